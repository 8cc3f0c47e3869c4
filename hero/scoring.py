"""Tile signals: what makes one tile of an image worth more tokens than another (docs/method.md, 2).

Values are raw; the budget operation normalises them over the tiles of each image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import ImageLayout

__all__ = ["concentration", "crop_images", "saliency"]


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
