"""LLaVA-NeXT (transformers ``LlavaNextForConditionalGeneration``): thumbnail first, stitched, newlines."""

from __future__ import annotations

import functools

from .base import Adapter, Patch, parameter
from .llava import check_crops, kept_features, parts_of

__all__ = ["ADAPTER"]


def get_image_features(
    self,
    original,
    pixel_values,
    image_sizes,
    vision_feature_layer=None,
    vision_feature_select_strategy=None,
    **kwargs,
):
    strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
    if len(image_sizes) == 0:
        kwargs |= {"vision_feature_layer": vision_feature_layer, "vision_feature_select_strategy": strategy}
        return original(pixel_values, image_sizes, **kwargs)
    return kept_features(self, pixel_values, image_sizes, vision_feature_layer, strategy, **kwargs)


def get_number_of_features(self, original, orig_height, orig_width, height, width):
    """Visual tokens of an image, plus the CLS token that callers subtract again."""
    geometry = self._hero.geometry
    if (height, width) != (geometry.crop_size,) * 2:
        raise ValueError(f"pixel_values: expected crops of {geometry.crop_size} px, got {(height, width)}")
    if _pairs(self.image_processor.image_grid_pinpoints) != geometry.pinpoints:
        raise RuntimeError("image_grid_pinpoints of the processor changed after attach: attach again")
    return self._hero.tokens((orig_height, orig_width)) + self.num_additional_image_tokens


class LlavaNextAdapter(Adapter):
    def parts(self, model):
        newline = functools.partial(parameter, model.model, "image_newline")
        return parts_of(model, _pairs(model.config.image_grid_pinpoints), newline)

    def check_processor(self, processor, parts):
        image_processor = getattr(processor, "image_processor", None)
        if image_processor is None or not hasattr(processor, "_get_number_of_features"):
            raise TypeError(f"processor: expected a LlavaNextProcessor, got {type(processor).__name__}")
        pinpoints = _pairs(image_processor.image_grid_pinpoints)
        if pinpoints != parts.geometry.pinpoints:
            expected = f"the model's image_grid_pinpoints {list(parts.geometry.pinpoints)}"
            raise ValueError(f"processor: expected {expected}, got {list(pinpoints)}")
        check_crops(processor, parts)

    def model_patches(self, model):
        return [Patch(model.model, "get_image_features", get_image_features)]

    def processor_patches(self, processor):
        return [Patch(processor, "_get_number_of_features", get_number_of_features)]


def _pairs(pinpoints) -> tuple[tuple[int, int], ...]:
    return tuple((int(height), int(width)) for height, width in pinpoints)


ADAPTER = LlavaNextAdapter()
