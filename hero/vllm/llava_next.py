"""LLaVA-NeXT in vLLM with dropped tokens."""

from __future__ import annotations

from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)

from .model import TOWER_NAMES, DroppingModel
from .processing import DroppingInfo, DroppingProcessor, registered

__all__ = ["HeroLlavaNextForConditionalGeneration"]


class _Info(DroppingInfo, LlavaNextProcessingInfo):
    pass


class _Processor(DroppingProcessor, LlavaNextMultiModalProcessor):
    pass


@registered(LlavaNextForConditionalGeneration, _Info, _Processor)
class HeroLlavaNextForConditionalGeneration(DroppingModel, LlavaNextForConditionalGeneration):
    """vLLM's model, which keeps only the visual tokens that the policy selects."""

    stock = LlavaNextForConditionalGeneration
    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
