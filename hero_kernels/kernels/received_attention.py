"""Attention that tokens receive, averaged over queries: the column mean of the softmax.

    rows[t, h, n] (+)= w_t / N · Σ_m softmax_j(scale · q[t, h, m] · k[t, h, j])[n]      (docs/method.md, 1)

Shapes: query and key [T, H, N, D] in fp32, fp16 or bf16, any strides; rows [T, H, N] fp32, contiguous. With
cu_seqlens [S + 1] int32, T is 1, and each of S segments of the N tokens plays the part of a crop: t is a
segment, and N in the formula its length.

The softmax runs along rows and the sum along columns, so the keys are read twice and no N × N map is ever in
memory. ``received_log_sums_kernel``, grid (query blocks, H, T): the log-sum-exp of each query and what it
lost to rounding, [T, H, N, 2]. ``received_columns_kernel``, grid (key blocks, H, T): a program owns BLOCK_N
columns, loops over all queries and sums 2^(512 (s − log_sum)). The mean over heads is taken once after the
last layer, by :mod:`.finalize_scores`.

Of segments the grids are (blocks of the longest segment, H, S): still one pair of launches, in which programs
beyond the end of a shorter segment find nothing to do. Blocks begin where their segment does, so its rows do
not depend on the others. Bounds are clamped to N: wrong ones give wrong rows, and no access outside.

With ``lse``, the natural log-sum-exp of attention that ran anyway, the first kernel is not launched. Half of
the products and exponentials are left, and rows are as exact as the log-sum-exp.

The passes must round logits identically, or probabilities near 1 are wrong: both multiply in the same order,
without fused multiply-add. Tensor cores take widths that are powers of two; a product over 72 features is one
over 64 and one over 16, not one over 128.

Bytes: q and k twice, 4·T·N·H·D of their dtype, and T·H·N·20; FLOPs: 4·T·H·N²·D. With ``lse``: 2·T·N·H·D,
T·H·N·8 and 2·T·H·N²·D. Of segments of n_s tokens, N² is Σ n_s².

Source: the two-pass scheme of FlashAttention-2's backward pass (2307.08691).
"""

import torch
import triton
import triton.language as tl

from .. import _launch
from .._env import SWITCHES
from .common import (
    TO_UNITS,
    UNITS,
    alignment,
    blocks,
    checked_total,
    finish_rows,
    matmul_options,
    power_of_2,
    rows_buffer,
    scale_arguments,
    weight_arguments,
    weight_of,
)


@triton.jit
def load_head(
    head,  # of one crop or segment, at token 0
    token,
    strides,
    count,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """``[tokens, MAIN]`` and ``[tokens, REST]`` features of tokens, transposed if ACROSS; 0 beyond the last.

    If REST is 0, the second is the first, and is not used.
    """
    token = tl.expand_dims(token, 0 if ACROSS else 1)
    d = tl.expand_dims(tl.arange(0, MAIN), 1 if ACROSS else 0)
    head += token.to(tl.int64) * strides[2]
    main = tl.load(head + d * strides[3], mask=(token < count) & (d < D), other=0.0)
    rest = main
    if REST:
        d = MAIN + tl.expand_dims(tl.arange(0, REST), 1 if ACROSS else 0)
        rest = tl.load(head + d * strides[3], mask=(token < count) & (d < D), other=0.0)
    return main, rest


@triton.jit
def segment_of(cu_seqlens, t, start, w, tokens):
    """Where crop or segment t lies: its crop, first token and number of tokens; and its weight w.

    The weight is 0 for a block of tokens that begins beyond the last, at ``start``: it has no work.
    """
    if cu_seqlens is None:
        return t, 0, tokens, w
    else:
        first = tl.maximum(tl.minimum(tl.load(cu_seqlens + t), tokens), 0)
        count = tl.maximum(tl.minimum(tl.load(cu_seqlens + t + 1), tokens), first) - first
        return 0, first.to(tl.int64), count, tl.where(start < count, w, 0.0)


@triton.jit
def place_of(strides, crop, h, first, ALIGN: tl.constexpr):
    """Offset of the first token of a head. Compilers forget ALIGN with an addition of 0: one of two stays."""
    head = tl.multiple_of(crop * strides[0] + h * strides[1], ALIGN)
    return tl.multiple_of(head + first * strides[2], ALIGN)


@triton.jit
def times(x, power):
    """``x · power`` in the dtype of x; exact for a power of two."""
    return (x.to(tl.float32) * power).to(x.dtype)


@triton.jit
def products(q, q_rest, k, k_rest, REST: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``q · k`` in fp32 of what :func:`load_head` returns."""
    if UPCAST:  # the interpreter's dot would multiply the bit patterns of bfloat16
        q, q_rest, k, k_rest = (
            q.to(tl.float32),
            q_rest.to(tl.float32),
            k.to(tl.float32),
            k_rest.to(tl.float32),
        )
    s = tl.dot(q, k, input_precision=PRECISION)
    if REST:
        s = tl.dot(q_rest, k_rest, s, input_precision=PRECISION)
    return s


@triton.jit
def received_log_sums_kernel(
    query,
    key,
    log_sums,
    weights,
    weight,
    cu_seqlens,
    heads,
    query_strides,
    key_strides,
    power,
    scale,
    tokens,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``log_sums[t, h, m] = log2 Σ_n 2^(512 s[m, n]) / 512``, and what it lost, times 512."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    crop, first, count, w = segment_of(cu_seqlens, t, start, weight_of(weights, weight, t), tokens)
    if w != 0.0:
        m = start + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        to_units = scale * TO_UNITS
        query += place_of(query_strides, crop, h, first, ALIGN)
        key += place_of(key_strides, crop, h, first, ALIGN)
        q, q_rest = load_head(query, m, query_strides, count, D, MAIN, REST, False)
        q, q_rest = times(q, power), times(q_rest, power)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for begin in tl.range(0, count, BLOCK_N, num_stages=STAGES):
            here = begin + n
            k, k_rest = load_head(key, here, key_strides, count, D, MAIN, REST, True)
            s = products(q, q_rest, k, k_rest, REST, PRECISION, UPCAST) * to_units
            s = tl.where((here < count)[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            total = total * tl.exp2((top - new_top) * UNITS)
            total += tl.sum(tl.exp2((s - new_top[:, None]) * UNITS), 1)
            top = new_top
        log_total = tl.log2(checked_total(total, top)) / UNITS
        log_sum = top + log_total
        # Large logits leave few bits for the total. Elsewhere the loss is below the rounding of the logits.
        lost = tl.where(tl.abs(top) > 4.0, (log_total - (log_sum - top)) * UNITS, 0.0)
        sums = log_sums + ((crop * heads + h) * tokens + first + m) * 2
        tl.store(sums, log_sum, mask=m < count)
        tl.store(sums + 1, lost, mask=m < count)


@triton.jit
def received_columns_kernel(
    query,
    key,
    log_sums,
    rows,
    weights,
    weight,
    cu_seqlens,
    heads,
    query_strides,
    key_strides,
    power,
    scale,
    tokens,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ADD: tl.constexpr,
    GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``rows[t, h, n] (+)= w_t / N · Σ_m 2^(512 (s[m, n] − log_sums[t, h, m]))``.

    If GIVEN, ``log_sums`` are natural logarithms [T, H, N], computed elsewhere.
    """
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    crop, first, count, w = segment_of(cu_seqlens, t, start, weight_of(weights, weight, t), tokens)
    n = start + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    if w != 0.0:
        m = tl.arange(0, BLOCK_M)
        to_units = scale * TO_UNITS
        query += place_of(query_strides, crop, h, first, ALIGN)
        key += place_of(key_strides, crop, h, first, ALIGN)
        k, k_rest = load_head(key, n, key_strides, count, D, MAIN, REST, True)
        k, k_rest = times(k, power), times(k_rest, power)
        for begin in tl.range(0, count, BLOCK_M, num_stages=STAGES):
            here = begin + m
            q, q_rest = load_head(query, here, query_strides, count, D, MAIN, REST, False)
            # Beyond the last query the log-sum-exp is infinite, and the probability 0.
            sums = log_sums + ((crop * heads + h) * tokens + first + here) * (1 if GIVEN else 2)
            log_sum = tl.load(sums, mask=here < count, other=float("inf"))
            if GIVEN:
                log_sum = log_sum * TO_UNITS
                lost = tl.zeros([BLOCK_M], tl.float32)
            else:
                lost = tl.load(sums + 1, mask=here < count, other=0.0)
            s = products(q, q_rest, k, k_rest, REST, PRECISION, UPCAST) * to_units
            # UNITS is a power of two: this fused operation rounds as two do.
            total += tl.sum(tl.exp2(tl.fma(s - log_sum[:, None], UNITS, -lost[:, None])), 0)
        total = total * (w / count)
    place = rows + (crop * heads + h) * tokens + first + n
    if ADD:
        total += tl.load(place, mask=n < count, other=0.0)
    tl.store(place, total, mask=n < count)


def split_width(width: int) -> tuple[int, int]:
    """Two powers of two that cover a head width with less padding than one, or that one and 0."""
    padded = power_of_2(width, 16)
    main = padded // 2
    rest = power_of_2(width - main, 16)
    return (main, rest) if main + rest < padded else (padded, 0)


def received_attention(query, key, scale, weight, out, lse, cu_seqlens, max_seqlen):
    name, precision = matmul_options("received_attention", key)
    crops, heads, tokens, width = key.shape
    if lse is not None:
        log_sums = lse.contiguous()
    else:
        log_sums = torch.empty((crops, heads, tokens, 2), dtype=torch.float32, device=key.device)
    rows, add = rows_buffer((crops, heads, tokens), out, key.device)
    main, rest = split_width(width)
    longest, count = (tokens, crops) if cu_seqlens is None else (max_seqlen, len(cu_seqlens) - 1)
    shared = {
        "query": query,
        "key": key,
        "log_sums": log_sums,
        **weight_arguments(weight),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "heads": heads,
        "query_strides": query.stride(),
        "key_strides": key.stride(),
        **scale_arguments(scale, key),
        "tokens": tokens,
        "ALIGN": alignment(query, key),
        "D": width,
        "MAIN": main,
        "REST": rest,
        "PRECISION": precision,
        "UPCAST": SWITCHES.interpret,
        "enable_fp_fusion": False,  # the passes round as each other
        **_launch.configuration(name, main + rest, key.device),
    }
    if lse is None:
        _launch.launch(received_log_sums_kernel, (blocks(longest, shared["BLOCK_M"]), heads, count), **shared)
    grid = (blocks(longest, shared["BLOCK_N"]), heads, count)
    _launch.launch(received_columns_kernel, grid, rows=rows, ADD=add, GIVEN=lse is not None, **shared)
    return finish_rows(rows, out)
