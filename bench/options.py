"""Command line arguments that several benchmarks take."""

import argparse

import torch

from .timing import CLOCKS

__all__ = ["add_threads", "keep_ratios", "positive", "use_threads"]


def add_threads(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """``--threads`` and ``--clock``."""
    shown = default or "torch's own"
    parser.add_argument(
        "--threads", type=positive, default=default, help=f"threads of torch (default: {shown})"
    )
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="with --threads 1 alone: cpu")


def use_threads(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Set the threads asked for, if their clock can tell what they take."""
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu: expected --threads 1, since waiting threads count too")
    if options.threads:
        torch.set_num_threads(options.threads)


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
