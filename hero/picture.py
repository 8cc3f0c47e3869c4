"""Picture: what was kept of an image, for a person to look at. The same bytes on every run."""

from __future__ import annotations

import textwrap
from numbers import Integral

import numpy as np
from PIL import Image

from ._checks import check_integer, error
from .images import read
from .selection import Selection

__all__ = ["visualize"]

MIN_WIDTH = 400  # below it the headings of the panels no longer fit

_INK, _MUTED = "#1c1e24", "#60646e"
# Red, green, blue and alpha over dropped patches; not black, or a dropped black patch would look kept.
_DROPPED = np.array([0x22, 0x24, 0x2C, 0xB8]) / 255
_HATCHED = {"facecolor": "#eeeff2", "edgecolor": "#d0d3d9", "hatch": "////", "linewidth": 0}
_NEAREST = {"aspect": "auto", "interpolation": "nearest"}
_CHIP = {"boxstyle": "round,pad=0.25", "facecolor": "#12141aeb", "edgecolor": _MUTED}
_NBSP = "\u00a0"
_DPI = 72  # so that a point of matplotlib's is a pixel


def visualize(
    image, selection: Selection, *, image_index: int = 0, width: int = 1000, title: str | None = None
) -> Image.Image:
    """Draw which visual tokens of an image were kept, and by which scores.

    Kept patches have full brightness on the tiles and on the thumbnail, dropped ones are dimmed, and padding
    is hatched. Each tile is labelled with the number of its kept patches and its share of the tile tokens
    before caps. Two heat maps show the patch scores. Tiles and thumbnail are scored by different layers, so
    each has its own colour scale.

    Args:
        image: what the model was shown: a PIL image of any mode that converts to RGB, an array of uint8 that
            Pillow reads, a path or an http(s) URL. A file is rotated by its Exif tag, as transformers does,
            if the result has the size that the model saw. Transparency is drawn on white.
        selection: what :class:`hero.HeroVisionEncoder` returned, or ``handle.last``.
        image_index: which image of the selection's batch.
        width: of the picture in pixels, at least 400. Type grows with it; the height follows.
        title: a line above the picture, such as the question and its answer. ``None`` for no line.

    Returns:
        an RGB image, ``width`` pixels wide.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or the image has another
            size than the selection's, where that is known. The message names the argument.
        OSError: the path or URL cannot be read.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(selection, Selection):
        raise error(TypeError, "selection", "hero.Selection", selection)
    is_integer = isinstance(image_index, Integral) and not isinstance(image_index, bool)
    if not is_integer or not 0 <= image_index < len(selection.layout):
        expected = f"an integer in [0, {len(selection.layout)})"
        raise error(ValueError if is_integer else TypeError, "image_index", expected, image_index)
    width = check_integer("width", width, MIN_WIDTH)
    if title is not None and not isinstance(title, str):
        raise error(TypeError, "title", "a string or None", title)
    layout = selection.layout[image_index]
    if not layout.grid_is_known:
        expected = "a call that tells how tiles are arranged (with hero attached to the processor)"
        raise ValueError(f"selection: expected that of {expected}, got one of {layout.tiles} tiles")
    pixels = read(image, layout.image_size)
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise ImportError("hero.visualize needs matplotlib: pip install 'hero-vlm[plot]'") from problem
    figure = Figure((width / _DPI, 1), _DPI, facecolor="white")
    return _Page(figure, pixels, _Kept(selection, image_index), width).draw(title)


class _Kept:
    """A selection's part of one image, in numpy.

    Attributes:
        layout: of the image.
        keep, scores: ``[crops, p, p]``, bool and float64.
        labels: of each tile, the patches kept and the share.
        length: tokens kept, newlines included.
        detail: what the scores are.
        valid: the stitched grid of the tiles, true where it is not padding.
    """

    def __init__(self, selection: Selection, image_index: int):
        layout = self.layout = selection.layout[image_index]
        first = sum(other.crops for other in selection.layout[:image_index])
        keep, scores, budgets, shares = (
            values[first : first + layout.crops].detach().cpu().numpy()
            for values in (selection.keep_mask(), selection.scores, selection.budgets, selection.shares)
        )
        shape = (layout.crops, layout.side, layout.side)
        self.keep, self.scores = keep.reshape(shape), scores.astype(np.float64).reshape(shape)
        tiles = slice(layout.tile_crops.start, layout.tile_crops.stop)
        self.labels = [f"{n} · {_percent(share)}" for n, share in zip(budgets[tiles], shares[tiles])]
        self.length = selection.lengths[image_index]
        self.detail = selection.config.policy.scored_by
        size = layout.grid[0] * layout.side, layout.grid[1] * layout.side
        if layout.is_whole:  # nothing but the image is drawn
            size = layout.rows[1], layout.columns[1]
        self.valid: np.ndarray = np.zeros(size, bool)
        self.valid[slice(*layout.rows), slice(*layout.columns)] = True

    def tiles(self, values: np.ndarray) -> np.ndarray:
        """``[crops, p, p]`` of the tiles, as the grid that they were cut from."""
        (rows, columns), side = self.layout.grid, self.layout.side
        grid = values[list(self.layout.tile_crops)].reshape(rows, columns, side, side)
        grid = grid.swapaxes(1, 2).reshape(rows * side, columns * side)
        return grid[: self.valid.shape[0], : self.valid.shape[1]]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Patches of the thumbnail and of the tiles: kept, and all."""
        counts = {}
        if self.layout.thumbnail != "none":
            counts["thumbnail"] = int(self.keep[self.layout.thumbnail_crop].sum()), self.layout.patches
        if self.layout.tiles:
            counts["tile patches"] = int(self.tiles(self.keep).sum()), int(self.valid.sum())
        return counts

    def summary(self) -> str:
        """One sentence of counts."""
        parts = [f"{kept:,} of {whole:,} {name}" for name, (kept, whole) in self.counts().items()]
        newlines = self.length - sum(kept for kept, _ in self.counts().values())
        if newlines:
            parts.append(f"{newlines:,} newline{'s' if newlines > 1 else ''}")
        whole = self.layout.full_tokens
        share = _percent(self.length / max(whole, 1))
        total = f"{self.length:,} of {whole:,} tokens kept ({share})"
        return total if self.layout.is_whole else f"{total}: {', '.join(parts)}"


def _percent(share: float) -> str:
    return f"{'<1' if 0 < share < 0.005 else f'{100 * share:.0f}'} %"


def _scale(scores: np.ndarray) -> tuple[float, float, bool] | None:
    """Ends of the colour scale, and whether it is logarithmic; ``None`` without finite scores.

    It is logarithmic, over at most three decades, where scores are not negative and differ at least tenfold.
    """
    scores = scores[np.isfinite(scores)]
    if not scores.size:
        return None
    low, high = float(scores.min()), float(scores.max())
    logarithmic = low >= 0 and high > 0 and high >= 10 * low
    return (max(low, high / 1000) if logarithmic else low), high, logarithmic


class _Page:
    """The picture of one image, drawn on a matplotlib figure. Positions are pixels from the top left."""

    def __init__(self, figure, image: Image.Image, kept: _Kept, width: int):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self.canvas = FigureCanvasAgg(figure)
        self.figure, self.image, self.kept, self.width = figure, image, kept, width
        self.margin = round(0.026 * width) + 1
        self.body, self.small = max(11, round(0.0145 * width)), max(9, round(0.0125 * width))
        self.head, self.line = round(2.6 * self.body + 0.5 * self.small), max(1, round(width / 1000))

    def draw(self, title: str | None) -> Image.Image:
        """Draw title, summary, panels and notes from top to bottom."""
        large = max(14, round(0.021 * self.width))
        header = [(line, large, _INK) for line in self._wrap((title or "").strip(), large)]
        header += [(line, self.body, _INK) for line in self._wrap(self.kept.summary(), self.body)]
        panels, bottom = self._arrange(self.margin + round(sum(1.4 * size for _, size, _ in header)))
        labelled = self._fitting(*panels[0][3:])
        notes = [(line, self.small, _MUTED) for line in self._wrap(self._notes(labelled), self.small)]
        height = bottom + round(1.4 * self.small * len(notes)) + self.margin
        self.figure.set_size_inches(self.width / _DPI, height / _DPI)
        for top, lines in ((self.margin, header), (bottom, notes)):
            y = float(top)
            for line, letters, colour in lines:
                x = self.margin / self.width
                self.figure.text(x, 1 - (y + letters) / height, line, **self._style(letters, colour))
                y += 1.4 * letters
        for name, *place in panels:
            axes = self._panel(name, *place)
            if name == "Tiles" and labelled:
                self._labels(axes)
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")

    def _style(self, size: float, colour: str) -> dict:
        return {"fontsize": size, "color": colour, "family": "DejaVu Sans", "parse_math": False}

    def _length(self, text: str, size: float) -> float:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(family="DejaVu Sans", size=size)
        return self.canvas.get_renderer().get_text_width_height_descent(text, font, False)[0]

    def _wrap(self, text: str, size: float) -> list[str]:
        """Lines that fit between the margins; words longer than a line are split."""
        letters = int(4 * self.width / size)
        while True:
            lines = [line for part in text.splitlines() for line in textwrap.wrap(part, letters)]
            if all(self._length(line, size) <= self.width - 2 * self.margin for line in lines):
                return lines
            letters = letters * 9 // 10

    def _arrange(self, y: int) -> tuple[list[tuple[str, int, int, int, int]], int]:
        """Name, place, width and height of each panel, in rows from ``y`` down, and where they end."""
        layout, width, gap = self.kept.layout, self.width - 2 * self.margin, self.margin
        rows = []
        if layout.tiles:
            aspect = self.kept.valid.shape[1] / self.kept.valid.shape[0]
            each = ["Tiles", "Tile scores"]
            rows = [(each, aspect)] if aspect < 1.6 else [(each[:1], aspect), (each[1:], aspect)]
        if layout.thumbnail != "none":
            rows.append((["Thumbnail", "Thumbnail scores"], 1.0))
        panels = []
        for names, aspect in rows:
            room = (width - gap * (len(names) - 1)) // len(names)
            size = room, round(room / aspect)
            most = round((0.28 if layout.tiles and names[0] == "Thumbnail" else 1.2) * width)
            if size[1] > most:
                size = max(round(most * aspect), 1), most
            for number, name in enumerate(names):
                x = self.margin + number * (max(size[0], round(0.28 * width)) + gap)
                panels.append((name, x, y + gap, *size))
            y += gap + self.head + max(size[1], 1)
            y += round(2.4 * self.small) * names[-1].endswith("scores")
        return panels, y + gap

    def _axes(self, x: int, y: int, width: int, height: int):
        whole, height = self.figure.bbox.height, max(height, 1)
        axes = self.figure.add_axes(
            (x / self.width, 1 - (y + height) / whole, width / self.width, height / whole)
        )
        axes.set_axis_off()
        return axes

    def _panel(self, name: str, x: int, y: int, width: int, height: int):
        """Draw a picture on a hatched ground, its heading above, and a colour scale below scores."""
        kept, tiles, side = self.kept, name.startswith("Tile"), self.kept.layout.side
        values = kept.scores if name.endswith("scores") else kept.keep
        values = kept.tiles(values) if tiles else values[kept.layout.thumbnail_crop]
        valid = kept.valid if tiles else np.ones_like(values, bool)
        (rows, columns), top = values.shape, y + self.head
        axes = self._axes(x, top, width, height)
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.axhspan(0, rows, zorder=-1, **_HATCHED)
        if name.endswith("scores"):
            bar = self._axes(x, top + height + self.small // 2, width, round(0.7 * self.small))
            detail = kept.detail + self._scores(axes, bar, values, valid)
        else:
            detail = "{:,} of {:,} ".format(*kept.counts()["tile patches" if tiles else "thumbnail"])
            detail += "tokens" if kept.layout.is_whole else "patches"
            self._photograph(axes, values, valid, width, height)
        if min(width / columns, height / rows) * side >= 6 * self.line:
            style = {"colors": "white", "linewidth": self.line}
            axes.vlines(np.arange(side, columns, side), 0, rows, **style)
            axes.hlines(np.arange(side, rows, side), 0, columns, **style)
        shown = name.replace("Tile", "Block") if kept.layout.is_whole else name
        heading = f"{shown}, {kept.layout.grid[0]} x {kept.layout.grid[1]}" if tiles else name
        axes.set_title(
            f"{heading}\n{detail}", loc="left", y=1, pad=0.5 * self.small, **self._style(self.body, _INK)
        )
        return axes

    def _photograph(self, axes, keep: np.ndarray, valid: np.ndarray, width: int, height: int) -> None:
        """Draw the image on the valid patches, the dropped ones dimmed, the kept ones with an outline."""
        rows, columns = np.flatnonzero(valid.any(1)), np.flatnonzero(valid.any(0))
        if not len(rows):
            return
        box = int(columns[0]), int(columns[-1]) + 1, int(rows[-1]) + 1, int(rows[0])
        cell = width / keep.shape[1], height / keep.shape[0]
        size = round((box[1] - box[0]) * cell[0]), round((box[2] - box[3]) * cell[1])
        pixels = self.image.resize((max(size[0], 1), max(size[1], 1)), Image.Resampling.BICUBIC)
        axes.imshow(pixels, extent=box, **_NEAREST)
        dropped = np.where((valid & ~keep)[..., None], _DROPPED, 0.0)
        axes.imshow(dropped, extent=(0, keep.shape[1], keep.shape[0], 0), **_NEAREST)
        if min(cell) >= 6 * self.line:  # smaller patches would be filled by it
            inside, style = np.pad(keep, 1), {"colors": "#e1e4eb", "linewidth": self.line}
            y, x = np.nonzero(inside[1:-1, 1:] != inside[1:-1, :-1])
            axes.vlines(x, y, y + 1, **style)
            y, x = np.nonzero(inside[1:, 1:-1] != inside[:-1, 1:-1])
            axes.hlines(y, x, x + 1, **style)

    def _scores(self, axes, bar, scores: np.ndarray, valid: np.ndarray) -> str:
        """Draw a heat map and its colour scale; return what kind of scale it is."""
        scale = _scale(scores[valid])
        if scale is None:
            bar.set_visible(False)
            return ""
        low, high, logarithmic = scale
        below = bool(scores[valid & np.isfinite(scores)].min() < low)
        ends = "< " * below + f"{low:.2g}", f"{high:.2g}"
        norm = {"norm": "log" if logarithmic else "linear", "vmin": low, "vmax": high}
        drawn = np.ma.masked_where(~valid | np.isnan(scores), np.clip(scores, low, high))
        whole = (0, scores.shape[1], scores.shape[0], 0)
        axes.imshow(drawn, cmap="viridis", **norm, extent=whole, **_NEAREST)
        bar.imshow([np.linspace(0, high > low, 256)], cmap="viridis", vmin=0, vmax=1, **_NEAREST)
        for place, end, side in zip((0, 1), ends, ("left", "right")):
            style = self._style(self.small, _MUTED)
            bar.text(place, -0.4, end, ha=side, va="top", transform=bar.transAxes, **style)
        return " (log)" * logarithmic

    def _fitting(self, width: int, height: int) -> bool:
        """Whether the labels fit the tiles of a picture of this size."""
        if not self.kept.labels:
            return False
        side, size = self.kept.layout.side, self.small
        rows, columns = (count / side for count in self.kept.valid.shape)
        longest = max(self._length(label, size) for label in self.kept.labels)
        return longest + 1.8 * size <= 0.92 * width / columns and 2.4 * size <= 0.45 * height / rows

    def _labels(self, axes) -> None:
        """Write the label of each tile in its upper left corner."""
        side, columns = self.kept.layout.side, self.kept.layout.grid[1]
        for tile, text in enumerate(self.kept.labels):
            corner = tile % columns * side, tile // columns * side
            offset = {"xytext": (0.65 * self.small, -0.65 * self.small), "textcoords": "offset points"}
            axes.annotate(text, corner, va="top", bbox=_CHIP, **offset, **self._style(self.small, "white"))

    def _notes(self, labelled: bool) -> str:
        """What the picture shows, with a table of all labels where tiles are too small for them."""
        labels, columns = self.kept.labels, self.kept.layout.grid[1]
        key = "bright: kept; dark: dropped" + "; hatched: padding" * (not self.kept.valid.all())
        if labels:
            meaning = "tokens kept · share of the tile tokens before caps"
            key += f"; {'on tiles' if labelled else 'row,column'}: {meaning}"
        if self.kept.layout.is_whole:
            key = key.replace("tile", "block")
        cells = (f"{n // columns + 1},{n % columns + 1}: {label}" for n, label in enumerate(labels))
        return key if labelled else "\n".join([key, "   ".join(cell.replace(" ", _NBSP) for cell in cells)])
