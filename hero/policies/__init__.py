"""Policies: which visual tokens to keep. One file each, alike in form, all on the same operations.

A policy says what it must see of the encoder (:meth:`Policy.maps`, :meth:`Policy.needs`) and makes of it
patch scores and tile signals (:meth:`Policy.score`); some also replace features of what is kept
(:meth:`Policy.replace`). How many tokens that comes to follows from the image's size and stands in
``hero/layout.py``, which counts without torch. Names and one-line descriptions are in ``config.POLICIES``;
the module of that name (``hero_plus`` for ``hero+``) holds the policy as ``POLICY`` and is imported on use.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hero_kernels import Finalized, TileBudgets, TileSignal

from ..config import POLICIES, HeroConfig
from ..layout import ImageLayout
from ..models import Encoded
from ..scoring import Places

__all__ = ["Map", "Needs", "Policy", "Replacement", "Scored", "Seen", "equal_shares", "policy_of"]

SCORES = "scores"  # the map that Seen holds by itself: the one map of most policies


class Map(NamedTuple):
    """Attention rows to accumulate over layers: ``{layer: weight}`` for thumbnails and for tiles.

    Attributes:
        thumbnail, tiles: weights by 0-based layer; a layer in neither is not captured.
        ranked: whether the order of the scores is wanted.
    """

    thumbnail: Mapping[int, float]
    tiles: Mapping[int, float]
    ranked: bool = True

    @classmethod
    def mean(cls, thumbnail: Sequence[int], tiles: Sequence[int], *, ranked: bool = True) -> Map:
        """The mean over layers; over none, nothing."""
        weights = [{layer: 1.0 / len(layers) for layer in layers} for layers in (thumbnail, tiles)]
        return cls(*weights, ranked)

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers, in order."""
        return tuple(sorted({*self.thumbnail, *self.tiles}))


class Needs(NamedTuple):
    """What a policy must see besides its maps.

    Attributes:
        cls: the encoder's last layer at CLS.
        relevance: the question's relevance to each tile; the caller must then give the question.
        patch_relevance: the question's relevance to each patch; likewise.
        keys: the mean key of each patch in the last layer of the features.
        second_softmax: a second softmax over the patches of each head, before the mean over heads.
    """

    cls: bool = False
    relevance: bool = False
    patch_relevance: bool = False
    keys: bool = False
    second_softmax: bool = False


@dataclass(frozen=True)
class Seen:
    """What a policy may look at; T crops of P patches.

    Attributes:
        scores: ``[T, P]`` fp32, its map ``"scores"``, if it has one.
        entropy: ``[T]`` fp32, of the scores over the valid patches.
        ranks: ``[T, P]`` int16, the order of the scores.
        valid: ``[T, P]`` bool.
        cls: ``[T, C]`` the encoder's last layer at CLS, if a signal needs it.
        layouts: the images of the batch.
        places: where its crops belong.
        config: the configuration.
        relevance: gives the cosines ``[T]`` of tile and question when called; ``None`` without a
            relevance model.
        patch_relevance: gives the cosines ``[T, P]`` of patch and question when called; ``None`` without
            a relevance model.
        maps: every map by name, ``"scores"`` among them, as :func:`hero_kernels.finalize_scores` returns it.
        constants: what :meth:`Policy.constants` made of the layouts, on the device.
    """

    scores: Tensor | None
    entropy: Tensor | None
    ranks: Tensor | None
    valid: Tensor
    cls: Tensor | None
    layouts: Sequence[ImageLayout]
    places: Places
    config: HeroConfig
    relevance: Callable[[], Tensor] | None
    patch_relevance: Callable[[], Tensor] | None = None
    maps: Mapping[str, Finalized] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)


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


class Replacement(NamedTuple):
    """Features that stand in for those of kept patches.

    Attributes:
        ranks: ``[T, P]`` int16; of each crop, the valid patches whose rank is below the budget are kept. They
            must be as many as the budget; their order does not matter.
        slots: ``[T, P]`` int64, which of the crop's values takes the place of the patch's; −1 for none.
        values: ``[T, S, C]`` in the dtype of the features.
    """

    ranks: Tensor
    slots: Tensor
    values: Tensor


class Policy(ABC):
    """How to choose; stateless, one instance for all encoders.

    Attributes:
        by_cls: whether it is defined by the attention of a CLS token, which not every encoder has.
        by_thumbnail: whether it is defined by what the thumbnail attends to.
    """

    by_cls: bool = False
    by_thumbnail: bool = False

    @abstractmethod
    def maps(self, config: HeroConfig, depth: int, feature_layer: int) -> dict[str, Map]:
        """The attention rows it needs, by name; only these are captured.

        Args:
            config: the configuration.
            depth: layers of the encoder.
            feature_layer: the 0-based layer whose output the features are, the last where there are several:
                ``depth − 2`` for LLaVA, which takes hidden state −2.

        Raises:
            ValueError: layers of the configuration that the encoder does not have, by name.
        """

    def needs(self, config: HeroConfig, with_relevance: bool) -> Needs:
        """What else it needs; nothing unless said otherwise.

        Raises:
            ValueError: the configuration asks for relevance where there is no relevance model.
        """
        return Needs()

    def constants(self, layouts: Sequence[ImageLayout]) -> Mapping[str, Tensor | tuple[Tensor, ...]]:
        """Tensors, or named tuples of them, that follow from layouts alone, on the CPU: made once."""
        return {}

    @abstractmethod
    def score(self, seen: Seen) -> Scored:
        """Patch scores and tile signals."""

    def replace(
        self, encoded: Encoded, scored: Scored, budgets: TileBudgets, valid: Tensor
    ) -> Replacement | None:
        """Features to put in place of kept ones, once budgets are known; ``None`` to keep them as they are.

        Args:
            encoded: what the encoder made of the crops.
            scored: what :meth:`score` returned.
            budgets: patches to keep of each crop, on the device: waiting for them is not allowed.
            valid: ``[T, P]`` bool.
        """
        return None


def equal_shares(valid: Tensor) -> TileSignal:
    """Every tile of an image the same share. ``valid`` is ``[T, P]``."""
    return TileSignal(torch.ones(len(valid), device=valid.device), 1.0)


@cache
def policy_of(name: str) -> Policy:
    """The policy of a name in ``config.POLICIES``.

    Raises:
        ValueError: another name.
    """
    if name not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(map(repr, POLICIES))}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name.replace('+', '_plus')}").POLICY
