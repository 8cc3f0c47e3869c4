"""hero makes high-resolution vision-language models fast by dropping visual tokens, without training.

Most users need only ``hero.attach(model, processor)``; see the README. Torch and transformers are imported on
first use: counting tokens needs neither.
"""

import importlib
from typing import TYPE_CHECKING

from . import policies
from ._version import __version__
from .config import HeroConfig, count_tokens
from .layout import Geometry
from .policies import SignalWeights

if TYPE_CHECKING:  # type checkers do not see what __getattr__ imports on first use
    from .encoder import HeroVisionEncoder
    from .handle import Handle, attach, detach
    from .picture import visualize
    from .relevance import ClipRelevance
    from .selection import Selection

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
    "detach",
    "count_tokens",
    "policies",
    "visualize",
]

_LAZY = {
    "ClipRelevance": "relevance",
    "Handle": "handle",
    "HeroVisionEncoder": "encoder",
    "Selection": "selection",
    "attach": "handle",
    "detach": "handle",
    "visualize": "picture",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
