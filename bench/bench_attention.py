"""Attention rows and scores: CLS rows, attention with CLS rows, received attention, finalising scores.

Inputs are views [T, H, N, D] of [T, N, H·D], as the projections of an encoder return them. The peers of the
CLS rows compute them from logits in PyTorch; the peers of attention with CLS rows are SDPA followed by
``cls_attention``, and eager attention that keeps its maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hero_kernels as hk

from .registry import (
    CLIP,
    Case,
    Packed,
    Shape,
    Unavailable,
    Variant,
    checked_crops,
    close,
    item_size,
    packed_shapes,
    same,
    shapes,
)

ROWS = 1e-3  # tolerance of rows computed in fp32
ROUNDED = 2e-2  # tolerance if logits or maps are rounded to bf16
COMPILED_CROPS = (5, 160)  # compiling takes long: only these, and only for CLIP
RECEIVED_CHUNK = 8  # crops whose maps a peer holds at a time


def make_attention(shape: Shape, device: torch.device, seed: int) -> SimpleNamespace:
    """Make query, key, value, accumulators, and random rows to finalise."""
    geometry, crops = shape.geometry, shape.crops
    generator = torch.Generator(device).manual_seed(seed)
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.item]
    size = (crops, geometry.tokens, geometry.heads, geometry.width)
    query, key, value = (
        torch.randn(size, device=device, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)
    )
    rows = (crops, geometry.heads, geometry.patches)
    return SimpleNamespace(
        query=query,
        key=key,
        value=value,
        qk=(query, key, geometry.scale),
        qkv=(query, key, value, geometry.scale),
        rows=torch.zeros(rows, device=device),
        valid=torch.ones(crops, geometry.patches, dtype=torch.bool, device=device),
        random_rows=torch.rand(rows, device=device, generator=generator),
    )


def reset(inputs: SimpleNamespace) -> None:
    """Clear the accumulator."""
    inputs.rows.zero_()


# Peers: PyTorch's attention.


def sdpa(backend: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return the output of one of PyTorch's attention backends."""
    if backend == "CUDNN_ATTENTION" and query.device.type != "cuda":
        raise Unavailable("cuDNN needs a GPU")
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)


def eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return output and maps [T, H, N, N], as with ``output_attentions=True``."""
    maps = torch.matmul(query, key.transpose(2, 3)) * scale
    maps = maps.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(maps, value), maps


# CLS rows.


def logits_row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return rows [T, H, P] from the logits of the CLS query."""
    logits = torch.matmul(query[:, :, :1], key.transpose(2, 3))[:, :, 0].float() * scale
    return logits.softmax(-1)[..., 1:]


@cache
def _compiled_row() -> Callable:
    return torch.compile(logits_row, dynamic=False)


def check_rows(shape: Shape, tolerance: float, inputs: SimpleNamespace, rows: Tensor) -> None:
    """Compare rows [T, H, P] with fp64."""
    crops = checked_crops(len(rows))
    query, key = inputs.query[crops, :, 0].double(), inputs.key[crops].double()
    logits = torch.einsum("thd,thnd->thn", query, key) * shape.geometry.scale
    close("CLS rows", rows[crops], logits.softmax(-1)[..., 1:], tolerance)


def rows_case(shape: Shape, device: torch.device) -> Case:
    exact, rounded = (partial(check_rows, shape, tolerance) for tolerance in (ROWS, ROUNDED))
    variants = [
        Variant("cls_attention", lambda x: hk.cls_attention(*x.qk, out=x.rows), exact, True, reset=reset),
        Variant("softmax(q₀Kᵀ), eager", lambda x: logits_row(*x.qk), rounded),
    ]
    if device.type == "cuda" and shape.geometry == CLIP and shape.crops in COMPILED_CROPS:
        variants.append(Variant("softmax(q₀Kᵀ), compiled", lambda x: _compiled_row()(*x.qk), rounded))
    return _case("cls_attention", shape, device, variants)


# Attention, with or without CLS rows.


def check_attention(shape: Shape, tolerance: float, inputs: SimpleNamespace, result: tuple) -> None:
    """Compare output and rows with fp64; the rows may be ``None``."""
    output, rows = result[:2]
    crops = checked_crops(len(output))
    query, key, value = (tensor[crops].double() for tensor in (inputs.query, inputs.key, inputs.value))
    maps = (torch.matmul(query, key.transpose(2, 3)) * shape.geometry.scale).softmax(-1)
    close("attention", output[crops], torch.matmul(maps, value), ROUNDED)
    if rows is not None:
        check_rows(shape, tolerance, inputs, rows)


def attention_case(shape: Shape, device: torch.device) -> Case:
    def alone(attention, x):
        return attention(*x.qkv), None

    def with_rows(attention, x):
        return attention(*x.qkv), hk.cls_attention(*x.qk, out=x.rows)

    def with_maps(x):
        output, maps = eager(*x.qkv)
        return output, maps[:, :, 0, 1:], maps  # keeps the maps, as the released method does

    def fused(x):
        return hk.attention_with_cls(*x.qkv, out=x.rows)

    exact, rounded = (partial(check_attention, shape, tolerance) for tolerance in (ROWS, ROUNDED))
    variants = [Variant("attention_with_cls", fused, exact, ours=True, reset=reset)]
    for name, backend in (("flash", "FLASH_ATTENTION"), ("cuDNN", "CUDNN_ATTENTION")):
        attention = partial(sdpa, backend)
        variants += [
            Variant(f"SDPA {name}, no scores", partial(alone, attention), exact, less=True),
            Variant(f"SDPA {name} + cls_attention", partial(with_rows, attention), exact, reset=reset),
        ]
    variants.append(Variant("eager, maps kept", with_maps, rounded))
    return _case("attention_with_cls", shape, device, variants)


# Received attention.


def check_received(shape: Shape, tolerance: float, inputs: SimpleNamespace, rows: Tensor) -> None:
    crops = checked_crops(len(rows))
    query, key = inputs.query[crops].double(), inputs.key[crops].double()
    close("received attention", rows[crops], received(query, key, shape.geometry.scale), tolerance)


def received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return rows [T, H, N] from the maps of a few crops at a time."""
    rows = []
    for begin in range(0, len(query), RECEIVED_CHUNK):
        crops = slice(begin, begin + RECEIVED_CHUNK)
        logits = torch.matmul(query[crops], key[crops].transpose(2, 3)) * scale
        rows.append(logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(2))
    return torch.cat(rows)


def make_received(shape: Shape, device: torch.device, seed: int) -> SimpleNamespace:
    """Make the inputs of attention, and the log-sum-exp of each query from a few crops at a time."""
    inputs = make_attention(shape, device, seed)
    chunks = zip(inputs.query.split(RECEIVED_CHUNK), inputs.key.split(RECEIVED_CHUNK), strict=True)
    logits = ((query.float() @ key.float().mT) * shape.geometry.scale for query, key in chunks)
    inputs.lse = torch.cat([one.logsumexp(-1) for one in logits])
    return inputs


def received_case(shape: Shape, device: torch.device) -> Case:
    def ours(x):
        return hk.received_attention(*x.qk, out=x.rows)

    def given(x):
        return hk.received_attention(*x.qk, out=x.rows, lse=x.lse)

    exact, rounded = (partial(check_received, shape, tolerance) for tolerance in (ROWS, ROUNDED))
    variants = (
        Variant("received_attention", ours, exact, ours=True, reset=reset),
        Variant("received_attention, lse", given, exact, ours=True, reset=reset),
        Variant("softmax(QKᵀ), in chunks", lambda x: received(*x.qk), rounded),
    )
    return _case("received_attention", shape, device, variants, make_received)


# Received attention of packed images.


def make_packed(shape: Packed, device: torch.device, seed: int) -> SimpleNamespace:
    """Make query and key, views [1, H, N, D] of [N, H, D], their bounds, accumulators and log-sum-exp."""
    geometry, tokens = shape.geometry, sum(shape.batch)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.item]
    size = (1, tokens, geometry.heads, geometry.width)
    query, key = (
        torch.randn(size, device=device, generator=generator).to(dtype).transpose(1, 2) for _ in range(2)
    )
    lse = torch.empty(1, geometry.heads, tokens, device=device)
    for head in range(geometry.heads):  # the maps of all heads would take gigabytes
        parts = (x[:, head].float().split(shape.batch, 1) for x in (query, key, lse))
        for q, k, part in zip(*parts, strict=True):
            part[:] = (q @ k.mT * geometry.scale).logsumexp(-1)
    bounds = torch.tensor([0, *shape.batch]).cumsum(0).int().to(device)
    return SimpleNamespace(
        query=query,
        key=key,
        qk=(query, key, geometry.scale),
        bounds={"cu_seqlens": bounds, "max_seqlen": max(shape.batch)},
        lse=lse,
        rows=torch.zeros(1, geometry.heads, tokens, device=device),
    )


def received_by_image(shape: Packed, query: Tensor, key: Tensor) -> Tensor:
    """Return rows [1, H, N], from the maps of one image at a time."""
    parts = zip(query.split(shape.batch, 2), key.split(shape.batch, 2), strict=True)
    return torch.cat([received(q, k, shape.geometry.scale) for q, k in parts], 2)


def check_packed(shape: Packed, tolerance: float, inputs: SimpleNamespace, rows: Tensor) -> None:
    """Compare the rows of two heads with fp64."""
    for head in (0, shape.geometry.heads - 1):
        query, key = (x[:, head, None].double() for x in (inputs.query, inputs.key))
        close("received attention", rows[:, head, None], received_by_image(shape, query, key), tolerance)


def packed_case(shape: Packed, device: torch.device) -> Case:
    def ours(x):
        return hk.received_attention(*x.qk, out=x.rows, **x.bounds)

    def given(x):
        return hk.received_attention(*x.qk, out=x.rows, lse=x.lse, **x.bounds)

    exact, rounded = (partial(check_packed, shape, tolerance) for tolerance in (ROWS, ROUNDED))
    name = "received_attention, packed"
    variants = (
        Variant(name, ours, exact, ours=True, reset=reset),
        Variant(f"{name}, lse", given, exact, ours=True, reset=reset),
        Variant("softmax(QKᵀ), by image", lambda x: received_by_image(shape, x.query, x.key), rounded),
    )
    return _case(name, shape, device, variants, make_packed)


# From rows to scores.


def check_finalized(rank: bool, inputs: SimpleNamespace, result: hk.segments.Finalized) -> None:
    scores = inputs.random_rows.double().mean(1)
    share = scores / scores.sum(1, keepdim=True)
    close("scores", result.scores, scores, 1e-5)
    close("entropy", result.entropy, -torch.special.xlogy(share, share).sum(1), 1e-4)
    if rank:
        same("ranks", result.ranks, (-result.scores).argsort(dim=1, stable=True).argsort(1))


def finalize_case(shape: Shape, device: torch.device) -> Case:
    variants = []
    for rank, name in ((False, "finalize_scores"), (True, "finalize_scores, ranks")):

        def call(x, rank=rank):
            return hk.finalize_scores(x.random_rows, valid=x.valid, rank=rank)

        variants.append(Variant(name, call, partial(check_finalized, rank), ours=True, cost=name))
    return _case("finalize_scores", shape, device, variants)


def _case(op, shape, device, variants, make=make_attention) -> Case:
    return Case(op, shape, 4 * shape.activations(), partial(make, shape, device), tuple(variants))


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """Return all cases, the most important first."""
    for shape in shapes(small, item_size(device)):
        if shape.geometry.cls:
            yield attention_case(shape, device)
            yield rows_case(shape, device)
            yield finalize_case(shape, device)
        else:
            yield received_case(shape, device)
    for packed in packed_shapes(small, item_size(device)):
        yield packed_case(packed, device)
