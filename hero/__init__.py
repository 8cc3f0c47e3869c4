"""hero: high-resolution vision-language models made fast by dropping visual tokens, training-free.

``hero.attach(model, processor)`` is the whole of it for most users; see the README.
Torch and transformers are imported on first use: counting tokens needs neither.
"""

import importlib

from ._version import __version__
from .config import HeroConfig, SignalWeights
from .layout import Geometry, count_tokens

__all__ = [
    "ClipRelevance",
    "Geometry",
    "Handle",
    "HeroConfig",
    "HeroVisionEncoder",
    "Selection",
    "SignalWeights",
    "__version__",
    "attach",
    "count_tokens",
    "visualize",
]

_LAZY = {
    "ClipRelevance": "relevance",
    "Handle": "handle",
    "HeroVisionEncoder": "encoder",
    "Selection": "encoder",
    "attach": "handle",
    "visualize": "picture",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
