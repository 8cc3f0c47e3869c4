"""Greedy choice that covers: 20 % of each crop, and of each image's crops together.

Ours is checked against the reference, index by index. Peers compute cosines in the dtype of the features and
round otherwise: they are checked for the number of patches, and for at least half of ours. There are two for
each rule: a loop over segments that takes one step at a time, as the released codes do, and the same batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

import hero_kernels as hk
from hero._checks import floor_ratio
from hero_kernels import reference

from .registry import KEEP, Case, Shape, Variant, Wrong, checked_crops, item_size, same, shapes

MOST = 4096  # candidates of a segment
RULES = ("max_min", "dpp", "coverage")
CENTRES = 40  # around which the features of a crop lie


def make(shape: Shape, crops: int, device: torch.device, seed: int) -> SimpleNamespace:
    """Make features around a few directions, a view without CLS, and a quality; segments of ``crops``."""
    geometry = shape.geometry
    draw = torch.Generator(device).manual_seed(seed)
    size = (shape.crops, geometry.tokens)
    centres = torch.randn(CENTRES, geometry.features, device=device, generator=draw)
    which = torch.randint(CENTRES, size, device=device, generator=draw)
    hidden = centres[which] + 0.5 * torch.randn(*size, geometry.features, device=device, generator=draw)
    hidden = hidden.to({2: torch.bfloat16, 4: torch.float32}[shape.item])
    count = shape.crops // crops
    budget = floor_ratio(KEEP * crops * geometry.patches)
    return SimpleNamespace(
        features=hidden[:, geometry.tokens - geometry.patches :],
        quality=0.1 + torch.rand(shape.crops, geometry.patches, device=device, generator=draw),
        budgets=torch.full((count,), budget, dtype=torch.int32, device=device),
        cu_crops=torch.arange(count + 1, dtype=torch.int32, device=device) * crops,
        crops=crops,
        budget=budget,
    )


def ours(rule: str, x: SimpleNamespace) -> Tensor:
    return _choose(hk.segmented_diverse_topk, rule, x)


def _choose(function: Callable, rule: str, x: SimpleNamespace) -> Tensor:
    segments = {"cu_crops": x.cu_crops, "max_crops": x.crops} if x.crops > 1 else {}
    quality = None if rule == "max_min" else x.quality
    return function(x.features, x.budgets, rule=rule, quality=quality, **segments)


def check_ranks(rule: str, x: SimpleNamespace, ranks: Tensor) -> None:
    """Compare some segments with the reference on the same device."""
    for segment in checked_crops(len(x.budgets)):
        part = slice(segment * x.crops, (segment + 1) * x.crops)
        one = SimpleNamespace(**vars(x) | {"features": x.features[part], "quality": x.quality[part]})
        one.budgets, one.cu_crops = x.budgets[:1], x.cu_crops[:2]
        same("ranks", ranks[part], _choose(reference.segmented_diverse_topk, rule, one))


def check_peer(rule: str, x: SimpleNamespace, chosen: Tensor) -> None:
    """``chosen`` [S, budget] without a patch twice, at least half of what ours choose."""
    kept = torch.zeros(len(x.budgets), x.features.shape[1] * x.crops, dtype=torch.bool, device=chosen.device)
    kept.scatter_(1, chosen, True)
    if not (kept.sum(1) == x.budget).all():
        raise Wrong(f"chosen: expected {x.budget} patches of each segment")
    common = int((kept & (ours(rule, x).view_as(kept) < x.budget)).sum())
    if common < 0.5 * chosen.numel():
        raise Wrong(f"chosen: {common} of {chosen.numel()} in common, expected half")


# Peers: ``unit`` [n, D] and ``quality`` [n] of one segment, or [S, n, D] and [S, n] of all.


def max_min_loop(unit: Tensor, quality: Tensor, budget: int) -> Tensor:
    distance = 1 - unit @ unit.mT
    chosen = distance.topk(2, dim=0, largest=False).values[1].argmax()[None]
    while len(chosen) < budget:
        nearest = distance[chosen].amin(0).index_fill_(0, chosen, -1)
        chosen = torch.cat([chosen, nearest.argmax()[None]])
    return chosen


def dpp_loop(unit: Tensor, quality: Tensor, budget: int) -> Tensor:
    kernel = quality[:, None] * (unit @ unit.mT) * quality
    gain, vectors = kernel.diagonal().clone(), kernel.new_zeros(budget, len(kernel))
    chosen = torch.empty(budget, dtype=torch.int64, device=unit.device)
    for step in range(budget):
        best = gain.argmax()
        chosen[step] = best
        vectors[step] = (kernel[best] - vectors[:step, best] @ vectors[:step]) / gain[best].sqrt()
        gain -= vectors[step].square()
        gain[best] = -torch.inf
    return chosen


def coverage_loop(unit: Tensor, quality: Tensor, budget: int) -> Tensor:
    return coverage_batched(unit[None], quality[None], budget)[0]


def max_min_batched(unit: Tensor, quality: Tensor, budget: int) -> Tensor:
    distance, chosen = 1 - unit @ unit.mT, []
    nearest = distance.topk(2, dim=1, largest=False).values[:, 1]
    for step in range(budget):
        best = nearest.argmax(1, keepdim=True)
        row = _row(distance, best)
        nearest = (row if step == 0 else torch.minimum(nearest, row)).scatter(1, best, -1)
        chosen.append(best)
    return torch.cat(chosen, 1)


def dpp_batched(unit: Tensor, quality: Tensor, budget: int) -> Tensor:
    kernel, chosen = quality[:, :, None] * (unit @ unit.mT) * quality[:, None], []
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    vectors = kernel.new_zeros(len(kernel), budget, kernel.shape[2])
    for step in range(budget):
        best = gain.argmax(1, keepdim=True)
        earlier = vectors[:, :step]
        own = earlier.gather(2, best[:, None].expand(-1, step, 1))
        vector = (_row(kernel, best) - (own.mT @ earlier)[:, 0]) / gain.gather(1, best).sqrt()
        vectors[:, step] = vector
        gain = (gain - vector.square()).scatter(1, best, -torch.inf)
        chosen.append(best)
    return torch.cat(chosen, 1)


def coverage_batched(unit: Tensor, quality: Tensor, budget: int) -> Tensor:
    similarity, chosen = unit @ unit.mT, []
    covered, left = torch.zeros_like(quality), torch.ones_like(quality, dtype=torch.bool)
    for _ in range(budget):
        gain = (similarity - covered[:, None]).clamp_min_(0).sum(2) * quality
        best = gain.masked_fill(~left, -1).argmax(1, keepdim=True)
        left = left.scatter(1, best, False)
        covered = torch.maximum(covered, _row(similarity, best))
        chosen.append(best)
    return torch.cat(chosen, 1)


def _row(matrix: Tensor, best: Tensor) -> Tensor:
    return matrix.gather(1, best[:, None].expand(-1, 1, matrix.shape[2]))[:, 0]


LOOPS = {"max_min": max_min_loop, "dpp": dpp_loop, "coverage": coverage_loop}
BATCHED = {"max_min": max_min_batched, "dpp": dpp_batched, "coverage": coverage_batched}


def peer(function: Callable, batched: bool, x: SimpleNamespace) -> Tensor:
    """The chosen candidates of each segment, ``[S, budget]``."""
    features = x.features.float().reshape(len(x.budgets), -1, x.features.shape[2])
    unit, quality = torch.nn.functional.normalize(features, dim=-1), x.quality.view(features.shape[:2])
    if batched:
        return function(unit, quality, x.budget)
    return torch.stack([function(*segment, x.budget) for segment in zip(unit, quality)])


# Cases.


def _variants(rule: str, waits: bool) -> tuple[Variant, ...]:
    check = partial(check_peer, rule)
    return (
        Variant(f"{rule}", partial(ours, rule), partial(check_ranks, rule), ours=True, synchronises=waits),
        Variant(f"{rule}, loop over segments", partial(peer, LOOPS[rule], False), check, synchronises=True),
        Variant(f"{rule}, batched", partial(peer, BATCHED[rule], True), check),
    )


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """Return the cases: each rule on crops, then on whole images where they are small enough."""
    waits = hk.implementations(device.type)["segmented_diverse_topk"] == "reference"
    for shape in shapes(small, item_size(device)):
        size = shape.crops * shape.geometry.tokens * shape.geometry.features * shape.item
        images = {rows * columns + 1 for rows, columns in shape.batch}
        for crops in (1, *(images if len(images) == 1 else ())):
            if crops * shape.geometry.patches > MOST:
                continue
            name = "segmented_diverse_topk" + (", images" if crops > 1 else "")
            for rule in RULES:
                yield Case(name, shape, size, partial(make, shape, crops, device), _variants(rule, waits))
