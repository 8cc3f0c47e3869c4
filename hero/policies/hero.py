"""HERO (Li et al. 2025, https://arxiv.org/abs/2509.13067).

    score_c[j] = mean over L(c), mean over heads of a^{l,h}_c[j]     L: thumbnail_layers or tile_layers
    share_i    = Σ_s w_s · signal_s,i                                density, saliency, relevance, entropy

The thumbnail keeps ⌊R·P⌋ patches, the tiles together min(⌊R·K·P⌋, Σ valid), divided by their shares. The
released code applies a second softmax to each head (``second_softmax``) and loses what rounding and caps
leave over (``allocation="floor"``); docs/method.md lists every difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .._checks import check_positive, check_real, error
from .base import PATCHES, LayerPolicy, Needs, Scored

__all__ = ["Hero", "SignalWeights"]

PAPER_DENSITY = 0.2  # the paper's weight of density; alpha divides the rest
DEFAULT_ALPHA = 0.5


class SignalWeights(NamedTuple):
    """Weights of the tile signals in a tile's share, >= 0; only their proportions matter."""

    density: float = 0.0
    saliency: float = 0.0
    relevance: float = 0.0
    entropy: float = 0.0


@dataclass(frozen=True)
class Hero(LayerPolicy):
    """HERO (arXiv 2509.13067): tile budgets by density, saliency and relevance; patches by CLS attention.

    Example: ``hero.attach(model, processor, policy=hero.policies.Hero(alpha=0.7, temperature_cls=0.2))``.

    Args:
        tile_layers, thumbnail_layers, second_softmax: as in :class:`LayerPolicy`.
        weights: weights of the tile signals, a mapping or :class:`SignalWeights`. ``None`` is the paper's
            mix: density 0.2, saliency 0.8·alpha, relevance 0.8·(1 − alpha).
        alpha: weight of saliency against relevance in the paper's mix, in [0, 1]. ``None`` is 0.5 with a
            relevance model and 1 without.
        temperature_cls: softmax temperature of saliency, a cosine.
        temperature_clip: softmax temperature of relevance, a cosine.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or out of range, by name.
    """

    name = "hero"
    summary = "tile budgets by saliency, relevance and density; patches by CLS attention (arXiv 2509.13067)"

    weights: SignalWeights | None = None
    alpha: float | None = None
    temperature_cls: float = 0.1
    temperature_clip: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            if self.alpha is not None:
                raise ValueError(
                    f"weights, alpha: expected one of the two, got {self.weights!r} and {self.alpha!r}"
                )
            object.__setattr__(self, "weights", _weights(self.weights))
        if self.alpha is not None:
            alpha = check_real("alpha", "a number in [0, 1]", self.alpha)
            if not 0.0 <= alpha <= 1.0:
                raise error(ValueError, "alpha", "a number in [0, 1]", self.alpha)
            object.__setattr__(self, "alpha", alpha)
        for name in ("temperature_cls", "temperature_clip"):
            object.__setattr__(self, name, check_positive(name, getattr(self, name)))

    def signal_weights(self, with_relevance: bool) -> SignalWeights:
        """Weights of the tile signals, summing to 1.

        Raises:
            ValueError: relevance has a weight but ``with_relevance`` is false.
        """
        if self.weights is not None:
            weights = self.weights
        else:
            alpha = self.alpha if self.alpha is not None else DEFAULT_ALPHA if with_relevance else 1.0
            rest = 1.0 - PAPER_DENSITY
            weights = SignalWeights(PAPER_DENSITY, rest * alpha, rest * (1.0 - alpha))
        if weights.relevance > 0 and not with_relevance:
            raise ValueError(
                "relevance: expected a hero.ClipRelevance, since the policy gives relevance "
                f"{weights.relevance:g} of the weight, got None"
            )
        whole = sum(weights)
        return SignalWeights(*(weight / whole for weight in weights))

    def needs(self, with_relevance):
        weights = self.signal_weights(with_relevance)
        return Needs(
            cls=weights.saliency > 0,
            relevance=weights.relevance > 0,
            second_softmax=self.second_softmax,
        )

    def constants(self, layouts):
        from .. import signals

        constants = {"density": signals.density_of(layouts)}
        return constants | ({"parts": signals.parts_of(layouts)} if layouts[0].is_whole else {})

    def score(self, observed):
        from hero_kernels import TileSignal

        from .. import signals

        patches = observed.attention[PATCHES]
        weights = self.signal_weights(observed.relevance is not None)
        parts = observed.constants.get("parts")
        if parts is None and observed.layouts[0].thumbnail == "none":  # saliency compares with it
            weights = weights._replace(saliency=0.0, entropy=weights.entropy + weights.saliency)
        found = []
        if weights.density:
            found.append(TileSignal(observed.constants["density"], weights.density))
        if weights.saliency:
            cosine = signals.saliency(observed.cls, observed.places, parts)
            found.append(TileSignal(cosine, weights.saliency, self.temperature_cls))
        if weights.relevance:
            found.append(TileSignal(observed.relevance(), weights.relevance, self.temperature_clip))
        if weights.entropy:
            found.append(TileSignal(signals.concentration(patches.entropy, observed.valid), weights.entropy))
        return Scored(patches.scores, tuple(found))


def _weights(value: object) -> SignalWeights:
    expected = f"a mapping of {', '.join(SignalWeights._fields)} to numbers >= 0, not all zero"
    if isinstance(value, SignalWeights):
        value = value._asdict()
    if not isinstance(value, Mapping):
        raise error(TypeError, "weights", expected, value)
    if set(value) - set(SignalWeights._fields):
        raise error(ValueError, "weights", expected, dict(value))
    weights = SignalWeights(
        **{name: check_real(f"weights[{name!r}]", "a number >= 0", number) for name, number in value.items()}
    )
    if min(weights) < 0 or sum(weights) <= 0:
        raise error(ValueError, "weights", expected, dict(value))
    return weights
