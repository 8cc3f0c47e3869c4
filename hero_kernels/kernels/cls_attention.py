"""Rows of the attention map at CLS, without the map.

    out[t, n] += w_t / H · Σ_h softmax_j(scale · q[t, h, 0] · k[t, h, j])[n + 1]        (docs/method.md, 1)

Two forms, equal up to fp32 rounding.

``rows``, self-contained: grid (H, T). A program streams the N keys of one head in blocks of BLOCK, keeps
the N − 1 logits in registers (an array [BLOCKS, BLOCK]), takes the softmax there and writes one row of
``[T, H, N − 1]`` fp32. The head mean is taken once after the last layer, by :mod:`.finalize`.

``sums``, where the attention backend returned its log-sum-exp: grid (patch blocks, T). No reduction over
keys is left, so a program owns BLOCK patches, walks through the heads in fixed order and adds the mean
over heads to ``out`` itself.

Bytes: every key once, T·H·N·D of the key's dtype; besides ``rows`` T·H·(N − 1)·4 out, ``sums`` T·(N − 1)·8.
Crops of weight 0 read nothing: layers that score thumbnails pass by the tiles, and the other way round.
No atomics: every element has one owner, every sum a fixed order.
"""

import torch
import triton
import triton.language as tl

from .._launch import configuration, launch
from .common import LOG2E, alignment, power_of_2, weight_arguments, weight_of
from .finalize import add_mean

MAX_PATCHES = 8192


@triton.jit
def softmax_row(
    query,  # of this crop and head: row 0
    key,  # of this crop and head: row 0
    log_sum,  # of this crop and head's row 0
    stride_qd,
    stride_kn,
    stride_kd,
    scale,
    patches,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
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
    if HAS_LSE:
        p = tl.exp2(logits - tl.load(log_sum).to(tl.float32) * LOG2E)
    else:
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
    lse,
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
    stride_lt,
    stride_lh,
    scale,
    patches,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LSE: tl.constexpr,
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
            lse + t * stride_lt + h * stride_lh,
            stride_qd,
            stride_kn,
            stride_kd,
            scale,
            patches,
            D,
            D_PAD,
            BLOCK,
            BLOCKS,
            HAS_LSE,
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
    lse,
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
    stride_lt,
    stride_lh,
    scale,
    patches,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    SECOND: tl.constexpr,
    ADD: tl.constexpr,
):
    """Grid (H, T): ``rows[t, h] (+)= w_t · softmax(...)`` of one crop and head."""
    cls_row(
        query,
        key,
        lse,
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
        stride_lt,
        stride_lh,
        scale,
        patches,
        ALIGN,
        D,
        D_PAD,
        BLOCK,
        BLOCKS,
        HAS_WEIGHTS,
        HAS_LSE,
        SECOND,
        ADD,
    )


@triton.jit
def cls_sums_kernel(
    query,
    key,
    lse,
    out,
    weights,
    weight,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_lt,
    stride_lh,
    stride_ot,
    stride_on,
    scale,
    patches,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Grid (patch blocks, T): ``out[t, n] (+)= w_t / H · Σ_h exp(s[h, n] − lse[h])``."""
    t = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < patches
    d = tl.arange(0, D_PAD)
    w = weight_of(weights, weight, t, HAS_WEIGHTS)
    total = tl.zeros([BLOCK], tl.float32)
    if w != 0.0:
        for h0 in tl.static_range(0, H, H_BLOCK):
            h = h0 + tl.arange(0, H_BLOCK)
            in_h = h < H
            h64 = h.to(tl.int64)
            in_hd = in_h[:, None] & (d < D)[None, :]
            head = tl.multiple_of(t * stride_qt + h64 * stride_qh, ALIGN)
            q = query + head[:, None] + d[None, :] * stride_qd
            q = tl.load(q, mask=in_hd, other=0.0).to(tl.float32) * scale
            log_sum = tl.load(lse + t * stride_lt + h64 * stride_lh, mask=in_h, other=0.0).to(tl.float32)
            head = tl.multiple_of(t * stride_kt + h64 * stride_kh, ALIGN)
            token = (n + 1).to(tl.int64)[:, None, None] * stride_kn
            k = key + token + head[None, :, None] + d[None, None, :] * stride_kd
            k = tl.load(k, mask=inside[:, None, None] & in_hd[None, :, :], other=0.0).to(tl.float32)
            p = tl.exp2((tl.sum(k * q[None, :, :], 2) - log_sum[None, :]) * LOG2E)
            total += tl.sum(tl.where(in_h[None, :], p, 0.0), 1)
    total = total * (w / H)
    place = out + t * stride_ot + n.to(tl.int64) * stride_on
    if ADD:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


def row_blocks(patches: int, block: int) -> dict[str, int]:
    """Shape of the register array that holds a row's logits."""
    block = min(block, power_of_2(patches, 16))
    return {"BLOCK": block, "BLOCKS": power_of_2(triton.cdiv(patches, block))}


def check_patches(patches: int) -> None:
    """A row of logits is held in registers, which end somewhere."""
    if patches > MAX_PATCHES:
        raise ValueError(f"key: expected at most {MAX_PATCHES} patches a crop on a GPU, got {patches}")


def rows_buffer(shape, out, per_head, device):
    """(rows, ADD): the buffer ``[T, H, n]`` that a kernel writes or adds to."""
    if per_head and out is not None and out.is_contiguous():
        return out, True
    return torch.empty(shape, dtype=torch.float32, device=device), False


def finish_rows(rows, out, per_head):
    """Rows as an operation returns them: per head, or their mean; in ``out`` where given."""
    if not per_head:
        return add_mean(rows, out)
    return rows if out is None or out is rows else out.add_(rows)


def cls_attention(query, key, scale, *, lse=None, weight=1.0, out=None, second_softmax=False, per_head=False):
    crops, heads, tokens, width = key.shape
    patches = tokens - 1
    check_patches(patches)
    weights, weight, has_weights = weight_arguments(weight, key)
    strides = (*query.stride()[:2], query.stride(3), *key.stride())
    strides += lse.stride()[:2] if lse is not None else (0, 0)
    flags = {
        "ALIGN": alignment(query, key),
        "D": width,
        "D_PAD": power_of_2(width, 16),
        "HAS_WEIGHTS": has_weights,
    }
    if lse is not None and not (second_softmax or per_head):
        result = torch.empty((crops, patches), dtype=torch.float32, device=key.device) if out is None else out
        options = configuration("cls_sums", width, key.device)
        options["H_BLOCK"] = min(options["H_BLOCK"], power_of_2(heads))
        launch(
            cls_sums_kernel,
            (triton.cdiv(patches, options["BLOCK"]), crops),
            *(query, key, lse, result, weights, weight, *strides, *result.stride(), float(scale), patches),
            **{"H": heads, "ADD": out is not None, **flags, **options},
        )
        return result
    rows, add = rows_buffer((crops, heads, patches), out, per_head, key.device)
    options = configuration("cls_rows", width, key.device)
    launch(
        cls_rows_kernel,
        (heads, crops),
        *(query, key, key if lse is None else lse, rows, weights, weight, heads, *strides),
        *(float(scale), patches),
        **{"HAS_LSE": lse is not None, "SECOND": second_softmax, "ADD": add, **flags},
        **{**options, **row_blocks(patches, options["BLOCK"])},
    )
    return finish_rows(rows, out, per_head)
