"""What vLLM's processors do for models that drop tokens: as many placeholders as tokens are kept.

These classes come before a model's own in the order of bases. The front end counts the tokens of each image
and hands the count on with its pixels, so that the model can compare it with what the encoder returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems

from ..layout import Geometry, ImageLayout
from .geometry import geometry_of
from .options import KEEP_RATIO, Options, read_ratio

__all__ = ["COUNT", "DroppingInfo", "DroppingProcessor"]

COUNT = "hero_tokens"


class DroppingInfo:
    """Token counts of a model's images; a base of its ``ProcessingInfo``."""

    @cached_property
    def options(self) -> Options:
        """What to keep."""
        return Options.read(self.get_hf_config())

    @cached_property
    def geometry(self) -> Geometry:
        """How the model cuts images."""
        return geometry_of(self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens kept of an image: :func:`hero.count_tokens` of the model's geometry."""
        return self.geometry.layout((image_height, image_width)).kept_tokens(self.options.config)


class DroppingProcessor:
    """Placeholders and inputs of a model's images; a base of its ``MultiModalProcessor``."""

    def _get_mm_hashes(self, inputs):
        # The options of a request are part of the hash already, but those of the engine are not, and some
        # caches outlive an engine or are shared by several.
        options = {**inputs.hf_processor_mm_kwargs, "hero": self.info.options.key}
        return super()._get_mm_hashes(dataclasses.replace(inputs, hf_processor_mm_kwargs=options))

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        [stock] = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        images = mm_items.get("image")
        if not isinstance(images, ImageProcessorItems):  # features that somebody else computed
            return [stock]
        ratio, config = read_ratio(hf_processor_mm_kwargs), self.info.options.config
        token = self.info.get_hf_config().image_token_index

        def replacement(number: int) -> list[int]:
            width, height = images.get_image_size(number)
            [layout] = Options.layouts(self.info.geometry, [(height, width)], [ratio])
            return [token] * layout.kept_tokens(config)

        return [dataclasses.replace(stock, replacement=replacement)]

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]):
        ratio = read_ratio(hf_kwargs)
        others = {name: value for name, value in hf_kwargs.items() if name != KEEP_RATIO}
        outputs = super()._call_hf_processor(hf_data, others)
        if "pixel_values" not in outputs:
            return outputs
        sizes = torch.as_tensor(outputs["image_sizes"]).tolist()
        layouts = Options.layouts(self.info.geometry, sizes, [ratio] * len(sizes))
        outputs["pixel_values"] = _own_crops(outputs["pixel_values"], layouts, self.info.geometry)
        outputs[KEEP_RATIO] = torch.tensor([ratio] * len(sizes))
        counts = [layout.kept_tokens(self.info.options.config) for layout in layouts]
        outputs[COUNT] = torch.tensor(counts)
        return outputs

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        own = {name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in (KEEP_RATIO, COUNT)}
        return {**super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs), **own}


def _own_crops(
    pixels: Sequence[torch.Tensor], layouts: Sequence[ImageLayout], geometry: Geometry
) -> list[torch.Tensor]:
    """Crops of each image ``[crops, 3, S, S]``, without those that pad a batch.

    Raises:
        ValueError: other crops than the model cuts, since options of the request change the image processor.
    """
    size = (3, geometry.crop_size, geometry.crop_size)
    for image, layout in zip(pixels, layouts, strict=True):
        if image.shape[1:] != size or len(image) < layout.crops or image[layout.crops :].any():
            raise ValueError(
                f"mm_processor_kwargs: expected options that cut an image of {layout} as the model does, "
                f"into {layout.crops} crops of {geometry.crop_size} px, got {tuple(image.shape)}"
            )
    return [image[: layout.crops].contiguous() for image, layout in zip(pixels, layouts, strict=True)]
