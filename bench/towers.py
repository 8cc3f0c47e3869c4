"""The vision stage of each family on one thread of a CPU: stock, with dropping, and the cost of scores.

Towers and projectors have real shapes and random weights; the language model never runs. The image has two
tiles and a thumbnail, or 16 × 32 tokens where the tower sees it whole. ``hero`` is the default policy at R =
0.2, ``uniform`` reads the same attention rows without tile signals, ``random`` reads none: ``uniform`` to
``random`` is the cost of the rows. Variants take turns on copies that share their weights, and times are
processor time, which does not count other processes.

``python -m bench.towers --out bench/results/towers_cpu.json``; then ``python -m bench.report``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import hero
from hero.layout import ImageLayout
from hero.tiling import Blocks

from . import timing
from .end_to_end import TOLERANCE
from .models import CLIP_L, SIZES, SPECIAL, Shape, build_processor, random_model, shared_copy
from .records import environment, write

KEEP, ROUNDS = 0.2, 3  # a call takes up to half a minute
POLICIES = ("hero", "uniform", "random")
SO400M = dataclasses.replace(CLIP_L, vision=(27, 1152, 16, 4304), crop_size=384)
# By model type: the shape, whose language model gives the projector its width, and how patches are merged.
SHAPES: dict[str, tuple[Shape, dict]] = {
    "llava_next": (dataclasses.replace(CLIP_L, text=(1, 4096, 32, 64)), {}),
    "llava_onevision": (
        dataclasses.replace(SO400M, vision=(26, *SO400M.vision[1:]), text=(1, 3584, 28, 64)),
        {"vision": {"model_type": "siglip_vision_model", "vision_use_head": False}},
    ),
    "internvl": (
        dataclasses.replace(CLIP_L, text=(1, 3584, 28, 64), crop_size=448),
        {"vision": {"attention_bias": True}},
    ),
    "smolvlm": (dataclasses.replace(SO400M, text=(1, 2048, 32, 64)), {"scale_factor": 3}),
    "qwen2_5_vl": (dataclasses.replace(CLIP_L, vision=(32, 1280, 16, 3420), text=(1, 3584, 28, 64)), {}),
    "qwen3_vl": (
        dataclasses.replace(CLIP_L, vision=(27, 1152, 16, 4304), text=(1, 4096, 32, 64), patch_size=16),
        {},
    ),
}
WHOLE = 16, 32  # tokens
SMALL = {"vision": (4, 64, 4, 128), "text": (1, 64, 4, 128), "crop_size": 84}


def build(family: str, shape: Shape, vision: Mapping | None = None, **fields) -> torch.nn.Module:
    """Build a random model of a family."""
    square = {"image_size": shape.crop_size, "patch_size": shape.patch_size}
    vision = dict(zip(SIZES, shape.vision)) | square | dict(vision or {})
    if family.startswith("qwen"):
        depth, width, heads, hidden = shape.vision
        vision = {"depth": depth, "hidden_size": width, "num_heads": heads, "intermediate_size": hidden}
        vision |= {"patch_size": shape.patch_size, "out_hidden_size": shape.text[1]}
        vision["fullatt_block_indexes"] = list(range(depth // 4 - 1, depth, depth // 4))
        fields["image_token_id"] = SPECIAL["eos_token_id"] + 1
    text = dict(zip(SIZES, shape.text)) | SPECIAL | {"vocab_size": shape.vocabulary}
    if family.startswith("llava"):
        fields["image_grid_pinpoints"] = shape.pinpoints
    config = AutoConfig.for_model(family, vision_config=vision, text_config=text, **fields)
    config.text_config.num_key_value_heads = shape.text[2]
    return random_model(AutoModelForImageTextToText, config, torch.device("cpu"), torch.float32)


def attach(model: torch.nn.Module, **options) -> hero.Handle:
    """Attach hero; any tokenizer will do, since no prompt is read."""
    return hero.attach(model, tokenizer=build_processor(CLIP_L).tokenizer, **options)


def ready(family: str, model: torch.nn.Module) -> tuple[ImageLayout, dict[str, Callable]]:
    """The image and the calls to time; R = 1 was checked to give the stock tokens.

    Raises:
        RuntimeError: it does not.
    """
    with attach(model, keep_ratio=1.0) as handle:
        geometry = handle.encoder.geometry
        if isinstance(geometry.tiling, Blocks):
            layout, channels = geometry.of_tokens(*WHOLE), model.config.vision_config.in_channels * 2
            pixels = torch.randn(4 * layout.full_tokens, channels * (geometry.patch_size // 2) ** 2)
        else:
            layout = geometry.of_grid((1, 2), (geometry.crop_size, 2 * geometry.crop_size))
            pixels = torch.randn(layout.crops, 3, geometry.crop_size, geometry.crop_size)
        ours = handle.encoder(pixels, [layout]).tokens
    given = (pixels if family == "internvl" or layout.is_whole else pixels[None],)
    given += (torch.tensor([layout.image_size]),) if family.startswith("llava") else ()
    given += (torch.tensor([[1, *(2 * side for side in WHOLE)]]),) if layout.is_whole else ()
    calls = {"stock": lambda: model.model.get_image_features(*given, return_dict=True).pooler_output}
    stock = torch.cat([one.flatten(0, -2) for one in calls["stock"]()])
    worst = float((stock - ours).abs().max() / stock.abs().max())  # raises for other shapes
    if not worst <= TOLERANCE[torch.float32]:
        raise RuntimeError(f"keep_ratio=1: expected the stock tokens, they differ by {worst}")
    for policy in POLICIES:
        handle = attach(shared_copy(model), keep_ratio=KEEP, policy=policy)
        calls[policy] = lambda handle=handle: handle.encoder(pixels, [layout])
    return layout, calls


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.towers", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=timing.positive, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test the script")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about = {"small": options.small, "clock": "cpu", "dtype": "float32", "threads": 1, "towers": []}
    record = {**environment("towers", "python -m bench.towers", arguments), **about}
    for family, (shape, fields) in SHAPES.items():
        shape = dataclasses.replace(shape, **(SMALL if options.small else {}))
        with torch.inference_mode():
            layout, calls = ready(family, build(family, shape, **fields))
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            found = {"family": family, "vision": shape.vision, "crops": layout.crops, "seconds": seconds}
            found["tokens"] = [layout.full_tokens, layout.kept_tokens(hero.HeroConfig(KEEP))]
            for turn in range(options.rounds):
                for name in timing.take_turns(list(calls), turn):
                    seconds[name].append(timing.seconds(calls[name], "cpu"))
        found["to stock"] = {name: timing.compare(seconds[name], seconds["stock"]) for name in POLICIES}
        found["rows"] = timing.compare(seconds["uniform"], seconds["random"])
        record["towers"].append(found)
        write(options.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
