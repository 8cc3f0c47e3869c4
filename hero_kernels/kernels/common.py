"""Shared by several kernels: the columns of the segment table, device functions, and launch arguments.

Conventions: ``t`` is a crop, ``h`` a head, ``m`` a query, ``n`` a key or patch, ``d`` a feature. Base offsets
are int64. Strides are tuples. An absent tensor is ``None``: the branch that reads it is not compiled.
"""

import torch
import triton
import triton.language as tl

from ..reference import split_scale
from ..segments import COLUMNS

# Columns of the segment table, one row per image.
WIDTH = tl.constexpr(len(COLUMNS))
FIRST_CROP = tl.constexpr(COLUMNS.index("first_crop"))
FIRST_ROW = tl.constexpr(COLUMNS.index("first_row"))
TABLE_ROWS = tl.constexpr(COLUMNS.index("rows"))
CROPS = tl.constexpr(COLUMNS.index("crops"))
THUMBNAIL = tl.constexpr(COLUMNS.index("thumbnail"))
GRID_WIDTH = tl.constexpr(COLUMNS.index("grid_width"))
THUMBNAIL_TOKENS = tl.constexpr(COLUMNS.index("thumbnail_tokens"))
TILE_TOKENS = tl.constexpr(COLUMNS.index("tile_tokens"))
NEWLINE_BEGIN = tl.constexpr(COLUMNS.index("newline_begin"))
NEWLINE_END = tl.constexpr(COLUMNS.index("newline_end"))
THUMBNAIL_NEWLINE = tl.constexpr(COLUMNS.index("thumbnail_newline"))

LOG2E = tl.constexpr(1.4426950408889634)
# Kernels keep logits s in units of 512 · ln 2, with exponential 2^(512 s): a power of two does not change how
# they are rounded. Sums of products and differences of logits then fit fp32 wherever the logits do.
UNITS = tl.constexpr(512.0)
TO_UNITS = tl.constexpr(LOG2E.value / UNITS.value)
LARGEST_LOGIT = tl.constexpr(torch.finfo(torch.float32).max * TO_UNITS.value * (1 + 2.0**-22))  # rounded up
INFINITY_BITS = tl.constexpr(0x7F800000)
MOST_WIDTH = 8192


@triton.jit
def order_key(x, ok):
    """uint32 keys in selection order (method.md, 4): 0 where not ok, 1 for NaN, then numbers; −0 equals +0.

    Integer arithmetic only: a device may flush subnormals in floating-point comparisons.
    """
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, bits)
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    key = tl.where(magnitude > INFINITY_BITS, tl.full([], 1, tl.uint32), key)
    return tl.where(ok, key, tl.full([], 0, tl.uint32))


@triton.jit
def checked_total(total, top):
    """The sum of exponentials; NaN, as in the reference, where the largest logit ``top`` is beyond fp32."""
    return tl.where(tl.abs(top) <= LARGEST_LOGIT, total, float("nan"))


@triton.jit
def weight_of(weights, weight, t):
    """Weight of a layer for crop t: from ``weights`` [T], or one number for all crops."""
    if weights is None:
        return weight
    else:
        return tl.load(weights + t)


@triton.jit
def valid_patches(valid, t, p, inside, patches):
    """``inside``, restricted to the valid patches of crop t; ``valid`` is [T, P] bytes or ``None``."""
    if valid is None:
        return inside
    else:
        return inside & (tl.load(valid + t * patches + p, mask=inside, other=0) != 0)


def power_of_2(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``size`` and ``least``.

    Triton's own functions take microseconds: they serve kernels too.
    """
    return max(least, 1 << (size - 1).bit_length() if size > 0 else 0)


def blocks(size: int, block: int) -> int:
    """The number of blocks that hold ``size`` elements."""
    return -(-size // block)


def check_width(features: torch.Tensor) -> None:
    """Check that a program can hold a vector of features.

    Raises:
        ValueError: it cannot.
    """
    if features.shape[-1] > MOST_WIDTH:
        raise ValueError(
            f"features: expected at most {MOST_WIDTH} features on a GPU, got {features.shape[-1]}"
        )


def alignment(*tensors: torch.Tensor) -> int:
    """A divisor of all strides but the last: 8 where rows can be read in 16-byte accesses, else 1.

    Triton's own specialisation only detects multiples of 16, which heads of width 72 are not.
    """
    return 8 if all(stride % 8 == 0 for tensor in tensors for stride in tensor.stride()[:-1]) else 1


def as_bytes(valid: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as contiguous bytes: the meaning of a pointer to bool differs between versions of Triton."""
    return None if valid is None else valid.contiguous().view(torch.uint8)


def weight_arguments(weight: float | torch.Tensor) -> dict[str, object]:
    """``weights`` and ``weight`` of a kernel: one weight per crop, or one number."""
    if isinstance(weight, torch.Tensor):
        return {"weights": weight.contiguous(), "weight": 0.0}
    return {"weights": None, "weight": float(weight)}


def scale_arguments(scale: float, key: torch.Tensor) -> dict[str, float]:
    """``power`` and ``scale`` of a kernel of matrix products, as the reference splits them.

    Products of fp16 fit fp32 without, and fp16 could not hold small multiples.
    """
    power, factor = (1.0, scale) if key.dtype == torch.float16 else split_scale(scale)
    return {"power": float(power), "scale": float(factor)}


def rows_buffer(shape, out, device) -> tuple[torch.Tensor, bool]:
    """The contiguous buffer ``[T, H, n]`` that a kernel writes, or adds to where the flag is set."""
    if out is not None and out.is_contiguous():
        return out, True
    return torch.empty(shape, dtype=torch.float32, device=device), False


def finish_rows(rows, out) -> torch.Tensor:
    """The rows, added to ``out`` where it is given and the kernel could not add in place."""
    if out is rows and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that autograd sees that the kernel wrote
    return rows if out is None or out is rows else out.add_(rows)


def matmul_options(kernel: str, key: torch.Tensor) -> tuple[str, str]:
    """Configuration name and ``tl.dot`` precision of a kernel of matrix products.

    fp32 is multiplied as fp32, not rounded to tf32, and has tuned configurations of its own.

    Raises:
        TypeError: float64, which GPUs would round or take very long for.
    """
    if key.dtype == torch.float64:
        raise TypeError("key: expected float32, float16 or bfloat16 on a GPU, got float64")
    return (kernel + "_fp32", "ieee") if key.dtype == torch.float32 else (kernel, "tf32")
