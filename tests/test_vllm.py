"""The plug-in for vLLM: the mini model gives the same answers from the same tokens as in transformers.

Needs vLLM, which `make test-vllm` brings; left out elsewhere. Engines run in this process, so that tests see
what the model selects. `test_vllm_server.py` starts one as users do.
"""

import gc
import json
import os
from importlib.metadata import entry_points

import pytest

pytest.importorskip("vllm", reason="vLLM: `make test-vllm` brings it")

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, EngineArgs, ModelRegistry, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm_checkpoint import write

import hero
from hero import mini
from hero.models.llava_next import pinpoints_of
from hero.vllm import MODELS, register
from hero.vllm.model import DroppingModel

RATIOS = (1.0, 0.5, 0.2)
# (width, height): on six grids, with and without padding, larger and smaller than the grid.
SIZES = ((144, 144), (96, 144), (130, 70), (48, 96), (37, 91), (300, 310))
QUESTIONS = tuple(asked.question for asked in mini.demo_questions())
GREEDY = SamplingParams(temperature=0, max_tokens=4, logprobs=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint."""
    return write(tmp_path_factory.mktemp("vllm") / "mini")


@pytest.fixture(scope="module")
def images():
    """The bundled scene, and parts of it, of different sizes."""
    scene = Image.open(mini.DEMO / "scene_1.png").convert("RGB")
    return [scene.resize(size) if max(size) > 144 else scene.crop((0, 0, *size)) for size in SIZES]


@pytest.fixture(scope="module")
def stock_model():
    return mini.load(relevance=False)


@pytest.fixture
def engine(folder):
    """Starts engines; the last one ends with the test."""
    started = []

    def start(options=None, *, path=folder, **arguments) -> LLM:
        stop()
        arguments = {"max_num_seqs": 8, "limit_mm_per_prompt": {"image": 8}, **arguments}
        if options is not None:
            arguments["hf_overrides"] = {"hero": options}
        started.append(LLM(str(path), dtype="float32", enforce_eager=True, max_model_len=1024, **arguments))
        return started[0]

    def stop():
        started.clear()
        gc.collect()
        cleanup_dist_env_and_memory()

    yield start
    stop()


def model_of(llm):
    """The model of an engine in this process."""
    [model] = llm.apply_model(lambda model: model)
    return model


def config_of(folder, options=None, **arguments):
    """The configuration of an engine that is not started."""
    if options is not None:
        arguments["hf_overrides"] = {"hero": options}
    return EngineArgs(str(folder), dtype="float32", max_model_len=1024, **arguments).create_engine_config()


def processor_of(folder, options=None, **arguments):
    return MULTIMODAL_REGISTRY.create_processor(config_of(folder, options, **arguments).model_config)


def processed(processor, images, **options):
    """What the front end makes of a prompt with images."""
    items = processor.info.parse_mm_data({"image": images})
    return processor("<image> " * len(images) + QUESTIONS[0], items, hf_processor_mm_kwargs=options)


def prompt_of(question, *images, **options):
    text = "<image> " * len(images) + question
    return {"prompt": text, "multi_modal_data": {"image": list(images)}, "mm_processor_kwargs": options}


def spied(llm):
    """The selections that the model of an engine makes from now on, in a list that grows."""
    stage, selections = model_of(llm).vision_stage, []
    select = stage.select

    def recorded(*arguments):
        selections.append(select(*arguments))
        return selections[-1]

    stage.select = recorded
    return selections


def answers(llm, prompts, sampling=GREEDY):
    """(token ids, their log-probabilities, prompt length) of each prompt."""
    found = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        tokens = list(output.outputs[0].token_ids)
        logprobs = [one[token].logprob for one, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        found.append((tokens, logprobs, len(output.prompt_token_ids)))
    return found


def expected_answers(loaded, asked, ratio, ratios=None):
    """The same of transformers with hero attached, one prompt at a time, and the selections."""
    found, selections = [], []
    ratios = [ratio] * len(asked) if ratios is None else ratios
    with hero.attach(loaded.model, loaded.processor, keep_ratio=ratio) as handle:
        for (question, *images), own in zip(asked, ratios, strict=True):
            text = "<image> " * len(images) + question
            options = {} if own == ratio else {"keep_ratio": own}
            inputs = loaded.processor(images=images, text=text, return_tensors="pt", **options)
            output = loaded.model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
            length = inputs["input_ids"].shape[1]
            tokens = output.sequences[0, length:].tolist()
            scores = [one[0].log_softmax(-1)[token].item() for one, token in zip(output.scores, tokens)]
            found.append((tokens, scores, length))
            selections.append(handle.last)
    return found, selections


def assert_same(found, expected):
    assert [one[0] for one in found] == [one[0] for one in expected]
    assert [one[2] for one in found] == [one[2] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one[1] == pytest.approx(other[1], abs=1e-3)


def asked_of(images):
    """(question, image) for every image, with different questions."""
    return [(QUESTIONS[number % len(QUESTIONS)], image) for number, image in enumerate(images)]


# --- exactness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
def test_answers_and_kept_tokens_are_those_of_transformers(ratio, engine, images, stock_model):
    """Six images of different sizes in one batch; then all of them in one prompt."""
    asked = asked_of(images)
    llm = engine({"keep_ratio": ratio})
    selections = spied(llm)
    found = answers(llm, [prompt_of(*one) for one in asked])
    expected, own = expected_answers(stock_model, asked, ratio)
    assert_same(found, expected)

    kept = [part.tolist() for one in selections for part in _per_image(one)]
    assert kept == [part.tolist() for one in own for part in _per_image(one)]
    config = hero.HeroConfig(keep_ratio=ratio)
    geometry = hero.Geometry(48, 8, pinpoints_of(stock_model.model.config))
    counts = [hero.count_tokens(config, image.size[::-1], geometry=geometry) for image in images]
    assert [len(one) for one in kept] == counts
    words = [len(stock_model.processor.tokenizer(question)["input_ids"]) for question, _ in asked]
    assert [one[2] for one in found] == [n + word for n, word in zip(counts, words, strict=True)]

    several = [(QUESTIONS[1], *images[:2]), (QUESTIONS[0], images[3], images[2], images[4])]
    assert_same(
        answers(llm, [prompt_of(*one) for one in several]), expected_answers(stock_model, several, ratio)[0]
    )


def _per_image(selection):
    """The index of each image's tokens, from its first crop."""
    patches, crop = selection.scores.shape[1], 0
    for layout, index in zip(selection.layout, selection.index.split(selection.lengths), strict=True):
        yield torch.where(index < 0, index, index - crop * patches)
        crop += layout.crops


@pytest.mark.parametrize("family", ["llava", "siglip"])
def test_other_families(family, engine, folder, images, tmp_path):
    """LLaVA-1.5, whose images are one crop; LLaVA-NeXT with SigLIP, whose patches receive attention."""
    path = write(tmp_path / "mini", family=family)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    loaded = mini.MiniModel(model, AutoProcessor.from_pretrained(path), None)
    asked = asked_of(images)
    llm = engine({"keep_ratio": 0.3}, path=path)
    selections = spied(llm)
    found = answers(llm, [prompt_of(*one) for one in asked])
    expected, own = expected_answers(loaded, asked, 0.3)
    assert_same(found, expected)
    kept = [part.tolist() for one in selections for part in _per_image(one)]
    assert kept == [part.tolist() for one in own for part in _per_image(one)]
    options = [{}, {"hero_keep_ratio": 0.6}]
    prompts = [prompt_of(*asked[0], **one) for one in options]
    assert_same(answers(llm, prompts), expected_answers(loaded, asked[:1] * 2, 0.3, [0.3, 0.6])[0])
    del llm
    stock = engine(path=path)
    assert type(model_of(stock)).__module__.startswith("vllm.model_executor.models.llava")
    assert_same(
        answers(stock, [prompt_of(*one) for one in asked[:2]]), expected_answers(loaded, asked[:2], 1.0)[0]
    )


def _record(model):
    """Make a model of another process keep the index of what it selects."""
    stage, model.kept = model.vision_stage, []
    select = stage.select

    def recorded(*arguments):
        selection = select(*arguments)
        model.kept.append(selection.index.tolist())
        return selection

    stage.select = recorded


def _recorded(model):
    return model.kept


def test_two_ranks_keep_the_same_tokens(engine, images, stock_model, monkeypatch):
    """Tensor parallelism over two processes: each has half of the heads of the language model."""

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to hand the spy to other processes
    asked = asked_of(images[:3])
    llm = engine({"keep_ratio": 0.2}, tensor_parallel_size=2, distributed_executor_backend="mp")
    llm.apply_model(_record)
    found = answers(llm, [prompt_of(*one) for one in asked])
    expected, own = expected_answers(stock_model, asked, 0.2)
    assert_same(found, expected)
    first, second = llm.apply_model(_recorded)
    assert first == second
    assert sum(map(len, first)) == sum(sum(one.lengths) for one in own)


def test_same_tokens_whatever_the_chunks(engine, images, stock_model):
    """The vision tower takes few crops at once, and prompts are divided among steps inside of an image."""
    asked = asked_of(images)
    llm = engine({"keep_ratio": 0.5, "max_crops": 6}, max_num_batched_tokens=64, max_num_seqs=3)
    selections = spied(llm)
    assert_same(
        answers(llm, [prompt_of(*one) for one in asked]), expected_answers(stock_model, asked, 0.5)[0]
    )
    crops = [sum(layout.crops for layout in one.layout) for one in selections]
    alone = [len(one.layout) == 1 for one in selections]
    assert all(n <= 6 or is_alone for n, is_alone in zip(crops, alone, strict=True))
    assert max(crops) > 6, "the largest image has more crops, and is encoded alone"


def test_crops_are_divided_by_image(engine, images):
    """Images that a step encodes together, in order: as many as fit, at least one."""
    llm = engine({"keep_ratio": 0.5, "max_crops": 12})
    selections = spied(llm)
    answers(llm, [prompt_of(QUESTIONS[0], *images)])
    crops = [[layout.crops for layout in one.layout] for one in selections]
    assert crops == [[10], [7], [7, 3], [3], [10]]


@pytest.mark.parametrize("prefixes", [False, True])
def test_a_repeated_image_is_encoded_once(prefixes, engine, images, stock_model):
    """It is found in the encoder's cache without a prefix cache, and in both with one."""
    twice = [(QUESTIONS[0], images[0]), (QUESTIONS[1], images[0])]
    expected, _ = expected_answers(stock_model, twice, 0.2)
    llm = engine({"keep_ratio": 0.2}, enable_prefix_caching=prefixes)
    selections = spied(llm)
    found = [answers(llm, [prompt_of(*one)])[0] for one in (*twice, twice[0])]
    assert_same(found, [*expected, expected[0]])
    assert len(selections) == 1


def test_prefix_cache_is_used(engine, images):
    llm = engine({"keep_ratio": 0.5}, enable_prefix_caching=True, block_size=32)
    prompt = prompt_of(QUESTIONS[0], images[0])
    first, second = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert second.num_cached_tokens > 100 > first.num_cached_tokens
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_preempted_requests_are_answered_alike(engine, images, stock_model):
    """The cache has room for some of the requests: others are stopped and computed again."""
    asked = [(question, image) for image in images[:3] for question in QUESTIONS]
    longer = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [prompt_of(*one) for one in asked]
    roomy = engine({"keep_ratio": 0.2}, max_num_seqs=9, enable_prefix_caching=False, disable_log_stats=False)
    whole = [output.outputs[0].token_ids[:2] for output in roomy.generate(prompts, longer, use_tqdm=False)]
    del roomy
    llm = engine(
        {"keep_ratio": 0.2},
        max_num_seqs=9,
        block_size=32,
        num_gpu_blocks_override=36,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    found = [output.outputs[0].token_ids[:2] for output in llm.generate(prompts, longer, use_tqdm=False)]
    [preempted] = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert preempted > 0
    expected, _ = expected_answers(stock_model, asked, 0.2)
    assert [list(one) for one in found] == [list(one) for one in whole] == [one[0][:2] for one in expected]


def test_text_without_images(engine, images):
    """Beside prompts with images; and where an engine serves text alone, without a vision tower."""
    text = {"prompt": QUESTIONS[0]}
    llm = engine({"keep_ratio": 0.2})
    [beside, _] = answers(llm, [text, prompt_of(QUESTIONS[0], images[0])])
    del llm
    llm = engine({"keep_ratio": 0.2}, limit_mm_per_prompt={"image": 0})
    assert not hasattr(model_of(llm), "vision_stage")
    assert_same(answers(llm, [text]), [beside])


def test_features_that_were_computed_ahead(engine, images):
    """They are used as they are, beside images."""
    llm = engine({"keep_ratio": 0.2}, enable_mm_embeds=True)
    inputs = processed(llm.llm_engine.renderer.get_mm_processor(), images[:1])["mm_kwargs"].get_data()
    with torch.inference_mode():
        [features] = model_of(llm).embed_multimodal(**inputs)
    ahead = {"prompt": f"<image> {QUESTIONS[0]}", "multi_modal_data": {"image": features[None]}}
    found = answers(llm, [prompt_of(QUESTIONS[0], images[0]), ahead])
    assert_same(found[:1], found[1:])


@pytest.mark.parametrize(
    "prefix", ["vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower."]
)
def test_spellings_of_the_parameters(prefix, engine, folder, images, tmp_path, stock_model):
    llm = engine({"keep_ratio": 0.2}, path=write(tmp_path / "mini", prefix))
    tower, own = model_of(llm).vision_tower.state_dict(), stock_model.model.model.vision_tower.state_dict()
    assert tower.keys() == own.keys()
    assert all(torch.equal(tower[name], own[name]) for name in own)


# --- without the override --------------------------------------------------------------------------------


def test_without_the_override_vllm_is_unchanged(engine, folder, images, stock_model):
    """vLLM's own class answers, from all tokens, as transformers does."""
    asked = asked_of(images)
    llm = engine()
    model = model_of(llm)
    assert type(model) is LlavaNextForConditionalGeneration
    assert_same(
        answers(llm, [prompt_of(*one) for one in asked]), expected_answers(stock_model, asked, 1.0)[0]
    )
    processor = processor_of(folder)
    assert [type(one).__module__ for one in (processor, processor.info)] == [
        "vllm.model_executor.models.llava_next"
    ] * 2
    assert config_of(folder).scheduler_config == config_of(folder).scheduler_config


def test_without_the_override_embeddings_are_those_of_vllm(engine):
    """vLLM derives a class from the registered one; the model is derived from its own all the same."""
    model = model_of(engine(runner="pooling", convert="embed"))
    assert isinstance(model, LlavaNextForConditionalGeneration)
    assert not isinstance(model, DroppingModel)


def test_all_tokens_are_those_of_vllm(engine, images):
    """At keep_ratio=1 the embeddings of an image are those of vLLM's own class, in the same order."""
    pixels = {}
    for options in (None, {"keep_ratio": 1}):
        llm = engine(options)
        inputs = llm.llm_engine.renderer.get_mm_processor()
        items = inputs.info.parse_mm_data({"image": images[:3]})
        data = inputs("<image> " * 3, items)["mm_kwargs"].get_data()
        with torch.inference_mode():
            pixels[options is None] = model_of(llm).embed_multimodal(**data)
        del llm
    for own, stock in zip(pixels[False], pixels[True], strict=True):
        torch.testing.assert_close(own, stock, atol=1e-4, rtol=1e-4)


# --- registration and options ----------------------------------------------------------------------------


def test_registration():
    """vLLM finds the plug-in, and loads it more than once in some processes."""
    [entry] = entry_points(group="vllm.general_plugins", name="hero")
    assert entry.load() is register
    register()
    before = [(ModelRegistry.models[name], MODELS_CONFIG_MAP[name]) for name in MODELS]
    register()
    assert [(ModelRegistry.models[name], MODELS_CONFIG_MAP[name]) for name in MODELS] == before
    assert all(model.module_name.startswith("hero.vllm.") for model, _ in before)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"keep_ratio": 2}, "keep_ratio"),
        ({"keep_ratio": "most"}, "keep_ratio"),
        ({"keep_ratio": 0.2, "keep_tokens": 100}, "keep_ratio, keep_tokens"),
        ({"keep": 0.2}, "keep"),
        ({"policy": "best"}, "policy"),
        ({"policy": "fastervlm", "alpha": 0.5}, "alpha"),
        ({"alpha": 0.5}, "relevance"),
        ({"policy": "cdpruner"}, "relevance"),
        ({"relevance": "openai/clip-vit-large-patch14-336"}, "relevance"),
        ({"second_pass": True}, "second_pass"),
        ({"allocation": "floor"}, "allocation"),
        ({"max_crops": 0}, "max_crops"),
        ({"tile_layers": [99]}, "tile_layers"),
        ({"block": 4}, "block"),
        (0.2, "expected a mapping"),
    ],
)
def test_bad_options_are_refused_at_the_start(options, name, folder):
    with pytest.raises(ValueError, match=rf"hf_overrides, hero: .*\b{name}\b"):
        config_of(folder, options)


def test_other_models_of_the_engine_are_refused(folder):
    with pytest.raises(ValueError, match=r"hf_overrides, hero: runner: expected 'generate'"):
        config_of(folder, {}, runner="pooling")
    with pytest.raises(
        ValueError,
        match=r"hero_keep_ratio: expected an option of a request",
    ):
        config_of(folder, {}, mm_processor_kwargs={"hero_keep_ratio": 0.5})


def test_unsupported_models_are_refused(folder, tmp_path):
    """With the override alone."""
    config = json.loads((folder / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    config_of(tmp_path, skip_tokenizer_init=True)
    with pytest.raises(
        ValueError, match=r"hf_overrides, hero: expected a model of .*LlavaNextFor.*, got 'Llama"
    ):
        config_of(tmp_path, {}, skip_tokenizer_init=True)


def test_policies_and_numbers_reach_the_encoder(engine, images, stock_model):
    options = {"policy": "uniform", "keep_tokens": 24, "tile_layers": [0.5]}
    llm = engine(options)
    encoder = model_of(llm).vision_stage.encoder
    assert encoder.config == hero.HeroConfig(**options)
    selections = spied(llm)
    [found] = answers(llm, [prompt_of(QUESTIONS[0], images[0])])
    assert selections[0].lengths == [24 + 18]


# --- scheduling ------------------------------------------------------------------------------------------


def test_counts_are_those_of_count_tokens(folder):
    """For many sizes: what the scheduler plans with is what the model will return."""
    info = processor_of(folder, {"keep_ratio": 0.3}).info
    config, geometry = hero.HeroConfig(keep_ratio=0.3), hero.Geometry(48, 8, info.geometry.tiling)
    for width in range(1, 400, 23):
        for height in range(1, 400, 29):
            expected = hero.count_tokens(config, (height, width), geometry=geometry)
            assert info.get_num_image_tokens(image_width=width, image_height=height) == expected
    stock = processor_of(folder).info
    whole = processor_of(folder, {"keep_ratio": 1}).info
    for size in SIZES:
        size = dict(zip(("image_width", "image_height"), size, strict=True))
        assert whole.get_num_image_tokens(**size) == stock.get_num_image_tokens(**size)


def test_a_step_encodes_about_as_many_images_as_without_hero(folder):
    """The budget shrinks as the largest image does: from 378 tokens to 18 + 162 + 18 at R = 0.5."""
    before = config_of(folder, max_num_batched_tokens=8192).scheduler_config
    after = config_of(folder, {"keep_ratio": 0.5}, max_num_batched_tokens=8192).scheduler_config
    assert before.max_num_encoder_input_tokens == 8192
    assert after.max_num_encoder_input_tokens == 8192 * 198 // 378
    small = config_of(
        folder, {"keep_ratio": 0.2}, max_num_batched_tokens=512, max_num_seqs=4
    ).scheduler_config
    assert small.max_num_encoder_input_tokens == 378, "a whole image fits, since a request may ask for it"
    tiny = config_of(folder, {"keep_ratio": 0.2}, max_num_batched_tokens=64, max_num_seqs=4).scheduler_config
    assert tiny.encoder_cache_size == tiny.max_num_encoder_input_tokens == 378
    with pytest.raises(ValueError, match="max_num_batched_tokens: expected at least 378"):
        config_of(folder, {}, max_num_batched_tokens=256, disable_chunked_mm_input=True)


@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_tokens_is_an_error(change, engine, images):
    """vLLM would drop a surplus without a word."""
    llm = engine({"keep_ratio": 0.2})
    data = processed(llm.llm_engine.renderer.get_mm_processor(), images[:2])["mm_kwargs"].get_data()
    model = model_of(llm)
    with torch.inference_mode():
        assert [len(one) for one in model.embed_multimodal(**data)] == data["hero_images"][:, -1].tolist()
        data["hero_images"][1, -1] += change
        with pytest.raises(RuntimeError, match=r"^hero kept \[89, 68\] tokens of images whose prompts"):
            model.embed_multimodal(**data)


# --- one request -----------------------------------------------------------------------------------------


def test_ratio_of_a_request(engine, images, stock_model):
    """In one batch, requests with ratios of their own and without; one image with two ratios."""
    asked = asked_of([images[0], images[0], images[1], images[0]])
    ratios = [0.2, 0.5, 1.0, 0.35]
    llm = engine({"keep_ratio": 0.2})
    selections = spied(llm)
    options = [{}, *({"hero_keep_ratio": ratio} for ratio in ratios[1:])]
    prompts = [prompt_of(*one, **own) for one, own in zip(asked, options, strict=True)]
    expected, own = expected_answers(stock_model, asked, 0.2, ratios)
    for _ in range(2):
        assert_same(answers(llm, prompts), expected)
    kept = [part.tolist() for one in selections for part in _per_image(one)]
    assert kept == [part.tolist() for one in own for part in _per_image(one)], "once each, then cached"


def test_any_ratio_can_be_scheduled(engine, images, stock_model):
    """A request keeps all tokens where the engine keeps few and steps are small."""
    llm = engine({"keep_ratio": 0.05}, max_num_batched_tokens=64, max_num_seqs=4)
    found = answers(llm, [prompt_of(QUESTIONS[0], images[0], hero_keep_ratio=1.0)])
    assert_same(found, expected_answers(stock_model, [(QUESTIONS[0], images[0])], 1.0)[0])


@pytest.mark.parametrize(
    "options", [{"hero_keep_ratio": 0}, {"hero_keep_ratio": "0.5"}, {"hero_policy": "uniform"}]
)
def test_bad_options_of_a_request(options, folder, images):
    [name] = options
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        processed(processor_of(folder, {}), images[:1], **options)


def test_options_that_change_the_crops_are_refused(folder, images):
    """A request that changes the image processor would end the engine, not just itself."""
    processor = processor_of(folder, {})
    with pytest.raises(ValueError, match=r"^mm_processor_kwargs: expected options that cut an image"):
        processed(processor, images[:1], crop_size=24)


def test_options_enter_the_hash(folder, images):
    """What tells images in vLLM's caches apart: image, ratio of the request, options of the engine."""

    def key(options, image=images[0], **own):
        return processed(processor_of(folder, options), [image], **own)["mm_hashes"]["image"][0]

    engines = (None, {}, {"keep_ratio": 0.5}, {"policy": "uniform"}, {"keep_tokens": 30})
    keys = [key(options) for options in engines]
    keys += [key({}, images[1]), key({}, hero_keep_ratio=0.5), key({}, hero_keep_ratio=0.2)]
    assert len(set(keys)) == len(keys)
    assert key({}) == key({"keep_ratio": 0.2}) == key({"max_crops": 2}) == keys[1]


def test_an_image_is_the_same_beside_others(folder, images):
    """The image processor pads a batch to the most crops; caches keep each image by itself."""
    processor = processor_of(folder, {})
    together = processed(processor, images)["mm_kwargs"]["image"]
    for image, item in zip(images, together, strict=True):
        [alone] = processed(processor, [image])["mm_kwargs"]["image"]
        assert item.keys() == alone.keys()
        for name in item:
            assert torch.equal(item[name].data, alone[name].data)
