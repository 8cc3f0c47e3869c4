"""InternVL in its own format (``InternVLChatModel``) in vLLM with dropped tokens of images; videos are whole.

Its vision encoder is that of transformers' InternVL under other names, with queries, keys and values in one
matrix. Selection is that of transformers' format, on the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)

from .chat_format import renamed
from .model import DroppingModel
from .processing import DroppingInfo, DroppingProcessor, registered

__all__ = ["HeroInternVLChatModel"]


class _Info(DroppingInfo, InternVLProcessingInfo):
    pass


class _Processor(DroppingProcessor, InternVLMultiModalProcessor):
    pixels = "pixel_values_flat"

    def shown(self, count):
        return self.info.get_hf_processor().get_image_repl(None, count)


@registered(InternVLChatModel, _Info, _Processor)
class HeroInternVLChatModel(DroppingModel, InternVLChatModel):
    """vLLM's model, which keeps only the visual tokens that the policy selects."""

    stock = InternVLChatModel
    modalities = frozenset({"image", "video"})
    tower, projector, pixels = "vision_model", "mlp1", "pixel_values_flat"

    def extract_feature(self, pixel_values):
        """All tokens ``[T, P, D]`` of frames ``[T, 3, S, S]`` of videos."""
        return self.vision_stage.whole(pixel_values)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint, with the vision encoder's parameters as transformers has them."""
        return super().load_weights(renamed(weights))
