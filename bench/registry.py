"""What a microbenchmark is made of: shapes, minimum costs, cases with their variants, and checks.

Shapes are real encoders at real batches of images, and small ones to test the scripts. In a cost, each input
is read once and each output written once; an accumulator is read and written; a multiply-add counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import hero_kernels as hk
from hero._checks import floor_ratio

from .timing import MOST_SETS, Ceilings

KEEP = 0.2


class Geometry(NamedTuple):
    """A vision encoder, and how its model lays out crops.

    Attributes:
        tokens: N, including CLS if ``cls``.
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
QWEN25 = Geometry("Qwen2.5-VL", layers=32, heads=16, tokens=8464, width=80, features=1280, cls=False)
QWEN3 = Geometry("Qwen3-VL", layers=27, heads=16, tokens=6400, width=72, features=1152, cls=False)
SMALL = Geometry("small", layers=2, heads=2, tokens=17, width=16, features=32)
SMALL_NO_CLS = Geometry("small, no CLS", layers=2, heads=2, tokens=16, width=24, features=48, cls=False)

Batch = tuple[tuple[int, int], ...]  # the tile grid (rows, columns) of each image; all have a thumbnail too
REAL_BATCHES = (((2, 2),), ((3, 3),), ((2, 2),) * 8, ((2, 2),) * 32)  # 5, 10, 40 and 160 crops
SMALL_BATCH = ((1, 2), (2, 2))


class Cost(NamedTuple):
    """Minimum bytes to move and floating-point operations to compute."""

    bytes: int
    flops: int = 0


def floor_us(cost: Cost, ceilings: Ceilings | None) -> float | None:
    """Return the minimum microseconds of a cost; ``None`` without ceilings, as on a CPU."""
    return ceilings and 1e6 * max(cost.bytes / ceilings.bandwidth, cost.flops / ceilings.flops)


class Shape(NamedTuple):
    """An encoder at a batch; ``item`` is the size of an element of its activations in bytes."""

    geometry: Geometry
    batch: Batch
    item: int = 2

    @property
    def name(self) -> str:
        return f"{self.geometry.name} T={self.crops}"

    @property
    def crops(self) -> int:
        return sum(rows * columns + 1 for rows, columns in self.batch)

    @property
    def segments(self) -> hk.Segments:
        """The segments of the batch at keep ratio ``KEEP``, without padding."""
        g = self.geometry
        images = [
            hk.Segment(
                crops=rows * columns + 1,
                thumbnail=rows * columns if g.thumbnail_last else 0,
                grid_width=1 if g.thumbnail_last else columns,
                thumbnail_tokens=floor_ratio(KEEP * g.patches),
                tile_tokens=floor_ratio(KEEP * rows * columns * g.patches),
                newline_rows=(0, rows * g.side) if g.newlines else (0, 0),
            )
            for rows, columns in self.batch
        ]
        return hk.Segments(tuple(images), g.side)

    def activations(self) -> int:
        """Bytes of the query, the key or the value: T·H·N·D."""
        return self.crops * self.geometry.heads * self.geometry.tokens * self.geometry.width * self.item

    def cost(self, name: str) -> Cost:
        """Return the minimum cost of an operation, or of its form with ranks."""
        g, crops, images = self.geometry, self.crops, self.segments.images
        heads, keys, patches = crops * g.heads, self.activations(), crops * g.patches
        out = sum(self.segments.lengths)
        kept = sum(image.thumbnail_tokens + image.tile_tokens for image in images)
        gathered = (kept + out) * g.features * self.item + 4 * out + patches
        flops = 2 * heads * g.tokens * g.width
        return {
            "cls_attention": Cost(keys + heads * (g.width * self.item + 2 * g.patches * 4), flops),
            "attention_with_cls": Cost(4 * keys + 2 * heads * g.patches * 4, 2 * g.tokens * flops),
            "received_attention": Cost(2 * keys + 2 * heads * g.tokens * 4, g.tokens * flops),
            "finalize_scores": Cost(heads * g.patches * 4 + 5 * patches + 4 * crops),
            "finalize_scores, ranks": Cost(heads * g.patches * 4 + 7 * patches + 4 * crops),
            "rarity": Cost(patches * (g.features * self.item + 5), 4 * patches * g.features),
            "tile_budgets": Cost(4 * crops * (3 + 4)),  # three signals and the counts; three results
            "segmented_topk": Cost(6 * patches + 4 * crops),
            "segmented_diverse_topk": self._products(1),
            "segmented_diverse_topk, images": self._products(crops // len(images)),
            "segmented_topk_gather": Cost(4 * patches + gathered),
            "segmented_topk_gather, ranks": Cost(2 * patches + gathered),
        }[name]

    def _products(self, crops: int) -> Cost:
        """Return the cost of the similarities within segments of so many crops."""
        g = self.geometry
        features = self.crops * g.patches * g.features
        return Cost(features * self.item + 6 * self.crops * g.patches, 2 * features * crops * g.patches)


class Packed(NamedTuple):
    """An encoder whose images are one sequence; ``batch`` holds the tokens of each image."""

    geometry: Geometry
    batch: tuple[int, ...]
    item: int = 2

    @property
    def name(self) -> str:
        return f"{self.geometry.name} N={' + '.join(map(str, self.batch))}"

    @property
    def crops(self) -> int:
        """Segments, which play the part of crops."""
        return len(self.batch)

    def activations(self) -> int:
        """Bytes of the query or the key: N·H·D."""
        return sum(self.batch) * self.geometry.heads * self.geometry.width * self.item

    def cost(self, name: str) -> Cost:
        """Return the minimum cost of received attention, of which one matrix product counts."""
        g = self.geometry
        flops = 2 * g.heads * g.width * sum(tokens**2 for tokens in self.batch)
        return Cost(2 * self.activations() + 2 * g.heads * sum(self.batch) * 4, flops)


def packed_shapes(small: bool, item: int = 2) -> list[Packed]:
    """Return one image, and a batch of images of many sizes, of each packed encoder."""
    if small:
        return [Packed(SMALL_NO_CLS, (16, 5), item)]
    return [
        Packed(geometry, batch, item)
        for geometry in (QWEN25, QWEN3)
        for batch in ((geometry.tokens,), (geometry.tokens, 256, 2304, 1024))
    ]


def shapes(small: bool, item: int = 2) -> list[Shape]:
    """Return all shapes, the most important first: the last are left out when time runs out."""
    if small:
        return [Shape(geometry, SMALL_BATCH, item) for geometry in (SMALL, SMALL_NO_CLS)]
    first, second, third, last = REAL_BATCHES
    return [
        Shape(geometry, batch, item)
        for batches in ((first, last), (third, second))
        for geometry in (CLIP, SIGLIP, INTERNVIT)
        for batch in batches
    ]


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


class Wrong(Exception):
    """A result differs from the reference."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        call: the timed function; takes a set of inputs.
        check: takes the inputs and the result, raises :class:`Wrong`.
        ours: an operation of this package; otherwise a peer.
        cost: name of its minimum cost, if it differs from the operation's.
        reset: clears the accumulators of a set of inputs before ``check``.
        synchronises: the host waits for the device inside, so no CUDA graph can be captured.
        against: for a peer, the variant of ours that computes the same; ``None`` for the first.
        less: a peer that computes less than ours, timed to show the cost of the difference.
    """

    name: str
    call: Callable[[Any], object]
    check: Callable[[Any, Any], None]
    ours: bool = False
    cost: str | None = None
    reset: Callable[[Any], None] | None = None
    synchronises: bool = False
    against: str | None = None
    less: bool = False


@dataclass(frozen=True)
class Case:
    """An operation at a shape.

    Attributes:
        size: bytes of a set of inputs.
        make: makes a set of inputs from a seed.
        most_sets: maximum number of input sets; few where a model's data also stays in the L2 cache.
    """

    op: str
    shape: Shape | Packed
    size: int
    make: Callable[[int], Any]
    variants: tuple[Variant, ...]
    most_sets: int = MOST_SETS

    @property
    def ours(self) -> Variant:
        """The first variant of ours."""
        return next(variant for variant in self.variants if variant.ours)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape.name}"


def default_device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def item_size(device: torch.device) -> int:
    """Return the bytes of an element: bf16 on a GPU, fp32 on a CPU."""
    return 2 if device.type == "cuda" else 4


def checked_crops(crops: int) -> list[int]:
    """Return the crops that are checked; the fp64 reference of all crops would not fit into memory."""
    return sorted({0, crops // 2, crops - 1})


def _check_shape(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    if result.shape != expected.shape:
        raise Wrong(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(result.shape)}")


def close(name: str, result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise :class:`Wrong` unless ‖result − expected‖ ≤ tolerance · ‖expected‖; NaN raises too."""
    _check_shape(name, result, expected)
    error = float((result.double() - expected.double()).norm() / expected.double().norm())
    if not error <= tolerance:
        raise Wrong(f"{name}: relative error {error:.2g}, expected at most {tolerance:g}")


def same(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise :class:`Wrong` unless all elements are equal."""
    _check_shape(name, result, expected)
    if not torch.equal(result, expected.to(result.dtype)):
        raise Wrong(f"{name}: {int((result != expected).sum())} of {result.numel()} elements differ")
