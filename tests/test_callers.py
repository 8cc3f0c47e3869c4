"""What callers do to a model: each gives the value of a fresh or a stock run, or an error by name."""

import copy
import inspect
import io
import pickle

import accelerate
import peft
import pytest
import torch
from independent import CACHE, FORWARD, ONE, tiny_clip, tiny_image, tiny_model, tiny_processor, tiny_tokenizer
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.generation import LogitsProcessor, StoppingCriteria, TextStreamer

import hero
from hero import calls

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def batch(processor=None, text=ONE, size=(120, 90), seed=0):
    return (processor or tiny_processor())(
        images=tiny_image(*size, seed), text=text, padding=True, return_tensors="pt"
    )


def stock_prompts(model, **options):
    """hero attached to the model alone: stock prompts are shortened."""
    return hero.attach(model, tokenizer=tiny_tokenizer(), **{"keep_ratio": 0.2, **options})


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def wanted(model):
    """The logits of :func:`batch` at R = 0.2."""
    with stock_prompts(model):
        return logits(model, batch())


# --- parts of the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["load_state_dict", "setattr"])
def test_a_newline_put_in_later_is_used(model, wanted, how):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["model.image_newline"] += 5
    with stock_prompts(model):
        if how == "setattr":
            model.model.image_newline = nn.Parameter(weights["model.image_newline"])
        else:
            model.load_state_dict(weights, assign=True)
        got = logits(model, batch())
        model(**batch()).logits.sum().backward()
    assert not torch.allclose(got, wanted, atol=1e-2)
    assert model.model.image_newline.grad.abs().sum() > 0
    fresh = tiny_model()
    fresh.load_state_dict(weights)
    with stock_prompts(fresh):
        torch.testing.assert_close(logits(fresh, batch()), got)


@pytest.mark.parametrize("name", ["vision_tower", "multi_modal_projector"])
def test_a_part_put_in_later_is_refused(model, name):
    with stock_prompts(model):
        setattr(model.model, name, copy.deepcopy(getattr(tiny_model(1).model, name)))
        with pytest.raises(RuntimeError, match=r"(vision_tower|projector) was replaced after attach"):
            logits(model, batch())


@pytest.mark.parametrize("owner", ["model", "processor"])
def test_grids_that_change_later_are_refused(model, owner):
    processor = tiny_processor()
    place = model.config if owner == "model" else processor.image_processor
    with hero.attach(model, processor, keep_ratio=0.2):
        place.image_grid_pinpoints = place.image_grid_pinpoints[:2]
        with pytest.raises(RuntimeError, match="changed after attach: attach again"):
            logits(model, batch(processor))


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_an_offloaded_model(model, wanted, tmp_path, to):
    if to == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    with stock_prompts(model):
        torch.testing.assert_close(logits(model, batch()), wanted)
        assert model.generate(**batch(), **GREEDY).shape[1] == batch()["input_ids"].shape[1] + 4
    clip = tiny_clip()
    with pytest.raises(ValueError, match="relevance: expected weights that can be compared"):
        stock_prompts(model, relevance=hero.ClipRelevance(clip, tiny_tokenizer()))
    with stock_prompts(model, relevance=hero.ClipRelevance(clip, tiny_tokenizer(), second_pass=True)):
        assert logits(model, batch()).isfinite().all()


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before attach", "after attach", "layer by layer"])
def test_a_sharded_model(model, wanted, mesh, when):
    fully_shard = torch.distributed.fsdp.fully_shard
    if when == "layer by layer":
        for layer in model.model.vision_tower.encoder.layers:
            fully_shard(layer, mesh=mesh)
    if when != "after attach":
        fully_shard(model, mesh=mesh)
    with stock_prompts(model):
        if when == "after attach":
            fully_shard(model, mesh=mesh)
        output = model(**batch()).logits
        output.sum().backward()
        torch.testing.assert_close(output.detach(), wanted, atol=1e-4, rtol=1e-4)
        assert model.model.image_newline.grad.full_tensor().abs().sum() > 0


def test_copies_of_wrappers(model, wanted):
    """They are wrappers again, around an attached copy."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    with hero.attach(wrapped.base_model.model, keep_ratio=0.3):
        copied = copy.deepcopy(wrapped)
        assert type(copied) is type(wrapped)
        inner = copied.base_model.model
        assert inner is not model and inner._hero is not model._hero and inner._hero.model is inner
        assert torch.equal(inner.generate(**batch(), **GREEDY), model.generate(**batch(), **GREEDY))
        compiled = torch.compile(model)
        assert type(copy.deepcopy(compiled)) is type(compiled)


def test_peft(model, wanted):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["vision_tower"])
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"attach to its \.base_model\.model"):
        hero.attach(wrapped)
    inner = wrapped.base_model.model
    with stock_prompts(inner):
        output = wrapped(**batch()).logits
        torch.testing.assert_close(output.detach(), wanted)
        output.sum().backward()
        tower = inner.model.vision_tower.modules_to_save["default"]
        assert tower.encoder.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    other = tiny_model()
    with stock_prompts(other):
        peft.get_peft_model(other, config)
        with pytest.raises(RuntimeError, match="vision_tower was replaced after attach"):
            logits(other, batch())


# --- hooks -------------------------------------------------------------------------------------------------

PLACES = ("layers.5", "layers.5.self_attn", "layers.5.mlp", "layers.5.layer_norm1", "layers.0")


@pytest.mark.parametrize("kind", ["forward", "pre", "global"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_see_what_they_see_in_the_stock_model(model, place, kind):
    module, seen = model.model.vision_tower.encoder.get_submodule(place), []

    def hook(this, given, *output):
        if this is module:
            seen.append([tuple(one.shape) for one in (*given, *output) if isinstance(one, torch.Tensor)])

    register = {"forward": module.register_forward_hook, "pre": module.register_forward_pre_hook}
    registered = register.get(kind, nn.modules.module.register_module_forward_hook)(hook)
    logits(model, batch())
    stock, seen[:] = list(seen), []
    with stock_prompts(model):
        logits(model, batch())
    registered.remove()
    assert stock and seen == stock


def test_transformers_own_hooks_do_not_run_the_whole_tower(monkeypatch, model):
    model.model.vision_tower(
        torch.zeros(1, 3, 56, 56), output_hidden_states=True
    )  # leaves hooks on all layers
    layers, ran = model.model.vision_tower.encoder.layers, []
    stock = type(layers[0]).forward
    monkeypatch.setattr(type(layers[0]), "forward", lambda *args, **kw: ran.append(1) or stock(*args, **kw))
    with stock_prompts(model):
        logits(model, batch())
    assert len(ran) == len(layers) - 1  # of the last, one row is computed


def test_fused_attention_with_gradient_checkpointing(model):
    def gradient(checkpointing):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with stock_prompts(model, attention="fused"):
            model(**batch()).logits.square().sum().backward()
        weight = model.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight
        grad, weight.grad = weight.grad.clone(), None
        return grad

    torch.testing.assert_close(gradient(True), gradient(False))


# --- prompts of stock length -------------------------------------------------------------------------------

ARGUMENTS = {
    "shortened": "input_ids attention_mask position_ids labels",
    "counted": "logits_to_keep past_key_values cache mm_encoder_outputs inputs_embeds stopping_criteria "
    "logits_processor prefix_allowed_tokens_fn streamer generation_config inputs",
    "read": "pixel_values image_sizes vision_feature_layer vision_feature_select_strategy",
    "no positions of the prompt": "self kwargs use_cache synced_gpus assistant_model negative_prompt_ids "
    "negative_prompt_attention_mask custom_generate return_dict output_attentions output_hidden_states "
    "use_model_defaults cache_position tokenizer trust_remote_code",
}


@pytest.mark.parametrize("function", ["forward", "inner", "generate"])
def test_every_argument_is_known(model, function):
    """A new argument of transformers must be shortened with the prompt, refused, or shown to need neither."""
    stock = {"forward": type(model).forward, "inner": type(model.model).forward}
    names = inspect.signature(stock.get(function, GenerationMixin.generate)).parameters
    assert set(names) <= set(" ".join(ARGUMENTS.values()).split())


@pytest.mark.parametrize("place", ["model", "config", "argument"])
@pytest.mark.parametrize("limit", ["max_length", "min_length"])
def test_limits_mean_the_callers_prompt(model, place, limit):
    inputs = batch()
    length = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "max_new_tokens": 9} if limit == "min_length" else {"do_sample": False}
    model.generation_config.eos_token_id = 5 if limit == "min_length" else None
    if place == "model":
        setattr(model.generation_config, limit, length + 4)
    elif place == "argument":
        options[limit] = length + 4
    else:
        config = copy.deepcopy(model.generation_config)
        setattr(config, limit, length + 4)
        options["generation_config"] = config
    with stock_prompts(model):
        answer = model.generate(**inputs, **options)[0, length:]
    assert len(answer) == 4 if limit == "max_length" else len(answer) >= 4


def test_positions_to_keep(model, wanted):
    inputs = batch()
    last = inputs["input_ids"].shape[1] - 1
    with stock_prompts(model), torch.no_grad():
        got = model(**inputs, logits_to_keep=torch.tensor([0, last])).logits
        torch.testing.assert_close(got, wanted[:, [0, -1]])
        dropped = int((inputs["input_ids"][0] == 4).nonzero()[-1])
        with pytest.raises(ValueError, match=r"^logits_to_keep: expected positions that are kept"):
            model(**inputs, logits_to_keep=torch.tensor([dropped]))


def test_shifted_labels(model):
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 4, -100)
    shifted = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], dim=1)
    with stock_prompts(model), torch.no_grad():
        loss = model(**inputs, labels=labels).loss
        again = model(**inputs, labels=labels, shift_labels=shifted).loss
    torch.testing.assert_close(again, loss)


@pytest.mark.skipif("mm_encoder_outputs" not in FORWARD, reason="this transformers has no such argument")
def test_features_computed_ahead(model, wanted):
    inputs = dict(batch())
    with stock_prompts(model), torch.no_grad():
        answer = model.generate(**inputs, **GREEDY)
        features = model.get_image_features(
            inputs.pop("pixel_values"), inputs["image_sizes"], return_dict=True
        )
        given = {"mm_encoder_outputs": {"image": features}}
        torch.testing.assert_close(model(**inputs, **given).logits, wanted)
        assert torch.equal(model.generate(**inputs, **given, **GREEDY), answer)


def test_embeddings(model, wanted):
    short = tiny_processor()
    with hero.attach(model, short, keep_ratio=0.2), torch.no_grad():
        for processor, fits in ((short, True), (tiny_processor(), False)):
            inputs = dict(batch(processor))
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
            if fits:
                torch.testing.assert_close(model(**inputs).logits, wanted)
            else:
                with pytest.raises(ValueError, match=r"^inputs_embeds: expected"):
                    model(**inputs)


def test_what_cannot_be_shortened_is_refused(model):
    inputs = batch()
    length = inputs["input_ids"].shape[1]
    with stock_prompts(model):
        with pytest.raises(ValueError, match=r"^position_ids: expected None"):
            model(**inputs, position_ids=torch.arange(length)[None] * 2)
        with pytest.raises(ValueError, match=r"^something: expected input_ids with as many"):
            model(**inputs, something=torch.zeros(1, length))
        with pytest.raises(ValueError, match=r"^input_ids: expected a tensor \[B, L\]"):
            model(**{**inputs, "input_ids": inputs["input_ids"][0]})
        with pytest.raises(ValueError, match=r"^image_sizes: expected"):
            model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])


def test_other_ways_to_call(model, wanted):
    inputs = batch()
    with stock_prompts(model), torch.no_grad():
        torch.testing.assert_close(model.forward(**inputs).logits, wanted)
        hidden = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), wanted)
        inputs["attention_mask"][:, :5] = 0  # stock fills placeholders that the mask covers
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.skipif("mm_encoder_outputs" not in FORWARD, reason="the stock model of this transformers fails")
def test_no_images(model):
    ids = tiny_tokenizer()("what is this", return_tensors="pt")
    given = {"pixel_values": torch.zeros(0, 5, 3, 56, 56), "image_sizes": torch.zeros(0, 2, dtype=torch.long)}
    stock = logits(model, {**ids, **given})
    with stock_prompts(model):
        torch.testing.assert_close(logits(model, {**ids, **given}), stock)


class Recorder(StoppingCriteria, LogitsProcessor, TextStreamer):
    """Notes the prompt that it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, ids, scores):
        self.seen.append(ids)
        return scores if self.processes else torch.zeros(len(ids), dtype=torch.bool)

    def put(self, value):
        self.seen.append(value)

    def end(self):
        pass


SHOWN = ("stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn")
SEVERAL = [(name, sequences) for name in SHOWN for sequences in (1, "beams", "samples")]


@pytest.mark.parametrize(("name", "sequences"), [*SEVERAL, ("streamer", 1)])
def test_criteria_processors_and_streamers_see_the_callers_prompt(model, name, sequences):
    many = {"beams": {"num_beams": 2}, "samples": {"do_sample": True, "num_return_sequences": 2}}
    inputs, recorder = batch(), Recorder()
    recorder.processes = name == "logits_processor"
    given = recorder if name == "streamer" else [recorder]
    if name == "prefix_allowed_tokens_fn":
        given = lambda row, ids: recorder.seen.append(ids[None]) or list(range(20))  # noqa: E731
    with stock_prompts(model):
        model.generate(**inputs, **{**GREEDY, **many.get(sequences, {}), name: given})
    prompt = inputs["input_ids"]
    assert recorder.seen
    for ids in recorder.seen[:1] if name == "streamer" else recorder.seen:
        assert torch.equal(ids[:, : prompt.shape[1]], prompt.expand(len(ids), -1))


def test_padding_is_inferred_as_in_the_stock_model(model):
    processor = tiny_processor()
    sizes = (120, 90), (60, 170)
    images = [tiny_image(*size, seed) for seed, size in enumerate(sizes)]
    inputs = processor(images=images, text=[ONE, ONE], padding=True, return_tensors="pt")
    assert not inputs["attention_mask"].all()
    with stock_prompts(model):
        answer = model.generate(**inputs, **GREEDY)
        del inputs["attention_mask"]
        assert torch.equal(model.generate(**inputs, **GREEDY), answer)


def test_prefill_in_chunks_is_refused_where_it_drops_images(monkeypatch, model):
    monkeypatch.setattr(calls, "_transformers_version", lambda: (5, 22))
    with stock_prompts(model), pytest.raises(ValueError, match=r"^prefill_chunk_size: expected None"):
        model.generate(**batch(), **GREEDY, prefill_chunk_size=8)


# --- caches ------------------------------------------------------------------------------------------------


def turns(first, *more):
    """The ids of a conversation so far, followed by other prompts."""
    ids = torch.cat([first, *(one["input_ids"] for one in more)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


CHUNKS = [{}, {"prefill_chunk_size": 8}] if "mm_encoder_outputs" in FORWARD else [{}]


@pytest.mark.parametrize("chunks", CHUNKS, ids=["whole", "chunks"][: len(CHUNKS)])
@pytest.mark.parametrize("which", ["patched", "stock"])
def test_a_second_turn(model, which, chunks):
    """With the cache, however it was filled, a new image or none, as without it."""
    processor = tiny_processor()
    with hero.attach(model, processor if which == "patched" else None, keep_ratio=0.2):
        one, two = batch(processor), batch(processor, size=(60, 170), seed=1)
        cache = DynamicCache()
        first = model.generate(**one, **GREEDY, **chunks, **{CACHE: cache})
        words = tiny_tokenizer()("and that one ?", return_tensors="pt")
        images = {name: torch.cat([one[name], two[name]]) for name in ("image_sizes",)}
        most = max(one["pixel_values"].shape[1], two["pixel_values"].shape[1])
        padded = [
            nn.functional.pad(each["pixel_values"], (0, 0) * 3 + (0, most - each["pixel_values"].shape[1]))
            for each in (one, two)
        ]
        for more, new in ((words, {}), (two, {name: two[name] for name in ("pixel_values", "image_sizes")})):
            whole = turns(first, more)
            all_ = (
                {"pixel_values": torch.cat(padded), **images}
                if new
                else {name: one[name] for name in ("pixel_values", "image_sizes")}
            )
            fresh = model.generate(**whole, **all_, **GREEDY)
            again = model.generate(**whole, **new, **GREEDY, **{CACHE: copy.deepcopy(cache)})
            assert torch.equal(again, fresh)


def test_an_interrupted_call_is_noted_too(model):
    class Interrupt(StoppingCriteria):
        def __call__(self, ids, scores):
            raise KeyboardInterrupt

    inputs, cache = batch(), DynamicCache()
    words = tiny_tokenizer()("and that one ?", return_tensors="pt")
    with stock_prompts(model):
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **GREEDY, stopping_criteria=[Interrupt()], **{CACHE: cache})
        whole = turns(inputs["input_ids"], words)
        again = model.generate(**whole, **GREEDY, **{CACHE: cache})
        images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
        assert torch.equal(again, model.generate(**whole, **images, **GREEDY))


def test_a_cache_of_another_selection_is_refused(model):
    inputs = batch()
    caches = [DynamicCache() for _ in range(2)]
    first = model.generate(**inputs, **GREEDY, **{CACHE: caches[0]})  # by the stock model
    with stock_prompts(model):
        model.generate(**inputs, **GREEDY, **{CACHE: caches[1]})
    turn = {
        **turns(first, tiny_tokenizer()("and ?", return_tensors="pt")),
        "image_sizes": inputs["image_sizes"],
    }
    stock = model.generate(
        **turns(first, tiny_tokenizer()("and ?", return_tensors="pt")),
        **GREEDY,
        **{CACHE: copy.deepcopy(caches[0])},
    )
    with stock_prompts(model, keep_ratio=0.5):
        for cache, message in zip(
            caches, ("pixel_values: expected the images", "past_key_values: expected ")
        ):
            with pytest.raises(ValueError, match=message):
                model.generate(**turn, **GREEDY, **{CACHE: cache})
    with stock_prompts(model, keep_ratio=1.0):
        assert torch.equal(model.generate(**turn, **GREEDY, **{CACHE: caches[0]}), stock)


def test_a_cropped_cache_forgets_its_images(model):
    """Cropped to before the turn of an image it takes the image again; cropped within it, it is refused."""
    inputs, cache = batch(), DynamicCache()
    images = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes")}
    words = tiny_tokenizer()("what is it ?", return_tensors="pt")
    with stock_prompts(model):
        first = model.generate(**words, **GREEDY, **{CACHE: cache})
        length = cache.get_seq_length()
        turn = turns(first, inputs)
        wanted = model.generate(**turn, **images, **GREEDY, **{CACHE: cache})
        cache.crop(length - cache.get_seq_length())
        assert torch.equal(model.generate(**turn, **images, **GREEDY, **{CACHE: cache}), wanted)
        cache.crop(length + 3 - cache.get_seq_length())
        with pytest.raises(
            ValueError, match=rf"^past_key_values: .* to {length} positions.* to {length + 3}$"
        ):
            model.generate(**turn, **images, **GREEDY, **{CACHE: cache})


# --- results, copies, removal ------------------------------------------------------------------------------


def test_features_have_the_stock_members(model):
    given = batch()["pixel_values"], batch()["image_sizes"]
    with torch.no_grad():
        stock = model.get_image_features(*given, return_dict=False)
        with stock_prompts(model, keep_ratio=1.0):
            ours = model.get_image_features(*given, return_dict=False)
            config = model.model.vision_tower.config
            assert config is model.config.vision_config and config._attn_implementation == "sdpa"
    assert [type(one) for one in ours] == [type(one) for one in stock]
    torch.testing.assert_close(ours[0], stock[0])
    torch.testing.assert_close(ours[1][0], stock[1][0])


def test_copies(wanted):
    model, processor, file = tiny_model(), tiny_processor(), io.BytesIO()
    stock = batch(processor)["input_ids"].shape[1]
    plain = logits(tiny_model(), batch())  # transformers' hooks after a stock call cannot be pickled
    with hero.attach(model, processor, keep_ratio=0.2):
        attached = batch(processor)["input_ids"].shape[1]
        torch.save(model, file)
        assert batch(pickle.loads(pickle.dumps(processor)))["input_ids"].shape[1] == stock
        assert batch(copy.deepcopy(processor))["input_ids"].shape[1] == attached < stock
        torch.testing.assert_close(logits(copy.deepcopy(model), batch()), wanted)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded, batch()), plain)
    assert not any("_hero" in name for module in loaded.modules() for name in vars(module))


def test_detach(model):
    processor, plain = tiny_processor(), logits(model, batch())
    before = [set(vars(one)) for one in (model, model.model, processor)]
    hero.attach(model, processor, keep_ratio=0.2)
    with pytest.raises(ValueError, match=r"call hero\.detach\(model\) first"):
        hero.attach(model, processor)
    hero.detach(processor)
    assert batch(processor)["input_ids"].shape == batch()["input_ids"].shape
    layers = model.model.vision_tower.encoder.layers
    layers[2].self_attn = copy.deepcopy(tiny_model().model.vision_tower.encoder.layers[2].self_attn)
    for _ in range(2):
        hero.detach(model)
    assert torch.equal(logits(model, batch()), plain)
    assert [set(vars(one)) for one in (model, model.model, processor)] == before
    hero.HeroVisionEncoder(model.model.vision_tower)  # lost, as by a cell that is run twice
    with pytest.raises(ValueError, match=r"vision_tower: expected an encoder without hero attached"):
        hero.HeroVisionEncoder(model.model.vision_tower)
    hero.detach(model.model.vision_tower)
    hero.attach(model).remove()
    for other in (nn.Linear(1, 1), None):
        with pytest.raises(ValueError, match=r"^model: expected a supported model"):
            hero.detach(other)


def test_a_wrapper_on_generate_is_called(model):
    called, stock = [], model.generate
    model.generate = lambda *args, **kwargs: called.append(1) or stock(*args, **kwargs)
    with stock_prompts(model):
        model.generate(**batch(), **GREEDY)
    assert called and model.generate(**batch(), **GREEDY) is not None and len(called) == 2


def test_wrappers_and_replicas(model):
    for wrapped, place in ((torch.compile(model), "_orig_mod"), (nn.DataParallel(model), "module")):
        with pytest.raises(ValueError, match=rf"attach to its \.{place}"):
            hero.attach(wrapped)
    with stock_prompts(model), pytest.raises(RuntimeError, match=r"torch.nn.DataParallel"):
        model._replicate_for_data_parallel()


def test_messages(model):
    with pytest.raises(TypeError) as caught:
        hero.count_tokens(model.config, (10, 10))
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    processor = tiny_processor()
    processor.num_additional_image_tokens = 0
    with pytest.raises(ValueError, match="num_additional_image_tokens=1"):
        hero.attach(model, processor)
    with hero.attach(model, keep_ratio=0.2) as handle:
        assert repr(handle).startswith("<hero.Handle of LlavaNextForConditionalGeneration: HeroConfig(keep_")
    assert "removed" in repr(handle)
    inputs = batch()
    inputs["pixel_values"][0, 0, 0, 0, 0] = float("nan")
    with (
        stock_prompts(model),
        pytest.raises(ValueError, match="pixel_values: expected finite numbers, got others in image 0"),
    ):
        logits(model, inputs)
    with stock_prompts(model, keep_ratio=0.001), pytest.warns(UserWarning, match="keeps no patches"):
        logits(model, batch())
