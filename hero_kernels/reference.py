"""The PyTorch twins: the specification of every operation, and what runs on a CPU.

Each function has the name and signature of the operation it specifies and says what it computes,
no more: arguments are checked by the public functions in :mod:`hero_kernels`.
Section numbers are those of ``docs/method.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .segments import LARGEST, Finalized, Gathered, Lanes, Segments, TileBudgets, TileSignal

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


def _accumulate(rows: Tensor, weight: float | Tensor, out: Tensor | None) -> Tensor:
    """``out += weight · rows`` with ``rows`` [T, H, n]; weight 0 adds nothing."""
    if isinstance(weight, Tensor):
        weight = weight[:, None, None]
        rows = (rows * weight).masked_fill(weight == 0, 0.0)
    else:
        rows = rows * weight if weight else torch.zeros_like(rows)
    return rows if out is None else out.add_(rows)


def cls_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
    second_softmax: bool = False,
) -> Tensor:
    """Attention of the CLS token to every patch, per head (§1).

    ``out[t, h, n] += weight · softmax_j(scale · q[t, h, 0] · k[t, h, j])[n + 1]`` in fp32: the softmax
    runs over all N keys, then the CLS column is dropped, without renormalising. The mean over heads is
    taken once, after the last layer, by :func:`finalize_scores`.

    Args:
        query: ``[T, H, N or 1, D]`` floating view, any strides; only row 0 is read.
        key: ``[T, H, N, D]`` floating view, any strides.
        scale: factor of the logits, usually D^−½.
        weight: factor of this layer, for all crops or ``[T]`` fp32, one a crop. Crops of weight 0 get
            nothing added, whatever their keys.
        out: fp32 of the result's shape to add to in place; a new tensor where ``None``.
        second_softmax: a second softmax over the N − 1 patches of each head, as the paper's released
            code has it.

    Returns:
        ``[T, H, N − 1]`` fp32, ``out`` where given. No gradient runs through it.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, by name.
    """
    logits = torch.einsum("thd,thnd->thn", query[:, :, 0].float(), key.float()) * scale
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
    """Full attention that yields the CLS row of :func:`cls_attention` on the side.

    Args:
        query, key, value: ``[T, H, N, D]`` floating views, any strides.
        scale, weight, out, second_softmax: as in :func:`cls_attention`.

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
    )
    return output, rows


def received_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Attention a token receives per head, averaged over queries: the score of encoders without CLS (§1).

    ``out[t, h, n] += weight · mean_m softmax_j(scale · q[t, h, m] · k[t, h, j])[n]`` in fp32.

    Args:
        query, key: ``[T, H, N, D]`` floating views, any strides.
        scale, weight, out: as in :func:`cls_attention`.

    Returns:
        ``[T, H, N]`` fp32, ``out`` where given. No gradient runs through it.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, by name.
    """
    rows = []
    for q, k in zip(query.unbind(1), key.unbind(1), strict=True):  # the N × N maps of all heads would not fit
        logits = torch.einsum("tmd,tnd->tmn", q.float(), k.float()) * scale
        rows.append(logits.softmax(-1).mean(1))
    rows = torch.stack(rows, dim=1)
    return _accumulate(rows, weight, out)


def finalize_scores(rows: Tensor, *, valid: Tensor | None = None, rank: bool = False) -> Finalized:
    """Patch scores from rows per head, and what follows from the scores alone (§1, §2).

    Args:
        rows: ``[T, H, P]`` fp32, as :func:`cls_attention` accumulates them.
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


def _part(signal: TileSignal, lanes: Lanes) -> Tensor:
    """A signal normalised to sum 1 over the tiles of each image: ``[B, L]`` fp32, 0 elsewhere (§2)."""
    values = signal.values.float()[lanes.crop]
    if signal.temperature is None:
        values = values.clamp_min(0.0).masked_fill(lanes.no_tile, 0.0)
        return values / values.sum(1, keepdim=True)
    values = values.masked_fill(lanes.no_tile, -torch.inf)
    return ((values - values.amax(1, keepdim=True)) / signal.temperature).softmax(1)


def _shares(signals: Sequence[TileSignal], lanes: Lanes) -> Tensor:
    """Weighted mean of the normalised signals of each tile, 0 elsewhere: ``[B, L]`` fp32 (§2)."""
    total_weight = sum(signal.weight for signal in signals)
    parts = torch.stack([_part(signal, lanes) for signal in signals])
    whole = parts.sum(2, keepdim=True)  # NaN where there is nothing to divide, or it is beyond fp32
    parts = torch.where((whole - 1.0).abs() < 0.5, parts, lanes.equal)
    return sum((signal.weight / total_weight) * part for signal, part in zip(signals, parts, strict=True))


def _apportion(total: Tensor, weights: Tensor, caps: Tensor) -> Tensor:
    """Largest remainder with caps, in int64: rows sum to ``min(total, Σ caps)`` (§3).

    Where tiles with weight cannot take all, they are full, and the others share what is left equally.

    Water rises in all tiles at once, in each as fast as its weight. When it reaches the cap of tile j, tile i
    holds ``min(cap_j · weight_i / weight_j, cap_i)``: tile j is full if all together hold no more than there
    is. The others get the floor of their quota of what full tiles leave, and the rest goes one by one to the
    largest remainders, ties to the lower tile.

    Args:
        total: ``[B, 1]``, below 2³¹.
        weights: ``[B, K]``, in sum at most about 2²⁴; K < 2³¹, so that no product or sum reaches 2⁶³.
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
    """The released rule: the floor of each quota, at most the cap; leftovers are lost (§3)."""
    return torch.minimum(total * weights // weights.sum(1, keepdim=True).clamp_min(1), caps)


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
    rule = _apportion if allocation == "exact" else _apportion_floor
    lanes = segments.lanes(valid_counts.device)
    shares = _shares(signals, lanes)[:, : lanes.most]
    weights = (shares.double() * FIXED_POINT + 0.5).floor().long()  # fp32 could not add the half
    counts = valid_counts.long().clamp_max(LARGEST)[lanes.crop[:, : lanes.most]]
    caps = counts.masked_fill(lanes.no_tile[:, : lanes.most], 0)
    budgets = rule(lanes.tile_tokens, weights, caps)
    thumbnails = torch.minimum(lanes.thumbnail_tokens, counts)
    budgets = torch.where(lanes.thumbnail_tokens < 0, budgets, thumbnails)
    rows = (budgets.to(torch.int32), shares, weights.to(torch.int32))
    return TileBudgets(*(row.flatten().index_select(0, lanes.place) for row in rows))


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


def _lengths(keep: Tensor, segments: Segments) -> tuple[int, ...]:
    """Rows of each image, read by the host at once."""
    kept = keep.new_zeros(len(segments.images), dtype=torch.int64)
    kept = kept.index_add_(0, segments.lanes(keep.device).image, keep.sum(1))
    return tuple(rows + image.newlines for rows, image in zip(kept.tolist(), segments.images, strict=True))


def _packed_index(keep: Tensor, segments: Segments, length: int) -> Tensor:
    """``[length]`` int64, source of every packed row: ``crop · P + patch``, −1 for a newline (§5)."""
    order = segments.order(keep.device)
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
    # Where nothing can fall short of what the segments promise, nothing needs to be counted.
    promised = allocation == "exact" and budgets is None and valid is None and valid_counts is None
    if budgets is None:
        if valid_counts is None and valid is None:
            valid_counts = torch.full((segments.crops,), segments.patches, device=scores.device)
        elif valid_counts is None:
            valid_counts = valid.sum(1)
        budgets = tile_budgets(signals, valid_counts, segments, allocation=allocation)
    keep = _top(_ranks(scores, valid) if ranks is None else ranks, budgets.budgets, valid)
    lengths = segments.lengths if promised else _lengths(keep, segments)
    index = _packed_index(keep, segments, sum(lengths))
    # Chosen before the gather: one advanced index on a strided view, without copying the view.
    crop, patch = index.clamp_min(0) // segments.patches, index.clamp_min(0) % segments.patches
    tokens = features[crop, patch]
    newlines = torch.nonzero_static(index < 0, size=sum(image.newlines for image in segments.images))
    tokens = tokens.index_fill_(0, newlines[:, 0], 0.0)  # in place: these rows alone are written
    return Gathered(tokens, index.to(torch.int32), lengths, budgets)
