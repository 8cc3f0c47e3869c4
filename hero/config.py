"""Configuration: what to keep, and how to choose it. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

__all__ = ["ALLOCATIONS", "DEFAULT_KEEP_RATIO", "POLICIES", "HeroConfig", "SignalWeights", "resolve_layers"]

DEFAULT_KEEP_RATIO = 0.2
ALLOCATIONS = ("exact", "floor")
ATTENTIONS = ("native", "fused")
POLICIES = {
    "hero": "tile budgets by saliency, relevance and density; patches by CLS attention (arXiv 2509.13067)",
    "hero+": "half to the thumbnail; tile budgets by concentration and relevance; patches as hero (ours)",
    "hired": "half to the thumbnail; tile budgets by its attention to their regions (arXiv 2408.10945)",
    "fastervlm": "equal budgets; patches by CLS attention of the features' layer (arXiv 2412.01818)",
    "visionzip": "equal budgets; dominant patches and means of the rest by key (arXiv 2412.04467)",
    "globalcom2": "tile budgets and patches by the thumbnail's attention and their own (arXiv 2501.05179)",
    "uniform": "equal tile budgets; patches by CLS attention",
    "random": "equal tile budgets; patches at random, the same ones on every run",
}
PAPER_DENSITY = 0.2  # the paper's share of density in the mix; the rest is split by alpha
DEFAULT_ALPHA = 0.5


class SignalWeights(NamedTuple):
    """Weights of the tile signals in a tile's share, >= 0; only their proportions matter."""

    density: float = 0.0
    saliency: float = 0.0
    relevance: float = 0.0
    entropy: float = 0.0


def _error(kind: type[Exception], name: str, expected: str, value: object) -> Exception:
    return kind(f"{name}: expected {expected}, got {value!r}")


def _real(name: str, expected: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _error(TypeError, name, expected, value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _error(ValueError, name, expected, value)
    return number


def _positive(name: str, value: object) -> float:
    expected = "a finite number > 0"
    number = _real(name, expected, value)
    if number <= 0:
        raise _error(ValueError, name, expected, value)
    return number


def _choice(name: str, value: object, choices: Sequence[str]) -> None:
    expected = "one of " + ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise _error(TypeError, name, expected, value)
    if value not in choices:
        raise _error(ValueError, name, expected, value)


def _layers(name: str, value: object) -> tuple[int | float, ...]:
    expected = "layer indices (int) or fractions of depth (float in [0, 1]), at least one"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _error(TypeError, name, expected, value)
    if not value:
        raise _error(ValueError, name, expected, value)
    layers = []
    for layer in value:
        if isinstance(layer, bool) or not isinstance(layer, Real):
            raise _error(TypeError, name, expected, value)
        if isinstance(layer, Integral):
            layers.append(int(layer))
        elif 0.0 <= float(layer) <= 1.0:  # also false for NaN
            layers.append(float(layer))
        else:
            raise _error(ValueError, name, expected, value)
    return tuple(layers)


def _weights(value: object) -> SignalWeights:
    expected = f"a mapping of {', '.join(SignalWeights._fields)} to numbers >= 0, not all zero"
    if isinstance(value, SignalWeights):
        value = value._asdict()
    if not isinstance(value, Mapping):
        raise _error(TypeError, "weights", expected, value)
    if set(value) - set(SignalWeights._fields):
        raise _error(ValueError, "weights", expected, dict(value))
    weights = SignalWeights(
        **{name: _real(f"weights[{name!r}]", "a number >= 0", number) for name, number in value.items()}
    )
    if min(weights) < 0 or sum(weights) <= 0:
        raise _error(ValueError, "weights", expected, dict(value))
    return weights


@dataclass(frozen=True)
class HeroConfig:
    """What share of an image's patch tokens to keep, and how to choose them. Immutable and hashable.

    Args:
        keep_ratio: share R of patch tokens kept, in (0, 1]; 0.2 where neither this nor ``keep_tokens``
            is given. Of each image, ``floor(R·P)`` patches of the thumbnail and ``floor(R·K·P)`` of its K
            tiles together are kept (``"hired"`` and ``"hero+"`` give the thumbnail half), padding never;
            newline tokens are kept on top (docs/method.md, 3).
        keep_tokens: a number of patch tokens per image instead of a ratio.
        policy: a name in :data:`POLICIES` (docs/method.md, 6). ``tile_layers``, ``thumbnail_layers`` and
            ``second_softmax`` are read by ``"hero"``, ``"hero+"`` and ``"uniform"``; ``temperature_clip``
            and a relevance model by the first two; ``weights``, ``alpha`` and ``temperature_cls`` by
            ``"hero"`` alone. The published peers fix their layers, weights and temperatures themselves:
            there these fields have no effect. All others hold for all.
        tile_layers: encoder layers whose CLS attention scores the patches of tiles (paper: low to middle
            layers, which attend to objects). Integers are 0-based indices, negative from the end;
            floats in [0, 1] are fractions of depth, ``round(f · (depth − 1))``.
        thumbnail_layers: the same for the thumbnail (paper: deep layers, which attend to global tokens).
        weights: weights of the tile signals, a mapping or :class:`SignalWeights`. ``None`` is the
            paper's mix: density 0.2, saliency 0.8·alpha, relevance 0.8·(1 − alpha).
        alpha: share of saliency against relevance in the paper's mix, in [0, 1]. ``None`` is 0.5 with a
            relevance model and 1 without.
        temperature_cls: softmax temperature of saliency, a cosine.
        temperature_clip: softmax temperature of relevance, a cosine.
        allocation: ``"exact"`` keeps exactly as many tokens as the image's size determines;
            ``"floor"`` is the released rule, which loses a few to rounding and caps.
        attention: in the layers that score patches, ``"native"`` runs the encoder's own attention and
            computes its CLS rows beside it; ``"fused"`` runs attention that yields the rows, for encoders
            with CLS, without attention mask or dropout.
        second_softmax: a second softmax over the patches of each head, as the released code has it.
        encoder_keep: share of each tile's patches, in (0, 1] and not below ``keep_ratio``, that go on through
            the encoder after the last layer that scores tiles; the others are dropped there, and no tile can
            keep more. ``None`` drops none. It saves time, and changes what is kept and its features
            (docs/method.md, 7). For ``"hero"``, ``"hero+"`` and ``"uniform"``.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range, by name.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    policy: str = "hero"
    tile_layers: tuple[int | float, ...] = (0.2, 0.3, 0.4, 0.5)
    thumbnail_layers: tuple[int | float, ...] = (0.95, 1.0)
    weights: SignalWeights | None = None
    alpha: float | None = None
    temperature_cls: float = 0.1
    temperature_clip: float = 0.05
    allocation: str = "exact"
    attention: str = "native"
    second_softmax: bool = False
    encoder_keep: float | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.keep_ratio is not None and self.keep_tokens is not None:
            given = f"{self.keep_ratio!r} and {self.keep_tokens!r}"
            raise ValueError(f"keep_ratio, keep_tokens: expected one of the two, got {given}")
        if self.keep_tokens is not None:
            expected = "an integer >= 1"
            if isinstance(self.keep_tokens, bool) or not isinstance(self.keep_tokens, Integral):
                raise _error(TypeError, "keep_tokens", expected, self.keep_tokens)
            if self.keep_tokens < 1:
                raise _error(ValueError, "keep_tokens", expected, self.keep_tokens)
            put("keep_tokens", int(self.keep_tokens))
        else:
            expected = "a number in (0, 1]"
            ratio = _real(
                "keep_ratio", expected, DEFAULT_KEEP_RATIO if self.keep_ratio is None else self.keep_ratio
            )
            if not 0.0 < ratio <= 1.0:
                raise _error(ValueError, "keep_ratio", expected, self.keep_ratio)
            put("keep_ratio", ratio)
        _choice("policy", self.policy, tuple(POLICIES))
        put("tile_layers", _layers("tile_layers", self.tile_layers))
        put("thumbnail_layers", _layers("thumbnail_layers", self.thumbnail_layers))
        if self.weights is not None:
            if self.alpha is not None:
                raise ValueError(
                    f"weights, alpha: expected one of the two, got {self.weights!r} and {self.alpha!r}"
                )
            put("weights", _weights(self.weights))
        if self.alpha is not None:
            expected = "a number in [0, 1]"
            alpha = _real("alpha", expected, self.alpha)
            if not 0.0 <= alpha <= 1.0:
                raise _error(ValueError, "alpha", expected, self.alpha)
            put("alpha", alpha)
        put("temperature_cls", _positive("temperature_cls", self.temperature_cls))
        put("temperature_clip", _positive("temperature_clip", self.temperature_clip))
        _choice("allocation", self.allocation, ALLOCATIONS)
        _choice("attention", self.attention, ATTENTIONS)
        if not isinstance(self.second_softmax, bool):
            raise _error(TypeError, "second_softmax", "a bool", self.second_softmax)
        if self.encoder_keep is not None:
            expected = "a number in (0, 1], or None"
            share = _real("encoder_keep", expected, self.encoder_keep)
            if not 0.0 < share <= 1.0:
                raise _error(ValueError, "encoder_keep", expected, self.encoder_keep)
            if self.keep_ratio is not None and share < self.keep_ratio:
                expected = f"at least keep_ratio {self.keep_ratio:g}, or None"
                raise _error(ValueError, "encoder_keep", expected, self.encoder_keep)
            put("encoder_keep", share)

    def signal_weights(self, with_relevance: bool) -> SignalWeights:
        """Weights of the tile signals, summing to 1.

        Raises:
            ValueError: relevance has weight but ``with_relevance`` is false.
        """
        if self.weights is not None:
            weights = self.weights
        else:
            alpha = self.alpha if self.alpha is not None else DEFAULT_ALPHA if with_relevance else 1.0
            rest = 1.0 - PAPER_DENSITY
            weights = SignalWeights(PAPER_DENSITY, rest * alpha, rest * (1.0 - alpha))
        if weights.relevance > 0 and not with_relevance:
            raise ValueError(
                "relevance: expected a hero.ClipRelevance, since the config gives relevance "
                f"{weights.relevance:g} of the weight, got None"
            )
        whole = sum(weights)
        return SignalWeights(*(weight / whole for weight in weights))

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values, fit for JSON; :meth:`from_dict` reads it back."""
        values = dataclasses.asdict(self)
        values["tile_layers"] = list(self.tile_layers)
        values["thumbnail_layers"] = list(self.thumbnail_layers)
        values["weights"] = None if self.weights is None else self.weights._asdict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeroConfig:
        """The configuration that :meth:`to_dict` wrote.

        Raises:
            TypeError, ValueError: not a mapping, an unknown key, or a value out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise _error(TypeError, "values", "a mapping", values)
        unknown = sorted(set(values) - set(names), key=str)
        if unknown:
            raise _error(ValueError, "values", f"keys among {', '.join(names)}", unknown)
        return cls(**values)


def resolve_layers(name: str, layers: Sequence[int | float], depth: int) -> tuple[int, ...]:
    """0-based indices of ``layers`` in an encoder of ``depth`` layers, sorted, each once.

    Raises:
        ValueError: an index outside ``[-depth, depth)``.
    """
    resolved = set()
    for layer in layers:
        if isinstance(layer, float):
            resolved.add(int(layer * (depth - 1) + 0.5))
        elif -depth <= layer < depth:
            resolved.add(layer % depth)
        else:
            raise _error(
                ValueError, name, f"indices in [{-depth}, {depth}) for an encoder of {depth} layers", layer
            )
    return tuple(sorted(resolved))
