"""HiRED (Arif et al. 2024, https://arxiv.org/abs/2408.10945).

    total      = ⌊R·(K+1)·P⌋, or keep_tokens;  thumbnail min(⌊total/2⌋, P), tiles the rest
    share_i    ∝ Σ over the thumbnail's patches in the region of tile i, Σ_h of a^{0,h}_thumbnail
    score_c[j] = Σ_h a^{l,h}_c[j]                     l the last layer of the features (22 of 24)

Sums over heads order as means do, and means are what is computed. A tile's region is what it shows of the
image, padding left out; a patch of the thumbnail that straddles regions is divided among them by area.

The paper floors each tile's part and caps it at P, and the rest is lost. Here it is dealt out to the last
token, tiles never above their valid patches, so the count follows from the size; ``allocation="floor"`` loses
it. With ``keep_tokens`` the thumbnail takes what the tiles cannot, as in every policy. The released code
counts the top patches in flat runs of the thumbnail's sequence in place of summing over regions, and drops
newlines; here regions are the paper's and newlines stay.
"""

from __future__ import annotations

from hero_kernels import TileSignal

from .. import scoring
from . import SCORES, Map, Policy, Scored

__all__ = ["POLICY"]


class HiRED(Policy):
    by_cls = True
    by_thumbnail = True

    def maps(self, config, depth, feature_layer):
        return {
            SCORES: Map.mean([feature_layer], [feature_layer]),
            "regions": Map.mean([0], [], ranked=False),
        }

    def constants(self, layouts):
        return {"regions": scoring.regions_of(layouts)}

    def score(self, seen):
        sums = scoring.region_sums(seen.maps["regions"].scores, seen.places, seen.constants["regions"])
        return Scored(seen.scores, (TileSignal(sums, 1.0),), seen.ranks)


POLICY = HiRED()
