"""Properties of the reference, against oracles written as plain loops, and the argument checks.

The operations are called by their public names: on a CPU these check the arguments and run the reference. Its
results on the common cases are compared with the oracles in ``test_kernels.py``, as those of the kernels are.
"""

import math
import random
from itertools import chain

import numpy as np
import pytest
import torch
from cases import BATCHES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    attention_maps,
    draw_attention,
    first_difference,
    generator,
    oracle_attention,
    oracle_cls,
    oracle_exact,
    oracle_floor,
    oracle_index,
    oracle_keep,
    oracle_received,
    oracle_rounds,
    oracle_shares,
    oracle_weights,
)

import hero_kernels as hk
from hero_kernels import Segment, Segments, TileBudgets, TileSignal
from hero_kernels.testing import OperationCounter, peak_bytes, same_bits

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = {"rtol": 2e-5, "atol": 2e-7}  # of an fp32 computation to the exact one on the same inputs
ROUNDED = {
    torch.float32: CLOSE,
    torch.bfloat16: {"rtol": 4e-3, "atol": 1e-5},
    torch.float16: {"rtol": 5e-4, "atol": 1e-5},
}


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True)


def close(actual, expected, **tolerance):
    expected = torch.tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, **(tolerance or CLOSE))


# --- attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 37])
def test_oracles_agree(tokens):
    """The tensor oracle of ``test_kernels.py`` equals the loops."""
    query, key = draw_attention("oracles", tokens, tokens=tokens)
    maps = attention_maps(query, key, 0.4)
    close(maps, oracle_attention(query, key, 0.4), rtol=1e-12, atol=1e-15)
    close(maps[:, :, 0, 1:].mean(1), oracle_cls(query, key, 0.4), rtol=1e-12, atol=1e-15)
    close(maps[:, :, 0, 1:].softmax(-1).mean(1), oracle_cls(query, key, 0.4, True), rtol=1e-12, atol=1e-15)
    close(maps.mean((1, 2)), oracle_received(query, key, 0.4), rtol=1e-12, atol=1e-15)


def test_every_token_pays_all_its_attention():
    for tokens in (1, 2, 37, 577):
        scores = hk.received_attention(*draw_attention("received", tokens, tokens=tokens), 0.4)
        close(scores.mean(1).sum(1), [1.0] * len(scores))


def test_cls_attention_of_a_double():
    query, key = draw_attention("double", dtype=torch.float64)
    scores = hk.cls_attention(query, key, 0.3)
    assert scores.dtype == torch.float32
    close(scores.mean(1), oracle_cls(query, key, 0.3), rtol=1e-4, atol=1e-6)


def test_cls_attention_of_extreme_logits():
    query, key = draw_attention("extreme", tokens=37)
    for scale in (1e4, -1e4):  # one key takes all; exponentials of the bare logits would overflow
        scores = hk.cls_attention(query, key, scale)
        close(scores.mean(1), oracle_cls(query, key, scale))
        assert float(scores.mean(1).max()) > 0.3
    flat = hk.cls_attention(query, key, 0.0).mean(1)
    close(flat, [[1 / 37] * 36] * 2)  # the CLS column is dropped, without renormalising


@pytest.mark.parametrize("operation", ["cls_attention", "attention_with_cls", "received_attention"])
def test_accumulation(operation):
    """Three layers, weighted by numbers and crop by crop, added to what stands in the buffer."""
    function = getattr(hk, operation)
    size = 37 if operation == "received_attention" else 36
    memory = torch.full((4, 3, size + 2), NAN)
    out = memory[1:-1, :, 1:-1].copy_(torch.randn(2, 3, size, generator=generator("out")))
    expected = out.double().mean(1)
    weights = [0.25, torch.tensor([0.5, 0.0]), torch.tensor([[3.0, NAN], [1.0, NAN]])[:, 0]]
    for layer, weight in enumerate(weights):
        query, key, value = draw_attention("layer", layer, count=3)
        tensors = (query, key, value) if operation == "attention_with_cls" else (query, key)
        result = function(*tensors, 0.4, weight=weight, out=out)
        assert (result[1] if operation == "attention_with_cls" else result) is out
        rows = torch.tensor(
            oracle_received(query, key, 0.4)
            if operation == "received_attention"
            else oracle_cls(query, key, 0.4)
        )
        expected += rows * (weight[:, None] if isinstance(weight, torch.Tensor) else weight)
        close(out.mean(1), expected.tolist())
    memory[1:-1, :, 1:-1] = NAN
    assert memory.isnan().all()  # nothing was written around the buffer


@pytest.mark.parametrize("weight", [0.25, torch.tensor([0.5, -2.0])], ids=["number", "tensor"])
def test_weight_without_a_buffer(weight):
    query, key = draw_attention("weight")
    factors = [weight] * 2 if isinstance(weight, float) else weight.tolist()
    for function, oracle in (
        (hk.cls_attention, oracle_cls),
        (hk.received_attention, oracle_received),
    ):
        rows = oracle(query, key, 0.4)
        expected = [[factor * score for score in row] for factor, row in zip(factors, rows)]
        close(function(query, key, 0.4, weight=weight).mean(1), expected)


def shapes(tokens):
    """Small enough for N² loops."""
    return {"crops": 1, "heads": 1, "tokens": tokens, "width": 2} if tokens > 100 else {"tokens": tokens}


@pytest.mark.parametrize("second_softmax", [False, True], ids=["", "second softmax"])
def test_rows_per_head(second_softmax):
    query, key, value = draw_attention("per head", count=3)
    heads = [slice(head, head + 1) for head in range(3)]
    cls = [oracle_cls(query[:, h], key[:, h], 0.4, second_softmax) for h in heads]
    received = [oracle_received(query[:, h], key[:, h], 0.4) for h in heads]
    options = {"second_softmax": second_softmax}
    for rows, expected in (
        (hk.cls_attention(query, key, 0.4, **options), cls),
        (hk.attention_with_cls(query, key, value, 0.4, **options)[1], cls),
        (hk.received_attention(query, key, 0.4), received),
    ):
        close(rows.transpose(0, 1), expected)
    out = torch.ones(2, 3, 36)
    assert hk.cls_attention(query, key, 0.4, out=out, weight=2.0, **options) is out
    close(out.transpose(0, 1), (1 + 2 * torch.tensor(cls)).tolist())


@pytest.mark.parametrize("operation", ["cls_attention", "received_attention"])
def test_crops_of_weight_zero_are_left(operation):
    """Whatever their keys: NaN and infinity there change nothing, not even the sign of a zero."""
    query, key = draw_attention("zero weight", crops=3)
    key[1], key[2, 0, 5] = NAN, INF
    size = 37 if operation == "received_attention" else 36
    shape = (3, 3, size)
    function = getattr(hk, operation)
    alone = function(query[:1], key[:1], 0.4, weight=0.5)
    weight = torch.tensor([0.5, 0.0, -0.0])
    result = function(query, key, 0.4, weight=weight)
    close(result, torch.cat([alone, torch.zeros(2, *shape[1:])]).tolist())
    for factor, left, start in ((weight, 1, 7.0), (0.0, 0, -1.0), (torch.zeros(3), 0, 3.0)):
        out = torch.full(shape, start)
        assert function(query, key, 0.4, weight=factor, out=out) is out
        assert (out[left:] == start).all()


def test_segments_are_read_in_blocks():
    """Of a large image the map is never in memory, but a few blocks of it."""
    tokens = 6400
    query, key = draw_attention("large", crops=1, heads=1, tokens=tokens, width=4)
    bounds = torch.tensor([0, tokens], dtype=torch.int32)

    def run():
        return hk.received_attention(query, key, 0.4, cu_seqlens=bounds, max_seqlen=tokens)

    assert peak_bytes(run) < 4 * 5 * 1024 * tokens < 4 * tokens**2
    torch.testing.assert_close(run(), hk.received_attention(query, key, 0.4))


# --- scores ----------------------------------------------------------------------------------------------


def test_finalize_scores_of_extremes():
    equal = hk.finalize_scores(torch.full((2, 1, 36), 1e-30))
    close(equal.entropy, [math.log(36)] * 2)
    one = torch.zeros(1, 2, 36)
    one[0, 0, 5] = 3.0
    assert hk.finalize_scores(one).entropy.tolist() == [0.0]
    assert hk.finalize_scores(one, valid=torch.zeros(1, 36, dtype=torch.bool)).entropy.tolist() == [0.0]
    none = hk.finalize_scores(torch.empty(0, 2, 9), rank=True)
    assert [part.shape for part in none] == [(0, 9), (0,), (0, 9)]


def test_ranks_put_nan_last_of_the_valid():
    scores = torch.tensor([[NAN, -INF, 1.0, -NAN, INF, -0.0, 0.0]])
    valid = torch.tensor([[True, True, True, True, False, True, True]])
    ranks = hk.finalize_scores(scores[:, None], valid=valid, rank=True).ranks
    assert ranks[0, [2, 5, 6, 1, 0, 3, 4]].tolist() == [0, 1, 2, 3, 4, 5, 6]
    for k in range(8):  # the reference selects where the public operation refuses NaN
        keep = hk.reference.segmented_topk(scores, torch.tensor([k]), valid)
        assert keep.tolist() == [oracle_keep(scores[0].tolist(), k, valid[0].tolist())]


# --- top-k -----------------------------------------------------------------------------------------------


def check_topk(scores, budgets, valid=None, dtype=torch.float32, integers=torch.int32):
    scores = torch.tensor(scores, dtype=torch.float64).to(dtype)
    keep = hk.segmented_topk(
        scores, torch.tensor(budgets, dtype=integers), None if valid is None else torch.tensor(valid)
    )
    assert keep.dtype == torch.bool
    masks = [None] * len(budgets) if valid is None else valid
    assert keep.tolist() == [oracle_keep(*crop) for crop in zip(scores.tolist(), budgets, masks)]


TINY = 2.0**-149  # the least subnormal of fp32
ROWS = {
    "distinct": [0.3, 0.1, 0.9, 0.5, 0.2, 0.8, 0.7, 0.6, 0.4],
    "ascending": [float(i) for i in range(9)],
    "all equal": [0.5] * 9,
    "all zero": [0.0] * 9,
    "ties": [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 2.0],
    "signed zeros": [-0.0, 0.0, -0.0, 0.0, -TINY, TINY, 0.0, -0.0, 0.0],
    "infinities": [INF, 1.0, -INF, INF, -INF, 2.0, 3.4e38, -3.4e38, 0.0],
    "all -inf": [-INF] * 9,
    "subnormal": [TINY, 3 * TINY, 2 * TINY, 0.0, -TINY, 2.0**-126, 2.0**-127, 2 * TINY, -3 * TINY],
    "negative": [-1.0, -2.0, -1.5, -0.5, -0.5, -4.0, -0.25, -8.0, -0.25],
}
MASKS = {
    "none": None,
    "all": [True] * 9,
    "nothing": [False] * 9,
    "border": [False, False, False, True, True, True, False, False, False],
    "odd": [patch % 2 == 1 for patch in range(9)],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("row", ROWS)
def test_topk(row, mask):
    """Every budget at once, a crop each: none, all, and more than there is."""
    budgets = [*range(12), 1000]
    check_topk([ROWS[row]] * len(budgets), budgets, None if mask == "none" else [MASKS[mask]] * len(budgets))


def test_topk_prefers_valid_minus_infinity_to_any_invalid_patch():
    scores = torch.tensor([[5.0, -INF, INF, -INF, 7.0, -INF]])
    valid = torch.tensor([[False, True, False, True, False, False]])
    for budget, kept in ((1, [1]), (2, [1, 3]), (6, [1, 3])):
        assert hk.segmented_topk(scores, torch.tensor([budget]), valid)[0].nonzero()[:, 0].tolist() == kept


def test_topk_of_no_crops():
    keep = hk.segmented_topk(torch.empty(0, 9), torch.empty(0, dtype=torch.int32))
    assert keep.shape == (0, 9)


PALETTE = st.sampled_from([-INF, -1.0, -TINY, -0.0, 0.0, TINY, 2 * TINY, 0.5, 1.0, 3.4e38, INF])
CROPS = st.lists(
    st.tuples(
        st.lists(PALETTE, min_size=9, max_size=9),
        st.integers(0, 11),
        st.lists(st.booleans(), min_size=9, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


@examples(800)
@given(
    CROPS,
    st.booleans(),
    st.sampled_from([*DTYPES, torch.float64]),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_topk_on_anything(crops, masked, dtype, integers):
    scores, budgets, valid = ([crop[part] for crop in crops] for part in range(3))
    check_topk(scores, budgets, valid if masked else None, dtype, integers)


def test_topk_of_many_patches_with_ties():
    draw = random.Random(3)
    scores = [[draw.randrange(40) / 8 for _ in range(576)] for _ in range(8)]
    valid = [[draw.random() < 0.7 for _ in range(576)] for _ in range(8)]
    budgets = [0, 1, 57, 115, 288, 400, 576, 900]
    check_topk(scores, budgets, valid)
    check_topk(scores, budgets)


# --- budgets ---------------------------------------------------------------------------------------------


def image_of(caps, tile_tokens, thumbnail="first", thumbnail_tokens=0, **fields) -> tuple[Segment, list[int]]:
    """A segment of the tiles with these caps, and the caps of its crops."""
    crops = len(caps) + (thumbnail != "none")
    position = {"first": 0, "last": crops - 1, "none": -1}[thumbnail]
    caps = {"first": [16, *caps], "last": [*caps, 16], "none": list(caps)}[thumbnail]
    return Segment(crops, position, 1, thumbnail_tokens, tile_tokens, **fields), caps


def one_image(weights, caps, total, allocation="exact") -> TileBudgets:
    """Budgets of an image without thumbnail, its one signal proportional to ``weights``."""
    segments = Segments((image_of(caps, total, "none")[0],), math.isqrt(max(caps)) + 1)
    signal = TileSignal(torch.tensor(weights, dtype=torch.float32), 1.0)
    return hk.tile_budgets([signal], torch.tensor(caps), segments, allocation=allocation)


TILES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 36)), min_size=1, max_size=9)
UNEVEN = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 1000, 10**6]), st.integers(0, 576)), min_size=1, max_size=40
)
TOTAL = st.integers(0, 200)
FRACTION = st.integers(0, 110)


@examples(1000)
@given(st.one_of(TILES, UNEVEN), FRACTION)
def test_exact_budgets(tiles, percent):
    weights, caps = map(list, zip(*tiles))
    total = sum(caps) * percent // 100
    result = one_image(weights, caps, total)
    emitted, budgets = result.weights.tolist(), result.budgets.tolist()
    assert budgets == oracle_exact(total, emitted, caps)[0]
    assert sum(budgets) == min(total, sum(caps))
    assert all(0 <= budget <= cap for budget, cap in zip(budgets, caps))
    for i, j in ((i, j) for i in range(len(caps)) for j in range(len(caps))):
        if emitted[i] > emitted[j] and budgets[i] < caps[i]:
            assert budgets[i] >= budgets[j]
        if emitted[i] > 0 == emitted[j] and budgets[j] > 0:  # no weight: only what the others cannot take
            assert budgets[i] == caps[i]


@examples(600)
@given(TILES, TOTAL, st.integers(0, 8), st.integers(1, 5))
def test_more_weight_never_means_less(tiles, total, tile, more):
    weights, caps = map(list, zip(*tiles))
    tile %= len(tiles)
    before = one_image(weights, caps, total).budgets.tolist()
    if sum(weights) == 0:
        weights = [1] * len(weights)  # what all zero means
    weights[tile] += more
    after = one_image(weights, caps, total).budgets.tolist()
    assert after[tile] >= before[tile]


@examples(600)
@given(TILES, TOTAL, st.randoms(use_true_random=False))
def test_order_of_tiles_matters_to_ties_alone(tiles, total, draw):
    weights, caps = map(list, zip(*tiles))
    order = list(range(len(tiles)))
    draw.shuffle(order)
    result = one_image(weights, caps, total)
    budgets = result.budgets.tolist()
    shuffled = one_image([weights[tile] for tile in order], [caps[tile] for tile in order], total)
    assert shuffled.weights.tolist() == [int(result.weights[tile]) for tile in order]
    if not oracle_exact(total, result.weights.tolist(), caps)[1]:
        assert shuffled.budgets.tolist() == [budgets[tile] for tile in order]


@examples(400)
@given(st.one_of(TILES, UNEVEN), TOTAL)
def test_floor_budgets(tiles, total):
    weights, caps = map(list, zip(*tiles))
    result = one_image(weights, caps, total, "floor")
    assert result.budgets.tolist() == oracle_floor(total, result.weights.tolist(), caps)


@pytest.mark.parametrize(
    ("weights", "caps", "total", "exact", "floor"),
    [
        ([1, 1, 1], [9, 9, 9], 10, [4, 3, 3], [3, 3, 3]),  # a tie of remainders: the lower tile
        ([0, 0, 0], [9, 9, 9], 11, [4, 4, 3], [3, 3, 3]),  # no weight at all: equal parts
        ([1, 0, 0], [4, 9, 9], 9, [4, 3, 2], [4, 0, 0]),  # zero weights take what a full tile leaves
        ([1, 0, 1], [9, 9, 9], 18, [9, 0, 9], [9, 0, 9]),
        ([3, 1], [4, 9], 8, [4, 4], [4, 2]),  # the cap binds, the rest flows on
        ([4, 2, 2], [4, 5, 9], 16, [4, 5, 7], [4, 4, 4]),  # filling the first fills the second
        ([1, 2], [9, 0], 5, [5, 0], [1, 0]),  # an empty tile
        ([1, 2], [3, 4], 100, [3, 4], [3, 4]),
        ([1, 2], [3, 4], 0, [0, 0], [0, 0]),
        ([5], [9], 7, [7], [7]),
        ([1, 1, 2], [9, 9, 9], 2, [1, 0, 1], [0, 0, 1]),  # quotas ½, ½, 1
    ],
)
def test_budgets_by_hand(weights, caps, total, exact, floor):
    assert one_image(weights, caps, total).budgets.tolist() == exact
    assert one_image(weights, caps, total, "floor").budgets.tolist() == floor


LARGEST = 2**31 - 1


def draw_tiles(draw):
    """``(total, weights, caps)`` of an image: ties, zeros, weights and counts up to what is allowed."""
    count = draw.choice([0, 1, 2, 3, 4, 5, 9, 17, 40])
    kind = draw.choice(
        [[0], [1], [0, 1], [1, 2, 3], range(10), [0, 1, 10**6], [2**22, 2**22 + 1], [0, 1, 2**24]]
    )
    top = max(2**24 // max(count, 1), 1)  # weights are shares of 2²⁴
    weights = [min(draw.choice(kind), top) for _ in range(count)]
    if count and draw.random() < 0.2:
        weights = [0] * count
        weights[draw.randrange(count)] = 2**24
    caps = draw.choice([[0], [36], [0, 36], range(5), range(577), [0, 1, 576], [0, 1, LARGEST, LARGEST - 1]])
    caps = [draw.choice(caps) for _ in range(count)]
    whole = sum(caps)
    total = draw.choice([0, 1, whole - 1, whole, whole + 9, draw.randint(0, whole), draw.randint(0, count)])
    return min(max(total, 0), LARGEST), weights, caps


@pytest.mark.parametrize("seed", range(20))
def test_apportionment_of_batches(seed):
    """Thirty thousand images in all, up to 50 a batch, whatever their neighbours."""
    draw, tied = random.Random(seed), 0
    for _ in range(90):
        images = [draw_tiles(draw) for _ in range(draw.choice([1, 2, 50]))]
        width = max(len(caps) for _, _, caps in images) + draw.choice([0, 3])
        total = torch.tensor([[total] for total, _, _ in images])
        weights, caps = (
            torch.tensor([image[part] + [0] * (width - len(image[part])) for image in images]).long()
            for part in (1, 2)
        )
        exact, floor = (
            rule(total, weights, caps).tolist()
            for rule in (hk.reference._apportion, hk.reference._apportion_floor)
        )
        for image, budgets, floors in zip(images, exact, floor):
            count = len(image[2])
            assert budgets[:count] == oracle_rounds(*image)
            assert floors[:count] == (oracle_floor(*image) if any(image[1]) else [0] * count)
            assert not any(budgets[count:] + floors[count:])
            if count < 10:
                expected, tie = oracle_exact(*image)
                assert budgets[:count] == expected
                tied += tie
    assert tied > 20


SIGNAL = st.tuples(st.sampled_from([0.0, 0.1, 0.8, 3.0]), st.sampled_from([None, 0.02, 0.1, 1.0]))
IMAGES = st.lists(
    st.tuples(
        st.integers(0, 40),  # tiles
        st.sampled_from(["first", "last", "none"]),
        st.integers(0, 40),  # thumbnail tokens
        st.integers(0, 700),  # tile tokens
    ),
    min_size=1,
    max_size=4,
)


@examples(400)
@given(
    IMAGES,
    st.lists(SIGNAL, min_size=1, max_size=4).filter(lambda signals: any(weight for weight, _ in signals)),
    st.sampled_from(["exact", "floor"]),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(0, 2**32),
)
def test_budgets_of_a_ragged_batch(images, signals, allocation, integers, seed):
    draw = random.Random(seed)
    segments, counts, places = [], [], []
    for tiles, thumbnail, thumbnail_tokens, tile_tokens in images:
        thumbnail = thumbnail if tiles else "first"
        caps = [draw.choice([0, 5, 16, 16, 16]) for _ in range(tiles)]
        image, caps = image_of(caps, tile_tokens, thumbnail, thumbnail_tokens)
        first = len(counts) + (thumbnail == "first")
        places.append((range(first, first + tiles), len(counts) + image.thumbnail))
        segments.append(image)
        counts += caps
    values = [[draw.choice([draw.uniform(-0.3, 1), 0.0]) for _ in counts] for _ in signals]
    result = hk.tile_budgets(
        [TileSignal(torch.tensor(v), *signal) for v, signal in zip(values, signals)],
        torch.tensor(counts, dtype=integers),
        Segments(tuple(segments), 4),
        allocation=allocation,
    )
    assert [part.dtype for part in result] == [torch.int32, torch.float32, torch.int32]
    assert {part.shape for part in result} == {(len(counts),)}
    budgets, shares, weights = (part.tolist() for part in result)
    rule = {"exact": lambda *image: oracle_exact(*image)[0], "floor": oracle_floor}[allocation]
    for image, (tiles, thumbnail) in zip(segments, places):
        if image.thumbnail >= 0:
            assert budgets[thumbnail] == min(image.thumbnail_tokens, counts[thumbnail])
            assert shares[thumbnail] == weights[thumbnail] == 0
        if not tiles:
            continue
        part = slice(tiles.start, tiles.stop)
        expected = oracle_shares([(v, *signal) for v, signal in zip(values, signals)], tiles)
        assert shares[part] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert math.fsum(shares[part]) == pytest.approx(1.0, abs=1e-5)
        assert weights[part] == oracle_weights(shares[part])
        assert budgets[part] == rule(image.tile_tokens, weights[part], counts[part])


def test_shares_in_fixed_point():
    """``floor(share · 2²⁴ + ½)`` exactly: fp32 cannot add ½ to 2²³, nor to the number just below ½."""
    draw = random.Random(5)
    values = [draw.random() for _ in range(40)]
    values += [1.0, 2.0**-25, 2.0**-24, 2.0**-25 - 2.0**-50, 1.5 * 2.0**-24, 2.0**-40, 0.0]
    for other in values:
        result = one_image([1.0, other], [9, 9], 9)
        assert result.weights.tolist() == oracle_weights(result.shares.tolist())


@pytest.mark.parametrize(
    ("values", "temperature"),
    [
        (torch.tensor([0.0, 1.0, 1.0]), 1e-40),
        (torch.tensor([0.0, 1.0, 0.5]), 1e-320),
        (torch.tensor([0.0, 1e300, 1.0], dtype=torch.float64), None),
        (torch.tensor([0.0, 1e300, 1.0], dtype=torch.float64), 0.1),
        (torch.tensor([1.0, 3e38, 3e38]), None),
    ],
)
def test_signal_beyond_fp32(values, temperature):
    """Refused, or shared out all the same: never more tokens than the image has placeholders."""
    segments = Segments((image_of([16] * 3, 20, "none")[0],), 4)
    try:
        result = hk.tile_budgets([TileSignal(values, 1.0, temperature)], torch.full((3,), 16), segments)
    except ValueError as error:
        assert str(error).startswith("signals[0].")
    else:
        assert int(result.budgets.sum()) == 20
        assert float(result.shares.sum()) == pytest.approx(1.0)


def test_at_most_four_signals():
    segments = Segments((image_of([16] * 3, 20)[0],), 4)
    signals = [TileSignal(torch.ones(4), 1.0)] * 4
    assert int(hk.tile_budgets(signals, torch.full((4,), 16), segments).budgets.sum()) == 20
    with pytest.raises(ValueError, match=r"^signals: expected 1 to 4 TileSignals, got "):
        hk.tile_budgets([*signals, signals[0]], torch.full((4,), 16), segments)


def test_signals_of_other_dtypes():
    values = torch.tensor([0.0, 1.0, 3.0, 0.5])
    segments = Segments((image_of([16] * 3, 20)[0],), 4)
    counts = torch.full((4,), 16)
    expected = hk.tile_budgets([TileSignal(values, 1.0, 0.5)], counts, segments)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        result = hk.tile_budgets([TileSignal(values.to(dtype), 1.0, 0.5)], counts, segments)
        assert all(torch.equal(got, want) for got, want in zip(result, expected))


# --- gather ----------------------------------------------------------------------------------------------


MASKED = {"all valid": None, "padding": 0.7, "sparse": 0.1}


def draw_batch(images, masked, *seed, width=3, dtype=torch.float32):
    """Features, scores with ties, mask and signals of a batch."""
    draw = generator(*seed)
    segments = Segments(images, 4)
    shape = (segments.crops, segments.patches)
    features = torch.randn(*shape, width, generator=draw).to(dtype)
    scores = torch.randint(0, 9, shape, generator=draw) / 8
    valid = None if masked is None else torch.rand(shape, generator=draw) < masked
    signals = [
        TileSignal(torch.rand(segments.crops, generator=draw), 0.3),
        TileSignal(torch.rand(segments.crops, generator=draw), 0.7, 0.2),
    ]
    return segments, features, scores, valid, signals


def draw_layout(draw):
    """A batch of any layout, some of its tiles all padding."""
    side, images = draw.choice([1, 2, 3]), []
    for _ in range(draw.choice([1, 2, 3, 6])):
        gh, gw = draw.choice([(0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (1, 5), (6, 1), (4, 5)])
        thumbnail = draw.choice([-1, 0, gh * gw] if gh else [0])
        begin, end = sorted(draw.randint(0, gh * side) for _ in range(2))
        wanted = draw.choice([0, draw.randint(0, gh * gw * side**2 + 2), gh * gw * side**2])
        images.append(
            Segment(
                *(gh * gw + (thumbnail >= 0), thumbnail, gw, draw.randint(0, side**2 + 1), wanted),
                *((begin, end), thumbnail >= 0 and draw.random() < 0.5),
            )
        )
    return Segments(tuple(images), side)


@pytest.mark.parametrize("allocation", ["exact", "floor"])
@pytest.mark.parametrize("seed", range(8))
def test_gather_of_any_layout(seed, allocation):
    """Two thousand batches against loops, token by token."""
    draw, random_numbers = random.Random(repr((seed, allocation))), generator(seed, allocation)
    promised = 0
    for _ in range(125):
        segments = draw_layout(draw)
        shape = (segments.crops, segments.patches)
        scores = torch.randint(0, 5, shape, generator=random_numbers) / 4
        features = torch.randn(*shape, 2, generator=random_numbers)
        valid = torch.rand(shape, generator=random_numbers) < draw.choice([0.3, 0.9])
        valid[torch.rand(segments.crops, generator=random_numbers) < 0.2] = False
        masks = {"valid": valid} if draw.random() < 0.6 else {}
        signals = [
            TileSignal(
                torch.randint(-1, draw.choice([1, 3]), shape[:1], generator=random_numbers).float(),
                *draw.choice([(1.0, None), (0.4, 0.1)]),
            )
            for _ in range(draw.choice([1, 2]))
        ]
        result = hk.segmented_topk_gather(
            features, scores, segments, signals=signals, allocation=allocation, **masks
        )
        mask = masks.get("valid", torch.ones_like(valid))
        budgets = hk.tile_budgets(signals, mask.sum(1), segments, allocation=allocation)
        assert all(same_bits(got, want) for got, want in zip(result.budgets, budgets))
        weights, expected = budgets.weights.tolist(), budgets.budgets.tolist()
        rule = {"exact": oracle_rounds, "floor": oracle_floor}[allocation]
        caps = mask.sum(1).tolist()
        for image, first in zip(segments.images, segments.first_crops):
            tiles = slice(first + image.first_tile, first + image.first_tile + image.tiles)
            if image.thumbnail >= 0:
                expected[first + image.thumbnail] = min(image.thumbnail_tokens, caps[first + image.thumbnail])
            if image.tiles:
                expected[tiles] = rule(image.tile_tokens, weights[tiles], caps[tiles])
        assert first_difference(budgets.budgets.tolist(), expected) is None
        keep = [oracle_keep(*crop) for crop in zip(scores.tolist(), expected, mask.tolist())]
        sequences = oracle_index(keep, segments)
        index = list(chain(*sequences))
        assert result.lengths == tuple(len(sequence) for sequence in sequences)
        assert first_difference(result.index.tolist(), index) is None
        rows = features.flatten(0, 1)[index].masked_fill((result.index < 0)[:, None], 0.0)
        assert same_bits(result.tokens, rows)
        promised += result.lengths == segments.lengths
    assert 30 < promised < 125 or allocation == "floor"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("scores_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gather_of_views_and_dtypes(dtype, scores_dtype):
    """Features as they come from a tower: everything but the CLS row of its hidden state."""
    segments, features, scores, valid, signals = draw_batch(BATCHES["ragged"], 0.7, "views", dtype=dtype)
    expected = hk.segmented_topk_gather(features, scores, segments, valid=valid, signals=signals)
    hidden = torch.full((segments.crops, segments.patches + 1, 7), INF, dtype=dtype)
    view = hidden[:, 1:, 2:5].copy_(features)
    result = hk.segmented_topk_gather(
        view,
        scores.T.contiguous().T.to(scores_dtype),  # eighths are exact
        segments,
        valid=valid.T.contiguous().T,
        signals=[TileSignal(values.repeat_interleave(2)[::2], *rest) for values, *rest in signals],
    )
    assert result.tokens.dtype == dtype
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(result.index, expected.index)


@pytest.mark.parametrize("most", [8, 63, 64, 100, 300])
def test_shares_do_not_depend_on_the_batch(most):
    """Bit by bit, even beside an image of more crops than a row of lanes has."""
    draw = random.Random(most)
    for turn in range(30):
        tiles = [draw.choice([1, 2, 3, 4, 5, 7, 9, 16, 17, 40, 63]) for _ in range(draw.choice([1, 2, 9]))]
        images = [
            Segment(k + (t >= 0), t, 1, 1, k) for k in [*tiles, most] for t in [draw.choice([-1, 0, k])]
        ]
        draw.shuffle(images)
        segments = Segments(tuple(images), 4)
        values = torch.rand(2, segments.crops, generator=generator(most, turn)) * draw.choice(
            [1.0, 1e-3, 9.0]
        )
        counts = torch.randint(0, 17, (segments.crops,), generator=generator(most, turn))
        signals = [TileSignal(values[0], 0.3, None), TileSignal(values[1], 0.7, draw.choice([0.05, 1.0]))]
        together = hk.tile_budgets(signals, counts, segments)
        for image, first in zip(segments.images, segments.first_crops):
            part = slice(first, first + image.crops)
            own = [signal._replace(values=signal.values[part]) for signal in signals]
            alone = hk.tile_budgets(own, counts[part], Segments((image,), 4))
            assert all(same_bits(got, want[part]) for got, want in zip(alone, together))


def operations(batch, device, **options):
    """What the reference launches for a batch: its budgets, and the whole of the selection."""
    segments, features, scores, valid, signals = (
        [signal._replace(values=signal.values.to(device)) for signal in part]
        if isinstance(part, list)
        else part
        if isinstance(part, Segments)
        else part.to(device)
        for part in draw_batch(batch, 0.7, "operations")
    )
    given = {"valid": valid} if options.pop("masked") else {}
    counts = valid.sum(1)
    for _ in range(2):  # the first keeps what follows from the segments
        with OperationCounter() as budgeting:
            hk.reference.tile_budgets(signals, counts, segments)
        with OperationCounter() as gathering:
            hk.reference.segmented_topk_gather(
                features, scores, segments, signals=signals, **given, **options
            )
    assert len(budgeting.operations) > 20 and len(gathering.operations) > 30
    return budgeting, gathering


@pytest.mark.parametrize("allocation", ["exact", "floor"])
@pytest.mark.parametrize("masked", [False, True])
def test_operations_do_not_grow_with_tiles_or_images(masked, allocation):
    batches = [*BATCHES.values(), BATCHES["ragged"] * 5]
    counts = [operations(batch, "cpu", masked=masked, allocation=allocation) for batch in batches]
    copied = {"clone", "_unsafe_view"}  # a slice of several rows; that of one is contiguous as it is
    for part in zip(*counts):
        assert len({tuple(name for name in one.operations if name not in copied) for one in part}) == 1


def test_no_synchronisation_where_the_lengths_are_known():
    """The ``meta`` device has no values that could be read."""
    for counter in operations(BATCHES["ragged"], "meta", masked=False):
        assert not counter.waits


def test_what_is_kept_with_the_segments_serves_training():
    """Though it was made where no gradients are."""
    segments, features, scores, valid, signals = draw_batch(BATCHES["ragged"], 0.7, "kept")
    with torch.inference_mode():
        first = hk.segmented_topk_gather(features, scores, segments, valid=valid, signals=signals)
    features = features.requires_grad_()
    again = hk.segmented_topk_gather(features, scores, segments, valid=valid, signals=signals)
    again.tokens.sum().backward()
    kept = torch.zeros(features.shape[:2]).flatten()
    kept[first.index[first.index >= 0].long()] = 1.0
    assert torch.equal(features.grad, kept.view(features.shape[:2])[..., None].expand_as(features))


def test_budgets_beyond_the_valid_patches_are_clamped():
    segments, features, scores, valid, signals = draw_batch(BATCHES["ragged"], 0.3, "clamped")
    given = hk.tile_budgets(signals, torch.full((segments.crops,), 16), segments)  # as if all were valid
    result = hk.segmented_topk_gather(features, scores, segments, valid=valid, budgets=given)
    keep = [oracle_keep(*crop) for crop in zip(scores.tolist(), given.budgets.tolist(), valid.tolist())]
    assert result.index.tolist() == list(chain(*oracle_index(keep, segments)))


@pytest.mark.parametrize("masked", MASKED)
def test_ranks_decide_in_place_of_scores(masked):
    segments, features, scores, valid, signals = draw_batch(BATCHES["ragged"], MASKED[masked], "ranks")
    expected = hk.segmented_topk_gather(features, scores, segments, valid=valid, signals=signals)
    ranks = hk.finalize_scores(scores[:, None], valid=valid, rank=True).ranks
    counts = torch.full((segments.crops,), 16) if valid is None else valid.sum(1)
    for more in ({}, {"valid_counts": counts}, {"valid_counts": counts.int()}):
        result = hk.segmented_topk_gather(
            features, -scores, segments, valid=valid, signals=signals, ranks=ranks, **more
        )
        assert torch.equal(result.index, expected.index) and torch.equal(result.tokens, expected.tokens)
        assert all(torch.equal(got, want) for got, want in zip(result.budgets, expected.budgets))


# --- arguments -------------------------------------------------------------------------------------------


def qkv():
    return draw_attention("arguments", crops=2, heads=2, tokens=5, width=4, count=3)


def batch_of():
    """Good arguments of the selecting operations, by name."""
    segments, features, scores, valid, signals = draw_batch((Segment(5, 0, 2, 3, 11, (0, 8)),), 0.7, "good")
    counts = valid.sum(1)
    return {
        "segments": segments,
        "features": features,
        "scores": scores,
        "valid": valid,
        "signals": signals,
        "valid_counts": counts,
        "budgets": hk.tile_budgets(signals, counts, segments),
        "values": signals[0].values,
    }


def with_nan(values):
    values = values.clone()
    values.view(-1)[-1] = NAN
    return values


def attend(name, **change):
    query, key, value = qkv()
    given = {"query": query, "key": key, "scale": 0.5}
    if name == "attention_with_cls":
        given["value"] = value
    return getattr(hk, name)(**{**given, **change})


def of_segments(**change):
    query, key, _ = (x[:1] for x in qkv())
    given = {"query": query, "key": key, "scale": 0.5, "cu_seqlens": BOUNDS, "max_seqlen": 3}
    return hk.received_attention(**{**given, **change})


def topk(**change):
    good = batch_of()
    return hk.segmented_topk(
        **{"scores": good["scores"], "budgets": good["budgets"].budgets, "valid": good["valid"], **change}
    )


def diverse(**change):
    good = batch_of()
    given = {"features": good["features"], "budgets": good["valid_counts"], "rule": "dpp"}
    given |= {"quality": good["scores"].sigmoid(), "valid": good["valid"]}
    return hk.segmented_diverse_topk(**{**given, **change})


def images(**change):
    return diverse(**{"budgets": torch.tensor([3, 9]), "cu_crops": CROPS, "max_crops": 3, **change})


def rarity(**change):
    good = batch_of()
    return hk.rarity(**{**{name: good[name] for name in ("features", "segments", "valid")}, **change})


def budgets(**change):
    good = batch_of()
    return hk.tile_budgets(
        **{**{name: good[name] for name in ("signals", "valid_counts", "segments")}, **change}
    )


def gather(**change):
    good = batch_of()
    names = ("features", "scores", "segments", "valid") + (() if "budgets" in change else ("signals",))
    return hk.segmented_topk_gather(**{**{name: good[name] for name in names}, **change})


def finalize(**change):
    valid = torch.ones(2, 9, dtype=torch.bool)
    return hk.finalize_scores(**{"rows": torch.ones(2, 3, 9), "valid": valid, "rank": True, **change})


def signal(**change):
    return [TileSignal(batch_of()["values"], 1.0)._replace(**change)]


META = torch.empty(2, 2, 5, 4, device="meta")
ATTENTION = [
    ({"key": "key"}, TypeError, "key"),
    ({"key": torch.ones(2, 2, 5, 4, dtype=torch.int32)}, TypeError, "key"),
    ({"key": torch.ones(2, 5, 8)}, ValueError, "key"),
    ({"key": torch.ones(2, 2, 5, 4).to_sparse()}, TypeError, "key"),
    ({"key": torch.ones(2, 2, 0, 4), "query": torch.ones(2, 2, 1, 4)}, ValueError, None),
    ({"query": None}, TypeError, "query"),
    ({"query": torch.ones(2, 2, 5, 4, dtype=torch.float16)}, TypeError, "query"),
    ({"query": torch.ones(2, 2, 5, 3)}, ValueError, "query"),
    ({"query": torch.ones(2, 3, 5, 4)}, ValueError, "query"),
    ({"query": torch.ones(1, 2, 5, 4)}, ValueError, "query"),
    ({"query": torch.ones(2, 2, 5)}, ValueError, "query"),
    ({"query": META}, ValueError, "query"),
    ({"scale": "0.5"}, TypeError, "scale"),
    ({"scale": True}, TypeError, "scale"),
    ({"scale": None}, TypeError, "scale"),
    ({"scale": NAN}, ValueError, "scale"),
    ({"scale": INF}, ValueError, "scale"),
    ({"scale": 1e300}, ValueError, "scale"),
    ({"scale": -1e-50}, ValueError, "scale"),
    ({"scale": 10**400}, ValueError, "scale"),
    ({"weight": "1"}, TypeError, "weight"),
    ({"weight": True}, TypeError, "weight"),
    ({"weight": None}, TypeError, "weight"),
    ({"weight": NAN}, ValueError, "weight"),
    ({"weight": 1e-50}, ValueError, "weight"),
    ({"weight": -1e300}, ValueError, "weight"),
    ({"weight": torch.ones(3)}, ValueError, "weight"),
    ({"weight": torch.ones(2, 1)}, ValueError, "weight"),
    ({"weight": torch.ones(2, dtype=torch.float64)}, TypeError, "weight"),
    ({"weight": torch.ones(2, device="meta")}, ValueError, "weight"),
    ({"out": torch.zeros(2, 4)}, ValueError, "out"),
    ({"out": [0.0]}, TypeError, "out"),
    ({"out": torch.zeros(2, 2, 3)}, ValueError, "out"),
    ({"out": torch.zeros(1, 2, 4)}, ValueError, "out"),
    ({"out": torch.zeros(2, 2, 4, dtype=torch.float16)}, TypeError, "out"),
    ({"out": torch.zeros(2, 2, 4, device="meta")}, ValueError, "out"),
]
CLS_ALONE = [
    ({"query": torch.ones(2, 2, 0, 4)}, ValueError, "query"),
    ({"key": torch.ones(2, 2, 1, 4), "query": torch.ones(2, 2, 1, 4)}, ValueError, "key"),
]
ALL_ROWS = [({"query": torch.ones(2, 2, 1, 4)}, ValueError, "query")]
LSE = [
    ({"lse": 0.5}, TypeError, "lse"),
    ({"lse": torch.ones(2, 2, 4)}, ValueError, "lse"),
    ({"lse": torch.ones(2, 2, 5, 1)}, ValueError, "lse"),
    ({"lse": torch.ones(2, 2, 5, dtype=torch.bfloat16)}, TypeError, "lse"),
    ({"lse": torch.ones(2, 2, 5, device="meta")}, ValueError, "lse"),
]
BOUNDS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
SEGMENTS = [
    ({"cu_seqlens": None}, ValueError, "cu_seqlens"),
    ({"max_seqlen": None}, ValueError, "max_seqlen"),
    ({"key": torch.ones(2, 2, 5, 4), "query": torch.ones(2, 2, 5, 4)}, ValueError, "key"),
    ({"weight": torch.ones(1)}, ValueError, "weight"),
    ({"weight": torch.ones(5)}, ValueError, "weight"),
    ({"out": torch.zeros(3, 2, 5)}, ValueError, "out"),
    ({"lse": torch.zeros(3, 2, 5)}, ValueError, "lse"),
    ({"cu_seqlens": [0, 2, 2, 5]}, TypeError, "cu_seqlens"),
    ({"cu_seqlens": BOUNDS.long()}, TypeError, "cu_seqlens"),
    ({"cu_seqlens": BOUNDS[None]}, ValueError, "cu_seqlens"),
    ({"cu_seqlens": BOUNDS[:0]}, ValueError, "cu_seqlens"),
    ({"cu_seqlens": BOUNDS.to("meta")}, ValueError, "cu_seqlens"),
    ({"cu_seqlens": BOUNDS[:3]}, ValueError, "cu_seqlens"),
    ({"cu_seqlens": BOUNDS[1:]}, ValueError, "cu_seqlens"),
    ({"cu_seqlens": BOUNDS + 1}, ValueError, "cu_seqlens"),
    ({"cu_seqlens": BOUNDS[[0, 3, 1, 3]]}, ValueError, "cu_seqlens"),
    ({"max_seqlen": 2}, ValueError, "max_seqlen"),
    ({"max_seqlen": -1}, ValueError, "max_seqlen"),
    ({"max_seqlen": 3.0}, TypeError, "max_seqlen"),
    ({"max_seqlen": torch.tensor(3)}, TypeError, "max_seqlen"),
]
WITH_VALUE = [
    ({"value": 1.0}, TypeError, "value"),
    ({"value": torch.ones(2, 2, 4, 4)}, ValueError, "value"),
    ({"value": torch.ones(2, 2, 5, 4, dtype=torch.bfloat16)}, TypeError, "value"),
    ({"value": META}, ValueError, "value"),
]
SIGNALS = [
    ({"signals": []}, ValueError, "signals"),
    ({"signals": [1.0]}, TypeError, "signals[0]"),
    ({"signals": signal() * 5}, ValueError, "signals"),
    ({"signals": [*signal(), None]}, TypeError, "signals[1]"),
    ({"signals": signal(values=[1.0] * 5)}, TypeError, "signals[0].values"),
    ({"signals": signal(values=torch.ones(5, dtype=torch.int64))}, TypeError, "signals[0].values"),
    ({"signals": signal(values=torch.ones(4))}, ValueError, "signals[0].values"),
    ({"signals": signal(values=torch.ones(5, 1))}, ValueError, "signals[0].values"),
    ({"signals": signal(values=torch.ones(5, device="meta"))}, ValueError, "signals[0].values"),
    ({"signals": [*signal(), *signal(values=with_nan(torch.ones(5)))]}, ValueError, "signals[1].values"),
    ({"signals": signal(values=torch.full((5,), INF))}, ValueError, "signals[0].values"),
    ({"signals": signal(values=torch.full((5,), -INF))}, ValueError, "signals[0].values"),
    ({"signals": signal(weight="1")}, TypeError, "signals[0].weight"),
    ({"signals": signal(weight=True)}, TypeError, "signals[0].weight"),
    ({"signals": signal(weight=-0.1)}, ValueError, "signals[0].weight"),
    ({"signals": signal(weight=NAN)}, ValueError, "signals[0].weight"),
    ({"signals": signal(weight=INF)}, ValueError, "signals[0].weight"),
    ({"signals": signal(weight=1e300)}, ValueError, "signals[0].weight"),
    ({"signals": signal(weight=1e-50)}, ValueError, "signals[0].weight"),
    ({"signals": signal(weight=0.0) * 2}, ValueError, "signals"),
    ({"signals": signal(temperature="hot")}, TypeError, "signals[0].temperature"),
    ({"signals": signal(temperature=0.0)}, ValueError, "signals[0].temperature"),
    ({"signals": signal(temperature=-1.0)}, ValueError, "signals[0].temperature"),
    ({"signals": signal(temperature=NAN)}, ValueError, "signals[0].temperature"),
    ({"signals": signal(temperature=1e-50)}, ValueError, "signals[0].temperature"),
    ({"signals": signal(temperature=1e300)}, ValueError, "signals[0].temperature"),
    (
        {"signals": signal(values=torch.full((5,), 1e300, dtype=torch.float64))},
        ValueError,
        "signals[0].values",
    ),
]
LAYOUT = [
    ({"segments": None}, TypeError, "segments"),
    ({"segments": (Segment(5),)}, TypeError, "segments"),
    ({"allocation": "ceil"}, ValueError, "allocation"),
    ({"allocation": None}, TypeError, "allocation"),
]
COUNTS = [
    ({"valid_counts": [16] * 5}, TypeError, "valid_counts"),
    ({"valid_counts": torch.ones(5)}, TypeError, "valid_counts"),
    ({"valid_counts": torch.ones(4, dtype=torch.int32)}, ValueError, "valid_counts"),
    ({"valid_counts": torch.tensor([1, 2, -1, 3, 4])}, ValueError, "valid_counts"),
]
TOPK = [
    ({"scores": [[1.0]]}, TypeError, "scores"),
    ({"scores": torch.ones(5, 16, dtype=torch.int32)}, TypeError, "scores"),
    ({"scores": torch.ones(80)}, ValueError, "scores"),
    ({"scores": with_nan(torch.ones(5, 16))}, ValueError, "scores"),
    ({"valid": torch.ones(5, 16)}, TypeError, "valid"),
    ({"valid": torch.ones(5, 15, dtype=torch.bool)}, ValueError, "valid"),
    ({"valid": torch.ones(5, 16, dtype=torch.bool, device="meta")}, ValueError, "valid"),
]
BUDGETS = [
    ({"budgets": 3}, TypeError, "budgets"),
    ({"budgets": torch.ones(5)}, TypeError, "budgets"),
    ({"budgets": torch.ones(4, dtype=torch.int32)}, ValueError, "budgets"),
    ({"budgets": torch.ones(5, dtype=torch.int32, device="meta")}, ValueError, "budgets"),
    ({"budgets": torch.tensor([1, 2, -1, 3, 4])}, ValueError, "budgets"),
]
GATHER = [
    ({"scores": torch.ones(4, 16)}, ValueError, "scores"),
    ({"scores": torch.ones(5, 9)}, ValueError, "scores"),
    ({"features": [1.0]}, TypeError, "features"),
    ({"features": torch.ones(5, 16, 3, dtype=torch.int8)}, TypeError, "features"),
    ({"features": torch.ones(5, 17, 3)}, ValueError, "features"),
    ({"features": torch.ones(80, 3)}, ValueError, "features"),
    ({"features": torch.ones(5, 16, 3, device="meta")}, ValueError, "features"),
    ({"features": with_nan(torch.ones(5, 16, 3))}, ValueError, "features"),
    ({"budgets": None, "signals": None}, ValueError, "budgets"),
    ({"budgets": batch_of()["budgets"], "signals": signal()}, ValueError, "budgets"),
    ({"budgets": torch.ones(5, dtype=torch.int32)}, TypeError, "budgets"),
    (
        {"budgets": TileBudgets(torch.ones(5), torch.ones(5), torch.ones(5, dtype=torch.int32))},
        TypeError,
        "budgets.budgets",
    ),
    (
        {"budgets": TileBudgets(*[torch.ones(4, dtype=torch.int32)] * 3)},
        ValueError,
        "budgets.budgets",
    ),
    (
        {"budgets": TileBudgets(*[torch.tensor([1, -2, 3, 4, 5])] * 3)},
        ValueError,
        "budgets.budgets",
    ),
    ({"ranks": torch.ones(5, 16, dtype=torch.int32)}, TypeError, "ranks"),
    ({"ranks": torch.ones(5, 15, dtype=torch.int16)}, ValueError, "ranks"),
    ({"valid_counts": torch.full((5,), -1)}, ValueError, "valid_counts"),
    ({"valid_counts": torch.ones(5)}, TypeError, "valid_counts"),
    ({"valid_counts": torch.ones(4, dtype=torch.int32)}, ValueError, "valid_counts"),
]
RARITY = [
    ({"features": [1.0]}, TypeError, "features"),
    ({"features": torch.ones(5, 16, 3, dtype=torch.int8)}, TypeError, "features"),
    ({"features": torch.ones(5, 17, 3)}, ValueError, "features"),
    ({"features": torch.ones(80, 3)}, ValueError, "features"),
    ({"features": with_nan(torch.ones(5, 16, 3))}, ValueError, "features"),
    ({"valid": torch.ones(5, 16)}, TypeError, "valid"),
    ({"valid": torch.ones(5, 15, dtype=torch.bool)}, ValueError, "valid"),
    ({"valid": torch.ones(5, 16, dtype=torch.bool, device="meta")}, ValueError, "valid"),
]
DIVERSE = [
    ({"features": torch.ones(5, 16, 3, dtype=torch.int8)}, TypeError, "features"),
    ({"features": torch.ones(80, 3)}, ValueError, "features"),
    ({"features": torch.ones(5, 16, 0)}, ValueError, "features"),
    ({"features": torch.ones(1, 4097, 1)}, ValueError, "features"),
    ({"features": with_nan(torch.ones(5, 16, 3))}, ValueError, "features"),
    ({"rule": "greedy"}, ValueError, "rule"),
    ({"rule": None}, TypeError, "rule"),
    ({"rule": "max_min"}, ValueError, "quality"),
    ({"quality": 1.0}, TypeError, "quality"),
    ({"quality": torch.ones(5, 15)}, ValueError, "quality"),
    ({"quality": torch.ones(5, 16, dtype=torch.float16)}, TypeError, "quality"),
    ({"quality": torch.ones(5, 16, device="meta")}, ValueError, "quality"),
    ({"quality": -torch.ones(5, 16)}, ValueError, "quality"),
    ({"quality": with_nan(torch.ones(5, 16))}, ValueError, "quality"),
    ({"quality": torch.full((5, 16), 1e20)}, ValueError, "quality"),
    ({"valid": torch.ones(5, 16)}, TypeError, "valid"),
    ({"valid": torch.ones(5, 15, dtype=torch.bool)}, ValueError, "valid"),
    ({"cu_crops": torch.tensor([0, 3, 5], dtype=torch.int32)}, ValueError, "max_crops"),
    ({"max_crops": 3}, ValueError, "cu_crops"),
]
CROPS = torch.tensor([0, 3, 5], dtype=torch.int32)
IMAGES = [
    ({"budgets": torch.ones(5, dtype=torch.int32)}, ValueError, "budgets"),
    ({"budgets": torch.tensor([1, -1])}, ValueError, "budgets"),
    ({"cu_crops": [0, 3, 5]}, TypeError, "cu_crops"),
    ({"cu_crops": CROPS.long()}, TypeError, "cu_crops"),
    ({"cu_crops": CROPS + 1}, ValueError, "cu_crops"),
    ({"cu_crops": CROPS[[0, 2, 1]]}, ValueError, "cu_crops"),
    ({"cu_crops": CROPS.to("meta")}, ValueError, "cu_crops"),
    ({"max_crops": 2}, ValueError, "max_crops"),
    ({"max_crops": 257}, ValueError, "max_crops"),
    ({"max_crops": 3.0}, TypeError, "max_crops"),
]
ROWS_PER_HEAD = [
    ({"rows": None}, TypeError, "rows"),
    ({"rows": torch.ones(2, 3, 9, dtype=torch.float16)}, TypeError, "rows"),
    ({"rows": torch.ones(2, 9)}, ValueError, "rows"),
    ({"rows": torch.ones(2, 0, 9)}, ValueError, "rows"),
    ({"rows": torch.ones(2, 1, 32768), "valid": None, "rank": True}, ValueError, "rows"),
    ({"valid": torch.ones(2, 9)}, TypeError, "valid"),
    ({"valid": torch.ones(2, 8, dtype=torch.bool)}, ValueError, "valid"),
    ({"valid": torch.ones(2, 9, dtype=torch.bool, device="meta")}, ValueError, "valid"),
    ({"rank": 1}, TypeError, "rank"),
]


def cases(name, call, *tables):
    return [pytest.param(call, *case, id=f"{name}-{n}") for n, case in enumerate(chain(*tables))]


REFUSED = [
    *cases("cls_attention", lambda **c: attend("cls_attention", **c), ATTENTION, CLS_ALONE),
    *cases(
        "attention_with_cls", lambda **c: attend("attention_with_cls", **c), ATTENTION, ALL_ROWS, WITH_VALUE
    ),
    *cases(
        "received_attention",
        lambda **c: attend("received_attention", **c),
        [case for case in ATTENTION if case[0].keys() != {"out"}],
        [({"out": torch.zeros(2, 2, 4)}, ValueError, "out")],
        ALL_ROWS,
        LSE,
    ),
    *cases("segments", of_segments, SEGMENTS),
    *cases("rarity", rarity, LAYOUT[:2], RARITY),
    *cases("tile_budgets", budgets, LAYOUT, SIGNALS, COUNTS, [({"signals": None}, None, "signals")]),
    *cases("finalize_scores", finalize, ROWS_PER_HEAD),
    *cases("segmented_topk", topk, TOPK, BUDGETS),
    *cases("segmented_diverse_topk", diverse, BUDGETS, DIVERSE),
    *cases("segmented_diverse_topk of segments", images, IMAGES),
    *cases("segmented_topk_gather", gather, LAYOUT, SIGNALS, TOPK, GATHER),
]


@pytest.mark.parametrize(("call", "change", "kind", "name"), REFUSED)
def test_refused(call, change, kind, name):
    call()  # what is changed is what is wrong
    with pytest.raises((TypeError, ValueError)) as error:
        call(**change)
    assert kind in (None, error.type)
    said, _, rest = str(error.value).partition(": ")
    assert said == name if name else said in change
    assert rest.startswith("expected ") and ", got " in rest


def test_some_of_the_rows():
    with pytest.raises(ValueError, match=r"^query: expected .*, got "):
        attend("cls_attention", query=torch.ones(2, 2, 3, 4))  # of five tokens, neither all rows nor one


@pytest.mark.parametrize(
    ("fields", "side"),
    [
        ({"crops": 0}, 4),
        ({"crops": 5, "thumbnail": 2, "grid_width": 2}, 4),
        ({"crops": 5, "thumbnail": -2}, 4),
        ({"crops": 5, "grid_width": 3}, 4),
        ({"crops": 5, "grid_width": 0}, 4),
        ({"crops": 5, "thumbnail": -1, "grid_width": 2}, 4),
        ({"crops": 5, "thumbnail_tokens": -1}, 4),
        ({"crops": 5, "tile_tokens": -1}, 4),
        ({"crops": 5, "thumbnail_tokens": 2**31}, 4),
        ({"crops": 5, "tile_tokens": 2**31}, 4),
        ({"crops": 1, "grid_width": 2**31}, 4),
        ({"crops": 5, "grid_width": 2, "newline_rows": (0, 9)}, 4),
        ({"crops": 5, "grid_width": 2, "newline_rows": (-1, 8)}, 4),
        ({"crops": 5, "grid_width": 2, "newline_rows": (5, 4)}, 4),
        ({"crops": 1, "newline_rows": (0, 1)}, 4),
        ({"crops": 5, "thumbnail": -1, "thumbnail_newline": True}, 4),
    ],
)
def test_segment_contradicts_itself(fields, side):
    with pytest.raises(ValueError, match=r"^images\[1\]: expected .*, got Segment\(") as error:
        Segments((Segment(5, 0, 2, 3, 11, (0, 8)), Segment(**fields)), side)
    assert str(Segment(**fields)) in str(error.value)


def test_segments_refuse_other_things():
    with pytest.raises(TypeError, match=r"^images\[0\]: expected a Segment, got tuple"):
        Segments(((5, 0, 2),), 4)
    for images in (None, 5, (image for image in [Segment(1)])):
        with pytest.raises(TypeError, match=r"^images: expected a sequence of Segments, got "):
            Segments(images, 4)
    for side in (0, -1, 4.0, "4", None, True):
        with pytest.raises((TypeError, ValueError), match=r"^side: expected an integer >= 1, got "):
            Segments((Segment(1),), side)


@pytest.mark.parametrize("bad", [1.5, 2.0, "2", None, True, torch.tensor(2)])
@pytest.mark.parametrize("field", ["crops", "thumbnail", "grid_width", "thumbnail_tokens", "tile_tokens"])
def test_segments_take_integers_alone(field, bad):
    with pytest.raises(TypeError, match=rf"^images\[0\]\.{field}: expected an integer, got "):
        Segments((Segment(2)._replace(**{field: bad}),), 4)


@pytest.mark.parametrize(
    ("field", "bad"),
    [("newline_rows", 3), ("newline_rows", (0, 1, 2)), ("newline_rows", (0, 1.5)), ("thumbnail_newline", 2)],
)
def test_segments_take_newlines(field, bad):
    with pytest.raises(TypeError, match=rf"^images\[0\]\.{field}: expected .*, got "):
        Segments((Segment(2)._replace(**{field: bad}),), 4)


def test_integers_of_numpy_become_int():
    fields = (5, 0, 2, 3, 11)
    image = Segment(*np.array(fields), np.array([0, 8], dtype=np.int32).tolist(), 1)
    segments = Segments([image], np.int64(4))
    assert segments == Segments((Segment(*fields, (0, 8), True),), 4)
    assert all(type(number) is int for number in (*segments.numbers, segments.side))
    assert hash(segments) == hash(Segments((Segment(*fields, (0, 8), True),), 4))
