"""The published peers of HERO, written from their formulas: one crop, one tile, one token at a time.

Like ``independent.py``, on which it builds, it shares nothing with the package under test. Sizes of regions
and counts are fractions, all else float64; attention is that of an eager model, keys are computed from its
weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from independent import (
    ImageResult,
    Independent,
    Layout,
    allocate_exact,
    allocate_floor,
    cosine,
    normalised,
    numbers,
    quantised,
    select,
    softmax,
)

PEERS = ("hired", "fastervlm", "visionzip", "globalcom2")
COVERING = ("divprune", "cdpruner", "scope")


@dataclass(frozen=True)
class PeerRule:
    """What to keep, and by which peer; ``keep_ratio`` as text, so that it is exact.

    ``pool`` and ``alpha`` are for those of COVERING. ``near`` are places, ``crop · P + patch`` of the batch,
    that decide between candidates that are nearly equal.
    """

    policy: str
    keep_ratio: str | None = None
    keep_tokens: int | None = None
    allocation: str = "exact"
    pool: str = "crop"
    alpha: float = 1.0
    near: frozenset[int] | None = None


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


# By what rounding moves a cosine: elements of unit vectors to 1/4000 (a standard deviation of 1e-4).
NEAR = 2e-4


class Greedy:
    """Chooses vectors one at a time by one of the three rules, from the formulas of the papers.

    Args:
        policy: Which rule.
        vectors: The candidates.
        quality: What each is weighed by.
    """

    def __init__(self, policy: str, vectors: Sequence[Sequence[float]], quality: Sequence[float]) -> None:
        self.policy, self.quality = policy, torch.tensor(quality, dtype=torch.float64)
        rows = torch.tensor(vectors, dtype=torch.float64).view(len(vectors), -1)
        rows = rows / rows.norm(dim=1)[:, None]
        self.cosines = rows @ rows.T
        self.near = NEAR * (math.sqrt(len(rows)) if policy == "scope" else 1.0)
        if policy == "cdpruner":
            self.quality = self.quality**2

    def values(self, chosen: list[int]) -> torch.Tensor:
        """What each candidate is worth beside those chosen, before quality."""
        between = self.cosines[chosen]
        if self.policy == "divprune":
            itself = torch.full((len(self.cosines),), math.inf).diag()
            return (1.0 - between).amin(0) if chosen else (1.0 - self.cosines + itself).amin(0)
        if self.policy == "scope":
            covered = between.amax(0).clamp_min(0.0) if chosen else 0.0
            return (self.cosines - covered).clamp_min(0.0).sum(1)
        variance = self.cosines.diagonal()
        if chosen:
            inverse = torch.linalg.pinv(between[:, chosen], hermitian=True, rtol=1e-10)
            variance = variance - (between * (inverse @ between)).sum(0)
        return variance.clamp_min(2.0**-20)  # so that copies of those chosen are ordered by their quality

    def choose(self, count: int, near: Sequence[bool] | None = None) -> list[int]:
        """``count`` candidates in the order of their choice, ties to the lower one.

        Args:
            near: If given, choices between candidates that are nearly equal are tried until only candidates
                with ``near`` are chosen. Nothing is returned if that is not possible.
        """
        tried, begun = set(), [[]]
        while begun:
            chosen = begun.pop()
            if len(chosen) == count:
                return chosen
            left = [one for one in range(len(self.cosines)) if one not in chosen]
            values, near_by = (
                (self.quality * self.values(chosen)).tolist(),
                (self.quality * self.near).tolist(),
            )
            best = max(left, key=lambda one: values[one])
            for one in [best] if near is None else [one for one in left if near[one]]:
                after = frozenset([*chosen, one])
                if values[one] + near_by[one] >= values[best] - near_by[best] and after not in tried:
                    tried.add(after)
                    begun.append([*chosen, one])
        return []


def hero_plus(
    features: Sequence[torch.Tensor],
    valid: Sequence[Sequence[int]],
    attention: Sequence[float] | None,
    total: int,
    cosines: Sequence[float] | None,
    temperature: float,
    near: Sequence[set[int]] | None = None,
) -> tuple[list[float], list[int], list[set[int]]]:
    """hero+ of one image, from the features of its crops.

    Args:
        features: ``[P, C]`` of each crop: the thumbnail, if there is one, then the tiles.
        valid: The patches of each crop that are not padding.
        attention: Scores of the thumbnail's patches; none without a thumbnail.
        total: Patches to keep of the whole image.
        cosines: Of each tile and the question, if it counts.
        near: What was kept of each crop, for choices between candidates that are nearly equal.

    Returns:
        Shares and budgets of all crops, and the patches kept.
    """
    first_tile = 0 if attention is None else 1
    tiles = range(first_tile, len(features))
    units = [torch.nn.functional.normalize(one.double(), dim=1) for one in features]

    def rarity(crops: Sequence[int]) -> dict[int, list[float]]:
        everything = torch.cat([units[crop][list(valid[crop])] for crop in crops])
        return {crop: (1.0 - (units[crop] @ everything.T).mean(1)).tolist() for crop in crops}

    rare = rarity(tiles) if len(tiles) else {}
    rare |= {} if attention is None else rarity([0])
    alike = [1.0 if attention is not None else float(len(valid[tile])) for tile in tiles]
    parts, weights = normalised(alike), [1.0] * len(tiles)
    if cosines is not None:
        chances = softmax([value / temperature for value in cosines])
        weights = [chance + 8.0 / len(tiles) for chance in chances]
    sums = [math.fsum(rare[tile][patch] ** 4 for patch in valid[tile]) for tile in tiles]
    one = normalised([value * weight for value, weight in zip(sums, weights, strict=True)])
    other = normalised([value * weight for value, weight in zip(parts, weights, strict=True)])
    shares = [0.8 * first + 0.2 * second for first, second in zip(one, other, strict=True)]

    room = sum(len(valid[tile]) for tile in tiles)
    own = 0
    if attention is not None:
        patches = len(features[0])
        own = min(max(total // 5, total - patches * len(tiles)), patches)
    given = min(total - own, room)
    budgets = allocate_exact(quantised(shares), [len(valid[tile]) for tile in tiles], given)
    budgets = [own] * first_tile + budgets
    shares = [0.0] * first_tile + shares

    kept = []
    for crop, budget in enumerate(budgets):
        places = list(valid[crop])
        if crop < first_tile:
            first = select(attention, places, budget // 2)
        else:
            poor = shares[crop] <= parts[crop - first_tile]
            common = [-value for value in rare[crop]]
            more = max(0, budget - len(places) // 8) // 2
            first = select(common, places, min(max(more, 1 if poor else 0), budget))
        vectors, quality = units[crop][places].tolist(), [rare[crop][patch] ** 2 for patch in places]
        near_by = None if near is None else [patch in near[crop] for patch in places]
        greedy = Greedy("cdpruner", vectors, quality)
        chain = greedy.choose(budget, near_by) or greedy.choose(budget)
        rest = [places[place] for place in chain if places[place] not in first]
        kept.append({*first, *rest[: budget - len(first)]})
    return shares, budgets, kept


class IndependentPeers(Independent):
    """The reference with a :class:`PeerRule` wherever it takes a rule.

    Attributes:
        clip: The CLIP model of "cdpruner", which also needs embeddings of the questions.
    """

    clip: Any = None

    def __init__(self, model) -> None:
        super().__init__(model)
        self._known: dict[tuple[str, bytes], Any] = {}

    def _image(self, crops, layout, rule, first, text_embedding, image_embeddings) -> ImageResult:
        depth = len(self.model.model.vision_tower.encoder.layers)
        states = self.config.vision_feature_layer
        states = [states] if isinstance(states, int) else states
        last = max(state % (depth + 1) for state in states) - 1  # the last layer of the features
        seen = [self._once("crop", pixels, lambda pixels: self._crop(pixels, last)) for pixels in crops]
        scores, first_layer, features, keys = map(list, zip(*seen, strict=True))

        valid = [len(patches) for patches in layout.valid[1:]]
        thumbnail, total, multiplier = counts(rule, self.patches, valid)
        shares = self._shares(rule, layout, scores[0], first_layer[0]) if valid else []
        if rule.allocation == "exact":
            budgets = allocate_exact(quantised(shares), valid, total)
        else:
            budgets = allocate_floor(quantised(shares), valid, multiplier) if valid else []
        budgets = [thumbnail, *budgets]

        if rule.policy in COVERING:
            total += thumbnail
            return self._covering(
                crops, layout, rule, first, text_embedding, scores, features, budgets, total, shares
            )
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

    def _covering(
        self, crops, layout, rule, first, text_embedding, scores, features, budgets, total, shares
    ) -> ImageResult:
        """One image by a policy that covers. Scores of the result are the qualities."""
        places = [(crop, patch) for crop in range(layout.crops) for patch in layout.valid[crop]]
        quality = [[1.0] * self.patches for _ in range(layout.crops)]
        if rule.policy == "scope":
            quality = [[score**rule.alpha for score in values] for values in scores]
        if rule.policy == "cdpruner":
            cosines = [
                self._unlike(crops[layout.number(crop)], text_embedding) for crop in range(layout.crops)
            ]
            seen = [cosines[crop][patch] for crop, patch in places]
            low, high = min(seen), max(seen)
            quality = [[(value - low) / (high - low) for value in values] for values in cosines]
        pools = (
            [places]
            if rule.pool == "image"
            else [[place for place in places if place[0] == crop] for crop in range(layout.crops)]
        )
        kept: list[list[int]] = [[] for _ in range(layout.crops)]
        for pool, count in zip(pools, [total] if rule.pool == "image" else budgets, strict=True):
            vectors = [numbers(features[crop][patch]) for crop, patch in pool]
            greedy = Greedy(rule.policy, vectors, [quality[crop][patch] for crop, patch in pool])
            numbered = [(first + layout.number(crop)) * self.patches + patch for crop, patch in pool]
            near = None if rule.near is None else [place in rule.near for place in numbered]
            for one in greedy.choose(count, near):
                kept[pool[one][0]].append(pool[one][1])
        index, tokens = self._sequence(layout, first, kept, features)
        listed = (layout.in_order(values) for values in ([len(own) for own in kept], [0.0, *shares], quality))
        return ImageResult(index, *listed, tokens)

    def _unlike(self, pixels: torch.Tensor, question: Sequence[float]) -> list[float]:
        """Minus the cosine of each patch of a crop and the question, as CLIP projects them."""

        def projected(pixels):
            vision = self.clip.vision_model
            hidden = vision(pixel_values=pixels[None]).last_hidden_state[0, 1:]
            return [numbers(self.clip.visual_projection(vision.post_layernorm(one))) for one in hidden]

        return [-cosine(patch, question) for patch in self._once("clip", pixels, projected)]

    def _crop(self, pixels: torch.Tensor, last: int) -> tuple[list, list, torch.Tensor, list]:
        """Scores in the features' last layer and the first one, features and keys of a crop's patches."""
        out = self.model.model.vision_tower(
            pixels[None].to(self.device), output_attentions=True, output_hidden_states=True, return_dict=True
        )
        scores, first = (self.patch_scores(out.attentions, [layer], False) for layer in (last, 0))
        keys = self._keys(out.hidden_states[last], last)
        return scores, first, self._features(out.hidden_states)[0, 1:], keys

    def _once(self, name: str, pixels: torch.Tensor, function: Callable) -> Any:
        """``function(pixels)``, run once for the same crop."""
        key = name, pixels.float().cpu().numpy().tobytes()
        if key not in self._known:
            self._known[key] = function(pixels)
        return self._known[key]

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
