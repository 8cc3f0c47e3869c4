"""Slow reference for dropping visual tokens in LLaVA-NeXT and LLaVA-1.5, with CLIP or SigLIP towers.

``independent_families.py`` adds the other families.

It is written from the specification alone and shares no code with the package under test. Everything is
done one crop, one tile and one token at a time, in plain Python: float64 for signals, integers and fractions
for budgets. The only things borrowed from transformers are the model itself (run with eager attention, one
crop and one row at a time) and the model's own rules for grids and padding (``select_best_resolution``,
``image_size_to_num_patches``, ``unpad_image``).

Words: a *crop* is one input of the vision tower. Crop 0 of an image is its *thumbnail*, then come the K
*tiles*, row-major on a grid of ``gh x gw``. Every crop has P patches. Crops are numbered over the whole
batch, without the crops that only pad the batch. Without a CLS token a patch's score is the attention that it
receives, averaged over queries, and the mean of a crop's valid patch features stands for its CLS vector.

``python independent.py`` checks that keeping everything gives the stock model.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches, unpad_image

SHARE_ONE = 2**24
"""Shares are quantised to integers, with this number standing for a share of 1."""

NEWLINE = -1
"""How ``ImageResult.index`` writes an ``image_newline`` row."""

IGNORE = -100
"""The label that the loss ignores."""


@dataclass(frozen=True)
class Rule:
    """What to keep.

    ``keep_tokens`` wins over ``keep_ratio`` where both are given. The layers are 0-based encoder layers,
    already resolved (no fractions, no negative numbers); the defaults suit the six layers of `tiny_model` and
    mean nothing else. ``density``, ``saliency``, ``relevance`` and ``entropy`` weigh the tile signals; they
    need not sum to 1.
    """

    keep_ratio: float | None = 0.2
    keep_tokens: int | None = None
    tile_layers: tuple[int, ...] = (1, 2)
    thumbnail_layers: tuple[int, ...] = (4,)
    density: float = 0.2
    saliency: float = 0.8
    relevance: float = 0.0
    entropy: float = 0.0
    temperature_cls: float = 0.1
    temperature_clip: float = 0.05
    allocation: str = "exact"
    second_softmax: bool = False


@dataclass
class ImageResult:
    """What is kept of one image.

    Attributes:
        index: In packed order, ``global_crop * P + patch`` of a kept patch, ``-1`` of a newline.
        budgets: Kept patches of each crop, in the model's order (thumbnail first in LLaVA).
        shares: Share of each crop before quantisation, 0.0 for the thumbnail.
        scores: Patch scores, ``[crops][P]``.
        tokens: ``[n, D_llm]``, the projected features and newline rows in the order of ``index``.
    """

    index: list[int]
    budgets: list[int]
    shares: list[float]
    scores: list[list[float]]
    tokens: torch.Tensor


@dataclass
class Layout:
    """What follows from the size of one image alone. Crops are numbered within the image here.

    Crop 0 is the thumbnail here wherever the model has it; `number` tells the place in the model's order.

    Attributes:
        crops: Number of crops, thumbnail included.
        rows: The rows of the stitched tile grid that un-padding keeps; each is a list of ``(crop, patch)``.
        valid: For each crop the patches that un-padding keeps, ascending. All of them for the thumbnail.
        thumbnail_last: The model has the thumbnail behind the tiles, and the tiles one after the other
            instead of stitched.
    """

    crops: int
    rows: list[list[tuple[int, int]]]
    valid: list[list[int]]
    thumbnail_last: bool = False

    @property
    def inputs(self) -> int:
        """Number of crops that go through the vision tower."""
        return self.crops

    def number(self, crop: int) -> int:
        """The number of a crop in the model's order."""
        return (crop - 1) % self.crops if self.thumbnail_last else crop

    def in_order(self, values: Sequence[Any]) -> list[Any]:
        """Values of the crops, thumbnail first, in the model's order."""
        return [
            values[(place + 1) % self.crops if self.thumbnail_last else place] for place in range(self.crops)
        ]


@dataclass
class Row:
    """One row of a batch without padding: ``embeds`` is ``[n, D_llm]``, ``labels`` n numbers or None."""

    embeds: torch.Tensor
    labels: list[int] | None


# ----------------------------------------------------------------------------------------------------
# plain arithmetic


def floor_ratio(x: float) -> int:
    """The floor of a ratio of a count: 0.29 * 100 is 29."""
    return math.floor(x + 1e-9)


def softmax(values: Sequence[float]) -> list[float]:
    """Softmax of a few numbers."""
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    total = math.fsum(powers)
    return [power / total for power in powers]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine of two vectors, 0 where one of them is zero."""
    if len(a) != len(b):
        raise ValueError(f"cosine of vectors of length {len(a)} and {len(b)}")
    norm = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
    if norm == 0.0:
        return 0.0
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norm


def normalised(values: Sequence[float]) -> list[float]:
    """The values over their sum; all equal where the sum is 0."""
    total = math.fsum(values)
    if total == 0.0:
        return [1.0 / len(values) for _ in values]
    return [value / total for value in values]


def quantised(shares: Sequence[float]) -> list[int]:
    """Shares as integers: ``floor(share * 2**24 + 0.5)``."""
    return [math.floor(Fraction(share) * SHARE_ONE + Fraction(1, 2)) for share in shares]


def plan(rule: Rule, patches: int, valid: Sequence[int], room: int | None = None) -> tuple[int, int, int]:
    """Counts that follow from the layout alone.

    Args:
        rule: The rule.
        patches: P.
        valid: Number of valid patches of each tile.
        room: What the ratio of the tiles refers to, P times the tiles if None.

    Returns:
        The thumbnail's budget, the budget B of all tiles together, and the M of the ``floor`` allocation.
    """
    tiles = len(valid)
    total = sum(valid)
    if rule.keep_tokens is not None:
        count = rule.keep_tokens
        if count < 0:
            raise ValueError(f"keep_tokens={count}")
        thumbnail = min(count // (tiles + 1), patches)
        budget = min(count - thumbnail, total)
        thumbnail = min(patches, count - budget)
        return thumbnail, budget, budget
    if rule.keep_ratio is None or not 0.0 < rule.keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio={rule.keep_ratio}")
    thumbnail = floor_ratio(rule.keep_ratio * patches)
    multiplier = floor_ratio(rule.keep_ratio * (tiles * patches if room is None else room))
    return thumbnail, min(multiplier, total), multiplier


def allocate_exact(weights: Sequence[int], caps: Sequence[int], budget: int) -> list[int]:
    """Water-filling: shares of the budget in proportion to the weights, no tile above its cap, none lost.

    Args:
        weights: Quantised shares.
        caps: Valid patches of each tile.
        budget: What to give out; at most the sum of the caps.
    """
    if not 0 <= budget <= sum(caps):
        raise ValueError(f"a budget of {budget} under caps {list(caps)}")
    given = [0] * len(caps)
    active = [tile for tile in range(len(caps)) if caps[tile] > 0]
    weight = {tile: weights[tile] for tile in active}
    total = 0
    left = budget
    while active:
        total = sum(weights[tile] for tile in active)
        weight = {tile: weights[tile] for tile in active}
        if total == 0:
            weight = dict.fromkeys(active, 1)
            total = len(active)
        full = [tile for tile in active if left * weight[tile] >= caps[tile] * total]
        if not full:
            break
        for tile in full:
            given[tile] = caps[tile]
            left -= caps[tile]
            active.remove(tile)
    if not active:
        assert left == 0
        return given
    remainder: dict[int, Fraction] = {}
    missing = left
    for tile in active:
        exact = Fraction(left * weight[tile], total)
        given[tile] = math.floor(exact)
        remainder[tile] = exact - given[tile]
        missing -= given[tile]
    for tile in sorted(active, key=lambda tile: (-remainder[tile], tile))[:missing]:
        given[tile] += 1
    assert sum(given) == budget
    assert all(0 <= got <= cap for got, cap in zip(given, caps, strict=True))
    return given


def allocate_floor(weights: Sequence[int], caps: Sequence[int], multiplier: int) -> list[int]:
    """Each tile its floored share of the multiplier, at most its cap; what is left over is lost."""
    total = sum(weights)
    if total == 0:
        weights, total = [1] * len(caps), len(caps)
    given = []
    for weight, cap in zip(weights, caps, strict=True):
        given.append(min(math.floor(Fraction(weight * multiplier, total)), cap))
    return given


def select(scores: Sequence[float], valid: Sequence[int], budget: int) -> list[int]:
    """The budget's highest-scoring valid patches, ties to the lower index, in raster order."""
    if any(math.isnan(scores[patch]) for patch in valid):
        raise ValueError("a patch score is NaN")
    ranked = sorted(valid, key=lambda patch: (-scores[patch], patch))
    return sorted(ranked[:budget])


def concentration(scores: Sequence[float], valid: Sequence[int]) -> float:
    """``1 - H(p) / ln(number of valid patches)`` of the scores over the valid patches, at least 0."""
    total = math.fsum(scores[patch] for patch in valid)
    if len(valid) <= 1 or total == 0.0:
        return 0.0
    terms = []
    for patch in valid:
        probability = scores[patch] / total
        if probability > 0.0:
            terms.append(-probability * math.log(probability))
    return max(0.0, 1.0 - math.fsum(terms) / math.log(len(valid)))


def numbers(tensor: torch.Tensor) -> list[float]:
    """A vector, seen in fp32, as Python floats."""
    return [float(x) for x in tensor.detach().float().cpu().reshape(-1).tolist()]


def one_number(value: int | Sequence[int]) -> int:
    """The side of a square that is given by one number or by two."""
    if isinstance(value, int):
        return value
    height, width = value
    if height != width:
        raise ValueError(f"{height} x {width} is no square")
    return height


def padding_side(mask: Sequence[Sequence[int]]) -> str:
    """The side a batch was padded on: ``left`` if nothing says otherwise."""
    if any(row[0] == 0 for row in mask):
        return "left"
    if any(row[-1] == 0 for row in mask):
        return "right"
    return "left"


# ----------------------------------------------------------------------------------------------------
# the reference


class Independent:
    """The reference around a private eager copy of a model.

    Args:
        model: Any model of these classes, changed by whomever: the copy is built afresh from its config and
            filled with copies of its weights and buffers, so no hook, no replaced method and
            no attention function of the given model comes along.
    """

    def __init__(self, model: LlavaNextForConditionalGeneration | LlavaForConditionalGeneration) -> None:
        config = copy.deepcopy(model.config)
        config._attn_implementation = "eager"
        with torch.random.fork_rng():
            own = type(model)(config)
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        own.load_state_dict(state, assign=True)
        buffers = dict(model.named_buffers())
        for name, buffer in list(own.named_buffers()):
            if name in buffers:
                parent, _, leaf = name.rpartition(".")
                own.get_submodule(parent)._buffers[leaf] = buffers[name].detach().clone()
            else:
                raise ValueError(f"the model has no buffer {name}, shape {tuple(buffer.shape)}")
        own.set_attn_implementation("eager")
        self.model = own.eval().requires_grad_(False)

        self.config = config = own.config
        self.has_cls = config.vision_config.model_type in ("clip_vision_model", "internvl_vision")
        wanted = "default" if self.has_cls else "full"
        if getattr(config, "vision_feature_select_strategy", wanted) != wanted:
            raise ValueError("vision_feature_select_strategy must drop the CLS token, if there is one")
        self.crop_size: int = one_number(config.vision_config.image_size)
        self.tower_side: int = self.crop_size // one_number(config.vision_config.patch_size)
        self.side: int = self.tower_side // self.merge
        self.patches: int = self.side * self.side
        self.device = own.lm_head.weight.device

    # -------------------------------------------------------------------------------- parts of the model

    @property
    def merge(self) -> int:
        """A token is a square of so many patches a side; P counts tokens."""
        return 1

    @property
    def vision_tower(self) -> torch.nn.Module:
        return self.model.model.vision_tower

    @property
    def projector(self) -> torch.nn.Module:
        """What makes a token for the language model of a token's features."""
        return self.model.model.multi_modal_projector

    @property
    def language_model(self) -> torch.nn.Module:
        return self.model.model.language_model

    # -------------------------------------------------------------------------------- layout

    def layout(self, image_size: Sequence[int]) -> Layout:
        """The layout of an image of ``(height, width)`` pixels."""
        size = [int(x) for x in image_size]
        if not hasattr(self.config, "image_grid_pinpoints"):
            return Layout(crops=1, rows=[], valid=[list(range(self.patches))])
        pinpoints = self.config.image_grid_pinpoints
        crops = image_size_to_num_patches(size, pinpoints, self.crop_size)
        everything = list(range(self.patches))
        if crops == 1:
            return Layout(crops=1, rows=[[]], valid=[everything])
        height, width = select_best_resolution(size, pinpoints)
        grid_h, grid_w = height // self.crop_size, width // self.crop_size
        if crops != 1 + grid_h * grid_w:
            raise ValueError(f"{crops} crops on a grid of {grid_h}x{grid_w}")

        stitched = torch.zeros(1, grid_h * self.side, grid_w * self.side, dtype=torch.long)
        for y in range(grid_h * self.side):
            for x in range(grid_w * self.side):
                crop = 1 + (y // self.side) * grid_w + x // self.side
                patch = (y % self.side) * self.side + x % self.side
                stitched[0, y, x] = crop * self.patches + patch
        rows = []
        for line in unpad_image(stitched, size)[0].tolist():
            rows.append([(code // self.patches, code % self.patches) for code in line])
        valid = [everything]
        for crop in range(1, crops):
            valid.append(sorted(patch for row in rows for c, patch in row if c == crop))
        return Layout(crops=crops, rows=rows, valid=valid)

    def stock_index(self, layout: Layout) -> list[int]:
        """The stock sequence: ``crop * P + patch`` with the image's own crop numbers, ``-1`` a newline."""
        index = []
        for place in self.order(layout):
            index.append(NEWLINE if place is None else layout.number(place[0]) * self.patches + place[1])
        return index

    def order(self, layout: Layout) -> list[tuple[int, int] | None]:
        """The stock sequence as pairs of crop (0 is the thumbnail) and patch, None a newline."""
        thumbnail: list[tuple[int, int] | None] = [(0, patch) for patch in range(self.patches)]
        if layout.thumbnail_last:
            tiles = [(tile, patch) for tile in range(1, layout.crops) for patch in range(self.patches)]
            return [*tiles, *thumbnail]
        sequence = thumbnail
        for row in layout.rows:
            sequence.extend(row)
            sequence.append(None)
        return sequence

    def runs(self, layout: Layout) -> list[list[int]]:
        """The stock sequence, cut where the prompt has other tokens between the placeholders of an image."""
        return [self.stock_index(layout)]

    # -------------------------------------------------------------------------------- images

    def crop_list(self, pixel_values: torch.Tensor, layouts: Sequence[Layout]) -> list[torch.Tensor]:
        """The crops of the batch in global order, each ``[3, S, S]``, without those that pad the batch."""
        if pixel_values.dim() == 5:
            if len(pixel_values) != len(layouts):
                raise ValueError(f"{len(pixel_values)} images in pixel_values, {len(layouts)} sizes")
            crops = []
            for image, layout in zip(pixel_values, layouts, strict=True):
                if len(image) < layout.inputs:
                    raise ValueError(f"{len(image)} crops in pixel_values, {layout.inputs} by its size")
                for crop in range(layout.inputs):
                    crops.append(image[crop])
            return crops
        if pixel_values.dim() != 4:
            raise ValueError(f"pixel_values of shape {tuple(pixel_values.shape)}")
        expected = sum(layout.inputs for layout in layouts)
        if len(pixel_values) != expected:
            raise ValueError(f"{len(pixel_values)} crops in pixel_values, {expected} by the image sizes")
        return list(pixel_values)

    def patch_scores(
        self, attentions: Sequence[torch.Tensor], layers: Sequence[int], again: bool
    ) -> list[float]:
        """Mean over layers and heads of the attention probability of CLS, or of any query, to each patch.

        Args:
            attentions: Of one crop, for each encoder layer ``[1, heads, N, N]``.
            layers: The layers to average.
            again: Apply a second softmax over the values of each head.

        Returns:
            P scores. That of a token of several patches is the mean of theirs.
        """
        if not layers or min(layers) < 0 or max(layers) >= len(attentions):
            raise ValueError(f"layers {tuple(layers)} of a tower of {len(attentions)}")
        patches = self.tower_side**2
        total = [0.0] * patches
        for layer in layers:
            maps = attentions[layer][0]
            for head in range(len(maps)):
                row = numbers(maps[head, 0])[1:] if self.has_cls else numbers(maps[head].double().mean(0))
                if again:
                    row = softmax(row)
                for patch in range(patches):
                    total[patch] += row[patch] / (len(maps) * len(layers))
        if self.merge == 1:
            return total
        return [
            math.fsum(total[patch] for patch in self.patches_of(token)) / self.merge**2
            for token in range(self.patches)
        ]

    def patches_of(self, token: int) -> list[int]:
        """The patches of a token, row by row."""
        top, left = (place * self.merge for place in divmod(token, self.side))
        return [
            (top + down) * self.tower_side + left + right
            for down in range(self.merge)
            for right in range(self.merge)
        ]

    def tile_shares(
        self,
        rule: Rule,
        layout: Layout,
        scores: Sequence[Sequence[float]],
        cls: Sequence[Sequence[float]],
        text_embedding: Sequence[float] | None,
        image_embeddings: Sequence[Sequence[float]] | None,
    ) -> list[float]:
        """Shares of the tiles of one image.

        Args:
            rule: The rule.
            layout: Layout of the image.
            scores: Patch scores of its crops.
            cls: CLS vectors of its crops.
            text_embedding: Embedding of its question, needed for relevance only.
            image_embeddings: CLIP embeddings of its crops, needed for relevance only.
        """
        tiles = range(1, layout.crops)
        weights = [rule.density, rule.saliency, rule.relevance, rule.entropy]
        if min(weights) < 0.0 or sum(weights) <= 0.0:
            raise ValueError(f"weights {weights}")
        signals: list[list[float]] = []
        used: list[float] = []
        if rule.density > 0.0:
            used.append(rule.density)
            signals.append(normalised([len(layout.valid[tile]) / self.patches for tile in tiles]))
        if rule.saliency > 0.0:
            used.append(rule.saliency)
            signals.append(softmax([cosine(cls[tile], cls[0]) / rule.temperature_cls for tile in tiles]))
        if rule.relevance > 0.0:
            if text_embedding is None or image_embeddings is None:
                raise ValueError("relevance needs text_embeddings and image_embeddings")
            used.append(rule.relevance)
            cosines = [cosine(image_embeddings[tile], text_embedding) for tile in tiles]
            signals.append(softmax([value / rule.temperature_clip for value in cosines]))
        if rule.entropy > 0.0:
            used.append(rule.entropy)
            signals.append(normalised([concentration(scores[tile], layout.valid[tile]) for tile in tiles]))
        shares = []
        for position in range(len(tiles)):
            terms = [weight * signal[position] for weight, signal in zip(used, signals, strict=True)]
            shares.append(math.fsum(terms) / math.fsum(used))
        return shares

    def plan(self, rule: Rule, valid: Sequence[int]) -> tuple[int, int, int]:
        """`plan` of an image with so many valid patches a tile."""
        return plan(rule, self.patches, valid)

    def _plan(self, rule: Rule, layout: Layout) -> tuple[int, int, int]:
        """`plan` of an image of this layout."""
        return self.plan(rule, [len(patches) for patches in layout.valid[1:]])

    @torch.no_grad()
    def images(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | Sequence[Sequence[int]],
        rule: Rule,
        text_embeddings: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
    ) -> list[ImageResult]:
        """Encode and reduce each image.

        Args:
            pixel_values: ``[images, max_crops, 3, S, S]`` padded, or ``[crops, 3, S, S]``.
            image_sizes: ``(height, width)`` of each image.
            rule: What to keep.
            text_embeddings: ``[images, E]``, the question of each image; needed if relevance has weight.
            image_embeddings: ``[crops, E]``, every crop of the batch in global numbering, also thumbnails.
        """
        sizes = [[int(x) for x in size] for size in image_sizes]
        layouts = [self.layout(size) for size in sizes]
        crops = self.crop_list(pixel_values, layouts)
        return self._results(layouts, crops, rule, text_embeddings, image_embeddings)

    def _results(
        self,
        layouts: Sequence[Layout],
        crops: Sequence[torch.Tensor],
        rule: Rule,
        text_embeddings: torch.Tensor | None,
        image_embeddings: torch.Tensor | None,
    ) -> list[ImageResult]:
        """`images` where layouts and crops are known."""
        if image_embeddings is not None and len(image_embeddings) != len(crops):
            raise ValueError(f"{len(image_embeddings)} image embeddings for {len(crops)} crops")
        if text_embeddings is not None and len(text_embeddings) != len(layouts):
            raise ValueError(f"{len(text_embeddings)} text embeddings for {len(layouts)} images")

        results = []
        first = start = 0  # the image's first crop, as they are numbered and among those of the tower
        for image, layout in enumerate(layouts):
            own = crops[start : start + layout.inputs]
            text = None if text_embeddings is None else numbers(text_embeddings[image])
            pictures = None
            if image_embeddings is not None:
                if layout.inputs != layout.crops:
                    raise ValueError("relevance is for tiles that the tower sees")
                places = [start + layout.number(crop) for crop in range(layout.crops)]
                pictures = [numbers(image_embeddings[place]) for place in places]
            results.append(self._image(own, layout, rule, first, text, pictures))
            first += layout.crops
            start += layout.inputs
        return results

    def _image(
        self,
        crops: Sequence[torch.Tensor],
        layout: Layout,
        rule: Rule,
        first: int,
        text_embedding: Sequence[float] | None,
        image_embeddings: Sequence[Sequence[float]] | None,
    ) -> ImageResult:
        """One image, whose first crop has the global number ``first``."""
        scores, cls, features = self._encoded(crops, layout, rule)
        valid = [len(patches) for patches in layout.valid[1:]]
        thumbnail, budget, multiplier = self._plan(rule, layout)
        shares: list[float] = []
        budgets: list[int] = []
        if valid:
            shares = self.tile_shares(rule, layout, scores, cls, text_embedding, image_embeddings)
            weights = quantised(shares)
            if rule.allocation == "exact":
                budgets = allocate_exact(weights, valid, budget)
            elif rule.allocation == "floor":
                budgets = allocate_floor(weights, valid, multiplier)
            else:
                raise ValueError(f"allocation={rule.allocation!r}")
        budgets = [thumbnail, *budgets]
        kept = [select(scores[crop], layout.valid[crop], budgets[crop]) for crop in range(layout.crops)]
        index, tokens = self._sequence(layout, first, kept, features)
        listed = (layout.in_order(values) for values in (budgets, [0.0, *shares], scores))
        return ImageResult(index, *listed, tokens)

    def _encoded(
        self, crops: Sequence[torch.Tensor], layout: Layout, rule: Rule
    ) -> tuple[list[list[float]], list[list[float]], list[torch.Tensor]]:
        """Scores ``[P]``, CLS vector (or what stands for it) and tokens' features ``[P, C]`` of each crop.

        The crops come in the model's order, the results with the thumbnail first.
        """
        scores: list[list[float]] = []
        cls: list[list[float]] = []
        features: list[torch.Tensor] = []
        for crop in range(layout.crops):
            out = self.vision_tower(
                crops[layout.number(crop)][None].to(self.device, self.model.dtype),
                output_attentions=True,
                output_hidden_states=True,
                return_dict=True,
            )
            layers = rule.thumbnail_layers if crop == 0 else rule.tile_layers
            scores.append(self.patch_scores(out.attentions, layers, rule.second_softmax))
            own = self._tower_features(out)[0]
            patches = own[1:] if self.has_cls else own
            if self.has_cls:
                cls.append(numbers(self._cls(out)))
            else:
                seen = [patch for token in layout.valid[crop] for patch in self.patches_of(token)]
                # A tile that is all padding has no mean: its vector is zero, and so is its cosine.
                mean = patches[seen].double().mean(0) if seen else torch.zeros(own.shape[1])
                cls.append(numbers(mean))
            if self.merge > 1:
                tokens = []
                for token in range(self.patches):
                    tokens.append(torch.cat([patches[patch] for patch in self.patches_of(token)]))
                patches = torch.stack(tokens)
            features.append(patches)
        return scores, cls, features

    def _tower_features(self, out: Any) -> torch.Tensor:
        """The features that the model uses, CLS still there."""
        return self._features(out.hidden_states)

    def _cls(self, out: Any) -> torch.Tensor:
        """CLS behind the last layer, before any norm that follows."""
        return out.last_hidden_state[0, 0]

    def _sequence(self, layout: Layout, first: int, kept, features) -> tuple[list[int], torch.Tensor]:
        """Index and tokens of an image: ``kept`` patches of each crop, newlines, in the stock order.

        ``features`` holds the feature of every kept patch, by crop and patch.
        """
        index: list[int] = []
        tokens: list[torch.Tensor] = []

        def keep(crop: int, patch: int) -> None:
            index.append((first + layout.number(crop)) * self.patches + patch)
            tokens.append(self._token(layout, crop, features[crop][patch]))

        for place in self.order(layout):
            if place is None:
                index.append(NEWLINE)
                tokens.append(self.model.model.image_newline.to(self.model.dtype))
            elif place[1] in kept[place[0]]:
                keep(*place)
        if not tokens:
            return index, self.model.get_input_embeddings().weight.new_empty(
                0, self.model.lm_head.in_features
            )
        return index, torch.stack(tokens)

    def _token(self, layout: Layout, crop: int, feature: torch.Tensor) -> torch.Tensor:
        """What the language model gets of a token's feature."""
        return self.projector(feature[None, None])[0, 0]

    def _features(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The hidden states that the model uses, CLS still there."""
        layer = self.config.vision_feature_layer
        if isinstance(layer, int):
            return hidden_states[layer]
        return torch.cat([hidden_states[one] for one in layer], dim=-1)

    # -------------------------------------------------------------------------------- sequences

    def _rows(
        self,
        inputs: Mapping[str, Any],
        rule: Rule,
        text_embeddings: torch.Tensor | None,
        image_embeddings: torch.Tensor | None,
    ) -> tuple[list[Row], list[ImageResult], str]:
        """Rows without padding, the images' results, and the side the input was padded on."""
        ids = inputs["input_ids"].tolist()
        given_mask, given_labels = inputs.get("attention_mask"), inputs.get("labels")
        mask = [[1] * len(row) for row in ids] if given_mask is None else given_mask.tolist()
        labels = None if given_labels is None else given_labels.tolist()

        layouts: list[Layout] = []
        results: list[ImageResult] = []
        if inputs.get("pixel_values") is not None:
            layouts, crops = self._read(inputs)
            results = self._results(layouts, crops, rule, text_embeddings, image_embeddings)
        pending: list[tuple[int, list[int]]] = []  # runs of placeholders that are still to come
        firsts, steps = [0], [0] * len(layouts)
        for image, layout in enumerate(layouts):
            pending.extend((image, run) for run in self.runs(layout))
            firsts.append(firsts[-1] + layout.crops)

        embed = self.model.get_input_embeddings()
        rows = []
        for b in range(len(ids)):
            real = [position for position in range(len(ids[b])) if mask[b][position]]
            if not real or real != list(range(real[0], real[-1] + 1)):
                raise ValueError(f"row {b}: the attention mask is empty or has holes")
            end = real[-1] + 1
            vectors: list[torch.Tensor] = []
            targets: list[int] = []
            position = real[0]
            while position < end:
                if ids[b][position] != self.config.image_token_id:
                    vectors.append(embed(torch.tensor([ids[b][position]], device=self.device))[0])
                    if labels is not None:
                        targets.append(labels[b][position])
                    position += 1
                    continue
                if not pending:
                    raise ValueError(f"row {b}: a placeholder without an image")
                image, stock = pending.pop(0)
                run = ids[b][position : min(position + len(stock), end)]
                if run != [self.config.image_token_id] * len(stock):
                    raise ValueError(f"row {b}: image {image} does not have its {len(stock)} placeholders")
                # Walk the stock sequence of the image: what is not kept falls out, with its label.
                result = results[image]
                for offset, code in enumerate(stock):
                    wanted = code if code == NEWLINE else code + firsts[image] * self.patches
                    if steps[image] < len(result.index) and result.index[steps[image]] == wanted:
                        vectors.append(result.tokens[steps[image]])
                        if labels is not None:
                            targets.append(labels[b][position + offset])
                        steps[image] += 1
                position += len(stock)
            dtype = embed.weight.dtype
            embeds = torch.stack([vector.to(self.device, dtype) for vector in vectors])
            rows.append(Row(embeds, None if labels is None else targets))
        if pending:
            raise ValueError(f"{len(results)} images, placeholders for {pending[0][0]}")
        assert steps == [len(result.index) for result in results]
        return rows, results, padding_side(mask)

    def _read(self, inputs: Mapping[str, Any]) -> tuple[list[Layout], list[torch.Tensor]]:
        """The layouts of a batch's images and their crops in global order."""
        sizes = inputs.get("image_sizes", [(self.crop_size, self.crop_size)] * len(inputs["pixel_values"]))
        layouts = [self.layout([int(x) for x in size]) for size in sizes]
        return layouts, self.crop_list(inputs["pixel_values"], layouts)

    @torch.no_grad()
    def inputs(
        self,
        inputs: Mapping[str, Any],
        rule: Rule,
        text_embeddings: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """The model's input with exactly the kept tokens in place of each image's placeholders.

        Args:
            inputs: Output of the stock processor, with all placeholders: ``input_ids``, ``pixel_values``,
                ``image_sizes`` and, optionally, ``attention_mask`` and ``labels``.
            rule: What to keep.
            text_embeddings: As in `images`.
            image_embeddings: As in `images`.

        Returns:
            ``inputs_embeds``, ``attention_mask``, ``labels`` (or None), padded with zeros, 0 and -100 on the
            side the input was padded on; ``lengths``, the number of tokens of each row without padding;
            ``results``, those of `images`. A kept token has the label of its own placeholder.
        """
        rows, results, side = self._rows(inputs, rule, text_embeddings, image_embeddings)
        lengths = [len(row.embeds) for row in rows]
        longest = max(lengths)
        embeds = rows[0].embeds.new_zeros(len(rows), longest, rows[0].embeds.shape[1])
        mask = torch.zeros(len(rows), longest, dtype=torch.long, device=self.device)
        labels = torch.full_like(mask, IGNORE)
        for b, row in enumerate(rows):
            start = longest - lengths[b] if side == "left" else 0
            for i in range(lengths[b]):
                embeds[b, start + i] = row.embeds[i]
                mask[b, start + i] = 1
                if row.labels is not None:
                    labels[b, start + i] = row.labels[i]
        return {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "labels": None if rows[0].labels is None else labels,
            "lengths": lengths,
            "results": results,
        }

    def _forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, V]`` of one row ``[n, D_llm]``, with an all-ones mask and without a cache."""
        out = self.language_model(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long, device=self.device),
            use_cache=False,
            return_dict=True,
        )
        return self.model.lm_head(out.last_hidden_state)[0]

    @torch.no_grad()
    def logits(
        self,
        inputs: Mapping[str, Any],
        rule: Rule,
        text_embeddings: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Logits ``[n_b, V]`` of each row without padding, the rows run one at a time."""
        rows, _, _ = self._rows(inputs, rule, text_embeddings, image_embeddings)
        return [self._forward(row.embeds) for row in rows]

    @torch.no_grad()
    def loss(
        self,
        inputs: Mapping[str, Any],
        rule: Rule,
        text_embeddings: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
    ) -> float:
        """Mean cross entropy over all labelled tokens of the batch, each predicted by the token before it.

        The first token of a row has nothing before it and does not count. (With padding on the left,
        transformers lets the last padding token predict it: label it -100 before comparing.) NaN where
        nothing is labelled, as in transformers.
        """
        rows, _, _ = self._rows(inputs, rule, text_embeddings, image_embeddings)
        terms = []
        for row in rows:
            if row.labels is None:
                raise ValueError("loss needs labels")
            logits = self._forward(row.embeds).double()
            for position in range(1, len(row.labels)):
                target = row.labels[position]
                if target != IGNORE:
                    terms.append(-float(torch.log_softmax(logits[position - 1], dim=0)[target]))
        return math.fsum(terms) / len(terms) if terms else math.nan

    @torch.no_grad()
    def greedy(
        self,
        inputs: Mapping[str, Any],
        rule: Rule,
        n: int,
        text_embeddings: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
    ) -> list[list[int]]:
        """``n`` greedy tokens for each row, the whole forward again at each step; it does not stop at EOS."""
        rows, _, _ = self._rows(inputs, rule, text_embeddings, image_embeddings)
        embed = self.model.get_input_embeddings()
        answers = []
        for row in rows:
            embeds, answer = row.embeds, []
            for _ in range(n):
                answer.append(int(self._forward(embeds)[-1].argmax()))
                embeds = torch.cat([embeds, embed(torch.tensor([answer[-1]], device=self.device))])
            answers.append(answer)
        return answers


# ----------------------------------------------------------------------------------------------------
# a tiny model

CROP, PATCH = 56, 14
"""Side of a crop and of a patch of the tiny model, in pixels: 16 patches a crop."""

PINPOINTS = [[h * CROP, w * CROP] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (1, 1))]
"""Resolutions of the tiny model, ``[height, width]``."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }} : "
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A whitespace tokenizer of fewer than 100 words that pads on the left and adds nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = (
        "<unk> <pad> <s> </s> <image> USER : ASSISTANT what is in this picture and that one describe the two "
        "pictures please . ?"
    )
    vocabulary = [*words.split(), *(f"w{i}" for i in range(60))]
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_processor(family: str = "llava_next", tower: str = "clip") -> LlavaNextProcessor | LlavaProcessor:
    """A processor for `tiny_model`; its chat template renders ``USER : <image> text ASSISTANT :``."""
    shared = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        "image_token": "<image>",
        "num_additional_image_tokens": int(tower == "clip"),
        "chat_template": CHAT_TEMPLATE,
    }
    if family == "llava":
        try:
            from transformers import CLIPImageProcessorPil as CLIPImageProcessor
        except ImportError:
            from transformers import CLIPImageProcessor
        crop = {"height": CROP, "width": CROP}
        images = CLIPImageProcessor(size={"shortest_edge": CROP}, crop_size=crop)
        return LlavaProcessor(images, tiny_tokenizer(), **shared)
    try:
        from transformers import LlavaNextImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import LlavaNextImageProcessor as ImageProcessor
    images = ImageProcessor(
        size={"shortest_edge": CROP},
        crop_size={"height": CROP, "width": CROP},
        image_grid_pinpoints=copy.deepcopy(PINPOINTS),
    )
    return LlavaNextProcessor(images, tiny_tokenizer(), **shared)


def tiny_model(
    seed: int = 0,
    *,
    family: str = "llava_next",
    tower: str = "clip",
    vision_layers: int = 6,
    attn: str | None = None,
    **kw: Any,
) -> LlavaNextForConditionalGeneration | LlavaForConditionalGeneration:
    """A random model of two text layers, whose weights are scaled up so that attention is not uniform.

    Args:
        seed: Seed of the weights; the global generator is left as it was.
        vision_layers: Layers of the vision tower.
        attn: Attention implementation, transformers' choice if None.
        **kw: Fields of ``LlavaNextConfig`` to set or replace.
    """
    vision = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=CROP,
        patch_size=PATCH,
        **({"projection_dim": 16} if tower == "clip" else {}),
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=4096,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    fields: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": 4,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }
    config_class, model_class = LlavaConfig, LlavaForConditionalGeneration
    if family == "llava_next":
        config_class, model_class = LlavaNextConfig, LlavaNextForConditionalGeneration
        fields["image_grid_pinpoints"] = copy.deepcopy(PINPOINTS)
    config = config_class(**{**fields, **kw})
    if attn is not None:
        config._attn_implementation = attn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.generation_config.pad_token_id = 1
    model.generation_config.bos_token_id = 2
    model.generation_config.eos_token_id = None
    return model


def tiny_clip(seed: int = 5) -> CLIPModel:
    """A random CLIP with the crops of `tiny_model` and the vocabulary of `tiny_tokenizer`."""
    shared = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "projection_dim": 16,
    }
    text = {
        **shared,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "max_position_embeddings": 77,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    vision = {**shared, "num_hidden_layers": 6, "image_size": CROP, "patch_size": PATCH}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def tiny_image(h: int, w: int, seed: int = 0) -> Image.Image:
    """Noise of ``h x w`` pixels."""
    noise = np.random.RandomState(seed).randint(0, 255, (h, w, 3))
    return Image.fromarray(noise.astype(np.uint8))


# ----------------------------------------------------------------------------------------------------
# self-check


FORWARD = inspect.signature(LlavaNextForConditionalGeneration.forward).parameters
CACHE = "past_key_values" if "past_key_values" in FORWARD else "cache"  # since transformers 5.24
ONE = "USER : <image> what is in this picture ? ASSISTANT :"
TWO = "USER : <image> describe ASSISTANT :"
PAIR = "USER : <image> and <image> describe the two pictures ASSISTANT :"
ADJACENT = "USER : <image> <image> describe ASSISTANT :"

CASES: dict[str, tuple[list[str], list[tuple[int, int]]]] = {
    "one image": ([ONE], [(120, 90)]),
    "two sizes": ([ONE, TWO], [(60, 170), (100, 110)]),
    "two images in a prompt": ([PAIR], [(100, 60), (50, 50)]),
    "adjacent images": ([ADJACENT, TWO], [(90, 100), (40, 130), (70, 70)]),
    "aspect 1:8": ([ONE], [(25, 200)]),
    "aspect 8:1": ([ONE], [(200, 25)]),
}
"""Name: the prompts, and height and width of the pictures in their order of use."""


def _check(dtype: torch.dtype, name: str, side: str) -> None:
    """Keeping everything gives the stock model, keeping less the promised counts.

    Features of the tiny model reach 3, and in fp32 stock ones themselves are 2e-6 off their exact values. So
    the bound on them holds relative to the largest one in fp32 and absolutely in fp64.
    """
    model, processor = tiny_model().to(dtype), tiny_processor()
    reference = Independent(model)
    everything = Rule(keep_ratio=1.0)
    prompts, shapes = CASES[name]
    pictures = [tiny_image(h, w, seed) for seed, (h, w) in enumerate(shapes)]
    batch = processor(images=pictures, text=prompts, return_tensors="pt", padding=True, padding_side=side)
    mask = batch["attention_mask"]
    labels = batch["input_ids"].clone()
    labels[(labels == model.config.image_token_id) | (mask == 0)] = IGNORE
    for b in range(len(mask)):
        labels[b, int(mask[b].argmax())] = IGNORE
    labelled = {**batch, "labels": labels}
    prepared = reference.inputs(labelled, everything)
    assert prepared["attention_mask"].equal(mask) and prepared["labels"].equal(labels)

    with torch.no_grad():
        features = model.model.get_image_features(
            batch["pixel_values"], batch["image_sizes"], return_dict=True
        ).pooler_output
        stock = model(**batch, labels=labels)
        padded = model(inputs_embeds=prepared["inputs_embeds"], attention_mask=mask)

    far: dict[str, float] = {"tokens": 0.0, "logits": 0.0, "padded": 0.0}
    for result, feature in zip(prepared["results"], features, strict=True):
        assert result.tokens.shape == feature.shape
        scale = float(feature.abs().max()) if dtype == torch.float32 else 1.0
        far["tokens"] = max(far["tokens"], float((result.tokens - feature).abs().max()) / scale)
    for b, row in enumerate(reference.logits(batch, everything)):
        for key, logits in (("logits", stock.logits), ("padded", padded.logits)):
            real = logits[b, mask[b].bool()]
            assert row.shape == real.shape
            far[key] = max(far[key], float((row - real).abs().max()))
    far["loss"] = abs(reference.loss(labelled, everything) - float(stock.loss))
    print(f"{dtype!s:14} {name:23} {side:5}", *(f"{key} {value:.1e}" for key, value in far.items()))
    assert far["tokens"] <= 1e-6
    assert max(far["logits"], far["padded"], far["loss"]) <= 1e-5
    if side == "left":
        generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert reference.greedy(batch, everything, 4) == generated[:, -4:].tolist()
    for rule in (
        Rule(keep_ratio=0.2),
        Rule(keep_ratio=0.5, entropy=1.0, second_softmax=True),
        Rule(keep_tokens=17),
        Rule(keep_ratio=0.3, allocation="floor"),
    ):
        _check_counts(reference, batch, rule)


def _check_counts(reference: Independent, batch: Mapping[str, Any], rule: Rule) -> None:
    """The number of kept tokens follows from the size of an image and the rule."""
    prepared = reference.inputs(batch, rule)
    for result, size in zip(prepared["results"], batch["image_sizes"].tolist(), strict=True):
        layout = reference.layout(size)
        valid = [len(patches) for patches in layout.valid[1:]]
        thumbnail, budget, _ = plan(rule, reference.patches, valid)
        assert result.budgets[0] == thumbnail
        assert abs(math.fsum(result.shares) - 1.0) < 1e-9
        got = sum(result.budgets[1:])
        assert got == budget if rule.allocation == "exact" else got <= budget
        assert len(result.index) == thumbnail + got + len(layout.rows) == len(result.tokens)
        assert result.index.count(NEWLINE) == len(layout.rows)


def _main() -> None:
    """The self-check."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.float64):
        for name in CASES:
            for side in ("left", "right"):
                _check(dtype, name, side)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe"}]}]
    assert tiny_processor().apply_chat_template(chat, add_generation_prompt=True) == TWO
    print("transformers", transformers.__version__, "ok")


if __name__ == "__main__":
    _main()
