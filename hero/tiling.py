"""Rules that cut images into tiles: the grid follows from an image's size. Standard library only.

Floating-point steps are those of transformers' image processors, in the same order, since the number of tiles
depends on their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, TypeAlias

from ._checks import check_integer, error

__all__ = ["Blocks", "LongestEdge", "NearestAspect", "Pinpoints", "Tiling", "Whole"]


@dataclass(frozen=True)
class Whole:
    """No tiles: an image is one crop (LLaVA-1.5; InternVL, SmolVLM and Idefics3 without tiling)."""

    pads: ClassVar[bool] = False

    def grid(self, height: int, width: int, crop_size: int) -> tuple[int, int]:
        """(rows, columns) of tiles of an image of (height, width) pixels; (0, 0) for none."""
        return 0, 0


@dataclass(frozen=True)
class Pinpoints:
    """One of several grids, into which the image is fitted and padded (LLaVA-NeXT, LLaVA-OneVision).

    Args:
        sizes: (height, width) of the grids in pixels, multiples of the crop size.

    Raises:
        TypeError, ValueError: anything else.
    """

    pads: ClassVar[bool] = True
    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        expected = "pairs (height, width) in pixels, at least one"
        if isinstance(self.sizes, str) or not isinstance(self.sizes, Sequence):
            raise error(TypeError, "tiling", expected, self.sizes)
        for pair in self.sizes:
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise error(TypeError, "tiling", expected, pair)
        if not self.sizes:
            raise error(ValueError, "tiling", expected, self.sizes)
        sizes = tuple(
            (check_integer("tiling", pair[0]), check_integer("tiling", pair[1])) for pair in self.sizes
        )
        object.__setattr__(self, "sizes", sizes)

    def grid(self, height: int, width: int, crop_size: int) -> tuple[int, int]:
        """The pinpoint that keeps most of the image's pixels, then wastes least, then comes first."""
        best, best_effective, best_wasted = self.sizes[0], 0, math.inf
        for pinpoint in self.sizes:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            wasted = pinpoint[0] * pinpoint[1] - effective
            if effective > best_effective or (effective == best_effective and wasted < best_wasted):
                best, best_effective, best_wasted = pinpoint, effective, wasted
        return best[0] // crop_size, best[1] // crop_size


@dataclass(frozen=True)
class NearestAspect:
    """The grid whose aspect ratio is nearest, to which the image is stretched (InternVL).

    Args:
        least, most: number of tiles. A grid of one tile is none: the thumbnail alone.

    Raises:
        TypeError, ValueError: not integers with 1 <= least <= most.
    """

    pads: ClassVar[bool] = False
    least: int = 1
    most: int = 12

    def __post_init__(self) -> None:
        check_integer("most", self.most, check_integer("least", self.least))

    def grid(self, height: int, width: int, crop_size: int) -> tuple[int, int]:
        """Grids are tried by number of tiles. Of equally near ones a later one is taken if the image has more
        than half of its pixels."""
        best, nearest = (1, 1), math.inf
        for columns, rows in _grids(self.least, self.most):
            distance = abs(width / height - columns / rows)
            larger = width * height > 0.5 * crop_size * crop_size * columns * rows
            if distance < nearest or (distance == nearest and larger):
                best, nearest = (rows, columns), distance
        return best if best != (1, 1) else (0, 0)


@lru_cache(maxsize=64)
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows), by number of tiles, then by columns."""
    sides = range(1, most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


@dataclass(frozen=True)
class LongestEdge:
    """The longer side is resized to a length, then the image is stretched to whole tiles (SmolVLM, Idefics3).

    Args:
        length: of the longer side in pixels.

    Raises:
        TypeError, ValueError: not an integer >= 1.
    """

    pads: ClassVar[bool] = False
    length: int

    def __post_init__(self) -> None:
        check_integer("length", self.length)

    def grid(self, height: int, width: int, crop_size: int) -> tuple[int, int]:
        """An image that fits into one crop is its thumbnail alone."""
        is_wide = width >= height
        height, width = _resized(height, width, self.length)
        if is_wide:
            height += height % 2
        else:
            width += width % 2
        height, width = max(height, 1), max(width, 1)
        if max(height, width) > _LONGEST:
            height, width = (max(side, 1) for side in _resized(height, width, _LONGEST))
        longer = math.ceil(max(height, width) / crop_size) * crop_size
        height, width = _resized(height, width, longer)
        grid = math.ceil(height / crop_size), math.ceil(width / crop_size)
        return grid if grid != (1, 1) else (0, 0)


_LONGEST = 4096  # transformers' MAX_IMAGE_SIZE of these image processors


def _resized(height: int, width: int, longer: int) -> tuple[int, int]:
    """(height, width) with the longer side of a length and the same aspect ratio."""
    aspect = width / height
    return (int(longer / aspect), longer) if width >= height else (longer, int(longer * aspect))


@dataclass(frozen=True)
class Blocks:
    """The image is resized to whole tokens, and blocks of its tokens act as tiles (Qwen2-VL and later).

    Args:
        min_pixels, max_pixels: of the resized image, as its processor has them; ``None`` if that is unknown.

    Raises:
        TypeError, ValueError: not integers with 1 <= min_pixels <= max_pixels, or one of them alone.
    """

    pads: ClassVar[bool] = False
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if (self.min_pixels, self.max_pixels) != (None, None):
            check_integer("max_pixels", self.max_pixels, check_integer("min_pixels", self.min_pixels))

    def tokens(self, height: int, width: int, size: int) -> tuple[int, int]:
        """(rows, columns) of tokens of ``size`` px: ``smart_resize`` of transformers' image processors."""
        if self.min_pixels is None or self.max_pixels is None:
            raise ValueError(
                "processor: expected the model's, whose pixel limits tell how an image is resized, got None"
            )
        if max(height, width) / min(height, width) > 200:
            raise error(ValueError, "image_size", "an aspect ratio of at most 200", (height, width))
        rows, columns = round(height / size), round(width / size)
        if rows * columns * size**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            return max(1, math.floor(height / shrink / size)), max(1, math.floor(width / shrink / size))
        if rows * columns * size**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * grow / size), math.ceil(width * grow / size)
        return rows, columns


Tiling: TypeAlias = Pinpoints | NearestAspect | LongestEdge | Whole | Blocks
