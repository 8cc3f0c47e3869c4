"""Dropping within the encoder, against one crop at a time with tokens taken out by index."""

import contextlib
import dataclasses
import math
import sys
from pathlib import Path

import independent
import pytest
import torch
from independent import (
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
from test_graphs import assert_same, captured
from test_launches import count
from test_launches import encoder_of as encoder_of_launches
from test_launches import pixels as pixels_of_launches

import hero
from bench.mini import scenes
from hero import mini
from hero.layout import Geometry
from hero.packing import packing_of
from hero.plan import plan_of
from hero_kernels.testing import same_bits

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # an installed package brings no benchmarks
    sys.path.insert(0, str(ROOT))

LAYERS = {"tile_layers": (1, 2), "thumbnail_layers": (4, 5)}
# Grids of several shapes; in the last, half of the outer tiles is padding.
SIZES = [(120, 90), (60, 170), (25, 200), (58, 118)]


class Dropping(Independent):
    """The reference with patches of tiles taken out by index after the last tile layer."""

    def __init__(self, model, encoder_keep):
        super().__init__(model)
        self.encoder_keep = encoder_keep

    def survivors(self, rule, valid):
        """Patches that go on of each tile, by trying all numbers."""
        _, budget, _ = self.plan(rule, valid)
        count = independent.floor_ratio(self.encoder_keep * self.patches)
        while sum(min(count, number) for number in valid) < budget:
            count += 1
        return count

    def _image(self, crops, layout, rule, first, text_embedding, image_embeddings):
        tower = self.model.model.vision_tower
        numbers = [len(patches) for patches in layout.valid[1:]]
        count, thumbnail = self.survivors(rule, numbers), self.plan(rule, numbers)[0]
        scores, cls, features, stay, pictures = [], [], [], [], []
        for crop, pixels in enumerate(crops):
            layers = rule.thumbnail_layers if crop == 0 else rule.tile_layers
            seen = tower(pixels[None], output_attentions=True)
            scores.append(self.patch_scores(seen.attentions, layers, rule.second_softmax))
            order = sorted(layout.valid[crop], key=lambda patch: (-scores[-1][patch], patch))
            order += [patch for patch in range(self.patches) if patch not in layout.valid[crop]]
            stay.append(sorted(order[: self.patches if crop == 0 else count]))
            hidden = tower.pre_layrnorm(tower.embeddings(pixels[None]))
            states = [hidden]
            for number, layer in enumerate(tower.encoder.layers):
                hidden = layer(hidden, attention_mask=None)
                if number == max(rule.tile_layers):
                    hidden = hidden[:, [0, *(1 + patch for patch in stay[-1])]]
                states.append(hidden)
            cls.append(independent.numbers(hidden[0, 0]))
            pictures.append(tower.post_layernorm(hidden[:, 0]))
            features.append(dict(zip(stay[-1], self._features(states)[0, 1:], strict=True)))
        self.last_cls, self.last_stay, self.last_pooled = cls, stay, pictures

        shares, caps = [], [min(number, count) for number in numbers]
        budgets = [thumbnail]
        if numbers:
            shares = self.tile_shares(rule, layout, scores, cls, text_embedding, image_embeddings)
            weights, (_, budget, multiplier) = independent.quantised(shares), self.plan(rule, numbers)
            if rule.allocation == "exact":
                budgets += independent.allocate_exact(weights, caps, budget)
            else:
                budgets += independent.allocate_floor(weights, caps, multiplier)
        kept = [
            independent.select(
                scores[crop], [p for p in layout.valid[crop] if p in stay[crop]], budgets[crop]
            )
            for crop in range(layout.crops)
        ]
        index, tokens = self._sequence(layout, first, kept, features)
        return independent.ImageResult(index, budgets, [0.0, *shares], scores, tokens)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def batch(sizes, prompts=None):
    images = [tiny_image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    prompts = [ONE] * len(sizes) if prompts is None else prompts
    return tiny_processor()(images=images, text=prompts, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def inputs():
    return batch(SIZES)


def encoder_of(model, **options):
    options = {**LAYERS, **options}
    geometry = Geometry(56, 14, tuple(map(tuple, model.config.image_grid_pinpoints)))
    encoder = hero.HeroVisionEncoder(
        model.model.vision_tower,
        model.model.multi_modal_projector,
        hero.HeroConfig(**options),
        geometry=geometry,
        image_newline=model.model.image_newline,
        feature_layer=model.config.vision_feature_layer,
    )
    return encoder


@contextlib.contextmanager
def encoding(model, **options):
    encoder = encoder_of(model, **options)
    try:
        with torch.no_grad():
            yield encoder
    finally:
        encoder.remove()


def planned(encoder, layouts):
    return plan_of(tuple(layouts), encoder.config, encoder.depth, torch.device("cpu"))


def stages(encoder, pixels, plan):
    """What is selected and what was encoded, of crops that are laid out already."""
    encoded = encoder.encode(pixels, plan)
    scored = encoder.score(encoded, plan)
    budgets = encoder.budget(scored, plan)
    return encoded, budgets, encoder.select(encoded, scored, budgets, plan)


# --- the same as crop by crop ----------------------------------------------------------------------------

CASES = {
    "0.3": ({}, 0.3, {}),
    "0.5": ({}, 0.5, {}),
    "0.9": ({}, 0.9, {}),
    "a count": ({"keep_tokens": 37}, 0.1, {}),
    "more than the share": ({"keep_tokens": 60}, 0.1, {}),
    "several lengths": ({"keep_ratio": 0.6}, 0.6, {}),
    "everything kept": ({"keep_ratio": 1.0}, 1.0, {}),
    "floor": ({"allocation": "floor", "keep_ratio": 0.4}, 0.5, {}),
    "second softmax": ({"second_softmax": True}, 0.4, {}),
    "thumbnail scored early and late": ({"thumbnail_layers": (0, 2, 3)}, 0.4, {}),
    "thumbnail scored early": ({"thumbnail_layers": (0,)}, 0.4, {}),
    "tiles scored by the first layer": ({"tile_layers": (0,)}, 0.4, {}),
    "one layer is left": ({"tile_layers": (3,)}, 0.4, {}),
    "features of the last layer": ({}, 0.4, {"vision_feature_layer": -1}),
    "features of several layers": ({}, 0.4, {"vision_feature_layer": [4, -2]}),
    "concentration": ({"weights": {"entropy": 1.0}}, 0.4, {}),
    "eager": ({}, 0.4, {"attn": "eager"}),
    "fused": ({"attention": "fused"}, 0.4, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_crop_by_crop(inputs, case):
    options, encoder_keep, fields = CASES[case]
    model = tiny_model(**fields)
    if "keep_tokens" not in options:
        options = {"keep_ratio": 0.3, **options}
    rule = {"keep_ratio": None, **LAYERS, **options}
    rule.pop("attention", None)
    if "weights" in rule:
        rule |= {"density": 0.0, "saliency": 0.0, **rule.pop("weights")}
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    with encoding(model, **options, encoder_keep=encoder_keep) as encoder:
        selection = encoder(pixels, sizes)
        results = Dropping(model, encoder_keep).images(pixels, sizes, Rule(**rule))
    assert torch.equal(selection.index, torch.tensor([place for one in results for place in one.index]))
    assert selection.budgets.tolist() == [budget for one in results for budget in one.budgets]
    wanted = [score for one in results for score in one.scores]
    torch.testing.assert_close(selection.scores, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    shares = torch.tensor([share for one in results for share in one.shares])
    torch.testing.assert_close(selection.shares, shares, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(selection.tokens, torch.cat([one.tokens for one in results]))


def test_features_and_cls_of_every_crop(model, inputs):
    """Not of kept patches alone: of all that went on, and zero where patches were dropped."""
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    with encoding(model, keep_ratio=0.2, encoder_keep=0.4) as encoder:
        crops, plan = encoder.prepare(pixels, sizes)
        encoded, _, _ = stages(encoder, crops, plan)
        offset = 0
        for number, layout in enumerate(plan.layouts):
            reference = Dropping(model, 0.4)
            rule = Rule(keep_ratio=0.2, **LAYERS)
            reference.images(pixels[number : number + 1], sizes[number : number + 1], rule)
            own = slice(offset, offset + layout.crops)
            torch.testing.assert_close(encoded.cls[own], torch.tensor(reference.last_cls))
            torch.testing.assert_close(encoded.pooled[own], torch.cat(reference.last_pooled))
            for crop, stay in enumerate(reference.last_stay):
                gone = [patch for patch in range(16) if patch not in stay]
                features = encoded.features[offset + crop]
                assert not features[gone].any() and features[stay].any(1).all()
            offset += layout.crops


def test_through_generate():
    """Two images in a prompt and another prompt: token for token what the slow reference says."""
    model = tiny_model()
    inputs = batch([(100, 60), (25, 200), (90, 100)], [PAIR, TWO])
    rule = Rule(keep_ratio=0.3, **LAYERS)
    wanted = Dropping(model, 0.4).greedy(inputs, rule, 4)
    processor = tiny_processor()
    with hero.attach(model, processor, keep_ratio=0.3, encoder_keep=0.4, **LAYERS) as handle:
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert answer[:, -4:].tolist() == wanted
        sizes, geometry = inputs["image_sizes"].tolist(), handle.encoder.geometry
        plain = dataclasses.replace(handle.config, encoder_keep=None)
        for config in (handle.config, plain):
            counts = [hero.count_tokens(config, size, geometry=geometry) for size in sizes]
            assert counts == handle.last.lengths


def test_floor_through_generate():
    """The released rule, whose count depends on the pictures, encodes ahead."""
    model = tiny_model()
    inputs = batch([(120, 90)])
    rule = Rule(keep_ratio=0.3, allocation="floor", **LAYERS)
    wanted = Dropping(model, 0.35).greedy(inputs, rule, 4)
    options = {"keep_ratio": 0.3, "allocation": "floor", "encoder_keep": 0.35}
    with hero.attach(model, **options, **LAYERS) as handle:
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert answer[:, -4:].tolist() == wanted
        assert handle.last.lengths[0] <= handle.count_tokens((120, 90))


def test_relevance_reads_what_went_on():
    """A CLIP model of the tower's weights takes the CLS that the kept patches made."""
    model, clip = tiny_model(), tiny_clip()
    clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    inputs = batch([(120, 90)])
    relevance = hero.ClipRelevance(clip, tiny_tokenizer())
    weights = {"relevance": 1.0}
    reference = Dropping(model, 0.4)
    rule = Rule(keep_ratio=0.3, density=0.0, saliency=0.0, relevance=1.0, **LAYERS)
    text = relevance.text_embeddings(["what is in this picture ?"])
    zeros = torch.zeros(5, 16)
    reference.images(inputs["pixel_values"], inputs["image_sizes"], rule, text, zeros)
    with torch.no_grad():
        pictures = torch.nn.functional.normalize(
            clip.visual_projection(torch.cat(reference.last_pooled)), dim=-1
        )
    (wanted,) = reference.images(inputs["pixel_values"], inputs["image_sizes"], rule, text, pictures)
    options = {"keep_ratio": 0.3, "encoder_keep": 0.4, "weights": weights, **LAYERS}
    with hero.attach(model, tiny_processor(), relevance=relevance, **options) as handle, torch.no_grad():
        model.generate(**inputs, max_new_tokens=1)
        assert handle.last.index.tolist() == wanted.index
        torch.testing.assert_close(handle.last.shares, torch.tensor(wanted.shares), rtol=1e-4, atol=1e-5)


# --- batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["hero", "hero+", "uniform"])
@pytest.mark.parametrize(("keep_ratio", "encoder_keep"), [(0.3, 0.45), (0.6, 0.6)])
def test_an_image_alone_and_in_a_batch(model, policy, keep_ratio, encoder_keep):
    """Grids of other shapes, padded ones, and one that is a thumbnail alone."""
    options = {"keep_ratio": keep_ratio, "encoder_keep": encoder_keep, "policy": policy}
    with encoding(model, **options) as encoder:
        layouts = [encoder.geometry.layout(size) for size in SIZES]
        thumbnail = dataclasses.replace(Geometry(56, 14, ()), newlines=True).layout((50, 70))
        layouts = (layouts[0], thumbnail, *layouts[1:])
        counts = [layout.crops for layout in layouts]
        crops = torch.randn(sum(counts), 3, 56, 56, generator=torch.Generator().manual_seed(1))
        plan = planned(encoder, layouts)
        assert counts[1] == 1 and len(plan.packing.blocks) == (
            4 if policy != "hero+" and keep_ratio == 0.6 else 2
        )
        together, budgets, whole = stages(encoder, crops, plan)
        rows, features, kept = whole.index.split(whole.lengths), together.features.split(counts), 0
        for number, (layout, own) in enumerate(zip(layouts, crops.split(counts), strict=True)):
            alone, budget, gathered = stages(encoder, own, planned(encoder, [layout]))
            theirs = rows[number]
            first = sum(counts[:number])
            assert torch.equal(torch.where(theirs < 0, theirs, theirs - first * 16), gathered.index)
            assert torch.equal(budgets.budgets[first : first + layout.crops], budget.budgets)
            assert gathered.lengths == (layout.kept_tokens(encoder.config),)
            torch.testing.assert_close(features[number], alone.features)
            if together.cls is not None:
                torch.testing.assert_close(together.cls[first : first + layout.crops], alone.cls)
            kept += len(theirs)
        assert kept == len(whole.index)


def test_only_what_went_on_is_kept(model, inputs):
    with encoding(model, keep_ratio=0.3, encoder_keep=0.4) as encoder:
        crops, plan = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
        encoded, budgets, gathered = stages(encoder, crops, plan)
        keep = torch.zeros(len(crops) * 16, dtype=torch.bool)
        keep[gathered.index[gathered.index >= 0].long()] = True
        assert not (keep.view(-1, 16) & ~encoded.valid).any()
        assert torch.equal(encoded.valid.sum(1, dtype=torch.int32), plan.caps)
        assert not (encoded.valid & ~plan.valid).any() and (budgets.budgets <= plan.caps).all()
        assert (plan.caps < plan.valid.sum(1)).any()


def test_another_score_chooses_among_what_went_on(model, inputs):
    """A stage put in the place of ours cannot keep patches that are no more."""
    with encoding(model, keep_ratio=0.3, encoder_keep=0.4) as encoder:
        crops, plan = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
        encoded = encoder.encode(crops, plan)
        scored = dataclasses.replace(encoder.score(encoded, plan), scores=-encoded.scores, ranks=None)
        gathered = encoder.select(encoded, scored, encoder.budget(scored, plan), plan)
        kept = gathered.index[gathered.index >= 0].long()
        assert encoded.valid.flatten()[kept].all() and gathered.tokens[gathered.index >= 0].any(1).all()
        assert list(gathered.lengths) == [layout.kept_tokens(encoder.config) for layout in plan.layouts]


def test_images_without_thumbnail(model, inputs):
    geometry = Geometry(56, 14, ((56, 112), (112, 112)), thumbnail="none", newlines=False)
    results = []
    for encoder_keep in (None, 0.5):
        config = hero.HeroConfig(0.3, encoder_keep=encoder_keep, **LAYERS)
        encoder = hero.HeroVisionEncoder(model.model.vision_tower, config=config, geometry=geometry)
        with torch.no_grad():
            results.append(encoder(inputs["pixel_values"][0, :4], [(112, 112)]))
        encoder.remove()
    whole, part = results
    assert part.lengths == whole.lengths
    torch.testing.assert_close(part.scores, whole.scores)
    assert part.budgets.max() <= 8 and not torch.equal(part.tokens, whole.tokens)


# --- everything goes on ----------------------------------------------------------------------------------


def test_all_patches_are_as_none(model, inputs):
    results = []
    for encoder_keep in (None, 1.0):
        with encoding(model, keep_ratio=0.3, encoder_keep=encoder_keep) as encoder:
            results.append(encoder(inputs["pixel_values"], inputs["image_sizes"]))
    for field in ("tokens", "index", "budgets", "shares", "scores"):
        assert same_bits(*(getattr(result, field) for result in results))


def test_packed_rows_of_all_patches_are_as_none(model, inputs):
    """One patch of each tile is dropped, so that all goes through packed rows: thumbnails are as before."""
    results = []
    for encoder_keep in (None, 15.5 / 16):
        with encoding(model, keep_ratio=0.3, encoder_keep=encoder_keep) as encoder:
            crops, plan = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
            results.append(encoder.encode(crops, plan))
    none, most = results
    thumbnails = torch.tensor([0, *(layout.crops for layout in plan.layouts[:-1])]).cumsum(0)
    assert same_bits(none.scores, most.scores) and same_bits(none.ranks, most.ranks)
    torch.testing.assert_close(most.features[thumbnails], none.features[thumbnails])
    torch.testing.assert_close(most.cls[thumbnails], none.cls[thumbnails])
    assert (most.valid.sum(1) < 16).sum() == len(crops) - len(plan.layouts)


# --- how many go on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 4, 6, 24])
def test_number_of_patches(side):
    geometry = Geometry(
        14 * side, 14, tuple((14 * side * y, 14 * side * x) for y, x in [(1, 2), (2, 2), (3, 1)])
    )
    patches = side * side
    reference = Dropping.__new__(Dropping)
    reference.patches = patches
    for size in [(300, 300), (100, 500), (500, 90), (7, 900), (801, 799)]:
        layout = geometry.layout(size)
        for keep, share in [(0.1, 0.1), (0.2, 0.3), (0.29, 0.29), (0.5, 0.6), (1.0, 1.0), (0.05, 1.0)]:
            for options in ({"keep_ratio": keep}, {"keep_tokens": math.ceil(keep * 3 * patches)}):
                config = hero.HeroConfig(**options, encoder_keep=share)
                reference.encoder_keep = share
                rule = Rule(**{"keep_ratio": None, **options})
                count = layout.encoder_patches(config)
                assert count == reference.survivors(rule, layout.valid_counts) <= patches
                caps = layout.tile_caps(config)
                assert caps == tuple(min(count, valid) for valid in layout.valid_counts)
                assert sum(caps) >= layout.budget(config)[1]
                plain = dataclasses.replace(config, encoder_keep=None)
                assert layout.kept_tokens(config) == layout.kept_tokens(plain)
                assert layout.encoder_patches(plain) == patches


@pytest.mark.parametrize("encoder_keep", [None, 0.5])
def test_gradients_after_inference_mode(model, encoder_keep):
    """What was planned in inference mode serves a call that has gradients, of padded pixels too."""
    pixels = torch.randn(2, 5, 3, 56, 56, requires_grad=True)
    sizes = [(112, 112), (20, 20)]
    plan_of.cache_clear()
    encoder = encoder_of(model, keep_ratio=0.3, encoder_keep=encoder_keep)
    with torch.inference_mode():
        before = encoder(pixels.detach(), sizes)
    after = encoder(pixels, sizes)
    encoder.remove()
    assert torch.equal(before.index, after.index)
    after.tokens.sum().backward()
    assert pixels.grad[0].abs().sum() > 0 and pixels.grad[1, 0].abs().sum() > 0


def test_rows_are_blocks():
    """Whole thumbnails first, then tiles by length, each a run of its own rows."""
    geometry = Geometry(56, 14, ((56, 112), (112, 112), (56, 168)))
    config = hero.HeroConfig(0.6, encoder_keep=0.6, **LAYERS)
    layouts = tuple(geometry.layout(size) for size in [(88, 172), (58, 118), (112, 110), (57, 119)])
    packed = packing_of(layouts, config)
    lengths = [layout.encoder_patches(config) + 1 for layout in layouts]
    assert lengths == [10, 13, 11, 13]
    assert packed.blocks[0] == (4, 17, True)
    assert [block.length for block in packed.blocks[1:]] == sorted(set(lengths), reverse=True)
    assert sum(block.crops * block.length for block in packed.blocks) == len(packed.places)
    ranks = torch.stack([torch.randperm(16) for _ in range(sum(layout.crops for layout in layouts))])
    sources = packed.sources(ranks.to(torch.int16))
    assert len(sources.unique()) == len(sources)
    crops, tokens = sources // 17, sources % 17
    row = 0
    for block in packed.blocks:
        own = slice(row, row + block.crops * block.length)
        for crop, token in zip(crops[own].split(block.length), tokens[own].split(block.length), strict=True):
            assert (crop == crop[0]).all() and token[0] == 0
            if block.scored:
                assert torch.equal(token, torch.arange(17))
            else:
                assert torch.equal(ranks[crop[0], token[1:] - 1], torch.arange(block.length - 1))
        row = own.stop
    everything = dataclasses.replace(config, encoder_keep=1.0)
    assert packing_of(layouts, everything) is None


# --- what it costs ---------------------------------------------------------------------------------------


FEW = {"encoder_keep": 0.4, "tile_layers": (0,), "thumbnail_layers": (2, 3)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_launches_do_not_grow_and_nothing_waits(device):
    """Neither with tiles nor with images of one length."""
    encoder = encoder_of_launches(device, **FEW)
    # Two: of a single thumbnail the formula of attention, which is all that ``meta`` has, is shorter.
    two = count(encoder, [(112, 112)] * 2, device)
    assert two.waits == []
    for sizes in ([(56, 112)] * 2, [(112, 112)] * 8, [(112, 168), (56, 56), (40, 112), (300, 20)]):
        layouts = encoder.geometry.layouts(sizes)
        assert {layout.encoder_patches(encoder.config) for layout in layouts} == {6}
        many = count(encoder, sizes, device)
        assert many.waits == [] and sorted(many.operations) == sorted(two.operations)


def test_the_encoder_compiles_whole():
    """One graph a layout, and the same results."""
    torch._dynamo.reset()
    encoder, graphs = encoder_of_launches(**FEW), []

    def backend(module, inputs):
        graphs.append(module)
        return module

    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    for sizes in ([(112, 112)], [(112, 168), (56, 56), (300, 20)], [(112, 112)]):
        images = pixels_of_launches(encoder, sizes)
        with torch.no_grad():
            plain, same = encoder(images, sizes), compiled(images, sizes)
        for name in ("tokens", "index", "budgets", "shares", "scores"):
            assert torch.equal(getattr(plain, name), getattr(same, name)), name
        assert same.lengths == plain.lengths
    assert len(graphs) == 2


def test_graphs_replay_the_same():
    encoder = encoder_of_launches(**FEW)
    batches = [
        (pixels_of_launches(encoder, sizes) * scale, sizes)
        for scale in (1, 2)
        for sizes in ([(112, 112)], [(112, 168), (56, 56), (300, 20)])
    ]
    with torch.no_grad():
        plain = [encoder(*one) for one in batches]
        encoder = captured(encoder, "cpu")
        for one, selection in zip(batches, plain, strict=True):
            assert_same(encoder(*one), selection)
    assert encoder.graphs.made == 2


def test_layers_run_on_the_rows_that_are_left(model, inputs):
    """Each part of a layer once, on packed rows; the last layer's for CLS alone."""
    ran = []
    layers = model.model.vision_tower.encoder.layers
    hooks = [
        module.register_forward_hook(
            lambda module, args, output, number=number, part=part: ran.append((number, part, args[0].shape))
        )
        for number, layer in enumerate(layers)
        for part, module in (("norm", layer.layer_norm1), ("mlp", layer.mlp))
    ]
    with encoding(model, keep_ratio=0.3, encoder_keep=0.4) as encoder:
        crops, plan = encoder.prepare(inputs["pixel_values"], inputs["image_sizes"])
        encoder.encode(crops, plan)
    for hook in hooks:
        hook.remove()
    rows = sum(17 + layout.tiles * (layout.encoder_patches(encoder.config) + 1) for layout in plan.layouts)
    whole, packed, cls = (len(crops), 17, 32), (rows, 32), (len(crops), 32)
    wanted = [(number, part, whole) for number in range(3) for part in ("norm", "mlp")]
    wanted += [(number, part, packed) for number in (3, 4) for part in ("norm", "mlp")]
    assert ran == [*wanted, (5, "norm", packed), (5, "mlp", cls)]
    assert rows < len(crops) * 17 * 0.7


def test_gradients_run_through_packed_rows(inputs):
    model = tiny_model()
    encoder = encoder_of(model, keep_ratio=0.3, encoder_keep=0.4)
    pixels = inputs["pixel_values"][:1, :5].clone().requires_grad_()
    selection = encoder(pixels, inputs["image_sizes"][:1])
    selection.tokens.square().sum().backward()
    encoder.remove()
    assert (pixels.grad[0].flatten(1).abs().sum(1) > 0).all()
    for layer in model.model.vision_tower.encoder.layers[:5]:
        assert layer.mlp.fc1.weight.grad.abs().sum() > 0
    assert not any(one.requires_grad for one in (selection.scores, selection.shares))


# --- refusals --------------------------------------------------------------------------------------------

REFUSED = {
    "random": {"policy": "random"},
    "fastervlm": {"policy": "fastervlm"},
    "visionzip": {"policy": "visionzip"},
    "hired": {"policy": "hired"},
    "globalcom2": {"policy": "globalcom2"},
    "tiles by the features' layer": {"tile_layers": (4,)},
    "tiles by the last layer": {"tile_layers": (1, -1)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_construction(model, case):
    with pytest.raises(ValueError, match=r"^encoder_keep: expected None .*, got 0\.5$"):
        hero.attach(model, **{"encoder_keep": 0.5, **LAYERS, **REFUSED[case]})
    assert "_hero" not in model.__dict__
    hero.attach(model, **{**LAYERS, **REFUSED[case]}).remove()


def test_refused_features(inputs):
    for layer in (0, 2, 3, [3, -2]):
        with pytest.raises(ValueError, match=r"^encoder_keep: expected None .* features of layer (-1|1|2),"):
            hero.attach(tiny_model(vision_feature_layer=layer), encoder_keep=0.5, **LAYERS)
    with hero.attach(tiny_model(), encoder_keep=0.5, **LAYERS) as handle:
        run, arguments = handle.encoder.run, (inputs["pixel_values"], inputs["image_sizes"])
        with pytest.raises(ValueError, match=r"^encoder_keep: .* features of layer 2,"):
            run(*arguments, feature_layer=3)
        run(*arguments, feature_layer=4)


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("encoder_keep", [0.5, 1.0])
def test_refused_for_more_outputs(model, inputs, wanted, encoder_keep):
    """Also where nothing is dropped: whether a call is right must not hang on the picture."""
    message = rf"^encoder_keep: expected None .*, got {wanted}=True"
    with hero.attach(model, encoder_keep=encoder_keep, **LAYERS):
        features = model.model.get_image_features
        features(inputs["pixel_values"], inputs["image_sizes"], **{wanted: False})
        with pytest.raises(ValueError, match=message):
            features(inputs["pixel_values"], inputs["image_sizes"], **{wanted: True})


def _nothing(*args):
    return None


def _replace_forward(module):
    module.forward = module.forward
    return lambda: module.__dict__.pop("forward")


TOUCHED = {
    "tower compiled": lambda tower: setattr(tower, "_compiled_call_impl", tower.forward),
    "hook on the tower": lambda tower: tower.register_forward_hook(_nothing),
    "hook on the encoder": lambda tower: tower.encoder.register_forward_pre_hook(_nothing),
    "hook on a layer": lambda tower: tower.encoder.layers[3].register_forward_hook(_nothing),
    "hook before a layer": lambda tower: tower.encoder.layers[5].register_forward_pre_hook(_nothing),
    "hook on gradients": lambda tower: tower.encoder.layers[4].register_full_backward_hook(_nothing),
    "hook on attention": lambda tower: tower.encoder.layers[4].self_attn.register_forward_hook(_nothing),
    "layer offloaded": lambda tower: _replace_forward(tower.encoder.layers[3]),
    "attention replaced": lambda tower: _replace_forward(tower.encoder.layers[3].self_attn),
    "layer compiled": lambda tower: tower.encoder.layers[3].compile(),
}


@pytest.mark.parametrize("case", TOUCHED)
def test_refused_for_what_must_run_whole(inputs, case):
    model = tiny_model()
    with hero.attach(model, encoder_keep=0.5, **LAYERS):
        TOUCHED[case](model.model.vision_tower)
        with pytest.raises(ValueError, match=r"^encoder_keep: expected None .*"):
            model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])


def test_hooks_that_are_no_hindrance(model, inputs):
    """On layers that run as they are, on parts that are called, and transformers' own."""
    tower = model.model.vision_tower
    seen = []
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    with torch.no_grad():
        tower(pixels[0], output_hidden_states=True, output_attentions=True)
        hooks = [
            module.register_forward_hook(lambda *args: seen.append(1))
            for module in (tower.encoder.layers[2], tower.encoder.layers[3].mlp)
        ]
        with hero.attach(model, encoder_keep=0.5, **LAYERS):
            model.model.get_image_features(pixels, sizes)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2


def test_other_attention_is_refused(inputs):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("custom_for_encoder_keep", sdpa_attention_forward)
    model = tiny_model()
    model.model.vision_tower.set_attn_implementation("custom_for_encoder_keep")
    handle = hero.attach(model, encoder_keep=0.5, **LAYERS)
    with pytest.raises(ValueError, match=r"^encoder_keep: .*custom_for_encoder_keep"):
        handle.encoder(inputs["pixel_values"], inputs["image_sizes"])


# --- the mini model --------------------------------------------------------------------------------------


def test_mini_model_answers():
    """The demo's questions are answered right; with all patches going on, the same tokens are chosen."""
    from PIL import Image

    loaded = mini.load()
    processor = loaded.processor
    for one in mini.demo_questions():
        picture = Image.open(one.image).convert("RGB")
        inputs = processor(images=picture, text=scenes.prompt(one.question), return_tensors="pt")
        chosen = {}
        for encoder_keep in (None, 1.0, 0.5):
            options = {"encoder_keep": encoder_keep, "relevance": loaded.relevance}
            with hero.attach(loaded.model, processor, **options) as handle:
                output = loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
            answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert answer.strip() == one.answer
            chosen[encoder_keep] = handle.last
        assert torch.equal(chosen[None].index, chosen[1.0].index)
        assert chosen[0.5].lengths == chosen[None].lengths
        assert chosen[0.5].budgets[1:].max() <= 18


# --- the benchmark ---------------------------------------------------------------------------------------


def test_benchmark_and_its_tables():
    """On tiny shapes and few questions: what is measured is consistent, and the page shows it."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from bench import encoder_keep, quality, report

    timed = encoder_keep.measure_time(encoder_keep.SMALL, 2, "wall", lambda line: None)
    rows = {name: one["patches"] for name, one in timed["variants"].items()}
    assert rows == {"none": 16, "1": 16, "0.99": 15, "0.5": 8, "0.4": 6, "0.2": 3, "early 0.2": 3}
    layers = {name: one["layer"] for name, one in timed["variants"].items()}
    assert {layers[name] for name in ("none", "0.2")} == {3} and layers["early 0.2"] == 1
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 for one in timed["variants"].values())

    answers = encoder_keep.measure_answers(8, 0, progress=False)
    runner = quality.Runner([quality.FULL, quality.Variant("hero", {}, "own")], (0.2,))
    cells = quality.measure(runner, 8)
    right = {(row["policy"], row["encoder_keep"]): row["right"] for row in answers["rows"]}
    assert right["hero", None] == quality.bits(cells["hero", 0.2].right)
    assert len(right) == 4 * 4
    for row in answers["rows"]:
        cell = row["groups"]["all"]
        assert cell["accuracy"]["mean"] == quality.unbits(row["right"], 8).mean()
        if row["encoder_keep"] is None:
            assert cell["to_none"]["mean"] == 0.0

    record = {
        "benchmark": "encoder_keep",
        "small": True,
        "command": "python -m bench.encoder_keep",
        "date": "2000-01-01",
        "commit": {"hash": "0" * 40, "dirty": False},
        "versions": {"torch": torch.__version__},
        "machine": {"cpu": "cpu", "cores": 1, "system": "Linux"},
        "dtype": "float32",
        "load_average": [0.0, 0.0],
        "time": timed,
        "answers": answers,
    }
    page = report.replace(
        "<!-- encoder_keep begin -->\n<!-- encoder_keep end -->", "encoder_keep", report.encoder_keep(record)
    )
    assert "a test of the script" in page and "| early 0.2 | 1 | 3 |" in page
    assert page.count("| hero+ |") == 4 and "| all tokens |" in page


def test_keep_ratios_share_a_tower_that_drops_nothing(monkeypatch):
    """With ``encoder_keep``, what the tower makes of a batch depends on the keep ratio too."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from bench import quality

    runs = []
    encode = hero.HeroVisionEncoder.encode

    def spy(self, *arguments, **options):
        runs.append(self.config.keep_ratio)
        return encode(self, *arguments, **options)

    monkeypatch.setattr(hero.HeroVisionEncoder, "encode", spy)
    for encoder_keep, wanted in ((None, 1), (0.5, 2)):
        runs.clear()
        variant = quality.Variant("uniform", {"policy": "uniform", "encoder_keep": encoder_keep})
        quality.Runner([variant], (0.5, 0.2)).run(range(2))
        assert len(runs) == wanted
