"""``hero_llava_next`` for lmms-eval, which finds it by the entry point in setup.py; see docs/evaluation.md.

lmms-eval loads this module in every run, whichever model is used, while its own package ``models`` is still
being imported. So this module must not import anything else.
"""

from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["manifest"]


def manifest() -> ModelManifest:
    """The model's name and class, for lmms-eval's registry."""
    return ModelManifest("hero_llava_next", chat_class_path="hero.lmms_eval.model.HeroLlavaNext")
