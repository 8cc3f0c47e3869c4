"""``hero_llava_next`` for lmms-eval, which finds it by the entry point in setup.py; see docs/evaluation.md.

lmms-eval loads this module in every run, whatever model is asked for, while its own ``models`` is half
imported: nothing else may be imported here.
"""

from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["manifest"]


def manifest() -> ModelManifest:
    """What lmms-eval needs to know to load the model by its name."""
    return ModelManifest("hero_llava_next", chat_class_path="hero.lmms_eval.model.HeroLlavaNext")
