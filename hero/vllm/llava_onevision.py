"""LLaVA-OneVision in vLLM with dropped tokens of images; videos are whole.

Each of several images in a prompt is tiled, as vLLM does, and transformers with a flat list of images. Its
nested lists, in which several images of a prompt are not tiled, do not exist in vLLM.
"""

from __future__ import annotations

from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)

from .model import TOWER_NAMES, DroppingModel
from .processing import DroppingInfo, DroppingProcessor, registered

__all__ = ["HeroLlavaOnevisionForConditionalGeneration"]


class _Info(DroppingInfo, LlavaOnevisionProcessingInfo):
    pass


class _Processor(DroppingProcessor, LlavaOnevisionMultiModalProcessor):
    pass


@registered(LlavaOnevisionForConditionalGeneration, _Info, _Processor)
class HeroLlavaOnevisionForConditionalGeneration(DroppingModel, LlavaOnevisionForConditionalGeneration):
    """vLLM's model, which keeps only the visual tokens that the policy selects."""

    stock = LlavaOnevisionForConditionalGeneration
    modalities = frozenset({"image", "video"})
    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def _video_pixels_to_features(self, vision_tower, pixel_values):
        return self.apply_pooling(self.vision_stage.whole(pixel_values))
