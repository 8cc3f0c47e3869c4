"""InternVL (transformers ``InternVLForConditionalGeneration``): thumbnail last, 2 × 2 patches merged.

The model's inputs do not tell which crops make an image. Each image is one run of placeholders, whose length
tells how many; how they are arranged only an attached processor tells.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .._checks import error
from ..layout import Geometry
from ..tiling import NearestAspect, Whole
from . import tower_for
from .base import Adapter, Parts, Patch, Shown, check_tokens, runs_of, token_blocks
from .processors import sizes_of, with_ratios

__all__ = ["ADAPTER", "feature_layer"]


def get_image_features(
    self, original, pixel_values, vision_feature_layer=None, vision_feature_select_strategy=None, **kwargs
):
    strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
    layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
    pixel_values, layer = pixel_values.to(self.dtype), feature_layer(layer, strategy)
    tokens, _ = self._hero.image_tokens(pixel_values, None, feature_layer=layer)
    return token_blocks(tokens, kwargs.get("return_dict", True))


def feature_layer(layer, strategy):
    """``vision_feature_layer`` as the encoder takes it: -1 is the last one after the tower's last norm."""
    if strategy != "default":
        raise error(ValueError, "vision_feature_select_strategy", "'default' (without CLS)", strategy)
    if not isinstance(layer, int):
        raise error(TypeError, "vision_feature_layer", "an integer", layer)
    return "last_hidden_state" if layer == -1 else layer


class InternVLAdapter(Adapter):
    reads_prompt = True
    takes_frames_for_images = True
    takes_features = False
    ours = ("keep_ratios", "image_grids", "image_sizes")  # with image_sizes a prefill cannot be chunked

    def parts(self, model):
        config, tower = model.config, model.model.vision_tower
        crop_size, patch_size = tower_for(tower).geometry(tower)
        token_size = patch_size * round(1 / config.downsample_ratio)
        return Parts(
            vision_tower=tower,
            projector=model.model.multi_modal_projector,
            image_newline=None,
            geometry=Geometry(crop_size, token_size, NearestAspect(), "last", stitched=False, newlines=False),
            feature_layer=feature_layer(config.vision_feature_layer, config.vision_feature_select_strategy),
            image_token_id=config.image_token_id,
        )

    def shown(self, ids, parts, tokenizer):
        return [Shown(row, ((at, length),)) for row, at, length in runs_of(ids == parts.image_token_id)]

    def layouts(self, inputs, parts, config, shown):
        pixels, sizes, ratios = (inputs.get(name) for name in ("pixel_values", "image_sizes", "keep_ratios"))
        if pixels is None:
            return None
        geometry, lengths = parts.geometry, [image.runs[0][1] for image in shown]
        ways = (lambda one: one.kept_tokens(config)), (lambda one: one.full_tokens)
        if sizes is not None:  # of an attached processor
            layouts, grids = geometry.layouts(sizes), inputs.get("image_grids")
            if grids is not None:  # a tensor or lists
                if len(grids) != len(layouts):
                    raise error(ValueError, "image_grids", f"one for each of {len(layouts)} images", grids)
                grids = map(tuple, torch.as_tensor(grids).tolist())
                layouts = list(map(geometry.of_grid, grids, [one.image_size for one in layouts]))
            layouts = layouts if ratios is None else with_ratios("keep_ratios", layouts, ratios)
            fits = any(list(map(count, layouts)) == lengths for count in ways)
            if fits and sum(one.crops for one in layouts) == len(pixels):
                return layouts
            raise ValueError(
                f"image_sizes: expected those of {len(pixels)} crops, whose runs are {lengths}, got those of "
                f"{[one.crops for one in layouts]} crops"
            )
        tiles = range(2, len(pixels))
        some = [geometry.of_grid((0, 0)), *(geometry.of_grid((1, k), is_known=False) for k in tiles)]
        choices = [some] * len(lengths)
        if ratios is not None:
            ratios = [one.keep_ratio for one in with_ratios("keep_ratios", some[:1] * len(lengths), ratios)]
            choices = [with_ratios("keep_ratios", some, [ratio] * len(some)) for ratio in ratios]
        for count in ways:
            fitting = [
                [one for one in own if count(one) == length]
                for own, length in zip(choices, lengths, strict=True)
            ]
            if not all(fitting):
                continue
            if any(len(each) > 1 for each in fitting):
                raise ValueError(
                    "processor: expected one with hero attached, or a keep ratio of at least "
                    f"{1 / geometry.side**2:.3g}, for which the number of tokens tells that of tiles"
                )
            if sum(one.crops for [one] in fitting) == len(pixels):
                return [one for [one] in fitting]
        raise ValueError(
            f"input_ids: expected runs of placeholders that fit {len(pixels)} crops, as kept (processor "
            f"attached) or as stock, got runs of {lengths}"
        )

    def feature_layer(self, layer):
        return None if layer is None else feature_layer(layer, "default")

    def mixes_up_beams(self, layouts, rows, version):
        return version < (5, 19) and (len(set(rows)) < len(rows) or any(one.tiles for one in layouts))

    def check_processor(self, processor, parts):
        image_processor = getattr(processor, "image_processor", None)
        if not hasattr(processor, "image_seq_length") or not hasattr(image_processor, "max_patches"):
            raise TypeError(f"processor: expected an InternVLProcessor, got {type(processor).__name__}")
        check_tokens("image_seq_length", processor.image_seq_length, parts.geometry)
        return self.cut(processor, parts.geometry, {})

    def cut(self, processor, geometry, options):
        images = processor.image_processor
        size = options.get("size") or images.size
        if (size["height"], size["width"]) != (geometry.crop_size,) * 2:
            raise error(ValueError, "size of the processor", f"crops of {geometry.crop_size} px", dict(size))
        least, most = (options.get(name) or getattr(images, name) for name in ("min_patches", "max_patches"))
        is_cut = options.get("crop_to_patches", True) and most > 1
        tiling = NearestAspect(least, most) if is_cut else Whole()
        return replace(geometry, tiling=tiling)

    def model_patches(self, model):
        return [Patch(model.model, "get_image_features", get_image_features)]

    def processed(self, processor, geometry, outputs, images):
        layouts = geometry.layouts(sizes_of(images))
        counts = [int(count) for count in outputs["num_patches"]]
        if counts != [one.crops for one in layouts]:
            raise error(ValueError, "processor", f"{[one.crops for one in layouts]} crops of images", counts)
        outputs["image_sizes"] = [list(one.image_size) for one in layouts]
        if geometry != processor._hero.geometry:  # options of the call cut otherwise
            outputs["image_grids"] = [list(one.grid) for one in layouts]
        return layouts


ADAPTER = InternVLAdapter()
