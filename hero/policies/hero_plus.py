"""hero+: HERO with half of the tokens for the thumbnail, and concentration instead of saliency. Ours.

    total      = ⌊R·(K+1)·P⌋, or keep_tokens;  thumbnail min(⌊total/2⌋, P), tiles the rest, as in HiRED
    c_i        = 1 − H(p_i) / ln(valid_i)     concentration of the tile's patch scores (docs/method.md, 2)
    r_i        = softmax_i(cos(E_img(tile_i), E_txt(question)) / temperature_clip)
    share_i    ∝ c_i · (r_i + β/K)            c_i alone without a relevance model

Only the whole picture tells some things, such as a count, so the thumbnail gets more tokens. The CLS token of
a tile with objects attends to few patches, that of an empty tile to all alike. The question then chooses
among the tiles with objects; if it prefers none, each keeps the share of its objects. Patch scores are
HERO's. docs/quality.md has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._checks import check_positive
from .base import PATCHES, LayerPolicy, Needs, Scored, half_to_thumbnail

__all__ = ["BETA", "HeroPlus"]

BETA = 2.0  # the share that tiles get whatever the question; a wrong one then costs as much as equal budgets


@dataclass(frozen=True)
class HeroPlus(LayerPolicy):
    """hero+ (ours): half to the thumbnail; tile budgets by concentration and relevance; patches as HERO.

    Example: ``hero.attach(model, processor, policy="hero+", relevance=relevance)``.

    Args:
        tile_layers, thumbnail_layers, second_softmax: as in :class:`LayerPolicy`.
        temperature_clip: softmax temperature of relevance, a cosine.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or out of range, by name.
    """

    name = "hero+"
    summary = "half to the thumbnail; tile budgets by concentration and relevance; patches as hero (ours)"

    temperature_clip: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(
            self, "temperature_clip", check_positive("temperature_clip", self.temperature_clip)
        )

    def divide(self, keep_ratio, keep_tokens, thumbnail, tiles):
        return half_to_thumbnail(keep_ratio, keep_tokens, thumbnail, tiles)

    def needs(self, with_relevance):
        return Needs(relevance=with_relevance, second_softmax=self.second_softmax)

    def score(self, observed):
        from hero_kernels import TileSignal

        from .. import signals

        patches = observed.attention[PATCHES]
        share = signals.concentration(patches.entropy, observed.valid)
        if observed.relevance is not None:
            cosine = observed.relevance() / self.temperature_clip
            share = share * signals.tile_softmax(cosine, observed.places, BETA)
        return Scored(patches.scores, (TileSignal(share, 1.0),))
