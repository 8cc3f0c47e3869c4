"""Timing on a GPU: replays of a CUDA graph over rotating inputs, and the ceilings to hold results against.

A graph leaves out what the host needs for a launch. Inputs rotate among so many sets that a set has left
the L2 cache by the time it comes round again, as in a model, where every layer has keys of its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .registry import Ceilings

__all__ = ["Graph", "ceilings", "free_wall", "l2_bytes", "sets_for", "wall"]

Call = Callable[[Any], object]  # takes a set of inputs
MOST_REPLAYS, LEAST_REPLAYS = 15, 5
SECONDS = 0.3  # for a measurement, within these limits
MOST_SETS = 96
MEMORY = 16 << 30  # of all sets of inputs together
LEAST_CALLS = 20  # in a graph, so that its own launch does not count


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache; 0 on a CPU, where nothing is rotated."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


def sets_for(touched: int, size: int, device: torch.device) -> int:
    """How many sets of inputs to rotate among, of which a call touches so many bytes and holds ``size``."""
    if device.type != "cuda":
        return 1
    cold = math.ceil(3 * l2_bytes(device) / max(touched, 1))
    return max(1, min(max(cold, 2), MOST_SETS, MEMORY // max(size, 1)))


class Graph:
    """Calls captured one after another in a CUDA graph, each with the next set of inputs.

    Attributes:
        calls: how many there are.
        results: of the last calls, one a set of inputs; written anew by every replay.
    """

    def __init__(self, call: Call, sets: Sequence[Any]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, loads and caches what only a first call does
            for inputs in sets[:3]:
                call(inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.calls = len(sets) * math.ceil(LEAST_CALLS / len(sets))
        self.results: deque = deque(maxlen=len(sets))  # kept alive, or all would be written to one place
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for number in range(self.calls):
                self.results.append(call(sets[number % len(sets)]))

    def replay(self) -> None:
        """Run it and wait."""
        self.graph.replay()
        torch.cuda.synchronize()

    def microseconds(self) -> list[float]:
        """Microseconds of a call, one for each replay."""
        self.replay()
        begin = time.perf_counter()
        self.replay()
        replays = int(SECONDS / (time.perf_counter() - begin))
        times = []
        for _ in range(max(LEAST_REPLAYS, min(replays, MOST_REPLAYS))):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / self.calls)
        return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def wall(call: Call, sets: Sequence[Any], device: torch.device, rounds: int) -> list[float]:
    """Microseconds of single calls by the host's clock, each waited for: for what cannot be captured."""
    call(sets[0])
    times = []
    for number in range(rounds):
        _wait(device)
        begin = time.perf_counter()
        result = call(sets[number % len(sets)])
        _wait(device)
        times.append(1e6 * (time.perf_counter() - begin))
        del result
    return times


def free_wall(call: Call, sets: Sequence[Any], device: torch.device) -> float:
    """Microseconds of a call in eager mode, many in a row and one wait: host and device as they overlap."""
    times, count = [], 1
    for _ in range(4):  # the first, of one call, says how many
        _wait(device)
        begin = time.perf_counter()
        for number in range(count):
            call(sets[number % len(sets)])
        _wait(device)
        times.append(1e6 * (time.perf_counter() - begin) / count)
        count = max(3, min(int(SECONDS / 3 * 1e6 / times[0]), 20))
    return statistics.median(times[1:])


def ceilings(device: torch.device) -> Ceilings | None:
    """Copy bandwidth (bytes in and out), bf16 matrix rate on random data, a launch of next to nothing."""
    if device.type != "cuda":
        return None

    def median(call: Call, inputs: Any) -> float:
        return statistics.median(Graph(call, [inputs]).microseconds()) * 1e-6

    source = torch.randint(-128, 127, (1 << 30,), dtype=torch.int8, device=device)
    bandwidth = 2 * source.numel() / median(lambda pair: pair[1].copy_(pair[0]), (source, source.clone()))
    size = 8192
    left, right, product = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(3))
    rate = 2 * size**3 / median(lambda three: torch.mm(*three[:2], out=three[2]), (left, right, product))
    launch = median(lambda number: number.add_(1), torch.zeros(1, device=device))
    del source, left, right, product
    torch.cuda.empty_cache()
    return Ceilings(bandwidth, rate, 1e6 * launch)
