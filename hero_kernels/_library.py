"""The operations as operators of torch, ``torch.ops.hero_kernels.*``: schemas, fakes, gradients.

Schemas follow from the signatures in :mod:`hero_kernels.reference`. They carry no dataclasses: segments
become integers and their table, signals become lists. An operation with an ``out`` buffer has a second
operator, ``name_``, that adds to it. Each operator runs the kernel or the reference, as in eager mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import _dispatch, reference
from .segments import Finalized, Gathered, Segments, TileBudgets, TileSignal, segments_of

_LIBRARY = torch.library.Library("hero_kernels", "DEF")
_OPERATORS = torch.ops.hero_kernels
_BUDGETS = (torch.int32, torch.float32, torch.int32)  # dtypes of TileBudgets

# --- arguments of a schema -------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """How an argument travels through a schema: what stands there, and the way there and back."""

    schema: str
    pack: Callable[[Any, torch.device], tuple]
    unpack: Callable[..., Any]


def _as_is(kind: str) -> _Kind:
    return _Kind(kind + " {}", lambda value, _: (value,), lambda value: value)


def _pack_weight(weight: float | Tensor, _) -> tuple[float, Tensor | None]:
    return (0.0, weight) if isinstance(weight, Tensor) else (float(weight), None)


def _pack_segments(segments: Segments, device: torch.device) -> tuple[list[int], int, Tensor]:
    return list(segments.numbers), segments.side, segments.table(device)


def _unpack_segments(numbers: list[int], side: int, table: Tensor) -> Segments:
    return segments_of(tuple(numbers), side).bound(table)


def _pack_signals(signals: Sequence[TileSignal] | None, _) -> tuple[list, list, list]:
    """A temperature of 0 stands for none, an empty list for no signals."""
    signals = signals or []
    return (
        [signal.values for signal in signals],
        [float(signal.weight) for signal in signals],
        [float(signal.temperature or 0.0) for signal in signals],
    )


def _unpack_signals(values: list, weights: list, temperatures: list) -> list[TileSignal] | None:
    columns = zip(values, weights, temperatures, strict=True)
    signals = [TileSignal(value, weight, temperature or None) for value, weight, temperature in columns]
    return signals or None


_SIGNALS = _Kind("Tensor[] {0}, float[] {0}_weights, float[] temperatures", _pack_signals, _unpack_signals)
_KINDS = {  # by annotation
    "Tensor": _as_is("Tensor"),
    "Tensor | None": _as_is("Tensor?"),
    "float": _Kind("float {}", lambda value, _: (float(value),), lambda value: value),
    "int | None": _as_is("SymInt?"),  # compiled code serves any
    "bool": _as_is("bool"),
    "str": _as_is("str"),
    "float | Tensor": _Kind(
        "float {0}, Tensor? {0}s", _pack_weight, lambda number, tensor: number if tensor is None else tensor
    ),
    "Segments": _Kind("int[] images, int side, Tensor table", _pack_segments, _unpack_segments),
    "Sequence[TileSignal]": _SIGNALS,
    "Sequence[TileSignal] | None": _SIGNALS,
    "TileBudgets | None": _Kind(
        "Tensor? {}",
        lambda budgets, _: (None if budgets is None else budgets.budgets,),
        lambda budgets: None if budgets is None else TileBudgets(budgets, None, None),
    ),
}
_PARAMETERS = {
    name: {
        parameter.name: _KINDS[parameter.annotation]
        for parameter in inspect.signature(getattr(reference, name)).parameters.values()
        if parameter.name != "out"
    }
    for name in reference.__all__
}


def _schema(name: str) -> str:
    return ", ".join(kind.schema.format(key) for key, kind in _PARAMETERS[name].items())


def pack(name: str, device: torch.device, arguments: dict[str, Any]) -> list:
    """The arguments of an operation but ``out``, as its operator takes them."""
    return [x for key, kind in _PARAMETERS[name].items() for x in kind.pack(arguments[key], device)]


def _unpack(name: str, flat: tuple) -> dict[str, Any]:
    values, arguments = iter(flat), {}
    for key, kind in _PARAMETERS[name].items():
        count = kind.schema.count(",") + 1
        arguments[key] = kind.unpack(*(next(values) for _ in range(count)))
    return arguments


def _device(arguments: dict[str, Any]) -> torch.device:
    return next(value for value in arguments.values() if isinstance(value, Tensor)).device


# --- registration ----------------------------------------------------------------------------------------


def _define(name: str, schema: str, implementation: Callable, fake: Callable) -> None:
    """Register an operator for every device."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hero_kernels::{name}", fake, lib=_LIBRARY)


def _run(name: str, out: Tensor | None = None, **arguments):
    more = {"out": out} if name in _WITH_OUT else {}
    return _dispatch.run(name, _device(arguments), **arguments, **more)


def _register(name: str, returns: str, fake: Callable, run: Callable | None = None) -> None:
    """Define the operator of an operation; ``run`` and ``fake`` take the operation's own arguments."""
    run = run or partial(_run, name)
    _define(
        name,
        f"({_schema(name)}) -> {returns}",
        lambda *flat: run(**_unpack(name, flat)),
        lambda *flat: fake(**_unpack(name, flat)),
    )


def _register_out(name: str) -> None:
    """Define the operator that adds to ``out``, its first argument."""

    def add(out, *flat):
        _run(name, out=out, **_unpack(name, flat))

    _define(f"{name}_", f"(Tensor(a!) out, {_schema(name)}) -> ()", add, lambda *_: None)


def _register_gradient(name: str, saved: Callable, backward: Callable, count: int) -> None:
    """Gradients of the first result with respect to the first ``count`` tensors.

    ``saved(ctx, arguments, output)`` saves what ``backward(ctx, grad)`` needs to compute them.
    """

    def context(ctx, inputs, output):
        saved(ctx, _unpack(name, inputs), output)
        ctx.others = [no_gradient(value) for value in inputs[count:]]
        ctx.mark_non_differentiable(*output[1:])

    def gradients(ctx, grad, *_):
        return *backward(ctx, grad), *ctx.others

    torch.library.register_autograd(f"hero_kernels::{name}", gradients, setup_context=context, lib=_LIBRARY)


def no_gradient(value):
    """``None``; one for each tensor of a list; an empty list of numbers counts as a list of tensors."""
    is_tensors = isinstance(value, (list, tuple)) and all(isinstance(x, Tensor) for x in value)
    return [None] * len(value) if is_tensors else None


# --- the operations --------------------------------------------------------------------------------------

_WITH_OUT = ("cls_attention", "attention_with_cls", "received_attention")


def _cls_rows(key: Tensor, **_) -> Tensor:
    return key.new_empty((*key.shape[:2], key.shape[2] - 1), dtype=torch.float32)


def _attention_with_cls(**arguments):
    output, rows = _run("attention_with_cls", **arguments)
    # The memory of [T, N, H, D], as the layer after attention expects it.
    return output.transpose(1, 2).contiguous().transpose(1, 2), rows


def _attention_with_cls_fake(key, **_):
    crops, heads, tokens, width = key.shape
    return key.new_empty((crops, tokens, heads, width)).transpose(1, 2), _cls_rows(key)


def _save_attention(ctx, arguments, output):
    ctx.scale = arguments["scale"]
    ctx.save_for_backward(arguments["query"], arguments["key"], arguments["value"])


def _attention_backward(ctx, grad):
    """Gradients of plain attention, which is computed again: its maps were never stored.

    With ``create_graph`` they are differentiable in turn; of PyTorch's backends only the math backend can.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if again else nullcontext():
        inputs = [tensor.view_as(tensor).requires_grad_() for tensor in ctx.saved_tensors]
        output = torch.nn.functional.scaled_dot_product_attention(*inputs, scale=ctx.scale)
        return torch.autograd.grad(output, inputs, grad, create_graph=again)


def _finalize_scores(rows, rank, **arguments):
    scores, entropy, ranks = _run("finalize_scores", rows=rows, rank=rank, **arguments)
    return scores, entropy, ranks if rank else rows.new_empty((rows.shape[0], 0), dtype=torch.int16)


def _finalize_scores_fake(rows, rank, **_):
    crops, _, patches = rows.shape
    ranks = rows.new_empty((crops, patches if rank else 0), dtype=torch.int16)
    return rows.new_empty((crops, patches)), rows.new_empty((crops,)), ranks


def _budgets_fake(tensor: Tensor, crops: int) -> Iterator[Tensor]:
    return (tensor.new_empty((crops,), dtype=dtype) for dtype in _BUDGETS)


def _gather(**arguments):
    result, segments = _run("segmented_topk_gather", **arguments), arguments["segments"]
    made = result.budgets
    if arguments["budgets"] is not None:  # an operator must not return its input
        made = (result.index.new_empty(0, dtype=dtype) for dtype in _BUDGETS)
    return *_promised(result, segments), *made


def _promised(result: Gathered, segments: Segments) -> tuple[Tensor, Tensor]:
    """Tokens and index at the lengths that the segments promise; the reference's depend on the data."""
    if result.lengths == segments.lengths:
        return result.tokens, result.index
    tokens = result.tokens.new_zeros((segments.total, result.tokens.shape[1]))
    index = result.index.new_full((len(tokens),), -2)
    begin, place = 0, 0
    for length, promised in zip(result.lengths, segments.lengths, strict=True):
        kept = min(length, promised)
        tokens[place : place + kept] = result.tokens[begin : begin + kept]
        index[place : place + kept] = result.index[begin : begin + kept]
        begin, place = begin + length, place + promised
    return tokens, index


def _gather_fake(features, segments, budgets, **_):
    total = segments.total
    tokens = features.new_empty((total, features.shape[2]))
    index = features.new_empty((total,), dtype=torch.int32)
    return tokens, index, *_budgets_fake(features, features.shape[0] if budgets is None else 0)


def _save_gather(ctx, arguments, output):
    ctx.shape = arguments["features"].shape
    ctx.save_for_backward(output[1])


def features_gradient(grad: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of each row goes to the row's source: ``crop · P + patch``, negative for none. No two rows
    have the same source.

    Args:
        shape: of the features, ``[T, P, D]``.
    """
    crops, patches, width = shape
    place = torch.where(index < 0, crops * patches, index).long()
    features = grad.new_zeros((crops * patches + 1, width)).index_copy_(0, place, grad)
    return features[:-1].view(shape)


def _gather_backward(ctx, grad):
    return (features_gradient(grad, *ctx.saved_tensors, ctx.shape),)


_register("cls_attention", "Tensor", _cls_rows)
_register_out("cls_attention")
_register("attention_with_cls", "(Tensor, Tensor)", _attention_with_cls_fake, _attention_with_cls)
_register_gradient("attention_with_cls", _save_attention, _attention_backward, 3)
_register("received_attention", "Tensor", lambda key, **_: key.new_empty(key.shape[:3], dtype=torch.float32))
_register_out("received_attention")
_register("finalize_scores", "(Tensor, Tensor, Tensor)", _finalize_scores_fake, _finalize_scores)
_register(
    "tile_budgets",
    "(Tensor, Tensor, Tensor)",
    lambda valid_counts, **_: tuple(_budgets_fake(valid_counts, valid_counts.shape[0])),
    lambda **arguments: tuple(_run("tile_budgets", **arguments)),
)
_register(
    "rarity",
    "Tensor",
    lambda features, **_: features.new_empty(features.shape[:2], dtype=torch.float32),
)
_register("segmented_topk", "Tensor", lambda scores, **_: scores.new_empty(scores.shape, dtype=torch.bool))
_register(
    "segmented_diverse_topk",
    "Tensor",
    lambda features, **_: features.new_empty(features.shape[:2], dtype=torch.int16),
)
_register("segmented_topk_gather", "(Tensor, Tensor, Tensor, Tensor, Tensor)", _gather_fake, _gather)
_register_gradient("segmented_topk_gather", _save_gather, _gather_backward, 1)


def call(name: str, device: torch.device, **arguments):
    """Call the operator of an operation on checked arguments: what the operation returns.

    Raises:
        ValueError: an allocation whose number of tokens depends on the data.
    """
    out = arguments.pop("out", None)
    if name == "segmented_topk_gather" and arguments["allocation"] != "exact":
        raise ValueError(
            "allocation: expected 'exact' under torch.compile and where gradients run through a kernel, "
            f"since with others the number of tokens depends on the data, got {arguments['allocation']!r}"
        )
    flat = pack(name, device, arguments)
    if out is not None and name != "attention_with_cls":
        getattr(_OPERATORS, f"{name}_")(out, *flat)
        return out
    result = getattr(_OPERATORS, name)(*flat)
    if name == "attention_with_cls":
        output, rows = result
        return output, rows.detach() if out is None else out.add_(rows.detach())
    if name == "finalize_scores":
        scores, entropy, ranks = result
        return Finalized(scores, entropy, ranks if arguments["rank"] else None)
    if name == "tile_budgets":
        return TileBudgets(*result)
    if name == "segmented_topk_gather":
        tokens, index, *made = result
        budgets = TileBudgets(*made) if arguments["budgets"] is None else arguments["budgets"]
        return Gathered(tokens, index, arguments["segments"].lengths, budgets)
    return result
