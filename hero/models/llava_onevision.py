"""LLaVA-OneVision (transformers ``LlavaOnevisionForConditionalGeneration``): large grids are resized.

Several images of a nested list are not tiled. Videos have placeholders of their own and are kept whole.
"""

from __future__ import annotations

import dataclasses
import functools

from .._checks import error
from .base import Adapter, Patch, parameter
from .llava import kept_features, parts_of
from .llava_next import pinpoints_of

__all__ = ["ADAPTER"]


def get_image_features(
    self,
    original,
    pixel_values,
    image_sizes,
    vision_feature_layer=None,
    vision_feature_select_strategy=None,
    vision_aspect_ratio=None,
    batch_num_images=None,
    **kwargs,
):
    own = self.config.vision_aspect_ratio
    if vision_aspect_ratio not in (None, own):
        raise error(ValueError, "vision_aspect_ratio", f"the model's, {own!r}", vision_aspect_ratio)
    strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
    if len(image_sizes) == 0:
        kwargs |= {"vision_feature_layer": vision_feature_layer, "vision_feature_select_strategy": strategy}
        return original(pixel_values, image_sizes, batch_num_images=batch_num_images, **kwargs)
    layouts = _layouts(self._hero.parts.geometry, image_sizes, batch_num_images)
    return kept_features(self, pixel_values, layouts, vision_feature_layer, strategy, **kwargs)


def _layouts(geometry, sizes, counts):
    layouts = geometry.layouts(sizes)
    if counts is None:
        return layouts
    counts = counts.tolist() if hasattr(counts, "tolist") else counts
    alone = [count == 1 for count in counts for _ in range(count)]
    if len(alone) != len(layouts):
        raise error(ValueError, "batch_num_images", f"{len(layouts)} images in all", counts)
    whole = (geometry.of_grid((0, 0), layout.image_size) for layout in layouts)
    return tuple(
        one if is_alone else other for one, other, is_alone in zip(layouts, whole, alone, strict=True)
    )


class LlavaOnevisionAdapter(Adapter):
    def parts(self, model):
        newline = functools.partial(parameter, model.model, "image_newline")
        parts = parts_of(model, pinpoints_of(model.config), newline)
        most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        return dataclasses.replace(parts, geometry=dataclasses.replace(parts.geometry, resized_beyond=most))

    def layouts(self, inputs, parts, config, shown):
        sizes = inputs.get("image_sizes")
        if sizes is None or not len(sizes):
            return sizes
        return _layouts(parts.geometry, sizes, inputs.get("batch_num_images"))

    def check_processor(self, processor, parts):
        images, geometry = getattr(processor, "image_processor", None), parts.geometry
        if images is None or not hasattr(processor, "num_image_tokens"):
            raise TypeError(f"processor: expected a LlavaOnevisionProcessor, got {type(processor).__name__}")
        config = {
            "image_grid_pinpoints": (pinpoints_of(images), geometry.tiling),
            "size": ((images.size["height"], images.size["width"]), (geometry.crop_size,) * 2),
            "num_image_tokens": (processor.num_image_tokens, geometry.side**2),
            "vision_aspect_ratio": (processor.vision_aspect_ratio, f"anyres_max_{geometry.resized_beyond}"),
            "vision_feature_select_strategy": (processor.vision_feature_select_strategy, "full"),
        }
        for name, (given, expected) in config.items():
            if given != expected:
                raise error(ValueError, f"{name} of the processor", f"the model's, {expected}", given)
        return geometry

    def model_patches(self, model):
        return [Patch(model.model, "get_image_features", get_image_features)]

    def processed(self, processor, geometry, outputs, images):
        return _layouts(geometry, outputs["image_sizes"], outputs["batch_num_images"])


ADAPTER = LlavaOnevisionAdapter()
