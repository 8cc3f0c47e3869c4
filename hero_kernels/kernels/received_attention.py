"""Attention that tokens receive, averaged over queries and heads: the column mean of the softmax.

    rows[t, h, n] += w_t / N · Σ_m softmax_j(scale · q[t, h, m] · k[t, h, j])[n]     (docs/method.md, 1)

The softmax runs along rows and the sum along columns, so the keys are passed over twice and no N × N map
is ever in memory. ``log_sums``: grid (query blocks, H, T), the log-sum-exp of each query, ``[T, H, N]``.
``columns``: grid (key blocks, H, T); a program owns BLOCK_N columns, goes through all queries and sums
exp(s − lse). The head mean is taken once after the last layer, by :mod:`.finalize`.

Bytes: q and k twice, 4·T·N·H·D of their dtype, and T·H·N·12; FLOPs: 4·T·H·N²·D.
"""

import torch
import triton
import triton.language as tl

from .._env import SWITCHES
from .._launch import configuration, launch
from .attention import by_precision, check_dtype, dot_precision
from .cls_attention import finish_rows, rows_buffer
from .common import LOG2E, alignment, power_of_2, weight_arguments, weight_of


@triton.jit
def log_sums_kernel(
    query,
    key,
    lse,
    weights,
    weight,
    heads,
    stride_qt,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kn,
    stride_kd,
    scale,
    tokens,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``lse[t, h, m] = log2 Σ_n 2^(s[m, n])``, logits in units of log 2."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    if weight_of(weights, weight, t, HAS_WEIGHTS) != 0.0:
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, D_PAD)
        in_d = d < D
        query += tl.multiple_of(t * stride_qt + h * stride_qh, ALIGN)
        key += tl.multiple_of(t * stride_kt + h * stride_kh, ALIGN)
        q = query + m.to(tl.int64)[:, None] * stride_qn + d[None, :] * stride_qd
        q = tl.load(q, mask=(m < tokens)[:, None] & in_d[None, :], other=0.0)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, tokens, BLOCK_N, num_stages=STAGES):
            here = start + n
            k = key + here.to(tl.int64)[None, :] * stride_kn + d[:, None] * stride_kd
            k = tl.load(k, mask=(here < tokens)[None, :] & in_d[:, None], other=0.0)
            if UPCAST:  # the interpreter's dot would multiply the bits of bfloat16
                s = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * (scale * LOG2E)
            else:
                s = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
            s = tl.where((here < tokens)[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(s - new_top[:, None]), 1)
            top = new_top
        tl.store(lse + (t * heads + h) * tokens + m, top + tl.log2(total), mask=m < tokens)


@triton.jit
def columns_kernel(
    query,
    key,
    lse,
    rows,
    weights,
    weight,
    heads,
    stride_qt,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kn,
    stride_kd,
    scale,
    tokens,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``rows[t, h, n] (+)= w_t / N · Σ_m 2^(s[m, n] − lse[m])``."""
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    w = weight_of(weights, weight, t, HAS_WEIGHTS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    if w != 0.0:
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, D_PAD)
        in_d = d < D
        query += tl.multiple_of(t * stride_qt + h * stride_qh, ALIGN)
        key += tl.multiple_of(t * stride_kt + h * stride_kh, ALIGN)
        k = key + n.to(tl.int64)[None, :] * stride_kn + d[:, None] * stride_kd
        k = tl.load(k, mask=(n < tokens)[None, :] & in_d[:, None], other=0.0)
        for start in tl.range(0, tokens, BLOCK_M, num_stages=STAGES):
            here = start + m
            q = query + here.to(tl.int64)[:, None] * stride_qn + d[None, :] * stride_qd
            q = tl.load(q, mask=(here < tokens)[:, None] & in_d[None, :], other=0.0)
            # Beyond the last query the log-sum-exp is infinite, and the probability 0.
            log_sum = tl.load(lse + (t * heads + h) * tokens + here, mask=here < tokens, other=float("inf"))
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


def received_attention(query, key, scale, *, weight=1.0, out=None):
    check_dtype(key)
    crops, heads, tokens, width = key.shape
    lse = torch.empty((crops, heads, tokens), dtype=torch.float32, device=key.device)
    rows, add = rows_buffer((crops, heads, tokens), out, key.device)
    weights, weight, has_weights = weight_arguments(weight, key)
    padded = power_of_2(width, 16)
    options = configuration(by_precision("received_attention", key.dtype), padded, key.device)
    options.update(
        ALIGN=alignment(query, key),
        D=width,
        D_PAD=padded,
        HAS_WEIGHTS=has_weights,
        PRECISION=dot_precision(key.dtype),
        UPCAST=SWITCHES.interpret,
    )
    numbers = (*query.stride(), *key.stride(), float(scale), tokens)
    launch(
        log_sums_kernel,
        (triton.cdiv(tokens, options["BLOCK_M"]), heads, crops),
        *(query, key, lse, weights, weight, heads, *numbers),
        **options,
    )
    launch(
        columns_kernel,
        (triton.cdiv(tokens, options["BLOCK_N"]), heads, crops),
        *(query, key, lse, rows, weights, weight, heads, *numbers),
        **{"ADD": add, **options},
    )
    return finish_rows(rows, out)
