"""Microbenchmarks of the operations: check each result, then time it. A wrong result is never timed.

A case is an operation at a shape: how to make its inputs, and the variants that compute it, ours and peers.
:mod:`bench.bench_attention`, :mod:`bench.bench_selection` and :mod:`bench.bench_diverse` define the cases.
``pytest bench/kernels.py --benchmark-only`` runs them with pytest-benchmark: the reference at small shapes on
a CPU, everything at real shapes on a GPU. This module writes all of them into a record:

``python -m bench.kernels --out FILE [--small] [--seconds N]``. The record is written before and after every
variant. Run again with the same file, it continues after the variant at which the process died.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import bench_attention, bench_diverse, bench_selection, records, timing
from .registry import Case, Unavailable, Variant, Wrong, default_device, floor_us

ROUNDS = 5  # of single calls
STALL_SECONDS = 120  # for one variant; compiling takes the longest
LEFT_OUT = {"status": "skipped", "reason": "left out: no time"}
ENDED = "the process ended here"


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
        times = [timing.call_us(variant.call, sets) for _ in range(ROUNDS)]
        return {"timing": "wall", "times_us": times}
    if variant.synchronises:
        times = [timing.call_us(variant.call, [one]) for one in (sets * ROUNDS)[:ROUNDS]]
        return {"timing": "wall", "times_us": times}
    times, inputs, last = timing.graph_us(variant.call, sets)
    if variant.reset is None:  # check the result of the replayed graph too
        variant.check(inputs, last)
    return {"timing": "graph", "times_us": times}


def measure(
    case: Case,
    variant: Variant,
    sets: Sequence[Any],
    device: torch.device,
    limits: timing.Ceilings | None = None,
) -> dict[str, Any]:
    """Check and time a variant.

    Returns:
        the description with a ``status``: ``ok`` with microseconds per call; ``wrong``, ``failed`` (ours) or
        ``unavailable`` (a peer) with the reason.
    """
    cost = case.shape.cost(variant.cost or case.op)
    cold = device.type == "cuda" and len(sets) * cost.bytes > 2 * timing.l2_bytes(device)
    result = {**describe(case, variant), **cost._asdict(), "sets": len(sets), "cold": cold}
    try:
        if variant.reset is not None:
            variant.reset(sets[0])
        variant.check(sets[0], variant.call(sets[0]))
        times = _times(variant, sets, device)
        us = statistics.median(times["times_us"])
        floor = floor_us(cost, limits)
        result |= {"status": "ok", **times, "us": us, "gb_s": cost.bytes / us / 1e3}
        result |= {"floor_us": floor, "floor_share": floor and floor / us}
    except Wrong as error:
        result |= {"status": "wrong", "reason": str(error)}
    except Exception as error:
        reason = str(error) if isinstance(error, Unavailable) else records.reason(error)
        result |= {"status": "failed" if variant.ours else "unavailable", "reason": reason}
    return result


# --- pytest-benchmark ------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc) -> None:
    """Parametrise the test with ``case`` and ``variant``: small shapes on a CPU, real shapes on a GPU."""
    device = default_device()
    cases = all_cases(device.type == "cpu", device)
    every = [(case, variant) for case in cases for variant in case.variants]
    names = [f"{case.name}: {variant.name}" for case, variant in every]
    metafunc.parametrize(("case", "variant"), every, ids=names)


def test_variant(benchmark, case: Case, variant: Variant) -> None:
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
        benchmark.pedantic(timing.call_us, args=(variant.call, sets), rounds=ROUNDS)


# --- the record ------------------------------------------------------------------------------------------


def all_cases(small: bool, device: torch.device) -> list[Case]:
    """Return the cases of all benchmark files, the most important shapes first."""
    files = (bench_attention, bench_selection, bench_diverse)
    cases = [case for file in files for case in file.cases(small, device)]
    order = {shape: number for number, shape in enumerate(dict.fromkeys(case.shape for case in cases))}
    return sorted(cases, key=lambda case: order[case.shape])


def new_record(small: bool, command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return a record without results."""
    record = records.environment("kernels", command, arguments)
    return {
        **record,
        "small": small,
        "dtype": "bfloat16" if record["gpu"] else "float32",
        "tests": {"status": "not run"},
        "ceilings": None,
        "notes": [],
        "results": [],
    }


def run(record: dict[str, Any], path: Path, clock: timing.Clock) -> None:
    """Measure the variants that the record lacks; an error of the device ends the process."""
    device, results, current = default_device(), record["results"], None
    every = [(case, variant) for case in all_cases(record["small"], device) for variant in case.variants]
    results += [describe(case, variant) | LEFT_OUT for case, variant in every[len(results) :]]
    if record["ceilings"] is None and device.type == "cuda":
        record["ceilings"] = timing.ceilings(device)._asdict()
    limits = record["ceilings"] and timing.Ceilings(**record["ceilings"])
    for number, (case, variant) in enumerate(tqdm(every, disable=None)):
        if results[number]["status"] != "skipped":
            continue
        if clock.left() <= 0:
            break
        status = "failed" if variant.ours else "unavailable"
        results[number] |= {"status": status, "reason": ENDED}  # stays if the process dies here
        records.write(path, record)
        faulthandler.dump_traceback_later(STALL_SECONDS, exit=True)
        if case is not current:
            current, sets = case, []
            if device.type == "cuda":
                torch.cuda.empty_cache()
            sets = sets_of(case, device)
        results[number] = measure(case, variant, sets, device, limits)
        records.write(path, record)
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises if the device does not respond any more
        faulthandler.cancel_dump_traceback_later()
    records.write(path, record)


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 if all results of ours were right."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/kernels.json"), help="JSON file to write")
    parser.add_argument("--small", action="store_true", help="small shapes, to test the script itself")
    parser.add_argument("--seconds", type=float, default=1e9, help="time limit (default: none)")
    options = parser.parse_args(arguments)
    clock = timing.Clock(options.seconds)
    if options.out.exists():
        record = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        record = new_record(options.small, "python -m bench.kernels", arguments)
    if default_device().type == "cpu":
        torch.set_num_threads(1)
    with torch.no_grad():
        run(record, options.out, clock)
    return int(any(one["ours"] and one["status"] in ("wrong", "failed") for one in record["results"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
