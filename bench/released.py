"""The method as its authors released it: the baseline of ``bench.end_to_end``.

Written from the formulas (docs/method.md, 1 to 5) in the way of research code, since the released code is
not part of this repository: eager attention that returns all maps and hidden states, the projector on every
token before any is dropped, a second pass of CLIP's own image encoder, and Python loops over images and
tiles that synchronise at each decision. It keeps what ``hero`` keeps with ``second_softmax=True,
allocation="floor"``, as ``tests/test_bench.py`` verifies.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hero import ClipRelevance, HeroConfig
from hero.layout import Geometry, ImageLayout
from hero.policies.base import resolve_layers


class Encoded(NamedTuple):
    """What the tower returns for T crops of N = P + 1 tokens.

    Attributes:
        attentions: maps of each layer, ``[T, H, N, N]``.
        features: hidden state of the feature layer without CLS, ``[T, P, C]``.
        cls: last layer at CLS, ``[T, C]``.
    """

    attentions: tuple[Tensor, ...]
    features: Tensor
    cls: Tensor


@contextlib.contextmanager
def eager(tower: torch.nn.Module) -> Iterator[None]:
    """Use eager attention in a vision tower, the only one that returns its maps."""
    name = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(name)


class Released:
    """The released vision stage of a LLaVA-NeXT model; run it inside :func:`eager`.

    Called with ``pixel_values`` ``[B, crops, 3, S, S]``, ``image_sizes`` (height, width) and the questions,
    it returns per image the tokens ``[n, D]`` and their source ``crop · P + patch``, −1 for a newline.

    Args:
        model: ``LlavaNextForConditionalGeneration``.
        config: keep ratio, and the layers, temperatures and alpha of its :class:`hero.policies.Hero`.
        geometry: how images are cut.
        relevance: CLIP model and tokenizer; its image encoder runs on all crops.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: HeroConfig,
        geometry: Geometry,
        relevance: ClipRelevance | None = None,
    ):
        self.model, self.geometry, self.relevance = model.model, geometry, relevance
        self.keep_ratio, self.policy = config.keep_ratio, config.policy
        depth = self.model.vision_tower.config.num_hidden_layers
        self.layers = {
            name: resolve_layers(name, getattr(self.policy, name), depth)
            for name in ("tile_layers", "thumbnail_layers")
        }

    def __call__(
        self, pixel_values: Tensor, image_sizes: Sequence[Sequence[int]], text: Sequence[str] | None = None
    ) -> tuple[list[Tensor], list[list[int]]]:
        layouts = self.geometry.layouts(image_sizes)
        crops = torch.cat([pixels[: layout.crops] for pixels, layout in zip(pixel_values, layouts)])
        encoded = self.encode(crops)
        tokens = self.model.multi_modal_projector(encoded.features)  # of every token
        scores = self.score(encoded, layouts)
        shares = self.share(encoded, crops, layouts, text)
        budgets = self.budget(shares, layouts)
        kept = self.select(scores, budgets, layouts)
        return self.pack(tokens, kept, layouts)

    def encode(self, crops: Tensor) -> Encoded:
        """Run the whole tower and keep all maps and hidden states."""
        output = self.model.vision_tower(
            crops, output_attentions=True, output_hidden_states=True, return_dict=True
        )
        layer = self.model.config.vision_feature_layer
        return Encoded(output.attentions, output.hidden_states[layer][:, 1:], output.hidden_states[-1][:, 0])

    def score(self, encoded: Encoded, layouts: Sequence[ImageLayout]) -> list[Tensor]:
        """Return scores ``[P]`` of each crop: a second softmax per head, mean over heads and layers."""
        scores = []
        for layout in layouts:
            for number in range(layout.crops):
                name = "thumbnail_layers" if number == layout.thumbnail_crop else "tile_layers"
                rows = [encoded.attentions[layer][len(scores), :, 0, 1:] for layer in self.layers[name]]
                scores.append(torch.stack([row.float().softmax(-1).mean(0) for row in rows]).mean(0))
        return scores

    def share(
        self,
        encoded: Encoded,
        crops: Tensor,
        layouts: Sequence[ImageLayout],
        text: Sequence[str] | None,
    ) -> list[Tensor]:
        """Return shares ``[K]`` of each image's tiles, from density, saliency and relevance."""
        policy, relevance = self.policy, self.relevance
        weights = policy.signal_weights(with_relevance=relevance is not None)
        if relevance is not None:
            clip = relevance.clip_model
            images = F.normalize(clip.get_image_features(pixel_values=crops).pooler_output.float(), dim=-1)
        shares, first = [], 0
        for number, layout in enumerate(layouts):
            tiles = [first + crop for crop in layout.tile_crops]
            thumbnail = encoded.cls[first + layout.thumbnail_crop].float()
            density = torch.tensor(layout.valid_counts, dtype=torch.float32, device=crops.device)
            share = weights.density * density / density.sum()
            saliency = [F.cosine_similarity(encoded.cls[tile].float(), thumbnail, dim=0) for tile in tiles]
            share = share + weights.saliency * (torch.stack(saliency) / policy.temperature_cls).softmax(0)
            if relevance is not None:
                inputs = relevance.tokenizer(text[number], add_special_tokens=False)["input_ids"]
                ids = [relevance.tokenizer.bos_token_id, *inputs, relevance.tokenizer.eos_token_id]
                ids = torch.tensor([ids], device=crops.device)
                question = F.normalize(clip.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)[0]
                cosine = torch.stack([images[tile] @ question for tile in tiles])
                share = share + weights.relevance * (cosine / policy.temperature_clip).softmax(0)
            shares.append(share)
            first += layout.crops
        return shares

    def budget(self, shares: Sequence[Tensor], layouts: Sequence[ImageLayout]) -> list[list[int]]:
        """Return the patches to keep of each crop of each image: floored and capped, the rest lost."""
        budgets = []
        for share, layout in zip(shares, layouts):
            total = math.floor(self.keep_ratio * layout.tiles * layout.patches + 1e-9)
            budgets.append([math.floor(self.keep_ratio * layout.patches + 1e-9)])
            for part, valid in zip(share, layout.valid_counts):
                budgets[-1].append(min(math.floor(part.item() * total), valid))
        return budgets

    def select(
        self, scores: Sequence[Tensor], budgets: Sequence[Sequence[int]], layouts: Sequence[ImageLayout]
    ) -> list[Tensor]:
        """Return the kept patches of each crop in raster order."""
        kept = []
        for budget, layout in zip(budgets, layouts):
            for number in range(layout.crops):
                score = scores[len(kept)].view(layout.side, layout.side)
                if number != layout.thumbnail_crop:
                    top, bottom, left, right = layout.tile_rectangles[number - layout.tile_crops.start]
                    valid = torch.zeros_like(score, dtype=torch.bool)
                    valid[top:bottom, left:right] = True
                    score = score.masked_fill(~valid, -torch.inf)
                kept.append(score.flatten().topk(budget[number]).indices.sort().values)
        return kept

    def pack(
        self, tokens: Tensor, kept: Sequence[Tensor], layouts: Sequence[ImageLayout]
    ) -> tuple[list[Tensor], list[list[int]]]:
        """Pack kept tokens in the stock order, with a newline after every row of the grid."""
        newline = self.model.image_newline.to(tokens.dtype)[None]
        packed, sources, first = [], [], 0
        for layout in layouts:
            side, (rows, columns) = layout.side, layout.grid
            parts = [tokens[first][kept[first]]]
            source = [first * layout.patches + patch for patch in kept[first].tolist()]
            for row in range(rows * side):
                for column in range(columns):
                    crop = first + layout.tile_crops[row // side * columns + column]
                    here = kept[crop][kept[crop] // side == row % side]
                    parts.append(tokens[crop][here])
                    source += [crop * layout.patches + patch for patch in here.tolist()]
                if layout.rows[0] <= row < layout.rows[1]:
                    parts.append(newline)
                    source.append(-1)
            packed.append(torch.cat(parts))
            sources.append(source)
            first += layout.crops
        return packed, sources
