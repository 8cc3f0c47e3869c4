"""GlobalCom² (Liu et al. 2025, https://arxiv.org/abs/2501.05179).

    a_c[j]     = mean over heads of a^{l,h}_c[j]      l the last layer of the features (22 of 24)
    σ          = softmax over the tiles of s_i / 10,  s_i = Σ of a_thumbnail over the region of tile i
    r_i        = R · (1 + σ_i − 1/K), the keep ratio of tile i; R that of the thumbnail
    score_i[j] = ½ · a_i[j] + ½ · (a_thumbnail resized to the image's patches)_i[j]

The region of a tile is the part of the image that it shows, without padding; a patch of the thumbnail that
lies in several regions is divided among them by area. The thumbnail is resized bilinearly (pixel centres, no
antialiasing) to the grid without padding. The ratio applies to the tile's valid patches, as in the released
code: share_i ∝ valid_i · (1 + σ_i − 1/K).

Paper and released code round each tile's r_i·valid_i down. Here the tiles' total min(⌊R·K·P⌋, Σ valid) is
divided completely by these shares; ``allocation="floor"`` loses what is left over. The released code also
ignores padding in s_i, takes a from the encoder's last layer, and scales both halves of a score to unit
length over the tile before it adds them; here they are added as in the paper. Newlines stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import PATCHES, Policy, Rows, Scored

__all__ = ["GlobalCom2"]

TEMPERATURE = 10.0


@dataclass(frozen=True)
class GlobalCom2(Policy):
    """GlobalCom² (arXiv 2501.05179): tile budgets and patches by the thumbnail's attention and their own.

    It has no parameters: ``hero.attach(model, processor, policy="globalcom2")``.
    """

    name = "globalcom2"
    summary = "tile budgets and patches by the thumbnail's attention and their own (arXiv 2501.05179)"
    requires_cls = True
    requires_thumbnail = True

    def rows(self, depth, feature_layer):
        return {PATCHES: Rows.mean([feature_layer], [feature_layer])}

    def constants(self, layouts):
        from .. import signals

        return {"regions": signals.regions_of(layouts), "resize": signals.resize_of(layouts)}

    def score(self, observed):
        from hero_kernels import TileSignal

        from .. import signals

        scores, places = observed.attention[PATCHES].scores, observed.places
        sums = signals.region_sums(scores, places, observed.constants["regions"])
        excess = signals.tile_softmax(sums / TEMPERATURE, places, -1.0)
        signal = TileSignal(observed.valid.sum(1) * (1.0 + excess), 1.0)
        resized = signals.resized_thumbnails(scores, places, observed.constants["resize"])
        return Scored(0.5 * scores + 0.5 * resized, (signal,))
