"""VisionZip (Yang et al. 2024, https://arxiv.org/abs/2412.04467).

    every crop keeps n tokens, the share R of its patches: n − C dominant and C = ⌊n·10/64⌋ contextual ones
    dominant:    the highest Σ_h a^{l,h}_c[j]         l the last layer of the features (22 of 24)
    contextual:  of the m patches left, in raster order, the targets 0, s, 2s, … with s = ⌊m/C⌋, C of them;
                 every other patch left joins the target of the most similar key (cosine of the means over
                 heads of layer l's keys, ties to the first); a token is the mean of target and joined

The split 54 : 10 is the paper's at 64 tokens a crop, taken at every budget. A contextual token stands at its
target's place in the sequence. Where all is kept nothing is left to join, and the sequence is the stock one.

Counts are those of FasterVLM: the tiles' total is dealt out to the last token, tiles never above their valid
patches, and only valid patches merge. The released code adds the mean of the joined to the target instead of
averaging over both, places contextual tokens behind the dominant ones, and keeps CLS. Here newlines stay, and
CLS goes, as the stock model has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import hero_kernels as hk

from . import SCORES, Map, Needs, Policy, Replacement, Scored, equal_shares

__all__ = ["CONTEXTUAL", "POLICY"]

CONTEXTUAL = (10, 64)  # contextual tokens of all tokens of a crop, the paper's split


class VisionZip(Policy):
    by_cls = True

    def maps(self, config, depth, feature_layer):
        return {SCORES: Map.mean([feature_layer], [feature_layer])}

    def needs(self, config, with_relevance):
        return Needs(keys=True)

    def score(self, seen):
        return Scored(seen.scores, (equal_shares(seen.valid),), seen.ranks)

    def replace(self, encoded, scored, budgets, valid):
        crops, patches = valid.shape
        part, whole = CONTEXTUAL
        slots = patches * part // whole  # the most a crop can have: results do not hang on the batch
        if not slots:
            return None
        kept = torch.minimum(budgets.budgets.long(), valid.sum(1))
        contextual = kept * part // whole
        dominant = kept - contextual
        if scored.ranks is None:
            chosen = hk.segmented_topk(scored.scores, dominant, valid)
        else:
            chosen = valid & (scored.ranks < dominant[:, None])
        left = valid & ~chosen
        place = left.cumsum(1) - 1  # among the patches left
        step = left.sum(1).div(contextual.clamp_min(1), rounding_mode="floor").clamp_min(1)
        slot = place.div(step[:, None], rounding_mode="floor")
        is_target = left & (place % step[:, None] == 0) & (slot < contextual[:, None])

        ranks = torch.where(chosen | is_target, 0, patches).to(torch.int16)
        slot = torch.where(is_target, slot, -1)

        # The patch of each slot; what is no target goes to one slot more, which is cut off.
        patch = torch.arange(patches, device=valid.device).expand(crops, patches)
        targets = patch.new_zeros((crops, slots + 1))
        targets = targets.scatter(1, torch.where(is_target, slot, slots), patch)[:, :slots]
        keys = F.normalize(encoded.keys, dim=-1)
        similar = keys @ keys.gather(1, targets[..., None].expand(-1, -1, keys.shape[-1])).mT
        used = torch.arange(slots, device=valid.device) < contextual[:, None]
        similar = similar.masked_fill(~used[:, None], -torch.inf)
        joins = torch.where(is_target, slot, similar.argmax(-1))
        joins = torch.where(left & (contextual > 0)[:, None], joins, slots)  # [T, P]
        members = (joins[:, None] == torch.arange(slots, device=valid.device)[:, None]).float()  # [T, S, P]
        members = members / members.sum(-1, keepdim=True).clamp_min(1.0)
        values = members @ encoded.features.float()
        return Replacement(ranks, slot, values.to(encoded.features.dtype))


POLICY = VisionZip()
