"""hero+: HERO with half of the tokens for the thumbnail, and concentration in the place of saliency. Ours.

    total      = ⌊R·(K+1)·P⌋, or keep_tokens;  thumbnail min(⌊total/2⌋, P), tiles the rest, as HiRED has it
    c_i        = 1 − H(p_i) / ln(valid_i)     concentration of the tile's patch scores (docs/method.md, 2)
    r_i        = softmax_i(cos(E_img(tile_i), E_txt(question)) / temperature_clip)
    share_i    ∝ c_i · (r_i + β/K)            c_i alone without a relevance model

What only the whole picture tells, such as a count, stands in the thumbnail. A tile that holds objects
concentrates the attention of its CLS token, one without any spreads it; the question decides among tiles that
hold objects, and where it favours none, each keeps the share of its objects. Patch scores are HERO's. What it
gains, what it costs, and what was tried and lost: docs/quality.md.
"""

from __future__ import annotations

from hero_kernels import TileSignal

from .. import scoring
from . import SCORES, Needs, Policy, Scored
from .hero import configured_map

__all__ = ["BETA", "POLICY"]

BETA = 2.0  # what the question leaves to all tiles alike: a wrong one then costs about what equal budgets do


class HeroPlus(Policy):
    def maps(self, config, depth, feature_layer):
        return {SCORES: configured_map(config, depth)}

    def needs(self, config, with_relevance):
        return Needs(relevance=with_relevance, second_softmax=config.second_softmax)

    def score(self, seen):
        share = scoring.concentration(seen.entropy, seen.valid)
        if seen.relevance is not None:
            cosine = seen.relevance() / seen.config.temperature_clip
            share = share * scoring.tile_softmax(cosine, seen.places, BETA)
        return Scored(seen.scores, (TileSignal(share, 1.0),), seen.ranks)


POLICY = HeroPlus()
