"""Idefics3's vision tower (transformers ``Idefics3VisionTransformer``): SigLIP with a mask of patches."""

import torch

from .layer_runner import TowerKind

__all__ = ["TOWER"]


def _all_patches(tower, crops):
    sides = (size // tower.patch_size for size in crops.shape[-2:])
    return {"patch_attention_mask": torch.ones((len(crops), *sides), dtype=torch.bool, device=crops.device)}


TOWER = TowerKind(
    "transformers.models.idefics3.modeling_idefics3",
    ("Idefics3VisionTransformer", "Idefics3EncoderLayer", "Idefics3VisionAttention"),
    has_cls=False,
    inputs=_all_patches,
)
