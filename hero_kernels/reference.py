"""The reference: every operation in plain PyTorch. It is the specification, and the path without kernels.

Each function has the name and signature of the operation it specifies. The operations in
:mod:`hero_kernels.ops` document and check the arguments. Section numbers are those of ``docs/method.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ._diverse import segmented_diverse_topk
from .segments import Finalized, Gathered, Segment, Segments, TileBudgets, TileSignal, to_device

__all__ = [
    "attention_with_cls",
    "cls_attention",
    "finalize_scores",
    "rarity",
    "received_attention",
    "segmented_diverse_topk",
    "segmented_topk",
    "segmented_topk_gather",
    "tile_budgets",
]

FIXED_POINT = 1 << 24
LANES = 64  # see Lanes
QUERIES = 1024  # see _received_packed


# --- attention rows and scores ---------------------------------------------------------------------------


def _accumulate(rows: Tensor, weight: float | Tensor, out: Tensor | None) -> Tensor:
    """``out += weight · rows``, ``rows`` [T, H, n], a tensor of weights [T] or [1, 1, n]; 0 adds nothing."""
    if isinstance(weight, Tensor):
        weight = weight[:, None, None] if weight.dim() == 1 else weight
        rows = (rows * weight).masked_fill(weight == 0, 0.0)
    else:
        rows = rows * weight if weight else torch.zeros_like(rows)
    return rows if out is None else out.add_(rows)


def split_scale(scale: float) -> tuple[float, float]:
    """A power of two and a factor whose product is ``scale``, for :func:`_logits`."""
    power = 2.0 ** min(max(math.frexp(scale)[1] - 9, -126), 0) if scale else 0.0
    return power, scale / power if scale else 1.0


def _logits(equation: str, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """``scale · query · key`` in fp32.

    The query takes a power of two of the scale, which does not change how results are rounded. Sums of up to
    256 products then fit fp32 wherever the logits do.
    """
    power, factor = split_scale(scale)
    return torch.einsum(equation, query.float() * power, key.float()) * factor


def cls_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
    second_softmax: bool = False,
) -> Tensor:
    """Row 0 of the softmax of all logits, without the CLS column, per head (§1)."""
    logits = _logits("thd,thnd->thn", query[:, :, 0], key, scale)
    rows = logits.softmax(-1)[..., 1:]
    if second_softmax:
        rows = rows.softmax(-1)
    return _accumulate(rows, weight, out)


def attention_with_cls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
    second_softmax: bool = False,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in fp32, and the rows of :func:`cls_attention` (§1)."""
    logits = _logits("thmd,thnd->thmn", query, key, scale)
    output = torch.einsum("thmn,thnd->thmd", logits.softmax(-1), value.float()).to(query.dtype)
    rows = cls_attention(
        *(query.detach(), key.detach(), scale),
        weight=weight,
        out=out,
        second_softmax=second_softmax,
    )
    return output, rows


def received_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """The mean of the attention map over queries, per head, within each crop or segment (§1)."""
    if cu_seqlens is not None:
        if isinstance(weight, Tensor):
            weight = weight.repeat_interleave(cu_seqlens.diff())[None, None]
        return _accumulate(_received_packed(query, key, scale, lse, cu_seqlens), weight, out)
    rows = []
    for head in range(key.shape[1]):  # the N × N maps of all heads would not fit
        logits = _logits("tmd,tnd->tmn", query[:, head], key[:, head], scale)
        maps = logits.softmax(-1) if lse is None else (logits - lse[:, head, :, None]).exp()
        rows.append(maps.mean(1))
    rows = torch.stack(rows, dim=1) if rows else key.new_empty(key.shape[:3], dtype=torch.float32)
    return _accumulate(rows, weight, out)


def _received_packed(
    query: Tensor, key: Tensor, scale: float, lse: Tensor | None, cu_seqlens: Tensor
) -> Tensor:
    """``[1, H, N]`` of segments, each computed by itself, QUERIES queries at a time: its map would not fit.

    Keys are copied, since the product of the same numbers at other addresses may be rounded otherwise.
    """
    rows = key.new_zeros(key.shape[:3], dtype=torch.float32)
    for begin, end in pairwise(cu_seqlens.tolist()):
        for head in range(key.shape[1]):
            keys = key[0, head, begin:end].clone(memory_format=torch.contiguous_format)
            for start in range(begin, end, QUERIES):
                some = slice(start, min(start + QUERIES, end))
                logits = _logits("md,nd->mn", query[0, head, some], keys, scale)
                maps = logits.softmax(-1) if lse is None else (logits - lse[0, head, some, None]).exp()
                rows[0, head, begin:end] += maps.sum(0)
        rows[:, :, begin:end] /= max(end - begin, 1)
    return rows


def finalize_scores(rows: Tensor, *, valid: Tensor | None = None, rank: bool = False) -> Finalized:
    """The mean over heads, its normalised entropy over valid patches, and ranks (§1, §2, §4)."""
    scores = rows.mean(1)
    some = scores > 0.0 if valid is None else valid & (scores > 0.0)
    weight = scores.masked_fill(~some, 0.0)
    total = weight.sum(1, keepdim=True)
    share = weight / total.clamp_min(torch.finfo(torch.float32).tiny)
    entropy = -torch.special.xlogy(share, share).sum(1)
    count = torch.full_like(entropy, scores.shape[1]) if valid is None else valid.sum(1).float()
    entropy = torch.where((total[:, 0] > 0) & total[:, 0].isfinite(), entropy, count.clamp_min(1.0).log())
    ranks = _ranks(scores, valid).to(torch.int16) if rank else None
    return Finalized(scores, entropy, ranks)


# --- budgets ---------------------------------------------------------------------------------------------


class Lanes(NamedTuple):
    """The images of a batch as rows of lanes, one crop per lane, so that all are computed at once.

    A row has LANES lanes, or a multiple of them where an image of the batch has more crops. The order in
    which a row is summed must not depend on the other images: see :func:`_sums` and :func:`_softmax`.

    Attributes:
        crop: ``[B, L]`` int64, the crop of each lane; 0 where there is none.
        no_tile: ``[B, L]`` bool, thumbnails and lanes without a crop.
        equal: ``[B, L]`` fp32, equal parts of the tiles of an image.
        thumbnail_tokens: ``[B, most]`` int64, at the thumbnail; −1 elsewhere.
        tile_tokens: ``[B, 1]`` int64.
        image: ``[T]`` int64, the row of each crop.
        place: ``[T]`` int64, where each crop is among the first ``most`` lanes, flattened.
        most: crops of the largest image; no lane beyond has one.
    """

    crop: Tensor
    no_tile: Tensor
    equal: Tensor
    thumbnail_tokens: Tensor
    tile_tokens: Tensor
    image: Tensor
    place: Tensor
    most: int


def _lanes(segments: Segments, device: torch.device) -> Lanes:
    """The lanes of the images on a device; stored with the segments."""
    return segments.stored("lanes", device, lambda: _make_lanes(segments, device))


def _make_lanes(segments: Segments, device: torch.device) -> Lanes:
    images = segments.images
    crops, thumbnail, thumbnail_tokens, tile_tokens, tiles = (
        torch.tensor([getattr(image, name) for image in images])[:, None]
        for name in ("crops", "thumbnail", "thumbnail_tokens", "tile_tokens", "tiles")
    )
    first, most = torch.tensor(segments.first_crops[:-1])[:, None], int(crops.max())
    lane = torch.arange(-(-most // LANES) * LANES)
    inside, is_thumbnail = lane < crops, lane == thumbnail
    is_tile = inside & ~is_thumbnail
    tensors = (
        torch.where(inside, first + lane, 0),
        ~is_tile,
        is_tile / tiles.clamp_min(1),
        torch.where(is_thumbnail, thumbnail_tokens, -1)[:, :most],
        tile_tokens,
        inside.nonzero()[:, 0],
        inside[:, :most].flatten().nonzero()[:, 0],
    )
    return Lanes._make([*(to_device(tensor, device) for tensor in tensors), most])


def _sums(rows: Tensor) -> Tensor:
    """``[B, 1]``: groups of LANES are summed first, then one by one, and groups of zeros change nothing."""
    return reduce(torch.add, rows.unflatten(1, (-1, LANES)).sum(2, keepdim=True).unbind(1))


def _softmax(rows: Tensor) -> Tensor:
    """Softmax of rows whose largest number is 0; where the first LANES lanes hold a row, that of these."""
    first = rows[:, :LANES].softmax(1)
    if rows.shape[1] == LANES:
        return first
    powers = rows.exp()
    few = (powers[:, LANES:] == 0.0).all(1, keepdim=True)
    first = torch.nn.functional.pad(first, (0, rows.shape[1] - LANES))
    return torch.where(few, first, powers / _sums(powers))


def _part(signal: TileSignal, lanes: Lanes) -> Tensor:
    """A signal normalised to sum 1 over the tiles of each image: ``[B, L]`` fp32, 0 elsewhere (§2)."""
    values = signal.values.float()[lanes.crop]
    if signal.temperature is None:
        values = values.clamp_min(0.0).masked_fill(lanes.no_tile, 0.0)
        return values / _sums(values)
    values = values.masked_fill(lanes.no_tile, -torch.inf)
    return _softmax((values - values.amax(1, keepdim=True)) / signal.temperature)


def _shares(signals: Sequence[TileSignal], lanes: Lanes) -> Tensor:
    """Weighted mean of the normalised signals of each tile, 0 elsewhere: ``[B, L]`` fp32 (§2)."""
    total_weight = sum(signal.weight for signal in signals)
    parts = torch.stack([_part(signal, lanes) for signal in signals])
    whole = parts.sum(2, keepdim=True)  # NaN where the sum is zero or overflows fp32
    parts = torch.where((whole - 1.0).abs() < 0.5, parts, lanes.equal)
    return sum((signal.weight / total_weight) * part for signal, part in zip(signals, parts, strict=True))


def _apportion(total: Tensor, weights: Tensor, caps: Tensor) -> Tensor:
    """Largest remainder with caps, in int64: rows sum to ``min(total, Σ caps)`` (§3).

    If the tiles with positive weight cannot take the whole total, they are full, and the tiles of weight 0
    divide the rest equally.

    Water-filling: the level rises in all tiles at once, in each in proportion to its weight. When it reaches
    the cap of tile j, tile i holds ``min(cap_j · weight_i / weight_j, cap_i)``; tile j is full if the sum
    over i is at most the total. The other tiles get the floor of their quota of the rest, and the remaining
    tokens go one by one to the largest remainders, ties to the lower index.

    Args:
        total: ``[B, 1]``, below 2³¹.
        weights: ``[B, K]``, with a sum of at most about 2²⁴, so that no product or sum reaches 2⁶³.
        caps: ``[B, K]``, below 2³¹; 0 where there is no tile.
    """
    left = torch.minimum(total, caps.sum(1, keepdim=True))
    weighted = caps.masked_fill(weights == 0, 0)
    spills = left >= weighted.sum(1, keepdim=True)
    budgets = weighted * spills
    left = left - budgets.sum(1, keepdim=True)
    weights = torch.where(spills, weights == 0, weights)

    reached = caps[:, :, None] * weights[:, None, :]  # times weight_j: [B, j, i]
    held = torch.minimum(reached, reached.mT).sum(2)
    full = (weights > 0) & (left * weights >= held)
    filled = caps.masked_fill(~full, 0)
    budgets = budgets + filled
    left = left - filled.sum(1, keepdim=True)

    weights = weights.masked_fill(full, 0)
    product, whole = left * weights, weights.sum(1, keepdim=True).clamp_min(1)
    quota = product // whole
    left = left - quota.sum(1, keepdim=True)
    place = (product % whole).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return budgets + quota + (place < left)


def _apportion_floor(total: Tensor, weights: Tensor, caps: Tensor) -> Tensor:
    """The rule of the released code: the floor of each quota, at most the cap; the remainder is lost (§3)."""
    return torch.minimum(total * weights // weights.sum(1, keepdim=True).clamp_min(1), caps)


def tile_budgets(
    signals: Sequence[TileSignal],
    valid_counts: Tensor,
    segments: Segments,
    *,
    allocation: str = "exact",
) -> TileBudgets:
    """Shares of the tiles, rounded to integers, divided by largest remainders with caps (§2, §3)."""
    rule = _apportion if allocation == "exact" else _apportion_floor
    lanes = _lanes(segments, valid_counts.device)
    shares = _shares(signals, lanes)[:, : lanes.most]
    weights = (shares.double() * FIXED_POINT + 0.5).floor().long()  # fp32 could not hold the sum
    counts = valid_counts.long().clamp(0, segments.patches)[lanes.crop[:, : lanes.most]]
    caps = counts.masked_fill(lanes.no_tile[:, : lanes.most], 0)
    budgets = rule(lanes.tile_tokens, weights, caps)
    thumbnails = torch.minimum(lanes.thumbnail_tokens, counts)
    budgets = torch.where(lanes.thumbnail_tokens < 0, budgets, thumbnails)
    rows = (budgets.to(torch.int32), shares, weights.to(torch.int32))
    return TileBudgets(*(row.flatten().index_select(0, lanes.place) for row in rows))


# --- rarity ----------------------------------------------------------------------------------------------


def rarity(features: Tensor, segments: Segments, valid: Tensor | None = None) -> Tensor:
    """1 less the product of each unit vector with the mean of those of its pool.

    Pools are the tiles and the thumbnail of each image. They are summed in fp64, crop by crop, so that the
    batch does not change the fp32 result.
    """
    lanes = _lanes(segments, features.device)
    pools = 2 * lanes.image + (lanes.thumbnail_tokens >= 0).flatten()[lanes.place]
    x = features.float()
    length = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    square = length * length
    some = (square >= torch.finfo(torch.float32).tiny) & square.isfinite()
    counted = torch.ones_like(some[..., 0]) if valid is None else valid
    some = some & counted[..., None]
    unit = (x / length).masked_fill_(~some, 0.0)
    sums = torch.cat([unit.sum(1), counted.sum(1, keepdim=True)], dim=1).double()
    sums = sums.new_zeros((2 * len(segments.images), sums.shape[1])).index_add_(0, pools, sums)[pools]
    means = (sums[:, :-1] / sums[:, -1:].clamp_min(1.0)).float()
    return (1.0 - unit.mul_(means[:, None]).sum(2)).clamp_min(0.0)


# --- selection -------------------------------------------------------------------------------------------


def _ranks(scores: Tensor, valid: Tensor | None) -> Tensor:
    """``[T, P]`` int64: the place of each patch in selection order (§4)."""
    last = scores.isnan().to(torch.uint8)  # after a valid −inf come NaN, then invalid patches
    if valid is not None:
        last = last.masked_fill(~valid, 2)
    keys = (scores + 0.0).masked_fill(last > 0, -torch.inf)  # −0 becomes +0
    order = keys.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, last.gather(1, order).argsort(dim=1, stable=True))
    ranks = torch.empty_like(order)
    return ranks.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))


def _top(ranks: Tensor, budgets: Tensor, valid: Tensor | None) -> Tensor:
    """``[T, P]`` bool: the budget's first valid patches."""
    keep = ranks < budgets[:, None]
    return keep if valid is None else keep & valid


def segmented_topk(scores: Tensor, budgets: Tensor, valid: Tensor | None = None) -> Tensor:
    """The first patches of each crop in selection order (§4)."""
    return _top(_ranks(scores, valid), budgets, valid)


def _order(segments: Segments, device: torch.device) -> Tensor:
    """``[N]`` int64: ``crop · P + patch`` of all patches in packed order, −1 for newlines (§5).

    A selection drops patches and keeps this order. Stored with the segments.
    """

    def make() -> Tensor:
        pairs = zip(segments.images, segments.first_crops, strict=False)
        return to_device(torch.cat([_order_of(*pair, segments.side) for pair in pairs]), device)

    return segments.stored("order", device, make)


def _order_of(image: Segment, first: int, side: int) -> Tensor:
    """The order of one image, whose first crop is ``first``."""
    source = torch.arange(first * side**2, (first + image.crops) * side**2).view(image.crops, -1)
    newline = torch.tensor([-1])
    stitched = rearrange(
        source[image.first_tile : image.first_tile + image.tiles],
        "(gh gw) (y x) -> (gh y) (gw x)",
        gw=image.grid_width,
        y=side,
    )
    begin, end = image.newline_rows
    rows = stitched[begin:end]
    rows = torch.cat([rows, newline.expand(len(rows), 1)], dim=1)
    tiles = [stitched[:begin].flatten(), rows.flatten(), stitched[end:].flatten()]
    thumbnail = []
    if image.thumbnail >= 0:
        thumbnail = [source[image.thumbnail], newline[: int(image.thumbnail_newline)]]
    return torch.cat([*thumbnail, *tiles] if image.thumbnail <= 0 else [*tiles, *thumbnail])


def _lengths(keep: Tensor, segments: Segments) -> tuple[int, ...]:
    """Rows of each image, read by the host in one synchronisation."""
    kept = keep.new_zeros(len(segments.images), dtype=torch.int64)
    kept = kept.index_add_(0, _lanes(segments, keep.device).image, keep.sum(1))
    return tuple(rows + image.newlines for rows, image in zip(kept.tolist(), segments.images, strict=True))


def _packed_index(keep: Tensor, segments: Segments, length: int) -> Tensor:
    """``[length]`` int64, source of every packed row: ``crop · P + patch``, −1 for a newline (§5)."""
    order = _order(segments, keep.device)
    stays = keep.flatten().index_select(0, order.clamp_min(0)) | (order < 0)
    return order.index_select(0, torch.nonzero_static(stays, size=length)[:, 0])


def segmented_topk_gather(
    features: Tensor,
    scores: Tensor,
    segments: Segments,
    *,
    valid: Tensor | None = None,
    budgets: TileBudgets | None = None,
    signals: Sequence[TileSignal] | None = None,
    allocation: str = "exact",
    ranks: Tensor | None = None,
    valid_counts: Tensor | None = None,
) -> Gathered:
    """The packed order of all patches, restricted to the kept ones (§3 to §5)."""
    # Lengths are those that the segments promise where no budget or mask can make them shorter.
    promised = allocation == "exact" and budgets is None and valid is None and valid_counts is None
    if budgets is None:
        if valid_counts is None and valid is None:
            valid_counts = torch.full((segments.crops,), segments.patches, device=scores.device)
        elif valid_counts is None and valid is not None:
            valid_counts = valid.sum(1)
        budgets = tile_budgets(signals or (), valid_counts, segments, allocation=allocation)
    keep = _top(_ranks(scores, valid) if ranks is None else ranks, budgets.budgets, valid)
    lengths = segments.lengths if promised else _lengths(keep, segments)
    index = _packed_index(keep, segments, sum(lengths))
    # One advanced index on a strided view: flattening first would copy the view.
    crop, patch = index.clamp_min(0) // segments.patches, index.clamp_min(0) % segments.patches
    tokens = features[crop, patch]
    newlines = torch.nonzero_static(index < 0, size=sum(image.newlines for image in segments.images))
    tokens = tokens.index_fill_(0, newlines[:, 0], 0.0)  # in place: only these rows are written
    return Gathered(tokens, index.to(torch.int32), lengths, budgets)
