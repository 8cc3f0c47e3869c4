"""A very small trained LLaVA-NeXT with its own pictures and questions.

It answers short questions about generated scenes, offline and on a CPU, so that the demo runs anywhere and
tests can measure what dropping tokens costs. See ``weights/README.md`` for what it is.
Importing this module loads neither torch nor transformers; ``load`` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .._checks import error

if TYPE_CHECKING:
    import torch
    from transformers import (
        CLIPConfig,
        CLIPModel,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        PretrainedConfig,
        PreTrainedTokenizerBase,
    )

    from hero.relevance import ClipRelevance

__all__ = [
    "DEMO",
    "WEIGHTS",
    "DemoQuestion",
    "MiniModel",
    "build_clip",
    "clip_config",
    "clip_tokenizer",
    "demo_questions",
    "load",
]

WEIGHTS: Path = Path(__file__).parent / "weights"
"""Folder for ``LlavaNextForConditionalGeneration.from_pretrained`` and ``AutoProcessor.from_pretrained``."""

DEMO: Path = Path(__file__).parent / "demo"
"""Folder of the bundled picture and questions."""

CLIP_HEAD = "clip_head.safetensors"
_CLIP_POSITIONS = 24


class MiniModel(NamedTuple):
    """What ``load`` returns."""

    model: LlavaNextForConditionalGeneration
    processor: LlavaNextProcessor
    relevance: ClipRelevance | None
    """Text relevance from the model's own tower; None if it was not asked for."""


class DemoQuestion(NamedTuple):
    """A question about a bundled picture."""

    image: Path
    question: str
    answer: str
    tile: int
    """Raster index, in the picture's grid of 48 px tiles, of the tile that holds the answer."""


def load(
    dtype: torch.dtype | None = None, relevance: bool = True, weights: str | Path = WEIGHTS
) -> MiniModel:
    """Load the mini model, on the CPU and in eval mode.

    Args:
        dtype: floating-point dtype of model and relevance; None is ``torch.float32``. The weights are stored
            in fp16.
        relevance: whether to build ``hero.ClipRelevance`` as well.
        weights: folder of the model, the bundled one or one that ``bench.mini.train`` wrote.
    """
    import torch
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    if dtype is None:
        dtype = torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise error(TypeError, "dtype", "a floating-point torch.dtype or None", dtype)
    if not isinstance(relevance, bool):
        raise error(TypeError, "relevance", "True or False", relevance)
    weights = Path(weights)
    if not (weights / CLIP_HEAD).is_file():
        raise ValueError(f"weights: expected the folder of a mini model, with {CLIP_HEAD}, got {weights}")
    model = LlavaNextForConditionalGeneration.from_pretrained(
        weights, dtype=dtype, local_files_only=True
    ).eval()
    processor = AutoProcessor.from_pretrained(weights, local_files_only=True)
    if not relevance:
        return MiniModel(model, processor, None)
    from hero.relevance import ClipRelevance

    return MiniModel(model, processor, ClipRelevance(build_clip(model, weights), clip_tokenizer(weights)))


def clip_config(text: PretrainedConfig, vision: PretrainedConfig) -> CLIPConfig:
    """The CLIP model beside a LLaVA-NeXT: its vision tower, and a small text encoder over its vocabulary."""
    from transformers import CLIPConfig, CLIPTextConfig

    text_config = CLIPTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_CLIP_POSITIONS,
        projection_dim=vision.projection_dim,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    return CLIPConfig(
        text_config=text_config.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=vision.projection_dim,
    )


def build_clip(model: LlavaNextForConditionalGeneration, weights: str | Path = WEIGHTS) -> CLIPModel:
    """The CLIP model whose image encoder is the vision tower of ``model``, which ``load`` returned.

    The image encoder holds the tower's own parameters, not copies: what moves one moves the other.
    Text encoder, projections and temperature come from ``clip_head.safetensors`` in the folder ``weights``,
    cast to the tower's dtype and device.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import CLIPModel

    tower = model.model.vision_tower
    # The constructor draws initial weights, all replaced below: leave the caller's random state as it was.
    with torch.random.fork_rng(devices=[]):
        clip = CLIPModel(clip_config(model.config.text_config, model.config.vision_config))
    weight = tower.embeddings.patch_embedding.weight
    state = {
        name: value.to(weight.device, weight.dtype)
        for name, value in load_file(Path(weights) / CLIP_HEAD).items()
    }
    state |= {f"vision_model.{name}": value for name, value in tower.state_dict(keep_vars=True).items()}
    clip.load_state_dict(state, strict=True, assign=True)
    return clip.to(weight.device).eval()


def clip_tokenizer(weights: str | Path = WEIGHTS) -> PreTrainedTokenizerBase:
    """The text encoder's tokenizer: the model's vocabulary as ``<bos> ... <eos>``, at most 24 tokens.

    The processor's tokenizer ends without ``<eos>``, the position at which CLIP reads its text embedding.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        weights, model_max_length=_CLIP_POSITIONS, local_files_only=True
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)],
    )
    return tokenizer


def demo_questions() -> list[DemoQuestion]:
    """The bundled questions, chosen so that the model answers them: they are no measure of accuracy."""
    records = json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))
    return [
        DemoQuestion(DEMO / record["image"], record["question"], record["answer"], record["tile"])
        for record in records
    ]
