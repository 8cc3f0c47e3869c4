"""Checks of arguments that every torch-free module shares. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

__all__ = [
    "check_choice",
    "check_flag",
    "check_integer",
    "check_layers",
    "check_positive",
    "check_ratio",
    "check_types",
    "check_real",
    "count",
    "error",
    "floor_ratio",
]


def error(kind: type[Exception], name: str, expected: str, value: object) -> Exception:
    """An exception that names the argument, what was expected and what was given, if that is short."""
    text = repr(value)
    if len(text) > 100 or "\n" in text:
        text = f"{type(value).__name__} {text.splitlines()[0][:60]}…"
    return kind(f"{name}: expected {expected}, got {text}")


def check_real(name: str, expected: str, value: object) -> float:
    """``value`` as a finite float.

    Raises:
        TypeError: not a number.
        ValueError: not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise error(TypeError, name, expected, value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise error(ValueError, name, expected, value)
    return number


def check_ratio(name: str, value: object) -> float:
    """``value`` as a float in (0, 1].

    Raises:
        TypeError, ValueError: anything else.
    """
    expected = "a number in (0, 1]"
    number = check_real(name, expected, value)
    if not 0.0 < number <= 1.0:
        raise error(ValueError, name, expected, value)
    return number


def check_positive(name: str, value: object) -> float:
    """``value`` as a finite float > 0.

    Raises:
        TypeError, ValueError: anything else.
    """
    expected = "a finite number > 0"
    number = check_real(name, expected, value)
    if number <= 0:
        raise error(ValueError, name, expected, value)
    return number


def check_integer(name: str, value: object, low: int = 1, high: int | None = None) -> int:
    """``value`` as an integer >= ``low``, and at most ``high``.

    Raises:
        TypeError, ValueError: anything else.
    """
    expected = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise error(TypeError, name, expected, value)
    number = int(value)
    if number < low or (high is not None and number > high):
        raise error(ValueError, name, expected, value)
    return number


def check_flag(name: str, value: object, *, expected: str = "a bool") -> bool:
    """``value`` as a bool.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise error(TypeError, name, expected, value)
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """``value`` as one of ``choices``.

    Raises:
        TypeError: not a string.
        ValueError: another string.
    """
    expected = "one of " + ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise error(TypeError, name, expected, value)
    if value not in choices:
        raise error(ValueError, name, expected, value)
    return value


def check_types(*arguments: tuple[str, object, type, str]) -> None:
    """Raise ``TypeError`` unless arguments (name, value, class, expected) are of their classes."""
    for name, value, kind, expected in arguments:
        if not isinstance(value, kind) and not (value is None and expected.endswith("None")):
            raise error(TypeError, name, expected, value)


def check_layers(name: str, value: object) -> tuple[int | float, ...]:
    """``value`` as layer indices (int) and fractions of depth (float in [0, 1]), at least one.

    Raises:
        TypeError, ValueError: anything else.
    """
    expected = "layer indices (int) or fractions of depth (float in [0, 1]), at least one"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise error(TypeError, name, expected, value)
    if not value:
        raise error(ValueError, name, expected, value)
    layers: list[int | float] = []
    for layer in value:
        if isinstance(layer, bool) or not isinstance(layer, Real):
            raise error(TypeError, name, expected, value)
        if isinstance(layer, Integral):
            layers.append(int(layer))
        elif 0.0 <= float(layer) <= 1.0:  # also false for NaN
            layers.append(float(layer))
        else:
            raise error(ValueError, name, expected, value)
    return tuple(layers)


def floor_ratio(value: float) -> int:
    """``floor(value + 1e-9)``: 0.29 · 100 is 29 although the product falls just short of it."""
    return math.floor(value + 1e-9)


def count(keep_ratio: float | None, keep_tokens: int | None, tokens: int) -> int:
    """``keep_tokens``, or the share ``keep_ratio`` of ``tokens``, rounded down; one of the two is given."""
    if keep_tokens is not None:
        return keep_tokens
    assert keep_ratio is not None
    return floor_ratio(keep_ratio * tokens)
