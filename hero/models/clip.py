"""CLIP vision towers (transformers ``CLIPVisionModel``): a CLS token, no merging."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.utils import output_capturing

from . import Tower

__all__ = ["TOWER"]

# Whether transformers keeps just the hidden states asked for; older ones must keep all.
_SELECTS_HIDDEN_STATES = hasattr(output_capturing, "resolve_hidden_states_indices")


class ClipTower(Tower):
    def attention_modules(self, tower):
        tower = getattr(tower, "_orig_mod", tower)
        return {number: layer.self_attn for number, layer in enumerate(tower.encoder.layers)}

    def geometry(self, tower):
        return tower.config.image_size, tower.config.patch_size

    def run(self, tower, pixel_values, feature_layer, *, cls=True, scored=(), **kwargs):
        layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if kwargs or not _is_plain(tower):
            states, output = self._run_whole(tower, pixel_values, layers, **kwargs)
            last, pooled = output.last_hidden_state[:, 0], output.pooler_output
        else:
            count = len(tower.encoder.layers) + 1
            indices = [layer % count for layer in layers]
            states, last, pooled = _run_needed(tower, pixel_values, indices, cls, max(scored, default=-1))
            output = None
        features = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        return features[:, 1:], last, pooled, output

    def _run_whole(self, tower, pixel_values, layers, **kwargs):
        if not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = layers if _SELECTS_HIDDEN_STATES else True
        # The tower does this on its first call; a compiled tower cannot, for the lock it takes.
        output_capturing.maybe_install_capturing_hooks(getattr(tower, "_orig_mod", tower))
        output = tower(pixel_values, return_dict=True, **kwargs)
        return [output.hidden_states[layer] for layer in layers], output


def _is_plain(tower: nn.Module) -> bool:
    """Whether layers can be run one by one: nothing that the user put on the tower would be passed by."""
    if hasattr(tower, "_orig_mod") or tower._compiled_call_impl is not None:
        return False
    for module in (tower, tower.encoder, *tower.encoder.layers[-1].modules()):  # accelerate replaces forward
        if "forward" in module.__dict__:
            return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in (tower, tower.encoder)):
        return False
    name = tower.config._attn_implementation or "eager"
    return name in ("eager", "sdpa") or name.startswith("flash_attention")


def _run_needed(
    tower: nn.Module, pixel_values: Tensor, indices: list[int], cls: bool, scored: int
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Hidden states ``indices``, and CLS of the last layer if asked for, running no more than these need.

    Layers after the last one needed are skipped; where the last layer is needed for CLS alone, only that
    row is computed past its keys and values.

    Args:
        indices: hidden states, 0 the embeddings.
        cls: whether to compute the last layer at CLS.
        scored: the last layer whose attention is captured.
    """
    layers = tower.encoder.layers
    depth = len(layers)
    cls_only = depth not in indices and (cls or scored == depth - 1)
    whole = depth - 1 if cls_only else max(*indices, scored + 1)
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    states = {0: hidden} if 0 in indices else {}
    for number, layer in enumerate(layers[:whole], 1):
        hidden = layer(hidden, attention_mask=None)
        if number in indices:
            states[number] = hidden
    states = [states[index] for index in indices]
    if cls_only:
        last = _cls_row(layers[-1], hidden)
    elif cls:
        last = hidden[:, 0]
    else:
        return states, None, None
    return states, last, tower.post_layernorm(last)


def _cls_row(layer: nn.Module, hidden: Tensor) -> Tensor:
    """What a layer makes of the CLS token: ``[T, N, C]`` to ``[T, C]``."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)

    def heads(values: Tensor) -> Tensor:
        return values.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)

    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )
    output, _ = attend(
        attention,
        heads(attention.q_proj(normed[:, :1])),
        heads(attention.k_proj(normed)),
        heads(attention.v_proj(normed)),
        None,
        scaling=attention.scale,
        dropout=attention.dropout if attention.training else 0.0,
    )
    cls = hidden[:, :1] + attention.out_proj(output.flatten(2))
    return (cls + layer.mlp(layer.layer_norm2(cls)))[:, 0]


TOWER = ClipTower()
