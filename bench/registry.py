"""The shapes that kernels are timed at, and the minimum bytes and operations of each kernel.

Real encoders at real batches of images, and small shapes to test the scripts. Formulas count each input read
once and each output written once, in bytes, and a multiply-add as two operations; an accumulator is read and
written. The floor of an operation is the larger of its bytes over the bandwidth and its operations over the
matrix rate, both measured in the same run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import hero_kernels as hk
from hero._checks import floor_ratio

from .timing import Ceilings

__all__ = [
    "CLIP",
    "INTERNVIT",
    "KEEP",
    "SIGLIP",
    "SMALL",
    "SMALL_NO_CLS",
    "Batch",
    "Cost",
    "Geometry",
    "Shape",
    "floor_us",
    "shapes",
]

KEEP = 0.2


class Geometry(NamedTuple):
    """A vision encoder, and how its model lays out crops.

    Attributes:
        tokens: N, CLS included where there is one.
        width: D of a head.
        features: width of the gathered features.
        thumbnail_last: the thumbnail follows the tiles, and tiles are packed one after another.
        newlines: the stitched grid has a newline row after each patch row.
    """

    name: str
    layers: int
    heads: int
    tokens: int
    width: int
    features: int
    cls: bool = True
    thumbnail_last: bool = False
    newlines: bool = True

    @property
    def patches(self) -> int:
        """P."""
        return self.tokens - self.cls

    @property
    def side(self) -> int:
        """Patches along one side of a crop."""
        return math.isqrt(self.patches)

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return self.width**-0.5


CLIP = Geometry("CLIP-L/14-336", layers=24, heads=16, tokens=577, width=64, features=1024)
SIGLIP = Geometry("SigLIP-so400m/14-384", layers=27, heads=16, tokens=729, width=72, features=1152, cls=False)
INTERNVIT = Geometry(*("InternViT-300M-448", 24, 16, 1025, 64, 1024), thumbnail_last=True, newlines=False)
SMALL = Geometry("small", layers=2, heads=2, tokens=17, width=16, features=32)
SMALL_NO_CLS = Geometry("small, no CLS", layers=2, heads=2, tokens=16, width=24, features=48, cls=False)


class Batch(NamedTuple):
    """A batch of images: the tile grid (rows, columns) of each; every image also has a thumbnail."""

    grids: tuple[tuple[int, int], ...]

    @property
    def crops(self) -> int:
        """T."""
        return sum(rows * columns + 1 for rows, columns in self.grids)


REAL_BATCHES = (  # 5, 10, 40 and 160 crops
    Batch(((2, 2),)),
    Batch(((3, 3),)),
    Batch(((2, 2),) * 8),
    Batch(((2, 2),) * 32),
)
SMALL_BATCHES = (Batch(((1, 2), (2, 2))),)


class Cost(NamedTuple):
    """Minimum bytes to move and floating-point operations to compute."""

    bytes: int
    flops: int = 0


def floor_us(cost: Cost, ceilings: Ceilings | None) -> float | None:
    """Return the minimum microseconds of a cost; ``None`` without ceilings, as on a CPU."""
    if ceilings is None:
        return None
    return 1e6 * max(cost.bytes / ceilings.bandwidth, cost.flops / ceilings.flops)


class Shape(NamedTuple):
    """An encoder at a batch; ``item`` is the size of an element of its activations in bytes."""

    geometry: Geometry
    batch: Batch
    item: int = 2

    @property
    def name(self) -> str:
        return f"{self.geometry.name} T={self.batch.crops}"

    @property
    def segments(self) -> hk.Segments:
        """The segments of the batch at keep ratio ``KEEP``, without padding."""
        geometry = self.geometry
        images = []
        for rows, columns in self.batch.grids:
            tiles = rows * columns
            images.append(
                hk.Segment(
                    crops=tiles + 1,
                    thumbnail=tiles if geometry.thumbnail_last else 0,
                    grid_width=1 if geometry.thumbnail_last else columns,
                    thumbnail_tokens=floor_ratio(KEEP * geometry.patches),
                    tile_tokens=floor_ratio(KEEP * tiles * geometry.patches),
                    newline_rows=(0, rows * geometry.side) if geometry.newlines else (0, 0),
                )
            )
        return hk.Segments(tuple(images), geometry.side)

    @property
    def _rows(self) -> int:
        """T · H, the number of attention rows."""
        return self.batch.crops * self.geometry.heads

    def activations(self) -> int:
        """Bytes of the query, the key or the value: T·H·N·D."""
        return self._rows * self.geometry.tokens * self.geometry.width * self.item

    def cls_rows(self) -> Cost:
        """CLS attention: every key and the CLS query read, rows [T, H, P] accumulated."""
        geometry = self.geometry
        rows = 2 * self._rows * geometry.patches * 4
        query = self._rows * geometry.width * self.item
        return Cost(self.activations() + query + rows, 2 * self._rows * geometry.tokens * geometry.width)

    def attention(self) -> Cost:
        """Attention with CLS rows: query, key, value read, output written, rows [T, H, P] accumulated."""
        geometry = self.geometry
        rows = 2 * self._rows * geometry.patches * 4
        return Cost(4 * self.activations() + rows, 4 * self._rows * geometry.tokens**2 * geometry.width)

    def received(self) -> Cost:
        """Received attention: query and key read, one product of them, rows [T, H, N] accumulated."""
        geometry = self.geometry
        rows = 2 * self._rows * geometry.tokens * 4
        return Cost(2 * self.activations() + rows, 2 * self._rows * geometry.tokens**2 * geometry.width)

    def finalize(self, rank: bool) -> Cost:
        """Scores, entropy and ranks: rows [T, H, P] and the mask read, scores, entropy and ranks written."""
        elements = self.batch.crops * self.geometry.patches
        out = 4 * elements + 4 * self.batch.crops + (2 * elements if rank else 0)
        return Cost(self._rows * self.geometry.patches * 4 + elements + out)

    def budgets(self, signals: int) -> Cost:
        """Tile budgets: signals and valid counts read; budgets, shares and weights written."""
        return Cost(4 * self.batch.crops * (signals + 4))

    def topk(self) -> Cost:
        """Segmented top-k: scores, mask and budgets read, the mask of kept patches written."""
        elements = self.batch.crops * self.geometry.patches
        return Cost((4 + 1 + 1) * elements + 4 * self.batch.crops)

    def gather(self, ranks: bool = False) -> Cost:
        """Top-k and gather: scores or ranks and the mask read, kept features copied, the index written."""
        segments, geometry = self.segments, self.geometry
        elements = segments.crops * geometry.patches
        kept = sum(image.thumbnail_tokens + image.tile_tokens for image in segments.images)
        rows = sum(segments.lengths)
        moved = (kept + rows) * geometry.features * self.item
        return Cost((2 if ranks else 4) * elements + elements + moved + 4 * rows)


def shapes(small: bool, item: int = 2) -> list[Shape]:
    """Return all shapes, the most important first: the last are left out when time runs out."""
    if small:
        return [Shape(geometry, batch, item) for geometry in (SMALL, SMALL_NO_CLS) for batch in SMALL_BATCHES]
    first, second, third, last = REAL_BATCHES
    return [
        Shape(geometry, batch, item)
        for batches in ((first, last), (third, second))
        for geometry in (CLIP, SIGLIP, INTERNVIT)
        for batch in batches
    ]
