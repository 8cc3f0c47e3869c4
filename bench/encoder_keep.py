"""What dropping within the encoder saves in time, and what it costs in answers (docs/method.md, 7).

Time: the vision tower of CLIP-ViT-L/14-336 on a picture of 2 × 2 tiles, random weights, R = 0.2, with each
``encoder_keep``, one right after the other in every round (:mod:`bench.timing`). ``none`` is hero as it is
without the option; ``1`` runs the same code and shows what the machine can resolve; ``0.99`` drops next to
nothing and shows what packed rows cost by themselves. *Early* scores tiles by one low layer, so that dropping
begins sooner.

Answers: the mini model at R = 0.2 on the questions of :mod:`bench.quality`, all variants on the same ones.

``python -m bench.encoder_keep --out bench/results/encoder_keep.json``; then ``python -m bench.report``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

import hero
from hero import mini

from . import models, quality
from .options import add_threads, positive, use_threads
from .record import environment, write
from .timing import compare, quiet_heap, seconds, summary, take_turns

__all__ = ["EARLY", "TIMED", "main", "measure_answers", "measure_time"]

RATIO = 0.2
SMALL = dataclasses.replace(
    models.SHAPES["small"], vision=(6, 64, 4, 128)
)  # two layers after those that score
EARLY = {"tile_layers": (0.2,)}
"""Of 24 layers layer 5, of the mini model's 6 layer 1; the default reaches layers 12 and 3."""

TIMED: dict[str, dict[str, object]] = {
    "none": {},
    "1": {"encoder_keep": 1.0},
    "0.99": {"encoder_keep": 0.99},
    "0.5": {"encoder_keep": 0.5},
    "0.4": {"encoder_keep": 0.4},
    "0.2": {"encoder_keep": 0.2},
    "early 0.2": {"encoder_keep": 0.2, **EARLY},
}
POLICIES: dict[str, dict[str, object]] = {
    "hero": {},
    "hero, early": EARLY,
    "hero+": {"policy": "hero+"},
    "uniform": {"policy": "uniform"},
}
SHARES = (None, 0.5, 0.3, 0.2)
GROUPS = ("one attribute", "count", "all")


# --- time ------------------------------------------------------------------------------------------------


def measure_time(
    shape: models.Shape, rounds: int, clock: str, progress: Callable[[str], None]
) -> dict[str, object]:
    """Seconds of the tower, in rounds, and what they say."""
    size = (2 * shape.crop_size, 2 * shape.crop_size)  # 2 × 2 tiles without padding
    model = models.build_model(shape)
    tower, geometry = (
        model.model.vision_tower,
        hero.Geometry(shape.crop_size, shape.patch_size, _pairs(shape)),
    )
    layout = geometry.layout(size)
    crops = torch.randn(
        layout.crops, 3, shape.crop_size, shape.crop_size, generator=torch.Generator().manual_seed(0)
    )
    times: dict[str, list[float]] = {name: [] for name in TIMED}
    patches: dict[str, int] = {}
    layers: dict[str, int] = {}

    def once(name: str) -> None:
        config = hero.HeroConfig(keep_ratio=RATIO, **TIMED[name])
        encoder = hero.HeroVisionEncoder(tower, config=config, geometry=geometry)
        try:
            patches[name] = layout.encoder_patches(config)
            layers[name] = max(hero.config.resolve_layers("tile_layers", config.tile_layers, encoder.depth))
            _, batch = encoder.prepare(crops, [size])
            times[name].append(seconds(lambda: encoder.encode(crops, batch), clock))
        finally:
            encoder.remove()

    with torch.inference_mode(), contextlib.ExitStack() as heap:
        heap.enter_context(quiet_heap())
        for name in ("none", "0.2"):  # warm up
            once(name)
        for values in times.values():
            values.clear()
        for turn in range(rounds):
            for name in take_turns(tuple(TIMED), turn):
                once(name)
            ratio = compare(times["0.2"], times["none"])["paired"]
            progress(f"round {turn + 1}/{rounds}: tower with 0.2 to none {ratio:.3f}")
    return {
        "shape": shape.describe(),
        "crops": len(crops),
        "rounds": rounds,
        "clock": clock,
        "threads": torch.get_num_threads(),
        "variants": {
            name: {
                "options": dict(TIMED[name]),
                "patches": patches[name],
                "layer": layers[name],
                "seconds": values,
                "summary": summary(values),
                "to_none": compare(values, times["none"]),
            }
            for name, values in times.items()
        },
    }


def _pairs(shape: models.Shape) -> tuple[tuple[int, int], ...]:
    return tuple((height, width) for height, width in shape.pinpoints)


# --- answers ---------------------------------------------------------------------------------------------


def measure_answers(questions: int, workers: int, progress: bool = True) -> dict[str, object]:
    """Accuracy of the mini model with each policy and share; all paired."""
    loaded = mini.load()
    variants, names = [quality.FULL], {}
    for policy, options in POLICIES.items():
        text = "own" if quality.reads_text(loaded, options) else "none"
        for share in SHARES:
            name = policy if share is None else f"{policy} {share:g}"
            variants.append(quality.Variant(name, {**options, "encoder_keep": share}, text))
            names[policy, share] = name
    runner = quality.Runner(variants, (RATIO,), loaded=loaded)
    cells = quality.measure(runner, questions, workers, progress)
    kinds = np.array([runner.draw(index).kind for index in range(questions)])
    groups = {
        "one attribute": np.isin(kinds, quality.scenes.ONE_ATTRIBUTE),
        "count": kinds == "count",
        "all": np.ones(questions, dtype=bool),
    }
    right = {name: np.array(cells[name, RATIO].right) for name in names.values()}
    full = np.array(cells["full", 1.0].right)

    def row(policy: str, share: float | None) -> dict[str, object]:
        own = right[names[policy, share]]
        return {
            "policy": policy,
            "encoder_keep": share,
            "right": quality.bits(own),
            "groups": {
                group: {
                    "accuracy": quality.estimate(own[members]),
                    "to_full": quality.difference(own[members], full[members]),
                    "to_none": quality.difference(own[members], right[names[policy, None]][members]),
                }
                for group, members in groups.items()
                if members.any()
            },
        }

    return {
        "questions": questions,
        "split": "test",
        "keep_ratio": RATIO,
        "weights": quality.weights_hash(runner.weights),
        "kinds": {group: int(members.sum()) for group, members in groups.items()},
        "full": {
            group: quality.estimate(full[members]) for group, members in groups.items() if members.any()
        },
        "rows": [row(policy, share) for policy in POLICIES for share in SHARES],
    }


def main(arguments: Sequence[str]) -> dict:
    """The command: returns the record it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.encoder_keep", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=positive, default=5, help="measured rounds of time (default 5)")
    parser.add_argument("--questions", type=positive, default=1000, help="default 1000")
    parser.add_argument("--workers", type=positive, default=2, help="processes that answer (default 2)")
    add_threads(parser)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test the script itself")
    options = parser.parse_args(arguments)
    use_threads(parser, options)
    shape = SMALL if options.small else models.SHAPES["clip-l"]
    begin, load = time.perf_counter(), [os.getloadavg()[0]]
    timed = measure_time(shape, options.rounds, options.clock, lambda line: print(line, flush=True))
    load.append(os.getloadavg()[0])
    answers = measure_answers(options.questions, options.workers)
    record = {
        "benchmark": "encoder_keep",
        "small": options.small,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **environment("bench.encoder_keep", arguments, ("torch", "transformers", "tokenizers", "numpy")),
        "dtype": "float32",
        "load_average": load,
        "seconds": round(time.perf_counter() - begin, 1),
        "time": timed,
        "answers": answers,
    }
    write(options.out, record)
    return record


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
