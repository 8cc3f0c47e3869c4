"""The public operations: check the arguments, then run the kernel or the twin of the device.

Plain tensors in eager mode go straight to the implementation. Whatever has to see the operation as one,
``torch.compile``, fake tensors, dispatch modes, autograd around a kernel, gets the operator registered in
:mod:`hero_kernels._library`, whose implementation comes back to :func:`_run`.

A device without kernels runs the PyTorch twins of :mod:`hero_kernels.reference`; :func:`implementations`
tells which, and ``HERO_REQUIRE_KERNEL=1`` turns that into an error on accelerators.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import _library, reference
from ._checks import FLOATS, INTEGERS, check_number, check_tensor, describe
from ._env import SWITCHES
from .segments import MAX_SIGNALS, Finalized, Gathered, Segments, TileBudgets, TileSignal, check_allocation

__all__ = [
    "attention_with_cls",
    "cls_attention",
    "finalize_scores",
    "implementations",
    "received_attention",
    "segmented_topk",
    "segmented_topk_gather",
    "tile_budgets",
]

_MODULES = {  # operation -> module of hero_kernels.kernels that launches its kernel
    "attention_with_cls": "attention",
    "cls_attention": "cls_attention",
    "finalize_scores": "finalize",
    "received_attention": "received_attention",
    "segmented_topk": "topk",
    "segmented_topk_gather": "topk_gather",
    "tile_budgets": "budgets",
}


@cache
def _launcher(name: str) -> Callable | None:
    """What launches the kernel of an operation, with the twin's signature; ``None`` without Triton."""
    try:
        module = importlib.import_module(f"{__package__}.kernels.{_MODULES[name]}")
    except ImportError as error:
        if not (error.name or "").startswith("triton"):
            raise
        warnings.warn(f"hero_kernels: no Triton ({error}), the PyTorch twins run instead", stacklevel=2)
        return None
    return getattr(module, name)


def _kernel(name: str, device_type: str) -> Callable | None:
    """The kernel that serves an operation on a device type, if any."""
    if SWITCHES.reference or not (device_type == "cuda" or (device_type == "cpu" and SWITCHES.interpret)):
        return None
    return _launcher(name)


def _run(name: str, device: torch.device, *arguments, **options):
    """Run the kernel of an operation, or its twin."""
    kernel = _kernel(name, device.type)
    if kernel is not None:
        return kernel(*arguments, **options)
    if SWITCHES.require_kernel and device.type != "cpu":
        raise RuntimeError(
            f"hero_kernels.{name}: HERO_REQUIRE_KERNEL is set and {device.type!r} has no kernel"
        )
    return getattr(reference, name)(*arguments, **options)


def implementations(device: str = "cpu") -> dict[str, str]:
    """``{operation: "kernel" or "reference"}`` on a device type such as ``"cpu"`` or ``"cuda"``."""
    return {name: "kernel" if _kernel(name, device) else "reference" for name in reference.__all__}


def _plain(tensors: Sequence[Tensor | None], gradient_of: Sequence[Tensor] = ()) -> bool:
    """Whether an implementation can be called as it is; ``gradient_of`` are what autograd runs through."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    if any(tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return False
    if not any(tensor.requires_grad for tensor in gradient_of) or not torch.is_grad_enabled():
        return True
    return _kernel("cls_attention", gradient_of[0].device.type) is None  # twins are differentiable


def _check_attention(query: Tensor, key: Tensor, scale: float, *, rows: bool) -> None:
    key = check_tensor("key", key, ("T", "H", "N", "D"), FLOATS)
    crops, heads, tokens, width = key.shape
    check_tensor(
        "query", query, (crops, heads, "N or 1" if rows else tokens, width), (key.dtype,), key.device
    )
    if rows and query.shape[2] not in (1, tokens):
        raise ValueError(f"query: expected {tokens} rows or the CLS row alone, got {describe(query)}")
    if tokens < 1 + rows:
        raise ValueError(f"key: expected at least {1 + rows} tokens a crop, got {describe(key)}")
    check_number("scale", scale)


def _check_accumulation(weight: float | Tensor, out: Tensor | None, key: Tensor, size: int) -> None:
    crops, heads = key.shape[:2]
    if isinstance(weight, Tensor):
        check_tensor("weight", weight, (crops,), (torch.float32,), key.device)
    else:
        check_number("weight", weight)
    if out is not None:
        check_tensor("out", out, (crops, heads, size), (torch.float32,), key.device)


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")


def cls_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
    second_softmax: bool = False,
) -> Tensor:
    _check_attention(query, key, scale, rows=True)
    _check_flag("second_softmax", second_softmax)
    _check_accumulation(weight, out, key, key.shape[2] - 1)
    query, key = query.detach(), key.detach()
    options = {"weight": weight, "out": out, "second_softmax": second_softmax}
    if _plain((query, key, out)):
        return _run("cls_attention", key.device, query, key, scale, **options)
    return _library.cls_attention(query, key, scale, **options)


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
    if key.shape[2] < 2:
        raise ValueError(f"key: expected at least 2 tokens a crop, got {describe(key)}")
    _check_flag("second_softmax", second_softmax)
    _check_accumulation(weight, out, key, key.shape[2] - 1)
    options = {"weight": weight, "out": out, "second_softmax": second_softmax}
    if _plain((query, key, value, out), (query, key, value)):
        return _run("attention_with_cls", key.device, query, key, value, scale, **options)
    return _library.attention_with_cls(query, key, value, scale, **options)


def received_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    weight: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    _check_attention(query, key, scale, rows=False)
    _check_accumulation(weight, out, key, key.shape[2])
    query, key = query.detach(), key.detach()
    options = {"weight": weight, "out": out}
    if _plain((query, key, out)):
        return _run("received_attention", key.device, query, key, scale, **options)
    return _library.received_attention(query, key, scale, **options)


def finalize_scores(rows: Tensor, *, valid: Tensor | None = None, rank: bool = False) -> Finalized:
    check_tensor("rows", rows, ("T", "H", "P"), (torch.float32,))
    if not rows.shape[1]:
        raise ValueError(f"rows: expected at least one head, got {describe(rows)}")
    if valid is not None:
        check_tensor("valid", valid, (rows.shape[0], rows.shape[2]), (torch.bool,), rows.device)
    _check_flag("rank", rank)
    if rank and rows.shape[2] > torch.iinfo(torch.int16).max:
        raise ValueError(f"rows: expected at most 32767 patches to rank, got {describe(rows)}")
    rows = rows.detach()
    if _plain((rows, valid)):
        return _run("finalize_scores", rows.device, rows, valid=valid, rank=rank)
    return _library.finalize_scores(rows, valid=valid, rank=rank)


def _check_segments(segments: Segments) -> None:
    if not isinstance(segments, Segments):
        raise TypeError(f"segments: expected hero_kernels.Segments, got {describe(segments)}")


def _check_signals(signals: Sequence[TileSignal], segments: Segments, device: torch.device) -> None:
    if not isinstance(signals, Sequence) or not 1 <= len(signals) <= MAX_SIGNALS:
        raise ValueError(f"signals: expected 1 to {MAX_SIGNALS} TileSignals, got {describe(signals)}")
    for number, signal in enumerate(signals):
        name = f"signals[{number}]"
        if not isinstance(signal, TileSignal):
            raise TypeError(f"{name}: expected a TileSignal, got {describe(signal)}")
        check_tensor(f"{name}.values", signal.values, (segments.crops,), FLOATS, device)
        check_number(f"{name}.weight", signal.weight, low=0.0)
        if signal.temperature is not None:
            check_number(f"{name}.temperature", signal.temperature, positive=True)
        _check_cpu(f"{name}.values", "finite numbers", signal.values, torch.isfinite)
    if sum(signal.weight for signal in signals) <= 0:
        raise ValueError(f"signals: expected a weight > 0, got {[signal.weight for signal in signals]}")


def _check_cpu(name: str, expected: str, values: Tensor, fits: Callable[[Tensor], Tensor]) -> None:
    """Check values where no one has to wait for the answer: on the CPU, outside compiled code."""
    if values.device.type != "cpu" or not _plain((values,)):
        return
    if values.is_floating_point() and values.detach().sum().isfinite():  # so are all values
        return
    fit = fits(values)
    if not fit.all():
        wrong = values[~fit]
        kind = "NaN" if torch.isnan(wrong).any() else "infinite" if wrong.isinf().any() else "wrong"
        raise ValueError(f"{name}: expected {expected}, got {len(wrong)} {kind} of {values.numel()}")


def _check_numbers(name: str, values: Tensor) -> None:
    if not SWITCHES.interpret:  # there a CPU does what a GPU would
        _check_cpu(name, "numbers", values, lambda values: ~torch.isnan(values))


def _check_counts(name: str, counts: Tensor) -> None:
    _check_cpu(name, "integers >= 0", counts, lambda counts: counts >= 0)


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
    _check_counts("valid_counts", valid_counts)
    _check_signals(signals, segments, valid_counts.device)
    signals = _detached(signals)
    if _plain((valid_counts, *(signal.values for signal in signals))):
        return _run(
            "tile_budgets", valid_counts.device, signals, valid_counts, segments, allocation=allocation
        )
    return _library.tile_budgets(signals, valid_counts, segments, allocation=allocation)


def _detached(signals: Sequence[TileSignal]) -> list[TileSignal]:
    return [signal._replace(values=signal.values.detach()) for signal in signals]


def segmented_topk(scores: Tensor, budgets: Tensor, valid: Tensor | None = None) -> Tensor:
    check_tensor("scores", scores, ("T", "P"), FLOATS)
    check_tensor("budgets", budgets, (scores.shape[0],), INTEGERS, scores.device)
    if valid is not None:
        check_tensor("valid", valid, tuple(scores.shape), (torch.bool,), scores.device)
    _check_counts("budgets", budgets)
    _check_numbers("scores", scores)
    scores = scores.detach()
    if _plain((scores, budgets, valid)):
        return _run("segmented_topk", scores.device, scores, budgets, valid)
    return _library.segmented_topk(scores, budgets, valid)


def segmented_topk_gather(
    features: Tensor,
    scores: Tensor,
    segments: Segments,
    *,
    valid: Tensor | None = None,
    budgets: TileBudgets | None = None,
    signals: Sequence[TileSignal] | None = None,
    allocation: str = "exact",
    ranks: Tensor | None = None,
    valid_counts: Tensor | None = None,
) -> Gathered:
    _check_segments(segments)
    check_allocation(allocation)
    check_tensor("scores", scores, (segments.crops, segments.patches), FLOATS)
    device = scores.device
    check_tensor("features", features, (segments.crops, segments.patches, "D"), FLOATS, device)
    if valid is not None:
        check_tensor("valid", valid, tuple(scores.shape), (torch.bool,), device)
    if ranks is not None:
        check_tensor("ranks", ranks, tuple(scores.shape), (torch.int16,), device)
    if valid_counts is not None:
        check_tensor("valid_counts", valid_counts, (segments.crops,), INTEGERS, device)
    if (budgets is None) == (signals is None):
        raise ValueError(
            "budgets: expected either budgets or signals, got " + ("both", "none")[budgets is None]
        )
    if signals is not None:
        _check_signals(signals, segments, device)
        signals = _detached(signals)
    elif not isinstance(budgets, TileBudgets):
        raise TypeError(f"budgets: expected TileBudgets, got {describe(budgets)}")
    else:
        check_tensor("budgets.budgets", budgets.budgets, (segments.crops,), INTEGERS, device)
        _check_counts("budgets.budgets", budgets.budgets)
    _check_numbers("scores", scores)
    _check_numbers("features", features)
    scores = scores.detach()
    options = {
        "valid": valid,
        "budgets": budgets,
        "signals": signals,
        "allocation": allocation,
        "ranks": ranks,
        "valid_counts": valid_counts,
    }
    given = (valid, ranks, valid_counts, *(budgets or ()), *(signal.values for signal in signals or ()))
    if _plain((features, scores, *given), (features,)):
        return _run("segmented_topk_gather", device, features, scores, segments, **options)
    return _library.segmented_topk_gather(features, scores, segments, **options)


for _name in reference.__all__:
    globals()[_name].__doc__ = getattr(reference, _name).__doc__
