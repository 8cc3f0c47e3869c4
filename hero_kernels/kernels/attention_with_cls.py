"""Flash attention, not causal, that also returns the CLS rows, in one launch.

    output[t, h, m] = Σ_n softmax_n(scale · q[t, h, m] · k[t, h, n]) · v[t, h, n]
    rows[t, h, n] (+)= w_t · softmax_j(scale · q[t, h, 0] · k[t, h, j])[n + 1]

Shapes: query, key, value [T, H, N, D] in fp32, fp16 or bf16, any strides; output [T, H, N, D] in their dtype,
with the memory of [T, N, H, D]; rows [T, H, N − 1] fp32, contiguous.

Grid (1 + query blocks, H, T). The first program of a head runs the kernel of :mod:`.cls_attention`, so rows
do not depend on how attention is computed; it starts first, since it reads all keys. The others are plain
online-softmax attention for BLOCK_M queries each. The key and value of CLS initialise the running maximum,
sum and output (m = s₀, l = 1, acc = v₀), which leaves the patches: 576 of them are nine blocks of 64, and no
lane is masked.

Bytes: q, k, v and the output once, 4·T·N·H·D of their dtype, if the keys and values of a head stay in L2;
FLOPs: 4·T·H·N²·D.

Source: FlashAttention-2 (2307.08691), forward pass.
"""

import torch
import triton
import triton.language as tl

from .. import _launch
from .._env import SWITCHES
from .cls_attention import check_patches, cls_attention_kernel, row_blocks
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
)


@triton.jit
def attention_with_cls_kernel(
    query,
    key,
    value,
    output,
    rows,
    weights,
    weight,
    heads,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    power,
    scale,
    patches,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    SECOND: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    if tl.program_id(0) == 0:
        cls_attention_kernel(
            query,
            key,
            rows,
            weights,
            weight,
            heads,
            query_strides,
            key_strides,
            power * scale,
            patches,
            ALIGN,
            D,
            D_PAD,
            BLOCK,
            BLOCKS,
            1,  # shared memory is for the others
            SECOND,
            ADD,
        )
    else:
        m = (tl.program_id(0) - 1) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, D_PAD)
        in_d = d < D
        in_m = m <= patches
        to_units = scale * TO_UNITS
        query += tl.multiple_of(t * query_strides[0] + h * query_strides[1], ALIGN)
        key += tl.multiple_of(t * key_strides[0] + h * key_strides[1], ALIGN)
        value += tl.multiple_of(t * value_strides[0] + h * value_strides[1], ALIGN)
        output += tl.multiple_of(t * output_strides[0] + h * output_strides[1], ALIGN)
        q = query + m.to(tl.int64)[:, None] * query_strides[2] + d[None, :] * query_strides[3]
        q = tl.load(q, mask=in_m[:, None] & in_d[None, :], other=0.0)
        q = (q.to(tl.float32) * power).to(q.dtype)
        k_cls = tl.load(key + d * key_strides[3], mask=in_d, other=0.0).to(tl.float32)
        v_cls = tl.load(value + d * value_strides[3], mask=in_d, other=0.0).to(tl.float32)
        top = tl.sum(q.to(tl.float32) * k_cls[None, :], 1) * to_units
        total = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = tl.zeros([BLOCK_M, D_PAD], tl.float32) + v_cls[None, :]
        for start in tl.range(0, patches, BLOCK_N, num_stages=STAGES):
            here = start + n
            token = (here + 1).to(tl.int64)
            k = key + token[None, :] * key_strides[2] + d[:, None] * key_strides[3]
            v = value + token[:, None] * value_strides[2] + d[None, :] * value_strides[3]
            if EVEN:
                k = tl.load(k, mask=in_d[:, None], other=0.0)
                v = tl.load(v, mask=in_d[None, :], other=0.0)
            else:
                k = tl.load(k, mask=(here < patches)[None, :] & in_d[:, None], other=0.0)
                v = tl.load(v, mask=(here < patches)[:, None] & in_d[None, :], other=0.0)
            if UPCAST:  # the interpreter's dot would multiply the bit patterns of bfloat16
                s = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * to_units
            else:
                s = tl.dot(q, k, input_precision=PRECISION) * to_units
            if not EVEN:
                s = tl.where((here < patches)[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2((s - new_top[:, None]) * UNITS)
            fade = tl.exp2((top - new_top) * UNITS)
            total = total * fade + tl.sum(p, 1)
            p = p.to(v.dtype)
            acc = acc * fade[:, None]
            if UPCAST:
                acc = tl.dot(p.to(tl.float32), v.to(tl.float32), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(p, v, acc, input_precision=PRECISION)
            top = new_top
        place = output + m.to(tl.int64)[:, None] * output_strides[2] + d[None, :]
        acc = acc / checked_total(total, top)[:, None]
        tl.store(place, acc.to(output.dtype.element_ty), mask=in_m[:, None] & in_d[None, :])


def attention_with_cls(query, key, value, scale, weight, out, second_softmax):
    name, precision = matmul_options("attention", key)
    crops, heads, tokens, width = key.shape
    patches = tokens - 1
    check_patches(patches)
    output = torch.empty((crops, tokens, heads, width), dtype=key.dtype, device=key.device).transpose(1, 2)
    rows, add = rows_buffer((crops, heads, patches), out, key.device)
    padded = power_of_2(width, 16)
    options = _launch.configuration(name, padded, key.device)
    _launch.launch(
        attention_with_cls_kernel,
        (1 + blocks(tokens, options["BLOCK_M"]), heads, crops),
        query=query,
        key=key,
        value=value,
        output=output,
        rows=rows,
        **weight_arguments(weight),
        heads=heads,
        query_strides=query.stride(),
        key_strides=key.stride(),
        value_strides=value.stride(),
        output_strides=output.stride(),
        **scale_arguments(scale, key),
        patches=patches,
        ALIGN=alignment(query, key, value, output),
        D=width,
        D_PAD=padded,
        EVEN=patches % options["BLOCK_N"] == 0,
        SECOND=second_softmax,
        ADD=add,
        PRECISION=precision,
        UPCAST=SWITCHES.interpret,
        enable_fp_fusion=True,
        **{**options, **row_blocks(patches, options["BLOCK"])},
    )
    return output, finish_rows(rows, out)
