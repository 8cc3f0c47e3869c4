"""hero+: rare patches that differ, tile budgets by how much of the image is rare there. Ours.

    total      = ⌊R·(K+1)·P⌋, or keep_tokens;  thumbnail a fifth, at most P, tiles the rest
    q_j        = 1 − mean_i cos(x_j, x_i) over the valid patches i of the image's tiles; the thumbnail's over
                 its own;  x are the features before the projector
    r_i        = softmax_i(cos(E_img(tile_i), E_txt(question)) / temperature_clip) + β/K;  1 without a
                 relevance model
    share_i    = 0.8 · r_i·Σ_j q_j⁴ + 0.2 · r_i, each part divided by its sum over the image's tiles
    first      of a tile of v valid patches half of what it may keep beyond ⌊v/8⌋, rounded down, at
               least one in tiles of at most the equal share: the patches of the lowest q;
               of the thumbnail half by CLS attention of the last layer
    then       greedy maximum of det(diag(q²) · S · diag(q²)) over the chosen, S_ij = cos(x_i, x_j)

What is like most of the image is background: the patches of the lowest q stand for it. Tiles need no
attention. The thumbnail shows the whole picture: there attention finds what is common. The question only
softens the shares: one that misleads leaves each tile with rare patches its part. docs/quality.md has the
measurements, and what was rejected.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._checks import check_positive, count
from .base import PATCHES, Needs, Policy, Rows, Scored

__all__ = ["BETA", "HeroPlus"]

BETA = 8.0  # what tiles get whatever the question
RARE = 0.8  # the rest of a tile's share does not depend on its patches
POWER = 4  # so that a tile's sum counts its rare patches
RARE_PART = 8  # one in so many of a tile's patches may all be rare; of others half is common
THUMBNAIL = 5  # of all tokens one in so many


@dataclass(frozen=True)
class HeroPlus(Policy):
    """hero+ (ours): patches that are rare in the image and differ, with or without the question.

    Example: ``hero.attach(model, processor, policy="hero+", relevance=relevance)``.

    Args:
        temperature_clip: softmax temperature of relevance, a cosine.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or out of range, by name.
    """

    name = "hero+"
    summary = "patches that are rare in the image and differ; tile budgets by rarity and relevance (ours)"
    scored_by = "rarity"

    temperature_clip: float = 0.05

    def __post_init__(self) -> None:
        temperature = check_positive("temperature_clip", self.temperature_clip)
        object.__setattr__(self, "temperature_clip", temperature)

    def divide(self, keep_ratio, keep_tokens, thumbnail, tiles):
        total = count(keep_ratio, keep_tokens, thumbnail + tiles)
        first = min(max(total // THUMBNAIL, total - tiles), thumbnail)
        return first, total - first

    def rows(self, depth, feature_layer):
        return {PATCHES: Rows.mean([depth - 1], [])}

    def needs(self, with_relevance):
        return Needs(relevance=with_relevance)

    def constants(self, layouts):
        import torch

        from .. import signals

        rare = [count // RARE_PART for layout in layouts for count in layout.full_counts]
        return {"parts": signals.equal_parts(layouts), "rare": torch.tensor(rare, dtype=torch.int32)}

    def score(self, observed):
        import torch

        import hero_kernels as hk

        from .. import signals

        valid, places, parts = observed.valid, observed.places, observed.constants["parts"]
        rarity = hk.rarity(observed.features, observed.segments, valid)
        relevance = 1.0
        if observed.relevance is not None:
            relevance = signals.tile_softmax(observed.relevance() / self.temperature_clip, places, BETA)
        rare = (rarity**POWER * valid).sum(1)
        shares = hk.TileSignal(rare * relevance, RARE), hk.TileSignal(parts * relevance, 1 - RARE)
        first = -rarity
        if PATCHES in observed.attention:
            is_thumbnail = (parts == 0)[:, None]
            first = torch.where(is_thumbnail, observed.attention[PATCHES].scores, first)
        return Scored(rarity, shares, own=(first, parts, observed.constants["rare"]))

    def choose(self, features, scored, budgets, valid):
        import torch

        import hero_kernels as hk

        first, parts, rare = scored.own
        more = (budgets.budgets - rare).clamp_min(0) // 2
        counts = torch.where(budgets.shares <= parts, more.clamp_min(1), more)
        counts = torch.where(parts == 0, budgets.budgets // 2, counts).minimum(budgets.budgets)
        taken = hk.segmented_topk(first, counts, valid)
        ranks = hk.segmented_diverse_topk(
            features, budgets.budgets, rule="dpp", quality=scored.scores.square(), valid=valid
        )
        return hk.segmented_topk(torch.where(taken, 1.0, -ranks.float()), budgets.budgets, valid)
