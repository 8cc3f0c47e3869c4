"""What attach, the encoder, the processor and the model refuse: by name, what was expected, what came.

A refusal changes nothing: every test here shares one model and one processor, which must stay as they were
and work afterwards.
"""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from independent import PAIR, TWO, tiny_clip, tiny_image, tiny_model, tiny_processor, tiny_tokenizer

import hero
from hero import ClipRelevance, Geometry, HeroConfig, HeroVisionEncoder

SIZES = [(100, 60), (50, 50)]  # 2 × 2 tiles by the tiny model's grids, and one
CROPS = [5, 2]
NAN = float("nan")


@contextmanager
def refusal(kind, name):
    with pytest.raises((TypeError, ValueError)) as error:
        yield error
    assert error.type is kind
    said, _, rest = str(error.value).partition(": ")
    assert said.split("[")[0] == name
    assert rest.startswith("expected ") and "got " in rest


def contents(owner) -> dict:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in vars(owner).items()}


def assert_same(now: dict, before: dict) -> None:
    assert now.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value, dict):
            assert_same(now[key], value)
        else:
            assert now[key] is value, key


@contextmanager
def untouched(*roots):
    """Nothing in the modules below ``roots``, nor in any configuration, is another object afterwards."""
    owners = []
    for root in roots:
        parts = root.modules() if isinstance(root, torch.nn.Module) else [root, root.image_processor]
        for part in parts:
            owners += [part, part.config] if hasattr(part, "config") else [part]
    before = [contents(owner) for owner in owners]
    yield
    for owner, old in zip(owners, before):
        assert_same(contents(owner), old)


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    run("forward", model, inputs_of(tiny_processor()))  # transformers puts hooks of its own in place
    return model


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def relevance():
    return ClipRelevance(tiny_clip(), tiny_tokenizer(), second_pass=True)


@pytest.fixture(autouse=True)
def nothing_changes(model, processor):
    """Checked around every test of this file; then hero is attached and at work as ever."""
    with untouched(model, processor):
        yield
        with hero.attach(model, processor, keep_ratio=0.5) as handle, torch.no_grad():
            inputs = inputs_of(processor)
            count = sum(handle.count_tokens(size) for size in SIZES)
            assert int((inputs["input_ids"] == handle.image_token_id).sum()) == count
            assert model(**inputs).logits.isfinite().all()
            assert sum(handle.last.lengths) == count


def inputs_of(processor, text=PAIR):
    images = [tiny_image(*size, seed) for seed, size in enumerate(SIZES)]
    return dict(processor(images=images, text=text, return_tensors="pt", padding=True))


def other(value, **change):
    """A copy with other attributes."""
    value = copy.deepcopy(value)
    for name, new in change.items():
        setattr(value, name, new)
    return value


def other_cut(processor, **change):
    return other(processor, image_processor=other(processor.image_processor, **change))


# --- attach ----------------------------------------------------------------------------------------------


def with_strategy(strategy):
    return tiny_model(vision_feature_select_strategy=strategy)


ATTACH = {
    # model
    "no model": (lambda m, p, r: hero.attach(None, p), ValueError, "model"),
    "a name": (lambda m, p, r: hero.attach("llava-hf/llava-v1.6-mistral-7b-hf"), ValueError, "model"),
    "the base model": (lambda m, p, r: hero.attach(m.model, p), ValueError, "model"),
    "the tower": (lambda m, p, r: hero.attach(m.model.vision_tower), ValueError, "model"),
    "the language model": (lambda m, p, r: hero.attach(m.model.language_model), ValueError, "model"),
    "CLIP": (lambda m, p, r: hero.attach(r.clip_model, p), ValueError, "model"),
    "processor first": (lambda m, p, r: hero.attach(p, m), ValueError, "model"),
    "a model that keeps CLS": (
        lambda m, p, r: hero.attach(with_strategy("full"), p),
        ValueError,
        "vision_feature_select_strategy",
    ),
    # processor
    "a tokenizer": (lambda m, p, r: hero.attach(m, p.tokenizer), TypeError, "processor"),
    "an image processor": (lambda m, p, r: hero.attach(m, p.image_processor), TypeError, "processor"),
    "a class": (lambda m, p, r: hero.attach(m, type(p)), TypeError, "processor"),
    "processor, a name": (lambda m, p, r: hero.attach(m, "llava"), TypeError, "processor"),
    "processor, an object": (lambda m, p, r: hero.attach(m, object()), TypeError, "processor"),
    "processor, a number": (lambda m, p, r: hero.attach(m, 0.2), TypeError, "processor"),
    "other pinpoints": (
        lambda m, p, r: hero.attach(m, other_cut(p, image_grid_pinpoints=[[56, 112], [112, 56]])),
        ValueError,
        "processor",
    ),
    "reordered pinpoints": (
        lambda m, p, r: hero.attach(
            m, other_cut(p, image_grid_pinpoints=p.image_processor.image_grid_pinpoints[::-1])
        ),
        ValueError,
        "processor",
    ),
    "other crops": (
        lambda m, p, r: hero.attach(m, other_cut(p, crop_size={"height": 112, "width": 112})),
        ValueError,
        "processor",
    ),
    "oblong crops": (
        lambda m, p, r: hero.attach(m, other_cut(p, crop_size={"height": 56, "width": 112})),
        ValueError,
        "processor",
    ),
    "other patches": (lambda m, p, r: hero.attach(m, other(p, patch_size=7)), ValueError, "processor"),
    "patches unknown": (lambda m, p, r: hero.attach(m, other(p, patch_size=None)), ValueError, "processor"),
    "a processor that keeps CLS": (
        lambda m, p, r: hero.attach(m, other(p, vision_feature_select_strategy="full")),
        ValueError,
        "vision_feature_select_strategy",
    ),
    # configuration
    "config and options": (
        lambda m, p, r: hero.attach(m, p, config=HeroConfig(), keep_ratio=0.2),
        ValueError,
        "config",
    ),
    "config, a dict": (lambda m, p, r: hero.attach(m, p, config={"keep_ratio": 0.2}), TypeError, "config"),
    "config, a number": (lambda m, p, r: hero.attach(m, p, config=0.2), TypeError, "config"),
    "unknown option": (lambda m, p, r: hero.attach(m, p, keep=0.2), TypeError, "keep"),
    "option out of range": (lambda m, p, r: hero.attach(m, p, keep_ratio=20), ValueError, "keep_ratio"),
    "option of a wrong type": (lambda m, p, r: hero.attach(m, p, policy=None), TypeError, "policy"),
    "no such layer": (lambda m, p, r: hero.attach(m, p, tile_layers=[6]), ValueError, "tile_layers"),
    "no such layer from the end": (
        lambda m, p, r: hero.attach(m, p, thumbnail_layers=[0, -7]),
        ValueError,
        "thumbnail_layers",
    ),
    # relevance
    "relevance, a name": (lambda m, p, r: hero.attach(m, p, relevance="clip"), TypeError, "relevance"),
    "relevance, a model": (
        lambda m, p, r: hero.attach(m, p, relevance=r.clip_model),
        TypeError,
        "relevance",
    ),
    "relevance, a switch": (lambda m, p, r: hero.attach(m, p, relevance=True), TypeError, "relevance"),
    "a tokenizer, a number": (
        lambda m, p, r: hero.attach(m, relevance=r, tokenizer=42),
        TypeError,
        "tokenizer",
    ),
    "nobody to read the question": (lambda m, p, r: hero.attach(m, relevance=r), ValueError, "tokenizer"),
    "alpha without relevance": (lambda m, p, r: hero.attach(m, p, alpha=0.5), ValueError, "relevance"),
    "weight without relevance": (
        lambda m, p, r: hero.attach(m, p, weights={"density": 1, "relevance": 0.1}),
        ValueError,
        "relevance",
    ),
}


def table(cases):
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("call", "kind", "name"), table(ATTACH))
def test_attach_refuses(model, processor, relevance, call, kind, name):
    with untouched(model, processor, relevance.clip_model), refusal(kind, name):
        call(model, processor, relevance)


@pytest.mark.parametrize("unsupported", [lambda: None, lambda: "llava", tiny_clip])
def test_message_names_the_supported_models(unsupported):
    unsupported = unsupported()
    with refusal(ValueError, "model") as error:
        hero.attach(unsupported)
    assert "LlavaNextForConditionalGeneration" in str(error.value)
    assert str(error.value).endswith(f"got {type(unsupported).__name__}")


def test_message_shows_what_differs(model, processor):
    with refusal(ValueError, "processor") as error:
        hero.attach(model, other_cut(processor, image_grid_pinpoints=[[56, 112]]))
    assert "[(56, 112), (112, 56), (112, 112)" in str(error.value)  # the model's
    assert str(error.value).endswith("got [(56, 112)]")


def test_attached_twice(model, processor):
    second, fresh = tiny_model(), tiny_processor()
    with hero.attach(model, processor) as handle, untouched(model, processor, second, fresh):
        for one, two, name in (
            (model, processor, "model"),
            (model, fresh, "model"),
            (model, None, "model"),
            (second, processor, "processor"),
        ):
            with refusal(ValueError, name):
                hero.attach(one, two)
        with refusal(ValueError, "vision_tower"):
            HeroVisionEncoder(model.model.vision_tower)
        assert model._hero is handle
        with hero.attach(second, fresh):
            pass


def test_tower_in_use_elsewhere(model, processor):
    encoder = HeroVisionEncoder(model.model.vision_tower)
    try:
        with untouched(model, processor), refusal(ValueError, "vision_tower"):
            hero.attach(model, processor)
    finally:
        encoder.remove()


CLIP_RELEVANCE = {
    "no model": (None, tiny_tokenizer, TypeError, "clip_model"),
    "its vision side": (lambda: tiny_clip().vision_model, tiny_tokenizer, TypeError, "clip_model"),
    "a LLaVA": (tiny_model, tiny_tokenizer, TypeError, "clip_model"),
    "no tokenizer": (tiny_clip, None, TypeError, "tokenizer"),
    "a function": (tiny_clip, lambda: len, TypeError, "tokenizer"),
    "nothing to begin with": (
        tiny_clip,
        lambda: other(tiny_tokenizer(), bos_token=None),
        ValueError,
        "tokenizer",
    ),
    "nothing to end with": (
        tiny_clip,
        lambda: other(tiny_tokenizer(), eos_token=None),
        ValueError,
        "tokenizer",
    ),
}


def test_a_second_pass_is_asked_for(model, processor):
    """A CLIP model of other vision weights than the tower's is refused, where it would be looked at."""
    relevance = ClipRelevance(tiny_clip(), tiny_tokenizer())
    with untouched(model, processor), refusal(ValueError, "relevance"):
        hero.attach(model, processor, relevance=relevance)
    hero.attach(model, processor, relevance=relevance, policy="uniform").remove()
    own = tiny_clip()
    own.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    hero.attach(model, processor, relevance=ClipRelevance(own, tiny_tokenizer())).remove()
    own.vision_model.to(torch.bfloat16)  # the same weights, rounded
    hero.attach(model, processor, relevance=ClipRelevance(own, tiny_tokenizer())).remove()
    own.vision_model.post_layernorm.weight.data[0] += 1
    with untouched(model, processor), refusal(ValueError, "relevance"):
        hero.attach(model, processor, relevance=ClipRelevance(own, tiny_tokenizer()))
    with refusal(TypeError, "second_pass"):
        ClipRelevance(own, tiny_tokenizer(), second_pass="yes")


@pytest.mark.parametrize(("clip", "tokenizer", "kind", "name"), table(CLIP_RELEVANCE))
def test_clip_relevance_refuses(clip, tokenizer, kind, name):
    with refusal(kind, name):
        ClipRelevance(clip and clip(), tokenizer and tokenizer())


# --- the encoder -----------------------------------------------------------------------------------------

ENCODER = {
    "no tower": ({"vision_tower": None}, TypeError, "vision_tower"),
    "tower, a name": ({"vision_tower": "clip"}, TypeError, "vision_tower"),
    "tower, a layer": ({"vision_tower": torch.nn.Linear(3, 3)}, ValueError, "vision_tower"),
    "config, a dict": ({"config": {"keep_ratio": 0.2}}, TypeError, "config"),
    "config, a ratio": ({"config": 0.2}, TypeError, "config"),
    "relevance": ({"relevance": "clip"}, TypeError, "relevance"),
    "alpha without relevance": ({"config": HeroConfig(alpha=0.5)}, ValueError, "relevance"),
    "no such layer": ({"config": HeroConfig(tile_layers=[6])}, ValueError, "tile_layers"),
    "other crops": ({"geometry": Geometry()}, ValueError, "geometry"),
    "other patches": ({"geometry": Geometry(56, 7, ((56, 112),))}, ValueError, "geometry"),
    "geometry, numbers": ({"geometry": (56, 14)}, TypeError, "geometry"),
    "newline, a number": ({"image_newline": 0.5}, TypeError, "image_newline"),
    "projector, a name": ({"projector": "linear"}, TypeError, "projector"),
    "feature layer, a name": ({"feature_layer": "last"}, TypeError, "feature_layer"),
    "feature layer, a bool": ({"feature_layer": [True]}, TypeError, "feature_layer"),
    "feature layer, beyond the last": ({"feature_layer": 7}, ValueError, "feature_layer"),
    "feature layers, none": ({"feature_layer": []}, ValueError, "feature_layer"),
}


@pytest.mark.parametrize(("change", "kind", "name"), table(ENCODER))
def test_encoder_refuses(model, processor, change, kind, name):
    with untouched(model, processor), refusal(kind, name):
        HeroVisionEncoder(**{"vision_tower": model.model.vision_tower, **change})


def with_nan(pixels):
    pixels = pixels.clone()
    pixels[0, 0, 0, 0, 0] = NAN
    return pixels


def flat(pixels):
    return torch.cat([image[:count] for image, count in zip(pixels, CROPS)])


# Of the pixels [2, 5, 3, 56, 56] and sizes of two images, what is given instead.
CALLS = {
    "nothing": (lambda x, s: (None, s), TypeError, "pixel_values"),
    "a list": (lambda x, s: (list(x), s), TypeError, "pixel_values"),
    "an array": (lambda x, s: (x.numpy(), s), TypeError, "pixel_values"),
    "bytes": (lambda x, s: (x.to(torch.uint8), s), TypeError, "pixel_values"),
    "integers": (lambda x, s: (x.long(), s), TypeError, "pixel_values"),
    "one crop": (lambda x, s: (x[0, 0], s), ValueError, "pixel_values"),
    "rank 2": (lambda x, s: (x[0, 0, 0], s), ValueError, "pixel_values"),
    "rank 6": (lambda x, s: (x[None], s), ValueError, "pixel_values"),
    "small crops": (lambda x, s: (x[..., ::2, ::2], s), ValueError, "pixel_values"),
    "oblong crops": (lambda x, s: (x[..., :28], s), ValueError, "pixel_values"),
    "flat crops": (lambda x, s: (x[..., :28, :], s), ValueError, "pixel_values"),
    "small crops, flat": (lambda x, s: (flat(x)[..., ::2, ::2], s), ValueError, "pixel_values"),
    "channels last": (lambda x, s: (flat(x).movedim(1, -1), s), ValueError, "pixel_values"),
    "grey": (lambda x, s: (x[:, :, :1], s), ValueError, "pixel_values"),
    "one size for two": (lambda x, s: (x, s[:1]), ValueError, "image_sizes"),
    "three sizes for two": (lambda x, s: (x, s[[0, 1, 1]]), ValueError, "image_sizes"),
    "too few crops": (lambda x, s: (x[:, :4], s), ValueError, "image_sizes"),
    "one crop too few, flat": (lambda x, s: (flat(x)[1:], s), ValueError, "image_sizes"),
    "one crop too many, flat": (lambda x, s: (flat(x)[[0, *range(7)]], s), ValueError, "image_sizes"),
    "padding crops, flat": (lambda x, s: (x.flatten(0, 1), s), ValueError, "image_sizes"),
    "one size for two, flat": (lambda x, s: (flat(x), s[:1]), ValueError, "image_sizes"),
    "no size": (lambda x, s: (x, []), ValueError, "image_sizes"),
    "no sizes": (lambda x, s: (x, None), TypeError, "image_sizes"),
    "a bare size": (lambda x, s: (x, [100, 60]), TypeError, "image_sizes"),
    "sizes of three": (lambda x, s: (x, [(3, 100, 60), (3, 50, 50)]), TypeError, "image_sizes"),
    "floating sizes": (lambda x, s: (x, s.float()), TypeError, "image_sizes"),
    "empty image": (lambda x, s: (x, s * 0), ValueError, "image_sizes"),
}


@pytest.fixture(scope="module")
def pixels():
    inputs = inputs_of(tiny_processor())
    assert inputs["pixel_values"].shape[:2] == (2, max(CROPS))
    return inputs["pixel_values"], inputs["image_sizes"]


@pytest.fixture
def encode(model):
    """An encoder made as told, until the end of the test."""
    made = []

    def make(**options):
        given = {"geometry": geometry_of(model), **options}
        made.append(HeroVisionEncoder(model.model.vision_tower, **given))
        return made[-1]

    yield make
    for encoder in made:
        encoder.remove()


def geometry_of(model):
    return Geometry(56, 14, tuple(map(tuple, model.config.image_grid_pinpoints)))


@pytest.mark.parametrize(("change", "kind", "name"), table(CALLS))
def test_call_refuses(encode, pixels, change, kind, name):
    encoder = encode()
    with refusal(kind, name):
        encoder(*change(*pixels))
    with torch.no_grad():
        assert encoder(*pixels).tokens.isfinite().all()
        assert encoder(flat(pixels[0]), pixels[1]).tokens.isfinite().all()


@pytest.mark.parametrize("policy", ["hero", "uniform", "random"])
def test_nan_is_named(encode, pixels, policy):
    """Also what was the first to meet it: the tile signals, the patch scores or the features."""
    encoder = encode(config=HeroConfig(policy=policy))
    with pytest.raises(ValueError, match=r"^pixel_values: .* in image 0 \(\w.* NaN of "), torch.no_grad():
        encoder(with_nan(pixels[0]), pixels[1])


TEXTS = {
    "not asked for": (False, "what is this", ValueError),
    "not asked for, a list": (False, ["what", "which"], ValueError),
    "not asked for, empty": (False, "", ValueError),
    "missing": (True, None, ValueError),
    "one for two": (True, ["what"], ValueError),
    "three for two": (True, ["what"] * 3, ValueError),
    "none at all": (True, [], ValueError),
    "no string": (True, ["what", 3], TypeError),
    "None within": (True, [None, "what"], TypeError),
    "bytes within": (True, [b"what", b"which"], TypeError),
    "a number": (True, 5, TypeError),
}


@pytest.mark.parametrize(("with_relevance", "text", "kind"), table(TEXTS))
def test_text_is_refused(encode, pixels, relevance, with_relevance, text, kind):
    encoder = encode(relevance=relevance if with_relevance else None)
    with refusal(kind, "text"):
        encoder(*pixels, text=text)
    with torch.no_grad():
        assert encoder(*pixels, text=["what", "which"] if with_relevance else None).tokens.isfinite().all()


# --- the model -------------------------------------------------------------------------------------------


def drop(inputs, position):
    """One token less at a position of the only prompt."""
    keep = torch.arange(inputs["input_ids"].shape[1]) != position
    return {
        name: value[:, keep] if name in ("input_ids", "attention_mask") else value
        for name, value in inputs.items()
    }


def double(inputs, position):
    """One token twice."""
    order = sorted([*range(inputs["input_ids"].shape[1]), position])
    return {
        name: value[:, order] if name in ("input_ids", "attention_mask") else value
        for name, value in inputs.items()
    }


def run(how, model, inputs, **kwargs):
    with torch.no_grad():
        if how == "generate":
            return model.generate(**inputs, max_new_tokens=2, do_sample=False, **kwargs)
        return model(**inputs, **kwargs).logits


WAYS = pytest.mark.parametrize("how", ["forward", "generate"])


@WAYS
@pytest.mark.parametrize("which", ["patched", "stock"])
@pytest.mark.parametrize("change", [drop, double])
def test_number_of_placeholders(model, processor, how, which, change):
    with hero.attach(model, processor if which == "patched" else None, keep_ratio=0.5) as handle:
        inputs = inputs_of(processor)
        good = run(how, model, inputs)
        position = int((inputs["input_ids"][0] == handle.image_token_id).nonzero()[3, 0])
        given = int((inputs["input_ids"] == handle.image_token_id).sum())
        kept = sum(handle.count_tokens(size) for size in SIZES)
        full = sum(layout.full_tokens for layout in handle.last.layout)
        assert given == (kept if which == "patched" else full)
        with refusal(ValueError, "input_ids") as error:
            run(how, model, change(inputs, position))
        assert str(error.value).endswith(f"got {given + (1 if change is double else -1)}")
        assert f"expected {kept} " in str(error.value) and f"or {full} " in str(error.value)
        assert torch.equal(run(how, model, inputs), good)


@WAYS
def test_an_images_placeholders_in_two_rows(model, how):
    """The right number of placeholders, but the second row begins with the last one of the first image."""
    with hero.attach(model, keep_ratio=0.5) as handle:
        inputs = inputs_of(tiny_processor(), [TWO, TWO])
        ids = inputs["input_ids"]
        first, second = ((row == handle.image_token_id).nonzero()[:, 0] for row in ids)
        text = int(ids[0, -1])
        ids[0, first[-1]] = text
        ids[1, second[0] - 1] = handle.image_token_id
        with refusal(ValueError, "input_ids"):
            run(how, model, inputs)


@WAYS
def test_attention_mask_of_four_dimensions(model, how):
    """Only where prompts are shortened: a mask of that kind cannot be."""
    with hero.attach(model, keep_ratio=0.5):
        inputs = inputs_of(tiny_processor())
        length = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = torch.zeros(1, 1, length, length)
        with refusal(ValueError, "attention_mask"):
            run(how, model, inputs)


@WAYS
def test_strategy_that_keeps_cls(model, processor, how):
    with hero.attach(model, processor):
        inputs = inputs_of(processor)
        good = run(how, model, inputs)
        with refusal(ValueError, "vision_feature_select_strategy") as error:
            run(how, model, inputs, vision_feature_select_strategy="full")
        assert "'default'" in str(error.value) and str(error.value).endswith("got 'full'")
        with refusal(ValueError, "vision_feature_select_strategy"):
            model.get_image_features(
                inputs["pixel_values"], inputs["image_sizes"], vision_feature_select_strategy="full"
            )
        assert torch.equal(run(how, model, inputs), good)


@WAYS
@pytest.mark.parametrize(
    ("which", "kind"), [("sizes", ValueError), ("integers", TypeError), ("crops", ValueError)]
)
def test_pixels_of_the_model(model, processor, how, which, kind):
    with hero.attach(model, processor):
        inputs = inputs_of(processor)
        good, pixels = run(how, model, inputs), inputs["pixel_values"]
        bad = {
            "sizes": {"pixel_values": pixels[:1]},
            "integers": {"pixel_values": pixels.long()},
            "crops": {"pixel_values": pixels[..., :28]},
        }[which]
        with refusal(kind, "image_sizes" if which == "sizes" else "pixel_values"):
            run(how, model, {**inputs, **bad})
        assert torch.equal(run(how, model, inputs), good)


@WAYS
def test_nan_in_the_models_pixels(model, processor, how):
    with hero.attach(model, processor) as handle:
        inputs = inputs_of(processor)
        good, last = run(how, model, inputs), handle.last
        with pytest.raises(
            ValueError, match=r"^pixel_values: expected finite numbers, got others in image 0"
        ):
            run(how, model, {**inputs, "pixel_values": with_nan(inputs["pixel_values"])})
        assert handle.last is last
        assert torch.equal(run(how, model, inputs), good)


def test_images_missing_where_the_count_hangs_on_them(model):
    """With the released rule, a stock prompt cannot be shortened without seeing the images."""
    with hero.attach(model, allocation="floor"):
        inputs = inputs_of(tiny_processor())
        with refusal(ValueError, "pixel_values"):
            run("generate", model, {**inputs, "pixel_values": None})
        run("generate", model, inputs)


def test_features_without_a_prompt_need_the_question(model, processor, relevance):
    with hero.attach(model, processor, relevance=relevance):
        inputs = inputs_of(processor)
        with refusal(ValueError, "text") as error, torch.no_grad():
            model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        assert "each of 2 images" in str(error.value)
        run("forward", model, inputs)


def test_processor_counts_its_own_crops_alone(model, processor):
    images, text = [tiny_image(100, 60)], ["<image> what"]
    with hero.attach(model, processor):
        with refusal(ValueError, "pixel_values"):
            processor(images, text, crop_size={"height": 28, "width": 28}, size={"shortest_edge": 28})
        assert processor(images, text)["input_ids"]


def test_projector_replaced_while_attached(model, processor):
    projector = model.model.multi_modal_projector
    with hero.attach(model, processor):
        inputs = inputs_of(processor)
        model.model.multi_modal_projector = copy.deepcopy(projector)
        try:
            with pytest.raises(RuntimeError, match="projector was replaced after attach"):
                run("forward", model, inputs)
        finally:
            model.model.multi_modal_projector = projector


def test_untouched_sees_a_change(model, processor):
    """The guard of this file is itself worth something."""
    layer = model.model.vision_tower.encoder.layers[0].self_attn
    changes = {
        "attribute": (lambda: model.__dict__.update(_hero=1), lambda: model.__dict__.pop("_hero")),
        "hook": (
            lambda: model._forward_hooks.update({-1: print}),
            lambda: model._forward_hooks.pop(-1),
        ),
        "method": (
            lambda: processor.__dict__.update(_get_number_of_features=len),
            lambda: processor.__dict__.pop("_get_number_of_features"),
        ),
    }
    config = layer.config
    changes["config"] = (
        lambda: setattr(layer, "config", SimpleNamespace(**vars(config))),
        lambda: setattr(layer, "config", config),
    )
    for change, undo in changes.values():
        try:
            with pytest.raises(AssertionError), untouched(model, processor):
                change()
        finally:
            undo()
