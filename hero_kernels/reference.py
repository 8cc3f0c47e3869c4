"""The PyTorch twins: the specification of every operation, and what runs on a CPU.

Each function has the name and signature of the operation it specifies and says what it computes,
no more: arguments are checked by the public functions in :mod:`hero_kernels`.
Section numbers are those of ``docs/method.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from .segments import Finalized, Gathered, Segment, Segments, TileBudgets, TileSignal

__all__ = [
    "attention_with_cls",
    "cls_attention",
    "finalize_scores",
    "received_attention",
    "segmented_topk",
    "segmented_topk_gather",
    "tile_budgets",
]

FIXED_POINT = 1 << 24


def _accumulate(rows: Tensor, weight: float | Tensor, out: Tensor | None, per_head: bool) -> Tensor:
    """``out += weight · rows`` with ``rows`` [T, H, n], or their mean over heads; weight 0 adds nothing."""
    if not per_head:
        rows = rows.mean(1)
    if isinstance(weight, Tensor):
        weight = weight.view(-1, *[1] * (rows.dim() - 1))
        rows = (rows * weight).masked_fill(weight == 0, 0.0)
    else:
        rows = rows * weight if weight else torch.zeros_like(rows)
    return rows if out is None else out.add_(rows)


def cls_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    lse: Tensor | None = None,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
    second_softmax: bool = False,
    per_head: bool = False,
) -> Tensor:
    """Attention of the CLS token to every patch, averaged over heads (§1).

    ``out[t, n] += weight · mean_h softmax_j(scale · q[t, h, 0] · k[t, h, j])[n + 1]`` in fp32: the
    softmax runs over all N keys, then the CLS column is dropped, without renormalising.

    Args:
        query: ``[T, H, N or 1, D]`` floating view, any strides; only row 0 is read.
        key: ``[T, H, N, D]`` floating view, any strides.
        scale: factor of the logits, usually D^−½.
        lse: ``[T, H, N or 1]`` natural-log sum of exponentials of the logits, where the attention
            backend returns it; saves the softmax reduction. Only row 0 is read.
        weight: factor of this layer, for all crops or ``[T]`` fp32, one a crop. Crops of weight 0 get
            nothing added, whatever their keys.
        out: fp32 of the result's shape to add to in place; a new tensor where ``None``.
        second_softmax: a second softmax over the N − 1 patches of each head before averaging, as the
            paper's released code has it.
        per_head: leave the mean over heads out, for :func:`finalize_scores` to take once after the last
            layer.

    Returns:
        ``[T, N − 1]`` fp32, or ``[T, H, N − 1]`` with ``per_head``: ``out`` where given. No gradient runs
        through it.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, by name.
    """
    logits = torch.einsum("thd,thnd->thn", query[:, :, 0].float(), key.float()) * scale
    if lse is None:
        rows = logits.softmax(-1)[..., 1:]
    else:
        rows = (logits - lse[:, :, :1].float()).exp()[..., 1:]
    if second_softmax:
        rows = rows.softmax(-1)
    return _accumulate(rows, weight, out, per_head)


def attention_with_cls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
    second_softmax: bool = False,
    per_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """Full attention that yields the CLS row of :func:`cls_attention` on the side.

    Args:
        query, key, value: ``[T, H, N, D]`` floating views, any strides.
        scale, weight, out, second_softmax, per_head: as in :func:`cls_attention`.

    Returns:
        the attention output ``[T, H, N, D]`` in the dtype of ``query`` (accumulated in fp32), and the
        CLS rows as :func:`cls_attention` returns them.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, by name.
    """
    logits = torch.einsum("thmd,thnd->thmn", query.float(), key.float()) * scale
    output = torch.einsum("thmn,thnd->thmd", logits.softmax(-1), value.float()).to(query.dtype)
    rows = cls_attention(
        *(query.detach(), key.detach(), scale),
        weight=weight,
        out=out,
        second_softmax=second_softmax,
        per_head=per_head,
    )
    return output, rows


def received_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
    per_head: bool = False,
) -> Tensor:
    """Attention a token receives, averaged over queries and heads: the score of encoders without CLS (§1).

    ``out[t, n] += weight · mean_{h, m} softmax_j(scale · q[t, h, m] · k[t, h, j])[n]`` in fp32.

    Args:
        query, key: ``[T, H, N, D]`` floating views, any strides.
        scale, weight, out, per_head: as in :func:`cls_attention`.

    Returns:
        ``[T, N]`` fp32, or ``[T, H, N]`` with ``per_head``: ``out`` where given. No gradient runs through
        it.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, by name.
    """
    rows = query.new_zeros(key.shape[:3], dtype=torch.float32)
    for crop in range(key.shape[0]):  # one crop at a time: N × N maps of a whole batch would not fit
        logits = torch.einsum("hmd,hnd->hmn", query[crop].float(), key[crop].float()) * scale
        rows[crop] = logits.softmax(-1).mean(1)
    return _accumulate(rows, weight, out, per_head)


def finalize_scores(rows: Tensor, *, valid: Tensor | None = None, rank: bool = False) -> Finalized:
    """Patch scores from rows per head, and what follows from the scores alone (§1, §2).

    Args:
        rows: ``[T, H, P]`` fp32, as :func:`cls_attention` accumulates them with ``per_head``.
        valid: ``[T, P]`` bool; all valid where ``None``.
        rank: whether ranks are wanted.

    Returns:
        ``scores[t, p] = mean_h rows[t, h, p]``; the entropy in nats of each crop's scores over its valid
        patches, normalised to sum 1 (negative scores and NaN count as 0; without a finite sum above 0 it is
        that of equal scores, ``ln(valid)``); and each patch's place in the order of selection (§4):
        highest score first, ties to the lower index, invalid patches last.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, by name; more than 32767
            patches where ranks are wanted.
    """
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


def _shares(signals: Sequence[TileSignal], tiles: slice) -> Tensor:
    """Weighted mean of the normalised signals over the tiles of one image: [K] fp32, sum 1 (§2)."""
    count = tiles.stop - tiles.start
    total_weight = sum(signal.weight for signal in signals)
    shares = signals[0].values.new_zeros(count, dtype=torch.float32)
    for signal in signals:
        values = signal.values[tiles].float()
        if signal.temperature is not None:
            part = ((values - values.max()) / signal.temperature).softmax(0)
        else:
            values = values.clamp_min(0.0)
            part = values / values.sum()
        if not 0.5 < part.sum() < 1.5:  # nothing to divide, or beyond fp32
            part = torch.full_like(values, 1.0 / count)
        shares = shares + (signal.weight / total_weight) * part
    return shares


def _apportion(total: int, weights: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Largest remainder with caps, in integers: sums to ``min(total, sum(caps))`` (§3).

    Tiles whose quota reaches their cap are fixed at it and leave, until none does. The others get the
    floor of their quota, and the rest goes one by one to the largest remainders, ties to the lower tile.
    """
    budgets = [0] * len(caps)
    left = min(total, sum(caps))
    active = [tile for tile, cap in enumerate(caps) if cap > 0]
    while True:
        equal = not any(weights[tile] for tile in active)
        weight = {tile: 1 if equal else weights[tile] for tile in active}
        whole = sum(weight.values())
        full = [tile for tile in active if left * weight[tile] >= caps[tile] * whole]
        if not full:
            break
        for tile in full:
            budgets[tile] = caps[tile]
        left -= sum(caps[tile] for tile in full)
        active = [tile for tile in active if tile not in full]
    remainder = {}
    for tile in active:
        budgets[tile], remainder[tile] = divmod(left * weight[tile], whole)
    left -= sum(budgets[tile] for tile in active)
    for tile in sorted(active, key=lambda tile: (-remainder[tile], tile))[:left]:
        budgets[tile] += 1
    return budgets


def _apportion_floor(total: int, weights: Sequence[int], caps: Sequence[int]) -> list[int]:
    """The released rule: the floor of each quota, at most the cap; leftovers are lost (§3)."""
    whole = sum(weights) or 1
    return [min(total * weight // whole, cap) for weight, cap in zip(weights, caps, strict=True)]


def tile_budgets(
    signals: Sequence[TileSignal],
    valid_counts: Tensor,
    segments: Segments,
    *,
    allocation: str = "exact",
) -> TileBudgets:
    """Share each image's tile tokens among its tiles (§2, §3).

    ``share_i = Σ_s w_s · signal_s,i / Σ_s w_s``, each signal normalised to sum 1 over the tiles of its
    image. Shares become integers ``floor(share · 2²⁴ + ½)``; all further arithmetic is exact.

    Args:
        signals: at least one, with positive weight in sum.
        valid_counts: ``[T]`` int32 or int64, valid patches of each crop: the caps.
        segments: the images of the batch.
        allocation: ``"exact"``, water-filling with caps, always the whole of
            ``min(tile_tokens, Σ valid)``; or ``"floor"``, the released rule, which loses what the floors
            and caps leave over.

    Returns:
        budgets, shares and fixed-point weights; a thumbnail's budget is
        ``min(thumbnail_tokens, valid)``, its share 0.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, by name; a signal that is not
            finite.
    """
    device = valid_counts.device
    rule = _apportion if allocation == "exact" else _apportion_floor
    shares = torch.zeros(segments.crops, dtype=torch.float32, device=device)
    caps = valid_counts.tolist()
    budgets = [0] * segments.crops
    for first, image in zip(segments.first_crops, segments.images, strict=False):
        if image.thumbnail >= 0:
            crop = first + image.thumbnail
            budgets[crop] = min(image.thumbnail_tokens, caps[crop])
        if image.tiles:
            start = first + image.first_tile
            shares[start : start + image.tiles] = _shares(signals, slice(start, start + image.tiles))
    weights = (shares.double() * FIXED_POINT + 0.5).floor().to(torch.int32)  # fp32 could not add the half
    whole_numbers = weights.tolist()
    for first, image in zip(segments.first_crops, segments.images, strict=False):
        if image.tiles:
            start = first + image.first_tile
            tiles = slice(start, start + image.tiles)
            budgets[tiles] = rule(image.tile_tokens, whole_numbers[tiles], caps[tiles])
    return TileBudgets(torch.tensor(budgets, dtype=torch.int32, device=device), shares, weights)


def _ranks(scores: Tensor, valid: Tensor | None) -> Tensor:
    """``[T, P]`` int64: each patch's place in the order of selection (§4)."""
    last = scores.isnan().to(torch.uint8)  # behind a valid −inf come NaN, then invalid patches
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
    """Per crop, the budget's highest-scoring valid patches (§4).

    Ties go to the lower index, −0 equals +0, a budget beyond the valid patches is clamped to them.

    Args:
        scores: ``[T, P]`` floating.
        budgets: ``[T]`` int32 or int64, >= 0.
        valid: ``[T, P]`` bool; all valid where ``None``.

    Returns:
        ``[T, P]`` bool, true where the patch is kept.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, by name; NaN in ``scores``,
            where that is seen without waiting, on the CPU. (Elsewhere NaN ranks below every number.)
    """
    return _top(_ranks(scores, valid), budgets, valid)


def _packed_index(keep: Tensor, image: Segment, first: int, side: int) -> Tensor:
    """Source of every packed row of one image: ``crop · P + patch``, −1 for a newline (§5)."""
    source = torch.arange(keep.numel(), device=keep.device).view_as(keep) + first * keep.shape[1]
    newline = source.new_full((1,), -1)
    thumbnail = source.new_empty(0)
    if image.thumbnail >= 0:
        thumbnail = source[image.thumbnail][keep[image.thumbnail]]
        if image.thumbnail_newline:
            thumbnail = torch.cat([thumbnail, newline])
    if not image.tiles:
        return thumbnail
    tiles = slice(image.first_tile, image.first_tile + image.tiles)
    stitch = {"gw": image.grid_width, "y": side}
    source = rearrange(source[tiles], "(gh gw) (y x) -> (gh y) (gw x)", **stitch)
    keep = rearrange(keep[tiles], "(gh gw) (y x) -> (gh y) (gw x)", **stitch)
    row = torch.arange(source.shape[0], device=source.device)
    begin, end = image.newline_rows
    source = torch.cat([source, newline.expand(source.shape[0], 1)], dim=1)
    keep = torch.cat([keep, ((row >= begin) & (row < end))[:, None]], dim=1)
    stitched = source[keep]
    return torch.cat([thumbnail, stitched] if image.thumbnail <= 0 else [stitched, thumbnail])


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
    """Budgets, top-k, packing in stitched raster order with newline rows, gather; ragged batches (§3–§5).

    Args:
        features: ``[T, P, D]`` floating view, any strides.
        scores: ``[T, P]`` floating.
        segments: the images of the batch.
        valid: ``[T, P]`` bool; all valid where ``None``.
        budgets: what :func:`tile_budgets` returned; or
        signals: what it takes, for both steps at once. One of the two is given.
        allocation: the rule of the budgets, those given too: with ``"exact"`` a kernel need not wait for
            them to know how long the result is.
        ranks: ``[T, P]`` int16, what :func:`finalize_scores` made of the scores and the same ``valid``.
            They decide in place of the scores and spare a kernel the search for the cut.
        valid_counts: ``[T]`` int32, the row sums of ``valid`` where they are known: spares counting them.

    Returns:
        packed tokens (newline rows zero: they live in the language model's width and are filled after
        projection), their source, the length of each image, and the budgets. Gradients run from tokens
        to features.

        On an accelerator, and compiled, the lengths are those that ``segments`` promise, unless
        ``allocation`` is ``"floor"``. Where budgets or mask hold fewer patches, the image ends in empty
        rows (zeros, index −2); budgets that hold more are cut off at the length.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, by name; both or none of
            ``budgets`` and ``signals``; NaN in ``features`` or ``scores`` (on the CPU).
    """
    if budgets is None:
        if valid is None:
            counts = torch.full((segments.crops,), segments.patches, dtype=torch.int32, device=scores.device)
        else:
            counts = valid.sum(1, dtype=torch.int32)
        budgets = tile_budgets(signals, counts, segments, allocation=allocation)
    keep = _top(_ranks(scores, valid) if ranks is None else ranks, budgets.budgets, valid)
    rows = [
        _packed_index(keep[first : first + image.crops], image, first, segments.side)
        for first, image in zip(segments.first_crops, segments.images, strict=False)
    ]
    index = torch.cat(rows)
    # Chosen before the gather: one advanced index on a strided view, without copying the view.
    crop, patch = index.clamp_min(0) // segments.patches, index.clamp_min(0) % segments.patches
    tokens = features[crop, patch]
    tokens = tokens.masked_fill((index < 0)[:, None], 0.0)
    return Gathered(tokens, index.to(torch.int32), tuple(len(row) for row in rows), budgets)
