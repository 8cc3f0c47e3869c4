"""What vLLM's models that drop tokens share: hero's encoder over transformers' tower and vLLM's projector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.adapters import as_embedding_model, as_seq_cls_model
from vllm.model_executor.models.utils import StageMissingLayer, WeightsMapper

from ..encoder import HeroVisionEncoder
from ..layout import ImageLayout
from ..models.base import parameter
from ..selection import Selection
from ..tokens import merge
from .geometry import geometry_of, seen
from .options import Options, build_tower, is_asked_for
from .processing import IMAGES, layouts_of

__all__ = ["TOWER_NAMES", "DroppingModel", "VisionStage"]

# Checkpoints name the tower's parameters with or without "vision_model".
TOWER_NAMES = WeightsMapper(orig_to_new_prefix={"vision_tower.vision_model.": "vision_tower."})


class DroppingModel(nn.Module):
    """A base before vLLM's own class of a model, which keeps only the visual tokens that the policy selects.

    The vision tower is that of transformers, since hero sees queries and keys there. Each rank of a tensor
    parallel group runs it as a whole, and so selects the same tokens. Projector, newline and language model
    are vLLM's. Without ``hero`` in the configuration, the constructor returns vLLM's own class instead.

    Attributes:
        stock: vLLM's own class.
        modalities: what the vision tower encodes. All but images is kept whole.
        tower, projector: names of the model's modules.
        pixels: the name of the images' crops among the inputs.
        vision_stage: absent where an engine serves text alone.
    """

    stock: ClassVar[type[nn.Module]]
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    tower: ClassVar[str] = "vision_tower"
    projector: ClassVar[str] = "multi_modal_projector"
    pixels: ClassVar[str] = "pixel_values"
    supports_tower_connector_lora = False

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = ""):
        model = vllm_config.model_config
        if is_asked_for(model.hf_config):
            return super().__new__(cls)
        convert = {"embed": as_embedding_model, "classify": as_seq_cls_model}.get(model.convert_type)
        own = cls.stock if convert is None else convert(cls.stock)
        return own(vllm_config=vllm_config, prefix=prefix)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model: Any = self
        if isinstance(getattr(model, self.tower), StageMissingLayer):
            return
        names = model._tower_model_names
        with model._mark_tower_model(vllm_config, set(self.modalities)):
            setattr(model, self.tower, build_tower(model.config))
        model._tower_model_names = names
        options = Options.read(model.config)
        newline = partial(parameter, model, "image_newline") if hasattr(model, "image_newline") else None
        modules = getattr(model, self.tower), getattr(model, self.projector)
        encoder = options.encoder(*modules, model.config, geometry_of(vllm_config.model_config), newline)
        self.vision_stage = VisionStage(encoder, options.max_crops)

    def embed_multimodal(self, **kwargs: Any) -> Sequence[Tensor]:
        """Kept tokens ``[n_i, D]`` of each image, newlines included.

        Raises:
            RuntimeError: an image has another number of tokens than placeholders in its prompt.
        """
        if kwargs.get(self.pixels) is None:  # features that somebody else computed, or videos
            return super().embed_multimodal(**kwargs)
        return self.vision_stage(kwargs[self.pixels], kwargs[IMAGES].tolist())


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

    def __call__(self, pixel_values: Sequence[Tensor], images: Sequence[Sequence[int]]) -> list[Tensor]:
        """Kept tokens ``[n_i, D]`` of each image, newlines included.

        Args:
            pixel_values: crops ``[crops, 3, S, S]`` of each image; or all one after another.
            images: what :class:`hero.vllm.processing.DroppingProcessor` says of each image.

        Raises:
            RuntimeError: an image has another number of tokens than placeholders in its prompt.
        """
        layouts = layouts_of(self.encoder.geometry, images)
        if isinstance(pixel_values, Tensor) and pixel_values.ndim == 4:
            pixel_values = pixel_values.split([seen(layout).crops for layout in layouts])
        tokens: list[Tensor] = []
        for chunk in _chunks(layouts, self.max_crops):
            crops = torch.cat([pixel_values[number] for number in chunk])
            tokens += self.select(crops, [layouts[number] for number in chunk]).per_image()
        found, expected = [len(one) for one in tokens], [row[-1] for row in images]
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

    def whole(self, crops: Tensor) -> Tensor:
        """All tokens ``[T, P, D]`` of crops ``[T, 3, S, S]``: those of a video's frames."""
        encoder = self.encoder
        ran = encoder.kind.run(encoder.vision_tower, crops, encoder._states, cls=False)
        tokens = merge(ran.features, encoder._merge)
        return tokens if encoder.projector is None else encoder.projector(tokens)


def _chunks(layouts: Sequence[ImageLayout], most: int) -> Iterator[list[int]]:
    """Images to encode together, in order: at least one, with at most ``most`` crops where several."""
    chunk: list[int] = []
    crops = 0
    for number, layout in enumerate(layouts):
        if chunk and crops + seen(layout).crops > most:
            yield chunk
            chunk, crops = [], 0
        chunk.append(number)
        crops += seen(layout).crops
    yield chunk
