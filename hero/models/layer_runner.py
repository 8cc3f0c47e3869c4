"""Runs a vision encoder of transformers layer by layer, no further than needed. Its parts are described."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from .towers import Tower, TowerOutput, is_untouched, square, unwrapped

__all__ = ["TowerKind"]

# Whether transformers returns only the hidden states asked for; older versions return all.
_SELECTS_HIDDEN_STATES = hasattr(output_capturing, "resolve_hidden_states_indices")


@dataclass(frozen=True)
class TowerKind(Tower):
    """A vision encoder, described by the names of its parts.

    Attributes:
        source: the module of transformers that defines it.
        classes: names of its classes of tower, layer and attention. Others, such as subclasses, run as a
            whole.
        has_cls: whether its first token is CLS.
        takes_clip_pixels: as in :class:`Tower`.
        layers: the list of layers, in ``tower.encoder``.
        attention, norm_before, norm_after: parts of a layer: attention, and the norms before it and before
            the MLP.
        output, attention_dropout: parts of the attention: projection of its output, probability of dropout.
        first_norm: the norm between embeddings and layers, if there is one.
        last_norm: the norm after the layers.
        query_norm, key_norm: parts of the attention, norms of all heads' queries and keys, if there are any.
        output_dropout, mlp_dropout: parts of attention and layer, dropout of what they add, if there is any.
        attention_scale, mlp_scale: parameters of a layer, factors of what attention and MLP add, likewise.
        takes_mask: whether layers take an ``attention_mask``.
        inputs: further arguments of the tower and of its embeddings for crops ``[T, 3, S, S]``.
    """

    source: str
    classes: tuple[str, str, str]
    has_cls: bool = True
    takes_clip_pixels: bool = False
    layers: str = "layers"
    attention: str = "self_attn"
    norm_before: str = "layer_norm1"
    norm_after: str = "layer_norm2"
    output: str = "out_proj"
    attention_dropout: str = "dropout"
    first_norm: str | None = None
    last_norm: str = "post_layernorm"
    query_norm: str | None = None
    key_norm: str | None = None
    output_dropout: str | None = None
    mlp_dropout: str | None = None
    attention_scale: str | None = None
    mlp_scale: str | None = None
    takes_mask: bool = True
    inputs: Callable[[nn.Module, Tensor], Mapping[str, Tensor]] = lambda *_: {}

    def layers_of(self, tower: nn.Module) -> nn.ModuleList:
        """The layers of a tower."""
        return getattr(tower.encoder, self.layers)

    def attention_modules(self, tower):
        layers = self.layers_of(unwrapped(tower))
        return {number: getattr(layer, self.attention) for number, layer in enumerate(layers)}

    def geometry(self, tower):
        config = unwrapped(tower).config
        return square("image_size", config.image_size), square("patch_size", config.patch_size)

    def run(self, tower, pixel_values, states, *, cls=True, scored=(), whole=False, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        cls, last, pooled = cls and self.has_cls, None, None
        scored = max(scored, default=-1)
        depth = len(self.layers_of(unwrapped(tower)))
        output = None
        if whole or kwargs or not self.is_plain(tower, min(max(*states, scored + 1), depth)):
            hidden, output = self._run_whole(tower, pixel_values, (*states, depth), **kwargs)
            *hidden, at_end = hidden
            if self.has_cls:
                last, pooled = at_end[:, 0], output.pooler_output
        else:
            with _quiet_hooks():
                hidden, last, pooled = self._run_needed(tower, pixel_values, states, cls, scored)
        features = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=-1)
        return TowerOutput(features[:, 1:] if self.has_cls else features, last, pooled, output)

    def is_plain(self, tower: nn.Module, layers: int = 0) -> bool:
        """Whether layers can be run one by one: it bypasses nothing that the user put on the tower.

        Args:
            layers: how many of them are called as they are; of the next, parts may be called, or nothing.
        """
        if not self._is(tower, 0) or tower._compiled_call_impl is not None:
            return False
        all_layers = self.layers_of(tower)
        rest = all_layers[min(layers, len(all_layers) - 1) :]
        own = (tower, tower.encoder, getattr(tower, self.last_norm))
        modules = (*own, *(one for layer in rest for one in layer.modules()))
        if torch_module._has_any_global_hook() or not all(map(is_untouched, modules)):
            return False
        if not all(self._is(layer, 1) and self._is(getattr(layer, self.attention), 2) for layer in rest):
            return False
        name = tower.config._attn_implementation or "eager"
        return name in ("eager", "sdpa") or name.startswith("flash_attention")

    @property
    def _unmasked(self) -> dict[str, None]:
        return {"attention_mask": None} if self.takes_mask else {}

    def _is(self, module: nn.Module, number: int) -> bool:
        return (type(module).__module__, type(module).__name__) == (self.source, self.classes[number])

    def _run_needed(
        self, tower: nn.Module, pixel_values: Tensor, states: Sequence[int], cls: bool, scored: int
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Hidden states ``states``, and the last layer at CLS before and after the last norm, if needed.

        Layers after the last one needed are skipped. If the last layer is needed at CLS alone, only that row
        is computed after keys and values.

        Args:
            cls: whether the last layer is needed at CLS.
            scored: the last layer that scores patches.
        """
        layers, last_norm = self.layers_of(tower), getattr(tower, self.last_norm)
        depth = len(layers)
        cls_only = self.has_cls and max(states) < depth and (cls or scored == depth - 1)
        whole = depth - 1 if cls_only else min(max(*states, scored + 1), depth)
        hidden = tower.embeddings(pixel_values, **self.inputs(tower, pixel_values))
        if self.first_norm is not None:
            hidden = getattr(tower, self.first_norm)(hidden)
        found = {0: hidden} if 0 in states else {}
        for number, layer in enumerate(layers[:whole]):
            hidden = layer(hidden, **self._unmasked)
            if number + 1 in states:
                found[number + 1] = hidden
        if depth + 1 in states:
            found[depth + 1] = last_norm(hidden)
        wanted = [found[state] for state in states]
        if not cls_only and not cls:
            return wanted, None, None
        last = self._at_cls(layers[-1], hidden) if cls_only else hidden[:, 0]
        return wanted, last, last_norm(last)

    def _run_whole(
        self, tower: nn.Module, pixel_values: Tensor, states: Sequence[int], **kwargs
    ) -> tuple[list[Tensor], Any]:
        """Hidden states ``states`` and the output of the module."""
        depth = len(self.layers_of(unwrapped(tower)))
        if not kwargs.get("output_hidden_states"):
            wanted = [state for state in states if state <= depth]
            kwargs["output_hidden_states"] = wanted if _SELECTS_HIDDEN_STATES else True
        kwargs |= self.inputs(unwrapped(tower), pixel_values)
        # The tower does this on its first call; a compiled tower cannot, because of the lock it takes.
        output_capturing.maybe_install_capturing_hooks(unwrapped(tower))
        output = tower(pixel_values, return_dict=True, **kwargs)
        every = output.hidden_states
        return [every[state] if state <= depth else output.last_hidden_state for state in states], output

    def _at_cls(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The output of a layer at CLS, ``[T, C]``, for hidden states ``[T, N, C]``."""
        attention, (crops, tokens, _) = getattr(layer, self.attention), hidden.shape
        hidden = hidden.flatten(0, 1)
        cls = slice(None, None, tokens)
        normed = getattr(layer, self.norm_before)(hidden)
        query, key, value = attention.q_proj(normed[cls]), attention.k_proj(normed), attention.v_proj(normed)
        query, key = _part(attention, self.query_norm)(query), _part(attention, self.key_norm)(key)
        eager = sys.modules[type(attention).__module__].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
        shape = (crops, -1, attention.num_heads, attention.head_dim)
        output, _ = attend(
            attention,
            *(values.view(shape).transpose(1, 2) for values in (query, key, value)),
            None,
            scaling=attention.scale,
            dropout=getattr(attention, self.attention_dropout) if attention.training else 0.0,
        )
        output = getattr(attention, self.output)(output.flatten(0, 1).flatten(1))
        output = _part(attention, self.output_dropout)(output)
        wanted = hidden[cls] + _scaled(layer, self.attention_scale, output)
        output = _part(layer, self.mlp_dropout)(layer.mlp(getattr(layer, self.norm_after)(wanted)))
        return wanted + _scaled(layer, self.mlp_scale, output)


@contextlib.contextmanager
def _quiet_hooks():
    """Let transformers' output-capturing hooks see no collector.

    They read a context variable, which ``torch.compile`` cannot trace unless it was set in the traced code.
    """
    collector = output_capturing._active_collector
    token = collector.set(None) if torch.compiler.is_compiling() else None
    try:
        yield
    finally:
        if torch.compiler.is_compiling():
            collector.reset(token)


def _part(module: nn.Module, name: str | None) -> Callable[[Tensor], Tensor]:
    return _same if name is None else getattr(module, name)


def _same(values: Tensor) -> Tensor:
    return values


def _scaled(layer: nn.Module, name: str | None, values: Tensor) -> Tensor:
    return values if name is None else getattr(layer, name) * values
