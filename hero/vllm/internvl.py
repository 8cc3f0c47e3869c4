"""InternVL in transformers' format in vLLM with dropped tokens of images; videos are whole."""

from __future__ import annotations

from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdateDetails

from .model import DroppingModel
from .options import is_asked_for
from .processing import DroppingInfo, DroppingProcessor

__all__ = ["HeroInternVLForConditionalGeneration"]


class _Info(DroppingInfo, InternS1ProcessingInfo):
    pass


class _Processor(DroppingProcessor, InternS1MultiModalProcessor):
    def shown(self, count):
        own = self.info.get_hf_processor()
        tokens = [own.start_image_token_id, *[own.image_token_id] * count, own.end_image_token_id]
        return PromptUpdateDetails.select_token_id(tokens, own.image_token_id)


def _info(ctx):
    return (_Info if is_asked_for(ctx.get_hf_config()) else InternS1ProcessingInfo)(ctx)


def _processor(info, *args, **kwargs):
    return (_Processor if isinstance(info, _Info) else InternS1MultiModalProcessor)(info, *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=InternS1DummyInputsBuilder)
class HeroInternVLForConditionalGeneration(DroppingModel, InternS1ForConditionalGeneration):
    """vLLM's model, which keeps only the visual tokens that the policy selects."""

    stock = InternS1ForConditionalGeneration
    modalities = frozenset({"image", "video"})

    def extract_feature(self, pixel_values):
        """All tokens ``[T, P, D]`` of frames ``[T, 3, S, S]`` of videos."""
        return self.vision_stage.whole(pixel_values)
