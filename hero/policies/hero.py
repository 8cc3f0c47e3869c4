"""HERO (Li et al. 2025, https://arxiv.org/abs/2509.13067).

    score_c[j] = mean over L(c), mean over heads of a^{l,h}_c[j]     L: thumbnail_layers or tile_layers
    share_i    = Σ_s w_s · signal_s,i                                density, saliency, relevance, entropy

Thumbnail ⌊R·P⌋ patches, tiles together min(⌊R·K·P⌋, Σ valid) by their shares. The released code applies a
second softmax to each head (``second_softmax``) and loses what floors and caps leave over
(``allocation="floor"``); see docs/method.md for every difference.
"""

from __future__ import annotations

from hero_kernels import TileSignal

from .. import scoring
from ..config import resolve_layers
from . import SCORES, Map, Needs, Policy, Scored

__all__ = ["POLICY", "configured_map"]


def configured_map(config, depth: int) -> Map:
    """The map of ``thumbnail_layers`` and ``tile_layers``."""
    tiles = resolve_layers("tile_layers", config.tile_layers, depth)
    return Map.mean(resolve_layers("thumbnail_layers", config.thumbnail_layers, depth), tiles)


class Hero(Policy):
    def maps(self, config, depth, feature_layer):
        return {SCORES: configured_map(config, depth)}

    def needs(self, config, with_relevance):
        weights = config.signal_weights(with_relevance=with_relevance)
        return Needs(
            cls=weights.saliency > 0,
            relevance=weights.relevance > 0,
            second_softmax=config.second_softmax,
        )

    def constants(self, layouts):
        return {"density": scoring.density_of(layouts)}

    def score(self, seen):
        config = seen.config
        weights = config.signal_weights(with_relevance=seen.relevance is not None)
        if seen.layouts[0].thumbnail == "none":  # nothing to compare with: concentration stands in
            weights = weights._replace(saliency=0.0, entropy=weights.entropy + weights.saliency)
        signals = []
        if weights.density:
            signals.append(TileSignal(seen.constants["density"], weights.density))
        if weights.saliency:
            cosine = scoring.saliency(seen.cls, seen.places)
            signals.append(TileSignal(cosine, weights.saliency, config.temperature_cls))
        if weights.relevance:
            signals.append(TileSignal(seen.relevance(), weights.relevance, config.temperature_clip))
        if weights.entropy:
            signals.append(TileSignal(scoring.concentration(seen.entropy, seen.valid), weights.entropy))
        return Scored(seen.scores, tuple(signals), seen.ranks)


POLICY = Hero()
