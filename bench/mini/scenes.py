"""Generated scenes and questions for the bundled mini model.

A scene is a picture of ``rows x columns`` tiles of 48 px. It shows up to nine small coloured shapes, each
wholly inside one tile and each carrying a real handwritten digit, on a dimmed crop of a real photograph. No
two objects of a scene share a digit or a (colour, shape) pair, so every question has exactly one answer.

Digits come from ``sklearn.datasets.load_digits`` and photographs from the files that scikit-image carries;
both packages are imported when the first scene is drawn (``pip install 'hero-vlm[bench]'``). The order in
which random numbers are drawn is part of the contract: the same generator state gives the same scene, and the
weights in ``hero/mini/weights`` were trained on exactly this distribution.

Pixels are (y, x) with the origin at the top left. Boxes are ``(y0, x0, y1, x1)``, end exclusive.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
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

# fmt: off
WORDS = (
    "<pad>", "<bos>", "<unk>", "<eos>", "<image>",
    *COLOURS, *SHAPES, *(str(digit) for digit in range(10)),
    "what", "digit", "is", "on", "the", "colour", "has", "shape", "how", "many", "objects", "are", "there",
    "?", "a", "photo", "of", "with", "and", "nothing", "object", "background", "in", "picture", "where",
    "left", "right", "top", "bottom", "middle", "centre", "yes", "no", "which", "an", "number", "see", "do",
    "you", "this", "image", "tell", "me", ".", ",", "above",
    "astronaut", "coffee", "cat", "rocket", "motorcycle", "camera", "brick", "grass", "gravel", "moon",
    "stars", "coins",
)
# fmt: on
"""The model's whole vocabulary, in token id order. Words are split at white space and are case-sensitive."""

SPLITS = ("train", "test")
MAX_OBJECTS = 9  # digits do not repeat in a scene, and a count must be a word of the vocabulary
MAX_GRID = 6  # 6 tiles = 288 px, the most that the photographs, 300 px on their short side, can fill

DEMO_SEED = 14
"""Seed from which the bundled demo was built."""

_OBJECT_SIZES = (17, 18, 19, 20)  # px
_DIGIT_SIZES = (11, 12, 13)  # px
_COLOUR_VALUES = np.array(list(COLOURS.values()), np.float32) / 255
_COLOUR_NAMES = tuple(COLOURS)
_PLACEMENT_TRIES = 30
_TRAIN_DIGITS = 1400  # of 1797
_VARIANTS = 16  # of each training handwriting: as it is, and turned, slanted, scaled and moved a little
_APART = 16  # px between the centres of objects whose relation is asked for

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

KINDS = {"digit": 0.40, "colour": 0.16, "shape": 0.16, "count": 0.08, "relation": 0.12, "background": 0.08}
"""Kind of question -> its share of those drawn."""

ONE_ATTRIBUTE = ("digit", "colour", "shape")
"""The kinds that ask for one attribute of one object; a single tile answers them."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape with a digit on it."""

    colour: str
    shape: str
    digit: int
    box: Box
    """(y0, x0, y1, x1) in px of the scene."""
    tile: int
    """Raster index of the tile that holds the whole object."""


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows."""

    image: Image.Image
    """RGB, ``rows * 48`` px high and ``columns * 48`` px wide."""
    objects: tuple[SceneObject, ...]
    grid: tuple[int, int]
    """(rows, columns) of tiles."""
    background: str
    """What the photograph behind the objects shows: a word of ``PHOTOGRAPHS``."""


class Question(NamedTuple):
    """A question with its one-word answer and where that answer is to be seen."""

    text: str
    answer: str
    kind: str
    """A key of ``KINDS``: what is asked for."""
    tile: int | None
    """Tile of the object asked about; None where the question is not about one object."""
    box: Box | None
    """Box of the object asked about; None where the question is not about one object."""
    objects: tuple[SceneObject, ...]
    """What has to be seen to answer: one object, two for a relation, all for a count, none else."""


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


def scene(rng: np.random.Generator, grid: tuple[int, int], n_objects: int, split: str = "train") -> Scene:
    """Draw a random scene.

    Args:
        rng: source of all randomness; the same state gives the same scene.
        grid: (rows, columns) of tiles, each 1..6. The weights know the grids in ``GRIDS``.
        n_objects: objects wanted, 0..9. One that finds no free place in 30 tries is left out, so a small
            crowded scene may hold fewer.
        split: which handwritings to use, ``"train"`` or ``"test"``. The two share no handwritten image,
            though the same people may have written both.
    """
    rng = _generator(rng)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"grid: expected (rows, columns), got {grid!r}")
    rows, columns = (_integer(f"grid[{axis}]", value, 1, MAX_GRID) for axis, value in enumerate(grid))
    n_objects = _integer("n_objects", n_objects, 0, MAX_OBJECTS)
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")

    digits = _digits()
    pixels, photograph = _background(rng, rows * TILE, columns * TILE)
    looks = rng.permutation(len(COLOURS) * len(SHAPES))[:n_objects]
    written = rng.permutation(10)[:n_objects]
    objects: list[SceneObject] = []
    for look, digit in zip(looks.tolist(), written.tolist(), strict=True):
        colour, shape = divmod(look, len(SHAPES))
        for _ in range(_PLACEMENT_TRIES):
            row, column = int(rng.integers(rows)), int(rng.integers(columns))
            side = _OBJECT_SIZES[rng.integers(len(_OBJECT_SIZES))]
            y = row * TILE + int(rng.integers(1, TILE - side))
            x = column * TILE + int(rng.integers(1, TILE - side))
            box = (y, x, y + side, x + side)
            if all(_apart(box, placed.box) for placed in objects):
                break
        else:
            continue

        mask = _shape_mask(SHAPES[shape], side)
        paint = np.clip(_COLOUR_VALUES[colour] + rng.normal(0, 0.04, 3), 0, 1)
        area = pixels[y : y + side, x : x + side]
        area[:] = area * (1 - mask) + paint * mask

        handwritings = digits.indices[split][digit]
        triangle = SHAPES[shape] == "triangle"
        ink_side = 11 if triangle else 12 if side < 19 else 13
        written_by = handwritings[rng.integers(len(handwritings))]
        if split == "train":
            ink = _variants(ink_side)[written_by, rng.integers(_VARIANTS)]
        else:
            ink = digits.pixels[ink_side][written_by]
        ink = ink[..., None]
        # A triangle is wide at its foot only: its digit sits lower.
        top = y + min((side - ink_side) // 2 + (3 if triangle else 0), side - ink_side)
        left = x + (side - ink_side) // 2
        area = pixels[top : top + ink_side, left : left + ink_side]
        area[:] = area * (1 - 0.92 * ink)
        objects.append(SceneObject(_COLOUR_NAMES[colour], SHAPES[shape], digit, box, row * columns + column))
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    return Scene(image, tuple(objects), (rows, columns), tuple(PHOTOGRAPHS)[photograph])


def questions(
    scene: Scene, rng: np.random.Generator, n: int, kinds: Sequence[str] = tuple(KINDS)
) -> list[Question]:
    """Draw ``n`` random questions about a scene, with replacement.

    The wording ends in the key word and carries no question mark: the model was trained so. Digits are asked
    of an object by its colour and shape, or by one of them where that is unique; colours and shapes of an
    object by its digit.

    Args:
        scene: the scene, with at least one object.
        rng: source of all randomness.
        n: how many.
        kinds: the kinds to draw from, in the proportions of ``KINDS``. A relation is asked only where two
            objects are far enough apart; otherwise another kind is drawn.
    """
    if not isinstance(scene, Scene):
        raise TypeError(f"scene: expected a Scene, got {type(scene).__name__}")
    rng = _generator(rng)
    n = _integer("n", n, 0)
    if not scene.objects:
        raise ValueError("scene: expected at least one object to ask about, got none")
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {kinds!r}")
    relations = _relations(scene)
    possible = [kind for kind in KINDS if kind in kinds and (kind != "relation" or relations)]
    if not possible:
        raise ValueError(f"scene: expected two objects {_APART} px apart to ask for a relation, got none")
    shares = np.array([KINDS[kind] for kind in possible])
    drawn = []
    for _ in range(n):
        kind = possible[rng.choice(len(possible), p=shares / shares.sum())]
        if kind == "count":
            text, answer, asked = "how many objects are there", str(len(scene.objects)), scene.objects
        elif kind == "background":
            text, answer, asked = "what is in the background", scene.background, ()
        elif kind == "relation":
            word, first, second = relations[rng.integers(len(relations))]
            answer = "yes" if rng.random() < 0.5 else "no"
            asked = (first, second) if answer == "yes" else (second, first)
            text = f"is the {_name(asked[0])} {word} the {_name(asked[1])}"
        else:
            thing = scene.objects[rng.integers(len(scene.objects))]
            asked, answer = (thing,), str(getattr(thing, kind))
            text = f"what {kind} has the digit {thing.digit}"
            if kind == "digit":
                text = f"what digit is on the {_reference(thing, scene, rng)}"
        one = asked[0] if kind in ONE_ATTRIBUTE else None
        drawn.append(Question(text, answer, kind, one and one.tile, one and one.box, asked))
    return drawn


def _name(thing: SceneObject) -> str:
    return f"{thing.colour} {thing.shape}"


def _reference(thing: SceneObject, scene: Scene, rng: np.random.Generator) -> str:
    """Words for one object of a scene: colour and shape, sometimes one of them where that is unique."""
    r = rng.random()
    if r < 0.27 and [other.colour for other in scene.objects].count(thing.colour) == 1:
        return f"object with colour {thing.colour}"
    if r < 0.40 and [other.shape for other in scene.objects].count(thing.shape) == 1:
        return f"object with shape {thing.shape}"
    return _name(thing)


def _relations(scene: Scene) -> list[tuple[str, SceneObject, SceneObject]]:
    """(words, first, second) of which it is true that the first is so placed to the second."""
    relations = []
    for first in scene.objects:
        for second in scene.objects:
            for axis, words in enumerate(("above", "left of")):
                distance = second.box[axis] + second.box[axis + 2] - first.box[axis] - first.box[axis + 2]
                if distance >= 2 * _APART:
                    relations.append((words, first, second))
    return relations


def prompt(question_text: str) -> str:
    """The text to give the processor for a question about one image."""
    if not isinstance(question_text, str):
        raise TypeError(f"question_text: expected a str, got {type(question_text).__name__}")
    return "<image> " + question_text


def build_demo(seed: int, out_dir: str | Path) -> None:
    """Write ``scene_1.png``, a 3 x 3 scene of the test split, and ``questions.json``, three questions on it.

    The questions ask for a digit, a colour and a shape, in three different tiles. ``DEMO_SEED`` built the
    demo that the package carries. It was chosen so that the stock model, with all tokens, answers all three,
    and so that the photograph in it is free to copy (coffee, CC0, Rachel Michetti). The demo shows what the
    model does; it says nothing about how often the model is right.
    """
    seed = _integer("seed", seed, 0)
    rng = np.random.default_rng(seed)
    picture = scene(rng, (3, 3), 6, "test")
    chosen: dict[str, Question] = {}
    for question in questions(picture, rng, 100):
        taken = {other.tile for other in chosen.values()}
        if question.kind in ONE_ATTRIBUTE and question.kind not in chosen and question.tile not in taken:
            chosen[question.kind] = question
    if len(chosen) < 3:
        raise ValueError(
            f"seed: expected one whose scene spreads three questions over three tiles, got {seed}"
        )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    picture.image.save(out_dir / "scene_1.png")
    records = [
        {"image": "scene_1.png", "question": question.text, "answer": question.answer, "tile": question.tile}
        for question in chosen.values()
    ]
    (out_dir / "questions.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
