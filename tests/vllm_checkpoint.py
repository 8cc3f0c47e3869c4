"""The mini model as vLLM's attention on a CPU can run it: with heads of 32 channels instead of 16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hero import mini

WIDE = 32
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
    text = config["text_config"]
    narrow, heads = text["head_dim"], text["num_attention_heads"]
    text["head_dim"], config["dtype"] = WIDE, "float32"
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        value = value.float()
        if "language_model" in name and "self_attn" in name:
            value = _widened(name, value, heads, narrow)
        weights[name.replace("vision_tower.", prefix, 1)] = value.contiguous()
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


def _widened(name: str, weight: torch.Tensor, heads: int, narrow: int) -> torch.Tensor:
    """A projection of attention with zeros in the new channels of each head.

    Pair i of a narrow head rotates by the angle of pair ``i * WIDE / narrow`` of a wide one: it moves there.
    Attention divides by the root of the width, for which the queries make up.
    """
    channels = torch.arange(narrow)
    if "q_proj" in name or "k_proj" in name:
        half, step = channels % (narrow // 2), WIDE // narrow
        channels = channels // (narrow // 2) * (WIDE // 2) + half * step
    if "o_proj" in name:
        wide = weight.new_zeros(weight.shape[0], heads, WIDE)
        wide[:, :, channels] = weight.unflatten(1, (heads, narrow))
        return wide.flatten(1)
    wide = weight.new_zeros(heads, WIDE, weight.shape[1])
    wide[:, channels] = weight.unflatten(0, (heads, narrow))
    return wide.flatten(0, 1) * ((WIDE / narrow) ** 0.5 if "q_proj" in name else 1.0)
