"""Argument checks: each error names the argument, what was expected and what was given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

__all__ = ["check_choice", "check_number", "check_tensor", "describe"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def describe(value: object) -> str:
    """``value`` in a few words, for error messages."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def _shape(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> Tensor:
    """Check rank, the sizes given as integers, dtype and device of a tensor argument.

    Strings in ``shape`` name free dimensions in the message.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another shape, or on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {_shape(shape)}, got {describe(value)}")
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {describe(value)}")
    fits = value.dim() == len(shape) and all(
        not isinstance(size, int) or size == actual for size, actual in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected shape {_shape(shape)}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {describe(value)}")
    return value


def check_number(name: str, value: object, *, positive: bool = False, low: float | None = None) -> float:
    """Check a finite real number; ``positive`` excludes zero, ``low`` is a lower bound.

    Raises:
        TypeError: not a real number, or a bool.
        ValueError: NaN, infinite, or out of range.
    """
    expected = "a finite number" + (" > 0" if positive else "" if low is None else f" >= {low:g}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    number = float(value)
    if not math.isfinite(number) or (positive and number <= 0) or (low is not None and number < low):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Check that ``value`` is one of ``choices``.

    Raises:
        TypeError: not a string.
        ValueError: a string that is not one of them.
    """
    expected = "one of " + ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return value
