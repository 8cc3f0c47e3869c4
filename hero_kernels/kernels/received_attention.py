"""Attention that tokens receive, averaged over queries: the column mean of the softmax.

    rows[t, h, n] (+)= w_t / N · Σ_m softmax_j(scale · q[t, h, m] · k[t, h, j])[n]      (docs/method.md, 1)

Shapes: query and key [T, H, N, D] in fp32, fp16 or bf16, any strides; rows [T, H, N] fp32, contiguous.

The softmax runs along rows and the sum along columns, so the keys are read twice and no N × N map is ever in
memory. ``received_log_sums_kernel``, grid (query blocks, H, T): the log-sum-exp of each query and what it
lost to rounding, [T, H, N, 2]. ``received_columns_kernel``, grid (key blocks, H, T): a program owns BLOCK_N
columns, loops over all queries and sums 2^(512 (s − log_sum)). The mean over heads is taken once after the
last layer, by :mod:`.finalize_scores`.

Bytes: q and k twice, 4·T·N·H·D of their dtype, and T·H·N·20; FLOPs: 4·T·H·N²·D.

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
    D_PAD: tl.constexpr,
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
        d = tl.arange(0, D_PAD)
        in_d = d < D
        to_units = scale * TO_UNITS
        query += tl.multiple_of(t * query_strides[0] + h * query_strides[1], ALIGN)
        key += tl.multiple_of(t * key_strides[0] + h * key_strides[1], ALIGN)
        q = query + m.to(tl.int64)[:, None] * query_strides[2] + d[None, :] * query_strides[3]
        q = tl.load(q, mask=(m < tokens)[:, None] & in_d[None, :], other=0.0)
        q = (q.to(tl.float32) * power).to(q.dtype)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, tokens, BLOCK_N, num_stages=STAGES):
            here = start + n
            k = key + here.to(tl.int64)[None, :] * key_strides[2] + d[:, None] * key_strides[3]
            k = tl.load(k, mask=(here < tokens)[None, :] & in_d[:, None], other=0.0)
            if UPCAST:  # the interpreter's dot would multiply the bit patterns of bfloat16
                s = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * to_units
            else:
                s = tl.dot(q, k, input_precision=PRECISION) * to_units
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
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``rows[t, h, n] (+)= w_t / N · Σ_m 2^(512 (s[m, n] − log_sums[t, h, m]))``."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    w = weight_of(weights, weight, t)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    if w != 0.0:
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, D_PAD)
        in_d = d < D
        to_units = scale * TO_UNITS
        query += tl.multiple_of(t * query_strides[0] + h * query_strides[1], ALIGN)
        key += tl.multiple_of(t * key_strides[0] + h * key_strides[1], ALIGN)
        k = key + n.to(tl.int64)[None, :] * key_strides[2] + d[:, None] * key_strides[3]
        k = tl.load(k, mask=(n < tokens)[None, :] & in_d[:, None], other=0.0)
        k = (k.to(tl.float32) * power).to(k.dtype)
        for start in tl.range(0, tokens, BLOCK_M, num_stages=STAGES):
            here = start + m
            q = query + here.to(tl.int64)[:, None] * query_strides[2] + d[None, :] * query_strides[3]
            q = tl.load(q, mask=(here < tokens)[:, None] & in_d[None, :], other=0.0)
            # Beyond the last query the log-sum-exp is infinite, and the probability 0.
            sums = log_sums + ((t * heads + h) * tokens + here) * 2
            log_sum = tl.load(sums, mask=here < tokens, other=float("inf"))
            lost = tl.load(sums + 1, mask=here < tokens, other=0.0)
            if UPCAST:
                s = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * to_units
            else:
                s = tl.dot(q, k, input_precision=PRECISION) * to_units
            total += tl.sum(tl.exp2((s - log_sum[:, None]) * UNITS - lost[:, None]), 0)
        total = total * (w / tokens)
    place = rows + (t * heads + h) * tokens + n
    if ADD:
        total += tl.load(place, mask=n < tokens, other=0.0)
    tl.store(place, total, mask=n < tokens)


def received_attention(query, key, scale, weight, out):
    name, precision = matmul_options("received_attention", key)
    crops, heads, tokens, width = key.shape
    log_sums = torch.empty((crops, heads, tokens, 2), dtype=torch.float32, device=key.device)
    rows, add = rows_buffer((crops, heads, tokens), out, key.device)
    padded = power_of_2(width, 16)
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
        "D_PAD": padded,
        "PRECISION": precision,
        "UPCAST": SWITCHES.interpret,
        "enable_fp_fusion": True,
        **_launch.configuration(name, padded, key.device),
    }
    _launch.launch(received_log_sums_kernel, (triton.cdiv(tokens, shared["BLOCK_M"]), heads, crops), **shared)
    grid = (triton.cdiv(tokens, shared["BLOCK_N"]), heads, crops)
    _launch.launch(received_columns_kernel, grid, rows=rows, ADD=add, **shared)
    return finish_rows(rows, out)
