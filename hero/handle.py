"""``hero.attach`` and ``hero.detach``: put hero on the instances of a stock model, and remove it exactly."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from . import calls
from ._checks import error
from .caches import Held
from .config import HeroConfig
from .encoder import HeroVisionEncoder
from .layout import Geometry, ImageLayout
from .models import Adapter, Parts, ProcessorCounts, Shown, adapter_for, tower_for, with_ratios
from .patches import patch, put, restore
from .relevance import ClipRelevance
from .selection import Selection

__all__ = ["Handle", "attach", "detach"]


class _PerThread(threading.local):
    """A value of each thread's own; copies start empty."""

    value: Selection | None = None

    def __reduce__(self):
        return _PerThread, ()


class Handle:
    """What :func:`attach` returns; also a context manager that removes hero on exit.

    Attributes:
        model, processor: what hero is attached to.
        encoder: the :class:`hero.HeroVisionEncoder`, whose stages can be called one by one.
        config: its configuration.
    """

    def __init__(
        self,
        model: nn.Module,
        processor,
        encoder: HeroVisionEncoder,
        tokenizer,
        adapter: Adapter,
        parts: Parts,
        geometry: Geometry,
    ):
        self.model = model
        self.processor = processor
        self.encoder = encoder
        self.config = encoder.config
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.parts = dataclasses.replace(parts, geometry=geometry)
        self._model_parts = parts
        self.image_token_id = parts.image_token_id
        self._last = _PerThread()
        self._owners: list[object] = []

    def __repr__(self) -> str:
        state = "" if self.model.__dict__.get("_hero") is self else ", removed"
        return f"<hero.Handle of {type(self.model).__name__}: {self.config}{state}>"

    @property
    def last(self) -> Selection | None:
        """The selection of this thread's last call, without tokens; ``None`` before the first."""
        return self._last.value

    def shown(self, ids: Tensor | None, held: Sequence[Held] = ()) -> tuple[Sequence[Shown], Sequence[Shown]]:
        """The images that prompts ``[B, L]`` show: those held in a cache, and the others.

        Raises:
            ValueError: no prompt, for families whose images only the prompt tells.
        """
        if not self.adapter.reads_prompt:
            return (), ()
        if ids is None:
            expected = "the prompt, which tells which crops or runs make an image"
            raise error(ValueError, "input_ids", expected, None)
        before = Counter(one.row for one in held)
        old: list[Shown] = []
        new: list[Shown] = []
        for image in self.adapter.shown(ids, self.parts, self.tokenizer):
            (old if before[image.row] > 0 else new).append(image)
            before[image.row] -= 1
        return old, new

    def layouts(self, inputs: Mapping[str, Any], shown: Sequence[Shown]) -> tuple[ImageLayout, ...] | None:
        """The images that a call encodes or names; ``None`` if its arguments tell none.

        Args:
            inputs: keyword arguments of ``forward`` or ``generate``.
            shown: the images of the prompts that no cache holds.
        """
        found = self.adapter.layouts(inputs, self.parts, self.config, shown)
        if found is None or not len(found):
            return None if found is None else ()
        layouts, ratios = self.parts.geometry.layouts(found), inputs.get("keep_ratios")
        layouts = layouts if ratios is None else with_ratios("keep_ratios", layouts, ratios)
        if len(layouts) > len(shown) > 0:  # the others are in the cache
            layouts = tuple(layouts[image.number] for image in shown)
        return layouts

    def crops(self, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[ImageLayout, ...]]:
        """Pixels and images of a call, as the encoder takes them.

        Args:
            inputs: keyword arguments of ``forward`` or ``generate``, with pixels.
        """
        _, shown = self.shown(inputs.get("input_ids"))
        layouts, rows = self.layouts(inputs, shown) or (), [image.row for image in shown]
        return self.adapter.crops(inputs["pixel_values"], layouts, rows, self.parts), layouts

    def count_tokens(self, image_size: Sequence[int]) -> int:
        """Visual tokens of an image of (height, width) pixels; see :func:`hero.count_tokens`."""
        return self.encoder.geometry.layout(image_size).kept_tokens(self.config)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore model and processor exactly. A second call does nothing.

        A method that was replaced since, as by a wrapper around it, stays, and what it wraps is stock again.
        """
        self.encoder.remove()
        for owner in self._owners:
            restore(owner)

    def _put(self) -> None:
        model, processor, patches = self.model, self.processor, self.adapter.model_patches(self.model)
        for owner in {id(owner): owner for owner in (model, *(one.owner for one in patches))}.values():
            put(owner, "_hero", self)
            patch(owner, "forward", calls.forward)
            self._owners.append(owner)
        patch(model, "generate", calls.generate)
        put(model, "_replicate_for_data_parallel", _no_replicas)
        if processor is not None:
            put(processor, "_hero", ProcessorCounts(self.adapter, self.config, self.parts.geometry))
            patches += self.adapter.processor_patches(processor)
            self._owners.append(processor)
        for one in patches:
            patch(one.owner, one.name, one.function)

    # The methods below are called by the patched methods.

    def image_tokens(
        self, pixel_values: Tensor, image_sizes, *, feature_layer=None, **kwargs
    ) -> tuple[list[Tensor], Any]:
        """Kept tokens of each image, and what the vision tower returned. Sets :attr:`last`.

        What the tower returned is ``None`` within a call of the model, where nobody sees it.

        Args:
            image_sizes: ``None`` for families whose images only the prompt of a call tells.
        """
        selection, output, order = self.images(
            pixel_values, image_sizes, feature_layer=feature_layer, **kwargs
        )
        images = selection.per_image()
        return [images[number] for number in order], output

    def images(
        self, pixel_values: Tensor, image_sizes, *, feature_layer=None, **kwargs
    ) -> tuple[Selection, Any, Sequence[int]]:
        """:meth:`image_tokens` as a selection, and which of its images are asked for, in order."""
        call = calls.current_call(self)
        if call is not None and call.layouts:
            # Beam search in older transformers repeats the images before they are encoded.
            order, rows = call.repeated(pixel_values, image_sizes)
            if call.encoded is not None:
                return *call.encoded, order
            layouts = [call.layouts[number] for number in order]
            pixel_values = self.adapter.crops(pixel_values, layouts, rows, self.parts)
            text = call.text if call.text is None else [call.text[number] for number in order]
            selection, output = self.encode(
                pixel_values, layouts, text, feature_layer=feature_layer, **kwargs
            )
            return selection, output, range(len(layouts))
        if image_sizes is None:
            raise ValueError(
                "pixel_values: expected a call of generate or forward, whose prompt tells which crops make "
                "an image, got get_image_features alone"
            )
        if self.encoder.cuda_graphs is None or not self.encoder.cuda_graphs.required:
            kwargs["whole"] = True
        selection, output = self.encode(
            pixel_values, image_sizes, None, feature_layer=feature_layer, **kwargs
        )
        return selection, output, range(len(selection.layout))

    def encode(self, pixel_values, image_sizes, text, **kwargs) -> tuple[Selection, object]:
        """Run the encoder on the parts that the model has now."""
        parts, attached = self.adapter.parts(self.model), self._model_parts
        for name in ("vision_tower", "projector"):
            if getattr(self.encoder, name) is not getattr(parts, name):
                raise RuntimeError(f"the model's {name} was replaced after attach: attach again")
        same = parts.geometry == attached.geometry  # dynamo fails at != of numbers that it made symbols
        if not same:
            raise RuntimeError(
                f"the model's configuration changed after attach: attach again (it cut images by "
                f"{attached.geometry}, now by {parts.geometry})"
            )
        selection, output = self.encoder.run(pixel_values, image_sizes, text, **kwargs)
        self._last.value = dataclasses.replace(
            selection,
            tokens=None,
            **{name: getattr(selection, name).detach() for name in ("index", "budgets", "shares", "scores")},
        )
        return selection, output


def _no_replicas() -> None:
    raise RuntimeError(
        "hero is attached to this model, and replicas of torch.nn.DataParallel would call the original: use "
        "DistributedDataParallel, or call hero.detach(model) first"
    )


def attach(
    model: nn.Module,
    processor=None,
    *,
    config: HeroConfig | None = None,
    relevance: ClipRelevance | None = None,
    tokenizer=None,
    cuda_graphs: bool | str = "auto",
    **options,
) -> Handle:
    """Make a model keep only the visual tokens worth keeping, until ``handle.remove()``.

    Instances are patched, never classes; weights, the model's configuration and its attention implementation
    stay as they are. The attention modules that score patches get a configuration of their own.
    ``generate``, ``forward``, chat templates and pipelines go on working. A pickled copy is a stock one.

    Args:
        model: one of transformers' ``ForConditionalGeneration`` classes of LLaVA-1.5, LLaVA-NeXT,
            LLaVA-OneVision, InternVL, Idefics3, SmolVLM, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5.
        processor: its processor, which then emits only as many image placeholders as are kept. With
            ``None``, prompts of the stock length are shortened on entry instead.
        config: what to keep, or
        options: arguments of :class:`hero.HeroConfig`, parameters of the policy included:
            ``keep_ratio=0.2, policy="hero", alpha=0.5``. With neither a configuration nor a number of tokens
            0.2 of them are kept, 0.7 for Qwen's models, which lose more by it.
        relevance: a :class:`hero.ClipRelevance`, to weigh tiles by the question in the prompt.
        tokenizer: the language model's, to read the question and the separators between tiles of Idefics3 and
            SmolVLM; the processor's where ``None``.
        cuda_graphs: ``"auto"``, ``True`` or ``False``, as in :class:`hero.HeroVisionEncoder`: replay the
            vision tower from CUDA graphs. ``handle.last.path`` tells whether the last call did, or why not.

    Returns:
        a handle; ``with hero.attach(...):`` removes it at the end of the block.

    Raises:
        TypeError, ValueError: an unsupported model or processor, options out of range, a relevance
            model without a tokenizer, or without a processor for pixels that are not normalised as CLIP's, a
            model that has hero attached already; each by name.
    """
    if config is not None and options:
        raise ValueError(f"config: expected it or options, got both: {', '.join(options)}")
    if config is not None and not isinstance(config, HeroConfig):
        raise error(TypeError, "config", "hero.HeroConfig", config)
    adapter = adapter_for(model)
    if config is None:
        if options.get("keep_ratio") is None and options.get("keep_tokens") is None:
            options["keep_ratio"] = adapter.keep_ratio
        config = HeroConfig(**options)
    parts = adapter.parts(model)
    geometry = parts.geometry
    if processor is not None:
        geometry = adapter.check_processor(processor, parts)
        tokenizer = processor.tokenizer if tokenizer is None else tokenizer
    for name, target in (("model", model), ("processor", processor)):
        if target is not None and "_hero" in target.__dict__:
            raise ValueError(
                f"{name}: expected one without hero attached, got one with; call hero.detach({name}) first"
            )
    if adapter.has_run_per_crop and tokenizer is None:
        raise ValueError(
            "tokenizer: expected the language model's tokenizer (or a processor), which tells the separators "
            "between tiles, got None"
        )
    if relevance is not None and tokenizer is None:
        raise ValueError(
            "tokenizer: expected the language model's tokenizer (or a processor), with which relevance reads "
            "the question, got None"
        )
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise error(TypeError, "tokenizer", "the language model's tokenizer", tokenizer)
    normalization = None
    if processor is not None:
        images = processor.image_processor
        normalization = (
            (images.image_mean, images.image_std) if images.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        )
    elif relevance is not None and not tower_for(parts.vision_tower).takes_clip_pixels:
        raise ValueError(
            "processor: expected the model's, whose image_mean and image_std tell how to make pixels for "
            "CLIP, got None"
        )
    encoder = HeroVisionEncoder(
        parts.vision_tower,
        parts.projector,
        config,
        geometry=geometry,
        image_newline=parts.image_newline,
        relevance=relevance,
        feature_layer=parts.feature_layer,
        normalization=normalization,
        cuda_graphs=cuda_graphs,
    )
    handle = Handle(model, processor, encoder, tokenizer, adapter, parts, encoder.geometry)
    handle._put()
    return handle


def detach(model_or_processor) -> None:
    """Restore a model or a processor exactly, without the handle. Without hero attached, nothing changes.

    A model's processor is restored too, where it was attached with it. A vision tower is restored whose
    :class:`hero.HeroVisionEncoder` was lost.

    Raises:
        ValueError: an unsupported model or processor.
    """
    target = model_or_processor
    attached = getattr(target, "__dict__", {}).get("_hero")
    if isinstance(attached, Handle):
        attached.remove()
    elif attached is None and not hasattr(target, "image_processor") and not hasattr(target, "encoder"):
        adapter_for(target)
    for owner in target.modules() if isinstance(target, nn.Module) else [target]:
        restore(owner)
