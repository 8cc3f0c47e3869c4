"""Measure the accuracy of every policy at every keep ratio, on questions that the mini model has not seen.

The bundled model (:mod:`hero.mini`) answers generated questions about generated scenes of test handwritings,
one question a scene, with hero attached as a user attaches it. Each variant answers the same questions, so
differences are paired; intervals are bootstraps over questions. A variant is

- ``full``: the stock model with all tokens;
- a policy, by its name. A policy that reads the question is also run as ``<policy>-no-text``, without
  relevance model, and as ``<policy>-other-question``, where relevance reads the question of another scene;
- ``oracle``: keeps the tiles' patches that the box of the object asked about touches, the most covered first,
  and fills up with the same number of patches of each tile, by CLS attention. Its thumbnail is that of
  ``uniform``. It exists only for questions about boxes;
- the NAME of ``--variant NAME=JSON``, options of :class:`hero.HeroConfig`.

``--out FILE`` runs and writes a record. ``--check RECORD`` runs a record's variants again and compares every
answer.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from hero.layout import ImageLayout
from hero.policies import POLICIES

from .mini import scenes
from .records import environment, write
from .timing import keep_ratios, positive

__all__ = ["Runner", "Variant", "check", "main", "measure", "record_of", "variants_of"]

SEEDS = {"validation": 20260210, "test": 20260209}
"""Settings are chosen on the first split, results are reported on the second."""

KEEP = (0.5, 0.2, 0.1, 0.05)
GRID = (3, 3)
OBJECTS = (3, 6)
BATCH = 50
RESAMPLES = 10_000


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
    """Question ``index`` of a split. Each has its own random stream, so every process draws the same."""
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
        name: in the record.
        options: of :class:`hero.HeroConfig`, without the keep ratio; ``None`` for the stock model.
        text: the question that relevance reads: ``own``, ``other``, or ``none`` without a relevance model.
        oracle: whether the boxes asked about are kept first.
    """

    name: str
    options: Mapping[str, object] | None
    text: str = "none"
    oracle: bool = False


FULL = Variant("full", None)
ORACLE = Variant("oracle", {"policy": "uniform"}, oracle=True)


def variants_of(
    loaded: mini.MiniModel,
    policies: Sequence[str] = tuple(POLICIES),
    more: Mapping[str, Mapping[str, object]] | None = None,
    plain: bool = False,
) -> tuple[Variant, ...]:
    """The variants that a run compares, ``full`` first.

    Args:
        loaded: the model with its relevance.
        policies: names in :data:`hero.policies.POLICIES`.
        more: options of :class:`hero.HeroConfig` by the name of the variant.
        plain: leave out the oracle and the variants without text and with another question.

    Raises:
        ValueError: an unknown policy, or a name given twice.
    """
    unknown = [name for name in policies if name not in POLICIES]
    if unknown:
        raise ValueError(f"policies: expected names among {', '.join(POLICIES)}, got {', '.join(unknown)}")
    variants = [FULL]
    for name, options in [*((name, {"policy": name}) for name in policies), *(more or {}).items()]:
        with hero.attach(loaded.model, loaded.processor, relevance=loaded.relevance, **options) as handle:
            text = handle.encoder.needs_text
        variants.append(Variant(name, options, "own" if text else "none"))
        if text and not plain:
            if options.get("alpha") is None and options.get("weights") is None:
                variants.append(Variant(f"{name}-no-text", options))
            variants.append(Variant(f"{name}-other-question", options, "other"))
    variants += [] if plain else [ORACLE]
    names = [variant.name for variant in variants]
    twice = sorted({name for name in names if names.count(name) > 1})
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
    """Replace the stages of this encoder that score and budget, for these questions."""
    score, budget = encoder.score, encoder.budget
    kept = []

    def oracle_score(encoded, plan, text=None):
        scored = score(encoded, plan, text)
        layout = plan.layouts[0]
        tiles = slice(layout.tile_crops.start, layout.tile_crops.stop)
        patch = encoder.geometry.patch_size
        overlap = torch.stack([overlaps(question.boxes, layout, patch) for question in questions])
        scores = scored.scores.view(len(plan.layouts), layout.crops, layout.patches).clone()
        keep = oracle_keep(scores[:, tiles], overlap, layout.budget(encoder.config)[1])
        scores[:, tiles] = keep.to(scores)
        kept[:] = [tiles, keep.sum(-1)]
        return dataclasses.replace(scored, scores=scores.flatten(0, 1), ranks=None)

    def oracle_budget(scored, plan):
        budgets = budget(scored, plan)
        counts = budgets.budgets.view(len(plan.layouts), -1).clone()
        counts[:, kept[0]] = kept[1].to(counts)
        return budgets._replace(budgets=counts.flatten())

    encoder.score, encoder.budget = oracle_score, oracle_budget


# --- answers ---------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The answers of a variant at a keep ratio, question by question."""

    right: list[bool]
    found: list[bool]
    """Whether the tile asked about had the largest share."""
    tokens: float
    """Visual tokens of an image, newlines included, on average."""


def _encode_once(encoder: hero.HeroVisionEncoder, kept: list) -> None:
    """Run the tower once for all keep ratios: what it returns does not depend on them."""
    encode = encoder.encode

    def once(*args, **kwargs):
        kept[:] = kept or [encode(*args, **kwargs)]
        return kept[0]

    encoder.encode = once


class Runner:
    """Asks the model.

    Args:
        variants: ``full`` runs once, the others at every keep ratio.
        keep: keep ratios.
        split, grid, kinds: as in :func:`asked`.
        weights: folder of the mini model.
        loaded: the model of that folder, if it is loaded already.
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
        """The next question, of any kind, that is not the same."""
        own = self.draw(index).text
        draw = functools.partial(self.draw, kinds=None)  # all questions of one kind may be the same
        return next(text for later in itertools.count(index + 1) if (text := draw(later).text) != own)

    def inputs(self, questions: Sequence[Asked]) -> dict[str, Tensor]:
        """The stock processor's output, padded on the left."""
        inputs = self.loaded.processor(
            images=[question.image for question in questions],
            text=[scenes.prompt(question.text) for question in questions],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        # The positions that generate uses.
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return {**inputs, "position_ids": positions}

    def answers(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The most likely first token of each answer, hero attached or not: one forward."""
        return self.loaded.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)

    @contextlib.contextmanager
    def attached(self, variant: Variant, ratio: float, questions, others) -> Iterator[hero.Handle | None]:
        """Attach a variant, for some questions."""
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
        """Ask every variant at every keep ratio; that of ``full`` is 1."""
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
        cells = {}
        for variant in self.variants:
            encoded = []
            for ratio in (1.0,) if variant.options is None else self.keep:
                with self.attached(variant, ratio, questions, others) as handle:
                    if handle is not None:
                        _encode_once(handle.encoder, encoded)
                    answers = self.answers(inputs)
                    last = None if handle is None else handle.last
                tokens, found = full_tokens, [False] * len(questions)
                if last is not None:
                    tokens = sum(last.lengths) / len(questions)
                    found = _found(last, questions)
                right = (answers == expected).tolist()
                cells[variant.name, ratio] = Cell(right, found, tokens)
        return cells


def _found(last: hero.Selection, questions: Sequence[Asked]) -> list[bool]:
    """Whether the tile asked about has the largest share, alone."""
    layout = last.layout[0]
    shares = last.shares.view(len(questions), layout.crops)[:, list(layout.tile_crops)]
    largest = (shares == shares.amax(1, keepdim=True)).tolist()
    return [
        question.tile is not None and row[question.tile] and sum(row) == 1
        for question, row in zip(questions, largest, strict=True)
    ]


def _start(arguments: Mapping[str, object]) -> None:
    global _runner
    torch.set_num_threads(1)
    _runner = Runner(**arguments)


def _work(indices: Sequence[int]) -> dict[tuple[str, float], Cell]:
    return _runner.run(indices)


def measure(runner: Runner, questions: int, workers: int = 0, progress: bool = False) -> dict:
    """Ask the first ``questions`` questions. Answers do not depend on the number of workers.

    Args:
        workers: processes of one thread each; 0 runs in this process.

    Returns:
        the :class:`Cell` of each (variant name, keep ratio), of all questions together.
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
    )


# --- statistics ------------------------------------------------------------------------------------------


def estimate(values: np.ndarray) -> dict[str, object]:
    """Mean of values in {−1, 0, 1}, its standard error and its 95 % percentile bootstrap interval.

    A resample of such values is drawn as three counts. The seed is fixed.
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
    """The differences that the page judges, with their limits, as far as they were measured.

    Those of ``hero`` are about one attribute; those of ``hero+`` about all questions and about counts.
    """
    right, groups = _right(record), _groups(record)
    one, everything, fifth = "one attribute", "all", 0.0
    peers = [
        name
        for name, variant in record["variants"].items()
        if name in POLICIES and variant["text"] == "none" and name not in ("hero", "hero+", "random")
    ]
    wanted = [
        ("hero to all tokens, R = 0.2", ("hero", "0.2"), ("full", "1"), -0.01, one),
        ("hero to random, R = 0.2", ("hero", "0.2"), ("random", "0.2"), 0.10, one),
        *((f"hero to {name}, R = 0.2", ("hero", "0.2"), (name, "0.2"), 0.0, one) for name in peers),
    ]
    if peers and ("hero", "0.05") in right and one in groups:
        best = max(peers, key=lambda name: right[name, "0.05"][groups[one]].mean())
        what = f"hero to the best peer, {best}, R = 0.05"
        wanted.append((what, ("hero", "0.05"), (best, "0.05"), 0.05, one))
    if "count" in groups and ("full", "1") in right:
        fifth = float(right["full", "1"][groups["count"]].mean()) / 5
    misled = {
        name: [
            (
                f"{name} with another scene's question to equal budgets, R = {keep:g}",
                (f"{name}-other-question", f"{keep:g}"),
                ("uniform", f"{keep:g}"),
                -0.01,
                group,
            )
            for keep in record["keep"]
        ]
        for name, group in (("hero", one), ("hero+", everything))
    }
    wanted += [
        *misled["hero"],
        ("hero+ to hero, R = 0.1", ("hero+", "0.1"), ("hero", "0.1"), 0.0, everything),
        ("hero+ to all tokens, R = 0.2", ("hero+", "0.2"), ("full", "1"), -fifth, "count"),
        *misled["hero+"],
    ]
    found = []
    for what, first, second, limit, group in wanted:
        if first in right and second in right and group in groups:
            gap = difference(right[first][groups[group]], right[second][groups[group]])
            low, high = gap["interval"]
            verdict = "met" if low >= limit else "missed" if high < limit else "undecided"
            found.append({"what": f"{what}, {group}", "difference": gap, "limit": limit, "verdict": verdict})
    return found


# --- the record ------------------------------------------------------------------------------------------


def _digest(parts: Iterable[bytes]) -> str:
    """The beginning of a hash."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def record_of(runner: Runner, cells: Mapping[tuple[str, float], Cell]) -> dict[str, object]:
    """What a run found, in plain values fit for JSON."""
    count = len(next(iter(cells.values())).right)
    questions = [runner.draw(index) for index in range(count)]
    located = np.array([question.tile is not None for question in questions])
    kinds = list(dict.fromkeys(question.kind for question in questions))
    with hero.attach(runner.loaded.model, runner.loaded.processor) as handle:
        layout = handle.encoder.geometry.layout(questions[0].image.size[::-1])
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
        "weights": _digest(file.read_bytes() for file in sorted(runner.weights.glob("*.safetensors"))),
        "digest": _digest(f"{one.text}\0{one.answer}\0{one.boxes}\0".encode() for one in questions),
        "one_attribute": [kind for kind in kinds if kind in scenes.ONE_ATTRIBUTE],
        "kinds": {kind: bits([question.kind == kind for question in questions]) for kind in kinds},
        "boxed": bits([bool(question.boxes) for question in questions]),
        "variants": variants,
    }
    return {**record, "summary": summarise(record), "targets": targets(record)}


def check(
    record: Mapping, policies: Sequence[str], keep: Sequence[float], questions: int, workers: int
) -> int:
    """Ask the first questions of a record again and print, for each variant, how many answers differ.

    Args:
        record: of the bundled weights; its own variants, of these policies at these keep ratios, are run.

    Returns:
        the number of answers, or of tiles found and token counts, that differ.
    """
    variants = [
        Variant(name, one["options"], one["text"], one["oracle"])
        for name, one in record["variants"].items()
        if one["options"] is None or one["options"]["policy"] in policies
    ]
    kinds = None if set(record["kinds"]) == set(scenes.KINDS) else tuple(record["kinds"])
    keep = [ratio for ratio in record["keep"] if ratio in keep]
    runner = Runner(variants, keep, record["split"], tuple(record["grid"]), kinds)
    questions = min(questions, record["questions"])
    again = record_of(runner, measure(runner, questions, workers, progress=True))
    differ = int(again["weights"] != record["weights"])
    for (name, ratio), right in _right(again).items():
        cell, old = (one["variants"][name]["keep"][ratio] for one in (again, record))
        wrong = int((right != unbits(old["right"], record["questions"])[:questions]).sum())
        other = [
            key for key in ("patches", "tokens") if questions == record["questions"] and cell[key] != old[key]
        ]
        print(f"{name:22} R = {ratio:5} {wrong} of {questions} answers differ", *other)
        differ += wrong + len(other)
    return differ


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
    parser.add_argument("--check", metavar="RECORD", help="run a record again, compare every answer")
    options = parser.parse_args(arguments)
    if options.check:
        torch.set_num_threads(1)
        record = json.loads(Path(options.check).read_text(encoding="utf-8"))
        differ = check(record, options.policies, options.keep, options.questions, options.workers)
        sys.exit(f"{differ} answers differ" if differ else 0)
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
    for one in record["targets"]:
        points, limit = (f"{100 * value:+.1f}" for value in (one["difference"]["mean"], one["limit"]))
        print(f"{one['verdict']:9} {points}, at least {limit}: {one['what']}")
    print(f"\n{options.questions} questions in {record['seconds']:.0f} s")
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
