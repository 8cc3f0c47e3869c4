"""FasterVLM (Zhang et al. 2024, https://arxiv.org/abs/2412.01818).

    score_c[j] = mean over heads of a^{l,h}_c[j]      l the last layer of the features (22 of 24)
    every crop keeps the share R of its patches, the thumbnail like a tile

Paper and released code floor R·P for each crop by itself, and tiles with fewer valid patches keep fewer. Here
the tiles' total min(⌊R·K·P⌋, Σ valid) is dealt out equally and to the last token, tiles never above
their valid patches; ``allocation="floor"`` loses what is left over, as theirs does. Newlines stay.
"""

from __future__ import annotations

from . import SCORES, Map, Policy, Scored, equal_shares

__all__ = ["POLICY"]


class FasterVLM(Policy):
    by_cls = True

    def maps(self, config, depth, feature_layer):
        return {SCORES: Map.mean([feature_layer], [feature_layer])}

    def score(self, seen):
        return Scored(seen.scores, (equal_shares(seen.valid),), seen.ranks)


POLICY = FasterVLM()
