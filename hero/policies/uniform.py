"""Equal budgets, patches by CLS attention: what HERO's choice of layers does without its tile signals.

    score_c[j] as HERO has it,  share_i = 1/K

Ours, for comparison; the counts are HERO's.
"""

from __future__ import annotations

from . import SCORES, Needs, Policy, Scored, equal_shares
from .hero import configured_map

__all__ = ["POLICY"]


class Uniform(Policy):
    def maps(self, config, depth, feature_layer):
        return {SCORES: configured_map(config, depth)}

    def needs(self, config, with_relevance):
        return Needs(second_softmax=config.second_softmax)

    def score(self, seen):
        return Scored(seen.scores, (equal_shares(seen.valid),), seen.ranks)


POLICY = Uniform()
