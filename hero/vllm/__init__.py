"""The plug-in for vLLM, which finds it by the entry point in setup.py; see docs/serving.md.

vLLM calls :func:`register` in each of its processes, whichever model is served. So neither this module nor
``scheduling`` imports torch or transformers until a configuration asks for hero.
"""

from __future__ import annotations

__all__ = ["MODELS", "register"]

MODELS = {
    name: f"hero.vllm.{module}:Hero{name}"
    for name, module in {
        "InternVLChatModel": "internvl_chat",
        "InternVLForConditionalGeneration": "internvl",
        "LlavaForConditionalGeneration": "llava",
        "LlavaNextForConditionalGeneration": "llava_next",
        "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    }.items()
}


def register() -> None:
    """Make the supported models of vLLM drop tokens where ``--hf-overrides '{"hero": {...}}'`` asks for it.

    Without that override vLLM builds its own classes. A second call changes nothing.
    """
    from vllm import ModelRegistry

    from .scheduling import check_configurations

    for architecture, found in MODELS.items():
        ModelRegistry.register_model(architecture, found)
    check_configurations(ModelRegistry.get_supported_archs(), tuple(MODELS))
