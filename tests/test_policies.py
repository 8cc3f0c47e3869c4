"""Policies against the reference of ``independent_policies.py``, and the interface of a policy."""

import dataclasses
import functools
import math
import random
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from independent import CASES, ONE, tiny_clip, tiny_image, tiny_model, tiny_processor, tiny_tokenizer
from independent_policies import COVERING, PEERS, IndependentPeers, PeerRule, hero_plus
from test_llava_next import assert_rows_equal, attached, batch, embeddings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import hero
import hero_kernels as hk
from hero import encoder as encoders
from hero import signals
from hero.layout import Geometry
from hero.policies import POLICIES, Needs, Policy, Rows, Scored, make_policy

KEEPS = {
    "0.05": {"keep_ratio": 0.05},
    "0.2": {"keep_ratio": 0.2},
    "0.5": {"keep_ratio": 0.5},
    "0.9": {"keep_ratio": 0.9},
    "30 tokens": {"keep_tokens": 30},
    "floor 0.5": {"keep_ratio": 0.5, "allocation": "floor"},
}
SIZES = [(120, 90), (60, 170), (25, 200), (50, 50), (200, 25), (112, 112)]
POOLS = [f"{policy} {pool}" for policy in COVERING for pool in ("crop", "image")]
EVERY = [*(policy for policy in POLICIES if policy not in COVERING), *POOLS]
WORDS = ["what is in this picture ?", "describe", "and describe the two pictures"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def reference(model):
    own = IndependentPeers(model)
    own.clip = tiny_clip()
    return own


def options_of(policy: str) -> dict[str, str]:
    """Of a policy's name, with a pool or without."""
    return dict(zip(("policy", "pool"), policy.split(), strict=False))


def rule_of(policy: str, keep: dict) -> PeerRule:
    ratio = keep.get("keep_ratio")
    return PeerRule(**{**options_of(policy), **keep, "keep_ratio": None if ratio is None else str(ratio)})


@functools.cache
def relevance_model() -> hero.ClipRelevance:
    return hero.ClipRelevance(tiny_clip(), tiny_tokenizer(), second_pass=True)


def asked(policy: str) -> dict:
    """What the policy needs to read the question, if it does."""
    return {"relevance": relevance_model()} if policy.startswith("cdpruner") else {}


def questions(count: int) -> torch.Tensor:
    """CLIP's embeddings of as many questions."""
    return embeddings(tiny_clip(), tiny_tokenizer(), None, torch.zeros(1, 3, 56, 56), WORDS[:count])[0]


def select(encoder, pixels, sizes) -> hero.Selection:
    """The selection, with a question an image if the policy reads it."""
    return encoder(pixels, sizes, (WORDS * len(sizes))[: len(sizes)] if encoder.needs_text else None)


@functools.cache
def expected(case: str, policy: str, keep: str, reference: IndependentPeers):
    inputs = batch(tiny_processor(), case)
    with torch.no_grad():
        return reference.images(inputs["pixel_values"], inputs["image_sizes"], rule_of(policy, KEEPS[keep]))


def encode(model, config, inputs, **kwargs):
    given = {"tokenizer": tiny_tokenizer(), **asked(config.policy.name), **kwargs}
    with hero.attach(model, config=config, **given) as handle, torch.no_grad():
        return select(handle.encoder, inputs["pixel_values"], inputs["image_sizes"])


# --------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", PEERS)
def test_selection(model, reference, policy, case, keep):
    results = expected(case, policy, keep, reference)
    inputs = batch(tiny_processor(), case)
    selection = encode(model, hero.HeroConfig(policy=policy, **KEEPS[keep]), inputs)
    assert selection.policy == policy
    shares = torch.tensor([share for result in results for share in result.shares])
    torch.testing.assert_close(selection.shares, shares, rtol=0, atol=1e-6)
    assert selection.budgets.tolist() == [budget for result in results for budget in result.budgets]
    scores = torch.tensor([score for result in results for score in result.scores])
    places = torch.tensor([place for result in results for place in result.index if place >= 0])
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(selection.scores.flatten()[places], scores.flatten()[places], **close)
    assert selection.index.tolist() == [place for result in results for place in result.index]
    assert selection.lengths == [len(result.index) for result in results]
    tokens = torch.cat([result.tokens for result in results])
    torch.testing.assert_close(selection.tokens, tokens, rtol=1e-5, atol=1e-5)


def check_covering(model, reference, policy: str, pairs, **options) -> int:
    """Selections are the reference's for (case, keep); the number of those with nearly equal candidates.

    The package compares cosines of rounded features. Where that may decide between two candidates, the
    reference follows the package.
    """
    rounded = 0
    for case, keep in pairs:
        inputs = batch(tiny_processor(), case)
        config = hero.HeroConfig(**options_of(policy), **KEEPS[keep], **options)
        selection = encode(model, config, inputs)
        sizes, rule = inputs["image_sizes"], dataclasses.replace(rule_of(policy, KEEPS[keep]), **options)
        for near in (None, frozenset(selection.index.tolist())):
            rule = dataclasses.replace(rule, near=near)
            results = reference.images(inputs["pixel_values"], sizes, rule, questions(len(sizes)))
            if selection.index.tolist() == [place for result in results for place in result.index]:
                break
            rounded += near is None
        else:
            raise AssertionError(f"{policy}: not the reference's patches of {case!r} at {keep}")
        assert selection.budgets.tolist() == [budget for result in results for budget in result.budgets]
        assert selection.lengths == [len(result.index) for result in results]
        tokens = torch.cat([result.tokens for result in results])
        torch.testing.assert_close(selection.tokens, tokens, rtol=1e-5, atol=1e-5)
        if "floor" not in keep:
            geometry = Geometry(56, 14, tuple(map(tuple, model.config.image_grid_pinpoints)))
            counted = [hero.count_tokens(config, size, geometry=geometry) for size in sizes.tolist()]
            assert selection.lengths == counted
        if policy in ("cdpruner crop", "scope crop"):
            quality = torch.tensor([score for result in results for score in result.scores]).flatten()
            places = [place for result in results for place in result.index if place >= 0]
            found = selection.scores.flatten()
            torch.testing.assert_close(found[places], quality[places], rtol=1e-3, atol=1e-5)
    return rounded


PAIRS = [(case, keep) for case in CASES for keep in KEEPS]


@pytest.mark.parametrize("policy", POOLS)
def test_covering(model, reference, policy):
    """Each case and each ratio once; all pairs of them are slow."""
    assert check_covering(model, reference, policy, PAIRS[::5]) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("policy", POOLS)
def test_covering_in_full(model, reference, policy):
    assert check_covering(model, reference, policy, PAIRS) <= 9


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_exponent_of_attention(model, reference, alpha):
    pairs = [("two sizes", "0.2"), ("adjacent images", "0.5")]
    assert not check_covering(model, reference, "scope crop", pairs, alpha=alpha)


def test_the_nearest_neighbour_of_the_first_patch_is_valid(model, reference):
    """An image whose padding is like the patch that is farthest from all others."""
    inputs = tiny_processor()(images=[tiny_image(180, 30)], text=[ONE], return_tensors="pt")
    selection = encode(model, hero.HeroConfig(keep_tokens=1, policy="divprune"), inputs)
    rule = PeerRule("divprune", keep_tokens=1, pool="image")
    (result,) = reference.images(inputs["pixel_values"], inputs["image_sizes"], rule)
    assert selection.index.tolist() == result.index and selection.budgets.sum() == 1


def test_covering_differs(reference):
    """Each policy of each pool, SCOPE of each exponent, has a choice of its own."""
    inputs = batch(tiny_processor(), "two sizes")
    rules = [rule_of(policy, KEEPS["0.2"]) for policy in POOLS]
    rules += [dataclasses.replace(rule_of("scope crop", KEEPS["0.2"]), alpha=alpha) for alpha in (0.5, 3.0)]
    given = inputs["pixel_values"], inputs["image_sizes"]
    kept = [[one.index for one in reference.images(*given, rule, questions(2))] for rule in rules]
    assert all(kept.count(one) == 1 for one in kept)


def check_hero_plus(encoder, inputs, words, cosines, temperature) -> int:
    """The encoder keeps what the formulas say of its own features; how many images had near ties.

    Args:
        cosines: of all crops with the questions, or None.
    """
    with torch.no_grad():
        selection = encoder(inputs["pixel_values"], inputs["image_sizes"], words)
        crops, plan = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
        encoded = encoder.encode(crops, plan)
    keep, first, ties, patches = selection.keep_mask(), 0, 0, plan.valid.shape[1]
    for layout in selection.layout:
        own = slice(first, first + layout.crops)
        valid = [mask.nonzero()[:, 0].tolist() for mask in plan.valid[own]]
        attention = encoded.attention["patches"].scores[first].tolist()
        total = int(Fraction(str(encoder.config.keep_ratio)) * layout.crops * patches)
        told = None if cosines is None else cosines[own][1:].tolist()
        kept = [set(mask.nonzero()[:, 0].tolist()) for mask in keep[own]]
        for near in (None, kept):
            given = valid, attention, total, told, temperature, near
            shares, budgets, expected = hero_plus(list(encoded.features[own]), *given)
            if expected == kept:
                break
            ties += near is None
        torch.testing.assert_close(selection.shares[own], torch.tensor(shares), rtol=0, atol=1e-6)
        assert selection.budgets[own].tolist() == budgets
        assert kept == expected
        first += layout.crops
    return ties


@pytest.mark.parametrize("text", ["no text", "shared weights", "second pass"])
@pytest.mark.parametrize("case", CASES)
def test_hero_plus(model, case, text):
    """With the question and without, with padding and without tiles."""
    relevance = words = cosines = None
    inputs = batch(tiny_processor(), case)
    if text != "no text":
        clip = tiny_clip()
        if text == "shared weights":
            clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
        relevance = hero.ClipRelevance(clip, tiny_tokenizer(), second_pass=True)
        words = ["what is in this picture ?", "describe", "and describe the two pictures"] * 2
        words = words[: len(inputs["image_sizes"])]
    config = hero.HeroConfig(0.3, policy="hero+", temperature_clip=0.1)
    with hero.attach(model, tiny_processor(), config=config, relevance=relevance) as handle:
        assert handle.encoder.needs_text == (relevance is not None)
        if relevance is not None:
            crops, plan = handle.encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
            asked_about, images = embeddings(clip, tiny_tokenizer(), model, crops, words)
            cosines = torch.cosine_similarity(images, asked_about[plan.places.images], dim=-1)
        assert check_hero_plus(handle.encoder, inputs, words, cosines, 0.1) <= 1


@pytest.mark.parametrize("policy", PEERS)
def test_the_reference_merges_and_differs(reference, policy):
    """The cases above are no empty ones: peers choose otherwise than one another, and patches do merge."""
    kept = {peer: [one.index for one in expected("two sizes", peer, "0.5", reference)] for peer in PEERS}
    others = [kept[peer] for peer in PEERS if peer != policy]
    assert kept[policy] not in others
    if policy == "visionzip":
        chosen = expected("two sizes", "fastervlm", "0.5", reference)
        merged = expected("two sizes", "visionzip", "0.5", reference)
        both = zip(chosen[0].index, merged[0].index, strict=True)
        assert any(one != other for one, other in both)


@pytest.mark.parametrize("which", ["patched", "stock"])
@pytest.mark.parametrize("policy", EVERY)
def test_everything_kept_is_the_stock_model(model, policy, which):
    inputs = batch(tiny_processor(), "adjacent images")
    with torch.no_grad():
        stock = model(**inputs).logits
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    handle, processor = attached(model, which, hero.HeroConfig(1.0, **options_of(policy)), **asked(policy))
    with handle, torch.no_grad():
        ours = batch(processor, "adjacent images")
        assert torch.equal(ours["input_ids"], inputs["input_ids"])
        torch.testing.assert_close(model(**ours).logits, stock, rtol=0, atol=1e-6)
        if handle.encoder.needs_text:
            return  # and there is no question here
        kept = model.model.get_image_features(ours["pixel_values"], ours["image_sizes"]).pooler_output
        for one, other in zip(kept, features, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("which", ["patched", "stock"])
@pytest.mark.parametrize("policy", [*PEERS, *COVERING])
def test_generate(model, reference, policy, which):
    config = hero.HeroConfig(0.3, policy=policy)
    rule = PeerRule(policy, "0.3", pool="image" if policy == "divprune" else "crop")  # the default
    full, texts = batch(tiny_processor(), "two sizes"), questions(2)
    wanted = reference.greedy(full, rule, 4, texts)
    logits = reference.logits(full, rule, texts)
    handle, processor = attached(model, which, config, **asked(policy))
    with handle:
        inputs = batch(processor, "two sizes")
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == wanted
        with torch.no_grad():
            assert_rows_equal(model(**inputs).logits, logits, 1e-5)


@pytest.mark.parametrize("policy", ["uniform", "random"])
def test_generate_with_ours(model, policy):
    for which in ("patched", "stock"):
        handle, processor = attached(model, which, hero.HeroConfig(0.3, policy=policy))
        with handle:
            inputs = batch(processor, "two sizes")
            output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert output.shape[1] == inputs["input_ids"].shape[1] + 3


def test_bundled_model():
    """Each policy answers on the mini model, in as many tokens as were counted."""
    from hero import mini

    model, processor, relevance = mini.load()
    demo = mini.demo_questions()[0]
    from PIL import Image

    image = Image.open(demo.image).convert("RGB")
    for policy in POLICIES:
        with hero.attach(model, processor, policy=policy, keep_ratio=0.3, relevance=relevance) as handle:
            inputs = processor(images=image, text=f"<image> {demo.question}", return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert handle.last.policy == policy
            assert handle.last.lengths == [handle.count_tokens(inputs["image_sizes"][0].tolist())]
            assert output.shape[1] == inputs["input_ids"].shape[1] + 2


# ------------------------------------------------------------------------------ counts, batches, devices


@pytest.mark.parametrize("policy", EVERY)
def test_counts(model, policy):
    """What is packed is what was counted, whatever the image, the ratio or the number of tokens."""
    draw = random.Random(f"counts of {policy}")
    processor = tiny_processor()
    for _ in range(6):
        sizes = [(draw.randint(10, 220), draw.randint(10, 220)) for _ in range(3)]
        images = [tiny_image(*size, seed) for seed, size in enumerate(sizes)]
        inputs = processor(images=images, text=[ONE] * 3, padding=True, return_tensors="pt")
        one = {"keep_ratio": draw.randint(1, 100) / 100}
        other = {"keep_tokens": draw.randint(1, 130)}
        for keep in (one, other):
            config = hero.HeroConfig(**options_of(policy), **keep)
            selection = encode(model, config, inputs)
            geometry = Geometry(56, 14, tuple(map(tuple, model.config.image_grid_pinpoints)))
            counted = [hero.count_tokens(config, size, geometry=geometry) for size in sizes]
            assert selection.lengths == counted, (sizes, keep)
            assert len(selection.index) == sum(counted) == int((selection.index >= -1).sum())


@pytest.mark.parametrize("policy", EVERY)
def test_an_image_does_not_depend_on_its_batch(model, policy):
    processor = tiny_processor()
    images = [tiny_image(*size, seed) for seed, size in enumerate(SIZES)]
    inputs = processor(images=images, text=[ONE] * len(images), padding=True, return_tensors="pt")
    given = {"tokenizer": tiny_tokenizer(), **options_of(policy), **asked(policy)}
    with hero.attach(model, keep_ratio=0.4, **given) as handle, torch.no_grad():
        pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
        texts = questions(3).repeat(2, 1) if handle.encoder.needs_text else None
        whole = handle.encoder(pixels, sizes, texts)
        first = start = 0
        for image, layout in enumerate(whole.layout):
            own = slice(image, image + 1)
            alone = handle.encoder(pixels[own], sizes[own], texts if texts is None else texts[own])
            theirs = whole.index[start : start + whole.lengths[image]]
            place = torch.where(theirs < 0, theirs, theirs - first * layout.patches)
            assert torch.equal(place, alone.index)
            tokens = whole.tokens[start : start + whole.lengths[image]]
            torch.testing.assert_close(tokens, alone.tokens, rtol=1e-5, atol=1e-5)
            start, first = start + whole.lengths[image], first + layout.crops


@pytest.mark.parametrize("policy", ["hired", pytest.param("visionzip", marks=pytest.mark.slow)])
def test_compiled_tower(model, reference, policy):
    """Rows of several maps, and keys, come out of the graph."""
    own = tiny_model()
    results = expected("two sizes", policy, "0.5", reference)
    with hero.attach(own, policy=policy, keep_ratio=0.5) as handle, torch.no_grad():
        own.model.vision_tower.compile(fullgraph=True, backend="aot_eager")
        inputs = batch(tiny_processor(), "two sizes")
        for _ in range(2):
            selection = handle.encoder(inputs["pixel_values"], inputs["image_sizes"])
            assert selection.index.tolist() == [place for result in results for place in result.index]
            tokens = torch.cat([result.tokens for result in results])
            torch.testing.assert_close(selection.tokens, tokens, rtol=1e-5, atol=1e-5)
        for module in handle.encoder.observed.values():
            state = module.__dict__["_hero_attention_rows"]
            assert state.rows is None and state.keys is None


@pytest.mark.parametrize("policy", [*PEERS, *COVERING])
def test_fused_attention(model, reference, policy):
    inputs = batch(tiny_processor(), "two sizes")
    config = hero.HeroConfig(0.5, policy=policy, attention="fused")
    selection = encode(model, config, inputs)
    if policy in COVERING:
        wanted = encode(model, dataclasses.replace(config, attention="native"), inputs).index
        assert torch.equal(selection.index, wanted)
        return
    results = expected("two sizes", policy, "0.5", reference)
    assert selection.index.tolist() == [place for result in results for place in result.index]


@pytest.mark.parametrize("layer", [[1, 3], -1, 0])
@pytest.mark.parametrize("policy", ["hired", "visionzip", "scope"])
def test_scores_come_from_the_layer_of_the_features(policy, layer):
    model = tiny_model(vision_feature_layer=layer)
    inputs = batch(tiny_processor(), "one image")
    with hero.attach(model, policy=policy, keep_ratio=0.5) as handle, torch.no_grad():
        selection = handle.encoder(inputs["pixel_values"], inputs["image_sizes"])
        last = {-1: 5, 0: 0}.get(layer if isinstance(layer, int) else None, 2)
        assert handle.encoder._scored_layers == tuple(sorted({last, *([0] if policy == "hired" else [])}))
    if layer == 0:
        return  # embeddings have no last layer: the first one scores
    reference = IndependentPeers(model)
    (result,) = reference.images(
        inputs["pixel_values"], inputs["image_sizes"], rule_of(policy, {"keep_ratio": 0.5})
    )
    assert selection.index.tolist() == result.index
    torch.testing.assert_close(selection.tokens, result.tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["hero+", *PEERS, *(pool for pool in POOLS if not asked(pool))])
def test_no_synchronisation(model, policy):
    """Fake tensors have no values: reading one, as a host-device synchronisation would, raises."""
    with hero.attach(model, **options_of(policy), keep_ratio=0.5) as handle, torch.no_grad():
        encoder, inputs = handle.encoder, batch(tiny_processor(), "two sizes")
        crops, plan = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
        encoded = encoder.encode(crops, plan)
        budgets = encoder.budget(encoder.score(encoded, plan), plan)  # and all plans are made
        valid = plan.valid
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:

            def faked(tree):
                return tree_map_only(torch.Tensor, fake.from_tensor, tree)

            fields = ("features", "attention", "keys")
            encoded = dataclasses.replace(encoded, **{name: faked(getattr(encoded, name)) for name in fields})
            scored = encoder.score(encoded, plan)
            own, given = encoder.config.policy, (scored, faked(budgets), faked(valid))
            chosen = own.choose(encoded.features, scored, faked(budgets), faked(valid))
            replaced = own.replace(encoded.features, encoded.keys, *given)
        assert scored.scores.shape == valid.shape
        assert (chosen is not None) == policy.endswith(("crop", "+"))
        assert (replaced is not None) == (policy == "visionzip")
        if replaced is not None:
            assert replaced.values.shape == (len(valid), 2, 32) and replaced.ranks.dtype == torch.int16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", [*PEERS, *COVERING])
def test_half_precision(policy, dtype):
    model = tiny_model().to(dtype)
    inputs = batch(tiny_processor(), "two sizes").to(dtype)
    selection = encode(model, hero.HeroConfig(0.4, policy=policy), inputs)
    assert selection.tokens.dtype == dtype and selection.scores.dtype == torch.float32
    assert selection.tokens.isfinite().all()


def test_merged_tokens_carry_gradients(model):
    """Every valid patch of a crop reaches a token: chosen, or through a mean."""
    tower, inputs = model.model.vision_tower, batch(tiny_processor(), "one image")
    encoder = hero.HeroVisionEncoder(tower, config=hero.HeroConfig(0.5, policy="visionzip"))
    try:
        crops, plan = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
        encoded = encoder.encode(crops, plan)
        features = encoded.features.detach().requires_grad_()
        encoded = dataclasses.replace(encoded, features=features)
        scored = encoder.score(encoded, plan)
        budgets = encoder.budget(scored, plan)
        encoder.select(encoded, scored, budgets, plan).tokens.sum().backward()
        valid = plan.valid
        reached = features.grad[..., 0] > 0
        contextual = budgets.budgets * 10 // 64 > 0
        assert contextual.any()
        assert torch.equal(reached[contextual], valid[contextual])
        # A mean: the shares of its members sum to one token.
        torch.testing.assert_close(features.grad[..., 0].sum(1), budgets.budgets.float())
    finally:
        encoder.remove()


@pytest.mark.parametrize("policy", POOLS)
def test_the_choice_does_not_block_gradients(model, policy):
    """They reach the kept patches, each once, and no others."""
    config = hero.HeroConfig(0.4, **options_of(policy))
    encoder = hero.HeroVisionEncoder(model.model.vision_tower, config=config, **asked(policy))
    try:
        inputs = batch(tiny_processor(), "one image")
        crops, plan = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
        encoded = encoder.encode(crops, plan)
        features = encoded.features.detach().requires_grad_()
        encoded = dataclasses.replace(encoded, features=features)
        scored = encoder.score(encoded, plan, questions(1) if encoder.needs_text else None)
        gathered = encoder.select(encoded, scored, encoder.budget(scored, plan), plan)
        gathered.tokens.sum().backward()
        places = gathered.index[gathered.index >= 0].long()
        kept = torch.zeros(plan.valid.numel()).index_fill_(0, places, 1.0)
        assert torch.equal(features.grad, kept.view_as(plan.valid)[..., None].expand_as(features))
        assert kept.sum() == plan.pools.tokens.sum()
    finally:
        encoder.remove()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["scope crop", "divprune image"])
def test_gradients_of_a_compiled_tower(policy):
    """The tower compiled, pixels to tokens: as without."""
    inputs, found = batch(tiny_processor(), "two sizes"), []
    for compiled in (False, True):
        own = tiny_model()
        with hero.attach(own, **options_of(policy), keep_ratio=0.4) as handle:
            if compiled:
                own.model.vision_tower.compile(fullgraph=True, backend="aot_eager")
            pixels = inputs["pixel_values"].clone().requires_grad_()
            selection = handle.encoder(pixels, inputs["image_sizes"])
            selection.tokens.square().sum().backward()
            found.append((selection.index, pixels.grad))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].any()
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------- no more than a policy needs

READ = {  # layers, and attention rows that are finalised
    "hero": ((1, 2, 4), 1),
    "hero+": ((5,), 1),
    "uniform": ((1, 2, 4), 1),
    "random": ((), 0),
    "hired": ((0, 4), 2),
    "fastervlm": ((4,), 1),
    "visionzip": ((4,), 1),
    "globalcom2": ((4,), 1),
    "divprune": ((), 0),
    "cdpruner": ((), 0),
    "scope": ((4,), 1),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_reads_no_more_than_it_needs(model, monkeypatch, policy):
    layers, rows = READ[policy]
    calls = []
    names = "cls_attention", "finalize_scores", "tile_budgets", "segmented_topk_gather"
    for name in (*names, "segmented_diverse_topk"):
        operation = getattr(hk, name)

        def counted(*args, name=name, operation=operation, **kwargs):
            calls.append(name)
            return operation(*args, **kwargs)

        monkeypatch.setattr(hk, name, counted)
    others = (*PEERS, *COVERING, "random", "hero+")
    own = {} if policy in others else {"tile_layers": (1, 2), "thumbnail_layers": (4,)}
    config = hero.HeroConfig(0.3, policy=policy, **own)
    given = {"tokenizer": tiny_tokenizer(), **asked(policy)}
    with hero.attach(model, config=config, **given) as handle, torch.no_grad():
        encoder, needs = handle.encoder, handle.encoder._needs
        assert encoder._scored_layers == layers
        assert (encoder.needs_cls, encoder.needs_text) == (policy == "hero", policy == "cdpruner")
        assert (needs.relevance, needs.keys) == (False, policy == "visionzip")
        inputs = batch(tiny_processor(), "two sizes")
        select(encoder, inputs["pixel_values"], inputs["image_sizes"])
    assert calls.count("segmented_diverse_topk") == (policy in (*COVERING, "hero+"))
    calls = [call for call in calls if call in names]
    assert calls == ["cls_attention"] * len(layers) + ["finalize_scores"] * rows + [
        "tile_budgets",
        "segmented_topk_gather",
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_relevance_model_is_asked_by_those_that_read(model, policy):
    relevance = hero.ClipRelevance(tiny_clip(), tiny_tokenizer(), second_pass=True)
    with hero.attach(model, tiny_processor(), policy=policy, relevance=relevance) as handle:
        assert handle.encoder.needs_text == (policy in ("hero", "hero+", "cdpruner"))
    if policy not in ("hero", "scope"):
        with pytest.raises(TypeError, match=r"^alpha: expected "):
            hero.attach(model, policy=policy, alpha=0.5)


@pytest.mark.parametrize("policy", POLICIES)
def test_unsupported_encoders_are_named(model, monkeypatch, policy):
    tower = model.model.vision_tower
    geometry = Geometry(56, 14, ((56, 112), (112, 56)), thumbnail="none")

    def refused(config, **kwargs):
        with pytest.raises(ValueError) as error:
            hero.HeroVisionEncoder(tower, config=config, **kwargs)
        said, _, rest = str(error.value).partition(": ")
        assert said == "policy" and rest.startswith("expected ") and f"got {policy!r}" in rest

    config = hero.HeroConfig(policy=policy)
    if policy in ("hired", "globalcom2"):
        refused(config, geometry=geometry)
    else:
        hero.HeroVisionEncoder(tower, config=config, geometry=geometry, **asked(policy)).remove()
    monkeypatch.setitem(vars(encoders.tower_for(tower)), "has_cls", False)
    if policy in (*PEERS, "scope"):
        refused(config)
    else:
        hero.HeroVisionEncoder(tower, config=config, **asked(policy)).remove()
    monkeypatch.undo()
    hero.HeroVisionEncoder(tower, config=config, **asked(policy)).remove()  # a refusal leaves nothing behind


def test_bad_input_of_those_that_cover(model):
    tower = model.model.vision_tower
    for policy in COVERING:
        for pool, kind in (("tile", ValueError), (None, TypeError)):
            with pytest.raises(kind, match=r"^pool: expected one of 'crop', 'image', got "):
                make_policy(policy, {"pool": pool})
    for alpha, kind in ((0, ValueError), (math.inf, ValueError), ("1", TypeError)):
        with pytest.raises(kind, match=r"^alpha: expected a finite number > 0, got "):
            make_policy("scope", {"alpha": alpha})
    with pytest.raises(ValueError, match=r"^relevance: expected a hero.ClipRelevance for policy 'cdpruner'"):
        hero.HeroVisionEncoder(tower, config=hero.HeroConfig(policy="cdpruner"))
    encoder = hero.HeroVisionEncoder(tower, config=hero.HeroConfig(policy="cdpruner"), **asked("cdpruner"))
    with pytest.raises(ValueError, match=r"^text: expected a question for each of 1 images, got none"):
        encoder(torch.zeros(1, 5, 3, 56, 56), [(112, 112)])
    encoder.remove()


@pytest.mark.parametrize("policy", COVERING)
def test_one_pool_of_too_many_patches(model, policy):
    """257 crops of 16 patches: refused by name before the tower runs. In crops there is no such limit."""
    tower = model.model.vision_tower
    for pool, tiles in (("image", 255), ("image", 256), ("crop", 256)):
        config = hero.HeroConfig(0.3, policy=policy, pool=pool)
        geometry = Geometry(56, 14, ((tiles * 56, 56),))
        encoder = hero.HeroVisionEncoder(tower, config=config, geometry=geometry, **asked(policy))
        size = [(56 * tiles, 56)]
        try:
            if (pool, tiles) == ("image", 256):
                with pytest.raises(
                    ValueError, match=r"^pool: expected 'crop' for .* 4096 .*, got 'image' for 4112"
                ):
                    encoder.plan(size, torch.device("cpu"))
            elif tiles == 255:
                assert encoder.plan(size, torch.device("cpu")).pools.max_crops == 256
            else:
                config.policy.constants(encoder.geometry.layouts(size))
        finally:
            encoder.remove()


ROOT = Path(__file__).resolve().parents[1]
PAGES = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/method.md")]


def test_names():
    """Each name is a policy, its file names its paper, and the pages speak of it."""
    for name in POLICIES:
        policy = make_policy(name)
        text = sys.modules[type(policy).__module__].__doc__
        assert policy == make_policy(name) and isinstance(policy, Policy) and policy.name == name
        assert policy is make_policy(policy) and policy.summary
        assert ("https://arxiv.org/abs/" in text) == (name not in ("hero+", "uniform", "random"))
        assert all(f"`{name}`" in page for page in PAGES)
    with pytest.raises(ValueError, match=r"^policy: expected one of 'hero', .*, got 'best'$"):
        make_policy("best")


# ------------------------------------------------------------------------------------------- regions


def draw_layouts(draw: random.Random, thumbnail: str = "first"):
    grids = [(draw.randint(1, 4), draw.randint(1, 4)) for _ in range(4)]
    pinpoints = tuple((rows * 56, columns * 56) for rows, columns in grids)
    geometry = Geometry(56, draw.choice((4, 7, 14)), pinpoints, thumbnail)
    sizes = [(draw.randint(5, 400), draw.randint(5, 400)) for _ in range(3)]
    return tuple(geometry.layout(size) for size in sizes)


def test_regions_cover_the_thumbnail():
    """Regions of an image's tiles are all of its thumbnail, each part once."""
    draw = random.Random(3)
    for _ in range(100):
        layouts = draw_layouts(draw)
        scores = torch.rand(sum(layout.crops for layout in layouts), layouts[0].patches)
        places, regions = signals.places_of(layouts), signals.regions_of(layouts)
        sums, first = signals.region_sums(scores, places, regions), 0
        for layout in layouts:
            own = sums[first : first + layout.crops]
            assert own[0] == 0
            whole = scores[first].sum() if any(layout.valid_counts) else torch.tensor(0.0)
            torch.testing.assert_close(own.sum(), whole, rtol=1e-5, atol=0)
            empty = torch.tensor([valid == 0 for valid in layout.valid_counts])
            assert (own[1:][empty] == 0).all() and (own[1:][~empty] > 0).all()
            first += layout.crops


def test_resized_thumbnails_are_interpolated():
    """Stitched and un-padded, what tiles get is the thumbnail resized as a whole."""
    draw = random.Random(4)
    for _ in range(100):
        layouts = draw_layouts(draw)
        side = layouts[0].side
        scores = torch.rand(sum(layout.crops for layout in layouts), side * side)
        places, resize = signals.places_of(layouts), signals.resize_of(layouts)
        resized, first = signals.resized_thumbnails(scores, places, resize), 0
        for layout in layouts:
            own = resized[first : first + layout.crops]
            assert torch.equal(own[0], scores[first])
            grid = own[1:].view(*layout.grid, side, side).transpose(1, 2)
            grid = grid.reshape(layout.grid[0] * side, layout.grid[1] * side)
            grid = grid[slice(*layout.rows), slice(*layout.columns)]
            first, before = first + layout.crops, first
            if not grid.numel():
                continue  # so narrow that it is all padding
            whole = scores[before].view(1, 1, side, side)
            wanted = F.interpolate(whole, grid.shape, mode="bilinear", align_corners=False)[0, 0]
            torch.testing.assert_close(grid, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [-1.0, 0.0, 0.3])
def test_tile_softmax(more):
    draw = random.Random(5)
    for _ in range(30):
        layouts = draw_layouts(draw)
        values = torch.randn(sum(layout.crops for layout in layouts)) * 20
        shares, first = signals.tile_softmax(values, signals.places_of(layouts), more), 0
        for layout in layouts:
            own = slice(first + 1, first + layout.crops)
            wanted = values[own].softmax(0) + more / layout.tiles
            torch.testing.assert_close(shares[own], wanted, rtol=1e-5, atol=1e-6)
            first += layout.crops


def test_scaled():
    """Over the valid patches of each image; within the range also at padding; 1 where all are equal."""
    draw = random.Random(7)
    for _ in range(30):
        layouts = draw_layouts(draw)
        places = signals.places_of(layouts)
        values = torch.randn(len(places.images), layouts[0].patches)
        values[places.images == 1] = 0.5
        valid = torch.rand(values.shape) < 0.7
        valid[:, 0] = True
        found = signals.scaled(values, valid, places)
        assert found.min() >= 0.0 and found.max() <= 1.0
        for image in range(len(layouts)):
            own, seen = places.images == image, values[places.images == image][valid[places.images == image]]
            span = seen.max() - seen.min()
            wanted = (seen - seen.min()) / span if span else torch.ones_like(seen)
            torch.testing.assert_close(found[own][valid[own]], wanted)


SEEN_IN_THE_THUMBNAIL = (
    (signals.region_sums, signals.regions_of),
    (signals.resized_thumbnails, signals.resize_of),
)


def test_regions_follow_the_thumbnail():
    """Last instead of first: the same numbers in another place; and an image that is a thumbnail only."""
    draw = random.Random(6)
    for _ in range(10):
        state = draw.getstate()
        first = draw_layouts(draw)[:1]
        draw.setstate(state)
        last = draw_layouts(draw, "last")[:1]
        scores = torch.rand(first[0].crops, first[0].patches)
        for function, constant in SEEN_IN_THE_THUMBNAIL:
            one, other = (
                function(values, signals.places_of(layouts), constant(layouts))
                for values, layouts in ((scores.roll(-1, 0), last), (scores, first))
            )
            assert torch.equal(one, other.roll(-1, 0))
    alone = [Geometry(56, 14, ()).layout((30, 40))]
    scores, places = torch.rand(1, 16), signals.places_of(alone)
    assert signals.region_sums(scores, places, signals.regions_of(alone)).tolist() == [0.0]
    assert torch.equal(signals.resized_thumbnails(scores, places, signals.resize_of(alone)), scores)
    assert signals.tile_softmax(torch.zeros(1), places, 1.0).isfinite().all()


@pytest.mark.parametrize("policy", EVERY)
def test_thumbnail_alone(model, policy):
    """A model that sees a thumbnail only: no tile to share anything with."""
    config, geometry = hero.HeroConfig(0.5, **options_of(policy)), Geometry(56, 14, ())
    encoder = hero.HeroVisionEncoder(
        model.model.vision_tower, config=config, geometry=geometry, **asked(policy)
    )
    try:
        pixels = batch(tiny_processor(), "one image")["pixel_values"][0, :1]
        with torch.no_grad():
            selection = select(encoder, pixels, [(120, 90)])
        assert selection.lengths == [8] and selection.budgets.tolist() == [8]
    finally:
        encoder.remove()


# ---------------------------------------------------------------------------- policies of users


class _ByPatch(Policy):
    """Patches by the question, tiles by their best patch and rows of other layers."""

    def rows(self, depth, feature_layer):
        return {"middle": Rows.mean([], [2, 3])}

    def needs(self, with_relevance):
        return Needs(relevance=True, patch_relevance=True)

    def score(self, observed):
        scores = observed.patch_relevance()
        best = scores.masked_fill(~observed.valid, -math.inf).amax(1)
        middle = observed.attention["middle"].scores.sum(1)
        tiles = hk.TileSignal(observed.relevance(), 1.0, 0.1)
        return Scored(scores, (hk.TileSignal(best, 1.0, 0.1), hk.TileSignal(middle, 1.0), tiles))


@pytest.mark.parametrize("shared", [True, False], ids=["shared weights", "second pass"])
def test_relevance_of_patches(model, shared):
    clip, tokenizer = tiny_clip(), tiny_tokenizer()
    if shared:
        clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    inputs = batch(tiny_processor(), "two sizes")
    texts = ["what is in this picture ?", "describe"]
    relevance = hero.ClipRelevance(clip, tokenizer, second_pass=True)
    given = {"tokenizer": tokenizer, "policy": _ByPatch(), "keep_ratio": 0.4}
    with hero.attach(model, relevance=relevance, **given) as handle:
        assert handle.encoder.needs_text and handle.encoder._shared == shared
        assert handle.encoder._scored_layers == (2, 3)
        with torch.no_grad():
            crops, plan = handle.encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
            encoded = handle.encoder.encode(crops, plan)
            selection = handle.encoder(inputs["pixel_values"], inputs["image_sizes"], texts)
            stock = model.model.vision_tower(crops, output_hidden_states=True).hidden_states
    clip.config.vision_config.patch_size = 28
    with pytest.raises(ValueError, match=r"^relevance: expected a CLIP model of 4 × 4 patches"):
        hero.attach(model, relevance=relevance, **given)
    name = "test_policies:_ByPatch"
    with pytest.raises(ValueError, match=rf"^relevance: expected a hero.ClipRelevance for policy '{name}'"):
        hero.attach(model, policy=name)
    assert (encoded.patches is not None) == shared and set(encoded.attention) == {"middle"}
    torch.testing.assert_close(encoded.features, stock[-2][:, 1:])
    with torch.no_grad():
        hidden = clip.vision_model(pixel_values=crops).last_hidden_state[:, 1:]
        patches = F.normalize(clip.visual_projection(clip.vision_model.post_layernorm(hidden)), dim=-1)
        first = 0
        for text, layout in zip(texts, plan.layouts, strict=True):
            ids = [2, *tokenizer(text, add_special_tokens=False)["input_ids"], 3]
            output = clip.get_text_features(input_ids=torch.tensor([ids]))
            question = F.normalize(getattr(output, "pooler_output", output)[0], dim=-1)
            own = slice(first, first + layout.crops)
            torch.testing.assert_close(selection.scores[own], patches[own] @ question, rtol=0, atol=1e-5)
            first += layout.crops
    assert selection.lengths == [layout.kept_tokens(hero.HeroConfig(0.4)) for layout in plan.layouts]


class _Flat(Policy):
    """The first patches of each crop; reads no attention."""

    def rows(self, depth, feature_layer):
        return {}

    def score(self, observed):
        assert observed.attention == {}
        return Scored(observed.valid.float(), (signals.equal_shares(observed.valid),))


def test_a_policy_without_rows(model):
    config = hero.HeroConfig(0.25, policy=_Flat())
    selection = encode(model, config, batch(tiny_processor(), "one image"))
    first = selection.index[selection.index < 16].tolist()
    assert [place for place in first if place >= 0] == [0, 1, 2, 3]


@dataclasses.dataclass(frozen=True)
class _Thumbnail(Policy):
    """Nearly all tokens to the thumbnail, patches by the attention of one layer."""

    layer: int = 3
    most: int = 12

    def divide(self, keep_ratio, keep_tokens, thumbnail, tiles):
        total = int(keep_ratio * (tiles + thumbnail))
        return min(self.most, total), total - min(self.most, total)

    def rows(self, depth, feature_layer):
        return {"patches": Rows.mean([self.layer], [self.layer])}

    def score(self, observed):
        patches = observed.attention["patches"]
        return Scored(patches.scores, (signals.equal_shares(observed.valid),))


def test_a_policy_of_a_user_works_as_one_of_ours(model):
    """By object and by class; counted, packed, generated; in JSON and back."""
    own, by_class = _Thumbnail(most=9), {"policy": "test_policies:_Thumbnail", "most": 9}
    config = hero.HeroConfig(0.3, policy=own)
    assert config == hero.HeroConfig(0.3, **by_class) == hero.HeroConfig.from_dict(config.to_dict())
    with pytest.raises(TypeError, match=r"^least: expected .*test_policies:_Thumbnail.*\(layer, most\), got"):
        hero.HeroConfig(**by_class, least=3)
    found = []
    for given in ({"policy": own}, by_class):
        processor = tiny_processor()
        with hero.attach(model, processor, keep_ratio=0.3, **given) as handle:
            inputs = batch(processor, "two sizes")
            found.append(model.generate(**inputs, max_new_tokens=3, do_sample=False))
            assert handle.last.policy == "test_policies:_Thumbnail"
            assert handle.last.lengths == [handle.count_tokens(one.image_size) for one in handle.last.layout]
            assert handle.last.budgets[0] == 9
            assert handle.encoder._scored_layers == (3,)
    assert torch.equal(*found)


def test_errors_of_a_policy_are_named(model):
    inputs = batch(tiny_processor(), "one image")
    with pytest.raises(
        ValueError, match=r"^policy .*_Thumbnail': expected divide\(\) to return .*, got \(17, "
    ):
        encode(model, hero.HeroConfig(0.9, policy=_Thumbnail(most=17)), inputs)
    with pytest.raises(ValueError, match=r"^policy .*_Thumbnail': expected rows\(\) to name .* got \[6\]"):
        hero.attach(model, policy=_Thumbnail(layer=6))
    with pytest.raises(TypeError, match=r"^policy: expected one of 'hero', .*, got <class"):
        hero.attach(model, policy=_Thumbnail)
    for method, value in (("rows", [1]), ("divide", None), ("score", (1, 2))):
        broken = type("Broken", (_Thumbnail,), {method: lambda *args, value=value, **options: value})
        with pytest.raises(
            (TypeError, ValueError), match=rf"^policy .*Broken': expected {method}\(\) to return"
        ):
            encode(model, hero.HeroConfig(0.3, policy=broken()), inputs)


def test_the_policy_of_the_readme(model):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    [code] = [
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "class Spread" in block
    ]
    processor = tiny_processor()
    given = {"hero": hero, "__name__": __name__, "model": model, "processor": processor}
    try:
        exec(code, given)
        inputs = processor(images=[tiny_image(120, 90, 0)], text=[ONE], return_tensors="pt")
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
        selection = given["handle"].last
        assert selection.policy == given["handle"].config.policy.name
        assert selection.lengths == [given["handle"].count_tokens((120, 90))]
    finally:
        if "handle" in given:
            given["handle"].remove()
