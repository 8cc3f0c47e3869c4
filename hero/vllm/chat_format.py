"""InternVL's own format of checkpoints: its configuration and parameters as transformers has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import InternVLConfig

from .._checks import error

__all__ = ["converted", "image_processor_of", "renamed"]

# Names of the vision encoder's parameters, in the order in which they are replaced.
_NAMES = (
    (r"\.layers\.", ".layer."),
    (r"class_embedding", "cls_token"),
    (r"position_embedding", "position_embeddings"),
    (r"patch_embedding", "patch_embeddings.projection"),
    (r"\.ls(\d)", r".lambda_\1"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
# vision_config: a field of transformers, and its name here.
_FIELDS = {
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    **{
        name: name
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "hidden_act",
            "norm_type",
            "layer_norm_eps",
            "image_size",
            "patch_size",
        )
    },
}


def converted(hf_config: Any) -> InternVLConfig:
    """The configuration of transformers' InternVL with the same vision encoder.

    Raises:
        ValueError: a field that this one has not.
    """
    vision, size = hf_config.vision_config, hf_config.vision_config.image_size
    expected = {"ps_version": "v2", "use_thumbnail": True, "force_image_size": (None, size)}
    for name, wanted in expected.items():
        given = getattr(hf_config, name, None)
        if given != wanted and given not in (wanted if isinstance(wanted, tuple) else ()):
            raise error(ValueError, f"{name} of the model", repr(wanted), given)
    if hf_config.select_layer >= 0:  # which vLLM counts otherwise than the model's own code
        raise error(ValueError, "select_layer of the model", "a negative number", hf_config.select_layer)
    return InternVLConfig(
        vision_config={name: getattr(vision, own) for name, own in _FIELDS.items()},
        text_config=InternVLConfig().text_config,
        vision_feature_layer=hf_config.select_layer,
        downsample_ratio=hf_config.downsample_ratio,
    )


def image_processor_of(hf_config: Any, options: Mapping[str, Any]) -> Any:
    """Sizes and limits of vLLM's image processor, by the names of transformers'."""
    names = ("min_dynamic_patch", "max_dynamic_patch", "dynamic_image_size", "use_thumbnail")
    least, most, is_cut, has_thumbnail = (options.get(name, getattr(hf_config, name)) for name in names)
    if not has_thumbnail:
        raise error(ValueError, "use_thumbnail", "True, since hero needs a thumbnail", has_thumbnail)
    side = options.get("image_size", hf_config.vision_config.image_size)
    size = {"height": side, "width": side}
    return SimpleNamespace(size=size, min_patches=least if is_cut else 1, max_patches=most if is_cut else 1)


def renamed(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a checkpoint, those of the vision encoder as transformers has them."""
    for name, value in weights:
        if not name.startswith("vision_model."):
            yield name, value
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            for part, own in zip("qkv", value.chunk(3), strict=True):
                yield name.replace(".qkv.", f".{part}_proj."), own
        else:
            yield name, value
