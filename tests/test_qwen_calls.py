"""Calls of Qwen's packed towers: turns, templates, counts, attention, what is refused, and removal."""

import copy
import itertools
import math
import random

import pytest
import torch
import transformers
from independent import CACHE, CHAT_TEMPLATE, floor_ratio, tiny_clip
from independent import tiny_tokenizer as clip_tokenizer
from independent_policies import Greedy, hero_plus
from independent_qwen import (
    FAMILIES,
    IMAGE,
    ONE,
    TWO,
    QwenReference,
    batch_of,
    blocks_of,
    picture,
    tiny_model,
    tiny_picture,
    tiny_processor,
)
from test_qwen import (
    EACH,
    FEW,
    PROCESSORS,
    RULES,
    assert_logits,
    assert_selection,
    attached,
    diagonal,
    expected,
    kept_tokens,
    model_of,
    reference_of,
    rule_of,
    stock_batch,
    watched,
)
from transformers import pipeline
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hero
from hero import calls

SLOW = pytest.mark.slow
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NAMES = ("input_ids", "mm_token_type_ids", "attention_mask")


def prompt_of(processor, text, *images):
    return processor(images=list(images) or None, text=[text], return_tensors="pt")


def joined(first, *more):
    """Prompts of one row behind each other; numbers are words."""
    found = dict(first)
    for part in more:
        if not hasattr(part, "keys"):
            ids = torch.as_tensor(part).view(1, -1)
            part = dict(zip(NAMES, (ids, torch.zeros_like(ids), torch.ones_like(ids)), strict=True))
        for name, value in part.items():
            found[name] = torch.cat([found[name], value], dim=1 if name in NAMES else 0)
    return found


# --------------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize(("family", "which", "kinds"), diagonal(PROCESSORS, ("alone", "with kinds")))
def test_a_second_turn(family, which, kinds):
    """With the cache as without; the full prompt is refused without its grids, if it cannot be told."""
    model, image = model_of(family), picture(family, (7, 9))
    options, rule = {"max_new_tokens": 4, "do_sample": False}, rule_of(RULES["0.2"])
    handle, processor = attached(family, which, **RULES["0.2"])
    words = processor.tokenizer("USER : and that one ? ASSISTANT :", return_tensors="pt")["input_ids"]
    full = prompt_of(tiny_processor(family), ONE, image)
    with handle:
        first, cache = prompt_of(processor, ONE, image), DynamicCache(config=model.config.text_config)
        answer = model.generate(**first, **options, **{CACHE: cache})
        turn = torch.cat([answer, words], dim=1)
        given = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
        alone = []  # what the full prompt gives without its grids, on the cache's copies
        if which == "stock":
            for _ in range(2):
                try:
                    copied = {CACHE: copy.deepcopy(cache)}
                    alone.append(model.generate(**given, **options, **copied)[:, turn.shape[1] :].tolist())
                except ValueError as problem:
                    assert str(problem).startswith("image_grid_thw: ")
            given["image_grid_thw"] = first["image_grid_thw"]
        if kinds == "with kinds":
            given["mm_token_type_ids"] = (turn == model.config.image_token_id).int()
            given["image_grid_thw"] = first["image_grid_thw"]
        with watched(model) as seen:
            again = model.generate(**given, **options, **{CACHE: cache})
    length = first["input_ids"].shape[1]
    assert answer[:, length:].tolist() == reference_of(family).greedy(full, rule, 4)
    whole = joined(full, answer[:, length:], words)
    rows, images = reference_of(family).rows(whole, rule)
    assert torch.equal(again[:, : turn.shape[1]], turn)
    assert again[:, turn.shape[1] :].tolist() == reference_of(family).greedy(whole, rule, 4, images)
    assert all(one == again[:, turn.shape[1] :].tolist() for one in alone)  # if not refused, then right
    new = words.shape[1] + 1  # the answer's last token is not in the cache
    assert seen[0].expand(max(3, len(seen[0])), -1, -1)[-3:, 0].T.tolist() == rows[0].positions[-new:]


@pytest.mark.parametrize(("family", "which"), diagonal(PROCESSORS))
def test_turns_of_a_batch(family, which):
    """Two more turns of two rows, whose first prompts are padded, on one cache."""
    model, case, rule = model_of(family), "two rows", rule_of(RULES["0.5"])
    options, full = {"max_new_tokens": 3, "do_sample": False}, stock_batch(family, case)
    handle, processor = attached(family, which, **RULES["0.5"])
    words = [torch.tensor([[8, 24, 10], [9, 31, 10]]), torch.tensor([[40, 10], [41, 10]])]
    with handle:
        first, cache = batch_of(processor, family, case), DynamicCache(config=model.config.text_config)
        mask, grids = first["attention_mask"], {"image_grid_thw": first["image_grid_thw"]}
        answer = model.generate(**first, **options, **{CACHE: cache})
        answers = [answer[:, -3:]]
        for more in words:
            turn = torch.cat([answer, more], dim=1)
            mask = torch.cat([mask, torch.ones(2, turn.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
            given = {"input_ids": turn, "attention_mask": mask, **(grids if which == "stock" else {})}
            answer = model.generate(**given, **options, **{CACHE: cache})
            assert torch.equal(answer[:, : turn.shape[1]], turn)
            answers.append(answer[:, -3:])
    images, whole = expected(family, case, "0.5")[1], dict(full)
    for own, more in zip(answers, [*words, None], strict=True):
        assert own.tolist() == reference_of(family).greedy(whole, rule, 3, images)
        for part in (own, more) if more is not None else ():
            for name, value in zip(NAMES, (part, torch.zeros_like(part), torch.ones_like(part)), strict=True):
                whole[name] = torch.cat([whole[name], value], dim=1)


CALLS = {
    "no mask": {"attention_mask": None},
    "chunks": {"prefill_chunk_size": 7},
    "no cache": {"use_cache": False},
    "ids as inputs": {},
}


@pytest.mark.parametrize(("family", "which", "how"), diagonal(PROCESSORS, tuple(CALLS)))
def test_other_calls_of_generate(family, which, how):
    """All are greedy decoding of one image's prompt."""
    model, case = model_of(family), "one image"
    if how == "chunks" and VERSION < (5, 23):
        pytest.skip("transformers itself fails")
    images = expected(family, case, "0.5")[1]
    wanted = reference_of(family).greedy(stock_batch(family, case), rule_of(RULES["0.5"]), 5, images)
    handle, processor = attached(family, which, **RULES["0.5"])
    with handle:
        given = dict(batch_of(processor, family, case))
        length = given["input_ids"].shape[1]
        positional = [given.pop("input_ids")] if how == "ids as inputs" else []
        given = {name: value for name, value in {**given, **CALLS[how]}.items() if value is not None}
        output = model.generate(*positional, **given, **FEW)
    assert output[:, length:].tolist() == wanted


@pytest.mark.parametrize(("family", "dtype"), diagonal((torch.bfloat16, torch.float16)))
def test_half_precision(family, dtype):
    """All kept is stock; less is as many as promised, and mostly the same."""
    model, inputs = tiny_model(family).to(dtype), stock_batch(family, "different numbers of images")
    images = expected(family, "different numbers of images", "0.5")[1]
    with torch.no_grad():
        stock = model(**inputs).logits
        with hero.attach(model, keep_ratio=1.0):
            assert torch.equal(model(**inputs).logits, stock)
        with hero.attach(model, **RULES["0.5"]) as handle:
            assert model(**inputs).logits.dtype == dtype
            kept = kept_tokens(handle.last)
    assert handle.last.scores.dtype == torch.float32
    for own, image in zip(kept, images, strict=True):
        assert len(own) == len(image.kept)
        assert len(set(own) & set(image.kept)) >= 0.7 * len(own)


@pytest.mark.skipif(VERSION < (5, 23), reason="transformers gives such images positions of text")
@pytest.mark.parametrize(("family", "which"), diagonal(PROCESSORS, every=PROCESSORS))
def test_a_second_turn_with_a_new_image(family, which):
    """Raw pixels fail in transformers too, and are refused; features that the model encoded work."""
    model, rule = model_of(family), rule_of(RULES["0.5"])
    options = {"max_new_tokens": 4, "do_sample": False}
    one, two = picture(family, (7, 5)), picture(family, (4, 8), 5)
    stock = tiny_processor(family)
    handle, processor = attached(family, which, **RULES["0.5"])
    with handle, torch.no_grad():
        first, cache = prompt_of(processor, ONE, one), DynamicCache(config=model.config.text_config)
        answer = model.generate(**first, **options, **{CACHE: cache})[:, first["input_ids"].shape[1] :]
        more = prompt_of(processor, TWO, two)
        turn = joined(first, answer, more)
        pixels = turn.pop("pixel_values")
        for given in (
            {**turn, "pixel_values": pixels},
            {**turn, "pixel_values": more["pixel_values"]},
            {**turn, "pixel_values": more["pixel_values"], "image_grid_thw": more["image_grid_thw"]},
        ):
            with pytest.raises(ValueError, match=r"^\w+.*: "):
                model.generate(**given, **options, **{CACHE: cache})
        features = model.model.get_image_features(
            more["pixel_values"], more["image_grid_thw"], return_dict=True
        )
        turn["mm_encoder_outputs"] = {"image": features}
        length = turn["input_ids"].shape[1]
        with watched(model) as seen:
            output = model.generate(**turn, **options, **{CACHE: cache})
    assert torch.equal(output[:, :length], turn["input_ids"])
    whole = joined(prompt_of(stock, ONE, one), answer, prompt_of(stock, TWO, two))
    rows, images = reference_of(family).rows(whole, rule)
    assert output[:, length:].tolist() == reference_of(family).greedy(whole, rule, 4, images)
    new = seen[0].shape[-1]
    assert new > len(images[1].kept)
    assert seen[0][-3:, 0].T.tolist() == rows[0].positions[-new:]
    assert model.model.rope_deltas[:, 0].tolist() == [rows[0].delta]


# ------------------------------------------------------------------------------- templates and pipelines


@pytest.mark.parametrize("family", EACH)
def test_chat_template_and_pipeline(family):
    model, processor, image = model_of(family), tiny_processor(family), picture(family, (7, 9))
    processor.chat_template = CHAT_TEMPLATE.replace("<image>", IMAGE)
    words = {"type": "text", "text": "what is this ?"}
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, words]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    stock, rule = processor.apply_chat_template(chat, **options), rule_of(RULES["0.5"])
    wanted = reference_of(family).greedy(stock, rule, 5)
    with hero.attach(model, processor, **RULES["0.5"]) as handle:
        inputs = processor.apply_chat_template(chat, **options)
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 31
        output = model.generate(**inputs, **FEW)
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == wanted
        answer = pipeline("image-text-to-text", model=model, processor=processor)(
            text=chat, return_full_text=False, **FEW
        )
        assert handle.last.lengths == [31]
    text = processor.tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert answer[0]["generated_text"].split() == text.split()


# ------------------------------------------------------------------------------------ attention and ties


@pytest.mark.parametrize(("family", "attn"), diagonal(("eager", "sdpa")))
def test_attention_implementations(family, attn):
    model, case = tiny_model(family, attn=attn), "different numbers of images"
    assert model.model.visual.config._attn_implementation == attn
    rows, images = expected(family, case, "0.5")
    with hero.attach(model, **RULES["0.5"]) as handle, torch.no_grad():
        logits = model(**stock_batch(family, case)).logits
        assert_selection(handle.last, images)
    assert_logits(family, logits, [reference_of(family)._forward(row) for row in rows])


@pytest.fixture
def flash(request):
    """A stand-in for flash attention of packed sequences: (its name, the arguments of its calls)."""
    name, seen = "a_flash_stand_in", []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs)
        assert attention_mask is None
        assert kwargs["is_causal"] is False
        for side in "qk":
            lengths, longest = kwargs[f"cu_seq_lens_{side}"], kwargs[f"max_length_{side}"]
            assert lengths.dtype == torch.int32 and lengths[0] == 0
            assert lengths[-1] == query.shape[2] == key.shape[2]
            assert isinstance(longest, int) or longest.ndim == 0
            assert int(longest) >= int(lengths.diff().max())
        assert not module.is_causal
        ends, out = kwargs["cu_seq_lens_q"].tolist(), []
        for begin, end in itertools.pairwise(ends):
            q, k, v = (x[:, :, begin:end] for x in (query, key, value))
            out.append(((q @ k.mT) * kwargs["scaling"]).softmax(-1) @ v)
        return torch.cat(out, dim=2).transpose(1, 2), None

    type(ALL_ATTENTION_FUNCTIONS).register(name, attention)
    yield name, seen
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)


@pytest.mark.parametrize(("family", "ratio"), diagonal(("0.5", "0.2"), every=("0.5",)))
def test_packed_attention(family, ratio, flash):
    """One call a layer, with what flash attention needs."""
    name, seen = flash
    model, case = tiny_model(family), "different numbers of images"
    model.model.visual.config._attn_implementation = name
    rows, images = expected(family, case, ratio)
    inputs = stock_batch(family, case)
    with torch.no_grad():
        stock = model(**inputs).logits
        with hero.attach(model, keep_ratio=1.0):
            assert torch.equal(model(**inputs).logits, stock)
        wanted = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        before = len(seen)
        with hero.attach(model, **RULES[ratio]) as handle:
            logits = model(**inputs).logits
            assert_selection(handle.last, images)
            assert len(seen) - before == len(model.model.visual.blocks)
        again = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    assert torch.equal(again.pooler_output, wanted.pooler_output)
    assert_logits(family, logits, [reference_of(family)._forward(row) for row in rows])


@pytest.mark.parametrize(("family", "policy"), diagonal(("uniform", "hero")))
def test_ties_go_to_the_lower_place(family, policy):
    """Without queries every token receives the same attention."""
    model, case = tiny_model(family), "small and large"
    for block in model.model.visual.blocks:
        width = block.attn.qkv.in_features
        block.attn.qkv.weight.data[:width] = 0
        block.attn.qkv.bias.data[:width] = 0
    options, inputs = {"keep_ratio": 0.3, "block": 5, "policy": policy}, stock_batch(family, case)
    with torch.no_grad():
        images = QwenReference(model).images(inputs, rule_of(options))
        with hero.attach(model, **options) as handle:
            model(**inputs)
            kept, budgets = kept_tokens(handle.last), handle.last.budgets.tolist()
    assert budgets == [budget for image in images for budget in image.budgets]
    for image, own in zip(images, kept, strict=True):
        assert sum(budgets[: len(image.blocks)]) == len(own)
        wanted = [token for block in image.blocks for token in block[: budgets.pop(0)]]
        assert own == sorted(wanted)


# -------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("family", EACH)
def test_policies(family):
    model, inputs = model_of(family), stock_batch(family, "small and large")
    _, images = expected(family, "small and large", "uniform")
    with torch.no_grad():
        found = []
        for _ in range(2):
            with hero.attach(model, policy="random", keep_ratio=0.3, block=3) as handle:
                model(**inputs)
                assert handle.last.policy == "random"
                assert handle.last.budgets.tolist() == [n for image in images for n in image.budgets]
                assert handle.last.lengths == [len(image.kept) for image in images]
                found.append(kept_tokens(handle.last))
    assert found[0] == found[1] != [image.kept for image in images]
    for policy in ("hired", "globalcom2", "fastervlm", "visionzip", "scope"):
        with pytest.raises(ValueError, match=rf"^policy: .*{policy}"):
            hero.attach(model, policy=policy)


@pytest.mark.parametrize("pool", ["crop", "image"])
@pytest.mark.parametrize("policy", ["divprune", "cdpruner"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_covering(family, policy, pool):
    """Blocks keep their part in proportion, a whole image as many; which tokens follows from the features."""
    model, inputs, clip = model_of(family), stock_batch(family, "small and large"), tiny_clip()
    own, text = {}, None
    if policy == "cdpruner":
        own["relevance"] = hero.ClipRelevance(clip, clip_tokenizer(), second_pass=True)
        text = ["what is in this picture ?", "describe"]
    keep = {"policy": policy, "pool": pool, "keep_ratio": 0.3, "block": 4}
    with hero.attach(model, tiny_processor(family), **keep, **own) as handle, torch.no_grad():
        encoder, given = handle.encoder, (inputs["pixel_values"], inputs["image_grid_thw"])
        patches, plan = encoder.prepare(*given)
        encoded = encoder.encode(patches, plan)
        scored = encoder.score(encoded, plan, text)
        selection, config = encoder(*given, text), handle.config
    kept, first = selection.keep_mask(), 0
    for layout in plan.layouts:
        blocks = range(first, first + layout.crops)
        first += layout.crops
        wanted = layout.block_budgets(config)
        assert sum(wanted) == max(1, int(0.3 * layout.full_tokens)) == int(kept[blocks].sum())
        assert pool == "image" or kept[blocks].sum(1).tolist() == wanted == selection.budgets[blocks].tolist()
        places = [(block, token) for block in blocks for token in plan.valid[block].nonzero()[:, 0].tolist()]
        quality = [1.0 if scored.own is None else float(scored.own[place]) for place in places]
        if policy == "cdpruner" and len(places) > 1:
            assert (min(quality), max(quality)) == (0.0, 1.0)
        pools = [blocks] if pool == "image" else [[block] for block in blocks]
        for own_blocks in pools:
            own_places = [number for number, (block, _) in enumerate(places) if block in own_blocks]
            vectors = [encoded.features[places[number]].tolist() for number in own_places]
            near = [bool(kept[places[number]]) for number in own_places]
            greedy = Greedy(policy, vectors, [quality[number] for number in own_places])
            assert sorted(greedy.choose(sum(near), near)) == [n for n, one in enumerate(near) if one]


@pytest.mark.parametrize("family", [*FAMILIES][:2])
def test_hero_plus(family):
    """Blocks as tiles, without a thumbnail, from the encoder's own features."""
    model, inputs = model_of(family), stock_batch(family, "small and large")
    options = {"policy": "hero+", "keep_ratio": 0.3, "block": 4}
    with hero.attach(model, tiny_processor(family), **options) as handle, torch.no_grad():
        encoder, given = handle.encoder, (inputs["pixel_values"], inputs["image_grid_thw"])
        patches, plan = encoder.prepare(*given)
        encoded = encoder.encode(patches, plan)
        selection = encoder(*given)
    assert not encoded.attention and not encoder.observed
    keep, first = selection.keep_mask(), 0
    for layout in plan.layouts:
        own = slice(first, first + layout.crops)
        first += layout.crops
        valid = [mask.nonzero()[:, 0].tolist() for mask in plan.valid[own]]
        kept = [set(mask.nonzero()[:, 0].tolist()) for mask in keep[own]]
        total = max(1, int(0.3 * layout.full_tokens))
        shares, budgets, expected = hero_plus(
            list(encoded.features[own]), valid, None, total, None, 1.0, near=kept
        )
        torch.testing.assert_close(selection.shares[own], torch.tensor(shares), rtol=0, atol=1e-6)
        assert selection.budgets[own].tolist() == budgets and kept == expected


@pytest.mark.parametrize(
    ("family", "grid", "side", "count"),
    [
        *((family, (13, 14), 4, 54) for family in FAMILIES),
        ("qwen2_vl", (13, 14), 4, 17),
        ("qwen2_5_vl", (5, 9), 12, 1),
        ("qwen3_vl", (4, 5), 3, 5),  # 2.25, 1.5, 0.75 and 0.5: the second block gets 2
        ("qwen3_5", (3, 5), 2, 4),
    ],
)
@pytest.mark.parametrize("policy", [{"policy": "uniform"}, {"policy": "divprune", "pool": "crop"}])
def test_equal_shares_are_in_proportion(family, grid, side, count, policy):
    """By whole numbers: largest remainder, ties to the lower block."""
    sizes = [len(block) for block in blocks_of(*grid, side)]
    wanted = [size * count // sum(sizes) for size in sizes]
    order = sorted(range(len(sizes)), key=lambda b: (-(sizes[b] * count % sum(sizes)), b))
    for block in order[: count - sum(wanted)]:
        wanted[block] += 1
    inputs = prompt_of(tiny_processor(family), TWO, picture(family, grid))
    with hero.attach(model_of(family), **policy, block=side, keep_tokens=count) as handle:
        model_of(family)(**inputs)
        assert handle.last.budgets.tolist() == wanted


@pytest.mark.parametrize("family", EACH)
def test_options(family):
    """There is no thumbnail; layers must attend to the whole image; 0.7 is kept where nothing is said."""
    model, processor = model_of(family), tiny_processor(family)
    assert hero.HeroConfig().keep_ratio == 0.2
    size = picture(family, (10, 10)).size[::-1]
    for options, count in (
        ({}, 70),
        ({"policy": "uniform", "block": 3}, 70),
        ({"config": hero.HeroConfig()}, 20),
        ({"keep_ratio": 0.29}, 29),
        ({"keep_ratio": 0.001}, 1),
        ({"keep_tokens": 33}, 33),
        ({"keep_tokens": 133}, 100),
    ):
        with hero.attach(model, processor, **options) as handle:
            assert handle.count_tokens(size) == count
    with pytest.raises(TypeError, match=r"thumbnail_layers"):
        hero.attach(model, thumbnail_layers=(1,))
    for layers in ((6,), (-7,), (1, 99)):
        with pytest.raises(ValueError, match=r"^tile_layers: "):
            hero.attach(model, tile_layers=layers)
    for layers in ((0,), (2, 3), (-2,)):
        if family == "qwen2_5_vl":  # whose layers 0, 2 and 4 have windows
            with pytest.raises(ValueError, match=r"^tile_layers: "):
                hero.attach(model, tile_layers=layers)
        else:
            hero.attach(model, tile_layers=layers).remove()
    for block in (0, -1, 1.5):
        with pytest.raises((TypeError, ValueError), match=r"^block: "):
            hero.attach(model, block=block)
    inputs = stock_batch(family, "one image")  # and what failed has left nothing
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, tiny_model(family)(**inputs).logits)


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("family", EACH)
def test_refused_by_name(family):
    model, processor = model_of(family), tiny_processor(family)
    with hero.attach(model, processor, keep_ratio=0.3), torch.no_grad():
        inputs = prompt_of(processor, TWO, picture(family, (6, 7)))
        embedded = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
        embedded["inputs_embeds"] = model.get_input_embeddings()(embedded.pop("input_ids"))
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"^(input_ids|inputs_embeds): "):
                call(**embedded)
        at = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
        for parts in ((slice(at), slice(at + 1, None)), (slice(at + 1), slice(at, None))):
            wrong = dict(inputs)  # with one placeholder less, or one more
            for name in NAMES:
                wrong[name] = torch.cat([inputs[name][:, part] for part in parts], dim=1)
            for call in (model, model.generate):
                with pytest.raises(ValueError, match=r"^input_ids: "):
                    call(**wrong)
        model.generate(**inputs, **FEW)  # and nothing is left of it


@pytest.mark.parametrize("version", [(5, 18), (5, 19)])
@pytest.mark.parametrize("family", EACH)
def test_beams_that_transformers_mixes_up(family, version, monkeypatch):
    """With several images in a prompt, in 5.18 alone."""
    monkeypatch.setattr(calls, "_transformers_version", lambda: version)
    model, processor = model_of(family), tiny_processor(family)
    options = {"max_new_tokens": 2, "do_sample": False}
    with hero.attach(model, processor, keep_ratio=0.3):
        pair = batch_of(processor, family, "two images in a prompt")
        alone = batch_of(processor, family, "two rows")
        model.generate(**pair, **options)
        for more in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            model.generate(**alone, **{**options, **more})
            if version == (5, 18):
                with pytest.raises(ValueError, match=r"^num_beams"):
                    model.generate(**pair, **{**options, **more})
            else:
                model.generate(**pair, **{**options, **more})


# ---------------------------------------------------------------------------------------------- removal


def state_of(model, processor):
    """All that attaching could have left behind."""
    found = {}
    for name, module in model.named_modules():
        hooks = {
            key: list(value)
            for key, value in vars(module).items()
            if "hooks" in key and hasattr(value, "keys")
        }
        config = getattr(module, "config", None)
        found[name] = (
            sorted(vars(module)),
            type(module),
            hooks,
            id(config),
            getattr(config, "_attn_implementation", None),
        )
    parts = (processor, processor.image_processor, processor.tokenizer, processor.video_processor)
    found["processor"] = [(type(part), sorted(vars(part))) for part in parts]
    return found


@pytest.mark.parametrize(("family", "how"), diagonal(("remove", "with", "failed call")))
def test_removal_restores_exactly(family, how):
    model, processor = tiny_model(family), tiny_processor(family)
    inputs = batch_of(processor, family, "two images in a prompt")
    with torch.no_grad():
        logits, answer = model(**inputs).logits, model.generate(**inputs, **FEW)
        before = state_of(model, processor)
        handle = hero.attach(model, processor, keep_ratio=0.3, block=3)
        assert state_of(model, processor) != before
        if how == "with":
            with handle:
                model(**batch_of(processor, family, "two images in a prompt"))
        else:
            model.generate(**batch_of(processor, family, "two images in a prompt"), **FEW)
            if how == "failed call":
                with pytest.raises(ValueError):
                    model(**{**inputs, "image_grid_thw": inputs["image_grid_thw"][:1]})
            handle.remove()
        assert state_of(model, processor) == before
        again = batch_of(processor, family, "two images in a prompt")
        assert all(torch.equal(again[name], inputs[name]) for name in inputs)
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, **FEW), answer)


# ----------------------------------------------------------------------------------------------- counts


def resized_tokens(size, factor, least, most):
    """Tokens of an image of (height, width), as Qwen's processors resize it; halves round to even."""
    height, width = size
    down, right = round(height / factor), round(width / factor)
    if down * right * factor**2 > most:
        shrink = math.sqrt(height * width / most)
        down = max(1, math.floor(height / shrink / factor))
        right = max(1, math.floor(width / shrink / factor))
    elif down * right * factor**2 < least:
        grow = math.sqrt(least / (height * width))
        down, right = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return down * right


LIMITS = {
    "tiny": None,
    "published": (4 * 28 * 28, 16384 * 28 * 28),
    "narrow": (256 * 28 * 28, 1280 * 28 * 28),
}


def draw(generator):
    """(height, width) that no processor refuses, many of them near multiples of a token's side."""
    while True:
        size = []
        for _ in range(2):
            kind = generator.random()
            if kind < 0.3:
                size.append(
                    generator.choice((14, 16, 28, 32)) * generator.randint(1, 90) + generator.randint(-1, 1)
                )
            else:
                size.append(int(10 ** generator.uniform(0, 3.7)))
        if min(size) > 0 and max(size) / min(size) <= 200:
            return tuple(size)


@pytest.mark.parametrize("sizes", [300, pytest.param(3000, marks=SLOW)])
@pytest.mark.parametrize(("family", "limits"), diagonal(tuple(LIMITS)))
def test_counts(family, limits, sizes):
    """``count_tokens`` is a part of what the image processor plans, rounded down, for any size."""
    generator, patch = random.Random(f"{family} {limits} {sizes}"), FAMILIES[family][2]
    options = {}
    if limits != "tiny":
        options = dict(zip(("min_pixels", "max_pixels"), LIMITS[limits], strict=True))
    processor, model = tiny_processor(family, **options), model_of(family)
    images = processor.image_processor
    edges = images.size["shortest_edge"], images.size["longest_edge"]
    drawn = [draw(generator) for _ in range(sizes)] + [(1, 1), (1, 200), (4097, 64)]
    stock = [images.get_number_of_image_patches(*size) // 4 for size in drawn]
    assert [resized_tokens(size, 2 * patch, *edges) for size in drawn] == stock
    stock_plan = processor._get_num_multimodal_tokens(drawn)
    for keep in ({"keep_ratio": 1.0}, {"keep_ratio": 0.3}, {"keep_tokens": 40}):
        with hero.attach(model, processor, **keep) as handle:
            found = [handle.count_tokens(size) for size in drawn]
            plan = processor._get_num_multimodal_tokens(drawn)
        wanted = [
            min(40, count) if "keep_tokens" in keep else max(1, floor_ratio(keep["keep_ratio"] * count))
            for count in stock
        ]
        assert found == wanted == list(plan["num_image_tokens"])
        assert plan["num_image_patches"] == stock_plan["num_image_patches"]
    assert processor._get_num_multimodal_tokens(drawn)["num_image_tokens"] == stock
    with hero.attach(model, processor) as handle, pytest.raises(ValueError, match=r"^image_size: "):
        handle.count_tokens((1, 201))


@pytest.mark.parametrize("sizes", [8, pytest.param(60, marks=SLOW)])
@pytest.mark.parametrize("family", EACH)
def test_counts_of_real_images(family, sizes):
    """What the attached processor writes is the count, and what the model keeps."""
    generator, model, processor = random.Random(family), model_of(family), tiny_processor(family)
    with hero.attach(model, processor, keep_ratio=0.3, block=3) as handle, torch.no_grad():
        for seed in range(sizes):
            size = generator.randint(2, 300), generator.randint(2, 300)
            if seed % 3 == 0:
                size = (size[0] % 9 + 2, size[1])
            inputs = prompt_of(processor, TWO, tiny_picture(*size, seed))
            wanted = handle.count_tokens(size)
            assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == wanted
            assert model(**inputs).logits.isfinite().all()
            assert handle.last.lengths == [wanted] == [int(handle.last.keep_mask().sum())]
            grid = inputs["image_grid_thw"][0].tolist()
            [layout] = handle.last.layout
            assert [2 * layout.rows[1], 2 * layout.columns[1]] == grid[1:]
            assert layout.grid == (math.ceil(grid[1] / 6), math.ceil(grid[2] / 6))
