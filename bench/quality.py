"""What dropping costs in answers: every policy at every keep ratio, on questions new to the mini model.

The bundled model (``hero.mini``) answers generated questions about generated scenes of test handwritings,
one question a scene, with hero attached as a user attaches it. Everything is paired: each variant answers
the same questions, and differences come with bootstrap intervals over questions. A variant is

- ``full``: the stock model, nothing dropped;
- a policy by its name; one that reads the question also as ``<policy>-no-text``, without relevance model,
  and as ``<policy>-other-question``, whose relevance reads another scene's question while the prompt stays;
- ``oracle``: of the tiles, first the patches that the box of the asked object touches, the most covered
  first, then as many more of each tile as fill the same count, by CLS attention; the thumbnail as
  ``uniform`` has it. It exists where a question is about boxes;
- whatever ``--variant NAME=JSON`` says, fields of ``hero.HeroConfig``.

``python -m bench.quality --out bench/results/quality.json``; then ``python -m bench.report``.
``python -m bench.quality --compare before.json after.json`` compares two records of the same questions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import hero
from hero import mini
from hero.config import POLICIES
from hero.layout import ImageLayout

from .mini import scenes
from .record import environment, write
from .timing import keep_ratios, positive, take_turns

__all__ = [
    "KEEP",
    "SEEDS",
    "Asked",
    "Runner",
    "Variant",
    "asked",
    "bits",
    "compare",
    "estimate",
    "main",
    "measure",
    "oracle_keep",
    "overlaps",
    "record_of",
    "unbits",
    "variants_of",
]

SEEDS = {"validation": 20260210, "test": 20260209}
"""Choose settings on the one, report the other."""

KEEP = (0.5, 0.2, 0.1, 0.05)
GRID = (3, 3)
OBJECTS = (3, 6)
BATCH = 50
RESAMPLES = 10_000
_now = time.thread_time  # one thread: blind to other processes that take turns on the core


# --- questions -------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A question about a scene."""

    image: Image.Image
    text: str
    answer: str
    kind: str
    tile: int | None
    boxes: tuple[tuple[int, int, int, int], ...]
    """Boxes the question is about, (y0, x0, y1, x1) in px; none for a question about the whole scene."""


@functools.lru_cache(maxsize=4 * BATCH)
def asked(
    split: str, index: int, grid: tuple[int, int] = GRID, kinds: tuple[str, ...] | None = None
) -> Asked:
    """Question ``index`` of a split: its own random stream, so that any process draws it alike.

    Raises:
        ValueError: an unknown split, or kinds that the scenes never ask.
    """
    if split not in SEEDS:
        raise ValueError(f"split: expected one of {', '.join(SEEDS)}, got {split!r}")
    rng = np.random.default_rng((SEEDS[split], index))
    scene = scenes.scene(rng, grid, int(rng.integers(OBJECTS[0], OBJECTS[1] + 1)), split="test")
    question = scenes.questions(scene, rng, 1, tuple(scenes.KINDS) if kinds is None else kinds)[0]
    boxes = tuple(thing.box for thing in question.objects)
    return Asked(scene.image, question.text, question.answer, question.kind, question.tile, boxes)


# --- variants --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way of choosing tokens.

    Attributes:
        name: as the record has it.
        options: fields of ``hero.HeroConfig`` but for the keep ratio; ``None`` is the stock model.
        text: what relevance reads: ``own``, ``other``, or ``none`` without a relevance model.
        oracle: whether the boxes asked about are kept first.
    """

    name: str
    options: Mapping[str, object] | None
    text: str = "none"
    oracle: bool = False


FULL = Variant("full", None)
ORACLE = Variant("oracle", {"policy": "uniform"}, oracle=True)


def reads_text(loaded: mini.MiniModel, options: Mapping[str, object]) -> bool:
    """Whether the question has a say where there is a relevance model."""
    with hero.attach(loaded.model, loaded.processor, relevance=loaded.relevance, **options) as handle:
        return handle.encoder.needs_text


def variants_of(
    loaded: mini.MiniModel,
    policies: Sequence[str] = tuple(POLICIES),
    more: Mapping[str, Mapping[str, object]] | None = None,
    plain: bool = False,
) -> tuple[Variant, ...]:
    """The variants that a run compares, ``full`` first.

    Args:
        loaded: the model with its relevance.
        policies: names in ``hero.config.POLICIES``.
        more: fields of ``hero.HeroConfig`` by name of further variants.
        plain: leave out the oracle and what a text policy does without its text.

    Raises:
        ValueError: an unknown policy, or a name given twice.
    """
    unknown = [name for name in policies if name not in POLICIES]
    if unknown:
        raise ValueError(f"policies: expected names among {', '.join(POLICIES)}, got {', '.join(unknown)}")
    variants = [FULL]
    for name, options in {**{name: {"policy": name} for name in policies}, **(more or {})}.items():
        text = reads_text(loaded, options)
        variants.append(Variant(name, options, "own" if text else "none"))
        if text and not plain:
            if options.get("alpha") is None and options.get("weights") is None:
                variants.append(Variant(f"{name}-no-text", options))
            variants.append(Variant(f"{name}-other-question", options, "other"))
    if not plain:
        variants.append(ORACLE)
    names = [variant.name for variant in variants]
    twice = sorted({name for name in names if names.count(name) > 1} | ({*policies} & {*(more or {})}))
    if twice:
        raise ValueError(f"policies, variant: expected each name once, got {', '.join(twice)} again")
    return tuple(variants)


# --- the oracle ------------------------------------------------------------------------------------------


def overlaps(boxes: Sequence[tuple[int, int, int, int]], layout: ImageLayout, patch: int) -> Tensor:
    """``[K, P]`` int64: square pixels of each tile's patches inside a box, of the box that covers most.

    Args:
        boxes: (y0, x0, y1, x1) in pixels of the image, ends exclusive.
        layout: of an image that fills its grid, pixel for pixel.
        patch: side of a patch in pixels.
    """
    rows, columns = (count * layout.side for count in layout.grid)
    if layout.image_size != (rows * patch, columns * patch):
        raise ValueError(
            f"layout: expected an image of {rows * patch} × {columns * patch} px, got {layout.image_size}"
        )
    most = torch.zeros(rows, columns, dtype=torch.int64)

    def along(begin: int, end: int, count: int) -> Tensor:
        low = torch.arange(count) * patch
        return (low.add(patch).clamp_max(end) - low.clamp_min(begin)).clamp_min(0)

    for y0, x0, y1, x1 in boxes:
        most = torch.maximum(most, along(y0, y1, rows)[:, None] * along(x0, x1, columns)[None])
    tiles = most.view(layout.grid[0], layout.side, layout.grid[1], layout.side)
    return tiles.transpose(1, 2).reshape(layout.tiles, layout.patches)


def oracle_keep(scores: Tensor, overlap: Tensor, count: int) -> Tensor:
    """``[B, K, P]`` bool: touched patches first, then the same number of further ones in every tile.

    Args:
        scores: ``[B, K, P]``, by which further patches are taken.
        overlap: ``[B, K, P]`` as :func:`overlaps` has it.
        count: patches to keep of all tiles of an image.
    """
    batch, tiles, patches = scores.shape
    touched = overlap > 0
    rest = scores.masked_fill(touched, -torch.inf)
    rank = rest.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    turn = rank * tiles + torch.arange(tiles, device=scores.device)[:, None]  # tile after tile, best first
    key = torch.where(touched, -overlap, turn).view(batch, -1)
    first = key.argsort(dim=-1, stable=True)[:, :count]
    keep = torch.zeros_like(key, dtype=torch.bool).scatter_(1, first, True)
    return keep.view(batch, tiles, patches)


def _put_oracle(encoder: hero.HeroVisionEncoder, questions: Sequence[Asked]) -> None:
    """Replace the stages that score and budget, on this encoder, for these questions."""
    score, budget = encoder.score, encoder.budget
    held = []

    def oracle_score(encoded, batch, text=None):
        scored = score(encoded, batch, text)
        layout = batch.layouts[0]
        tiles = slice(layout.first_tile, layout.first_tile + layout.tiles)
        patch = encoder.geometry.patch_size
        overlap = torch.stack([overlaps(question.boxes, layout, patch) for question in questions])
        scores = scored.scores.view(len(batch.layouts), layout.crops, layout.patches).clone()
        keep = oracle_keep(scores[:, tiles], overlap, layout.budget(encoder.config)[1])
        scores[:, tiles] = keep.to(scores)
        held[:] = [tiles, keep.sum(-1)]
        return dataclasses.replace(scored, scores=scores.flatten(0, 1), ranks=None)

    def oracle_budget(scored, batch):
        budgets = budget(scored, batch)
        counts = budgets.budgets.view(len(batch.layouts), -1).clone()
        counts[:, held[0]] = held[1].to(counts)
        return budgets._replace(budgets=counts.flatten())

    encoder.score, encoder.budget = oracle_score, oracle_budget


# --- answers ---------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What a variant did at a keep ratio on some questions, in their order."""

    right: list[bool]
    found: list[bool]
    """Whether the tile asked about had a larger share than any other."""
    tokens: float
    """Visual tokens of an image, newlines included, on average."""
    vision: float
    """Processor seconds of the vision stage, all questions together."""
    prefill: float
    """The same of the language model on the whole prompt."""


class _Stopwatch:
    """Processor seconds of a model's vision stage, of the tower within it, and of the language model.

    Keep ratios of a variant share what the tower returned for a batch, which does not depend on them: each is
    charged the seconds that it took once.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.vision = self.prefill = 0.0
        self._encoded = self._encode_seconds = None

    def share_tower(self, encoder: hero.HeroVisionEncoder) -> None:
        """Encode once in the life of this watch: one batch, one variant, any keep ratio."""
        encode = encoder.encode

        def once(pixel_values, layouts, **kwargs):
            begin = _now()
            if self._encoded is None:
                self._encoded = encode(pixel_values, layouts, **kwargs)
                self._encode_seconds = _now() - begin
            self.vision += self._encode_seconds - (_now() - begin)
            return self._encoded

        encoder.encode = once

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Measure what runs inside, from zero."""
        self.vision = self.prefill = 0.0
        inner = self.model.model
        features, was_there = inner.get_image_features, "get_image_features" in inner.__dict__
        before = inner.__dict__.get("get_image_features")

        @functools.wraps(features)
        def timed(*args, **kwargs):
            begin = _now()
            try:
                return features(*args, **kwargs)
            finally:
                self.vision += _now() - begin

        def start(*_) -> None:
            self.prefill -= _now()

        def stop(*_) -> None:
            self.prefill += _now()

        inner.__dict__["get_image_features"] = timed
        hooks = (
            inner.language_model.register_forward_pre_hook(start),
            self.model.lm_head.register_forward_hook(stop),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if was_there:
                inner.__dict__["get_image_features"] = before
            else:
                del inner.__dict__["get_image_features"]


class Runner:
    """The model and how to ask it.

    Args:
        variants: ``full`` runs once, the others at every keep ratio.
        keep: keep ratios.
        split, grid, kinds: as in :func:`asked`.
        weights: folder of the mini model.
        loaded: the model of that folder, where it is at hand.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        keep: Sequence[float] = KEEP,
        split: str = "test",
        grid: tuple[int, int] = GRID,
        kinds: tuple[str, ...] | None = None,
        weights: str | Path = mini.WEIGHTS,
        loaded: mini.MiniModel | None = None,
    ):
        self.variants = tuple(variants)
        self.keep = tuple(keep)
        self.draw = functools.partial(asked, split, grid=grid, kinds=kinds)
        self.weights = Path(weights)
        self.loaded = mini.load(weights=weights) if loaded is None else loaded
        tokenizer = self.loaded.processor.tokenizer
        self.token_of = functools.cache(tokenizer.convert_tokens_to_ids)
        self.unknown = tokenizer.unk_token_id

    def other_text(self, index: int) -> str:
        """What is asked of the next scene that is asked something else, of whatever kind."""
        own = self.draw(index).text
        draw = functools.partial(self.draw, kinds=None)  # of one kind, all may be asked the same
        return next(text for later in itertools.count(index + 1) if (text := draw(later).text) != own)

    def inputs(self, questions: Sequence[Asked]) -> dict[str, Tensor]:
        """What the stock processor makes of questions, padded on the left."""
        inputs = self.loaded.processor(
            images=[question.image for question in questions],
            text=[scenes.prompt(question.text) for question in questions],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        # As generate numbers them.
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return {**inputs, "position_ids": positions}

    def answers(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The most likely first token of each answer, hero attached or not: one forward."""
        return self.loaded.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)

    @contextlib.contextmanager
    def attached(self, variant: Variant, ratio: float, questions, others) -> Iterator[hero.Handle | None]:
        """The variant at work on some questions."""
        if variant.options is None:
            yield None
            return
        relevance = None if variant.text == "none" else self.loaded.relevance
        options = {**variant.options, "keep_ratio": ratio}
        with hero.attach(self.loaded.model, self.loaded.processor, relevance=relevance, **options) as handle:
            encoder = handle.encoder
            if variant.text == "other":
                score = encoder.score
                encoder.score = lambda encoded, layouts, text=None: score(encoded, layouts, others)
            if variant.oracle:
                _put_oracle(encoder, questions)
            yield handle

    @torch.inference_mode()
    def run(self, indices: Sequence[int]) -> dict[tuple[str, float], Cell]:
        """Ask every variant at every keep ratio; ``full`` stands at 1."""
        questions = [self.draw(index) for index in indices]
        others = [self.other_text(index) for index in indices]
        expected = torch.tensor([self.token_of(question.answer) for question in questions])
        unknown = {one.answer for one, token in zip(questions, expected) if token == self.unknown}
        if unknown:
            words = ", ".join(sorted(unknown))
            raise ValueError(f"kinds: expected those whose answers the model's vocabulary has, got {words}")
        inputs = self.inputs(questions)
        image_token = self.loaded.model.config.image_token_id
        full_tokens = int((inputs["input_ids"][0] == image_token).sum())
        turn = indices[0] // len(indices)
        cells = {}
        for variant in take_turns(self.variants, turn):
            watch = _Stopwatch(self.loaded.model)
            ratios = (1.0,) if variant.options is None else take_turns(self.keep, turn)
            for ratio in ratios:
                with self.attached(variant, ratio, questions, others) as handle:
                    if handle is not None and handle.config.encoder_keep is None:
                        watch.share_tower(handle.encoder)
                    with watch.running():
                        answers = self.answers(inputs)
                    last = None if handle is None else handle.last
                tokens, found = full_tokens, [False] * len(questions)
                if last is not None:
                    tokens = sum(last.lengths) / len(questions)
                    found = _found(last, questions)
                right = (answers == expected).tolist()
                cells[variant.name, ratio] = Cell(right, found, tokens, watch.vision, watch.prefill)
        return cells


def _found(last: hero.Selection, questions: Sequence[Asked]) -> list[bool]:
    """Whether the tile asked about has the largest share, alone."""
    layout = last.layout[0]
    shares = last.shares.view(len(questions), layout.crops)[:, layout.first_tile :][:, : layout.tiles]
    largest = (shares == shares.amax(1, keepdim=True)).tolist()
    return [
        question.tile is not None and row[question.tile] and sum(row) == 1
        for question, row in zip(questions, largest, strict=True)
    ]


_runner: Runner | None = None


def _start(arguments: Mapping[str, object]) -> None:
    global _runner
    torch.set_num_threads(1)
    _runner = Runner(**arguments)


def _work(indices: Sequence[int]) -> dict[tuple[str, float], Cell]:
    return _runner.run(indices)


def measure(runner: Runner, questions: int, workers: int = 0, progress: bool = False) -> dict:
    """Ask ``questions`` questions; what the answers depend on is the question alone, not the workers.

    Args:
        workers: processes of one thread each; 0 runs in this one, whose model is then used as it is.

    Returns:
        :class:`Cell` of each (variant name, keep ratio), all questions together.
    """
    batches = [range(first, min(first + BATCH, questions)) for first in range(0, questions, BATCH)]
    bar = functools.partial(tqdm, total=len(batches), unit="batch", disable=not progress)
    if workers == 0:
        parts = list(bar(map(runner.run, batches)))
    else:
        arguments = {
            "variants": runner.variants,
            "keep": runner.keep,
            **{name: runner.draw.keywords[name] for name in ("grid", "kinds")},
            "split": runner.draw.args[0],
            "weights": runner.weights,
        }
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(arguments,)) as pool:
            parts = list(bar(pool.map(_work, batches)))
    return {key: _joined([part[key] for part in parts]) for key in parts[0]}


def _joined(cells: Sequence[Cell]) -> Cell:
    tokens = sum(cell.tokens * len(cell.right) for cell in cells) / sum(len(cell.right) for cell in cells)
    return Cell(
        [right for cell in cells for right in cell.right],
        [found for cell in cells for found in cell.found],
        tokens,
        sum(cell.vision for cell in cells),
        sum(cell.prefill for cell in cells),
    )


# --- statistics ------------------------------------------------------------------------------------------


def estimate(values: np.ndarray) -> dict[str, object]:
    """Mean of values in {−1, 0, 1}, its standard error and its 95 % percentile bootstrap interval.

    A resample of such values is three counts, so it is drawn as them. The seed is fixed.
    """
    values = np.asarray(values, dtype=np.int8)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values: expected a list of at least one, got shape {values.shape}")
    if np.abs(values).max() > 1:
        raise ValueError("values: expected −1, 0 and 1 alone")
    count = len(values)
    shares = np.array([(values == value).sum() for value in (-1, 0, 1)]) / count
    draws = np.random.default_rng(0).multinomial(count, shares, RESAMPLES)
    low, high = np.percentile((draws[:, 2] - draws[:, 0]) / count, (2.5, 97.5))
    error = values.std(ddof=1) / count**0.5 if count > 1 else float("nan")
    return {
        "mean": round(float(values.mean()), 5),
        "se": round(float(error), 5) if count > 1 else None,
        "interval": [round(float(low), 5), round(float(high), 5)],
    }


def difference(one: np.ndarray, other: np.ndarray) -> dict[str, object]:
    """:func:`estimate` of the paired difference ``one − other`` of right answers."""
    return estimate(one.astype(np.int8) - other.astype(np.int8))


def bits(values: Sequence[bool]) -> str:
    """Right and wrong as hexadecimal digits, the first question in the highest bit."""
    return np.packbits(np.asarray(values, dtype=bool)).tobytes().hex()


def unbits(text: str, count: int) -> np.ndarray:
    """What :func:`bits` wrote, ``[count]`` bool."""
    values = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    if len(values) != -(-count // 8) * 8:
        raise ValueError(f"text: expected the bits of {count} answers, got {len(text)} digits")
    return values[:count].astype(bool)


def _groups(record: Mapping) -> dict[str, np.ndarray]:
    """Questions of each group: one attribute, each kind, all."""
    kinds = {name: unbits(text, record["questions"]) for name, text in record["kinds"].items()}
    one = [kind for name, kind in kinds.items() if name in scenes.ONE_ATTRIBUTE]
    groups = {"one attribute": np.any(one, axis=0)} if one else {}
    return {**groups, **kinds, "all": np.ones(record["questions"], dtype=bool)}


def _right(record: Mapping) -> dict[tuple[str, str], np.ndarray]:
    """Right answers of each (variant, keep ratio)."""
    return {
        (name, ratio): unbits(cell["right"], record["questions"])
        for name, variant in record["variants"].items()
        for ratio, cell in variant["keep"].items()
    }


def summarise(record: Mapping) -> dict[str, object]:
    """Accuracy of each group, variant and keep ratio, and paired differences to ``full`` and ``hero``.

    The oracle stands where every question of a group is about boxes.
    """
    right, boxed = _right(record), unbits(record["boxed"], record["questions"])
    summary = {}
    for group, members in _groups(record).items():
        if not members.any():
            continue
        cells: dict[str, dict[str, object]] = {}
        for (name, ratio), values in right.items():
            if record["variants"][name]["oracle"] and not boxed[members].all():
                continue
            cell = {"accuracy": estimate(values[members])}
            for base, key in (("full", ("full", "1")), ("hero", ("hero", ratio))):
                if key in right and name not in ("full", base):
                    cell[f"to_{base}"] = difference(values[members], right[key][members])
            cells.setdefault(name, {})[ratio] = cell
        summary[group] = {"questions": int(members.sum()), "variants": cells}
    return summary


def targets(record: Mapping) -> list[dict[str, object]]:
    """What the table has to show, where it was measured.

    Of ``hero`` on questions about one attribute; of ``hero+`` on all questions together, and on counts.
    """
    right, groups = _right(record), _groups(record)
    found = []

    def target(what: str, one: tuple[str, str], other: tuple[str, str], limit: float, group: str) -> None:
        if one in right and other in right and group in groups:
            members = groups[group]
            gap = difference(right[one][members], right[other][members])
            low, high = gap["interval"]
            verdict = "met" if low >= limit else "missed" if high < limit else "undecided"
            found.append({"what": f"{what}, {group}", "difference": gap, "limit": limit, "verdict": verdict})

    def at(ratio: str) -> str:
        return f"R = {ratio}"

    peers = [
        name
        for name, variant in record["variants"].items()
        if name in POLICIES and variant["text"] == "none" and name not in ("hero", "hero+", "random")
    ]
    ratios, one, everything = [f"{ratio:g}" for ratio in record["keep"]], "one attribute", "all"
    target(f"hero to all tokens, {at('0.2')}", ("hero", "0.2"), ("full", "1"), -0.01, one)
    target(f"hero to random, {at('0.2')}", ("hero", "0.2"), ("random", "0.2"), 0.10, one)
    for name in peers:
        target(f"hero to {name}, {at('0.2')}", ("hero", "0.2"), (name, "0.2"), 0.0, one)
    if peers and ("hero", "0.05") in right and one in groups:
        best = max(peers, key=lambda name: right[name, "0.05"][groups[one]].mean())
        what = f"hero to the best peer, {best}, {at('0.05')}"
        target(what, ("hero", "0.05"), (best, "0.05"), 0.05, one)
    for ratio in ratios:
        what = f"hero with another scene's question to equal budgets, {at(ratio)}"
        target(what, ("hero-other-question", ratio), ("uniform", ratio), -0.01, one)
    target(f"hero+ to hero, {at('0.1')}", ("hero+", "0.1"), ("hero", "0.1"), 0.0, everything)
    if "count" in groups and ("full", "1") in right:
        fifth = float(right["full", "1"][groups["count"]].mean()) / 5
        target(f"hero+ to all tokens, {at('0.2')}", ("hero+", "0.2"), ("full", "1"), -fifth, "count")
    for ratio in ratios:
        what = f"hero+ with another scene's question to equal budgets, {at(ratio)}"
        target(what, ("hero+-other-question", ratio), ("uniform", ratio), -0.01, everything)
    return found


# --- the record ------------------------------------------------------------------------------------------


def weights_hash(folder: Path) -> str:
    """The beginning of a hash of the weights in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def record_of(runner: Runner, cells: Mapping[tuple[str, float], Cell]) -> dict[str, object]:
    """What a run found, in plain values fit for JSON."""
    count = len(next(iter(cells.values())).right)
    questions = [runner.draw(index) for index in range(count)]
    digest = hashlib.sha256()
    for question in questions:
        digest.update(f"{question.text}\0{question.answer}\0{question.boxes}\0".encode())
    located = np.array([question.tile is not None for question in questions])
    kinds = list(dict.fromkeys(question.kind for question in questions))
    layout = _layout(runner, questions[0])
    variants = {}
    for variant in runner.variants:
        ratios = (1.0,) if variant.options is None else runner.keep
        variants[variant.name] = {
            "options": None if variant.options is None else dict(variant.options),
            "text": variant.text,
            "oracle": variant.oracle,
            "keep": {
                f"{ratio:g}": {
                    "patches": round(cell.tokens - layout.newline_count, 2),
                    "tokens": round(cell.tokens, 2),
                    "vision_ms": round(1e3 * cell.vision / count, 3),
                    "prefill_ms": round(1e3 * cell.prefill / count, 3),
                    "tile_found": round(float(np.mean(np.array(cell.found)[located])), 4)
                    if variant.options is not None and not variant.oracle and located.any()
                    else None,
                    "right": bits(cell.right),
                }
                for ratio in ratios
                for cell in [cells[variant.name, ratio]]
            },
        }
    record = {
        "questions": count,
        "split": runner.draw.args[0],
        "seed": SEEDS[runner.draw.args[0]],
        "grid": list(runner.draw.keywords["grid"]),
        "objects": list(OBJECTS),
        "keep": list(runner.keep),
        "weights": weights_hash(runner.weights),
        "digest": digest.hexdigest()[:16],
        "one_attribute": [kind for kind in kinds if kind in scenes.ONE_ATTRIBUTE],
        "kinds": {kind: bits([question.kind == kind for question in questions]) for kind in kinds},
        "boxed": bits([bool(question.boxes) for question in questions]),
        "variants": variants,
    }
    return {**record, "summary": summarise(record), "targets": targets(record)}


def _layout(runner: Runner, question: Asked) -> ImageLayout:
    with hero.attach(runner.loaded.model, runner.loaded.processor) as handle:
        return handle.encoder.geometry.layout((question.image.height, question.image.width))


def compare(before: Mapping, after: Mapping) -> list[dict[str, object]]:
    """Paired differences ``after − before`` of every variant and keep ratio in both, by group.

    Raises:
        ValueError: records of different questions.
    """
    for name in ("questions", "digest"):
        if before[name] != after[name]:
            raise ValueError(
                f"compare: expected records of the same questions, got {name} {before[name]}, {after[name]}"
            )
    old, new = _right(before), _right(after)
    return [
        {
            "group": group,
            "variant": key[0],
            "keep": key[1],
            "before": float(old[key][members].mean()),
            "after": float(new[key][members].mean()),
            "difference": difference(new[key][members], old[key][members]),
        }
        for group, members in _groups(before).items()
        for key in old
        if key in new
    ]


# --- the command -----------------------------------------------------------------------------------------


def _ratios(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(keep_ratios(text)))  # each once: they are keys of the record


def _grid(text: str) -> tuple[int, int]:
    grid = tuple(int(word) for word in text.split("x"))
    if grid not in scenes.GRIDS:
        known = ", ".join(f"{rows}x{columns}" for rows, columns in scenes.GRIDS)
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {text!r}")
    return grid


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _named_options(text: str) -> tuple[str, dict]:
    name, _, options = text.partition("=")
    try:
        options = json.loads(options)
        hero.HeroConfig.from_dict(options)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected NAME=JSON of fields of hero.HeroConfig, got {text!r}: {error}"
        ) from None
    return name, options


def _points(gap: Mapping) -> str:
    low, high = gap["interval"]
    return f"{100 * gap['mean']:+6.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _print_record(record: Mapping) -> None:
    for group, part in record["summary"].items():
        print(f"\n{group}, {part['questions']} questions: accuracy, paired difference to all tokens")
        for name, ratios in part["variants"].items():
            cells = (
                f"{ratio}: {100 * cell['accuracy']['mean']:5.1f}"
                + (f" {_points(cell['to_full'])}" if "to_full" in cell else "")
                for ratio, cell in ratios.items()
            )
            print(f"  {name:22} " + "  ".join(cells))
    print()
    for one in record["targets"]:
        print(
            f"{one['verdict']:9} {_points(one['difference'])}, at least {100 * one['limit']:+g}: "
            f"{one['what']}"
        )


def _print_comparison(rows: Sequence[Mapping]) -> None:
    for row in rows:
        print(
            f"{row['group']:14} {row['variant']:22} R = {row['keep']:5} {100 * row['before']:5.1f} -> "
            f"{100 * row['after']:5.1f} {_points(row['difference'])}"
        )


def main(arguments: Sequence[str]) -> dict | None:
    """The command: returns the record it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--policies", type=_words, default=tuple(POLICIES), help="default: all there are")
    parser.add_argument("--keep", type=_ratios, default=KEEP, help="keep ratios (default 0.5,0.2,0.1,0.05)")
    parser.add_argument("--questions", type=positive, default=2000, help="default 2000")
    parser.add_argument("--split", choices=sorted(SEEDS), default="test", help="default test")
    parser.add_argument("--kinds", type=_words, help="kinds of questions to draw (default: as they come)")
    parser.add_argument("--grid", type=_grid, default=GRID, help="tiles, ROWSxCOLUMNS (default 3x3)")
    parser.add_argument(
        "--variant",
        type=_named_options,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="one more variant: fields of hero.HeroConfig",
    )
    parser.add_argument("--weights", default=mini.WEIGHTS, help="folder that bench.mini.train wrote")
    parser.add_argument("--plain", action="store_true", help="no oracle, no variants without the text")
    parser.add_argument("--workers", type=positive, default=2, help="processes of one thread (default 2)")
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="compare two records instead")
    options = parser.parse_args(arguments)
    if options.compare:
        before, after = (json.loads(Path(file).read_text(encoding="utf-8")) for file in options.compare)
        _print_comparison(compare(before, after))
        return None
    if options.out is None:
        parser.error("--out: expected a JSON file to write")
    torch.set_num_threads(1)
    try:
        loaded = mini.load(weights=options.weights)
        variants = variants_of(loaded, options.policies, dict(options.variant), options.plain)
        runner = Runner(
            variants,
            options.keep,
            options.split,
            options.grid,
            options.kinds,
            weights=options.weights,
            loaded=loaded,
        )
        runner.draw(0)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    load, begin = [os.getloadavg()[0]], time.perf_counter()
    cells = measure(runner, options.questions, options.workers, progress=True)
    load.append(os.getloadavg()[0])
    record = {
        "benchmark": "quality",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **environment("bench.quality", arguments, ("torch", "transformers", "tokenizers", "numpy")),
        "workers": options.workers,
        "seconds": round(time.perf_counter() - begin, 1),
        "load_average": load,
        **record_of(runner, cells),
    }
    write(options.out, record)
    _print_record(record)
    print(f"\n{options.questions} questions in {record['seconds']:.0f} s")
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
