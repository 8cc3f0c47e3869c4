"""CUDA graphs of the vision stage, one for each batch layout: one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CudaGraphs"]

LIMIT = 8  # graphs kept; each keeps the memory that its kernels write
Step = Callable[[Any, Tensor], Any]  # (what the step before returned, its input) → what it returns


@dataclass
class _Recorded:
    """Steps as graphs, and the memory they read and write."""

    inputs: list[Tensor]
    replays: list[Callable[[], None]]
    outputs: Sequence[Tensor]
    held: object  # owns other memory that the graphs read, which must not be freed before them
    weights: list[tuple[dict, str, Any, int]]  # of each: where its module keeps it, and its address
    done: torch.cuda.Event | None = None

    def is_stale(self) -> bool:
        """Whether weights were moved, converted or replaced, so that the graphs would read other memory."""
        return any(
            weight.data_ptr() != address or table.get(name) is not weight
            for table, name, weight, address in self.weights
        )


def _record(step: Step, state: object, value: Tensor, pool: object) -> tuple[Callable[[], None], object]:
    """A step as a graph: how to replay it, and what it returns, written anew by every replay."""
    with torch.cuda.device(value.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up: compile kernels, load modules, fill caches
            for _ in range(2):
                step(state, value)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = step(state, value)
    return graph.replay, result


class CudaGraphs:
    """CUDA graphs of recent calls, the least recently used dropped first. Safe to use from several threads.

    Recording synchronises with the device and takes as long as a few calls; a replay does neither. All graphs
    share one memory pool, which each call overwrites: results are copied out of it.

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
        modules: Sequence[nn.Module],
        held: object,
    ) -> list[Tensor]:
        """Run the steps by replaying graphs, which the first call with a key records.

        Args:
            key: what the steps depend on besides their inputs: sizes, options.
            steps: each takes what the one before returned, ``None`` first, and its input; the last returns
                tensors.
            inputs: return the input of each step, called right before the step is launched.
            modules: hold the weights that the steps read. If one was moved, converted or replaced since, the
                graph is recorded again.
            held: owns other memory that the steps read.

        Returns:
            what the last step returned, copied.

        Raises:
            ValueError: not on a CUDA device, or with gradients.
        """
        value = inputs[0]()
        device = value.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (key, value.device, value.dtype, autocast)
        if value.device.type not in self.devices:
            raise ValueError(f"cuda_graphs: expected pixel_values on a CUDA device, got {value.device}")
        if torch.is_grad_enabled():
            expected = "torch.no_grad() or torch.inference_mode()"
            raise ValueError(f"cuda_graphs: expected {expected}, got gradients enabled")
        with self._lock:
            recorded = self._recorded.get(key)
            if recorded is None or recorded.is_stale():
                values = [value, *(give() for give in inputs[1:])]
                recorded = self._recorded[key] = self._make(steps, values, modules, held)
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
        self, steps: Sequence[Step], values: Sequence[Tensor], modules: Sequence[nn.Module], held: object
    ) -> _Recorded:
        device = values[0].device
        weights: list[tuple[dict, str, Any, int]] = [
            (table, name, weight, weight.data_ptr())
            for whole in modules
            for module in whole.modules()
            for table in (module._parameters, module._buffers)
            for name, weight in table.items()
            if weight is not None
        ]
        elsewhere = {weight.device for _, _, weight, _ in weights} - {device}
        if elsewhere:
            raise ValueError(f"cuda_graphs: expected all weights on {device}, got some on {elsewhere}")
        if device.type == "cuda" and device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be written later
            inputs = [value.clone() for value in values]
        replays: list[Callable[[], None]] = []
        state: Any = None
        for step, static in zip(steps, inputs, strict=True):
            replay, state = self.record(step, state, static, self._pools.get(device))
            replay()  # recording runs no kernel, and the next step reads what this one writes
            replays.append(replay)
        return _Recorded(inputs, replays, state, held, weights)
