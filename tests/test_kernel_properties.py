"""Kernels on thousands of random inputs, many of them packed into one launch.

The properties of the reference are in ``test_reference.py``: 3,000 random examples of budgets, 30,000
apportionments and 800 of top-k. Here a launch of ``tile_budgets`` holds 100 images, each an apportionment
checked against exact fractions.
"""

import random

import torch
from cases import SCORES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import first_difference, oracle_exact, oracle_floor, oracle_keep, oracle_order, oracle_rounds
from test_kernels import check_budgets, check_gather, counts_of

from hero_kernels import Segment, Segments, TileSignal

IMAGES = 100  # per launch


def examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],  # the way, which is a constant
    )


SEED = st.integers(0, 2**32)


FEW, MANY = (1, 2, 3, 4, 5, 9, 12, 40, 63), (64, 65, 130, 256)  # tiles


def draw_image(draw: random.Random, counts=FEW):
    """``(weights, caps, total)`` of some tiles: equal, tied, skewed or zero weights, caps that bind."""
    count = draw.choice(counts)
    kind = draw.choice([[1], [0, 1], [1, 2, 3], range(10), [0, 1, 1000, 10**6], [10**6, 10**6 + 1]])
    caps = draw.choice([[36], [0, 36], range(5), range(37), [576, 577], [0, 1, 4096]])
    weights = [draw.choice(kind) for _ in range(count)]
    caps = [draw.choice(caps) for _ in range(count)]
    total = draw.choice([sum(caps), sum(caps) + 9, draw.randint(0, sum(caps)), draw.randint(0, count)])
    return weights, caps, total


def launch(way, images, allocation="exact"):
    """One launch; the weights, caps and total of each image with what came out."""
    segments = Segments(tuple(Segment(len(caps), -1, 1, 0, total) for _, caps, total in images), 64)
    values = torch.tensor([float(weight) for weights, _, _ in images for weight in weights])
    caps = torch.tensor([cap for _, caps, _ in images for cap in caps], dtype=torch.int32)
    signals = [TileSignal(values.to(way.device), 1.0)]
    result = way.run("tile_budgets", signals, caps.to(way.device), segments, allocation=allocation)
    budgets, emitted = result.budgets.tolist(), result.weights.tolist()
    places = zip(images, segments.first_crops, segments.first_crops[1:])
    return [(*image, emitted[begin:end], budgets[begin:end]) for image, begin, end in places]


@examples(3)
@given(SEED)
def test_exact_budgets(kernel, seed):
    """By fractions; the sum, the caps, and never less for more weight, unless full."""
    draw = random.Random(seed)
    for weights, caps, total, emitted, budgets in launch(kernel, [draw_image(draw) for _ in range(IMAGES)]):
        assert budgets == oracle_exact(total, emitted, caps)[0]
        assert sum(budgets) == min(total, sum(caps))
        assert all(0 <= budget <= cap for budget, cap in zip(budgets, caps))
        for i, j in ((i, j) for i in range(len(caps)) for j in range(len(caps)) if emitted[i] > emitted[j]):
            assert budgets[i] >= min(budgets[j], caps[i])
        assert [weight > 0 for weight in weights] == [weight > 0 for weight in emitted] or not any(weights)


@examples(4)
@given(SEED)
def test_budgets_of_many_tiles(kernel, seed):
    """Beside an image of few, with exact products of 256 tiles."""
    draw = random.Random(seed)
    images = [
        *(draw_image(draw, MANY) for _ in range(5)),
        draw_image(draw),
        ([1, 3] * 128, [4096] * 256, 999999),
    ]
    for _, caps, total, emitted, budgets in launch(kernel, images):
        assert budgets == oracle_rounds(total, emitted, caps)
    for _, caps, total, emitted, budgets in launch(kernel, images, "floor"):
        assert budgets == oracle_floor(total, emitted, caps)


@examples(2)
@given(SEED)
def test_floor_budgets(kernel, seed):
    draw = random.Random(seed)
    images = [draw_image(draw) for _ in range(IMAGES)]
    for _, caps, total, emitted, budgets in launch(kernel, images, "floor"):
        assert budgets == oracle_floor(total, emitted, caps)


@examples(1)
@given(SEED)
def test_order_of_tiles_matters_to_ties_alone(kernel, seed):
    draw = random.Random(seed)
    images = [draw_image(draw) for _ in range(IMAGES // 2)]
    orders = [draw.sample(range(len(caps)), len(caps)) for _, caps, _ in images]
    shuffled = [
        ([weights[tile] for tile in order], [caps[tile] for tile in order], total)
        for order, (weights, caps, total) in zip(orders, images)
    ]
    results = launch(kernel, images + shuffled)
    for order, one, other in zip(orders, results, results[len(images) :]):
        _, caps, total, emitted, budgets = one
        assert other[3] == [emitted[tile] for tile in order]
        if not oracle_exact(total, emitted, caps)[1]:
            assert other[4] == [budgets[tile] for tile in order]


@examples(4)
@given(SEED, st.booleans(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_selection_is_a_stable_sort(kernel, seed, masked, dtype):
    """Top-k and ranks of 32 crops at a time, of all kinds of scores and masks."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    crops, patches = 32, draw.choice([1, 7, 16, 36, 63])
    kinds = [SCORES[draw.choice(list(SCORES))] for _ in range(crops)]
    scores = torch.stack([kind(generator, patches) for kind in kinds]).to(dtype)
    valid = torch.rand(crops, patches, generator=generator) < torch.rand(crops, 1, generator=generator)
    budgets = torch.randint(0, patches + 3, (crops,), generator=generator)
    mask = valid.to(kernel.device) if masked else None
    masks = valid.tolist() if masked else [None] * crops
    keep = kernel.run("segmented_topk", scores.to(kernel.device), budgets.to(kernel.device), mask)
    expected = [oracle_keep(*crop) for crop in zip(scores.tolist(), budgets.tolist(), masks)]
    assert first_difference(keep.tolist(), expected) is None
    rows = scores.float()[:, None].to(kernel.device)
    ranks = kernel.run("finalize_scores", rows, valid=mask, rank=True).ranks.tolist()
    for crop, crop_mask, row in zip(scores.tolist(), masks, ranks):
        order = oracle_order(crop, crop_mask)
        assert [row[patch] for patch in order] == list(range(len(order)))


class Drawn:
    """A batch as :mod:`cases` describes them, drawn."""

    def __init__(self, draw: random.Random):
        side, images = draw.choice([1, 2, 3, 4]), []
        for _ in range(draw.randint(1, 2)):
            gw, gh = draw.choice([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (5, 1), (1, 4)])
            thumbnail = draw.choice([-1, 0, gw * gh])
            rows = sorted(draw.randint(0, gh * side) for _ in range(2))
            wanted = draw.randint(0, gw * gh * side**2 + 2)
            images.append(
                Segment(
                    *(gw * gh + (thumbnail >= 0), thumbnail, gw, draw.randint(0, side**2 + 1), wanted),
                    *((rows[0], rows[1]), thumbnail >= 0 and draw.random() < 0.5),
                )
            )
        self.segments = Segments(tuple(images), side)


@examples(6)
@given(SEED, st.booleans())
def test_gather_of_any_layout(kernel, seed, ranked):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    case = Drawn(draw)
    segments = case.segments
    shape = (segments.crops, segments.patches)
    scores = torch.randint(0, 5, shape, generator=generator) / 4
    features = torch.randn(*shape, draw.choice([1, 5, 16, 33]), generator=generator)
    valid = torch.rand(shape, generator=generator) < draw.choice([0.2, 0.8, 1.1])
    signals = [TileSignal(torch.rand(segments.crops, generator=generator), 1.0, draw.choice([None, 0.3]))]
    seen = {name: value.to(kernel.device) for name, value in (("valid", valid), ("scores", scores))}
    if ranked:
        ranks = kernel.run("finalize_scores", seen["scores"][:, None], valid=seen["valid"], rank=True).ranks
        seen["ranks"] = ranks
    result = kernel.run(
        "segmented_topk_gather",
        features.to(kernel.device),
        segments=segments,
        signals=[signals[0]._replace(values=signals[0].values.to(kernel.device))],
        **seen,
    )
    check_budgets(result.budgets, signals, counts_of(case, valid), segments)
    check_gather(result, features, scores, valid, result.budgets.budgets, segments, True)
