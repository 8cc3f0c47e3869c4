"""Fused operations for dropping visual tokens: CLS attention, tile budgets, segmented top-k, gather.

Every operation has a plain PyTorch implementation of the same name and signature in
:mod:`hero_kernels.reference`: the specification, and the CPU path. Importing needs only torch; kernels need
Triton. Neither ``hero`` nor transformers is imported.
"""

from . import reference
from ._dispatch import fused_attention_is_faster, implementations
from .ops import (
    attention_with_cls,
    cls_attention,
    finalize_scores,
    rarity,
    received_attention,
    segmented_diverse_topk,
    segmented_topk,
    segmented_topk_gather,
    tile_budgets,
)
from .segments import Finalized, Gathered, Segment, Segments, TileBudgets, TileSignal

__all__ = [
    "Finalized",
    "Gathered",
    "Segment",
    "Segments",
    "TileBudgets",
    "TileSignal",
    "attention_with_cls",
    "cls_attention",
    "finalize_scores",
    "fused_attention_is_faster",
    "implementations",
    "rarity",
    "received_attention",
    "reference",
    "segmented_diverse_topk",
    "segmented_topk",
    "segmented_topk_gather",
    "tile_budgets",
]
