"""Clocks, interleaved rounds, bootstrap intervals and CUDA graphs.

Variants to compare run one after the other in every round, in reverse order every other round, so that slow
phases of the machine affect all of them. Two variants are compared by the median of the ratios within
rounds, with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

# Processor time of one thread does not count other processes that run on the same core.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RESAMPLES, COVERAGE = 2000, 0.95


def positive(text: str) -> int:
    """Parse a positive integer."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, got {text!r}")
    return number


# --- rounds ----------------------------------------------------------------------------------------------


class Clock:
    """A time budget in seconds."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


@contextlib.contextmanager
def quiet_heap() -> Iterator[None]:
    """Exclude objects that exist now from garbage collection inside the block."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], clock: str = "wall") -> float:
    """Return the seconds of one call and what it launches.

    Garbage is collected before it; the result is freed after it.
    """
    now = CLOCKS[clock]
    gc.collect()
    gc.disable()
    wait()
    try:
        begin = now()
        result = function()
        wait()
        elapsed = now() - begin
    finally:
        gc.enable()
    del result
    return elapsed


def take_turns(names: Sequence[str], turn: int) -> list[str]:
    """Return the order of variants in a round: as given, reversed in every other round."""
    return list(names) if turn % 2 == 0 else list(reversed(names))


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return median and minimum."""
    return {"median": statistics.median(times), "min": min(times)}


def interval(values: Sequence[float]) -> list[float]:
    """Return the 95 % percentile bootstrap interval of the median, with a fixed seed."""
    draws = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    ends = 50 * (1 - COVERAGE), 50 * (1 + COVERAGE)
    return np.percentile(np.median(draws, axis=1), ends, method="nearest").tolist()


def compare(times: Sequence[float], base: Sequence[float]) -> Mapping[str, object]:
    """Compare a variant with a baseline measured in the same rounds; below 1, the variant is faster.

    Returns:
        ``paired``, the median of the ratios within rounds; ``interval``, its 95 % bootstrap interval;
        ``pairs``, the number of rounds.
    """
    ratios = [one / other for one, other in zip(times, base, strict=True)]
    return {"paired": statistics.median(ratios), "interval": interval(ratios), "pairs": len(ratios)}


# --- calls on a device -----------------------------------------------------------------------------------
#
# A call takes one set of inputs. A CUDA graph excludes the host's time per launch. Inputs rotate among enough
# sets that each set has left the L2 cache when it is used again, as in a model whose layers have keys of
# their own.

Call = Callable[[Any], object]
GRAPH_MS = 20  # of the calls in one CUDA graph
MOST_SETS = 96
MEMORY = 16 << 30  # bytes of all sets together
COPY_BYTES, PRODUCT = 1 << 30, 8192  # sizes of the copy and of the square matrices that give the ceilings


class Ceilings(NamedTuple):
    """Measured limits of a device: bytes and operations per second, microseconds of the smallest launch.

    ``bandwidth`` is the largest of ``copies``, the rates of several ways to copy.
    """

    bandwidth: float
    flops: float
    launch_us: float
    copies: Mapping[str, float] | None = None


def l2_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache; 0 on a CPU, where inputs are not rotated."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


def sets_for(touched: int, size: int, device: torch.device) -> int:
    """Return the number of input sets, given the bytes a call touches and the bytes of a set."""
    if device.type != "cuda":
        return 1
    cold = math.ceil(3 * l2_bytes(device) / max(touched, 1))
    return max(1, min(max(cold, 2), MOST_SETS, MEMORY // max(size, 1)))


def graph_us(call: Call, sets: Sequence[Any]) -> tuple[list[float], Any, Any]:
    """Return microseconds per call of several replays, and the inputs and result of the last call."""
    from triton.testing import do_bench_cudagraph

    rotation = itertools.cycle(sets)
    last: deque = deque(maxlen=len(sets))  # results stay alive, else all calls would write to one place

    def next_call() -> None:
        inputs = next(rotation)
        last.append((inputs, call(inputs)))

    torch.cuda.synchronize()  # the benchmark runs on a stream of its own
    times = do_bench_cudagraph(next_call, rep=GRAPH_MS, return_mode="all")
    torch.cuda.synchronize()
    return [1e3 * time for time in times], *last[-1]


def call_us(call: Call, sets: Sequence[Any], count: int = 1) -> float:
    """Return wall-clock microseconds per call, of a number of calls in a row."""
    wait()
    begin = time.perf_counter()
    for number in range(count):
        call(sets[number % len(sets)])
    wait()
    return 1e6 * (time.perf_counter() - begin) / count


def ceilings(device: torch.device) -> Ceilings:
    """Measure copies by a memcpy and by an elementwise kernel, a bf16 matrix product, the smallest launch.

    Either way to copy may be the slower: on an H200, kernels outran the memcpy of a CUDA graph.
    """

    def median(call: Call, inputs: Any) -> float:
        return statistics.median(graph_us(call, [inputs])[0]) * 1e-6

    source = torch.randint(1 << 30, (COPY_BYTES // 4,), dtype=torch.int32, device=device)
    pair = source, torch.empty_like(source)
    ways: dict[str, Call] = {
        "memcpy": lambda pair: pair[1].copy_(pair[0]),
        "kernel": lambda pair: torch.add(pair[0], 1, out=pair[1]),
    }
    copies = {name: 2 * source.nbytes / median(call, pair) for name, call in ways.items()}
    three = [torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16) for _ in range(3)]
    rate = 2 * PRODUCT**3 / median(lambda three: torch.mm(*three[:2], out=three[2]), three)
    launch = median(lambda number: number.add_(1), torch.zeros(1, device=device))
    del source, pair, three
    torch.cuda.empty_cache()
    return Ceilings(max(copies.values()), rate, 1e6 * launch, copies)


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak memory of a call's tensors on its device, beyond what was allocated before."""
    if not torch.cuda.is_available():
        from hero_kernels import testing  # not above: bench.compare imports that of a commit

        return testing.peak_bytes(function)
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
