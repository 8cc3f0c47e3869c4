"""CUDA graphs of the vision stage, one a layout: one launch of the host where there were hundreds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Graphs"]

LIMIT = 8  # graphs kept; each holds on to what its kernels write
Step = Callable[[object, Tensor], object]  # (what the step before returned, its input) → what it returns


@dataclass
class _Recorded:
    """Steps as graphs, and the memory they read and write."""

    inputs: list[Tensor]
    replays: list[Callable[[], None]]
    outputs: Sequence[Tensor]
    held: object  # what the graphs read besides: it must not be freed before them
    weights: list[tuple[Tensor, int]]
    done: torch.cuda.Event | None = None

    def is_stale(self) -> bool:
        """Whether weights were moved or converted, so that the graphs would read what is no longer there."""
        return any(weight.data_ptr() != address for weight, address in self.weights)


def _record(step: Step, state: object, value: Tensor, pool: object) -> tuple[Callable[[], None], object]:
    """A step as a graph: how to replay it, and what it returns, written anew by every replay."""
    with torch.cuda.device(value.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, loads and caches what only first calls do
            for _ in range(2):
                step(state, value)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = step(state, value)
    return graph.replay, result


class Graphs:
    """Graphs of recent calls, the least recently used dropped first. Safe to use from several threads.

    Recording waits for the device and takes as long as a few calls; a replay does neither. All graphs share
    one pool of memory, in which what a call computes is overwritten by the next: results are copied out.

    Args:
        limit: how many graphs to keep.
    """

    devices = ("cuda",)
    record = staticmethod(_record)

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._lock = threading.Lock()
        self._pools: dict[torch.device, object] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def __reduce__(self):  # copies start empty
        return type(self), (self.limit,)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._recorded.clear()
            self._pools.clear()

    def run(
        self,
        key: Hashable,
        steps: Sequence[Step],
        inputs: Sequence[Callable[[], Tensor]],
        weights: Callable[[], Sequence[Tensor]],
        held: object,
    ) -> list[Tensor]:
        """What the last step returns, from graphs; recorded on the first call with a key.

        Args:
            key: of what the steps do beside their inputs' values: sizes, types, options.
            steps: each takes what the one before returned, ``None`` first, and its input; the last returns
                tensors.
            inputs: gives the input of each step, called right before the step is launched.
            weights: gives those that the steps read: where one was moved or converted since, the graph is
                made anew.
            held: owns other memory that the steps read.

        Raises:
            ValueError: not on a CUDA device, or with gradients.
        """
        value = inputs[0]()
        if value.device.type not in self.devices:
            raise ValueError(f"capture: expected pixel_values on a CUDA device, got {value.device}")
        if torch.is_grad_enabled():
            expected = "torch.no_grad() or torch.inference_mode()"
            raise ValueError(f"capture: expected {expected}, got gradients enabled")
        with self._lock:
            recorded = self._recorded.get(key)
            if recorded is None or recorded.is_stale():
                values = [value, *(give() for give in inputs[1:])]
                recorded = self._recorded[key] = self._make(steps, values, weights(), held)
                while len(self._recorded) > self.limit:
                    self._recorded.popitem(last=False)
            self._recorded.move_to_end(key)
            if recorded.done is not None:  # by another thread, on another stream
                torch.cuda.current_stream(value.device).wait_event(recorded.done)
            for give, static, replay in zip(inputs, recorded.inputs, recorded.replays, strict=True):
                static.copy_(give())
                replay()
            results = [output.clone() for output in recorded.outputs]
            if value.device.type == "cuda":
                recorded.done = torch.cuda.Event()
                recorded.done.record(torch.cuda.current_stream(value.device))
        return results

    def _make(
        self, steps: Sequence[Step], values: Sequence[Tensor], weights: Sequence[Tensor], held: object
    ) -> _Recorded:
        device = values[0].device
        elsewhere = {weight.device for weight in weights} - {device}
        if elsewhere:
            raise ValueError(f"capture: expected all weights on {device}, got some on {elsewhere}")
        if device.type == "cuda" and device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        with torch.inference_mode(False), torch.no_grad():  # or it could be written in inference mode alone
            inputs = [value.clone() for value in values]
        replays, state = [], None
        for step, static in zip(steps, inputs, strict=True):
            replay, state = self.record(step, state, static, self._pools.get(device))
            replay()  # recording runs nothing, and the next step reads what this one writes
            replays.append(replay)
        return _Recorded(inputs, replays, state, held, [(weight, weight.data_ptr()) for weight in weights])
