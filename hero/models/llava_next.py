"""LLaVA-NeXT (transformers ``LlavaNextForConditionalGeneration``): thumbnail first, stitched, newlines."""

from __future__ import annotations

import functools

from ..tiling import Pinpoints
from .base import Adapter, Patch, parameter
from .llava import check_crops, kept_features, parts_of

__all__ = ["ADAPTER", "pinpoints_of"]


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


class LlavaNextAdapter(Adapter):
    def parts(self, model):
        newline = functools.partial(parameter, model.model, "image_newline")
        return parts_of(model, pinpoints_of(model.config), newline)

    def layouts(self, inputs, parts, config, shown):
        return inputs.get("image_sizes")

    def check_processor(self, processor, parts):
        image_processor = getattr(processor, "image_processor", None)
        if image_processor is None or not hasattr(processor, "_get_number_of_features"):
            raise TypeError(f"processor: expected a LlavaNextProcessor, got {type(processor).__name__}")
        tiling = pinpoints_of(image_processor)
        if tiling != parts.geometry.tiling:
            expected = f"the model's image_grid_pinpoints {list(parts.geometry.tiling.sizes)}"
            raise ValueError(f"processor: expected {expected}, got {list(tiling.sizes)}")
        check_crops(processor, parts)
        return parts.geometry

    def model_patches(self, model):
        return [Patch(model.model, "get_image_features", get_image_features)]

    def processed(self, processor, geometry, outputs, images):
        size = outputs["pixel_values"][0].shape[-1]
        if size != geometry.crop_size:
            raise ValueError(f"pixel_values: expected crops of {geometry.crop_size} px, got {size}")
        if pinpoints_of(processor.image_processor) != geometry.tiling:
            raise RuntimeError("image_grid_pinpoints of the processor changed after attach: attach again")
        return geometry.layouts(outputs["image_sizes"])


def pinpoints_of(config) -> Pinpoints:
    """The grids of a model's configuration or of an image processor."""
    return Pinpoints(tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints))


ADAPTER = LlavaNextAdapter()
