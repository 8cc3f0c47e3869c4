"""Rows of the attention map at CLS, without the map.

    rows[t, h, n] (+)= w_t · softmax_j(scale · q[t, h, 0] · k[t, h, j])[n + 1]          (docs/method.md, 1)

Shapes: query [T, H, 1 or N, D] and key [T, H, N, D] in fp32, fp16 or bf16, any strides; rows
[T, H, N − 1] fp32, contiguous.

Grid (1, H, T). A program streams the N keys of one head in blocks of BLOCK, with STAGES − 1 loaded ahead,
keeps the N − 1 logits in registers (an array [BLOCKS, BLOCK]), computes the softmax there and writes one row.
The mean over heads is taken once after the last layer, by :mod:`.finalize_scores`.

Bytes: every key once, T·H·N·D of the key's dtype, and T·H·(N − 1)·4 out. Crops of weight 0 read nothing:
layers that score thumbnails skip the tiles, and vice versa. No atomics: every element has one owner and every
sum a fixed order.

Source: the CLS scores of HiRED (2408.10945) and FasterVLM (2412.01818); the kernel is our own.
"""

import triton
import triton.language as tl

from .. import _launch
from .common import (
    LOG2E,
    TO_UNITS,
    UNITS,
    alignment,
    blocks,
    checked_total,
    finish_rows,
    power_of_2,
    rows_buffer,
    weight_arguments,
    weight_of,
)

MAX_PATCHES = 8192


@triton.jit
def softmax_row(
    query,  # row 0 of this crop and head
    key,  # row 0 of this crop and head
    query_strides,
    key_strides,
    scale,
    patches,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    SECOND: tl.constexpr,
):
    """CLS attention to the patches of one crop and head: ``[BLOCKS, BLOCK]`` fp32, 0 beyond the patches."""
    d = tl.arange(0, D_PAD)
    in_d = d < D
    q = tl.load(query + d * query_strides[3], mask=in_d, other=0.0).to(tl.float32)
    to_units = scale * TO_UNITS
    fits = tl.max(tl.abs(q), 0) * tl.abs(to_units) < float("inf")  # else the products are scaled
    q *= tl.where(fits, to_units, 1.0)
    factor = tl.where(fits, 1.0, to_units)
    first = tl.sum(tl.load(key + d * key_strides[3], mask=in_d, other=0.0).to(tl.float32) * q, 0) * factor
    n = tl.arange(0, BLOCK)
    block = tl.arange(0, BLOCKS)
    logits = tl.full([BLOCKS, BLOCK], float("-inf"), tl.float32)
    for i in tl.range(0, tl.cdiv(patches, BLOCK), num_stages=STAGES):
        here = i * BLOCK + n
        rows = key + (here + 1).to(tl.int64)[:, None] * key_strides[2] + d[None, :] * key_strides[3]
        k = tl.load(rows, mask=(here < patches)[:, None] & in_d[None, :], other=0.0)
        s = tl.sum(k.to(tl.float32) * q[None, :], 1) * factor
        s = tl.where(here < patches, s, float("-inf"))
        logits = tl.where((block == i)[:, None], s[None, :], logits)
    inside = block[:, None] * BLOCK + n[None, :] < patches
    top = tl.maximum(tl.max(tl.max(logits, 1), 0), first)
    p = tl.exp2((logits - top) * UNITS)
    p = p / checked_total(tl.sum(tl.sum(p, 1), 0) + tl.exp2((first - top) * UNITS), top)
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
def cls_attention_kernel(
    query,
    key,
    rows,
    weights,
    weight,
    heads,
    query_strides,
    key_strides,
    scale,
    patches,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    SECOND: tl.constexpr,
    ADD: tl.constexpr,
):
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    w = weight_of(weights, weight, t)
    row = rows + (t * heads + h) * patches
    if w != 0.0:
        q = query + tl.multiple_of(t * query_strides[0] + h * query_strides[1], ALIGN)
        k = key + tl.multiple_of(t * key_strides[0] + h * key_strides[1], ALIGN)
        p = softmax_row(
            q, k, query_strides, key_strides, scale, patches, D, D_PAD, BLOCK, BLOCKS, STAGES, SECOND
        )
        store_row(row, p, w, patches, BLOCK, BLOCKS, ADD)
    else:
        if not ADD:
            store_row(row, tl.zeros([BLOCKS, BLOCK], tl.float32), 0.0, patches, BLOCK, BLOCKS, False)


def row_blocks(patches: int, block: int) -> dict[str, int]:
    """Shape of the register array that holds the logits of a row."""
    block = min(block, power_of_2(patches, 16))
    return {"BLOCK": block, "BLOCKS": power_of_2(blocks(patches, block))}


def check_patches(patches: int) -> None:
    """Raise ``ValueError`` for rows that do not fit into registers."""
    if patches > MAX_PATCHES:
        raise ValueError(f"key: expected at most {MAX_PATCHES} patches a crop on a GPU, got {patches}")


def cls_attention(query, key, scale, weight, out, second_softmax):
    crops, heads, tokens, width = key.shape
    patches = tokens - 1
    check_patches(patches)
    rows, add = rows_buffer((crops, heads, patches), out, key.device)
    options = _launch.configuration("cls_rows", width, key.device)
    _launch.launch(
        cls_attention_kernel,
        (1, heads, crops),
        query=query,
        key=key,
        rows=rows,
        **weight_arguments(weight),
        heads=heads,
        query_strides=query.stride(),
        key_strides=key.stride(),
        scale=float(scale),
        patches=patches,
        ALIGN=alignment(query, key),
        D=width,
        D_PAD=power_of_2(width, 16),
        SECOND=second_softmax,
        ADD=add,
        enable_fp_fusion=True,
        **{**options, **row_blocks(patches, options["BLOCK"])},
    )
    return finish_rows(rows, out)
