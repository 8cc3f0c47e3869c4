"""Policies on the families beside LLaVA-NeXT, against ``independent_policies.py`` on InternVL; exact ties."""

import functools
from dataclasses import replace

import pytest
import torch
from independent import (
    ImageResult,
    Rule,
    allocate_exact,
    allocate_floor,
    numbers,
    quantised,
    select,
    tiny_clip,
    tiny_tokenizer,
)
from independent_families import PAIR, TWO, InternVLReference, batch_of, independent_of, tiny_model
from independent_policies import COVERING, PEERS, IndependentPeers, PeerRule, counts
from PIL import Image
from test_families import RUN_PER_CROP as IDEFICS
from test_families import model_of
from test_families import processor_or_skip as processor_of
from test_llava_next import assert_rows_equal, config_of, rule_of

import hero
from hero.policies import POLICIES

OURS = ("internvl", "llava_onevision", *IDEFICS)
SLOW = pytest.mark.slow


class InternVLPeers(InternVLReference, IndependentPeers):
    """The peers on InternVL, whose thumbnail is last, and whose tokens stand for four patches.

    Set ``grids``, (rows, columns) of tiles of each image, before use.
    """

    def _read(self, inputs):
        layouts, crops = super()._read(inputs)
        for layout, (rows, columns) in zip(layouts, self.grids, strict=True):
            for y in range(rows * self.side):
                places = [(y // self.side * columns + x // self.side, x) for x in range(columns * self.side)]
                line = [(1 + tile, y % self.side * self.side + x % self.side) for tile, x in places]
                layout.rows.append(line)
        return layouts, crops

    def _image(self, crops, layout, rule, first, text_embedding, image_embeddings):
        last = len(self.vision_tower.encoder.layer) - 1
        scores, _, features = self._encoded(
            crops, layout, Rule(tile_layers=(last,), thumbnail_layers=(last,))
        )
        early, _, _ = self._encoded(crops, layout, Rule(tile_layers=(0,), thumbnail_layers=(0,)))
        valid = [self.patches] * (layout.crops - 1)
        thumbnail, total, multiplier = counts(rule, self.patches, valid)
        shares = self._shares(rule, layout, scores[0], early[0]) if valid else []
        if rule.allocation == "exact":
            budgets = [thumbnail, *allocate_exact(quantised(shares), valid, total)]
        else:
            budgets = [thumbnail, *(allocate_floor(quantised(shares), valid, multiplier) if valid else [])]
        if rule.policy == "globalcom2" and valid:
            scores = self._half_global(layout, scores)
        if rule.policy in COVERING:
            own = layout, rule, first, text_embedding, scores, features, budgets, thumbnail + total, shares
            return self._covering(crops, *own)
        kept, own = [], []
        for crop in range(layout.crops):
            place = layout.valid[crop]
            if rule.policy == "visionzip":
                keys = self._keys(crops[layout.number(crop)], last)
                picked, means = self._visionzip(scores[crop], keys, features[crop], place, budgets[crop])
            else:
                picked, means = select(scores[crop], place, budgets[crop]), {}
            kept.append(picked)
            own.append({token: means.get(token, features[crop][token]) for token in picked})
        index, tokens = self._sequence(layout, first, kept, own)
        listed = (layout.in_order(values) for values in (budgets, [0.0, *shares], scores))
        return ImageResult(index, *listed, tokens)

    def _keys(self, pixels, number):
        """The key of each token: the mean over heads, then over its patches."""
        layer = self.vision_tower.encoder.layer[number]
        hidden = self.vision_tower(pixels[None], output_hidden_states=True).hidden_states[number]
        keys = layer.attention.k_norm(layer.attention.k_proj(layer.layernorm_before(hidden)))[0, 1:]
        keys = keys.unflatten(-1, (layer.attention.num_heads, -1)).double().mean(1)
        return [numbers(keys[self.patches_of(token)].mean(0)) for token in range(self.patches)]


@functools.cache
def peers():
    return InternVLPeers(model_of("internvl"))


KEEPS = {"0.3": {"keep_ratio": 0.3}, "30 tokens": {"keep_tokens": 30}}
KEEPS |= {"0.9": {"keep_ratio": 0.9}, "floor": {"keep_ratio": 0.5, "allocation": "floor"}}


def listed(results, name):
    return [value for result in results for value in getattr(result, name)]


@pytest.mark.parametrize(
    "keep", [keep if keep == "0.3" else pytest.param(keep, marks=SLOW) for keep in KEEPS]
)
@pytest.mark.parametrize("case", ["two sizes", "two images in a prompt", "one crop"])
@pytest.mark.parametrize("policy", [*PEERS, "divprune", "scope"])
def test_policies_on_internvl(policy, case, keep):
    model, processor, options = model_of("internvl"), processor_of("internvl"), KEEPS[keep]
    given = batch_of(processor, "internvl", case)
    ratio = options.get("keep_ratio")
    rule = PeerRule(policy, **{**options, "keep_ratio": None if ratio is None else str(ratio)})
    reference, rule = peers(), replace(rule, pool="image" if policy == "divprune" else "crop")
    config = hero.HeroConfig(policy=policy, **options)
    with hero.attach(model, processor, config=config) as handle, torch.no_grad():
        inputs = batch_of(processor, "internvl", case)
        reference.grids = [layout.grid for layout in handle.parts.geometry.layouts(inputs["image_sizes"])]
        output, last = model(**inputs).logits, handle.last
        if policy in COVERING:  # where candidates are nearly equal, both are right
            rule = replace(rule, near=frozenset(last.index.tolist()))
        rows, results, _ = reference._rows(given, rule, None, None)
        logits = [reference._forward(row.embeds) for row in rows]
        counts_of = [handle.count_tokens(size) for size in inputs["image_sizes"].tolist()]
    shares = torch.tensor(listed(results, "shares"))
    torch.testing.assert_close(last.shares, shares, rtol=0, atol=3e-5)
    assert last.budgets.tolist() == listed(results, "budgets")
    assert last.index.tolist() == listed(results, "index")
    if "floor" not in keep:
        assert last.lengths == counts_of
    assert_rows_equal(output, logits, 5e-5)


@pytest.mark.parametrize("which", ["patched", "stock"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", OURS)
def test_every_policy(family, policy, which):
    """It runs, twice alike, or is refused by name."""
    model, processor = model_of(family), processor_of(family)
    own = {"processor": processor} if which == "patched" else {"tokenizer": processor.tokenizer}
    if policy == "cdpruner":
        own["relevance"] = hero.ClipRelevance(tiny_clip(), tiny_tokenizer(), second_pass=True)
        if which == "stock":
            with pytest.raises(ValueError, match=r"^processor: expected the model's, whose image_mean"):
                hero.attach(model, **own, policy=policy, keep_ratio=0.3)
            return
    if family != "internvl" and POLICIES[policy].requires_cls:
        with pytest.raises(ValueError, match=rf"^policy: expected one of 'hero', .* got '{policy}'"):
            hero.attach(model, **own, policy=policy, keep_ratio=0.3)
        return
    with hero.attach(model, **own, policy=policy, keep_ratio=0.3) as handle, torch.no_grad():
        inputs = batch_of(processor, family, "two images in a prompt")
        if which == "stock" and policy in ("hired", "globalcom2"):
            with pytest.raises(ValueError, match=r"^processor: expected one with hero attached for a policy"):
                model(**inputs)
            return
        first, once = model(**inputs).logits, handle.last
        assert torch.equal(model(**inputs).logits, first)
        assert torch.equal(handle.last.index, once.index)
        if which == "patched" or family not in IDEFICS:  # whose processor tells the longest edge
            assert once.lengths == [handle.count_tokens(size) for size in ((100, 60), (50, 50))]


@pytest.mark.parametrize("family", OURS[1:])
def test_what_needs_cls_is_refused(family):
    for options, message in (
        ({"second_softmax": True}, "second_softmax: expected False for an encoder without CLS"),
        ({"attention": "fused"}, "attention: expected 'native' for an encoder without CLS"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            hero.attach(model_of(family), tokenizer=tiny_tokenizer(), **options)


@SLOW
@pytest.mark.parametrize("which", ["patched", "stock"])
@pytest.mark.parametrize("family", OURS)
def test_exact_ties(family, which):
    """Images of one colour, and heads that attend to all patches alike: the first ones are kept."""
    model = tiny_model(family=family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name and "vision" in name:
                parameter.zero_()
    reference, rule = independent_of(model), rule_of({"keep_ratio": 0.3})
    processor = processor_of(family)
    images = [Image.new("RGB", size, colour) for size, colour in (((90, 120), "red"), ((170, 60), "blue"))]
    given = _rows_of(processor, images)
    _, results, _ = reference._rows(given, rule, None, None)
    logits = reference.logits(given, rule)
    own = {"processor": processor} if which == "patched" else {"tokenizer": processor.tokenizer}
    with hero.attach(model, **own, config=config_of({"keep_ratio": 0.3})) as handle, torch.no_grad():
        output = model(**_rows_of(processor, images)).logits
    assert handle.last.index.tolist() == listed(results, "index")
    assert_rows_equal(output, logits, 5e-5)


def _rows_of(processor, images):
    """One image a row, the second padded."""
    texts = [
        text.replace("<image>", processor.image_token) for text in (TWO, PAIR.replace("and <image>", ""))
    ]
    nested = [[image] for image in images] if hasattr(processor, "image_seq_len") else images
    return processor(images=nested, text=texts, padding=True, return_tensors="pt")
