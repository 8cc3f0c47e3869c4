"""Slow reference for dropping image tokens of the Qwen families with packed towers, with tiny models.

    reference = QwenReference(tiny_model("qwen3_vl"))
    inputs = batch_of(tiny_processor("qwen3_vl"), "two rows")
    reference.greedy(inputs, Rule(keep_ratio=0.3), 5)

Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3-VL-MoE, Qwen3.5 and Qwen3.5-MoE. As ``independent.py`` it is written
from the specification alone and shares no code with the package under test: one image, one row and one token
at a time, without padding and without a cache, in plain loops. Attention maps are made here from what the
tower's attention modules are given. Borrowed from transformers are the model itself (a private eager copy)
and its ``get_rope_index`` for the full prompt.

Words: a *token* is what the language model gets, of 2 x 2 patches; the *merged grid* of an image has
``gh x gw`` tokens, numbered in raster order; a *block* is a square of tokens of that grid.

``python independent_qwen.py [family ...]`` checks that keeping everything gives the stock model.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
from independent import (
    IGNORE,
    allocate_exact,
    concentration,
    cosine,
    floor_ratio,
    normalised,
    quantised,
    select,
    softmax,
)
from independent_families import tiny_picture
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

FRACTIONS = (0.2, 0.3, 0.4, 0.5)
"""The default ``tile_layers``."""


@dataclass(frozen=True)
class Rule:
    """What to keep. ``keep_tokens`` wins over ``keep_ratio``; the weights are those of "hero"."""

    keep_ratio: float | None = 0.2
    keep_tokens: int | None = None
    policy: str = "hero"
    block: int = 12
    tile_layers: tuple[float | int, ...] = FRACTIONS
    density: float = 0.2
    saliency: float = 0.8
    entropy: float = 0.0
    temperature_cls: float = 0.1


@dataclass
class Image:
    """What is kept of one image of ``gh x gw`` tokens.

    Attributes:
        grid: ``(gh, gw)``.
        scores: Of each token.
        blocks: The tokens of each block, in raster order.
        shares: Of each block.
        budgets: Of each block.
        kept: The kept tokens, ascending.
        features: ``[gh * gw, D]``.
        deep: DeepStack features of each level, as ``features``.
    """

    grid: tuple[int, int]
    scores: list[float]
    blocks: list[list[int]]
    shares: list[float]
    budgets: list[int]
    kept: list[int]
    features: torch.Tensor
    deep: list[torch.Tensor]


@dataclass
class Row:
    """A row of a batch without padding, after dropping.

    Attributes:
        ids, labels: Of the tokens that stay.
        vectors: Their embeddings or features.
        positions: Their ``(t, h, w)`` in the full prompt.
        deep: For each DeepStack level and token the feature to add, or None.
        delta: What to add to the number of tokens before a later token to get its position.
    """

    ids: list[int] = field(default_factory=list)
    vectors: list[torch.Tensor] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    deep: list[list[torch.Tensor | None]] = field(default_factory=list)
    delta: int = 0


def kept_of(rule: Rule, tokens: int) -> int:
    """K of an image of so many tokens: at least 1."""
    if rule.keep_tokens is not None:
        return max(1, min(rule.keep_tokens, tokens))
    return max(1, floor_ratio(rule.keep_ratio * tokens))


def layers_of(given: Sequence[float | int], full: Sequence[int], depth: int) -> list[int]:
    """The layers that ``tile_layers`` names, each once."""
    found: set[int] = set()
    for one in given:
        if isinstance(one, float):
            wanted = one * (depth - 1)
            found.add(min(sorted(full), key=lambda layer: (abs(layer - wanted), layer)))
        else:
            layer = one + depth if one < 0 else one
            if layer not in full:
                raise ValueError(f"layer {one} does not attend to the whole image")
            found.add(layer)
    return sorted(found)


def blocks_of(height: int, width: int, side: int) -> list[list[int]]:
    """The tokens of each block of a merged grid."""
    blocks = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            blocks.append(
                [
                    y * width + x
                    for y in range(top, min(top + side, height))
                    for x in range(left, min(left + side, width))
                ]
            )
    return blocks


def window_order(height: int, width: int, side: int) -> list[int]:
    """The tokens of a merged grid as Qwen2.5-VL's tower has them, window by window of ``side`` tokens."""
    return [token for window in blocks_of(height, width, side) for token in window]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys ``[N, H, D]`` turned by the angles of their positions ``[N, D]``."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def private_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A fresh eager model with copies of the weights and buffers, and nothing else of the given one."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        own = type(model)(config)
    own.load_state_dict({name: value.detach().clone() for name, value in model.state_dict().items()})
    buffers = dict(model.named_buffers())
    for name, _ in list(own.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        own.get_submodule(parent)._buffers[leaf] = buffers[name].detach().clone()
    own.set_attn_implementation("eager")
    own.generation_config = copy.deepcopy(model.generation_config)
    return own.eval().requires_grad_(False)


class QwenReference:
    """The reference around a private eager copy of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = private_copy(model)
        self.visual = self.model.model.visual
        self.merge: int = self.visual.spatial_merge_size
        self.image_token: int = self.model.config.image_token_id
        self.video_token: int = self.model.config.video_token_id
        self.depth = len(self.visual.blocks)
        config = self.visual.config
        self.full = list(getattr(config, "fullatt_block_indexes", range(self.depth)))
        self.window = None  # side of a window in tokens
        if hasattr(config, "window_size"):
            self.window = config.window_size // config.patch_size // self.merge

    # -------------------------------------------------------------------------------- images

    def encode(self, pixels: torch.Tensor, grid: Sequence[int]) -> tuple[Any, list[torch.Tensor]]:
        """The model's output for one image, and ``(heads, N, N)`` fp64 of each layer over the whole image."""
        maps: list[torch.Tensor] = []

        def see(module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            cos, sin = kwargs["position_embeddings"]
            heads = module.num_heads
            rows = module.qkv(hidden).view(len(hidden), 3, heads, -1)
            query, key = rotated(rows[:, 0], cos, sin), rotated(rows[:, 1], cos, sin)
            scale = query.shape[-1] ** -0.5
            own = []
            for head in range(heads):
                product = query[:, head].double() @ key[:, head].double().T * scale
                own.append(product.softmax(-1))
            if len(maps) in self.full:  # these maps are what the layer itself has used
                mixed = [(own[head] @ rows[:, 2, head].double()).float() for head in range(heads)]
                again = module.proj(torch.cat(mixed, dim=-1))
                assert (again - output).abs().max() <= 1e-4 * output.abs().max() + 1e-6
            maps.append(torch.stack(own))

        hooks = [block.attn.register_forward_hook(see, with_kwargs=True) for block in self.visual.blocks]
        try:
            one = torch.tensor([list(grid)])
            output = self.model.model.get_image_features(pixels, one, return_dict=True)
        finally:
            for hook in hooks:
                hook.remove()
        return output, maps

    def scores(self, maps: Sequence[torch.Tensor], grid: tuple[int, int], rule: Rule) -> list[float]:
        """Received attention of each token, in raster order."""
        height, width = grid
        layers = layers_of(rule.tile_layers, self.full, self.depth)
        order = list(range(height * width))
        if self.window is not None:
            order = window_order(height, width, self.window)
        found = [0.0] * len(order)
        unit = self.merge**2
        for layer in layers:
            for one in maps[layer]:
                column = numbers64(one.mean(0))
                for place, token in enumerate(order):
                    mean = math.fsum(column[place * unit : (place + 1) * unit]) / unit
                    found[token] += mean / (len(layers) * len(maps[layer]))
        return found

    def shares(
        self, blocks: list[list[int]], scores: list[float], features: torch.Tensor, rule: Rule
    ) -> list[float]:
        """The share of each block."""
        if rule.policy in ("uniform", "random"):
            return normalised([float(len(block)) for block in blocks])
        spread = normalised([concentration(scores, block) for block in blocks])
        assert rule.policy == "hero"
        density = normalised([len(block) / rule.block**2 for block in blocks])
        vectors = features.double()
        whole = numbers64(vectors.mean(0))
        cosines = [cosine(numbers64(vectors[block].mean(0)), whole) for block in blocks]
        saliency = softmax([value / rule.temperature_cls for value in cosines])
        total = rule.density + rule.saliency + rule.entropy
        return [
            (rule.density * one + rule.saliency * two + rule.entropy * three) / total
            for one, two, three in zip(density, saliency, spread, strict=True)
        ]

    def image(self, pixels: torch.Tensor, grid: Sequence[int], rule: Rule) -> Image:
        """Encode one image of ``(1, h, w)`` patches and choose."""
        assert grid[0] == 1
        height, width = int(grid[1]) // self.merge, int(grid[2]) // self.merge
        output, maps = self.encode(pixels, grid)
        features = output.pooler_output[0]
        assert len(features) == height * width
        deep = []
        for level in getattr(output, "deepstack_features", None) or ():
            deep.append(level if isinstance(level, torch.Tensor) else level[0])
        scores = self.scores(maps, (height, width), rule)
        blocks = blocks_of(height, width, rule.block)
        shares = self.shares(blocks, scores, features.detach(), rule)
        caps = [len(block) for block in blocks]
        weights = caps if rule.policy in ("uniform", "random") else quantised(shares)
        budgets = allocate_exact(weights, caps, kept_of(rule, height * width))
        kept: list[int] = []
        for block, budget in zip(blocks, budgets, strict=True):
            kept.extend(select(scores, block, budget))
        return Image((height, width), scores, blocks, shares, budgets, sorted(kept), features, deep)

    def images(self, inputs: Mapping[str, Any], rule: Rule) -> list[Image]:
        """The images of a batch."""
        found: list[Image] = []
        if inputs.get("pixel_values") is None:
            return found
        start = 0
        for grid in inputs["image_grid_thw"].tolist():
            length = grid[0] * grid[1] * grid[2]
            found.append(self.image(inputs["pixel_values"][start : start + length], grid, rule))
            start += length
        assert start == len(inputs["pixel_values"])
        return found

    # -------------------------------------------------------------------------------- rows

    def _videos(self, inputs: Mapping[str, Any]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Feature and DeepStack features of every token of the batch's videos, one video at a time."""
        found: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        if inputs.get("pixel_values_videos") is None:
            return found
        start = 0
        for grid in inputs["video_grid_thw"].tolist():
            length = grid[0] * grid[1] * grid[2]
            pixels = inputs["pixel_values_videos"][start : start + length]
            out = self.model.model.get_video_features(pixels, torch.tensor([grid]), return_dict=True)
            levels = []
            for level in getattr(out, "deepstack_features", None) or ():
                levels.append(level if isinstance(level, torch.Tensor) else level[0])
            for token in range(len(out.pooler_output[0])):
                found.append((out.pooler_output[0][token], [level[token] for level in levels]))
            start += length
        return found

    def rows(
        self, inputs: Mapping[str, Any], rule: Rule, images: list[Image] | None = None
    ) -> tuple[list[Row], list[Image]]:
        """The rows of a prompt of the stock length, and its images."""
        images = self.images(inputs, rule) if images is None else images
        videos = self._videos(inputs)
        kinds, labels = inputs["mm_token_type_ids"], inputs.get("labels")
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        levels = len(images[0].deep) if images else len(videos[0][1]) if videos else 0
        embed = self.model.get_input_embeddings().weight
        found: list[Row] = []
        image = video = 0  # the next ones
        video_grids, video_grid = inputs.get("video_grid_thw"), 0
        for b in range(len(mask)):
            places = [place for place in range(mask.shape[1]) if int(mask[b, place])]
            ids = [int(inputs["input_ids"][b, place]) for place in places]
            first_image, first_grid = image, video_grid
            row = Row(deep=[[] for _ in range(levels)])
            takes: list[int] = []
            at = 0
            while at < len(ids):
                run, vectors, deep = [at], [embed[ids[at]]], [[None] * levels]
                step = 1
                if ids[at] == self.image_token:
                    own = images[image]
                    step = own.grid[0] * own.grid[1]
                    assert ids[at : at + step] == [self.image_token] * step, "the run of an image"
                    run = [at + token for token in own.kept]
                    vectors = [own.features[token] for token in own.kept]
                    deep = [[level[token] for level in own.deep] for token in own.kept]
                    image += 1
                elif ids[at] == self.video_token:
                    vectors, deep = [videos[video][0]], [videos[video][1]]
                    video += 1
                takes.extend(run)
                row.vectors.extend(vectors)
                for one in deep:
                    for level in range(levels):
                        row.deep[level].append(one[level])
                at += step
            if video_grids is not None:
                count = ids.count(self.video_token)
                while count > 0:
                    t, h, w = video_grids[video_grid].tolist()
                    count -= t * h * w // self.merge**2
                    video_grid += 1
                assert count == 0
            own_grids: dict[str, Any] = {}
            if image > first_image:
                own_grids["image_grid_thw"] = inputs["image_grid_thw"][first_image:image]
            if video_grid > first_grid:
                own_grids["video_grid_thw"] = video_grids[first_grid:video_grid]
                if inputs.get("second_per_grid_ts") is not None:
                    own_grids["second_per_grid_ts"] = inputs["second_per_grid_ts"][first_grid:video_grid]
            positions, _ = self.model.model.get_rope_index(
                input_ids=torch.tensor([ids]),
                mm_token_type_ids=torch.tensor([[int(kinds[b, place]) for place in places]]),
                **own_grids,
            )
            for place in takes:
                row.ids.append(ids[place])
                row.positions.append([int(positions[axis, 0, place]) for axis in range(3)])
                if labels is not None:
                    row.labels.append(int(labels[b, places[place]]))
            row.delta = int(positions.max()) + 1 - len(takes)
            found.append(row)
        assert image == len(images) and video == len(videos)
        return found, images

    def _forward(self, row: Row, answer: Sequence[int] = ()) -> torch.Tensor:
        """Logits ``[n, V]`` of a row with an answer behind it, at the positions that follow."""
        embed = self.model.get_input_embeddings().weight
        vectors, positions = list(row.vectors), list(row.positions)
        for token in answer:
            vectors.append(embed[token])
            positions.append([one + 1 for one in positions[-1]])
        given: dict[str, Any] = {}
        if row.deep:
            seen = [one is not None for one in row.deep[0]] + [False] * len(answer)
            if any(seen):
                given["visual_pos_masks"] = torch.tensor([seen])
                given["deepstack_visual_embeds"] = [
                    torch.stack([one for one in level if one is not None]) for level in row.deep
                ]
        out = self.model.model.language_model(
            inputs_embeds=torch.stack(vectors)[None],
            position_ids=torch.tensor(positions).T[:, None],
            use_cache=False,
            **given,
        )
        return self.model.lm_head(out.last_hidden_state)[0]

    # -------------------------------------------------------------------------------- results

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any], rule: Rule) -> list[torch.Tensor]:
        """Of each row ``[n, V]``."""
        return [self._forward(row) for row in self.rows(inputs, rule)[0]]

    @torch.no_grad()
    def greedy(self, inputs: Mapping[str, Any], rule: Rule, steps: int, images=None) -> list[list[int]]:
        """The best token, again and again, everything computed anew for each."""
        answers = []
        for row in self.rows(inputs, rule, images)[0]:
            answer: list[int] = []
            for _ in range(steps):
                answer.append(int(self._forward(row, answer)[-1].argmax()))
            answers.append(answer)
        return answers

    @torch.no_grad()
    def beams(
        self, inputs: Mapping[str, Any], rule: Rule, steps: int, beams: int, returned: int = 1
    ) -> list[list[int]]:
        """Beam search where no answer ends early: all beams have the same length."""
        answers = []
        for row in self.rows(inputs, rule)[0]:
            alive: list[tuple[float, list[int]]] = [(0.0, [])]
            for _ in range(steps):
                longer = []
                for total, answer in alive:
                    values = self._forward(row, answer)[-1].log_softmax(-1).tolist()
                    longer += [(total + value, [*answer, token]) for token, value in enumerate(values)]
                alive = sorted(longer, key=lambda one: -one[0])[:beams]
            answers.extend(answer for _, answer in alive[:returned])
        return answers

    @torch.no_grad()
    def samples(
        self, inputs: Mapping[str, Any], rule: Rule, steps: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """Draws of the global generator, all rows at once in each step, as generate draws them."""
        rows = self.rows(inputs, rule)[0]
        answers: list[list[int]] = [[] for _ in rows]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for _ in range(steps):
                ends = [self._forward(row, answer)[-1] for row, answer in zip(rows, answers, strict=True)]
                drawn = torch.multinomial((torch.stack(ends) / temperature).softmax(-1), 1)
                for answer, token in zip(answers, drawn[:, 0].tolist(), strict=True):
                    answer.append(token)
        return answers

    def loss(self, inputs: Mapping[str, Any], rule: Rule) -> torch.Tensor:
        """The mean over all rows of the cross-entropy of each label with the token before it."""
        terms = []
        for row in self.rows(inputs, rule)[0]:
            values = self._forward(row).log_softmax(-1)
            for place in range(1, len(row.labels)):
                if row.labels[place] != IGNORE:
                    terms.append(-values[place - 1, row.labels[place]])
        return torch.stack(terms).mean()


def numbers64(tensor: torch.Tensor) -> list[float]:
    """A vector as Python floats, whatever it is made of."""
    return [float(x) for x in tensor.detach().double().tolist()]


# ----------------------------------------------------------------------------------------------------
# tiny models and processors

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]

FAMILIES: dict[str, tuple[str, str, int]] = {
    "qwen2_vl": ("Qwen2VL", "Qwen2VLProcessor", 14),
    "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2_5_VLProcessor", 14),
    "qwen3_vl": ("Qwen3VL", "Qwen3VLProcessor", 16),
    "qwen3_vl_moe": ("Qwen3VLMoe", "Qwen3VLProcessor", 16),
    "qwen3_5": ("Qwen3_5", "Qwen3VLProcessor", 16),
    "qwen3_5_moe": ("Qwen3_5Moe", "Qwen3VLProcessor", 16),
}
"""Family: how its classes begin, its processor, its patch size in pixels."""

TOLERANCE = {name: 1e-4 if name.startswith("qwen3_5") else 5e-5 for name in FAMILIES}
"""How far logits may be from the reference, as a part of the largest."""

VOCABULARY = 100


def tiny_model(
    family: str, seed: int = 0, *, attn: str | None = None, vision: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """A random model whose weights are scaled up so that attention is not uniform.

    Args:
        family: One of `FAMILIES`.
        seed: Seed of the weights; the global generator is left as it was.
        attn: Attention implementation, transformers' choice if None.
        vision: Fields of the tower's config to set or replace.
    """
    prefix, _, patch = FAMILIES[family]
    tower: dict[str, Any] = {"depth": 6, "hidden_size": 32, "num_heads": 2, "patch_size": patch}
    if family == "qwen2_vl":
        tower |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        tower |= {"intermediate_size": 48, "out_hidden_size": 64}
    if family == "qwen2_5_vl":
        tower |= {"fullatt_block_indexes": [1, 3, 5], "window_size": 4 * patch}
    if family.startswith("qwen3"):
        tower |= {"num_position_embeddings": 64}
    if family.startswith("qwen3_vl"):
        tower |= {"deepstack_visual_indexes": [0, 2]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 4 if family.startswith("qwen3") else 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "rope_parameters": rope,
    }
    if family.startswith("qwen3"):
        text |= {"head_dim": 16}
    if family.endswith("moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        text |= {"shared_expert_intermediate_size": 32} if family == "qwen3_5_moe" else {}
    if family != "qwen3_5_moe":
        text |= {"intermediate_size": 96}
    if family.startswith("qwen3_5"):
        rope["partial_rotary_factor"] = 1.0
        text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    names = ("image", "video", "vision_start", "vision_end")
    tokens = {f"{name}_token_id": 4 + number for number, name in enumerate(names)}
    kinds = {"vision_config": {**tower, **(vision or {})}, "text_config": text}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{prefix}Config")(**kinds, **tokens)
        if attn is not None:
            config._attn_implementation = attn
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "linear_attn" in name and parameter.dim() > 1:
                    fan_in = parameter[0].numel()
                    parameter.normal_(std=0.5 / math.sqrt(fan_in))
                elif "visual" in name and "qkv" in name and parameter.dim() > 1:
                    parameter.mul_(12.0)  # scores differ by factors then, not by fifths
                elif parameter.dim() > 1:
                    parameter.mul_(6.0)
                elif "visual" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)  # else norms and biases do little
    model.generation_config.update(pad_token_id=1, bos_token_id=2, eos_token_id=None)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A whitespace tokenizer that pads on the left and adds nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, "USER", "ASSISTANT", ":", "what", "is", "in", "this", "picture", "and", "that"]
    words += ["one", "please", "describe", ".", "?"]
    words += [f"w{number}" for number in range(VOCABULARY - len(words))]
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        additional_special_tokens=SPECIAL[4:],
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


class NoVideos:
    """Stands in the place of the video processor, which needs torchvision."""

    merge_size = 2
    temporal_patch_size = 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")
    num_frames, fps, size, video_sampling = 1, 1, {}, {}  # read by chat templates


def tiny_images(family: str, **options: Any) -> Any:
    """The stock image processor, the one on PIL if there is one."""
    patch = FAMILIES[family][2]
    limits = {"min_pixels": (2 * patch) ** 2, "max_pixels": (60 * patch) ** 2}
    found = getattr(transformers, "Qwen2VLImageProcessorPil", transformers.Qwen2VLImageProcessor)
    return found(**{"patch_size": patch, **limits, **options})


def tiny_processor(family: str, **options: Any) -> ProcessorMixin:
    """A stock processor; the options are fields of its image processor."""
    kind = getattr(transformers, FAMILIES[family][1])
    with mock.patch.object(kind, "check_argument_for_proper_class"):
        return kind(tiny_images(family, **options), tiny_tokenizer(), NoVideos())


# ----------------------------------------------------------------------------------------------------
# prompts

IMAGE = "<|vision_start|> <|image_pad|> <|vision_end|>"
ONE = f"USER : {IMAGE} what is in this picture ? ASSISTANT :"
TWO = f"USER : {IMAGE} describe ASSISTANT :"
PAIR = f"USER : {IMAGE} and {IMAGE} describe that one please ASSISTANT :"
TRIPLE = f"USER : {IMAGE} {IMAGE} and {IMAGE} what is this ? ASSISTANT :"
TEXT = "USER : what is that ? ASSISTANT :"

CASES: dict[str, list[tuple[str, list[tuple[int, int]]]]] = {
    "one image": [(ONE, [(7, 9)])],
    "two images in a prompt": [(PAIR, [(5, 7), (8, 4)])],
    "two rows": [(ONE, [(4, 7)]), (TWO, [(8, 3)])],
    "different numbers of images": [(TRIPLE, [(5, 5), (1, 9), (7, 2)]), (TWO, [(6, 11)])],
    "a row without an image": [(TWO, [(5, 6)]), (TEXT, []), (PAIR, [(3, 3), (9, 7)])],
    "small and large": [(PAIR, [(1, 1), (13, 14)])],
}
"""Name: for each row its prompt and its pictures' merged grids."""


def picture(family: str, grid: tuple[int, int], seed: int = 0):
    """A picture that the processor leaves at so many tokens."""
    side = 2 * FAMILIES[family][2]
    return tiny_picture(grid[0] * side, grid[1] * side, seed)


def batch_of(processor: ProcessorMixin, family: str, case: str, **kwargs: Any) -> BatchFeature:
    """The processor's output for a case, padded."""
    return batch_of_rows(processor, family, CASES[case], **kwargs)


def batch_of_rows(
    processor: ProcessorMixin,
    family: str,
    rows: Sequence[tuple[str, Sequence[tuple[int, int]]]],
    **kwargs: Any,
) -> BatchFeature:
    """The processor's output for rows of a prompt and its pictures' merged grids, padded."""
    texts, images = [], []
    for text, grids in rows:
        texts.append(text)
        images += [picture(family, grid, len(images) + number) for number, grid in enumerate(grids)]
    return processor(images=images or None, text=texts, padding=True, return_tensors="pt", **kwargs)


def with_video(
    inputs: Mapping[str, Any], family: str, frames: int = 2, grid: tuple[int, int] = (4, 6)
) -> dict:
    """A prompt of one row with a video in front, made by hand: ``frames`` grids of patches.

    Qwen3-VL and 3.5 have each frame in a run of its own.
    """
    per_frame = grid[0] * grid[1] // 4
    video, start, end = (SPECIAL.index(f"<|{name}|>") for name in ("video_pad", "vision_start", "vision_end"))
    if family.startswith("qwen3"):
        words = [start, *[video] * per_frame, end] * frames
    else:
        words = [start, *[video] * (per_frame * frames), end]
    kinds = [2 if word == video else 0 for word in words]
    patch = FAMILIES[family][2]
    generator = torch.Generator().manual_seed(3)
    given = dict(inputs)
    for name, front in (
        ("input_ids", words),
        ("mm_token_type_ids", kinds),
        ("attention_mask", [1] * len(words)),
    ):
        given[name] = torch.cat([torch.tensor([front]), inputs[name]], dim=1)
    patches = frames * grid[0] * grid[1]
    given["pixel_values_videos"] = torch.randn(patches, 3 * 2 * patch * patch, generator=generator)
    given["video_grid_thw"] = torch.tensor([[frames, *grid]])
    if family == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([1.0])
    return given


# ----------------------------------------------------------------------------------------------------
# self-check


@torch.no_grad()
def _check(family: str, case: str, side: str) -> None:
    """Keeping everything gives the stock model."""
    model, processor = tiny_model(family), tiny_processor(family)
    reference, everything = QwenReference(model), Rule(keep_ratio=1.0)
    inputs = batch_of(processor, family, case, padding_side=side)
    mask = inputs["attention_mask"].bool()
    stock, far = model(**inputs), 0.0
    for b, row in enumerate(reference.logits(inputs, everything)):
        real = stock.logits[b, mask[b]]
        far = max(far, float((row - real).abs().max() / real.abs().max()))
    assert far <= TOLERANCE[family], far
    deltas = [row.delta for row in reference.rows(inputs, everything)[0]]
    assert model.model.rope_deltas[:, 0].tolist() == deltas
    answers: Any = "-"
    if side == "left":
        options = {"max_new_tokens": 5, "do_sample": False}
        first = inputs["input_ids"].shape[1]
        answers = model.generate(**inputs, **options)[:, first:].tolist()
        assert reference.greedy(inputs, everything, 5) == answers
        beams = model.generate(**inputs, **options, num_beams=3)[:, first:].tolist()
        assert reference.beams(inputs, everything, 5, 3) == beams
        torch.manual_seed(4)
        own = {**options, "do_sample": True, "temperature": 1.5, "top_k": 0}
        drawn = model.generate(**inputs, **own)[:, first:].tolist()
        assert reference.samples(inputs, everything, 5, 1.5, 4) == drawn
    images = reference.images(inputs, Rule(keep_ratio=0.3, block=3))
    spread = [max(one.scores) / min(one.scores) for one in images]
    print(f"{family:14}{case:30}{side:6}{far:.1e} spread {max(spread):.1f} {answers}", flush=True)
    for rule in (
        Rule(keep_ratio=0.07),
        Rule(keep_ratio=0.5, block=3),
        Rule(keep_tokens=9, block=4, policy="uniform"),
        Rule(keep_ratio=0.3, block=3, policy="uniform"),
        Rule(keep_ratio=0.3, block=3, entropy=1.0),
    ):
        for image in reference.images(inputs, rule):
            tokens = image.grid[0] * image.grid[1]
            assert sorted(token for block in image.blocks for token in block) == list(range(tokens))
            assert len(image.kept) == sum(image.budgets) == kept_of(rule, tokens)
            assert abs(sum(image.scores) * 4 - 1) < 1e-9 and abs(sum(image.shares) - 1) < 1e-9


@torch.no_grad()
def _check_videos(family: str) -> None:
    model, processor = tiny_model(family), tiny_processor(family)
    reference = QwenReference(model)
    inputs = with_video(batch_of(processor, family, "one image"), family)
    row = reference.logits(inputs, Rule(keep_ratio=1.0))[0]
    real = model(**inputs).logits[0]
    assert (row - real).abs().max() <= TOLERANCE[family] * real.abs().max()


def _main(names: Sequence[str]) -> None:
    """The self-check."""
    torch.set_num_threads(1)
    for family in names or FAMILIES:
        _check_videos(family)
        for case in CASES:
            for side in ("left", "right"):
                _check(family, case, side)
        assert "window_index" not in inspect.getsource(QwenReference)
    for height, width in ((1, 1), (5, 7), (8, 4), (3, 9)):
        from transformers.vision_utils import get_vision_window_index

        index, _ = get_vision_window_index(torch.tensor([[1, 2 * height, 2 * width]]), 2, 56, 14)
        assert index.tolist() == window_order(height, width, 2)
    print("transformers", transformers.__version__, "ok")


if __name__ == "__main__":
    _main(sys.argv[1:])
