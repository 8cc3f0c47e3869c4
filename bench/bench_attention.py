"""Scores out of attention: the CLS row alone, whole attention with it, received attention, finishing scores.

Inputs are views [T, H, N, D] of [T, N, H·D], as the projections of an encoder leave them. Peers of the CLS
row take it from the logits in PyTorch; those of whole attention are the two steps, SDPA and then the row,
and what the released method needs, eager attention that keeps its maps.

``pytest bench/bench_attention.py --benchmark-only`` times them with pytest-benchmark: on a CPU the twins at
small shapes, on a GPU everything at real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor

import hero_kernels as hk
from hero_kernels import reference

from .measure import (
    Case,
    Unavailable,
    Variant,
    benchmark_variant,
    close,
    generate_tests,
    item_size,
    same,
    some,
)
from .registry import CLIP, Shape, shapes

__all__ = ["cases"]

ROWS = 1e-3  # rows computed in fp32
ROUNDED = 2e-2  # and where logits or maps are rounded to bf16
COMPILED_CROPS = (5, 160)  # compiling takes long: these, of CLIP alone
RECEIVED_CHUNK = 8  # crops whose maps a peer holds at a time


def make_attention(shape: Shape, device: torch.device, seed: int) -> SimpleNamespace:
    """Query, key, value, what the encoder's attention says of them, and accumulators."""
    geometry, crops = shape.geometry, shape.batch.crops
    generator = torch.Generator(device).manual_seed(seed)
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.item]
    size = (crops, geometry.tokens, geometry.heads, geometry.width)
    query, key, value = (
        torch.randn(size, device=device, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)
    )
    heads = (crops, geometry.heads, geometry.patches)
    return SimpleNamespace(
        query=query,
        key=key,
        value=value,
        rows=torch.zeros(heads, device=device),
        received=torch.zeros((*heads[:2], geometry.tokens), device=device),
        valid=torch.ones(crops, geometry.patches, dtype=torch.bool, device=device),
        random_rows=torch.rand(heads, device=device, generator=generator),
    )


def reset(inputs: SimpleNamespace) -> None:
    """Empty the accumulators."""
    inputs.rows.zero_()
    inputs.received.zero_()


# Attention of PyTorch, with its log-sum-exp.


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp [T, H, N]) of flash attention."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)[:2]
    return aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]


def cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same of cuDNN."""
    if query.device.type != "cuda":
        raise Unavailable("cuDNN needs a GPU")
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    output, lse = operator(query, key, value, None, True, scale=scale)[:2]
    return output, lse.reshape(lse.shape[:3])  # some versions keep a last dimension of 1


@cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same of FlexAttention, compiled."""
    return _compiled_flex()(query, key, value, scale=scale, return_lse=True)


def eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output, maps [T, H, N, N]) as ``output_attentions=True`` has it."""
    maps = torch.matmul(query, key.transpose(2, 3)) * scale
    maps = maps.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(maps, value), maps


def _compilable(shape: Shape, device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("compiled on a GPU alone")
    if shape.geometry != CLIP or shape.batch.crops not in COMPILED_CROPS:
        raise Unavailable("compiled for CLIP at T = 5 and 160 alone, to fit the time")


# The CLS row.


def logits_row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[T, P] from the logits of the CLS query, as one writes it down."""
    logits = torch.matmul(query[:, :, :1], key.transpose(2, 3))[:, :, 0].float() * scale
    return logits.softmax(-1)[..., 1:].mean(1)


@cache
def _compiled_row() -> Callable:
    return torch.compile(logits_row, dynamic=False)


def expected_rows(shape: Shape, inputs: SimpleNamespace) -> Tensor:
    """[t, H, P] in fp64 of the crops that are checked."""
    crops = some(len(inputs.key))
    query, key = inputs.query[crops, :, 0].double(), inputs.key[crops].double()
    logits = torch.einsum("thd,thnd->thn", query, key) * shape.geometry.scale
    return logits.softmax(-1)[..., 1:]


def check_row(shape: Shape, tolerance: float, inputs: SimpleNamespace, row: Tensor) -> None:
    """[T, P], or [T, H, P]."""
    expected = expected_rows(shape, inputs)
    if row.dim() == 2:
        expected = expected.mean(1)
    close("CLS row", row[some(len(row))], expected, tolerance)


def row_case(shape: Shape, device: torch.device) -> Case:
    scale = shape.geometry.scale

    def rows(x):
        return hk.cls_attention(x.query, x.key, scale, out=x.rows)

    def compiled(x):
        _compilable(shape, device)
        return _compiled_row()(x.query, x.key, scale)

    exact, rounded = (partial(check_row, shape, tolerance) for tolerance in (ROWS, ROUNDED))
    peer = partial(Variant, check=rounded)
    variants = (
        Variant("cls_attention", rows, exact, ours=True, reset=reset),
        peer("softmax(q₀Kᵀ), eager", lambda x: logits_row(x.query, x.key, scale)),
        peer("softmax(q₀Kᵀ), compiled", compiled),
    )
    return _case("cls_attention", shape, device, shape.cls_rows(), variants)


# Whole attention, with the row or without.


def check_attention(shape: Shape, tolerance: float, inputs: SimpleNamespace, result: tuple) -> None:
    """(output, row): the row may be missing, [T, P] or [T, H, P]."""
    output, row = result
    crops = some(len(output))
    query, key, value = (tensor[crops].double() for tensor in (inputs.query, inputs.key, inputs.value))
    maps = (torch.matmul(query, key.transpose(2, 3)) * shape.geometry.scale).softmax(-1)
    close("attention", output[crops], torch.matmul(maps, value), ROUNDED)
    if row is not None:
        check_row(shape, tolerance, inputs, row)


def attention_case(shape: Shape, device: torch.device) -> Case:
    scale = shape.geometry.scale

    def alone(attention, x):
        return attention(x.query, x.key, x.value, scale)[0], None

    def with_rows(attention, x):
        output, _ = attention(x.query, x.key, x.value, scale)
        return output, hk.cls_attention(x.query, x.key, scale, out=x.rows)

    def compiled_flex(*arguments):
        _compilable(shape, device)
        return flex(*arguments)

    def with_maps(x):
        output, maps = eager(x.query, x.key, x.value, scale)
        return output, maps[:, :, 0, 1:].float().mean(1), maps  # which it keeps

    def fused(x):
        return hk.attention_with_cls(x.query, x.key, x.value, scale, out=x.rows)

    exact, rounded = (partial(check_attention, shape, tolerance) for tolerance in (ROWS, ROUNDED))
    accumulating = partial(Variant, check=exact, reset=reset)
    variants = [
        accumulating("attention_with_cls", fused, ours=True),
    ]
    for name, attention in (("flash", flash), ("cuDNN", cudnn)):
        variants += [
            Variant(f"SDPA {name}, no scores", partial(alone, attention), exact, less=True),
            accumulating(f"SDPA {name} + cls_attention", partial(with_rows, attention)),
        ]
    variants += [
        accumulating("FlexAttention + cls_attention", partial(with_rows, compiled_flex)),
        Variant("eager, maps kept", with_maps, lambda x, result: rounded(x, result[:2])),
    ]
    return _case("attention_with_cls", shape, device, shape.attention(), tuple(variants))


# Received attention.


def check_received(shape: Shape, tolerance: float, inputs: SimpleNamespace, row: Tensor) -> None:
    crops = some(len(row))
    expected = reference.received_attention(
        inputs.query[crops].double(), inputs.key[crops].double(), shape.geometry.scale
    )
    expected = expected if row.dim() == 3 else expected.mean(1)
    close("received attention", row[crops], expected, tolerance)


def received_in_chunks(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[T, N] from the maps of a few crops at a time."""
    rows = []
    for begin in range(0, len(query), RECEIVED_CHUNK):
        crops = slice(begin, begin + RECEIVED_CHUNK)
        logits = torch.matmul(query[crops], key[crops].transpose(2, 3)) * scale
        rows.append(logits.softmax(-1, dtype=torch.float32).mean((1, 2)))
    return torch.cat(rows)


def received_case(shape: Shape, device: torch.device) -> Case:
    scale = shape.geometry.scale

    def ours(x):
        return hk.received_attention(x.query, x.key, scale, out=x.received)

    def attention(x):
        return flash(x.query, x.key, x.value, scale)

    exact, rounded = (partial(check_received, shape, tolerance) for tolerance in (ROWS, ROUNDED))
    variants = (
        Variant("received_attention", ours, exact, ours=True, reset=reset),
        Variant("softmax(QKᵀ), in chunks", lambda x: received_in_chunks(x.query, x.key, scale), rounded),
        Variant("SDPA flash, for scale", attention, lambda x, result: None, less=True),
        Variant("twin", lambda x: reference.received_attention(x.query, x.key, scale), exact),
    )
    return _case("received_attention", shape, device, shape.received(), variants)


# From rows to scores.


def check_finalized(rank: bool, inputs: SimpleNamespace, result: hk.segments.Finalized) -> None:
    scores = inputs.random_rows.double().mean(1)
    share = scores / scores.sum(1, keepdim=True)
    close("scores", result.scores, scores, 1e-5)
    close("entropy", result.entropy, -torch.special.xlogy(share, share).sum(1), 1e-4)
    if rank:
        same("ranks", result.ranks, (-result.scores).argsort(dim=1, stable=True).argsort(1))


def finalize_case(shape: Shape, device: torch.device) -> Case:
    def finish(function, rank, x):
        return function(x.random_rows, valid=x.valid, rank=rank)

    variants = tuple(
        Variant(
            name + (", ranks" if rank else ""),
            partial(finish, function, rank),
            partial(check_finalized, rank),
            ours=function is not reference.finalize_scores,
            cost=shape.finalize(rank),
            against="finalize_scores" + (", ranks" if rank else ""),
        )
        for name, function in (("finalize_scores", hk.finalize_scores), ("twin", reference.finalize_scores))
        for rank in (False, True)
    )
    return _case("finalize_scores", shape, device, shape.finalize(False), variants)


def _case(op, shape, device, cost, variants) -> Case:
    size = 3 * shape.activations() + 3 * shape.cls_rows().bytes
    return Case(op, shape, cost, size, partial(make_attention, shape, device), variants)


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """Every case, the most important first."""
    for shape in shapes(small, item_size(device)):
        if shape.geometry.cls:
            yield attention_case(shape, device)
            yield row_case(shape, device)
            yield finalize_case(shape, device)
        else:
            yield received_case(shape, device)


# pytest-benchmark


def pytest_generate_tests(metafunc) -> None:
    generate_tests(metafunc, cases)


def test_attention(benchmark, case, variant) -> None:
    benchmark_variant(benchmark, case, variant)
