"""From patches to visual tokens: merged patches, and the resized grids of LLaVA-OneVision.

A grid of tiles that is resized to h × w tokens is cut into cells of p × p tokens, which act as tiles. Of each
resized image a few operations run, as in the stock model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hero_kernels as hk
from hero_kernels.segments import to_device

from .layout import ImageLayout
from .plan import Plan
from .selection import Encoded

__all__ = ["average", "average_in_cells", "in_cells", "merge", "resize_to_cells"]


def merge(features: Tensor, factor: int) -> Tensor:
    """``[T, P, C]`` as tokens of factor × factor patches, ``[T, P / factor², factor²·C]``.

    The pixel shuffle of InternVL, SmolVLM and Idefics3: channels are those of the patches in raster order.
    """
    if factor == 1:
        return features
    side = math.isqrt(features.shape[1]) // factor
    blocks = features.unflatten(1, (side, factor, side, factor)).transpose(2, 3)
    return blocks.reshape(len(features), side * side, -1)


def average(rows: Tensor, factor: int) -> Tensor:
    """Means over the patches of each token: ``[..., P]`` as ``[..., P / factor²]``."""
    if factor == 1:
        return rows
    side = math.isqrt(rows.shape[-1]) // factor
    return rows.unflatten(-1, (side, factor, side, factor)).mean((-3, -1)).flatten(-2)


def in_cells(encoded: Encoded, plan: Plan, projector: nn.Module | None) -> Encoded:
    """What was encoded of crops, for the cells of resized grids, if there are any.

    Features are projected first then: the stock model resizes them behind the projector.

    Args:
        plan: of the cells.
    """
    if plan.of_crops is None:
        return encoded
    plan = plan.to(encoded.features.device)
    features = encoded.features if projector is None else projector(encoded.features)
    attention = {}
    for name, one in encoded.attention.items():
        rows = resize_to_cells(one.scores, plan)[:, None]
        attention[name] = hk.finalize_scores(rows, valid=plan.valid)
    return dataclasses.replace(
        encoded,
        features=resize_to_cells(features, plan),
        cls=None if encoded.cls is None else average_in_cells(encoded.cls, plan),
        attention=attention,
        is_projected=True,
    )


def resize_to_cells(values: Tensor, plan: Plan) -> Tensor:
    """Values of the crops' tokens as values of the tokens of cells; those of other crops stay.

    Bilinear, without antialiasing and without padding, as the model resizes features.

    Args:
        values: ``[T, P]`` or ``[T, P, C]``, floating; T crops as the encoder sees them. A resized image has
            its thumbnail first.
        plan: of the cells.

    Returns:
        ``[T', P]`` or ``[T', P, C]``; 0 outside the resized grids.
    """
    if plan.of_crops is None:
        return values
    parts: list[Tensor] = []
    for layout, own in _of_images(values, plan):
        if layout.encoded is None:
            parts.append(own)
            continue
        side, (down, across) = layout.side, layout.encoded.grid
        grid = own[1:].reshape(down, across, side, side, -1).permute(4, 0, 2, 1, 3)
        grid = grid.reshape(-1, down * side, across * side)
        grid = grid[:, slice(*layout.encoded.rows), slice(*layout.encoded.columns)]
        height, width = layout.rows[1], layout.columns[1]
        grid = F.interpolate(grid[None], size=(height, width), mode="bilinear")[0]
        down, across = layout.grid
        grid = F.pad(grid, (0, across * side - width, 0, down * side - height))
        cells = grid.view(-1, down, side, across, side).permute(1, 3, 2, 4, 0)
        parts += [own[:1], cells.reshape(down * across, *own.shape[1:])]
    return torch.cat(parts)


def average_in_cells(values: Tensor, plan: Plan) -> Tensor:
    """Values of crops, ``[T]`` or ``[T, C]``, as fp32 means over the tiles of each cell, by area."""
    if plan.of_crops is None:
        return values
    parts: list[Tensor] = []
    for layout, own in _of_images(values.float(), plan):
        if layout.encoded is None:
            parts.append(own)
            continue
        seen = layout.encoded
        rows = _overlaps(layout.grid[0], layout.rows[1], seen.rows, seen.grid[0], layout.side)
        columns = _overlaps(layout.grid[1], layout.columns[1], seen.columns, seen.grid[1], layout.side)
        weights = torch.tensor([[a * b for a in row for b in column] for row in rows for column in columns])
        parts += [own[:1], to_device(weights, own.device) @ own[1:]]
    return torch.cat(parts)


def _of_images(values: Tensor, plan: Plan) -> Iterator[tuple[ImageLayout, Tensor]]:
    counts = [layout.crops for layout in plan.seen.layouts]
    return zip(plan.layouts, values.split(counts), strict=True)


def _overlaps(cells: int, length: int, valid: tuple[int, int], tiles: int, side: int) -> list[list[float]]:
    """For each cell along an axis the share of it that lies in each tile.

    Args:
        length: of the resized grid in tokens.
        valid: range of patches that was resized.
    """
    scale, shares = (valid[1] - valid[0]) / length, []
    for cell in range(cells):
        low, high = (min((cell + edge) * side, length) * scale + valid[0] for edge in (0, 1))
        own = [max(0.0, min(high, (tile + 1) * side) - max(low, tile * side)) for tile in range(tiles)]
        shares.append([part / sum(own) for part in own])
    return shares
