"""Rows of the attention map at CLS, without the map.

    rows[t, h, n] += w_t · softmax_j(scale · q[t, h, 0] · k[t, h, j])[n + 1]            (docs/method.md, 1)

Grid (H, T). A program streams the N keys of one head in blocks of BLOCK, keeps the N − 1 logits in registers
(an array [BLOCKS, BLOCK]), takes the softmax there and writes one row of ``[T, H, N − 1]`` fp32. The head
mean is taken once after the last layer, by :mod:`.finalize`.

Bytes: every key once, T·H·N·D of the key's dtype, and T·H·(N − 1)·4 out.
Crops of weight 0 read nothing: layers that score thumbnails pass by the tiles, and the other way round.
No atomics: every element has one owner, every sum a fixed order.
"""

import torch
import triton
import triton.language as tl

from .._launch import configuration, launch
from .common import LOG2E, alignment, power_of_2, weight_arguments, weight_of

MAX_PATCHES = 8192


@triton.jit
def softmax_row(
    query,  # of this crop and head: row 0
    key,  # of this crop and head: row 0
    stride_qd,
    stride_kn,
    stride_kd,
    scale,
    patches,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SECOND: tl.constexpr,
):
    """CLS attention to the patches of one crop and head, ``[BLOCKS, BLOCK]`` fp32, 0 beyond the patches."""
    d = tl.arange(0, D_PAD)
    in_d = d < D
    q = tl.load(query + d * stride_qd, mask=in_d, other=0.0).to(tl.float32) * (scale * LOG2E)
    first = tl.sum(tl.load(key + d * stride_kd, mask=in_d, other=0.0).to(tl.float32) * q, 0)
    n = tl.arange(0, BLOCK)
    block = tl.arange(0, BLOCKS)
    logits = tl.full([BLOCKS, BLOCK], float("-inf"), tl.float32)
    for i in range(0, tl.cdiv(patches, BLOCK)):
        here = i * BLOCK + n
        rows = key + (here + 1).to(tl.int64)[:, None] * stride_kn + d[None, :] * stride_kd
        k = tl.load(rows, mask=(here < patches)[:, None] & in_d[None, :], other=0.0)
        s = tl.sum(k.to(tl.float32) * q[None, :], 1)
        s = tl.where(here < patches, s, float("-inf"))
        logits = tl.where((block == i)[:, None], s[None, :], logits)
    inside = block[:, None] * BLOCK + n[None, :] < patches
    top = tl.maximum(tl.max(tl.max(logits, 1), 0), first)
    p = tl.exp2(logits - top)
    p = p / (tl.sum(tl.sum(p, 1), 0) + tl.exp2(first - top))
    if SECOND:
        top = tl.max(tl.max(p, 1), 0)
        p = tl.where(inside, tl.exp2((p - top) * LOG2E), 0.0)
        p = p / tl.sum(tl.sum(p, 1), 0)
    return p


@triton.jit
def store_row(row, p, weight, patches, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ADD: tl.constexpr):
    """``row (+)= weight · p``."""
    n = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    p = p * weight
    if ADD:
        p += tl.load(row + n, mask=n < patches, other=0.0)
    tl.store(row + n, p, mask=n < patches)


@triton.jit
def cls_row(
    query,
    key,
    rows,
    weights,
    weight,
    h,
    t,
    heads,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kn,
    stride_kd,
    scale,
    patches,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SECOND: tl.constexpr,
    ADD: tl.constexpr,
):
    """One row of ``rows``: weighted CLS attention of crop t in head h (both int64)."""
    w = weight_of(weights, weight, t, HAS_WEIGHTS)
    row = rows + (t * heads + h) * patches
    if w != 0.0:
        p = softmax_row(
            query + tl.multiple_of(t * stride_qt + h * stride_qh, ALIGN),
            key + tl.multiple_of(t * stride_kt + h * stride_kh, ALIGN),
            stride_qd,
            stride_kn,
            stride_kd,
            scale,
            patches,
            D,
            D_PAD,
            BLOCK,
            BLOCKS,
            SECOND,
        )
        store_row(row, p, w, patches, BLOCK, BLOCKS, ADD)
    else:
        if not ADD:
            store_row(row, tl.zeros([BLOCKS, BLOCK], tl.float32), 0.0, patches, BLOCK, BLOCKS, False)


@triton.jit
def cls_rows_kernel(
    query,
    key,
    rows,
    weights,
    weight,
    heads,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kn,
    stride_kd,
    scale,
    patches,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SECOND: tl.constexpr,
    ADD: tl.constexpr,
):
    """Grid (H, T): ``rows[t, h] (+)= w_t · softmax(...)`` of one crop and head."""
    cls_row(
        query,
        key,
        rows,
        weights,
        weight,
        tl.program_id(0).to(tl.int64),
        tl.program_id(1).to(tl.int64),
        heads,
        stride_qt,
        stride_qh,
        stride_qd,
        stride_kt,
        stride_kh,
        stride_kn,
        stride_kd,
        scale,
        patches,
        ALIGN,
        D,
        D_PAD,
        BLOCK,
        BLOCKS,
        HAS_WEIGHTS,
        SECOND,
        ADD,
    )


def row_blocks(patches: int, block: int) -> dict[str, int]:
    """Shape of the register array that holds a row's logits."""
    block = min(block, power_of_2(patches, 16))
    return {"BLOCK": block, "BLOCKS": power_of_2(triton.cdiv(patches, block))}


def check_patches(patches: int) -> None:
    """A row of logits is held in registers, which end somewhere."""
    if patches > MAX_PATCHES:
        raise ValueError(f"key: expected at most {MAX_PATCHES} patches a crop on a GPU, got {patches}")


def rows_buffer(shape, out, device):
    """(rows, ADD): the buffer ``[T, H, n]`` that a kernel writes or adds to."""
    if out is not None and out.is_contiguous():
        return out, True
    return torch.empty(shape, dtype=torch.float32, device=device), False


def finish_rows(rows, out):
    """Rows as an operation returns them: in ``out`` where given."""
    return rows if out is None or out is rows else out.add_(rows)


def cls_attention(query, key, scale, *, weight=1.0, out=None, second_softmax=False):
    crops, heads, tokens, width = key.shape
    patches = tokens - 1
    check_patches(patches)
    weights, weight, has_weights = weight_arguments(weight, key)
    strides = (*query.stride()[:2], query.stride(3), *key.stride())
    flags = {
        "ALIGN": alignment(query, key),
        "D": width,
        "D_PAD": power_of_2(width, 16),
        "HAS_WEIGHTS": has_weights,
    }
    rows, add = rows_buffer((crops, heads, patches), out, key.device)
    options = configuration("cls_rows", width, key.device)
    launch(
        cls_rows_kernel,
        (heads, crops),
        *(query, key, rows, weights, weight, heads, *strides),
        *(float(scale), patches),
        **{"SECOND": second_softmax, "ADD": add, **flags},
        **{**options, **row_blocks(patches, options["BLOCK"])},
    )
    return finish_rows(rows, out)
