"""What ``generate`` is given, when it runs on a shortened prompt: all of it sees the caller's own prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["as_called", "restored", "setting"]


def setting(model: nn.Module, kwargs: Mapping[str, Any], name: str) -> Any:
    """A parameter of generation as ``generate`` finds it."""
    places = (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None))
    return next((one for one in places if one is not None), getattr(model.generation_config, name, None))


def as_called(model: nn.Module, kwargs: dict, prompt: Tensor) -> None:
    """Let limits, criteria and processors mean and see the caller's own prompt."""
    length = kwargs["input_ids"].shape[1]
    for limit, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = setting(model, kwargs, limit)
        if value is not None and setting(model, kwargs, new) is None:
            kwargs[limit] = max(value - (prompt.shape[1] - length), 0)
    for name, kind in (("stopping_criteria", _Criterion), ("logits_processor", _Processor)):
        if kwargs.get(name):
            kwargs[name] = type(kwargs[name])([kind(one, prompt, length) for one in kwargs[name]])
    if kwargs.get("prefix_allowed_tokens_fn") is not None:
        allowed, rows = kwargs["prefix_allowed_tokens_fn"], 1
        if (setting(model, kwargs, "num_beams") or 1) == 1:  # then every sequence of a prompt has a number
            rows = setting(model, kwargs, "num_return_sequences") or 1
        kwargs["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat([prompt[row // rows].to(ids), ids[length:]])
        )
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _Streamer(kwargs["streamer"], prompt)


def restored(prompt: Tensor, length: int, ids: Tensor) -> Tensor:
    """A shortened prompt of a length and its answer, with the caller's own prompt before the answer."""
    repeats = ids.shape[0] // prompt.shape[0]
    return torch.cat([prompt.repeat_interleave(repeats, dim=0).to(ids), ids[:, length:]], dim=1)


class _Seen:
    """Something of the caller's that must see the caller's own prompt."""

    def __init__(self, wrapped: Any, prompt: Tensor, length: int = 0):
        self._wrapped, self._prompt, self._length = wrapped, prompt, length

    def __getattr__(self, name: str):
        return getattr(self._wrapped, name)


class _Criterion(_Seen):
    def __call__(self, ids: Tensor, scores, **kwargs):
        return self._wrapped(restored(self._prompt, self._length, ids), scores, **kwargs)


class _Processor(_Seen):
    def __call__(self, ids: Tensor, scores):
        return self._wrapped(restored(self._prompt, self._length, ids), scores)


class _Streamer(_Seen):
    def put(self, value: Tensor) -> None:
        """Generate puts the prompt first, then token after token."""
        self._wrapped.put(value if self._prompt is None else self._prompt.to(value))
        self._prompt = None
