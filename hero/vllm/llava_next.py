"""LLaVA-NeXT in vLLM with dropped tokens."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models import llava_next as stock
from vllm.model_executor.models.adapters import as_embedding_model, as_seq_cls_model
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.utils import StageMissingLayer, WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from .geometry import geometry_of
from .options import Options, build_tower
from .processing import DroppingInfo, DroppingProcessor
from .vision import VisionStage

__all__ = ["HeroLlavaNextForConditionalGeneration"]


class _Info(DroppingInfo, stock.LlavaNextProcessingInfo):
    pass


class _Processor(DroppingProcessor, stock.LlavaNextMultiModalProcessor):
    pass


def _info(ctx):
    drops = Options.read(ctx.get_hf_config()) is not None
    return (_Info if drops else stock.LlavaNextProcessingInfo)(ctx)


def _processor(info, *args, **kwargs):
    processor = _Processor if isinstance(info, _Info) else stock.LlavaNextMultiModalProcessor
    return processor(info, *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=LlavaDummyInputsBuilder)
class HeroLlavaNextForConditionalGeneration(stock.LlavaNextForConditionalGeneration):
    """vLLM's model, which keeps only the visual tokens that the policy selects.

    The vision tower is that of transformers, since hero sees queries and keys there. Each rank of a tensor
    parallel group runs it as a whole, and so selects the same tokens. Projector, newline and language model
    are vLLM's. Without ``hero`` in the configuration, the constructor returns vLLM's own class.
    """

    supports_tower_connector_lora = False

    # Checkpoints name the tower's parameters with or without "vision_model".
    hf_to_vllm_mapper = stock.LlavaNextForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={"vision_tower.vision_model.": "vision_tower."}
    )

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = ""):
        model = vllm_config.model_config
        if Options.read(model.hf_config) is not None:
            return super().__new__(cls)
        own = stock.LlavaNextForConditionalGeneration
        if model.convert_type != "none":
            own = {"embed": as_embedding_model, "classify": as_seq_cls_model}[model.convert_type](own)
        return own(vllm_config=vllm_config, prefix=prefix)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        options = Options.read(self.config)
        if isinstance(self.vision_tower, StageMissingLayer):  # serves text alone
            return
        names = self._tower_model_names
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_tower = build_tower(self.config)
        self._tower_model_names = names
        encoder = options.encoder(
            self.vision_tower,
            self.multi_modal_projector,
            self.config,
            geometry_of(self.config),
            lambda: self.image_newline,
        )
        self.vision_stage = VisionStage(encoder, options.max_crops)

    def embed_multimodal(self, **kwargs: Any):
        """Kept tokens ``[n_i, D]`` of each image, newlines included.

        Raises:
            RuntimeError: an image has another number of tokens than placeholders in its prompt.
        """
        if kwargs.get("pixel_values") is None:  # features that somebody else computed
            return super().embed_multimodal(**kwargs)
        return self.vision_stage(**kwargs)
