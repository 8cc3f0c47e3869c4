"""Kinds of command line arguments that several benchmarks take."""

import argparse

__all__ = ["keep_ratios", "positive"]


def keep_ratios(text: str) -> tuple[float, ...]:
    """Keep ratios, in the order given."""
    values = tuple(float(word) for word in text.split(","))
    if not values or not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"expected ratios in (0, 1] with commas between, got {text!r}")
    return values


def positive(text: str) -> int:
    """A number of things."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, got {text!r}")
    return number
