"""From rows per head to patch scores, and what follows from these alone: one launch after the last layer.

    score[t, p] = 1/H · Σ_h rows[t, h, p]                       heads in fixed order
    entropy[t] = −Σ_p x_p ln x_p,  x = score over the valid patches, normalised; ln(valid) of no scores
    rank[t, p] = |{p' : p' comes before p in the order of selection}|            (docs/method.md, 2 and 4)

Grid (slices, T). Each program reads all rows of its crop, T·H·P·4 bytes, and owns the ranks of SLICE
patches: it compares their keys with all P, which costs P² comparisons a crop and needs no sort. Without
ranks there is one slice. The rank does not depend on the budget, so selection becomes a comparison.
"""

import torch
import triton
import triton.language as tl

from .._launch import configuration, launch
from ..segments import Finalized
from .common import mask_arguments, order_key, power_of_2


@triton.jit
def head_mean(rows, t, p, heads, patches):
    """Mean over heads at patches p of crop t."""
    base = rows + t * heads * patches + p
    total = tl.zeros(p.shape, tl.float32)
    for h in range(0, heads):
        total += tl.load(base + h * patches, mask=p < patches, other=0.0)
    return total / heads


@triton.jit
def finalize_kernel(
    rows,
    valid,
    scores,
    entropy,
    ranks,
    stride_vt,
    stride_vp,
    heads,
    patches,
    P_PAD: tl.constexpr,
    SLICE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    RANK: tl.constexpr,
):
    s = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    p = tl.arange(0, P_PAD)
    inside = p < patches
    score = head_mean(rows, t, p, heads, patches)
    ok = inside
    if HAS_VALID:
        ok = inside & (tl.load(valid + t * stride_vt + p.to(tl.int64) * stride_vp, mask=inside, other=0) != 0)
    if s == 0:
        tl.store(scores + t * patches + p, score, mask=inside)
        weight = tl.where(ok & (score > 0.0), score, 0.0)
        total = tl.sum(weight, 0)
        share = weight / tl.maximum(total, 1.1754943508222875e-38)
        some = share > 0.0
        value = -tl.sum(tl.where(some, share * tl.log(tl.where(some, share, 1.0)), 0.0), 0)
        count = tl.maximum(tl.sum(ok.to(tl.int32), 0), 1).to(tl.float32)
        tl.store(entropy + t, tl.where((total > 0.0) & (total < float("inf")), value, tl.log(count)))
    if RANK:
        key = order_key(score, ok)
        q = s * SLICE + tl.arange(0, SLICE)
        mine = q < patches
        if HAS_VALID:
            mine = mine & (
                tl.load(valid + t * stride_vt + q.to(tl.int64) * stride_vp, mask=mine, other=0) != 0
            )
        key_q = order_key(head_mean(rows, t, q, heads, patches), mine)
        before = (key[None, :] > key_q[:, None]) | (
            (key[None, :] == key_q[:, None]) & (p[None, :] < q[:, None])
        )
        rank = tl.sum(before.to(tl.int32), 1)
        tl.store(ranks + t * patches + q, rank.to(tl.int16), mask=q < patches)


def finalize_scores(rows, *, valid=None, rank=False):
    rows = rows.contiguous()
    crops, heads, patches = rows.shape
    scores = rows.new_empty((crops, patches))
    entropy = rows.new_empty((crops,))
    ranks = torch.empty((crops, patches), dtype=torch.int16, device=rows.device) if rank else None
    options = configuration("finalize", patches, rows.device)
    size = options.pop("SLICE")
    mask, *strides = mask_arguments(valid, rows)
    launch(
        finalize_kernel,
        (triton.cdiv(patches, size) if rank else 1, crops),
        *(rows, mask, scores, entropy, ranks if rank else rows, *strides, heads, patches),
        P_PAD=power_of_2(patches, 16),
        SLICE=size,
        HAS_VALID=valid is not None,
        RANK=rank,
        **options,
    )
    return Finalized(scores, entropy, ranks)
