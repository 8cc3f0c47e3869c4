"""How the supported models cut images, from their configuration alone."""

from __future__ import annotations

from typing import Any

from .._checks import error
from ..layout import Geometry
from ..models.llava_next import pinpoints_of
from ..models.towers import square
from ..tiling import Pinpoints, Whole

__all__ = ["geometry_of", "largest"]


def geometry_of(hf_config: Any) -> Geometry:
    """How a model cuts images.

    Raises:
        ValueError: crops or patches that are not square; LLaVA with Pixtral's encoder.
    """
    vision = hf_config.vision_config
    if vision.model_type == "pixtral":
        raise error(ValueError, "vision_config", "an encoder of crops, CLIP's or SigLIP's", vision.model_type)
    crop_size, patch_size = square("image_size", vision.image_size), square("patch_size", vision.patch_size)
    if hf_config.model_type == "llava":
        return Geometry(crop_size, patch_size, Whole(), newlines=False)
    return Geometry(crop_size, patch_size, pinpoints_of(hf_config))


def largest(geometry: Geometry, config: Any = None) -> int:
    """Tokens of the largest image: all of them, or those kept by a :class:`hero.HeroConfig`."""
    tiling = geometry.tiling
    sizes = tiling.sizes if isinstance(tiling, Pinpoints) else ((geometry.crop_size,) * 2,)
    layouts = [geometry.layout(size) for size in sizes]
    return max(layout.full_tokens if config is None else layout.kept_tokens(config) for layout in layouts)
