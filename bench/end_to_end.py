"""From pixels to tokens: the stock model, hero attached to it, and the released method, in one run.

``--shape`` selects the model (:mod:`bench.models`): ``7b`` is LLaVA-NeXT-7B's shape, in bf16 on a GPU;
``clip-l`` is the same vision tower with a small language model, for a CPU; ``small`` tests the script.
Variants are ``stock``, ``stock again`` (shows the resolution of the machine), ``hero R`` at each keep ratio
R, ``hero 0.2 + text`` with relevance from the shared tower, ``released`` (:mod:`bench.released`, R = 0.2,
with relevance from a second pass of CLIP); on a GPU also hero with ``cuda_graphs=True``, marked ``(graph)``.
They run in interleaved rounds (:mod:`bench.timing`) per batch:

- ``vision``: from crops to the visual tokens of the language model;
- ``ttft``: ``generate`` of one token from processed inputs;
- ``peak_bytes``: peak memory of the vision stage.

The record is written after every round. Rounds that do not fit into ``--seconds`` are recorded as left out,
and so are failures. Before a batch is timed, the script checks that R = 1 returns the stock tokens and that
``hero.count_tokens`` gives the number of placeholders.

``python -m bench.end_to_end --out bench/results/end_to_end.json``; then ``python -m bench.report``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import hero

from . import timing
from .models import PHOTOGRAPH, SHAPES, Subject, build
from .records import environment, reason, write
from .released import Released, eager
from .timing import Clock, compare, summary

MAIN = 0.2  # the keep ratio of relevance, of the released method and of the targets
KEEP = (1.0, 0.5, MAIN, 0.1)
GPU_ROUNDS, CPU_ROUNDS = 7, 6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of R = 1: the projector gets other rows


class Variant(NamedTuple):
    """A way to run the model; stock if ``keep`` is ``None``."""

    keep: float | None = None
    text: bool = False
    released: bool = False
    graph: bool = False


HEROES = {f"hero {ratio:g}": Variant(ratio) for ratio in KEEP}
BEST, TEXT = f"hero {MAIN:g}", f"hero {MAIN:g} + text"
VARIANTS = {
    "stock": Variant(),
    "stock again": Variant(),
    BEST: HEROES[BEST],
    "released": Variant(MAIN, text=True, released=True),
    TEXT: Variant(MAIN, text=True),
    **HEROES,
    f"{BEST} (graph)": Variant(MAIN, graph=True),
    f"{TEXT} (graph)": Variant(MAIN, text=True, graph=True),
}


def measured(gpu: bool) -> list[str]:
    """Return the variants that run on a device; CUDA graphs need a GPU."""
    return [name for name, variant in VARIANTS.items() if gpu or not variant.graph]


class Ready(NamedTuple):
    """A variant on the model."""

    vision: Callable[[], list[Tensor]]
    first_token: Callable[[], Tensor]


class Prepared:
    """A batch as the processor returns it: inputs of ``generate`` by keep ratio, ``None`` for stock."""

    def __init__(self, subject: Subject, number: int, device: torch.device, attached: Callable):
        self.batch = subject.batches[number]
        self.name = str(len(self.batch.images))
        self.inputs: dict[float | None, dict[str, Tensor]] = {}
        for ratio in (None, *KEEP):
            with attached(Variant(ratio)) if ratio else contextlib.nullcontext():
                inputs = subject.processor(
                    images=self.batch.images, text=self.batch.prompts, padding=True, return_tensors="pt"
                ).to(device)
            inputs["pixel_values"] = inputs["pixel_values"].to(subject.model.dtype)
            self.inputs[ratio] = dict(inputs)
        self.pixels, self.sizes = self.inputs[None]["pixel_values"], self.inputs[None]["image_sizes"].cpu()


class Bench:
    """The model under test."""

    def __init__(self, subject: Subject, device: torch.device):
        self.subject, self.device = subject, device
        self.model, self.gpu = subject.model, device.type == "cuda"
        self.image_token = self.model.config.image_token_id
        count = len(subject.batches)
        self.prepared = [Prepared(subject, number, device, self._attached) for number in range(count)]

    # Variants.

    def _attached(self, variant: Variant) -> hero.Handle:
        return hero.attach(
            self.model,
            self.subject.processor,
            keep_ratio=variant.keep,
            relevance=self.subject.relevance if variant.text else None,
            cuda_graphs=variant.graph,
        )

    def _geometry(self) -> hero.Geometry:
        with self._attached(Variant(MAIN)) as handle:
            return handle.encoder.geometry

    @contextlib.contextmanager
    def ready(self, batch: Prepared, name: str) -> Iterator[Ready]:
        """Put a variant on the model."""
        variant, model = VARIANTS[name], self.model.model
        text = batch.batch.questions if variant.text else None
        generate = functools.partial(self.generate, **batch.inputs[variant.keep])
        if variant.keep is None:
            yield Ready(functools.partial(self.stock, batch), generate)
        elif variant.released:
            config = hero.HeroConfig(keep_ratio=variant.keep)
            released = Released(self.model, config, self._geometry(), self.subject.relevance)

            def vision() -> list[Tensor]:
                return released(batch.pixels, batch.sizes, text)[0]

            def first_token() -> Tensor:
                return self.generate(**self.embedded(batch, vision()))

            with eager(model.vision_tower):
                yield Ready(vision, first_token)
        else:
            with self._attached(variant) as handle:
                handle.encoder.prepare(batch.pixels, batch.sizes)  # makes the plan, which later calls reuse

                def vision() -> list[Tensor]:
                    return handle.encoder(batch.pixels, batch.sizes, text=text).per_image()

                yield Ready(vision, generate)

    def stock(self, batch: Prepared) -> list[Tensor]:
        """Run the stock vision stage."""
        return self.model.model.get_image_features(batch.pixels, batch.sizes, return_dict=True).pooler_output

    def generate(self, **inputs) -> Tensor:
        return self.model.generate(**inputs, max_new_tokens=1, do_sample=False)

    def embedded(self, batch: Prepared, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return prompts with these visual tokens in place, padded on the left, as embeddings."""
        embed, stock, rows = self.model.get_input_embeddings(), batch.inputs[None], []
        for ids, mask, one in zip(stock["input_ids"], stock["attention_mask"], tokens, strict=True):
            ids = ids[mask.bool()]
            places = (ids == self.image_token).nonzero()[:, 0]
            rows.append(torch.cat([embed(ids[: places[0]]), one, embed(ids[places[-1] + 1 :])]))
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        mask = pad([torch.ones(len(row), dtype=torch.long, device=self.device) for row in rows])
        return {"inputs_embeds": pad(rows), "attention_mask": mask}

    # Measurements.

    def check(self, batch: Prepared) -> dict[str, object]:
        """Check that the variants are right, and describe the batch.

        Raises:
            RuntimeError: a wrong number of tokens, or tokens that differ from the stock model's.
        """
        with self.ready(batch, "hero 1") as ready:
            for one, other in zip(self.stock(batch), ready.vision(), strict=True):
                worst = float((one - other).abs().max() / one.abs().max())  # raises for other shapes
                if not worst <= TOLERANCE[self.model.dtype]:
                    raise RuntimeError(f"keep_ratio=1: expected the stock tokens, they differ by {worst}")
        geometry = self._geometry()
        layouts = geometry.layouts(batch.sizes)
        visual = {}
        for ratio, inputs in batch.inputs.items():
            visual[ratio] = (inputs["input_ids"] == self.image_token).sum(1).tolist()
            config = hero.HeroConfig(keep_ratio=ratio or 1.0)
            expected = [hero.count_tokens(config, one.image_size, geometry=geometry) for one in layouts]
            if visual[ratio] != expected:
                raise RuntimeError(f"{ratio}: expected {expected} placeholders, got {visual[ratio]}")
        hidden = ("stock again", "released")
        counts = {name: sum(visual[one.keep]) for name, one in VARIANTS.items() if name not in hidden}
        return {
            "images": [list(layout.image_size) for layout in layouts],
            "crops": sum(layout.crops for layout in layouts),
            "visual_tokens": counts,
        }

    def measure(self, batch: Prepared, name: str) -> dict[str, float]:
        """Measure a variant once: seconds of vision and of ttft."""
        with self.ready(batch, name) as ready:
            if self.gpu:
                ready.vision()  # warms up: a new attachment does some work only once
            found = {"vision": timing.seconds(ready.vision)}
            if name != "stock again":
                found["ttft"] = timing.seconds(ready.first_token)
        return found

    def peak(self, batch: Prepared, name: str) -> int:
        """Return the peak memory of the vision stage in bytes, beyond what was allocated before."""
        with self.ready(batch, name) as ready:
            return timing.peak_bytes(ready.vision)


# --- summary ---------------------------------------------------------------------------------------------


def summarise(record: Mapping) -> dict[str, object]:
    """Return what follows from the raw times of a record, for each batch.

    ``vision`` and ``ttft`` compare each variant with stock (``None`` if stock failed); ``times`` has their
    medians and minima.
    """
    result = {}
    for series in record["series"]:
        result[series["batch"]] = found = {"times": {}}
        for group in ("vision", "ttft"):
            times = series["seconds"].get(group, {})
            stock = times.get("stock")
            found["times"][group] = {name: summary(values) for name, values in times.items()}
            found[group] = {name: stock and compare(values, stock) for name, values in times.items()}
    return result


# --- the run ---------------------------------------------------------------------------------------------


class Run:
    """A run of the steps into a record, which is written as it goes."""

    def __init__(self, record: dict, out: str, clock: Clock, rounds: int):
        self.record, self.out, self.clock, self.rounds = record, out, clock, rounds

    def write(self) -> None:
        self.record["summary"] = summarise(self.record)
        write(self.out, self.record)

    def failed(self, what: str, error: Exception, ours: bool = True) -> None:
        """Record a failure; only failures of ours fail the run."""
        self.record["failed"].append({"what": what, "ours": ours, "reason": reason(error)})
        print(f"failed: {what}: {reason(error)}", flush=True)
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def steps(self, bench: Bench) -> None:
        """Check each batch, then run the rounds that fit into the time."""
        right = []
        for batch in bench.prepared:
            try:
                self.record["batches"][batch.name] = bench.check(batch)
                right.append(batch)
            except Exception as error:
                self.failed(f"batch {batch.name}", error)
        with timing.quiet_heap():
            for number, batch in enumerate(right):
                self.times(bench, batch, Clock(self.clock.left() / (len(right) - number)))
                self.write()

    def times(self, bench: Bench, batch: Prepared, clock: Clock) -> None:
        """Run rounds over all variants; one that fails is dropped, since ratios compare the same rounds."""
        series = {"batch": batch.name, "rounds": 0, "seconds": defaultdict(dict)}
        variants, longest = measured(bench.gpu), 0.0
        peaks = self.record["peak_bytes"].setdefault(batch.name, {})
        for turn in tqdm(range(self.rounds), f"batch {batch.name}", disable=None):
            if clock.left() < longest or clock.left() <= 0:
                left = f"no time for {self.rounds - turn} of {self.rounds} rounds"
                self.record["left_out"].append(f"times of all variants, batch {batch.name}: {left}")
                break
            begin = time.monotonic()
            for name in timing.take_turns(variants, turn):
                try:
                    found = bench.measure(batch, name)
                    if turn == 0:
                        peaks[name] = bench.peak(batch, name)
                except Exception as error:
                    self.failed(f"times of {name}, batch {batch.name}", error, name.startswith("hero"))
                    variants.remove(name)
                    for group in series["seconds"].values():
                        group.pop(name, None)
                    continue
                for group, seconds in found.items():
                    series["seconds"][group].setdefault(name, []).append(seconds)
            longest = max(longest, time.monotonic() - begin)
            if turn == 0:
                self.record["series"].append(series)
            series["rounds"] += 1
            self.write()


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 if nothing of ours failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--shape", choices=list(SHAPES), help="default: 7b on a GPU, else clip-l")
    parser.add_argument("--seconds", type=float, default=1e9, help="time limit (default: none)")
    help = f"measured rounds (default {GPU_ROUNDS}, {CPU_ROUNDS} on a CPU)"
    parser.add_argument("--rounds", type=timing.positive, help=help)
    parser.add_argument("--threads", type=timing.positive, help="threads of torch (default: its own)")
    options = parser.parse_args(arguments)
    clock = Clock(options.seconds)
    gpu = torch.cuda.is_available()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    shape = options.shape or ("7b" if gpu else "clip-l")
    dtype = torch.bfloat16 if gpu else torch.float32
    record = {
        **environment("end_to_end", "python -m bench.end_to_end", arguments),
        "shape_name": shape,
        "small": shape == "small",
        "threads": torch.get_num_threads(),
        "clock": "wall",
        "dtype": str(dtype).removeprefix("torch."),
        "attention": "sdpa",
        "picture": PHOTOGRAPH,
        "shape": dataclasses.asdict(SHAPES[shape]) | {"pinpoints": SHAPES[shape].pinpoints},
        "batches": {},
        "series": [],
        "peak_bytes": {},
        "left_out": [],
        "failed": [],
    }
    run = Run(record, options.out, clock, options.rounds or (GPU_ROUNDS if gpu else CPU_ROUNDS))
    run.write()
    device = torch.device("cuda" if gpu else "cpu")
    with torch.no_grad():
        subject = build(shape, device, dtype)
    with torch.inference_mode():
        run.steps(Bench(subject, device))
    run.write()
    return int(any(one["ours"] for one in record["failed"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
