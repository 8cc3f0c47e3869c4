"""The layout of the crops of a ragged batch of images, and the result types of the operations.

Everything here is host integers; no device value is read. An image is a run of consecutive crops of the
batch: at most one thumbnail, first or last, and tiles in raster order. Tiles are stitched in bands of
``grid_width`` tiles: a patch row of a band runs through all its tiles before the next row begins, which is
how LLaVA-NeXT packs its sequence. ``grid_width = 1`` packs tile after tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_choice, check_integer, describe

__all__ = ["ALLOCATIONS", "Finalized", "Gathered", "Segment", "Segments", "TileBudgets", "TileSignal"]

ALLOCATIONS = ("exact", "floor")
MAX_SIGNALS = 4
LARGEST = (1 << 31) - 1  # token count: products with weights then fit into int64
NUMBERS = (
    "crops",
    "thumbnail",
    "grid_width",
    "thumbnail_tokens",
    "tile_tokens",
    "newline_begin",
    "newline_end",
    "thumbnail_newline",
)
COLUMNS = ("first_crop", "first_row", "rows", *NUMBERS)  # of the table that kernels read


class Segment(NamedTuple):
    """One image of a batch.

    Attributes:
        crops: number of its crops, thumbnail included.
        thumbnail: which of its crops is the thumbnail (0 or ``crops - 1``), −1 for none.
        grid_width: tiles stitched side by side.
        thumbnail_tokens: patches to keep of the thumbnail.
        tile_tokens: patches to keep of all tiles together.
        newline_rows: half-open range of stitched patch rows that end in a newline.
        thumbnail_newline: whether a newline follows the thumbnail.
    """

    crops: int
    thumbnail: int = 0
    grid_width: int = 1
    thumbnail_tokens: int = 0
    tile_tokens: int = 0
    newline_rows: tuple[int, int] = (0, 0)
    thumbnail_newline: bool = False

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.crops - (self.thumbnail >= 0)

    @property
    def first_tile(self) -> int:
        """Position of the first tile among the crops of the image."""
        return 1 if self.thumbnail == 0 else 0

    @property
    def newlines(self) -> int:
        """Number of newline rows in the packed sequence."""
        return self.newline_rows[1] - self.newline_rows[0] + self.thumbnail_newline


def _integers(name: str, image: object) -> Segment:
    """The segment with every field an ``int`` or a ``bool``."""
    if not isinstance(image, Segment):
        raise TypeError(f"{name}: expected a Segment, got {describe(image)}")
    *fields, rows, newline = image
    numbers = [
        check_integer(f"{name}.{key}", value) for key, value in zip(image._fields, fields, strict=False)
    ]
    if not isinstance(rows, Sequence) or len(rows) != 2:
        raise TypeError(f"{name}.newline_rows: expected two integers, got {describe(rows)}")
    begin, end = (check_integer(f"{name}.newline_rows", row) for row in rows)
    if isinstance(newline, Tensor) or newline not in (False, True):
        raise TypeError(f"{name}.thumbnail_newline: expected a bool, got {describe(newline)}")
    return Segment._make([*numbers, (begin, end), bool(newline)])


@dataclass(frozen=True)
class Segments:
    """The images of a batch, in order.

    Args:
        images: one :class:`Segment` per image; a list becomes a tuple.
        side: patches along one side of a crop; P = side².

    Raises:
        TypeError: ``images`` holds something other than segments, or a number is not an integer. Integers of
            other types, such as NumPy's, become ``int``.
        ValueError: the fields of a segment contradict each other.
    """

    images: tuple[Segment, ...]
    side: int
    _stored: dict[tuple[str, torch.device], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _bound: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "side", check_integer("side", self.side, low=1))
        if not isinstance(self.images, Sequence):
            raise TypeError(f"images: expected a sequence of Segments, got {describe(self.images)}")
        if not self.images:
            raise ValueError("images: expected at least one Segment, got none")
        images = tuple(_integers(f"images[{number}]", image) for number, image in enumerate(self.images))
        object.__setattr__(self, "images", images)
        for number, image in enumerate(images):
            name = f"images[{number}]"
            if image.crops < 1 or image.thumbnail not in (-1, 0, image.crops - 1):
                raise ValueError(f"{name}: expected a thumbnail first, last or nowhere, got {image}")
            if image.grid_width < 1 or image.tiles % image.grid_width:
                raise ValueError(f"{name}: expected grid_width to divide {image.tiles} tiles, got {image}")
            if min(image.thumbnail_tokens, image.tile_tokens) < 0:
                raise ValueError(f"{name}: expected token counts >= 0, got {image}")
            if max(image.thumbnail_tokens, image.tile_tokens, image.grid_width) > LARGEST:
                raise ValueError(f"{name}: expected token counts and grid_width below 2³¹, got {image}")
            if image.thumbnail_newline and image.thumbnail < 0:
                raise ValueError(f"{name}: expected a thumbnail before its newline, got {image}")
            begin, end = image.newline_rows
            if not 0 <= begin <= end <= (image.tiles // image.grid_width) * self.side:
                raise ValueError(f"{name}: expected newline_rows within the stitched rows, got {image}")
        if self.crops * self.patches >= 1 << 31:
            raise ValueError(f"images: expected crops · patches below 2³¹, got {self.crops} · {self.patches}")

    def __getstate__(self) -> dict[str, object]:
        return {"images": self.images, "side": self.side, "_stored": {}, "_bound": None}

    @property
    def patches(self) -> int:
        """P, patches of a crop."""
        return self.side * self.side

    @property
    def crops(self) -> int:
        """T, crops of the batch."""
        return self.first_crops[-1]

    @cached_property
    def total(self) -> int:
        """Packed rows of the batch."""
        return sum(self.lengths)

    @cached_property
    def bands(self) -> int:
        """The most bands of an image: grid rows of tiles, and the thumbnail."""
        return max(image.tiles // image.grid_width + (image.thumbnail >= 0) for image in self.images)

    @cached_property
    def widest_band(self) -> int:
        """The most crops of a band."""
        return max(min(image.grid_width, image.crops) for image in self.images)

    @cached_property
    def most_crops(self) -> int:
        """The most crops of an image."""
        return max(image.crops for image in self.images)

    @cached_property
    def first_crops(self) -> tuple[int, ...]:
        """First crop of each image, and at the end T."""
        return tuple(accumulate((image.crops for image in self.images), initial=0))

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The images as plain integers, ``len(NUMBERS)`` each, for the schema of an operator."""
        return tuple(
            number
            for image in self.images
            for number in (*image[:5], *image.newline_rows, int(image.thumbnail_newline))
        )

    def table(self, device: torch.device) -> Tensor:
        """``[B, len(COLUMNS)]`` int32 on a device: the fields of each image that kernels read.

        Copied to the device once and stored with this object: it must outlive CUDA graphs that read it.
        """
        if self._bound is not None:
            return self._bound
        return self.stored("table", device, lambda: to_device(_table(self), device))

    def stored(self, name: str, device: torch.device, make: Callable[[], Any]) -> Any:
        """The result of ``make()`` for a device, computed at the first call and stored with this object."""
        key = name, device
        if key not in self._stored:
            with torch.inference_mode(False):  # it may be used later in a call that has gradients
                self._stored[key] = make()
        return self._stored[key]

    def warm(self, device: torch.device) -> None:
        """Compute what is computed once: compiled code can read these values, but not compute them."""
        _ = self.table(device), self.numbers, self.lengths, self.first_crops

    def bound(self, table: Tensor) -> Segments:
        """The same segments with their table given."""
        same = object.__new__(Segments)
        same.__dict__.update(self.__dict__, _bound=table)
        return same

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Packed rows of each image: its tokens, at most as many as patches, and its newlines."""
        patches = self.patches
        return tuple(
            (min(image.thumbnail_tokens, patches) if image.thumbnail >= 0 else 0)
            + min(image.tile_tokens, image.tiles * patches)
            + image.newlines
            for image in self.images
        )


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device, asynchronously."""
    if device.type == "cuda" and not torch.compiler.is_compiling():  # dynamo cannot trace pin_memory
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _table(segments: Segments) -> Tensor:
    """:meth:`Segments.table` on the host."""
    begins = accumulate(segments.lengths, initial=0)
    rows = zip(segments.first_crops, begins, segments.lengths, segments.images, strict=False)
    numbers = [
        (first, begin, length, *image[:5], *image.newline_rows, image.thumbnail_newline)
        for first, begin, length, image in rows
    ]
    return torch.tensor(numbers, dtype=torch.int32)


@lru_cache(maxsize=256)
def segments_of(numbers: tuple[int, ...], side: int) -> Segments:
    """The :class:`Segments` of :attr:`Segments.numbers`."""
    images = []
    for i in range(0, len(numbers), len(NUMBERS)):
        *fields, begin, end, newline = numbers[i : i + len(NUMBERS)]
        images.append(Segment._make([*fields, (begin, end), bool(newline)]))
    return Segments(tuple(images), side)


class Finalized(NamedTuple):
    """The result of :func:`hero_kernels.finalize_scores`.

    Attributes:
        scores: ``[T, P]`` fp32, mean over heads.
        entropy: ``[T]`` fp32, nats, of the scores over the valid patches.
        ranks: ``[T, P]`` int16, place in selection order, or ``None``.
    """

    scores: Tensor
    entropy: Tensor
    ranks: Tensor | None


class TileSignal(NamedTuple):
    """One signal by which the tokens of an image are divided among its tiles.

    Attributes:
        values: ``[T]`` fp32; entries of thumbnails are ignored.
        weight: its weight in the share, >= 0.
        temperature: softmax temperature, or ``None`` to divide by the sum over tiles instead (negative
            values count as zero). Where the sum is zero or overflows fp32, tiles get equal parts.
    """

    values: Tensor
    weight: float
    temperature: float | None = None


class TileBudgets(NamedTuple):
    """The result of :func:`hero_kernels.tile_budgets`.

    Attributes:
        budgets: ``[T]`` int32, patches to keep of each crop.
        shares: ``[T]`` fp32, each tile's share of its image; 0 for thumbnails.
        weights: ``[T]`` int32, the shares in fixed point (2⁻²⁴), on which the apportionment is exact.
    """

    budgets: Tensor
    shares: Tensor
    weights: Tensor


class Gathered(NamedTuple):
    """The result of :func:`hero_kernels.segmented_topk_gather`.

    Attributes:
        tokens: ``[total, D]``, kept features packed image by image; newline rows are zero.
        index: ``[total]`` int32, ``crop · P + patch`` of each row, −1 for a newline (−2 for an empty row).
        lengths: rows of each image, host integers.
        budgets: the budgets, given or computed.
    """

    tokens: Tensor
    index: Tensor
    lengths: tuple[int, ...]
    budgets: TileBudgets


def check_allocation(value: object) -> str:
    """Check the name of an allocation rule."""
    return check_choice("allocation", value, ALLOCATIONS)
