"""CLIP vision towers (transformers ``CLIPVisionModel``): a CLS token, no merging."""

from __future__ import annotations

from functools import lru_cache

import torch

from . import Tower

__all__ = ["TOWER"]


@lru_cache(maxsize=1)
def _selects_hidden_states() -> bool:
    """Whether this transformers can keep the asked-for hidden states alone; older ones keep all or misread."""
    from transformers.utils import output_capturing

    return hasattr(output_capturing, "resolve_hidden_states_indices")


class ClipTower(Tower):
    def attention_modules(self, tower):
        tower = getattr(tower, "_orig_mod", tower)
        return {number: layer.self_attn for number, layer in enumerate(tower.encoder.layers)}

    def geometry(self, tower):
        return tower.config.image_size, tower.config.patch_size

    def run(self, tower, pixel_values, feature_layer, **kwargs):
        layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        if not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = layers if _selects_hidden_states() else True
        output = tower(pixel_values, return_dict=True, **kwargs)
        states = [output.hidden_states[layer] for layer in layers]
        features = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        return features[:, 1:], output.last_hidden_state[:, 0], output.pooler_output, output


TOWER = ClipTower()
