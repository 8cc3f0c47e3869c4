"""GlobalCom² (Liu et al. 2025, https://arxiv.org/abs/2501.05179).

    a_c[j]     = mean over heads of a^{l,h}_c[j]      l the last layer of the features (22 of 24)
    σ          = softmax over the tiles of s_i / 10,  s_i = Σ of a_thumbnail over the region of tile i
    r_i        = R · (1 + σ_i − 1/K), the keep ratio of tile i; R that of the thumbnail
    score_i[j] = ½ · a_i[j] + ½ · (a_thumbnail resized to the image's patches)_i[j]

A tile's region is what it shows of the image, padding left out; a patch of the thumbnail that straddles
regions is divided among them by area. The thumbnail is resized bilinearly (pixel centres, no antialiasing) to
the un-padded grid, which shows the same picture. The ratio is one of the tile's valid patches, as in the
released code: share_i ∝ valid_i · (1 + σ_i − 1/K).

Paper and released code floor each tile's ⌊r_i·valid_i⌋. Here the tiles' total min(⌊R·K·P⌋, Σ valid) is dealt
out by these shares to the last token; ``allocation="floor"`` loses what is left over. The released code also
ignores padding in s_i, takes a from the encoder's last layer, and scales both halves of a score to unit
length over the tile before adding them; here they are added as the paper has it. Newlines stay.
"""

from __future__ import annotations

from hero_kernels import TileSignal

from .. import scoring
from . import SCORES, Map, Policy, Scored

__all__ = ["POLICY"]

TEMPERATURE = 10.0


class GlobalCom2(Policy):
    by_cls = True
    by_thumbnail = True

    def maps(self, config, depth, feature_layer):
        return {SCORES: Map.mean([feature_layer], [feature_layer], ranked=False)}

    def constants(self, layouts):
        return {"regions": scoring.regions_of(layouts), "resize": scoring.resize_of(layouts)}

    def score(self, seen):
        sums = scoring.region_sums(seen.scores, seen.places, seen.constants["regions"])
        excess = scoring.tile_softmax(sums / TEMPERATURE, seen.places, -1.0)
        signal = TileSignal(seen.valid.sum(1) * (1.0 + excess), 1.0)
        resized = scoring.resized_thumbnails(seen.scores, seen.places, seen.constants["resize"])
        return Scored(0.5 * seen.scores + 0.5 * resized, (signal,))


POLICY = GlobalCom2()
