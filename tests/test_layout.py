"""Counting tokens and laying out images, against transformers' own rules and against what is packed."""

import dataclasses
import random
from fractions import Fraction

import pytest
import torch
from independent import tiny_model, tiny_processor
from independent_policies import COVERING
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

import hero
import hero_kernels as hk
from hero import Geometry, HeroConfig, count_tokens
from hero._checks import floor_ratio
from hero.layout import LLAVA_NEXT_PINPOINTS
from hero.plan import make_plan
from hero.policies import POLICIES

GROUPS, DRAWS = 500, 20  # of a geometry and a configuration; of an image size in each
LLAVA_NEXT = Geometry()


def draw_geometry(draw: random.Random) -> Geometry:
    """Any crop and patch size, divisible or not, and any grids in any order, some of them twice."""
    if draw.random() < 0.2:
        return LLAVA_NEXT
    patch = draw.randint(1, 16)
    crop = patch * draw.randint(1, 14) + draw.randrange(patch)
    grids = [(draw.randint(1, 5), draw.randint(1, 5)) for _ in range(draw.randint(1, 7))]
    return Geometry(crop, patch, tuple((rows * crop, columns * crop) for rows, columns in grids))


def draw_size(draw: random.Random, geometry: Geometry) -> tuple[int, int]:
    """Pixels of an image: ordinary, very narrow, a pixel wide, as a grid, or where a row is just gained."""
    height, width = draw.choice(geometry.tiling.sizes)
    kind = draw.choice(("any", "any", "narrow", "pixel", "grid", "edge", "edge"))
    if kind == "any":
        size = (int(10 ** draw.uniform(0, 3.7)), int(10 ** draw.uniform(0, 3.7)))
    elif kind == "narrow":
        short = draw.randint(1, 80)
        size = (short, short * draw.randint(10, 60) + draw.randint(-1, 1))
    elif kind == "pixel":
        size = (1, draw.choice((1, 2, draw.randint(1, 5000))))
    elif kind == "grid":
        size = (height + draw.randint(-1, 1), width + draw.randint(-1, 1))
    else:  # whole patches of the grid along one side, whole pixels a patch
        size = (int(10 ** draw.uniform(1, 3.7)), int(10 ** draw.uniform(1, 3.7)))
        patches = [tiles * geometry.side for tiles in geometry.layout(size).grid]
        side = draw.randrange(2)
        scale = max(size[side] // patches[side], 1)
        size = [length // scale * scale + draw.choice((-1, 0, 0, 1)) for length in size]
        size[side] = patches[side] * scale
        return max(size[0], 1), max(size[1], 1)
    size = size if draw.random() < 0.5 else size[::-1]
    return max(size[0], 1), max(size[1], 1)


def draw_config(draw: random.Random, geometry: Geometry) -> tuple[HeroConfig, Fraction | None]:
    """A configuration, and its ratio as a fraction."""
    policies = [name for name in POLICIES if name not in COVERING]  # which count as most of the others
    if geometry.thumbnail == "none":
        policies.remove("hired")
    policy = draw.choice(policies)
    if draw.random() < 0.3:
        count = draw.randint(1, geometry.side**2 * draw.randint(1, 12))
        return HeroConfig(keep_tokens=count, policy=policy), None
    ratio = Fraction(draw.randint(1, 1000), 1000)
    return HeroConfig(keep_ratio=ratio, policy=policy), ratio


def index_grid(layout) -> torch.Tensor:
    """Numbers of the patches of the stitched grid, ``[1, rows, columns]``."""
    rows, columns = layout.grid[0] * layout.side, layout.grid[1] * layout.side
    return torch.arange(rows * columns).view(1, rows, columns)


def expected_count(config: HeroConfig, ratio: Fraction | None, patches: int, tiles: int, unpadded) -> int:
    """Tokens that are kept, in whole numbers, from the stock model's own un-padded grid."""
    rows, valid = unpadded.shape[1], unpadded.numel()
    if ratio is None:
        return min(config.keep_tokens, patches + valid) + rows
    share = ratio.numerator, ratio.denominator
    if config.policy.name in ("hired", "hero+"):
        total = share[0] * (tiles + 1) * patches // share[1]
        part = total // 2 if config.policy.name == "hired" else max(total // 5, total - tiles * patches)
        thumbnail = min(part, patches)
        return thumbnail + min(total - thumbnail, valid) + rows
    return share[0] * patches // share[1] + min(share[0] * tiles * patches // share[1], valid) + rows


def stock_index(layout, unpadded, first_crop: int) -> list[int]:
    """``crop · P + patch`` of every token of the stock sequence, −1 for newlines."""
    side, patches, columns = layout.side, layout.patches, layout.grid[1] * layout.side
    index = [first_crop * patches + patch for patch in range(patches)]
    for row in unpadded[0].tolist():
        for code in row:
            y, x = divmod(code, columns)
            crop = first_crop + 1 + y // side * layout.grid[1] + x // side
            index.append(crop * patches + y % side * side + x % side)
        index.append(-1)
    return index


def pack(layouts, config, draw: random.Random) -> hk.Gathered:
    """What is packed of images with random scores and one-wide random features."""
    plan = make_plan(tuple(layouts), config, config.policy.rows(6, 4), torch.device("cpu"))
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    scores = torch.rand(plan.valid.shape, generator=generator)
    signals = (hk.TileSignal(torch.ones(len(scores)), 1.0),)
    given = {"valid": plan.valid, "signals": signals, "allocation": config.allocation}
    return hk.segmented_topk_gather(scores[..., None] + 1.0, scores, plan.segments, **given)


def test_against_transformers():
    """10,000 draws: stock processor, the model's un-padding, patched processor, a formula, the packing."""
    draw = random.Random(20250917)
    model, processor, stock = tiny_model(vision_layers=1), tiny_processor(), tiny_processor()
    packed = extreme = 0
    for _ in range(GROUPS):
        geometry = draw_geometry(draw)
        config, ratio = draw_config(draw, geometry)
        crop, pinpoints = geometry.crop_size, [list(pinpoint) for pinpoint in geometry.tiling.sizes]
        tower = model.model.vision_tower.config
        tower.image_size, tower.patch_size = crop, geometry.patch_size
        model.config.image_grid_pinpoints = pinpoints
        for one in (processor, stock):
            one.image_processor.image_grid_pinpoints = pinpoints
            one.image_processor.crop_size = {"height": crop, "width": crop}
            one.image_processor.size = {"shortest_edge": crop}
            one.patch_size = geometry.patch_size
        everything = HeroConfig(keep_ratio=1.0)
        with hero.attach(model, processor, config=config) as handle:
            batch = []
            for _ in range(DRAWS):
                size = draw_size(draw, geometry)
                said = (size, geometry, config)
                layout = geometry.layout(size)
                grid = index_grid(layout)
                unpadded = unpad_image(grid, size)
                extreme += max(size) > 20 * min(size)
                # the stock model's view of the image
                assert layout.grid == get_anyres_image_grid_shape(size, pinpoints, crop), said
                assert layout.crops == image_size_to_num_patches(size, pinpoints, crop), said
                kept = grid[:, slice(*layout.rows), slice(*layout.columns)]
                assert torch.equal(kept, unpadded), said
                tile = unpadded // grid.shape[2] // layout.side * layout.grid[1]
                tile = tile + unpadded % grid.shape[2] // layout.side
                counts = torch.bincount(tile.flatten(), minlength=layout.tiles)
                assert layout.valid_counts == tuple(counts.tolist()), said
                assert layout.newline_count == unpadded.shape[1], said
                # everything kept is the stock count, CLS aside
                features = stock._get_number_of_features(*size, crop, crop) - 1
                assert layout.full_tokens == features, said
                assert count_tokens(everything, size, geometry=geometry) == features, said
                # less kept
                count = expected_count(config, ratio, layout.patches, layout.tiles, unpadded)
                assert count_tokens(config, size, geometry=geometry) == count, said
                assert handle.count_tokens(size) == layout.kept_tokens(config) == count, said
                batch.append((layout, unpadded, count))
            planned = processor._get_num_multimodal_tokens([layout.image_size for layout, *_ in batch])
            assert planned["num_image_tokens"] == [count for *_, count in batch], (geometry, config)
        batch = batch[: draw.randint(1, 4)]
        layouts = [layout for layout, _, _ in batch]
        assert pack(layouts, config, draw).lengths == tuple(count for _, _, count in batch)
        first, index = 0, []
        for layout, unpadded, _ in batch:
            index += stock_index(layout, unpadded, first)
            first += layout.crops
        assert pack(layouts, everything, draw).index.tolist() == index
        packed += len(batch)
    assert packed > 1000 and extreme > 1000  # the draws are as wide as was meant


@pytest.mark.parametrize("keep", [{"keep_ratio": 0.1}, {"keep_ratio": 0.73}, {"keep_tokens": 300}])
def test_floor_allocation_keeps_at_most_the_count(keep):
    draw = random.Random(7)
    fewer = 0
    for _ in range(60):
        geometry = draw_geometry(draw)
        layouts = [geometry.layout(draw_size(draw, geometry)) for _ in range(3)]
        config = HeroConfig(allocation="floor", **keep)
        for layout, length in zip(layouts, pack(layouts, config, draw).lengths):
            assert layout.newline_count <= length <= layout.kept_tokens(config)
            fewer += length < layout.kept_tokens(config)
    assert fewer > 0


# --- other shapes of a sequence --------------------------------------------------------------------------


@pytest.mark.parametrize("thumbnail", ["first", "last", "none"])
@pytest.mark.parametrize(("stitched", "newlines"), [(True, True), (True, False), (False, False)])
def test_other_sequences(thumbnail, stitched, newlines):
    """Where the thumbnail stands and what separates rows change the sequence, not the rule of the count."""
    draw = random.Random(11)
    shape = {"thumbnail": thumbnail, "stitched": stitched, "newlines": newlines}
    geometry = Geometry(56, 14, ((56, 112), (112, 112), (112, 168)), **shape)
    for _ in range(100):
        layouts = [geometry.layout(draw_size(draw, geometry)) for _ in range(draw.randint(1, 3))]
        config, ratio = draw_config(draw, geometry)
        for layout, length in zip(layouts, pack(layouts, config, draw).lengths):
            unpadded = unpad_image(index_grid(layout), layout.image_size)
            patches = 0 if thumbnail == "none" else 16
            # Without a thumbnail there is nothing to halve with: the rule of the others.
            rule = dataclasses.replace(config, policy="hero") if thumbnail == "none" else config
            count = expected_count(rule, ratio, 16, layout.tiles, unpadded)
            if ratio is None:
                count = min(config.keep_tokens, patches + unpadded.numel()) + unpadded.shape[1]
            elif thumbnail == "none":
                count -= ratio.numerator * 16 // ratio.denominator
            count -= 0 if newlines else unpadded.shape[1]
            assert length == layout.kept_tokens(config) == count
            assert layout.crops == layout.tiles + (thumbnail != "none")
    first, crops = layouts[0], layouts[0].crops
    assert first.thumbnail_crop == {"first": 0, "last": crops - 1, "none": -1}[thumbnail]
    assert first.tile_crops.start == (thumbnail == "first")


@pytest.mark.parametrize("newlines", [True, False])
@pytest.mark.parametrize("thumbnail", ["first", "last"])
def test_thumbnail_alone(thumbnail, newlines):
    geometry = Geometry(56, 14, (), thumbnail, newlines=newlines)
    layout = geometry.layout((300, 20))
    assert (layout.crops, layout.tiles, layout.grid, layout.valid_counts) == (1, 0, (0, 0), ())
    assert layout.full_tokens == 16 + newlines
    for keep, patches in (({"keep_ratio": 0.2}, 3), ({"keep_tokens": 7}, 7), ({"keep_tokens": 99}, 16)):
        config = HeroConfig(**keep)
        assert layout.kept_tokens(config) == patches + newlines
        assert pack([layout], config, random.Random(0)).lengths == (patches + newlines,)


# --- by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "grid", "rows", "columns"),
    [
        ((672, 672), (2, 2), (0, 48), (0, 48)),
        ((480, 640), (2, 2), (6, 42), (0, 48)),
        ((640, 480), (2, 2), (0, 48), (6, 42)),
        ((336, 1008), (1, 3), (0, 24), (0, 72)),
        ((100, 5000), (1, 3), (11, 13), (0, 72)),  # 1.44 rows of 24 are image: an odd rest pads one side less
        ((5000, 100), (3, 1), (0, 72), (11, 13)),
    ],
)
def test_layout_of_llava_next(size, grid, rows, columns):
    layout = LLAVA_NEXT.layout(size)
    assert (layout.grid, layout.rows, layout.columns) == (grid, rows, columns)
    assert (layout.side, layout.patches, layout.crops) == (24, 576, 1 + grid[0] * grid[1])


@pytest.mark.parametrize(
    ("keep", "size", "count"),
    [
        ({"keep_ratio": 1.0}, (672, 672), 576 + 2304 + 48),
        ({"keep_ratio": 0.2}, (672, 672), 115 + 460 + 48),  # ⌊115.2⌋ + ⌊460.8⌋
        ({"keep_ratio": 0.2}, (480, 640), 115 + 460 + 36),
        ({"keep_ratio": 0.2}, (100, 5000), 115 + 144 + 2),  # all 2 · 72 valid patches, of 345
        ({"keep_ratio": 1e-6}, (672, 672), 0 + 0 + 48),
        ({"keep_tokens": 1}, (672, 672), 1 + 48),
        ({"keep_tokens": 640}, (672, 672), 640 + 48),
        ({"keep_tokens": 10**9}, (672, 672), 2880 + 48),
        ({"keep_tokens": 10**9}, (100, 5000), 576 + 144 + 2),
    ],
)
def test_counts_of_llava_next(keep, size, count):
    assert count_tokens(HeroConfig(**keep), size) == count


def test_count_is_split_evenly_and_overflows_either_way():
    layout = LLAVA_NEXT.layout((672, 672))
    assert layout.budget(HeroConfig(keep_tokens=640)) == (128, 512)
    assert layout.budget(HeroConfig(keep_tokens=2879)) == (575, 2304)
    narrow = LLAVA_NEXT.layout((100, 5000))
    assert narrow.budget(HeroConfig(keep_tokens=400)) == (
        256,
        144,
    )  # tiles are full, the thumbnail takes over


@pytest.mark.parametrize(
    ("policy", "keep", "size", "budget"),
    [
        ("hero+", {"keep_ratio": 0.2}, (672, 672), (115, 461)),  # a fifth of 576
        ("hero+", {"keep_ratio": 1.0}, (672, 672), (576, 2304)),
        ("hero+", {"keep_ratio": 0.9}, (336, 672), (403, 1152)),  # what the tiles cannot take
        ("hero+", {"keep_tokens": 101}, (672, 672), (20, 81)),
        ("hired", {"keep_ratio": 0.2}, (672, 672), (288, 288)),  # half of 576 each
        ("hired", {"keep_ratio": 0.5}, (672, 672), (576, 864)),  # half of 1440 is more than the thumbnail has
        ("hired", {"keep_ratio": 0.9}, (100, 5000), (576, 144)),  # all that is no padding
        ("hired", {"keep_ratio": 1.0}, (672, 672), (576, 2304)),
        ("hired", {"keep_tokens": 101}, (672, 672), (50, 51)),
        ("hired", {"keep_tokens": 400}, (100, 5000), (256, 144)),  # the thumbnail takes what the tiles cannot
    ],
)
def test_parts_of_the_thumbnail(policy, keep, size, budget):
    config = HeroConfig(policy=policy, **keep)
    layout = LLAVA_NEXT.layout(size)
    assert layout.budget(config) == budget
    assert count_tokens(config, size) == sum(budget) + layout.newline_count
    alone = Geometry(tiling=()).layout(size)  # nothing to halve with
    assert alone.budget(config) == (min(config.keep_tokens or int(576 * config.keep_ratio), 576), 0)


def test_floor_ratio():
    assert 0.29 * 100 < 29
    assert floor_ratio(0.29 * 100) == 29
    for patches in (1, 16, 36, 100, 576, 729, 40 * 576):
        for permille in range(1001):
            assert floor_ratio(permille / 1000 * patches) == permille * patches // 1000


def test_geometry_by_its_fields():
    config = HeroConfig(keep_ratio=0.5)
    fields = {"tiling": [[56, 112], [112, 56]], "crop_size": 56, "patch_size": 14}
    geometry = Geometry(**fields)
    assert geometry.tiling.sizes == ((56, 112), (112, 56))
    assert count_tokens(config, (50, 100), **fields) == 8 + 16 + 4
    assert count_tokens(config, (50, 100), geometry=geometry) == 8 + 16 + 4
    assert count_tokens(config, (672, 672), patch_size=28) == 72 + 288 + 24
    assert count_tokens(config, (672, 672)) == count_tokens(config, (672, 672), tiling=LLAVA_NEXT_PINPOINTS)


def test_sizes_in_any_sequence():
    numpy = pytest.importorskip("numpy")
    layout = LLAVA_NEXT.layout((480, 640))
    for size in ([480, 640], numpy.array([480, 640]), (numpy.int64(480), numpy.int32(640))):
        assert LLAVA_NEXT.layout(size) is layout  # cached


def test_values_are_hashable():
    assert hash(Geometry()) == hash(LLAVA_NEXT) and Geometry() == LLAVA_NEXT
    assert len({LLAVA_NEXT.layout((480, 640)), LLAVA_NEXT.layout((480, 641))}) == 2


# --- refusals --------------------------------------------------------------------------------------------

INTEGERS = {
    "zero": (0, ValueError),
    "negative": (-56, ValueError),
    "float": (56.0, TypeError),
    "bool": (True, TypeError),
    "string": ("56", TypeError),
    "None": (None, TypeError),
}
SIZES = {
    "zero": ((0, 100), ValueError),
    "negative": ((100, -1), ValueError),
    "float": ((100.0, 100), TypeError),
    "NaN": ((100, float("nan")), TypeError),
    "bool": ((True, 100), TypeError),
    "strings": (("100", "100"), TypeError),
    "one": ((100,), TypeError),
    "three": ((3, 100, 100), TypeError),
    "string": ("10", TypeError),
    "number": (100, TypeError),
    "None": (None, TypeError),
}
PINPOINTS = {
    "string": ("336", TypeError),
    "number": (336, TypeError),
    "None": (None, TypeError),
    "not pairs": ((336, 672), TypeError),
    "one side": (((336,),), TypeError),
    "three sides": (((336, 336, 336),), TypeError),
    "strings": (("33",), TypeError),
    "floats": (((336.0, 672.0),), TypeError),
    "bool": (((True, 336),), TypeError),
    "no multiple": (((336, 700),), ValueError),
    "smaller than a crop": (((336, 168),), ValueError),
    "zero": (((0, 336),), ValueError),
}
GEOMETRY = [
    *[("crop_size", *case) for case in INTEGERS.values()],
    *[("patch_size", *case) for case in INTEGERS.values()],
    ("patch_size", 337, ValueError),
    *[("tiling", *case) for case in PINPOINTS.values()],
    ("thumbnail", "middle", ValueError),
    ("thumbnail", None, ValueError),
]


def check(error, kind, name):
    assert error.type is kind
    said, _, rest = str(error.value).partition(": ")
    assert said == name
    assert rest.startswith("expected ") and "got " in rest


@pytest.mark.parametrize(("name", "value", "kind"), GEOMETRY)
def test_geometry_refuses(name, value, kind):
    with pytest.raises((TypeError, ValueError)) as error:
        Geometry(**{name: value})
    check(error, kind, name)
    if name != "thumbnail" and value is not None:
        with pytest.raises(kind):
            count_tokens(HeroConfig(), (100, 100), **{name: value})


def test_nothing_to_see():
    with pytest.raises(ValueError) as error:
        Geometry(tiling=(), thumbnail="none")
    check(error, ValueError, "tiling")


@pytest.mark.parametrize("size", SIZES)
def test_image_size_is_refused(size):
    size, kind = SIZES[size]
    for call in (LLAVA_NEXT.layout, lambda size: count_tokens(HeroConfig(), size)):
        with pytest.raises((TypeError, ValueError)) as error:
            call(size)
        check(error, kind, "image_size")


@pytest.mark.parametrize(
    ("change", "kind", "name"),
    [
        ({"config": None}, TypeError, "config"),
        ({"config": {"keep_ratio": 0.2}}, TypeError, "config"),
        ({"config": 0.2}, TypeError, "config"),
        ({"geometry": LLAVA_NEXT, "patch_size": 14}, ValueError, "geometry"),
        ({"geometry": LLAVA_NEXT, "tiling": []}, ValueError, "geometry"),
        ({"geometry": (336, 14)}, TypeError, "geometry"),
    ],
)
def test_count_tokens_refuses(change, kind, name):
    with pytest.raises((TypeError, ValueError)) as error:
        count_tokens(**{"config": HeroConfig(), "image_size": (100, 100), **change})
    check(error, kind, name)
