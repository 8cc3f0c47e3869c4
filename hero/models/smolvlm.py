"""SmolVLM and SmolVLM2 (transformers ``SmolVLMForConditionalGeneration``): as Idefics3."""

from .idefics3 import ADAPTER

__all__ = ["ADAPTER"]
