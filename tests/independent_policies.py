"""The published peers of HERO, written from their formulas: one crop, one tile, one token at a time.

Like ``independent.py``, on which it builds, it shares nothing with the package under test. Sizes of regions
and counts are fractions, all else float64; attention is that of an eager model, keys are computed from its
weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from independent import (
    ImageResult,
    Independent,
    Layout,
    allocate_exact,
    allocate_floor,
    concentration,
    cosine,
    normalised,
    numbers,
    quantised,
    select,
    softmax,
)

PEERS = ("hired", "fastervlm", "visionzip", "globalcom2")


@dataclass(frozen=True)
class PeerRule:
    """What to keep, and by which peer; ``keep_ratio`` as text, so that it is exact."""

    policy: str
    keep_ratio: str | None = None
    keep_tokens: int | None = None
    allocation: str = "exact"


def counts(rule: PeerRule, patches: int, valid: Sequence[int]) -> tuple[int, int, int]:
    """Tokens of the thumbnail, of all tiles, and what the tiles divide among them before any cap.

    Args:
        rule: The rule.
        patches: P.
        valid: Number of valid patches of each tile; none for an image of one crop.
    """
    crops, room = len(valid) + 1, sum(valid)
    total = rule.keep_tokens
    if rule.policy == "hired":
        if total is None:
            total = math.floor(Fraction(rule.keep_ratio) * crops * patches)
        thumbnail = min(total // 2, patches) if valid else min(total, patches)
        tiles = total - thumbnail
    elif total is None:
        thumbnail = math.floor(Fraction(rule.keep_ratio) * patches)
        tiles = math.floor(Fraction(rule.keep_ratio) * (crops - 1) * patches)
    else:
        thumbnail = min(total // crops, patches)
        tiles = total - thumbnail
    multiplier, tiles = tiles, min(tiles, room)
    if rule.keep_tokens is not None:
        thumbnail, multiplier = min(patches, rule.keep_tokens - tiles), tiles
    return thumbnail, tiles, multiplier


class IndependentPlus(Independent):
    """The reference of HERO with the counts of HiRED and the shares of hero+."""

    def plan(self, rule, valid) -> tuple[int, int, int]:
        ratio = None if rule.keep_ratio is None else str(rule.keep_ratio)
        return counts(PeerRule("hired", ratio, rule.keep_tokens, rule.allocation), self.patches, valid)

    def tile_shares(self, rule, layout, scores, cls, text_embedding, image_embeddings) -> list[float]:
        tiles = range(1, layout.crops)
        parts = [concentration(scores[tile], layout.valid[tile]) for tile in tiles]
        if text_embedding is not None:
            cosines = [cosine(image_embeddings[tile], text_embedding) for tile in tiles]
            chances = softmax([value / rule.temperature_clip for value in cosines])
            parts = [part * (chance + 2.0 / len(tiles)) for part, chance in zip(parts, chances, strict=True)]
        return normalised(parts)


class IndependentPeers(Independent):
    """The reference with a :class:`PeerRule` wherever it takes a rule."""

    def _image(self, crops, layout, rule, first, text_embedding, image_embeddings) -> ImageResult:
        depth = len(self.model.model.vision_tower.encoder.layers)
        states = self.config.vision_feature_layer
        states = [states] if isinstance(states, int) else states
        last = max(state % (depth + 1) for state in states) - 1  # the last layer of the features
        scores, first_layer, features, keys = [], [], [], []
        for pixels in crops:
            out = self.model.model.vision_tower(
                pixels[None].to(self.device),
                output_attentions=True,
                output_hidden_states=True,
                return_dict=True,
            )
            scores.append(self.patch_scores(out.attentions, [last], False))
            first_layer.append(self.patch_scores(out.attentions, [0], False))
            features.append(self._features(out.hidden_states)[0, 1:])
            keys.append(self._keys(out.hidden_states[last], last))

        valid = [len(patches) for patches in layout.valid[1:]]
        thumbnail, total, multiplier = counts(rule, self.patches, valid)
        shares = self._shares(rule, layout, scores[0], first_layer[0]) if valid else []
        if rule.allocation == "exact":
            budgets = allocate_exact(quantised(shares), valid, total)
        else:
            budgets = allocate_floor(quantised(shares), valid, multiplier) if valid else []
        budgets = [thumbnail, *budgets]

        if rule.policy == "globalcom2":
            scores = self._half_global(layout, scores)
        kept, merged = [], []
        for crop in range(layout.crops):
            if rule.policy == "visionzip":
                picked, means = self._visionzip(
                    scores[crop], keys[crop], features[crop], layout.valid[crop], budgets[crop]
                )
            else:
                picked, means = select(scores[crop], layout.valid[crop], budgets[crop]), {}
            kept.append(picked)
            merged.append(means)

        replaced = [
            {patch: merged[crop].get(patch, features[crop][patch]) for patch in kept[crop]}
            for crop in range(layout.crops)
        ]
        index, tokens = self._sequence(layout, first, kept, replaced)
        return ImageResult(index, budgets, [0.0, *shares], scores, tokens)

    def _keys(self, hidden: torch.Tensor, number: int) -> list[list[float]]:
        """The key of each patch in a layer, averaged over heads."""
        layer = self.model.model.vision_tower.encoder.layers[number]
        heads = self.config.vision_config.num_attention_heads
        result = []
        for token in layer.self_attn.k_proj(layer.layer_norm1(hidden))[0, 1:]:
            key = numbers(token)
            width = len(key) // heads
            parts = [key[head * width : (head + 1) * width] for head in range(heads)]
            result.append([math.fsum(part[i] for part in parts) / heads for i in range(width)])
        return result

    def _regions(self, layout: Layout, scores: Sequence[float]) -> list[float]:
        """What of the thumbnail's scores falls on each tile, patch by patch of the un-padded grid."""
        height, width, side = len(layout.rows), len(layout.rows[0]), self.side
        sums = [0.0] * (layout.crops - 1)
        for row, line in enumerate(layout.rows):
            top, bottom = Fraction(row * side, height), Fraction((row + 1) * side, height)
            for column, (crop, _) in enumerate(line):
                left, right = Fraction(column * side, width), Fraction((column + 1) * side, width)
                for y in range(math.floor(top), min(math.ceil(bottom), side)):
                    for x in range(math.floor(left), min(math.ceil(right), side)):
                        area = (min(bottom, y + 1) - max(top, y)) * (min(right, x + 1) - max(left, x))
                        sums[crop - 1] += float(area) * scores[y * side + x]
        return sums

    def _shares(
        self, rule: PeerRule, layout: Layout, thumbnail: Sequence[float], first_layer: Sequence[float]
    ) -> list[float]:
        tiles = layout.crops - 1
        if rule.policy == "hired":
            parts = self._regions(layout, first_layer)
        elif rule.policy == "globalcom2":
            sigma = softmax([value / 10.0 for value in self._regions(layout, thumbnail)])
            parts = [len(layout.valid[1 + tile]) * (1.0 + sigma[tile] - 1.0 / tiles) for tile in range(tiles)]
        else:
            parts = [1.0] * tiles
        return [part / math.fsum(parts) for part in parts]

    def _half_global(self, layout: Layout, scores: list[list[float]]) -> list[list[float]]:
        """Half a tile's own score, half the thumbnail's at the same place; padding is left as it is."""
        side, thumbnail = self.side, scores[0]
        result = [list(values) for values in scores]
        for row, line in enumerate(layout.rows):
            for column, (crop, patch) in enumerate(line):
                ends = []
                for place, length in ((row, len(layout.rows)), (column, len(line))):
                    centre = (place + 0.5) * side / length - 0.5
                    centre = min(max(centre, 0.0), side - 1.0)
                    low = math.floor(centre)
                    ends.append((low, min(low + 1, side - 1), centre - low))
                (top, bottom, down), (left, right, across) = ends
                value = (
                    (1 - down) * (1 - across) * thumbnail[top * side + left]
                    + (1 - down) * across * thumbnail[top * side + right]
                    + down * (1 - across) * thumbnail[bottom * side + left]
                    + down * across * thumbnail[bottom * side + right]
                )
                result[crop][patch] = 0.5 * scores[crop][patch] + 0.5 * value
        return result

    def _visionzip(
        self,
        scores: Sequence[float],
        keys: Sequence[Sequence[float]],
        features: torch.Tensor,
        valid: Sequence[int],
        budget: int,
    ) -> tuple[list[int], dict[int, torch.Tensor]]:
        """(patches that are kept, feature of each target) of one crop."""
        contextual = math.floor(Fraction(10, 64) * budget)
        dominant = select(scores, valid, budget - contextual)
        if not contextual:
            return dominant, {}
        left = [patch for patch in valid if patch not in dominant]
        targets = left[:: len(left) // contextual][:contextual]
        groups = {target: [target] for target in targets}
        for patch in left:
            if patch not in targets:
                likeness = [cosine(keys[patch], keys[target]) for target in targets]
                groups[targets[likeness.index(max(likeness))]].append(patch)
        means = {}
        for target, group in groups.items():
            vectors = [numbers(features[patch]) for patch in group]
            mean = [math.fsum(values) / len(group) for values in zip(*vectors, strict=True)]
            means[target] = torch.tensor(mean, dtype=features.dtype, device=features.device)
        return sorted([*dominant, *targets]), means
