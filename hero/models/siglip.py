"""SigLIP vision towers (transformers ``SiglipVisionModel``): no CLS token, scored by received attention."""

from .layer_runner import TowerKind

__all__ = ["TOWER"]

TOWER = TowerKind(
    "transformers.models.siglip.modeling_siglip",
    ("SiglipVisionModel", "SiglipEncoderLayer", "SiglipAttention"),
    has_cls=False,
)
