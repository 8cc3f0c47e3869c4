"""Model families. The core imports none of them: they are found by class name and imported on use."""

from __future__ import annotations

import importlib
import operator
from typing import Any

from torch import nn

from .base import Adapter, Parts, Patch, Shown
from .processors import ProcessorCounts, with_ratios
from .towers import PackedTower, Tower, TowerOutput, hidden_states, is_untouched, unwrapped

__all__ = [
    "Adapter",
    "PackedTower",
    "Parts",
    "Patch",
    "ProcessorCounts",
    "Shown",
    "Tower",
    "TowerOutput",
    "adapter_for",
    "hidden_states",
    "is_untouched",
    "supported_types",
    "tower_for",
    "unwrapped",
    "with_ratios",
]

_ADAPTERS = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "InternVLForConditionalGeneration": "internvl",
    "Idefics3ForConditionalGeneration": "idefics3",
    "SmolVLMForConditionalGeneration": "smolvlm",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
}
_MODULES = dict.fromkeys([name for name in _ADAPTERS.values() if name.startswith("qwen")], "qwen_vl")
_TOWERS = {
    "CLIPVisionModel": "clip",
    "SiglipVisionModel": "siglip",
    "InternVLVisionModel": "internvit",
    "Idefics3VisionTransformer": "idefics3_vision",
    "SmolVLMVisionTransformer": "smolvlm_vision",
    "Qwen2VisionTransformerPretrainedModel": "qwen_vision",
    "Qwen2_5_VisionTransformerPretrainedModel": "qwen_vision",
    "Qwen3VLVisionModel": "qwen_vision",
    "Qwen3VLMoeVisionModel": "qwen_vision",
    "Qwen3_5VisionModel": "qwen_vision",
    "Qwen3_5MoeVisionModel": "qwen_vision",
}


def _find(kind: str, argument: str, table: dict[str, str], value: object):
    for cls in type(value).__mro__:
        if cls.__name__ in table and cls.__module__.startswith("transformers."):
            name = table[cls.__name__]
            return importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    hint = ""
    for inner in ("module", "_orig_mod", "base_model.model"):  # DataParallel, torch.compile, PEFT
        try:
            found = type(operator.attrgetter(inner)(value))
        except AttributeError:
            continue
        if any(cls.__name__ in table for cls in found.__mro__):
            hint = f": attach to its .{inner}"
    raise ValueError(f"{argument}: expected {kind} ({', '.join(table)}), got {type(value).__name__}{hint}")


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises:
        ValueError: an unsupported model; the message names those supported.
    """
    return _find("a supported model", "model", _ADAPTERS, model).ADAPTER


def supported_types() -> list[str]:
    """The supported models' ``config.model_type``."""
    return list(_ADAPTERS.values())


def tower_for(vision_tower: nn.Module) -> Any:
    """The kind of a vision encoder, wrapped or not: a :class:`Tower` or a :class:`PackedTower`.

    Raises:
        ValueError: an unsupported encoder; the message names those supported.
    """
    return _find("a supported vision encoder", "vision_tower", _TOWERS, unwrapped(vision_tower)).TOWER
