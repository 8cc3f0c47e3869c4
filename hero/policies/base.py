"""The interface of a policy, which decides how many tokens each crop keeps and which.

A policy names the attention rows and other tensors it reads (:meth:`Policy.rows`, :meth:`Policy.needs`) and
computes patch scores and tile signals from them (:meth:`Policy.score`). It may choose patches otherwise than
by their scores (:meth:`Policy.choose`), and replace features of kept patches (:meth:`Policy.replace`). How an
image's tokens are divided between thumbnail and tiles is plain arithmetic (:meth:`Policy.divide`).

Modules of policies import torch inside methods only, so that :func:`hero.count_tokens` works without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from .._checks import check_flag, check_layers, count, error

if TYPE_CHECKING:
    from torch import Tensor

    from hero_kernels import Finalized, Segments, TileBudgets, TileSignal

__all__ = [
    "PATCHES",
    "LayerPolicy",
    "Needs",
    "Observed",
    "Policy",
    "Pools",
    "Replacement",
    "Rows",
    "Scored",
]

PATCHES = "patches"  # the attention rows that most policies score patches by


class Rows(NamedTuple):
    """Attention rows to accumulate: ``{layer: weight}`` for thumbnails and for tiles.

    Attributes:
        thumbnail, tiles: weights by 0-based layer.
    """

    thumbnail: Mapping[int, float]
    tiles: Mapping[int, float]

    @classmethod
    def mean(cls, thumbnail: Sequence[int], tiles: Sequence[int]) -> Rows:
        """The mean over layers; an empty sequence reads no layer."""
        first, second = ({layer: 1.0 / len(layers) for layer in layers} for layers in (thumbnail, tiles))
        return cls(first, second)

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers, sorted."""
        return tuple(sorted({*self.thumbnail, *self.tiles}))


class Needs(NamedTuple):
    """What a policy reads besides attention rows.

    Attributes:
        cls: the CLS feature of the encoder's last layer.
        relevance: the relevance of each tile to the question; callers must then pass the question.
        patch_relevance: the relevance of each patch to the question; likewise.
        keys: the key of each patch in the features' last layer, averaged over heads.
        second_softmax: whether each head's row gets a second softmax over the patches.
    """

    cls: bool = False
    relevance: bool = False
    patch_relevance: bool = False
    keys: bool = False
    second_softmax: bool = False


class Pools(NamedTuple):
    """All patches of an image as one pool, for policies that choose from it.

    Attributes:
        cu_crops: ``[B + 1]`` int32, the crop with which each image begins.
        tokens: ``[B]`` int32, patches to keep of each image.
        max_crops: the most crops of an image.
    """

    cu_crops: Tensor
    tokens: Tensor
    max_crops: int


@dataclass(frozen=True)
class Observed:
    """What a policy may read; T crops of P patches.

    Attributes:
        features: ``[T, P, C]``, the features that the model uses, before the projector.
        attention: the policy's attention rows by name, finalised (:class:`hero_kernels.Finalized`: scores
            ``[T, P]`` fp32, entropy ``[T]`` fp32).
        valid: ``[T, P]`` bool, patches that are not padding.
        cls: ``[T, C]``, the CLS feature of the encoder's last layer, if the policy needs it.
        layouts: the :class:`hero.layout.ImageLayout` of each image.
        places: the :class:`hero.signals.Places` of the crops.
        segments: the images, as operations of :mod:`hero_kernels` take them.
        pools: the images as pools of patches.
        constants: what :meth:`Policy.constants` returned, on the device.
        block_budgets: ``[T]`` int32, budgets in proportion to the size of blocks, where these are the tiles.
        relevance: returns the cosine ``[T]`` of each tile and the question; ``None`` without a relevance
            model.
        patch_relevance: returns the cosine ``[T, P]`` of each patch and the question; likewise.
    """

    features: Tensor
    attention: Mapping[str, Finalized]
    valid: Tensor
    cls: Tensor | None
    layouts: Sequence[Any]
    places: Any
    segments: Segments
    pools: Pools
    constants: Mapping[str, Any] = field(default_factory=dict)
    relevance: Callable[[], Tensor] | None = None
    patch_relevance: Callable[[], Tensor] | None = None
    block_budgets: Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """What a policy decides.

    Attributes:
        scores: ``[T, P]`` fp32, patch scores.
        signals: the signals that divide each image's tile tokens among its tiles.
        budgets: ``[T]`` int32, the tokens of each crop; ``None`` if the signals decide.
        own: what :meth:`Policy.choose` reads besides, as the policy likes.
    """

    scores: Tensor
    signals: tuple[TileSignal, ...]
    budgets: Tensor | None = None
    own: Any = None


class Replacement(NamedTuple):
    """Features that replace those of kept patches.

    Attributes:
        ranks: ``[T, P]`` int16; in each crop the valid patches whose rank is below the budget are kept. There
            must be as many as the budget; their order does not matter.
        slots: ``[T, P]`` int64, which of the crop's values replaces the feature of a patch; −1 for none.
        values: ``[T, S, C]`` in the dtype of the features.
    """

    ranks: Tensor
    slots: Tensor
    values: Tensor


class Policy(ABC):
    """Which visual tokens to keep. Subclasses are frozen dataclasses whose fields are the parameters.

    Attributes:
        name: the name in :data:`hero.policies.POLICIES`; ``"module:Class"`` for classes that are not listed.
        summary: one line for help texts.
        scored_by: what its patch scores are, for pictures.
        requires_cls: whether the policy is defined by the attention of a CLS token.
        requires_thumbnail: whether the policy is defined by the attention of the thumbnail.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    scored_by: ClassVar[str] = "attention"
    requires_cls: ClassVar[bool] = False
    requires_thumbnail: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    def divide(
        self, keep_ratio: float | None, keep_tokens: int | None, thumbnail: int, tiles: int
    ) -> tuple[int, int]:
        """Tokens to keep of (the thumbnail, all tiles together) of an image with a thumbnail, before caps.

        By default both keep the same share of their tokens (docs/method.md, section 3).

        Args:
            keep_ratio, keep_tokens: a share or a number of the image's tokens; one of them is ``None``.
            thumbnail: P, tokens of the thumbnail.
            tiles: tokens of all tiles: K·P with their padding, or those of a resized grid.
        """
        if keep_tokens is None:
            return count(keep_ratio, None, thumbnail), count(keep_ratio, None, tiles)
        first = min(keep_tokens * thumbnail // (thumbnail + tiles), thumbnail)
        return first, keep_tokens - first

    @abstractmethod
    def rows(self, depth: int, feature_layer: int) -> dict[str, Rows]:
        """The attention rows it reads, by name; only these are computed.

        Args:
            depth: number of the encoder's layers.
            feature_layer: the last layer, 0-based, whose output is among the features: ``depth − 2`` for
                LLaVA, which takes hidden state −2.

        Raises:
            ValueError: a layer that the encoder does not have, by name.
        """

    def needs(self, with_relevance: bool) -> Needs:
        """What else it reads; nothing by default.

        Raises:
            ValueError: the policy needs relevance, and there is no relevance model.
        """
        return Needs()

    def constants(self, layouts: Sequence[Any]) -> Mapping[str, Any]:
        """CPU tensors, or named tuples of them, that follow from the layouts alone. Computed once a batch."""
        return {}

    @abstractmethod
    def score(self, observed: Observed) -> Scored:
        """Patch scores and tile signals."""

    def choose(self, features: Tensor, scored: Scored, budgets: TileBudgets, valid: Tensor) -> Tensor | None:
        """The patches to keep, ``[T, P]`` bool; ``None`` keeps those that score highest.

        Args:
            features: ``[T, P, C]``.
            scored: what :meth:`score` returned.
            budgets: patches to keep of each crop; more than are valid mean all of these. Reading their values
                would synchronise with the device.
            valid: ``[T, P]`` bool.
        """
        return None

    def replace(
        self, features: Tensor, keys: Tensor | None, scored: Scored, budgets: TileBudgets, valid: Tensor
    ) -> Replacement | None:
        """Features that replace those of kept patches; ``None`` keeps them as they are.

        Args:
            features: ``[T, P, C]``.
            keys: ``[T, P, D]`` fp32, if the policy needs them.
            scored: what :meth:`score` returned.
            budgets: patches to keep of each crop. Reading their values would synchronise with the device.
            valid: ``[T, P]`` bool.
        """
        return None


@dataclass(frozen=True)
class LayerPolicy(Policy):
    """A policy that scores patches by attention averaged over chosen layers: CLS's, or what patches receive.

    Args:
        tile_layers: layers that score the patches of tiles (paper: low to middle layers, which attend to
            objects). Integers are 0-based indices, negative from the end; floats in [0, 1] are fractions of
            depth, ``round(f · (depth − 1))``. In encoders with windowed attention (Qwen2.5-VL) a fraction
            means the nearest layer with full attention, the lower of two.
        thumbnail_layers: the same for the thumbnail (paper: deep layers, which attend to global tokens).
        second_softmax: whether each head's row gets a second softmax over the patches, as in the paper's
            released code.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or out of range, by name.
    """

    tile_layers: tuple[int | float, ...] = (0.2, 0.3, 0.4, 0.5)
    thumbnail_layers: tuple[int | float, ...] = (0.95, 1.0)
    second_softmax: bool = False

    def __post_init__(self) -> None:
        for name in ("tile_layers", "thumbnail_layers"):
            object.__setattr__(self, name, check_layers(name, getattr(self, name)))
        check_flag("second_softmax", self.second_softmax)

    def rows(self, depth: int, feature_layer: int, scoring: Sequence[int] | None = None) -> dict[str, Rows]:
        """As :meth:`Policy.rows`.

        Args:
            scoring: the layers whose attention sees whole images, given for encoders that need not have it in
                all layers (Qwen2-VL and later): only these can score.
        """
        thumbnail, tiles = (
            resolve_layers(name, getattr(self, name), depth, scoring)
            for name in ("thumbnail_layers", "tile_layers")
        )
        return {PATCHES: Rows.mean(thumbnail, tiles)}

    def needs(self, with_relevance):
        return Needs(second_softmax=self.second_softmax)


def resolve_layers(
    name: str, layers: Sequence[int | float], depth: int, scoring: Sequence[int] | None = None
) -> tuple[int, ...]:
    """0-based indices of ``layers`` in an encoder of ``depth`` layers, sorted, without duplicates.

    Args:
        scoring: as in :meth:`LayerPolicy.rows`.

    Raises:
        ValueError: an index outside ``[-depth, depth)``, or not among ``scoring``.
    """
    resolved = set()
    for layer in layers:
        if isinstance(layer, float) and scoring is not None:
            place = layer * (depth - 1)
            resolved.add(min(scoring, key=lambda one: (abs(one - place), one)))
        elif isinstance(layer, float):
            resolved.add(int(layer * (depth - 1) + 0.5))
        elif not -depth <= layer < depth:
            expected = f"indices in [{-depth}, {depth}) for an encoder of {depth} layers"
            raise error(ValueError, name, expected, layer)
        elif scoring is not None and layer % depth not in scoring:
            raise error(ValueError, name, f"layers with full attention, {list(scoring)}", layer)
        else:
            resolved.add(layer % depth)
    return tuple(sorted(resolved))
