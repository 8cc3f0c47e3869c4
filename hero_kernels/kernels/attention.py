"""Flash attention, not causal, that yields the rows of CLS on the side, in one launch.

    output[t, h, m] = Σ_n softmax_n(scale · q[t, h, m] · k[t, h, n]) · v[t, h, n]
    rows[t, h, n] += w_t · softmax_j(scale · q[t, h, 0] · k[t, h, j])[n + 1]

Grid (1 + query blocks, H, T). The first program of a head makes its row with the code of
:mod:`.cls_attention`, so rows do not depend on how attention is computed; it starts first, since it reads
all keys. The others are plain online-softmax attention for BLOCK_M queries each. The key and value of CLS
seed the running maximum, sum and output (m = s₀, l = 1, acc = v₀), which leaves the patches: 576 of them are
nine blocks of 64, and no lane is masked.

Bytes: q, k, v and the output once, 4·T·N·H·D of their dtype, if the keys and values of a head stay in L2;
FLOPs: 4·T·H·N²·D.
"""

import torch
import triton
import triton.language as tl

from .._env import SWITCHES
from .._launch import configuration, launch
from .cls_attention import check_patches, cls_row, finish_rows, row_blocks, rows_buffer
from .common import LOG2E, alignment, power_of_2, weight_arguments


@triton.jit
def attention_kernel(
    query,
    key,
    value,
    output,
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
    stride_vt,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_ot,
    stride_oh,
    stride_on,
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
    HAS_WEIGHTS: tl.constexpr,
    SECOND: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):
    h = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2).to(tl.int64)
    if tl.program_id(0) == 0:
        cls_row(
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
            ALIGN,
            D,
            D_PAD,
            BLOCK,
            BLOCKS,
            HAS_WEIGHTS,
            SECOND,
            ADD,
        )
    else:
        m = (tl.program_id(0) - 1) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, D_PAD)
        in_d = d < D
        in_m = m <= patches
        to_log2 = scale * LOG2E
        query += tl.multiple_of(t * stride_qt + h * stride_qh, ALIGN)
        key += tl.multiple_of(t * stride_kt + h * stride_kh, ALIGN)
        value += tl.multiple_of(t * stride_vt + h * stride_vh, ALIGN)
        output += tl.multiple_of(t * stride_ot + h * stride_oh, ALIGN)
        q = query + m.to(tl.int64)[:, None] * stride_qn + d[None, :] * stride_qd
        q = tl.load(q, mask=in_m[:, None] & in_d[None, :], other=0.0)
        k_cls = tl.load(key + d * stride_kd, mask=in_d, other=0.0).to(tl.float32)
        v_cls = tl.load(value + d * stride_vd, mask=in_d, other=0.0).to(tl.float32)
        top = tl.sum(q.to(tl.float32) * k_cls[None, :], 1) * to_log2
        total = tl.full([BLOCK_M], 1.0, tl.float32)
        acc = tl.zeros([BLOCK_M, D_PAD], tl.float32) + v_cls[None, :]
        for start in tl.range(0, patches, BLOCK_N, num_stages=STAGES):
            here = start + n
            token = (here + 1).to(tl.int64)
            k = key + token[None, :] * stride_kn + d[:, None] * stride_kd
            v = value + token[:, None] * stride_vn + d[None, :] * stride_vd
            if EVEN:
                k = tl.load(k, mask=in_d[:, None], other=0.0)
                v = tl.load(v, mask=in_d[None, :], other=0.0)
            else:
                k = tl.load(k, mask=(here < patches)[None, :] & in_d[:, None], other=0.0)
                v = tl.load(v, mask=(here < patches)[:, None] & in_d[None, :], other=0.0)
            if UPCAST:  # the interpreter's dot would multiply the bits of bfloat16
                s = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision=PRECISION) * to_log2
            else:
                s = tl.dot(q, k, input_precision=PRECISION) * to_log2
            if not EVEN:
                s = tl.where((here < patches)[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(p, 1)
            p = p.to(v.dtype)
            acc = acc * fade[:, None]
            if UPCAST:
                acc = tl.dot(p.to(tl.float32), v.to(tl.float32), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(p, v, acc, input_precision=PRECISION)
            top = new_top
        place = output + m.to(tl.int64)[:, None] * stride_on + d[None, :]
        acc = acc / total[:, None]
        tl.store(place, acc.to(output.dtype.element_ty), mask=in_m[:, None] & in_d[None, :])


def attention_with_cls(query, key, value, scale, *, weight=1.0, out=None, second_softmax=False):
    check_dtype(key)
    crops, heads, tokens, width = key.shape
    patches = tokens - 1
    check_patches(patches)
    output = torch.empty((crops, tokens, heads, width), dtype=key.dtype, device=key.device).transpose(1, 2)
    rows, add = rows_buffer((crops, heads, patches), out, key.device)
    weights, weight, has_weights = weight_arguments(weight, key)
    padded = power_of_2(width, 16)
    options = configuration(by_precision("attention", key.dtype), padded, key.device)
    launch(
        attention_kernel,
        (1 + triton.cdiv(tokens, options["BLOCK_M"]), heads, crops),
        *(query, key, value, output, rows, weights, weight, heads),
        *(*query.stride(), *key.stride(), *value.stride(), *output.stride()[:3], float(scale), patches),
        ALIGN=alignment(query, key, value, output),
        D=width,
        D_PAD=padded,
        EVEN=patches % options["BLOCK_N"] == 0,
        HAS_WEIGHTS=has_weights,
        SECOND=second_softmax,
        ADD=add,
        PRECISION=dot_precision(key.dtype),
        UPCAST=SWITCHES.interpret,
        **{**options, **row_blocks(patches, options["BLOCK"])},
    )
    return output, finish_rows(rows, out)


def check_dtype(key: torch.Tensor) -> None:
    """Products of matrices are those of the GPU's own units."""
    if key.dtype == torch.float64:
        raise TypeError("key: expected float32, float16 or bfloat16 on a GPU, got float64")


def by_precision(kernel: str, dtype: torch.dtype) -> str:
    """The name of a kernel's configuration: products of fp32 run on other units, out of registers."""
    return kernel + "_fp32" if dtype == torch.float32 else kernel


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 is multiplied as fp32, not rounded to tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"
