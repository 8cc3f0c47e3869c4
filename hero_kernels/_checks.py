"""Argument checks: each error names the argument, what was expected and what was given.

Every call of an operation passes through them, before the GPU has work: messages are made for errors alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

__all__ = [
    "check_buffer",
    "check_choice",
    "check_flag",
    "check_integer",
    "check_number",
    "check_tensor",
    "describe",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
TINY, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


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
    """Check rank, the sizes given as integers, dtype, layout and device of a tensor argument.

    Strings in ``shape`` name free dimensions in the message.

    Raises:
        TypeError: not a tensor, not dense, or of another dtype.
        ValueError: of another shape, or on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {_shape(shape)}, got {describe(value)}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: expected a dense tensor, got a tensor of layout {kind}")
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {describe(value)}")
    sizes = value.shape
    if sizes != shape and not (
        len(sizes) == len(shape)
        and all([isinstance(size, str) or size == actual for size, actual in zip(shape, sizes, strict=True)])
    ):
        raise ValueError(f"{name}: expected shape {_shape(shape)}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {describe(value)}")
    return value


def check_number(name: str, value: object, *, positive: bool = False, low: float | None = None) -> float:
    """Check a real number; ``positive`` excludes zero, ``low`` is a lower bound.

    Raises:
        TypeError: not a real number, or a bool.
        ValueError: NaN, out of range, or neither 0 nor a normal number of fp32, in which kernels take it.
    """
    kind: type[Exception]
    if type(value) is float or (isinstance(value, Real) and not isinstance(value, bool)):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond float64
            number = math.inf
        fits = number == 0 or TINY <= abs(number) <= LARGEST
        if fits and not (positive and number <= 0) and (low is None or number >= low):
            return number
        kind, given = ValueError, repr(value)
    else:
        kind, given = TypeError, describe(value)
    bound = " > 0" if positive else "" if low is None else f" >= {low:g}"
    raise kind(f"{name}: expected a finite number{bound} in float32, got {given}")


def check_integer(name: str, value: object, *, low: int | None = None) -> int:
    """Check an integer, of any integer type but bool; ``low`` is a lower bound.

    Raises:
        TypeError: not an integer, or a bool.
        ValueError: out of range.
    """
    expected = "an integer" + ("" if low is None else f" >= {low}")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    if low is not None and value < low:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return int(value)


def check_flag(name: str, value: object) -> None:
    """Check a bool.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")


def check_buffer(name: str, value: object, shape: Sequence[int], device: torch.device) -> None:
    """Check an fp32 tensor that an operation adds to in place.

    The rules are those of PyTorch's in-place operations. A kernel writes past them, so they are checked here.

    Raises:
        TypeError, ValueError: as :func:`check_tensor`.
        ValueError: it requires a gradient, its elements share memory, or it is an inference tensor outside
            inference mode.
    """
    tensor = check_tensor(name, value, shape, (torch.float32,), device)
    if tensor.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got requires_grad=True")
    compiling = torch.compiler.is_compiling()  # it cannot trace what follows, and checks this itself
    if not compiling and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: expected no inference tensor outside inference mode, got {describe(tensor)}"
        )
    if tensor.is_contiguous():
        return
    steps = [pair for pair in zip(tensor.stride(), tensor.shape, strict=True) if pair[1] > 1]
    for stride, size in steps:  # not sorted, which cannot be compiled
        reach = sum((length - 1) * step for step, length in steps if step <= stride) - (size - 1) * stride
        if stride <= reach and tensor.numel():
            raise ValueError(
                f"{name}: expected elements that share no memory, got strides {tuple(tensor.stride())}"
            )


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Check that ``value`` is one of ``choices``.

    Raises:
        TypeError: not a string.
        ValueError: a string that is not one of them.
    """
    if isinstance(value, str) and value in choices:
        return value
    kind, given = (ValueError, repr(value)) if isinstance(value, str) else (TypeError, describe(value))
    raise kind(f"{name}: expected one of {', '.join(map(repr, choices))}, got {given}")
