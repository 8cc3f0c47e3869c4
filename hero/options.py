"""Options of the ``hero`` command that stand for arguments."""

from __future__ import annotations

import contextlib

__all__ = ["options_named"]

# What a person types for an argument of HeroConfig or attach.
OPTIONS = {
    "keep_ratio": "--keep",
    "keep_tokens": "--tokens",
    "policy": "--policy",
    "alpha": "--alpha",
    "relevance": "question, --clip",
    **dict.fromkeys(("model", "vision_tower", "processor", "tokenizer"), "--model"),
}


@contextlib.contextmanager
def options_named():
    """Errors begin with the option of the command line in place of the argument."""
    try:
        yield
    except (TypeError, ValueError) as problem:
        argument, colon, message = str(problem).partition(":")
        raise ValueError(f"{OPTIONS.get(argument, argument)}{colon}{message}") from problem
