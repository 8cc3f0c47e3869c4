"""Exact top-k of many crops at once, without sorting.

    keep[t, p] = (rank of p among the valid patches of crop t) < budgets[t]              (docs/method.md, 4)

Shapes: scores [T, P] in fp32, fp16 or bf16, budgets [T] int32 or int64, valid [T, P] bytes or None; keep
[T, P] bool. All contiguous.

Scores become uint32 keys in selection order (:func:`.common.order_key`). The k-th largest key is found by
bisection, two bits per pass: one reduction counts the keys above three candidates at once. It stops as soon
as a candidate leaves exactly k. Only where equal keys straddle the cut, a second bisection over indices finds
which of them are kept.

Grid (T,). Bytes: T·P·(score + 2).

Source: radix select, as in flashinfer's top-k; the packed counts are our own.
"""

import torch
import triton
import triton.language as tl

from .. import _launch
from .common import as_bytes, order_key, power_of_2, valid_patches

MAX_PATCHES = 4096
LIMIT = tl.constexpr(MAX_PATCHES)


@triton.jit
def bisect(key, k, BITS: tl.constexpr, WIDE: tl.constexpr):
    """A threshold with ``count(key >= threshold) >= k``, and that count.

    The count is k where such a threshold exists; otherwise the threshold is the k-th key. Requires
    ``1 <= k <= count(key > 0)``. Three counts share one word: 10 bits each up to 1023 patches, else 20.
    """
    threshold = (k * 0).to(tl.uint32)
    unit = threshold + (1 << (BITS - 2))
    count = k * 0 - 1
    while (unit > 0) & (count != k):
        t1 = threshold | unit
        t2 = threshold | (unit + unit)
        t3 = t2 | unit
        if WIDE:
            c = (key >= t1).to(tl.int64)
            c += (key >= t2).to(tl.int64) << 20
            c += (key >= t3).to(tl.int64) << 40
            n = tl.sum(c)
            n1 = (n & 0xFFFFF).to(tl.int32)
            n2 = ((n >> 20) & 0xFFFFF).to(tl.int32)
            n3 = (n >> 40).to(tl.int32)
        else:
            c = (key >= t1).to(tl.int32)
            c += (key >= t2).to(tl.int32) << 10
            c += (key >= t3).to(tl.int32) << 20
            n = tl.sum(c)
            n1 = n & 0x3FF
            n2 = (n >> 10) & 0x3FF
            n3 = n >> 20
        threshold = tl.where(n3 >= k, t3, tl.where(n2 >= k, t2, tl.where(n1 >= k, t1, threshold)))
        count = tl.where(n3 >= k, n3, tl.where(n2 >= k, n2, tl.where(n1 >= k, n1, count)))
        unit = unit >> 2
    return threshold, count


@triton.jit
def topk_mask(key, patch, k, WIDE: tl.constexpr):
    """Which patches of one crop are kept: the k largest keys above 0, ties to the lower index."""
    k = tl.minimum(k, tl.sum((key > 0).to(tl.int32)))
    keep = key > 0xFFFFFFFE  # none
    if k > 0:
        threshold, count = bisect(key, k, 32, WIDE)
        keep = key >= threshold
        if count != k:
            above = key > threshold
            tied = keep & (above == 0)
            late = tl.where(tied, -patch + LIMIT, 0).to(tl.uint32)  # the lower the index, the larger
            last, _ = bisect(late, k - tl.sum(above.to(tl.int32)), 14, WIDE)
            keep = above | (tied & (late >= last))
    return keep


@triton.jit
def segmented_topk_kernel(scores, budgets, valid, keep, patches, P_PAD: tl.constexpr, WIDE: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, P_PAD)
    inside = patch < patches
    ok = valid_patches(valid, t, patch, inside, patches)
    score = tl.load(scores + t * patches + patch, mask=ok, other=0.0)
    k = tl.maximum(tl.minimum(tl.load(budgets + t), patches), 0).to(tl.int32)
    kept = topk_mask(order_key(score, ok), patch, k, WIDE)
    tl.store(keep + t * patches + patch, kept.to(tl.int8), mask=inside)


def check_patches(scores) -> None:
    """Raise for crops whose keys do not fit into registers, and for float64."""
    if scores.shape[1] > MAX_PATCHES:
        raise ValueError(
            f"scores: expected at most {MAX_PATCHES} patches a crop on a GPU, got {scores.shape[1]}"
        )
    if scores.dtype == torch.float64:
        raise TypeError("scores: expected float32, float16 or bfloat16 on a GPU, got float64")


def segmented_topk(scores, budgets, valid):
    check_patches(scores)
    crops, patches = scores.shape
    keep = torch.empty((crops, patches), dtype=torch.bool, device=scores.device)
    _launch.launch(
        segmented_topk_kernel,
        (crops,),
        scores=scores.contiguous(),
        budgets=budgets.contiguous(),
        valid=as_bytes(valid),
        keep=keep.view(torch.uint8),
        patches=patches,
        P_PAD=power_of_2(patches, 16),
        WIDE=patches > 1023,
        enable_fp_fusion=True,
        **_launch.configuration("segmented_topk", patches, scores.device),
    )
    return keep
