"""Check a result, then time it: what the benchmarks of the kernels share.

A case is an operation at a shape: how its inputs are made, and the variants that compute it, ours and
peers. :func:`measure` times one variant after its result was found right; no time is reported of a wrong
one. A peer that cannot run is recorded with the reason. The benchmark files drive this with
pytest-benchmark, ``bench.kernels`` without.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .gpu_timing import MOST_SETS, Graph, ceilings, free_wall, l2_bytes, sets_for, wall
from .registry import Ceilings, Cost, Shape, floor_us

__all__ = [
    "Case",
    "Unavailable",
    "Variant",
    "Wrong",
    "benchmark_variant",
    "close",
    "device_ceilings",
    "default_device",
    "describe",
    "generate_tests",
    "item_size",
    "measure",
    "numbered",
    "same",
    "sets_of",
    "some",
]

CPU_ROUNDS = 5


class Unavailable(Exception):
    """A peer that cannot run here, and why."""


class Wrong(Exception):
    """A result that is not what the twin says."""


@dataclass(frozen=True)
class Variant:
    """One way to compute what a case is about.

    Attributes:
        call: what is timed; takes a set of inputs.
        check: takes the inputs and the result, raises :class:`Wrong`.
        ours: of this package; otherwise a peer.
        cost: what it must move, where that differs from the case's.
        reset: brings a set of inputs back to what ``check`` expects, where the call writes into it.
        waits: the host waits for the device within, so that no graph can be captured.
        against: of a peer, the variant of ours that does the same; ``None`` for the first.
        less: a peer that does less than ours, timed to show what the rest costs.
    """

    name: str
    call: Callable[[Any], object]
    check: Callable[[Any, Any], None]
    ours: bool = False
    cost: Cost | None = None
    reset: Callable[[Any], None] | None = None
    waits: bool = False
    against: str | None = None
    less: bool = False


@dataclass(frozen=True)
class Case:
    """An operation at a shape.

    Attributes:
        make: inputs from a seed.
        size: bytes of a set of inputs.
        most_sets: fewer sets where the data is small enough to stay in the L2 cache, in a model too.
    """

    op: str
    shape: Shape
    cost: Cost
    size: int
    make: Callable[[int], Any]
    variants: tuple[Variant, ...]
    most_sets: int = MOST_SETS

    @property
    def ours(self) -> Variant:
        """The first variant of ours."""
        return next(variant for variant in self.variants if variant.ours)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape.name}"


def item_size(device: torch.device) -> int:
    """Bytes of an element: bf16 on a GPU; fp32 on a CPU, where bf16 is emulated."""
    return 2 if device.type == "cuda" else 4


def some(crops: int) -> list[int]:
    """The crops that are checked: a reference of all would not fit beside what is timed."""
    return sorted({0, crops // 2, crops - 1})


def close(name: str, result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise :class:`Wrong` unless ‖result − expected‖ ≤ tolerance · ‖expected‖; NaN never passes."""
    if result.shape != expected.shape:
        raise Wrong(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(result.shape)}")
    error = float((result.double() - expected.double()).norm() / expected.double().norm())
    if not error <= tolerance:
        raise Wrong(f"{name}: relative error {error:.2g}, expected at most {tolerance:g}")


def same(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise :class:`Wrong` unless equal in every element."""
    if result.shape != expected.shape:
        raise Wrong(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(result.shape)}")
    if not torch.equal(result, expected.to(result.dtype)):
        raise Wrong(f"{name}: {int((result != expected).sum())} of {result.numel()} elements differ")


def sets_of(case: Case, device: torch.device) -> list[Any]:
    """Sets of inputs to rotate among."""
    count = min(sets_for(case.cost.bytes, case.size, device), case.most_sets)
    return [case.make(seed) for seed in range(count)]


@cache
def device_ceilings(device: torch.device) -> Ceilings | None:
    """The ceilings, measured once a process."""
    return ceilings(device)


def _verify(variant: Variant, inputs: Any) -> None:
    if variant.reset is not None:
        variant.reset(inputs)
    variant.check(inputs, variant.call(inputs))


def _time(variant: Variant, sets: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """Raw times, and how they were taken."""
    result: dict[str, Any] = {}
    if device.type != "cuda":
        return {"timing": "wall", "calls": 1, "times_us": wall(variant.call, sets, device, CPU_ROUNDS)}
    if not variant.waits:
        graph = Graph(variant.call, sets)
        result = {"timing": "graph", "calls": graph.calls, "times_us": graph.microseconds()}
        if variant.reset is None:  # what the graph computed is right too
            variant.check(sets[(graph.calls - 1) % len(sets)], graph.results[-1])
        del graph
    else:
        result = {"timing": "wall", "calls": 1, "times_us": wall(variant.call, sets, device, 11)}
    result["eager_us"] = free_wall(variant.call, sets, device)
    return result


def describe(case: Case, variant: Variant) -> dict[str, Any]:
    """What a variant is, without measuring it."""
    return {
        "op": case.op,
        "geometry": case.shape.geometry.name,
        "crops": case.shape.batch.crops,
        "variant": variant.name,
        "ours": variant.ours,
        "against": None if variant.ours else variant.against or case.ours.name,
        "less": variant.less,
    }


def measure(
    case: Case, variant: Variant, sets: Sequence[Any], device: torch.device, time: bool = True
) -> dict[str, Any]:
    """Check and time a variant.

    Returns:
        what it is and its ``status``: ``ok`` with times, in microseconds a call; ``wrong``, ``failed``
        (ours) or ``unavailable`` (a peer) with the reason; ``checked`` where no time was asked for.
    """
    cost = variant.cost or case.cost
    record: dict[str, Any] = {
        **describe(case, variant),
        "bytes": cost.bytes,
        "flops": cost.flops,
        "sets": len(sets),
        # Rotating so many sets, has a call's data left the L2 cache?
        "cold": device.type == "cuda" and len(sets) * cost.bytes > 2 * l2_bytes(device),
    }
    try:
        _verify(variant, sets[0])
        record["status"] = "checked"
        if time:
            record.update(_time(variant, sets, device), status="ok")
    except Wrong as error:
        record.update(status="wrong", reason=str(error))
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0][:300]
        if not isinstance(error, Unavailable):
            reason = f"{type(error).__name__}: {reason}"
        record.update(status="failed" if variant.ours else "unavailable", reason=reason)
    if record["status"] == "ok":
        record["us"] = statistics.median(record["times_us"])
        record["gb_s"] = cost.bytes / record["us"] / 1e3
        record["floor_us"] = floor_us(cost, device_ceilings(device))
        record["floor_share"] = record["floor_us"] and record["floor_us"] / record["us"]
    else:
        record.pop("times_us", None)
    return record


def numbered(cases: Sequence[Case]) -> Iterator[tuple[int, Case, Variant]]:
    """Every variant of every case with its number."""
    number = 0
    for case in cases:
        for variant in case.variants:
            yield number, case, variant
            number += 1


# pytest-benchmark


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def generate_tests(metafunc, cases: Callable[[bool, torch.device], Iterator[Case]]) -> None:
    """Parametrise a test with ``case`` and ``variant``: small shapes on a CPU, real ones on a GPU."""
    device = default_device()
    own = [one[1:] for one in numbered(cases(device.type == "cpu", device))]
    names = [f"{case.name}: {variant.name}" for case, variant in own]
    metafunc.parametrize(("case", "variant"), own, ids=names)


def benchmark_variant(benchmark, case: Case, variant: Variant) -> None:
    """Check a variant, then time it; what :func:`measure` says is in ``extra_info``.

    pytest-benchmark's own numbers are the host's: of a call on a CPU, of a replay of many on a GPU.
    """
    import pytest

    device = default_device()
    with torch.no_grad():
        sets = sets_of(case, device)
        record = measure(case, variant, sets, device)
        if record["status"] == "unavailable":
            pytest.skip(record["reason"])
        if record["status"] != "ok":
            pytest.fail(record["reason"])
        benchmark.extra_info.update(record)
        if device.type == "cpu" or variant.waits:
            benchmark.pedantic(variant.call, args=(sets[0],), rounds=CPU_ROUNDS)
        else:
            benchmark.pedantic(Graph(variant.call, sets).replay, rounds=CPU_ROUNDS)
