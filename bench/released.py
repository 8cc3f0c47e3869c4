"""The method as it was released, plainly: the baseline that the package is measured against.

Written from the formulas (docs/method.md, 1 to 5) the way research code goes about them, since the released
code is not part of this repository: eager attention that returns every map and every hidden state, the
projector on every token before any is dropped, a second pass of CLIP's own image encoder, and Python loops
over images and tiles in which the host waits for each decision. It chooses what ``hero`` chooses with
``HeroConfig(second_softmax=True, allocation="floor")``; ``tests/test_bench.py`` holds it to that.
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
from hero.config import resolve_layers
from hero.layout import Geometry, ImageLayout

__all__ = ["Encoded", "Released", "eager"]


class Encoded(NamedTuple):
    """What the encoder gives: T crops of N = P + 1 tokens.

    Attributes:
        attentions: of each layer, ``[T, H, N, N]``.
        features: hidden state of the features without CLS, ``[T, P, C]``.
        cls: last layer at CLS, ``[T, C]``.
    """

    attentions: tuple[Tensor, ...]
    features: Tensor
    cls: Tensor


@contextlib.contextmanager
def eager(tower: torch.nn.Module) -> Iterator[None]:
    """Eager attention in a vision tower, the only one that returns its maps."""
    name = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(name)


class Released:
    """The vision stage as released, on a LLaVA-NeXT model whose tower runs eager attention (:func:`eager`).

    Called with ``pixel_values`` ``[B, crops, 3, S, S]``, ``image_sizes`` (height, width) of each image on the
    host and the question of each image, it returns of each image the tokens ``[n, D]`` and their source
    ``crop · P + patch``, −1 for a newline, as :class:`hero.Selection` numbers them.

    Args:
        model: ``LlavaNextForConditionalGeneration``.
        config: keep ratio, layers, temperatures and alpha; always the second softmax and floored budgets.
        geometry: how images are cut.
        relevance: CLIP model and tokenizer; its image encoder runs on all crops once more.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: HeroConfig,
        geometry: Geometry,
        relevance: ClipRelevance | None = None,
    ):
        self.model = model.model
        self.config = config
        self.geometry = geometry
        self.relevance = relevance
        depth = self.model.vision_tower.config.num_hidden_layers
        self.tile_layers = resolve_layers("tile_layers", config.tile_layers, depth)
        self.thumbnail_layers = resolve_layers("thumbnail_layers", config.thumbnail_layers, depth)

    def __call__(
        self, pixel_values: Tensor, image_sizes: Sequence[Sequence[int]], text: Sequence[str] | None = None
    ) -> tuple[list[Tensor], list[list[int]]]:
        layouts = self.geometry.layouts(image_sizes)
        crops = torch.cat([pixels[: layout.crops] for pixels, layout in zip(pixel_values, layouts)])
        encoded = self.encode(crops)
        tokens = self.project(encoded.features)
        scores = self.score(encoded, layouts)
        shares = self.share(encoded, crops, layouts, text)
        budgets = self.budget(shares, layouts)
        kept = self.select(scores, budgets, layouts)
        return self.pack(tokens, kept, layouts)

    def encode(self, crops: Tensor) -> Encoded:
        """The whole tower with all its maps and hidden states."""
        output = self.model.vision_tower(
            crops, output_attentions=True, output_hidden_states=True, return_dict=True
        )
        layer = self.model.config.vision_feature_layer
        return Encoded(output.attentions, output.hidden_states[layer][:, 1:], output.hidden_states[-1][:, 0])

    def project(self, features: Tensor) -> Tensor:
        """Every token in the language model's width."""
        return self.model.multi_modal_projector(features)

    def score(self, encoded: Encoded, layouts: Sequence[ImageLayout]) -> list[Tensor]:
        """Patch scores ``[P]`` of each crop: second softmax a head, mean over heads, mean over layers."""
        scores, crop = [], 0
        for layout in layouts:
            for number in range(layout.crops):
                layers = self.thumbnail_layers if number == layout.thumbnail_crop else self.tile_layers
                rows = [encoded.attentions[layer][crop, :, 0, 1:].float() for layer in layers]
                scores.append(torch.stack([row.softmax(-1).mean(0) for row in rows]).mean(0))
                crop += 1
        return scores

    def share(
        self,
        encoded: Encoded,
        crops: Tensor,
        layouts: Sequence[ImageLayout],
        text: Sequence[str] | None,
    ) -> list[Tensor]:
        """Share ``[K]`` of each image's tiles: density, saliency, relevance."""
        config, relevance = self.config, self.relevance
        weights = config.signal_weights(with_relevance=relevance is not None)
        if relevance is not None:
            clip = relevance.clip_model
            images = F.normalize(_embedding(clip.get_image_features(pixel_values=crops)).float(), dim=-1)
        shares, first = [], 0
        for number, layout in enumerate(layouts):
            tiles = range(first + layout.first_tile, first + layout.first_tile + layout.tiles)
            thumbnail = encoded.cls[first + layout.thumbnail_crop].float()
            density = torch.tensor(layout.valid_counts, dtype=torch.float32, device=crops.device)
            share = weights.density * density / density.sum()
            saliency = [F.cosine_similarity(encoded.cls[tile].float(), thumbnail, dim=0) for tile in tiles]
            share = share + weights.saliency * (torch.stack(saliency) / config.temperature_cls).softmax(0)
            if relevance is not None:
                inputs = relevance.tokenizer(text[number], add_special_tokens=False)["input_ids"]
                ids = [relevance.tokenizer.bos_token_id, *inputs, relevance.tokenizer.eos_token_id]
                ids = torch.tensor([ids], device=crops.device)
                question = _embedding(clip.get_text_features(input_ids=ids)).float()
                question = F.normalize(question, dim=-1)[0]
                cosine = torch.stack([images[tile] @ question for tile in tiles])
                share = share + weights.relevance * (cosine / config.temperature_clip).softmax(0)
            shares.append(share)
            first += layout.crops
        return shares

    def budget(self, shares: Sequence[Tensor], layouts: Sequence[ImageLayout]) -> list[list[int]]:
        """Patches to keep of each crop of each image: floored, capped, the rest lost."""
        ratio, budgets = self.config.keep_ratio, []
        for share, layout in zip(shares, layouts):
            total = math.floor(ratio * layout.tiles * layout.patches + 1e-9)
            tiles = [
                min(math.floor(part.item() * total), valid) for part, valid in zip(share, layout.valid_counts)
            ]
            budgets.append([math.floor(ratio * layout.patches + 1e-9), *tiles])
        return budgets

    def select(
        self, scores: Sequence[Tensor], budgets: Sequence[Sequence[int]], layouts: Sequence[ImageLayout]
    ) -> list[Tensor]:
        """Kept patches of each crop, in raster order: ``topk``, then sorted."""
        kept, crop = [], 0
        for budget, layout in zip(budgets, layouts):
            side = layout.side
            for number in range(layout.crops):
                score = scores[crop].view(side, side)
                if number != layout.thumbnail_crop:
                    top, bottom, left, right = layout.tile_rectangles[number - layout.first_tile]
                    valid = torch.zeros_like(score, dtype=torch.bool)
                    valid[top:bottom, left:right] = True
                    score = score.masked_fill(~valid, -torch.inf)
                kept.append(score.flatten().topk(budget[number]).indices.sort().values)
                crop += 1
        return kept

    def pack(
        self, tokens: Tensor, kept: Sequence[Tensor], layouts: Sequence[ImageLayout]
    ) -> tuple[list[Tensor], list[list[int]]]:
        """The stock sequence of each image with what was kept, a newline after every row of the grid."""
        newline = self.model.image_newline.to(tokens.dtype)[None]
        packed, sources, first = [], [], 0
        for layout in layouts:
            side, (rows, columns) = layout.side, layout.grid
            patches = kept[first].tolist()
            parts, source = [tokens[first][kept[first]]], [first * layout.patches + p for p in patches]
            for row in range(rows * side):
                for column in range(columns):
                    crop = first + layout.first_tile + row // side * columns + column
                    here = kept[crop]
                    here = here[here // side == row % side]
                    parts.append(tokens[crop][here])
                    source += [crop * layout.patches + patch for patch in here.tolist()]
                if layout.rows[0] <= row < layout.rows[1]:
                    parts.append(newline)
                    source.append(-1)
            packed.append(torch.cat(parts))
            sources.append(source)
            first += layout.crops
        return packed, sources


def _embedding(output) -> Tensor:
    """What CLIP's ``get_*_features`` returned: a tensor, or an output that holds it."""
    return output if isinstance(output, Tensor) else output.pooler_output
