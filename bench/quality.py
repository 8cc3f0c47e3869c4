"""Measure the accuracy of every policy at every keep ratio, on questions that the mini model has not seen.

The bundled model (:mod:`hero.mini`) answers generated questions about generated scenes of test handwritings,
one question a scene, with hero attached as a user attaches it. Each variant answers the same questions, so
differences are paired; intervals are bootstraps over questions. A variant is

- ``full``: the stock model with all tokens;
- a policy, by its name. A policy that reads the question is also run as ``<policy>-no-text``, without
  relevance model, and as ``<policy>-other-question``, where relevance reads the question of another scene;
- the NAME of ``--variant NAME=JSON``, options of :class:`hero.HeroConfig`.

``--out FILE`` runs and writes a record. ``--check RECORD`` runs a record's variants again and compares every
answer.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hero
from hero import mini
from hero.policies import POLICIES

from .mini import scenes
from .quality_statistics import answers_of, bits, summarise, unbits
from .quality_variants import (
    BATCH,
    GRID,
    KEEP,
    SEEDS,
    Asked,
    Variant,
    asked,
    variants_of,
)
from .records import environment, write
from .timing import positive

# --- answers ---------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The answers of a variant at a keep ratio, question by question."""

    right: list[bool]
    kept: list[bool]
    """Whether a patch of each digit asked for was kept; false where no digits are asked for."""
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
        split, kinds: as in :func:`asked`.
        weights: folder of the mini model.
        loaded: the same, if it is loaded already.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        keep: Sequence[float] = KEEP,
        split: str = "test",
        kinds: tuple[str, ...] | None = None,
        weights: Path = mini.WEIGHTS,
        loaded: mini.MiniModel | None = None,
    ):
        self.variants = tuple(variants)
        self.keep = tuple(keep)
        self.split, self.kinds = split, kinds
        self.weights = weights
        self.loaded = mini.load(weights=weights) if loaded is None else loaded
        tokenizer = self.loaded.processor.tokenizer
        self.token_of = tokenizer.convert_tokens_to_ids

    def draw(self, index: int) -> Asked:
        """The question of this number."""
        return asked(self.split, index, self.kinds)

    def other_text(self, index: int) -> str:
        """The next question that is another one and names no colour of this one."""
        own = self.draw(index).text
        colours = set(own.split()) & set(scenes.COLOURS)
        later = (asked(self.split, number, self.kinds).text for number in itertools.count(index + 1))
        return next(text for text in later if text != own and not colours & set(text.split()))

    def inputs(self, questions: Sequence[Asked]) -> dict[str, Tensor]:
        """The stock processor's output, padded on the left. Prompts hold the answer but for its last word."""
        texts = [
            " ".join([scenes.prompt(question.text), *question.answer.split()[:-1]]) for question in questions
        ]
        inputs = self.loaded.processor(
            images=[question.image for question in questions],
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        # The positions that generate uses.
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return {**inputs, "position_ids": positions}

    def expected(self, questions: Sequence[Asked]) -> Tensor:
        """``[questions, words]``: the tokens of the answers; −1 before those that are shorter."""
        answers = [self.token_of(question.answer.split()) for question in questions]
        most = max(map(len, answers))
        return torch.tensor([[-1] * (most - len(answer)) + answer for answer in answers])

    def answers(self, inputs: Mapping[str, Tensor], words: int) -> Tensor:
        """``[questions, words]``: the most likely last tokens, hero attached or not: one forward."""
        return self.loaded.model(**inputs, use_cache=False, logits_to_keep=words).logits.argmax(-1)

    @contextlib.contextmanager
    def attached(self, variant: Variant, ratio: float, texts: Sequence[str]) -> Iterator[hero.Handle | None]:
        """Attach a variant; relevance reads ``texts``, since the prompts hold answers, too."""
        if variant.options is None:
            yield None
            return
        relevance = None if variant.text == "none" else self.loaded.relevance
        options = {**variant.options, "keep_ratio": ratio}
        with hero.attach(self.loaded.model, self.loaded.processor, relevance=relevance, **options) as handle:
            encoder = handle.encoder
            if relevance is not None:
                score = encoder.score
                encoder.score = lambda encoded, plan, text=None: score(encoded, plan, texts)
            yield handle

    @torch.inference_mode()
    def run(self, indices: Sequence[int]) -> dict[tuple[str, float], Cell]:
        """Ask every variant at every keep ratio; that of ``full`` is 1."""
        questions = [self.draw(index) for index in indices]
        others = [self.other_text(index) for index in indices]
        own = [question.text for question in questions]
        expected = self.expected(questions)
        inputs = self.inputs(questions)
        image_token = self.loaded.model.config.image_token_id
        full_tokens = int((inputs["input_ids"][0] == image_token).sum())
        cells = {}
        for variant in self.variants:
            encoded, texts = [], others if variant.text == "other" else own
            for ratio in (1.0,) if variant.options is None else self.keep:
                with self.attached(variant, ratio, texts) as handle:
                    if handle is not None:
                        _encode_once(handle.encoder, encoded)
                    answers = self.answers(inputs, expected.shape[1])
                    last = None if handle is None else handle.last
                tokens, kept = full_tokens, [bool(question.boxes) for question in questions]
                if last is not None:
                    tokens = sum(last.lengths) / len(questions)
                    kept = _kept(last, questions)
                right = ((answers == expected) | (expected < 0)).all(1).tolist()
                cells[variant.name, ratio] = Cell(right, kept, tokens)
        return cells


def _kept(last: hero.Selection, questions: Sequence[Asked]) -> list[bool]:
    """Whether a patch of each digit asked for was kept."""
    layout = last.layout[0]
    kept = last.keep_mask().view(len(questions), layout.crops, -1)[:, list(layout.tile_crops)].numpy()
    return [
        bool(question.boxes) and bool((question.needed() & mask).any((1, 2)).all())
        for question, mask in zip(questions, kept, strict=True)
    ]


def measure(runner: Runner, questions: int) -> dict[tuple[str, float], Cell]:
    """Ask the first ``questions`` questions.

    Returns:
        the :class:`Cell` of each (variant name, keep ratio), of all questions together.
    """
    batches = [range(first, min(first + BATCH, questions)) for first in range(0, questions, BATCH)]
    parts = [runner.run(batch) for batch in tqdm(batches, unit="batch", disable=None)]
    return {key: _joined([part[key] for part in parts]) for key in parts[0]}


def _joined(cells: Sequence[Cell]) -> Cell:
    tokens = sum(cell.tokens * len(cell.right) for cell in cells) / sum(len(cell.right) for cell in cells)
    return Cell(
        [right for cell in cells for right in cell.right],
        [kept for cell in cells for kept in cell.kept],
        tokens,
    )


# --- the record ------------------------------------------------------------------------------------------


def _digest(parts: Iterable[bytes]) -> str:
    """The beginning of a hash."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def record_of(runner: Runner, cells: Mapping[tuple[str, float], Cell]) -> dict[str, object]:
    """What a run found, in plain values fit for JSON."""
    count = len(next(iter(cells.values())).right)
    questions = [runner.draw(index) for index in range(count)]
    reads = np.array([bool(question.boxes) for question in questions])
    kinds = list(dict.fromkeys(question.kind for question in questions))
    with hero.attach(runner.loaded.model, runner.loaded.processor) as handle:
        layout = handle.encoder.geometry.layout(questions[0].image.size[::-1])
    variants = {}
    for variant in runner.variants:
        ratios = (1.0,) if variant.options is None else runner.keep
        variants[variant.name] = {
            "options": None if variant.options is None else dict(variant.options),
            "text": variant.text,
            "keep": {
                f"{ratio:g}": {
                    "patches": round(cell.tokens - layout.newline_count, 2),
                    "tokens": round(cell.tokens, 2),
                    "digits_kept": round(float(np.mean(np.array(cell.kept)[reads])), 4)
                    if reads.any()
                    else None,
                    "right": bits(cell.right),
                }
                for ratio in ratios
                for cell in [cells[variant.name, ratio]]
            },
        }
    record = {
        "questions": count,
        "split": runner.split,
        "seed": SEEDS[runner.split],
        "grid": list(GRID),
        "keep": list(runner.keep),
        "asked": runner.kinds,
        "weights": _digest(file.read_bytes() for file in sorted(runner.weights.glob("*.safetensors"))),
        "trained": json.loads((runner.weights / "training.json").read_text())["settings"]["seed"],
        "digest": _digest(f"{one.text}\0{one.answer}\0{one.boxes}\0".encode() for one in questions),
        "kinds": {kind: bits([question.kind == kind for question in questions]) for kind in kinds},
        "variants": variants,
    }
    return {**record, "summary": summarise(record)}


def check(record: Mapping, weights: Path = mini.WEIGHTS) -> int:
    """Ask the questions of a record again and print, for each variant, how many answers differ.

    Returns:
        the number of answers, or of digits kept and token counts, that differ.
    """
    variants = [Variant(name, one["options"], one["text"]) for name, one in record["variants"].items()]
    kinds = tuple(record["asked"]) if record.get("asked") else None
    runner = Runner(variants, record["keep"], record["split"], kinds, weights)
    again = record_of(runner, measure(runner, record["questions"]))
    differ = sum(again[name] != record[name] for name in ("weights", "digest"))
    for (name, ratio), right in answers_of(again).items():
        cell, old = (one["variants"][name]["keep"][ratio] for one in (again, record))
        wrong = int((right != unbits(old["right"], record["questions"])).sum())
        other = [key for key in ("patches", "tokens", "digits_kept") if cell[key] != old[key]]
        print(f"{name:22} R = {ratio:5} {wrong} of {record['questions']} answers differ", *other)
        differ += wrong + len(other)
    return differ


# --- the command -----------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return text.split(",")


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


def run(runner: Runner, options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Ask the questions, write the record and print the accuracy over all kinds."""
    begin = time.perf_counter()
    cells = measure(runner, options.questions)
    record = {
        **environment("quality", "python -m bench.quality", arguments),
        "seconds": round(time.perf_counter() - begin, 1),
        **record_of(runner, cells),
    }
    write(options.out, record)
    for name, cells in record["summary"]["all"]["variants"].items():
        means = (f"R = {ratio} {100 * cell['accuracy']['mean']:.1f} %" for ratio, cell in cells.items())
        print(f"{name:22}", *means, sep="  ")
    print(f"\n{options.questions} questions in {record['seconds']:.0f} s")


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--check", metavar="RECORD", help="run a record again, compare every answer")
    parser.add_argument("--policies", type=_words, default=list(POLICIES), help="default: all there are")
    parser.add_argument("--questions", type=positive, default=2400, help="default 2400")
    parser.add_argument("--split", choices=sorted(SEEDS), default="test", help="default test")
    help = "folder of a mini model; default: the bundled one"
    parser.add_argument("--weights", type=Path, default=mini.WEIGHTS, help=help)
    help = "one more variant: fields of hero.HeroConfig"
    options = {"type": _named_options, "action": "append", "default": [], "metavar": "NAME=JSON"}
    parser.add_argument("--variant", help=help, **options)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.check:
        record = json.loads(Path(options.check).read_text(encoding="utf-8"))
        differ = check(record, options.weights)
        sys.exit(f"{differ} answers differ" if differ else 0)
    if options.out is None:
        parser.error("--out: expected a JSON file to write")
    loaded = mini.load(weights=options.weights)
    try:
        variants = variants_of(loaded, options.policies, dict(options.variant))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    runner = Runner(variants, KEEP, options.split, weights=options.weights, loaded=loaded)
    run(runner, options, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
