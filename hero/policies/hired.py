"""HiRED (Arif et al. 2024, https://arxiv.org/abs/2408.10945).

    total      = ⌊R·(K+1)·P⌋, or keep_tokens;  thumbnail min(⌊total/2⌋, P), tiles the rest
    share_i    ∝ Σ over the thumbnail's patches in the region of tile i, Σ_h of a^{0,h}_thumbnail
    score_c[j] = Σ_h a^{l,h}_c[j]                     l the last layer of the features (22 of 24)

Means over heads are computed instead of sums, which order patches alike. The region of a tile is the part of
the image that it shows, without padding; a patch of the thumbnail that lies in several regions is divided
among them by area.

The paper rounds each tile's part down, caps it at P and loses the rest. Here the tiles' tokens are divided
completely, with at most the valid patches of a tile, so the count follows from the image size;
``allocation="floor"`` loses the rest. With ``keep_tokens`` the thumbnail takes what the tiles cannot, as in
every policy. The released code counts the top patches in flat runs of the thumbnail's sequence instead of
summing over regions, and drops newlines; here regions are the paper's and newlines stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._checks import count
from .base import PATCHES, Policy, Rows, Scored

__all__ = ["HiRED"]


@dataclass(frozen=True)
class HiRED(Policy):
    """HiRED (arXiv 2408.10945): half to the thumbnail; tile budgets by its attention to their regions.

    It has no parameters: ``hero.attach(model, processor, policy="hired")``.
    """

    name = "hired"
    summary = "half to the thumbnail; tile budgets by its attention to their regions (arXiv 2408.10945)"
    requires_cls = True
    requires_thumbnail = True

    def divide(self, keep_ratio, keep_tokens, thumbnail, tiles):
        total = count(keep_ratio, keep_tokens, thumbnail + tiles)
        first = min(total // 2 if tiles else total, thumbnail)
        return first, total - first

    def rows(self, depth, feature_layer):
        return {
            PATCHES: Rows.mean([feature_layer], [feature_layer]),
            "regions": Rows.mean([0], []),
        }

    def constants(self, layouts):
        from .. import signals

        return {"regions": signals.regions_of(layouts)}

    def score(self, observed):
        from hero_kernels import TileSignal

        from .. import signals

        patches = observed.attention[PATCHES]
        scores = observed.attention["regions"].scores
        sums = signals.region_sums(scores, observed.places, observed.constants["regions"])
        return Scored(patches.scores, (TileSignal(sums, 1.0),))
