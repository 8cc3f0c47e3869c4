"""Checks that several operations of :mod:`hero_kernels.ops` share: they raise as its docstring says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ._checks import FLOATS, check_buffer, check_integer, check_number, check_tensor, describe
from ._dispatch import is_plain
from ._env import SWITCHES
from .segments import MAX_SIGNALS, Segments, TileSignal

# The names of each signal in messages; made once, since a call takes tens of microseconds.
_SIGNALS = [
    (name, *(f"{name}.{field}" for field in TileSignal._fields))
    for name in (f"signals[{number}]" for number in range(MAX_SIGNALS))
]


def detached(values: Tensor) -> Tensor:
    return values.detach() if values.requires_grad else values


def check_attention(
    query: Tensor, key: Tensor, scale: float, *, cls: bool = False, packed: bool = False
) -> float:
    key = check_tensor("key", key, (1 if packed else "T", "H", "N", "D"), FLOATS)
    crops, heads, tokens, width = key.shape
    check_tensor("query", query, (crops, heads, "N or 1" if cls else tokens, width), (key.dtype,), key.device)
    if cls and query.shape[2] not in (1, tokens):
        raise ValueError(f"query: expected {tokens} rows or the CLS row alone, got {describe(query)}")
    if tokens < 1 + cls - packed:
        raise ValueError(f"key: expected at least {1 + cls} tokens a crop, got {describe(key)}")
    return check_number("scale", scale)


def check_accumulation(
    weight: float | Tensor, out: Tensor | None, key: Tensor, size: int, count: int | None = None
) -> float | Tensor:
    """Check ``weight``, of ``count`` segments or of the crops, and ``out``."""
    crops, heads = key.shape[:2]
    if out is not None:
        check_buffer("out", out, (crops, heads, size), key.device)
    if isinstance(weight, Tensor):
        shape = (crops if count is None else count,)
        return detached(check_tensor("weight", weight, shape, (torch.float32,), key.device))
    return check_number("weight", weight)


def check_bounds(cu_seqlens: Tensor | None, max_seqlen: int | None, key: Tensor) -> int | None:
    """Check the bounds of segments, which go with the longest length; return the number of segments."""
    if cu_seqlens is None or max_seqlen is None:
        if cu_seqlens is max_seqlen:
            return None
        missing = "cu_seqlens" if cu_seqlens is None else "max_seqlen"
        raise ValueError(f"{missing}: expected cu_seqlens and max_seqlen together, got None")
    check_tensor("cu_seqlens", cu_seqlens, ("S + 1",), (torch.int32,), key.device)
    check_integer("max_seqlen", max_seqlen, low=0)
    if not cu_seqlens.shape[0]:
        raise ValueError(f"cu_seqlens: expected at least one bound, got {describe(cu_seqlens)}")
    if cu_seqlens.device.type == "cpu" and is_plain((cu_seqlens,)):  # as in check_cpu
        bounds, tokens = cu_seqlens.tolist(), key.shape[2]
        if bounds != sorted(bounds) or (bounds[0], bounds[-1]) != (0, tokens):
            expected = f"bounds that rise from 0 to {tokens}"
            raise ValueError(f"cu_seqlens: expected {expected}, got {describe(bounds)}")
        longest = max((end - begin for begin, end in pairwise(bounds)), default=0)
        if max_seqlen < longest:
            expected = f"at least {longest}, the longest segment"
            raise ValueError(f"max_seqlen: expected {expected}, got {max_seqlen}")
    return cu_seqlens.shape[0] - 1


def check_segments(segments: Segments) -> None:
    if not isinstance(segments, Segments):
        raise TypeError(f"segments: expected hero_kernels.Segments, got {describe(segments)}")


def check_signals(
    signals: Sequence[TileSignal], segments: Segments, device: torch.device
) -> list[TileSignal]:
    checked = []
    if not isinstance(signals, Sequence) or not 1 <= len(signals) <= MAX_SIGNALS:
        raise ValueError(f"signals: expected 1 to {MAX_SIGNALS} TileSignals, got {describe(signals)}")
    for signal, names in zip(signals, _SIGNALS, strict=False):
        if not isinstance(signal, TileSignal):
            raise TypeError(f"{names[0]}: expected a TileSignal, got {describe(signal)}")
        values = check_tensor(names[1], signal.values, (segments.crops,), FLOATS, device)
        weight, temperature = check_number(names[2], signal.weight, low=0.0), signal.temperature
        if temperature is not None:
            temperature = check_number(names[3], temperature, positive=True)
        check_cpu(names[1], "finite numbers", values, _is_finite)
        checked.append(TileSignal(detached(values), weight, temperature))
    if not any(signal.weight for signal in checked):
        raise ValueError(f"signals: expected a weight > 0, got {[signal.weight for signal in checked]}")
    return checked


def check_cpu(name: str, expected: str, values: Tensor, fits: Callable[[Tensor], Tensor]) -> None:
    """Check values where this needs no synchronisation: on the CPU, outside compiled code."""
    if values.device.type != "cpu" or not is_plain((values,)):
        return
    if values.is_floating_point() and values.detach().sum(dtype=torch.float32).isfinite():  # then all are
        return
    fit = fits(values)
    if not fit.all():
        wrong = values[~fit]
        kind = "NaN" if torch.isnan(wrong).any() else "infinite" if wrong.isinf().any() else "wrong"
        raise ValueError(f"{name}: expected {expected}, got {len(wrong)} {kind} of {values.numel()}")


def _is_finite(values: Tensor) -> Tensor:
    return values.float().isfinite()


def check_numbers(name: str, values: Tensor) -> None:
    if not SWITCHES.interpret:  # the interpreter behaves as a GPU does
        check_cpu(name, "numbers", values, lambda values: ~torch.isnan(values))


def check_counts(name: str, counts: Tensor) -> None:
    check_cpu(name, "integers >= 0", counts, lambda counts: counts >= 0)
