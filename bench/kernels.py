"""Microbenchmarks of the operations: check each result, then time it. A wrong result is never timed.

A case is an operation at a shape: how to make its inputs, and the variants that compute it, ours and peers.
:mod:`bench.bench_attention` and :mod:`bench.bench_selection` define the cases; pytest-benchmark runs them
one by one, and this module writes all of them into a record:

``python -m bench.kernels --out FILE [--small] [--seconds N]``. The record is written before and after every
variant. Run again with the same file, it continues after the variant at which the process died.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import records, timing
from .registry import Shape, floor_us

ROUNDS = 5  # of single calls
STALL_SECONDS = 120  # for one variant; compiling takes the longest
BROKEN = 3  # exit status: the device does not respond in this process any more
LEFT_OUT = {"status": "skipped", "reason": "left out: no time"}
ENDED = "the process ended here"


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


class Wrong(Exception):
    """A result differs from the reference."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        call: the timed function; takes a set of inputs.
        check: takes the inputs and the result, raises :class:`Wrong`.
        ours: an operation of this package; otherwise a peer.
        cost: name of its minimum cost, if it differs from the operation's.
        reset: clears the accumulators of a set of inputs before ``check``.
        synchronises: the host waits for the device inside, so no CUDA graph can be captured.
        against: for a peer, the variant of ours that computes the same; ``None`` for the first.
        less: a peer that computes less than ours, timed to show the cost of the difference.
    """

    name: str
    call: Callable[[Any], object]
    check: Callable[[Any, Any], None]
    ours: bool = False
    cost: str | None = None
    reset: Callable[[Any], None] | None = None
    synchronises: bool = False
    against: str | None = None
    less: bool = False


@dataclass(frozen=True)
class Case:
    """An operation at a shape.

    Attributes:
        size: bytes of a set of inputs.
        make: makes a set of inputs from a seed.
        most_sets: maximum number of input sets; few where a model's data also stays in the L2 cache.
    """

    op: str
    shape: Shape
    size: int
    make: Callable[[int], Any]
    variants: tuple[Variant, ...]
    most_sets: int = timing.MOST_SETS

    @property
    def ours(self) -> Variant:
        """The first variant of ours."""
        return next(variant for variant in self.variants if variant.ours)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape.name}"


def default_device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def item_size(device: torch.device) -> int:
    """Return the bytes of an element: bf16 on a GPU, fp32 on a CPU."""
    return 2 if device.type == "cuda" else 4


def checked_crops(crops: int) -> list[int]:
    """Return the crops that are checked; the fp64 reference of all crops would not fit into memory."""
    return sorted({0, crops // 2, crops - 1})


def _check_shape(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    if result.shape != expected.shape:
        raise Wrong(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(result.shape)}")


def close(name: str, result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise :class:`Wrong` unless ‖result − expected‖ ≤ tolerance · ‖expected‖; NaN raises too."""
    _check_shape(name, result, expected)
    error = float((result.double() - expected.double()).norm() / expected.double().norm())
    if not error <= tolerance:
        raise Wrong(f"{name}: relative error {error:.2g}, expected at most {tolerance:g}")


def same(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise :class:`Wrong` unless all elements are equal."""
    _check_shape(name, result, expected)
    if not torch.equal(result, expected.to(result.dtype)):
        raise Wrong(f"{name}: {int((result != expected).sum())} of {result.numel()} elements differ")


def sets_of(case: Case, device: torch.device) -> list[Any]:
    """Make the sets of inputs to rotate among."""
    count = timing.sets_for(case.shape.cost(case.op).bytes, case.size, device)
    return [case.make(seed) for seed in range(min(count, case.most_sets))]


def describe(case: Case, variant: Variant) -> dict[str, Any]:
    """Describe a variant for the record."""
    return {
        "op": case.op,
        "geometry": case.shape.geometry.name,
        "crops": case.shape.crops,
        "variant": variant.name,
        "ours": variant.ours,
        "against": None if variant.ours else variant.against or case.ours.name,
        "less": variant.less,
    }


def _times(variant: Variant, sets: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """Return raw times and how they were measured."""
    if device.type != "cuda":
        times = [timing.call_us(variant.call, sets, device) for _ in range(ROUNDS)]
        return {"timing": "wall", "times_us": times}
    eager = timing.eager_us(variant.call, sets, device)
    if variant.synchronises:
        times = [timing.call_us(variant.call, [one], device) for one in (sets * ROUNDS)[:ROUNDS]]
        return {"timing": "wall", "times_us": times, "eager_us": eager}
    times, inputs, last = timing.graph_us(variant.call, sets)
    if variant.reset is None:  # check the result of the replayed graph too
        variant.check(inputs, last)
    return {"timing": "graph", "times_us": times, "eager_us": eager}


def measure(
    case: Case,
    variant: Variant,
    sets: Sequence[Any],
    device: torch.device,
    limits: timing.Ceilings | None = None,
    time: bool = True,
) -> dict[str, Any]:
    """Check and time a variant.

    Returns:
        the description with a ``status``: ``ok`` with microseconds per call; ``wrong``, ``failed`` (ours) or
        ``unavailable`` (a peer) with the reason; ``checked`` with ``time=False``.
    """
    cost = case.shape.cost(variant.cost or case.op)
    cold = device.type == "cuda" and len(sets) * cost.bytes > 2 * timing.l2_bytes(device)
    result = {**describe(case, variant), **cost._asdict(), "sets": len(sets), "cold": cold}
    try:
        if variant.reset is not None:
            variant.reset(sets[0])
        variant.check(sets[0], variant.call(sets[0]))
        result["status"] = "checked"
        if time:
            times = _times(variant, sets, device)
            us = statistics.median(times["times_us"])
            floor = floor_us(cost, limits)
            result |= {"status": "ok", **times, "us": us, "gb_s": cost.bytes / us / 1e3}
            result |= {"floor_us": floor, "floor_share": floor and floor / us}
    except Wrong as error:
        result |= {"status": "wrong", "reason": str(error)}
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0][:300]
        if not isinstance(error, Unavailable):
            reason = f"{type(error).__name__}: {records.without_folders(reason)}"
        result |= {"status": "failed" if variant.ours else "unavailable", "reason": reason}
    return result


# --- pytest-benchmark ------------------------------------------------------------------------------------


def generate_tests(metafunc, cases: Callable[[bool, torch.device], Iterator[Case]]) -> None:
    """Parametrise a test with ``case`` and ``variant``: small shapes on a CPU, real shapes on a GPU."""
    device = default_device()
    every = [(case, variant) for case in cases(device.type == "cpu", device) for variant in case.variants]
    names = [f"{case.name}: {variant.name}" for case, variant in every]
    metafunc.parametrize(("case", "variant"), every, ids=names)


def benchmark_variant(benchmark, case: Case, variant: Variant) -> None:
    """Check and time a variant; ``extra_info`` holds the result of :func:`measure`.

    pytest-benchmark's own numbers are wall-clock times of single calls, also on a GPU.
    """
    import pytest

    device = default_device()
    with torch.no_grad():
        sets = sets_of(case, device)
        result = measure(case, variant, sets, device)
        if result["status"] == "unavailable":
            pytest.skip(result["reason"])
        if result["status"] != "ok":
            pytest.fail(result["reason"])
        benchmark.extra_info.update(result)
        benchmark.pedantic(timing.call_us, args=(variant.call, sets, device), rounds=ROUNDS)


# --- the record ------------------------------------------------------------------------------------------


def all_cases(small: bool, device: torch.device) -> list[Case]:
    """Return the cases of both benchmark files, the most important shapes first."""
    from . import bench_attention, bench_selection

    cases = [*bench_attention.cases(small, device), *bench_selection.cases(small, device)]
    order = {shape: number for number, shape in enumerate(dict.fromkeys(case.shape for case in cases))}
    return sorted(cases, key=lambda case: order[case.shape])


def new_record(small: bool, arguments: Sequence[str], command: Sequence[str] | None = None) -> dict[str, Any]:
    """Return a record without results."""
    gpu = records.accelerator()
    packages = ("torch", "triton", "transformers", "numpy")
    return {
        "benchmark": "kernels",
        "small": small,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **records.environment("bench.kernels", arguments, packages, command=command),
        "code": records.fingerprint(),
        "gpu": gpu,
        "dtype": "bfloat16" if gpu else "float32",
        "tests": {"status": "not run"},
        "end_to_end": {"status": "not run"},
        "sanitizer": None,
        "ceilings": None,
        "notes": [],
        "results": [],
    }


def run(record: dict[str, Any], path: Path, clock: timing.Clock, check_only: bool = False) -> bool:
    """Measure the variants that the record lacks; return whether the device still responds."""
    device, results, current = default_device(), record["results"], None
    every = [(case, variant) for case in all_cases(record["small"], device) for variant in case.variants]
    results += [describe(case, variant) | LEFT_OUT for case, variant in every[len(results) :]]
    if record["ceilings"] is None and device.type == "cuda" and not check_only:
        record["ceilings"] = timing.ceilings(device)._asdict()
    limits = record["ceilings"] and timing.Ceilings(**record["ceilings"])
    for number, (case, variant) in enumerate(tqdm(every, disable=None)):
        if results[number]["status"] != "skipped" or (check_only and not variant.ours):
            continue
        if clock.left() <= 0:
            break
        status = "failed" if variant.ours else "unavailable"
        results[number] |= {"status": status, "reason": ENDED}  # stays if the process dies here
        records.write(path, record)
        faulthandler.dump_traceback_later(STALL_SECONDS, exit=True)
        try:
            if case is not current:
                current, sets = case, []
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                sets = [case.make(0)] if check_only else sets_of(case, device)
            if sets:
                results[number] = measure(case, variant, sets, device, limits, time=not check_only)
            else:
                results[number]["reason"] = "no inputs"
            if device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError as error:  # no memory for the inputs, or the device does not respond any more
            reason = records.without_folders(str(error).splitlines()[0])
            results[number] |= {"status": status, "reason": reason}
            if sets:
                records.write(path, record)
                return False
        faulthandler.cancel_dump_traceback_later()
    records.write(path, record)
    return True


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 if all results of ours were right, 3 to run it again."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/kernels.json"), help="JSON file to write")
    parser.add_argument("--small", action="store_true", help="small shapes, to test the script itself")
    parser.add_argument("--check", action="store_true", help="check our results and time nothing")
    parser.add_argument("--seconds", type=float, default=1e9, help="time limit (default: none)")
    options = parser.parse_args(arguments)
    clock = timing.Clock(options.seconds)
    if options.out.exists():
        record = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        record = new_record(options.small, arguments)
    if default_device().type == "cpu":
        torch.set_num_threads(1)
    with torch.no_grad():
        responds = run(record, options.out, clock, options.check)
    wrong = any(one["ours"] and one["status"] in ("wrong", "failed") for one in record["results"])
    return BROKEN if not responds else int(wrong)


if __name__ == "__main__":  # the cases import bench.kernels: it must not exist twice
    sys.exit(importlib.import_module("bench.kernels").main(sys.argv[1:]))
