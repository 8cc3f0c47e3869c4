"""The public operations: check the arguments, choose an implementation by device, run it.

A device without an entry in ``_KERNELS`` runs the PyTorch twin of :mod:`hero_kernels.reference`;
:func:`implementations` tells which, and ``HERO_REQUIRE_KERNEL=1`` turns that into an error on
accelerators. Kernels register here, callers never change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, INTEGERS, check_number, check_tensor, describe
from ._env import SWITCHES
from .segments import Gathered, Segments, TileBudgets, TileSignal, check_allocation

__all__ = [
    "attention_with_cls",
    "cls_attention",
    "implementations",
    "received_attention",
    "segmented_topk",
    "segmented_topk_gather",
    "tile_budgets",
]

_KERNELS: dict[tuple[str, str], Callable] = {}  # (operation, device type) -> same signature as the twin


def _implementation(name: str, device: torch.device) -> Callable:
    kernel = None if SWITCHES.reference else _KERNELS.get((name, device.type))
    if kernel is not None:
        return kernel
    if SWITCHES.require_kernel and device.type != "cpu":
        raise RuntimeError(
            f"hero_kernels.{name}: HERO_REQUIRE_KERNEL is set and {device.type!r} has no kernel"
        )
    return getattr(reference, name)


def implementations(device: str = "cpu") -> dict[str, str]:
    """``{operation: "kernel" or "reference"}`` on a device type such as ``"cpu"`` or ``"cuda"``."""
    return {
        name: "kernel" if (name, device) in _KERNELS and not SWITCHES.reference else "reference"
        for name in reference.__all__
    }


def _check_attention(query: Tensor, key: Tensor, scale: float, *, rows: bool) -> None:
    key = check_tensor("key", key, ("T", "H", "N", "D"), FLOATS)
    crops, heads, tokens, width = key.shape
    check_tensor(
        "query", query, (crops, heads, "N or 1" if rows else tokens, width), (key.dtype,), key.device
    )
    if rows:
        _check_rows("query", query, tokens)
    if tokens < 1 + rows:
        raise ValueError(f"key: expected at least {1 + rows} tokens a crop, got {describe(key)}")
    check_number("scale", scale)


def _check_rows(name: str, values: Tensor, tokens: int) -> None:
    if values.shape[2] not in (1, tokens):
        raise ValueError(f"{name}: expected {tokens} rows or the CLS row alone, got {describe(values)}")


def _check_accumulation(weight: float | Tensor, out: Tensor | None, crops: int, size: int, device) -> None:
    if isinstance(weight, Tensor):
        check_tensor("weight", weight, (crops,), (torch.float32,), device)
    else:
        check_number("weight", weight)
    if out is not None:
        check_tensor("out", out, (crops, size), (torch.float32,), device)


def cls_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    lse: Tensor | None = None,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
    second_softmax: bool = False,
) -> Tensor:
    _check_attention(query, key, scale, rows=True)
    crops, heads, tokens, _ = key.shape
    _check_accumulation(weight, out, crops, tokens - 1, key.device)
    if lse is not None:
        check_tensor("lse", lse, (crops, heads, "N or 1"), FLOATS, key.device)
        _check_rows("lse", lse, tokens)
    run = _implementation("cls_attention", key.device)
    return run(query, key, scale, lse=lse, weight=weight, out=out, second_softmax=second_softmax)


def attention_with_cls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
    second_softmax: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_attention(query, key, scale, rows=False)
    check_tensor("value", value, tuple(key.shape), (key.dtype,), key.device)
    _check_accumulation(weight, out, key.shape[0], key.shape[2] - 1, key.device)
    run = _implementation("attention_with_cls", key.device)
    return run(query, key, value, scale, weight=weight, out=out, second_softmax=second_softmax)


def received_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    _check_attention(query, key, scale, rows=False)
    _check_accumulation(weight, out, key.shape[0], key.shape[2], key.device)
    return _implementation("received_attention", key.device)(query, key, scale, weight=weight, out=out)


def _check_segments(segments: Segments) -> None:
    if not isinstance(segments, Segments):
        raise TypeError(f"segments: expected hero_kernels.Segments, got {describe(segments)}")


def _check_signals(signals: Sequence[TileSignal], segments: Segments, device: torch.device) -> None:
    if not isinstance(signals, Sequence) or not signals:
        raise ValueError(f"signals: expected at least one TileSignal, got {describe(signals)}")
    for number, signal in enumerate(signals):
        name = f"signals[{number}]"
        if not isinstance(signal, TileSignal):
            raise TypeError(f"{name}: expected a TileSignal, got {describe(signal)}")
        check_tensor(f"{name}.values", signal.values, (segments.crops,), FLOATS, device)
        check_number(f"{name}.weight", signal.weight, low=0.0)
        _check_cpu(f"{name}.values", "finite numbers", signal.values, torch.isfinite)
        if signal.temperature is not None:
            check_number(f"{name}.temperature", signal.temperature, positive=True)
    if sum(signal.weight for signal in signals) <= 0:
        raise ValueError(f"signals: expected a weight > 0, got {[signal.weight for signal in signals]}")


def _check_cpu(name: str, expected: str, values: Tensor, fits: Callable[[Tensor], Tensor]) -> None:
    if values.device.type != "cpu":  # there the answer would have to be waited for
        return
    fit = fits(values)
    if not fit.all():
        wrong = values[~fit]
        kind = "NaN" if torch.isnan(wrong).any() else "infinite"
        raise ValueError(f"{name}: expected {expected}, got {len(wrong)} {kind} of {values.numel()}")


def _check_numbers(name: str, values: Tensor) -> None:
    _check_cpu(name, "numbers", values, lambda values: ~torch.isnan(values))


def tile_budgets(
    signals: Sequence[TileSignal],
    valid_counts: Tensor,
    segments: Segments,
    *,
    allocation: str = "exact",
) -> TileBudgets:
    _check_segments(segments)
    check_allocation(allocation)
    check_tensor("valid_counts", valid_counts, (segments.crops,), INTEGERS)
    _check_signals(signals, segments, valid_counts.device)
    run = _implementation("tile_budgets", valid_counts.device)
    return run(signals, valid_counts, segments, allocation=allocation)


def segmented_topk(scores: Tensor, budgets: Tensor, valid: Tensor | None = None) -> Tensor:
    check_tensor("scores", scores, ("T", "P"), FLOATS)
    check_tensor("budgets", budgets, (scores.shape[0],), INTEGERS, scores.device)
    if valid is not None:
        check_tensor("valid", valid, tuple(scores.shape), (torch.bool,), scores.device)
    _check_numbers("scores", scores)
    return _implementation("segmented_topk", scores.device)(scores, budgets, valid)


def segmented_topk_gather(
    features: Tensor,
    scores: Tensor,
    segments: Segments,
    *,
    valid: Tensor | None = None,
    budgets: TileBudgets | None = None,
    signals: Sequence[TileSignal] | None = None,
    allocation: str = "exact",
) -> Gathered:
    _check_segments(segments)
    check_allocation(allocation)
    check_tensor("scores", scores, (segments.crops, segments.patches), FLOATS)
    check_tensor("features", features, (segments.crops, segments.patches, "D"), FLOATS, scores.device)
    if valid is not None:
        check_tensor("valid", valid, tuple(scores.shape), (torch.bool,), scores.device)
    if (budgets is None) == (signals is None):
        raise ValueError(
            "budgets: expected either budgets or signals, got " + ("both", "none")[budgets is None]
        )
    if signals is not None:
        _check_signals(signals, segments, scores.device)
    elif not isinstance(budgets, TileBudgets):
        raise TypeError(f"budgets: expected TileBudgets, got {describe(budgets)}")
    else:
        check_tensor("budgets.budgets", budgets.budgets, (segments.crops,), INTEGERS, scores.device)
    _check_numbers("scores", scores)
    _check_numbers("features", features)
    run = _implementation("segmented_topk_gather", scores.device)
    return run(
        features, scores, segments, valid=valid, budgets=budgets, signals=signals, allocation=allocation
    )


for _name in reference.__all__:
    globals()[_name].__doc__ = getattr(reference, _name).__doc__
