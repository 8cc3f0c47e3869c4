"""DivPrune (Alvar et al. 2025, https://arxiv.org/abs/2503.02175).

    d(i, j)  = 1 − cos(x_i, x_j)
    first    the patch farthest from its nearest neighbour
    then     argmax_i min over those chosen of d(i, j), again and again

As published, all tokens of an image are one pool, without padding. The released code measures projected
features, lets newlines compete, and rounds R times the number of tokens, newlines among them. Here x are the
features before the projector, newlines stay, and as many patches are kept as of other policies. Ties go to
the lower index. ``pool="crop"`` chooses in each crop with equal tile budgets, which is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from .coverage import CoveragePolicy

__all__ = ["DivPrune"]


@dataclass(frozen=True)
class DivPrune(CoveragePolicy):
    """DivPrune (arXiv 2503.02175): the patches that are farthest apart, of the whole image.

    Example: ``hero.attach(model, processor, policy="divprune", pool="crop")``.

    Args:
        pool: as in :class:`CoveragePolicy`.
    """

    name = "divprune"
    summary = "patches that are farthest apart, of the whole image (arXiv 2503.02175)"
    scored_by = "kept"
    rule = "max_min"

    pool: str = "image"

    def rows(self, depth, feature_layer):
        return {}
