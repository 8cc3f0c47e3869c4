"""LLaVA-NeXT (transformers ``LlavaNextForConditionalGeneration``): thumbnail first, stitched, newlines."""

from __future__ import annotations

import functools

from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..layout import Geometry
from . import tower_for
from .base import Adapter, Parts, Patch, parameter

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
    """Kept visual tokens of each image: ``pooler_output`` is a list of ``[n_i, D]``, newlines included.

    Called by a user, the output has what the stock one has. Within a call of the model it has the tokens and
    the hidden states that were asked for, so that the tower runs no further than needed.
    """
    strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
    if len(image_sizes) == 0:
        kwargs |= {"vision_feature_layer": vision_feature_layer, "vision_feature_select_strategy": strategy}
        return original(pixel_values, image_sizes, **kwargs)
    _check_strategy(strategy)
    layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
    return_dict = kwargs.pop("return_dict", None)
    if return_dict is None:
        return_dict = self.config.return_dict
    kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or None
    tokens, output = self._hero.image_tokens(pixel_values, image_sizes, feature_layer=layer, **kwargs)
    output = BaseModelOutputWithPooling() if output is None else output
    output.pooler_output = tokens
    return output if return_dict else output.to_tuple()


def get_number_of_features(self, original, orig_height, orig_width, height, width):
    """Visual tokens of an image, plus the CLS token that callers subtract again."""
    geometry = self._hero.geometry
    if (height, width) != (geometry.crop_size,) * 2:
        raise ValueError(f"pixel_values: expected crops of {geometry.crop_size} px, got {(height, width)}")
    if _pairs(self.image_processor.image_grid_pinpoints) != geometry.pinpoints:
        raise RuntimeError("image_grid_pinpoints of the processor changed after attach: attach again")
    return self._hero.tokens((orig_height, orig_width)) + self.num_additional_image_tokens


def _check_strategy(strategy: str) -> None:
    if strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy: expected 'default' (without CLS), got {strategy!r}"
        )


class LlavaNextAdapter(Adapter):
    def parts(self, model):
        config = model.config
        _check_strategy(config.vision_feature_select_strategy)
        crop_size, patch_size = tower_for(model.model.vision_tower).geometry(model.model.vision_tower)
        layer = config.vision_feature_layer
        return Parts(
            vision_tower=model.model.vision_tower,
            projector=model.model.multi_modal_projector,
            image_newline=functools.partial(parameter, model.model, "image_newline"),
            geometry=Geometry(crop_size, patch_size, _pairs(config.image_grid_pinpoints)),
            feature_layer=layer if isinstance(layer, int) else tuple(layer),
            image_token_id=config.image_token_id,
        )

    def check_processor(self, processor, parts):
        geometry = parts.geometry
        image_processor = getattr(processor, "image_processor", None)
        if image_processor is None or not hasattr(processor, "_get_number_of_features"):
            raise TypeError(f"processor: expected a LlavaNextProcessor, got {type(processor).__name__}")
        pinpoints = _pairs(image_processor.image_grid_pinpoints)
        if pinpoints != geometry.pinpoints:
            expected = f"the model's image_grid_pinpoints {list(geometry.pinpoints)}"
            raise ValueError(f"processor: expected {expected}, got {list(pinpoints)}")
        crop = image_processor.crop_size
        crop = (crop["height"], crop["width"])
        if crop != (geometry.crop_size,) * 2 or processor.patch_size != geometry.patch_size:
            expected = f"crops of {geometry.crop_size} px and patches of {geometry.patch_size} px"
            raise ValueError(f"processor: expected {expected}, got {crop} and {processor.patch_size}")
        _check_strategy(processor.vision_feature_select_strategy)
        if processor.num_additional_image_tokens != 1:
            got = processor.num_additional_image_tokens
            raise ValueError(f"processor: expected num_additional_image_tokens=1, the CLS token, got {got}")

    def model_patches(self, model):
        return [Patch(model.model, "get_image_features", get_image_features)]

    def processor_patches(self, processor):
        return [Patch(processor, "_get_number_of_features", get_number_of_features)]


def _pairs(pinpoints) -> tuple[tuple[int, int], ...]:
    return tuple((int(height), int(width)) for height, width in pinpoints)


ADAPTER = LlavaNextAdapter()
