"""Tile signals, by which an image's tokens are divided among its tiles (docs/method.md, sections 2 and 6).

Values are raw; :func:`hero_kernels.tile_budgets` normalises them over the tiles of each image. What follows
from layouts alone is computed once, on the CPU (:mod:`hero.plan` copies it to the device). The result of an
image does not depend on the other images of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hero_kernels import TileSignal

from .layout import ImageLayout

__all__ = [
    "Places",
    "Resize",
    "concentration",
    "density_of",
    "equal_parts",
    "equal_shares",
    "mean_features",
    "parts_of",
    "places_of",
    "region_sums",
    "regions_of",
    "resize_of",
    "resized_thumbnails",
    "scaled",
    "saliency",
    "tile_softmax",
]


class Places(NamedTuple):
    """Where each crop of a batch belongs.

    Attributes:
        images: ``[T]`` int64, the image of the crop.
        crops: ``[T]`` int64, which of the image's crops it is.
        thumbnails: ``[T]`` int64, the thumbnail of its image; the image's first crop if it has none.
        tiles: ``[T, most tiles]`` int64, the tiles of its image, padded with any crop.
        is_tile: ``[T, most tiles]`` fp64, 1 for tiles, 0 for padding.
    """

    images: Tensor
    crops: Tensor
    thumbnails: Tensor
    tiles: Tensor
    is_tile: Tensor


def places_of(layouts: Sequence[ImageLayout]) -> Places:
    """The places of a batch, on the CPU."""
    most = max(1, *(layout.tiles for layout in layouts))
    images: list[int] = []
    crops: list[int] = []
    thumbnails: list[int] = []
    tiles: list[list[int]] = []
    counts: list[int] = []
    first = 0
    for number, layout in enumerate(layouts):
        own = [first + crop for crop in layout.tile_crops]
        images += [number] * layout.crops
        crops += range(layout.crops)
        thumbnails += [first + max(layout.thumbnail_crop, 0)] * layout.crops
        tiles += [(own + [first] * most)[:most]] * layout.crops
        counts += [layout.tiles] * layout.crops
        first += layout.crops
    is_tile = torch.arange(most) < torch.tensor(counts)[:, None]
    numbers = [torch.tensor(values) for values in (images, crops, thumbnails, tiles)]
    return Places(numbers[0], numbers[1], numbers[2], numbers[3], is_tile.double())


def density_of(layouts: Sequence[ImageLayout]) -> Tensor:
    """``[T]`` fp32: the share of each tile's patches that are not padding; 1 for thumbnails."""
    densities = []
    for layout in layouts:
        densities += layout.per_crop(1.0, [count / layout.patches for count in layout.valid_counts])
    return torch.tensor(densities)


def equal_shares(valid: Tensor, layouts: Sequence[ImageLayout] = ()) -> TileSignal:
    """The signal that gives every tile of an image the same share, and every block one as large as it is.

    Args:
        valid: ``[T, P]`` bool.
        layouts: of images with blocks.
    """
    if layouts and layouts[0].is_whole:
        return TileSignal(valid.sum(1).float(), 1.0)
    return TileSignal(torch.ones(len(valid), device=valid.device), 1.0)


def equal_parts(layouts: Sequence[ImageLayout]) -> Tensor:
    """``[T]`` fp32: 1/K for each of an image's K tiles, a block's part of its tokens; 0 for thumbnails."""
    parts: list[float] = []
    for one in layouts:
        counts = one.valid_counts if one.is_whole else (1,) * one.tiles
        parts += one.per_crop(0.0, [count / sum(counts) for count in counts])
    return torch.tensor(parts)


def parts_of(layouts: Sequence[ImageLayout]) -> Tensor:
    """``[B, T]`` fp64: the part of an image's tokens that each of its blocks has; 0 for those of others."""
    rows = [torch.tensor([layout.valid_counts]).double() / layout.full_tokens for layout in layouts]
    return torch.block_diag(*rows)


def saliency(cls: Tensor, places: Places, parts: Tensor | None = None) -> Tensor:
    """Cosine of each crop's CLS feature with the CLS feature of its image's thumbnail.

    Args:
        cls: ``[T, C]``, the encoder's last layer at CLS before the post layer norm (or the mean of the
            patch features, for encoders without CLS).
        places: of the images.
        parts: of images without thumbnail (:func:`parts_of`): the mean of the image replaces it.

    Returns:
        ``[T]`` fp32.
    """
    unit = F.normalize(cls.float(), dim=-1)
    if parts is None:
        return (unit * unit[places.thumbnails]).sum(-1)
    # In fp64, so that the zeros of other images of the batch do not change the fp32 result.
    means = F.normalize((parts @ cls.double()).float(), dim=-1)
    return (unit * means[places.images]).sum(-1)


def mean_features(features: Tensor, valid: Tensor) -> Tensor:
    """The mean of a crop's features over its valid patches, which replaces CLS in encoders without it.

    Args:
        features: ``[T, P, C]``.
        valid: ``[T, P]`` bool.

    Returns:
        ``[T, C]`` in the dtype of the features; 0 for crops without a valid patch.
    """
    weights = valid[..., None].to(features)
    return (features.detach() * weights).sum(1) / weights.sum(1).clamp_min(1.0)


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


class Resize(NamedTuple):
    """Linear interpolation of a thumbnail at the patches of its image's tiles, along both axes.

    Along each axis ``(1 − part) · value[low] + part · value[high]``: ``[T, p]`` int64, int64 and fp32.
    """

    row_low: Tensor
    row_high: Tensor
    row_part: Tensor
    column_low: Tensor
    column_high: Tensor
    column_part: Tensor


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


def regions_of(layouts: Sequence[ImageLayout]) -> Tensor:
    """``[T, P]`` fp32: share of each patch of the image's thumbnail that lies in a tile; 0 for thumbnails.

    The un-padded stitched grid and the thumbnail show the same picture, so a patch of one is a patch
    of the other stretched by p / rows and p / columns.
    """
    _check_grids(layouts)
    areas = []
    for layout in layouts:
        side, areas_here = layout.side, torch.zeros((layout.crops, layout.side**2))
        for tile, (top, bottom, left, right) in enumerate(layout.tile_rectangles):
            y, x = (number * side for number in divmod(tile, layout.grid[1]))
            down = torch.tensor(_overlaps(y + top, y + bottom, layout.rows, side))
            across = torch.tensor(_overlaps(x + left, x + right, layout.columns, side))
            areas_here[layout.tile_crops[tile]] = torch.outer(down, across).flatten()
        areas.append(areas_here)
    return torch.cat(areas)


def _check_grids(layouts: Sequence[ImageLayout]) -> None:
    if not all(layout.grid_is_known for layout in layouts):
        raise ValueError(
            "processor: expected one with hero attached for a policy that reads how tiles are arranged, "
            "which this model's inputs do not tell, got None"
        )


def resize_of(layouts: Sequence[ImageLayout]) -> Resize:
    """How the thumbnail is resized to the un-padded grid of its image, for each crop; thumbnails stay."""
    _check_grids(layouts)
    rows, columns = [], []
    for layout in layouts:
        itself = [(patch, patch, 0.0) for patch in range(layout.side)]
        corners = [
            tuple(n * layout.side for n in divmod(tile, layout.grid[1])) for tile in range(layout.tiles)
        ]
        rows += layout.per_crop(itself, [_steps(y, layout.rows, layout.side) for y, _ in corners])
        columns += layout.per_crop(itself, [_steps(x, layout.columns, layout.side) for _, x in corners])
    axes = (torch.tensor(steps, dtype=torch.float64).unbind(-1) for steps in (rows, columns))
    return Resize(*(values for low, high, part in axes for values in (low.long(), high.long(), part.float())))


def region_sums(scores: Tensor, places: Places, regions: Tensor) -> Tensor:
    """Sum of the thumbnail's scores over the region that each tile shows, padding left out.

    The thumbnail is the whole image resized to a square; a patch that lies in several regions is divided
    among them by area. A tile that is all padding has sum 0.

    Args:
        scores: ``[T, P]`` fp32; those of tiles are not read.
        places: of images that all have a thumbnail.
        regions: of the same images (:func:`regions_of`).

    Returns:
        ``[T]`` fp32, 0 for thumbnails.
    """
    return (scores[places.thumbnails] * regions).sum(1)


def resized_thumbnails(scores: Tensor, places: Places, resize: Resize) -> Tensor:
    """The thumbnail's scores resized to the un-padded grid of its image, cut into tiles.

    Bilinear between centres of patches, without antialiasing, as ``interpolate(align_corners=False)``.

    Args:
        scores: ``[T, P]`` fp32; those of tiles are not read.
        places: of images that all have a thumbnail.
        resize: of the same images (:func:`resize_of`).

    Returns:
        ``[T, P]`` fp32; a thumbnail's are its own, those of padding have no meaning.
    """
    side = resize.row_low.shape[1]
    # Gathers and element-wise products, no matrix product, whose rounding would depend on the batch.
    grid = scores[places.thumbnails].view(-1, side, side)
    ends = [grid.gather(1, index[..., None].expand_as(grid)) for index in (resize.row_low, resize.row_high)]
    grid = torch.lerp(*ends, resize.row_part[..., None])
    ends = [
        grid.gather(2, index[:, None].expand_as(grid)) for index in (resize.column_low, resize.column_high)
    ]
    return torch.lerp(*ends, resize.column_part[:, None]).flatten(1)


def scaled(values: Tensor, valid: Tensor, places: Places) -> Tensor:
    """Values scaled to [0, 1] over the valid patches of each image; 1 where these are all equal.

    Those of padding are clamped to this range.

    Args:
        values: ``[T, P]`` floating.
        valid: ``[T, P]`` bool.
        places: of the images.

    Returns:
        ``[T, P]`` fp32, within [0, 1].
    """
    values = values.float()

    def ends(end: float, how: str) -> Tensor:
        of_crops = getattr(values.masked_fill(~valid, end), how)(1)
        return torch.full_like(of_crops, end).scatter_reduce(0, places.images, of_crops, how)[places.images]

    low, high = ends(torch.inf, "amin")[:, None], ends(-torch.inf, "amax")[:, None]
    return torch.where(high > low, (values - low) / (high - low), 1.0).clamp(0.0, 1.0)


def tile_softmax(values: Tensor, places: Places, more: float) -> Tensor:
    """The softmax over an image's tiles plus ``more / K``, the same for each of its K tiles.

    With ``more = −1`` this is by how much the softmax exceeds that of equal values.

    Args:
        values: ``[T]`` floating; those of thumbnails are not read.
        places: of the batch.

    Returns:
        ``[T]`` fp32; those of thumbnails have no meaning.
    """
    # In fp64, so that the zeros that pad smaller images of the batch do not change the fp32 result.
    own = values.double()[places.tiles].masked_fill(places.is_tile == 0, -torch.inf)
    highest = own.amax(1)
    highest = highest.masked_fill(highest.isinf(), 0.0)  # no tile at all
    whole = ((own - highest[:, None]).exp()).sum(1).clamp_min(1.0)
    return ((values - highest).exp() / whole + more / places.is_tile.sum(1).clamp_min(1.0)).float()
