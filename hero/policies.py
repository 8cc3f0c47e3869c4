"""Policies: from what the encoder saw to patch scores and tile signals. Later stages are the same for all.

A policy is a function of :class:`Seen`; the names and one-line descriptions stand in ``config.POLICIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hero_kernels import TileSignal

from . import scoring
from .config import HeroConfig
from .layout import ImageLayout

__all__ = ["FUNCTIONS", "Scored", "Seen"]


@dataclass(frozen=True)
class Seen:
    """What a policy may look at.

    Attributes:
        scores: ``[T, P]`` fp32 CLS attention, by tile layers for tiles, thumbnail layers for thumbnails.
        entropy: ``[T]`` fp32, of the scores over the valid patches.
        ranks: ``[T, P]`` int16, the order of the scores.
        valid: ``[T, P]`` bool.
        cls: ``[T, C]`` the encoder's last layer at CLS, if a signal needs it.
        layouts: the images of the batch.
        config: the configuration.
        relevance: gives the cosines ``[T]`` of tile and question when called; ``None`` without a
            relevance model.
    """

    scores: Tensor
    entropy: Tensor
    ranks: Tensor
    valid: Tensor
    cls: Tensor | None
    layouts: Sequence[ImageLayout]
    config: HeroConfig
    relevance: Callable[[], Tensor] | None


@dataclass(frozen=True)
class Scored:
    """What a policy decides.

    Attributes:
        scores: ``[T, P]`` fp32, patch scores.
        signals: what shares each image's tokens among its tiles.
        ranks: ``[T, P]`` int16, the order of the scores, where the policy left that as it was.
    """

    scores: Tensor
    signals: tuple[TileSignal, ...]
    ranks: Tensor | None = None


def _hero(seen: Seen) -> Scored:
    """HERO (arXiv 2509.13067): density, saliency, relevance and entropy, weighted."""
    config = seen.config
    weights = config.signal_weights(with_relevance=seen.relevance is not None)
    if seen.layouts[0].thumbnail == "none":  # nothing to compare with: concentration stands in
        weights = weights._replace(saliency=0.0, entropy=weights.entropy + weights.saliency)
    signals = []
    if weights.density:
        signals.append(TileSignal(seen.valid.float().mean(1), weights.density))
    if weights.saliency:
        cosine = scoring.saliency(seen.cls, seen.layouts)
        signals.append(TileSignal(cosine, weights.saliency, config.temperature_cls))
    if weights.relevance:
        signals.append(TileSignal(seen.relevance(), weights.relevance, config.temperature_clip))
    if weights.entropy:
        signals.append(TileSignal(scoring.concentration(seen.entropy, seen.valid), weights.entropy))
    return Scored(seen.scores, tuple(signals), seen.ranks)


def _uniform(seen: Seen) -> Scored:
    """Equal budgets; patches by CLS attention."""
    return Scored(seen.scores, (TileSignal(torch.ones_like(seen.scores[:, 0]), 1.0),), seen.ranks)


def _random(seen: Seen) -> Scored:
    """Equal budgets; patches at random, from a fixed seed for every image, whatever its batch."""
    parts = []
    for layout in seen.layouts:
        generator = torch.Generator().manual_seed(0)
        parts.append(torch.rand((layout.crops, layout.patches), generator=generator))
    scores = torch.cat(parts).to(seen.scores.device)
    return Scored(scores, (TileSignal(torch.ones_like(scores[:, 0]), 1.0),))


FUNCTIONS: dict[str, Callable[[Seen], Scored]] = {"hero": _hero, "uniform": _uniform, "random": _random}
