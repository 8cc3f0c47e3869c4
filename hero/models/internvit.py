"""InternViT (transformers ``InternVLVisionModel``): a CLS token, scaled residuals, norms of Q and K."""

from .layer_runner import TowerKind

__all__ = ["TOWER"]

TOWER = TowerKind(
    "transformers.models.internvl.modeling_internvl",
    ("InternVLVisionModel", "InternVLVisionLayer", "InternVLVisionAttention"),
    layers="layer",
    attention="attention",
    norm_before="layernorm_before",
    norm_after="layernorm_after",
    output="projection_layer",
    attention_dropout="attention_dropout",
    last_norm="layernorm",
    query_norm="q_norm",
    key_norm="k_norm",
    output_dropout="projection_dropout",
    mlp_dropout="dropout",
    attention_scale="lambda_1",
    mlp_scale="lambda_2",
    takes_mask=False,
)
