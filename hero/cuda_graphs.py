"""CUDA graphs: one launch instead of the hundreds of a tower, for inputs of a shape that was recorded before.

What is recorded depends on the number of crops, not on the sizes of images: these are inputs of the graph.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

__all__ = ["CudaGraphs", "Path"]

LIMIT = 8  # graphs kept; each keeps the memory that its kernels write
CROPS = 16  # beyond, the GPU takes longer than the launches (bench/results/h200_end_to_end.json)
Result = TypeVar("Result")


class Path(NamedTuple):
    """How the vision tower ran.

    Attributes:
        cuda_graph: whether it was replayed from a CUDA graph.
        reason: why not; empty if it was.
        attention: what the layers that score patches ran, ``"native"`` or ``"fused"``.
    """

    cuda_graph: bool
    reason: str
    attention: str


class _Watch:
    """The modules, weights and hooks of a module, which must not change while graphs are replayed.

    They are compared at every call, so the loops run in C: dictionaries compare values by identity first.
    """

    def __init__(self, module: nn.Module):
        modules = list(module.modules())
        self.module = module
        tables = (table for one in modules for table in (one._modules, one._parameters, one._buffers))
        self._tables = [table for table in tables if table]
        self._copies = list(map(dict, self._tables))
        values = [(table, name, value) for table in self._tables for name, value in table.items()]
        self._weights = [value for _, _, value in values if isinstance(value, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._weights))
        # Of different tensors of one element, Python would compare the values.
        self._scalars = [one for one in values if isinstance(one[2], Tensor) and one[2].numel() == 1]
        self._attributes = [one.__dict__ for one in modules]
        self._hooks = [hooks for one in modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self._hook_counts = list(map(len, self._hooks))
        self._next_hook = RemovableHandle.next_id

    def is_same(self) -> bool:
        """Whether nothing was added, replaced, moved or converted."""
        try:
            if self._tables != self._copies:
                return False
        except (RuntimeError, TypeError):  # tensors that cannot be compared as a whole
            return False
        return (
            not any(map(operator.contains, self._attributes, repeat("forward")))  # a replaced one
            and all(table[name] is value for table, name, value in self._scalars)
            and list(map(Tensor.data_ptr, self._weights)) == self._addresses
        )

    def has_new_hooks(self) -> bool:
        """Whether hooks were added since this was asked last."""
        if RemovableHandle.next_id == self._next_hook:  # nowhere
            return False
        before, self._hook_counts = self._hook_counts, list(map(len, self._hooks))
        self._next_hook = RemovableHandle.next_id
        return self._hook_counts != before

    def devices(self) -> set[torch.device]:
        """Where the weights are."""
        return {weight.device for weight in self._weights}


@dataclass
class _Recorded:
    """A graph, and the memory that it reads and writes."""

    inputs: list[Tensor]
    constants: list[Tensor]
    given: tuple[Tensor, ...]  # what the constants were copied from
    replay: Callable[[], None]
    output: Any
    done: torch.cuda.Event | None = None


def _record(
    step: Callable[..., Any], values: Sequence[Tensor], pool: object
) -> tuple[Callable[[], None], object]:
    """A step as a graph: how to replay it, and what it returns, written anew by every replay."""
    with torch.cuda.device(values[0].device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up: compile kernels, load modules, fill caches
            for _ in range(2):
                step(*values)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = step(*values)
    return graph.replay, result


class CudaGraphs:
    """CUDA graphs of one module, the least recently used dropped first. Safe to use from several threads.

    Recording synchronises with the device and takes as long as a few calls; a replay does neither. All graphs
    share one memory pool, which each call overwrites.

    Args:
        required: raise an error where no graph can be replayed, and record at the first call of a kind;
            otherwise such calls run eagerly, and the second call of a kind records.
        limit: how many graphs to keep.
    """

    devices = ("cuda",)
    record = staticmethod(_record)

    def __init__(self, required: bool = False, limit: int = LIMIT):
        self.required = required
        self.limit = limit
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.RLock()
        self._pools: dict[torch.device, object] = {}
        self._watch: _Watch | None = None
        self._failure = ""

    def __len__(self) -> int:
        return len(self._recorded)

    def __reduce__(self):  # copies start empty
        return type(self), (self.required, self.limit)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._recorded.clear()
            self._seen.clear()
            self._pools.clear()
            self._watch, self._failure = None, ""

    def refusal(
        self, module: nn.Module, is_plain: Callable[[], bool], value: Tensor, given: Mapping[str, object]
    ) -> str:
        """Why a call of the module cannot be replayed; empty if it can.

        Args:
            is_plain: whether the module runs no code of the user's, such as hooks; asked anew only when the
                module has changed.
            value: the input, ``[T, ...]``.
            given: arguments that change what is computed.

        Raises:
            ValueError: the same, if graphs are required.
        """
        expected, got = self._refusal(module, is_plain, value, given)
        if got and self.required:
            raise ValueError(f"cuda_graphs: expected {expected}, got {got}")
        return got

    def _refusal(self, module, is_plain, value, given) -> tuple[str, str]:
        if value.device.type not in self.devices:
            return "pixel_values on a CUDA device", str(value.device)
        if torch.is_grad_enabled():
            return "torch.no_grad() or torch.inference_mode()", "gradients enabled"
        if given:
            return "no arguments for the vision tower", ", ".join(sorted(given))
        if torch_module._has_any_global_hook():
            return "no global hooks of modules", "global hooks"
        if module.training:
            return "a module in eval mode", "training mode"
        if value.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "a call outside other CUDA graphs", "one inside"
        if not self.required and len(value) > CROPS:
            return f"at most {CROPS} crops", f"{len(value)} crops"
        with self._lock:
            watch = self._watch
            is_same = watch is not None and watch.module is module and watch.is_same()
            if watch is None or not is_same or (watch.has_new_hooks() and not is_plain()):
                self.clear()
                self._watch = watch = _Watch(module) if is_plain() else None
            if watch is None:
                return "a module that runs its class's code alone", "hooks, wrappers or replaced methods"
            elsewhere = watch.devices() - {value.device}
            if elsewhere:
                return f"all weights on {value.device}", f"some on {', '.join(map(str, elsewhere))}"
            return "a module that can be recorded", self._failure

    def run(
        self,
        key: Hashable,
        step: Callable[..., Any],
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        then: Callable[[Any], Result],
    ) -> tuple[Result | None, str]:
        """Run a step by replaying its graph, after :meth:`refusal` returned nothing.

        Args:
            key: what the step depends on besides tensors: options.
            step: takes inputs and constants.
            inputs: copied to the graph's memory by each call.
            constants: likewise, but not if they are those of the last call.
            then: takes what the step returns, which the next call overwrites, and returns the result.

        Returns:
            the result and an empty string; or ``None`` and why nothing was run.

        Raises:
            RuntimeError: the step cannot be recorded, if graphs are required.
        """
        value = inputs[0]
        device = value.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (key, value.shape, value.dtype, value.device, autocast)
        with self._lock:
            recorded = self._recorded.get(key)
            if recorded is None:
                if not self.required and key not in self._seen:
                    self._seen[key] = None
                    if len(self._seen) > 4 * self.limit:
                        self._seen.popitem(last=False)
                    return None, "the first call of this kind"
                try:
                    recorded = self._recorded[key] = self._make(step, inputs, constants)
                except RuntimeError as problem:
                    if self.required:
                        raise
                    self._failure = f"recording failed: {str(problem).splitlines()[0]}"
                    return None, self._failure
                while len(self._recorded) > self.limit:
                    self._recorded.popitem(last=False)
            self._recorded.move_to_end(key)
            if recorded.done is not None:  # by another thread, on another stream
                torch.cuda.current_stream(value.device).wait_event(recorded.done)
            for given, static in zip(inputs, recorded.inputs, strict=True):
                static.copy_(given)
            if not all(map(operator.is_, constants, recorded.given)):
                for given, static in zip(constants, recorded.constants, strict=True):
                    static.copy_(given)
                recorded.given = tuple(constants)
            recorded.replay()
            result = then(recorded.output)
            if value.device.type == "cuda":
                recorded.done = torch.cuda.Event()
                recorded.done.record(torch.cuda.current_stream(value.device))
        return result, ""

    def _make(
        self, step: Callable[..., Any], inputs: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> _Recorded:
        device = inputs[0].device
        if device.type == "cuda" and device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a graph must not read what autocast drops afterwards
        try:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be written later
                own = [value.clone() for value in (*inputs, *constants)]
                replay, output = self.record(step, own, self._pools.get(device))
        finally:
            torch.set_autocast_cache_enabled(cached)
        return _Recorded(own[: len(inputs)], own[len(inputs) :], tuple(constants), replay, output)
