"""Helpers for tests of the operations, here and in packages that build on them.

Tolerance, poisoned memory, strided views, and counts of launches, host-device synchronisations and
allocations. Only tests import this module; it needs only torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "VIEWS",
    "OperationCounter",
    "assert_accurate",
    "backwards",
    "call",
    "contiguous",
    "offset",
    "packed",
    "peak_bytes",
    "same_bits",
    "tensors_in",
]

# --- tolerance -------------------------------------------------------------------------------------------

# Allowed in addition to twice PyTorch's own error, in units in the last place of the largest result: that
# error may be small by chance, and an exponential multiplies the rounding of its argument, a logit of 10 or
# 20.
ULPS = {torch.float64: 16, torch.float32: 16, torch.float16: 1, torch.bfloat16: 1}


def assert_accurate(actual: Tensor, exact: Tensor, peer: Tensor, name: str = "result") -> None:
    """Assert an error of at most twice PyTorch's own in the same dtype, plus ``ULPS``. The only tolerance.

    Args:
        actual: the result under test.
        exact: the result in float64.
        peer: PyTorch's own result, of the dtype that ``actual`` must have.
        name: of the result, for the message.
    """
    actual, exact, peer = actual.detach().cpu(), exact.detach().cpu().double(), peer.detach().cpu()
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert actual.dtype == peer.dtype, f"{name}: {actual.dtype}, not {peer.dtype}"
    if not exact.numel():
        return
    assert exact.isfinite().all() and peer.isfinite().all(), f"{name}: nothing to compare with"
    errors = (actual.double() - exact).abs()
    own = float((peer.double() - exact).abs().max())
    allowed = 2 * own + ULPS[peer.dtype] * torch.finfo(peer.dtype).eps * float(exact.abs().max())
    error = float(errors.max())  # NaN stays NaN, which is not below anything
    where = [int(i) for i in torch.unravel_index(errors.nan_to_num(math.inf).argmax(), exact.shape)]
    assert error <= allowed, (
        f"{name}: error {error:.3g} at {where}, allowed {allowed:.3g} (PyTorch {own:.3g})"
    )


def _bytes(values: Tensor) -> Tensor:
    """The elements of a tensor as contiguous bytes."""
    return values.detach().contiguous().view(-1).view(torch.uint8)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether shape, dtype and bits are equal: NaN equals itself, −0 is not +0."""
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(_bytes(one), _bytes(other))


# --- memory ----------------------------------------------------------------------------------------------

GUARD = 256  # elements before and after an allocation; keeps its alignment
# A NaN with an unusual payload for floats, an implausible value for integers: neither is ever a result.
POISON = {
    torch.float64: (torch.int64, 0x7FFDA5A5A5A5A5A5),
    torch.float32: (torch.int32, 0x7FDA5A5A),
    torch.float16: (torch.int16, 0x7FDA),
    torch.bfloat16: (torch.int16, 0x7FDA),
    torch.int64: (torch.int64, 0x5A5A5A5A5A5A5A5A),
    torch.int32: (torch.int32, 0x5A5A5A5A),
    torch.int16: (torch.int16, 0x5A5A),
    torch.uint8: (torch.uint8, 0x5A),
    torch.bool: (torch.uint8, 0x5A),
}


class _Poisoned(TorchFunctionMode):
    """A mode in which new empty tensors are filled with poison and lie between guards."""

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[tuple[Tensor, int]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in (torch.empty, torch.empty_like, Tensor.new_empty) or not result.numel():
            return result
        kind, poison = POISON[result.dtype]
        memory = torch.full((result.numel() + 2 * GUARD,), poison, dtype=kind, device=result.device)
        self.allocations.append((memory, poison))
        return memory[GUARD:-GUARD].view(result.dtype).as_strided(result.shape, result.stride(), GUARD)

    def check(self, outputs: list[Tensor]) -> None:
        for memory, poison in self.allocations:
            for guard in (memory[:GUARD], memory[-GUARD:]):
                assert (guard == poison).all(), "written beyond an allocation"
        for output in outputs:
            kind, value = POISON[output.dtype]
            left = int((output.detach().contiguous().view(kind) == value).sum())
            assert not left, f"{left} elements of {tuple(output.shape)} {output.dtype} never written"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def call(function: Callable, *arguments: Any, poison: bool = True, **options: Any) -> Any:
    """Call an operation, with the checks that hold for every operation.

    Its allocations are poisoned: every element of its outputs must be written, and nothing around them. The
    memory of its inputs must be unchanged, that of ``out`` outside the view. ``poison=False`` is for compiled
    functions, whose allocations cannot be intercepted.
    """
    out = options.get("out")
    inputs = [tensor.detach() for tensor in tensors_in([arguments, options])]
    before = [tensor.untyped_storage().clone() for tensor in inputs]
    memory = _Poisoned()
    if poison:
        with memory:
            result = function(*arguments, **options)
    else:
        result = function(*arguments, **options)
    memory.check([tensor for tensor in tensors_in(result) if tensor is not out])
    for tensor, bits in zip(inputs, before, strict=True):
        storage = tensor.untyped_storage()
        if out is not None and storage.data_ptr() == out.untyped_storage().data_ptr():
            tensor.new_empty(0).set_(bits, out.storage_offset(), out.shape, out.stride()).copy_(out)
        old, new = (torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(s) for s in (bits, storage))
        assert torch.equal(old, new), "an input was changed"
    return result


# --- views: the same values at other strides --------------------------------------------------------------


def contiguous(values: Tensor) -> Tensor:
    return values.clone()


def packed(values: Tensor) -> Tensor:
    """The view that attention modules pass: a transposed ``[T, N, H·D]``."""
    crops, heads, tokens, width = values.shape
    memory = values.transpose(1, 2).flatten(2).contiguous()
    return memory.view(crops, tokens, heads, width).transpose(1, 2)


def offset(values: Tensor) -> Tensor:
    """The middle third of a fused projection, inside a larger batch, surrounded by NaN."""
    crops, heads, tokens, width = values.shape
    memory = values.new_full((crops + 2, tokens + 3, 3 * heads * width), math.nan)
    view = memory[1:-1, 2:-1, heads * width : 2 * heads * width].unflatten(-1, (heads, width)).transpose(1, 2)
    return view.copy_(values)


def backwards(values: Tensor) -> Tensor:
    """Memory order reversed, every second element NaN (or true); for tensors of any rank."""
    memory = torch.full(
        (*reversed(values.shape), 2),
        math.nan if values.is_floating_point() else 1,
        dtype=values.dtype,
        device=values.device,
    )
    return memory[..., 0].permute(*reversed(range(values.dim()))).copy_(values)


VIEWS = {view.__name__: view for view in (contiguous, packed, offset, backwards)}


# --- launches, synchronisations, memory ------------------------------------------------------------------

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Their result has a data-dependent shape, or is a number on the host.
_WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2", "unique_dim"}
_COPIES = {"_to_copy", "copy_", "_copy_from"}


class _Constants(TorchFunctionMode):
    """Records ``torch.tensor(..., device=...)``, a copy from the host that ``meta`` does not make."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor) and result.device.type != "cpu":
            self.counter.operations.append("tensor")
            self.counter.waits.append("tensor")
        return result


class OperationCounter(TorchDispatchMode):
    """Counts launches and host-device synchronisations of a block, on the CPU or on the ``meta`` device.

    An operation of :mod:`hero_kernels` counts as one launch. Operations inside other operations are not seen,
    nor is ``tolist`` on a CPU, which reads memory.

    Attributes:
        operations: names of the operations that would be launched, in order, without views and allocations.
        waits: names of those that synchronise host and device: numbers on the host, data-dependent shapes,
            and copies between devices unless they are ``non_blocking``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.waits: list[str] = []
        self._constants = _Constants(self)

    def __enter__(self) -> OperationCounter:
        self._constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._constants.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if function.is_view or function.namespace == "prim" or name in _ALLOCATIONS:
            return result
        if name in ("detach", "alias", "lift_fresh"):
            return result
        self.operations.append(name)
        if _waits(name, list(tensors_in([args, kwargs or {}, result])), args, kwargs or {}):
            self.waits.append(name)
        return result


def _waits(name: str, tensors: list[Tensor], args: tuple, kwargs: dict) -> bool:
    if name in _WAITS:
        return True
    if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    if name in _COPIES:
        non_blocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        return len({tensor.device for tensor in tensors}) > 1 and not non_blocking
    if name.startswith("repeat_interleave"):  # its length depends on the data
        return "output_size" not in kwargs or kwargs["output_size"] is None
    return False


def peak_bytes(function: Callable[[], Any]) -> int:
    """Peak CPU memory that PyTorch allocated during a call, in bytes, beyond what was allocated before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
