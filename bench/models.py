"""Models, processors and images of the end-to-end benchmark.

Times do not depend on the weights, so large shapes have random ones, made on the device and in the dtype they
run in.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedConfig,
)

import hero
from hero import mini
from hero.layout import grid_pinpoints

from .records import ROOT

PHOTOGRAPH = "bench/data/astronaut.jpg"
QUESTION = "what is in this picture ?"
PROMPT = f"<image> {QUESTION}"
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}  # of the mini model's tokenizer


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: layers, width, heads and MLP of each transformer; pixels of crop and patch.

    Attributes:
        text: the language model.
        clip_text: CLIP's text encoder; ``projection`` is the width of its embeddings.
        batches: the batches to measure, each as the (height, width) of its images.
    """

    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    clip_text: tuple[int, int, int, int]
    projection: int
    crop_size: int
    patch_size: int
    batches: tuple[tuple[tuple[int, int], ...], ...]
    vocabulary: int = 1000

    @property
    def pinpoints(self) -> list[list[int]]:
        return [list(pinpoint) for pinpoint in grid_pinpoints(self.crop_size)]


CLIP_L = Shape((24, 1024, 16, 4096), (), (12, 768, 12, 3072), 768, crop_size=336, patch_size=14, batches=())
MIXED = ((672, 672), (480, 640), (768, 1024), (375, 500))
SHAPES = {
    "7b": replace(CLIP_L, text=(32, 4096, 32, 11008), vocabulary=32064, batches=(((672, 672),), 2 * MIXED)),
    # One row of two tiles and a small language model: a round takes minutes on a CPU.
    "clip-l": replace(CLIP_L, text=(8, 1024, 16, 2816), batches=(((336, 672),),)),
    "small": Shape(
        *((4, 64, 4, 128), (2, 64, 4, 128), (2, 32, 2, 64), 32),
        crop_size=56,
        patch_size=14,
        batches=(((112, 112),), ((112, 112), (70, 140))),
    ),
}


class Batch(NamedTuple):
    """Images, with a question and a prompt each."""

    images: list[Image.Image]
    questions: list[str]
    prompts: list[str]


class Subject(NamedTuple):
    """What is measured; ``relevance`` shares the model's vision tower."""

    model: LlavaNextForConditionalGeneration
    processor: LlavaNextProcessor
    relevance: hero.ClipRelevance
    batches: list[Batch]


def random_model(model_class, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype):
    """Make a model on a device and in a dtype, its weights from a fixed seed."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = model_class.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def shared_copy(model, *more):
    """Copy a model, and what is given beside it; the weights are shared."""
    weights = {id(one): one for one in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy((model, *more) if more else model, weights)


def build_model(
    shape: Shape, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LlavaNextForConditionalGeneration:
    """Build a random model with SDPA, its weights from a fixed seed."""
    vision = dict(zip(SIZES, shape.vision)) | {"model_type": "clip_vision_model"}
    vision |= {"image_size": shape.crop_size, "patch_size": shape.patch_size}
    text = dict(zip(SIZES, shape.text)) | SPECIAL
    text |= {"model_type": "llama", "num_key_value_heads": shape.text[2], "max_position_embeddings": 4096}
    text["vocab_size"], vision["projection_dim"] = shape.vocabulary, shape.projection
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        image_grid_pinpoints=shape.pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = random_model(AutoModelForImageTextToText, config, torch.device(device), dtype)
    model.generation_config.update(**SPECIAL)
    return model


def build_clip(model: LlavaNextForConditionalGeneration, shape: Shape) -> CLIPModel:
    """Build a CLIP model that shares the parameters of the model's tower; the rest is random."""
    text = dict(zip(SIZES, shape.clip_text)) | SPECIAL
    text |= {"vocab_size": shape.vocabulary, "projection_dim": shape.projection}
    vision = model.config.vision_config.to_dict()
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.projection)
    clip = random_model(AutoModel, config, model.device, model.dtype)
    tower = model.model.vision_tower
    clip.vision_model.load_state_dict(tower.state_dict(keep_vars=True), assign=True)
    return clip


def build_processor(shape: Shape) -> LlavaNextProcessor:
    """Build a processor for :func:`build_model`: the mini model's, at other sizes."""
    processor = AutoProcessor.from_pretrained(mini.WEIGHTS, local_files_only=True)
    images = processor.image_processor
    images.size = {"shortest_edge": shape.crop_size}
    images.crop_size = {"height": shape.crop_size, "width": shape.crop_size}
    images.image_grid_pinpoints = shape.pinpoints
    processor.patch_size = shape.patch_size
    return processor


def _photographs(sizes: tuple[tuple[int, int], ...]) -> Batch:
    """Crop the photograph to each of the sizes."""
    with Image.open(ROOT / PHOTOGRAPH) as photograph:
        images = [ImageOps.fit(photograph.convert("RGB"), size[::-1]) for size in sizes]
    return Batch(images, [QUESTION] * len(sizes), [PROMPT] * len(sizes))


def build(name: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """Build the subject named in :data:`SHAPES`."""
    shape = SHAPES[name]
    model, processor = build_model(shape, device, dtype), build_processor(shape)
    relevance = hero.ClipRelevance(build_clip(model, shape), processor.tokenizer)
    batches = [_photographs(sizes) for sizes in shape.batches]
    model.generation_config.eos_token_id = None
    processor.tokenizer.padding_side = "left"
    return Subject(model, processor, relevance, batches)
