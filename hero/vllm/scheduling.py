"""How many images the scheduler lets the vision encoder see in one step."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import config as model_configs

__all__ = ["limit_encoder"]


def limit_encoder(architecture: str) -> None:
    """Check the options when an engine is configured, and limit the images of a step by what they cost.

    vLLM charges an image the tokens that the language model sees. Counted so, a step would admit 1/R times as
    many images as without hero, and each costs the vision encoder as much as before. So the budget of a step
    shrinks as the largest image does, but not below the tokens of a whole image, which a request may ask for.
    """
    hooks = model_configs.MODELS_CONFIG_MAP
    found = hooks.get(architecture, model_configs.VerifyAndUpdateConfig)
    if not issubclass(found, _Limited):
        hooks[architecture] = type("Limited", (_Limited, found), {})


class _Limited(model_configs.VerifyAndUpdateConfig):
    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        super().verify_and_update_config(vllm_config)
        if getattr(vllm_config.model_config.hf_config, "hero", None) is not None:
            _check_and_limit(vllm_config)


def _check_and_limit(vllm_config: Any) -> None:
    from .._checks import error
    from .geometry import geometry_of, largest
    from .options import KEEP_RATIO, Options

    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    options, geometry = Options.read(model.hf_config), geometry_of(model.hf_config)
    options.check(model.hf_config, geometry)
    if model.runner_type != "generate":
        raise error(ValueError, "hf_overrides, hero: runner", "'generate'", model.runner_type)
    if KEEP_RATIO in (model.multimodal_config.mm_processor_kwargs or {}):
        expected = "an option of a request; for the engine, keep_ratio in hf_overrides"
        raise error(ValueError, KEEP_RATIO, expected, "one of the engine")
    whole, kept = largest(geometry), largest(geometry, options.config)
    if scheduler.disable_chunked_mm_input and whole > scheduler.max_num_batched_tokens:
        expected = f"at least {whole}, the tokens of a whole image, where images are not divided among steps"
        raise error(ValueError, "max_num_batched_tokens", expected, scheduler.max_num_batched_tokens)
    shrunk = scheduler.max_num_encoder_input_tokens * kept // whole
    scheduler.max_num_encoder_input_tokens = max(whole, shrunk)
    scheduler.encoder_cache_size = max(whole, scheduler.encoder_cache_size)
