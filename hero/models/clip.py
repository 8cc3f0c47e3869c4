"""CLIP vision towers (transformers ``CLIPVisionModel``): a CLS token, no merging."""

from __future__ import annotations

import torch
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

    def run(self, tower, pixel_values, feature_layer, **kwargs):
        layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        if not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = layers if _SELECTS_HIDDEN_STATES else True
        # The tower does this on its first call; a compiled tower cannot, for the lock it takes.
        output_capturing.maybe_install_capturing_hooks(getattr(tower, "_orig_mod", tower))
        output = tower(pixel_values, return_dict=True, **kwargs)
        states = [output.hidden_states[layer] for layer in layers]
        features = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        return features[:, 1:], output.last_hidden_state[:, 0], output.pooler_output, output


TOWER = ClipTower()
