"""LLaVA-NeXT in vLLM with dropped tokens."""

from __future__ import annotations

from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .model import TOWER_NAMES, DroppingModel
from .options import is_asked_for
from .processing import DroppingInfo, DroppingProcessor

__all__ = ["HeroLlavaNextForConditionalGeneration"]


class _Info(DroppingInfo, LlavaNextProcessingInfo):
    pass


class _Processor(DroppingProcessor, LlavaNextMultiModalProcessor):
    pass


def _info(ctx):
    return (_Info if is_asked_for(ctx.get_hf_config()) else LlavaNextProcessingInfo)(ctx)


def _processor(info, *args, **kwargs):
    processor = _Processor if isinstance(info, _Info) else LlavaNextMultiModalProcessor
    return processor(info, *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=LlavaDummyInputsBuilder)
class HeroLlavaNextForConditionalGeneration(DroppingModel, LlavaNextForConditionalGeneration):
    """vLLM's model, which keeps only the visual tokens that the policy selects."""

    stock = LlavaNextForConditionalGeneration
    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
