"""What follows from image sizes alone: tiles, padding and token counts. Standard library only.

Floating-point steps are those of transformers' ``unpad_image`` and ``pack_image_features``, in the same
order, since the number of tokens depends on their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

from ._checks import check_integer, count, error
from .tiling import Blocks, Pinpoints, Tiling, Whole

__all__ = ["LLAVA_NEXT_PINPOINTS", "Geometry", "ImageLayout", "Keep", "Pinpoints", "grid_pinpoints"]

LLAVA_NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # (rows, columns) of tiles


def grid_pinpoints(crop_size: int) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of LLaVA-NeXT's grids of crops of ``crop_size``."""
    return tuple((rows * crop_size, columns * crop_size) for rows, columns in LLAVA_NEXT_GRIDS)


LLAVA_NEXT_PINPOINTS = grid_pinpoints(336)


class Keep(Protocol):
    """How many tokens to keep: the fields of :class:`hero.HeroConfig` that counting reads."""

    @property
    def keep_ratio(self) -> float | None: ...
    @property
    def keep_tokens(self) -> int | None: ...
    @property
    def policy(self) -> Any: ...
    @property
    def allocation(self) -> str: ...


@dataclass(frozen=True)
class ImageLayout:
    """Crops and sequence of one image. A patch is a visual token, of merged patches where the model merges.

    Attributes:
        image_size: (height, width) in pixels; ``None`` where the call does not tell it.
        grid: (rows, columns) of tiles; (0, 0) where there are none.
        side: p, patches along one side of a crop.
        rows, columns: half-open ranges of the stitched grid, in patches, that are not padding.
        thumbnail: ``"first"``, ``"last"`` or ``"none"``.
        stitched: whether the tiles of a grid row interleave, patch row by patch row.
        newlines: whether every remaining row of the stitched grid ends in a newline token.
        grid_is_known: whether ``grid`` is the arrangement of the tiles, not just their number.
        encoded: the layout of the crops that the encoder sees, where their grid is resized: this layout is
            that of the resized grid, whose cells of p × p tokens act as tiles. Otherwise ``None``.
        keep_ratio: what is kept of this image, if that is not what the configuration says.
        is_whole: whether the encoder sees the image whole. Blocks of p × p of its tokens, of which the last
            of a row or column may be smaller, are its tiles then.
    """

    image_size: tuple[int, int] | None
    grid: tuple[int, int]
    side: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    thumbnail: str = "first"
    stitched: bool = True
    newlines: bool = True
    grid_is_known: bool = True
    encoded: ImageLayout | None = None
    keep_ratio: float | None = None
    is_whole: bool = False

    def __str__(self) -> str:
        if self.is_whole:
            return f"{self.rows[1]} × {self.columns[1]} tokens"
        size = self.image_size
        return f"{self.crops} crops" if size is None else f"{size} px"

    @property
    def tiles(self) -> int:
        """K, number of tiles."""
        return self.grid[0] * self.grid[1]

    @property
    def crops(self) -> int:
        """Number of crops: K, and one more with a thumbnail."""
        return self.tiles + (self.thumbnail != "none")

    @property
    def patches(self) -> int:
        """P, patch tokens of a crop."""
        return self.side * self.side

    @property
    def thumbnail_crop(self) -> int:
        """Which crop of the image is the thumbnail; −1 for none."""
        return {"first": 0, "last": self.crops - 1, "none": -1}[self.thumbnail]

    @property
    def tile_crops(self) -> range:
        """Which crops of the image are its tiles, in raster order."""
        first = 1 if self.thumbnail == "first" else 0
        return range(first, first + self.tiles)

    def per_crop(self, thumbnail: Any, tiles: Sequence[Any]) -> list[Any]:
        """A value of the thumbnail and one of each tile, in the order of the crops."""
        values = [thumbnail] * self.crops
        values[slice(self.tile_crops.start, self.tile_crops.stop)] = tiles
        return values

    @cached_property
    def tile_rectangles(self) -> tuple[tuple[int, int, int, int], ...]:
        """The valid patches of each tile (row begin, row end, column begin, column end), within the tile."""

        def within(valid: tuple[int, int], tile: int) -> tuple[int, int]:
            begin = min(max(valid[0] - tile * self.side, 0), self.side)
            return begin, max(begin, min(max(valid[1] - tile * self.side, 0), self.side))

        return tuple(
            within(self.rows, row) + within(self.columns, column)
            for row in range(self.grid[0])
            for column in range(self.grid[1])
        )

    @cached_property
    def valid_counts(self) -> tuple[int, ...]:
        """Number of valid patches of each tile."""
        return tuple((bottom - top) * (right - left) for top, bottom, left, right in self.tile_rectangles)

    @property
    def full_counts(self) -> list[int]:
        """Tokens of each crop in the stock sequence."""
        return self.per_crop(self.patches, self.valid_counts)

    def equal_counts(self, config: Keep) -> list[int]:
        """:meth:`budget`, as if tiles were all alike: what a prompt shows before the images are encoded."""
        thumbnail, tiles = self.budget(config)
        share, rest = divmod(tiles, max(self.tiles, 1))
        return self.per_crop(thumbnail, [share + (tile < rest) for tile in range(self.tiles)])

    @property
    def newline_count(self) -> int:
        """Newline tokens: one a remaining row of the grid; one in all where there is no grid."""
        if not self.newlines:
            return 0
        return self.rows[1] - self.rows[0] if self.tiles else 1

    @property
    def full_tokens(self) -> int:
        """Length of the stock sequence."""
        return self.patches * (self.thumbnail != "none") + sum(self.valid_counts) + self.newline_count

    @property
    def _tile_tokens(self) -> int:
        """Tokens of the tiles that the keep ratio counts: with padding, but for resized grids and blocks."""
        with_padding = self.encoded is None and not self.is_whole
        return self.tiles * self.patches if with_padding else sum(self.valid_counts)

    def _keep(self, config: Keep) -> tuple[float | None, int | None]:
        """Ratio and number of tokens to keep, of which one is ``None``."""
        if self.keep_ratio is not None:
            return self.keep_ratio, None
        return config.keep_ratio, config.keep_tokens

    def _quota(self, config: Keep) -> tuple[int, int]:
        """Patch tokens for (the thumbnail, all tiles together) before these are capped."""
        given = self._keep(config)
        if self.thumbnail == "none":  # a run of no placeholders would not show where an image is
            return 0, max(count(*given, self._tile_tokens), int(self.is_whole))
        divided = config.policy.divide(*given, self.patches, self._tile_tokens)
        fits = isinstance(divided, tuple) and len(divided) == 2 and all(type(n) is int for n in divided)
        if not fits or not 0 <= divided[0] <= self.patches or divided[1] < 0:
            expected = f"divide() to return two integers >= 0, the first at most {self.patches}"
            raise error(ValueError, f"policy {config.policy.name!r}", expected, divided)
        return divided

    def budget(self, config: Keep) -> tuple[int, int]:
        """Patch tokens to keep of (the thumbnail, all tiles together) (docs/method.md, sections 3 and 6)."""
        thumbnail, tiles = self._quota(config)
        tiles = min(tiles, sum(self.valid_counts))
        keep_tokens = self._keep(config)[1]
        if keep_tokens is not None and self.thumbnail != "none":  # what the tiles cannot use
            thumbnail = min(self.patches, keep_tokens - tiles)
        return thumbnail, tiles

    def tile_quota(self, config: Keep) -> int:
        """Tile tokens that the allocation rule divides: "floor" divides them before any cap."""
        if config.allocation == "floor" and self._keep(config)[1] is None:
            return self._quota(config)[1]
        return self.budget(config)[1]

    def block_budgets(self, config: Keep) -> list[int]:
        """Tokens of each block in proportion to its size: largest remainders, ties to the lower block."""
        total, whole = self.tile_quota(config), sum(self.valid_counts)
        budgets = [total * count // whole for count in self.valid_counts]
        if config.allocation == "exact":
            by_remainder = sorted(range(self.tiles), key=lambda n: -(total * self.valid_counts[n] % whole))
            for block in by_remainder[: total - sum(budgets)]:
                budgets[block] += 1
        return budgets

    def kept_tokens(self, config: Keep) -> int:
        """Length of the packed sequence; with ``allocation="floor"`` an upper bound."""
        return sum(self.budget(config)) + self.newline_count


_LLAVA_NEXT = Pinpoints(LLAVA_NEXT_PINPOINTS)


@dataclass(frozen=True)
class Geometry:
    """How a model cuts images: the size-independent part of a layout. Immutable and hashable.

    Args:
        crop_size: side of a crop in pixels.
        patch_size: side of a visual token in pixels (of the merged token, where patches are merged).
        tiling: how the grid of tiles follows from the image size: :class:`hero.tiling.Pinpoints`,
            ``NearestAspect``, ``LongestEdge``, ``Whole`` or ``Blocks``. Pairs (height, width) in pixels are
            pinpoints, none at all means ``Whole``. Blocks are as large as crops.
        thumbnail, stitched, newlines: as in :class:`ImageLayout`. An image without tiles is its thumbnail.
        resized_beyond: the number of tiles to whose patches a stitched grid is resized if it has more than
            1.21 times as many (LLaVA-OneVision: 9 in ``"anyres_max_9"``); ``None`` if it never is.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range, by name.
    """

    crop_size: int = 336
    patch_size: int = 14
    tiling: Tiling = _LLAVA_NEXT
    thumbnail: str = "first"
    stitched: bool = True
    newlines: bool = True
    resized_beyond: int | None = None

    def __post_init__(self) -> None:
        crop = check_integer("crop_size", self.crop_size)
        if crop < check_integer("patch_size", self.patch_size):
            raise ValueError(f"patch_size: expected at most crop_size {crop}, got {self.patch_size}")
        if not isinstance(self.tiling, Tiling):
            pairs: Any = self.tiling
            tiling = Whole() if isinstance(pairs, Sequence) and not pairs else Pinpoints(pairs)
            object.__setattr__(self, "tiling", tiling)
        if isinstance(self.tiling, Pinpoints):
            for pair in self.tiling.sizes:
                if any(side % crop for side in pair):
                    raise ValueError(f"tiling: expected multiples of the crop size {crop}, got {pair}")
        if self.thumbnail not in ("first", "last", "none"):
            raise error(ValueError, "thumbnail", "'first', 'last' or 'none'", self.thumbnail)
        if isinstance(self.tiling, Whole) and self.thumbnail == "none":
            raise ValueError("tiling: expected one with tiles where there is no thumbnail, got none")
        if isinstance(self.tiling, Blocks) and (self.thumbnail != "none" or self.newlines):
            raise ValueError("tiling: expected another one for images with thumbnail or newlines, got Blocks")
        if self.resized_beyond is not None:
            check_integer("resized_beyond", self.resized_beyond)

    @property
    def side(self) -> int:
        """p, patches along one side of a crop."""
        return self.crop_size // self.patch_size

    def layout(self, image_size: Sequence[int]) -> ImageLayout:
        """Layout of an image of (height, width) pixels; cached.

        Raises:
            TypeError, ValueError: not two positive integers.
        """
        return self._layout("image_size", image_size)

    def _layout(self, name: str, size: Sequence[int] | ImageLayout) -> ImageLayout:
        if isinstance(size, ImageLayout):
            return size
        if isinstance(size, str) or not hasattr(size, "__len__") or len(size) != 2:
            raise error(TypeError, name, "(height, width) in pixels", size)
        return _layout(self, check_integer(name, size[0]), check_integer(name, size[1]))

    def layouts(self, image_sizes) -> tuple[ImageLayout, ...]:
        """Layout of each image of a batch: ``[B, 2]`` (height, width), a tensor, array, pairs or layouts.

        Raises:
            TypeError, ValueError: not pairs of positive integers, or none.
        """
        sizes = image_sizes.tolist() if hasattr(image_sizes, "tolist") else image_sizes
        if not isinstance(sizes, Sequence) or isinstance(sizes, str):
            raise error(TypeError, "image_sizes", "(height, width) of each image", image_sizes)
        if not sizes:
            raise ValueError("image_sizes: expected at least one image, got none")
        sizes = [size.tolist() if hasattr(size, "tolist") else size for size in sizes]
        return tuple(self._layout(f"image_sizes[{number}]", size) for number, size in enumerate(sizes))

    def of_grid(
        self, grid: tuple[int, int], image_size: tuple[int, int] | None = None, *, is_known: bool = True
    ) -> ImageLayout:
        """Layout of an image that was stretched to a grid of (rows, columns) tiles, whatever its size.

        Args:
            is_known: whether this is the arrangement of the tiles, not just their number.
        """
        rows, columns = (0, grid[0] * self.side), (0, grid[1] * self.side)
        return self._of(image_size, grid, rows, columns, grid_is_known=is_known)

    def of_tokens(self, rows: int, columns: int, image_size: tuple[int, int] | None = None) -> ImageLayout:
        """Layout of an image that the encoder sees whole, as rows × columns tokens."""
        grid = math.ceil(rows / self.side), math.ceil(columns / self.side)
        return self._of(image_size, grid, (0, rows), (0, columns), is_whole=True)

    def _of(self, image_size, grid, rows, columns, **fields) -> ImageLayout:
        own = self.thumbnail, self.stitched, self.newlines
        return ImageLayout(image_size, grid, self.side, rows, columns, *own, **fields)

    def padded(self, image_size: tuple[int, int], grid: tuple[int, int]) -> ImageLayout:
        """Layout of an image that was fitted into a grid of (rows, columns) tiles and padded."""
        side = self.side
        rows, columns = _unpadded(*image_size, grid[0] * side, grid[1] * side)
        layout = self._of(image_size, grid, rows, columns)
        if self.resized_beyond is None:
            return layout
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        ratio = math.sqrt(max(height * width, 0) / (self.resized_beyond * side**2))
        if ratio <= 1.1:
            return layout
        height, width = int(height // ratio), int(width // ratio)
        cells = math.ceil(height / side), math.ceil(width / side)
        return self._of(image_size, cells, (0, height), (0, width), encoded=layout)


@lru_cache(maxsize=4096)
def _layout(geometry: Geometry, height: int, width: int) -> ImageLayout:
    if isinstance(geometry.tiling, Blocks):
        return geometry.of_tokens(
            *geometry.tiling.tokens(height, width, geometry.patch_size), (height, width)
        )
    grid = geometry.tiling.grid(height, width, geometry.crop_size)
    if geometry.tiling.pads:
        return geometry.padded((height, width), grid)
    return geometry.of_grid(grid, (height, width))


def _unpadded(height: int, width: int, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Ranges of rows and columns of a stitched grid that hold image rather than padding."""
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return (padding, rows - padding), (0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return (0, rows), (padding, columns - padding)
