"""Idefics3 (transformers ``Idefics3ForConditionalGeneration``): thumbnail last, a run of placeholders a crop.

The prompt has a separator before each crop, which tells the grid of tiles. How many tokens of a tile are
kept depends on the image, and so do the lengths of the runs; their sum does not. An attached processor writes
equal runs, which are set right once the images are encoded.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from hero_kernels.segments import to_device

from .._checks import error
from ..layout import Geometry
from ..plan import check_shown_crops
from ..tiling import LongestEdge, Whole
from . import tower_for
from .base import Adapter, Parts, Patch, Shown, check_tokens, token_blocks

__all__ = ["ADAPTER"]

_SEPARATOR = re.compile(r"<row_(\d+)_col_(\d+)>|<global-img>")
_LONGEST_EDGE = 4  # of the published image processors, in crops


def get_image_features(self, original, pixel_values, pixel_attention_mask=None, **kwargs):
    tokens, _ = self._hero.image_tokens(pixel_values, None)
    return token_blocks(tokens, kwargs.get("return_dict", True))


class Idefics3Adapter(Adapter):
    reads_prompt = True
    has_run_per_crop = True
    takes_frames_for_images = True
    takes_features = False

    def parts(self, model):
        config, tower = model.config, model.model.vision_model
        crop_size, patch_size = tower_for(tower).geometry(tower)
        tiling = LongestEdge(_LONGEST_EDGE * crop_size)
        return Parts(
            vision_tower=tower,
            projector=model.model.connector.modality_projection,
            image_newline=None,
            geometry=Geometry(
                crop_size, patch_size * config.scale_factor, tiling, "last", stitched=False, newlines=False
            ),
            feature_layer="last_hidden_state",
            image_token_id=config.image_token_id,
        )

    def shown(self, ids, parts, tokenizer):
        separators = {
            number: match
            for word, number in tokenizer.get_vocab().items()
            if (match := _SEPARATOR.fullmatch(word))
        }
        before, images = tokenizer.convert_tokens_to_ids("<fake_token_around_image>"), []
        for row, line in enumerate(ids.tolist()):
            runs: list[tuple[int, int]] = []
            grid = 0, 0
            for at, number in enumerate(line):
                if number not in separators or line[at - 1] != before:  # a model may write any token
                    continue
                end = at + 1
                while end < len(line) and line[end] == parts.image_token_id:
                    end += 1
                runs.append((at + 1, end - at - 1))
                if separators[number][1] is None:
                    images.append(Shown(row, tuple(runs), grid))
                    runs, grid = [], (0, 0)
                else:
                    grid = int(separators[number][1]), int(separators[number][2])
        return images

    def layouts(self, inputs, parts, config, shown):
        pixels, mask = inputs.get("pixel_values"), inputs.get("pixel_attention_mask")
        if pixels is None:
            return None
        prompts = len(inputs["input_ids"])
        if pixels.dim() != 5 or len(pixels) != prompts:
            expected = f"[{prompts} prompts, crops, 3, S, S]"
            raise ValueError(f"pixel_values: expected {expected}, got shape {tuple(pixels.shape)}")
        counts = [0] * prompts
        for image in shown:
            if len(image.runs) != image.grid[0] * image.grid[1] + 1:
                expected, found = "a separator for each tile, then that of the thumbnail", len(image.runs)
                raise error(ValueError, "input_ids", expected, f"{found} separators of {image.grid}")
            counts[image.row] += len(image.runs)
        check_shown_crops(pixels, mask, counts)
        return [parts.geometry.of_grid(image.grid) for image in shown]

    def crops(self, pixel_values, layouts, rows, parts):
        counts = [0] * len(pixel_values)
        for layout, row in zip(layouts, rows, strict=True):
            counts[row] += layout.crops
        most = pixel_values.shape[1]
        index = torch.tensor([row * most + crop for row, count in enumerate(counts) for crop in range(count)])
        crops = pixel_values.flatten(0, 1)[to_device(index, pixel_values.device)]
        return crops.to(parts.vision_tower.dtype)

    def mixes_up_beams(self, layouts, rows, version):
        return version == (5, 18)

    def check_processor(self, processor, parts):
        if not hasattr(processor, "image_seq_len") or not hasattr(processor, "fake_image_token"):
            name = "an Idefics3Processor or a SmolVLMProcessor"
            raise TypeError(f"processor: expected {name}, got {type(processor).__name__}")
        check_tokens("image_seq_len", processor.image_seq_len, parts.geometry)
        return self.cut(processor, parts.geometry, {})

    def cut(self, processor, geometry, options):
        def option(name):
            value = options.get(name)
            return getattr(processor.image_processor, name) if value is None else value

        crop = option("max_image_size")["longest_edge"]
        if crop != geometry.crop_size:
            raise error(
                ValueError, "max_image_size of the processor", f"crops of {geometry.crop_size} px", crop
            )
        tiling = LongestEdge(option("size")["longest_edge"]) if option("do_image_splitting") else Whole()
        return replace(geometry, tiling=tiling)

    def model_patches(self, model):
        return [Patch(model.model, "get_image_features", get_image_features)]

    def processed(self, processor, geometry, outputs, images):
        rows, columns = ([n for one in outputs[name] for n in one] for name in ("rows", "cols"))
        return [geometry.of_grid(grid) for grid in zip(rows, columns, strict=True)]

    def other_tokens(self, processor, count, layout):
        newlines = len(processor.tokenizer("\n\n", add_special_tokens=False)["input_ids"]) - 1
        rows, columns = layout.grid
        return 3 + (newlines if rows else 0) + rows * (2 * columns + 1)


ADAPTER = Idefics3Adapter()
