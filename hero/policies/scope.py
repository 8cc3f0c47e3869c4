"""SCOPE (Deng et al. 2025, https://arxiv.org/abs/2510.24214).

    a_i      = mean over heads of a^{l,h}[i]      l the last layer of the features (22 of 24), CLS attention
    gain_i   = Σ_j max(0, cos(x_i, x_j) − max(0, max over those chosen of cos(x_c, x_j)))
    chosen   argmax_i a_i^α · gain_i, again and again

As published, every crop keeps the same number, the thumbnail like a tile, α is 1, and x are the features
before the projector. The released code sums over heads, which chooses the same, rounds the number of a crop
down, lets padding compete and be covered, and drops newlines between the rows of tiles. Here the total of the
tiles is divided equally and completely, with at most the valid patches of a tile, only valid patches compete
and are covered, and newlines stay. ``pool="image"`` chooses from the whole image, which is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._checks import check_positive
from .base import PATCHES, Rows
from .coverage import CoveragePolicy

__all__ = ["Scope"]


@dataclass(frozen=True)
class Scope(CoveragePolicy):
    """SCOPE (arXiv 2510.24214): patches that cover the others, weighed by CLS attention.

    Example: ``hero.attach(model, processor, policy="scope")``.

    Args:
        pool: as in :class:`CoveragePolicy`.
        alpha: exponent of attention, > 0.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or out of range, by name.
    """

    name = "scope"
    summary = "patches that cover the others, weighed by CLS attention (arXiv 2510.24214)"
    rule = "coverage"
    requires_cls = True

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", check_positive("alpha", self.alpha))

    def rows(self, depth, feature_layer):
        return {PATCHES: Rows.mean([feature_layer], [feature_layer])}

    def quality(self, observed):
        return observed.attention[PATCHES].scores ** self.alpha
