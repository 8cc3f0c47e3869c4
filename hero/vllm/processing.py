"""What vLLM's processors do for models that drop tokens: as many placeholders as tokens are kept.

These classes come before a model's own in the order of bases. The front end counts the tokens of each image
and hands the count on with its pixels, so that the model can compare it with what the encoder returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo

from .._checks import error
from ..layout import Geometry, ImageLayout
from .geometry import geometry_of, seen
from .options import OPTIONS, Options, is_asked_for, of_processor, read_ratio

__all__ = ["IMAGES", "DroppingInfo", "DroppingProcessor", "layouts_of", "registered"]

# ``[images, 7]`` int64: height and width in pixels, rows and columns of tiles, numerator and denominator of
# the ratio of the request, the number of kept tokens.
IMAGES = "hero_images"


def layouts_of(geometry: Geometry, images: Sequence[Sequence[int]]) -> tuple[ImageLayout, ...]:
    """The layout of each image, from the first six numbers of its row of ``hero_images``."""
    found = []
    for height, width, rows, columns, numerator, denominator, *_ in images:
        size, grid = (height, width), (rows, columns)
        layout = geometry.padded(size, grid) if geometry.tiling.pads else geometry.of_grid(grid, size)
        ratio = numerator / denominator if denominator else None
        found.append(dataclasses.replace(layout, keep_ratio=ratio))
    return tuple(found)


class DroppingInfo(BaseProcessingInfo):
    """Token counts of a model's images."""

    @cached_property
    def options(self) -> Options:
        """What to keep."""
        return Options.read(self.get_hf_config())

    @cached_property
    def geometry(self) -> Geometry:
        """How the model cuts images, by the options of the engine."""
        return geometry_of(self.ctx.model_config)

    def layouts(
        self, sizes: Sequence[tuple[int, int]], options: Mapping[str, Any]
    ) -> tuple[ImageLayout, ...]:
        """Layouts of images of (height, width) pixels, by the options of a request."""
        options, (numerator, denominator) = of_processor(options), read_ratio(options)
        geometry = geometry_of(self.ctx.model_config, options) if options else self.geometry
        ratio = numerator / denominator if denominator else None
        return tuple(dataclasses.replace(one, keep_ratio=ratio) for one in geometry.layouts(sizes))

    def get_num_image_tokens(self, *, image_width: int, image_height: int, **_: Any) -> int:
        """Tokens kept of an image: :func:`hero.count_tokens` of the model's geometry."""
        return self.geometry.layout((image_height, image_width)).kept_tokens(self.options.config)


class DroppingProcessor(BaseMultiModalProcessor):
    """Placeholders and inputs of a model's images.

    Attributes:
        pixels: the name of the images' crops among the inputs.
    """

    pixels: ClassVar[str] = "pixel_values"

    def apply(self, inputs, timing_ctx):
        """What the front end makes of a prompt.

        The options of a request are part of the hash of an image already, but those of the engine are not,
        and some caches outlive an engine or are shared by several.
        """
        if OPTIONS in inputs.hf_processor_mm_kwargs:
            raise error(ValueError, OPTIONS, "an option of the engine, in hf_overrides", "one of a request")
        read_ratio(
            inputs.hf_processor_mm_kwargs
        )  # its error names the option, that of a stock processor may not
        options = {**inputs.hf_processor_mm_kwargs, OPTIONS: self.info.options.key}
        return super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)

    def shown(self, count: int) -> Any:
        """The tokens of a prompt for an image of which ``count`` tokens are kept."""
        return [self.info.get_hf_config().image_token_index] * count

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        stock = super()._get_prompt_updates(mm_items, of_processor(hf_processor_mm_kwargs), out_mm_kwargs)
        images = mm_items.get("image")
        if not isinstance(images, ImageProcessorItems):  # features that somebody else computed
            return stock

        def replacement(number: int) -> Any:
            size = images.get_image_size(number)
            [layout] = self.info.layouts([(size.height, size.width)], hf_processor_mm_kwargs)
            return self.shown(layout.kept_tokens(self.info.options.config))

        return [
            dataclasses.replace(update, replacement=replacement) if update.modality == "image" else update
            for update in stock
        ]

    def _apply_hf_processor_main(self, mm_items, *args, **kwargs):
        # The options come last, and by names that differ among versions.
        named = args[-1] if args else next(iter(kwargs.values()))
        stock = of_processor(named)
        kwargs = dict.fromkeys(kwargs, stock)
        outputs = super()._apply_hf_processor_main(mm_items, *(stock for _ in args), **kwargs)
        images = mm_items.get("image")
        if not isinstance(images, ImageProcessorItems) or not len(images):
            return outputs
        sizes = [images.get_image_size(number)[::-1] for number in range(len(images))]
        layouts, ratio = self.info.layouts(sizes, named), read_ratio(named)
        self._check_crops(outputs, layouts)
        rows = [
            (*size, *seen(layout).grid, *ratio, layout.kept_tokens(self.info.options.config))
            for size, layout in zip(sizes, layouts, strict=True)
        ]
        outputs[IMAGES] = torch.tensor(rows)
        return outputs

    def _check_crops(self, outputs: Any, layouts: Sequence[ImageLayout]) -> None:
        """Leave the crops of each image ``[crops, 3, S, S]``, without those that pad a batch.

        Raises:
            ValueError: other crops than the model cuts, since options of the request change the processor.
        """
        size, counts = self.info.geometry.crop_size, outputs.get("image_num_patches")
        pixels = outputs[self.pixels]
        if counts is not None:  # all crops one after another
            pixels = pixels.split(counts.tolist())
        found = []
        for image, layout in zip(pixels, layouts, strict=True):
            crops, count = image if image.ndim == 4 else image[None], seen(layout).crops
            own, more = crops[:count], crops[count:]
            is_padded = counts is None and not more.any()
            if own.shape != (count, 3, size, size) or (len(more) and not is_padded):
                expected = f"options that cut an image of {layout} as the model does, into {count} crops"
                raise error(ValueError, "mm_processor_kwargs", f"{expected} of {size} px", tuple(image.shape))
            found.append(own.contiguous())
        if counts is None:
            outputs[self.pixels] = found

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        fields = super()._get_mm_fields_config(hf_inputs, of_processor(hf_processor_mm_kwargs))
        return {**fields, IMAGES: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}


def registered(
    stock: type[nn.Module], info: type[DroppingInfo], processor: type[DroppingProcessor]
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a model that drops tokens with its classes; engines without ``hero`` get those of vLLM's own.

    Args:
        stock: vLLM's own class of the model.
        info, processor: those of the model that drops tokens.
    """
    own = stock._processor_factory

    def make_info(ctx):
        return (info if is_asked_for(ctx.get_hf_config()) else own.info)(ctx)

    def make_processor(made, *args, **kwargs):
        return (processor if isinstance(made, info) else own.processor)(made, *args, **kwargs)

    return MULTIMODAL_REGISTRY.register_processor(
        make_processor, info=make_info, dummy_inputs=own.dummy_inputs
    )
