"""What several kernels share: device functions, and the arguments of their launches."""

import torch
import triton
import triton.language as tl

from ..segments import COLUMNS

# Columns of the table of segments.
WIDTH = tl.constexpr(len(COLUMNS))
FIRST_CROP = tl.constexpr(COLUMNS.index("first_crop"))
FIRST_ROW = tl.constexpr(COLUMNS.index("first_row"))
ROWS = tl.constexpr(COLUMNS.index("rows"))
CROPS = tl.constexpr(COLUMNS.index("crops"))
THUMBNAIL = tl.constexpr(COLUMNS.index("thumbnail"))
GRID_WIDTH = tl.constexpr(COLUMNS.index("grid_width"))
THUMBNAIL_TOKENS = tl.constexpr(COLUMNS.index("thumbnail_tokens"))
TILE_TOKENS = tl.constexpr(COLUMNS.index("tile_tokens"))
NEWLINE_BEGIN = tl.constexpr(COLUMNS.index("newline_begin"))
NEWLINE_END = tl.constexpr(COLUMNS.index("newline_end"))
THUMBNAIL_NEWLINE = tl.constexpr(COLUMNS.index("thumbnail_newline"))

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def order_key(x, ok):
    """uint32 keys in the order of selection (§4): 0 where not ok, 1 for NaN, then numbers, −0 as +0.

    In integers alone: a device may flush subnormals in floating-point comparisons.
    """
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, bits)
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    key = tl.where(magnitude > INFINITY_BITS, tl.full([], 1, tl.uint32), key)
    return tl.where(ok, key, tl.full([], 0, tl.uint32))


@triton.jit
def weight_of(weights, weight, crop, HAS_WEIGHTS: tl.constexpr):
    """Weight of a layer for a crop: from ``weights`` [T] or one number for all."""
    if HAS_WEIGHTS:
        return tl.load(weights + crop)
    else:
        return weight


def power_of_2(size: int, least: int = 1) -> int:
    """The least power of two that is not below ``size`` and ``least``."""
    return max(least, triton.next_power_of_2(size))


def alignment(*tensors: torch.Tensor) -> int:
    """Elements that all strides but the last are multiples of: 8 where rows can be read 16 bytes at a time.

    Triton itself sees 16 or nothing, which heads of 72 are not.
    """
    return 8 if all(stride % 8 == 0 for tensor in tensors for stride in tensor.stride()[:-1]) else 1


def weight_arguments(weight: float | torch.Tensor, some: torch.Tensor) -> tuple[torch.Tensor, float, bool]:
    """(weights, weight, HAS_WEIGHTS) of a kernel; ``some`` tensor stands in for a pointer not used."""
    if isinstance(weight, torch.Tensor):
        return weight.contiguous(), 0.0, True
    return some, float(weight), False


def mask_arguments(valid: torch.Tensor | None, some: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """(mask, strides) of a kernel: bytes, since a pointer to bool means other things in other versions."""
    if valid is None:
        return some, 0, 0
    return valid.view(torch.uint8), *valid.stride()
