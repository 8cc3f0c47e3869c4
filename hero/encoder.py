"""The drop-in vision encoder: pixels → encode → score → budget → select → project → packed tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

import hero_kernels as hk
from hero_kernels.segments import to_device

from . import attention_rows, compiled, packed
from ._checks import check_flag, check_types, error
from .config import HeroConfig
from .cuda_graphs import CudaGraphs, Path
from .layout import Geometry
from .models import hidden_states, tower_for
from .plan import CropPlan, Plan, Plans, check_crops, check_pixels, make_plan, with_image
from .policies import Observed, Scored, supported_rows
from .relevance import ClipRelevance, check_questions, check_relevance, renormalization, renormalized
from .selection import Encoded, Selection, with_replaced
from .signals import mean_features
from .tokens import average, average_in_cells, in_cells, merge, resize_to_cells

__all__ = ["HeroVisionEncoder"]

Text: TypeAlias = str | Sequence[str] | Tensor | None


class HeroVisionEncoder(nn.Module):
    """A vision encoder that returns only the visual tokens worth keeping (docs/method.md).

    Wraps a vision tower as it is: its attention implementation, dtype, devices and hooks stay the user's. The
    stages are methods, each replaceable: :meth:`prepare`, :meth:`text_embeddings`, :meth:`encode`,
    :meth:`score`, :meth:`budget`, :meth:`select`, :meth:`project`.

    Args:
        vision_tower: of transformers: ``CLIPVisionModel``, ``SiglipVisionModel``, ``InternVLVisionModel``, or
            that of Idefics3, SmolVLM, Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5. Its attention modules that
            score patches change until :meth:`remove`.
        projector: maps features to the language model's width; ``None`` leaves them as they are.
        config: what to keep; ``HeroConfig()`` if ``None``.
        geometry: how images are cut; ``None`` takes the tower's sizes and the grids 1×2, 2×1, 2×2, 3×1 and
            1×3 of LLaVA-NeXT. If its patches are m times the tower's, a token is m × m patches merged.
        image_newline: ``[D]`` embedding that ends each row of the stitched grid, or a function that returns
            it at each call; ``None`` for none.
        relevance: a :class:`hero.ClipRelevance`, to divide tokens among tiles by the question.
        feature_layer: the hidden state(s) that the model uses; several are concatenated.
            ``"last_hidden_state"`` is the last one after the tower's last norm.
        normalization: mean and standard deviation by which pixels are normalised, CLIP's if ``None``.
            Relevance undoes it where CLIP encodes the crops anew.
        cuda_graphs: replay the tower and its scores from a CUDA graph, one for each number of crops.
            ``"auto"`` does so on a GPU for up to 16 crops, from the second call with this number on, where
            nothing prevents it (gradients, hooks, wrappers, several devices, packed images); ``True`` raises
            an error where something does; ``False`` never does. ``selection.path`` tells what was done.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; a tower with hero attached.
    """

    def __init__(
        self,
        vision_tower: nn.Module,
        projector: nn.Module | None = None,
        config: HeroConfig | None = None,
        *,
        geometry: Geometry | None = None,
        image_newline: Tensor | Callable[[], Tensor] | None = None,
        relevance: ClipRelevance | None = None,
        feature_layer: int | str | Sequence[int] = -2,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        cuda_graphs: bool | str = "auto",
    ):
        super().__init__()
        config = HeroConfig() if config is None else config
        check_types(
            ("config", config, HeroConfig, "hero.HeroConfig"),
            ("relevance", relevance, ClipRelevance, "hero.ClipRelevance or None"),
            ("vision_tower", vision_tower, nn.Module, "an nn.Module"),
            ("projector", projector, nn.Module, "an nn.Module or None"),
            ("geometry", geometry, Geometry, "hero.Geometry or None"),
        )
        if not (image_newline is None or isinstance(image_newline, Tensor) or callable(image_newline)):
            raise error(TypeError, "image_newline", "a tensor [D], a function or None", image_newline)
        self.kind = tower_for(vision_tower)
        geometry, self._merge = self.kind.geometry_of(vision_tower, geometry, config)
        modules = self.kind.attention_modules(vision_tower)
        self.depth = len(modules)
        self._states = hidden_states(feature_layer, self.depth)
        self._last_layer = min(max(*self._states, 1), self.depth) - 1  # of the features
        self.config, policy = config, config.policy
        self._needs = needs = policy.needs(relevance is not None)
        self.geometry = dataclasses.replace(geometry, newlines=image_newline is not None)
        has = {"has_cls": self.kind.has_cls, "has_thumbnail": geometry.thumbnail != "none"}
        scoring = self.kind.scoring_layers(vision_tower)
        self.rows = supported_rows(policy, needs, self.depth, self._last_layer, scoring, **has)
        if config.attention == "fused" and not self.kind.has_cls:
            raise error(ValueError, "attention", "'native' for an encoder without CLS", config.attention)
        self._shared = relevance is not None and relevance.shares_weights(vision_tower)
        if self.needs_text:
            patches_side = geometry.side if needs.patch_relevance else None
            check_relevance(relevance, policy.name, patches_side, shared=self._shared)
        self._to_clip = None if normalization is None else renormalization(normalization)
        if cuda_graphs != "auto":
            check_flag("cuda_graphs", cuda_graphs, expected="'auto', True or False")
        if cuda_graphs is True and self.kind.is_packed:
            raise error(ValueError, "cuda_graphs", "'auto' or False for packed images", True)
        self.cuda_graphs = CudaGraphs(required=cuda_graphs is True) if cuda_graphs else None
        self.vision_tower, self.projector = vision_tower, projector
        if isinstance(image_newline, Tensor) and not isinstance(image_newline, nn.Parameter):
            self.register_buffer("image_newline", image_newline, persistent=False)
        else:
            self.image_newline = image_newline
        self.relevance = relevance
        keys = [self._last_layer] if needs.keys else []
        layers = (layer for rows in self.rows.values() for layer in rows.layers)
        self._scored_layers = tuple(sorted({*layers, *keys}))
        self.plans = Plans()
        self._name = compiled.register(self)
        self.observed = {layer: modules[layer] for layer in self._scored_layers}
        is_stock = config.keep_ratio == 1.0 or not self.kind.has_cls  # fused attention rounds differently
        attention_rows.install(
            self.observed,
            received=not self.kind.has_cls,
            second_softmax=needs.second_softmax,
            attention="native" if is_stock and config.attention == "auto" else config.attention,
            keys=keys,
            packed=self.kind.is_packed,
        )

    @property
    def needs_text(self) -> bool:
        """Whether the question affects what is kept."""
        return self._needs.relevance or self._needs.patch_relevance

    @property
    def needs_cls(self) -> bool:
        """Whether a tile signal reads the CLS feature of the last layer."""
        return self._needs.cls or (self._shared and self._needs.relevance)

    def remove(self) -> None:
        """Restore the tower exactly, and drop plans and CUDA graphs."""
        if self.cuda_graphs is not None:
            self.cuda_graphs.clear()
        self.plans.clear()
        attention_rows.remove(self.observed)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self._name = compiled.register(self)  # a copy is another encoder

    def plan(self, image_sizes, device: torch.device) -> Plan:
        """The plan of a batch of images (see :meth:`prepare`), made when the sizes are first seen."""
        layouts = self.geometry.layouts(self.kind.layouts(self.vision_tower, image_sizes, self.geometry))
        return self.plans.get((layouts, device), partial(make_plan, layouts, self.config, self.rows, device))

    def prepare(self, pixel_values: Tensor, image_sizes) -> tuple[Tensor, Plan]:
        """Check the input and plan the batch.

        Args:
            pixel_values: ``[B, crops, 3, S, S]``, padded to the largest number of crops, or ``[T, 3, S, S]``,
                all crops one after another; floating. ``[patches, channels]`` for Qwen's towers.
            image_sizes: ``[B, 2]`` (height, width) in pixels: pairs of integers or a tensor; for Qwen's
                towers ``image_grid_thw`` ``[B, 3]``. Reading a tensor on a GPU synchronises with it.

        Returns:
            crops ``[T, 3, S, S]``, or packed pixels, and the plan, which the other stages take.

        Raises:
            TypeError, ValueError: another type, rank, dtype or size, by name.
        """
        if self.kind.is_packed:
            plan = self.plan(image_sizes, getattr(pixel_values, "device", torch.device("cpu")))
            return packed.check_pixels(self, pixel_values, plan.layouts), plan
        check_pixels(pixel_values, self.geometry.crop_size)
        plan = self.plan(image_sizes, pixel_values.device)
        check_crops(pixel_values.shape, plan.seen.layouts)
        if pixel_values.ndim == 4:
            return pixel_values, plan
        images, crops = plan.seen.places[:2]
        is_padded = len(images) < len(pixel_values) * pixel_values.shape[1]
        return pixel_values[images, crops] if is_padded else pixel_values.flatten(0, 1), plan

    def encode(
        self,
        pixel_values: Tensor,
        plan: CropPlan,
        *,
        feature_layer: int | str | Sequence[int] | None = None,
        whole: bool = False,
        **kwargs,
    ) -> Encoded:
        """Run the tower on prepared pixels, with the policy's attention rows beside its attention.

        Args:
            feature_layer: other hidden states for the features of this call; the rows stay the same.
            whole: call the tower instead of the layers needed, to have its output as well.
            kwargs: further arguments of the tower, which is then called too.
        """
        if self.kind.is_packed:
            return packed.encode(self, pixel_values, cast(Plan, plan), **kwargs)
        needs, received = self._needs, not self.kind.has_cls
        own: CropPlan = plan.seen if isinstance(plan, Plan) else plan
        collectors = {
            name: attention_rows.Collector(weights, second_softmax=needs.second_softmax, received=received)
            for name, weights in own.weights.items()
        }
        keys = [attention_rows.KeyCollector(self._last_layer)] if needs.keys else []
        states = self._states if feature_layer is None else hidden_states(feature_layer, self.depth)
        with_patches = needs.patch_relevance and self._shared
        if with_patches:  # the last layer is one more hidden state of the features
            states = (*states, self.depth)
        with attention_rows.collect([*collectors.values(), *keys], self.observed):
            ran = self.kind.run(
                self.vision_tower,
                pixel_values,
                states,
                cls=self.needs_cls,
                scored=self._scored_layers,
                whole=whole,
                **kwargs,
            )
        features, patches = ran.features, None
        if with_patches:
            width = features.shape[-1] // len(states)
            features, patches = features.split((width * (len(states) - 1), width), dim=-1)
        own, m = own.to(features.device), self._merge
        features = merge(features, m)
        attention = {
            name: hk.finalize_scores(average(collector.result().to(own.device), m), valid=own.valid)
            for name, collector in collectors.items()
        }
        cls = ran.cls
        if cls is None and self.needs_cls:  # of the patches, which are parts of a token's channels
            cls = mean_features(features, own.valid).unflatten(1, (m * m, -1)).mean(1)
        encoded = Encoded(
            features=features,
            cls=cls,
            pooled=ran.pooled,
            attention=attention,
            pixel_values=pixel_values,
            output=ran.output,
            keys=average(keys[0].result().to(own.device).mT, m).mT if keys else None,
            patches=patches,
            attention_ran="fused" if any(one.fused for one in collectors.values()) else "native",
        )
        return in_cells(encoded, plan, self.projector) if isinstance(plan, Plan) else encoded

    def text_embeddings(self, plan: Plan, text: Text) -> Callable[[], Tensor] | None:
        """Begin to embed the questions, ``text`` of :meth:`forward`; on a GPU beside the vision tower.

        Returns:
            a function that returns the embeddings ``[B, E]``; ``None`` if the question affects nothing.

        Raises:
            TypeError, ValueError: relevance affects the budgets and there is not one question for each image;
                a question without a relevance model.
        """
        if text is not None and self.relevance is None:
            raise error(ValueError, "text", "None without a relevance model", text)
        questions = check_questions(text, len(plan.layouts), required=self.needs_text)
        if self.relevance is None or questions is None or not self.needs_text:
            return None
        if isinstance(questions, Tensor):
            return lambda: questions
        return self.relevance.start(questions, cuda_graphs=self.cuda_graphs is not None)

    def score(self, encoded: Encoded, plan: Plan, text: Text | Callable[[], Tensor] = None) -> Scored:
        """Patch scores and tile signals, by the policy.

        Args:
            plan: on the device of the features.
            text: as in :meth:`forward`, or what :meth:`text_embeddings` returned.

        Raises:
            TypeError, ValueError: as :meth:`text_embeddings`.
        """
        question: Any = text if callable(text) else self.text_embeddings(plan, text)
        images, clip = plan.seen.places.images, cast(Any, self.relevance)

        def pixels() -> Tensor:
            given = encoded.pixel_values
            pixels = packed.pixels_of_blocks(self, given, plan) if self.kind.is_packed else given
            return pixels if self._to_clip is None else renormalized(pixels, *self._to_clip)

        def relevance() -> Tensor:
            pooled = encoded.pooled if self._shared else None
            return average_in_cells(clip(question(), images, pixels(), pooled), plan)

        def patch_relevance() -> Tensor:
            return resize_to_cells(clip.of_patches(question(), images, pixels(), encoded.patches), plan)

        with torch.no_grad():
            observed = Observed(
                features=encoded.features,
                attention=encoded.attention,
                valid=plan.valid,
                cls=encoded.cls,
                layouts=plan.layouts,
                places=plan.places,
                segments=plan.segments,
                pools=plan.pools,
                constants=plan.constants,
                relevance=None if clip is None else relevance,
                patch_relevance=None if clip is None else patch_relevance,
                block_budgets=plan.block_budgets,
            )
            scored = self.config.policy.score(observed)
        if not isinstance(scored, Scored):
            name = f"policy {self.config.policy.name!r}"
            raise error(TypeError, name, "score() to return Scored", type(scored).__name__)
        return scored

    def budget(self, scored: Scored, plan: Plan) -> hk.TileBudgets:
        """Patches to keep of each crop."""
        counts, allocation = plan.valid_counts, self.config.allocation
        found = hk.tile_budgets(scored.signals, counts, plan.segments, allocation=allocation)
        return found if scored.budgets is None else found._replace(budgets=scored.budgets)

    def select(self, encoded: Encoded, scored: Scored, budgets: hk.TileBudgets, plan: Plan) -> hk.Gathered:
        """The kept features, packed in the order of the stock sequence; newline rows are still zero."""
        policy = self.config.policy
        chosen = policy.choose(encoded.features.detach(), scored, budgets, plan.valid)
        replaced = policy.replace(encoded.features, encoded.keys, scored, budgets, plan.valid)
        gathered = hk.segmented_topk_gather(
            encoded.features,
            scored.scores if chosen is None else chosen.float(),
            plan.segments,
            valid=plan.valid,
            budgets=budgets,
            allocation=self.config.allocation,
            ranks=None if replaced is None else replaced.ranks,
            valid_counts=plan.valid_counts,
        )
        return gathered if replaced is None else with_replaced(gathered, replaced)

    def project(self, tokens: Tensor, index: Tensor, *, is_projected: bool = False) -> Tensor:
        """Tokens ``[total, D]`` in the language model's width, with newlines where the index is negative."""
        if self.projector is not None and not is_projected:
            tokens = self.projector(tokens)
        newline = self.image_newline() if callable(self.image_newline) else self.image_newline
        if newline is None:
            return tokens
        is_newline = (index < 0).to(tokens.device)[:, None]
        return torch.where(is_newline, newline.to(tokens.device, tokens.dtype), tokens)

    def forward(self, pixel_values: Tensor, image_sizes, text: Text = None) -> Selection:
        """Encode images and keep their most useful tokens.

        Args:
            pixel_values: ``[B, crops, 3, S, S]`` or ``[T, 3, S, S]`` (see :meth:`prepare`).
            image_sizes: ``[B, 2]`` (height, width) in pixels before cutting (see :meth:`prepare`).
            text: the question, one for all images or one for each; required with relevance, and otherwise an
                error. Or ``[B, E]`` fp32, its embeddings (:meth:`hero.ClipRelevance.text_embeddings`).

        Raises:
            TypeError, ValueError: an argument of the wrong type or size, by name; on the CPU also NaN.
        """
        return self.run(pixel_values, image_sizes, text)[0]

    def run(
        self, pixel_values: Tensor, image_sizes, text: Text = None, **kwargs
    ) -> tuple[Selection, object | None]:
        """:meth:`forward`, and what the tower returned; keyword arguments go to :meth:`encode`."""
        if torch.compiler.is_compiling():
            return compiled.run(self, self._name, pixel_values, image_sizes, text, **kwargs)
        crops, plan = self.prepare(pixel_values, image_sizes)
        question = self.text_embeddings(plan, text)
        try:
            found, reason = self._replay(crops, plan, question, **kwargs)
            if found is None:
                encoded = self.encode(crops, plan, **kwargs)
                found = *self.choose(encoded, plan, question), encoded
        except ValueError as problem:
            raise with_image(problem, crops, plan) from problem
        tensors, lengths, encoded = found
        device, counts = tensors[1].device, None
        cu_seqlens = plan.to(device).cu_seqlens
        if lengths != plan.segments.lengths:  # "floor": the data decides
            counts = lengths
            cu_seqlens = to_device(torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32), device)
        path = Path(not reason, reason, encoded.attention_ran)
        details = (*tensors, cu_seqlens), path, counts, encoded.is_projected
        selection = self.selection(plan.layouts, *details)
        if self.kind.is_packed:
            return selection, packed.kept_output(self, encoded.output, selection, plan)
        return selection, encoded.output

    def choose(
        self, encoded: Encoded, plan: Plan, question: Callable[[], Tensor] | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """:meth:`score`, :meth:`budget` and :meth:`select`.

        Returns:
            tokens before the projector, index, budgets, shares and scores of a :class:`hero.Selection`, and
            the rows of each image.
        """
        plan = plan.to(encoded.features.device)
        scored = self.score(encoded, plan, question)
        budgets = self.budget(scored, plan)
        tokens, index, lengths, _ = self.select(encoded, scored, budgets, plan)
        return (tokens, index, budgets.budgets, budgets.shares, scored.scores), lengths

    def selection(
        self,
        images: Any,
        tensors: Sequence[Tensor],
        path: Path,
        counts: Sequence[int] | None = None,
        is_projected: bool = False,
    ) -> Selection:
        """What the encoder returns, with the tokens projected."""
        names = ("tokens", "index", "budgets", "shares", "scores", "cu_seqlens")
        fields: dict[str, Any] = dict(zip(names, tensors, strict=True))
        fields["tokens"] = self.project(*tensors[:2], is_projected=is_projected)
        fields |= {"images": images, "geometry": self.geometry, "config": self.config}
        return Selection(**fields, counts=counts, path=path)

    def _replay(
        self,
        crops: Tensor,
        plan: Plan,
        question: Callable[[], Tensor] | None,
        feature_layer: int | Sequence[int] | None = None,
        **kwargs,
    ) -> tuple[tuple[tuple[Tensor, ...], tuple[int, ...], Encoded] | None, str]:
        """What :meth:`choose` returns and takes, with :meth:`encode` replayed; or ``None`` and why not."""
        graphs, tower = self.cuda_graphs, self.vision_tower
        given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        if graphs is None or self.kind.is_packed:
            return None, "packed images" if self.kind.is_packed else "cuda_graphs=False"
        if reason := graphs.refusal(tower, partial(self.kind.is_plain, tower), crops, given):
            return None, reason
        states = self._states if feature_layer is None else hidden_states(feature_layer, self.depth)

        def encode(crops: Tensor, valid: Tensor, weights: Tensor) -> Encoded:
            own = CropPlan(valid, weights, self.rows, crops.device)
            return self.encode(crops, own, feature_layer=feature_layer)

        def choose(encoded: Encoded) -> tuple[tuple[Tensor, ...], tuple[int, ...], Encoded]:
            encoded = in_cells(encoded, plan, self.projector)
            tensors, lengths = self.choose(encoded, plan, question)
            return (*tensors[:-1], tensors[-1].clone()), lengths, encoded  # scores may be the graph's memory

        key = states, tower.config._attn_implementation
        return graphs.run(key, encode, (crops,), (plan.seen.valid, plan.seen.layer_weights), choose)
