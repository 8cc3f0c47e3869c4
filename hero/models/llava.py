"""LLaVA-1.5 (transformers ``LlavaForConditionalGeneration``): one crop an image, which is its thumbnail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..layout import Geometry
from ..tiling import Tiling, Whole
from . import tower_for
from .base import Adapter, Parts, Patch
from .towers import AnyTower

__all__ = ["ADAPTER", "check_crops", "check_strategy", "kept_features", "parts_of"]

# What towers take; transformers 5.24 hands on more.
_TOWER_ARGUMENTS = ("output_hidden_states", "output_attentions", "interpolate_pos_encoding")


def kept_features(
    model: nn.Module, pixel_values, image_sizes, layer, strategy, *, return_dict=None, **kwargs
) -> object:
    """Kept visual tokens of each image: ``pooler_output`` is a list of ``[n_i, D]``, newlines included.

    Called by a user, the output has what the stock one has. Within a call of the model it has the tokens and
    the hidden states that were asked for, so that the tower runs no further than needed.
    """
    config = model.config
    check_strategy(strategy or config.vision_feature_select_strategy, tower_for(model.vision_tower))
    layer = config.vision_feature_layer if layer is None else layer
    kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or None
    tokens, output = model._hero.image_tokens(pixel_values, image_sizes, feature_layer=layer, **kwargs)
    output = BaseModelOutputWithPooling() if output is None else output
    output.pooler_output = tokens
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def parts_of(model: nn.Module, tiling: Tiling, image_newline: Callable[[], Tensor] | None) -> Parts:
    """The parts of a model whose modules have the names of LLaVA's."""
    config, tower = model.config, tower_for(model.model.vision_tower)
    check_strategy(config.vision_feature_select_strategy, tower)
    crop_size, patch_size = tower.geometry(model.model.vision_tower)
    layer = config.vision_feature_layer
    return Parts(
        vision_tower=model.model.vision_tower,
        projector=model.model.multi_modal_projector,
        image_newline=image_newline,
        geometry=Geometry(crop_size, patch_size, tiling, newlines=image_newline is not None),
        feature_layer=layer if isinstance(layer, int) else tuple(layer),
        image_token_id=config.image_token_id,
    )


def check_strategy(strategy: str, tower: AnyTower) -> None:
    """Raise ``ValueError`` unless features are the patches alone."""
    if strategy != ("default" if tower.has_cls else "full"):
        expected = "'default' (without CLS)" if tower.has_cls else "'full' (there is no CLS)"
        raise ValueError(f"vision_feature_select_strategy: expected {expected}, got {strategy!r}")


def check_crops(processor, parts: Parts) -> None:
    """Raise ``ValueError`` unless a processor's crops, patches and features are those of the model."""
    geometry, tower = parts.geometry, tower_for(parts.vision_tower)
    crop = processor.image_processor.crop_size or processor.image_processor.size
    crop = (crop["height"], crop["width"])
    if crop != (geometry.crop_size,) * 2 or processor.patch_size != geometry.patch_size:
        expected = f"crops of {geometry.crop_size} px and patches of {geometry.patch_size} px"
        raise ValueError(f"processor: expected {expected}, got {crop} and {processor.patch_size}")
    check_strategy(processor.vision_feature_select_strategy, tower)
    if processor.num_additional_image_tokens != tower.has_cls:
        expected = f"num_additional_image_tokens={tower.has_cls:d}, the number of CLS tokens"
        raise ValueError(f"processor: expected {expected}, got {processor.num_additional_image_tokens}")


def get_image_features(
    self,
    original,
    pixel_values,
    vision_feature_layer=None,
    vision_feature_select_strategy=None,
    image_sizes=None,
    **kwargs,
):
    if image_sizes is not None:  # of Pixtral, whose towers take images of any size
        raise ValueError(f"image_sizes: expected None for {type(self.vision_tower).__name__}, got sizes")
    kwargs = {name: kwargs[name] for name in (*_TOWER_ARGUMENTS, "return_dict") if name in kwargs}
    if len(pixel_values) == 0:
        kwargs |= {"vision_feature_layer": vision_feature_layer}
        return original(pixel_values, vision_feature_select_strategy=vision_feature_select_strategy, **kwargs)
    sizes = [tuple(pixel_values.shape[-2:])] * len(pixel_values)
    return kept_features(
        self, pixel_values, sizes, vision_feature_layer, vision_feature_select_strategy, **kwargs
    )


class LlavaAdapter(Adapter):
    def parts(self, model):
        return parts_of(model, Whole(), None)

    def layouts(self, inputs, parts, config, shown) -> Sequence[tuple[int, int]] | None:
        images = inputs.get("pixel_values")
        if images is None and inputs.get("mm_encoder_outputs"):
            images = inputs["mm_encoder_outputs"]["image"].pooler_output
        return None if images is None else [(parts.geometry.crop_size,) * 2] * len(images)

    def check_processor(self, processor, parts):
        is_one = getattr(processor, "image_processor", None) is not None and hasattr(processor, "patch_size")
        if not is_one or hasattr(processor, "_get_number_of_features"):  # that of LLaVA-NeXT has it
            raise TypeError(f"processor: expected a LlavaProcessor, got {type(processor).__name__}")
        check_crops(processor, parts)
        return parts.geometry

    def model_patches(self, model):
        return [Patch(model.model, "get_image_features", get_image_features)]

    def processed(self, processor, geometry, outputs, images):
        sizes = [tuple(image.shape[-2:]) for image in outputs["pixel_values"]]
        for size in sizes:
            if size != (geometry.crop_size,) * 2:
                raise ValueError(f"pixel_values: expected crops of {geometry.crop_size} px, got {size}")
        return geometry.layouts(sizes)


ADAPTER = LlavaAdapter()
