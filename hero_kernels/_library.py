"""The operations as operators of torch: schemas, fakes, gradients. ``torch.ops.hero_kernels.*``.

Schemas carry no dataclasses: segments travel as integers (``Segments.numbers``) and their table, signals
as lists. Each operator runs the kernel or the twin of its device, as in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .segments import Finalized, Gathered, Segments, TileBudgets, TileSignal, segments_of

_LIBRARY = torch.library.Library("hero_kernels", "DEF")
_OPERATORS = torch.ops.hero_kernels
_LAYER = "Tensor? weights, float weight"  # one weight a crop, or one for all


def _operator(schema: str, implementation: Callable, fake: Callable) -> None:
    """Register an operator for every device."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hero_kernels::{name}", fake, lib=_LIBRARY)


def _run(name: str, device: torch.device, *arguments, **options):
    from . import _ops  # which imports this module

    return _ops._run(name, device, *arguments, **options)


def _split(weight: float | Tensor) -> tuple[Tensor | None, float]:
    return (weight, 0.0) if isinstance(weight, Tensor) else (None, float(weight))


def _joined(weights: Tensor | None, weight: float) -> float | Tensor:
    return weight if weights is None else weights


def _token_major(output: Tensor) -> Tensor:
    """``[T, H, N, D]`` with the memory of ``[T, N, H, D]``, as the layer after attention wants it."""
    return output.transpose(1, 2).contiguous().transpose(1, 2)


# --- attention -------------------------------------------------------------------------------------------


def _cls_attention(query, key, scale, weights, weight, second_softmax):
    weight = _joined(weights, weight)
    return _run("cls_attention", key.device, query, key, scale, weight=weight, second_softmax=second_softmax)


def _cls_attention_fake(query, key, scale, weights, weight, second_softmax):
    return key.new_empty((*key.shape[:2], key.shape[2] - 1), dtype=torch.float32)


def _cls_attention_into(out, query, key, scale, weights, weight, second_softmax):
    options = {"weight": _joined(weights, weight), "out": out, "second_softmax": second_softmax}
    _run("cls_attention", key.device, query, key, scale, **options)


_flags = f"float scale, {_LAYER}, bool second_softmax"
_operator(f"cls_attention(Tensor query, Tensor key, {_flags}) -> Tensor", _cls_attention, _cls_attention_fake)
_operator(
    f"cls_attention_(Tensor(a!) out, Tensor query, Tensor key, {_flags}) -> ()",
    _cls_attention_into,
    lambda *_: None,
)


def cls_attention(query, key, scale, *, weight, out, second_softmax) -> Tensor:
    arguments = (query, key, float(scale), *_split(weight), second_softmax)
    if out is None:
        return _OPERATORS.cls_attention(*arguments)
    _OPERATORS.cls_attention_(out, *arguments)
    return out


def _attention_with_cls(query, key, value, scale, weights, weight, second_softmax):
    output, rows = _run(
        *("attention_with_cls", key.device, query, key, value, scale),
        weight=_joined(weights, weight),
        second_softmax=second_softmax,
    )
    return _token_major(output), rows


def _attention_with_cls_fake(query, key, value, scale, weights, weight, second_softmax):
    rows = _cls_attention_fake(query, key, scale, weights, weight, second_softmax)
    crops, heads, tokens, width = key.shape
    return key.new_empty((crops, tokens, heads, width)).transpose(1, 2), rows


def _attention_context(ctx, inputs, output):
    query, key, value, ctx.scale, *_ = inputs
    ctx.save_for_backward(query, key, value)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx, grad, _):
    """Gradients of plain attention, which is run once more: its own maps were never kept."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        output = torch.nn.functional.scaled_dot_product_attention(*inputs, scale=ctx.scale)
    return *torch.autograd.grad(output, inputs, grad), None, None, None, None


_operator(
    f"attention_with_cls(Tensor query, Tensor key, Tensor value, float scale, {_LAYER}, bool second_softmax)"
    " -> (Tensor, Tensor)",
    _attention_with_cls,
    _attention_with_cls_fake,
)
torch.library.register_autograd(
    "hero_kernels::attention_with_cls",
    _attention_backward,
    setup_context=_attention_context,
    lib=_LIBRARY,
)


def attention_with_cls(query, key, value, scale, *, weight, out, second_softmax):
    output, rows = _OPERATORS.attention_with_cls(
        query, key, value, float(scale), *_split(weight), second_softmax
    )
    return output, rows.detach() if out is None else out.add_(rows.detach())


def _received_attention(query, key, scale, weights, weight):
    return _run("received_attention", key.device, query, key, scale, weight=_joined(weights, weight))


def _received_attention_fake(query, key, scale, weights, weight):
    return key.new_empty(key.shape[:3], dtype=torch.float32)


def _received_attention_into(out, query, key, scale, weights, weight):
    weight = _joined(weights, weight)
    _run("received_attention", key.device, query, key, scale, weight=weight, out=out)


_flags = f"float scale, {_LAYER}"
_operator(
    f"received_attention(Tensor query, Tensor key, {_flags}) -> Tensor",
    _received_attention,
    _received_attention_fake,
)
_operator(
    f"received_attention_(Tensor(a!) out, Tensor query, Tensor key, {_flags}) -> ()",
    _received_attention_into,
    lambda *_: None,
)


def received_attention(query, key, scale, *, weight, out) -> Tensor:
    arguments = (query, key, float(scale), *_split(weight))
    if out is None:
        return _OPERATORS.received_attention(*arguments)
    _OPERATORS.received_attention_(out, *arguments)
    return out


# --- scores, budgets, selection --------------------------------------------------------------------------


def _finalize_scores(rows, valid, rank):
    scores, entropy, ranks = _run("finalize_scores", rows.device, rows, valid=valid, rank=rank)
    return scores, entropy, ranks if rank else rows.new_empty((rows.shape[0], 0), dtype=torch.int16)


def _finalize_scores_fake(rows, valid, rank):
    crops, _, patches = rows.shape
    ranks = rows.new_empty((crops, patches if rank else 0), dtype=torch.int16)
    return rows.new_empty((crops, patches)), rows.new_empty((crops,)), ranks


_operator(
    "finalize_scores(Tensor rows, Tensor? valid, bool rank) -> (Tensor, Tensor, Tensor)",
    _finalize_scores,
    _finalize_scores_fake,
)


def finalize_scores(rows, *, valid, rank) -> Finalized:
    scores, entropy, ranks = _OPERATORS.finalize_scores(rows, valid, rank)
    return Finalized(scores, entropy, ranks if rank else None)


_SIGNALS = "Tensor[] signals, float[] weights, float[] temperatures"
_SEGMENTS = "int[] images, int side, Tensor table"


def _lists(signals: Sequence[TileSignal] | None) -> tuple[list, list, list]:
    """Signals as lists; no temperature is 0, which is none."""
    signals = signals or ()
    return (
        [signal.values for signal in signals],
        [float(signal.weight) for signal in signals],
        [float(signal.temperature or 0.0) for signal in signals],
    )


def _signals(values, weights, temperatures) -> list[TileSignal]:
    return [TileSignal(*signal, t or None) for *signal, t in zip(values, weights, temperatures, strict=True)]


def _segments(images, side, table) -> Segments:
    return segments_of(tuple(images), side).bound(table)


def _tile_budgets(values, weights, temperatures, valid_counts, images, side, table, exact):
    return tuple(
        _run(
            *("tile_budgets", valid_counts.device, _signals(values, weights, temperatures), valid_counts),
            _segments(images, side, table),
            allocation="exact" if exact else "floor",
        )
    )


def _budgets_fake(counts: Tensor, crops: int) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = (torch.int32, torch.float32, torch.int32)
    return tuple(counts.new_empty((crops,), dtype=dtype) for dtype in dtypes)


def _tile_budgets_fake(values, weights, temperatures, valid_counts, images, side, table, exact):
    return _budgets_fake(valid_counts, valid_counts.shape[0])


_operator(
    f"tile_budgets({_SIGNALS}, Tensor valid_counts, {_SEGMENTS}, bool exact) -> (Tensor, Tensor, Tensor)",
    _tile_budgets,
    _tile_budgets_fake,
)


def _described(segments: Segments, device: torch.device) -> tuple[tuple[int, ...], int, Tensor]:
    return list(segments.numbers), segments.side, segments.table(device)


def tile_budgets(signals, valid_counts, segments, *, allocation) -> TileBudgets:
    described = _described(segments, valid_counts.device)
    return TileBudgets(
        *_OPERATORS.tile_budgets(*_lists(signals), valid_counts, *described, allocation == "exact")
    )


def _segmented_topk(scores, budgets, valid):
    return _run("segmented_topk", scores.device, scores, budgets, valid)


_operator(
    "segmented_topk(Tensor scores, Tensor budgets, Tensor? valid) -> Tensor",
    _segmented_topk,
    lambda scores, budgets, valid: scores.new_empty(scores.shape, dtype=torch.bool),
)


def segmented_topk(scores, budgets, valid) -> Tensor:
    return _OPERATORS.segmented_topk(scores, budgets, valid)


def _gather(
    features, scores, valid, budgets, values, weights, temperatures, images, side, table, ranks, valid_counts
):
    segments = _segments(images, side, table)
    given = None if budgets is None else TileBudgets(budgets, None, None)
    result = _run(
        *("segmented_topk_gather", scores.device, features, scores, segments),
        valid=valid,
        budgets=given,
        signals=_signals(values, weights, temperatures) if budgets is None else None,
        ranks=ranks,
        valid_counts=valid_counts,
    )
    tokens, index = _promised(result, segments)
    made = result.budgets if budgets is None else [table.new_empty(0, dtype=kind) for kind in _KINDS]
    return tokens, index, *made


_KINDS = (torch.int32, torch.float32, torch.int32)  # of TileBudgets


def _promised(result: Gathered, segments: Segments) -> tuple[Tensor, Tensor]:
    """Tokens and index of the lengths that the segments promise: the twin's are those of the content."""
    if result.lengths == segments.lengths:
        return result.tokens, result.index
    tokens = result.tokens.new_zeros((sum(segments.lengths), result.tokens.shape[1]))
    index = result.index.new_full((len(tokens),), -2)
    begin, place = 0, 0
    for length, promised in zip(result.lengths, segments.lengths, strict=True):
        kept = min(length, promised)
        tokens[place : place + kept] = result.tokens[begin : begin + kept]
        index[place : place + kept] = result.index[begin : begin + kept]
        begin, place = begin + length, place + promised
    return tokens, index


def _gather_fake(
    features, scores, valid, budgets, values, weights, temperatures, images, side, table, ranks, valid_counts
):
    total = sum(segments_of(tuple(images), side).lengths)
    tokens = features.new_empty((total, features.shape[2]))
    index = features.new_empty((total,), dtype=torch.int32)
    return tokens, index, *_budgets_fake(features, features.shape[0] if budgets is None else 0)


def _gather_context(ctx, inputs, output):
    ctx.shape, ctx.signals = inputs[0].shape, len(inputs[4])
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])


def _gather_backward(ctx, grad, *_):
    """Each row goes back to where it came from; no two rows come from one place."""
    (index,) = ctx.saved_tensors
    crops, patches, width = ctx.shape
    place = torch.where(index < 0, crops * patches, index).long()
    features = grad.new_zeros((crops * patches + 1, width)).index_copy_(0, place, grad)
    features = features[:-1].view(ctx.shape)
    numbers = (
        None if ctx.signals else []
    )  # torch takes a list of numbers for one input, an empty one for none
    return features, None, None, None, [None] * ctx.signals, numbers, numbers, *[None] * 5


_operator(
    f"segmented_topk_gather(Tensor features, Tensor scores, Tensor? valid, Tensor? budgets, {_SIGNALS}, "
    f"{_SEGMENTS}, Tensor? ranks, Tensor? valid_counts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gather,
    _gather_fake,
)
torch.library.register_autograd(
    "hero_kernels::segmented_topk_gather", _gather_backward, setup_context=_gather_context, lib=_LIBRARY
)


def segmented_topk_gather(
    features, scores, segments, *, valid, budgets, signals, allocation, ranks, valid_counts
) -> Gathered:
    if allocation != "exact":
        raise ValueError(
            "allocation: expected 'exact' under torch.compile and where gradients run through a kernel, "
            f"since with others the number of tokens depends on the content, got {allocation!r}"
        )
    tokens, index, *made = _OPERATORS.segmented_topk_gather(
        *(features, scores, valid, None if budgets is None else budgets.budgets, *_lists(signals)),
        *(*_described(segments, scores.device), ranks, valid_counts),
    )
    return Gathered(tokens, index, segments.lengths, TileBudgets(*made) if budgets is None else budgets)
