"""Attention that tokens receive, averaged over queries: the column mean of the softmax.

    rows[t, h, n] (+)= w_t / N · Σ_m softmax_j(scale · q[t, h, m] · k[t, h, j])[n]      (docs/method.md, 1)

Shapes: query and key [T, H, N, D] in fp32, fp16 or bf16, any strides; rows [T, H, N] fp32, contiguous.

The softmax runs along rows and the sum along columns, so the keys are read twice and no N × N map is ever in
memory. ``received_log_sums_kernel``, grid (query blocks, H, T): the log-sum-exp of each query, [T, H, N].
``received_columns_kernel``, grid (key blocks, H, T): a program owns BLOCK_N columns, loops over all queries
and sums 2^(s − log_sum). The mean over heads is taken once after the last layer, by :mod:`.finalize_scores`.

Bytes: q and k twice, 4·T·N·H·D of their dtype, and T·H·N·12; FLOPs: 4·T·H·N²·D.

Source: the two-pass scheme of FlashAttention-2's backward pass (2307.08691).
"""

import torch
import triton
import triton.language as tl

from .. import _launch
from .._env import SWITCHES
from .common import (
    LOG2E,
    alignment,
    finish_rows,
    matmul_options,
    power_of_2,
    rows_buffer,
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
    """``log_sums[t, h, m] = log2 Σ_n 2^(s[m, n])``, logits in units of log 2."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    if weight_of(weights, weight, t) != 0.0:
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, D_PAD)
        in_d = d < D
        query += tl.multiple_of(t * query_strides[0] + h * query_strides[1], ALIGN)
        key += tl.multiple_of(t * key_strides[0] + h * key_strides[1], ALIGN)
        q = query + m.to(tl.int64)[:, None] * query_strides[2] + d[None, :] * query_strides[3]
        q = tl.load(q, mask=(m < tokens)[:, None] & in_d[None, :], other=0.0)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, tokens, BLOCK_N, num_stages=STAGES):
            here = start + n
            k = key + here.to(tl.int64)[None, :] * key_strides[2] + d[:, None] * key_strides[3]
            k = tl.load(k, mask=(here < tokens)[None, :] & in_d[:, None], other=0.0)
            if UPCAST:  # the interpreter's dot would multiply the bit patterns of bfloat16
                s = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * (scale * LOG2E)
            else:
                s = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
            s = tl.where((here < tokens)[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(s - new_top[:, None]), 1)
            top = new_top
        tl.store(log_sums + (t * heads + h) * tokens + m, top + tl.log2(total), mask=m < tokens)


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
    """``rows[t, h, n] (+)= w_t / N · Σ_m 2^(s[m, n] − log_sums[t, h, m])``."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    w = weight_of(weights, weight, t)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    if w != 0.0:
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, D_PAD)
        in_d = d < D
        query += tl.multiple_of(t * query_strides[0] + h * query_strides[1], ALIGN)
        key += tl.multiple_of(t * key_strides[0] + h * key_strides[1], ALIGN)
        k = key + n.to(tl.int64)[None, :] * key_strides[2] + d[:, None] * key_strides[3]
        k = tl.load(k, mask=(n < tokens)[None, :] & in_d[:, None], other=0.0)
        for start in tl.range(0, tokens, BLOCK_M, num_stages=STAGES):
            here = start + m
            q = query + here.to(tl.int64)[:, None] * query_strides[2] + d[None, :] * query_strides[3]
            q = tl.load(q, mask=(here < tokens)[:, None] & in_d[None, :], other=0.0)
            # Beyond the last query the log-sum-exp is infinite, and the probability 0.
            log_sum = tl.load(
                log_sums + (t * heads + h) * tokens + here, mask=here < tokens, other=float("inf")
            )
            if UPCAST:
                s = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * (scale * LOG2E)
            else:
                s = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
            total += tl.sum(tl.exp2(s - log_sum[:, None]), 0)
        total = total * (w / tokens)
    place = rows + (t * heads + h) * tokens + n
    if ADD:
        total += tl.load(place, mask=n < tokens, other=0.0)
    tl.store(place, total, mask=n < tokens)


def received_attention(query, key, scale, weight, out):
    name, precision = matmul_options("received_attention", key)
    crops, heads, tokens, width = key.shape
    log_sums = torch.empty((crops, heads, tokens), dtype=torch.float32, device=key.device)
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
        "scale": float(scale),
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
