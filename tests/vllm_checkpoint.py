"""Checkpoints of the mini model's weights as vLLM loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hero import mini

SHARED = (
    "hidden_size",
    "intermediate_size",
    "image_size",
    "patch_size",
    "num_attention_heads",
    "num_hidden_layers",
)
TEMPLATE = (
    "<bos>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def write(folder: Path, prefix: str = "vision_tower.vision_model.", family: str = "llava_next") -> Path:
    """Write a checkpoint that computes what the mini model does, in fp32.

    Args:
        folder: where to.
        prefix: of the vision tower's parameters; checkpoints have several.
        family: ``"llava"`` is LLaVA-1.5 with the same weights, ``"siglip"`` LLaVA-NeXT with a random SigLIP
            tower, of which it uses two layers, as Granite Vision does.
    """
    shutil.copytree(
        mini.WEIGHTS, folder, ignore=shutil.ignore_patterns("clip_head*")
    )  # vLLM loads all of a folder
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "processor_config.json").read_text())
    config["dtype"] = "float32"
    weights = {
        name.replace("vision_tower.", prefix, 1): value.float()
        for name, value in load_file(folder / "model.safetensors").items()
    }
    if family == "llava":
        _make_llava(config, processor, weights)
    elif family == "siglip":
        _make_siglip(config, processor, weights, prefix)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _make_llava(config: dict, processor: dict, weights: dict) -> None:
    config |= {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    processor["processor_class"] = "LlavaProcessor"
    processor["image_processor"]["image_processor_type"] = "CLIPImageProcessor"
    for settings in (config, processor["image_processor"]):
        del settings["image_grid_pinpoints"]
    del processor["image_processor"]["do_pad"], weights["image_newline"]


def _make_siglip(config: dict, processor: dict, weights: dict, prefix: str) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    vision = {name: config["vision_config"][name] for name in SHARED}
    config["vision_config"] = {**vision, "model_type": "siglip_vision_model", "vision_use_head": False}
    config |= {"vision_feature_layer": [-3, -1], "vision_feature_select_strategy": "full"}
    processor |= {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    for name in [name for name in weights if name.startswith(prefix)]:
        del weights[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = SiglipVisionModel(SiglipVisionConfig(**vision, vision_use_head=False))
        weights["multi_modal_projector.linear_1.weight"] = torch.randn(64, 2 * vision["hidden_size"]) / 8
    weights |= {prefix + name: value.contiguous() for name, value in tower.state_dict().items()}
