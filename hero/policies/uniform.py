"""Equal budgets, patches by CLS attention: HERO's choice of layers without its tile signals.

    score_c[j] as in HERO,  share_i = 1/K (of blocks: in proportion to their tokens)

Ours, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import PATCHES, LayerPolicy, Scored

__all__ = ["Uniform"]


@dataclass(frozen=True)
class Uniform(LayerPolicy):
    """Equal tile budgets, patches by CLS attention of HERO's layers (ours, for comparison).

    Example: ``hero.attach(model, processor, policy="uniform", tile_layers=(0.5,))``.

    Args:
        tile_layers, thumbnail_layers, second_softmax: as in :class:`LayerPolicy`.
    """

    name = "uniform"
    summary = "equal tile budgets; patches by CLS attention"

    def score(self, observed):
        from .. import signals

        patches = observed.attention[PATCHES]
        shares = signals.equal_shares(observed.valid, observed.layouts)
        return Scored(patches.scores, (shares,), observed.block_budgets)
