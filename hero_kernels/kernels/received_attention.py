"""Attention that tokens receive, averaged over queries: the column mean of the softmax.

    rows[t, h, n] (+)= w_t / N · Σ_m softmax_j(scale · q[t, h, m] · k[t, h, j])[n]      (docs/method.md, 1)

Shapes: query and key [T, H, N, D] in fp32, fp16 or bf16, any strides; rows [T, H, N] fp32, contiguous.

The softmax runs along rows and the sum along columns, so the keys are read twice and no N × N map is ever in
memory. ``received_log_sums_kernel``, grid (query blocks, H, T): the log-sum-exp of each query and what it
lost to rounding, [T, H, N, 2]. ``received_columns_kernel``, grid (key blocks, H, T): a program owns BLOCK_N
columns, loops over all queries and sums 2^(512 (s − log_sum)). The mean over heads is taken once after the
last layer, by :mod:`.finalize_scores`.

With ``lse``, the natural log-sum-exp of attention that ran anyway, the first kernel is not launched. Half of
the products and exponentials are left, and rows are as exact as the log-sum-exp.

The passes must round logits identically, or probabilities near 1 are wrong: both multiply in the same order,
without fused multiply-add. Tensor cores take widths that are powers of two; a product over 72 features is one
over 64 and one over 16, not one over 128.

Bytes: q and k twice, 4·T·N·H·D of their dtype, and T·H·N·20; FLOPs: 4·T·H·N²·D. With ``lse``: 2·T·N·H·D,
T·H·N·8 and 2·T·H·N²·D.

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
    head,  # of one crop, at token 0
    token,
    strides,
    tokens,
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
    main = tl.load(head + d * strides[3], mask=(token < tokens) & (d < D), other=0.0)
    rest = main
    if REST:
        d = MAIN + tl.expand_dims(tl.arange(0, REST), 1 if ACROSS else 0)
        rest = tl.load(head + d * strides[3], mask=(token < tokens) & (d < D), other=0.0)
    return main, rest


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
    if weight_of(weights, weight, t) != 0.0:
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        to_units = scale * TO_UNITS
        query += tl.multiple_of(t * query_strides[0] + h * query_strides[1], ALIGN)
        key += tl.multiple_of(t * key_strides[0] + h * key_strides[1], ALIGN)
        q, q_rest = load_head(query, m, query_strides, tokens, D, MAIN, REST, False)
        q, q_rest = times(q, power), times(q_rest, power)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, tokens, BLOCK_N, num_stages=STAGES):
            here = start + n
            k, k_rest = load_head(key, here, key_strides, tokens, D, MAIN, REST, True)
            s = products(q, q_rest, k, k_rest, REST, PRECISION, UPCAST) * to_units
            s = tl.where((here < tokens)[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            total = total * tl.exp2((top - new_top) * UNITS)
            total += tl.sum(tl.exp2((s - new_top[:, None]) * UNITS), 1)
            top = new_top
        log_total = tl.log2(checked_total(total, top)) / UNITS
        log_sum = top + log_total
        # Large logits leave few bits for the total. Elsewhere the loss is below the rounding of the logits.
        lost = tl.where(tl.abs(top) > 4.0, (log_total - (log_sum - top)) * UNITS, 0.0)
        sums = log_sums + ((t * heads + h) * tokens + m) * 2
        tl.store(sums, log_sum, mask=m < tokens)
        tl.store(sums + 1, lost, mask=m < tokens)


@triton.jit
def received_columns_kernel(
    query,
    key,
    log_sums,
    rows,
    weights,
    weight,
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
    w = weight_of(weights, weight, t)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    if w != 0.0:
        m = tl.arange(0, BLOCK_M)
        to_units = scale * TO_UNITS
        query += tl.multiple_of(t * query_strides[0] + h * query_strides[1], ALIGN)
        key += tl.multiple_of(t * key_strides[0] + h * key_strides[1], ALIGN)
        k, k_rest = load_head(key, n, key_strides, tokens, D, MAIN, REST, True)
        k, k_rest = times(k, power), times(k_rest, power)
        for start in tl.range(0, tokens, BLOCK_M, num_stages=STAGES):
            here = start + m
            q, q_rest = load_head(query, here, query_strides, tokens, D, MAIN, REST, False)
            # Beyond the last query the log-sum-exp is infinite, and the probability 0.
            sums = log_sums + ((t * heads + h) * tokens + here) * (1 if GIVEN else 2)
            log_sum = tl.load(sums, mask=here < tokens, other=float("inf"))
            if GIVEN:
                log_sum = log_sum * TO_UNITS
                lost = tl.zeros([BLOCK_M], tl.float32)
            else:
                lost = tl.load(sums + 1, mask=here < tokens, other=0.0)
            s = products(q, q_rest, k, k_rest, REST, PRECISION, UPCAST) * to_units
            # UNITS is a power of two: this fused operation rounds as two do.
            total += tl.sum(tl.exp2(tl.fma(s - log_sum[:, None], UNITS, -lost[:, None])), 0)
        total = total * (w / tokens)
    place = rows + (t * heads + h) * tokens + n
    if ADD:
        total += tl.load(place, mask=n < tokens, other=0.0)
    tl.store(place, total, mask=n < tokens)


def split_width(width: int) -> tuple[int, int]:
    """Two powers of two that cover a head width with less padding than one, or that one and 0."""
    padded = power_of_2(width, 16)
    main = padded // 2
    rest = power_of_2(width - main, 16)
    return (main, rest) if main + rest < padded else (padded, 0)


def received_attention(query, key, scale, weight, out, lse):
    name, precision = matmul_options("received_attention", key)
    crops, heads, tokens, width = key.shape
    if lse is not None:
        log_sums = lse.contiguous()
    else:
        log_sums = torch.empty((crops, heads, tokens, 2), dtype=torch.float32, device=key.device)
    rows, add = rows_buffer((crops, heads, tokens), out, key.device)
    main, rest = split_width(width)
    shared = {
        "query": query,
        "key": key,
        "log_sums": log_sums,
        **weight_arguments(weight),
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
        _launch.launch(received_log_sums_kernel, (blocks(tokens, shared["BLOCK_M"]), heads, crops), **shared)
    grid = (blocks(tokens, shared["BLOCK_N"]), heads, crops)
    _launch.launch(received_columns_kernel, grid, rows=rows, ADD=add, GIVEN=lse is not None, **shared)
    return finish_rows(rows, out)
