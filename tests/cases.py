"""The cases that every operation is tested on, and the ways of running it.

``ATTENTION`` for the operations on queries and keys, ``SELECTION`` for those on scores, budgets and features.
They run in every way that this machine has: the reference; with ``TRITON_INTERPRET=1`` the kernel in Triton's
interpreter instead; on a GPU also the kernel itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import draw_attention, generator

import hero_kernels as hk
from hero_kernels import Segment, Segments, TileSignal
from hero_kernels._env import SWITCHES
from hero_kernels.testing import VIEWS, backwards, call, contiguous

NAN, INF = float("nan"), float("inf")
TINY = 2.0**-149  # the least subnormal of fp32
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16

# --- ways ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way of running an operation; ``kernel`` tells whether it is a kernel or the reference."""

    name: str

    @property
    def kernel(self) -> bool:
        return self.name != "reference"

    @property
    def device(self) -> str:
        return "cuda" if self.name in ("eager", "compiled") else "cpu"

    def run(self, operation: str, *arguments, **options):
        """The operation on arguments that are on the device, with the checks of :func:`call`."""
        if not self.kernel:
            return call(getattr(hk.reference, operation), *arguments, **options)
        function = getattr(hk, operation)
        if self.name == "compiled":
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True)
        return call(function, *arguments, poison=self.name != "compiled", **options)


GPU = torch.cuda.is_available() and not SWITCHES.interpret
WAYS = [Way("interpreter")] if SWITCHES.interpret else [Way("reference")]  # those of this machine
WAYS += [Way("eager")] if GPU else []  # compiled on a GPU: test_kernels.test_compiled
KERNELS = [way for way in WAYS if way.kernel]


def parameters(cases):
    """Cases as parameters, slow ones marked."""
    return [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in cases]


# The tests of the kernels run twice, without and with Triton's interpreter. Tests that do not depend on the
# kernels, or whose kernels other cases run too, are slow in the interpreter.
SLOW_IN_INTERPRETER = [pytest.mark.slow] if SWITCHES.interpret else []


def slow_in_interpreter(test):
    for mark in SLOW_IN_INTERPRETER:
        test = mark(test)
    return test


def combined(cases, options, fast):
    """Cases with options: slow unless fast; slow cases with options that are not fast are exhaustive."""

    def marks(case, option):
        slow = [pytest.mark.slow] if case.slow or not fast(case, option) else []
        return [*slow, pytest.mark.exhaustive] if case.slow and not fast(case, option) else slow

    return [
        pytest.param(case, option, id=f"{case.name}-{option}", marks=marks(case, option))
        for case in cases
        for option in options
    ]


# --- attention -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values of a layer: P = tokens − 1 with CLS."""

    name: str
    crops: int
    heads: int
    tokens: int
    width: int
    dtype: torch.dtype = FLOAT
    view: str = "contiguous"
    scale: float = 0.25
    kind: str = "uneven"
    slow: bool = False  # in full, where every query attends

    def tensors(self) -> list[torch.Tensor]:
        """``[T, H, N, D]`` query, key and value, contiguous, on the CPU."""
        shape = {name: getattr(self, name) for name in ("crops", "heads", "tokens", "width", "dtype")}
        tensors = draw_attention(self.name, count=3, **shape)
        if self.kind == "all equal":
            tensors[1][:] = tensors[1][:, :, :1]
        if self.kind == "zero":
            tensors[0].zero_()
        return tensors

    def seen(self, tensors, device) -> list[torch.Tensor]:
        """The tensors on a device, as views of this case's kind."""
        return [VIEWS[self.view](tensor.to(device)) for tensor in tensors]


ATTENTION = [
    Attention("two tokens", 2, 2, 2, 32),
    Attention("P 36", 3, 2, 37, 64, FLOAT, "packed"),
    Attention("P 256 bf16", 2, 2, 257, 80, BRAIN, "offset"),
    Attention("P 576 fp16", 1, 2, 577, 64, HALF, "packed"),
    Attention("P 729", 1, 1, 730, 72, FLOAT, "packed", slow=True),
    Attention("P 1024 bf16", 1, 1, 1025, 128, BRAIN, "offset", slow=True),
    Attention("P 4096 fp16", 1, 1, 4097, 32, HALF, "packed", slow=True),
    Attention("one past a block", 1, 3, 66, 64, BRAIN, "packed"),
    Attention("odd sizes", 2, 3, 101, 40, FLOAT, "backwards"),
    Attention("odd width fp16", 1, 2, 50, 17, HALF, "offset"),
    Attention("one head", 4, 1, 23, 32),
    Attention("many heads", 1, 17, 20, 64, BRAIN, "packed"),
    Attention("narrow", 1, 2, 70, 8),
    Attention("all equal", 2, 2, 37, 32, kind="all equal"),
    Attention("query zero", 2, 2, 65, 32, BRAIN, kind="zero"),
    Attention("one key takes all", 1, 2, 67, 32, FLOAT, "packed", scale=-1e4),
    Attention("scale zero", 1, 2, 40, 32, HALF, scale=0.0),
]


@dataclass(frozen=True)
class Packed(Attention):
    """Segments of ``lengths`` tokens one after another, in place of crops."""

    lengths: tuple[int, ...] = ()

    @property
    def bounds(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def parts(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The segments of a tensor ``[1, H, N, ...]``."""
        return tensor.split(self.lengths, dim=2)


def _packed(name, lengths, heads, width, *more, **options) -> Packed:
    return Packed(name, 1, heads, sum(lengths), width, *more, **options, lengths=lengths)


PACKED = [
    _packed("ragged", (37, 0, 1, 64, 20), 3, 40, FLOAT, "backwards"),
    _packed("Qwen2.5-VL bf16", (70, 129, 3), 2, 80, BRAIN, "packed"),
    _packed("Qwen3-VL fp16", (0, 65, 130), 2, 72, HALF, "offset"),
    _packed("one segment", (100,), 2, 16),
    _packed("empty segments", (0, 0), 2, 16),
    _packed("no segments", (), 2, 16),
    _packed("one key of each takes all", (33, 67), 1, 32, scale=-1e4),
    _packed("long", (1100, 40), 1, 72, HALF, "packed", slow=True),
]

# --- selection -------------------------------------------------------------------------------------------

BATCHES = {
    "stitched 2 × 2": (Segment(5, 0, 2, 3, 11, (0, 8)),),
    "stitched 2 × 3, padding rows": (Segment(7, 0, 3, 4, 30, (2, 6)),),
    "stitched 3 × 1": (Segment(4, 0, 1, 4, 9, (1, 11)),),
    "stitched 1 × 4": (Segment(5, 0, 4, 16, 64, (0, 4)),),
    "tile after tile": (Segment(7, 0, 1, 5, 17),),
    "thumbnail last": (Segment(7, 6, 1, 5, 17),),
    "thumbnail last, stitched": (Segment(7, 6, 2, 5, 17, (3, 9)),),
    "thumbnail last, newline": (Segment(5, 4, 2, 5, 17, (0, 8), True),),
    "no thumbnail": (Segment(6, -1, 3, 0, 21, (0, 8)),),
    "thumbnail alone": (Segment(1, 0, 1, 7),),
    "thumbnail alone, newline": (Segment(1, 0, 1, 7, 0, (0, 0), True),),
    "thumbnail and tiles, both newlines": (Segment(5, 0, 2, 6, 10, (0, 8), True),),
    "nothing kept": (Segment(5, 0, 2, 0, 0, (0, 8)),),
    "nothing at all": (Segment(5, 0, 2), Segment(3, 0, 2, 2, 2)),
    "everything kept": (Segment(5, 0, 2, 16, 64, (0, 8)),),
    "more than there is": (Segment(5, 0, 2, 99, 999, (0, 8)),),
    "ragged": (
        Segment(5, 0, 2, 3, 11, (0, 8)),
        Segment(1, 0, 1, 7, 0, (0, 0), True),
        Segment(13, 12, 4, 2, 77, (5, 6)),
        Segment(6, -1, 1, 0, 21, (0, 24)),
        Segment(41, 0, 8, 16, 100, (4, 17)),
        Segment(3, 0, 2, 16, 0, (0, 4)),
    ),
}


def _special(values, draw, patches):
    """Scores drawn from a few values."""
    return torch.tensor(values)[torch.randint(len(values), (patches,), generator=draw)]


# Scores of one crop; "mixed" takes them in turn.
SCORES: dict[str, Callable] = {
    "distinct": lambda draw, patches: torch.randperm(patches, generator=draw) / patches,
    "ties": lambda draw, patches: torch.randint(0, 9, (patches,), generator=draw) / 8,
    "all equal": lambda draw, patches: torch.full((patches,), 0.5),
    "ascending": lambda draw, patches: torch.arange(patches) / patches - 0.5,
    "zeros of both signs": lambda draw, patches: _special([0.0, -0.0, TINY, -TINY], draw, patches),
    "infinities": lambda draw, patches: _special([INF, -INF, 3e38, -3e38, 1.0], draw, patches),
    "subnormal": lambda draw, patches: _special(
        [k * TINY for k in range(-4, 5)] + [2.0**-126], draw, patches
    ),
    "some NaN": lambda draw, patches: _special([NAN, -NAN, -INF, 1.0, 2.0], draw, patches),
    "all NaN": lambda draw, patches: torch.full((patches,), NAN),
    "all −inf": lambda draw, patches: torch.full((patches,), -INF),
    "random": lambda draw, patches: torch.randn(patches, generator=draw),
}
MASKS = {"none": None, "padding": 0.7, "sparse": 0.1, "nothing": 0.0}


@dataclass(frozen=True)
class Selection:
    """A ragged batch: its images, scores, mask, signals and features."""

    name: str
    images: tuple[Segment, ...]
    side: int = 4
    width: int = 3
    dtype: torch.dtype = FLOAT
    scores: str = "mixed"
    mask: str = "padding"
    view: str = "contiguous"
    scores_dtype: torch.dtype = FLOAT
    slow: bool = False

    @property
    def segments(self) -> Segments:
        return Segments(self.images, self.side)

    def draw_scores(self) -> torch.Tensor:
        """``[T, P]``."""
        draw, segments = generator(self.name, "scores"), self.segments
        kinds = list(SCORES) if self.scores == "mixed" else [self.scores]
        rows = [SCORES[kinds[t % len(kinds)]](draw, segments.patches) for t in range(segments.crops)]
        return torch.stack(rows).to(self.scores_dtype)

    def draw_valid(self) -> torch.Tensor | None:
        """``[T, P]``; of a mask with holes, every third crop but the first has none or nothing."""
        share, segments = MASKS[self.mask], self.segments
        if share is None:
            return None
        draw = generator(self.name, "valid")
        valid = torch.rand(segments.crops, segments.patches, generator=draw) < share
        valid[1::6] = False
        valid[4::6] = share > 0
        return valid

    def draw_signals(self) -> list[TileSignal]:
        draw, crops = generator(self.name, "signals"), self.segments.crops
        return [
            TileSignal(torch.rand(crops, generator=draw) - 0.1, 0.3),
            TileSignal(torch.rand(crops, generator=draw), 0.7, 0.2),
        ]

    def draw_features(self) -> torch.Tensor:
        """``[T, P, D]``, NaN among them: they are copied, not computed with."""
        segments = self.segments
        shape = (segments.crops, segments.patches, self.width)
        features = torch.randn(shape, generator=generator(self.name, "features"))
        features[..., 0][features[..., 0] > 1.5] = NAN
        return features.to(self.dtype)

    def seen(self, value, device):
        """A nest of tensors on a device, as views of this case's kind."""
        view = {"contiguous": contiguous, "backwards": backwards, "hidden": _hidden}[self.view]
        if isinstance(value, torch.Tensor):
            return view(value.to(device))
        if isinstance(value, list):
            return [self.seen(part, device) for part in value]
        return value._replace(values=view(value.values.to(device))) if value is not None else None


def _hidden(values: torch.Tensor) -> torch.Tensor:
    """As from a tower: all but the CLS row of wider hidden states. Masks and rows of numbers just offset."""
    shape = [size + 3 for size in values.shape]
    memory = values.new_full(shape, NAN if values.is_floating_point() else 1)
    return memory[tuple(slice(1, -2) for _ in shape)].copy_(values)


def _tiles(count, grid_width, tokens=None, **fields) -> Segment:
    """Tiles behind a thumbnail, of which about a fifth of 16 patches is kept."""
    tokens = 3 * count if tokens is None else tokens
    return Segment(count + 1, 0, grid_width if count else 1, 3, tokens, **fields)


def _widths():
    """Each grid width, two bands each."""
    return tuple(_tiles(2 * gw, gw, 9, newline_rows=(1, 7)) for gw in range(1, 9))


SELECTION = [
    *(Selection(name, images) for name, images in BATCHES.items()),
    Selection("all valid", BATCHES["ragged"][:3], mask="none", view="backwards"),
    Selection("sparse", BATCHES["ragged"][:4], mask="sparse", view="hidden", width=33, dtype=BRAIN),
    Selection("nothing valid", BATCHES["ragged"][:4], mask="nothing", width=16, dtype=HALF),
    Selection("grid widths", _widths(), width=1),
    Selection("forty in a row", (_tiles(40, 40, 40, newline_rows=(0, 4)),), view="hidden", slow=True),
    Selection("63 tiles", (_tiles(63, 9, 60, newline_rows=(0, 28)),), width=7),
    Selection("63 in a row", (_tiles(63, 63, 30),), width=5, mask="sparse", slow=True),
    Selection("64 tiles", (Segment(64, -1, 8, 0, 70), Segment(64, 63, 1, 2, 20)), mask="none", slow=True),
    Selection("65 tiles", (_tiles(65, 13, 70, newline_rows=(1, 4)), _tiles(4, 2, 3)), side=1),
    Selection(
        *("220 tiles", (_tiles(220, 55, 300, newline_rows=(1, 7)), _tiles(4, 2, 9), _tiles(100, 1)), 2),
        slow=True,
    ),
    Selection("255 in a row", (_tiles(255, 255, 90), Segment(256, -1, 4, 0, 900)), side=3, slow=True),
    Selection("K from 0 to 40", tuple(_tiles(k, 1, k) for k in (0, 1, 2, 5, 13, 40)), mask="none"),
    Selection("every K", tuple(_tiles(k, 1) for k in range(41)), slow=True),
    Selection("side 1", (_tiles(6, 3, 4, newline_rows=(0, 2)), _tiles(0, 1)), side=1, scores="ties"),
    Selection("side 3", (_tiles(4, 2, 9, newline_rows=(1, 5)), _tiles(1, 1)), side=3, width=100, dtype=HALF),
    Selection(
        "P 36", (_tiles(6, 3, 43, newline_rows=(0, 12)), _tiles(2, 1)), side=6, width=64, view="hidden"
    ),
    Selection("P 256 bf16", (_tiles(4, 2, 104, newline_rows=(0, 32)),), 16, 100, BRAIN, view="hidden"),
    Selection("P 576 bf16", (Segment(5, 0, 2, 57, 130, (4, 44)),), 24, 1024, BRAIN, view="hidden"),
    Selection("P 576 random", (Segment(5, 4, 2, 115, 60),), 24, 8, scores="random", mask="none", slow=True),
    Selection("P 576 fp16 scores", (Segment(3, 0, 1, 60, 40),), 24, 40, HALF, "ties", scores_dtype=HALF),
    Selection("P 576 bf16 scores", (Segment(3, 0, 1, 60, 40),), 24, 40, FLOAT, scores_dtype=BRAIN),
    Selection("P 576 five wide", (Segment(6, 0, 5, 3, 40, (4, 9)),), 24, 4, view="backwards", slow=True),
    Selection("P 729", (Segment(4, -1, 2, 0, 99, (0, 27)),), 27, 1152, HALF, slow=True),
    Selection("P 1024", (Segment(3, 2, 1, 30, 50),), 32, 6, mask="none"),
    Selection("P 4096", (Segment(2, 0, 1, 9, 70, (3, 60)),), 64, 5, slow=True),
    Selection("P 4096, all kept", (Segment(1, 0, 1, 4096),), 64, 1, mask="none", slow=True),
    Selection("8192 wide", (Segment(2, 0, 1, 2, 5, (0, 1)),), 4, 8192, BRAIN, mask="none"),
]

# Where crops alone matter and not how they make images: of each kind the case with most crops, up to 25.
CROPS = list(
    {
        (case.side, case.scores, case.mask, case.view, case.scores_dtype, case.slow): case
        for case in sorted(SELECTION, key=lambda case: case.segments.crops)
        if case.segments.crops <= 25
    }.values()
)
# Many images or tiles, which the interpreter takes seconds to gather; other cases have some of each.
LARGE = ("ragged", "grid widths", "63 tiles", "K from 0 to 40")
# A few for options that are the same everywhere.
FEW = [
    case
    for case in SELECTION
    if case.name in ("stitched 2 × 3, padding rows", "thumbnail last, newline", "more than there is", "P 36")
]

# --- diverse selection -----------------------------------------------------------------------------------

RULES = ("max_min", "dpp", "coverage")


@dataclass(frozen=True)
class Diverse:
    """Candidates: crops of patches, each crop a segment, or segments of ``lengths`` crops."""

    name: str
    crops: int
    patches: int
    width: int
    budgets: tuple[int, ...]  # taken in turn
    kind: str = "clustered"
    dtype: torch.dtype = FLOAT
    view: str = "contiguous"
    lengths: tuple[int, ...] | None = None
    mask: float | None = None
    slow: bool = False

    def draw_features(self) -> torch.Tensor:
        """``[T, P, D]``: around a few directions, drawn from three numbers, or of few dimensions."""
        draw, shape = generator(self.name, "features"), (self.crops, self.patches, self.width)
        if self.kind == "ties":
            return torch.randint(-1, 2, shape, generator=draw).to(self.dtype)
        if self.kind == "low rank":
            pair = (torch.randn(n, 5, generator=draw) for n in (self.crops * self.patches, self.width))
            return torch.einsum("nr,dr->nd", *pair).view(shape).to(self.dtype)
        centres = torch.randn(7, self.width, generator=draw)
        which = torch.randint(7, shape[:2], generator=draw)
        return (centres[which] + 0.4 * torch.randn(shape, generator=draw)).to(self.dtype)

    def given(self, rule: str, device) -> dict[str, Any]:
        """The other arguments of the operation; weights of a sixteenth, with zeros among them."""
        draw, segments = generator(self.name, "given"), self.lengths or [1] * self.crops
        shape = (self.crops, self.patches)
        budgets = [self.budgets[s % len(self.budgets)] for s in range(len(segments))]
        given: dict[str, Any] = {"budgets": torch.tensor(budgets, dtype=torch.int64), "rule": rule}
        if rule != "max_min" and self.kind != "low rank":
            given["quality"] = torch.randint(0, 17, shape, generator=draw) / 16
        if self.mask is not None:
            given["valid"] = torch.rand(shape, generator=draw) < self.mask
            given["valid"][:1] = given["valid"][:1] & (self.mask > 0.5)
        if self.lengths is not None:
            given["cu_crops"] = torch.tensor([0, *self.lengths]).cumsum(0).int()
            given["max_crops"] = max(self.lengths) + 1 if self.patches < 4 else max(self.lengths)
            given["budgets"] = given["budgets"].int()
        return {
            name: self.seen(value, device) if name in ("quality", "valid") else placed(value, device)
            for name, value in given.items()
        }

    def seen(self, values, device):
        """A tensor on a device, as a view of this case's kind."""
        return {"contiguous": contiguous, "backwards": backwards, "hidden": _hidden}[self.view](
            values.to(device)
        )


def placed(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


DIVERSE = [
    Diverse("tiles", 3, 37, 24, (9, 0, 7), mask=0.8),
    Diverse("ties", 2, 20, 4, (20, 9), "ties", HALF, "backwards"),
    Diverse("images", 6, 16, 40, (9, 10**9, 5), "clustered", BRAIN, "hidden", (4, 0, 1, 1), 0.9),
    Diverse("ragged", 75, 1, 33, (10, 3, 1, 12), "clustered", HALF, "contiguous", (40, 0, 1, 34), 0.9),
    Diverse("low rank", 1, 40, 20, (10,), "low rank"),
    Diverse("nothing valid", 4, 9, 8, (5,), mask=0.0),
    Diverse("two blocks", 1, 150, 70, (6,), dtype=BRAIN, view="hidden"),
    Diverse("P 576", 2, 576, 96, (20, 40), dtype=BRAIN, view="hidden", mask=0.9, slow=True),
    Diverse("all", 2, 100, 16, (100,), "ties", slow=True),
    Diverse("one image", 5, 576, 64, (24,), "clustered", BRAIN, "hidden", (4, 1), slow=True),
    Diverse("most", 2, 2048, 32, (10,), "clustered", FLOAT, "backwards", (2,), slow=True),
]
