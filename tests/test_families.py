"""Models beside LLaVA-NeXT with CLIP, which test_llava_next.py has, against the independent reference."""

import functools

import independent_families
import numpy as np
import pytest
import torch
import transformers
from independent import CACHE, tiny_clip, tiny_image, tiny_tokenizer
from independent_families import (
    batch_of,
    cases_of,
    independent_of,
    tiny_model,
    tiny_processor,
)
from test_llava_next import LAYERS, PROCESSORS, assert_rows_equal, config_of, rule_of
from transformers import SiglipVisionModel
from transformers.cache_utils import DynamicCache
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import hero
from hero import cli
from hero.models import tower_for

FAMILIES = {
    "llava_next, siglip": {"family": "llava_next", "tower": "siglip"},
    "llava_next, siglip, several layers": {
        "family": "llava_next",
        "tower": "siglip",
        "vision_feature_layer": [-5, -2, -1],
    },
    "llava": {"family": "llava"},
    "llava, siglip": {"family": "llava", "tower": "siglip"},
    **independent_families.FAMILIES,
}
RUN_PER_CROP = ("smolvlm", "idefics3")
RULES = {
    **{f"{ratio}": {"keep_ratio": ratio} for ratio in (0.1, 0.3, 0.9)},
    "floor": {"keep_ratio": 0.3, "allocation": "floor"},
    "15 tokens": {"keep_tokens": 15},
    "entropy": {"keep_ratio": 0.3, "weights": {"density": 0.2, "saliency": 0.3, "entropy": 0.5}},
}


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


FAST = ("llava_next, siglip", "llava", "llava_onevision", "internvl", "smolvlm")
NAMES = [name if name in FAST else slow(name) for name in FAMILIES]
FAST_CASES = ("two sizes", "two images in a prompt", "resized and not", "nested")
NAMES_AND_CASES = [
    pytest.param(name, case, marks=[] if name in FAST and case in FAST_CASES else pytest.mark.slow)
    for name, options in FAMILIES.items()
    for case in cases_of(options["family"])
]
FEW_RULES = [rule if rule in ("0.3", "floor") else slow(rule) for rule in RULES]


@functools.cache
def model_of(name):
    return tiny_model(**FAMILIES[name])


@functools.cache
def reference_of(name):
    return independent_of(model_of(name))


def processor_or_skip(*args, **options):
    """:func:`tiny_processor`; skips where transformers cannot build it without torchvision."""
    try:
        return tiny_processor(*args, **options)
    except ImportError as problem:
        if "requires the Torchvision library" not in str(problem):
            raise
        pytest.skip(f"transformers {transformers.__version__} wants torchvision for this processor")


def processor_of(name):
    options = independent_families.PROCESSOR_OPTIONS.get(name, {})
    return processor_or_skip(FAMILIES[name]["family"], FAMILIES[name].get("tower", "clip"), **options)


def batch(name, processor, case):
    return batch_of(processor, FAMILIES[name]["family"], case)


def attached(name, which, **options):
    processor = processor_of(name)
    if which == "patched":
        return hero.attach(model_of(name), processor, config=config_of(options)), processor
    return hero.attach(model_of(name), config=config_of(options), tokenizer=processor.tokenizer), processor


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize(("name", "case"), NAMES_AND_CASES)
def test_everything_kept_is_the_stock_model(name, case, which):
    model, inputs = model_of(name), batch(name, processor_of(name), case)
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        stock = model(**inputs).logits
        answer = model.generate(**inputs, **options)
        handle, processor = attached(name, which, keep_ratio=1.0)
        with handle:
            ours = batch(name, processor, case)
            assert torch.equal(ours["input_ids"], inputs["input_ids"])
            torch.testing.assert_close(model(**ours).logits, stock, rtol=0, atol=1e-6)
            assert handle.last is not None
            assert torch.equal(model.generate(**ours, **options), answer)
        assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("rule", FEW_RULES)
@pytest.mark.parametrize(("name", "case"), NAMES_AND_CASES)
def test_selection_and_logits(name, case, rule, which):
    inputs = batch(name, processor_of(name), case)
    rows, results, _ = reference_of(name)._rows(inputs, rule_of(RULES[rule]), None, None)
    logits = [reference_of(name)._forward(row.embeds) for row in rows]
    handle, processor = attached(name, which, **RULES[rule])
    with handle, torch.no_grad():
        output, last = model_of(name)(**batch(name, processor, case)).logits, handle.last
    assert last.index.tolist() == [place for result in results for place in result.index]
    assert last.budgets.tolist() == [budget for result in results for budget in result.budgets]
    assert last.lengths == [len(result.index) for result in results]
    scores = torch.tensor([score for result in results for score in result.scores])
    torch.testing.assert_close(last.scores, scores, rtol=0, atol=2e-6)
    assert_rows_equal(output, logits, 5e-5)


GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "static cache": {"cache_implementation": "static"},
}


def mixes_up_beams(family):
    """Whether this version of transformers gives images to the wrong beams, so that hero refuses them."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return version < (5, 19) if family == "internvl" else version == (5, 18) and family in RUN_PER_CROP


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("how", [how if how in ("greedy", "beams") else slow(how) for how in GENERATIONS])
@pytest.mark.parametrize("case", ["two sizes", slow("one image")])
@pytest.mark.parametrize("name", NAMES)
def test_generation(name, case, how, which):
    options = {"do_sample": False, "max_new_tokens": 5, **GENERATIONS[how]}
    reference = reference_of(name)
    reference.model.generation_config = model_of(name).generation_config
    given = reference.inputs(batch(name, processor_of(name), case), rule_of({"keep_ratio": 0.3}))
    torch.manual_seed(0)
    wanted = reference.model.generate(
        inputs_embeds=given["inputs_embeds"], attention_mask=given["attention_mask"], **options
    )
    handle, processor = attached(name, which, keep_ratio=0.3)
    with handle:
        inputs = batch(name, processor, case)
        if how == "beams" and mixes_up_beams(FAMILIES[name]["family"]):
            with pytest.raises(ValueError, match=r"^num_beams, num_return_sequences: expected 1 for these"):
                model_of(name).generate(**inputs, **options)
            return
        torch.manual_seed(0)
        output = model_of(name).generate(**inputs, **options)
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == wanted.tolist()


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name, which):
    inputs = batch(name, processor_of(name), "one image")
    inputs["labels"] = inputs["input_ids"].clone()
    wanted = reference_of(name).loss(inputs, rule_of({"keep_ratio": 0.3}))
    handle, processor = attached(name, which, keep_ratio=0.3)
    model = model_of(name)
    with handle:
        ours = batch(name, processor, "one image")
        loss = model(**ours, labels=ours["input_ids"].clone()).loss
        loss.backward()
    assert float(loss) == pytest.approx(wanted, abs=1e-5)
    tower = handle.encoder.vision_tower
    weight = next(value for name, value in tower.named_parameters() if name.endswith("q_proj.weight"))
    assert weight.grad.abs().sum() > 0
    model.zero_grad()


def prompt_of(name, processor, text, *images, **kwargs):
    images = [list(images)] if FAMILIES[name]["family"] in RUN_PER_CROP else list(images)
    text = [text.replace("<image>", processor.image_token)]
    return processor(images=images, text=text, return_tensors="pt", **kwargs)


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("name", NAMES)
def test_a_second_turn(name, which):
    """With the cache, and a new image, as without it."""
    model, options = model_of(name), {"max_new_tokens": 4, "do_sample": False}
    handle, processor = attached(name, which, keep_ratio=0.3)
    words = processor.tokenizer("and that one ?", return_tensors="pt")["input_ids"]
    with handle:
        one, image = tiny_image(120, 90, 0), tiny_image(70, 60, 5)
        first = prompt_of(name, processor, "<image> what is this ?", one)
        more = prompt_of(name, processor, "<image> describe", image)
        cache = DynamicCache()
        answer = model.generate(**first, **options, **{CACHE: cache})
        turn = torch.cat([answer, words], dim=1)
        mask = torch.ones_like(turn)
        again = model.generate(input_ids=turn, attention_mask=mask, **options, **{CACHE: cache})
        images = {key: first[key] for key in first if key not in ("input_ids", "attention_mask")}
        assert torch.equal(again, model.generate(input_ids=turn, attention_mask=mask, **images, **options))
        turn = torch.cat([again, more["input_ids"]], dim=1)
        mask = torch.ones_like(turn)
        new = {key: more[key] for key in images}
        last = model.generate(input_ids=turn, attention_mask=mask, **new, **options, **{CACHE: cache})
        whole = prompt_of(name, processor, "<image> and <image>", one, image)
        images = {key: whole[key] for key in images}
        if "batch_num_images" in images:  # both are tiled, as in turns of their own
            images["batch_num_images"] = torch.tensor([1, 1])
        assert torch.equal(last, model.generate(input_ids=turn, attention_mask=mask, **images, **options))


@pytest.mark.parametrize("name", NAMES)
def test_processor_counts(name):
    """``count_tokens``, the processor's two counts and the model's tokens are the same."""
    stock, sizes = processor_of(name), ((120, 90), (30, 200), (56, 56))
    handle, processor = attached(name, "patched", keep_ratio=0.3)
    with handle, torch.no_grad():
        for size in sizes:
            before, inputs = (
                prompt_of(name, one, "<image>", tiny_image(*size)) for one in (stock, processor)
            )
            count = int((inputs["input_ids"] == handle.image_token_id).sum())
            assert count == handle.count_tokens(size)
            model_of(name)(**inputs)
            assert handle.last.lengths == [count]
            if not hasattr(stock, "_get_num_multimodal_tokens"):  # SmolVLM's
                continue
            [planned] = processor._get_num_multimodal_tokens([size])["num_image_tokens"]
            [full] = stock._get_num_multimodal_tokens([size])["num_image_tokens"]
            full_count = int((before["input_ids"] == handle.image_token_id).sum())
            assert full - planned == full_count - count > 0


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("name", NAMES)
def test_ratios_of_a_call(name, which):
    """Ratios given to the processor, or to the model for a stock prompt: as attached with that ratio."""
    model, options, images = model_of(name), {"max_new_tokens": 4, "do_sample": False}, []
    one, two = tiny_image(120, 90, 0), tiny_image(70, 160, 5)
    for ratio, image in ((0.5, one), (0.25, two)):
        handle, processor = attached(name, which, keep_ratio=ratio)
        with handle, torch.no_grad():
            inputs = prompt_of(name, processor, "<image> what is this ?", image)
            images.append(
                (model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :], handle.last)
            )
    handle, processor = attached(name, which, keep_ratio=0.9)
    with handle, torch.no_grad():
        given = {"keep_ratio": [0.5]} if which == "patched" else {}
        inputs = prompt_of(name, processor, "<image> what is this ?", one, **given)
        ratios = {} if which == "patched" else {"keep_ratios": [0.5]}
        if which == "patched":
            inputs = inputs.to("cpu", torch.bfloat16)  # as many do; the ratio is not rounded
            assert inputs["keep_ratios"].tolist() == [[1, 2]]
            inputs["pixel_values"] = prompt_of(name, processor, "<image>", one)["pixel_values"]
        answer = model.generate(**inputs, **ratios, **options)[:, inputs["input_ids"].shape[1] :]
        assert answer.tolist() == images[0][0].tolist()
        assert handle.last.index.tolist() == images[0][1].index.tolist()
        given = {"keep_ratio": [0.5, 0.25]} if which == "patched" else {}
        inputs = prompt_of(name, processor, "<image> and <image>", one, two, **given)
        if "batch_num_images" in inputs:
            inputs["batch_num_images"] = torch.tensor([1, 1])
        ratios = {} if which == "patched" else {"keep_ratios": torch.tensor([0.5, 0.25])}
        model(**inputs, **ratios)
        assert handle.last.lengths == [selection.lengths[0] for _, selection in images]
        assert handle.last.budgets.tolist() == [n for _, last in images for n in last.budgets.tolist()]
        text = {name: inputs[name][:, -2:] for name in ("input_ids", "attention_mask")}
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"^keep_ratios: expected None without images"):
                call(**text, keep_ratios=[0.5])
        for right in (0.5, torch.tensor(0.5), np.array([0.5, 0.5])) if which == "stock" else ():
            model(**inputs, keep_ratios=right)
            assert handle.last.lengths[0] == images[0][1].lengths[0]
        for wrong in (
            [0.5, 0.5, 0.5],
            [0.5],
            [[1, 0], [1, 2]],
            0.0,
            [0.0, 0.5],
            [0.5, 1.5],
            ["a", 0.5],
            "half",
        ):
            with pytest.raises((TypeError, ValueError), match=r"^keep_ratios: expected "):
                model(**{**inputs, "keep_ratios": wrong})
            if which == "patched":
                with pytest.raises((TypeError, ValueError), match=r"^keep_ratio: expected "):
                    prompt_of(name, processor, "<image> and <image>", one, two, keep_ratio=wrong)


@pytest.mark.parametrize("name", [slow(name) for name in FAMILIES if "not split" not in name])
def test_a_second_turn_with_ratios(name):
    """The cache knows what was kept of its images."""
    model, options = model_of(name), {"max_new_tokens": 4, "do_sample": False}
    handle, processor = attached(name, "patched", keep_ratio=0.9)
    words = processor.tokenizer("and that one ?", return_tensors="pt")["input_ids"]
    with handle:
        first = prompt_of(name, processor, "<image> what is this ?", tiny_image(120, 90, 0), keep_ratio=0.4)
        cache = DynamicCache()
        turn = torch.cat([model.generate(**first, **options, **{CACHE: cache}), words], dim=1)
        mask = torch.ones_like(turn)
        again = model.generate(input_ids=turn, attention_mask=mask, **options, **{CACHE: cache})
        images = {key: first[key] for key in first if key not in ("input_ids", "attention_mask")}
        assert torch.equal(again, model.generate(input_ids=turn, attention_mask=mask, **images, **options))


@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "smolvlm", "llava_next, siglip"])
def test_relevance_sees_the_pixels_that_clip_expects(name, monkeypatch):
    """Its second pass gets crops normalised as CLIP's, and the question without the family's markers."""
    clip, seen = tiny_clip(), []
    relevance = hero.ClipRelevance(clip, tiny_tokenizer(), second_pass=True)
    stock = clip.get_image_features
    monkeypatch.setattr(
        clip, "get_image_features", lambda pixel_values: seen.append(pixel_values) or stock(pixel_values)
    )
    monkeypatch.setattr(
        relevance,
        "start",
        lambda texts, **kw: seen.append(texts) or hero.ClipRelevance.start(relevance, texts, **kw),
    )
    processor = processor_of(name)
    image = tiny_image(120, 90)
    config = config_of({"keep_ratio": 0.3})
    with (
        hero.attach(model_of(name), processor, config=config, relevance=relevance) as handle,
        torch.no_grad(),
    ):
        inputs = prompt_of(name, processor, "<image> what is this ?", image)
        model_of(name)(**inputs)
        crops, _ = handle.encoder.prepare(*handle.crops(inputs))
    images = processor.image_processor
    mean, std = (torch.tensor(one)[:, None, None] for one in (images.image_mean, images.image_std))
    raw = crops * std + mean
    mean, std = (torch.tensor(one)[:, None, None] for one in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    texts, pixels = seen if isinstance(seen[0], list) else seen[::-1]
    assert texts == ["what is this ?"]
    torch.testing.assert_close(pixels, (raw - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "smolvlm"])
def test_pictures(name, which):
    """Of merged tokens and of resized grids; without the arrangement of the tiles there is none."""
    image = tiny_image(230, 270)
    handle, processor = attached(name, which, keep_ratio=0.3)
    with handle, torch.no_grad():
        model_of(name)(**prompt_of(name, processor, "<image>", image))
    if (name, which) == ("internvl", "stock"):
        with pytest.raises(ValueError, match=r"^selection: expected that of a call that tells how tiles"):
            hero.visualize(image, handle.last)
    else:
        assert hero.visualize(image, handle.last, width=400).width == 400


@pytest.mark.parametrize("backend", ["eager", slow("inductor")])
@pytest.mark.parametrize("name", ["internvl", slow("smolvlm"), "llava_onevision"])
def test_the_encoder_compiles_whole(name, backend):
    """But for grids that may be resized, which are refused."""
    sizes = torch.tensor([(112, 168), (60, 60)])
    with hero.attach(model_of(name), tokenizer=tiny_tokenizer(), keep_ratio=0.3) as handle, torch.no_grad():
        crops = sum(layout.crops for layout in handle.parts.geometry.layouts(sizes))
        pixels = torch.randn((crops, 3, 56, 56), generator=torch.Generator().manual_seed(0))
        torch._dynamo.reset()
        compiled = torch.compile(handle.encoder, fullgraph=True, backend=backend)
        if name == "llava_onevision":
            with pytest.raises(
                Exception, match="geometry: expected one that resizes no grids in compiled code"
            ):
                compiled(pixels, sizes)
            return
        found, wanted = compiled(pixels, sizes), handle.encoder(pixels, sizes)
    assert torch.equal(found.index, wanted.index) and torch.equal(found.budgets, wanted.budgets)
    torch.testing.assert_close(found.tokens, wanted.tokens, rtol=0, atol=1e-5)


def test_a_tower_without_cls():
    """What needs CLS is refused by name; policies that do not, work."""
    model = model_of("llava_next, siglip")
    inputs = batch("llava_next, siglip", processor_of("llava_next, siglip"), "two sizes")
    for policy in ("hired", "globalcom2", "fastervlm", "visionzip", "scope"):
        with pytest.raises(ValueError, match=rf"^policy: expected one of 'hero', .* got '{policy}'"):
            hero.attach(model, policy=policy)
    for options, message in (
        ({"second_softmax": True}, "second_softmax: expected False for an encoder without CLS"),
        ({"attention": "fused"}, "attention: expected 'native' for an encoder without CLS"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            hero.attach(model, **options)
    relevance = hero.ClipRelevance(tiny_clip(), tiny_tokenizer(), second_pass=True)
    with pytest.raises(ValueError, match=r"^processor: expected the model's, whose image_mean and image_std"):
        hero.attach(model, tokenizer=tiny_tokenizer(), relevance=relevance)
    for policy in ("hero", "hero+", "uniform", "random"):
        with hero.attach(model, tokenizer=tiny_tokenizer(), policy=policy, keep_ratio=0.3) as handle:
            with torch.no_grad():
                model(**inputs)
            assert handle.last.policy == policy
            assert handle.last.lengths == [
                handle.count_tokens(size) for size in inputs["image_sizes"].tolist()
            ]
    with pytest.raises(ValueError, match="vision_feature_select_strategy: expected 'full'"):
        hero.attach(tiny_model(tower="siglip", vision_feature_select_strategy="default"))
    with pytest.raises(ValueError, match="num_additional_image_tokens=0"):
        processor = processor_of("llava_next, siglip")
        processor.num_additional_image_tokens = 1
        hero.attach(model, processor)


def test_the_processor_of_another_family_is_refused():
    for name, other, kind in (("llava", "llava_next", "Llava"), ("llava_next, siglip", "llava", "LlavaNext")):
        with pytest.raises(TypeError, match=rf"^processor: expected a {kind}Processor, got "):
            hero.attach(model_of(name), tiny_processor(other))


def test_layers_that_are_not_needed_are_skipped(monkeypatch):
    model, ran = model_of("llava_next, siglip"), []
    layers = model.model.vision_tower.encoder.layers
    stock = type(layers[0]).forward
    monkeypatch.setattr(type(layers[0]), "forward", lambda *args, **kw: ran.append(1) or stock(*args, **kw))
    with hero.attach(model, keep_ratio=0.3, **LAYERS), torch.no_grad():
        model(**batch("llava_next, siglip", processor_of("llava_next, siglip"), "one image"))
    assert len(ran) == len(layers) - 1


def test_a_foreign_class_of_the_same_name_is_refused():
    class SiglipVisionModel(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match=r"^vision_tower: expected a supported vision encoder \("):
        tower_for(SiglipVisionModel())


def test_a_subclass_runs_as_a_whole():
    class Own(SiglipVisionModel):
        pass

    tower = model_of("llava_next, siglip").model.vision_tower
    own = Own(tower.config).eval()
    own.load_state_dict(tower.state_dict())
    pixels, sizes = torch.randn(5, 3, 56, 56), [(112, 112)]
    with torch.no_grad():
        found = [
            hero.HeroVisionEncoder(one, config=hero.HeroConfig(0.3))(pixels, sizes) for one in (tower, own)
        ]
    assert torch.equal(found[0].index, found[1].index) and torch.equal(found[0].tokens, found[1].tokens)
    hero.detach(tower)


@pytest.mark.parametrize("name", ["llava", "llava_next, siglip"])
def test_command_line(name, capsys, tmp_path):
    model_of(name).save_pretrained(tmp_path / "model")
    processor_of(name).save_pretrained(tmp_path / "model")
    tiny_image(90, 120).save(tmp_path / "image.png")
    given = (str(tmp_path / "image.png"), "what is this", "--model", str(tmp_path / "model"))
    picture = str(tmp_path / "picture.png")
    assert cli.main(["ask", *given, "--save", picture, "--max-new-tokens", "3"]) == 0
    assert cli.main(["show", *given[:1], *given[2:], "--save", picture]) == 0
    assert cli.main(["bench", *given[:1], *given[2:], "--keep", "0.5", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    with hero.attach(model_of(name), keep_ratio=0.2) as handle:
        assert f" {handle.count_tokens((90, 120))} visual tokens, first token" in out
