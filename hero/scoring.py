"""Tile signals: what makes one tile of an image worth more tokens than another (docs/method.md, 2 and 6).

Values are raw; the budget operation normalises them over the tiles of each image. What follows from layouts
alone is kept as tensors on the device, and every result of an image is the same in whatever batch it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import ImageLayout

__all__ = [
    "concentration",
    "crop_images",
    "region_sums",
    "resized_thumbnails",
    "saliency",
    "tile_softmax",
]


def crop_images(layouts: Sequence[ImageLayout], device: torch.device | str = "cpu") -> Tensor:
    """``[T]`` int64: the image that each crop of a batch belongs to."""
    crops = torch.tensor([layout.crops for layout in layouts], dtype=torch.int64)
    return torch.arange(len(layouts)).repeat_interleave(crops).to(device)


def saliency(cls: Tensor, layouts: Sequence[ImageLayout]) -> Tensor:
    """Cosine of each crop's CLS feature with the CLS feature of its image's thumbnail.

    Args:
        cls: ``[T, C]``, the encoder's last layer at CLS before the post layer norm (or the mean of the
            patch features, for encoders without CLS).
        layouts: the images of the batch, each with a thumbnail.

    Returns:
        ``[T]`` fp32.
    """
    thumbnails, first = [], 0
    for layout in layouts:
        thumbnails += [first + layout.thumbnail_crop] * layout.crops
        first += layout.crops
    cls = cls.float()
    return F.cosine_similarity(cls, cls[torch.tensor(thumbnails, device=cls.device)], dim=-1)


def concentration(entropy: Tensor, valid: Tensor) -> Tensor:
    """How concentrated each crop's patch scores are: ``1 − H(p) / ln(valid)``, 0 flat, 1 on one patch.

    p is the score over the crop's valid patches, normalised to sum 1; H its entropy in nats. Crops with
    fewer than two valid patches, or no score, have concentration 0.

    Args:
        entropy: ``[T]`` nats, as :func:`hero_kernels.finalize_scores` gives it.
        valid: ``[T, P]`` bool.

    Returns:
        ``[T]`` fp32 in [0, 1].
    """
    count = valid.sum(1)
    value = 1.0 - entropy / count.clamp_min(2).float().log()
    return value * ((count > 1) & (value > 1e-6))  # below, it is the rounding of the logarithms


class _Steps(NamedTuple):
    """Linear interpolation along one axis: ``(1 − part) · value[low] + part · value[high]``."""

    low: Tensor  # [T, p] int64
    high: Tensor
    part: Tensor  # [T, p] fp32


class _Regions(NamedTuple):
    """Where each crop of a batch lies in its image's thumbnail.

    The un-padded stitched grid and the thumbnail show the same picture, so patches of the one are patches
    of the other stretched by p / rows and p / columns.
    """

    thumbnails: Tensor  # [T] int64, the thumbnail of the crop's image
    weights: Tensor  # [T, P] fp32, share of each thumbnail patch that lies in the tile; 0 for thumbnails
    rows: _Steps
    columns: _Steps
    tiles: Tensor  # [T, most tiles] int64, the tiles of the crop's image
    is_tile: Tensor  # [T, most tiles] fp64, 0 where there are fewer


def _overlaps(begin: int, end: int, valid: tuple[int, int], side: int) -> list[float]:
    """Share of each of the thumbnail's patches along an axis that lies in valid patches begin to end."""
    length = max(valid[1] - valid[0], 1)  # a very narrow image may be all padding
    low, high = ((edge - valid[0]) * side / length for edge in (begin, end))
    return [max(0.0, min(high, patch + 1) - max(low, patch)) for patch in range(side)]


def _steps(begin: int, valid: tuple[int, int], side: int) -> list[tuple[int, int, float]]:
    """Where the centres of a tile's patches along an axis lie among those of the thumbnail."""
    length = max(valid[1] - valid[0], 1)
    steps = []
    for patch in range(begin, begin + side):
        place = (patch - valid[0] + 0.5) * side / length - 0.5
        place = min(max(place, 0.0), side - 1.0)
        low = min(int(place), side - 1)
        steps.append((low, min(low + 1, side - 1), place - low))
    return steps


@lru_cache(maxsize=256)
def _regions(layouts: tuple[ImageLayout, ...], device: torch.device) -> _Regions:
    """The regions of a batch whose images all have a thumbnail; cached."""
    side, most, first = layouts[0].side, max(max(layout.tiles for layout in layouts), 1), 0
    itself = [(patch, patch, 0.0) for patch in range(side)]
    thumbnails, weights, rows, columns, tiles, counts = [], [], [], [], [], []
    for layout in layouts:
        own = [first + layout.first_tile + tile for tile in range(layout.tiles)]
        place = [(torch.zeros(side * side), itself, itself)] * layout.crops
        for tile, (top, bottom, left, right) in enumerate(layout.tile_rectangles):
            y, x = (number * side for number in divmod(tile, layout.grid[1]))
            down = torch.tensor(_overlaps(y + top, y + bottom, layout.rows, side))
            across = torch.tensor(_overlaps(x + left, x + right, layout.columns, side))
            area = torch.outer(down, across).flatten()
            place[layout.first_tile + tile] = (
                area,
                _steps(y, layout.rows, side),
                _steps(x, layout.columns, side),
            )
        for area, row, column in place:
            thumbnails.append(first + layout.thumbnail_crop)
            weights.append(area)
            rows.append(row)
            columns.append(column)
            tiles.append((own + [first] * most)[:most])
            counts.append(layout.tiles)
        first += layout.crops

    def axis(steps: list) -> _Steps:
        low, high, part = torch.tensor(steps, dtype=torch.float64).unbind(-1)
        return _Steps(low.long().to(device), high.long().to(device), part.float().to(device))

    return _Regions(
        torch.tensor(thumbnails).to(device),
        torch.stack(weights).to(device),
        axis(rows),
        axis(columns),
        torch.tensor(tiles).to(device),
        (torch.arange(most) < torch.tensor(counts)[:, None]).double().to(device),
    )


def region_sums(scores: Tensor, layouts: Sequence[ImageLayout]) -> Tensor:
    """Sum of the thumbnail's scores over the region that each tile shows, padding left out.

    The thumbnail is the whole image squashed to a square; its patches that straddle regions are divided among
    them by area. A tile that is all padding has sum 0.

    Args:
        scores: ``[T, P]`` fp32; those of tiles are not read.
        layouts: the images of the batch, each with a thumbnail.

    Returns:
        ``[T]`` fp32, 0 for thumbnails.
    """
    regions = _regions(tuple(layouts), scores.device)
    return (scores[regions.thumbnails] * regions.weights).sum(1)


def resized_thumbnails(scores: Tensor, layouts: Sequence[ImageLayout]) -> Tensor:
    """The thumbnail's scores resized to the un-padded grid of its image, cut into tiles.

    Bilinear between centres of patches, without antialiasing, as ``interpolate(align_corners=False)``.

    Args:
        scores: ``[T, P]`` fp32; those of tiles are not read.
        layouts: the images of the batch, each with a thumbnail.

    Returns:
        ``[T, P]`` fp32; a thumbnail's are its own, those of padding have no meaning.
    """
    _, _, rows, columns, *_ = regions = _regions(tuple(layouts), scores.device)
    side = layouts[0].side
    # Gathers and products one by one, not a matrix product: the batch must not decide how it is rounded.
    grid = scores[regions.thumbnails].view(-1, side, side)
    ends = [grid.gather(1, index[..., None].expand_as(grid)) for index in (rows.low, rows.high)]
    grid = torch.lerp(*ends, rows.part[..., None])
    ends = [grid.gather(2, index[:, None].expand_as(grid)) for index in (columns.low, columns.high)]
    return torch.lerp(*ends, columns.part[:, None]).flatten(1)


def tile_softmax(values: Tensor, layouts: Sequence[ImageLayout], more: float) -> Tensor:
    """The softmax over an image's tiles plus ``more / K``, the same for each of its K tiles.

    With ``more = −1`` by how much the softmax exceeds that of equal values.

    Args:
        values: ``[T]`` floating; those of thumbnails are not read.
        layouts: the images of the batch.

    Returns:
        ``[T]`` fp32; those of thumbnails have no meaning.
    """
    regions = _regions(tuple(layouts), values.device)
    # In fp64, so that zeros that fill up the batch's smaller images cannot tip a rounding of the fp32 result.
    own = values.double()[regions.tiles].masked_fill(regions.is_tile == 0, -torch.inf)
    highest = own.amax(1)
    highest = highest.masked_fill(highest.isinf(), 0.0)  # no tile at all
    whole = ((own - highest[:, None]).exp()).sum(1).clamp_min(1.0)
    return ((values - highest).exp() / whole + more / regions.is_tile.sum(1).clamp_min(1.0)).float()
