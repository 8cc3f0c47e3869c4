"""Crops of unequal length as packed rows: what goes on through an encoder that drops patches on the way.

Hidden states ``[T, N, C]``, N = 1 + P with CLS, become rows ``[M, C]``: whole thumbnails, then tiles of CLS
and their n best patches, ordered by length. Crops of one length are one block, a view ``[G, L, C]`` of the
rows, so nothing is padded or masked, and as much is launched for many tiles as for one. How many rows there
are and in what order follows from layouts alone (``hero/layout.py``); which patches they are, from the order
of the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hero_kernels as hk

from . import capture
from .config import HeroConfig
from .layout import ImageLayout

__all__ = ["Block", "Cut", "Packing", "packing_of"]


class Block(NamedTuple):
    """Crops of one length, one after another.

    Attributes:
        crops: G, how many.
        length: L, tokens of each, CLS first.
        scored: whether their attention is captured: that of thumbnails is, whose scores may be deep.
    """

    crops: int
    length: int
    scored: bool


@dataclass(frozen=True, eq=False)
class Packing:
    """The packed rows of a batch, and where each comes from.

    Attributes:
        blocks: the rows' crops, thumbnails first, then tiles by length.
        thumbnails: ``[images with a thumbnail]`` int64, their crops.
        is_thumbnail: ``[T, 1]`` bool.
        limits: ``[T, 1]`` int16, patches of each crop that stay.
        tokens: ``[T, N]`` int64, ``crop · N + token``.
        places: ``[M]`` int64, of each row ``crop · N + place``: place 0 is CLS, place 1 + r the patch of rank
            r in a tile and patch r in a thumbnail.
        cls: ``[T]`` int64, the rows of CLS, in packed order.
        order: ``[T]`` int64, where each crop stands in packed order.
    """

    blocks: tuple[Block, ...]
    thumbnails: Tensor
    is_thumbnail: Tensor
    limits: Tensor
    tokens: Tensor
    places: Tensor
    cls: Tensor
    order: Tensor

    def sources(self, ranks: Tensor) -> Tensor:
        """``[M]`` int64: the token ``crop · N + token`` of each row.

        Args:
            ranks: ``[T, P]`` int16, each crop a permutation; those of thumbnails are not looked at.
        """
        place = torch.where(self.is_thumbnail, self.tokens[:1, :-1], ranks)  # a thumbnail in its own order
        by_place = self.tokens.scatter(1, place + 1, self.tokens[:, 1:])
        return by_place.flatten().index_select(0, self.places)


def packing_of(layouts: Sequence[ImageLayout], config: HeroConfig) -> Packing | None:
    """The packing of a batch, on the CPU; ``None`` where nothing is dropped."""
    patches, counts, is_thumbnail = layouts[0].patches, [], []
    for layout in layouts:
        for crop in range(layout.crops):
            is_thumbnail.append(crop == layout.thumbnail_crop)
            counts.append(patches if is_thumbnail[-1] else layout.encoder_patches(config))
    if min(counts) == patches:
        return None
    packed = sorted(range(len(counts)), key=lambda crop: (not is_thumbnail[crop], -counts[crop], crop))
    runs = groupby(packed, key=lambda crop: (counts[crop] + 1, is_thumbnail[crop]))
    tokens = torch.arange(len(counts) * (patches + 1)).view(len(counts), patches + 1)
    lengths = torch.tensor([counts[crop] + 1 for crop in packed])
    return Packing(
        blocks=tuple(Block(len(list(run)), *length_and_scored) for length_and_scored, run in runs),
        thumbnails=torch.tensor([crop for crop in packed if is_thumbnail[crop]], dtype=torch.int64),
        is_thumbnail=torch.tensor(is_thumbnail)[:, None],
        limits=torch.tensor(counts, dtype=torch.int16)[:, None],
        tokens=tokens,
        places=torch.cat([tokens[crop, : counts[crop] + 1] for crop in packed]),
        cls=lengths.cumsum(0) - lengths,
        order=torch.tensor(packed).argsort(),
    )


class Cut:
    """Dropping in one pass of an encoder.

    Args:
        layer: the last layer, 0-based, that runs on all patches.
        packing: the rows after it; ``None`` where nothing of the batch is dropped.
        valid: ``[T, P]`` bool, patches that are not padding.
        collectors: of the pass; from the cut on, they see thumbnails alone.
        weights: ``{map: {layer: weight}}`` of thumbnails in the layers to come.
        scores: the map by which patches stay.
        modules: those captured, ``{layer: module}``.

    Attributes:
        ranks: ``[T, P]`` int16, the order by which patches stayed, once they did.
    """

    def __init__(
        self,
        layer: int,
        packing: Packing | None,
        valid: Tensor,
        collectors: Mapping[str, capture.Collector],
        weights: Mapping[str, Mapping[int, float]],
        scores: str,
        modules: Mapping[int, nn.Module],
    ):
        self.layer = layer
        self.packing = packing
        self.ranks: Tensor | None = None
        self._pass = valid, collectors, weights, scores, modules
        self._sources: Tensor | None = None

    def pack(self, hidden: Tensor) -> Tensor:
        """What the layer made of all patches, ``[T, N, C]``, to rows ``[M, C]``."""
        valid, collectors, weights, scores, modules = self._pass
        capture.fetch(collectors.values(), modules)
        rows = collectors[scores].rows
        for name, collector in collectors.items():
            collector.narrow(self.packing.thumbnails, weights[name])
        self.ranks = hk.finalize_scores(rows, valid=valid, rank=True).ranks
        self._sources = self.packing.sources(self.ranks)
        return hidden.flatten(0, 1).index_select(0, self._sources)

    def unpack(self, rows: Tensor) -> Tensor:
        """``[M, C]`` to ``[T, N, C]``, zero where patches were dropped."""
        crops, tokens = self.packing.tokens.shape
        whole = rows.new_zeros((crops * tokens, rows.shape[1])).index_copy(0, self._sources, rows)
        return whole.view(crops, tokens, rows.shape[1])

    def valid(self) -> Tensor:
        """``[T, P]`` bool, the patches that went on and are not padding."""
        return self._pass[0] & (self.ranks < self.packing.limits)
