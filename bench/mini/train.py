"""Train the mini model from scratch: ``python -m bench.mini.train --out FOLDER`` (docs/quality.md).

Three stages, each of a fixed number of steps on scenes drawn on the fly (:mod:`bench.mini.scenes`):

1. ``clip``: heads that are thrown away afterwards read from each patch what it shows, and from the patches of
   a thumbnail, as the last layer's CLS token weighs them, the photograph and the colours in it. Later, crops
   are also contrasted with captions, which are worded unlike the questions.
2. ``align``: vision tower frozen; projected patches move to the embeddings of their words.
3. ``answer``: vision tower frozen; answers, from small grids to large ones. Heads that are thrown away read
   from the language model's first layers what is asked for and what was found.

The batch of a step depends on seed, stage and step alone, so a run that was stopped goes on where it was, to
the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import subprocess
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

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
IDS = {word: number for number, word in enumerate(scenes.WORDS)}
PAD, BOS, EOS = IDS["<pad>"], IDS["<bos>"], IDS["<eos>"]
COLOURS, PHOTOGRAPHS = tuple(scenes.COLOURS), tuple(scenes.PHOTOGRAPHS)
LABELS = {
    "colour": (*COLOURS, *scenes.PATTERNS, "background"),
    "shape": (*scenes.SHAPES, "plate"),
    "digit": tuple(str(digit) for digit in range(10)),
    "place": scenes.PLACES,
    "row": tuple(f"row{row}" for row in range(SIDE)),
    "column": tuple(f"column{column}" for column in range(SIDE)),
}
"""What a patch may be labelled with. Rows and columns are those of a thumbnail."""

LABEL_WEIGHTS = (1.0, 1.0, 1.5, 1.0, 0.3, 0.3)
ASKED = {"colour": len(COLOURS), "place": 3}
FOUND = {"digit": 10, "row": SIDE, "column": SIDE}
"""What heads read from the language model's first and second layer, and how many values each has."""

LONGEST = 16  # words of a question with its answer, and <eos>

CARD = Path(__file__).with_name("card.md")
"""The model card, with places for what a run fills in."""

NOTHING = -100  # a label that cross_entropy ignores


@dataclass(frozen=True)
class Schedule:
    """How long each stage runs, and on how much at a time.

    Attributes:
        clip_steps, align_steps, answer_steps: optimiser steps.
        clip_crowded: scenes of 3 x 3 tiles full of things in a step of the first two stages, tile by tile.
        clip_thumbnails: thumbnails of scenes as questions see them, likewise.
        text_from: share of the first stage's steps after which captions join.
        answer_tokens: about how many tokens a step of the last stage holds; scenes follow from it.
        answer_scenes: different scenes of each grid; each is asked about in several steps.
        questions: questions asked of each scene in a step.
        small_until: share of the last stage's steps on grids of two to four tiles.
        learning_rate, muon_rate: peaks for AdamW and, for hidden matrices, Muon.
        digit_labels: whether the tower's patches are labelled with digits; else captions alone tell of them.
    """

    clip_steps: int = 8000
    align_steps: int = 450
    answer_steps: int = 2600
    clip_crowded: int = 10
    clip_thumbnails: int = 15
    text_from: float = 0.3
    answer_tokens: int = 5500
    answer_scenes: int = 3000
    questions: int = 20
    small_until: float = 0.12
    learning_rate: float = 2e-3
    muon_rate: float = 0.012
    digit_labels: bool = True


SCHEDULES = {
    "full": Schedule(),
    "no-digit-labels": Schedule(digit_labels=False),
    "short": Schedule(40, 20, 30, 4, 6, answer_tokens=2500, answer_scenes=50, questions=8),
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
    """``[crops, P, 6]``: what each patch shows, by index in ``LABELS``; of the tiles or of the thumbnail.

    A patch belongs to the thing that covers most of it, and at least 45 %; 25 % in a thumbnail, where digits
    are too small to read and their place is labelled instead. A digit of a plate covers 30 %.
    """
    rows, columns = (SIDE, SIDE) if thumbnail else (scene.grid[0] * SIDE, scene.grid[1] * SIDE)
    labels = np.full((rows, columns, len(LABELS)), NOTHING)
    labels[..., 0] = LABELS["colour"].index("background")
    most, most_digit = np.zeros((rows, columns)), np.zeros((rows, columns))
    for thing in scene.things:
        share = scenes.covered(np.array(thing.box) / (scene.grid * 2 if thumbnail else 1), rows, columns)
        here = (share >= (0.25 if thumbnail else 0.45)) & (share > most)
        most = np.maximum(most, share)
        labels[here] = NOTHING
        labels[here, 0] = LABELS["colour"].index(thing.colour or thing.shape)
        if thing.sort == "clutter":
            continue
        labels[here, 1] = LABELS["shape"].index(thing.shape)
        if thumbnail:
            labels[here, 4:] = np.argwhere(here)
        elif thing.sort == "object":
            labels[here, 2] = thing.digits[0]
        else:
            for place, (digit, box) in enumerate(zip(thing.digits, thing.digit_boxes, strict=True)):
                share = scenes.covered(box, rows, columns)
                there = (share >= 0.3) & (share > most_digit)
                most_digit = np.maximum(most_digit, share)
                colour, shape = LABELS["colour"].index(thing.colour), LABELS["shape"].index("plate")
                labels[there, :4] = colour, shape, digit, place
    if thumbnail:
        return labels.reshape(1, PATCHES, -1)
    tiles = labels.reshape(scene.grid[0], SIDE, scene.grid[1], SIDE, -1).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, PATCHES, len(LABELS))


class Seen(NamedTuple):
    """What a crop shows of a thing, or what a caption says of one; None where it says nothing."""

    colour: str | None = None
    shape: str | None = None
    digits: tuple[int, ...] | None = None

    def shows(self, said: Seen) -> bool:
        """Whether this thing is as a caption says; one digit may be any of its digits."""
        digits = said.digits in (None, self.digits, *((digit,) for digit in self.digits or ()))
        return digits and said.colour in (None, self.colour) and said.shape in (None, self.shape)


def _seen(scene: scenes.Scene, thumbnail: bool) -> list[list[Seen]]:
    """The things that each crop shows at least 30 % of, with the digits that it shows whole."""
    if thumbnail:
        return [[Seen(thing.colour, thing.shape, ()) for thing in scene.things]]
    crops: list[list[Seen]] = [[] for _ in range(scene.grid[0] * scene.grid[1])]
    for thing in scene.things:
        y0, x0, y1, x1 = thing.box
        for tile in thing.tiles(scene.grid):
            top, left = (scenes.TILE * place for place in divmod(tile, scene.grid[1]))
            height = min(y1, top + scenes.TILE) - max(y0, top)
            width = min(x1, left + scenes.TILE) - max(x0, left)
            if height * width >= 0.3 * (y1 - y0) * (x1 - x0):
                whole = [left <= box[1] and box[3] <= left + scenes.TILE for box in thing.digit_boxes]
                digits = tuple(digit for digit, shown in zip(thing.digits, whole, strict=True) if shown)
                crops[tile].append(Seen(thing.colour, thing.shape, digits))
    return crops


def _caption(rng: np.random.Generator, things: list[Seen], background: str) -> tuple[str, list[Seen]]:
    """A caption, and what it says of one or two things; of none where it names the photograph."""
    if not things or rng.random() < 0.08:
        return ("a photo of {}", "{} in the background")[rng.integers(2)].format(background), []
    count = 2 if len(things) > 1 and rng.random() < 0.4 else 1
    phrases, said = [], []
    for number in rng.permutation(len(things))[:count]:
        colour, shape, digits = things[number]
        named, form = f"a {colour} {shape}", rng.integers(3)
        if colour is None or not digits or rng.random() < 0.5:
            phrases.append(named if colour else shape)
            said.append(Seen(colour, shape))
            continue
        if len(digits) != 3:
            digits = (digits[rng.integers(len(digits))],)
        told = "number" if len(digits) == 3 else "digit"
        words = f"the {told} " + " ".join(map(str, digits))
        phrases.append((f"{named} with {words}", f"{words} on {named}", words)[form])
        said.append(Seen(digits=digits) if form == 2 else Seen(colour, shape, digits))
    forms = ("{}", "a photo of {}", "{} in a picture", "there is {}")
    return forms[rng.integers(len(forms))].format(" and ".join(phrases)), said


class ClipBatches(Dataset):
    """Batch number -> crops, what their patches show and, from ``text_from`` on, captions."""

    def __init__(self, seed: int, schedule: Schedule, stage: str, split: str = "train"):
        self.seed, self.schedule, self.stage, self.split = seed, schedule, stage, split

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = _generator(self.seed, self.stage, step)
        pixels, labels, whole, seen, backgrounds = [], [], [], [], []

        def add(scene: scenes.Scene, thumbnail: bool) -> None:
            pixels.append(_thumbnail(scene)[None] if thumbnail else _tiles(scene))
            labels.append(_patch_labels(scene, thumbnail))
            seen.extend(_seen(scene, thumbnail))
            shown = {thing.colour for thing in scene.things}
            known = (PHOTOGRAPHS.index(scene.background), *(colour in shown for colour in COLOURS))
            whole.extend([known if thumbnail else (NOTHING,) * len(known)] * len(pixels[-1]))
            backgrounds.extend([scene.background] * len(pixels[-1]))

        for _ in range(self.schedule.clip_crowded):
            many = scenes.Amounts(*(int(rng.integers(low, high)) for low, high in ((2, 10), (2, 10), (0, 6))))
            scene = scenes.scene(rng, scenes.GRIDS[-1], many, self.split, repeat=True)
            add(scene, thumbnail=False)
            if rng.random() < 0.5:
                add(scene, thumbnail=True)
        for _ in range(self.schedule.clip_thumbnails):
            grid = scenes.GRIDS[rng.choice(len(scenes.GRIDS), p=(0.05, 0.05, 0.25, 0.05, 0.05, 0.55))]
            add(scenes.scene(rng, grid, scenes.amounts(rng, grid[0] * grid[1]), self.split), thumbnail=True)
        batch = {
            "pixels": torch.from_numpy(np.concatenate(pixels)),
            "labels": torch.from_numpy(np.concatenate(labels)),
            "whole": torch.tensor(whole),
        }
        if self.stage == "clip" and not self.schedule.digit_labels:
            batch["labels"][..., 2:4] = NOTHING
        if self.stage == "clip" and step >= self.schedule.text_from * self.schedule.clip_steps:
            captions = [_caption(rng, *each) for each in zip(seen, backgrounds, strict=True)]
            texts = [[BOS, *_ids(text), EOS] for text, _ in captions]
            longest = max(map(len, texts))
            batch["text"] = torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])
            fits = [
                [
                    all(any(thing.shows(one) for thing in things) for one in said)
                    if said
                    else background in text.split()
                    for text, said in captions
                ]
                for things, background in zip(seen, backgrounds, strict=True)
            ]
            batch["fits"] = torch.tensor(fits, dtype=torch.float32)
        return batch


class Heads(nn.Module):
    """What reads from patches, in the first stage only."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.ModuleList(nn.Linear(width, len(words)) for words in LABELS.values())
        self.background = nn.Linear(width, len(PHOTOGRAPHS))
        self.colours = nn.Linear(width, len(COLOURS))


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
    background = torch.ones(len(LABELS["colour"]), device=labels.device)
    background[-1] = 0.2  # most patches show it
    total = torch.zeros((), device=labels.device)
    for part, (values, share) in enumerate(zip(logits, LABEL_WEIGHTS, strict=True)):
        wanted = labels[..., part].flatten()
        if (wanted == NOTHING).all():
            continue
        weight = background if part == 0 else None
        total = total + share * F.cross_entropy(values.flatten(0, 1), wanted, weight=weight)
    return total


def clip_loss(clip: CLIPModel, heads: Heads, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    vision = clip.vision_model(pixel_values=batch["pixels"], output_hidden_states=True)
    hidden = vision.hidden_states[-2]
    is_thumbnail = batch["whole"][:, 0] != NOTHING
    seen, whole = _seen_by_cls(clip, hidden[is_thumbnail]), batch["whole"][is_thumbnail]
    losses = {
        "patches": _patch_loss([head(hidden[:, 1:]) for head in heads.patch], batch["labels"]),
        "background": 0.5 * F.cross_entropy(heads.background(seen), whole[:, 0]),
        "colours": F.binary_cross_entropy_with_logits(heads.colours(seen), whole[:, 1:].float()),
    }
    if "text" in batch:
        text = clip.text_model(input_ids=batch["text"], attention_mask=(batch["text"] != PAD).long())
        image = F.normalize(clip.visual_projection(vision.pooler_output), dim=-1)
        words = F.normalize(clip.text_projection(text.pooler_output), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=50) * image @ words.T
        losses["contrast"] = (_contrast(logits, batch["fits"]) + _contrast(logits.T, batch["fits"].T)) / 2
    return losses


# 2. and 3. LLaVA


def align_loss(model: LlavaNextForConditionalGeneration, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    embeddings = model.get_input_embeddings().weight
    projected = model.model.multi_modal_projector(_features(model, batch["pixels"]))
    unit, words = F.normalize(projected, dim=-1), F.normalize(embeddings, dim=-1)
    logits = [10 * unit @ words[[IDS[word] for word in some]].T for some in LABELS.values()]
    lengths = (projected.norm(dim=-1) - 1).square().mean() + (embeddings.norm(dim=-1) - 1).square().mean()
    return {"patches": _patch_loss(logits, batch["labels"]), "lengths": 0.01 * lengths}


@torch.no_grad()
def _features(model: LlavaNextForConditionalGeneration, pixels: Tensor) -> Tensor:
    """``[T, 3, S, S]`` to hidden state −2 of the patches, ``[T, P, C]``."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


class AnswerBatches(Dataset):
    """Batch number -> scenes of one grid, by number, and questions on each."""

    def __init__(self, seed: int, schedule: Schedule):
        self.seed, self.schedule = seed, schedule

    def scene(self, grid: tuple[int, int], number: int) -> scenes.Scene:
        """Scene ``number`` of a grid."""
        rng = np.random.default_rng([self.seed, *grid, number])
        while True:
            scene = scenes.scene(rng, grid, scenes.amounts(rng, grid[0] * grid[1]))
            if scene.of("plate") and scene.of("object"):
                return scene

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng, schedule = _generator(self.seed, "answer", step), self.schedule
        small, large = (0.35, 0.1, 0.55, 0, 0, 0), (0.04, 0.04, 0.17, 0.1, 0.1, 0.55)
        chances = small if step < schedule.small_until * schedule.answer_steps else large
        grid = scenes.GRIDS[rng.choice(len(scenes.GRIDS), p=chances)]
        tokens = (grid[0] * grid[1] + 1) * PATCHES + schedule.questions * LONGEST
        numbers = rng.integers(schedule.answer_scenes, size=max(2, schedule.answer_tokens // tokens))
        drawn = [self.scene(grid, int(number)) for number in numbers]
        text = np.full((len(drawn), schedule.questions, LONGEST), PAD)
        label = np.full(text.shape, NOTHING)
        read = np.full((*text.shape, len(ASKED) + len(FOUND)), NOTHING)
        for row, scene in enumerate(drawn):
            for column, question in enumerate(scenes.questions(scene, rng, schedule.questions)):
                asked, answer = _ids(question.text), _ids(question.answer)
                text[row, column, : len(asked) + len(answer)] = asked + answer
                label[row, column, len(asked) - 1 : len(asked) + len(answer)] = *answer, EOS
                _label_reading(read[row, column], question, scene.grid, asked)
        return {
            "pixels": torch.from_numpy(np.stack([[_thumbnail(one), *_tiles(one)] for one in drawn])),
            "numbers": torch.from_numpy(numbers),
            "text": torch.from_numpy(text).flatten(1),
            "labels": torch.from_numpy(label).flatten(1),
            "read": torch.from_numpy(read).flatten(1, 2),
            "grid": torch.tensor(grid),
        }


def _label_reading(
    labels: np.ndarray, question: scenes.Question, grid: tuple[int, int], asked: list[int]
) -> None:
    """Label what is asked for and where it is: at each colour's shape, and where digits are told."""
    for thing in question.things:
        end = asked.index(IDS[thing.colour]) + 1
        y0, x0, y1, x1 = thing.box
        labels[end, 0] = COLOURS.index(thing.colour)
        labels[end, 3:] = (y0 + y1) // 2 // grid[0] // scenes.PATCH, (x0 + x1) // 2 // grid[1] // scenes.PATCH
        if thing.sort == "object":
            labels[end, 2] = thing.digits[0]
    for told, place in enumerate(question.places, len(asked) - 1):
        thing = question.things[0]
        labels[told, :3] = COLOURS.index(thing.colour), place, thing.digits[place]


class Readers(nn.Module):
    """What reads from the language model's layers, in the last stage only."""

    def __init__(self, width: int):
        super().__init__()
        self.asked = nn.ModuleList(nn.Linear(width, values) for values in ASKED.values())
        self.found = nn.ModuleList(nn.Linear(width, values) for values in FOUND.values())


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


class Answers:
    """The loss of the last stage. Features of scenes are kept, since the tower is frozen."""

    def __init__(self, model: LlavaNextForConditionalGeneration, readers: Readers, schedule: Schedule):
        self.model, self.readers, self.schedule = model, readers, schedule
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def features(self, pixels: Tensor, grid: tuple[int, int], numbers: list[int]) -> Tensor:
        """``[B, crops, P, C]`` of the scenes with these numbers."""
        missing = [row for row, number in enumerate(numbers) if (*grid, number) not in self.kept]
        if missing:
            new = _features(self.model, pixels[missing].flatten(0, 1)).unflatten(0, (len(missing), -1))
            self.kept |= {(*grid, numbers[row]): one.clone() for row, one in zip(missing, new, strict=True)}
        return torch.stack([self.kept[(*grid, number)] for number in numbers])

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model, text, grid = self.model, batch["text"], tuple(batch["grid"].tolist())
        size, sequence = len(text), _sequence(model, grid)
        features = self.features(batch["pixels"], grid, batch["numbers"].tolist())
        features = model.model.multi_modal_projector(features).flatten(1, 2)
        newline = model.model.image_newline.expand(size, 1, -1)
        visual = torch.cat([features, newline], 1)[:, sequence.to(text.device)]
        embed = model.get_input_embeddings()
        inputs = torch.cat([embed(text.new_full((size, 1), BOS)), visual, embed(text)], 1)
        mask, positions = _mask_and_positions(
            len(sequence), self.schedule.questions, LONGEST, str(text.device)
        )
        states = model.model.language_model(
            inputs_embeds=inputs,
            attention_mask=mask.expand(size, 1, -1, -1),
            position_ids=positions.expand(size, -1),
            use_cache=False,
            output_hidden_states=True,
        )
        first, second = (states.hidden_states[layer][:, -text.shape[1] :] for layer in (1, 2))
        read = torch.zeros((), device=text.device)
        heads = [(head, first) for head in self.readers.asked] + [
            (head, second) for head in self.readers.found
        ]
        for (head, hidden), wanted in zip(heads, batch["read"].unbind(-1), strict=True):
            here = wanted != NOTHING
            if here.any():
                read = read + F.cross_entropy(head(hidden[here]), wanted[here])
        asked = batch["labels"] != NOTHING
        hidden = states.last_hidden_state[:, -text.shape[1] :]
        logits, wanted = model.lm_head(hidden[asked]), batch["labels"][asked]
        weights = torch.where(wanted == EOS, 0.1, 1.0)  # the end of an answer says little
        losses = F.cross_entropy(logits, wanted, reduction="none")
        right = (logits.argmax(-1) == wanted)[wanted != EOS].float().mean()
        return {
            "answer": (losses * weights).sum() / weights.sum(),
            "read": 0.3 * read,
            "right": right.detach(),
        }


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
        head_dim=32,  # the narrowest that vLLM runs on a CPU
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
        muon: bool = True,
    ) -> list[dict[str, float]]:
        """Train what requires gradients of ``modules`` for ``steps`` steps, from the last checkpoint on.

        Returns:
            the mean of each loss over every tenth of the steps.
        """
        parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        optimizers = _optimizers(modules, self.schedule, decay, muon)
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(one, lambda step: _rate(step / steps)) for one in optimizers
        ]
        file, start, history = self.folder / f"{name}.pt", 0, []
        if file.exists():
            saved = torch.load(file, map_location=self.device, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(saved["modules"][key])
            for one, state in zip([*optimizers, *schedules], saved["optimizers"], strict=True):
                one.load_state_dict(state)
            start, history = saved["step"], saved["history"]

        def save(step: int) -> None:
            state = {key: module.state_dict() for key, module in modules.items()}
            part = file.with_suffix(".part")
            torch.save(
                {
                    "modules": state,
                    "optimizers": [one.state_dict() for one in (*optimizers, *schedules)],
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
            for optimizer in optimizers:
                optimizer.zero_grad()
            whole.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for one in (*optimizers, *schedules):
                one.step()
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


def _optimizers(
    modules: dict[str, nn.Module], schedule: Schedule, decay: float, muon: bool
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention, MLPs and projector where wanted, AdamW for everything else."""
    parameters = [
        (name, p) for module in modules.values() for name, p in module.named_parameters() if p.requires_grad
    ]
    hidden = ("self_attn", "mlp", "multi_modal_projector")
    matrices = [p for name, p in parameters if muon and p.ndim == 2 and any(part in name for part in hidden)]
    others = [p for _, p in parameters if not any(p is one for one in matrices)]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    ]
    if matrices:
        rate = {"lr": schedule.muon_rate, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(matrices, weight_decay=decay, **rate))
    return optimizers


def _rate(done: float) -> float:
    """Share of the peak learning rate: warm-up, a constant part, then a cosine down to 3 %."""
    if done < 0.4:
        return min(1.0, 0.02 + done / 0.02)
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.4) / 0.6)))


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
        muon=False,
    )
    with torch.no_grad():
        words = trained["embeddings"].weight
        model.lm_head.weight.copy_(words)
        # Patches look like words now; a vector common to all words tells text from picture.
        common = torch.randn(words.shape[1], generator=torch.Generator().manual_seed(run.seed))
        words.add_((common / common.norm()).to(words.device))
    readers = Readers(model.config.text_config.hidden_size).to(run.device)
    history["answer"] = run.stage(
        "answer",
        schedule.answer_steps,
        {"model": model, "readers": readers},
        AnswerBatches(run.seed, schedule),
        Answers(model, readers, schedule),
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
        questions: questions a kind, on 3 x 3 tiles; and ones that ask for digits on each grid.

    Returns:
        ``{"kinds": {kind: accuracy}, "grids": {"rows x columns": accuracy}}``.
    """
    loaded = load(relevance=False, weights=folder)
    parts = [("kinds", kind, scenes.GRIDS[-1], (kind,)) for kind in scenes.KINDS]
    parts += [("grids", f"{grid[0]}x{grid[1]}", grid, scenes.READ) for grid in scenes.GRIDS]
    result = {"kinds": {}, "grids": {}}
    for group, name, grid, kinds in tqdm(parts, desc="evaluate", disable=quiet):
        rng = np.random.default_rng([seed, len(result["kinds"]), len(result["grids"])])
        right = 0
        for start in range(0, questions, 50):
            asked = []
            while len(asked) < min(50, questions - start):
                scene = scenes.scene(rng, grid, scenes.amounts(rng, grid[0] * grid[1]), "test")
                with contextlib.suppress(ValueError):  # a scene that allows none of the kinds
                    asked.append((scene.image, scenes.questions(scene, rng, 1, kinds)[0]))
            inputs = loaded.processor(
                images=[image for image, _ in asked],
                text=[scenes.prompt(question.text) for _, question in asked],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            output = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            answers = loaded.processor.batch_decode(new, skip_special_tokens=True)
            right += sum(one == question.answer for one, (_, question) in zip(answers, asked, strict=True))
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
    for name, title in (("kinds", "3x3 tiles, by kind of question"), ("grids", "digits, by grid")):
        cells = accuracy[name]
        tables.append(
            f"| {title} | {' | '.join(cells)} |\n|---{'|---' * len(cells)}|\n"
            f"| accuracy | {' | '.join(f'{value:.3f}' for value in cells.values())} |"
        )
    sizes = {part: (folder / part).stat().st_size / 1e6 for part in ("model.safetensors", CLIP_HEAD)}
    one = np.mean(list(accuracy["kinds"].values()))
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
