"""Token budgets of the tiles of each image: shares, fixed point, apportionment (docs/method.md, 2 and 3).

    share_i = Σ_s w_s · signal_s,i          each signal normalised over the tiles of its image
    weight_i = floor(share_i · 2²⁴ + ½)
    budget = largest remainder of ``tile_tokens`` over the weights, with caps

Grid (B,): one program an image, one lane a crop. Shares are fp32; from the weights on everything is
integers, so that budgets equal the twin's on the same weights, and the weights are returned for the check.
There are always LANES lanes, whatever the batch holds: the order of sums must not depend on neighbours.
"""

import torch
import triton
import triton.language as tl

from .._launch import configuration, launch
from ..segments import MAX_SIGNALS, TileBudgets
from .common import CROPS, FIRST_CROP, THUMBNAIL, THUMBNAIL_TOKENS, TILE_TOKENS, WIDTH

LANES = 64  # crops of an image: 63 tiles and a thumbnail
FIXED_POINT = tl.constexpr(16777216.0)


@triton.jit
def part(values, stride, temperature, crop, is_tile, SOFTMAX: tl.constexpr):
    """A signal normalised to sum 1 over the tiles: softmax, or a share of the sum.

    Equal parts where there is nothing to divide, or fp32 does not reach.
    """
    v = tl.load(values + crop.to(tl.int64) * stride, mask=is_tile, other=0.0).to(tl.float32)
    count = tl.sum(is_tile.to(tl.int32), 0).to(tl.float32)
    if SOFTMAX:
        top = tl.max(tl.where(is_tile, v, float("-inf")), 0)
        e = tl.where(is_tile, tl.exp(tl.div_rn(v - top, temperature)), 0.0)
    else:
        e = tl.where(is_tile & ((v > 0.0) | (v != v)), v, 0.0)
    total = tl.sum(e, 0)
    share = tl.div_rn(e, tl.where(total > 0.0, total, 1.0) + tl.zeros_like(e))
    whole = tl.sum(tl.where(is_tile, share, 0.0), 0)
    even = tl.div_rn(tl.full(share.shape, 1.0, tl.float32), tl.maximum(count, 1.0) + tl.zeros_like(share))
    share = tl.where((whole > 0.5) & (whole < 1.5), share, even)  # NaN is neither
    return tl.where(is_tile, share, 0.0)


@triton.jit
def shares_of(
    signal_0,
    signal_1,
    signal_2,
    signal_3,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    weight_0,
    weight_1,
    weight_2,
    weight_3,
    temperature_0,
    temperature_1,
    temperature_2,
    temperature_3,
    crop,
    is_tile,
    SIGNALS: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """Shares of the tiles, fp32; bit s of SOFTMAX says how signal s is normalised."""
    share = weight_0 * part(signal_0, stride_0, temperature_0, crop, is_tile, SOFTMAX & 1 != 0)
    if SIGNALS > 1:
        share += weight_1 * part(signal_1, stride_1, temperature_1, crop, is_tile, SOFTMAX & 2 != 0)
    if SIGNALS > 2:
        share += weight_2 * part(signal_2, stride_2, temperature_2, crop, is_tile, SOFTMAX & 4 != 0)
    if SIGNALS > 3:
        share += weight_3 * part(signal_3, stride_3, temperature_3, crop, is_tile, SOFTMAX & 8 != 0)
    return share


@triton.jit
def fixed_point(share):
    """``floor(share · 2²⁴ + ½)`` exactly: the sum with ½ could round, the comparison cannot."""
    scaled = share * FIXED_POINT
    whole = tl.floor(scaled)
    return whole.to(tl.int64) + (scaled - whole >= 0.5).to(tl.int64)


@triton.jit
def apportion(weight, cap, is_tile, total):
    """Largest remainder with caps, in int64 (docs/method.md, 3): sums to ``min(total, Σ cap)``.

    Tiles whose quota reaches their cap are fixed at it and leave, until none does; quotas are compared by
    cross-multiplication. At most 63 tiles of 4096 patches and weights of 2²⁴: products stay below 2⁴³.
    """
    lane = tl.arange(0, weight.shape[0])
    cap = tl.where(is_tile, cap, 0)
    active = cap > 0
    left = tl.minimum(total, tl.sum(cap, 0))
    budget = tl.zeros_like(cap)
    whole = tl.sum(tl.where(active, weight, 0), 0)
    w = tl.where(whole > 0, weight, 1)
    whole = tl.where(whole > 0, whole, tl.sum(active.to(tl.int64), 0))
    full = active & (left * w >= cap * whole)
    some = tl.sum(full.to(tl.int32), 0)
    while some > 0:
        budget = tl.where(full, cap, budget)
        left -= tl.sum(tl.where(full, cap, 0), 0)
        active = active & (full == 0)
        whole = tl.sum(tl.where(active, weight, 0), 0)
        w = tl.where(whole > 0, weight, 1)
        whole = tl.where(whole > 0, whole, tl.sum(active.to(tl.int64), 0))
        full = active & (left * w >= cap * whole)
        some = tl.sum(full.to(tl.int32), 0)
    product = tl.where(active, left * w, 0)
    whole = tl.maximum(whole, 1)
    quota = product // whole
    remainder = product - quota * whole
    left -= tl.sum(quota, 0)
    # One number a tile, larger where it comes first: by remainder, then the lower tile.
    order = tl.where(active, remainder * weight.shape[0] + (weight.shape[0] - 1 - lane), -1)
    before = tl.sum((order[None, :] > order[:, None]).to(tl.int64), 1)
    return budget + quota + (active & (before < left)).to(tl.int64)


@triton.jit
def apportion_floor(weight, cap, is_tile, total):
    """The released rule: the floor of each quota, at most the cap; leftovers are lost."""
    weight = tl.where(is_tile, weight, 0)
    quota = total * weight // tl.maximum(tl.sum(weight, 0), 1)
    return tl.where(is_tile, tl.minimum(quota, cap), 0)


@triton.jit
def budgets_of(share, cap, lane, is_tile, image, EXACT: tl.constexpr):
    """(budgets, weights) of an image's crops, both int64; ``image`` is its row of the table."""
    weight = fixed_point(share)
    tile_tokens = tl.load(image + TILE_TOKENS).to(tl.int64)
    if EXACT:
        budget = apportion(weight, cap, is_tile, tile_tokens)
    else:
        budget = apportion_floor(weight, cap, is_tile, tile_tokens)
    thumbnail_tokens = tl.load(image + THUMBNAIL_TOKENS).to(tl.int64)
    budget = tl.where(lane == tl.load(image + THUMBNAIL), tl.minimum(thumbnail_tokens, cap), budget)
    return budget, weight


@triton.jit
def tile_budgets_kernel(
    table,
    valid_counts,
    stride_counts,
    signal_0,
    signal_1,
    signal_2,
    signal_3,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    weight_0,
    weight_1,
    weight_2,
    weight_3,
    temperature_0,
    temperature_1,
    temperature_2,
    temperature_3,
    budgets,
    shares,
    weights,
    LANES: tl.constexpr,
    SIGNALS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    EXACT: tl.constexpr,
):
    image = table + tl.program_id(0) * WIDTH
    lane = tl.arange(0, LANES)
    crop = tl.load(image + FIRST_CROP) + lane
    inside = lane < tl.load(image + CROPS)
    is_tile = inside & (lane != tl.load(image + THUMBNAIL))
    share = shares_of(
        signal_0,
        signal_1,
        signal_2,
        signal_3,
        stride_0,
        stride_1,
        stride_2,
        stride_3,
        weight_0,
        weight_1,
        weight_2,
        weight_3,
        temperature_0,
        temperature_1,
        temperature_2,
        temperature_3,
        crop,
        is_tile,
        SIGNALS,
        SOFTMAX,
    )
    cap = tl.load(valid_counts + crop * stride_counts, mask=inside, other=0).to(tl.int64)
    budget, weight = budgets_of(share, cap, lane, is_tile, image, EXACT)
    tl.store(budgets + crop, budget.to(tl.int32), mask=inside)
    tl.store(shares + crop, share, mask=inside)
    tl.store(weights + crop, weight.to(tl.int32), mask=inside)


def check_crops(segments) -> None:
    """An image's crops are the lanes of one program."""
    for number, image in enumerate(segments.images):
        if image.crops > LANES:
            raise ValueError(
                f"segments.images[{number}]: expected at most {LANES} crops on a GPU, got {image.crops}"
            )


def signal_arguments(signals, some) -> tuple[list, dict[str, int]]:
    """Pointers, strides, weights (of sum 1), temperatures of MAX_SIGNALS signals; and what is constant."""
    total = sum(signal.weight for signal in signals)
    spare = MAX_SIGNALS - len(signals)
    soft = [signal.temperature is not None for signal in signals]
    return [
        *(signal.values for signal in signals),
        *[some] * spare,
        *(signal.values.stride(0) for signal in signals),
        *[0] * spare,
        *(float(signal.weight / total) for signal in signals),
        *[0.0] * spare,
        *(float(signal.temperature or 1.0) for signal in signals),
        *[1.0] * spare,
    ], {"SIGNALS": len(signals), "SOFTMAX": sum(is_soft << bit for bit, is_soft in enumerate(soft))}


def empty_budgets(crops: int, device: torch.device) -> TileBudgets:
    return TileBudgets(
        torch.empty(crops, dtype=torch.int32, device=device),
        torch.empty(crops, dtype=torch.float32, device=device),
        torch.empty(crops, dtype=torch.int32, device=device),
    )


def tile_budgets(signals, valid_counts, segments, *, allocation="exact"):
    check_crops(segments)
    device = valid_counts.device
    result = empty_budgets(segments.crops, device)
    arguments, flags = signal_arguments(signals, valid_counts)
    launch(
        tile_budgets_kernel,
        (len(segments.images),),
        *(segments.table(device), valid_counts, valid_counts.stride(0), *arguments, *result),
        LANES=LANES,
        EXACT=allocation == "exact",
        enable_fp_fusion=False,  # shares as the twin adds them
        **flags,
        **configuration("tile_budgets", LANES, device),
    )
    return result
