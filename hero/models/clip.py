"""CLIP vision towers (transformers ``CLIPVisionModel``): a CLS token, no merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward
from transformers.utils import output_capturing

from .. import capture
from ..packing import Block, Cut
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

    def run(self, tower, pixel_values, feature_layer, *, cls=True, scored=(), cut=None, **kwargs):
        layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if cut is not None:
            kwargs = {name: value for name, value in kwargs.items() if value is not False}
            _check_cut(tower, cut, kwargs)
        if kwargs or not _is_plain(tower):
            states, output = self._run_whole(tower, pixel_values, layers, **kwargs)
            last, pooled = output.last_hidden_state[:, 0], output.pooler_output
        else:
            count = len(tower.encoder.layers) + 1
            indices = [layer % count for layer in layers]
            scored = max(scored, default=-1)
            states, last, pooled = _run_needed(tower, pixel_values, indices, cls, scored, cut)
            output = None
        features = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        if cut is not None and cut.packing is not None:
            features = cut.unpack(features)
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


def _is_open(layer: nn.Module) -> bool:
    """Whether the parts of a layer can be run one by one: the same, of the layer and its attention."""
    for module in (layer, layer.self_attn):
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return False
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        hooks += (module._backward_hooks, module._backward_pre_hooks)
        for hook in (hook for some in hooks for hook in some.values()):
            # Those that transformers leaves on a tower do nothing while no hidden states are asked for.
            if getattr(hook, "__module__", None) != output_capturing.__name__:
                return False
    return True


def _check_cut(tower: nn.Module, cut: Cut, kwargs: Mapping[str, object]) -> None:
    """Raise where patches cannot be dropped within the tower: results would be silently others."""
    if kwargs:
        got = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        raise ValueError(f"encoder_keep: expected None where more is asked of the encoder, got {got} with it")
    if not _is_plain(tower) or not all(map(_is_open, tower.encoder.layers[cut.layer + 1 :])):
        raise ValueError(
            "encoder_keep: expected None for an encoder that is compiled, offloaded, has hooks on it or "
            f"attention {tower.config._attn_implementation!r} of the user's, since it must run whole"
        )


def _run_needed(
    tower: nn.Module, pixel_values: Tensor, indices: list[int], cls: bool, scored: int, cut: Cut | None
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Hidden states ``indices``, and CLS of the last layer if asked for, running no more than these need.

    Layers after the last one needed are skipped; where the last layer is needed for CLS alone, only that
    row is computed past its keys and values. After a cut, states are packed rows ``[M, C]``.

    Args:
        indices: hidden states, 0 the embeddings; all of them behind a cut.
        cls: whether to compute the last layer at CLS.
        scored: the last layer whose attention is captured.
        cut: where patches are dropped on the way.
    """
    layers = tower.encoder.layers
    depth = len(layers)
    cls_only = depth not in indices and (cls or scored == depth - 1)
    whole = depth - 1 if cls_only else max(*indices, scored + 1)
    packing = None if cut is None else cut.packing
    last_unpacked = depth if packing is None else cut.layer
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    states = {0: hidden} if 0 in indices else {}
    for number, layer in enumerate(layers[:whole]):
        if number <= last_unpacked:
            hidden = layer(hidden, attention_mask=None)
        else:
            hidden = _rows(layer, hidden, packing.blocks)
        if number == last_unpacked:
            hidden = cut.pack(hidden)
        if number + 1 in indices:
            states[number + 1] = hidden
    states = [states[index] for index in indices]
    if not cls_only and not cls:
        return states, None, None
    if packing is not None:
        last = _rows(layers[-1], hidden, packing.blocks, packing.cls) if cls_only else hidden[packing.cls]
        last = last[packing.order]
    elif cls_only:
        crops, tokens, _ = hidden.shape
        blocks = (Block(crops, tokens, True),)
        last = _rows(layers[-1], hidden.flatten(0, 1), blocks, slice(None, None, tokens))
    else:
        last = hidden[:, 0]
    return states, last, tower.post_layernorm(last)


def _rows(
    layer: nn.Module, hidden: Tensor, blocks: Sequence[Block], cls: Tensor | slice | None = None
) -> Tensor:
    """What a layer makes of packed rows ``[M, C]``, or of those of CLS alone: ``[T, C]``.

    All but attention works row by row and runs once; attention runs once a block.

    Args:
        blocks: the crops that the rows are.
        cls: the rows of CLS, where no others are wanted.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    wanted, queries = (hidden, normed) if cls is None else (hidden[cls], normed[cls])
    captured = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )
    lengths = [block.crops * block.length for block in blocks]
    counts = lengths if cls is None else [block.crops for block in blocks]
    outputs = []
    for block, *parts in zip(
        blocks,
        attention.q_proj(queries).split(counts),
        attention.k_proj(normed).split(lengths),
        attention.v_proj(normed).split(lengths),
        strict=True,
    ):
        shape = (block.crops, -1, attention.num_heads, attention.head_dim)
        attend = captured if block.scored else capture.uncaptured
        output, _ = attend(
            attention,
            *(part.view(shape).transpose(1, 2) for part in parts),
            None,
            scaling=attention.scale,
            dropout=attention.dropout if attention.training else 0.0,
        )
        outputs.append(output.flatten(0, 1).flatten(1))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    wanted = wanted + attention.out_proj(output)
    return wanted + layer.mlp(layer.layer_norm2(wanted))


TOWER = ClipTower()
