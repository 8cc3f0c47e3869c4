"""CLIP vision towers (transformers ``CLIPVisionModel``): a CLS token, no merging."""

from .layer_runner import TowerKind

__all__ = ["TOWER"]

TOWER = TowerKind(
    "transformers.models.clip.modeling_clip",
    ("CLIPVisionModel", "CLIPEncoderLayer", "CLIPAttention"),
    takes_clip_pixels=True,
    first_norm="pre_layrnorm",
)
