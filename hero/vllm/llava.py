"""LLaVA-1.5 in vLLM with dropped tokens."""

from __future__ import annotations

from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .model import TOWER_NAMES, DroppingModel
from .options import is_asked_for
from .processing import DroppingInfo, DroppingProcessor

__all__ = ["HeroLlavaForConditionalGeneration"]

# vLLM's own choose between LLaVA and Pixtral.
_STOCK = LlavaForConditionalGeneration._processor_factory


class _Info(DroppingInfo, LlavaProcessingInfo):
    pass


class _Processor(DroppingProcessor, LlavaMultiModalProcessor):
    pass


def _info(ctx):
    return (_Info if is_asked_for(ctx.get_hf_config()) else _STOCK.info)(ctx)


def _processor(info, *args, **kwargs):
    return (_Processor if isinstance(info, _Info) else _STOCK.processor)(info, *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=LlavaDummyInputsBuilder)
class HeroLlavaForConditionalGeneration(DroppingModel, LlavaForConditionalGeneration):
    """vLLM's model, which keeps only the visual tokens that the policy selects."""

    stock = LlavaForConditionalGeneration
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
