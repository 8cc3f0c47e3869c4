"""LLaVA-1.5 in vLLM with dropped tokens."""

from __future__ import annotations

from vllm.model_executor.models.llava import (
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)

from .model import TOWER_NAMES, DroppingModel
from .processing import DroppingInfo, DroppingProcessor, registered

__all__ = ["HeroLlavaForConditionalGeneration"]


class _Info(DroppingInfo, LlavaProcessingInfo):
    pass


class _Processor(DroppingProcessor, LlavaMultiModalProcessor):
    pass


@registered(LlavaForConditionalGeneration, _Info, _Processor)
class HeroLlavaForConditionalGeneration(DroppingModel, LlavaForConditionalGeneration):
    """vLLM's model, which keeps only the visual tokens that the policy selects."""

    stock = LlavaForConditionalGeneration
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
