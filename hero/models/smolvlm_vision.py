"""The vision tower of SmolVLM and SmolVLM2 (transformers ``SmolVLMVisionTransformer``): that of Idefics3."""

from dataclasses import replace

from . import idefics3_vision

__all__ = ["TOWER"]

TOWER = replace(
    idefics3_vision.TOWER,
    source="transformers.models.smolvlm.modeling_smolvlm",
    classes=("SmolVLMVisionTransformer", "SmolVLMEncoderLayer", "SmolVLMVisionAttention"),
)
