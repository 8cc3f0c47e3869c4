"""What a processor with hero attached does: it writes as many placeholders as tokens are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real
from typing import Any

from .._checks import check_ratio, error
from ..config import HeroConfig
from ..layout import Geometry, ImageLayout

__all__ = [
    "ProcessorCounts",
    "merge_kwargs",
    "num_multimodal_tokens",
    "process_images",
    "refuse_videos",
    "sizes_of",
    "with_ratios",
]

_KEEP_RATIO = "hero_keep_ratio"  # among the options of images


@dataclass(frozen=True)
class ProcessorCounts:
    """What a patched processor needs to count tokens: a :class:`hero.models.Adapter` and what it reads."""

    adapter: Any
    config: HeroConfig
    geometry: Geometry

    def runs(self, layout: ImageLayout) -> tuple[int, ...]:
        """Lengths of an image's runs of placeholders as the processor writes them."""
        return self.adapter.runs(layout, layout.equal_counts(self.config))


def merge_kwargs(self, original, *args, keep_ratio=None, **kwargs):
    """``processor._merge_kwargs``, which hands ``keep_ratio`` of a call on to :func:`process_images`."""
    nested = dict(kwargs.get("images_kwargs") or {})
    keep_ratio = nested.pop(_KEEP_RATIO, keep_ratio)
    if nested:
        kwargs["images_kwargs"] = nested
    merged = original(*args, **kwargs)
    if keep_ratio is not None:
        merged["images_kwargs"][_KEEP_RATIO] = keep_ratio
    return merged


def process_images(self, original, images, **kwargs):
    """``processor._process_images``: texts of the images, with as many placeholders as tokens are kept."""
    keep_ratio = kwargs.pop(_KEEP_RATIO, None)
    outputs, texts = original(images, **kwargs)
    own = self._hero
    geometry = own.adapter.cut(self, own.geometry, kwargs)
    layouts = own.adapter.processed(self, geometry, outputs, images)
    if keep_ratio is not None:
        layouts = with_ratios("keep_ratio", layouts, keep_ratio)
        # As fractions of integers: whoever casts the inputs to half precision does not round them.
        exact = (Fraction(one.keep_ratio).limit_denominator(10**9) for one in layouts)
        outputs["keep_ratios"] = [list(one.as_integer_ratio()) for one in exact]
    return outputs, [_shortened(self, *each) for each in zip(texts, layouts, strict=True)]


def with_ratios(name: str, layouts: Sequence[ImageLayout], ratios: Any) -> tuple[ImageLayout, ...]:
    """Layouts of images of which a call keeps other shares than the configuration says.

    Args:
        name: of the argument.
        ratios: a number in (0, 1], or one for each image; or ``[B, 2]`` integers, numerator and denominator.

    Raises:
        TypeError, ValueError: anything else.
    """
    ratios = ratios.tolist() if hasattr(ratios, "tolist") else ratios
    ratios = [ratios] * len(layouts) if isinstance(ratios, Real) else ratios
    if isinstance(ratios, str) or not isinstance(ratios, Sequence):
        raise error(TypeError, name, "a number in (0, 1], or one for each image", ratios)
    if len(ratios) != len(layouts):
        raise error(ValueError, name, f"one for each of {len(layouts)} images", ratios)
    numbers = [one[0] / (one[1] or math.nan) if isinstance(one, list) else one for one in ratios]
    checked = [check_ratio(name, number) for number in numbers]
    return tuple(replace(one, keep_ratio=ratio) for one, ratio in zip(layouts, checked, strict=True))


def sizes_of(images: Any) -> list[tuple[int, int]]:
    """(height, width) of images as an image processor takes them, in order."""
    from transformers import image_utils

    sizes = []
    for image in image_utils.make_flat_list_of_images(images):
        if isinstance(image.size, tuple):  # of Pillow
            sizes.append(image.size[::-1])
        else:
            channels = image_utils.infer_channel_dimension_format(image)
            sizes.append(tuple(image_utils.get_image_size(image, channels)))
    return sizes


def refuse_videos(self, original, *args, **kwargs):
    """``processor._process_videos`` where a frame of a video cannot be told from an image."""
    raise ValueError(
        f"videos: expected None with hero attached to {type(self).__name__}, got some: detach for videos"
    )


def _shortened(processor, text: str, layout: ImageLayout) -> str:
    own, token = processor._hero, processor.image_token
    written = tuple(len(run) // len(token) for run in re.findall(f"(?:{re.escape(token)})+", text))
    full = own.adapter.runs(layout, layout.full_counts)
    if written != full:
        raise ValueError(
            f"processor: expected {sum(full)} placeholders for an image of {layout}, as the model has "
            f"tokens, got {sum(written)}: its settings differ from the model's, or changed after attach"
        )
    lengths = iter(own.runs(layout))
    return re.sub(f"(?:{re.escape(token)})+", lambda run: token * next(lengths), text)


def num_multimodal_tokens(self, original, image_sizes=None, **kwargs):
    """``processor._get_num_multimodal_tokens``, for images of (height, width) pixels."""
    data = original(image_sizes, **kwargs)
    if image_sizes is not None:
        own = self._hero
        layouts = own.adapter.cut(self, own.geometry, kwargs).layouts(image_sizes)
        data.num_image_tokens = [
            own.adapter.other_tokens(self, count, layout) + sum(own.runs(layout))
            for count, layout in zip(data.num_image_tokens, layouts, strict=True)
        ]
    return data
