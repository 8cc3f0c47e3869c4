"""Checkpoints of small random models of InternVL, in both of its formats, and LLaVA-OneVision.

They are those of ``independent_families.py``, with heads of 32 channels, the least that vLLM's attention on a
CPU can run.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from independent_families import CROP, PINPOINTS, VOCABULARY, family_tokenizer, tiny_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

IMAGE = {"internvl": "<IMG_CONTEXT>", "internvl_chat": "<image>", "llava_onevision": "<image>"}
VIDEO = "<video>"
TEXT = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "tie_word_embeddings": False,
}
# What transformers calls the vision encoder's parameters, and InternVL's own format; in this order.
OWN_NAMES = {
    "model.vision_tower.": "vision_model.",
    "embeddings.cls_token": "embeddings.class_embedding",
    "position_embeddings": "position_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "attention.": "attn.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "ls",
    "model.multi_modal_projector.layer_norm": "mlp1.0",
    "model.multi_modal_projector.linear_1": "mlp1.1",
    "model.multi_modal_projector.linear_2": "mlp1.3",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
CONFIGURATION = """
from transformers import PretrainedConfig, Qwen2Config

class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
        super().__init__(**kwargs)
"""


def write(folder: Path, family: str) -> PreTrainedModel:
    """Write a checkpoint, and return its model.

    Args:
        folder: where to.
        family: ``"internvl"``, ``"internvl_chat"`` with the same weights in InternVL's own format,
            or ``"llava_onevision"``.
    """
    kind = family.removesuffix("_chat")
    model = tiny_model(family=kind, text_config=TEXT, tie_word_embeddings=False)
    model.save_pretrained(folder)
    square, tokenizer = {"height": CROP, "width": CROP}, family_tokenizer()
    if kind == "internvl":
        images = transformers.GotOcr2ImageProcessor(size=square)
        videos = transformers.InternVLVideoProcessor(size=square)
        processor = transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=16)
    else:
        _save(folder, {_published(name): value for name, value in model.state_dict().items()})
        grids = [list(one) for one in PINPOINTS]
        images = transformers.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=grids)
        videos = transformers.LlavaOnevisionVideoProcessor(size=square)
        own = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
        processor = transformers.LlavaOnevisionProcessor(images, tokenizer, videos, **own)
    processor.save_pretrained(folder)
    if family == "internvl_chat":
        _make_chat(folder, model)
        tokenizer.add_tokens(["<|video_pad|>"], special_tokens=True)  # of Qwen2, for videos
        tokenizer.save_pretrained(folder)
    return model


def _published(name: str) -> str:
    """The name of a parameter in published checkpoints, the only one that vLLM's own SigLIP loads."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def _save(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    weights = {name: value.contiguous() for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _make_chat(folder: Path, model: PreTrainedModel) -> None:
    config, weights = json.loads((folder / "config.json").read_text()), {}
    for name, value in model.state_dict().items():
        for found, own in OWN_NAMES.items():
            name = name.replace(found, own)
        weights[name] = value
    queries = [name for name in weights if "vision_model" in name and ".q_proj." in name]
    for name in queries:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("q_proj", "qkv")] = torch.cat(parts)
    _save(folder, weights)
    vision = config["vision_config"]
    vision = {name: value[0] if isinstance(value, list) else value for name, value in vision.items()}
    vision |= {"qkv_bias": vision["attention_bias"], "qk_normalization": vision["use_qk_norm"]}
    vision |= {"model_type": "intern_vit_6b", "initializer_factor": 1.0}
    own = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "vision_config": vision,
        "llm_config": TEXT,
        "select_layer": -1,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "force_image_size": CROP,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "configuration_internvl_chat.py").write_text(CONFIGURATION)
    (folder / "processor_config.json").unlink()
