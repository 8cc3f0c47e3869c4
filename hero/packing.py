"""Crops of unequal length as packed rows: what goes on through an encoder that drops patches on the way.

Hidden states ``[T, N, C]``, N = 1 + P with CLS, become rows ``[M, C]``: whole thumbnails, then tiles of CLS
and their n best patches, ordered by length. Crops of one length are one block, a view ``[G, L, C]`` of the
rows, so nothing is padded or masked, and as much is launched for many tiles as for one. How many rows there
are and in what order follows from layouts alone (``hero/layout.py``); which patches they are, from the order
of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .config import HeroConfig
from .layout import ImageLayout

__all__ = ["Block", "Cut", "Packing", "packing"]


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


@dataclass(frozen=True)
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
        patches = self.tokens[:, 1:]
        place = torch.where(self.is_thumbnail, self.tokens[:1, :-1], ranks)  # a thumbnail in its own order
        by_place = self.tokens.clone()
        by_place[:, 1:].scatter_(1, place, patches)
        return by_place.flatten().index_select(0, self.places)


@dataclass
class Cut:
    """Dropping in one pass of an encoder: the state that a tower passes through.

    Attributes:
        layer: the last layer, 0-based, that runs on all patches.
        packing: what runs after it; ``None`` where nothing of the batch is dropped.
        rank: gives the ranks ``[T, P]`` int16 when called after that layer; captures thumbnails alone from
            there on.
        ranks: what it gave.
    """

    layer: int
    packing: Packing | None
    rank: Callable[[], Tensor]
    ranks: Tensor | None = None
    _sources: Tensor | None = None

    def pack(self, hidden: Tensor) -> Tensor:
        """``[T, N, C]`` to ``[M, C]``, once."""
        self.ranks = self.rank()
        self._sources = self.packing.sources(self.ranks)
        return hidden.flatten(0, 1).index_select(0, self._sources)

    def unpack(self, rows: Tensor) -> Tensor:
        """``[M, C]`` to ``[T, N, C]``, zero where patches were dropped."""
        shape = self.packing.tokens.shape
        whole = rows.new_zeros((shape.numel(), rows.shape[1])).index_copy_(0, self._sources, rows)
        return whole.view(*shape, rows.shape[1])

    def survivors(self) -> Tensor:
        """``[T, P]`` bool, the patches that went on."""
        return self.ranks < self.packing.limits


@lru_cache(maxsize=256)
def packing(layouts: Sequence[ImageLayout], config: HeroConfig, device: torch.device) -> Packing | None:
    """The packing of a batch; cached. ``None`` where nothing is dropped."""
    patches, counts, is_thumbnail = layouts[0].patches, [], []
    for layout in layouts:
        for crop in range(layout.crops):
            is_thumbnail.append(crop == layout.thumbnail_crop)
            counts.append(patches if is_thumbnail[-1] else layout.encoder_patches(config))
    if min(counts) == patches:
        return None
    packed = sorted(range(len(counts)), key=lambda crop: (not is_thumbnail[crop], -counts[crop], crop))
    runs = groupby(packed, key=lambda crop: (counts[crop] + 1, is_thumbnail[crop]))
    blocks = tuple(Block(len(list(run)), *length_and_scored) for length_and_scored, run in runs)
    tokens = torch.arange(len(counts) * (patches + 1)).view(len(counts), patches + 1)
    lengths = torch.tensor([counts[crop] + 1 for crop in packed])
    order = torch.empty(len(counts), dtype=torch.int64)
    order[packed] = torch.arange(len(counts))
    thumbnails = torch.tensor(is_thumbnail)
    return Packing(
        blocks,
        thumbnails=thumbnails.nonzero()[:, 0].to(device),
        is_thumbnail=thumbnails[:, None].to(device),
        limits=torch.tensor(counts, dtype=torch.int16)[:, None].to(device),
        tokens=tokens.to(device),
        places=torch.cat([tokens[crop, : counts[crop] + 1] for crop in packed]).to(device),
        cls=(lengths.cumsum(0) - lengths).to(device),
        order=order.to(device),
    )
