"""The drop-in vision encoder: pixels → encode → score → budget → select → project → packed tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hero_kernels as hk

from . import capture, scoring
from .config import POLICIES, HeroConfig
from .layout import Geometry, ImageLayout, grid_pinpoints
from .models import Encoded, tower_for
from .packing import Cut, packing
from .policies import SCORES, Needs, Scored, Seen, policy_of
from .relevance import ClipRelevance

__all__ = ["HeroVisionEncoder", "Plan", "Selection", "plan"]


@dataclass(frozen=True)
class Selection:
    """The visual tokens kept of a batch of images, packed, and how they were chosen.

    Attributes:
        tokens: ``[total, D]`` projected features and newlines, image after image; ``None`` in
            ``handle.last``, which keeps no features alive.
        lengths: rows of each image.
        cu_seqlens: ``[B + 1]`` int32, where each image begins.
        index: ``[total]`` int32, ``crop · P + patch`` of each row, −1 for a newline.
        budgets: ``[T]`` int32, patches kept of each crop.
        shares: ``[T]`` fp32, each tile's share of its image's tile tokens before caps; 0 for thumbnails.
        scores: ``[T, P]`` fp32, the patch scores.
        layout: the images of the batch.
        policy: the name of the policy that chose.
    """

    tokens: Tensor | None
    lengths: list[int]
    cu_seqlens: Tensor
    index: Tensor
    budgets: Tensor
    shares: Tensor
    scores: Tensor
    layout: tuple[ImageLayout, ...]
    policy: str = "hero"

    def per_image(self) -> list[Tensor]:
        """The tokens of each image, ``[n_i, D]``."""
        return list(self.tokens.split(self.lengths))

    def keep_mask(self) -> Tensor:
        """``[T, P]`` bool, true where the patch was kept."""
        keep = torch.zeros(self.scores.numel(), dtype=torch.bool, device=self.index.device)
        keep[self.index[self.index >= 0].long()] = True
        return keep.view_as(self.scores)


@dataclass(frozen=True)
class Plan:
    """What a batch's layout and a configuration imply, as tensors on a device.

    Attributes:
        segments: the images, for the operations.
        valid: ``[T, P]`` bool, patches that are not padding.
        valid_counts: ``[T]`` int32.
        caps: ``[T]`` int32, the most that can be kept of each crop: fewer where the encoder drops patches.
        maps: ``{map: {layer: [T] fp32}}``, weight of a layer in a map of each crop.
        ranked: the maps whose order is wanted.
    """

    segments: hk.Segments
    valid: Tensor
    valid_counts: Tensor
    caps: Tensor
    maps: dict[str, dict[int, Tensor]]
    ranked: frozenset[str]

    @property
    def layer_weights(self) -> dict[int, Tensor]:
        """``{layer: [T] fp32}``, weight of a layer in the score of each crop."""
        return self.maps[SCORES]


@lru_cache(maxsize=256)
def plan(
    layouts: tuple[ImageLayout, ...],
    config: HeroConfig,
    depth: int,
    device: torch.device,
    feature_layer: int | None = None,
) -> Plan:
    """The plan of a batch on an encoder of ``depth`` layers; cached.

    ``feature_layer`` is the last layer of the features, the last but one where ``None``.
    """
    feature_layer = max(depth - 2, 0) if feature_layer is None else feature_layer
    segments, is_thumbnail, valid, caps = [], [], [], []
    for layout in layouts:
        thumbnail_tokens, _ = layout.budget(config)
        segments.append(
            hk.Segment(
                crops=layout.crops,
                thumbnail=layout.thumbnail_crop,
                grid_width=layout.grid[1] if layout.stitched and layout.tiles else 1,
                thumbnail_tokens=thumbnail_tokens,
                tile_tokens=layout.tile_quota(config),
                newline_rows=layout.rows if layout.newlines else (0, 0),
                thumbnail_newline=layout.newlines and not layout.tiles,
            )
        )
        crops = torch.ones((layout.crops, layout.side, layout.side), dtype=torch.bool)
        tiles = crops[layout.first_tile : layout.first_tile + layout.tiles]
        tiles.zero_()
        for tile, (top, bottom, left, right) in zip(tiles, layout.tile_rectangles, strict=True):
            tile[top:bottom, left:right] = True
        valid.append(crops.flatten(1))
        own = [layout.patches] * layout.crops
        own[layout.first_tile : layout.first_tile + layout.tiles] = layout.tile_caps(config)
        caps += own
        is_thumbnail += [crop == layout.thumbnail_crop for crop in range(layout.crops)]
    is_thumbnail = torch.tensor(is_thumbnail)
    asked = policy_of(config.policy).maps(config, depth, feature_layer)
    maps = {
        name: {
            layer: torch.where(is_thumbnail, one.thumbnail.get(layer, 0.0), one.tiles.get(layer, 0.0))
            .float()
            .to(device)
            for layer in one.layers
        }
        for name, one in asked.items()
    }
    ranked = frozenset(name for name, one in asked.items() if one.ranked)
    valid = torch.cat(valid)
    counts = valid.sum(1, dtype=torch.int32)
    side = layouts[0].side
    caps = counts if config.encoder_keep is None else torch.tensor(caps, dtype=torch.int32)
    return Plan(
        hk.Segments(tuple(segments), side),
        valid.to(device),
        counts.to(device),
        caps.to(device),
        maps,
        ranked,
    )


class _Dropping(NamedTuple):
    """Where in the encoder patches are dropped, and what is captured after."""

    layer: int
    thumbnail: dict[str, dict[int, float]]  # {map: {layer after: weight}}


@lru_cache(maxsize=256)
def _dropping(config: HeroConfig, depth: int, features: tuple[int, ...], with_relevance: bool) -> _Dropping:
    """How a configuration with ``encoder_keep`` drops patches within an encoder of ``depth`` layers; cached.

    Args:
        features: the layers of the features.

    Raises:
        ValueError: the policy needs dropped patches afterwards, or nothing would be saved.
    """
    policy = policy_of(config.policy)
    maps, needs = policy.maps(config, depth, max(features)), policy.needs(config, with_relevance)

    def refuse(why: str) -> ValueError:
        return ValueError(f"encoder_keep: expected None {why}, got {config.encoder_keep!r}")

    if SCORES not in maps or not all(one.tiles for one in maps.values()):
        raise refuse(f"for policy {config.policy!r}, which does not choose patches of tiles by attention")
    if needs.keys or needs.patch_relevance:
        raise refuse(f"for policy {config.policy!r}, which looks at all patches of the last layers")
    layer = max(layer for one in maps.values() for layer in one.tiles)
    if min(features) <= layer:
        raise refuse(
            f"for policy {config.policy!r} with tiles scored up to layer {layer} and features of layer "
            f"{min(features)}, which must be a later one"
        )
    return _Dropping(
        layer,
        {
            name: {deep: weight for deep, weight in one.thumbnail.items() if deep > layer}
            for name, one in maps.items()
        },
    )


def _check_feature_layer(value: object, depth: int) -> int | tuple[int, ...]:
    """A hidden state, or several, of an encoder of ``depth`` layers; 0 is what the first layer takes."""
    layers = (value,) if isinstance(value, int) else value
    expected = f"hidden states in [{-depth - 1}, {depth}], at least one"
    if isinstance(layers, str) or not isinstance(layers, Sequence) or any(type(x) is not int for x in layers):
        raise TypeError(f"feature_layer: expected {expected}, got {value!r}")
    if not layers or not all(-depth - 1 <= layer <= depth for layer in layers):
        raise ValueError(f"feature_layer: expected {expected}, got {value!r}")
    return value if isinstance(value, int) else tuple(layers)


def _layers_of(feature_layer: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """The layers whose outputs the features are; −1 for the embeddings."""
    states = (feature_layer,) if isinstance(feature_layer, int) else feature_layer
    return tuple(state % (depth + 1) - 1 for state in states)


def _last_layer(feature_layer: int | tuple[int, ...], depth: int) -> int:
    """The last layer whose output is among the features; the first where they are the embeddings alone."""
    return max(*_layers_of(feature_layer, depth), 0)


class HeroVisionEncoder(nn.Module):
    """A vision encoder that returns only the visual tokens worth keeping (docs/method.md).

    Wraps a tower as it is: its attention implementation, dtype, devices and hooks stay the user's. The
    stages are methods, each replaceable, in this order: :meth:`prepare`, :meth:`encode`, :meth:`score`,
    :meth:`budget`, :meth:`select`, :meth:`project`.

    Args:
        vision_tower: a transformers ``CLIPVisionModel``. Its chosen attention modules are captured
            until :meth:`remove`.
        projector: maps features to the language model's width; ``None`` leaves them as they are.
        config: what to keep; the defaults where ``None``.
        geometry: how images are cut; ``None`` takes the tower's sizes and the grids 1×2, 2×1, 2×2, 3×1
            and 1×3 of LLaVA-NeXT.
        image_newline: ``[D]`` embedding that closes each row of the stitched grid; ``None`` for none.
        relevance: a :class:`hero.ClipRelevance`, to weigh tiles by the question.
        feature_layer: the hidden state(s) the model uses; several are concatenated.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, by name; a tower that
            has hero attached already.
    """

    def __init__(
        self,
        vision_tower: nn.Module,
        projector: nn.Module | None = None,
        config: HeroConfig | None = None,
        *,
        geometry: Geometry | None = None,
        image_newline: Tensor | None = None,
        relevance: ClipRelevance | None = None,
        feature_layer: int | Sequence[int] = -2,
    ):
        super().__init__()
        config = HeroConfig() if config is None else config
        if not isinstance(config, HeroConfig):
            raise TypeError(f"config: expected hero.HeroConfig, got {config!r}")
        if relevance is not None and not isinstance(relevance, ClipRelevance):
            raise TypeError(f"relevance: expected hero.ClipRelevance, got {relevance!r}")
        if not isinstance(vision_tower, nn.Module):
            raise TypeError(f"vision_tower: expected an nn.Module, got {vision_tower!r}")
        if projector is not None and not isinstance(projector, nn.Module):
            raise TypeError(f"projector: expected an nn.Module or None, got {projector!r}")
        if geometry is not None and not isinstance(geometry, Geometry):
            raise TypeError(f"geometry: expected hero.Geometry, got {geometry!r}")
        if image_newline is not None and not isinstance(image_newline, Tensor):
            raise TypeError(f"image_newline: expected a tensor [D], got {image_newline!r}")
        self._tower = tower_for(vision_tower)
        crop_size, patch_size = self._tower.geometry(vision_tower)
        if geometry is None:
            geometry = Geometry(crop_size, patch_size, grid_pinpoints(crop_size))
        elif (geometry.crop_size, geometry.patch_size) != (crop_size, patch_size * self._tower.merge):
            got = f"{geometry.crop_size} and {geometry.patch_size}"
            raise ValueError(
                f"geometry: expected crops of {crop_size} px, patches of {patch_size} px, got {got}"
            )
        modules = self._tower.attention_modules(vision_tower)
        self.depth = len(modules)
        self.feature_layer = _check_feature_layer(feature_layer, self.depth)
        self._last_layer = _last_layer(self.feature_layer, self.depth)
        policy = policy_of(config.policy)
        maps = policy.maps(config, self.depth, self._last_layer)
        needs = policy.needs(config, relevance is not None)  # raises where relevance is missing
        lacks = {"by_cls": not self._tower.has_cls, "by_thumbnail": geometry.thumbnail == "none"}
        for by, lacking in lacks.items():
            if lacking and getattr(policy, by):
                others = ", ".join(repr(name) for name in POLICIES if not getattr(policy_of(name), by))
                where = "an encoder without CLS" if by == "by_cls" else "images without a thumbnail"
                raise ValueError(f"policy: expected one of {others} for {where}, got {config.policy!r}")
        if relevance is None and (needs.relevance or needs.patch_relevance):
            raise ValueError(
                f"relevance: expected a hero.ClipRelevance for policy {config.policy!r}, got None"
            )
        if needs.patch_relevance and relevance.side != geometry.side:
            raise ValueError(
                f"relevance: expected a CLIP model of {geometry.side} × {geometry.side} patches a crop for "
                f"policy {config.policy!r}, got one of {relevance.side} × {relevance.side}"
            )
        self.vision_tower = vision_tower
        self.projector = projector
        self.config = config
        self.geometry = dataclasses.replace(geometry, newlines=image_newline is not None)
        if image_newline is None or isinstance(image_newline, nn.Parameter):
            self.image_newline = image_newline
        else:
            self.register_buffer("image_newline", image_newline, persistent=False)
        self.relevance = relevance
        self._shared = relevance is not None and relevance.shares_weights(vision_tower)
        layers = {layer for asked in maps.values() for layer in asked.layers}
        keys = [self._last_layer] if needs.keys else []
        self._captured = tuple(sorted({*layers, *keys}))
        if config.attention == "fused" and not self._tower.has_cls:
            raise ValueError("attention: expected 'native' for an encoder without CLS, got 'fused'")
        if config.encoder_keep is not None and not self._tower.has_cls:
            raise ValueError(
                f"encoder_keep: expected None for an encoder without CLS, got {config.encoder_keep!r}"
            )
        self._where(self.feature_layer)
        capture.install(
            self._modules_captured(),
            received=not self._tower.has_cls,
            second_softmax=needs.second_softmax,
            fused=config.attention == "fused",
            keys=keys,
        )

    @property
    def _needs(self) -> Needs:
        """What the policy looks at."""
        return policy_of(self.config.policy).needs(self.config, self.relevance is not None)

    @property
    def needs_text(self) -> bool:
        """Whether the question weighs in what is kept."""
        return self._needs.relevance or self._needs.patch_relevance

    @property
    def needs_cls(self) -> bool:
        """Whether a tile signal looks at the last layer's CLS."""
        return self._needs.cls or (self._shared and self._needs.relevance)

    def _plan(self, layouts: tuple[ImageLayout, ...], device: torch.device) -> Plan:
        return plan(layouts, self.config, self.depth, device, self._last_layer)

    def _where(self, feature_layer: int | Sequence[int]) -> _Dropping | None:
        """Where patches are dropped within the encoder, if they are."""
        if self.config.encoder_keep is None:
            return None
        features = _layers_of(feature_layer, self.depth)
        return _dropping(self.config, self.depth, features, self.relevance is not None)

    def _cut(
        self,
        where: _Dropping,
        layouts: tuple[ImageLayout, ...],
        collectors: Mapping[str, capture.Collector],
        device: torch.device,
    ) -> Cut:
        """Dropping in one pass, whose collectors these are."""
        batch, packed = self._plan(layouts, device), packing(layouts, self.config, device)

        def rank() -> Tensor:
            for name, collector in collectors.items():
                collector.narrow(packed.thumbnails, where.thumbnail[name])
            rows, _ = collectors[SCORES].whole
            return hk.finalize_scores(rows, valid=batch.valid, rank=True).ranks

        return Cut(where.layer, packed, rank)

    def _modules_captured(self) -> dict[int, nn.Module]:
        modules = self._tower.attention_modules(self.vision_tower)
        return {layer: modules[layer] for layer in self._captured}

    def remove(self) -> None:
        """Stop capturing: the tower is exactly as it was before."""
        capture.remove(self._modules_captured())

    def prepare(self, pixel_values: Tensor, image_sizes) -> tuple[Tensor, tuple[ImageLayout, ...]]:
        """Check the input and lay it out.

        Args:
            pixel_values: ``[B, crops, 3, S, S]``, padded to the largest number of crops, or
                ``[T, 3, S, S]``, all crops one after another; floating.
            image_sizes: ``[B, 2]`` (height, width) in pixels, a tensor or pairs.

        Returns:
            crops ``[T, 3, S, S]`` and the layout of each image.

        Raises:
            TypeError, ValueError: of another type, rank, dtype or size, by name.
        """
        expected = "[B, crops, 3, S, S] or [T, 3, S, S]"
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values: expected a tensor {expected}, got {type(pixel_values).__name__}")
        shape = tuple(pixel_values.shape)
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values: expected a floating dtype, got {pixel_values.dtype}")
        if len(shape) not in (4, 5):
            raise ValueError(f"pixel_values: expected {expected}, got shape {shape}")
        size = self.geometry.crop_size
        if shape[-3:] != (3, size, size):
            raise ValueError(f"pixel_values: expected crops of 3 × {size} × {size}, got shape {shape}")
        layouts = self.geometry.layouts(image_sizes)
        counts = [layout.crops for layout in layouts]
        if len(shape) == 4:
            if shape[0] != sum(counts):
                raise ValueError(
                    f"image_sizes: expected the sizes of {shape[0]} crops, got those of {sum(counts)}"
                )
            return pixel_values, layouts
        if shape[0] != len(layouts) or shape[1] < max(counts):
            raise ValueError(
                f"image_sizes: expected {shape[0]} images of at most {shape[1]} crops, "
                f"got {len(layouts)} images of {counts} crops"
            )
        if min(counts) == shape[1]:
            return pixel_values.flatten(0, 1), layouts
        return torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)]), layouts

    def encode(
        self,
        pixel_values: Tensor,
        layouts: tuple[ImageLayout, ...],
        *,
        feature_layer: int | Sequence[int] | None = None,
        **kwargs,
    ) -> Encoded:
        """Run the tower on crops ``[T, 3, S, S]``; patch scores fall out of its attention.

        Another ``feature_layer`` changes the features of this call; what is captured stays as it is.

        Raises:
            ValueError: ``encoder_keep`` is set, and the tower must run whole or features are of early layers.
        """
        batch = self._plan(layouts, pixel_values.device)
        needs, received = self._needs, not self._tower.has_cls
        collectors = {
            name: capture.Collector(weights, second_softmax=needs.second_softmax, received=received)
            for name, weights in batch.maps.items()
        }
        keys = [capture.KeyCollector(self._last_layer)] if needs.keys else []
        layer = (
            self.feature_layer if feature_layer is None else _check_feature_layer(feature_layer, self.depth)
        )
        with_patches = needs.patch_relevance and self._shared
        if with_patches:  # the last layer comes along as one more layer of features
            layer = [*((layer,) if isinstance(layer, int) else layer), self.depth]
        where = self._where(layer)
        cut = None if where is None else self._cut(where, layouts, collectors, pixel_values.device)
        with capture.collect([*collectors.values(), *keys], self._modules_captured()):
            features, cls, pooled, output = self._tower.run(
                self.vision_tower,
                pixel_values,
                layer,
                cls=self.needs_cls,
                scored=self._captured,
                cut=cut,
                **kwargs,
            )
        patches = None
        if with_patches:
            width = features.shape[-1] // len(layer)
            features, patches = features.split((width * (len(layer) - 1), width), dim=-1)
        device = features.device
        valid = self._plan(layouts, device).valid
        maps = {
            name: hk.finalize_scores(collector.result().to(device), valid=valid, rank=name in batch.ranked)
            for name, collector in collectors.items()
        }
        return Encoded(
            features,
            cls,
            pooled,
            *maps.get(SCORES, (None, None, None)),
            pixel_values,
            output,
            maps=maps,
            keys=keys[0].result().to(device) if keys else None,
            patches=patches,
            valid=None if cut is None or cut.packing is None else valid & cut.survivors(),
        )

    def score(
        self, encoded: Encoded, layouts: tuple[ImageLayout, ...], text: Sequence[str] | None = None
    ) -> Scored:
        """Patch scores and tile signals, by the policy.

        Raises:
            ValueError: relevance weighs in the budgets and no question is given for each image.
        """
        relevance = patch_relevance = None
        if self.relevance is not None:
            if self.needs_text and (text is None or len(text) != len(layouts)):
                got = "none" if text is None else f"{len(text)}"
                raise ValueError(f"text: expected a question for each of {len(layouts)} images, got {got}")

            def relevance() -> Tensor:
                images = scoring.crop_images(layouts, encoded.features.device)
                pooled = encoded.pooled if self._shared else None
                return self.relevance(text, images, encoded.pixel_values, pooled)

            def patch_relevance() -> Tensor:
                images = scoring.crop_images(layouts, encoded.features.device)
                return self.relevance.of_patches(text, images, encoded.pixel_values, encoded.patches)

        with torch.no_grad():
            seen = Seen(
                scores=encoded.scores,
                entropy=encoded.entropy,
                ranks=encoded.ranks,
                valid=self._plan(layouts, encoded.features.device).valid,
                cls=encoded.cls,
                layouts=layouts,
                config=self.config,
                relevance=relevance,
                patch_relevance=patch_relevance,
                maps=encoded.maps,
            )
            return policy_of(self.config.policy).score(seen)

    def budget(self, scored: Scored, layouts: tuple[ImageLayout, ...]) -> hk.TileBudgets:
        """Patches to keep of each crop."""
        batch = self._plan(layouts, scored.scores.device)
        return hk.tile_budgets(scored.signals, batch.caps, batch.segments, allocation=self.config.allocation)

    def select(
        self, encoded: Encoded, scored: Scored, budgets: hk.TileBudgets, layouts: tuple[ImageLayout, ...]
    ) -> hk.Gathered:
        """The kept features, packed in the order of the stock sequence; newline rows are still zero."""
        batch = self._plan(layouts, scored.scores.device)
        replaced = policy_of(self.config.policy).replace(encoded, scored, budgets, batch.valid)
        gathered = hk.segmented_topk_gather(
            encoded.features,
            scored.scores,
            batch.segments,
            valid=batch.valid if encoded.valid is None else encoded.valid,
            budgets=budgets,
            allocation=self.config.allocation,
            ranks=scored.ranks if replaced is None else replaced.ranks,
            valid_counts=batch.caps,
        )
        if replaced is None:
            return gathered
        place = gathered.index.clamp_min(0).long()
        slot = replaced.slots.flatten()[place].masked_fill(gathered.index < 0, -1)
        values = replaced.values[place // batch.segments.patches, slot.clamp_min(0)]
        tokens = torch.where((slot >= 0)[:, None], values, gathered.tokens)
        return gathered._replace(tokens=tokens)

    def project(self, gathered: hk.Gathered) -> Tensor:
        """Tokens ``[total, D]`` in the language model's width, newline rows filled."""
        tokens = gathered.tokens if self.projector is None else self.projector(gathered.tokens)
        if self.image_newline is None:
            return tokens
        newline = (gathered.index < 0).to(tokens.device)[:, None]
        return torch.where(newline, self.image_newline.to(tokens.device, tokens.dtype), tokens)

    def forward(
        self, pixel_values: Tensor, image_sizes, text: str | Sequence[str] | None = None
    ) -> Selection:
        """Encode images and keep their most useful tokens.

        Args:
            pixel_values: ``[B, crops, 3, S, S]`` or ``[T, 3, S, S]`` (see :meth:`prepare`).
            image_sizes: ``[B, 2]`` (height, width) in pixels before cutting.
            text: the question, one for all images or one an image; needed with relevance, and only then.

        Raises:
            TypeError, ValueError: an argument of the wrong type or size, by name; NaN in the features
                (checked on the CPU).
        """
        return self.run(pixel_values, image_sizes, text)[0]

    def run(
        self, pixel_values: Tensor, image_sizes, text: str | Sequence[str] | None = None, **kwargs
    ) -> tuple[Selection, Encoded]:
        """:meth:`forward`, and what :meth:`encode` returned; keyword arguments go to it."""
        crops, layouts = self.prepare(pixel_values, image_sizes)
        if isinstance(text, str):
            text = [text] * len(layouts)
        if text is not None and not isinstance(text, Sequence):
            raise TypeError(f"text: expected a string, or one an image, got {text!r}")
        if text is not None and self.relevance is None:
            raise ValueError(f"text: expected None without a relevance model, got {text!r}")
        encoded = self.encode(crops, layouts, **kwargs)
        scored = self.score(encoded, layouts, text)
        budgets = self.budget(scored, layouts)
        gathered = self.select(encoded, scored, budgets, layouts)
        lengths = torch.tensor((0, *gathered.lengths)).cumsum(0, dtype=torch.int32)
        selection = Selection(
            tokens=self.project(gathered),
            lengths=list(gathered.lengths),
            cu_seqlens=lengths.to(gathered.index.device),
            index=gathered.index,
            budgets=budgets.budgets,
            shares=budgets.shares,
            scores=scored.scores,
            layout=layouts,
            policy=self.config.policy,
        )
        return selection, encoded
