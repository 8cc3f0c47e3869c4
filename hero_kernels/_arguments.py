"""Checks that several operations of :mod:`hero_kernels.ops` share: they raise as its docstring says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    INTEGERS,
    check_buffer,
    check_choice,
    check_integer,
    check_number,
    check_tensor,
    describe,
)
from ._dispatch import is_plain
from ._diverse import MOST_CANDIDATES, MOST_QUALITY, RULES
from ._env import SWITCHES
from .segments import MAX_SIGNALS, Segments, TileBudgets, TileSignal

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


def check_bounds(
    names: tuple[str, str], bounds: Tensor | None, most: int | None, total: int, device: torch.device
) -> int | None:
    """Check the bounds of segments, which go with the longest length; return the number of segments.

    Args:
        names: of the two arguments.
        total: the last bound.
    """
    if bounds is None or most is None:
        if bounds is most:
            return None
        missing = names[bounds is not None]
        raise ValueError(f"{missing}: expected {names[0]} and {names[1]} together, got None")
    check_tensor(names[0], bounds, ("S + 1",), (torch.int32,), device)
    check_integer(names[1], most, low=0)
    if not bounds.shape[0]:
        raise ValueError(f"{names[0]}: expected at least one bound, got {describe(bounds)}")
    if bounds.device.type == "cpu" and is_plain((bounds,)):  # as in check_cpu
        places = bounds.tolist()
        if places != sorted(places) or (places[0], places[-1]) != (0, total):
            expected = f"bounds that rise from 0 to {total}"
            raise ValueError(f"{names[0]}: expected {expected}, got {describe(places)}")
        longest = max((end - begin for begin, end in pairwise(places)), default=0)
        if most < longest:
            expected = f"at least {longest}, the longest segment"
            raise ValueError(f"{names[1]}: expected {expected}, got {most}")
    return bounds.shape[0] - 1


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


def check_finite(name: str, values: Tensor) -> None:
    if not SWITCHES.interpret:  # as check_numbers
        check_cpu(name, "finite numbers", values, _is_finite)


def check_counts(name: str, counts: Tensor) -> None:
    check_cpu(name, "integers >= 0", counts, lambda counts: counts >= 0)


def check_diverse(
    features: Tensor,
    budgets: Tensor,
    rule: str,
    quality: Tensor | None,
    valid: Tensor | None,
    cu_crops: Tensor | None,
    max_crops: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments of ``segmented_diverse_topk``; return features and quality, detached."""
    check_tensor("features", features, ("T", "P", "D"), FLOATS)
    (crops, patches, width), device = features.shape, features.device
    if not width:
        raise ValueError(f"features: expected at least one feature, got {describe(features)}")
    check_choice("rule", rule, tuple(RULES))
    count = check_bounds(("cu_crops", "max_crops"), cu_crops, max_crops, crops, device)
    name, most = ("features", 1) if max_crops is None else ("max_crops", max_crops)
    if most * patches > MOST_CANDIDATES:
        given = f"{most} · {patches}"
        raise ValueError(f"{name}: expected at most {MOST_CANDIDATES} candidates a segment, got {given}")
    check_tensor("budgets", budgets, (crops if count is None else count,), INTEGERS, device)
    check_counts("budgets", budgets)
    if valid is not None:
        check_tensor("valid", valid, (crops, patches), (torch.bool,), device)
    if quality is not None:
        if rule == "max_min":
            raise ValueError(f"quality: expected None with rule 'max_min', got {describe(quality)}")
        check_tensor("quality", quality, (crops, patches), (torch.float32,), device)
    check_finite("features", features)
    if quality is not None and not SWITCHES.interpret:  # as check_numbers
        fits = (quality >= 0) & (quality <= MOST_QUALITY)
        check_cpu("quality", "numbers from 0 to 2⁶⁰", fits, lambda fits: fits)
    return detached(features), quality if quality is None else detached(quality)


def check_gather(
    features: Tensor,
    scores: Tensor,
    segments: Segments,
    valid: Tensor | None,
    budgets: TileBudgets | None,
    signals: Sequence[TileSignal] | None,
    ranks: Tensor | None,
    valid_counts: Tensor | None,
) -> list[TileSignal] | None:
    """Check the arguments of ``segmented_topk_gather``; return the signals, if given, checked."""
    check_segments(segments)
    check_tensor("scores", scores, (segments.crops, segments.patches), FLOATS)
    device, checked = scores.device, None
    check_tensor("features", features, (segments.crops, segments.patches, "D"), FLOATS, device)
    if valid is not None:
        check_tensor("valid", valid, tuple(scores.shape), (torch.bool,), device)
    if ranks is not None:
        check_tensor("ranks", ranks, tuple(scores.shape), (torch.int16,), device)
    if valid_counts is not None:
        check_tensor("valid_counts", valid_counts, (segments.crops,), INTEGERS, device)
        check_counts("valid_counts", valid_counts)
    if (budgets is None) == (signals is None):
        given = "none" if budgets is None else "both"
        raise ValueError(f"budgets: expected either budgets or signals, got {given}")
    if signals is not None:
        checked = check_signals(signals, segments, device)
    elif not isinstance(budgets, TileBudgets):
        raise TypeError(f"budgets: expected TileBudgets, got {describe(budgets)}")
    else:
        check_tensor("budgets.budgets", budgets.budgets, (segments.crops,), INTEGERS, device)
        check_counts("budgets.budgets", budgets.budgets)
    check_numbers("scores", scores)
    check_numbers("features", features)
    return checked
