"""Equal budgets, patches at random: the floor that every policy has to clear.

    score_c[j] uniform in [0, 1) from a fixed seed,  share_i = 1/K

The same patches for every image of the same layout, on every run and in every batch. Ours, for comparison;
the counts are HERO's. Nothing of the encoder is captured.
"""

from __future__ import annotations

import torch

from . import Policy, Scored, equal_shares

__all__ = ["POLICY"]


class Random(Policy):
    def maps(self, config, depth, feature_layer):
        return {}

    def constants(self, layouts):
        parts = []
        for layout in layouts:
            generator = torch.Generator().manual_seed(0)
            parts.append(torch.rand((layout.crops, layout.patches), generator=generator))
        return {"scores": torch.cat(parts)}

    def score(self, seen):
        return Scored(seen.constants["scores"], (equal_shares(seen.valid),))


POLICY = Random()
