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
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo

from .._checks import error
from ..layout import Geometry, ImageLayout
from .geometry import geometry_of
from .options import KEEP_RATIO, Options, read_ratio

__all__ = ["IMAGES", "DroppingInfo", "DroppingProcessor", "layouts_of"]

# ``[images, 5]`` int64: height and width in pixels, the ratio of the request, the number of kept tokens.
IMAGES = "hero_images"


def layouts_of(geometry: Geometry, images: Sequence[Sequence[int]]) -> tuple[ImageLayout, ...]:
    """The layout of each image, from the first four numbers of its row of ``hero_images``."""
    layouts = geometry.layouts([row[:2] for row in images])
    return tuple(
        dataclasses.replace(layout, keep_ratio=row[2] / row[3]) if row[3] else layout
        for layout, row in zip(layouts, images, strict=True)
    )


class DroppingInfo(BaseProcessingInfo):
    """Token counts of a model's images."""

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
        return self.count((image_height, image_width), (0, 0))

    def count(self, image_size: Sequence[int], ratio: tuple[int, int]) -> int:
        """The same for an image of (height, width) pixels, by the ratio of a request (:func:`read_ratio`)."""
        [layout] = layouts_of(self.geometry, [(*image_size, *ratio)])
        return layout.kept_tokens(self.options.config)


class DroppingProcessor(BaseMultiModalProcessor):
    """Placeholders and inputs of a model's images."""

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
        ratio = read_ratio(hf_processor_mm_kwargs)
        token = self.info.get_hf_config().image_token_index

        def replacement(number: int) -> list[int]:
            width, height = images.get_image_size(number)
            return [token] * self.info.count((height, width), ratio)

        return [dataclasses.replace(stock, replacement=replacement)]

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]):
        ratio = read_ratio(hf_kwargs)
        others = {name: value for name, value in hf_kwargs.items() if name != KEEP_RATIO}
        outputs = super()._call_hf_processor(hf_data, others)
        pixels = outputs.get("pixel_values")
        if pixels is None:
            return outputs
        geometry = self.info.geometry
        whole = [(geometry.crop_size,) * 2] * len(pixels)  # where an image is one crop
        sizes = torch.as_tensor(outputs.get("image_sizes", whole)).tolist()
        outputs["pixel_values"] = _own_crops(pixels, geometry.layouts(sizes), geometry.crop_size)
        outputs[IMAGES] = torch.tensor([(*size, *ratio, self.info.count(size, ratio)) for size in sizes])
        return outputs

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, IMAGES: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}


def _own_crops(pixels: Sequence[Tensor], layouts: Sequence[ImageLayout], crop_size: int) -> list[Tensor]:
    """Crops of each image ``[crops, 3, S, S]``, without those that pad a batch.

    Raises:
        ValueError: other crops than the model cuts, since options of the request change the image processor.
    """
    found = []
    for image, layout in zip(pixels, layouts, strict=True):
        crops = image if image.ndim == 4 else image[None]
        own = crops[: layout.crops]
        if own.shape != (layout.crops, 3, crop_size, crop_size) or crops[layout.crops :].any():
            expected = f"options that cut an image of {layout} as the model does, into {layout.crops} crops"
            raise error(
                ValueError, "mm_processor_kwargs", f"{expected} of {crop_size} px", tuple(image.shape)
            )
        found.append(own.contiguous())
    return found
