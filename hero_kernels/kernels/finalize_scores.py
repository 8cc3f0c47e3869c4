"""Patch scores from rows per head, their entropy and their ranks, in one launch after the last layer.

    score[t, p] = 1/H · Σ_h rows[t, h, p]                       heads in fixed order
    entropy[t] = −Σ_p x_p ln x_p,  x = score over the valid patches, normalised; ln(valid) without scores
    rank[t, p] = |{p' : p' comes before p in selection order}|                   (docs/method.md, 2 and 4)

Shapes: rows [T, H, P] fp32, valid [T, P] bytes or None; scores [T, P] fp32, entropy [T] fp32, ranks [T, P]
int16 or None. All contiguous.

Grid (slices, T). Each program reads all rows of its crop and owns the ranks of SLICE patches: it compares
their keys with all P, which takes P² comparisons per crop and no sort. Without ranks there is one slice. The
rank does not depend on the budget, so selection becomes a comparison.

Bytes: T·H·P·4 in (again from L2 for each slice), T·P·6 out.

Source: our own.
"""

import torch
import triton
import triton.language as tl

from .. import _launch
from ..segments import Finalized
from .common import as_bytes, blocks, order_key, power_of_2, valid_patches


@triton.jit
def head_mean(rows, t, p, heads, patches):
    """Mean over heads at patches p of crop t."""
    base = rows + t * heads * patches + p
    total = tl.zeros(p.shape, tl.float32)
    for h in range(0, heads):
        total += tl.load(base + h * patches, mask=p < patches, other=0.0)
    return total / heads


@triton.jit
def finalize_scores_kernel(
    rows,
    valid,
    scores,
    entropy,
    ranks,
    heads,
    patches,
    P_PAD: tl.constexpr,
    SLICE: tl.constexpr,
):
    s = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    p = tl.arange(0, P_PAD)
    inside = p < patches
    score = head_mean(rows, t, p, heads, patches)
    ok = valid_patches(valid, t, p, inside, patches)
    if s == 0:
        tl.store(scores + t * patches + p, score, mask=inside)
        weight = tl.where(ok & (score > 0.0), score, 0.0)
        total = tl.sum(weight, 0)
        share = weight / tl.maximum(total, 1.1754943508222875e-38)
        some = share > 0.0
        value = -tl.sum(tl.where(some, share * tl.log(tl.where(some, share, 1.0)), 0.0), 0)
        count = tl.maximum(tl.sum(ok.to(tl.int32), 0), 1).to(tl.float32)
        tl.store(entropy + t, tl.where((total > 0.0) & (total < float("inf")), value, tl.log(count)))
    if ranks is not None:
        key = order_key(score, ok)
        q = s * SLICE + tl.arange(0, SLICE)
        mine = valid_patches(valid, t, q, q < patches, patches)
        key_q = order_key(head_mean(rows, t, q, heads, patches), mine)
        before = (key[None, :] > key_q[:, None]) | (
            (key[None, :] == key_q[:, None]) & (p[None, :] < q[:, None])
        )
        rank = tl.sum(before.to(tl.int32), 1)
        tl.store(ranks + t * patches + q, rank.to(tl.int16), mask=q < patches)


def finalize_scores(rows, valid, rank):
    rows = rows.contiguous()
    crops, heads, patches = rows.shape
    scores = rows.new_empty((crops, patches))
    entropy = rows.new_empty((crops,))
    ranks = torch.empty((crops, patches), dtype=torch.int16, device=rows.device) if rank else None
    options = _launch.configuration("finalize", patches, rows.device)
    _launch.launch(
        finalize_scores_kernel,
        (max(blocks(patches, options["SLICE"]), 1) if rank else 1, crops),
        rows=rows,
        valid=as_bytes(valid),
        scores=scores,
        entropy=entropy,
        ranks=ranks,
        heads=heads,
        patches=patches,
        P_PAD=power_of_2(patches, 16),
        enable_fp_fusion=True,
        **options,
    )
    return Finalized(scores, entropy, ranks)
