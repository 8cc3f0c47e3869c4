"""Time the vision stage of each family's tower, at its real shape with random weights.

``python -m bench.towers --out bench/results/FILE.json``. Each model sees one image of two tiles and a thumbnail.
Variants take turns in each round: the stock model's ``get_image_features``, hero at R = 0.2, and two policies
that share the budgets out equally: ``uniform`` scores patches by attention, ``random`` reads no attention at
all. Their difference is the cost of the scores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch
import transformers
from torch import Tensor

import hero

from . import records, timing

TEXT = {"hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 1000}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}
CLIP |= {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "patch_size": 14}
SIGLIP |= {"num_hidden_layers": 27, "image_size": 384}
ONEVISION = SIGLIP | {"model_type": "siglip_vision_model", "num_hidden_layers": 26, "vision_use_head": False}
INTERNVIT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": [448, 448],
}
INTERNVIT |= {"num_attention_heads": 16, "patch_size": [14, 14], "attention_bias": True}
LLAMA, QWEN = TEXT | {"model_type": "llama"}, TEXT | {"model_type": "qwen2"}

# Name: configuration of the model, and whether the crops of an image are one entry of the pixels.
MODELS = {
    "LLaVA-NeXT, CLIP-L/14-336": ("LlavaNext", {"vision_config": CLIP, "text_config": LLAMA}, True),
    "LLaVA-OneVision, SigLIP-so400m/14-384": (
        "LlavaOnevision",
        {"vision_config": ONEVISION, "text_config": QWEN},
        True,
    ),
    "InternVL3, InternViT-300M-448": ("InternVL", {"vision_config": INTERNVIT, "text_config": QWEN}, False),
    "SmolVLM, SigLIP-so400m/14-384": (
        "SmolVLM",
        {"vision_config": SIGLIP, "text_config": LLAMA, "scale_factor": 3},
        True,
    ),
}
POLICIES = {"hero 0.2": "hero", "uniform 0.2": "uniform", "random 0.2": "random"}


def build(name: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A model with random weights, and the arguments of its ``get_image_features``."""
    family, fields, is_nested = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    model = model.eval().requires_grad_(False)
    size = fields["vision_config"]["image_size"]
    size = size if isinstance(size, int) else size[0]
    pixels = torch.randn(3, 3, size, size)
    given = {"pixel_values": pixels[None] if is_nested else pixels}
    if family.startswith("Llava"):
        given["image_sizes"] = torch.tensor([[size, 2 * size]])
    return model, given


def measure(name: str, rounds: int) -> dict[str, object]:
    """Seconds of each variant in each round, and the tokens of the image."""
    model, given = build(name)
    seconds: dict[str, list[float]] = {variant: [] for variant in ("stock", *POLICIES)}
    tokens = {}
    for turn in range(rounds):
        for variant in timing.take_turns(list(seconds), turn):
            if variant == "stock":
                call = partial(model.model.get_image_features, **given)
                seconds[variant].append(timing.seconds(call))
                continue
            with hero.attach(model, keep_ratio=0.2, policy=POLICIES[variant]) as handle:
                geometry = handle.parts.geometry
                size = geometry.crop_size
                layout = geometry.layout((size, 2 * size))
                layout = layout if layout.tiles == 2 else geometry.of_grid((1, 2))
                tokens = {"stock": layout.full_tokens, "hero 0.2": layout.kept_tokens(handle.config)}
                crops = given["pixel_values"].flatten(0, -4)
                seconds[variant].append(timing.seconds(partial(handle.encoder, crops, [layout])))
    return {"tokens": tokens, "seconds": seconds}


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.towers", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=timing.positive, default=5, help="rounds of each model")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="default: all")
    options = parser.parse_args(arguments)
    record = records.environment("towers", "python -m bench.towers", arguments)
    record |= {"dtype": "float32", "threads": torch.get_num_threads(), "models": {}}
    for name in options.model or MODELS:
        with torch.inference_mode():
            record["models"][name] = measure(name, options.rounds)
        records.write(options.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
