"""A very small, really trained LLaVA-NeXT with its own pictures and questions.

It answers one-word questions about generated scenes (``hero.mini.scenes``), offline and on a CPU, so that the
demo runs anywhere and tests can measure what dropping tokens costs. See ``weights/README.md`` for what it is.
Importing this module loads neither torch nor transformers; ``load`` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import (
        CLIPModel,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        PreTrainedTokenizerBase,
    )

    from hero.relevance import ClipRelevance

__all__ = [
    "DEMO",
    "WEIGHTS",
    "DemoQuestion",
    "MiniModel",
    "build_clip",
    "clip_tokenizer",
    "demo_questions",
    "load",
]

WEIGHTS: Path = Path(__file__).parent / "weights"
"""Folder for ``LlavaNextForConditionalGeneration.from_pretrained`` and ``AutoProcessor.from_pretrained``."""

DEMO: Path = Path(__file__).parent / "demo"
"""Folder of the bundled picture and questions."""

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


def load(dtype: torch.dtype | None = None, relevance: bool = True) -> MiniModel:
    """Load the mini model, on the CPU and in eval mode.

    Args:
        dtype: floating-point dtype of model and relevance; None is ``torch.float32``. The weights are stored
            in fp16.
        relevance: whether to build ``hero.ClipRelevance`` as well.
    """
    import torch
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    if dtype is None:
        dtype = torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")
    if not isinstance(relevance, bool):
        raise TypeError(f"relevance: expected True or False, got {relevance!r}")
    model = LlavaNextForConditionalGeneration.from_pretrained(
        WEIGHTS, dtype=dtype, local_files_only=True
    ).eval()
    processor = AutoProcessor.from_pretrained(WEIGHTS, local_files_only=True)
    if not relevance:
        return MiniModel(model, processor, None)
    from hero.relevance import ClipRelevance

    return MiniModel(model, processor, ClipRelevance(build_clip(model), clip_tokenizer()))


def build_clip(model: LlavaNextForConditionalGeneration) -> CLIPModel:
    """The CLIP model whose image half is the vision tower of ``model``, the mini model that ``load`` returns.

    The image half holds the tower's own parameters, not copies: what moves one moves the other.
    Text half, projections and temperature come from ``clip_head.safetensors``, cast to the tower's dtype and
    device.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    tower = model.model.vision_tower
    text = model.config.text_config
    vision = model.config.vision_config
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
    config = CLIPConfig(
        text_config=text_config.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=vision.projection_dim,
    )
    # The constructor draws initial weights, all replaced below: leave the caller's random state as it was.
    with torch.random.fork_rng(devices=[]):
        clip = CLIPModel(config)
    weight = tower.embeddings.patch_embedding.weight
    state = {
        name: value.to(weight.device, weight.dtype)
        for name, value in load_file(WEIGHTS / "clip_head.safetensors").items()
    }
    state |= {f"vision_model.{name}": value for name, value in tower.state_dict(keep_vars=True).items()}
    clip.load_state_dict(state, strict=True, assign=True)
    return clip.to(weight.device).eval()


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the text half: the model's own words in CLIP's frame, ``<bos> ... <eos>``, 24 at most.

    The processor's tokenizer ends without ``<eos>``, the position at which CLIP reads its text embedding.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        WEIGHTS, model_max_length=_CLIP_POSITIONS, local_files_only=True
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
