"""A strictly typed program that uses the public API. `make lint` checks it with mypy; it never runs."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn
from typing_extensions import assert_type

import hero
import hero_kernels as hk
from hero import policies


def count() -> int:
    config = hero.HeroConfig(keep_ratio=0.2, policy=policies.Hero(alpha=0.5))
    again = hero.HeroConfig.from_dict(config.to_dict())
    assert_type(again.policy, policies.Policy)
    assert_type(again.keep_tokens, int | None)
    names: list[str] = [f"{name}: {policy.summary}" for name, policy in policies.POLICIES.items()]
    geometry = hero.Geometry(patch_size=14, crop_size=336)
    return len(names) + hero.count_tokens(again, (480, 640), geometry=geometry)


def attach(model: nn.Module, processor: Any, relevance: hero.ClipRelevance, path: str) -> Image.Image:
    with hero.attach(
        model, processor, keep_ratio=0.2, policy="hero", alpha=0.7, relevance=relevance, cuda_graphs=True
    ) as handle:
        assert_type(handle, hero.Handle)
        assert_type(handle.count_tokens((480, 640)), int)
        assert_type(handle.config, hero.HeroConfig)
        selection = handle.last
        assert selection is not None
    handle.remove()
    assert_type(selection, hero.Selection)
    assert_type(selection.lengths, list[int])
    assert_type(selection.keep_mask(), Tensor)
    return hero.visualize(path, selection, image_index=0, title="what is kept")


def encode(encoder: hero.HeroVisionEncoder, pixel_values: Tensor, sizes: Tensor) -> list[Tensor]:
    crops, plan = encoder.prepare(pixel_values, sizes)
    encoded = encoder.encode(crops, plan)
    assert_type(encoded.attention["patches"].scores, Tensor)
    scored = encoder.score(encoded, plan, "what is it")
    budgets = encoder.budget(scored, plan)
    assert_type(budgets, hk.TileBudgets)
    gathered = encoder.select(encoded, scored, budgets, plan)
    assert_type(encoder.project(gathered.tokens, gathered.index), Tensor)
    return encoder.run(pixel_values, sizes)[0].per_image()


@dataclass(frozen=True)
class Deep(policies.Policy):
    """A policy of the user's own."""

    weight: float = 1.0

    def rows(self, depth: int, feature_layer: int) -> dict[str, policies.Rows]:
        return {policies.PATCHES: policies.Rows.mean([depth - 1], [feature_layer])}

    def score(self, observed: policies.Observed) -> policies.Scored:
        patches = observed.attention[policies.PATCHES]
        return policies.Scored(patches.scores, (hk.TileSignal(patches.entropy, self.weight),))


def own(model: nn.Module) -> hero.Handle:
    return hero.attach(model, policy=Deep(0.5), keep_tokens=640)


def operations(query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> hk.Gathered:
    rows = hk.cls_attention(query, key, 0.125, weight=0.5)
    output, rows = hk.attention_with_cls(query, key, value, 0.125, out=rows)
    assert_type(output, Tensor)
    assert_type(hk.received_attention(query, key, 0.125), Tensor)
    found = hk.finalize_scores(rows, valid=valid, rank=True)
    assert_type(found.ranks, Tensor | None)
    segments = hk.Segments((hk.Segment(5, 0, 2, 115, 460),), 576)
    signals = [hk.TileSignal(found.entropy, 1.0, 0.1)]
    budgets = hk.tile_budgets(signals, valid.sum(1), segments, allocation="exact")
    return hk.segmented_topk_gather(output, found.scores, segments, budgets=budgets, valid=valid)
