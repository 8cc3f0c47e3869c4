"""CDPruner (Zhang et al. 2025, https://arxiv.org/abs/2506.10967).

    r_i      = −cos(patch i, question), scaled to [0, 1] over the valid patches of the image
    L        = diag(r) · S · diag(r),  S_ij = cos(x_i, x_j)
    chosen   greedy maximum of det(L over the chosen): the largest conditional variance, again and again

The sign is that of the released code: in CLIP, patches that show the question's object are less similar to it
than others. As published, every crop keeps the same number, the thumbnail like a tile. The released code
takes S from projected features, and r from CLIP's projection of the features' layer, scaled over all crops of
a call, plus 1e-6 of the range's inverse; padding competes and stays, newlines are dropped; of a question too
long for CLIP the windows count alike. Here x are the features before the projector, r comes from CLIP's last
layer and is scaled over each image, only valid patches compete, newlines stay, and windows count by length.
The tiles' total is divided equally and completely, with at most the valid patches of a tile.
``pool="image"`` chooses from the whole image, which is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._checks import error
from .base import Needs
from .coverage import CoveragePolicy

__all__ = ["CDPruner"]


@dataclass(frozen=True)
class CDPruner(CoveragePolicy):
    """CDPruner (arXiv 2506.10967): patches that differ, weighed by their relevance to the question.

    Example: ``hero.attach(model, processor, policy="cdpruner", relevance=relevance)``.

    Args:
        pool: as in :class:`CoveragePolicy`.
    """

    name = "cdpruner"
    summary = "patches that differ, weighed by relevance to the question (arXiv 2506.10967)"
    scored_by = "relevance"
    rule = "dpp"

    def rows(self, depth, feature_layer):
        return {}

    def needs(self, with_relevance):
        if not with_relevance:
            raise error(ValueError, "relevance", f"a hero.ClipRelevance for policy {self.name!r}", None)
        return Needs(patch_relevance=True)

    def quality(self, observed):
        from .. import signals

        return signals.scaled(-observed.patch_relevance(), observed.valid, observed.places)
