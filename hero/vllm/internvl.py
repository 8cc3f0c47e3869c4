"""InternVL in transformers' format in vLLM with dropped tokens of images; videos are whole."""

from __future__ import annotations

from vllm.model_executor.models.interns1 import (
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal.processing import PromptUpdateDetails

from .model import DroppingModel
from .processing import DroppingInfo, DroppingProcessor, registered

__all__ = ["HeroInternVLForConditionalGeneration"]


class _Info(DroppingInfo, InternS1ProcessingInfo):
    pass


class _Processor(DroppingProcessor, InternS1MultiModalProcessor):
    def shown(self, count):
        own = self.info.get_hf_processor()
        tokens = [own.start_image_token_id, *[own.image_token_id] * count, own.end_image_token_id]
        return PromptUpdateDetails.select_token_id(tokens, own.image_token_id)


@registered(InternS1ForConditionalGeneration, _Info, _Processor)
class HeroInternVLForConditionalGeneration(DroppingModel, InternS1ForConditionalGeneration):
    """vLLM's model, which keeps only the visual tokens that the policy selects."""

    stock = InternS1ForConditionalGeneration
    modalities = frozenset({"image", "video"})

    def extract_feature(self, pixel_values):
        """All tokens ``[T, P, D]`` of frames ``[T, 3, S, S]`` of videos."""
        return self.vision_stage.whole(pixel_values)
