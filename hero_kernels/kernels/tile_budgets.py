"""Token budgets of the tiles of each image: shares, fixed point, apportionment.

    share_i = Σ_s w_s · signal_s,i          each signal normalised over the tiles of its image
    weight_i = floor(share_i · 2²⁴ + ½)
    budget = largest remainder of ``tile_tokens`` over the weights, with caps    (docs/method.md, 2 and 3)

Shapes: table [B, columns] int32, valid_counts [T] int32 or int64, up to four signals [T] in fp32, fp16 or
bf16; budgets and weights [T] int32, shares [T] fp32. All contiguous.

Grid (B,): one program per image, one lane per crop. The latency of a program is the cost: one warp, so
that no reduction crosses warps, and few reductions. Shares are fp32; from the weights on all arithmetic is in
integers, so budgets equal those of the reference on the same weights, and the weights are returned for the
check. There are 64 lanes; 256 lanes and eight warps if an image of the batch has more crops. The result of
another image must not depend on that: sums of a signal are exact, so that their order decides nothing.

Bytes: T·(signals + 4)·4; the launch dominates.

Source: HERO's allocation and the largest-remainder method (docs/method.md, 2 and 3).
"""

import torch
import triton
import triton.language as tl

from .. import _launch
from ..segments import TileBudgets
from .common import CROPS, FIRST_CROP, THUMBNAIL, THUMBNAIL_TOKENS, TILE_TOKENS, WIDTH

LANES = (64, 256)  # crops of an image: tiles and a thumbnail
FIXED_POINT = tl.constexpr(16777216.0)
TILE = tl.constexpr(1 << 40)  # above any sum of weights
TINY = torch.finfo(torch.float32).tiny


@triton.jit
def exact_sum(e, most):
    """The sum of numbers from 0 to ``most``, in fp64.

    Each is first rounded to a multiple of the last place of 512 · most, which is at most 2⁻⁴³ · most. Sums of
    up to 256 of them are below 512 · most, and such multiples too: no addition is rounded.
    """
    large = most.to(tl.float64) * 512.0
    return tl.sum((e.to(tl.float64) + large) - large, 0)


@triton.jit
def normalised(values, temperature, crop, is_tile, tiles):
    """A signal normalised to sum 1 over the tiles: softmax, or division by the sum without a temperature.

    Equal parts where the sum is zero or beyond fp32.
    """
    v = tl.load(values + crop, mask=is_tile, other=0.0).to(tl.float32)
    if temperature is not None:
        top = tl.max(tl.where(is_tile, v, float("-inf")), 0)
        e = tl.where(is_tile, tl.exp(tl.div_rn(v - top, temperature)), 0.0)
        most = tl.full([], 1.0, tl.float32)
    else:
        e = tl.where(is_tile & ((v > 0.0) | (v != v)), v, 0.0)
        most = tl.max(e, 0)
    total = exact_sum(e, most).to(tl.float32)
    has_sum = (total > 0.0) & (total < float("inf"))  # NaN is neither
    part = tl.where(has_sum, e, 1.0)
    whole = tl.where(has_sum, total, tl.maximum(tiles, 1).to(tl.float32))
    return tl.where(is_tile, tl.div_rn(part, whole + tl.zeros_like(e)), 0.0)


@triton.jit
def fixed_point(share):
    """``floor(share · 2²⁴ + ½)`` exactly: the sum with ½ could round, the comparison cannot."""
    scaled = share * FIXED_POINT
    whole = tl.floor(scaled)
    return whole.to(tl.int64) + (scaled - whole >= 0.5).to(tl.int64)


@triton.jit
def apportion(weight, cap, is_tile, total):
    """Largest remainder with caps, in int64 (docs/method.md, 3): sums to ``min(total, Σ cap)``.

    Tiles whose quota reaches their cap are fixed at the cap and removed, until none is left to fix; quotas
    are compared by cross-multiplication. At most 256 tiles of 4096 patches hold 2²⁰ tokens, and weights sum
    to about 2²⁴: products stay below 2⁴⁵, sums with TILE below 2⁴⁹, sort keys below 2³¹ with 64 lanes and
    2³³ with 256.
    """
    lane = tl.arange(0, weight.shape[0])
    cap = tl.where(is_tile, cap, 0)
    active = cap > 0
    left = tl.minimum(total, tl.sum(cap, 0))
    budget = tl.zeros_like(cap)
    w, whole, fixed = budget, left, left + 1  # the loop sets them, and runs at least once
    while fixed > 0:
        # One sum for the weights and, above them, the number of tiles: these are equal where all weigh 0.
        both = tl.sum(tl.where(active, weight + TILE, 0), 0)
        whole = both % TILE
        w = tl.where(whole > 0, weight, 1)
        whole = tl.where(whole > 0, whole, both // TILE)
        full = active & (left * w >= cap * whole)
        budget = tl.where(full, cap, budget)
        active = active & (full == 0)
        fixed = tl.sum(tl.where(full, cap, 0), 0)
        left -= fixed
    product = tl.where(active, left * w, 0)
    whole = tl.maximum(whole, 1)
    quota = product // whole
    remainder = product - quota * whole
    left -= tl.sum(quota, 0)
    # Sort key of each tile, larger where it comes first: by remainder, then by lower index.
    if weight.shape[0] <= 64:
        remainder = remainder.to(tl.int32)
    order = remainder * weight.shape[0] + (weight.shape[0] - 1 - lane)
    order = tl.where(active, order, -1)
    before = tl.sum((order[:, None] > order[None, :]).to(tl.int32), 0)  # over rows: each thread by itself
    return budget + quota + (active & (before < left)).to(tl.int64)


@triton.jit
def apportion_floor(weight, cap, is_tile, total):
    """The rule of the released code: the floor of each quota, at most the cap; the remainder is lost."""
    weight = tl.where(is_tile, weight, 0)
    quota = total * weight // tl.maximum(tl.sum(weight, 0), 1)
    return tl.where(is_tile, tl.minimum(quota, cap), 0)


@triton.jit
def tile_budgets_kernel(
    table,
    valid_counts,
    signals,  # tuples with one entry per signal
    signal_weights,
    temperatures,
    budgets,
    shares,
    weights,
    patches,
    LANES: tl.constexpr,
    EXACT: tl.constexpr,
):
    image = table + tl.program_id(0) * WIDTH
    lane = tl.arange(0, LANES)
    crop = tl.load(image + FIRST_CROP) + lane
    crops = tl.load(image + CROPS)
    thumbnail = tl.load(image + THUMBNAIL)
    tiles = crops - (thumbnail >= 0).to(tl.int32)
    inside = lane < crops
    is_tile = inside & (lane != thumbnail)
    share = tl.zeros([LANES], tl.float32)
    for s in tl.static_range(len(signals)):
        share += signal_weights[s] * normalised(signals[s], temperatures[s], crop, is_tile, tiles)
    weight = fixed_point(share)
    cap = tl.load(valid_counts + crop, mask=inside, other=0)
    cap = tl.maximum(tl.minimum(cap, patches), 0).to(tl.int64)
    tile_tokens = tl.load(image + TILE_TOKENS).to(tl.int64)
    if EXACT:
        budget = apportion(weight, cap, is_tile, tile_tokens)
    else:
        budget = apportion_floor(weight, cap, is_tile, tile_tokens)
    thumbnail_tokens = tl.load(image + THUMBNAIL_TOKENS).to(tl.int64)
    budget = tl.where(lane == thumbnail, tl.minimum(thumbnail_tokens, cap), budget)
    tl.store(budgets + crop, budget.to(tl.int32), mask=inside)
    tl.store(shares + crop, share, mask=inside)
    tl.store(weights + crop, weight.to(tl.int32), mask=inside)


def lanes_of(segments) -> int:
    """The number of lanes that hold the crops of each image.

    Raises:
        ValueError: an image has more crops than a program can have lanes.
    """
    for lanes in LANES:
        if segments.most_crops <= lanes:
            return lanes
    number = [image.crops for image in segments.images].index(segments.most_crops)
    expected = f"at most {LANES[-1]} crops on a GPU, got {segments.most_crops}"
    raise ValueError(f"segments.images[{number}]: expected {expected}")


def tile_budgets(signals, valid_counts, segments, allocation):
    lanes = lanes_of(segments)
    device = valid_counts.device
    result = TileBudgets(
        torch.empty(segments.crops, dtype=torch.int32, device=device),
        torch.empty(segments.crops, dtype=torch.float32, device=device),
        torch.empty(segments.crops, dtype=torch.int32, device=device),
    )
    total = sum(signal.weight for signal in signals)
    _launch.launch(
        tile_budgets_kernel,
        (len(segments.images),),
        table=segments.table(device),
        valid_counts=valid_counts.contiguous(),
        signals=tuple(signal.values.contiguous() for signal in signals),
        # Triton would pass numbers too small for fp32 as fp64.
        signal_weights=tuple(
            part if part >= TINY else 0.0 for part in (float(signal.weight / total) for signal in signals)
        ),
        temperatures=tuple(None if s.temperature is None else float(s.temperature) for s in signals),
        **result._asdict(),
        patches=segments.patches,
        LANES=lanes,
        EXACT=allocation == "exact",
        enable_fp_fusion=False,  # shares are rounded as the reference rounds them
        **_launch.configuration("tile_budgets", lanes, device),
    )
    return result
