"""What policies share that choose patches which cover the others, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .._checks import check_choice
from .base import Policy, Scored

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Observed

__all__ = ["CoveragePolicy"]

MOST = 4096  # candidates of one pool (hero_kernels.segmented_diverse_topk)


@dataclass(frozen=True)
class CoveragePolicy(Policy):
    """A policy that chooses greedily by :func:`hero_kernels.segmented_diverse_topk`.

    Args:
        pool: where patches compete: ``"crop"``, in each crop, with equal tile budgets; ``"image"``, in all
            crops of an image together, up to 4096 patches with their padding.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or out of range, by name.
    """

    rule: ClassVar[str]
    pool: str = "crop"

    def __post_init__(self) -> None:
        check_choice("pool", self.pool, ("crop", "image"))

    def quality(self, observed: Observed) -> Tensor | None:
        """``[T, P]`` fp32 >= 0, by what patches are weighed; ``None`` weighs all alike."""
        return None

    def constants(self, layouts):
        most = max(layout.crops * layout.patches for layout in layouts)
        if self.pool == "image" and most > MOST:
            expected = f"'crop' for images of more than {MOST} patches, padding included"
            raise ValueError(f"pool: expected {expected}, got 'image' for {most}")
        return {}

    def score(self, observed):
        import torch

        from .. import signals

        quality = self.quality(observed)
        equal = signals.equal_shares(observed.valid, observed.layouts)
        if self.pool == "crop":
            scores = torch.zeros_like(observed.valid, dtype=torch.float32) if quality is None else quality
            return Scored(scores, (equal,), observed.block_budgets, quality)
        pools = observed.pools
        segments = {"cu_crops": pools.cu_crops, "max_crops": pools.max_crops}
        kept = self._chosen(observed.features, pools.tokens, quality, observed.valid, **segments)
        return Scored(kept.float(), (equal,), kept.sum(1, dtype=torch.int32), quality)

    def choose(self, features, scored, budgets, valid):
        if self.pool == "image":
            return None  # scores are 1 where a patch is kept, and budgets count these
        return self._chosen(features, budgets.budgets, scored.own, valid)

    def _chosen(
        self, features: Tensor, budgets: Tensor, quality: Tensor | None, valid: Tensor, **segments: Any
    ) -> Tensor:
        """``[T, P]`` bool, what the rule takes from each crop, or each of the segments."""
        import torch

        import hero_kernels as hk

        ranks = hk.segmented_diverse_topk(
            features, budgets, rule=self.rule, quality=quality, valid=valid, **segments
        )
        return ranks < torch.iinfo(ranks.dtype).max
