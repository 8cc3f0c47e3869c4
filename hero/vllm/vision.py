"""The vision stage of a model in vLLM: hero's encoder over the model's own tower and projector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, cat

from .. import Selection
from ..encoder import HeroVisionEncoder
from ..layout import ImageLayout
from .options import KEEP_RATIO, Options
from .processing import COUNT

__all__ = ["VisionStage"]


class VisionStage:
    """Encodes the images of a step, and keeps their most useful tokens.

    Not a module, so that the model's parameters keep their names.

    Args:
        encoder: over the model's modules.
        max_crops: crops that the tower encodes at once.
    """

    def __init__(self, encoder: HeroVisionEncoder, max_crops: int):
        self.encoder = encoder
        self.max_crops = max_crops

    def __call__(self, pixel_values: Sequence[Tensor], image_sizes: Tensor, **inputs: Any) -> list[Tensor]:
        """Kept tokens ``[n_i, D]`` of each image, newlines included.

        Args:
            pixel_values: crops ``[crops, 3, S, S]`` of each image.
            image_sizes: ``[images, 2]`` (height, width) in pixels.
            inputs: what :class:`hero.vllm.processing.DroppingProcessor` added: the ratio of each image
                ``[images, 2]`` and its number of tokens ``[images]``.

        Raises:
            RuntimeError: an image has another number of tokens than placeholders in its prompt.
        """
        layouts = Options.layouts(
            self.encoder.geometry, image_sizes.tolist(), inputs[KEEP_RATIO].reshape(-1, 2).tolist()
        )
        tokens: list[Tensor] = []
        for chunk in _chunks(layouts, self.max_crops):
            selection = self.select(
                cat([pixel_values[number] for number in chunk]), [layouts[n] for n in chunk]
            )
            tokens += selection.per_image()
        expected = inputs[COUNT].flatten().tolist()
        found = [len(image) for image in tokens]
        if found != expected:
            raise RuntimeError(
                f"hero kept {found} tokens of images whose prompts have {expected} placeholders"
            )
        return tokens

    def select(self, crops: Tensor, layouts: Sequence[ImageLayout]) -> Selection:
        """The selection of images that are encoded together.

        Args:
            crops: ``[T, 3, S, S]``, of all images.
            layouts: of the images.
        """
        return self.encoder(crops, layouts)


def _chunks(layouts: Sequence[ImageLayout], most: int) -> Iterator[list[int]]:
    """Images to encode together, in order: at least one, with at most ``most`` crops where several."""
    chunk: list[int] = []
    crops = 0
    for number, layout in enumerate(layouts):
        if chunk and crops + layout.crops > most:
            yield chunk
            chunk, crops = [], 0
        chunk.append(number)
        crops += layout.crops
    yield chunk
