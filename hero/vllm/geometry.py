"""How the supported models cut images, from their configuration alone."""

from __future__ import annotations

from typing import Any

from ..layout import Geometry
from ..models.llava_next import pinpoints_of
from ..models.towers import square

__all__ = ["geometry_of", "largest"]


def geometry_of(hf_config: Any) -> Geometry:
    """How a model cuts images.

    Raises:
        ValueError: crops or patches that are not square.
    """
    vision = hf_config.vision_config
    crop_size, patch_size = square("image_size", vision.image_size), square("patch_size", vision.patch_size)
    return Geometry(crop_size, patch_size, pinpoints_of(hf_config))


def largest(geometry: Geometry, config: Any = None) -> int:
    """Tokens of the largest image: all of them, or those kept by a :class:`hero.HeroConfig`."""
    layouts = [geometry.layout(size) for size in geometry.tiling.sizes]
    return max(layout.full_tokens if config is None else layout.kept_tokens(config) for layout in layouts)
