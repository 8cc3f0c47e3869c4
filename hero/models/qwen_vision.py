"""Vision towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: images of any size, packed into one sequence.

No CLS token, 2 × 2 patches merged inside the tower, attention within images, in Qwen2.5-VL mostly within
windows. What follows from sizes is computed on the host and passed to the stock tower, which then reads
nothing back from the device.
"""

from __future__ import annotations

import torch
from transformers import vision_utils

from hero_kernels.segments import to_device

from .towers import PackedTower, unwrapped

__all__ = ["TOWER"]


class QwenVision(PackedTower):
    def attention_modules(self, tower):
        return {number: block.attn for number, block in enumerate(unwrapped(tower).blocks)}

    def merge_size(self, tower):
        return unwrapped(tower).spatial_merge_size

    def token_size(self, tower):
        return unwrapped(tower).config.patch_size * self.merge_size(tower)

    def channels(self, tower):
        config = unwrapped(tower).config
        return config.in_channels * config.temporal_patch_size * config.patch_size**2

    def scoring_layers(self, tower):
        tower = unwrapped(tower)
        every = range(len(tower.blocks))
        layers = tuple(layer for layer in every if layer in getattr(tower, "fullatt_block_indexes", every))
        if not layers:
            raise ValueError("vision_tower: expected one with layers of full attention, got none")
        return layers

    def is_flash(self, tower):
        return "flash" in (unwrapped(tower).config._attn_implementation or "")

    def inputs(self, tower, grids, device):
        tower, grid, order = unwrapped(tower), torch.tensor(grids), None
        config, merge = tower.config, tower.spatial_merge_size
        places = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(grid)}
        tensors = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)}
        numbers = {"max_seqlen": max(height * width for _, height, width in grids)}
        if hasattr(tower, "fullatt_block_indexes"):
            window, begins = vision_utils.get_vision_window_index(
                grid, merge, config.window_size, config.patch_size
            )
            tensors["window_index"], places["cu_window_seqlens"] = window, begins
            numbers["max_window_seqlen"] = int(begins.diff().max())
            order = to_device(window.argsort(), device)
        if hasattr(tower, "pos_embed"):
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grid,
                tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            tensors |= {"interp_indices": indices, "interp_weights": weights}
        if self.is_flash(tower):  # otherwise its layers read the places: they stay here
            tensors |= places
        moved = {name: to_device(tensor, device) for name, tensor in tensors.items()}
        return {"grid_thw": grid, **places, **moved, **numbers}, order

    def run(self, tower, pixel_values, inputs, **kwargs):
        return tower(pixel_values.type(unwrapped(tower).dtype), **inputs, return_dict=True, **kwargs)


TOWER = QwenVision()
