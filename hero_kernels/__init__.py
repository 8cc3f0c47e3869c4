"""Fused operations for dropping visual tokens: CLS attention, tile budgets, segmented top-k, gather.

Every operation has a plain PyTorch twin of the same name and signature in
:mod:`hero_kernels.reference`; the twin is the specification and the CPU path.
This package needs torch alone: it imports neither ``hero`` nor transformers.
"""

from . import reference
from ._ops import (
    attention_with_cls,
    cls_attention,
    implementations,
    received_attention,
    segmented_topk,
    segmented_topk_gather,
    tile_budgets,
)
from .segments import Gathered, Segment, Segments, TileBudgets, TileSignal

__all__ = [
    "Gathered",
    "Segment",
    "Segments",
    "TileBudgets",
    "TileSignal",
    "attention_with_cls",
    "cls_attention",
    "implementations",
    "received_attention",
    "reference",
    "segmented_topk",
    "segmented_topk_gather",
    "tile_budgets",
]
