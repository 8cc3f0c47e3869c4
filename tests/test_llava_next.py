"""LLaVA-NeXT with hero attached, against the reference of ``independent.py`` and the stock model."""

import copy
import functools
import gc
import inspect
import threading
import weakref

import pytest
import torch
from independent import (
    ADJACENT,
    CACHE,
    CASES,
    NEWLINE,
    ONE,
    PAIR,
    TWO,
    Independent,
    Rule,
    tiny_clip,
    tiny_image,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from transformers import BatchFeature, TextStreamer, pipeline
from transformers.cache_utils import DynamicCache

import hero

CASES = {**CASES, "one tile": ([TWO], [(50, 50)])}
LAYERS = {"tile_layers": (1, 2), "thumbnail_layers": (4,)}
RULES = {
    **{f"exact {ratio}": {"keep_ratio": ratio} for ratio in (0.05, 0.1, 0.2, 0.5, 0.9)},
    "exact 21 tokens": {"keep_tokens": 21},
    **{f"floor {ratio}": {"keep_ratio": ratio, "allocation": "floor"} for ratio in (0.1, 0.2, 0.5, 0.9)},
    "floor 21 tokens": {"keep_tokens": 21, "allocation": "floor"},
    "second softmax": {"keep_ratio": 0.2, "second_softmax": True},
    "second softmax, floor": {"keep_ratio": 0.5, "allocation": "floor", "second_softmax": True},
    "entropy": {"keep_ratio": 0.2, "weights": {"density": 0.2, "saliency": 0.3, "entropy": 0.5}},
}
PROCESSORS = ("patched", "stock")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def reference(model):
    return Independent(model)


def rule_of(options: dict) -> Rule:
    fields = {"keep_ratio": None, **LAYERS, **options}
    weights = fields.pop("weights", {})
    fields.pop("alpha", None)
    if weights:
        fields |= {"density": 0.0, "saliency": 0.0, **weights}
    return Rule(**fields)


def config_of(options: dict) -> hero.HeroConfig:
    return hero.HeroConfig(**LAYERS, **options)


def batch(processor, case: str, **kwargs) -> BatchFeature:
    """The processor's output for a case, with labels on the text."""
    texts, sizes = CASES[case]
    images = [tiny_image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs)


@functools.cache
def expected(case: str, rule: str, reference: Independent):
    """(results of each image, logits of each row) by the reference."""
    inputs = batch(tiny_processor(), case)
    with torch.no_grad():
        results = reference.images(inputs["pixel_values"], inputs["image_sizes"], rule_of(RULES[rule]))
        return results, reference.logits(inputs, rule_of(RULES[rule]))


def rows(logits: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The logits of each row without padding."""
    return [row[kept.bool()] for row, kept in zip(logits, mask, strict=True)]


def attached(model, which: str, config: hero.HeroConfig, **kwargs):
    """(handle, processor): the processor patched, or left as it is."""
    processor = tiny_processor()
    if which == "patched":
        return hero.attach(model, processor, config=config, **kwargs), processor
    return hero.attach(model, config=config, tokenizer=processor.tokenizer, **kwargs), processor


def assert_rows_equal(actual: torch.Tensor, wanted: list[torch.Tensor], tolerance: float) -> None:
    """Compare padded logits [B, L, V] with rows [n_b, V], padded on the left."""
    for row, want in zip(actual, wanted, strict=True):
        torch.testing.assert_close(row[-len(want) :], want, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------- keep nothing back


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", PROCESSORS)
def test_everything_kept_is_the_stock_model(model, case, which):
    inputs = batch(tiny_processor(), case)
    with torch.no_grad():
        stock = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    handle, processor = attached(model, which, config_of({"keep_ratio": 1.0}))
    with handle, torch.no_grad():
        ours = batch(processor, case)
        assert torch.equal(ours["input_ids"], inputs["input_ids"])
        torch.testing.assert_close(model(**ours).logits, stock, rtol=0, atol=1e-6)
        assert handle.last is not None  # selected, not passed by
        kept = model.model.get_image_features(ours["pixel_values"], ours["image_sizes"]).pooler_output
        for image, (one, other) in enumerate(zip(kept, features, strict=True)):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6)
            assert handle.last.lengths[image] == len(other)
        assert torch.equal(model.generate(**ours, max_new_tokens=6, do_sample=False), answer)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)


# ------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", PROCESSORS)
def test_selection_and_logits(model, reference, case, rule, which):
    results, logits = expected(case, rule, reference)
    handle, processor = attached(model, which, config_of(RULES[rule]))
    with handle, torch.no_grad():
        inputs = batch(processor, case)
        output = model(**inputs).logits
        last = handle.last
        assert last.index.tolist() == [place for result in results for place in result.index]
        assert last.budgets.tolist() == [budget for result in results for budget in result.budgets]
        assert last.lengths == [len(result.index) for result in results]
        assert last.tokens is None
        shares = torch.tensor([share for result in results for share in result.shares])
        # One minus a near-uniform entropy cancels: fp32 leaves fewer digits than elsewhere.
        torch.testing.assert_close(last.shares, shares, rtol=0, atol=1e-5 if rule == "entropy" else 1e-6)
        scores = torch.tensor([score for result in results for score in result.scores])
        torch.testing.assert_close(last.scores, scores, rtol=0, atol=1e-6)
        tokens = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        for ours, result in zip(tokens, results, strict=True):
            torch.testing.assert_close(ours, result.tokens, rtol=1e-5, atol=1e-5)
        assert_rows_equal(output, logits, 1e-5)


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("rule", ["exact 0.2", "floor 0.5"])
@pytest.mark.parametrize("case", ["one image", "two sizes", "two images in a prompt", "adjacent images"])
def test_greedy(model, reference, case, rule, which):
    wanted = reference.greedy(batch(tiny_processor(), case), rule_of(RULES[rule]), 5)
    handle, processor = attached(model, which, config_of(RULES[rule]))
    with handle:
        inputs = batch(processor, case)
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert torch.equal(output[:, :length], inputs["input_ids"])  # the caller's own prompt, as it was
        assert output[:, length:].tolist() == wanted


GENERATIONS = {
    "beams": {"num_beams": 3},
    "beams, 2 sequences": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "sampling, 2 sequences": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True},
}


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("rule", ["exact 0.2", "floor 0.5"])
@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("case", ["one image", "two sizes", "two images in a prompt"])
def test_generation(model, reference, case, how, rule, which):
    options = {"do_sample": False, "max_new_tokens": 5, **GENERATIONS[how]}
    given = reference.inputs(batch(tiny_processor(), case), rule_of(RULES[rule]))
    torch.manual_seed(0)
    wanted = reference.model.generate(
        inputs_embeds=given["inputs_embeds"], attention_mask=given["attention_mask"], **options
    )
    handle, processor = attached(model, which, config_of(RULES[rule]))
    with handle:
        inputs = batch(processor, case)
        several = case == "two images in a prompt"
        repeats = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
        if several and repeats > 1 and _old_transformers():
            with pytest.raises(ValueError, match="num_beams, num_return_sequences: expected 1"):
                model.generate(**inputs, **options)
            return
        torch.manual_seed(0)
        output = model.generate(**inputs, **options)
    if how == "dictionary":
        for ours, theirs in zip(output.scores, wanted.scores, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        output, wanted = output.sequences, wanted.sequences
    length = inputs["input_ids"].shape[1]
    assert output[:, length:].tolist() == wanted.tolist()
    prompts = inputs["input_ids"].repeat_interleave(len(output) // len(inputs["input_ids"]), 0)
    assert torch.equal(output[:, :length], prompts)


def _old_transformers() -> bool:
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 19)


@pytest.mark.parametrize("which", PROCESSORS)
def test_streamer(model, which):
    handle, processor = attached(model, which, config_of({"keep_ratio": 0.2}))
    pieces = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    with handle:
        inputs = batch(processor, "one image")
        streamer = Streamer(processor.tokenizer, skip_prompt=True)
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=streamer)
    answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "".join(pieces).split() == answer.split()


@pytest.mark.parametrize("which", PROCESSORS)
def test_positional_arguments(model, which):
    handle, processor = attached(model, which, config_of({"keep_ratio": 0.2}))
    with handle, torch.no_grad():
        inputs = batch(processor, "one image")
        named = model(**inputs).logits
        ids, pixels, sizes, mask = (
            inputs[name] for name in ("input_ids", "pixel_values", "image_sizes", "attention_mask")
        )
        assert torch.equal(model(ids, pixels, sizes, mask).logits, named)
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        rest = {"pixel_values": pixels, "image_sizes": sizes, "max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(ids, **rest), answer)
        assert torch.equal(model.generate(inputs=ids, **rest), answer)


def test_limits_on_the_whole_length(model):
    """``max_length`` counts the caller's prompt, whatever its length inside."""
    handle, processor = attached(model, "stock", config_of({"keep_ratio": 0.2}))
    with handle:
        inputs = batch(processor, "one image")
        length = inputs["input_ids"].shape[1]
        assert model.generate(**inputs, max_length=length + 4, do_sample=False).shape[1] == length + 4
        config = copy.deepcopy(model.generation_config)
        config.max_length, config.do_sample = length + 3, False
        assert model.generate(**inputs, generation_config=config).shape[1] == length + 3
        assert config.max_length == length + 3


def test_chat_template(model, reference):
    rule = RULES["exact 0.2"]
    image = tiny_image(120, 90)
    conversation = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is this ?"}],
        }
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    wanted = reference.greedy(tiny_processor().apply_chat_template(conversation, **options), rule_of(rule), 5)
    handle, processor = attached(model, "patched", config_of(rule))
    with handle:
        inputs = processor.apply_chat_template(conversation, **options)
        places = int((inputs["input_ids"] == 4).sum())
        assert places == hero.count_tokens(handle.config, (120, 90), geometry=handle.encoder.geometry)
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == wanted


def test_pipeline(model, reference):
    rule = RULES["exact 0.2"]
    image = tiny_image(120, 90)
    wanted = reference.greedy(tiny_processor()(images=image, text=ONE, return_tensors="pt"), rule_of(rule), 5)
    handle, processor = attached(model, "patched", config_of(rule))
    with handle:
        ask = pipeline("image-text-to-text", model=model, processor=processor)
        answer = ask(images=image, text=ONE, max_new_tokens=5, return_full_text=False, do_sample=False)
    text = processor.tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert answer[0]["generated_text"].split() == text.split()


@pytest.mark.parametrize("which", PROCESSORS)
def test_second_turn_with_cache(model, which):
    """A second question on the cache of the first answers as a fresh call with the whole conversation."""
    handle, processor = attached(model, which, config_of({"keep_ratio": 0.2}))
    options = {"max_new_tokens": 4, "do_sample": False}
    with handle:
        inputs = batch(processor, "one image")
        cache = DynamicCache()
        first = model.generate(**inputs, **{CACHE: cache}, **options)
        more = processor.tokenizer("USER : and that one ? ASSISTANT :", return_tensors="pt")["input_ids"]
        ids = torch.cat([first, more], dim=1)
        whole = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "image_sizes": inputs["image_sizes"],
        }
        fresh = model.generate(**whole, pixel_values=inputs["pixel_values"], **options)
        second = model.generate(**whole, **{CACHE: cache}, **options)
        assert torch.equal(second[:, : ids.shape[1]], ids)
        assert torch.equal(second, fresh)


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("rule", ["exact 0.2", "floor 0.5"])
def test_turns_of_several_prompts(model, rule, which):
    """Each prompt goes on with an image of its own, then with text: as fresh calls with the conversation."""
    handle, processor = attached(model, which, config_of(RULES[rule]))
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [1, 4]}
    ids = mask = torch.zeros(2, 0, dtype=torch.long)
    cache, images = DynamicCache(), ([], [])
    with handle:
        for turn in ([(60, 170), (100, 110)], [(50, 50), (120, 90)], []):
            new = [tiny_image(*size) for size in turn]
            for row, image in zip(images, new, strict=bool(new)):
                row.append(image)
            texts = (
                [ONE, TWO] if new else ["USER : describe ASSISTANT :", "USER : what is this ? ASSISTANT :"]
            )
            inputs = processor(images=new or None, text=texts, padding=True, return_tensors="pt")
            inputs["input_ids"] = torch.cat([ids, inputs["input_ids"]], dim=1)
            inputs["attention_mask"] = torch.cat([mask, inputs["attention_mask"]], dim=1)
            every = processor.image_processor([*images[0], *images[1]], return_tensors="pt")
            fresh = model.generate(**{**inputs, **every}, **options)
            ids = model.generate(**inputs, **{CACHE: cache}, **options)
            assert torch.equal(ids, fresh)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, -3:])], dim=1)


def test_questions_of_later_images(model):
    """The question of a prompt's second image is its own, where the first ones are in the cache."""
    relevance = hero.ClipRelevance(tiny_clip(), tiny_tokenizer(), second_pass=True)
    handle, processor = attached(model, "patched", config_of({"keep_ratio": 0.2}), relevance=relevance)
    asked, image, cache = [], tiny_image(60, 170), DynamicCache()
    ids = torch.zeros(2, 0, dtype=torch.long)
    with handle:
        start = relevance.start
        relevance.start = lambda questions, **kw: asked.append(list(questions)) or start(questions, **kw)
        for first, second in (("w1", "w2"), ("w3", "w4")):
            texts = [f"USER : <image> {word} ASSISTANT :" for word in (first, second)]
            inputs = processor(images=[image, image], text=texts, return_tensors="pt")
            inputs["input_ids"] = torch.cat([ids, inputs["input_ids"]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            ids = model.generate(**inputs, **{CACHE: cache}, max_new_tokens=2, suppress_tokens=[1, 4])
    assert asked == [["w1", "w2"], ["w3", "w4"]]


def test_relevance_with_beams(model):
    """Older transformers repeats images for each beam before they are encoded: questions too."""
    relevance = hero.ClipRelevance(tiny_clip(), tiny_tokenizer(), second_pass=True)
    options = {"max_new_tokens": 3, "do_sample": False}
    handle, processor = attached(model, "patched", config_of({"keep_ratio": 0.2}), relevance=relevance)
    with handle:
        both = model.generate(**batch(processor, "two sizes"), num_beams=2, **options)
        inputs = processor(images=[tiny_image(100, 110, 1)], text=[TWO], return_tensors="pt")
        alone = model.generate(**inputs, num_beams=2, **options)
    assert torch.equal(both[1, -3:], alone[0, -3:])


@pytest.mark.parametrize("rule", ["exact 0.2", "floor 0.5"])
def test_offloaded(reference, rule):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    handle, processor = attached(model, "patched", config_of(RULES[rule]))
    with handle, torch.no_grad():
        logits = expected("one image", rule, reference)[1]
        assert_rows_equal(model(**batch(processor, "one image")).logits, logits, 1e-5)


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", ["exact 0.2", "floor 0.5", "exact 0.9"])
@pytest.mark.parametrize("case", ["one image", "two sizes", "adjacent images"])
def test_labels_and_loss(model, reference, case, rule, side, which):
    def labelled(processor):
        processor.tokenizer.padding_side = side
        inputs = batch(processor, case)
        silent = (inputs["input_ids"] == 4) | (inputs["attention_mask"] == 0)
        inputs["labels"] = inputs["input_ids"].masked_fill(silent, -100)
        first = inputs["attention_mask"].long().argmax(1)
        inputs["labels"][torch.arange(len(first)), first] = -100  # nothing stands before it
        return inputs

    wanted = reference.loss(labelled(tiny_processor()), rule_of(RULES[rule]))
    handle, processor = attached(model, which, config_of(RULES[rule]))
    with handle:
        output = model(**labelled(processor))
        assert output.loss.item() == pytest.approx(wanted, abs=1e-5)
        output.loss.backward()
        assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
        assert model.model.image_newline.grad.abs().sum() > 0
        model.zero_grad()


def test_position_ids_are_counted_anew(model):
    """Positions of the full prompt would leave gaps, which transformers reads as packed sequences."""
    handle, processor = attached(model, "stock", config_of({"keep_ratio": 0.2}))
    with handle, torch.no_grad():
        inputs = batch(processor, "one image")
        wanted = model(**inputs).logits
        positions = torch.arange(inputs["input_ids"].shape[1])[None]
        torch.testing.assert_close(model(**inputs, position_ids=positions).logits, wanted)
        del inputs["attention_mask"]
        torch.testing.assert_close(model(**inputs).logits, wanted)


def test_padding_to_a_fixed_length(model):
    """Padding beyond the longest prompt stays, padding that the dropped tokens leave behind goes."""
    handle, processor = attached(model, "stock", config_of({"keep_ratio": 0.2}))
    with handle, torch.no_grad():
        plain = batch(processor, "two sizes")
        padded = {name: value for name, value in plain.items()}
        for name, fill in (("input_ids", 1), ("attention_mask", 0)):
            extra = torch.full((2, 7), fill, dtype=plain[name].dtype)
            padded[name] = torch.cat([extra, plain[name]], dim=1)
        one, other = model(**plain), model(**padded)
        assert other.logits.shape[1] == one.logits.shape[1] + 7
        lengths = [sum(handle.last.lengths[i : i + 1]) for i in range(2)]
        for row, length in enumerate(lengths):
            torch.testing.assert_close(
                one.logits[row, -length:], other.logits[row, -length:], rtol=0, atol=1e-5
            )


def test_text_only_prompts_pass_untouched(model):
    tokens = tiny_tokenizer()("USER : what is this ? ASSISTANT :", return_tensors="pt")
    with torch.no_grad():
        stock = model(**tokens).logits
        answer = model.generate(**tokens, max_new_tokens=3, do_sample=False)
        with hero.attach(model, tiny_processor(), keep_ratio=0.2, **LAYERS):
            assert torch.equal(model(**tokens).logits, stock)
            assert torch.equal(model.generate(**tokens, max_new_tokens=3, do_sample=False), answer)


@pytest.mark.parametrize("which", PROCESSORS)
def test_image_sizes_as_a_list(model, which):
    """The stock model takes them as well."""
    handle, processor = attached(model, which, config_of({"keep_ratio": 0.2}))
    with handle, torch.no_grad():
        inputs = batch(processor, "two sizes")
        wanted = model(**inputs).logits
        inputs["image_sizes"] = inputs["image_sizes"].tolist()
        assert torch.equal(model(**inputs).logits, wanted)


def test_four_dimensional_pixels(model):
    handle, processor = attached(model, "patched", config_of({"keep_ratio": 0.2}))
    with handle, torch.no_grad():
        inputs = batch(processor, "two sizes")
        wanted = model(**inputs).logits
        counts = [layout.crops for layout in handle.last.layout]
        inputs["pixel_values"] = torch.cat(
            [image[:count] for image, count in zip(inputs["pixel_values"], counts, strict=True)]
        )
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [[-2], [1, -2], 3])
def test_other_feature_layers(layer):
    model = tiny_model(vision_feature_layer=layer)
    reference = Independent(model)
    with torch.no_grad():
        wanted = reference.logits(batch(tiny_processor(), "one image"), rule_of(RULES["exact 0.2"]))
        handle, processor = attached(model, "patched", config_of(RULES["exact 0.2"]))
        with handle:
            assert_rows_equal(model(**batch(processor, "one image")).logits, wanted, 1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_stays_the_users(reference, implementation):
    results, logits = expected("one image", "exact 0.2", reference)
    model = tiny_model(attn=implementation)
    calls = []
    with hero.attach(model, tiny_processor(), config=config_of(RULES["exact 0.2"])) as handle:
        original = torch.nn.functional.scaled_dot_product_attention

        def counted(*args, **kwargs):
            calls.append(1)
            return original(*args, **kwargs)

        torch.nn.functional.scaled_dot_product_attention = counted
        try:
            with torch.no_grad():
                pixels = batch(tiny_processor(), "one image")["pixel_values"]
                handle.encoder(pixels, [(120, 90)])
                assert len(calls) == (6 if implementation == "sdpa" else 0)
                model.set_attn_implementation("sdpa" if implementation == "eager" else "eager")
                calls.clear()
                handle.encoder(pixels, [(120, 90)])
                assert len(calls) == (0 if implementation == "sdpa" else 6)
        finally:
            torch.nn.functional.scaled_dot_product_attention = original
        assert handle.encoder(pixels, [(120, 90)]).index.tolist() == results[0].index


# ------------------------------------------------------------------------------------- leave no trace


def snapshot(target) -> dict:
    """Everything that attach could leave behind on an object and its modules."""
    modules = dict(target.named_modules()) if isinstance(target, torch.nn.Module) else {"": target}
    lazily_set_by_transformers = {"_output_capturing_hooks_installed"}
    return {
        name: {
            key: (id(value) if not isinstance(value, dict) else [(k, id(v)) for k, v in value.items()])
            for key, value in module.__dict__.items()
            if key not in lazily_set_by_transformers and "forward_hooks" not in key
        }
        for name, module in modules.items()
    }


def test_remove_restores_exactly():
    model, processor = tiny_model(), tiny_processor()
    inputs = batch(processor, "two sizes")
    with torch.no_grad():
        stock = model(**inputs).logits
    before = snapshot(model), snapshot(processor)
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    config, processing = model.config.to_dict(), processor.to_dict()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    methods = (
        model.generate,
        model.forward,
        model.model.get_image_features,
        processor._get_number_of_features,
    )
    signatures = [inspect.signature(method) for method in methods]
    handle = hero.attach(model, processor, keep_ratio=0.2, **LAYERS)
    attached_methods = (
        model.generate,
        model.forward,
        model.model.get_image_features,
        processor._get_number_of_features,
    )
    assert [inspect.signature(method) for method in attached_methods] == signatures
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(state)
    with torch.no_grad():
        model(**batch(processor, "two sizes"))
    handle.remove()
    handle.remove()  # a second time does nothing
    assert (snapshot(model), snapshot(processor)) == before
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == hooks
    assert model.config.to_dict() == config
    assert processor.to_dict() == processing
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)
    hero.attach(model, processor, keep_ratio=0.5).remove()  # and can be attached again


def test_a_wrapper_put_on_later_stays_and_calls_the_stock_method():
    model = tiny_model()
    inputs = batch(tiny_processor(), "one image")
    stock = model.generate(**inputs, max_new_tokens=2)
    handle = hero.attach(model, keep_ratio=0.2)
    own, calls = model.generate, []
    model.generate = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    handle.remove()
    assert torch.equal(model.generate(**inputs, max_new_tokens=2), stock) and calls == [1]
    model.generate = own
    handle.remove()
    assert not {"generate", "forward", "_hero", "_hero_hidden"} & set(model.__dict__)


def test_removed_on_errors():
    model = tiny_model()
    with pytest.raises(KeyError), hero.attach(model, keep_ratio=0.2):
        raise KeyError
    assert "generate" not in model.__dict__


def test_an_error_in_forward_leaves_nothing_behind(model):
    from hero import calls

    handle, processor = attached(model, "patched", config_of({"keep_ratio": 0.2}))
    with handle:
        inputs = batch(processor, "one image")
        inputs["pixel_values"] = inputs["pixel_values"].clone()
        inputs["pixel_values"][0, 0, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            model(**inputs)
        assert calls.current_call(handle) is None
        with pytest.raises(ValueError, match="NaN"):
            model.generate(**inputs)
        assert calls.current_call(handle) is None


@pytest.mark.parametrize("which", PROCESSORS)
def test_threads(which):
    model = tiny_model()
    handle, processor = attached(model, which, config_of({"keep_ratio": 0.2}))
    work = []
    for seed in range(8):
        images = [tiny_image(60 + 10 * seed, 170 - 15 * seed, seed)]
        text = ONE if seed % 2 else TWO
        work.append(processor(images=images, text=[text], return_tensors="pt"))

    def run(inputs):
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return output, handle.last.index.clone(), handle.last.budgets.clone()

    with handle:
        serial = [run(inputs) for inputs in work]
        results = [[] for _ in work]

        def target(number):
            for _ in range(5):
                results[number].append(run(work[number]))

        threads = [threading.Thread(target=target, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for wanted, repeats in zip(serial, results, strict=True):
            assert len(repeats) == 5
            for result in repeats:
                assert all(torch.equal(one, other) for one, other in zip(result, wanted, strict=True))


@pytest.mark.parametrize("rule", ["exact 0.2", "floor 0.5"])
def test_nothing_stays_in_memory(model, rule):
    handle, processor = attached(model, "patched", config_of(RULES[rule]))
    references = []
    run = handle.encoder.kind.run
    add = hero.attention_rows.Collector._take

    def spy_run(*args, **kwargs):
        ran = run(*args, **kwargs)
        references.extend(map(weakref.ref, (ran.features, ran.cls)))
        return ran

    def spy_take(self, layer, rows, added):
        references.append(weakref.ref(rows))
        return add(self, layer, rows, added)

    with handle:
        vars(handle.encoder.kind)["run"] = spy_run
        hero.attention_rows.Collector._take = spy_take
        try:
            with torch.no_grad():
                inputs = batch(processor, "two sizes")
                model(**inputs)
                model.generate(**inputs, max_new_tokens=2)
        finally:
            hero.attention_rows.Collector._take = add
            del vars(handle.encoder.kind)["run"]
        gc.collect()
        alive = [reference() for reference in references if reference() is not None]
        assert len(references) > 8
        # The scores of the last call are the one thing that stays.
        assert all(tensor.data_ptr() == handle.last.scores.data_ptr() for tensor in alive), len(alive)
        small = sum(
            value.numel() * value.element_size()
            for value in vars(handle.last).values()
            if isinstance(value, torch.Tensor)
        )
        assert small < 16 * handle.last.scores.numel()


def test_deepcopy_is_independent(model):
    handle, processor = attached(model, "patched", config_of({"keep_ratio": 0.2}))
    with handle, torch.no_grad():
        inputs = batch(processor, "one image")
        wanted = model(**inputs).logits
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**inputs).logits, wanted)
        assert copied._hero.encoder.vision_tower is copied.model.vision_tower
        for parameter in copied.model.vision_tower.parameters():
            parameter.zero_()
        assert torch.equal(model(**inputs).logits, wanted)
        stock = copied._hero
        stock.remove()
        assert "generate" not in copied.__dict__
        assert torch.equal(model(**inputs).logits, wanted)
    assert "generate" not in model.__dict__


def test_save_pretrained_while_attached(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(tmp_path / "before")
    processor.save_pretrained(tmp_path / "before")
    with hero.attach(model, processor, keep_ratio=0.2, **LAYERS):
        model.save_pretrained(tmp_path / "attached")
        processor.save_pretrained(tmp_path / "attached")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "attached").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "attached" / name).read_bytes()


def test_a_decoding_step_compiles_into_one_graph(model):
    handle, processor = attached(model, "patched", config_of(RULES["exact 0.2"]))
    ids = batch(processor, "one image")["input_ids"][:, -3:]  # no image any more
    with handle, torch.no_grad():
        wanted = model(input_ids=ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(input_ids=ids).logits, wanted)


def test_compiled_tower(model, reference):
    """``torch.compile(fullgraph=True)`` of the vision tower: the scores come out of the graph."""
    results, logits = expected("one image", "exact 0.2", reference)
    model = tiny_model()
    handle, processor = attached(model, "patched", config_of(RULES["exact 0.2"]))
    with handle, torch.no_grad():
        model.model.vision_tower.compile(fullgraph=True, backend="aot_eager")
        inputs = batch(processor, "one image")
        for _ in range(2):
            assert_rows_equal(model(**inputs).logits, logits, 1e-5)
            assert handle.last.index.tolist() == results[0].index
        modules = model.model.vision_tower.encoder.layers
        states = [layer.self_attn.__dict__.get("_hero_attention_rows") for layer in modules]
        assert any(states) and all(state.rows is None for state in states if state)


def test_tower_compiled_before_attach(reference):
    results, _ = expected("one image", "exact 0.2", reference)
    model = tiny_model()
    inputs = batch(tiny_processor(), "one image")
    with torch.no_grad():
        model(**inputs)  # stock transformers takes a lock on its first call, which cannot be compiled
        model.model.vision_tower.compile(fullgraph=True, backend="aot_eager")
        model(**inputs)  # compiled once without hero
        handle, _ = attached(model, "stock", config_of(RULES["exact 0.2"]))
        with handle:
            model(**inputs)
            assert handle.last.index.tolist() == results[0].index


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradient_modes(model, reference, context):
    results, logits = expected("one image", "exact 0.2", reference)
    handle, processor = attached(model, "patched", config_of(RULES["exact 0.2"]))
    with handle, context():
        output = model(**batch(processor, "one image")).logits
        assert handle.last.index.tolist() == results[0].index
        assert not handle.last.scores.requires_grad
    assert_rows_equal(output.detach(), logits, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_model().to(dtype)
    handle, processor = attached(model, "patched", config_of({"keep_ratio": 0.2}))
    with handle:
        inputs = batch(processor, "two sizes").to(dtype)
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert output.shape == (2, inputs["input_ids"].shape[1] + 3)
        assert handle.last.scores.dtype == torch.float32
        selection = handle.encoder(inputs["pixel_values"], inputs["image_sizes"])
        assert selection.tokens.dtype == dtype
        assert not selection.tokens.isnan().any()
        for image, layout in enumerate(selection.layout):
            assert selection.lengths[image] == layout.kept_tokens(handle.config)


# ----------------------------------------------------------------------------------------- relevance


def embeddings(clip, tokenizer, model, inputs, texts):
    """(text [images, E], image [crops, E]) straight from CLIP, one text at a time."""
    with torch.no_grad():
        text = []
        for words in texts:
            ids = [2, *tokenizer(words, add_special_tokens=False)["input_ids"], 3]
            output = clip.get_text_features(input_ids=torch.tensor([ids]))
            text.append(getattr(output, "pooler_output", output)[0])
        output = clip.get_image_features(pixel_values=inputs)
        return torch.stack(text), getattr(output, "pooler_output", output)


def crops_of(inputs, handle):
    return handle.encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])[0]


@pytest.mark.parametrize("which", PROCESSORS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared weights", "second pass"])
@pytest.mark.parametrize("case", ["one image", "two sizes", "adjacent images"])
def test_relevance(model, reference, case, shared, which):
    clip = tiny_clip()
    if shared:
        clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    options = {"keep_ratio": 0.2, "alpha": 0.25, "temperature_clip": 0.03}
    relevance = hero.ClipRelevance(clip, tiny_tokenizer(), second_pass=not shared)
    handle, processor = attached(model, which, config_of(options), relevance=relevance)
    with handle, torch.no_grad():
        assert handle.encoder._shared == shared
        inputs = batch(processor, case)
        output = model(**inputs).logits
        last = handle.last
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(handle.last.index, last.index)
        questions = {
            ONE: "what is in this picture ?",
            TWO: "describe",
            ADJACENT: "describe",
            PAIR: "and describe the two pictures",
        }
        prompts = CASES[case][0]
        texts = [questions[prompt] for prompt in prompts for _ in range(prompt.count("<image>"))]
        crops = crops_of(inputs, handle)
    text, image = embeddings(clip, tiny_tokenizer(), model, crops, texts)
    rule = rule_of({**options, "weights": {"density": 0.2, "saliency": 0.8 * 0.25, "relevance": 0.8 * 0.75}})
    full = batch(tiny_processor(), case)
    results = reference.images(full["pixel_values"], full["image_sizes"], rule, text, image)
    assert last.index.tolist() == [place for result in results for place in result.index]
    assert last.budgets.tolist() == [budget for result in results for budget in result.budgets]
    assert_rows_equal(output, reference.logits(full, rule, text, image), 1e-5)
    wanted = reference.greedy(full, rule, 3, text, image)
    assert generated[:, inputs["input_ids"].shape[1] :].tolist() == wanted


def test_two_questions_about_one_image(model):
    """The same image with two prompts in a batch gets two different allocations."""
    relevance = hero.ClipRelevance(tiny_clip(), tiny_tokenizer(), second_pass=True)
    options = {"keep_ratio": 0.2, "alpha": 0.0, "temperature_clip": 0.02}
    handle, processor = attached(model, "patched", config_of(options), relevance=relevance)
    image = tiny_image(112, 112)
    prompts = ["USER : <image> w1 w2 w3 ASSISTANT :", "USER : <image> w40 w41 ASSISTANT :"]
    with handle, torch.no_grad():
        inputs = processor(images=[image, image], text=prompts, padding=True, return_tensors="pt")
        model(**inputs)
        both = handle.last.budgets.view(2, -1)
        assert not torch.equal(both[0], both[1])
        assert both.sum(1).tolist() == [both[0].sum()] * 2
        for number, prompt in enumerate(prompts):
            model(**processor(images=[image], text=[prompt], return_tensors="pt"))
            assert torch.equal(handle.last.budgets, both[number])


def test_long_question(model):
    """300 tokens: windows of the text encoder's length, averaged by length."""
    clip, tokenizer = tiny_clip(), tiny_tokenizer()
    relevance = hero.ClipRelevance(clip, tokenizer, second_pass=True)
    words = [f"w{number % 60}" for number in range(300)]
    handle, processor = attached(model, "patched", config_of({"keep_ratio": 0.2}), relevance=relevance)
    with handle, torch.no_grad():
        prompt = f"USER : <image> {' '.join(words)} ASSISTANT :"
        inputs = processor(images=[tiny_image(100, 100)], text=[prompt], return_tensors="pt")
        model(**inputs)
        assert handle.last.budgets.sum() > 0
    windows = [words[start : start + 75] for start in range(0, 300, 75)]
    parts, _ = embeddings(clip, tokenizer, model, torch.zeros(1, 3, 56, 56), [" ".join(w) for w in windows])
    mean = torch.nn.functional.normalize(parts, dim=-1).mean(0)
    wanted = torch.nn.functional.normalize(mean, dim=0)
    torch.testing.assert_close(relevance.text_embeddings([" ".join(words)])[0], wanted, rtol=1e-5, atol=1e-6)


def test_newline_index_constant():
    assert NEWLINE == -1
