"""The public operations. They check their arguments, then run the kernel or the reference of the device.

Section numbers are those of ``docs/method.md``; :mod:`hero_kernels.reference` specifies each operation in
plain PyTorch. On the shapes: T crops, H heads, N tokens per crop (P = N − 1 patches with a CLS token, else P
= N), head width D, B images.

Plain tensors in eager mode go straight to the implementation (:func:`hero_kernels._dispatch.run`). Under
``torch.compile``, with fake tensors and dispatch modes, and where autograd runs through a kernel, the
operation is one operator of :mod:`hero_kernels._library`.

Every operation raises ``TypeError`` or ``ValueError`` for an argument of another type, shape, dtype or device
than documented, and for a number beyond the normal range of fp32; the message names the argument, what was
expected and what was given. A dimension may be 0, with an empty result or what the formula gives, unless the
formula divides by it: attention needs a key, and :func:`finalize_scores` a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _dispatch, _library
from ._arguments import (
    check_accumulation,
    check_attention,
    check_bounds,
    check_counts,
    check_diverse,
    check_finite,
    check_gather,
    check_numbers,
    check_segments,
    check_signals,
    detached,
)
from ._checks import FLOATS, INTEGERS, check_flag, check_tensor, describe
from .segments import Finalized, Gathered, Segments, TileBudgets, TileSignal, check_allocation

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

# --- attention -------------------------------------------------------------------------------------------


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

    ``out[t, h, n] += weight[t] · softmax_j(scale · q[t, h, 0] · k[t, h, j])[n + 1]`` in fp32: the softmax
    runs over all N keys, then the CLS column is dropped without renormalising. :func:`finalize_scores` takes
    the mean over heads, once after the last layer.

    Args:
        query: ``[T, H, N or 1, D]`` floating point, any strides; only row 0 is read.
        key: ``[T, H, N, D]`` of the same dtype, any strides.
        scale: factor of the logits, usually D^−½.
        weight: factor of this layer, for all crops or ``[T]`` fp32, one per crop. Crops of weight 0 are
            skipped: nothing is added, even if their keys are NaN.
        out: ``[T, H, N − 1]`` fp32 buffer to add to in place; a new tensor where ``None``. It must not
            require a gradient, and its elements must not share memory.
        second_softmax: apply a second softmax over the N − 1 patches of each head, as HERO's released code
            does.

    Returns:
        ``[T, H, N − 1]`` fp32; ``out`` where given. Not differentiable.

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Source: the CLS scores of HiRED (2408.10945) and FasterVLM (2412.01818).
    """
    scale = check_attention(query, key, scale, cls=True)
    check_flag("second_softmax", second_softmax)
    weight = check_accumulation(weight, out, key, key.shape[2] - 1)
    query, key = detached(query), detached(key)
    arguments = {"query": query, "key": key, "scale": scale, "weight": weight, "out": out}
    return _call("cls_attention", key.device, (query, key, out), **arguments, second_softmax=second_softmax)


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
    """Full attention, not causal, that also returns the rows of :func:`cls_attention`.

    ``output[t, h, m] = Σ_n softmax_n(scale · q[t, h, m] · k[t, h, n]) · v[t, h, n]``, accumulated in fp32.

    Args:
        query, key, value: ``[T, H, N, D]`` of one floating-point dtype, any strides.
        scale, weight, out, second_softmax: as in :func:`cls_attention`.

    Returns:
        the attention output ``[T, H, N, D]`` in the dtype of ``query``, differentiable with respect to query,
        key and value; and the rows ``[T, H, N − 1]`` fp32, which are not differentiable.

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Source: FlashAttention-2 (2307.08691).
    """
    scale = check_attention(query, key, scale)
    check_tensor("value", value, tuple(key.shape), (key.dtype,), key.device)
    if key.shape[2] < 2:
        raise ValueError(f"key: expected at least 2 tokens a crop, got {describe(key)}")
    check_flag("second_softmax", second_softmax)
    weight = check_accumulation(weight, out, key, key.shape[2] - 1)
    arguments = {"query": query, "key": key, "value": value, "scale": scale, "weight": weight, "out": out}
    return _call(
        *("attention_with_cls", key.device, (query, key, value, out), (query, key, value)),
        **arguments,
        second_softmax=second_softmax,
    )


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
    """Attention that each token receives, averaged over queries: the score of encoders without CLS (§1).

    ``out[t, h, n] += weight[t] · mean_m softmax_j(scale · q[t, h, m] · k[t, h, j])[n]`` in fp32.

    Args:
        query, key: ``[T, H, N, D]`` of one floating-point dtype, any strides.
        scale, weight: as in :func:`cls_attention`.
        out: ``[T, H, N]`` fp32 buffer, as in :func:`cls_attention`.
        lse: ``[T, H, N]`` fp32, any strides: the log-sum-exp of each query, as attention that ran on the same
            query and key returns it, ``ln Σ_j exp(scale · q[t, h, m] · k[t, h, j])``. It saves the kernel
            that computes it. The values are not checked: an error e in one multiplies what this query gives
            by ``exp(−e)``. Rounding alone makes rows sum to 1 only up to about ``10⁻⁷ · max(1, |lse|)``.
        cu_seqlens: ``[S + 1]`` int32, as FlashAttention takes it: query and key are ``[1, H, N, D]`` and hold
            S segments one after another; segment s ends before token ``cu_seqlens[s + 1]``, the last at N.
            Each plays the part of a crop: softmax and mean run within it, and ``weight`` is a number or
            ``[S]``. A segment may be empty.
        max_seqlen: tokens of the longest segment, or more, on the host; given with ``cu_seqlens``, which is
            then not read on the host. The CPU checks both. On a GPU wrong values give wrong rows.

    Returns:
        ``[T, H, N]`` fp32, of segments ``[1, H, N]``; ``out`` where given. Not differentiable.

    Raises:
        TypeError, ValueError: a bad argument, by name.

    Source: VisionZip (2412.04467), for SigLIP towers.
    """
    scale = check_attention(query, key, scale, packed=cu_seqlens is not None)
    names = ("cu_seqlens", "max_seqlen")
    count = check_bounds(names, cu_seqlens, max_seqlen, key.shape[2], key.device)
    weight = check_accumulation(weight, out, key, key.shape[2], count)
    if lse is not None:
        lse = detached(check_tensor("lse", lse, tuple(key.shape[:3]), (torch.float32,), key.device))
    query, key = detached(query), detached(key)
    arguments = {"query": query, "key": key, "scale": scale, "weight": weight, "out": out, "lse": lse}
    arguments |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    return _call("received_attention", key.device, (query, key, out, lse, cu_seqlens), **arguments)


# --- scores, budgets, selection --------------------------------------------------------------------------


def finalize_scores(rows: Tensor, *, valid: Tensor | None = None, rank: bool = False) -> Finalized:
    """Patch scores from rows per head, their entropy, and their ranks (§1, §2, §4).

    Args:
        rows: ``[T, H, P]`` fp32, as :func:`cls_attention` or :func:`received_attention` accumulate them.
        valid: ``[T, P]`` bool; all patches are valid where ``None``.
        rank: whether to compute ranks.

    Returns:
        ``scores[t, p] = mean_h rows[t, h, p]``; the entropy in nats of each crop's scores over its valid
        patches, normalised to sum 1 (negative scores and NaN count as 0; without a finite sum above 0 it is
        ``ln(valid)``, that of equal scores); and the place of each patch in selection order: highest score
        first, ties to the lower index, then NaN, then invalid patches.

    Raises:
        TypeError, ValueError: a bad argument, by name; more than 32767 patches with ``rank``.
    """
    check_tensor("rows", rows, ("T", "H", "P"), (torch.float32,))
    if not rows.shape[1]:
        raise ValueError(f"rows: expected at least one head, got {describe(rows)}")
    if valid is not None:
        check_tensor("valid", valid, (rows.shape[0], rows.shape[2]), (torch.bool,), rows.device)
    check_flag("rank", rank)
    if rank and rows.shape[2] > torch.iinfo(torch.int16).max:
        raise ValueError(f"rows: expected at most 32767 patches to rank, got {describe(rows)}")
    rows = detached(rows)
    return _call("finalize_scores", rows.device, (rows, valid), rows=rows, valid=valid, rank=rank)


def rarity(features: Tensor, segments: Segments, valid: Tensor | None = None) -> Tensor:
    """How unlike each patch is to the others of its image: 1 less its mean cosine with them.

    ``q_j = max(0, 1 − mean_i cos(x_j, x_i))`` over the valid patches i of the image's tiles, j included; for
    the patches of a thumbnail over those of the thumbnail. A cosine with a zero vector is 0.

    Args:
        features: ``[T, P, D]`` floating point, any strides. Vectors whose squared length is not a normal
            number of fp32 count as zero.
        segments: the images of the batch.
        valid: ``[T, P]`` bool; all patches are valid where ``None``.

    Returns:
        ``[T, P]`` fp32 from 0 to 2; 1 for zero vectors and patches that are not valid. Not differentiable.

    Raises:
        TypeError, ValueError: a bad argument, by name; on the CPU also features that are not finite. (On a
            GPU such a vector counts as zero.)

    Source: our own, for hero+.
    """
    check_segments(segments)
    check_tensor("features", features, (segments.crops, segments.patches, "D"), FLOATS)
    if valid is not None:
        check_tensor("valid", valid, tuple(features.shape[:2]), (torch.bool,), features.device)
    check_finite("features", features)
    given = {"features": detached(features), "segments": segments, "valid": valid}
    return _call("rarity", features.device, (features, valid), **given)


def tile_budgets(
    signals: Sequence[TileSignal],
    valid_counts: Tensor,
    segments: Segments,
    *,
    allocation: str = "exact",
) -> TileBudgets:
    """Divide each image's tile tokens among its tiles (§2, §3).

    ``share_i = Σ_s w_s · signal_s,i / Σ_s w_s``, each signal normalised to sum 1 over the tiles of its image.
    Shares become integers ``floor(share · 2²⁴ + ½)``; all further arithmetic is exact.

    Args:
        signals: one to four, with a positive sum of weights.
        valid_counts: ``[T]`` int32 or int64, valid patches of each crop: the caps. More than P count as P.
        segments: the images of the batch.
        allocation: ``"exact"``, largest remainders with caps, always ``min(tile_tokens, Σ valid)`` in sum; or
            ``"floor"``, the rule of HERO's released code, which loses what the floors and caps leave over.

    Returns:
        budgets, shares and fixed-point weights; a thumbnail's budget is ``min(thumbnail_tokens, valid)``, its
        share 0.

    Raises:
        TypeError, ValueError: a bad argument, by name; on the CPU also a signal that is not finite. (On a GPU
            such a signal gives equal parts.)

    Source: HERO's allocation; HiRED (2408.10945) for ``"floor"``.
    """
    check_segments(segments)
    check_allocation(allocation)
    check_tensor("valid_counts", valid_counts, (segments.crops,), INTEGERS)
    check_counts("valid_counts", valid_counts)
    signals = check_signals(signals, segments, valid_counts.device)
    tensors = (valid_counts, *(signal.values for signal in signals))
    arguments = {"signals": signals, "valid_counts": valid_counts, "segments": segments}
    return _call("tile_budgets", valid_counts.device, tensors, **arguments, allocation=allocation)


def segmented_topk(scores: Tensor, budgets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Per crop, the budget's highest-scoring valid patches (§4).

    Ties go to the lower index, −0 equals +0, and a budget beyond the valid patches is clamped to them.

    Args:
        scores: ``[T, P]`` floating point.
        budgets: ``[T]`` int32 or int64, >= 0.
        valid: ``[T, P]`` bool; all patches are valid where ``None``.

    Returns:
        ``[T, P]`` bool, true where the patch is kept.

    Raises:
        TypeError, ValueError: a bad argument, by name; on the CPU also NaN in ``scores``. (On a GPU NaN ranks
            below every number.)
    """
    check_tensor("scores", scores, ("T", "P"), FLOATS)
    check_tensor("budgets", budgets, (scores.shape[0],), INTEGERS, scores.device)
    if valid is not None:
        check_tensor("valid", valid, tuple(scores.shape), (torch.bool,), scores.device)
    check_counts("budgets", budgets)
    check_numbers("scores", scores)
    scores = detached(scores)
    arguments = {"scores": scores, "budgets": budgets, "valid": valid}
    return _call("segmented_topk", scores.device, (scores, budgets, valid), **arguments)


def segmented_diverse_topk(
    features: Tensor,
    budgets: Tensor,
    *,
    rule: str,
    quality: Tensor | None = None,
    valid: Tensor | None = None,
    cu_crops: Tensor | None = None,
    max_crops: int | None = None,
) -> Tensor:
    """Choose candidates one by one, each unlike those chosen before, in each crop or segment of crops.

    The similarity of two candidates is the cosine of their features. Elements are rounded to 2⁻¹² of their
    vector's length, so that cosines are exact integers, whatever the order of the sum. Each step takes the
    valid candidate of the largest value, ties to the lower index, by one of three rules:

    - ``"max_min"``: the distance to the nearest chosen candidate; first that to the nearest other one.
    - ``"dpp"``: quality² times the variance that the chosen ones leave, by a Cholesky factorisation in fp32
      whose operations are rounded one by one, in a fixed order. Variances below 2⁻¹⁶ count as 2⁻¹⁶.
    - ``"coverage"``: ``quality · Σ_j max(0, sim(i, j) − max_c sim(c, j))``, j over the valid candidates, c
      over the chosen ones and 0.

    ``"max_min"`` and ``"coverage"`` compare similarities rounded to 3.2·10⁻⁵. The choice is the same in every
    batch, on CPU and GPU.

    Args:
        features: ``[T, P, D]`` floating point, any strides.
        budgets: ``[T]`` int32 or int64, >= 0, clamped to the valid candidates; ``[S]`` with ``cu_crops``.
        rule: which of the three.
        quality: ``[T, P]`` fp32, >= 0, up to 2⁶⁰; 1 where ``None``. Not for ``"max_min"``.
        valid: ``[T, P]`` bool; all patches are valid where ``None``.
        cu_crops: ``[S + 1]`` int32: segment s holds the patches of crops ``cu_crops[s]``, …,
            ``cu_crops[s + 1] − 1``; it may be empty. Each crop is a segment where ``None``.
        max_crops: crops of the longest segment, or more, on the host; given with ``cu_crops``, which is then
            not read on the host. The CPU checks both. On a GPU wrong values give wrong ranks.

    Returns:
        ``[T, P]`` int16: the step of the segment in which the patch was chosen, from 0; 32767 if in none. If
        each crop is a segment, :func:`segmented_topk_gather` takes it as ``ranks``. Not differentiable.

    Raises:
        TypeError, ValueError: a bad argument, by name; more than 4096 candidates in a segment; on the CPU
            also features or quality that are not finite. (On a GPU such a vector counts as zero.)

    Source: DivPrune (2503.02175), CDPruner (2506.10967), SCOPE (2510.24214).
    """
    features, quality = check_diverse(features, budgets, rule, quality, valid, cu_crops, max_crops)
    arguments = {"budgets": budgets, "quality": quality, "valid": valid, "cu_crops": cu_crops}
    return _call(
        *("segmented_diverse_topk", features.device, (features, *arguments.values())),
        features=features,
        rule=rule,
        max_crops=max_crops,
        **arguments,
    )


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
    """Top-k of each crop, packing in stitched raster order with newline rows, and gather (§3 to §5).

    Args:
        features: ``[T, P, D]`` floating point, any strides.
        scores: ``[T, P]`` floating point.
        segments: the images of the batch.
        valid: ``[T, P]`` bool; all patches are valid where ``None``.
        budgets: what :func:`tile_budgets` returned; or
        signals: its argument, to do both steps in one call. Exactly one of the two is given.
        allocation: the rule of the budgets, also of given ones. With ``"exact"`` the lengths follow from
            ``segments``; with ``"floor"`` they depend on the data, which takes a host-device synchronisation.
        ranks: ``[T, P]`` int16 from :func:`finalize_scores` on the same scores and ``valid``. They are used
            in place of the scores, and a kernel need not search for the cut.
        valid_counts: ``[T]`` int32 or int64, the row sums of ``valid``, if known: they need not be counted.
            More than P count as P.

    Returns:
        packed tokens, their source, the length of each image, and the budgets. Newline rows are zero: they
        live in the language model's width and are filled after projection. Gradients run from tokens to
        features.

        On an accelerator, and compiled, the lengths are those that ``segments`` promise, unless
        ``allocation`` is ``"floor"``. Where budgets or the mask give fewer patches, the image ends in empty
        rows (zeros, index −2); where they give more, the sequence is cut at the promised length.

    Raises:
        TypeError, ValueError: a bad argument, by name; both or neither of ``budgets`` and ``signals``; on the
            CPU also NaN in ``features`` or ``scores``.

    Source: the packing is that of LLaVA-NeXT (``pack_image_features`` in transformers).
    """
    check_allocation(allocation)
    signals = check_gather(features, scores, segments, valid, budgets, signals, ranks, valid_counts)
    wanted = budgets and budgets.budgets
    tensors = (valid, ranks, valid_counts, wanted, *(signal.values for signal in signals or ()))
    return _call(
        *("segmented_topk_gather", scores.device, (features, scores, *tensors), (features,)),
        features=features,
        scores=detached(scores),
        segments=segments,
        valid=valid,
        budgets=budgets,
        signals=signals,
        allocation=allocation,
        ranks=ranks,
        valid_counts=valid_counts,
    )


# --- how they run ----------------------------------------------------------------------------


def _call(
    name: str,
    device: torch.device,
    tensors: Sequence[Tensor | None],
    differentiable: Sequence[Tensor] = (),
    **arguments,
):
    """Run an operation on checked arguments; ``tensors`` are those among them."""
    if _dispatch.is_plain(tensors, differentiable):
        return _dispatch.run(name, device, **arguments)
    return _library.call(name, device, **arguments)
