"""From pixels to tokens, end to end: the stock model, hero on it, and the method as released, in one run.

``--shape`` names what runs (:mod:`bench.models`): ``7b`` is LLaVA-NeXT-7B's shape, in bf16 on a GPU;
``clip-l`` the same vision tower before a small language model and ``mini`` the bundled trained model, both
for a CPU; ``small`` tests the script. Variants are ``stock``, ``stock again`` (what the machine resolves),
``hero R`` at each keep ratio R, ``hero 0.2 + text`` with the question's relevance from the shared tower, and
``released`` (:mod:`bench.released`, R = 0.2, with relevance by CLIP's own second pass); on a GPU also hero
with ``capture=True``, marked ``(graph)``. They are measured in interleaved rounds (:mod:`bench.timing`), by
batch:

- ``vision``: from crops to the visual tokens of the language model, whole calls; ``stages`` splits them;
- ``ttft``: ``generate`` of one token from processed inputs; ``prefill`` and ``decode``: the language model
  alone on as many random embeddings, and the tokens after them. A run must take ``vision + prefill``; what it
  takes more is lost between the parts;
- ``counts``: launches, waits of the host for the device, peak memory of the vision stage;
- ``profiles``, on a GPU: the kernels that take the most time.

The most important comes first, what does not fit into ``--seconds`` is recorded as left out, what fails as
failed, and the record is written after every round. Before a batch is timed, it is checked that keeping
everything gives the stock tokens and that the placeholders are as many as ``hero.count_tokens`` says.

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
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import hero
from hero import capture
from hero_kernels.testing import OperationCounter, peak_bytes

from .models import PHOTOGRAPH, SHAPES, Subject, build
from .options import add_threads, positive, use_threads
from .record import accelerator, environment, fingerprint, without_folders, write
from .released import Released, eager
from .timing import CLOCKS, Clock, compare, quiet_heap, seconds, summary, take_turns

__all__ = ["VARIANTS", "Bench", "Step", "main", "plan", "summarise"]

MAIN = 0.2  # the keep ratio of relevance, of the released method and of the targets
KEEP = (1.0, 0.5, MAIN, 0.1)
SLOW = ("clip-l",)  # shapes of which a call takes ten seconds on a CPU
GPU_ROUNDS, CPU_ROUNDS = 7, 6
DECODED = 16  # tokens after the first
TOP = 10  # kernels of a profile
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of R = 1 to stock: the projector sees other rows
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy")


class Variant(NamedTuple):
    """A way to run the model: stock where ``keep`` is ``None``."""

    keep: float | None = None
    text: bool = False
    released: bool = False
    graph: bool = False


HEROES = {f"hero {ratio:g}": Variant(ratio) for ratio in KEEP}
BEST, TEXT = f"hero {MAIN:g}", f"hero {MAIN:g} + text"
GRAPH, TEXT_GRAPH = f"{BEST} (graph)", f"{TEXT} (graph)"
VARIANTS = {
    "stock": Variant(),
    "stock again": Variant(),
    BEST: HEROES[BEST],
    "released": Variant(MAIN, text=True, released=True),
    TEXT: Variant(MAIN, text=True),
    **HEROES,
    GRAPH: Variant(MAIN, graph=True),
    TEXT_GRAPH: Variant(MAIN, text=True, graph=True),
}


@dataclass(frozen=True)
class Step:
    """A part of the run: rounds of ``groups`` over ``variants``; once each, ``counts`` or ``profiles``.

    Attributes:
        vision_only: variants of which no other group is measured.
    """

    batch: int
    variants: tuple[str, ...]
    groups: tuple[str, ...]
    vision_only: tuple[str, ...] = ("stock again",)

    @property
    def name(self) -> str:
        return f"{', '.join(self.groups)} of {', '.join(self.variants)} at batch {self.batch}"


def plan(batches: Sequence[int], gpu: bool, slow: bool = False) -> list[Step]:
    """The steps, the most important first.

    On a GPU rounds are short, so each comparison has rounds and a stock model of its own; on a CPU all
    variants share them. Where a call takes ten seconds (``slow``), R = 0.5 is left out, and so is the first
    token of relevance and of the released method, about which vision stage and prefill say enough.
    """
    every = tuple(name for name, variant in VARIANTS.items() if not variant.graph)
    times = ("vision", "ttft", "prefill")
    if not gpu:
        variants = tuple(name for name in every if not (slow and name == "hero 0.5"))
        vision_only = ("stock again", TEXT, "released") if slow else ("stock again",)
        steps = [Step(batch, variants, (*times, "decode"), vision_only) for batch in batches]
        counted = tuple(name for name in variants if name != "stock again")
        return steps + [Step(batch, counted, ("counts",)) for batch in batches]
    steps = [Step(batch, ("stock", "stock again", BEST), times) for batch in batches]
    steps += [Step(batch, ("stock", BEST, "released"), ("counts",)) for batch in batches]
    steps += [Step(batch, ("stock", BEST, "released"), times) for batch in batches]
    steps += [Step(batch, ("stock", TEXT, "released"), times) for batch in batches]
    steps += [Step(batch, (TEXT,), ("counts",)) for batch in batches]
    steps += [Step(batch, ("stock", GRAPH, TEXT_GRAPH), times) for batch in batches]
    steps += [Step(batch, ("stock", *HEROES), (*times, "decode")) for batch in batches]
    split = ("stock", BEST, TEXT, "released")
    steps += [Step(batch, split, ("stages",)) for batch in batches]
    steps += [Step(batch, split, ("profiles",)) for batch in batches]
    others = tuple(name for name in HEROES if name != BEST)
    return steps + [Step(batch, others, ("counts",)) for batch in batches]


class Stages:
    """How long named functions take within a call: events on a GPU, which nothing waits for, else a clock."""

    def __init__(self, device: torch.device, clock: str):
        self.device, self.clock = device, CLOCKS[clock]
        self.spans: list[tuple[str, object, object]] = []

    def _now(self) -> object:
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, each of its calls a span of a stage."""

        @functools.wraps(function)
        def run(*args, **kwargs):
            begin = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans.append((name, begin, self._now()))

        return run

    @contextlib.contextmanager
    def of(self, owner: object, **methods: str) -> Iterator[None]:
        """Time ``method=stage`` of an object or a class inside the block."""
        with contextlib.ExitStack() as stack:
            for method, stage in methods.items():
                run = self.timed(stage, getattr(owner, method))
                stack.enter_context(mock.patch.object(owner, method, run))
            yield

    def seconds(self) -> dict[str, float]:
        """Of each stage, once the device is done."""
        totals: dict[str, float] = defaultdict(float)
        for name, begin, end in self.spans:
            gpu = self.device.type == "cuda"
            totals[name] += 1e-3 * begin.elapsed_time(end) if gpu else end - begin
        return dict(totals)


class Ready(NamedTuple):
    """A variant in place on the model.

    Attributes:
        vision: crops to the tokens of each image.
        first_token: ``generate`` of one token.
        staged: times the stages of what runs inside its block.
    """

    vision: Callable[[], list[Tensor]]
    first_token: Callable[[], Tensor]
    staged: Callable[[Stages], contextlib.AbstractContextManager]


class Prepared:
    """A batch as the processor gives it, for each variant.

    Attributes:
        inputs: ``{keep ratio or None: inputs of generate}``, on the device.
        pixels, sizes: crops on the device, (height, width) on the host.
        around: token ids of each prompt before and after its image.
        masks: attention mask of each variant's prompts.
    """

    def __init__(self, subject: Subject, number: int, device: torch.device, attached: Callable):
        self.batch = subject.batches[number]

        def process() -> dict[str, Tensor]:
            inputs = subject.processor(
                images=self.batch.images, text=self.batch.prompts, padding=True, return_tensors="pt"
            )
            return {name: value.to(device) for name, value in inputs.items()}

        self.inputs = {None: process()}
        for ratio in KEEP:
            with attached(Variant(ratio)):
                self.inputs[ratio] = process()
        dtype = subject.model.dtype
        for inputs in self.inputs.values():
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        self.pixels = self.inputs[None]["pixel_values"]
        self.sizes = self.inputs[None]["image_sizes"].cpu()
        image_token = subject.model.config.image_token_id
        self.visual_tokens = {
            ratio: (inputs["input_ids"] == image_token).sum(1).tolist()
            for ratio, inputs in self.inputs.items()
        }
        self.around = []
        for ids, mask in zip(self.inputs[None]["input_ids"], self.inputs[None]["attention_mask"]):
            ids = ids[mask.bool()]
            places = (ids == image_token).nonzero()[:, 0]
            self.around.append((ids[: places[0]], ids[places[-1] + 1 :]))
        self.masks = {name: self.inputs[variant.keep]["attention_mask"] for name, variant in VARIANTS.items()}

    @property
    def name(self) -> str:
        return str(len(self.batch.images))

    def describe(self, layouts: Sequence) -> dict[str, object]:
        """For the record."""
        return {
            "images": [list(layout.image_size) for layout in layouts],
            "crops": sum(layout.crops for layout in layouts),
            "visual_tokens": {
                name: sum(self.visual_tokens[VARIANTS[name].keep])
                for name in VARIANTS
                if name not in ("stock again", "released")
            },
            "prompt_tokens": {name: mask.shape[1] for name, mask in self.masks.items()},
        }


class Bench:
    """The model under test."""

    def __init__(self, subject: Subject, device: torch.device, clock: str):
        self.subject, self.device, self.clock = subject, device, clock
        self.model = subject.model
        self.gpu = device.type == "cuda"
        self._cache = None
        count = len(subject.batches)
        self.prepared = [Prepared(subject, number, device, self._attached) for number in range(count)]
        longest = max(mask.shape[1] for one in self.prepared for mask in one.masks.values())
        most = max(len(one.batch.images) for one in self.prepared)
        width = self.model.config.text_config.hidden_size
        draw = torch.Generator(device).manual_seed(0)
        self.embeddings = torch.randn(
            most, longest, width, device=device, dtype=self.model.dtype, generator=draw
        )

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    # Variants.

    def _attached(self, variant: Variant) -> hero.Handle:
        relevance = self.subject.relevance if variant.text else None
        return hero.attach(
            self.model,
            self.subject.processor,
            keep_ratio=variant.keep,
            relevance=relevance,
            capture=variant.graph,
        )

    @contextlib.contextmanager
    def ready(self, batch: Prepared, name: str) -> Iterator[Ready]:
        """A variant put on the model."""
        variant = VARIANTS[name]
        text = batch.batch.questions if variant.text else None
        generate = functools.partial(self.generate, **batch.inputs[variant.keep])
        if variant.keep is None:
            yield Ready(functools.partial(self.stock, batch), generate, self._staged_stock)
        elif variant.released:
            geometry = self._geometry()
            relevance = self.subject.relevance
            released = Released(self.model, hero.HeroConfig(keep_ratio=variant.keep), geometry, relevance)
            with eager(self.model.model.vision_tower):

                def vision() -> list[Tensor]:
                    return released(batch.pixels, batch.sizes, text)[0]

                staged = functools.partial(self._staged_released, released)
                yield Ready(vision, lambda: self.generate(**self.embedded(batch, vision())), staged)
        else:
            with self._attached(variant) as handle:

                def vision() -> list[Tensor]:
                    return handle.encoder(batch.pixels, batch.sizes, text=text).per_image()

                yield Ready(vision, generate, functools.partial(self._staged_hero, handle))

    def _geometry(self) -> hero.Geometry:
        with self._attached(Variant(MAIN)) as handle:
            return handle.encoder.geometry

    def stock(self, batch: Prepared) -> list[Tensor]:
        """The stock vision stage."""
        return self.model.model.get_image_features(batch.pixels, batch.sizes, return_dict=True).pooler_output

    def generate(self, **inputs) -> Tensor:
        return self.model.generate(**inputs, max_new_tokens=1, do_sample=False)

    def embedded(self, batch: Prepared, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
        """Prompts with these visual tokens in place, padded on the left, as embeddings."""
        embed = self.model.get_input_embeddings()
        rows = [
            torch.cat([embed(before), one, embed(after)])
            for (before, after), one in zip(batch.around, tokens, strict=True)
        ]
        longest = max(map(len, rows))
        mask = torch.ones(len(rows), longest, dtype=torch.long, device=self.device)
        for number, row in enumerate(rows):
            mask[number, : longest - len(row)] = 0
        rows = [torch.cat([row.new_zeros(longest - len(row), row.shape[1]), row]) for row in rows]
        return {"inputs_embeds": torch.stack(rows), "attention_mask": mask}

    # Stages.

    @contextlib.contextmanager
    def _staged_stock(self, stages: Stages) -> Iterator[None]:
        model = self.model.model
        with (
            stages.of(model.vision_tower, forward="encode"),
            stages.of(model.multi_modal_projector, forward="project"),
            stages.of(model, pack_image_features="pack"),
        ):
            yield

    @contextlib.contextmanager
    def _staged_hero(self, handle: hero.Handle, stages: Stages) -> Iterator[None]:
        methods = ("encode", "score", "budget", "select", "project")
        with (
            stages.of(handle.encoder, ask="text", **{name: name for name in methods}),
            stages.of(capture.Collector, add="capture"),
        ):
            yield

    @contextlib.contextmanager
    def _staged_released(self, released: Released, stages: Stages) -> Iterator[None]:
        methods = ("encode", "score", "budget", "select", "project", "pack")
        with stages.of(released, **{name: name for name in methods}, share="score"):
            yield

    # What is timed.

    def prefill(self, mask: Tensor) -> Tensor:
        """The language model alone on as many random embeddings; keeps the cache for :meth:`decode`."""
        rows, tokens = mask.shape
        output = self.model.model.language_model(
            inputs_embeds=self.embeddings[:rows, :tokens], attention_mask=mask, use_cache=True
        )
        self._cache = output.past_key_values, mask
        return self.model.lm_head(output.last_hidden_state[:, -1:])

    def decode(self) -> None:
        """``DECODED`` tokens after a prefill, greedily."""
        cache, mask = self._cache
        token = mask.new_full((len(mask), 1), 5)
        for _ in range(DECODED):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            hidden = self.model.model.language_model(
                input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True
            ).last_hidden_state
            token = self.model.lm_head(hidden[:, -1:]).argmax(-1)

    def time(self, function: Callable[[], object]) -> float:
        """Seconds of a call, waited for."""

        def run() -> object:
            result = function()
            self.wait()
            return result

        self.wait()
        return seconds(run, self.clock)

    # Checks.

    def check(self, batch: Prepared) -> dict[str, object]:
        """That what is timed is right; the batch, described.

        Raises:
            RuntimeError: a wrong number of tokens, or tokens that are not the stock model's.
        """
        full = self.stock(batch)
        with self.ready(batch, "hero 1") as ready:
            same = ready.vision()
        for one, other in zip(full, same, strict=True):
            worst = float((one - other).abs().max() / one.abs().max()) if one.shape == other.shape else None
            limit = TOLERANCE[self.model.dtype]
            if worst is None or not worst <= limit:
                raise RuntimeError(f"keep_ratio=1: expected the stock tokens to {limit}, got {worst}")
        geometry = self._geometry()
        layouts = geometry.layouts(batch.sizes)
        for ratio, counts in batch.visual_tokens.items():
            config = hero.HeroConfig(keep_ratio=ratio or 1.0)
            for layout, count in zip(layouts, counts, strict=True):
                expected = hero.count_tokens(config, layout.image_size, geometry=geometry)
                if count != expected:
                    raise RuntimeError(f"{ratio}: expected {expected} placeholders, got {count}")
        with self.ready(batch, "released") as ready:
            tokens = ready.vision()
        for one, most in zip(tokens, batch.visual_tokens[MAIN], strict=True):
            if not 0 < len(one) <= most:
                raise RuntimeError(f"released: expected at most {most} tokens, got {len(one)}")
        batch.masks["released"] = self.embedded(batch, tokens)["attention_mask"]
        return batch.describe(layouts)

    # Steps.

    def round(self, step: Step, turn: int, variants: Sequence[str], failed: Callable) -> dict:
        """Measure each group of a step once.

        Args:
            failed: told the variant and the error of what cannot be measured; the others go on.

        Returns:
            ``{group: {variant: seconds}}``; of ``stages``, ``{variant: {stage: seconds}}``.
        """
        batch = self.prepared[step.batch]
        found: dict[str, dict] = defaultdict(dict)
        for group in step.groups:
            prefilled: dict[tuple, dict[str, float]] = {}
            for name in take_turns(variants, turn):
                if name in step.vision_only and group in ("ttft", "prefill", "decode"):
                    continue
                try:
                    if group == "prefill":
                        self._round_prefill(batch, name, "decode" in step.groups, prefilled, found)
                    elif group != "decode":
                        self._round(group, step.batch, name, found)
                except Exception as error:
                    failed(name, error)
        return found

    def _round_prefill(self, batch: Prepared, name: str, decode: bool, prefilled: dict, found: dict) -> None:
        mask = batch.masks[name]
        key = tuple(mask.sum(1).tolist())  # alike for all variants that keep as many
        if key not in prefilled:
            prefilled[key] = {"prefill": self.time(functools.partial(self.prefill, mask))}
            if decode:
                prefilled[key]["decode"] = self.time(self.decode)
            self._cache = None
        for group, value in prefilled[key].items():
            found[group][name] = value

    def _round(self, group: str, number: int, name: str, found: dict) -> None:
        with self.ready(self.prepared[number], name) as ready:
            if group == "ttft":
                if self.gpu:  # what a fresh attachment does only once
                    ready.vision()
                found[group][name] = self.time(ready.first_token)
                return
            if self.gpu:
                ready.vision()
            staged = group == "stages" or not self.gpu  # on a CPU reading a clock costs nothing
            stages = Stages(self.device, self.clock)
            with ready.staged(stages) if staged else contextlib.nullcontext():
                elapsed = self.time(ready.vision)
            if group == "vision":
                found[group][name] = elapsed
            if staged:
                found["stages"][name] = stages.seconds()

    def counts(self, number: int, name: str) -> dict[str, object]:
        """Launches, waits and peak memory of the vision stage."""
        with self.ready(self.prepared[number], name) as ready:
            if self.gpu:
                ready.vision()
                return {
                    **_launches(ready.vision),
                    "waits": _synchronisations(ready.vision),
                    "peak_bytes": _peak_gpu(ready.vision),
                }

            def counted() -> list[Tensor]:
                with counter:
                    return ready.vision()

            counter = OperationCounter()
            peak = peak_bytes(counted)
            return {
                "launches": len(counter.operations),
                "waits": len(counter.waits),
                "peak_bytes": peak,
            }

    def profile(self, number: int, name: str) -> dict[str, object]:
        """The kernels of a vision stage that take the most time."""
        with self.ready(self.prepared[number], name) as ready:
            ready.vision()
            kernels = _kernels(ready.vision)
        by_name: dict[str, list[float]] = defaultdict(list)
        for kernel, us in kernels:
            by_name[kernel].append(us)
        top = sorted(by_name.items(), key=lambda one: -sum(one[1]))[:TOP]
        return {
            "us": sum(us for _, us in kernels),
            "launches": len(kernels),
            "top": [{"name": kernel[:120], "calls": len(us), "us": sum(us)} for kernel, us in top],
        }


def _kernels(function: Callable[[], object]) -> list[tuple[str, float]]:
    """What a call runs on the GPU, copies and fills included: names and microseconds.

    Raises:
        RuntimeError: the profiler sees nothing of the GPU.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    events = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    if not events:
        raise RuntimeError("the profiler saw nothing on the GPU")
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def _launches(function: Callable[[], object]) -> dict[str, object]:
    try:
        names = [name for name, _ in _kernels(function)]
    except RuntimeError as error:
        return {"launches": None, "reason": str(error)}
    moves = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"launches": len(names) - moves, "copies": moves}


def _synchronisations(function: Callable[[], object]) -> int:
    """How often the host waits for the GPU within a call."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(one.message) for one in caught)


def _peak_gpu(function: Callable[[], object]) -> int:
    """The most bytes that PyTorch held on the GPU during a call, beyond what it held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


# --- what the raw times say ------------------------------------------------------------------------------


def _pair(record: Mapping, batch: str, groups: Sequence[str], names: Sequence[str]) -> list | None:
    """The times of variants in each of the groups, from the first series that has them all."""
    for series in record["series"]:
        times = series["seconds"]
        measured = (name in times.get(group, ()) for group in groups for name in names)
        if series["batch"] == batch and all(measured):
            return [[times[group][name] for name in names] for group in groups]
    return None


def _compare(record: Mapping, batch: str, group: str, name: str, base: str) -> Mapping | None:
    found = _pair(record, batch, (group,), (name, base))
    return found and compare(*found[0])


def _summarise_first_token(record: Mapping, batch: str, name: str) -> dict[str, object]:
    """Time to first token: to stock, as predicted from its parts, and to that prediction."""
    result = {"to_stock": _compare(record, batch, "ttft", name, "stock")}
    found = _pair(record, batch, ("vision", "prefill", "ttft"), (name, "stock"))
    if found:
        parts, stock = ([sum(pair) for pair in zip(*of)] for of in zip(*found[:2]))
        result["predicted_to_stock"] = compare(parts, stock)
        result["to_predicted"] = compare(found[2][0], parts)
    return result


def _summarise_stages(record: Mapping, batch: str) -> dict[str, object]:
    """Medians of each stage, and what the tower takes against the stock tower."""
    stages: dict[str, object] = {"seconds": {}, "tower": {}}
    for series in record["series"]:
        if series["batch"] != batch:
            continue
        found = series["stages"]
        for name, spans in found.items():
            if name in stages["seconds"]:
                continue
            stages["seconds"][name] = {stage: summary(times)["median"] for stage, times in spans.items()}
            if name != "stock" and "stock" in found:
                stages["tower"][name] = compare(spans["encode"], found["stock"]["encode"])
    return stages


def summarise(record: Mapping) -> dict[str, object]:
    """``{batch: {group: {variant: what its times say}}}``, from the raw times of a record."""
    result = {}
    for batch in record["batches"]:
        series = [one for one in record["series"] if one["batch"] == batch]
        times: dict[str, dict] = defaultdict(dict)
        for one in series:
            for group, variants in one["seconds"].items():
                for name, values in variants.items():
                    times[group].setdefault(name, summary(values))
        found: dict[str, dict] = {"times": {group: dict(variants) for group, variants in times.items()}}
        found["vision"] = {name: _compare(record, batch, "vision", name, "stock") for name in times["vision"]}
        found["ttft"] = {name: _summarise_first_token(record, batch, name) for name in times["ttft"]}
        found["decode"] = {
            name: int(batch) * DECODED / value["median"] for name, value in times["decode"].items()
        }
        for group in ("vision", "ttft"):
            found[f"released_{group}"] = {
                name: _compare(record, batch, group, "released", name) for name in (BEST, TEXT)
            }
        found["stages"] = _summarise_stages(record, batch)
        result[batch] = found
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
        """Record what could not be measured; where it is not ours, the run is no failure for it."""
        reason = (str(error).strip().splitlines() or ["no message"])[0][:300]
        reason = without_folders(reason)
        reason = f"{type(error).__name__}: {reason}"
        self.record["failed"].append({"what": what, "ours": ours, "reason": reason})
        print(f"failed: {what}: {reason}", flush=True)
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def steps(self, bench: Bench) -> None:
        """Check each batch, then run what fits into the time."""
        broken = set()
        for number, batch in enumerate(bench.prepared):
            try:
                self.record["batches"][batch.name] = bench.check(batch)
            except Exception as error:
                self.failed(f"batch {batch.name}", error)
                broken.add(number)
        todo = plan(range(len(bench.prepared)), bench.gpu, self.record["shape_name"] in SLOW)
        with quiet_heap():
            for step in todo:
                if step.batch in broken:
                    continue
                if "counts" in step.groups or "profiles" in step.groups:
                    self._once(bench, step)
                else:
                    self._series(bench, step)
                self.write()

    def _left_out(self, bench: Bench, step: Step, why: str) -> None:
        groups = ", ".join(step.groups)
        batch = bench.prepared[step.batch].name
        self.record["left_out"].append(f"{groups} of {', '.join(step.variants)}, batch {batch}: {why}")

    def _once(self, bench: Bench, step: Step) -> None:
        group = step.groups[0]
        measure = bench.counts if group == "counts" else bench.profile
        batch = bench.prepared[step.batch].name
        for name in step.variants:
            if self.clock.left() <= 0:
                self._left_out(bench, Step(step.batch, (name,), step.groups), "no time")
                continue
            try:
                self.record[group].setdefault(batch, {})[name] = measure(step.batch, name)
            except Exception as error:
                self.failed(f"{group} of {name}, batch {batch}", error, _is_ours(name))

    def _series(self, bench: Bench, step: Step) -> None:
        batch = bench.prepared[step.batch].name
        series = {"batch": batch, "rounds": 0, "seconds": {}, "stages": {}}
        variants, longest = list(step.variants), 0.0
        rounds = min(self.rounds, 3) if step.groups == ("stages",) else self.rounds
        for turn in range(rounds):
            if self.clock.left() < longest or self.clock.left() <= 0:
                self._left_out(bench, step, f"no time for {rounds - turn} of {rounds} rounds")
                break
            bad = set()

            def failed(name: str, error: Exception, bad: set = bad) -> None:
                if name not in bad:
                    what = f"{', '.join(step.groups)} of {name}, batch {batch}"
                    self.failed(what, error, _is_ours(name))
                bad.add(name)

            begin = time.monotonic()
            found = bench.round(step, turn, variants, failed)
            longest = max(longest, time.monotonic() - begin)
            if bad:  # what is compared was measured in the same rounds
                variants = [name for name in variants if name not in bad]
                for times in (*series["seconds"].values(), series["stages"]):
                    for name in bad:
                        times.pop(name, None)
            _append(series, found, variants)
            if turn == 0:
                self.record["series"].append(series)
            series["rounds"] += 1
            self.write()
            names = "; ".join(step.variants)
            print(f"batch {batch}, {', '.join(step.groups)}: round {turn + 1}/{rounds} ({names})", flush=True)
            if not variants:
                break


def _is_ours(name: str) -> bool:
    return name.startswith("hero")


def _append(series: dict, found: Mapping[str, Mapping], variants: Sequence[str]) -> None:
    """Put a round's times behind those of the rounds before."""
    for group, times in found.items():
        for name, value in times.items():
            if name not in variants:
                continue
            if group == "stages":
                for stage, span in value.items():
                    series["stages"].setdefault(name, {}).setdefault(stage, []).append(span)
            else:
                series["seconds"].setdefault(group, {}).setdefault(name, []).append(value)


def main(arguments: Sequence[str]) -> int:
    """The command: returns the exit status, 0 where nothing of ours failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument(
        "--shape", choices=[*SHAPES, "mini"], help="what runs (default: 7b on a GPU, else clip-l)"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: the GPU where there is one")
    parser.add_argument("--seconds", type=float, default=1e9, help="for everything (default: no limit)")
    parser.add_argument(
        "--rounds", type=positive, help=f"measured rounds (default {GPU_ROUNDS}, {CPU_ROUNDS} on a CPU)"
    )
    add_threads(parser)
    parser.add_argument("--commit", help="the commit, where there is no git to ask")
    options = parser.parse_args(arguments)
    clock = Clock(options.seconds)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    if options.clock == "cpu" and gpu:
        parser.error("--clock cpu: expected --device cpu, since a GPU takes none of the processor's time")
    use_threads(parser, options)
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
        "decoded": DECODED,
        "load_average": [os.getloadavg()[0]],
        "shape": None,
        "batches": {},
        "series": [],
        "counts": {},
        "profiles": {},
        "left_out": [],
        "failed": [],
    }
    if options.commit:
        record["commit"] = {"hash": options.commit, "dirty": None}
    run = Run(record, options.out, clock, options.rounds or (GPU_ROUNDS if gpu else CPU_ROUNDS))
    run.write()
    with torch.no_grad():
        subject = build(shape, device, dtype)
    record["shape"] = subject.description
    with torch.inference_mode():
        bench = Bench(subject, device, options.clock)
        run.steps(bench)
    record["load_average"].append(os.getloadavg()[0])
    run.write()
    return int(any(one["ours"] for one in record["failed"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
