"""Options of the ``hero`` command that stand for arguments."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from .policies import POLICIES

__all__ = ["list_of", "options_named", "policy_name"]

# What a person types for an argument of HeroConfig or attach.
OPTIONS = {
    "keep_ratio": "--keep",
    "keep_tokens": "--tokens",
    "policy": "--policy",
    "alpha": "--alpha",
    "relevance": "question, --clip",
    **dict.fromkeys(("model", "pretrained", "vision_tower", "processor", "tokenizer"), "--model"),
}


@contextlib.contextmanager
def options_named():
    """Errors begin with the option of the command line in place of the argument."""
    try:
        yield
    except (TypeError, ValueError) as problem:
        argument, colon, message = str(problem).partition(":")
        raise ValueError(f"{OPTIONS.get(argument, argument)}{colon}{message}") from problem


def policy_name(name: str) -> str:
    """A policy's name, or ``module:Class``, where the module may also be in the current folder."""
    if ":" in name:
        if "" not in sys.path:
            sys.path.append("")
    elif name not in POLICIES:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(POLICIES)} or module:Class, got {name!r}"
        )
    return name


def list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
    """The type of an option with commas between its values."""

    def parse(text: str) -> tuple:
        try:
            return tuple(map(kind, text.split(",")))
        except ValueError as problem:
            raise argparse.ArgumentTypeError(
                f"expected numbers with commas between, got {text!r}"
            ) from problem

    return parse
