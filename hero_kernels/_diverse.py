"""The reference of ``segmented_diverse_topk``, part of :mod:`hero_kernels.reference`.

Candidates are rounded so that every similarity is an exact integer, whatever the order of its sum: features
become integers in vectors about LENGTH long. Products of two of them, and all partial sums, are then integers
below 2²⁴, which fp32 holds. The step of an element is 2⁻¹² of the vector's length, as that of bf16 near 1/32.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

LENGTH = 4000.0  # rounding adds at most √D / 2, and 4096² = 2²⁴
TERMS = 16384.0  # squares of a vector that are summed exactly
SHIFT = 9  # similarities in 16 bits, in units of 2⁹ / LENGTH², which is 2⁻¹⁵ times 1.05
EXACT = 2.0**-24  # unit of the exact similarities
FLOOR = 2.0**-20  # the least variance: what fp32 leaves of none
MOST_QUALITY = 2.0**60
MOST_CANDIDATES = 4096
NOT_CHOSEN = 32767

Rule = Generator[Tensor, Tensor, None]  # yields the value of each candidate, is sent the chosen ones


def rounded(features: Tensor) -> Tensor:
    """Vectors of integers about LENGTH long, which fp16 holds; zero where a vector is zero or not finite.

    The squares are rounded to a multiple of the last place of TERMS times the largest, so that no addition of
    them is rounded.
    """
    x = features.float().double()
    squares = x * x
    large = squares.amax(-1, keepdim=True) * TERMS
    total = ((squares + large) - large).sum(-1, keepdim=True)
    whole = (x * (LENGTH / total.sqrt()) + 0.5).floor()
    return torch.where((total > 0) & total.isfinite(), whole, 0.0).half()


def _row(matrix: Tensor, chosen: Tensor) -> Tensor:
    """``[S, n]``: the row of the chosen candidate of each segment."""
    return matrix.gather(1, chosen[:, None, None].expand(-1, 1, matrix.shape[2]))[:, 0]


def _in_16_bits(products: Tensor) -> Tensor:
    return ((products.int() + (1 << SHIFT >> 1)) >> SHIFT).clamp_max(NOT_CHOSEN)


def _max_min(products: Tensor, valid: Tensor, quality: Tensor) -> Rule:
    """The distance to the nearest neighbour, then to the nearest chosen candidate."""
    similarity = _in_16_bits(products)
    others = valid[:, None] & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    chosen = yield -similarity.masked_fill(~others, -NOT_CHOSEN - 1).amax(2)
    nearest = _row(similarity, chosen)
    while True:
        chosen = yield -nearest
        nearest = torch.maximum(nearest, _row(similarity, chosen))


def _dpp(products: Tensor, valid: Tensor, quality: Tensor) -> Rule:
    """Quality² times the variance that the chosen candidates leave: the pivots of a Cholesky factorisation.

    Each element is updated once a step, by a product and a difference that are both rounded.
    """
    covariance = products.float() * EXACT
    while True:
        variance = covariance.diagonal(dim1=1, dim2=2).clamp_min(FLOOR)
        chosen = yield variance * quality * quality
        column = _row(covariance, chosen) / variance.gather(1, chosen[:, None]).sqrt()
        covariance = covariance - column[:, :, None] * column[:, None]


def _coverage(products: Tensor, valid: Tensor, quality: Tensor) -> Rule:
    """Quality times the coverage gained: by how much the similarity of each candidate to the nearest chosen
    one rises, from 0 on.
    """
    similarity = _in_16_bits(products)
    covered = torch.where(valid, 0, NOT_CHOSEN)  # what is not valid need not be covered
    while True:
        gain = (similarity - covered[:, None]).clamp_min_(0).sum(2)
        chosen = yield gain.float() * quality
        covered = torch.maximum(covered, _row(similarity, chosen))


RULES = {"max_min": _max_min, "dpp": _dpp, "coverage": _coverage}


def segmented_diverse_topk(
    features: Tensor,
    budgets: Tensor,
    *,
    rule: str,
    quality: Tensor | None = None,
    valid: Tensor | None = None,
    cu_crops: Tensor | None = None,
    max_crops: int | None = None,
) -> Tensor:
    """Greedy: in each step the candidate of the largest value, by the rule, of each segment."""
    crops, patches = features.shape[:2]
    ranks = features.new_full((crops, patches), NOT_CHOSEN, dtype=torch.int16)
    if not ranks.numel():
        return ranks
    if cu_crops is None or max_crops is None:
        cu_crops, max_crops = torch.arange(crops + 1, device=features.device), 1
    crop = cu_crops[:-1, None] + torch.arange(max_crops, device=features.device)  # [S, max_crops]
    inside = crop < cu_crops[1:, None]
    crop = crop.clamp_max(crops - 1).long()

    pool = inside[:, :, None].expand(-1, -1, patches)  # the valid candidates
    pool = (pool if valid is None else pool & valid[crop]).flatten(1)
    if quality is None:
        quality = torch.ones_like(ranks, dtype=torch.float32)
    weight = quality.nan_to_num(0.0).clamp(0.0, MOST_QUALITY)[crop].flatten(1)
    x = rounded(features)[crop].flatten(1, 2).double()  # neither tf32 nor autocast round it
    steps = torch.minimum(budgets, pool.sum(1)).clamp_min(0)
    left, order = pool.clone(), torch.full_like(pool, NOT_CHOSEN, dtype=torch.int16)
    values = RULES[rule](x @ x.mT, pool, weight)
    value = next(values)
    for step in range(int(steps.max())):
        chosen = value.masked_fill(~left, -(1 << 20)).argmax(1)  # the first of equal ones
        place = chosen[:, None]
        order.scatter_(1, place, torch.where(step < steps[:, None], step, order.gather(1, place)).short())
        left.scatter_(1, place, False)
        value = values.send(chosen)
    ranks[crop[inside]] = order.unflatten(1, (max_crops, patches))[inside]
    return ranks
