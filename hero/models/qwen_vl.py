"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 (transformers ``Qwen…ForConditionalGeneration``), dense and MoE.

Images of any size, which the tower sees whole. Kept tokens keep their three-dimensional positions; features
that Qwen3-VL adds in several layers (DeepStack) are those of the same tokens. Videos are kept whole.
"""

from __future__ import annotations

import contextvars
import copy
import inspect
from dataclasses import replace

import torch

from .._checks import error
from ..layout import Geometry
from ..tiling import Blocks
from . import tower_for
from .base import Adapter, Parts, Patch, Shown, runs_of
from .processors import sizes_of

__all__ = ["ADAPTER"]

_is_video: contextvars.ContextVar[bool] = contextvars.ContextVar("hero_is_video", default=False)
_OUTPUTS = ("output_hidden_states", "output_attentions")


def get_image_features(self, original, pixel_values, image_grid_thw=None, **kwargs):
    if _is_video.get():
        return original(pixel_values, image_grid_thw, **kwargs)
    if image_grid_thw is None:
        raise error(ValueError, "image_grid_thw", "a tensor [images, 3], (1, rows, columns) of patches", None)
    handle, asked = self._hero, {name: kwargs[name] for name in _OUTPUTS if kwargs.get(name)}
    _, output, order = handle.images(pixel_values, image_grid_thw, **asked)
    output = copy.copy(output)  # generate repeats features in place
    output.pooler_output = tuple(output.pooler_output[number] for number in order)
    if getattr(output, "deepstack_features", None) is not None:
        levels = [[level[number] for number in order] for level in output.deepstack_features]
        if "mm_encoder_outputs" not in inspect.signature(type(self).forward).parameters:
            levels = [torch.cat(level) for level in levels]  # transformers < 5.18
        output.deepstack_features = levels
    return output if kwargs.get("return_dict", True) else output.to_tuple()


def get_video_features(self, original, *args, **kwargs):
    token = _is_video.set(True)  # Qwen3-VL and Qwen3.5 encode videos as images
    try:
        return original(*args, **kwargs)
    finally:
        _is_video.reset(token)


class QwenAdapter(Adapter):
    reads_prompt = True
    keeps_positions = True
    keep_ratio = 0.7

    def parts(self, model):
        kind, tower = tower_for(model.model.visual), model.model.visual
        size = kind.token_size(tower)
        return Parts(
            vision_tower=tower,
            projector=None,
            image_newline=None,
            geometry=Geometry(size, size, Blocks(), "none", newlines=False),
            feature_layer="last_hidden_state",
            image_token_id=model.config.image_token_id,
        )

    def shown(self, ids, parts, tokenizer):
        runs = runs_of(ids == parts.image_token_id)
        return [Shown(row, ((at, length),), None, number) for number, (row, at, length) in enumerate(runs)]

    def layouts(self, inputs, parts, config, shown):
        grids = inputs.get("image_grid_thw")
        is_new = inputs.get("pixel_values") is not None or inputs.get("mm_encoder_outputs")
        if is_new and not isinstance(grids, torch.Tensor):
            expected = "a tensor [images, 3], (1, rows, columns) of patches"
            raise error(ValueError if grids is None else TypeError, "image_grid_thw", expected, grids)
        if grids is None:
            return None
        layouts = tower_for(parts.vision_tower).layouts(parts.vision_tower, grids, parts.geometry)
        last = max((image.number for image in shown), default=-1)
        if is_new and len(layouts) <= last:
            expected = f"those of the {last + 1} images that prompts show"
            raise error(ValueError, "image_grid_thw", expected, [str(one) for one in layouts])
        return layouts

    def mixes_up_beams(self, layouts, rows, version):
        return version == (5, 18) and len(set(rows)) < len(rows)

    def check_processor(self, processor, parts):
        images = getattr(processor, "image_processor", None)
        if not hasattr(images, "merge_size") or not hasattr(processor, "replace_image_token"):
            raise TypeError(f"processor: expected that of a Qwen model, got {type(processor).__name__}")
        return self.cut(processor, parts.geometry, {})

    def cut(self, processor, geometry, options):
        images = processor.image_processor
        patch, merge = (options.get(name) or getattr(images, name) for name in ("patch_size", "merge_size"))
        if patch * merge != geometry.patch_size:
            expected = f"patch_size · merge_size = {geometry.patch_size}, as in the model"
            raise error(ValueError, "processor", expected, patch * merge)
        size = options.get("size") or images.size
        edges = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
        return replace(geometry, tiling=Blocks(*(options.get(name) or size[edge] for name, edge in edges)))

    def other_tokens(self, processor, count, layout):
        return 0

    def model_patches(self, model):
        functions = (get_image_features, get_video_features)
        return [Patch(model.model, function.__name__, function) for function in functions]

    def processed(self, processor, geometry, outputs, images):
        merge = processor.image_processor.merge_size
        grids, sizes = torch.as_tensor(outputs["image_grid_thw"]).tolist(), sizes_of(images)
        return [
            geometry.of_tokens(rows // merge, columns // merge, size)
            for (_, rows, columns), size in zip(grids, sizes, strict=True)
        ]


ADAPTER = QwenAdapter()
