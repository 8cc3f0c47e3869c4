"""From patches to visual tokens: merged patches, and resized grids of LLaVA-OneVision."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["average", "merge"]


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
