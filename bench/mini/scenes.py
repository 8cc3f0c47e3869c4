"""Generated scenes and questions for the bundled mini model.

A scene is a picture of ``rows x columns`` tiles of 48 px on a dimmed crop of a real photograph. It shows

- plates: coloured bars with three handwritten digits, some across the border of two tiles side by side,
  which then runs between two digits;
- objects: coloured shapes with one handwritten digit, each wholly inside a tile;
- clutter: stripes, checkerboards and rings in strong colours, which no question asks about.

Plates and objects of a scene differ in colour, and its objects in their digits, so every question has
exactly one answer.

Digits come from ``sklearn.datasets.load_digits`` and photographs from the files that scikit-image carries;
both packages are imported when the first scene is drawn (``pip install 'hero-vlm[bench]'``). The order in
which random numbers are drawn is part of the contract: the same generator state gives the same scene, and the
weights in ``hero/mini/weights`` were trained on exactly this distribution.

Pixels are (y, x) with the origin at the top left. Boxes are ``(y0, x0, y1, x1)``, end exclusive.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

TILE = 48
"""Side of a tile, px: the input side of the vision tower."""

PATCH = 8
"""Side of a patch, px: 36 patches a tile."""

GRIDS = ((1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3))
"""Grids (rows, columns) the weights were trained on; the processor maps any other image to one of these."""

COLOURS = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (70, 110, 245),
    "yellow": (240, 220, 50),
    "purple": (175, 80, 215),
    "orange": (250, 145, 30),
    "cyan": (60, 215, 225),
}
"""Colour word -> mean RGB, 0..255; every object jitters around it."""

SHAPES = ("square", "circle", "triangle", "diamond")

PATTERNS = ("stripes", "checkerboard", "rings")
"""What clutter looks like."""

PLACES = ("first", "second", "third")
"""Words for the digits of a plate, from the left."""

# fmt: off
WORDS = (
    "<pad>", "<bos>", "<unk>", "<eos>", "<image>",
    *COLOURS, *SHAPES, "plate", *PATTERNS, *PLACES, *(str(digit) for digit in range(10)),
    "what", "digit", "number", "is", "on", "the", "larger", "left", "of", "above", "and",
    "a", "photo", "with", "background", "in", "picture", "yes", "no", "there",
    *(f"row{row}" for row in range(6)), *(f"column{column}" for column in range(6)),
    "astronaut", "coffee", "cat", "rocket", "motorcycle", "camera", "brick", "grass", "gravel", "moon",
    "stars", "coins",
)
# fmt: on
"""The model's whole vocabulary, in token id order. Words are split at white space and are case-sensitive."""

SPLITS = ("train", "test")
MAX_GRID = 6  # 6 tiles = 288 px, the most that the photographs, 300 px on their short side, can fill

DEMO_SEED = 11
"""Seed from which the bundled demo was built."""

_OBJECT_SIZES = (17, 18, 19, 20)  # px
_CLUTTER_SIZES = tuple(range(16, 27))  # px
_PLATE, _PLATE_DIGIT, _PITCH = (15, 39), 11, 12  # px: height and width, side of a digit, from one to the next
_ACROSS = 0.3  # of the places tried for a plate, those across the border of two tiles
_DIGIT_SIZES = (11, 12, 13)  # px
_COLOUR_VALUES = np.array(list(COLOURS.values()), np.float32) / 255
_COLOUR_NAMES = tuple(COLOURS)
_PLACEMENT_TRIES = 40
_TRAIN_DIGITS = 1400  # of 1797
_VARIANTS = 16  # of each training handwriting: as it is, and turned, slanted, scaled and moved a little
_APART = 36  # px between the centres of things whose relation is asked for

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "coffee": "coffee.png",
    "cat": "chelsea.png",
    "rocket": "rocket.jpg",
    "motorcycle": "motorcycle_left.png",
    "camera": "camera.png",
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "stars": "hubble_deep_field.jpg",
    "coins": "coins.png",
}
"""Word -> file of scikit-image. The order is part of the contract: a scene draws an index into it."""

KINDS = {"number": 0.30, "nth": 0.20, "digit": 0.14, "larger": 0.20, "relation": 0.12, "background": 0.04}
"""Kind of question -> its share of those drawn."""

READ = ("number", "nth", "digit", "larger")
"""The kinds that ask for digits: the patches that show these must be kept."""

Box = tuple[int, int, int, int]


class Amounts(NamedTuple):
    """How many things a scene holds, if all find a free place."""

    plates: int
    objects: int
    clutter: int


@dataclass(frozen=True)
class Thing:
    """A plate, an object or a piece of clutter."""

    sort: str
    """``"plate"``, ``"object"`` or ``"clutter"``."""
    colour: str | None
    """A word of ``COLOURS``; None for clutter."""
    shape: str
    """A word of ``SHAPES`` or ``PATTERNS``, or ``"plate"``."""
    digits: tuple[int, ...]
    """Three on a plate, one on an object, none on clutter."""
    box: Box
    digit_boxes: tuple[Box, ...] = ()

    @property
    def name(self) -> str:
        """The words that questions use."""
        return f"{self.colour} {self.shape}"

    def tiles(self, grid: tuple[int, int]) -> list[int]:
        """Raster indices of the tiles that it touches."""
        y0, x0, y1, x1 = self.box
        rows, columns = range(y0 // TILE, (y1 - 1) // TILE + 1), range(x0 // TILE, (x1 - 1) // TILE + 1)
        return [row * grid[1] + column for row in rows for column in columns]


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows."""

    image: Image.Image
    """RGB, ``rows * 48`` px high and ``columns * 48`` px wide."""
    things: tuple[Thing, ...]
    grid: tuple[int, int]
    """(rows, columns) of tiles."""
    background: str
    """What the photograph behind the things shows: a word of ``PHOTOGRAPHS``."""

    def of(self, sort: str) -> list[Thing]:
        """The things of one sort."""
        return [thing for thing in self.things if thing.sort == sort]


class Question(NamedTuple):
    """A question with its answer and where that answer is to be seen."""

    text: str
    answer: str
    """One word or, of a number, three."""
    kind: str
    """A key of ``KINDS``: what is asked for."""
    things: tuple[Thing, ...]
    """What has to be seen to answer: one thing, or two to compare; none for a background."""
    places: tuple[int, ...] = ()
    """Which digits of a plate are asked for."""

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Where the digits asked for stand: each plate digit, or the whole object."""
        if self.kind not in READ:
            return ()
        if self.places:
            return tuple(self.things[0].digit_boxes[place] for place in self.places)
        return tuple(thing.box for thing in self.things)


class _Digits(NamedTuple):
    pixels: dict[int, np.ndarray]
    """Side in px -> [1797, side, side] fp32, 1 = ink."""
    indices: dict[str, tuple[np.ndarray, ...]]
    """Split -> for each digit the indices of its handwritings."""
    ink: np.ndarray
    """[1797, 8, 8] uint8, as they come."""


def _missing(package: str, what: str) -> ImportError:
    return ImportError(f"bench.mini.scenes takes its {what} from {package}: pip install 'hero-vlm[bench]'")


@cache
def _digits() -> _Digits:
    """Handwritten digits at the sizes used, and the split into disjoint training and test handwritings."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("scikit-learn", "handwritten digits") from error
    data = load_digits()
    ink = (data.images.astype(np.float32) / 16 * 255).astype(np.uint8)
    pixels = {}
    for side in _DIGIT_SIZES:
        resized = [
            image.resize((side, side), Image.Resampling.BICUBIC) for image in map(Image.fromarray, ink)
        ]
        pixels[side] = np.stack([np.asarray(image, np.float32) / 255 for image in resized])
    # RandomState's stream is frozen by numpy, so the split never moves.
    order = np.random.RandomState(123).permutation(len(data.target))
    members = {"train": order[:_TRAIN_DIGITS], "test": order[_TRAIN_DIGITS:]}
    indices = {
        split: tuple(rows[data.target[rows] == digit] for digit in range(10))
        for split, rows in members.items()
    }
    return _Digits(pixels, indices, ink)


@cache
def _variants(side: int) -> np.ndarray:
    """Handwritings turned by up to 12 degrees, slanted, scaled by up to a tenth and moved by half a pixel.

    [1797, 16, side, side] fp32 in 0..1; the first of the 16 is the handwriting as it is.
    """
    rng = np.random.RandomState(321 + side)
    digits = _digits()
    variants = np.empty((len(digits.ink), _VARIANTS, side, side), np.float32)
    variants[:, 0] = digits.pixels[side]
    for row, image in zip(variants, map(Image.fromarray, digits.ink), strict=True):
        for variant in row[1:]:
            angle, slant, scale = rng.uniform(-0.21, 0.21), rng.uniform(-0.2, 0.2), rng.uniform(0.9, 1.1)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            linear = turn @ np.array([[1.0, slant], [0.0, 1.0]]) * (image.width / side / scale)
            offset = image.width / 2 + rng.uniform(-0.35, 0.35, 2) - linear.sum(1) * side / 2
            numbers = (*linear[0], offset[0], *linear[1], offset[1])
            varied = image.transform((side, side), Image.Transform.AFFINE, numbers, Image.Resampling.BICUBIC)
            variant[:] = np.asarray(varied, np.float32) / 255
    return variants


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    """Photographs, [height, width, 3] fp32 in 0..1, about 300 px on the short side."""
    try:
        import skimage
    except ImportError as error:
        raise _missing("scikit-image", "photographs") from error
    # The files are read directly: skimage.data's loaders may copy to a cache folder or reach for the network.
    folder = Path(skimage.__file__).parent / "data"
    photographs = []
    for name in PHOTOGRAPHS.values():
        with Image.open(folder / name) as file:
            image = file.convert("RGB")
        ratio = 300 / min(image.size)
        size = (int(image.width * ratio), int(image.height * ratio))
        photographs.append(np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / 255)
    return tuple(photographs)


@cache
def _shape_mask(shape: str, side: int) -> np.ndarray:
    """Coverage of a shape, [side, side, 1] fp32 in 0..1, anti-aliased by drawing at four times the size."""
    large = side * 4
    last, half = large - 1, large / 2
    canvas = Image.new("L", (large, large), 0)
    draw = ImageDraw.Draw(canvas)
    if shape == "square":
        draw.rectangle([large * 0.04, large * 0.04, large * 0.96, large * 0.96], fill=255)
    elif shape == "circle":
        draw.ellipse([0, 0, last, last], fill=255)
    elif shape == "triangle":
        draw.polygon([(half, 0), (last, last), (0, last)], fill=255)
    else:
        draw.polygon([(half, 0), (last, half), (half, last), (0, half)], fill=255)
    mask = np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32) / 255
    return mask[..., None]


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` as an int within [low, high], or an error that names the argument."""
    expected = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def _generator(rng: object) -> np.random.Generator:
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: expected a numpy.random.Generator, got {type(rng).__name__}")
    return rng


def _apart(box: Box, other: Box) -> bool:
    """Whether at least two px lie between the boxes, vertically or horizontally."""
    return box[2] + 1 < other[0] or other[2] + 1 < box[0] or box[3] + 1 < other[1] or other[3] + 1 < box[1]


def _pattern(name: str, side: int, period: int) -> np.ndarray:
    """[side, side, 1] fp32, 0 or 1."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    if name == "stripes":
        value = (x + y if period % 2 else y) // period
    elif name == "checkerboard":
        value = x // period + y // period
    else:
        value = np.hypot(y - side / 2 + 0.5, x - side / 2 + 0.5) // period
    return (value % 2)[..., None]


def _background(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, int]:
    """A crop of a photograph, perhaps mirrored, its contrast lowered; [height, width, 3] fp32 in 0..1."""
    photographs = _photographs()
    number = int(rng.integers(len(photographs)))
    photograph = photographs[number]
    y = rng.integers(photograph.shape[0] - height + 1)
    x = rng.integers(photograph.shape[1] - width + 1)
    crop = photograph[y : y + height, x : x + width].copy()
    if rng.random() < 0.5:
        crop = crop[:, ::-1].copy()
    contrast = rng.uniform(0.35, 0.75)
    return crop * contrast + rng.uniform(0.25, 0.65) * (1 - contrast), number


class _Canvas:
    """A scene while it is drawn."""

    def __init__(self, rng: np.random.Generator, grid: tuple[int, int], split: str):
        self.rng, self.grid, self.split = rng, grid, split
        self.pixels, self.photograph = _background(rng, grid[0] * TILE, grid[1] * TILE)
        self.things: list[Thing] = []

    def place(self, corner: Callable[[], tuple[int, int]], height: int, width: int) -> Box | None:
        """A free box at a corner (y, x) that is drawn anew until it fits; None after too many tries."""
        for _ in range(_PLACEMENT_TRIES):
            y, x = corner()
            box = (y, x, y + height, x + width)
            if all(_apart(box, thing.box) for thing in self.things):
                return box
        return None

    def within_tile(self, height: int, width: int) -> tuple[int, int]:
        """A corner of a box that lies in one tile."""
        row, column = (int(self.rng.integers(count)) for count in self.grid)
        y, x = (int(self.rng.integers(TILE - length + 1)) for length in (height, width))
        return row * TILE + y, column * TILE + x

    def plate_corner(self) -> tuple[int, int]:
        y, x = self.within_tile(*_PLATE)
        if self.grid[1] > 1 and self.rng.random() < _ACROSS:
            border = TILE * int(self.rng.integers(1, self.grid[1]))
            x = border - 1 - _PITCH * int(self.rng.integers(1, 3))
        return y, x

    def write(self, digit: int, side: int, top: int, left: int) -> Box:
        """Write a digit by a hand drawn from those of the split."""
        digits = _digits()
        hands = digits.indices[self.split][digit]
        hand = hands[self.rng.integers(len(hands))]
        if self.split == "train":
            ink = _variants(side)[hand, self.rng.integers(_VARIANTS)]
        else:
            ink = digits.pixels[side][hand]
        area = self.pixels[top : top + side, left : left + side]
        area[:] = area * (1 - 0.92 * ink[..., None])
        return top, left, top + side, left + side

    def paint(self, box: Box, mask: np.ndarray | float, colour: int) -> None:
        value = np.clip(_COLOUR_VALUES[colour] + self.rng.normal(0, 0.04, 3), 0, 1)
        area = self.pixels[box[0] : box[2], box[1] : box[3]]
        area[:] = area * (1 - mask) + value * mask

    def plate(self, colours: list[int]) -> None:
        box = self.place(self.plate_corner, *_PLATE)
        if box is None:
            return
        colour = colours.pop()
        self.paint(box, 1.0, colour)
        digits = tuple(self.rng.integers(10, size=3).tolist())
        boxes = tuple(
            self.write(digit, _PLATE_DIGIT, box[0] + 2, box[1] + 2 + place * _PITCH)
            for place, digit in enumerate(digits)
        )
        self.things.append(Thing("plate", _COLOUR_NAMES[colour], "plate", digits, box, boxes))

    def object(self, colours: list[int], digits: list[int]) -> None:
        side = _OBJECT_SIZES[self.rng.integers(len(_OBJECT_SIZES))]
        box = self.place(lambda: self.within_tile(side, side), side, side)
        if box is None:
            return
        colour, digit = colours.pop(), digits.pop()
        shape = SHAPES[self.rng.integers(len(SHAPES))]
        self.paint(box, _shape_mask(shape, side), colour)
        # A triangle is wide at its foot only: its digit is small and sits lower.
        ink = 11 if shape == "triangle" else 12 if side < 19 else 13
        top = box[0] + min((side - ink) // 2 + (3 if shape == "triangle" else 0), side - ink)
        written = self.write(digit, ink, top, box[1] + (side - ink) // 2)
        self.things.append(Thing("object", _COLOUR_NAMES[colour], shape, (digit,), box, (written,)))

    def clutter(self) -> None:
        side = _CLUTTER_SIZES[self.rng.integers(len(_CLUTTER_SIZES))]
        height, width = (count * TILE - side + 1 for count in self.grid)
        corner = lambda: (int(self.rng.integers(height)), int(self.rng.integers(width)))  # noqa: E731
        box = self.place(corner, side, side)
        if box is None:
            return
        pattern = PATTERNS[self.rng.integers(len(PATTERNS))]
        value = _pattern(pattern, side, int(self.rng.integers(2, 5)))
        dark, light = self.rng.uniform(0, 0.25, 3), self.rng.uniform(0.6, 1.0, 3)
        self.pixels[box[0] : box[2], box[1] : box[3]] = dark + (light - dark) * value
        self.things.append(Thing("clutter", None, pattern, (), box))


def scene(
    rng: np.random.Generator,
    grid: tuple[int, int],
    amounts: Amounts,
    split: str = "train",
    repeat: bool = False,
) -> Scene:
    """Draw a random scene.

    Args:
        rng: source of all randomness; the same state gives the same scene.
        grid: (rows, columns) of tiles, each 1..6. The weights know the grids in ``GRIDS``.
        amounts: things wanted. One that finds no free place in 40 tries is left out.
        split: which handwritings to use, ``"train"`` or ``"test"``. The two share no handwritten image,
            though the same people may have written both.
        repeat: whether colours and the digits of objects may repeat. Otherwise plates and objects are at most
            seven together. Questions about a scene with repetitions may have several answers.
    """
    rng = _generator(rng)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"grid: expected (rows, columns), got {grid!r}")
    grid = tuple(_integer(f"grid[{axis}]", value, 1, MAX_GRID) for axis, value in enumerate(grid))
    if not isinstance(amounts, tuple) or len(amounts) != 3:
        raise ValueError(f"amounts: expected (plates, objects, clutter), got {amounts!r}")
    plates, objects, clutter = (
        _integer(f"amounts.{name}", value, 0) for name, value in zip(Amounts._fields, amounts, strict=True)
    )
    if not repeat and plates + objects > len(COLOURS):
        raise ValueError(f"amounts: expected at most {len(COLOURS)} plates and objects, got {amounts}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")

    canvas = _Canvas(rng, grid, split)
    if repeat:
        colours = rng.integers(len(COLOURS), size=plates + objects).tolist()
        digits = rng.integers(10, size=objects).tolist()
    else:
        colours, digits = rng.permutation(len(COLOURS)).tolist(), rng.permutation(10).tolist()
    for _ in range(plates):
        canvas.plate(colours)
    for _ in range(objects):
        canvas.object(colours, digits)
    for _ in range(clutter):
        canvas.clutter()
    image = Image.fromarray((np.clip(canvas.pixels, 0, 1) * 255).astype(np.uint8))
    return Scene(image, tuple(canvas.things), grid, tuple(PHOTOGRAPHS)[canvas.photograph])


def amounts(rng: np.random.Generator, tiles: int) -> Amounts:
    """Draw how many things a scene of this many tiles holds, for scenes that are asked about."""
    plates, objects, clutter = ((1, 2), (1, 3), (0, 1)) if tiles <= 2 else ((1, 3), (2, 4), (0, 3))
    if tiles > 4:
        plates, objects, clutter = (2, 3), (3, 4), (2, 6)
    return Amounts(*(int(rng.integers(low, high + 1)) for low, high in (plates, objects, clutter)))


def questions(
    scene: Scene, rng: np.random.Generator, n: int, kinds: Sequence[str] = tuple(KINDS)
) -> list[Question]:
    """Draw ``n`` random questions about a scene, with replacement.

    The wording ends in the key word and carries no question mark: the model was trained so. Plates and
    objects are named by colour and shape.

    Args:
        scene: the scene.
        rng: source of all randomness.
        n: how many.
        kinds: the kinds to draw from, in the proportions of ``KINDS``; those that the scene does not allow
            are left out, such as a relation where no two things are far enough apart.

    Raises:
        ValueError: the scene allows none of the kinds.
    """
    if not isinstance(scene, Scene):
        raise TypeError(f"scene: expected a Scene, got {type(scene).__name__}")
    rng = _generator(rng)
    n = _integer("n", n, 0)
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {kinds!r}")
    plates, objects, relations = scene.of("plate"), scene.of("object"), _relations(scene)
    allowed = {
        "number": bool(plates),
        "nth": bool(plates),
        "digit": bool(objects),
        "larger": len(objects) > 1,
        "relation": bool(relations),
        "background": True,
    }
    possible = [kind for kind in KINDS if kind in kinds and allowed[kind]]
    if not possible:
        raise ValueError(f"scene: expected one that allows {', '.join(kinds)}, got {scene.things}")
    shares = np.array([KINDS[kind] for kind in possible])
    drawn = []
    for number in rng.choice(len(possible), size=n, p=shares / shares.sum()).tolist():
        kind, places = possible[number], ()
        if kind == "number":
            things, places = (plates[rng.integers(len(plates))],), (0, 1, 2)
            text, answer = f"what number is on the {things[0].name}", " ".join(map(str, things[0].digits))
        elif kind == "nth":
            things, places = (plates[rng.integers(len(plates))],), (int(rng.integers(3)),)
            text = f"what is the {PLACES[places[0]]} digit on the {things[0].name}"
            answer = str(things[0].digits[places[0]])
        elif kind == "digit":
            things = (objects[rng.integers(len(objects))],)
            text, answer = f"what digit is on the {things[0].name}", str(things[0].digits[0])
        elif kind == "larger":
            things = tuple(objects[one] for one in rng.choice(len(objects), size=2, replace=False))
            text = f"what is the larger digit on the {things[0].name} and the {things[1].name}"
            answer = str(max(thing.digits[0] for thing in things))
        elif kind == "relation":
            word, *pair = relations[rng.integers(len(relations))]
            answer = "yes" if rng.random() < 0.5 else "no"
            things = tuple(pair if answer == "yes" else pair[::-1])
            text = f"is the {things[0].name} {word} the {things[1].name}"
        else:
            text, answer, things = "what is in the background", scene.background, ()
        drawn.append(Question(text, answer, kind, things, places))
    return drawn


def _relations(scene: Scene) -> list[tuple[str, Thing, Thing]]:
    """(words, first, second) of which it is true that the first is so placed to the second."""
    named = [thing for thing in scene.things if thing.colour]
    relations = []
    for first in named:
        for second in named:
            for axis, words in enumerate(("above", "left of")):
                distance = second.box[axis] + second.box[axis + 2] - first.box[axis] - first.box[axis + 2]
                if distance >= 2 * _APART:
                    relations.append((words, first, second))
    return relations


def covered(box: np.ndarray | Box, rows: int, columns: int) -> np.ndarray:
    """``[rows, columns]``: the share of each patch that a box in px covers."""
    y0, x0, y1, x1 = box
    y, x = np.arange(rows + 1) * PATCH, np.arange(columns + 1) * PATCH
    height = (np.minimum(y[1:], y1) - np.maximum(y[:-1], y0)).clip(0)
    width = (np.minimum(x[1:], x1) - np.maximum(x[:-1], x0)).clip(0)
    return height[:, None] * width[None] / PATCH**2


def prompt(question_text: str) -> str:
    """The text to give the processor for a question about one image."""
    if not isinstance(question_text, str):
        raise TypeError(f"question_text: expected a str, got {type(question_text).__name__}")
    return "<image> " + question_text


def build_demo(seed: int, out_dir: str | Path) -> None:
    """Write ``scene_1.png``, a 3 x 3 scene of the test split, and ``questions.json``, three questions on it.

    The questions ask for a number, one of its digits and the digit of an object, in three different tiles.
    ``DEMO_SEED`` built the demo that the package carries. It was chosen so that the stock model, with all
    tokens, answers all three, and so that the photograph in it is free to copy (coffee, CC0, Rachel
    Michetti). The demo shows what the model does; it says nothing about how often the model is right.
    """
    seed = _integer("seed", seed, 0)
    rng = np.random.default_rng(seed)
    picture = scene(rng, (3, 3), Amounts(3, 4, 4), "test")
    chosen: dict[str, tuple[Question, int]] = {}
    for question in questions(picture, rng, 100, ("number", "nth", "digit")):
        tile, *more = question.things[0].tiles(picture.grid)
        if not more and question.kind not in chosen and tile not in {taken for _, taken in chosen.values()}:
            chosen[question.kind] = question, tile
    if len(chosen) < 3:
        raise ValueError(
            f"seed: expected one whose scene spreads three questions over three tiles, got {seed}"
        )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    picture.image.save(out_dir / "scene_1.png")
    records = [
        {"image": "scene_1.png", "question": question.text, "answer": question.answer, "tile": tile}
        for question, tile in chosen.values()
    ]
    (out_dir / "questions.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
