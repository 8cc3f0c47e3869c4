"""Selection: rarity, tile budgets, top-k per crop, packing and gathering.

Features are a view of the tower's output without CLS. Peers are given the budgets, which ours compute: the
loop of the released code, which synchronises at every crop; a synchronisation-free form in PyTorch, packed in
the same order; and ``index_select`` with a known index, the lower bound of any gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

import hero_kernels as hk
from hero_kernels import reference

from .registry import Case, Shape, Variant, Wrong, close, item_size, same, shapes

FEW = 8  # sets of inputs if a call touches less than a MB
SIGNALS = ((0.2, None), (0.4, 0.1), (0.4, 0.05))  # weight and temperature: density, saliency, relevance


def stitched_order(segments: hk.Segments) -> Tensor:
    """Return ``crop · P + patch`` of every row of the packed sequence at keep ratio 1; −1 for a newline."""
    patches = segments.patches
    images = [
        image._replace(thumbnail_tokens=patches, tile_tokens=image.tiles * patches)
        for image in segments.images
    ]
    budgets = hk.TileBudgets(torch.full((segments.crops,), patches, dtype=torch.int32), None, None)
    zeros = torch.zeros(segments.crops, patches)
    every = hk.Segments(tuple(images), segments.side)
    return reference.segmented_topk_gather(zeros[..., None], zeros, every, budgets=budgets).index


def make_selection(shape: Shape, segments: hk.Segments, device: torch.device, seed: int) -> SimpleNamespace:
    """Make features, scores without ties, signals, and the results of the reference."""
    geometry, crops = shape.geometry, shape.crops
    generator = torch.Generator().manual_seed(seed)
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.item]
    size = (crops, geometry.tokens, geometry.features)
    hidden = torch.randn(size, device=device, generator=torch.Generator(device).manual_seed(seed)).to(dtype)
    places = torch.rand(crops, geometry.patches, generator=generator).argsort(1)
    scores = ((places + 1.0) / geometry.patches) ** 4  # few are high, as in attention
    counts = torch.full((crops,), geometry.patches, dtype=torch.int32)
    values = (counts / geometry.patches, *(torch.rand(crops, generator=generator) for _ in range(2)))
    signals = [hk.TileSignal(value, *of) for value, of in zip(values, SIGNALS)]
    budgets = reference.tile_budgets(signals, counts, segments)
    ranks = (-scores).argsort(dim=1, stable=True).argsort(1)
    expected = reference.segmented_topk_gather(scores[..., None], scores, segments, budgets=budgets)
    return SimpleNamespace(
        hidden=hidden,
        features=hidden[:, geometry.tokens - geometry.patches :],
        scores=scores.to(device),
        valid=torch.ones(crops, geometry.patches, dtype=torch.bool, device=device),
        counts=counts.to(device),
        signals=[signal._replace(values=signal.values.to(device)) for signal in signals],
        budgets=hk.TileBudgets(*(tensor.to(device) for tensor in budgets)),
        ranks=ranks.to(device, torch.int16),
        keep=(ranks < budgets.budgets[:, None]).to(device),
        index=expected.index.to(device),
        rows=_rows_of(shape, expected.index).to(device),
    )


def _rows_of(shape: Shape, index: Tensor) -> Tensor:
    """Convert ``crop · P + patch`` to rows of the hidden states with CLS; a newline becomes the first row."""
    geometry, index = shape.geometry, index.long().clamp_min(0)
    crop, patch = index // geometry.patches, index % geometry.patches
    return crop * geometry.tokens + patch + geometry.tokens - geometry.patches


# Checks.


def check_packed(inputs: SimpleNamespace, tokens: Tensor) -> None:
    """Compare the rows of patches; newline rows are ignored, since peers leave anything there."""
    patch = inputs.index >= 0
    if len(tokens) != len(patch):
        raise Wrong(f"packed rows: expected {len(patch)}, got {len(tokens)}")
    same("packed rows", tokens[patch], inputs.hidden.flatten(0, 1)[inputs.rows[patch]])


def check_budgets(segments: hk.Segments, inputs: SimpleNamespace, result: hk.TileBudgets) -> None:
    """Compare shares up to fp32 rounding, and budgets exactly, given the weights returned with them.

    The exponential of a GPU may differ from a CPU's in the last bit and move a token to another tile.
    """
    close("shares", result.shares, inputs.budgets.shares, 1e-5)
    counts, weights = inputs.counts.tolist(), result.weights.tolist()
    expected = [0] * segments.crops
    for first, image in zip(segments.first_crops, segments.images):
        tiles = slice(first + image.first_tile, first + image.first_tile + image.tiles)
        expected[first + image.thumbnail] = min(image.thumbnail_tokens, counts[first + image.thumbnail])
        row = (torch.tensor([numbers]) for numbers in ([image.tile_tokens], weights[tiles], counts[tiles]))
        expected[tiles] = reference._apportion(*row)[0].tolist()
    same("budgets", result.budgets, torch.tensor(expected, device=result.budgets.device))


def check_gathered(shape: Shape, segments: hk.Segments, inputs: SimpleNamespace, result: hk.Gathered) -> None:
    """Compare budgets, the index that follows from them, the gathered rows and the zero newline rows."""
    check_budgets(segments, inputs, result.budgets)
    scores, budgets = inputs.scores.cpu(), hk.TileBudgets(result.budgets.budgets.cpu(), None, None)
    index = reference.segmented_topk_gather(scores[..., None], scores, segments, budgets=budgets).index
    rows, index = _rows_of(shape, index).to(inputs.rows.device), index.to(result.index.device)
    same("index", result.index, index)
    expected = inputs.hidden.flatten(0, 1)[rows].masked_fill((index < 0)[:, None], 0.0)
    same("packed rows", result.tokens, expected)


# Peers.


def loop(inputs: SimpleNamespace) -> Tensor:
    """Select crop by crop, as the released code does; synchronises at every budget."""
    rows = []
    for crop in range(len(inputs.scores)):
        count = int(inputs.budgets.budgets[crop].item())
        scores = inputs.scores[crop].masked_fill(~inputs.valid[crop], -torch.inf)
        rows.append(inputs.features[crop][scores.topk(count).indices.sort().values])
    return torch.cat(rows)


def kept_patches(inputs: SimpleNamespace) -> Tensor:
    """Return whether each patch is kept, by a stable sort."""
    scores = inputs.scores.masked_fill(~inputs.valid, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, place)
    return (ranks < inputs.budgets.budgets[:, None]) & inputs.valid


def sort_and_nonzero(order: Tensor, rows: Tensor, total: int, inputs: SimpleNamespace) -> Tensor:
    """Pack by ``nonzero_static``, whose size the host knows."""
    keep = kept_patches(inputs).flatten()[order.clamp_min(0)] | (order < 0)
    place = torch.nonzero_static(keep, size=total)[:, 0]
    return inputs.hidden.flatten(0, 1).index_select(0, rows[place])


# Cases.


def gather_case(shape: Shape, device: torch.device) -> Case:
    segments = shape.segments
    order = stitched_order(segments)
    known = (order.to(device), _rows_of(shape, order).to(device), sum(segments.lengths))

    def gather(x, *, budgets=False, ranks=False):
        given = {"budgets": x.budgets} if budgets else {"signals": x.signals}
        given |= {"valid": x.valid, "valid_counts": x.counts, "ranks": x.ranks if ranks else None}
        return hk.segmented_topk_gather(x.features, x.scores, segments, **given)

    def in_two(x):
        return gather(SimpleNamespace(**vars(x) | {"budgets": budgets(segments, x)}), budgets=True)

    def index_select(x):
        return x.hidden.flatten(0, 1).index_select(0, x.rows)

    check = partial(check_gathered, shape, segments)
    ours = partial(Variant, check=check, ours=True, synchronises=_synchronises(device))
    peer = partial(Variant, against="segmented_topk_gather(budgets)")
    ranks = "segmented_topk_gather, ranks"
    variants = (
        ours("segmented_topk_gather(signals)", gather),
        ours("segmented_topk_gather(budgets)", partial(gather, budgets=True)),
        ours("segmented_topk_gather(signals, ranks)", partial(gather, ranks=True), cost=ranks),
        ours("segmented_topk_gather(budgets, ranks)", partial(gather, budgets=True, ranks=True), cost=ranks),
        ours("tile_budgets + segmented_topk_gather", in_two),
        peer("index_select alone", index_select, check_packed, less=True),
        peer("sort, rank, nonzero_static, index_select", partial(sort_and_nonzero, *known), check_packed),
        peer("loop over crops, as released", loop, _check_by_crop, synchronises=True),
    )
    return _case("segmented_topk_gather", shape, device, variants)


def budgets(segments: hk.Segments, x: SimpleNamespace) -> hk.TileBudgets:
    return hk.tile_budgets(x.signals, x.counts, segments)


def rarity(function: Callable, segments: hk.Segments, x: SimpleNamespace) -> Tensor:
    return function(x.features, segments, x.valid)


def _check_rarity(segments: hk.Segments, x: SimpleNamespace, result: Tensor) -> None:
    close("rarity", result, rarity(reference.rarity, segments, x), 1e-5)


def topk(x: SimpleNamespace) -> Tensor:
    return hk.segmented_topk(x.scores, x.budgets.budgets, x.valid)


def _check_by_crop(x: SimpleNamespace, tokens: Tensor) -> None:
    same("rows", tokens, x.features[x.keep])


def _check_topk(x: SimpleNamespace, keep: Tensor) -> None:
    same("kept", keep, x.keep)


def _synchronises(device: torch.device) -> bool:
    """Return whether ours is the reference, which reads values on the host."""
    return hk.implementations(device.type)["tile_budgets"] == "reference"


def _case(op, shape, device, variants, **options) -> Case:
    size = shape.crops * shape.geometry.tokens * shape.geometry.features * shape.item
    return Case(op, shape, size, partial(make_selection, shape, shape.segments, device), variants, **options)


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """Return all cases, the most important first."""
    ours = partial(Variant, ours=True)
    waits = _synchronises(device)
    for shape in shapes(small, item_size(device)):
        yield gather_case(shape, device)
        call = partial(budgets, shape.segments)
        variants = (ours("tile_budgets", call, partial(check_budgets, shape.segments), synchronises=waits),)
        yield _case("tile_budgets", shape, device, variants, most_sets=FEW)
        check = partial(_check_rarity, shape.segments)
        variants = (
            ours("rarity", partial(rarity, hk.rarity, shape.segments), check),
            Variant("PyTorch", partial(rarity, reference.rarity, shape.segments), check),
        )
        yield _case("rarity", shape, device, variants)
        variants = (
            ours("segmented_topk", topk, _check_topk),
            Variant("sort, rank", kept_patches, _check_topk),
        )
        yield _case("segmented_topk", shape, device, variants, most_sets=FEW)
