"""How the supported models cut images: from an engine's configuration, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from .._checks import error
from ..layout import Geometry, ImageLayout
from ..models import internvl
from ..models.llava_next import pinpoints_of
from ..models.towers import square
from ..tiling import NearestAspect, Pinpoints, Whole

__all__ = ["geometry_of", "known", "largest", "seen"]


def known(hf_config: Any) -> Any:
    """A model's configuration as transformers has it.

    Raises:
        ValueError: InternVL's own format with a field that transformers' model has not.
    """
    if hf_config.model_type == "internvl_chat":
        from .chat_format import converted

        return converted(hf_config)
    return hf_config


def geometry_of(model_config: Any, options: Mapping[str, Any] | None = None) -> Geometry:
    """How a model cuts images.

    Args:
        model_config: vLLM's.
        options: of a request, ``mm_processor_kwargs``.

    Raises:
        ValueError: crops or patches that are not square; LLaVA with Pixtral's encoder.
    """
    hf_config = known(model_config.hf_config)
    vision = hf_config.vision_config
    if vision.model_type == "pixtral":
        raise error(ValueError, "vision_config", "an encoder of crops, CLIP's or SigLIP's", vision.model_type)
    crop_size, patch_size = square("image_size", vision.image_size), square("patch_size", vision.patch_size)
    if hf_config.model_type == "llava":
        return Geometry(crop_size, patch_size, Whole(), newlines=False)
    if hf_config.model_type == "internvl":
        return _internvl(model_config, hf_config, crop_size, patch_size, options or {})
    most = None
    if hf_config.model_type == "llava_onevision":
        most = int(hf_config.vision_aspect_ratio.removeprefix("anyres_max_"))
    return Geometry(crop_size, patch_size, pinpoints_of(hf_config), resized_beyond=most)


def _internvl(
    model_config: Any, hf_config: Any, crop_size: int, patch_size: int, options: Mapping[str, Any]
) -> Geometry:
    """The image processor and its options decide into how many tiles InternVL cuts."""
    token_size = patch_size * round(1 / hf_config.downsample_ratio)
    geometry = Geometry(crop_size, token_size, NearestAspect(), "last", stitched=False, newlines=False)
    merged = model_config.multimodal_config.merge_mm_processor_kwargs(options)
    merged = {**merged, **(merged.get("images_kwargs") or {})}
    if model_config.hf_config.model_type == "internvl_chat":
        from .chat_format import image_processor_of

        images, merged = image_processor_of(model_config.hf_config, merged), {}
    else:
        from vllm.transformers_utils.processor import cached_image_processor_from_config

        images = cached_image_processor_from_config(model_config)
    return internvl.ADAPTER.cut(SimpleNamespace(image_processor=images), geometry, merged)


def largest(geometry: Geometry, config: Any = None) -> int:
    """Tokens of the largest image: all of them, or those kept by a :class:`hero.HeroConfig`.

    Where grids are resized, an upper bound.
    """
    layouts = _large(geometry)
    return max(one.full_tokens if config is None else one.kept_tokens(config) for one in layouts)


def _large(geometry: Geometry) -> Iterator[ImageLayout]:
    """Layouts among which are those of most tokens."""
    tiling, crop = geometry.tiling, geometry.crop_size
    if isinstance(tiling, NearestAspect):
        yield geometry.of_grid((1, tiling.most) if tiling.most > 1 else (0, 0))
    elif isinstance(tiling, Pinpoints):
        for size in tiling.sizes:
            grid = size[0] // crop, size[1] // crop
            yield geometry.padded(size, grid)
            if geometry.resized_beyond is not None:  # with some padding it may not be resized, and be larger
                yield from (geometry.padded(one, grid) for one in _padded(size, tiling, geometry))
    else:
        yield geometry.layout((crop, crop))


def _padded(size: tuple[int, int], tiling: Pinpoints, geometry: Geometry) -> Iterator[tuple[int, int]]:
    """Sizes of images that a pinpoint may be chosen for: a smaller one would waste less of others."""
    for axis in (0, 1):
        smaller = (size[0] - geometry.crop_size * (axis == 0), size[1] - geometry.crop_size * (axis == 1))
        least = smaller[axis] if smaller in tiling.sizes else 0
        for side in range(least + 1, size[axis], geometry.patch_size):
            yield (side, size[1]) if axis == 0 else (size[0], side)


def seen(layout: ImageLayout) -> ImageLayout:
    """The layout of the crops that the vision encoder sees, whose grid may be resized afterwards."""
    return layout.encoded or layout
