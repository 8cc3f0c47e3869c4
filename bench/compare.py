"""Two commits in one run: is the later one faster, and does it still compute the same?

``hero`` and ``hero_kernels`` of each commit are put into a folder of their own and imported from there by a
process of their own; the benchmark around them is this checkout's, for both. Both processes stay alive and
run a round in turns, A B B A, so that slow phases of the machine hit them alike (:mod:`bench.timing`).
Where a process finds its memory may make it faster or slower by a tenth as long as it lives, so there are
several pairs of processes, and the interval is that of their ratios. Results are compared before anything is
timed, so that a faster wrong answer is seen.

Cases on a CPU: ``vision``, hero on a CLIP tower of real width and few layers; ``mini``, the vision stage of
the bundled model; ``selection``, the twins of budgets and gather at 1, 8 and 32 images; ``dispatch``, what
calling the operations costs the host. On a GPU ``kernels``, the operations at the shapes of
:mod:`bench.registry`, and ``dispatch``.

``python -m bench.compare BASE [HEAD] [--case NAME] [--rounds N] [--out FILE]``; HEAD is the working tree
unless given. The same commit twice shows what the machine resolves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .options import positive
from .record import ROOT, environment, write
from .timing import compare, interval, seconds, summary, take_turns

__all__ = ["main"]

PACKAGES = ("hero", "hero_kernels")
SIDES = ("base", "head")
CPU, GPU = ("vision", "mini", "selection", "dispatch"), ("kernels", "dispatch")
SPAN = 0.1  # seconds of a round, at least a call
KEEP = 0.2
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # glibc keeps what is freed: else the luck of a process decides whether every call faults its pages anew.
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(1 << 26),
}
# A case made: its result, a nest of tensors, and what gives the seconds of one of so many calls.
Made = tuple[Any, Callable[[int], float]]

# --- in the process of a commit --------------------------------------------------------------------------


def by_clock(clock: str, call: Callable[[], Any]) -> Made:
    def calls(count: int) -> None:
        for _ in range(count):
            call()

    return call(), lambda count: seconds(partial(calls, count), clock) / count


def vision(clock: str) -> Made:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    import hero

    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
    }
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=336, patch_size=14)).eval()
    encoder = hero.HeroVisionEncoder(tower, config=hero.HeroConfig(keep_ratio=KEEP))
    pixels = torch.randn(1, 5, 3, 336, 336)

    def call():
        result = encoder(pixels, [(672, 672)])
        return result.tokens, result.index, result.budgets, result.scores

    return by_clock(clock, call)


def mini(clock: str) -> Made:
    from PIL import Image

    import hero.mini

    model, processor, _ = hero.mini.load(relevance=False)
    image = Image.open(hero.mini.demo_questions()[0].image)
    inputs = processor(images=image, text="<image>", return_tensors="pt")
    hero.attach(model, processor, keep_ratio=KEEP)
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    return by_clock(clock, lambda: model.model.get_image_features(pixels, sizes).pooler_output)


def selection(images: int, clock: str) -> Made:
    from hero_kernels import reference

    from .bench_selection import make_selection
    from .registry import CLIP, Batch, Shape

    shape = Shape(CLIP, Batch(((2, 2),) * images), 4)
    segments = shape.segments
    x = make_selection(shape, segments, torch.device("cpu"), 0)
    given = {"valid": x.valid, "ranks": x.ranks, "valid_counts": x.counts}

    def call():
        budgets = reference.tile_budgets(x.signals, x.counts, segments)
        result = reference.segmented_topk_gather(x.features, x.scores, segments, budgets=budgets, **given)
        return result.tokens, result.index, budgets.budgets, budgets.shares

    return by_clock(clock, call)


def dispatch(clock: str) -> Made:
    from . import dispatch

    def spent(calls: int) -> float:
        return 1e-6 * sum(ways["public"] for ways in dispatch.measure(1, 100)["us"].values())

    return [public() for public, _ in dispatch.calls().values()], spent


def kernel(case, variant, clock: str) -> Made:
    """By graph where one can be captured, else from Python."""
    from .gpu_timing import Graph, free_wall
    from .measure import default_device, sets_of

    sets = sets_of(case, default_device())
    result = variant.call(sets[0])
    if variant.waits or not torch.cuda.is_available():
        return result, lambda calls: 1e-6 * free_wall(variant.call, sets, default_device())
    graph = Graph(variant.call, sets)
    return result, lambda calls: 1e-6 * statistics.median(graph.microseconds())


def cases(wanted: Sequence[str]) -> Iterator[tuple[str, Callable[[str], Made]]]:
    """Names, and what makes the case of a clock."""
    for name in wanted:
        if name == "selection":
            yield from ((f"selection {images}", partial(selection, images)) for images in (1, 8, 32))
        elif name != "kernels":
            yield name, {"vision": vision, "mini": mini, "dispatch": dispatch}[name]
        else:
            from . import bench_attention, bench_selection
            from .measure import default_device

            for module in (bench_selection, bench_attention):
                for case in module.cases(default_device().type == "cpu", default_device()):
                    for variant in case.variants:
                        if variant.ours:
                            yield f"{case.name}: {variant.name}", partial(kernel, case, variant)


def serve(clock: str, wanted: Sequence[str]) -> None:
    """Take orders, a line of JSON each, and answer them, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for package in PACKAGES:
        if not Path(__import__(package).__file__).resolve().is_relative_to(Path.cwd().resolve()):
            raise ImportError(f"{package}: expected that of the commit, got one from elsewhere")
    named, spent = dict(cases(wanted)), None
    for line in sys.stdin:
        order, *given = json.loads(line)
        try:
            with torch.no_grad():
                if order == "names":
                    answer: Any = list(named)
                elif order == "time":
                    answer = spent(*given)
                else:
                    spent = None  # the memory of the last case first
                    result, spent = named[order](clock)
                    leaves = torch.utils._pytree.tree_leaves(result)
                    torch.save([leaf.cpu() for leaf in leaves if isinstance(leaf, torch.Tensor)], *given)
                    del result, leaves
                    answer = spent(1)
        except Exception as error:  # a commit may lack what a case needs
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


# --- outside ---------------------------------------------------------------------------------------------


class Failed(Exception):
    """A case cannot run on a commit, and why."""


class Worker:
    """The process of a commit, whose packages lie in ``folder``."""

    def __init__(self, folder: Path, arguments: Sequence[str], threads: int):
        # With -m, modules are looked for in the process's folder first.
        command = [sys.executable, "-m", "bench.compare", "--serve", *arguments]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), **ENVIRONMENT}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=environ, text=True, stdin=pipe, stdout=pipe)

    def ask(self, *order: Any) -> Any:
        """Give an order and wait for its answer."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        if isinstance(answer, dict):
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def unpack(commit: str | None, folder: Path, root: Path) -> str | None:
    """Put the packages of a commit, or of the working tree, into a folder; the commit's hash."""
    if commit is None:
        for package in PACKAGES:
            shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        return None
    git = partial(subprocess.run, cwd=root, stdout=subprocess.PIPE)
    name = git(["git", "rev-parse", "--verify", f"{commit}^{{commit}}"]).stdout.decode().strip()
    if not name:
        raise SystemExit(f"expected a commit, got {commit}")
    files = git(["git", "archive", name, *PACKAGES], check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        archive.extractall(folder, filter="data")  # which makes the folder
    return name


def difference(base: Sequence[torch.Tensor], head: Sequence[torch.Tensor]) -> float | None:
    """The largest of all elements, 0 where all are equal; ``None`` where shapes or dtypes are not."""
    if [(one.shape, one.dtype) for one in base] != [(one.shape, one.dtype) for one in head]:
        return None
    largest = 0.0
    for a, b in zip(base, head, strict=True):
        if not torch.equal(a, b):
            gap = (a.double() - b.double()).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0).max()
            largest = max(largest, math.inf if gap.isnan() else float(gap))
    return largest


def measure(name: str, workers: dict[str, Worker], rounds: int, folder: Path) -> dict[str, Any]:
    """Compare the results of a case, then time it in turns."""
    files = {side: str(folder / f"{side}.pt") for side in SIDES}
    first = [workers[side].ask(name, files[side]) for side in SIDES]
    gap = difference(*(torch.load(files[side]) for side in SIDES))
    calls = max(1, min(round(SPAN / max(first)), 1000))
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(rounds + 1):
        for side in take_turns(SIDES, turn):
            times[side].append(workers[side].ask("time", calls))
    return {"difference": gap, **{side: times[side][1:] for side in SIDES}}  # the first warms up


def joined(name: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the pairs of processes measured: one ratio each, for rounds of one process err alike."""
    gaps = [part["difference"] for part in parts]
    ratios = [compare(part["head"], part["base"]) for part in parts]
    paired = [ratio["paired"] for ratio in ratios]
    return {
        "case": name,
        "difference": None if None in gaps else max(gaps),
        "paired": statistics.median(paired),
        "interval": list(interval(paired)) if len(parts) > 1 else ratios[0]["interval"],
        **{side: summary([spent for part in parts for spent in part[side]]) for side in SIDES},
        "processes": [{"ratio": ratio, **part} for ratio, part in zip(paired, parts, strict=True)],
    }


def line(result: dict[str, Any]) -> str:
    """A line of the table."""
    if "reason" in result:
        return f"{result['case']:40} {result['reason']}"
    gap, (low, high) = result["difference"], result["interval"]
    equal = "other shapes" if gap is None else f"differs by up to {gap:.2g}" if gap else "equal"
    times = " ".join(f"{1e3 * result[side]['median']:10.3f}" for side in SIDES)
    return f"{result['case']:40} {times} {result['paired']:8.3f} ({low:.3f} to {high:.3f})  {equal}"


def main(arguments: Sequence[str], root: Path = ROOT) -> dict | None:
    """The command: returns the record; ``root`` is the repository of the commits."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("base", nargs="?", help="a commit")
    parser.add_argument("head", nargs="?", help="another; the working tree where there is none")
    choices = sorted({*CPU, *GPU})
    parser.add_argument("--case", action="append", choices=choices, help="repeatable (default all)")
    parser.add_argument("--rounds", type=positive, default=5, help="of a pair of processes (default 5)")
    parser.add_argument("--processes", type=positive, default=5, help="pairs of them (default 5)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of PyTorch (default 1)")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = options.case or (GPU if torch.cuda.is_available() else CPU)
    clock = "cpu" if options.threads == 1 else "wall"
    if options.serve:
        torch.set_num_threads(options.threads)
        return serve(clock, wanted)
    if options.base is None:
        parser.error("base: expected a commit")
    given = [*(f"--case={name}" for name in wanted), f"--threads={options.threads}"]
    parts: dict[str, list[dict[str, Any]]] = {}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {side: Path(temporary, side) for side in SIDES}
        commits = {side: unpack(getattr(options, side), folders[side], root) for side in SIDES}
        for turn in range(options.processes):
            with contextlib.ExitStack() as stack:
                workers = {}
                for side in take_turns(SIDES, turn):
                    workers[side] = Worker(folders[side], given, options.threads)
                    stack.callback(workers[side].close)
                for name in workers["head"].ask("names"):
                    try:
                        part = measure(name, workers, options.rounds, Path(temporary))
                        parts.setdefault(name, []).append(part)
                    except Failed as error:
                        reasons[name] = str(error)
    results = [joined(name, parts[name]) for name in parts if name not in reasons]
    results += [{"case": name, "reason": reason} for name, reason in reasons.items()]
    print(f"{'case':40} {'base, ms':>10} {'head, ms':>10} {'ratio':>8} (95 % interval)")
    print(*map(line, results), sep="\n")
    record = {
        "benchmark": "compare",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **environment("bench.compare", arguments, ("torch", "transformers", "triton")),
        "commits": commits,
        "rounds": options.rounds,
        "clock": clock,
        "results": results,
    }
    if options.out:
        write(options.out, record)
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
