"""The drop-in vision encoder: pixels → encode → score → budget → select → project → packed tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hero_kernels as hk
from hero_kernels.segments import to_device

from . import capture as capturing
from .config import POLICIES, HeroConfig
from .graphs import Graphs
from .layout import Geometry, ImageLayout, grid_pinpoints
from .models import Encoded, tower_for
from .packing import Cut
from .plan import Plan, plan_of
from .policies import SCORES, Map, Needs, Scored, Seen, policy_of
from .relevance import ClipRelevance

__all__ = ["HeroVisionEncoder", "Selection"]


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


class _Dropping(NamedTuple):
    """Where within the encoder patches of tiles are dropped: after the last layer that scores them.

    Attributes:
        layer: that layer.
        thumbnail: ``{map: {later layer: weight}}``, what is captured after it.
    """

    layer: int
    thumbnail: dict[str, dict[int, float]]


def _dropping(config: HeroConfig, maps: Mapping[str, Map], needs: Needs) -> _Dropping | None:
    """Where a configuration drops patches within the encoder; ``None`` where it does not.

    Raises:
        ValueError: the policy looks at patches of tiles afterwards, or not at all before.
    """
    if config.encoder_keep is None:
        return None
    why = None
    if SCORES not in maps or not all(one.tiles for one in maps.values()):
        why = "does not choose patches of tiles by their attention alone"
    elif needs.keys or needs.patch_relevance:
        why = "looks at all patches in the last layers"
    if why is not None:
        raise ValueError(
            f"encoder_keep: expected None for policy {config.policy!r}, which {why}, "
            f"got {config.encoder_keep!r}"
        )
    layer = max(layer for one in maps.values() for layer in one.tiles)
    later = {
        name: {number: weight for number, weight in one.thumbnail.items() if number > layer}
        for name, one in maps.items()
    }
    return _Dropping(layer, later)


def _constants(image_sizes) -> tuple[tuple[int, int], ...]:
    """Sizes as constants of the code being compiled, which may have taken them for variables.

    A key of a dictionary has to be known.
    """
    if isinstance(image_sizes, Tensor):
        raise TypeError("image_sizes: expected pairs of integers in compiled code, got a tensor")
    return tuple((next(iter({height: 0})), next(iter({width: 0}))) for height, width in image_sizes)


class HeroVisionEncoder(nn.Module):
    """A vision encoder that returns only the visual tokens worth keeping (docs/method.md).

    Wraps a tower as it is: its attention implementation, dtype, devices and hooks stay the user's. The
    stages are methods, each replaceable, in this order: :meth:`prepare`, :meth:`ask`, :meth:`encode`,
    :meth:`score`, :meth:`budget`, :meth:`select`, :meth:`project`.

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
        capture: replay the stages from CUDA graphs, recorded when a batch of sizes is first seen: for a few
            sizes that come again and again. The :attr:`graphs` of the last 8 are kept; where something on the
            tower changes other than the place, type and values of its weights, ``graphs.clear()`` them.
            Needs a GPU, no gradients, and ``allocation="exact"``.

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
        capture: bool = False,
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
        self._held = SimpleNamespace()  # plans of compiled code
        self._policy = policy = policy_of(config.policy)
        maps = policy.maps(config, self.depth, self._last_layer)
        self._needs = needs = policy.needs(config, relevance is not None)  # raises where relevance is missing
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
        if not isinstance(capture, bool):
            raise TypeError(f"capture: expected a bool, got {capture!r}")
        if capture and config.allocation != "exact":
            raise ValueError(
                f"capture: expected False with allocation={config.allocation!r}, whose counts are waited for"
            )
        self.graphs = Graphs() if capture else None
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
        if (needs.relevance or needs.patch_relevance) and not self._shared and not relevance.second_pass:
            raise ValueError(
                "relevance: expected a CLIP model with the vision weights of the model's own tower, or "
                "ClipRelevance(..., second_pass=True), which runs CLIP's vision encoder too, got others"
            )
        layers = {layer for asked in maps.values() for layer in asked.layers}
        keys = [self._last_layer] if needs.keys else []
        self._captured = tuple(sorted({*layers, *keys}))
        if config.attention == "fused" and not self._tower.has_cls:
            raise ValueError("attention: expected 'native' for an encoder without CLS, got 'fused'")
        if config.encoder_keep is not None and not self._tower.has_cls:
            raise ValueError(
                f"encoder_keep: expected None for an encoder without CLS, got {config.encoder_keep!r}"
            )
        self._dropping = _dropping(config, maps, needs)
        self._check_dropping(self.feature_layer)
        capturing.install(
            self._modules_captured(),
            received=not self._tower.has_cls,
            second_softmax=needs.second_softmax,
            fused=config.attention == "fused",
            keys=keys,
        )

    @property
    def needs_text(self) -> bool:
        """Whether the question weighs in what is kept."""
        return self._needs.relevance or self._needs.patch_relevance

    @property
    def needs_cls(self) -> bool:
        """Whether a tile signal looks at the last layer's CLS."""
        return self._needs.cls or (self._shared and self._needs.relevance)

    def _plan(self, image_sizes, device: torch.device) -> Plan:
        layouts = self.geometry.layouts(image_sizes)
        return plan_of(layouts, self.config, self.depth, device, self._last_layer)

    @torch.compiler.assume_constant_result
    def _hold_plan(self, image_sizes: tuple[tuple[int, int], ...], device: torch.device) -> str:
        """Keep the plan for code being compiled, which can take a string for a constant, but no plan."""
        name = f"plan_{device}_{image_sizes}"
        setattr(self._held, name, self._plan(image_sizes, device))
        return name

    def _check_dropping(self, feature_layer: int | Sequence[int]) -> None:
        """Raise ``ValueError`` where features are of layers before patches are dropped."""
        first = min(_layers_of(feature_layer, self.depth))
        if self._dropping is not None and first <= self._dropping.layer:
            raise ValueError(
                f"encoder_keep: expected None for policy {self.config.policy!r} with tiles scored up to "
                f"layer {self._dropping.layer} and features of layer {first}, which must be a later one, "
                f"got {self.config.encoder_keep!r}"
            )

    def _modules_captured(self) -> dict[int, nn.Module]:
        modules = self._tower.attention_modules(self.vision_tower)
        return {layer: modules[layer] for layer in self._captured}

    def remove(self) -> None:
        """Stop capturing: the tower is exactly as it was before."""
        if self.graphs is not None:
            self.graphs.clear()
        capturing.remove(self._modules_captured())

    def prepare(self, pixel_values: Tensor, image_sizes) -> tuple[Tensor, Plan]:
        """Check the input and plan the batch.

        Args:
            pixel_values: ``[B, crops, 3, S, S]``, padded to the largest number of crops, or
                ``[T, 3, S, S]``, all crops one after another; floating.
            image_sizes: ``[B, 2]`` (height, width) in pixels: pairs of integers or a tensor, best on the CPU,
                for one on a GPU is waited for. In compiled code pairs of integers.

        Returns:
            crops ``[T, 3, S, S]`` and the plan, which the other stages take.

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
        if torch.compiler.is_compiling():
            batch = getattr(self._held, self._hold_plan(_constants(image_sizes), pixel_values.device))
        else:
            batch = self._plan(image_sizes, pixel_values.device)
        counts = [image.crops for image in batch.segments.images]
        if len(shape) == 4:
            if shape[0] != sum(counts):
                raise ValueError(
                    f"image_sizes: expected the sizes of {shape[0]} crops, got those of {sum(counts)}"
                )
            return pixel_values, batch
        if shape[0] != len(counts) or shape[1] < max(counts):
            raise ValueError(
                f"image_sizes: expected {shape[0]} images of at most {shape[1]} crops, "
                f"got {len(counts)} images of {counts} crops"
            )
        if min(counts) == shape[1]:
            return pixel_values.flatten(0, 1), batch
        return pixel_values[batch.places.images, batch.places.crops], batch

    def encode(
        self,
        pixel_values: Tensor,
        batch: Plan,
        *,
        feature_layer: int | Sequence[int] | None = None,
        **kwargs,
    ) -> Encoded:
        """Run the tower on crops ``[T, 3, S, S]``; patch scores fall out of its attention.

        Another ``feature_layer`` changes the features of this call; what is captured stays as it is.

        Raises:
            ValueError: ``encoder_keep`` is set, but the tower must run whole or features are early.
        """
        needs, received = self._needs, not self._tower.has_cls
        collectors = {
            name: capturing.Collector(weights, second_softmax=needs.second_softmax, received=received)
            for name, weights in batch.maps.items()
        }
        keys = [capturing.KeyCollector(self._last_layer)] if needs.keys else []
        layer = (
            self.feature_layer if feature_layer is None else _check_feature_layer(feature_layer, self.depth)
        )
        with_patches = needs.patch_relevance and self._shared
        if with_patches:  # the last layer comes along as one more layer of features
            layer = [*((layer,) if isinstance(layer, int) else layer), self.depth]
        modules, cut = self._modules_captured(), None
        if self._dropping is not None:
            self._check_dropping(layer)
            after, weights = self._dropping
            cut = Cut(after, batch.packing, batch.valid, collectors, weights, SCORES, modules)
        with capturing.collect([*collectors.values(), *keys], modules):
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
        valid = batch.on(device).valid
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
            valid=None if cut is None or cut.packing is None else cut.valid(),
        )

    def ask(self, batch: Plan, text: str | Sequence[str] | Tensor | None) -> Callable[[], Tensor] | None:
        """Begin to embed the questions, on a GPU beside what the vision tower does meanwhile.

        Args:
            text: as in :meth:`forward`.

        Returns:
            what gives their embeddings ``[B, E]``; ``None`` where the question has no say.

        Raises:
            TypeError, ValueError: relevance weighs in the budgets and no question is given for each image; a
                question without a relevance model.
        """
        images = len(batch.layouts)
        if isinstance(text, str):
            text = [text] * images
        if text is not None and not isinstance(text, (Sequence, Tensor)):
            raise TypeError(f"text: expected a string, one an image, or their embeddings, got {text!r}")
        if text is not None and self.relevance is None:
            raise ValueError(f"text: expected None without a relevance model, got {text!r}")
        if not self.needs_text:
            return None
        if text is None or len(text) != images:
            got = "none" if text is None else f"{len(text)}"
            raise ValueError(f"text: expected a question for each of {images} images, got {got}")
        if isinstance(text, Tensor):
            return lambda: text
        return self.relevance.start(text)

    def score(
        self,
        encoded: Encoded,
        batch: Plan,
        text: str | Sequence[str] | Tensor | Callable[[], Tensor] | None = None,
    ) -> Scored:
        """Patch scores and tile signals, by the policy.

        Args:
            text: as in :meth:`forward`, or what :meth:`ask` returned.

        Raises:
            TypeError, ValueError: as :meth:`ask`.
        """
        batch = batch.on(encoded.features.device)
        question = text if callable(text) else self.ask(batch, text)
        relevance = patch_relevance = None
        if self.relevance is not None:
            images = batch.places.images

            def relevance() -> Tensor:
                pooled = encoded.pooled if self._shared else None
                return self.relevance(question(), images, encoded.pixel_values, pooled)

            def patch_relevance() -> Tensor:
                return self.relevance.of_patches(question(), images, encoded.pixel_values, encoded.patches)

        with torch.no_grad():
            seen = Seen(
                scores=encoded.scores,
                entropy=encoded.entropy,
                ranks=encoded.ranks,
                valid=batch.valid,
                cls=encoded.cls,
                layouts=batch.layouts,
                places=batch.places,
                config=self.config,
                relevance=relevance,
                patch_relevance=patch_relevance,
                maps=encoded.maps,
                constants=batch.constants,
            )
            return self._policy.score(seen)

    def budget(self, scored: Scored, batch: Plan) -> hk.TileBudgets:
        """Patches to keep of each crop."""
        batch = batch.on(scored.scores.device)
        return hk.tile_budgets(scored.signals, batch.caps, batch.segments, allocation=self.config.allocation)

    def select(self, encoded: Encoded, scored: Scored, budgets: hk.TileBudgets, batch: Plan) -> hk.Gathered:
        """The kept features, packed in the order of the stock sequence; newline rows are still zero."""
        batch = batch.on(scored.scores.device)
        replaced = self._policy.replace(encoded, scored, budgets, batch.valid)
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
        self, pixel_values: Tensor, image_sizes, text: str | Sequence[str] | Tensor | None = None
    ) -> Selection:
        """Encode images and keep their most useful tokens.

        Args:
            pixel_values: ``[B, crops, 3, S, S]`` or ``[T, 3, S, S]`` (see :meth:`prepare`).
            image_sizes: ``[B, 2]`` (height, width) in pixels before cutting (see :meth:`prepare`).
            text: the question, one for all images or one an image, needed with relevance and only then; or
                ``[B, E]`` fp32, their embeddings (:meth:`hero.ClipRelevance.text_embeddings`).

        Raises:
            TypeError, ValueError: an argument of the wrong type or size, by name; NaN in the features
                (checked on the CPU).
        """
        return self.run(pixel_values, image_sizes, text)[0]

    def run(
        self, pixel_values: Tensor, image_sizes, text: str | Sequence[str] | Tensor | None = None, **kwargs
    ) -> tuple[Selection, object | None]:
        """:meth:`forward`, and what the tower returned; keyword arguments go to :meth:`encode`."""
        crops, batch = self.prepare(pixel_values, image_sizes)
        question = self.ask(batch, text)
        output, lengths = None, batch.segments.lengths
        if self.graphs is not None:
            tensors = self._replay(crops, batch, question, **kwargs)
        else:
            encoded = self.encode(crops, batch, **kwargs)
            tensors, lengths = self._choose(encoded, batch, question)
            output = encoded.output
        tokens, index, budgets, shares, scores = tensors
        cu_seqlens = batch.on(index.device).cu_seqlens
        if lengths != batch.segments.lengths:  # "floor": as many as the images have it
            cu_seqlens = to_device(torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32), index.device)
        selection = Selection(
            tokens=tokens,
            lengths=list(lengths),
            cu_seqlens=cu_seqlens,
            index=index,
            budgets=budgets,
            shares=shares,
            scores=scores,
            layout=batch.layouts,
            policy=self.config.policy,
        )
        return selection, output

    def _choose(
        self, encoded: Encoded, batch: Plan, question: Callable[[], Tensor] | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """All stages after :meth:`encode`: the tensors of a selection, and the images' lengths."""
        scored = self.score(encoded, batch, question)
        budgets = self.budget(scored, batch)
        gathered = self.select(encoded, scored, budgets, batch)
        tensors = (self.project(gathered), gathered.index, budgets.budgets, budgets.shares, scored.scores)
        return tensors, gathered.lengths

    def _replay(
        self,
        crops: Tensor,
        batch: Plan,
        question: Callable[[], Tensor] | None,
        feature_layer: int | Sequence[int] | None = None,
        **kwargs,
    ) -> list[Tensor]:
        """The tensors of a selection, by graphs: one, or two with the question embedded between them."""
        asked = {name: value for name, value in kwargs.items() if value is not None}
        if asked:
            raise ValueError(f"capture: expected nothing asked of the vision tower, got {asked}")
        layer = (
            feature_layer if feature_layer is None or isinstance(feature_layer, int) else (*feature_layer,)
        )

        def encode(_, crops: Tensor) -> Encoded:
            return self.encode(crops, batch, feature_layer=layer)

        def choose(encoded: Encoded, embeddings: Tensor) -> tuple[Tensor, ...]:
            return self._choose(encoded, batch, lambda: embeddings)[0]

        steps, inputs = [encode, choose], [lambda: crops]
        if question is None:
            steps = [lambda _, crops: self._choose(encode(None, crops), batch, None)[0]]
        else:
            inputs.append(lambda: question().to(crops.device))
        implementation = self.vision_tower.config._attn_implementation
        device = crops.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (batch.layouts, crops.device, crops.dtype, layer, question is None, implementation, autocast)
        modules = [self] if self.relevance is None else [self, self.relevance.clip_model]

        def weights() -> list[Tensor]:
            return [weight for module in modules for weight in (*module.parameters(), *module.buffers())]

        return self.graphs.run(key, steps, inputs, weights, batch)
