"""Train the mini model from scratch: ``python -m bench.mini.train --out FOLDER`` (docs/quality.md).

Three stages, each of a fixed number of steps on scenes drawn on the fly (:mod:`bench.mini.scenes`):

1. ``clip``: contrast tiles and thumbnails with captions. Heads that are thrown away afterwards read colour,
   shape and digit from each patch, and photograph and number of objects from the patches of a thumbnail as
   the last layer's CLS token weighs them.
2. ``align``: vision tower frozen; projected patches of objects move to the embeddings of their words.
3. ``answer``: vision tower frozen; one-word answers, from small grids to large ones.

The batch of a step depends on seed, stage and step alone, so a run that was stopped goes on where it was, to
the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from hero.mini import CLIP_HEAD, clip_config, load

from . import scenes

__all__ = ["SCHEDULES", "Schedule", "evaluate", "main", "train"]

SIDE = scenes.TILE // scenes.PATCH
PATCHES = SIDE * SIDE
PINPOINTS = [[rows * scenes.TILE, columns * scenes.TILE] for rows, columns in scenes.GRIDS]
MEAN, STD = 0.5, 0.25
LARGEST_COUNT = 8
IDS = {word: number for number, word in enumerate(scenes.WORDS)}
PAD, BOS, EOS = IDS["<pad>"], IDS["<bos>"], IDS["<eos>"]
COLOURS, PHOTOGRAPHS = tuple(scenes.COLOURS), tuple(scenes.PHOTOGRAPHS)
WORDS_OF = (
    (*COLOURS, "background"),
    scenes.SHAPES,
    tuple(str(digit) for digit in range(10)),
)
"""What a patch may be labelled with: colours and "background", shapes, digits."""

CARD = Path(__file__).with_name("card.md")
"""The model card, with places for what a run fills in."""

NOTHING = -100  # a label that cross_entropy ignores
MOST_OBJECTS = {2: 4, 4: 6, 6: 7, 9: LARGEST_COUNT}
"""Tiles of a grid -> most objects of a training scene."""


@dataclass(frozen=True)
class Schedule:
    """How long each stage runs, and on how much at a time.

    Attributes:
        clip_steps, align_steps, answer_steps: optimiser steps.
        clip_batch: crops a step, of the first two stages.
        answer_tokens: about how many visual tokens a step of the last stage holds; scenes follow from it.
        questions: questions asked of each scene in a step.
        curriculum: shares of the last stage's steps after which four tiles, then up to nine, join.
        learning_rate: peak of the cosine schedule.
    """

    clip_steps: int = 6500
    align_steps: int = 300
    answer_steps: int = 5000
    clip_batch: int = 128
    answer_tokens: int = 5000
    questions: int = 16
    curriculum: tuple[float, float] = (0.12, 0.3)
    learning_rate: float = 2e-3


SCHEDULES = {
    "full": Schedule(),
    "short": Schedule(80, 30, 60, clip_batch=64, answer_tokens=2500, questions=8, learning_rate=3e-3),
}
"""``full`` made the bundled weights; ``short`` shows in a minute that training works."""


def _generator(seed: int, stage: str, step: int) -> np.random.Generator:
    return np.random.default_rng([seed, sum(map(ord, stage)), step])


def _ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def _pixels(image: Image.Image) -> np.ndarray:
    return (np.asarray(image, np.float32).transpose(2, 0, 1) / 255 - MEAN) / STD


def _thumbnail(scene: scenes.Scene) -> np.ndarray:
    """As LLaVA-NeXT makes it: the whole picture squashed to one tile."""
    return _pixels(scene.image.resize((scenes.TILE, scenes.TILE), Image.Resampling.BICUBIC))


def _tiles(scene: scenes.Scene) -> np.ndarray:
    rows, columns = scene.grid
    pixels = _pixels(scene.image).reshape(3, rows, scenes.TILE, columns, scenes.TILE)
    return pixels.transpose(1, 3, 0, 2, 4).reshape(-1, 3, scenes.TILE, scenes.TILE)


# 1. CLIP


def _patch_labels(scene: scenes.Scene, thumbnail: bool) -> np.ndarray:
    """``[P, 3]``: colour, shape and digit of the object that covers a patch, by index in ``WORDS_OF``.

    A patch belongs to the object that covers at least half of it, a quarter in a thumbnail, where digits are
    too small to read.
    """
    labels = np.full((SIDE, SIDE, 3), NOTHING)
    labels[..., 0] = len(COLOURS)
    covered = np.zeros((SIDE, SIDE))
    edges = np.arange(SIDE + 1) * scenes.PATCH
    for thing in scene.objects:
        y0, x0, y1, x1 = np.array(thing.box) / (scene.grid * 2 if thumbnail else 1)
        height = np.minimum(edges[1:], y1) - np.maximum(edges[:-1], y0)
        width = np.minimum(edges[1:], x1) - np.maximum(edges[:-1], x0)
        share = height.clip(0)[:, None] * width.clip(0)[None] / scenes.PATCH**2
        here = (share >= (0.25 if thumbnail else 0.5)) & (share > covered)
        digit = NOTHING if thumbnail else thing.digit
        labels[here] = COLOURS.index(thing.colour), scenes.SHAPES.index(thing.shape), digit
        covered = np.maximum(covered, share)
    return labels.reshape(PATCHES, 3)


def _caption(
    rng: np.random.Generator, objects: tuple[scenes.SceneObject, ...], digits: bool
) -> tuple[str, list[dict]]:
    """A caption or a question, and what it says of one or two objects; nothing for an empty crop.

    Thumbnails are described without ``digits``.
    """
    if not objects:
        texts = ("a photo of nothing", "background", "a picture of the background")
        return texts[rng.integers(len(texts))], []
    count = 2 if len(objects) > 1 and rng.random() < 0.4 else 1
    phrases, facts = [], []
    for number in rng.permutation(len(objects))[:count]:
        thing, r = objects[number], rng.random() if digits else 0.0
        look = {"colour": thing.colour, "shape": thing.shape}
        if r < 0.1:
            name = ("colour", "shape")[rng.integers(2)]
            facts.append({name: look[name]})
            phrases.append(f"object with {name} {look[name]}")
        elif r < 0.45:
            facts.append(look)
            phrases.append(f"{thing.colour} {thing.shape}")
        elif r < 0.8:
            facts.append({"digit": thing.digit})
            phrases.append(f"digit {thing.digit}")
        else:
            facts.append(look | {"digit": thing.digit})
            phrases.append(f"{thing.colour} {thing.shape} with digit {thing.digit}")
    if count == 2:
        if rng.random() < 0.5:
            word = ("above", "left of")[rng.integers(2)]
            return f"is the {phrases[0]} {word} the {phrases[1]}", facts
        return f"a photo of a {phrases[0]} and a {phrases[1]}", facts
    forms = ["{}", "a photo of a {}", "the {} in a picture"]
    forms += ["what colour has the {}", "what shape has the {}"] if "digit" in facts[0] else []
    forms += ["what digit is on the {}"] * 2 if "digit" not in facts[0] else []
    return forms[rng.integers(len(forms))].format(phrases[0]), facts


def _fits(objects: tuple[scenes.SceneObject, ...], facts: list[dict]) -> bool:
    """Whether a caption is true of a crop; one that names nothing is true of an empty crop."""
    if not facts:
        return not objects
    return all(
        any(all(getattr(thing, name) == value for name, value in fact.items()) for thing in objects)
        for fact in facts
    )


class ClipBatches(Dataset):
    """Batch number -> crops, captions and what is true of them."""

    def __init__(self, seed: int, schedule: Schedule, stage: str, split: str = "train"):
        self.seed, self.size, self.stage, self.split = seed, schedule.clip_batch, stage, split

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = _generator(self.seed, self.stage, step)
        pixels, labels, whole, objects, captions = [], [], [], [], []
        for _ in range(self.size):
            thumbnail = rng.random() < 0.3
            if thumbnail:
                grid = scenes.GRIDS[rng.choice(len(scenes.GRIDS), p=(0.1, 0.1, 0.15, 0.15, 0.15, 0.35))]
                most = MOST_OBJECTS[grid[0] * grid[1]]
                scene = scenes.scene(rng, grid, int(rng.integers(0, most + 1)), self.split)
                pixels.append(_thumbnail(scene))
                whole.append((PHOTOGRAPHS.index(scene.background), len(scene.objects)))
            else:
                scene = scenes.scene(rng, (1, 1), int(rng.choice(4, p=(0.15, 0.45, 0.3, 0.1))), self.split)
                pixels.append(_pixels(scene.image))
                whole.append((NOTHING, NOTHING))
            labels.append(_patch_labels(scene, thumbnail))
            objects.append(scene.objects)
            captions.append(_caption(rng, scene.objects, not thumbnail))
        texts = [[BOS, *_ids(text), EOS] for text, _ in captions]
        longest = max(map(len, texts))
        fits = [[_fits(things, facts) for _, facts in captions] for things in objects]
        return {
            "pixels": torch.from_numpy(np.stack(pixels)),
            "labels": torch.from_numpy(np.stack(labels)),
            "whole": torch.tensor(whole),
            "text": torch.tensor([text + [PAD] * (longest - len(text)) for text in texts]),
            "fits": torch.tensor(fits, dtype=torch.float32),
        }


class Heads(nn.Module):
    """What reads words from patches, in the first stage only."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.ModuleList(nn.Linear(width, len(words)) for words in WORDS_OF)
        self.background = nn.Linear(width, len(PHOTOGRAPHS))
        self.count = nn.Linear(width, LARGEST_COUNT + 1)


def _seen_by_cls(clip: CLIPModel, hidden: Tensor) -> Tensor:
    """``[B, C]``: the patches of hidden state −2, as the last layer's CLS token weighs them."""
    layer = clip.vision_model.encoder.layers[-1]
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    query = attention.q_proj(normed[:, :1]).unflatten(-1, (attention.num_heads, -1))
    key = attention.k_proj(normed[:, 1:]).unflatten(-1, (attention.num_heads, -1))
    weights = torch.einsum("bqhd,bkhd->bhk", query, key).mul(attention.scale).softmax(-1).mean(1)
    return torch.einsum("bk,bkc->bc", weights, hidden[:, 1:])


def _contrast(logits: Tensor, fits: Tensor) -> Tensor:
    """Cross-entropy to equal shares among all captions that are true; 0 where it is as low as can be."""
    return -(logits.log_softmax(1) * fits).sum(1).div(fits.sum(1)).mean() - fits.sum(1).log().mean()


def _patch_loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    background = torch.ones(len(WORDS_OF[0]), device=labels.device)
    background[-1] = 0.2  # most patches show it
    losses = [
        F.cross_entropy(values.flatten(0, 1), labels[..., part].flatten(), weight=weight)
        for part, (values, weight) in enumerate(zip(logits, (background, None, None), strict=True))
    ]
    return sum(losses)


def clip_loss(clip: CLIPModel, heads: Heads, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    vision = clip.vision_model(pixel_values=batch["pixels"], output_hidden_states=True)
    text = clip.text_model(input_ids=batch["text"], attention_mask=(batch["text"] != PAD).long())
    image = F.normalize(clip.visual_projection(vision.pooler_output), dim=-1)
    words = F.normalize(clip.text_projection(text.pooler_output), dim=-1)
    logits = clip.logit_scale.exp().clamp(max=50) * image @ words.T
    hidden = vision.hidden_states[-2]
    seen = _seen_by_cls(clip, hidden)
    background, count = batch["whole"].unbind(1)
    return {
        "contrast": (_contrast(logits, batch["fits"]) + _contrast(logits.T, batch["fits"].T)) / 2,
        "patches": _patch_loss([head(hidden[:, 1:]) for head in heads.patch], batch["labels"]),
        "background": 0.5 * F.cross_entropy(heads.background(seen), background),
        "count": 0.5 * F.cross_entropy(heads.count(seen), count),
    }


# 2. and 3. LLaVA


def align_loss(model: LlavaNextForConditionalGeneration, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    embeddings = model.get_input_embeddings().weight
    projected = model.model.multi_modal_projector(_features(model, batch["pixels"]))
    unit, words = F.normalize(projected, dim=-1), F.normalize(embeddings, dim=-1)
    logits = [8 * unit @ words[[IDS[word] for word in some]].T for some in WORDS_OF]
    lengths = (projected.norm(dim=-1) - 1).square().mean() + (embeddings.norm(dim=-1) - 1).square().mean()
    return {"patches": _patch_loss(logits, batch["labels"]), "lengths": 0.01 * lengths}


@torch.no_grad()
def _features(model: LlavaNextForConditionalGeneration, pixels: Tensor) -> Tensor:
    """``[T, 3, S, S]`` to hidden state −2 of the patches, ``[T, P, C]``."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


class AnswerBatches(Dataset):
    """Batch number -> scenes of one grid, and questions on each."""

    longest = 11  # words of a question with its answer, and <eos>

    def __init__(self, seed: int, schedule: Schedule):
        self.seed, self.schedule = seed, schedule

    def grid(self, step: int, rng: np.random.Generator) -> tuple[int, int]:
        first, second = self.schedule.curriculum
        share = step / self.schedule.answer_steps
        if share < first:
            chances = (0.5, 0.5, 0, 0, 0, 0)
        elif share < second:
            chances = (0.1, 0.1, 0.8, 0, 0, 0)
        else:
            chances = (0.05, 0.05, 0.2, 0.15, 0.15, 0.4)
        return scenes.GRIDS[rng.choice(len(scenes.GRIDS), p=chances)]

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = _generator(self.seed, "answer", step)
        grid = self.grid(step, rng)
        tiles, count = grid[0] * grid[1], self.schedule.questions
        pixels, texts, labels = [], [], []
        for _ in range(max(1, self.schedule.answer_tokens // ((tiles + 1) * PATCHES))):
            scene = scenes.scene(rng, grid, int(rng.integers(1, MOST_OBJECTS[tiles] + 1)))
            pixels.append(np.concatenate([_thumbnail(scene)[None], _tiles(scene)]))
            text = np.full((count, self.longest), PAD)
            label = np.full((count, self.longest), NOTHING)
            for row, question in enumerate(scenes.questions(scene, rng, count)):
                ids = _ids(question.text)
                text[row, : len(ids) + 1] = *ids, IDS[question.answer]
                label[row, len(ids) - 1 : len(ids) + 1] = IDS[question.answer], EOS
            texts.append(text.ravel())
            labels.append(label.ravel())
        return {
            "pixels": torch.from_numpy(np.stack(pixels)),
            "text": torch.from_numpy(np.stack(texts)),
            "labels": torch.from_numpy(np.stack(labels)),
            "grid": torch.tensor(grid),
        }


def _sequence(model: LlavaNextForConditionalGeneration, grid: tuple[int, int]) -> Tensor:
    """``[n]``: where each visual token stands in the patches of all crops, as the model packs them.

    −1, the last, is a newline.
    """
    crops = grid[0] * grid[1] + 1
    places = torch.arange(float(crops * PATCHES)).view(crops, PATCHES, 1)
    size = torch.tensor([[grid[0] * scenes.TILE, grid[1] * scenes.TILE]])
    packed, _ = model.model.pack_image_features([places], size, "default", torch.tensor([-1.0]))
    return packed[0][:, 0].long()


@lru_cache
def _mask_and_positions(visual: int, questions: int, longest: int, device: str) -> tuple[Tensor, Tensor]:
    """Each question sees the picture and itself, and stands right behind the picture."""
    picture = torch.zeros(1 + visual, dtype=torch.int64)
    places = torch.arange(questions * longest)
    question = torch.cat([picture, 1 + places // longest])
    order = torch.arange(len(question))
    seen = order[:, None] >= order
    seen &= (question == 0) | (question[:, None] == question)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(1 + visual), 1 + visual + places % longest])
    return mask[None, None].to(device), positions[None].to(device)


def answer_loss(
    model: LlavaNextForConditionalGeneration, schedule: Schedule, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    pixels, text = batch["pixels"], batch["text"]
    size, sequence = len(pixels), _sequence(model, tuple(batch["grid"].tolist()))
    features = model.model.multi_modal_projector(_features(model, pixels.flatten(0, 1)))
    features = features.reshape(size, -1, features.shape[-1])
    newline = model.model.image_newline.expand(size, 1, -1)
    visual = torch.cat([features, newline], 1)[:, sequence.to(pixels.device)]
    embed = model.get_input_embeddings()
    inputs = torch.cat([embed(text.new_full((size, 1), BOS)), visual, embed(text)], 1)
    longest = text.shape[1] // schedule.questions
    mask, positions = _mask_and_positions(len(sequence), schedule.questions, longest, str(pixels.device))
    hidden = model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=mask.expand(size, 1, -1, -1),
        position_ids=positions.expand(size, -1),
        use_cache=False,
    ).last_hidden_state
    asked = batch["labels"] != NOTHING
    logits, wanted = model.lm_head(hidden[:, -text.shape[1] :][asked]), batch["labels"][asked]
    answers = wanted != EOS
    right = (logits.argmax(-1) == wanted)[answers].float().mean()
    return {"answer": F.cross_entropy(logits, wanted), "right": right.detach()}


def new_models(seed: int) -> tuple[CLIPModel, LlavaNextForConditionalGeneration]:
    """Both models as they are before training; their vision towers are alike, and not yet shared."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=scenes.TILE,
        patch_size=scenes.PATCH,
        hidden_act="gelu",  # one operation where CLIP's quick_gelu is two: a sixth less time
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(scenes.WORDS),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    config = LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=IDS["<image>"],
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
    )
    clip = CLIPModel(clip_config(config.text_config, config.vision_config))
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(10.0))
    model = LlavaNextForConditionalGeneration(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    model.generation_config.update(eos_token_id=EOS, pad_token_id=PAD, bos_token_id=BOS)
    return clip, model


# the loop


@dataclass
class Run:
    """One training run: where it keeps what it has done, and on what it runs."""

    folder: Path
    seed: int
    schedule: Schedule
    device: torch.device
    workers: int = 0
    quiet: bool = False
    save_every: int = 250

    def stage(
        self,
        name: str,
        steps: int,
        modules: dict[str, nn.Module],
        batches: Dataset,
        loss: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        decay: float,
    ) -> list[dict[str, float]]:
        """Train what requires gradients of ``modules`` for ``steps`` steps, from the last checkpoint on.

        Returns:
            the mean of each loss over every tenth of the steps.
        """
        parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=self.schedule.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        file, start, history = self.folder / f"{name}.pt", 0, []
        if file.exists():
            saved = torch.load(file, map_location=self.device, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(saved["modules"][key])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            start, history = saved["step"], saved["history"]

        def save(step: int) -> None:
            state = {key: module.state_dict() for key, module in modules.items()}
            part = file.with_suffix(".part")
            torch.save(
                {
                    "modules": state,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step,
                    "history": history,
                },
                part,
            )
            part.replace(file)  # a run stopped while it saves keeps the checkpoint before

        loader = DataLoader(batches, batch_size=None, sampler=range(start, steps), num_workers=self.workers)
        bar = tqdm(total=steps, initial=start, desc=name, disable=self.quiet, mininterval=5.0)
        for step, batch in enumerate(loader, start + 1):
            if not history or history[-1]["steps"] >= max(1, steps // 10):
                history.append({"steps": 0})
            losses = loss({key: value.to(self.device) for key, value in batch.items()})
            whole = sum(value for value in losses.values() if value.requires_grad)
            optimizer.zero_grad()
            whole.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            part, count = history[-1], history[-1]["steps"]
            for key, value in losses.items():
                part[key] = (part.get(key, 0.0) * count + value.item()) / (count + 1)
            part["steps"] = count + 1
            bar.set_postfix({key: f"{value:.3f}" for key, value in part.items()}, refresh=False)
            bar.update()
            if step % self.save_every == 0 or step == steps:
                save(step)
        bar.close()
        return history


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: warm-up, then a cosine down to 3 %."""
    warm = min(1.0, (step + 1) / min(150, max(1, steps // 10)))
    return warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def train(run: Run) -> dict[str, list[dict[str, float]]]:
    """Train from scratch, or go on, and write the model folder to ``run.folder / "model"``.

    Returns:
        stage -> the mean losses of each tenth of it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    schedule, history = run.schedule, {}
    clip, model = (module.to(run.device).train() for module in new_models(run.seed))
    heads = Heads(clip.config.vision_config.hidden_size).to(run.device)
    history["clip"] = run.stage(
        "clip",
        schedule.clip_steps,
        {"clip": clip, "heads": heads},
        ClipBatches(run.seed, schedule, "clip"),
        lambda batch: clip_loss(clip, heads, batch),
        decay=0.05,
    )
    tower = model.model.vision_tower
    tower.load_state_dict(clip.vision_model.state_dict())
    tower.requires_grad_(False)
    trained = {
        "embeddings": model.get_input_embeddings(),
        "projector": model.model.multi_modal_projector,
    }
    history["align"] = run.stage(
        "align",
        schedule.align_steps,
        trained,
        ClipBatches(run.seed, schedule, "align"),
        lambda batch: align_loss(model, batch),
        decay=0.0,
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    history["answer"] = run.stage(
        "answer",
        schedule.answer_steps,
        {"model": model},
        AnswerBatches(run.seed, schedule),
        lambda batch: answer_loss(model, schedule, batch),
        decay=0.03,
    )
    save_model(run.folder / "model", clip, model)
    return history


# what comes out


def build_processor() -> LlavaNextProcessor:
    """The processor of the model: its words, split at white space, and tiles of 48 px."""
    words = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(scenes.WORDS[:5]))
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": scenes.TILE},
        crop_size={"height": scenes.TILE, "width": scenes.TILE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def save_model(folder: Path, clip: CLIPModel, model: LlavaNextForConditionalGeneration) -> None:
    """Write the model in fp16, its processor, and what CLIP has beside the vision tower."""
    deepcopy(model).cpu().half().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    head = {
        name: value.detach().cpu().half().contiguous()
        for name, value in clip.named_parameters()
        if not name.startswith("vision_model.")
    }
    save_file(head, folder / CLIP_HEAD)


@torch.inference_mode()
def evaluate(folder: str | Path, questions: int, seed: int = 0, quiet: bool = False) -> dict:
    """Accuracy of a model folder with all tokens, in fp32, on test handwritings.

    Args:
        questions: questions a kind, on 3 x 3 tiles; and one-attribute questions on each other grid.

    Returns:
        ``{"kinds": {kind: accuracy}, "grids": {"rows x columns": accuracy}}``.
    """
    loaded = load(relevance=False, weights=folder)
    parts = [("kinds", kind, scenes.GRIDS[-1], (kind,)) for kind in scenes.KINDS]
    parts += [("grids", f"{grid[0]}x{grid[1]}", grid, scenes.ONE_ATTRIBUTE) for grid in scenes.GRIDS]
    result = {"kinds": {}, "grids": {}}
    for group, name, grid, kinds in tqdm(parts, desc="evaluate", disable=quiet):
        rng = np.random.default_rng([seed, len(result["kinds"]), len(result["grids"])])
        right = 0
        for start in range(0, questions, 50):
            asked = []
            while len(asked) < min(50, questions - start):
                count = int(rng.integers(3, min(6, MOST_OBJECTS[grid[0] * grid[1]]) + 1))
                scene = scenes.scene(rng, grid, count, "test")
                asked.append((scene.image, scenes.questions(scene, rng, 1, kinds)[0]))
            inputs = loaded.processor(
                images=[image for image, _ in asked],
                text=[scenes.prompt(question.text) for _, question in asked],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            output = loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            words = loaded.processor.batch_decode(output[:, -1:])
            right += sum(word == question.answer for word, (_, question) in zip(words, asked, strict=True))
        result[group][name] = right / questions
    return result


def _commit() -> str | None:
    """The commit of this source, with ``+`` where it was changed since; None outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mini.train", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; one begun there goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", choices=SCHEDULES, default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU; default: as torch has it")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
    parser.add_argument("--questions", type=int, default=1000, help="for the accuracy at the end, a kind")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    schedule = SCHEDULES[options.schedule]
    settings = {"schedule": options.schedule, "seed": options.seed} | asdict(schedule)
    settings = json.loads(json.dumps(settings))
    file = options.out / "run.json"
    if file.exists():
        begun = json.loads(file.read_text())
        if begun["settings"] != settings:
            parser.error(f"--out: expected a new folder or one of {settings}, got one of {begun['settings']}")
    else:
        begun = {
            "settings": settings,
            "commit": _commit(),
            "device": options.device,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        options.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(begun, indent=2) + "\n")
    run = Run(options.out, options.seed, schedule, torch.device(options.device), options.workers)
    history = train(run)
    record = begun | {
        "losses": history,
        "questions": options.questions,
        "accuracy": evaluate(options.out / "model", options.questions),
    }
    (options.out / "model" / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    write_card(options.out / "model")


def write_card(folder: Path) -> None:
    """Write the model card, ``README.md``, from ``training.json``."""
    record = json.loads((folder / "training.json").read_text())
    settings, accuracy = record["settings"], record["accuracy"]
    tables = []
    for name, title in (("kinds", "3x3 tiles, by kind of question"), ("grids", "one attribute, by grid")):
        cells = accuracy[name]
        tables.append(
            f"| {title} | {' | '.join(cells)} |\n|---{'|---' * len(cells)}|\n"
            f"| accuracy | {' | '.join(f'{value:.3f}' for value in cells.values())} |"
        )
    sizes = {part: (folder / part).stat().st_size / 1e6 for part in ("model.safetensors", CLIP_HEAD)}
    one = np.mean([accuracy["kinds"][kind] for kind in scenes.ONE_ATTRIBUTE])
    card = CARD.read_text(encoding="utf-8").format(
        **(settings | {"questions_each": settings["questions"], "questions": record["questions"]}),
        commit=record["commit"],
        torch=record["versions"]["torch"],
        transformers=record["versions"]["transformers"],
        device=record["device"],
        words=len(scenes.WORDS),
        model_size=sizes["model.safetensors"],
        head_size=sizes[CLIP_HEAD],
        error=100 * math.sqrt(one * (1 - one) / record["questions"]),
        tables="\n\n".join(tables),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
