"""Questions of ``bench.quality``, and the ways of choosing tokens that it compares, the oracle included."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import hero
from hero import mini
from hero.layout import ImageLayout
from hero.policies import POLICIES

from .mini import scenes

SEEDS = {"validation": 20260210, "test": 20260209}
"""Settings are chosen on the first split, results are reported on the second."""

GRID = (3, 3)
OBJECTS = (3, 6)
BATCH = 50


# --- questions -------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A question about a scene."""

    image: Image.Image
    text: str
    answer: str
    kind: str
    tile: int | None
    boxes: tuple[tuple[int, int, int, int], ...]
    """Boxes the question is about, (y0, x0, y1, x1) in px; none for a question about the whole scene."""


@functools.lru_cache(maxsize=4 * BATCH)
def asked(split: str, index: int, kinds: tuple[str, ...] | None = None) -> Asked:
    """Question ``index`` of a split. Each has its own random stream, so every process draws the same.

    Raises:
        ValueError: an unknown split, or kinds that the scenes never ask.
    """
    if split not in SEEDS:
        raise ValueError(f"split: expected one of {', '.join(SEEDS)}, got {split!r}")
    rng = np.random.default_rng((SEEDS[split], index))
    scene = scenes.scene(rng, GRID, int(rng.integers(OBJECTS[0], OBJECTS[1] + 1)), split="test")
    question = scenes.questions(scene, rng, 1, tuple(scenes.KINDS) if kinds is None else kinds)[0]
    boxes = tuple(thing.box for thing in question.objects)
    return Asked(scene.image, question.text, question.answer, question.kind, question.tile, boxes)


# --- variants --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way of choosing tokens.

    Attributes:
        name: in the record.
        options: of :class:`hero.HeroConfig`, without the keep ratio; ``None`` for the stock model.
        text: the question that relevance reads: ``own``, ``other``, or ``none`` without a relevance model.
        oracle: whether the boxes asked about are kept first.
    """

    name: str
    options: Mapping[str, object] | None
    text: str = "none"
    oracle: bool = False


FULL = Variant("full", None)
ORACLE = Variant("oracle", {"policy": "uniform"}, oracle=True)


def variants_of(
    loaded: mini.MiniModel,
    policies: Sequence[str] = tuple(POLICIES),
    more: Mapping[str, Mapping[str, object]] | None = None,
) -> tuple[Variant, ...]:
    """The variants that a run compares, ``full`` first and the oracle last.

    Args:
        loaded: the model with its relevance.
        policies: names in :data:`hero.policies.POLICIES`.
        more: options of :class:`hero.HeroConfig` by the name of the variant.

    Raises:
        ValueError: an unknown policy, or a name given twice.
    """
    unknown = [name for name in policies if name not in POLICIES]
    if unknown:
        raise ValueError(f"policies: expected names among {', '.join(POLICIES)}, got {', '.join(unknown)}")
    variants = [FULL]
    for name, options in [*((name, {"policy": name}) for name in policies), *(more or {}).items()]:
        with hero.attach(loaded.model, loaded.processor, relevance=loaded.relevance, **options) as handle:
            text = handle.encoder.needs_text
        variants.append(Variant(name, options, "own" if text else "none"))
        if text:
            if options.get("alpha") is None and options.get("weights") is None:
                variants.append(Variant(f"{name}-no-text", options))
            variants.append(Variant(f"{name}-other-question", options, "other"))
    variants.append(ORACLE)
    names = [variant.name for variant in variants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"policies, variant: expected each name once, got {', '.join(twice)} again")
    return tuple(variants)


# --- the oracle ------------------------------------------------------------------------------------------


def overlaps(boxes: Sequence[tuple[int, int, int, int]], layout: ImageLayout, patch: int) -> Tensor:
    """``[K, P]`` int64: square pixels of each tile's patches inside a box, of the box that covers most.

    Args:
        boxes: (y0, x0, y1, x1) in pixels of the image, ends exclusive.
        layout: of an image that fills its grid, pixel for pixel.
        patch: side of a patch in pixels.
    """
    rows, columns = (count * layout.side for count in layout.grid)
    if layout.image_size != (rows * patch, columns * patch):
        raise ValueError(
            f"layout: expected an image of {rows * patch} × {columns * patch} px, got {layout.image_size}"
        )
    most = torch.zeros(rows, columns, dtype=torch.int64)

    def along(begin: int, end: int, count: int) -> Tensor:
        low = torch.arange(count) * patch
        return (low.add(patch).clamp_max(end) - low.clamp_min(begin)).clamp_min(0)

    for y0, x0, y1, x1 in boxes:
        most = torch.maximum(most, along(y0, y1, rows)[:, None] * along(x0, x1, columns)[None])
    tiles = most.view(layout.grid[0], layout.side, layout.grid[1], layout.side)
    return tiles.transpose(1, 2).reshape(layout.tiles, layout.patches)


def oracle_keep(scores: Tensor, overlap: Tensor, count: int) -> Tensor:
    """``[B, K, P]`` bool: touched patches first, then the same number of further ones in every tile.

    Args:
        scores: ``[B, K, P]``, by which further patches are taken.
        overlap: ``[B, K, P]`` as :func:`overlaps` has it.
        count: patches to keep of all tiles of an image.
    """
    batch, tiles, patches = scores.shape
    touched = overlap > 0
    rest = scores.masked_fill(touched, -torch.inf)
    rank = rest.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    turn = rank * tiles + torch.arange(tiles, device=scores.device)[:, None]  # tile after tile, best first
    key = torch.where(touched, -overlap, turn).view(batch, -1)
    first = key.argsort(dim=-1, stable=True)[:, :count]
    keep = torch.zeros_like(key, dtype=torch.bool).scatter_(1, first, True)
    return keep.view(batch, tiles, patches)


def put_oracle(encoder: hero.HeroVisionEncoder, questions: Sequence[Asked]) -> None:
    """Replace the stages of this encoder that score and budget, for these questions."""
    score, budget = encoder.score, encoder.budget
    kept = []

    def oracle_score(encoded, plan, text=None):
        scored = score(encoded, plan, text)
        layout = plan.layouts[0]
        tiles = slice(layout.tile_crops.start, layout.tile_crops.stop)
        patch = encoder.geometry.patch_size
        overlap = torch.stack([overlaps(question.boxes, layout, patch) for question in questions])
        scores = scored.scores.view(len(plan.layouts), layout.crops, layout.patches).clone()
        keep = oracle_keep(scores[:, tiles], overlap, layout.budget(encoder.config)[1])
        scores[:, tiles] = keep.to(scores)
        kept[:] = [tiles, keep.sum(-1)]
        return dataclasses.replace(scored, scores=scores.flatten(0, 1), ranks=None)

    def oracle_budget(scored, plan):
        budgets = budget(scored, plan)
        counts = budgets.budgets.view(len(plan.layouts), -1).clone()
        counts[:, kept[0]] = kept[1].to(counts)
        return budgets._replace(budgets=counts.flatten())

    encoder.score, encoder.budget = oracle_score, oracle_budget
