"""Questions of ``bench.quality``, and the ways of choosing tokens that it compares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

import hero
from hero import mini
from hero.policies import POLICIES

from .mini import scenes

SEEDS = {"validation": 20260210, "test": 20260209}
"""Settings are chosen on the first split, results are reported on the second."""

KEEP = (0.5, 0.3, 0.2, 0.1)
GRID = (3, 3)
BATCH = 50
OBJECT = 15  # px: digits of plates are narrower, objects wider


# --- questions -------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A question about a scene."""

    image: Image.Image
    text: str
    answer: str
    kind: str
    boxes: tuple[tuple[int, int, int, int], ...]
    """Boxes of the digits asked for, (y0, x0, y1, x1) in px; none where no digits are."""

    def needed(self) -> np.ndarray:
        """``[digits, tiles, P]`` bool: patches that show each digit; any one of them may do."""
        side = scenes.TILE // scenes.PATCH
        found = []
        for box in self.boxes:
            share = scenes.covered(box, GRID[0] * side, GRID[1] * side)
            least = 0.3 if box[2] - box[0] < OBJECT else 0.45
            tiles = (share >= least).reshape(GRID[0], side, GRID[1], side).swapaxes(1, 2)
            found.append(tiles.reshape(-1, side * side))
        return np.stack(found)


@functools.lru_cache(maxsize=4 * BATCH)
def asked(split: str, index: int, kinds: tuple[str, ...] | None = None) -> Asked:
    """Question ``index`` of a split: the kinds take turns, so there are as many of each.

    Each question has its own random stream, so every process draws the same.

    Raises:
        ValueError: an unknown split, or kinds that the scenes never ask.
    """
    if split not in SEEDS:
        raise ValueError(f"split: expected one of {', '.join(SEEDS)}, got {split!r}")
    kinds = kinds or tuple(scenes.KINDS)
    rng = np.random.default_rng((SEEDS[split], index))
    while True:
        scene = scenes.scene(rng, GRID, scenes.amounts(rng, GRID[0] * GRID[1]), split="test")
        try:
            question = scenes.questions(scene, rng, 1, (kinds[index % len(kinds)],))[0]
        except ValueError as problem:
            if not str(problem).startswith("scene:"):
                raise
            continue  # a scene that does not allow it
        return Asked(scene.image, question.text, question.answer, question.kind, question.boxes)


# --- variants --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way of choosing tokens.

    Attributes:
        name: in the record.
        options: of :class:`hero.HeroConfig`, without the keep ratio; ``None`` for the stock model.
        text: the question that relevance reads: ``own``, ``other``, or ``none`` without a relevance model.
    """

    name: str
    options: Mapping[str, object] | None
    text: str = "none"


FULL = Variant("full", None)


def variants_of(
    loaded: mini.MiniModel,
    policies: Sequence[str] = tuple(POLICIES),
    more: Mapping[str, Mapping[str, object]] | None = None,
) -> tuple[Variant, ...]:
    """The variants that a run compares, ``full`` first.

    Args:
        loaded: the model with its relevance.
        policies: names in :data:`hero.policies.POLICIES`.
        more: options of :class:`hero.HeroConfig` by the name of the variant, instead of a policy's if equal.

    Raises:
        ValueError: an unknown policy.
    """
    unknown = [name for name in policies if name not in POLICIES]
    if unknown:
        raise ValueError(f"policies: expected names among {', '.join(POLICIES)}, got {', '.join(unknown)}")
    variants = [FULL]
    for name, options in ({name: {"policy": name} for name in policies} | dict(more or {})).items():
        with hero.attach(loaded.model, loaded.processor, relevance=loaded.relevance, **options) as handle:
            text = handle.encoder.needs_text
        variants.append(Variant(name, options, "own" if text else "none"))
        if text:
            if _does_without_text(options):
                variants.append(Variant(f"{name}-no-text", options))
            variants.append(Variant(f"{name}-other-question", options, "other"))
    return tuple(variants)


def _does_without_text(options: Mapping[str, object]) -> bool:
    """Whether a policy with these options chooses without a question."""
    try:
        hero.HeroConfig(**options).policy.needs(False)
    except ValueError:
        return False
    return options.get("alpha") is None
