"""From pixels to tokens: the stock model, hero attached to it, and the released method, in one run.

``--shape`` selects the model (:mod:`bench.models`): ``7b`` is LLaVA-NeXT-7B's shape, in bf16 on a GPU;
``clip-l`` is the same vision tower with a small language model, for a CPU; ``small`` tests the script.
Variants are ``stock``, ``stock again`` (shows the resolution of the machine), ``hero R`` at each keep ratio
R, ``hero 0.2 + text`` with relevance from the shared tower, ``released`` (:mod:`bench.released`, R = 0.2,
with relevance from a second pass of CLIP); on a GPU also hero without CUDA graphs, marked ``(eager)``, and
``stock, compiled``, whose vision tower is compiled with mode "reduce-overhead", that is with CUDA graphs.

Each variant runs on a copy of the model that shares its weights, so that all are ready at the same time: hero
is attached once for all rounds of a batch. Untimed calls come first, in which plans are made, code is
compiled and CUDA graphs are recorded: times are those of the steady state. Variants take turns in interleaved
rounds (:mod:`bench.timing`) per batch:

- ``vision``: from crops to the visual tokens of the language model;
- ``unseen``: the same for image sizes that no call had before, with as many crops;
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
from transformers import LlavaNextForConditionalGeneration

import hero

from . import timing
from .models import PHOTOGRAPH, SHAPES, Subject, build, shared_copy
from .records import environment, reason, write
from .released import Released, eager
from .timing import Clock, compare, summary

MAIN = 0.2  # the keep ratio of relevance, of the released method and of the targets
KEEP = (1.0, 0.5, MAIN, 0.1)
GPU_ROUNDS, CPU_ROUNDS = 7, 6
GPU_WARM_UPS = 3  # the second call of compiled code records a CUDA graph, the third replays it
GROUPS = ("vision", "unseen", "ttft")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of R = 1: the projector gets other rows


class Variant(NamedTuple):
    """A way to run the model; stock if ``keep`` is ``None``."""

    keep: float | None = None
    text: bool = False
    released: bool = False
    eager: bool = False
    compiled: bool = False


HEROES = {f"hero {ratio:g}": Variant(ratio) for ratio in KEEP}
BEST, TEXT = f"hero {MAIN:g}", f"hero {MAIN:g} + text"
VARIANTS = {
    "stock": Variant(),
    "stock again": Variant(),
    BEST: HEROES[BEST],
    "released": Variant(MAIN, text=True, released=True),
    TEXT: Variant(MAIN, text=True),
    **HEROES,
    f"{BEST} (eager)": Variant(MAIN, eager=True),
    f"{TEXT} (eager)": Variant(MAIN, text=True, eager=True),
    "stock, compiled": Variant(compiled=True),  # the last: compiling takes the longest
}


def measured(gpu: bool) -> list[str]:
    """Return the variants that run on a device; without a GPU, hero is eager anyway."""
    return [name for name, one in VARIANTS.items() if gpu or not (one.eager or one.compiled)]


class Ready(NamedTuple):
    """A variant on a model; ``vision`` takes image sizes, by default those of the batch."""

    vision: Callable[..., list[Tensor]]
    first_token: Callable[[], Tensor]


class Prepared:
    """A batch as the processor returns it: inputs of ``generate`` by keep ratio, ``None`` for stock."""

    def __init__(self, subject: Subject, number: int, device: torch.device, attached: Callable):
        self.batch = subject.batches[number]
        self.name = str(len(self.batch.images))
        self.inputs: dict[float | None, dict[str, Tensor]] = {}
        for ratio in (None, *KEEP):
            with attached(Variant(ratio)) if ratio else contextlib.nullcontext(subject) as owner:
                inputs = owner.processor(
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
        """Attach hero to a copy, with its default options."""
        return hero.attach(
            *shared_copy(self.model, self.subject.processor),
            keep_ratio=variant.keep,
            relevance=self.subject.relevance if variant.text else None,
            cuda_graphs=False if variant.eager else "auto",
        )

    def _geometry(self) -> hero.Geometry:
        with self._attached(Variant(MAIN)) as handle:
            return handle.encoder.geometry

    @contextlib.contextmanager
    def ready(self, batch: Prepared, name: str) -> Iterator[Ready]:
        """Put a variant on a copy of the model, which shares its weights."""
        variant = VARIANTS[name]
        text = batch.batch.questions if variant.text else None
        model, inputs = shared_copy(self.model), batch.inputs[variant.keep]
        if variant.keep is None:
            if variant.compiled:
                model.model.vision_tower.compile(mode="reduce-overhead", dynamic=False)
            vision = functools.partial(self.stock, batch, model)
            yield Ready(vision, lambda: self.generate(model, **inputs))
        elif variant.released:
            config = hero.HeroConfig(keep_ratio=variant.keep)
            released = Released(model, config, self._geometry(), self.subject.relevance)

            def vision(sizes: Tensor = batch.sizes) -> list[Tensor]:
                return released(batch.pixels, sizes, text)[0]

            with eager(model.model.vision_tower):
                yield Ready(vision, lambda: self.generate(model, **self.embedded(batch, vision())))
        else:
            with self._attached(variant) as handle:

                def vision(sizes: Tensor = batch.sizes) -> list[Tensor]:
                    return handle.encoder(batch.pixels, sizes, text=text).per_image()

                yield Ready(vision, lambda: self.generate(handle.model, **inputs))

    def stock(self, batch: Prepared, model=None, sizes: Tensor | None = None) -> list[Tensor]:
        """Run the stock vision stage."""
        model, sizes = (model or self.model).model, batch.sizes if sizes is None else sizes
        return model.get_image_features(batch.pixels, sizes, return_dict=True).pooler_output

    def generate(self, model: LlavaNextForConditionalGeneration, **inputs) -> Tensor:
        return model.generate(**inputs, max_new_tokens=1, do_sample=False)

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

    def warm_up(self, ready: Ready) -> int:
        """Run a variant untimed; return the peak memory of its vision stage in bytes, beyond what it had."""
        for _ in range(GPU_WARM_UPS if self.gpu else 1):
            ready.vision()
        ready.first_token()
        return timing.peak_bytes(ready.vision)

    def measure(self, batch: Prepared, name: str, ready: Ready, turn: int) -> dict[str, float]:
        """Measure a variant once: seconds of vision, of vision with unseen image sizes, and of ttft."""
        found = {"vision": timing.seconds(ready.vision)}
        if name != "stock again":
            if not VARIANTS[name].released:  # a few pixels smaller, each time another size
                less = torch.tensor([turn + 1, list(VARIANTS).index(name)])
                found["unseen"] = timing.seconds(functools.partial(ready.vision, batch.sizes - less))
            found["ttft"] = timing.seconds(ready.first_token)
        return found


# --- summary ---------------------------------------------------------------------------------------------


def summarise(record: Mapping) -> dict[str, object]:
    """Return what follows from the raw times of a record, for each batch.

    Each of ``GROUPS`` compares each variant with stock (``None`` if stock failed); ``times`` has their
    medians and minima.
    """
    result = {}
    for series in record["series"]:
        result[series["batch"]] = found = {"times": {}}
        for group in GROUPS:
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
        for number, batch in enumerate(right):
            self.times(bench, batch, 1 / (len(right) - number))
            self.write()

    def times(self, bench: Bench, batch: Prepared, share: float) -> None:
        """Run rounds over all variants, in a share of the time that is left once they are ready.

        A variant that fails is dropped, since ratios compare the same rounds.
        """
        series = {"batch": batch.name, "rounds": 0, "seconds": defaultdict(dict)}
        peaks = self.record["peak_bytes"].setdefault(batch.name, {})
        ready: dict[str, Ready] = {}

        @contextlib.contextmanager
        def dropped(name: str) -> Iterator[None]:
            """Drop a variant that raises."""
            try:
                yield
            except Exception as error:
                self.failed(f"times of {name}, batch {batch.name}", error, name.startswith("hero"))
                ready.pop(name, None)
                for group in series["seconds"].values():
                    group.pop(name, None)

        with contextlib.ExitStack() as stack:
            for name in measured(bench.gpu):
                if self.clock.left() > 0:
                    with dropped(name):
                        ready[name] = stack.enter_context(bench.ready(batch, name))
                        peaks[name] = bench.warm_up(ready[name])
            stack.enter_context(timing.quiet_heap())
            clock, longest = Clock(share * self.clock.left()), 0.0
            for turn in tqdm(range(self.rounds), f"batch {batch.name}", disable=None):
                if clock.left() < longest or clock.left() <= 0:
                    left = f"no time for {self.rounds - turn} of {self.rounds} rounds"
                    self.record["left_out"].append(f"times of all variants, batch {batch.name}: {left}")
                    break
                begin = time.monotonic()
                for name in timing.take_turns(list(ready), turn):
                    with dropped(name):
                        for group, seconds in bench.measure(batch, name, ready[name], turn).items():
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
        "attached": "once for all rounds",
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
