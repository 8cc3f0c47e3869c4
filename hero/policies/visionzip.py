"""VisionZip (Yang et al. 2024, https://arxiv.org/abs/2412.04467).

    every crop keeps n tokens, the share R of its patches: n − C dominant and C = ⌊n·10/64⌋ contextual ones
    dominant:    the highest Σ_h a^{l,h}_c[j]         l the last layer of the features (22 of 24)
    contextual:  of the m patches left, in raster order, the targets 0, s, 2s, … with s = ⌊m/C⌋, C of them;
                 every other patch left joins the target with the most similar key (cosine of the means over
                 heads of layer l's keys, ties to the first); a token is the mean of target and joined patches

The split 54 : 10 is the paper's at 64 tokens a crop, used at every budget. A contextual token stands at its
target's place in the sequence. If all patches are kept, none is left to join, and the sequence is the stock
one.

Counts are those of FasterVLM: the tiles' tokens are divided completely, with at most the valid patches of a
tile, and only valid patches merge. The released code adds the mean of the joined patches to the target
instead of averaging over both, places contextual tokens behind the dominant ones, and keeps CLS. Here
newlines stay, and CLS goes, as in the stock model.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import PATCHES, Needs, Policy, Replacement, Rows, Scored

__all__ = ["CONTEXTUAL", "VisionZip"]

CONTEXTUAL = (10, 64)  # contextual tokens of all tokens of a crop, the paper's split


@dataclass(frozen=True)
class VisionZip(Policy):
    """VisionZip (arXiv 2412.04467): equal budgets; dominant patches, and means of the others by key.

    It has no parameters: ``hero.attach(model, processor, policy="visionzip")``.
    """

    name = "visionzip"
    summary = "equal budgets; dominant patches and means of the rest by key (arXiv 2412.04467)"
    requires_cls = True

    def rows(self, depth, feature_layer):
        return {PATCHES: Rows.mean([feature_layer], [feature_layer])}

    def needs(self, with_relevance):
        return Needs(keys=True)

    def score(self, observed):
        from .. import signals

        patches = observed.attention[PATCHES]
        return Scored(patches.scores, (signals.equal_shares(observed.valid),))

    def replace(self, features, keys, scored, budgets, valid):
        import torch
        import torch.nn.functional as F

        import hero_kernels as hk

        crops, patches = valid.shape
        part, whole = CONTEXTUAL
        slots = patches * part // whole  # the most of a crop, so that results do not depend on the batch
        if not slots:
            return None
        kept = torch.minimum(budgets.budgets.long(), valid.sum(1))
        contextual = kept * part // whole
        dominant = kept - contextual
        chosen = hk.segmented_topk(scored.scores, dominant, valid)
        left = valid & ~chosen
        place = left.cumsum(1) - 1  # among the patches left
        step = left.sum(1).div(contextual.clamp_min(1), rounding_mode="floor").clamp_min(1)
        slot = place.div(step[:, None], rounding_mode="floor")
        is_target = left & (place % step[:, None] == 0) & (slot < contextual[:, None])

        ranks = torch.where(chosen | is_target, 0, patches).to(torch.int16)
        slot = torch.where(is_target, slot, -1)

        # The patch of each slot; patches that are no target go to an extra slot, which is cut off.
        patch = torch.arange(patches, device=valid.device).expand(crops, patches)
        targets = patch.new_zeros((crops, slots + 1))
        targets = targets.scatter(1, torch.where(is_target, slot, slots), patch)[:, :slots]
        keys = F.normalize(keys, dim=-1)
        similar = keys @ keys.gather(1, targets[..., None].expand(-1, -1, keys.shape[-1])).mT
        used = torch.arange(slots, device=valid.device) < contextual[:, None]
        similar = similar.masked_fill(~used[:, None], -torch.inf)
        joins = torch.where(is_target, slot, similar.argmax(-1))
        joins = torch.where(left & (contextual > 0)[:, None], joins, slots)  # [T, P]
        members = (joins[:, None] == torch.arange(slots, device=valid.device)[:, None]).float()  # [T, S, P]
        members = members / members.sum(-1, keepdim=True).clamp_min(1.0)
        values = members @ features.float()
        return Replacement(ranks, slot, values.to(features.dtype))
