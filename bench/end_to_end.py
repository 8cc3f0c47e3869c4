"""From pixels to tokens: the stock model, hero attached to it, and the released method, in one run.

``--shape`` selects the model (:mod:`bench.models`): ``7b`` is LLaVA-NeXT-7B's shape, in bf16 on a GPU;
``clip-l`` is the same vision tower with a small language model and ``mini`` the bundled trained model, both
for a CPU; ``small`` tests the script. Variants are ``stock``, ``stock again`` (shows the resolution of the
machine), ``hero R`` at each keep ratio R, ``hero 0.2 + text`` with relevance from the shared tower,
``released`` (:mod:`bench.released`, R = 0.2, with relevance from a second pass of CLIP); on a GPU also hero
with ``cuda_graphs=True``, marked ``(graph)``. They run in interleaved rounds (:mod:`bench.timing`) per batch:

- ``vision``: from crops to the visual tokens of the language model; on a CPU also the ``tower`` within it;
- ``ttft``: ``generate`` of one token from processed inputs;
- ``counts``: launches, host-device synchronisations ("waits") and peak memory of the vision stage.

The record is written after every round. Rounds that do not fit into ``--seconds`` are recorded as left out,
and so are failures. Before a batch is timed, the script checks that R = 1 returns the stock tokens and that
``hero.count_tokens`` gives the number of placeholders.

``python -m bench.end_to_end --out bench/results/end_to_end.json``; then ``python -m bench.report``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

import hero
from hero_kernels.testing import OperationCounter, peak_bytes

from . import timing
from .models import PHOTOGRAPH, SHAPES, Subject, build
from .records import accelerator, environment, fingerprint, without_folders, write
from .released import Released, eager
from .timing import Clock, compare, summary

MAIN = 0.2  # the keep ratio of relevance, of the released method and of the targets
KEEP = (1.0, 0.5, MAIN, 0.1)
GPU_ROUNDS, CPU_ROUNDS = 7, 6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of R = 1: the projector gets other rows
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy")


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


@contextlib.contextmanager
def timed(owner: object, name: str, now: Callable[[], float]) -> Iterator[list[float]]:
    """Time a method inside the block; yields a list that gets the seconds of each call."""
    function, spent = getattr(owner, name), []

    def run(*args, **kwargs):
        begin = now()
        result = function(*args, **kwargs)
        spent.append(now() - begin)
        return result

    with mock.patch.object(owner, name, run):
        yield spent


class Ready(NamedTuple):
    """A variant on the model; ``tower`` is the owner and the name of the method that runs the tower."""

    vision: Callable[[], list[Tensor]]
    first_token: Callable[[], Tensor]
    tower: tuple[object, str]


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

    def __init__(self, subject: Subject, device: torch.device, clock: str):
        self.subject, self.device, self.clock = subject, device, clock
        self.model, self.gpu = subject.model, device.type == "cuda"
        self.image_token = self.model.config.image_token_id
        count = len(subject.batches)
        self.prepared = [Prepared(subject, number, device, self._attached) for number in range(count)]

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

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
            yield Ready(functools.partial(self.stock, batch), generate, (model.vision_tower, "forward"))
        elif variant.released:
            config = hero.HeroConfig(keep_ratio=variant.keep)
            released = Released(self.model, config, self._geometry(), self.subject.relevance)

            def vision() -> list[Tensor]:
                return released(batch.pixels, batch.sizes, text)[0]

            def first_token() -> Tensor:
                return self.generate(**self.embedded(batch, vision()))

            with eager(model.vision_tower):
                yield Ready(vision, first_token, (released, "encode"))
        else:
            with self._attached(variant) as handle:
                handle.encoder.prepare(batch.pixels, batch.sizes)  # makes the plan, which later calls reuse

                def vision() -> list[Tensor]:
                    return handle.encoder(batch.pixels, batch.sizes, text=text).per_image()

                yield Ready(vision, generate, (handle.encoder, "encode"))

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

    def time(self, function: Callable[[], object]) -> float:
        """Return the seconds of a call, the device synchronised before and after."""

        def run() -> object:
            result = function()
            self.wait()
            return result

        self.wait()
        return timing.seconds(run, self.clock)

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
        with self.ready(batch, "released") as ready:
            tokens = ready.vision()
        if not all(0 < len(one) <= most for one, most in zip(tokens, visual[MAIN], strict=True)):
            raise RuntimeError(f"released: expected at most {visual[MAIN]} tokens, got {[*map(len, tokens)]}")
        placeholders = {name: sum(visual[variant.keep]) for name, variant in VARIANTS.items()}
        return {
            "images": [list(layout.image_size) for layout in layouts],
            "crops": sum(layout.crops for layout in layouts),
            "visual_tokens": {
                name: count for name, count in placeholders.items() if name not in ("stock again", "released")
            },
        }

    def measure(self, batch: Prepared, name: str) -> dict[str, float]:
        """Measure a variant once: seconds of vision, on a CPU of the tower within it, and of ttft."""
        with self.ready(batch, name) as ready:
            if self.gpu:
                ready.vision()  # warms up: a new attachment does some work only once
                found = {"vision": self.time(ready.vision)}
            else:
                with timed(*ready.tower, timing.CLOCKS[self.clock]) as spent:
                    found = {"vision": self.time(ready.vision)}
                found["tower"] = sum(spent)
            if name != "stock again":
                found["ttft"] = self.time(ready.first_token)
        return found

    def counts(self, batch: Prepared, name: str) -> dict[str, object]:
        """Return launches, synchronisations and peak memory of the vision stage."""
        with self.ready(batch, name) as ready:
            if not self.gpu:
                with OperationCounter() as counter:
                    ready.vision()
                launches, waits = len(counter.operations), len(counter.waits)
                return {"launches": launches, "waits": waits, "peak_bytes": peak_bytes(ready.vision)}
            ready.vision()
            found = {**timing.launches_gpu(ready.vision), "waits": timing.synchronisations_gpu(ready.vision)}
            return {**found, "peak_bytes": timing.peak_gpu(ready.vision)}


# --- summary ---------------------------------------------------------------------------------------------


def to_stock(group: Mapping[str, Sequence[float]]) -> dict[str, Mapping | None]:
    """Compare each variant with stock; ``None`` if stock failed."""
    stock = group.get("stock")
    return {name: stock and compare(times, stock) for name, times in group.items()}


def summarise(record: Mapping) -> dict[str, object]:
    """Return ``{batch: {group: {variant: comparison or median}}}`` from the raw times of a record."""
    result = {}
    for series in record["series"]:
        times = {group: series["seconds"].get(group, {}) for group in ("vision", "tower", "ttft")}
        towers = {name: found for name, found in to_stock(times["tower"]).items() if name != "stock"}
        result[series["batch"]] = found = {
            "times": {
                group: {name: summary(values) for name, values in variants.items()}
                for group, variants in times.items()
            },
            "vision": to_stock(times["vision"]),
            "ttft": {name: {"to_stock": found} for name, found in to_stock(times["ttft"]).items()},
            "stages": {"tower": towers},
        }
        for group in ("vision", "ttft"):
            found[f"released_{group}"] = {
                name: compare(times[group]["released"], times[group][name])
                if {"released", name} <= times[group].keys()
                else None
                for name in (BEST, TEXT)
            }
    return result


# --- the run ---------------------------------------------------------------------------------------------


class Run:
    """A run of the steps into a record, which is written as it goes."""

    def __init__(self, record: dict, out: str, clock: Clock, rounds: int):
        self.record, self.out, self.clock, self.rounds = record, out, clock, rounds

    def write(self) -> None:
        self.record["summary"] = summarise(self.record)
        self.record["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        write(self.out, self.record)

    def failed(self, what: str, error: Exception, ours: bool = True) -> None:
        """Record a failure; only failures of ours fail the run."""
        reason = (str(error).strip().splitlines() or ["no message"])[0][:300]
        reason = f"{type(error).__name__}: {without_folders(reason)}"
        self.record["failed"].append({"what": what, "ours": ours, "reason": reason})
        print(f"failed: {what}: {reason}", flush=True)
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def steps(self, bench: Bench) -> None:
        """Check each batch, then run what fits into the time, most of which goes to the rounds."""
        right = []
        for batch in bench.prepared:
            try:
                self.record["batches"][batch.name] = bench.check(batch)
                right.append(batch)
            except Exception as error:
                self.failed(f"batch {batch.name}", error)
        steps = [
            (step, batch, share) for step, share in ((self.times, 4), (self.counts, 1)) for batch in right
        ]
        with timing.quiet_heap():
            for number, (step, batch, share) in enumerate(steps):
                rest = sum(share for _, _, share in steps[number:])
                step(bench, batch, Clock(self.clock.left() * share / rest))
                self.write()

    def counts(self, bench: Bench, batch: Prepared, clock: Clock) -> None:
        """Count once what each variant launches, waits for and allocates."""
        for name in measured(bench.gpu):
            if clock.left() <= 0:
                self.record["left_out"].append(f"counts of {name}, batch {batch.name}: no time")
            elif name != "stock again":
                try:
                    self.record["counts"].setdefault(batch.name, {})[name] = bench.counts(batch, name)
                except Exception as error:
                    self.failed(f"counts of {name}, batch {batch.name}", error, name.startswith("hero"))

    def times(self, bench: Bench, batch: Prepared, clock: Clock) -> None:
        """Run rounds over all variants; one that fails is dropped, since ratios compare the same rounds."""
        series = {"batch": batch.name, "rounds": 0, "seconds": defaultdict(dict)}
        variants, longest = measured(bench.gpu), 0.0
        for turn in tqdm(range(self.rounds), f"batch {batch.name}", disable=None):
            if clock.left() < longest or clock.left() <= 0:
                left = f"no time for {self.rounds - turn} of {self.rounds} rounds"
                self.record["left_out"].append(f"times of all variants, batch {batch.name}: {left}")
                break
            begin = time.monotonic()
            for name in timing.take_turns(variants, turn):
                try:
                    found = bench.measure(batch, name)
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
    parser.add_argument("--shape", choices=[*SHAPES, "mini"], help="default: 7b on a GPU, else clip-l")
    parser.add_argument("--seconds", type=float, default=1e9, help="time limit (default: none)")
    help = f"measured rounds (default {GPU_ROUNDS}, {CPU_ROUNDS} on a CPU)"
    parser.add_argument("--rounds", type=timing.positive, help=help)
    timing.add_threads(parser)
    parser.add_argument("--commit", help="the commit, if there is no git")
    options = parser.parse_args(arguments)
    clock = Clock(options.seconds)
    gpu = torch.cuda.is_available()
    if options.clock == "cpu" and gpu:
        parser.error("--clock cpu: expected no GPU (CUDA_VISIBLE_DEVICES=)")
    timing.use_threads(parser, options)
    shape = options.shape or ("7b" if gpu else "clip-l")
    dtype = torch.bfloat16 if gpu and shape != "mini" else torch.float32
    record = {
        "benchmark": "end_to_end",
        "shape_name": shape,
        "small": shape == "small",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **environment("bench.end_to_end", arguments, PACKAGES),
        "code": fingerprint(),
        "gpu": accelerator() if gpu else None,
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": "sdpa",
        "picture": "scenes" if shape == "mini" else PHOTOGRAPH,
        "load_average": [os.getloadavg()[0]],
        "shape": None,
        "batches": {},
        "series": [],
        "counts": {},
        "left_out": [],
        "failed": [],
    }
    if options.commit:
        record["commit"] = {"hash": options.commit, "dirty": None}
    run = Run(record, options.out, clock, options.rounds or (GPU_ROUNDS if gpu else CPU_ROUNDS))
    run.write()
    device = torch.device("cuda" if gpu else "cpu")
    with torch.no_grad():
        subject = build(shape, device, dtype)
    record["shape"] = subject.description
    with torch.inference_mode():
        run.steps(Bench(subject, device, options.clock))
    record["load_average"].append(os.getloadavg()[0])
    run.write()
    return int(any(one["ours"] for one in record["failed"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
