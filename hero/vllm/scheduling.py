"""Checks of an engine's configuration, and how many images a step may encode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.model_executor.models import config as model_configs

__all__ = ["check_configurations"]


def check_configurations(architectures: Iterable[str], supported: tuple[str, ...]) -> None:
    """Make vLLM check the options of hero when it configures an engine, before it loads anything.

    For supported models this also limits the images of a step by what they cost. vLLM charges an image the
    tokens that the language model sees. Counted so, a step would admit 1/R times as many images as without
    hero, and each costs the vision encoder as much as before. So the budget of a step shrinks as the largest
    image does, but not below the tokens of a whole image, which a request may ask for.

    Args:
        architectures: that vLLM knows.
        supported: those of them that can drop tokens. For others the options are an error.
    """
    hooks = model_configs.MODELS_CONFIG_MAP
    for architecture in architectures:
        found = hooks.get(architecture, model_configs.VerifyAndUpdateConfig)
        if not issubclass(found, _Checked):
            hooks[architecture] = type("Checked", (_Checked, found), {"supported": supported})


class _Checked(model_configs.VerifyAndUpdateConfig):
    supported: tuple[str, ...]

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        super().verify_and_update_config(vllm_config)
        if getattr(vllm_config.model_config.hf_config, "hero", None) is not None:
            _check_and_limit(vllm_config, cls.supported)


def _check_and_limit(vllm_config: Any, supported: tuple[str, ...]) -> None:
    from .._checks import error
    from .geometry import geometry_of, largest
    from .options import KEEP_RATIO, Options

    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    if model.architecture not in supported:
        raise error(
            ValueError, "hf_overrides, hero", f"a model of {', '.join(supported)}", model.architecture
        )
    options, geometry = Options.read(model.hf_config), geometry_of(model)
    options.check(model.hf_config, geometry)
    if model.runner_type != "generate":
        raise error(ValueError, "hf_overrides, hero: runner", "'generate'", model.runner_type)
    if KEEP_RATIO in (model.multimodal_config.mm_processor_kwargs or {}):
        expected = "an option of a request; for the engine, keep_ratio in hf_overrides"
        raise error(ValueError, KEEP_RATIO, expected, "one of the engine")
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        expected = "False, since it would run vLLM's own vision encoder"
        raise error(ValueError, "hf_overrides, hero: cudagraph_mm_encoder", expected, True)
    whole, kept = largest(geometry), largest(geometry, options.config)
    if scheduler.disable_chunked_mm_input and whole > scheduler.max_num_batched_tokens:
        expected = f"at least {whole}, the tokens of a whole image, where images are not divided among steps"
        raise error(ValueError, "max_num_batched_tokens", expected, scheduler.max_num_batched_tokens)
    shrunk = scheduler.max_num_encoder_input_tokens * kept // whole
    scheduler.max_num_encoder_input_tokens = max(whole, shrunk)
    scheduler.encoder_cache_size = max(whole, scheduler.encoder_cache_size)
