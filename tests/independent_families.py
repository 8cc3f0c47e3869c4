"""The reference of ``independent.py`` for InternVL, LLaVA-OneVision, SmolVLM and Idefics3, with tiny models.

    reference = independent_of(tiny_model(family="internvl"))
    inputs = batch_of(tiny_processor("internvl"), "internvl", "two sizes")
    rows, results, _ = reference._rows(inputs, Rule(keep_ratio=0.3), None, None)

As in ``independent.py``, crops and tokens are taken one at a time, and nothing is shared with the package
under test. Here a *token* is what the language model gets: with merging it stands for a square of patches,
and P counts tokens. Features are made into tokens by plain indexing, not by the models' own pixel shuffle.

``python independent_families.py [family ...]`` checks that keeping everything gives the stock model.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import independent
import numpy as np
import torch
import transformers
from independent import CROP, IGNORE, NEWLINE, Independent, Layout, Rule, plan, tiny_tokenizer
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import select_best_resolution

# ----------------------------------------------------------------------------------------------------
# references


def independent_of(model: PreTrainedModel) -> Independent:
    """The reference for a model of any family."""
    references = {
        "internvl": InternVLReference,
        "llava_onevision": OneVisionReference,
        "smolvlm": IdeficsReference,
        "idefics3": IdeficsReference,
    }
    return references.get(model.config.model_type, Independent)(model)


@dataclass
class ResizedLayout(Layout):
    """A grid of tiles that the model resizes. `rows` and `valid` are of the resized grid.

    Squares of P tokens of the resized grid, cut from its top left, stand for the tiles: the *cells*. Crop
    ``1 + cell`` is a cell here; the last of a row or a column may lie partly outside the grid.

    Attributes:
        tiles: The layout before resizing, whose crops the tower sees.
        corner: Row and column, in patches of all tiles, of the first patch that un-padding keeps.
        columns: Tiles in a row.
    """

    tiles: Layout | None = None
    corner: tuple[int, int] = (0, 0)
    columns: int = 0

    @property
    def inputs(self) -> int:
        return self.tiles.crops


def resized(grid: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A grid ``[C, rows, columns]`` as the model resizes it."""
    return torch.nn.functional.interpolate(
        grid[None], size=(height, width), mode="bilinear", align_corners=False, antialias=False
    )[0]


def overlap(a: tuple[Fraction, Fraction], b: tuple[Fraction, Fraction]) -> Fraction:
    """The length that two intervals have in common."""
    return max(min(a[1], b[1]) - max(a[0], b[0]), Fraction(0))


class OneVisionReference(Independent):
    """As LLaVA-NeXT, but large grids are resized, and several images of a nested list are not tiled."""

    def layout(self, image_size: Sequence[int]) -> Layout:
        tiles = super().layout(image_size)
        rows, columns = len(tiles.rows), len(tiles.rows[0]) if tiles.rows else 0
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.patches))
        if ratio <= 1.1:
            return tiles
        height, width = int(rows // ratio), int(columns // ratio)
        cells_down, cells_right = math.ceil(height / self.side), math.ceil(width / self.side)
        lines = []
        for y in range(height):
            line = []
            for x in range(width):
                cell = (y // self.side) * cells_right + x // self.side
                line.append((1 + cell, (y % self.side) * self.side + x % self.side))
            lines.append(line)
        valid = [list(range(self.patches))]
        for cell in range(1, 1 + cells_down * cells_right):
            valid.append([token for line in lines for crop, token in line if crop == cell])
        size = [int(x) for x in image_size]
        _, grid_width = select_best_resolution(size, self.config.image_grid_pinpoints)
        columns = grid_width // self.crop_size
        crop, patch = tiles.rows[0][0]
        corner = (
            (crop - 1) // columns * self.side + patch // self.side,
            (crop - 1) % columns * self.side + patch % self.side,
        )
        return ResizedLayout(
            1 + cells_down * cells_right, lines, valid, tiles=tiles, corner=corner, columns=columns
        )

    def _read(self, inputs: Mapping[str, Any]) -> tuple[list[Layout], list[torch.Tensor]]:
        sizes = [[int(x) for x in size] for size in inputs["image_sizes"]]
        counts = inputs.get("batch_num_images")
        counts = [1] * len(sizes) if counts is None else [int(count) for count in counts]
        alone = [count == 1 for count in counts for _ in range(count)]
        layouts = []
        for size, tiled in zip(sizes, alone, strict=True):
            single = Layout(crops=1, rows=[[]], valid=[list(range(self.patches))])
            layouts.append(self.layout(size) if tiled else single)
        return layouts, self.crop_list(inputs["pixel_values"], layouts)

    def _plan(self, rule: Rule, layout: Layout) -> tuple[int, int, int]:
        if not isinstance(layout, ResizedLayout):
            return super()._plan(rule, layout)
        valid = [len(tokens) for tokens in layout.valid[1:]]
        return plan(rule, self.patches, valid, room=len(layout.rows) * len(layout.rows[0]))

    def _encoded(
        self, crops: Sequence[torch.Tensor], layout: Layout, rule: Rule
    ) -> tuple[list[list[float]], list[list[float]], list[torch.Tensor]]:
        """Of a resized image the scores, vectors and tokens of its cells, after the thumbnail's.

        The tokens of cells have been through the projector already, as the model resizes behind it.
        Outside the grid a score is 0.
        """
        if not isinstance(layout, ResizedLayout):
            return super()._encoded(crops, layout, rule)
        tiles = layout.tiles
        scores, cls, features = super()._encoded(crops, tiles, rule)
        height, width = len(layout.rows), len(layout.rows[0])
        seen = torch.tensor([[scores[crop][patch] for crop, patch in row] for row in tiles.rows])
        seen = resized(seen.float()[None], height, width)[0]
        projected = [
            torch.stack([self._token(tiles, crop, features[crop][patch]) for crop, patch in row])
            for row in tiles.rows
        ]
        tokens = resized(torch.stack(projected).permute(2, 0, 1), height, width)

        cell_scores = [[0.0] * self.patches for _ in layout.valid[1:]]
        cell_tokens = [tokens.new_zeros(self.patches, len(tokens)) for _ in layout.valid[1:]]
        for y, line in enumerate(layout.rows):
            for x, (crop, token) in enumerate(line):
                cell_scores[crop - 1][token] = float(seen[y, x])
                cell_tokens[crop - 1][token] = tokens[:, y, x]
        cell_cls = []
        for cell in range(layout.crops - 1):
            cell_cls.append(self._cell_vector(layout, cell, cls))
        return [scores[0], *cell_scores], [cls[0], *cell_cls], [features[0], *cell_tokens]

    def _cell_vector(self, layout: ResizedLayout, cell: int, cls: Sequence[Sequence[float]]) -> list[float]:
        """The mean of the tiles' vectors, weighted by the area that the cell has in common with each."""
        height, width = len(layout.rows), len(layout.rows[0])
        rows, columns = len(layout.tiles.rows), len(layout.tiles.rows[0])
        down, right = divmod(cell, math.ceil(width / self.side))

        def interval(place: int, length: int, full: int, start: int) -> tuple[Fraction, Fraction]:
            first, last = place * self.side, min((place + 1) * self.side, length)
            return start + Fraction(first * full, length), start + Fraction(last * full, length)

        own_rows = interval(down, height, rows, layout.corner[0])
        own_columns = interval(right, width, columns, layout.corner[1])
        areas = []
        for tile in range(layout.tiles.crops - 1):
            r, c = divmod(tile, layout.columns)
            tile_rows = (Fraction(r * self.side), Fraction((r + 1) * self.side))
            tile_columns = (Fraction(c * self.side), Fraction((c + 1) * self.side))
            areas.append(overlap(own_rows, tile_rows) * overlap(own_columns, tile_columns))
        assert sum(areas) == (own_rows[1] - own_rows[0]) * (own_columns[1] - own_columns[0])
        weights = [float(area / sum(areas)) for area in areas]
        return [
            math.fsum(weight * vector[i] for weight, vector in zip(weights, cls[1:], strict=True))
            for i in range(len(cls[0]))
        ]

    def _token(self, layout: Layout, crop: int, feature: torch.Tensor) -> torch.Tensor:
        if isinstance(layout, ResizedLayout) and crop > 0:
            return feature
        return super()._token(layout, crop, feature)


class ThumbnailLast(Independent):
    """Tiles one after the other, then the thumbnail; no grid, no newlines, no padding inside a crop."""

    def crops_layout(self, crops: int) -> Layout:
        """The layout of an image of so many crops. One crop alone is a thumbnail."""
        everything = list(range(self.patches))
        return Layout(crops=crops, rows=[], valid=[everything] * crops, thumbnail_last=True)

    def layout(self, image_size: Sequence[int]) -> Layout:
        raise TypeError("the size of an image alone does not say how the processor cuts it")

    def placeholder_runs(self, inputs: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
        """For each row the runs of placeholders, as ``(first position, length)``."""
        found = []
        for ids in inputs["input_ids"].tolist():
            runs: list[tuple[int, int]] = []
            for position, token in enumerate(ids):
                if token != self.config.image_token_id:
                    continue
                if runs and sum(runs[-1]) == position:
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((position, 1))
            found.append(runs)
        return found


class InternVLReference(ThumbnailLast):
    """A tower with CLS, whose last norm belongs to the features, but not to the CLS vector of saliency."""

    @property
    def merge(self) -> int:
        return round(1 / self.config.downsample_ratio)

    def _tower_features(self, out: Any) -> torch.Tensor:
        layer = self.config.vision_feature_layer
        return out.last_hidden_state if layer == -1 else out.hidden_states[layer]

    def _cls(self, out: Any) -> torch.Tensor:
        return out.hidden_states[-1][0, 0]

    def _read(self, inputs: Mapping[str, Any]) -> tuple[list[Layout], list[torch.Tensor]]:
        """Each image is one run of placeholders between ``<img>`` and ``</img>``."""
        layouts = []
        for runs in self.placeholder_runs(inputs):
            for _, length in runs:
                if length % self.patches:
                    raise ValueError(f"{length} placeholders are no whole number of crops")
                layouts.append(self.crops_layout(length // self.patches))
        return layouts, self.crop_list(inputs["pixel_values"], layouts)


class IdeficsReference(ThumbnailLast):
    """SmolVLM and Idefics3: no CLS; a run of placeholders for each crop, which may become empty."""

    @property
    def merge(self) -> int:
        return self.config.scale_factor

    @property
    def vision_tower(self) -> torch.nn.Module:
        return self.model.model.vision_model

    @property
    def projector(self) -> torch.nn.Module:
        return self.model.model.connector.modality_projection

    @property
    def language_model(self) -> torch.nn.Module:
        return self.model.model.text_model

    def _tower_features(self, out: Any) -> torch.Tensor:
        return out.last_hidden_state  # behind post_layernorm

    def runs(self, layout: Layout) -> list[list[int]]:
        codes = self.stock_index(layout)
        return [codes[start : start + self.patches] for start in range(0, len(codes), self.patches)]

    def _read(self, inputs: Mapping[str, Any]) -> tuple[list[Layout], list[torch.Tensor]]:
        """The run behind ``<global-img>`` is a thumbnail and ends an image; the runs before are its tiles."""
        layouts, crops = [], []
        ids = inputs["input_ids"].tolist()
        for b, runs in enumerate(self.placeholder_runs(inputs)):
            tiles = 0
            for position, length in runs:
                if length != self.patches:
                    raise ValueError(f"row {b}: a run of {length} placeholders")
                if ids[b][position - 1] == _number("<global-img>"):
                    layouts.append(self.crops_layout(tiles + 1))
                    tiles = 0
                else:
                    tiles += 1
            if tiles:
                raise ValueError(f"row {b}: tiles without a thumbnail")
            crops.extend(inputs["pixel_values"][b][crop] for crop in range(len(runs)))
        return layouts, crops


# ----------------------------------------------------------------------------------------------------
# tiny models

SPECIAL = [
    *("<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>", "<fake_token_around_image>", "<global-img>"),
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
"""Special tokens of the families. Only ``<image>`` is one of `tiny_tokenizer`'s words."""

VOCABULARY = 160
"""Vocabulary size of the families' models."""

NAMES = {
    "internvl": "InternVL",
    "llava_onevision": "LlavaOnevision",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
}
"""How the families' classes begin."""

PINPOINTS = [[CROP * rows, CROP * columns] for rows in range(1, 6) for columns in range(1, 6)]
"""Resolutions of the tiny OneVision; grids of more than 10 tiles are resized."""

FAMILIES: dict[str, dict[str, Any]] = {
    "internvl": {"family": "internvl"},
    "internvl, qk-norm": {
        "family": "internvl",
        "vision": {"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False},
    },
    "llava_onevision": {"family": "llava_onevision"},
    "smolvlm": {"family": "smolvlm"},
    "smolvlm, not split": {"family": "smolvlm"},
    "idefics3": {"family": "idefics3"},
}
"""Name: arguments of `tiny_model`."""

PROCESSOR_OPTIONS: dict[str, dict[str, Any]] = {"smolvlm, not split": {"do_image_splitting": False}}
"""Name: what `tiny_processor` gets beside the family, if anything."""


def family_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with the families' special tokens behind its words, which keep their numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    vocabulary = [word for word, _ in words]
    vocabulary += [word for word in SPECIAL if word not in vocabulary]
    assert len(vocabulary) <= VOCABULARY
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    fast = Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
            "image_token": "<image>",
        },
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    assert len(tokenizer) == len(vocabulary)
    return tokenizer


def _number(word: str) -> int:
    return family_tokenizer().convert_tokens_to_ids(word)


def _processor(name: str, *parts: Any, **options: Any) -> ProcessorMixin:
    """The stock class without its look at the video processor, which wants torchvision."""
    stock = getattr(transformers, f"{name}Processor")
    ignore = {"check_argument_for_proper_class": lambda self, *names: None}
    return type(stock.__name__, (stock,), ignore)(*parts, **options)


def _image_processor(name: str, **options: Any) -> Any:
    """The stock image processor, the one on PIL if there is one."""
    found = getattr(transformers, f"{name}ImageProcessorPil", None)
    return (found or getattr(transformers, f"{name}ImageProcessor"))(**options)


def tiny_processor(family: str = "llava_next", tower: str = "clip", **options: Any) -> ProcessorMixin:
    """A stock processor for `tiny_model`.

    Args:
        family: A family of `FAMILIES`, or one of ``independent.tiny_processor``.
        tower: For the latter.
        **options: Fields of the image processor to set or replace.
    """
    square = {"height": CROP, "width": CROP}
    if family == "internvl":
        images = _image_processor("GotOcr2", **{"size": square, **options})
        return _processor("InternVL", images, family_tokenizer(), None, image_seq_length=16)
    if family == "llava_onevision":
        fields = {"size": square, "image_grid_pinpoints": [list(one) for one in PINPOINTS], **options}
        images = _image_processor("LlavaOnevision", **fields)
        own = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
        return _processor("LlavaOnevision", images, family_tokenizer(), None, **own)
    if family in ("smolvlm", "idefics3"):
        name = NAMES[family]
        edges = {"size": {"longest_edge": 3 * CROP}, "max_image_size": {"longest_edge": CROP}}
        images = _image_processor(name, **{**edges, **options})
        video = [None] if family == "smolvlm" else []
        with_words = sys.modules[getattr(transformers, f"{name}Processor").__module__]
        if getattr(with_words, "num2words", str) is None:
            with_words.num2words = str  # counts frames of videos in words, and may not be installed
        return _processor(name, images, family_tokenizer(), *video, image_seq_len=16)
    assert not options
    return independent.tiny_processor(family, tower)


def processor_of(name: str) -> ProcessorMixin:
    """The processor for an entry of `FAMILIES`."""
    return tiny_processor(FAMILIES[name]["family"], **PROCESSOR_OPTIONS.get(name, {}))


def tiny_model(
    seed: int = 0,
    *,
    family: str = "llava_next",
    vision: Mapping[str, Any] | None = None,
    vision_layers: int = 6,
    attn: str | None = None,
    **kw: Any,
) -> PreTrainedModel:
    """A random model of two text layers, whose weights are scaled up so that attention is not uniform.

    Args:
        seed: Seed of the weights; the global generator is left as it was.
        family: A family of `FAMILIES`, or one of ``independent.tiny_model``.
        vision: Fields of the tower's config to set or replace.
        vision_layers: Layers of the vision tower.
        attn: Attention implementation, transformers' choice if None.
        **kw: Fields of the model's config to set or replace.
    """
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 4,
        "image_size": CROP,
    }
    vision = dict(vision or {})
    fields: dict[str, Any]
    if family == "internvl":
        square = {"image_size": [CROP, CROP], "patch_size": [7, 7]}
        fields = {
            "vision_config": {**tower, **square, **vision},
            "text_config": {"model_type": "qwen2", **text},
            "image_token_id": _number("<IMG_CONTEXT>"),
            "image_seq_length": 16,
        }
    elif family == "llava_onevision":
        siglip = {"model_type": "siglip_vision_model", "patch_size": 14, "vision_use_head": False}
        fields = {
            "vision_config": {**tower, **siglip, **vision},
            "text_config": {"model_type": "qwen2", **text},
            "image_token_index": _number("<image>"),
            "video_token_index": _number("<video>"),
            "image_grid_pinpoints": [list(one) for one in PINPOINTS],
        }
    elif family in ("smolvlm", "idefics3"):
        fields = {
            "vision_config": {**tower, "patch_size": 7, **vision},
            "text_config": {"model_type": "llama", **text},
            "image_token_id": _number("<image>"),
            "scale_factor": 2,
        }
    else:
        assert not vision
        return independent.tiny_model(seed, family=family, vision_layers=vision_layers, attn=attn, **kw)
    config = getattr(transformers, f"{NAMES[family]}Config")(**{**fields, **kw})
    if attn is not None:
        config._attn_implementation = attn
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{NAMES[family]}ForConditionalGeneration")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "position_embedding" in name or "cls_token" in name:
                    parameter.normal_(std=0.3)  # InternVL's are born as zeros
                elif "lambda_" in name:
                    parameter.fill_(1.0)  # at 0.1 CLS would hardly hear of the patches
                elif parameter.dim() > 1 and "vision" in name:
                    parameter.mul_(0.14 / parameter.std())  # at more, fp32 leaves too few digits
                elif parameter.dim() > 1:
                    parameter.mul_(3.0)
                elif "vision" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)  # else norms and biases do little
    model.generation_config.pad_token_id = 1
    model.generation_config.bos_token_id = 2
    model.generation_config.eos_token_id = None
    return model


# ----------------------------------------------------------------------------------------------------
# prompts

ONE = "USER : <image> what is in this picture ? ASSISTANT :"
TWO = "USER : <image> describe ASSISTANT :"
PAIR = "USER : <image> and <image> describe the two pictures ASSISTANT :"
TEXT = "USER : what is that ? ASSISTANT :"

CASES: dict[str, list[tuple[str, list[tuple[int, int]]]]] = {
    "one image": [(ONE, [(120, 90)])],
    "two sizes": [(ONE, [(60, 170)]), (TWO, [(100, 110)])],
    "two images in a prompt": [(PAIR, [(100, 60), (50, 50)])],
    "a row without an image": [(TWO, [(90, 100)]), (TEXT, []), (PAIR, [(40, 130), (70, 70)])],
}
"""Name: for each row its prompt, with ``<image>`` in every family, and its pictures' heights and widths."""

OWN_CASES: dict[str, dict[str, list[tuple[str, list[tuple[int, int]]]]]] = {
    "internvl": {"one crop": [(TWO, [(50, 50)])]},
    "llava_onevision": {
        "resized": [(ONE, [(230, 270)])],
        "resized and not": [(PAIR, [(280, 160), (100, 60)]), (TWO, [(140, 300)])],
        "no rows": [(ONE, [(10, 400)])],
        "no columns": [(ONE, [(400, 10)]), (TWO, [(60, 80)])],
        "nested": [(PAIR, [(230, 270), (60, 50)])],
        "nested, a row alone": [(PAIR, [(50, 100), (60, 50)]), (TEXT, []), (TWO, [(260, 240)])],
    },
}
"""Cases of a family. Where the name begins with "nested", the pictures of a row are a list of their own."""


def cases_of(family: str) -> dict[str, list[tuple[str, list[tuple[int, int]]]]]:
    """All cases of a family."""
    return {**CASES, **OWN_CASES.get(family, {})}


def tiny_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Blocks of different colour and noise, so that tiles differ and get different shares."""
    random = np.random.RandomState(seed)
    colour, strength = random.uniform(0, 255, (9, 9, 3)), random.uniform(0, 120, (9, 9, 1))
    down, right = np.arange(height) * 9 // height, np.arange(width) * 9 // width
    noise = random.uniform(-1, 1, (height, width, 3)) * strength[down][:, right]
    return Image.fromarray((colour[down][:, right] + noise).clip(0, 255).astype(np.uint8))


def batch_of(processor: ProcessorMixin, family: str, case: str, **kwargs: Any) -> BatchFeature:
    """The processor's output for a case, padded."""
    rows = cases_of(family)[case]
    texts = [text.replace("<image>", processor.image_token) for text, _ in rows]
    images, seed = [], 0
    for _, sizes in rows:
        images.append([tiny_picture(height, width, seed + i) for i, (height, width) in enumerate(sizes)])
        seed += len(sizes)
    if family not in ("smolvlm", "idefics3") and not case.startswith("nested"):
        images = [image for own in images for image in own]
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs)


# ----------------------------------------------------------------------------------------------------
# self-check


def _check(name: str, case: str, side: str, dtype: torch.dtype) -> None:
    """Keeping everything gives the stock model, keeping less the promised counts."""
    family = FAMILIES[name]["family"]
    model, processor = tiny_model(**FAMILIES[name]).to(dtype), processor_of(name)
    reference, everything = independent_of(model), Rule(keep_ratio=1.0)
    batch = batch_of(processor, family, case, padding_side=side)
    mask = batch["attention_mask"]
    labels = batch["input_ids"].clone()
    labels[(labels == model.config.image_token_id) | (mask == 0)] = IGNORE
    for b in range(len(mask)):
        labels[b, int(mask[b].argmax())] = IGNORE
    labelled = {**batch, "labels": labels}
    prepared = reference.inputs(labelled, everything)
    assert prepared["attention_mask"].equal(mask) and prepared["labels"].equal(labels)
    with torch.no_grad():
        stock = model(**batch, labels=labels)
    far = abs(reference.loss(labelled, everything) - float(stock.loss))
    for b, row in enumerate(reference.logits(batch, everything)):
        real = stock.logits[b, mask[b].bool()]
        assert row.shape == real.shape
        far = max(far, float((row - real).abs().max() / real.abs().max()))
    crops = [len(result.budgets) for result in prepared["results"]]
    print(f"{dtype!s:14} {name:20} {case:23} {side:5} crops {crops}: {far:.1e}")
    assert far <= 1e-5
    if side == "left":
        generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
        assert reference.greedy(batch, everything, 4) == generated[:, -4:].tolist()
        fewer = Rule(keep_ratio=0.3)
        prepared = reference.inputs(batch, fewer)
        given = {key: prepared[key] for key in ("inputs_embeds", "attention_mask")}
        generated = model.generate(**given, max_new_tokens=4, do_sample=False)
        assert reference.greedy(batch, fewer, 4) == generated.tolist()
    for rule in (
        Rule(keep_ratio=0.03),
        Rule(keep_ratio=0.3),
        Rule(keep_ratio=0.5, entropy=1.0),
        Rule(keep_tokens=17),
        Rule(keep_ratio=0.3, allocation="floor"),
    ):
        _check_counts(reference, batch, rule)


def _check_counts(reference: Independent, batch: Mapping[str, Any], rule: Rule) -> None:
    """The number of kept tokens follows from the layout and the rule; the order is stock's."""
    rows, results, _ = reference._rows(batch, rule, None, None)
    layouts, _ = reference._read(batch)
    first = 0
    for layout, result in zip(layouts, results, strict=True):
        thumbnail, budget, _ = reference._plan(rule, layout)
        assert result.budgets[layout.number(0)] == thumbnail
        got = sum(result.budgets) - thumbnail
        assert got == budget if rule.allocation == "exact" else got <= budget
        newlines = result.index.count(NEWLINE)
        assert newlines == len(layout.rows)
        assert len(result.index) == thumbnail + got + newlines == len(result.tokens)
        stock = iter(reference.stock_index(layout))
        shift = first * reference.patches
        assert all((code if code == NEWLINE else code - shift) in stock for code in result.index)
        first += layout.crops
    full = int(batch["attention_mask"].sum())
    gone = sum(
        len(reference.stock_index(layout)) - len(result.index)
        for layout, result in zip(layouts, results, strict=True)
    )
    assert sum(len(row.embeds) for row in rows) == full - gone


def _main(names: Sequence[str]) -> None:
    """The self-check."""
    torch.set_num_threads(1)
    for name in names or FAMILIES:
        for dtype in (torch.float32, torch.float64):
            for case in cases_of(FAMILIES[name]["family"]):
                for side in ("left", "right") if dtype == torch.float32 else ("left",):
                    _check(name, case, side, dtype)
    print("transformers", transformers.__version__, "ok")


if __name__ == "__main__":
    _main(sys.argv[1:])
