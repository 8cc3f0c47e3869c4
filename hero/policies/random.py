"""Equal budgets, patches at random: the baseline that every policy has to beat.

    score_c[j] uniform in [0, 1) from a fixed seed,  share_i = 1/K

Images of the same layout keep the same patches, on every run and in every batch. Ours, for comparison. It
reads no attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Policy, Scored

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(Policy):
    """Equal tile budgets, patches at random, the same ones on every run (ours, for comparison).

    It has no parameters: ``hero.attach(model, processor, policy="random")``.
    """

    name = "random"
    summary = "equal tile budgets; patches at random, the same ones on every run"
    scored_by = "random"

    def rows(self, depth, feature_layer):
        return {}

    def constants(self, layouts):
        import torch

        parts = []
        for layout in layouts:
            generator = torch.Generator().manual_seed(0)
            parts.append(torch.rand((layout.crops, layout.patches), generator=generator))
        return {"scores": torch.cat(parts)}

    def score(self, observed):
        from .. import signals

        shares = signals.equal_shares(observed.valid, observed.layouts)
        return Scored(observed.constants["scores"], (shares,), observed.block_budgets)
