"""Greedy choice that covers, in ragged segments of up to 4096 candidates.

    x = features · 4000 / |features|, rounded to integers        products[i, j] = Σ_d x[i, d] · x[j, d]
    s = products / 2⁹, rounded to int16 (max_min, coverage)      k = products · 2⁻²⁴ in fp32 (dpp)
    max_min:   value_i = − max_c s[c, i]                         c over the chosen; at first over all others
    coverage:  value_i = q_i · Σ_j max(0, s[i, j] − max(0, max_c s[c, j]))
    dpp:       value_i = max(k[i, i], 2⁻¹⁶) · q_i · q_i,         and after each step, with c chosen,
               k[i, j] −= e_i · e_j,  e = k[c] / √k[c, c]        e = 0 where k[c, c] ≤ 2⁻¹⁶

Shapes: features [T, P, D] floating point, any strides, budgets [S] int32 or int64, quality [T, P] fp32 or
None, valid [T, P] bytes or None, cu_crops [S + 1] int32 or None; ranks [T, P] int16. A segment is a run of
rows of [T · P], at most ``most``.

Products, and all their partial sums, are integers below 2²⁴: tensor cores add them in fp32 without rounding,
in any order. What follows is in integers, or in fp32 element by element, without fused multiply-add.

1. ``round_features_kernel``, grid (blocks of rows): x in fp16. Squares are summed exactly, in fp64.
2. ``similarities_kernel``, grid (blocks, blocks, S): s or k in a workspace [S, most, most], and what each
   block adds to the first values of its rows, a maximum or a sum. The workspace stays in L2: of int16 it is
   3.3 MB for 5 × 576 candidates and 17 MB for 2880; of fp32 twice that.
3. ``max_min_kernel``, grid (S,): all steps. Each reads one row of s.
   ``coverage_kernel``, grid (S,): all steps. A candidate j whose coverage rises from ``old`` to ``new`` takes
   ``min(max(s[i, j], old), new) − old`` from the gain of i: a step reads the rows of these j.
   ``dpp_kernel``, grid (S,): the steps in PANELS launches. The row of the chosen candidate makes room for its
   e; a step reads one row of k and the e of its panel. Between panels ``dpp_update_kernel``, grid (blocks,
   blocks, S), subtracts their products from the rows that are left, in the same order.

Bytes: T·P·D of the features, and the workspace; the chain of steps dominates. FLOPs: 2·n²·D a segment of n.

Source: our own, of the rules of DivPrune (2503.02175), CDPruner (2506.10967) and SCOPE (2510.24214).
"""

import torch
import triton
import triton.language as tl

from .. import _diverse, _launch
from .._env import SWITCHES
from .common import as_bytes, blocks, check_width, power_of_2

NOT_CHOSEN = tl.constexpr(_diverse.NOT_CHOSEN)
LAST = tl.constexpr(_diverse.MOST_CANDIDATES - 1)
INDEX_BITS = tl.constexpr(LAST.value.bit_length())
LENGTH = tl.constexpr(_diverse.LENGTH)
TERMS = tl.constexpr(_diverse.TERMS)
SHIFT = tl.constexpr(_diverse.SHIFT)
HALF = tl.constexpr(1 << SHIFT.value >> 1)
EXACT = tl.constexpr(_diverse.EXACT)
FLOOR = tl.constexpr(_diverse.FLOOR)
MOST_QUALITY = tl.constexpr(_diverse.MOST_QUALITY)
CHUNK = 64  # features of which rounded vectors hold a multiple


@triton.jit
def round_features_kernel(
    features, rounded, strides, rows, patches, width, padded, ROWS: tl.constexpr, D_PAD: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    d = tl.arange(0, D_PAD)[None, :]
    place = (row // patches) * strides[0] + (row % patches) * strides[1] + d.to(tl.int64) * strides[2]
    x = tl.load(features + place, mask=(row < rows) & (d < width), other=0.0).to(tl.float32).to(tl.float64)
    squares = x * x
    large = tl.max(squares, 1)[:, None] * TERMS
    total = tl.sum((squares + large) - large, 1)[:, None]
    some = (total > 0.0) & (total < float("inf"))  # NaN is neither
    x = tl.where(some, x, 0.0) * (LENGTH / tl.sqrt(tl.where(some, total, 1.0)))
    whole = tl.floor(x + 0.5).to(tl.float32).to(tl.float16)
    tl.store(rounded + row * padded + d, whole, mask=(row < rows) & (d < padded))


@triton.jit
def segment_of(cu_crops, s, crops, patches, most):
    """First candidate of a segment, in rows of [T · P], and their number."""
    if cu_crops is None:
        return s * patches, patches
    else:
        first = tl.maximum(tl.minimum(tl.load(cu_crops + s), crops), 0)
        count = tl.maximum(tl.minimum(tl.load(cu_crops + s + 1), crops), first) - first
        return first.to(tl.int64) * patches, tl.minimum(count * patches, most)


@triton.jit
def valid_candidates(valid, first, i, count):
    if valid is None:
        return i < count
    else:
        return (i < count) & (tl.load(valid + first + i, mask=i < count, other=0) != 0)


@triton.jit
def columns_of(count):
    """Columns of the workspace that hold something. Compilers know that 16 divides it: accesses are wide."""
    return tl.cdiv(count, 16) * 16


@triton.jit
def similarities_kernel(
    rounded,
    valid,
    cu_crops,
    similarities,
    starts,
    crops,
    patches,
    most,
    pitch,
    padded,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``pitch`` is the distance of rows of the workspace, ``padded`` that of the rounded vectors.

    ``starts[s, b, i]``: of max_min the largest similarity of i to others of block b, of coverage their sum.
    """
    s = tl.program_id(2).to(tl.int64)
    first, count = segment_of(cu_crops, s, crops, patches, most)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(0) * BLOCK < count) & (tl.program_id(1) * BLOCK < count):
        d = tl.arange(0, BLOCK_D)
        rounded += first * padded
        products = tl.zeros([BLOCK, BLOCK], tl.float32)
        for begin in tl.range(0, padded, BLOCK_D, num_stages=STAGES):
            at = (begin + d).to(tl.int64)
            x = tl.load(rounded + i[:, None] * padded + at[None, :], mask=(i < count)[:, None], other=0.0)
            y = tl.load(rounded + j[None, :] * padded + at[:, None], mask=(j < count)[None, :], other=0.0)
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            products = tl.dot(x, y, products)
        place = similarities + (s * most + i[:, None]) * pitch + j[None, :]
        inside = (i < count)[:, None] & (j < columns_of(count))[None, :]
        if RULE == "dpp":
            tl.store(place, products * EXACT, mask=inside)
        else:
            similarity = tl.minimum((products.to(tl.int32) + HALF) >> SHIFT, NOT_CHOSEN)
            tl.store(place, similarity.to(tl.int16), mask=inside)
            ok = valid_candidates(valid, first, j, count)[None, :]
            if RULE == "max_min":
                start = tl.max(tl.where(ok & (i[:, None] != j[None, :]), similarity, -NOT_CHOSEN - 1), 1)
            else:
                start = tl.sum(tl.where(ok, tl.maximum(similarity, 0), 0), 1)
            slot = (s * tl.num_programs(1) + tl.program_id(1)) * pitch
            tl.store(starts + slot + i, start, mask=i < columns_of(count))


@triton.jit
def steps_of(budgets, s, ok):
    """The budget of a segment, clamped to its valid candidates."""
    count = tl.sum(ok.to(tl.int32), 0)
    return tl.maximum(tl.minimum(tl.load(budgets + s), count), 0).to(tl.int32)


@triton.jit
def weights_of(quality, first, i, count):
    if quality is None:
        return tl.full(i.shape, 1.0, tl.float32)
    else:
        q = tl.load(quality + first + i, mask=i < count, other=0.0)
        return tl.where(q > 0.0, tl.minimum(q, MOST_QUALITY), 0.0)  # NaN is not


@triton.jit
def best_of(value, i, left):
    """The candidate left of the largest value >= 0 in fp32, ties to the lower index: one reduction."""
    key = (value.to(tl.int32, bitcast=True).to(tl.int64) << INDEX_BITS) | (LAST - i)
    return LAST - (tl.max(tl.where(left, key, -1), 0) & LAST).to(tl.int32)


@triton.jit
def max_min_kernel(
    similarities,
    starts,
    budgets,
    valid,
    cu_crops,
    ranks,
    crops,
    patches,
    most,
    pitch,
    slots,
    BLOCK: tl.constexpr,
    N_PAD: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    first, count = segment_of(cu_crops, s, crops, patches, most)
    i = tl.arange(0, N_PAD)
    inside = i < columns_of(count)
    left = valid_candidates(valid, first, i, count)
    steps = steps_of(budgets, s, left)
    similarities += s * most * pitch + i
    starts += s * slots * pitch + i
    nearest = tl.full([N_PAD], -NOT_CHOSEN - 1, tl.int32)
    for b in range(0, tl.cdiv(count, BLOCK)):
        start = tl.load(starts + b * pitch, mask=inside, other=0)
        nearest = tl.maximum(nearest, start)
    rank = tl.full([N_PAD], NOT_CHOSEN, tl.int32)
    for step in range(0, steps):
        # A distance in 16 bits and an index in 12: the reduction of an int32.
        key = ((NOT_CHOSEN - nearest) << INDEX_BITS) | (LAST - i)
        chosen = LAST - (tl.max(tl.where(left, key, -1), 0) & LAST)
        row = tl.load(similarities + chosen.to(tl.int64) * pitch, mask=inside, other=0).to(tl.int32)
        nearest = tl.where(step == 0, row, tl.maximum(nearest, row))
        rank = tl.where(i == chosen, step, rank)
        left = left & (i != chosen)
    tl.store(ranks + first + i, rank.to(tl.int16), mask=i < count)


@triton.jit
def coverage_kernel(
    similarities,
    starts,
    risen,
    budgets,
    quality,
    valid,
    cu_crops,
    ranks,
    crops,
    patches,
    most,
    pitch,
    slots,
    BLOCK: tl.constexpr,
    N_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``risen`` [S, pitch] int64 lists the candidates whose coverage rises: index, new and old one."""
    s = tl.program_id(0).to(tl.int64)
    first, count = segment_of(cu_crops, s, crops, patches, most)
    i = tl.arange(0, N_PAD)
    inside = i < columns_of(count)
    left = valid_candidates(valid, first, i, count)
    steps = steps_of(budgets, s, left)
    weight = weights_of(quality, first, i, count)
    similarities += s * most * pitch
    starts += s * slots * pitch + i
    risen += s * pitch
    gain = tl.zeros([N_PAD], tl.int32)
    for b in range(0, tl.cdiv(count, BLOCK)):
        gain += tl.load(starts + b * pitch, mask=inside, other=0)
    covered = tl.where(left, 0, NOT_CHOSEN)
    rank = tl.full([N_PAD], NOT_CHOSEN, tl.int32)
    for step in range(0, steps):
        chosen = best_of(gain.to(tl.float32) * weight, i, left)
        row = similarities + chosen.to(tl.int64) * pitch
        new = tl.load(row + i, mask=inside, other=0).to(tl.int32)
        rises = new > covered
        place = tl.cumsum(rises.to(tl.int32), 0)
        number = tl.sum(rises.to(tl.int32), 0)
        entry = (i.to(tl.int64) << 32) | (new << 16) | covered
        tl.store(risen + place - 1, entry, mask=rises)
        tl.debug_barrier()
        for begin in tl.range(0, number, ROWS, num_stages=STAGES):
            r = begin + tl.arange(0, ROWS)
            entries = tl.load(risen + r, mask=r < number, other=0)
            j = entries >> 32
            now = ((entries >> 16) & 0xFFFF).to(tl.int32)[:, None]
            before = (entries & 0xFFFF).to(tl.int32)[:, None]
            those = (r < number)[:, None] & inside[None, :]
            rows = tl.load(similarities + j[:, None] * pitch + i[None, :], mask=those, other=0).to(tl.int32)
            gain -= tl.sum(tl.minimum(tl.maximum(rows, before), now) - before, 0)
        tl.debug_barrier()
        covered = tl.maximum(covered, new)
        rank = tl.where(i == chosen, step, rank)
        left = left & (i != chosen)
    tl.store(ranks + first + i, rank.to(tl.int16), mask=i < count)


@triton.jit
def panel_of(steps, panel, PANELS: tl.constexpr):
    """First step of a panel, and that of the next."""
    return steps * panel // PANELS, steps * (panel + 1) // PANELS


@triton.jit(do_not_specialize=["panel"])
def dpp_kernel(
    covariance,
    order,
    budgets,
    quality,
    valid,
    cu_crops,
    ranks,
    crops,
    patches,
    most,
    pitch,
    panel,
    FIRST: tl.constexpr,
    PANELS: tl.constexpr,
    N_PAD: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``order`` [S, pitch] int32 lists the candidates chosen."""
    s = tl.program_id(0).to(tl.int64)
    first, count = segment_of(cu_crops, s, crops, patches, most)
    i = tl.arange(0, N_PAD)
    inside = i < columns_of(count)
    left = valid_candidates(valid, first, i, count)
    begin, end = panel_of(steps_of(budgets, s, left), panel, PANELS)
    weight = weights_of(quality, first, i, count)
    covariance += s * most * pitch
    order += s * pitch
    if FIRST:
        rank = tl.full([N_PAD], NOT_CHOSEN, tl.int32)
    else:
        rank = tl.load(ranks + first + i, mask=i < count, other=0).to(tl.int32)
        left = left & (rank == NOT_CHOSEN)
    variance = tl.load(covariance + i.to(tl.int64) * (pitch + 1), mask=i < count, other=0.0)
    for step in range(begin, end):
        chosen = best_of(tl.maximum(variance, FLOOR) * weight * weight, i, left)
        row = covariance + chosen.to(tl.int64) * pitch
        e = tl.load(row + i, mask=inside, other=0.0)
        for earlier in tl.range(begin, step, loop_unroll_factor=UNROLL):
            other = covariance + tl.load(order + earlier).to(tl.int64) * pitch
            e -= tl.load(other + chosen) * tl.load(other + i, mask=inside, other=0.0)
        own = tl.sum(tl.where(i == chosen, variance, 0.0), 0)
        root = tl.sqrt_rn(tl.maximum(own, FLOOR))
        e = tl.where(own > FLOOR, tl.div_rn(e, root + tl.zeros_like(e)), 0.0)
        variance -= e * e
        tl.debug_barrier()
        tl.store(row + i, e, mask=inside)
        tl.store(order + step, chosen)
        rank = tl.where(i == chosen, step, rank)
        left = left & (i != chosen)
        tl.debug_barrier()
    tl.store(ranks + first + i, rank.to(tl.int16), mask=i < count)


@triton.jit(do_not_specialize=["panel"])
def dpp_update_kernel(
    covariance,
    order,
    budgets,
    valid,
    cu_crops,
    ranks,
    crops,
    patches,
    most,
    pitch,
    panel,
    PANELS: tl.constexpr,
    N_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Subtract the products of a panel from the rows of candidates that are left; others hold their e."""
    s = tl.program_id(2).to(tl.int64)
    first, count = segment_of(cu_crops, s, crops, patches, most)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if (tl.program_id(0) * BLOCK < count) & (tl.program_id(1) * BLOCK < count):
        ok = valid_candidates(valid, first, tl.arange(0, N_PAD), count)
        begin, end = panel_of(steps_of(budgets, s, ok), panel, PANELS)
        covariance += s * most * pitch
        order += s * pitch
        left = tl.load(ranks + first + i, mask=i < count, other=0) == NOT_CHOSEN
        place = covariance + i[:, None].to(tl.int64) * pitch + j[None, :]
        inside = left[:, None] & (j < columns_of(count))[None, :]
        rest = tl.load(place, mask=inside, other=0.0)
        for step in tl.range(begin, end, loop_unroll_factor=UNROLL):
            row = covariance + tl.load(order + step).to(tl.int64) * pitch
            e_i = tl.load(row + i, mask=i < columns_of(count), other=0.0)
            e_j = tl.load(row + j, mask=j < columns_of(count), other=0.0)
            rest -= e_i[:, None] * e_j[None, :]
        tl.store(place, rest, mask=inside)


def segmented_diverse_topk(features, budgets, rule, quality, valid, cu_crops, max_crops):
    crops, patches, width = features.shape
    check_width(features)
    device = features.device
    most = patches * (1 if cu_crops is None else max_crops)
    count = crops if cu_crops is None else len(cu_crops) - 1
    ranks = torch.empty((crops, patches), dtype=torch.int16, device=device)
    padded, pitch = blocks(width, CHUNK) * CHUNK, blocks(most, 16) * 16
    rounded = torch.empty((crops * patches, padded), dtype=torch.float16, device=device)
    options = _launch.configuration("round_features", width, device)
    _launch.launch(
        round_features_kernel,
        (blocks(crops * patches, options["ROWS"]),),
        features=features,
        rounded=rounded,
        strides=features.stride(),
        rows=crops * patches,
        patches=patches,
        width=width,
        padded=padded,
        D_PAD=power_of_2(width, CHUNK),
        enable_fp_fusion=False,
        **options,
    )
    kind = torch.float32 if rule == "dpp" else torch.int16
    workspace = torch.empty((count, most, pitch), dtype=kind, device=device)
    options = _launch.configuration("similarities", most, device)
    slots = blocks(most, options["BLOCK"])
    starts = torch.empty((count, slots, pitch), dtype=torch.int32, device=device) if rule != "dpp" else None
    shared = {
        "valid": as_bytes(valid),
        "cu_crops": None if cu_crops is None else cu_crops.contiguous(),
        "crops": crops,
        "patches": patches,
        "most": most,
        "pitch": pitch,
        "enable_fp_fusion": False,  # values are rounded as the reference rounds them
    }
    _launch.launch(
        similarities_kernel,
        (slots, slots, count),
        rounded=rounded,
        similarities=workspace,
        starts=starts,
        padded=padded,
        RULE=rule,
        UPCAST=SWITCHES.interpret,
        **options,
        **shared,
    )
    shared |= {"budgets": budgets.contiguous(), "ranks": ranks, "N_PAD": power_of_2(most, 16)}
    if rule != "dpp":
        shared |= {"similarities": workspace, "starts": starts, "slots": slots, "BLOCK": options["BLOCK"]}
    quality = None if quality is None else quality.contiguous()
    chain = _launch.configuration(rule, most, device)
    if rule == "max_min":
        _launch.launch(max_min_kernel, (count,), **shared, **chain)
    elif rule == "coverage":
        risen = torch.empty((count, pitch), dtype=torch.int64, device=device)
        _launch.launch(coverage_kernel, (count,), risen=risen, quality=quality, **shared, **chain)
    else:
        shared |= {"covariance": workspace, "PANELS": chain.pop("PANELS")}
        shared["order"] = torch.empty((count, pitch), dtype=torch.int32, device=device)
        update = _launch.configuration("dpp_update", most, device)
        tiles = blocks(most, update["BLOCK"])
        for panel in range(shared["PANELS"]):
            if panel:
                _launch.launch(dpp_update_kernel, (tiles, tiles, count), panel=panel - 1, **shared, **update)
            _launch.launch(
                dpp_kernel, (count,), quality=quality, panel=panel, FIRST=panel == 0, **shared, **chain
            )
    return ranks
