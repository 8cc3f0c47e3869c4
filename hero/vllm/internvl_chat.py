"""InternVL in its own format (``InternVLChatModel``) in vLLM with dropped tokens of images; videos are whole.

Its vision encoder is that of transformers' InternVL under other names, with queries, keys and values in one
matrix. Selection is that of transformers' format, on the same weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import InternVLConfig
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .._checks import error
from .model import DroppingModel
from .options import is_asked_for
from .processing import DroppingInfo, DroppingProcessor

__all__ = ["HeroInternVLChatModel", "converted", "image_processor_of"]

# Names of the vision encoder's parameters, in the order in which they are replaced.
_NAMES = (
    (r"\.layers\.", ".layer."),
    (r"class_embedding", "cls_token"),
    (r"position_embedding", "position_embeddings"),
    (r"patch_embedding", "patch_embeddings.projection"),
    (r"\.ls(\d)", r".lambda_\1"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
# vision_config: a field of transformers, and its name here.
_FIELDS = {
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    **{
        name: name
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "hidden_act",
            "norm_type",
            "layer_norm_eps",
            "image_size",
            "patch_size",
        )
    },
}


def converted(hf_config: Any) -> InternVLConfig:
    """The configuration of transformers' InternVL with the same vision encoder.

    Raises:
        ValueError: a field that this one has not.
    """
    vision, size = hf_config.vision_config, hf_config.vision_config.image_size
    expected = {"ps_version": "v2", "use_thumbnail": True, "force_image_size": (None, size)}
    for name, wanted in expected.items():
        given = getattr(hf_config, name, None)
        if given != wanted and given not in (wanted if isinstance(wanted, tuple) else ()):
            raise error(ValueError, f"{name} of the model", repr(wanted), given)
    if hf_config.select_layer >= 0:  # which vLLM counts otherwise than the model's own code
        raise error(ValueError, "select_layer of the model", "a negative number", hf_config.select_layer)
    return InternVLConfig(
        vision_config={name: getattr(vision, own) for name, own in _FIELDS.items()},
        text_config=InternVLConfig().text_config,
        vision_feature_layer=hf_config.select_layer,
        downsample_ratio=hf_config.downsample_ratio,
    )


def image_processor_of(hf_config: Any, options: Mapping[str, Any]) -> Any:
    """Sizes and limits of vLLM's image processor, by the names of transformers'."""
    names = ("min_dynamic_patch", "max_dynamic_patch", "dynamic_image_size", "use_thumbnail")
    least, most, is_cut, has_thumbnail = (options.get(name, getattr(hf_config, name)) for name in names)
    if not has_thumbnail:
        raise error(ValueError, "use_thumbnail", "True, since hero needs a thumbnail", has_thumbnail)
    side = options.get("image_size", hf_config.vision_config.image_size)
    size = {"height": side, "width": side}
    return SimpleNamespace(size=size, min_patches=least if is_cut else 1, max_patches=most if is_cut else 1)


class _Info(DroppingInfo, InternVLProcessingInfo):
    pass


class _Processor(DroppingProcessor, InternVLMultiModalProcessor):
    pixels = "pixel_values_flat"

    def shown(self, count):
        return self.info.get_hf_processor().get_image_repl(None, count)


def _info(ctx):
    return (_Info if is_asked_for(ctx.get_hf_config()) else InternVLProcessingInfo)(ctx)


def _processor(info, *args, **kwargs):
    return (_Processor if isinstance(info, _Info) else InternVLMultiModalProcessor)(info, *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=InternVLDummyInputsBuilder)
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
        return super().load_weights(_renamed(weights))


def _renamed(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights:
        if not name.startswith("vision_model."):
            yield name, value
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            for part, own in zip("qkv", value.chunk(3), strict=True):
                yield name.replace(".qkv.", f".{part}_proj."), own
        else:
            yield name, value
