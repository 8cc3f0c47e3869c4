"""FasterVLM (Zhang et al. 2024, https://arxiv.org/abs/2412.01818).

    score_c[j] = mean over heads of a^{l,h}_c[j]      l the last layer of the features (22 of 24)
    every crop keeps the share R of its patches, the thumbnail like a tile

Paper and released code round R·P down for each crop, and tiles with fewer valid patches keep fewer. Here the
tiles' total min(⌊R·K·P⌋, Σ valid) is divided equally and completely, with at most the valid patches of a
tile; ``allocation="floor"`` loses what is left over, as the released code does. Newlines stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import PATCHES, Policy, Rows, Scored

__all__ = ["FasterVLM"]


@dataclass(frozen=True)
class FasterVLM(Policy):
    """FasterVLM (arXiv 2412.01818): equal tile budgets, patches by CLS attention of the features' layer.

    It has no parameters: ``hero.attach(model, processor, policy="fastervlm")``.
    """

    name = "fastervlm"
    summary = "equal budgets; patches by CLS attention of the features' layer (arXiv 2412.01818)"
    requires_cls = True

    def rows(self, depth, feature_layer):
        return {PATCHES: Rows.mean([feature_layer], [feature_layer])}

    def score(self, observed):
        from .. import signals

        patches = observed.attention[PATCHES]
        return Scored(patches.scores, (signals.equal_shares(observed.valid),))
