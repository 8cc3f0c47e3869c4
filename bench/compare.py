"""Compare two commits: whether a change is faster, and whether it computes the same.

``python -m bench.compare BASE [HEAD] [--case NAME] [--out FILE]``; HEAD is the working tree if omitted. The
same commit twice shows the resolution of the machine.

Each commit's ``hero`` and ``hero_kernels`` are imported in a process of their own, and the processes run
rounds in turns, A B B A. Where its memory lies makes a process faster or slower for its whole life, so there
are several pairs of processes. Results are compared before anything is timed.

Cases: ``vision``, hero on a CLIP tower of real width and few layers; ``mini``, the vision stage of the
bundled model; on a GPU ``kernels``, the operations at the shapes of :mod:`bench.registry`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .records import ROOT, environment, write
from .timing import call_us, compare, graph_us, interval, positive, seconds, summary, take_turns

PACKAGES = ("hero", "hero_kernels")
SIDES = ("base", "head")
CASES = ("vision", "mini", "kernels")
SPAN = 0.1  # seconds of a round, at least one call
KEEP = 0.2
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # glibc keeps freed memory: otherwise every call may fault its pages in again, depending on the process.
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(1 << 26),
}
Made = tuple[Any, Callable[[int], float]]  # the result of a case; returns seconds per call of so many calls

# --- in the process of a commit: only what both commits have ---------------------------------------------


def by_clock(call: Callable[[], Any]) -> Made:
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"  # which also counts waiting threads

    def calls(count: int) -> None:
        for _ in range(count):
            call()

    return call(), lambda count: seconds(partial(calls, count), clock) / count


def vision() -> Made:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    import hero

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "image_size": 336, "patch_size": 14}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=4, num_attention_heads=16)).eval()
    encoder = hero.HeroVisionEncoder(tower, config=hero.HeroConfig(keep_ratio=KEEP))
    pixels = torch.randn(1, 5, 3, 336, 336)

    def call():
        result = encoder(pixels, [(672, 672)])
        return result.tokens, result.index, result.budgets, result.scores

    return by_clock(call)


def mini() -> Made:
    from PIL import Image

    import hero.mini

    model, processor, _ = hero.mini.load(relevance=False)
    image = Image.open(hero.mini.demo_questions()[0].image)
    inputs = processor(images=image, text="<image>", return_tensors="pt")
    hero.attach(model, processor, keep_ratio=KEEP)
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    return by_clock(lambda: model.model.get_image_features(pixels, sizes).pooler_output)


def kernel(case, variant) -> Made:
    from .kernels import default_device, sets_of

    sets = sets_of(case, default_device())
    result = variant.call(sets[0])
    if variant.synchronises or not torch.cuda.is_available():
        return result, lambda calls: 1e-6 * call_us(variant.call, sets, calls)
    return result, lambda calls: 1e-6 * statistics.median(graph_us(variant.call, sets)[0])


def cases(wanted: Sequence[str]) -> dict[str, Callable[[], Made]]:
    """Return functions that prepare a case, by name."""
    found: dict[str, Callable[[], Made]] = {"vision": vision, "mini": mini}
    found = {name: found[name] for name in wanted if name in found}
    if "kernels" in wanted:
        from .kernels import all_cases, default_device

        for case in all_cases(default_device().type == "cpu", default_device()):
            ours = (variant for variant in case.variants if variant.ours)
            found |= {f"{case.name}: {variant.name}": partial(kernel, case, variant) for variant in ours}
    return found


_prepared: dict[str, Callable[[int], float]] = {}  # the case that this process runs


def start(folder: str, threads: int) -> None:
    """Make this process one of the commit whose packages are in ``folder``."""
    sys.path.insert(0, folder)
    torch.set_num_threads(threads)
    for package in PACKAGES:
        if not Path(__import__(package).__file__).resolve().is_relative_to(Path(folder).resolve()):
            raise ImportError(f"{package}: expected the commit's, got one from elsewhere")


@torch.no_grad()
def prepare(name: str, file: str) -> float:
    """Prepare a case, save the tensors of its result and return the seconds of a call."""
    _prepared.clear()  # frees the memory of the last case
    result, _prepared[name] = cases([name if name in CASES else "kernels"])[name]()
    leaves = torch.utils._pytree.tree_leaves(result)
    torch.save([leaf.cpu() for leaf in leaves if isinstance(leaf, torch.Tensor)], file)
    return _prepared[name](1)


@torch.no_grad()
def spent(name: str, calls: int) -> float:
    """Return the seconds per call of the prepared case."""
    return _prepared[name](calls)


# --- the command -----------------------------------------------------------------------------------------


def process(folder: Path, threads: int) -> ProcessPoolExecutor:
    """Return the process of a commit whose packages are in ``folder``."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=start, initargs=(str(folder), threads))


def ask(pool: ProcessPoolExecutor, function: Callable, *arguments: Any) -> Any:
    return pool.submit(function, *arguments).result()


def unpack(commit: str | None, folder: Path, root: Path) -> str | None:
    """Copy the packages of a commit, or of the working tree, into a folder; return the commit's hash."""
    if commit is None:
        for package in PACKAGES:
            shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        return None
    git = partial(subprocess.run, cwd=root, stdout=subprocess.PIPE)
    name = git(["git", "rev-parse", "--verify", f"{commit}^{{commit}}"]).stdout.decode().strip()
    if not name:
        raise SystemExit(f"expected a commit, got {commit}")
    folder.mkdir()
    files = git(["git", "archive", name, *PACKAGES], check=True).stdout
    subprocess.run(["tar", "x"], cwd=folder, input=files, check=True)
    return name


def difference(base: Sequence[torch.Tensor], head: Sequence[torch.Tensor]) -> float | None:
    """Return the largest difference of all elements, or ``None`` if shapes or dtypes differ."""
    if [(one.shape, one.dtype) for one in base] != [(one.shape, one.dtype) for one in head]:
        return None
    largest = 0.0
    for a, b in zip(base, head, strict=True):
        if not torch.equal(a, b):
            gap = (a.double() - b.double()).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0).max()
            largest = max(largest, math.inf if gap.isnan() else float(gap))
    return largest


def measure(name: str, sides: Mapping[str, Callable], rounds: int, folder: Path) -> dict[str, Any]:
    """Compare the results of a case, then time it in turns; ``sides`` call a function in their process."""
    files = [str(folder / f"{side}.pt") for side in SIDES]
    first = [sides[side](prepare, name, file) for side, file in zip(SIDES, files)]
    gap = difference(*map(torch.load, files))
    calls = max(1, min(round(SPAN / max(first)), 1000))
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(rounds + 1):
        for side in take_turns(SIDES, turn):
            times[side].append(sides[side](spent, name, calls))
    return {"difference": gap, **{side: times[side][1:] for side in SIDES}}  # the first warms up


def joined(name: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the pairs of processes: one ratio per pair, since rounds of a process share its luck."""
    gaps = [part["difference"] for part in parts]
    ratios = [compare(part["head"], part["base"]) for part in parts]
    paired = [ratio["paired"] for ratio in ratios]
    return {
        "case": name,
        "difference": None if None in gaps else max(gaps),
        "paired": statistics.median(paired),
        "interval": interval(paired) if len(parts) > 1 else ratios[0]["interval"],
        **{side: summary([spent for part in parts for spent in part[side]]) for side in SIDES},
        "processes": [{"ratio": ratio, **part} for ratio, part in zip(paired, parts, strict=True)],
    }


def line(result: dict[str, Any]) -> str:
    """Return a line of the printed table."""
    if "reason" in result:
        return f"{result['case']:40} {result['reason']}"
    gap, (low, high) = result["difference"], result["interval"]
    equal = "other shapes" if gap is None else f"differs by up to {gap:.2g}" if gap else "equal"
    times = " ".join(f"{1e3 * result[side]['median']:10.3f}" for side in SIDES)
    return f"{result['case']:40} {times} {result['paired']:8.3f} ({low:.3f} to {high:.3f})  {equal}"


def main(arguments: Sequence[str], root: Path = ROOT) -> dict:
    """Run the command and return the record; ``root`` is the repository of the commits."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("base", help="a commit")
    parser.add_argument("head", nargs="?", help="another commit (default: the working tree)")
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable (default: all)")
    parser.add_argument("--rounds", type=positive, default=5, help="per pair of processes (default 5)")
    parser.add_argument("--processes", type=positive, default=5, help="pairs of processes (default 5)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of PyTorch (default 1)")
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args(arguments)
    wanted = options.case or (CASES if torch.cuda.is_available() else CASES[:-1])
    threads = str(options.threads)
    parts: dict[str, list[dict[str, Any]]] = {}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {side: Path(temporary, side) for side in SIDES}
        commits = {side: unpack(getattr(options, side), folders[side], root) for side in SIDES}
        for turn in range(options.processes):
            with contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.dict(os.environ, {**ENVIRONMENT, "OMP_NUM_THREADS": threads}))
                sides = {}
                for side in take_turns(SIDES, turn):
                    pool = stack.enter_context(process(folders[side], options.threads))
                    sides[side] = partial(ask, pool)
                for name in cases(wanted):
                    try:
                        part = measure(name, sides, options.rounds, Path(temporary))
                        parts.setdefault(name, []).append(part)
                    except Exception as error:  # a commit may lack what a case needs
                        reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    results = [joined(name, parts[name]) for name in parts if name not in reasons]
    results += [{"case": name, "reason": reason} for name, reason in reasons.items()]
    print(f"{'case':40} {'base, ms':>10} {'head, ms':>10} {'ratio':>8} (95 % interval)")
    print(*map(line, results), sep="\n")
    record = {
        **environment("compare", "python -m bench.compare", arguments),
        "commits": commits,
        "rounds": options.rounds,
        "clock": "cpu" if options.threads == 1 else "wall",
        "results": results,
    }
    if options.out:
        write(options.out, record)
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
