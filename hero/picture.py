"""Picture: what was kept of an image, for a person to look at. The same bytes on every run."""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from .encoder import Selection
from .layout import ImageLayout

__all__ = ["visualize"]

MIN_WIDTH = 400  # below it the headings of the panels no longer fit

_INK = (28, 30, 36)
_MUTED = (96, 100, 110)
_PAPER = (255, 255, 255)
# Dropped patches fade towards it; not black, or a dropped black patch would look kept.
_DARK = (34, 36, 44)
_CHIP = (18, 20, 26)
_OUTLINE = (225, 228, 235)
_HATCH = (238, 239, 242), (208, 211, 217)
# Ten equal steps of viridis: its lightness alone orders the values, for colour-blind readers and in grey.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (72, 40, 120),
        (62, 73, 137),
        (49, 104, 142),
        (38, 130, 142),
        (31, 158, 137),
        (53, 183, 121),
        (110, 206, 88),
        (181, 222, 43),
        (253, 231, 37),
    ],
    np.float64,
)
_FINE = 4  # type is drawn this much larger and reduced: at its own size letters are spaced to whole pixels
_DECADES = 3  # of a logarithmic scale; lower scores get its lowest colour
# The font that Pillow carries has few signs beyond Latin-1's first half. Non-breaking spaces join words in
# `_Type.wrap` and are drawn as spaces.
_SUBSTITUTES = str.maketrans(
    {"\u00a0": " ", "\u202f": " ", "–": "-", "—": "-", "−": "-", "×": "x", "‘": "'", "’": "'"}
    | {"“": '"', "”": '"', "…": "...", "→": "->", "ß": "ss", "\t": " "}
)


def visualize(
    image, selection: Selection, *, image_index: int = 0, width: int = 1000, title: str | None = None
) -> Image.Image:
    """Draw which visual tokens of an image were kept, and by which scores.

    Kept patches stand at full brightness on the tiles and on the thumbnail, dropped ones are dimmed, padding
    is hatched. Each tile is labelled with the patches kept of it and its share of the tile tokens before
    caps. Beside them stand the patch scores; tiles and thumbnail, scored by different layers, have a colour
    scale each.

    Args:
        image: what the model was shown: a PIL image of any mode, an array ``[H, W]`` or ``[H, W, 1, 3 or 4]``
            (uint8, or floating in [0, 1]), or a path. A path is turned upright by its Exif tag, as
            transformers does, where that agrees with the size that the model saw. Transparency is drawn on
            white.
        selection: what :class:`hero.HeroVisionEncoder` returned, or ``handle.last``.
        image_index: which image of the selection's batch.
        width: of the picture in pixels, at least 400; type grows with it, and the height follows.
        title: a line above the picture, such as the question and its answer; none where ``None``.

    Returns:
        an RGB image, ``width`` pixels wide.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, by name; an image of
            another size than the selection's.
        OSError: a path that cannot be read.
        ImportError: a Pillow without FreeType.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: expected hero.Selection, got {selection!r}")
    expected = f"an integer in [0, {len(selection.layout)})"
    if isinstance(image_index, bool) or not isinstance(image_index, Integral):
        raise TypeError(f"image_index: expected {expected}, got {image_index!r}")
    if not 0 <= image_index < len(selection.layout):
        raise ValueError(f"image_index: expected {expected}, got {image_index!r}")
    expected = f"an integer >= {MIN_WIDTH}"
    if isinstance(width, bool) or not isinstance(width, Integral):
        raise TypeError(f"width: expected {expected}, got {width!r}")
    if width < MIN_WIDTH:
        raise ValueError(f"width: expected {expected}, got {width!r}")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title: expected a string or None, got {title!r}")
    pixels = _read(image, selection.layout[image_index].image_size)
    return _Page(pixels, _Kept.of(selection, int(image_index)), _Type(int(width))).draw(title)


def _read(image, size: tuple[int, int]) -> Image.Image:
    """The image in RGB, if it is one of (height, width) ``size``."""
    upright = None
    if isinstance(image, (str, os.PathLike)):
        with Image.open(image) as file:
            upright = ImageOps.exif_transpose(file)
            image = file.copy()
    elif isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise TypeError(f"image: expected a PIL image, a numpy array or a path, got {kind}")
    if upright is not None and upright.size[::-1] == size:
        image = upright
    if image.size[::-1] != size:
        raise ValueError(
            f"image: expected the selection's, {size[0]} x {size[1]} px (height x width), "
            f"got {image.size[1]} x {image.size[0]}"
        )
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*_PAPER, 255))
        return Image.alpha_composite(paper, image).convert("RGB")
    if image.mode.startswith(("I", "F")):  # Pillow would clip these instead of scaling them
        values = np.asarray(image, np.float64)
        low, high = float(values.min()), float(values.max())
        values = (values - low) / (high - low or 1.0)
        image = Image.fromarray((values * 255 + 0.5).astype(np.uint8))
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    expected = "an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        raise ValueError(f"image: expected {expected}, got shape {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # also raises for NaN
            raise ValueError(
                f"image: expected floating values in [0, 1], got [{array.min():g}, {array.max():g}]"
            )
        array = (array * 255 + 0.5).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise TypeError(f"image: expected {expected} of uint8 or floating dtype, got {array.dtype}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


@dataclass(frozen=True)
class _Kept:
    """A selection's part of one image, in numpy.

    Attributes:
        layout: of the image.
        keep: ``[crops, p, p]`` bool.
        scores: ``[crops, p, p]`` float64.
        budgets, shares: of each crop.
        length: tokens kept, newlines included.
        policy: that chose them.
    """

    layout: ImageLayout
    keep: np.ndarray
    scores: np.ndarray
    budgets: list[int]
    shares: list[float]
    length: int
    policy: str

    @classmethod
    def of(cls, selection: Selection, image_index: int) -> _Kept:
        layout = selection.layout[image_index]
        first = sum(other.crops for other in selection.layout[:image_index])
        crops = slice(first, first + layout.crops)
        shape = (layout.crops, layout.side, layout.side)

        def numpy(values: Tensor) -> np.ndarray:
            return values[crops].detach().cpu().numpy()

        return cls(
            layout,
            numpy(selection.keep_mask()).reshape(shape),
            numpy(selection.scores).astype(np.float64).reshape(shape),
            numpy(selection.budgets).tolist(),
            numpy(selection.shares).tolist(),
            selection.lengths[image_index],
            selection.policy,
        )

    @property
    def tiles(self) -> slice:
        """The crops that are tiles."""
        return slice(self.layout.tile_crops.start, self.layout.tile_crops.stop)

    def stitched(self, values: np.ndarray) -> np.ndarray:
        """``[crops, p, p]`` of the tiles as the grid they were cut from."""
        rows, columns = self.layout.grid
        side = self.layout.side
        grid = values[self.tiles].reshape(rows, columns, side, side)
        return grid.swapaxes(1, 2).reshape(rows * side, columns * side)

    @cached_property
    def valid(self) -> np.ndarray:
        """The stitched grid, true where it is not padding."""
        rows, columns = self.layout.grid
        valid = np.zeros((rows * self.layout.side, columns * self.layout.side), bool)
        valid[slice(*self.layout.rows), slice(*self.layout.columns)] = True
        return valid

    def tile_patches(self) -> tuple[int, int]:
        """Patches of the tiles: kept, and all."""
        return int(self.keep[self.tiles].sum()), int(self.valid.sum())

    def thumbnail_patches(self) -> tuple[int, int]:
        """Patches of the thumbnail: kept, and all."""
        return int(self.keep[self.layout.thumbnail_crop].sum()), self.layout.patches

    def summary(self) -> str:
        """One sentence of counts; non-breaking spaces within its parts."""
        layout = self.layout
        parts = []
        patches = 0
        if layout.thumbnail != "none":
            kept, whole = self.thumbnail_patches()
            patches += kept
            parts.append(f"{kept:,} of {whole:,} thumbnail")
        if layout.tiles:
            kept, whole = self.tile_patches()
            patches += kept
            parts.append(f"{kept:,} of {whole:,} tile patches")
        newlines = self.length - patches
        if newlines:
            parts.append(f"{newlines:,} newline{'s' if newlines > 1 else ''}")
        whole = layout.full_tokens
        total = f"{self.length:,} of {whole:,} tokens kept ({_percent(self.length / max(whole, 1))}): "
        return total + ", ".join(part.replace(" ", "\u00a0") for part in parts)


def _percent(share: float) -> str:
    return f"{'<1' if 0 < share < 0.005 else f'{100 * share:.0f}'}\u00a0%"


class _Type:
    """Sizes and type that follow from the picture's width."""

    def __init__(self, width: int):
        self.width = width
        self.margin = round(0.026 * width)
        self.gap = round(0.026 * width)
        self.line = max(1, round(width / 1000))
        self.title = max(14, round(0.023 * width))
        self.body = max(11, round(0.0155 * width))
        self.small = max(10, round(0.0135 * width))
        self.least = max(8, round(0.0095 * width))

    @staticmethod
    @lru_cache(maxsize=64)
    def font(size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.load_default(size=size)

    def length(self, text: str, size: int) -> float:
        """In pixels."""
        return self.font(_FINE * size).getlength(_printable(text)) / _FINE

    def fit(self, text: str, size: int, width: float) -> int:
        """The largest type, at most ``size``, in which a text fits a width."""
        while size > 1 and self.length(text, size) > width:
            size -= 1
        return size

    def wrap(self, text: str, size: int, width: int) -> Iterator[str]:
        """Lines no wider than ``width``; words longer than that are split."""
        for paragraph in text.splitlines() or [""]:
            line = ""
            for word in paragraph.split(" "):
                longer = f"{line} {word}" if line else word
                if self.length(longer, size) <= width:
                    line = longer
                    continue
                if line:
                    yield line
                while len(word) > 1 and self.length(word, size) > width:
                    pieces = range(1, len(word))
                    fits = bisect_right(pieces, width, key=lambda n: self.length(word[:n], size))
                    yield word[: max(fits, 1)]
                    word = word[max(fits, 1) :]
                line = word
            yield line

    def lines(self, text: str, size: int, width: int, colour=_INK) -> Image.Image:
        """Wrapped text as a strip of a width."""
        lines = list(self.wrap(text, size, width))
        step = round(1.34 * size)
        strip = Image.new("RGB", (width, step * len(lines)), _PAPER)
        for number, line in enumerate(lines):
            self.write(strip, (0, number * step + size), line, size, colour)
        return strip

    def write(
        self,
        image: Image.Image,
        position: tuple[float, float],
        text: str,
        size: int,
        colour: tuple[int, int, int] = _INK,
        align: float = 0.0,
    ) -> None:
        """Write a line on its baseline, which begins ``align`` · its length left of the position."""
        font, text = self.font(_FINE * size), _printable(text)
        left, top = int(position[0] - align * self.length(text, size)), round(position[1]) - 2 * size
        offset = position[0] - align * self.length(text, size) - left
        width = int(self.length(text, size)) + 2 * size
        mask = Image.new("L", (_FINE * width, _FINE * 3 * size))
        ImageDraw.Draw(mask).text((round(_FINE * offset), _FINE * 2 * size), text, 255, font, "ls")
        image.paste(colour, (left, top), mask.reduce(_FINE))


@lru_cache(maxsize=1024)
def _printable(text: str) -> str:
    """The text with letters that the font lacks replaced: by plain ones, by ``?`` where there are none."""
    font = _Type.font(16)
    missing = bytes(font.getmask("\uffff"))

    def letter(character: str) -> str:
        if character == " " or bytes(font.getmask(character)) != missing:
            return character
        plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        return plain or ("" if unicodedata.category(character).startswith(("M", "C")) else "?")

    return "".join(letter(character) for character in text.translate(_SUBSTITUTES))


def _cells(cells: int, size: int) -> np.ndarray:
    """Which of ``cells`` equal cells each of ``size`` pixels lies in, to the nearest pixel."""
    return np.repeat(np.arange(cells), np.diff(_edges(cells, size)))


def _edges(cells: int, size: int) -> np.ndarray:
    return (2 * np.arange(cells + 1) * size + cells) // (2 * cells)


def _enlarge(patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values of patches as values of (width, height) pixels."""
    return patches[_cells(patches.shape[0], size[1])][:, _cells(patches.shape[1], size[0])]


def _hatched(size: tuple[int, int], kind: _Type) -> np.ndarray:
    """Diagonal lines, ``[height, width, 3]``."""
    x, y = np.arange(size[0]), np.arange(size[1])[:, None]
    lines = (x + y) % (8 * kind.line) < kind.line
    return np.where(lines[..., None], np.uint8(_HATCH[1]), np.uint8(_HATCH[0]))


def _dim(pixels: np.ndarray) -> np.ndarray:
    """Darker and greyer."""
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    faded = 0.35 * pixels + 0.65 * grey[..., None]
    return (0.3 * faded + 0.7 * np.array(_DARK) + 0.5).astype(np.uint8)


def _photograph(
    image: Image.Image, keep: np.ndarray, valid: np.ndarray, size: tuple[int, int], kind: _Type
) -> np.ndarray:
    """The image on the valid part of a grid of patches, dropped patches dimmed, ``[height, width, 3]``."""
    canvas = _hatched(size, kind)
    rows, columns = np.flatnonzero(valid.any(1)), np.flatnonzero(valid.any(0))
    if not len(rows):
        return canvas
    y, x = _edges(valid.shape[0], size[1]), _edges(valid.shape[1], size[0])
    top, bottom, left, right = y[rows[0]], y[rows[-1] + 1], x[columns[0]], x[columns[-1] + 1]
    if bottom == top or right == left:
        return canvas
    box = slice(top, bottom), slice(left, right)
    pixels = np.asarray(image.resize((int(right - left), int(bottom - top)), Image.Resampling.BICUBIC))
    kept = _enlarge(keep, size)
    canvas[box] = np.where(kept[box][..., None], pixels, _dim(pixels))
    # Where image and dimmed image are both dark only a line tells them apart. It runs outside the kept
    # patches, whose pixels stay as they are, and is left out where it would fill the patches.
    if min(size[0] / keep.shape[1], size[1] / keep.shape[0]) >= 6 * kind.line:
        near = Image.fromarray(kept.astype(np.uint8))
        for _ in range(kind.line):
            near = near.filter(ImageFilter.MaxFilter(3))
        canvas[(np.asarray(near) > 0) & ~kept & _enlarge(valid, size)] = _OUTLINE
    return canvas


@dataclass(frozen=True)
class _Scale:
    """From patch scores to colours.

    Logarithmic where scores are positive and differ tenfold, since attention is so uneven that on a linear
    scale a few patches outshine all others; over three decades at most.
    """

    low: float
    high: float
    logarithmic: bool
    clipped: bool

    @classmethod
    def of(cls, scores: np.ndarray) -> _Scale | None:
        """The scale of the finite scores; ``None`` where there are none."""
        scores = scores[np.isfinite(scores)]
        if not scores.size:
            return None
        low, high = float(scores.min()), float(scores.max())
        if low < 0 or high < 10 * low or high == 0:
            return cls(low, high, False, False)
        least = high / 10**_DECADES
        return cls(max(low, least), high, True, low < least)

    def colours(self, scores: np.ndarray) -> np.ndarray:
        """``[..., 3]`` uint8; not-a-number in grey."""
        low, high = self.low, self.high
        values = np.clip(scores, low, high)
        if self.logarithmic:
            values, low, high = np.log(values), np.log(low), np.log(high)
        part = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
        unknown = np.isnan(part)
        place = np.where(unknown, 0.0, part) * (len(_VIRIDIS) - 1)
        step = np.minimum(place.astype(int), len(_VIRIDIS) - 2)
        rest = (place - step)[..., None]
        colours = (1 - rest) * _VIRIDIS[step] + rest * _VIRIDIS[step + 1]
        return np.where(unknown[..., None], _HATCH[1], colours + 0.5).astype(np.uint8)

    def bar(self, length: int) -> np.ndarray:
        """The colours from low to high, ``[length, 3]``."""
        if self.high == self.low:
            return np.tile(self.colours(np.array([self.low])), (length, 1))
        space = np.geomspace if self.logarithmic else np.linspace
        return self.colours(space(self.low, self.high, length))

    def ends(self) -> tuple[str, str]:
        """Numbers at the ends of the bar."""
        low, high = f"{self.low:.2g}", f"{self.high:.2g}"
        if self.low == self.high:
            return f"all {low}", ""
        return ("< " if self.clipped else "") + low, high


@dataclass(frozen=True)
class _Chip:
    """A label on a tile: its box (left, top, right, bottom) and its text."""

    box: tuple[int, int, int, int]
    text: str
    size: int


@dataclass(frozen=True)
class _Page:
    """The picture of one image: panels, and their arrangement."""

    image: Image.Image
    kept: _Kept
    type: _Type

    def draw(self, title: str | None) -> Image.Image:
        """The whole picture."""
        kind = self.type
        width = kind.width - 2 * kind.margin
        blocks = [] if title is None or not title.strip() else [kind.lines(title.strip(), kind.title, width)]
        blocks.append(kind.lines(self.kept.summary(), kind.body, width))
        header = _stacked(blocks, round(0.3 * kind.body))
        body = _stacked([header, *self._arrange(width)], kind.gap)
        page = Image.new("RGB", (kind.width, body.height + 2 * kind.margin), _PAPER)
        page.paste(body, (kind.margin, kind.margin))
        return page

    def _arrange(self, width: int) -> list[Image.Image]:
        """The panels, by the shape of the grid; nothing is cropped, sizes give way."""
        kind, layout = self.type, self.kept.layout
        gap = kind.gap
        has_thumbnail = layout.thumbnail != "none"
        if not layout.tiles:
            side = (width - gap) // 2
            panels = _beside([self.thumbnail(side), self.thumbnail_scores(side)], gap)
            return [panels, self.key(width)]
        aspect = layout.grid[1] / layout.grid[0]
        if aspect < 0.67:  # tiles and their scores as tall columns, the thumbnail in a third
            gaps = 2 * gap if has_thumbnail else gap
            side = 0
            if has_thumbnail:  # as wide as makes the third column as high as the others
                side = ((width - gaps) / (2 * aspect) - self._around() - gap) / (2 + 1 / (2 * aspect))
            height = min(round((width - side - gaps) / 2 / aspect), round(1.5 * kind.width))
            size = (max(round(height * aspect), 1), height)
            column = max(size[0], round(0.22 * width))
            panels = [self.tiles(size, column), self.tile_scores(size, column)]
            if has_thumbnail:
                side = width - 2 * column - gaps
                panels.append(_stacked([self.thumbnail(side), self.thumbnail_scores(side)], gap))
            return [_beside(panels, gap), self.key(width, size), *self.legend(size, width)]
        if aspect < 1.6:  # large tiles, everything else in a column at their right
            main = self._main_width(width, aspect)
            side = width - main - gap
            column = [self.tile_scores((side, round(side / aspect)))]
            if has_thumbnail:
                half = (side - gap) // 2
                column.insert(0, _beside([self.thumbnail(half), self.thumbnail_scores(half)], gap))
            size = (main, round(main / aspect))
            left = _stacked([self.tiles(size), self.key(main, size)], round(0.5 * gap))
            return [_beside([left, _stacked(column, gap)], gap), *self.legend(size, width)]
        size = (width, max(round(width / aspect), 1))
        blocks = [
            _stacked([self.tiles(size), self.key(width, size)], round(0.5 * gap)),
            *self.legend(size, width),
        ]
        if not has_thumbnail:
            return [*blocks, self.tile_scores(size)]
        if aspect < 3.2:  # one row below for all else, of one height
            side = int((width - 2 * gap) / (aspect + 2))
            scores = self.tile_scores((width - 2 * gap - 2 * side, side))
            return [*blocks, _beside([self.thumbnail(side), self.thumbnail_scores(side), scores], gap)]
        side = round(0.27 * width)
        thumbnails = _beside([self.thumbnail(side), self.thumbnail_scores(side)], gap)
        return [*blocks, self.tile_scores(size), thumbnails]

    def _around(self) -> int:
        """Height of a panel's heading and colour scale, nearly."""
        return round(1.5 * self.type.body + 4.3 * self.type.small)

    def _main_width(self, width: int, aspect: float) -> int:
        """Of the large tiles: where the columns at their two sides come out about equally high."""
        kind = self.type
        has_thumbnail = self.kept.layout.thumbnail != "none"

        def difference(main: int) -> float:
            side = width - main - kind.gap
            right = side / aspect
            if has_thumbnail:
                right += self._around() + (side - kind.gap) / 2 + kind.gap
            return abs(main / aspect - right)

        most = 0.69 * width
        if has_thumbnail:  # no narrower than the headings of its panels
            least = max(
                kind.length("Thumbnail scores", kind.body), kind.length("CLS attention (log)", kind.small)
            )
            most = min(most, width - 2 * kind.gap - 2 * least - 2)
        return min(range(round(0.45 * width), max(round(most), round(0.5 * width))), key=difference)

    def tiles(self, size: tuple[int, int], width: int = 0) -> Image.Image:
        """The image on its grid of tiles."""
        kept, whole = self.kept.tile_patches()
        rows, columns = self.kept.layout.grid
        heading = f"Tiles, {rows} x {columns}", f"{kept:,} of {whole:,} patches"
        return self._panel(heading, self.tiles_picture(size), width)

    def tiles_picture(self, size: tuple[int, int]) -> Image.Image:
        """The image on its grid of tiles, of (width, height) pixels, with its labels."""
        kind = self.type
        keep = self.kept.stitched(self.kept.keep)
        picture = Image.fromarray(_photograph(self.image, keep, self.kept.valid, size, kind))
        self._grid_lines(picture, self.kept.layout.grid)
        draw = ImageDraw.Draw(picture, "RGBA")
        for chip in self.chips(size):
            left, top, right, bottom = chip.box
            draw.rounded_rectangle(
                (left, top, right - 1, bottom - 1),
                round(0.28 * chip.size),
                (*_CHIP, 235),
                (255, 255, 255, 110),
            )
            middle = ((left + right) / 2, (top + bottom) / 2 + 0.36 * chip.size)
            kind.write(picture, middle, chip.text, chip.size, _PAPER, 0.5)
        return picture

    def _grid_lines(self, picture: Image.Image, grid: tuple[int, int]) -> None:
        """Thin lines between the tiles, where there is room for them."""
        rows, columns = grid
        width, height = picture.size
        line = self.type.line
        if min(width / columns, height / rows) < 6 * line:
            return
        draw = ImageDraw.Draw(picture)
        for x in _edges(columns, width)[1:-1].tolist():
            draw.rectangle((x - line // 2, 0, x - line // 2 + line - 1, height), _PAPER)
        for y in _edges(rows, height)[1:-1].tolist():
            draw.rectangle((0, y - line // 2, width, y - line // 2 + line - 1), _PAPER)

    def _label(self, tile: int) -> tuple[str, str]:
        """Budget and share of a tile."""
        crop = self.kept.layout.tile_crops[tile]
        return f"{self.kept.budgets[crop]}", _percent(self.kept.shares[crop])

    @staticmethod
    def _padding(size: int) -> tuple[int, int]:
        """Room in a chip beside and above its text."""
        return round(0.45 * size), round(0.22 * size)

    def _fitting(self, size: tuple[int, int]) -> tuple[list[str], int]:
        """The labels that fit the tiles of a picture, and their type: with shares, without, or none."""
        kind, layout = self.type, self.kept.layout
        tile = size[0] / layout.grid[1], size[1] / layout.grid[0]
        labels = [self._label(number) for number in range(layout.tiles)]
        for texts in ([f"{budget} · {share}" for budget, share in labels], [budget for budget, _ in labels]):
            longest = max(texts, key=lambda text: kind.length(text, 100))
            for letters in range(kind.body, kind.least - 1, -1):
                width, height = self._chip_size(longest, letters)
                inset = 2 * self._inset(letters)
                if width + inset <= 0.92 * tile[0] and height + inset <= 0.45 * tile[1]:
                    return texts, letters
        return [], kind.least

    def _chip_size(self, text: str, letters: int) -> tuple[int, int]:
        beside, above = self._padding(letters)
        return int(np.ceil(self.type.length(text, letters))) + 2 * beside, letters + 2 * above

    @staticmethod
    def _inset(letters: int) -> int:
        return max(2, round(0.3 * letters))

    def chips(self, size: tuple[int, int]) -> list[_Chip]:
        """The labels on a picture of the tiles: top left, or in the corner where they hide least."""
        texts, letters = self._fitting(size)
        kept = _enlarge(self.kept.stitched(self.kept.keep), size)
        x, y = (_edges(n, pixels).tolist() for n, pixels in zip(self.kept.layout.grid[::-1], size))
        inset = self._inset(letters)
        chips = []
        for tile, text in enumerate(texts):
            row, column = divmod(tile, len(x) - 1)
            width, height = self._chip_size(text, letters)
            boxes = [
                (left, top, left + width, top + height)
                for top in (y[row] + inset, y[row + 1] - inset - height)
                for left in (x[column] + inset, x[column + 1] - inset - width)
            ]

            def hidden(box: tuple[int, int, int, int]) -> float:
                left, top, right, bottom = box
                part = float(kept[top:bottom, left:right].mean())
                return part if part > 0.25 else 0.0

            chips.append(_Chip(min(boxes, key=hidden), text, letters))
        return chips

    def legend(self, size: tuple[int, int], width: int) -> list[Image.Image]:
        """A table of all labels, where tiles of a picture of ``size`` are too small for theirs."""
        kind, layout = self.type, self.kept.layout
        texts, _ = self._fitting(size)
        labels = [" · ".join(self._label(tile)) for tile in range(layout.tiles)]
        if texts == labels:
            return []
        places = [
            "{},{}".format(*(n + 1 for n in divmod(tile, layout.grid[1]))) for tile in range(len(labels))
        ]
        letters = kind.small
        first = max(kind.length(place, letters) for place in places) + 0.6 * letters
        cell = first + max(kind.length(label, letters) for label in labels) + 1.6 * letters
        columns = max(1, int((width + 1.6 * letters) / cell))
        columns -= columns % layout.grid[1] if columns > layout.grid[1] else 0  # whole rows of the grid
        step = round(1.45 * letters)
        table = Image.new("RGB", (width, step * -(-len(labels) // columns)), _PAPER)
        for tile, (place, label) in enumerate(zip(places, labels)):
            row, column = divmod(tile, columns)
            x, y = round(column * cell), row * step + letters
            kind.write(table, (x, y), place, letters, _MUTED)
            kind.write(table, (x + round(first), y), label, letters)
        heading = kind.lines(
            "Tiles, by row,column: tokens kept · share of the tokens before caps", letters, width, _MUTED
        )
        return [_stacked([heading, table], round(0.3 * letters))]

    def thumbnail(self, side: int) -> Image.Image:
        """The whole image, squashed into the thumbnail's square."""
        kept, whole = self.kept.thumbnail_patches()
        keep = self.kept.keep[self.kept.layout.thumbnail_crop]
        pixels = _photograph(self.image, keep, np.ones_like(keep), (side, side), self.type)
        return self._panel(("Thumbnail", f"{kept:,} of {whole:,} patches"), Image.fromarray(pixels), side)

    def tile_scores(self, size: tuple[int, int], width: int = 0) -> Image.Image:
        """A heat map of the tiles' scores."""
        scores = self.kept.stitched(self.kept.scores)
        return self._scores("Tile scores", scores, self.kept.valid, self.kept.layout.grid, size, width)

    def thumbnail_scores(self, side: int) -> Image.Image:
        """A heat map of the thumbnail's scores."""
        scores = self.kept.scores[self.kept.layout.thumbnail_crop]
        everywhere = np.ones(scores.shape, bool)
        return self._scores("Thumbnail scores", scores, everywhere, (1, 1), (side, side))

    def _scores(
        self,
        name: str,
        scores: np.ndarray,
        valid: np.ndarray,
        grid: tuple[int, int],
        size: tuple[int, int],
        width: int = 0,
    ) -> Image.Image:
        detail = "random" if self.kept.policy == "random" else "CLS attention"
        scale = _Scale.of(scores[valid])
        pixels = _hatched(size, self.type)
        if scale is None:
            return self._panel((name, detail), Image.fromarray(pixels), width)
        inside = _enlarge(valid, size)
        pixels[inside] = _enlarge(scale.colours(scores), size)[inside]
        picture = Image.fromarray(pixels)
        self._grid_lines(picture, grid)
        panel = self._panel((name, detail + " (log)" * scale.logarithmic), picture, width)
        return _stacked([panel, self._bar(scale, panel.width)], round(0.5 * self.type.small))

    def _bar(self, scale: _Scale, width: int) -> Image.Image:
        """A colour scale: its bar and the numbers at the ends."""
        kind = self.type
        bar = Image.fromarray(np.tile(scale.bar(width), (round(0.75 * kind.small), 1, 1)))
        low, high = scale.ends()
        letters = kind.fit(f"{low} {high}", kind.small, width)
        numbers = Image.new("RGB", (width, round(1.34 * kind.small)), _PAPER)
        kind.write(numbers, (0, kind.small), low, letters, _MUTED)
        kind.write(numbers, (width, kind.small), high, letters, _MUTED, 1.0)
        return _stacked([bar, numbers], round(0.25 * kind.small))

    def _panel(self, heading: tuple[str, str], picture: Image.Image, width: int) -> Image.Image:
        """A picture under two lines, its name and a detail, at least ``width`` wide."""
        kind = self.type
        width = max(width, picture.width)
        name, detail = heading
        letters = kind.fit(name, kind.body, width), kind.fit(detail, kind.small, width)
        # One height for all headings, so that pictures side by side are level.
        head = Image.new("RGB", (width, round(1.3 * kind.body) + round(1.45 * kind.small)), _PAPER)
        kind.write(head, (0, kind.body), name, letters[0])
        kind.write(head, (0, round(1.3 * kind.body) + kind.small), detail, letters[1], _MUTED)
        return _stacked([head, picture], round(0.2 * kind.body))

    def key(self, width: int, size: tuple[int, int] | None = None) -> Image.Image:
        """What brightness, hatching and the labels on tiles in a picture of ``size`` mean."""
        kind, layout = self.type, self.kept.layout
        letters = kind.small
        box = round(0.95 * letters)
        bright = np.full((box, box, 3), (125, 175, 220), np.uint8)
        items: list[tuple[np.ndarray | None, str]] = [
            (bright, "kept"),
            (_dim(bright.astype(float)), "dropped"),
        ]
        if layout.tiles and not self.kept.valid.all():
            items.append((_hatched((box, box), kind), "padding"))
        texts = self._fitting(size)[0] if size else []
        if texts:
            share = " · share of the tokens before caps" * ("·" in texts[0])
            items.append((None, "on tiles: tokens kept" + share))
        places: list[tuple[int, int]] = []
        x = row = 0
        for swatch, text in items:
            length = round(kind.length(text, letters)) + (round(1.5 * box) if swatch is not None else 0)
            if x and x + length > width:
                x, row = 0, row + 1
            places.append((x, row))
            x += length + round(1.4 * letters)
        step = round(1.45 * letters)
        strip = Image.new("RGB", (width, step * (row + 1)), _PAPER)
        for (swatch, text), (x, row) in zip(items, places):
            top = row * step + round(0.12 * letters)
            if swatch is not None:
                strip.paste(Image.fromarray(swatch), (x, top))
                x += round(1.5 * box)
            kind.write(strip, (x, row * step + letters), text, kind.fit(text, letters, width - x), _MUTED)
        return strip


def _stacked(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Images one below the other, flush left."""
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (max(image.width for image in images), height), _PAPER)
    y = 0
    for image in images:
        canvas.paste(image, (0, y))
        y += image.height + gap
    return canvas


def _beside(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Images one beside the other, flush at the top."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), _PAPER)
    x = 0
    for image in images:
        canvas.paste(image, (x, 0))
        x += image.width + gap
    return canvas
