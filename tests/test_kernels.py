"""Every operation on every case, in each way, against oracles in float64 and loops.

Without ``TRITON_INTERPRET=1`` these test the reference; with it, the kernels in Triton's interpreter; on a
GPU also the kernels. Each call also checks what :func:`hero_kernels.testing.call` can: every element is
written, nothing around it, and no input is changed.
"""

import importlib
import math
import pkgutil
from functools import cache
from itertools import chain

import pytest
import torch
from cases import (
    ATTENTION,
    BATCHES,
    CROPS,
    DIVERSE,
    FEW,
    LARGE,
    NAN,
    PACKED,
    RULES,
    SELECTION,
    SLOW_IN_INTERPRETER,
    Packed,
    Selection,
    Way,
    combined,
    parameters,
)
from oracles import (
    attention_maps,
    draw_attention,
    first_difference,
    generator,
    oracle_diverse,
    oracle_exact,
    oracle_floor,
    oracle_index,
    oracle_keep,
    oracle_order,
    oracle_shares,
    oracle_weights,
    rarities,
)

import hero_kernels as hk
from hero_kernels import Segment, Segments, TileBudgets, TileSignal, _dispatch, _launch, kernels, reference
from hero_kernels.testing import assert_accurate, offset, same_bits, tensors_in

# --- attention -------------------------------------------------------------------------------------------


def view_of(*shape):
    """Numbers to add to, within other memory."""
    memory = torch.randn([size + 2 for size in shape], generator=generator("out", shape))
    return memory[tuple(slice(1, -1) for _ in shape)]


# Options of an operation, given crops T, heads H and patches n: weights of 0 skip a crop.
OPTIONS = {
    "plain": lambda T, H, n: {},
    "weighted": lambda T, H, n: {"weight": 0.3},
    "per crop": lambda T, H, n: {"weight": torch.arange(2 * T)[1::2] % 3 * 0.75},
    "added": lambda T, H, n: {
        "weight": torch.arange(T) % 2 * -2.0,
        "out": view_of(T, H, n).contiguous(),
    },
    "added, view": lambda T, H, n: {"weight": 2.0, "out": view_of(T, H, n)},
}


LAYERS = ("plain", "added")  # what an encoder uses


def placed(value, way):
    """An argument on the device, a view of the same strides; other arguments unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    size = value.untyped_storage().nbytes() // value.element_size()
    memory = value.as_strided((size,), (1,), 0).to(way.device, copy=True)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


def layered(rows, weight=1.0, out=None):
    """What rows per head ``[T, H, n]`` become under an operation's options, in their dtype."""
    weight = torch.as_tensor(weight, dtype=rows.dtype).view(-1, 1, 1)
    rows = torch.where(weight == 0, 0.0, rows * weight)
    return rows if out is None else out + rows


def check_rows(way: Way, operation, case, tensors, rows, options, **more):
    """Run an operation and compare its rows with ``rows(dtype)``; returns the attention output, if any."""
    exact, peer = (layered(rows(dtype), **options) for dtype in (torch.float64, torch.float32))
    given = {name: placed(value, way) for name, value in {**options, **more}.items()}
    result = way.run(operation, *case.seen(tensors, way.device), case.scale, **given)
    output, rows = result if isinstance(result, tuple) else (None, result)
    assert "out" not in given or rows is given["out"]
    assert_accurate(rows, exact, peer, operation)
    return output


def without_ignored(query, key, options):
    """NaN in what must not matter to the row of CLS: other queries, and keys of crops that weigh nothing."""
    query, key = query.clone(), key.clone()
    query[:, :, 1:] = NAN
    if isinstance(options.get("weight"), torch.Tensor):
        key[options["weight"] == 0] = NAN
    return query, key


@pytest.mark.parametrize("second_softmax", [False, True], ids=["", "second softmax"])
@pytest.mark.parametrize(
    ("case", "options"),
    combined(ATTENTION, OPTIONS, lambda case, options: options in LAYERS or case.tokens < 200),
)
def test_cls_attention(case, options, second_softmax, way):
    query, key, _ = case.tensors()

    def rows(dtype):
        rows = attention_maps(query[:, :, :1], key, case.scale, dtype)[:, :, 0, 1:]
        return rows.softmax(-1) if second_softmax else rows

    options = OPTIONS[options](case.crops, case.heads, case.tokens - 1)
    tensors = without_ignored(query, key, options)
    check_rows(way, "cls_attention", case, tensors, rows, options, second_softmax=second_softmax)


@pytest.mark.parametrize(
    ("case", "options"),
    combined(ATTENTION, OPTIONS, lambda case, options: options in LAYERS or case.tokens < 60),
)
def test_attention_with_cls(case, options, way):
    tensors = query, key, value = case.tensors()
    second_softmax = options == "plain" and case.crops == 2

    def rows(dtype):
        rows = attention_maps(query[:, :, :1], key, case.scale, dtype)[:, :, 0, 1:]
        return rows.softmax(-1) if second_softmax else rows

    options = OPTIONS[options](case.crops, case.heads, case.tokens - 1)
    output = check_rows(
        way, "attention_with_cls", case, tensors, rows, options, second_softmax=second_softmax
    )
    exact = attention_maps(query, key, case.scale) @ value.double()
    peer = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=case.scale)
    assert_accurate(output, exact, peer, "output")


@pytest.mark.parametrize(
    ("case", "options"),
    combined(ATTENTION, OPTIONS, lambda case, options: options in LAYERS or case.tokens < 60),
)
def test_received_attention(case, options, way):
    query, key, _ = case.tensors()
    options = OPTIONS[options](case.crops, case.heads, case.tokens)
    seen = without_ignored(query, key, options)[1]

    def rows(dtype):
        return attention_maps(query, key, case.scale, dtype).mean(2)

    check_rows(way, "received_attention", case, (query, seen), rows, options)


@pytest.mark.parametrize(
    ("case", "options"),
    combined(ATTENTION, OPTIONS, lambda case, options: options in LAYERS and case.tokens < 200),
)
def test_received_with_lse(case, options, way):
    """The log-sum-exp is taken as it is, at any strides; that of crops of weight 0 is not read."""
    query, key, _ = case.tensors()
    options = OPTIONS[options](case.crops, case.heads, case.tokens)
    seen = without_ignored(query, key, options)[1]
    logits = torch.einsum("thmd,thnd->thmn", query.double(), key.double()) * case.scale
    lse = logits.logsumexp(-1).float()

    def rows(dtype):
        logits = torch.einsum("thmd,thnd->thmn", query.to(dtype), key.to(dtype)) * case.scale
        return (logits - lse[..., None].to(dtype)).exp().mean(2)

    given = lse.mT.contiguous().mT
    if isinstance(options.get("weight"), torch.Tensor):
        given[options["weight"] == 0] = NAN
    check_rows(way, "received_attention", case, (query, seen), rows, options, lse=given)


def of_segments(case, tensors, way):
    """Arguments of ``received_attention`` on a device."""
    query, key = case.seen(tensors, way.device)
    bounds = case.bounds.to(way.device)
    return {"query": query, "key": key, "scale": case.scale, "cu_seqlens": bounds, "max_seqlen": case.longest}


@pytest.mark.parametrize("given", [False, True], ids=["", "lse"])
@pytest.mark.parametrize(
    ("case", "options"), combined(PACKED, OPTIONS, lambda case, options: options in (*LAYERS, "per crop"))
)
def test_received_of_segments(case, options, given, way):
    """Of each what it would be as a crop; segments of weight 0 are not read."""
    query, key, _ = case.tensors()
    options = OPTIONS[options](len(case.lengths), case.heads, case.tokens)
    if "out" in options:
        options["out"] = view_of(1, case.heads, case.tokens)
    weights = options.get("weight")
    weights = weights.split(1) if isinstance(weights, torch.Tensor) else [weights] * len(case.lengths)
    lse = [
        torch.einsum("thmd,thnd->thmn", q.double(), k.double())
        for q, k in zip(*map(case.parts, (query, key)))
    ]
    lse = torch.cat([(x * case.scale).logsumexp(-1).float() for x in lse] or [query[..., 0].float()], 2)

    def rows(dtype):
        outs = case.parts(options["out"]) if "out" in options else [None] * len(case.lengths)
        found = [query.new_zeros(1, case.heads, 0, dtype=dtype)]
        for q, k, log_sum, weight, out in zip(*map(case.parts, (query, key, lse)), weights, outs):
            if given:
                logits = torch.einsum("thmd,thnd->thmn", q.to(dtype), k.to(dtype)) * case.scale
                maps = (logits - log_sum[..., None].to(dtype)).exp()
            else:
                maps = attention_maps(q, k, case.scale, dtype)
            found.append(layered(maps.mean(2), 1.0 if weight is None else weight, out))
        return torch.cat(found, 2)

    exact, peer = rows(torch.float64), rows(torch.float32)
    seen, log_sums = key.clone(), lse.mT.contiguous().mT
    for part, log_sum, weight in zip(case.parts(seen), case.parts(log_sums), weights):
        if isinstance(weight, torch.Tensor) and not weight:
            part[:], log_sum[:] = NAN, NAN
    more = {**options, "lse": log_sums} if given else options
    more = {name: placed(value, way) for name, value in more.items()}
    result = way.run("received_attention", **of_segments(case, (query, seen), way), **more)
    assert "out" not in more or result is more["out"]
    assert_accurate(result, exact, peer)


@pytest.mark.parametrize("case", parameters(PACKED))
def test_a_segment_does_not_depend_on_its_batch(case, way):
    """Bit-identical alone, and for any neighbours; a kernel's also to that of a crop."""
    query, key, _ = case.tensors()
    given = of_segments(case, (query, key), way)
    whole = way.run("received_attention", **given)
    parts = list(zip(*map(case.parts, (query, key, whole))))
    for q, k, want in parts:
        alone = Packed("alone", 1, case.heads, q.shape[2], case.width, view=case.view, lengths=(q.shape[2],))
        given = of_segments(alone, (q, k), way) | {"scale": case.scale}
        assert same_bits(way.run("received_attention", **given), want)
        if way.kernel and q.shape[2]:
            crop = {name: given[name] for name in ("query", "key", "scale")}
            assert same_bits(way.run("received_attention", **crop), want)
    if parts:
        *tensors, want = (torch.cat(pieces[::-1], 2) for pieces in zip(*parts))
        turned = Packed(
            "turned",
            *(getattr(case, x) for x in ("crops", "heads", "tokens", "width")),
            view=case.view,
            lengths=case.lengths[::-1],
        )
        given = of_segments(turned, tensors, way) | {"scale": case.scale}
        assert same_bits(way.run("received_attention", **given), want)


@pytest.mark.parametrize("given", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("lengths", [(50,), (7, 50, 0, 33, 50, 1)])
def test_segments_take_one_pair_of_launches(lengths, given, kernel, monkeypatch):
    launched = []
    monkeypatch.setattr(
        _launch, "launch", lambda kernel, grid, **_: launched.append((kernel.fn.__name__, *grid[1:]))
    )
    case = Packed("launches", 1, 2, sum(lengths), 16, lengths=lengths)
    arguments = of_segments(case, case.tensors()[:2], kernel)
    lse = torch.zeros(1, 2, case.tokens, device=kernel.device) if given else None
    hk.received_attention(**arguments, lse=lse)
    names = ["received_log_sums_kernel", "received_columns_kernel"][given:]
    assert launched == [(name, 2, len(lengths)) for name in names]


INT32 = torch.iinfo(torch.int32)


def test_wrong_bounds_stay_within_memory(kernel):
    """They are clamped: what is outside is neither read, which NaN would show, nor written."""
    query, key = draw_attention("bounds", crops=1, heads=2, tokens=70, width=24)
    query, key = (offset(x.to(kernel.device)) for x in (query, key))
    launch = _dispatch.launcher("received_attention")

    def run(bounds, longest):
        bounds = torch.tensor(bounds, dtype=torch.int32, device=kernel.device)
        out = torch.zeros(3, 2, 70, device=kernel.device)
        launch(query, key, 0.3, 1.0, out[1:2], None, bounds, longest)
        assert not out[::2].any()
        return out[1:2]

    wanted = run([0, 70], 70)
    assert same_bits(run([-9, 99], 200), wanted)
    assert same_bits(run([INT32.min, INT32.max, INT32.min], 70), wanted)
    assert not run([70, 30, INT32.min], 70).any() and not run([99, 120], 70).any()


# --- scores ----------------------------------------------------------------------------------------------


def rows_of(case, heads):
    """``[T, H, P]`` in eighths, whose sums are exact and often tied; of every fifth crop none is positive."""
    segments = case.segments
    shape = (segments.crops, heads, segments.patches)
    rows = torch.randint(-2, 6, shape, generator=generator(case.name, heads)) / 8
    rows[2::5] = -rows[2::5].abs()
    return rows


def entropy_of(scores, masks):
    """``[T]`` in the dtype of the scores."""
    weight = scores.clamp_min(0.0) * masks
    share = weight / weight.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(1)
    return torch.where(weight.sum(1) > 0, entropy, masks.sum(1).clamp_min(1).to(scores).log())


@pytest.mark.parametrize(("heads", "rank"), [(16, False), (3, True)], ids=["", "ranks"])
@pytest.mark.parametrize("case", parameters(CROPS))
def test_finalize_scores(case, heads, rank, way):
    rows, valid = rows_of(case, heads), case.draw_valid()
    result = way.run(
        *("finalize_scores", case.seen(rows, way.device)), valid=case.seen(valid, way.device), rank=rank
    )
    masks = torch.ones(len(rows), rows.shape[2], dtype=torch.bool) if valid is None else valid
    exact, peer = (rows.to(dtype).mean(1) for dtype in (torch.float64, torch.float32))
    assert_accurate(result.scores, exact, peer, "scores")
    assert_accurate(result.entropy, entropy_of(exact, masks), entropy_of(peer, masks), "entropy")
    if not rank:
        assert result.ranks is None
        return
    ranks = result.ranks.cpu()
    assert ranks.dtype == torch.int16
    for scores, mask, row in zip(result.scores.tolist(), masks.tolist(), ranks.tolist()):
        assert [row[patch] for patch in oracle_order(scores, mask)] == list(range(sum(mask)))


@pytest.mark.parametrize("case", parameters(CROPS))
def test_ranks_of_special_scores(case, way):
    """±0, NaN, infinities: of one head the mean is the score itself."""
    scores, valid = case.draw_scores().float(), case.draw_valid()
    result = way.run(
        *("finalize_scores", case.seen(scores[:, None], way.device)),
        valid=case.seen(valid, way.device),
        rank=True,
    )
    masks = [None] * len(scores) if valid is None else valid.tolist()
    for crop, mask, row in zip(scores.tolist(), masks, result.ranks.tolist()):
        order = oracle_order(crop, mask)
        assert [row[patch] for patch in order] == list(range(len(order)))
        if mask is not None:
            assert all(row[patch] >= len(order) for patch in range(len(mask)) if not mask[patch])


# --- rarity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", parameters(SELECTION))
def test_rarity(case, way):
    """By the formula, of vectors among which some are not finite."""
    features, valid, segments = case.draw_features(), case.draw_valid(), case.segments
    found = way.run(
        *("rarity", case.seen(features, way.device), segments), valid=case.seen(valid, way.device)
    )
    valid = torch.ones(features.shape[:2], dtype=torch.bool) if valid is None else valid
    pools = [
        pool
        for image, first in zip(segments.images, segments.first_crops)
        for tiles in [[first + image.first_tile + tile for tile in range(image.tiles)]]
        for pool in (tiles, [crop for crop in range(first, first + image.crops) if crop not in tiles])
    ]
    exact, peer = (rarities(features, pools, valid, dtype) for dtype in (torch.float64, torch.float32))
    assert_accurate(found, exact, peer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rarity_does_not_depend_on_the_batch(dtype, way):
    """Bit-identical alone and beside larger images, in any order."""
    case = Selection("rarity", BATCHES["ragged"], 7, 40, dtype)
    segments, valid = case.segments, case.draw_valid()
    features = case.draw_features().nan_to_num(1.0)
    images = list(zip(segments.images, segments.first_crops))

    def run(batch):
        crops = list(chain(*(range(first, first + image.crops) for image, first in batch)))
        segments = Segments(tuple(image for image, _ in batch), case.side)
        found = way.run("rarity", features[crops].to(way.device), segments, valid[crops].to(way.device))
        return found, crops

    whole, _ = run(images)
    for batch in (*([image] for image in images), images[::-1], images[1:4], images):
        found, crops = run(batch)
        assert same_bits(found, whole[crops])


def test_rarity_of_extreme_vectors(way):
    """Zero, not finite, too short and too long ones are unlike all; others by their direction alone."""
    values = torch.tensor([0.0, NAN, math.inf, 1e-25, 1e25, 1e-15, 1e15, -1.0, 0.0], device=way.device)
    features, segments = values[None, :, None].repeat(1, 1, 3), Segments((Segment(1),), 3)
    found = way.run("rarity", features, segments).cpu()
    assert found[0, [0, 1, 2, 3, 4, 8]].tolist() == [1.0] * 6
    torch.testing.assert_close(found[0, 5:8], torch.tensor([8 / 9, 8 / 9, 10 / 9]), rtol=0, atol=1e-6)
    none = torch.zeros(1, 9, dtype=torch.bool, device=way.device)
    for given in ((features[..., :0], segments), (features, segments, none)):
        assert way.run("rarity", *given).tolist() == [[1.0] * 9]


def test_launches_of_rarity(kernel, monkeypatch):
    """Three for any batch; the features are not copied."""
    launched = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, **given: launched.append((kernel, given)))
    for images in ((Segment(1),), (Segment(5, 0, 2), Segment(7, -1)), (Segment(3, 2, 2),) * 9):
        segments = Segments(images, 4)
        features = torch.zeros(segments.crops, 17, 24, device=kernel.device)[:, 1:]
        hk.rarity(features, segments)
        assert [one.fn.__name__ for one, _ in launched] == [
            *("unit_sums_kernel", "pool_means_kernel", "rarity_kernel")
        ]
        assert {launched[n][1]["features"].data_ptr() for n in (0, 2)} == {features.data_ptr()}
        launched.clear()


# --- budgets ---------------------------------------------------------------------------------------------


def counts_of(case, valid, dtype=torch.int32):
    segments = case.segments
    full = torch.full((segments.crops,), segments.patches, dtype=dtype)
    return full if valid is None else valid.sum(1, dtype=dtype)


def check_budgets(result: TileBudgets, signals, caps, segments: Segments, allocation="exact"):
    """Shares within the tolerance, weights by the shares, budgets exactly by the weights."""
    expected = reference.tile_budgets(signals, caps, segments, allocation=allocation)
    values = [(signal.values.tolist(), signal.weight, signal.temperature) for signal in signals]
    shares, weights, budgets = ([0] * segments.crops for _ in range(3))
    emitted = result.weights.tolist()
    rule = {"exact": lambda *image: oracle_exact(*image)[0], "floor": oracle_floor}[allocation]
    for image, first in zip(segments.images, segments.first_crops):
        if image.thumbnail >= 0:
            budgets[first + image.thumbnail] = min(image.thumbnail_tokens, int(caps[first + image.thumbnail]))
        if image.tiles:
            start = first + image.first_tile
            part = slice(start, start + image.tiles)
            shares[part] = oracle_shares(values, range(segments.crops)[part])
            weights[part] = oracle_weights(result.shares[part].tolist())
            budgets[part] = rule(image.tile_tokens, emitted[part], caps[part].tolist())
    assert [part.dtype for part in result] == [torch.int32, torch.float32, torch.int32]
    exact = torch.tensor(shares, dtype=torch.float64)
    assert_accurate(result.shares, exact, exact.float(), "shares")
    assert emitted == weights
    assert (result.weights.cpu() - expected.weights).abs().max() <= 16  # of 2²⁴
    assert result.budgets.tolist() == budgets


@pytest.mark.parametrize("allocation", ["exact", "floor"])
@pytest.mark.parametrize("case", parameters(SELECTION))
def test_tile_budgets(case, allocation, way):
    signals = case.draw_signals()
    signals += [signals[0]._replace(weight=0.0, temperature=1.0), signals[1]._replace(weight=2.0)]
    integers = torch.int64 if case.mask == "none" else torch.int32
    caps = counts_of(case, case.draw_valid(), integers)
    segments = case.segments
    ties = [signals[0]._replace(values=signals[0].values.gt(0.3).float())]
    for some in (ties, signals[:1], signals[:2], signals[:3], signals):
        seen, counts = case.seen(some, way.device), case.seen(caps, way.device)
        result = way.run("tile_budgets", seen, counts, segments, allocation=allocation)
        check_budgets(result, some, caps, segments, allocation)


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "softmax"])
def test_budgets_do_not_depend_on_larger_images(sums, way):
    """Bit-identical alone and beside images that need more lanes, whatever the order of sums."""
    counts = [5, 250, 64, 65, 129, 30]

    def budgets(counts):
        draws = [generator("lanes", count) for count in counts]
        numbers = [torch.randn(count, generator=draw) for count, draw in zip(counts, draws)]
        values, patches = (
            torch.cat(numbers) * (4 if sums else 1),
            torch.cat(numbers).abs().mul(60).int().clamp_max(144),
        )
        signal = TileSignal((values.exp() if sums else values).to(way.device), 1.0, None if sums else 0.5)
        segments = Segments(tuple(Segment(count, 0, 1, 9, 40 * count) for count in counts), 12)
        result = way.run("tile_budgets", [signal], patches.to(way.device), segments)
        check_budgets(result, [signal._replace(values=signal.values.cpu())], patches, segments)
        return zip(*(part.split(counts) for part in result))

    for count, whole in zip(counts, budgets(counts)):
        for others in ([count], [count, 193], [7, 256, count]):
            (alone,) = (each for other, each in zip(others, budgets(others)) if other == count)
            assert all(same_bits(*pair) for pair in zip(alone, whole))


def test_the_order_of_tiles_does_not_change_shares(kernel):
    """Bit for bit, since sums are exact: so neither can the number of lanes, which orders them."""
    values = torch.rand(60, 200, generator=generator("order"))
    orders = torch.stack([torch.randperm(200, generator=generator("order", n)) for n in range(60)])
    segments = Segments((Segment(200, -1, 1, 0, 999),) * 60, 4)
    patches = torch.full((segments.crops,), 16, dtype=torch.int32, device=kernel.device)

    def shares(values):
        signals = [TileSignal(values.flatten().to(kernel.device), 1.0, heat) for heat in (None, 0.3)]
        return [
            kernel.run("tile_budgets", [one], patches, segments).shares.view(60, 200).cpu() for one in signals
        ]

    for whole, turned in zip(shares(values), shares(values.gather(1, orders))):
        assert same_bits(whole.gather(1, orders), turned)


# --- selection -------------------------------------------------------------------------------------------


def oracle_kept(scores, budgets, valid):
    masks = [None] * len(scores) if valid is None else valid.tolist()
    return [oracle_keep(*crop) for crop in zip(scores.tolist(), budgets.tolist(), masks)]


@pytest.mark.parametrize("case", parameters(CROPS))
def test_segmented_topk(case, way):
    scores, valid, segments = case.draw_scores(), case.draw_valid(), case.segments
    P = segments.patches
    wanted = [0, 1, P // 5, P // 2 + 1, P - 1, P, P + 7, 10**9]
    budgets = torch.tensor([wanted[t * 5 % 8] for t in range(segments.crops)], dtype=torch.int32)
    if valid is not None:  # all of the valid ones, one less, one more
        counts = valid.sum(1, dtype=torch.int32)
        budgets[1::2] = (counts + torch.arange(len(counts)) % 3 - 1).clamp_min(0).int()[1::2]
    if segments.crops % 2:
        budgets = budgets.long()
    keep = way.run("segmented_topk", *(case.seen(value, way.device) for value in (scores, budgets, valid)))
    assert keep.dtype == torch.bool
    assert first_difference(keep.tolist(), oracle_kept(scores, budgets, valid)) is None
    assert torch.equal(keep.cpu(), reference.segmented_topk(scores, budgets, valid))


def check_gather(result, features, scores, valid, budgets, segments, promised):
    """Index, lengths and rows, exactly, given the budgets; a kernel's lengths are as promised."""
    sequences = oracle_index(oracle_kept(scores, budgets, valid), segments)
    if promised:
        sequences = [
            sequence[:length] + [-2] * (length - len(sequence))
            for sequence, length in zip(sequences, segments.lengths)
        ]
    index = list(chain(*sequences))
    assert result.lengths == tuple(len(sequence) for sequence in sequences)
    assert all(type(length) is int for length in result.lengths)
    assert result.index.dtype == torch.int32 and first_difference(result.index.tolist(), index) is None
    index = torch.tensor(index, dtype=torch.int64)
    rows = features.flatten(0, 1)[index.clamp_min(0)].masked_fill((index < 0)[:, None], 0.0)
    assert same_bits(result.tokens.cpu(), rows)


GIVEN = ("signals", "budgets", "ranks", "counts", "budgets and ranks", "floor", "floor of budgets")


def fast_gather(case, given):
    return case in FEW or (given == "signals" and not (SLOW_IN_INTERPRETER and case.name in LARGE))


@pytest.mark.parametrize(("case", "given"), combined(SELECTION, GIVEN, fast_gather))
def test_segmented_topk_gather(case, given, way):
    features, scores, valid, signals = (
        getattr(case, f"draw_{name}")() for name in ("features", "scores", "valid", "signals")
    )
    segments, caps, options = case.segments, counts_of(case, valid), {}
    if "budgets" in given:  # too many, too few
        share = torch.rand(segments.crops, generator=generator(case.name, "budgets"))
        budgets = (share * 1.2 * segments.patches).int()
        options["budgets"] = TileBudgets(*(case.seen(budgets, way.device) for _ in range(3)))
    else:
        options["signals"] = case.seen(signals, way.device)
    if "ranks" in given:
        ranks = reference.finalize_scores(scores[:, None].float(), valid=valid, rank=True).ranks
        options["ranks"] = case.seen(ranks, way.device)
        decide, scores = scores, torch.zeros_like(scores)  # which must not matter
    else:
        decide = scores
    if given == "counts":
        options["valid_counts"] = case.seen(caps.long(), way.device)
    if "floor" in given:
        options["allocation"] = "floor"
    result = way.run(
        "segmented_topk_gather",
        *(case.seen(features, way.device), case.seen(scores, way.device), segments),
        valid=case.seen(valid, way.device),
        **options,
    )
    if "budgets" in options:
        assert result.budgets is options["budgets"]
    else:
        check_budgets(result.budgets, signals, caps, segments, options.get("allocation", "exact"))
    promised = way.kernel and "floor" not in given
    check_gather(result, features, decide, valid, result.budgets.budgets, segments, promised)


def orders_of(ranks, lengths=None):
    """The patches of each segment that were chosen, in order; a segment's patches count through its crops."""
    segments = ranks.split(1 if lengths is None else lengths)
    orders = []
    for row in (segment.flatten().tolist() for segment in segments):
        order = sorted((rank, patch) for patch, rank in enumerate(row) if rank != 32767)
        assert [rank for rank, _ in order] == list(range(len(order)))
        orders.append([patch for _, patch in order])
    return orders


@pytest.mark.parametrize(
    ("case", "rule"),
    combined(DIVERSE, RULES, lambda case, rule: rule != "dpp" or case.crops * case.patches < 2000),
)
def test_segmented_diverse_topk(case, rule, way):
    features, given = case.draw_features(), case.given(rule, way.device)
    ranks = way.run("segmented_diverse_topk", case.seen(features, way.device), **given)
    assert (ranks.dtype, ranks.shape) == (torch.int16, features.shape[:2])
    split = [1] * case.crops if case.lengths is None else list(case.lengths)
    parts = [
        [None] * len(split) if value is None else value.cpu().split(split)
        for value in (features, given.get("quality"), given.get("valid"))
    ]
    orders = orders_of(ranks.cpu(), split)
    for order, budget, x, *rest in zip(orders, given["budgets"].tolist(), *parts):
        rest = [value if value is None else value.flatten() for value in rest]
        assert order == oracle_diverse(x.flatten(0, 1), budget, rule, *rest)


OF_DTYPE = {  # an operation, a dtype -> the first fast case of the dtype that it depends on
    **{
        (f"test_{operation}", case.dtype): (case, *options)
        for operation, options in (
            ("cls_attention", ("added", False)),
            ("attention_with_cls", ("added",)),
            ("received_attention", ("added",)),
            ("received_with_lse", ("added",)),
        )
        for case in reversed(ATTENTION)
        if not case.slow
    },
    **{
        ("test_received_of_segments", case.dtype): (case, "added", False)
        for case in reversed(PACKED)
        if not case.slow
    },
    **{("test_segmented_topk", case.scores_dtype): (case,) for case in reversed(CROPS) if not case.slow},
    **{
        ("test_segmented_topk_gather", case.dtype): (case, "signals")
        for case in reversed(SELECTION)
        if not case.slow
    },
    **{("test_rarity", case.dtype): (case,) for case in reversed(SELECTION) if not case.slow},
    **{
        ("test_segmented_diverse_topk", kind): (case, rule)
        for rule, kind, case in zip(RULES, (torch.float32, torch.float16, torch.bfloat16), DIVERSE)
    },
    ("test_finalize_scores", torch.float32): (CROPS[0], 3, True),
    ("test_tile_budgets", torch.float32): (SELECTION[0], "exact"),
}


@pytest.mark.gpu
@pytest.mark.parametrize(("test", "dtype"), OF_DTYPE, ids=str)
def test_compiled(test, dtype):
    """One case per operation and dtype under ``torch.compile(fullgraph=True)``."""
    globals()[test](*OF_DTYPE[test, dtype], Way("compiled"))


@pytest.mark.gpu
@pytest.mark.parametrize(("test", "dtype"), OF_DTYPE, ids=str)
def test_sanitized(test, dtype):
    """The same in eager mode, few enough for ``bench/run_device`` to run under compute-sanitizer."""
    globals()[test](*OF_DTYPE[test, dtype], Way("eager"))


def test_every_kernel_is_sanitized(kernel, monkeypatch):
    """The cases of :func:`test_sanitized` launch all kernels of the package."""
    launched, launch = set(), _launch.launch

    def seen(function, grid, **arguments):
        launched.add(function.fn.__name__)
        launch(function, grid, **arguments)

    monkeypatch.setattr(_launch, "launch", seen)
    for test, dtype in OF_DTYPE:
        globals()[test](*OF_DTYPE[test, dtype], kernel)
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"hero_kernels.kernels.{name}") for name in names]
    assert launched == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


# --- what callers may pass -------------------------------------------------------------------------------

HUGE = torch.iinfo(torch.int64).max
ATTENTIONS = ("cls_attention", "attention_with_cls", "received_attention")


def attend(operation, query, key, *more, **options):
    """An operation on queries and keys, which it takes as values too: its results as a tuple."""
    value = (key,) if operation == "attention_with_cls" else ()
    result = getattr(hk, operation)(query, key, *value, *more, **options)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("allocation", ["exact", "floor"])
def test_counts_and_budgets_beyond_int32(allocation, way):
    """They count as all patches."""
    case = SELECTION[0]
    segments, signals = case.segments, case.seen(case.draw_signals(), way.device)
    features, scores = (case.seen(x, way.device) for x in (case.draw_features(), torch.rand(5, 16)))
    features = features.nan_to_num()

    def run(count):
        counts = torch.full((segments.crops,), count, device=way.device)
        budgets = hk.tile_budgets(signals, counts, segments, allocation=allocation)
        at_once = hk.segmented_topk_gather(
            *(features, scores, segments), signals=signals, valid_counts=counts, allocation=allocation
        )
        given = TileBudgets(counts, *budgets[1:])
        gathered = hk.segmented_topk_gather(
            *(features, scores, segments), budgets=given, valid_counts=counts, allocation=allocation
        )
        return [*budgets, *at_once[:2], *gathered[:2], hk.segmented_topk(scores, counts)]

    wanted = run(segments.patches)
    for count in (HUGE, 2**32 + 1, 2**31):
        assert all(same_bits(*pair) for pair in zip(run(count), wanted))


@pytest.mark.parametrize("operation", ATTENTIONS)
def test_a_buffer_is_plain_memory(operation, way):
    """Its elements share no memory, and autograd has no part in it; other strides are fine."""
    query = torch.rand(2, 3, 5, 8, device=way.device)
    (rows,) = attend(operation, query, query, 0.3)[-1:]
    memory = torch.zeros(64, device=way.device)
    bad = {
        "expanded": memory[:1].view(1, 1, 1).expand(rows.shape),
        "one crop": torch.zeros_like(rows[:1]).expand(rows.shape),
        "overlapping": memory.as_strided(rows.shape, (9, 2, 1)),
        "gradient": torch.zeros_like(rows).requires_grad_(),
    }
    for out in bad.values():
        for context in (torch.enable_grad, torch.no_grad):
            with context(), pytest.raises(ValueError, match=r"^out: expected .*, got "):
                attend(operation, query, query, 0.3, out=out)
    with torch.inference_mode():
        inference = torch.zeros_like(rows)
        attend(operation, query, query, 0.3, out=inference)
    with pytest.raises(ValueError, match=r"^out: expected .* inference"):
        attend(operation, query, query, 0.3, out=inference)
    for out in (torch.zeros_like(rows.mT).mT, torch.zeros_like(rows)[:, ::3].repeat(1, 6, 1)[:, ::2]):
        weight = torch.ones(2, device=way.device, requires_grad=True)
        assert attend(operation, query, query, 0.3, weight=weight, out=out)[-1] is out
        assert same_bits(out, rows) and not out.requires_grad


@pytest.mark.parametrize("operation", ATTENTIONS)
def test_autograd_sees_that_a_buffer_was_written(operation, way):
    query = torch.rand(2, 3, 5, 8, device=way.device)
    out = torch.zeros_like(attend(operation, query, query, 0.3)[-1])
    product = torch.ones_like(out).requires_grad_() * out
    attend(operation, query, query, 0.3, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 5, 0)], ids=["T", "H", "D"])
@pytest.mark.parametrize("operation", ATTENTIONS)
def test_attention_of_nothing(operation, shape, way):
    """Without crops or heads results are empty; without features all keys are equal."""
    tensors = [torch.rand(shape, device=way.device, requires_grad=True) for _ in range(2)]
    *output, rows = attend(operation, *tensors, 0.3)
    patches = 5 if operation == "received_attention" else 4
    assert same_bits(rows.cpu(), torch.full((*shape[:2], patches), 0.2))
    assert not output or output[0].shape == shape
    for result in output:
        assert [x.shape for x in torch.autograd.grad(result.sum(), tensors)] == [shape, shape]
    out = torch.zeros_like(rows)
    assert attend(operation, *tensors, 0.3, out=out)[-1] is out and same_bits(out, rows)


@pytest.mark.parametrize(("crops", "patches"), [(0, 9), (3, 0), (0, 0)])
def test_selection_of_nothing(crops, patches, way):
    scores = torch.rand(crops, patches, device=way.device)
    budgets = torch.ones(crops, dtype=torch.int32, device=way.device)
    assert hk.segmented_topk(scores, budgets, scores > 0).shape == (crops, patches)
    finalized = hk.finalize_scores(scores[:, None], rank=True)
    assert finalized.scores.shape == finalized.ranks.shape == (crops, patches)
    entropy = torch.full((crops,), math.log(max(patches, 1)))
    assert crops == 0 or same_bits(finalized.entropy.cpu(), entropy)


def test_gather_of_no_features(way):
    case = SELECTION[0]
    segments, scores = case.segments, torch.rand(5, 16, device=way.device)
    signals = case.seen(case.draw_signals(), way.device)
    wide, empty = (
        hk.segmented_topk_gather(scores[..., None].expand(-1, -1, D), scores, segments, signals=signals)
        for D in (2, 0)
    )
    assert empty.tokens.shape == (len(wide.index), 0) and torch.equal(empty.index, wide.index)


def test_weights_far_apart(way):
    """One weight in proportion to the other is below fp32: it counts for nothing."""
    case = SELECTION[0]
    counts = counts_of(case, None).to(way.device)
    one, other = case.seen(case.draw_signals(), way.device)
    pair = [one._replace(weight=1e-37), other._replace(weight=1e37)]
    got, want = (hk.tile_budgets(signals, counts, case.segments) for signals in (pair, pair[1:]))
    torch.testing.assert_close(got.shares, want.shares)
    assert torch.equal(got.budgets, want.budgets)


def exact_maps(query, key, scale):
    """Attention by logits rounded to fp32, whose softmax is taken in float64."""
    products = torch.einsum("thmd,thnd->thmn", query.double(), key.double())
    return (products * scale).float().double().softmax(-1)


LIMITS = {  # queries and keys [N, D] of one head, and a scale: logits that fp32 can hold, or just not
    "largest": ([[3e38], [-3e38], [1e38], [3.4e38]], [[1.0], [-1.0], [0.5], [1.0]], 1.0),
    "all lowest": ([[-3e38], [-3e38]], [[1.0], [1.0]], 1.0),
    "products overflow": ([[1e20], [-1e20], [3e19]], [[1e20], [2e20], [-1e20]], 1e-3),
    "scaled query overflows": ([[3e38], [1e38]], [[0.25], [-0.25]], 4.0),
    "sums overflow": ([[3e38] * 3, [-3e38] * 3], [[1.0, 1.0, -1.5], [0.5, 0.5, -1.0]], 1.0),
    "largest scale": ([[1.0], [0.0], [-0.5]], [[1.0], [0.5], [0.0]], 3e38),
    "smallest scale": ([[3e38], [1.0]], [[3.0], [-1.0]], 1.2e-38),
    "scale 0": ([[3e38], [1.0]], [[3e38], [-1.0]], 0.0),
    "infinite": ([[3e38], [-3e38], [1e38]], [[1.3], [0.0], [-1.3]], 1.0),
    "one infinite below": ([[3e38], [1.0]], [[1.0], [-2.0]], 1.0),
    "equal and large": ([[1e9], [3e38], [1e5]], [[1.0], [1.0], [1.0]], 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", LIMITS)
def test_logits_near_the_limit_of_fp32(limit, dtype, way):
    """NaN where the rounded logits have no softmax, and nowhere else."""
    *tensors, scale = LIMITS[limit]
    query, key = (torch.tensor(x).to(dtype)[None, None] for x in tensors)
    maps = exact_maps(query, key, scale)
    query, key = query.to(way.device), key.to(way.device)
    wanted = {"cls_attention": maps[:, :, 0, 1:], "received_attention": maps.mean(2)}
    wanted["attention_with_cls"] = wanted["cls_attention"]
    for operation, rows in wanted.items():
        got = attend(operation, query, key, scale)[-1]
        torch.testing.assert_close(got.cpu(), rows.float(), rtol=1e-4, atol=1e-6, equal_nan=True)
    value = torch.arange(2.0 * key.shape[2]).view(1, 1, -1, 2)[..., :1].to(query)
    value = value.expand_as(key).contiguous()
    output, _ = hk.attention_with_cls(query, key, value, scale)
    exact = (maps @ value.cpu().double()).to(dtype)
    torch.testing.assert_close(output.cpu(), exact, rtol=1e-2, atol=1e-6, equal_nan=True)


# --- the same everywhere ---------------------------------------------------------------------------------

NEIGHBOURS = Selection(
    "neighbours",
    (Segment(5, 0, 2, 3, 11, (0, 8)), Segment(1, 0, 1, 4, 0, (0, 0), True), Segment(4, 3, 3, 2, 9, (1, 3))),
    width=9,
)


def everything(way, rows, case, features, valid, signals, segments):
    """What each selecting operation makes of a batch, as lists of tensors that go by crops or by rows."""
    device = way.device
    seen = {"valid": case.seen(valid, device)}
    finalized = way.run("finalize_scores", rows.to(device), rank=True, **seen)
    caps = valid.sum(1, dtype=torch.int32).to(device)
    budgets = way.run("tile_budgets", case.seen(signals, device), caps, segments)
    keep = way.run("segmented_topk", finalized.scores, budgets.budgets, **seen)
    features = case.seen(features, device)
    gathered = [
        way.run("segmented_topk_gather", features, finalized.scores, segments, budgets=budgets, **seen),
        way.run(
            *("segmented_topk_gather", features, finalized.scores, segments),
            signals=case.seen(signals, device),
            ranks=finalized.ranks,
            **seen,
        ),
    ]
    return [*finalized, *budgets, keep], gathered


@cache
def neighbours(way):
    """A batch, and what :func:`everything` makes of it."""
    case = NEIGHBOURS
    given = (rows_of(case, 3).exp2().log(), case.draw_features(), case.draw_valid(), case.draw_signals())
    rows, *others = given
    return given, everything(way, rows, case, *others, case.segments)


@pytest.mark.parametrize("order", ["alone", "reversed", "again"])
def test_an_image_does_not_depend_on_its_batch(order, way):
    """Bit-identical for any neighbours, any place among them, and on every run."""
    case, segments = NEIGHBOURS, NEIGHBOURS.segments
    (rows, features, valid, signals), (whole, gathered) = neighbours(way)
    images = list(zip(segments.images, segments.first_crops))
    batches = {"alone": [[image] for image in images], "reversed": [images[::-1]], "again": [images]}[order]
    for batch in batches:
        crops = list(chain(*(range(first, first + image.crops) for image, first in batch)))
        other = Segments(tuple(image for image, _ in batch), segments.side)
        part, part_gathered = everything(
            *(way, rows[crops], case, features[crops], valid[crops]),
            *([signal._replace(values=signal.values[crops]) for signal in signals], other),
        )
        assert all(same_bits(got, want[crops]) for got, want in zip(part, whole))
        for got, want in zip(part_gathered, gathered):
            got_rows = zip(got.tokens.split(got.lengths), got.index.split(got.lengths))
            want_rows = list(zip(want.tokens.split(want.lengths), want.index.split(want.lengths)))
            for (tokens, index), (image, first), place in zip(got_rows, batch, other.first_crops):
                want_tokens, want_index = want_rows[images.index((image, first))]
                shift = (first - place) * segments.patches
                assert same_bits(tokens, want_tokens)
                assert torch.equal(torch.where(index < 0, index, index + shift), want_index)


@pytest.mark.parametrize("operation", ["cls_attention", "attention_with_cls", "received_attention"])
def test_a_crop_does_not_depend_on_its_batch(operation, kernel):
    """True of kernels only: PyTorch's matrix products may add in another order for another batch."""
    case = next(case for case in ATTENTION if case.name == "odd sizes")
    tensors = case.tensors()[: 3 if operation == "attention_with_cls" else 2]

    def run(crops):
        seen = case.seen([tensor[crops] for tensor in tensors], kernel.device)
        result = kernel.run(operation, *seen, 0.3)
        return result if isinstance(result, tuple) else (result,)

    whole = run([0, 1])
    for crops in ([0], [1, 0], [0, 1, 1, 0, 1], [0, 1]):
        assert all(same_bits(got, want[crops]) for got, want in zip(run(crops), whole))


def with_blocks(monkeypatch, factor, **least):
    """Kernels launched with other block sizes: each option named, times the factor, at least so much."""

    configuration = _launch.configuration

    def varied(name, size, device):
        options = configuration(name, size, device)
        return {
            option: max(int(value * factor), least[option]) if option in least else value
            for option, value in options.items()
        }

    monkeypatch.setattr(_launch, "configuration", varied)


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize(
    "name", ["stitched 2 × 3, padding rows", pytest.param("P 36", marks=pytest.mark.slow)]
)
def test_block_sizes_decide_nothing(name, factor, kernel, monkeypatch):
    """Selections, budgets and ranks are integers, and the same for every configuration."""
    case = next(case for case in FEW if case.name == name)
    given = (rows_of(case, 2), case, case.draw_features(), case.draw_valid(), case.draw_signals())
    whole, gathered = everything(kernel, *given, case.segments)
    with_blocks(monkeypatch, factor, ROWS=1, SLICE=1, ELEMENTS=1, COLUMNS=16)
    part, part_gathered = everything(kernel, *given, case.segments)
    assert all(same_bits(got, want) for got, want in zip(part, whole))
    for got, want in zip(part_gathered, gathered):
        assert same_bits(got.tokens, want.tokens) and torch.equal(got.index, want.index)


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("name", ["one past a block", "odd sizes", "narrow"])
def test_block_sizes_of_attention(name, factor, kernel, monkeypatch):
    """Within the tolerance whatever the blocks."""
    with_blocks(monkeypatch, factor, BLOCK=8, BLOCK_M=16, BLOCK_N=16)
    case = next(case for case in ATTENTION if case.name == name)
    test_cls_attention(case, "plain", False, kernel)
    test_attention_with_cls(case, "plain", kernel)
    test_received_attention(case, "plain", kernel)


@pytest.mark.parametrize("factor", [1 / 16, 2])
def test_block_sizes_of_rarity(factor, kernel, monkeypatch):
    """Within the tolerance whatever the blocks; a pool of more than a block of sums."""
    with_blocks(monkeypatch, factor, ROWS=1, STEPS=1, COLUMNS=16)
    test_rarity(next(case for case in FEW if case.name == "P 36"), kernel)


# --- beyond 2³¹ elements ---------------------------------------------------------------------------------

FAR = 2**31 + 64  # elements from the first to the last of one dimension


@pytest.fixture
def vast(kernel, tmp_path):
    """Makes views that reach beyond :data:`FAR`: on the CPU over a sparse file, little of it touched."""

    def spread(values, dimension, name):
        strides = [math.prod(values.shape[d + 1 :]) for d in range(values.dim())]
        step = FAR // max(values.shape[dimension] - 1, 1) + 8
        strides[dimension] = step + max(strides)
        size = 1 + sum((length - 1) * stride for length, stride in zip(values.shape, strides))
        if kernel.device == "cuda":
            memory = torch.empty(size, dtype=values.dtype, device="cuda")
        else:
            file = str(tmp_path / name)
            memory = torch.from_file(file, shared=True, size=size, dtype=values.dtype)
        view = memory.as_strided(values.shape, strides).copy_(values)
        assert sum((length - 1) * stride for length, stride in zip(values.shape, strides)) > 2**31
        return view

    return spread


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["crops", "heads", "tokens"])
@pytest.mark.parametrize("operation", ["cls_attention", "attention_with_cls", "received_attention"])
def test_attention_far_apart(operation, dimension, kernel, vast):
    tensors = [x.half() for x in draw_attention("far", crops=2, heads=2, tokens=21, width=16, count=3)]
    tensors = tensors[: 3 if operation == "attention_with_cls" else 2]
    far = [vast(x, dimension, f"{n}") for n, x in enumerate(tensors)]
    result = getattr(hk, operation)(*far, 0.3)  # not kernel.run, which copies whole storages
    expected = getattr(hk, operation)(*(x.to(kernel.device) for x in tensors), 0.3)
    assert all(same_bits(*pair) for pair in zip(tensors_in(result), tensors_in(expected)))


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [0, 1])
def test_selection_far_apart(dimension, kernel, vast):
    case = next(case for case in SELECTION if case.name == "stitched 2 × 2")
    features, scores, valid = case.draw_features(), rows_of(case, 1)[:, 0], case.draw_valid()
    signals, segments = case.draw_signals(), case.segments
    ranks = reference.finalize_scores(scores[:, None], valid=valid, rank=True).ranks
    budgets = reference.tile_budgets(signals, counts_of(case, valid), segments)
    far = {"valid": vast(valid, dimension, "valid"), "ranks": vast(ranks, dimension, "ranks")}
    far_scores = vast(scores.half(), dimension, "scores")
    here = [signal._replace(values=signal.values.to(kernel.device)) for signal in signals]
    keep = hk.segmented_topk(far_scores, budgets.budgets.to(kernel.device), far["valid"])
    assert first_difference(keep.tolist(), oracle_kept(scores, budgets.budgets, valid)) is None
    finalized = hk.finalize_scores(
        scores[:, None].contiguous().to(kernel.device), valid=far["valid"], rank=True
    )
    assert torch.equal(finalized.ranks.cpu()[valid], ranks[valid])
    far_features = vast(features.half(), dimension, "features")
    expected = hk.rarity(features.half().to(kernel.device), segments, valid.to(kernel.device))
    assert same_bits(hk.rarity(far_features, segments, far["valid"]), expected)
    for ranked in (False, True):
        given = far if ranked else {"valid": far["valid"]}
        result = hk.segmented_topk_gather(far_features, far_scores, segments, signals=here, **given)
        check_gather(result, features.half(), scores, valid, result.budgets.budgets, segments, True)


@pytest.mark.slow
def test_buffers_far_apart(kernel, vast):
    """Rows added to a buffer whose crops lie far apart."""
    query, key = draw_attention("far out", crops=2, heads=2, tokens=21, width=16)
    far = vast(torch.ones(2, 2, 20), 0, "out")
    hk.cls_attention(query.to(kernel.device), key.to(kernel.device), 0.3, out=far)
    expected = reference.cls_attention(query, key, 0.3, out=torch.ones(2, 2, 20))
    torch.testing.assert_close(far.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.gpu
def test_rows_beyond_2_31():
    """One launch fills a buffer of more than 2³¹ elements, which takes 20 GB of GPU memory."""
    crops, heads, patches = 8192, 64, 4112
    query, key = (torch.randn(1, 1, patches + 1, 16, device="cuda") for _ in range(2))
    query, key = (x.expand(crops, heads, -1, -1) for x in (query, key))
    rows = hk.cls_attention(query, key, 0.3)
    assert rows.numel() > 2**31
    for t in (0, crops // 2, crops - 1):
        assert same_bits(rows[t, heads - 1], rows[0, 0])
    scores = hk.finalize_scores(rows).scores
    assert same_bits(scores[-1], scores[0])


@pytest.mark.parametrize("operation", ["attention_with_cls", "received_attention", "segmented_topk"])
def test_doubles_are_refused(operation):
    """By the launchers, before any launch: a GPU would round them, or take very long."""
    pytest.importorskip("triton")
    double = torch.randn(1, 2, 5, 16, dtype=torch.float64)
    arguments = {
        "attention_with_cls": (*(double, double, double, 0.5), 1.0, None, False),
        "received_attention": (double, double, 0.5, 1.0, None, None, None, None),
        "segmented_topk": (double[0, 0], torch.ones(5, dtype=torch.int32), None),
    }
    with pytest.raises(TypeError, match=r"(key|scores): expected float32, float16 or bfloat16 on a GPU"):
        _dispatch.launcher(operation)(*arguments[operation])


@pytest.mark.parametrize("operation", ATTENTIONS)
def test_sizes_beyond_the_kernels_are_refused_by_name(operation, kernel):
    wide = torch.zeros(1, 1, 3, 257, device=kernel.device)
    with pytest.raises(ValueError, match=r"^key: expected heads at most (256|128) wide on a GPU, got "):
        attend(operation, wide, wide, 0.3)
    crops, counts = Segments((Segment(9), Segment(257)), 1), torch.ones(266, dtype=torch.int32)
    counts = counts.to(kernel.device)
    with pytest.raises(
        ValueError, match=r"^segments.images\[1\]: expected at most 256 crops on a GPU, got 257"
    ):
        hk.tile_budgets([TileSignal(counts.float(), 1.0)], counts, crops)
    with pytest.raises(ValueError, match=r"^features: expected at most 8192 features on a GPU, got 8193"):
        hk.rarity(torch.zeros(1, 1, 8193, device=kernel.device), Segments((Segment(1),), 1))
    with pytest.raises(ValueError, match=r"^rows: expected at most 16384 patches on a GPU, got 16385"):
        hk.finalize_scores(torch.zeros(1, 1, 16385, device=kernel.device))
