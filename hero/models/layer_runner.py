"""Runs a vision encoder of transformers layer by layer, no further than needed. Its parts are described."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from .base import Tower, TowerOutput, is_untouched, unwrapped

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
        first_norm: the norm between embeddings and layers, if there is one.
    """

    source: str
    classes: tuple[str, str, str]
    has_cls: bool = True
    first_norm: str | None = None

    def attention_modules(self, tower):
        tower = unwrapped(tower)
        return {number: layer.self_attn for number, layer in enumerate(tower.encoder.layers)}

    def geometry(self, tower):
        tower = unwrapped(tower)
        return tower.config.image_size, tower.config.patch_size

    def run(self, tower, pixel_values, states, *, cls=True, scored=(), whole=False, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        cls, last, pooled = cls and self.has_cls, None, None
        scored = max(scored, default=-1)
        output = None
        if whole or kwargs or not self.is_plain(tower, max(*states, scored + 1)):
            hidden, output = _run_whole(tower, pixel_values, states, **kwargs)
            if self.has_cls:
                last, pooled = output.last_hidden_state[:, 0], output.pooler_output
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
        depth = len(tower.encoder.layers)
        rest = tower.encoder.layers[min(layers, depth - 1) :]
        modules = (
            tower,
            tower.encoder,
            tower.post_layernorm,
            *(one for layer in rest for one in layer.modules()),
        )
        if torch_module._has_any_global_hook() or not all(map(is_untouched, modules)):
            return False
        if not all(self._is(layer, 1) and self._is(layer.self_attn, 2) for layer in rest):
            return False
        name = tower.config._attn_implementation or "eager"
        return name in ("eager", "sdpa") or name.startswith("flash_attention")

    def _is(self, module: nn.Module, number: int) -> bool:
        return (type(module).__module__, type(module).__name__) == (self.source, self.classes[number])

    def _run_needed(
        self, tower: nn.Module, pixel_values: Tensor, states: Sequence[int], cls: bool, scored: int
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Hidden states ``states``, and the last layer at CLS before and after its norm, if needed.

        Layers after the last one needed are skipped. If the last layer is needed at CLS alone, only that row
        is computed after keys and values.

        Args:
            cls: whether the last layer is needed at CLS.
            scored: the last layer that scores patches.
        """
        layers = tower.encoder.layers
        depth = len(layers)
        cls_only = self.has_cls and depth not in states and (cls or scored == depth - 1)
        whole = depth - 1 if cls_only else max(*states, scored + 1)
        hidden = tower.embeddings(pixel_values)
        if self.first_norm is not None:
            hidden = getattr(tower, self.first_norm)(hidden)
        found = {0: hidden} if 0 in states else {}
        for number, layer in enumerate(layers[:whole]):
            hidden = layer(hidden, attention_mask=None)
            if number + 1 in states:
                found[number + 1] = hidden
        wanted = [found[state] for state in states]
        if not cls_only and not cls:
            return wanted, None, None
        last = _at_cls(layers[-1], hidden) if cls_only else hidden[:, 0]
        return wanted, last, tower.post_layernorm(last)


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


def _run_whole(
    tower: nn.Module, pixel_values: Tensor, states: Sequence[int], **kwargs
) -> tuple[list[Tensor], object]:
    """Hidden states ``states`` and the output of the module."""
    if not kwargs.get("output_hidden_states"):
        kwargs["output_hidden_states"] = list(states) if _SELECTS_HIDDEN_STATES else True
    # The tower does this on its first call; a compiled tower cannot, because of the lock it takes.
    output_capturing.maybe_install_capturing_hooks(unwrapped(tower))
    output = tower(pixel_values, return_dict=True, **kwargs)
    return [output.hidden_states[state] for state in states], output


def _at_cls(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The output of a layer at CLS, ``[T, C]``, for hidden states ``[T, N, C]``."""
    attention, (crops, tokens, _) = layer.self_attn, hidden.shape
    hidden = hidden.flatten(0, 1)
    cls = slice(None, None, tokens)
    normed = layer.layer_norm1(hidden)
    projected = attention.q_proj(normed[cls]), attention.k_proj(normed), attention.v_proj(normed)
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    shape = (crops, -1, attention.num_heads, attention.head_dim)
    output, _ = attend(
        attention,
        *(values.view(shape).transpose(1, 2) for values in projected),
        None,
        scaling=attention.scale,
        dropout=attention.dropout if attention.training else 0.0,
    )
    wanted = hidden[cls] + attention.out_proj(output.flatten(0, 1).flatten(1))
    return wanted + layer.mlp(layer.layer_norm2(wanted))
