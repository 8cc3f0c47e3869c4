"""``hero.attach``: put hero on a stock model, on its instances only, and remove it exactly."""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import functools
import inspect
import threading
import types
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import HeroConfig
from .encoder import HeroVisionEncoder
from .models import Patch, ProcessorCounts, adapter_for
from .prompt import images_of_rows, questions, shrink
from .relevance import ClipRelevance
from .selection import Selection

__all__ = ["Handle", "attach"]


@dataclass(frozen=True)
class _Call:
    """What one call of the model passes to its image encoder."""

    text: list[str] | None = None  # the question of each image
    rows: tuple[int, ...] = ()  # the prompt of each image
    sizes: tuple[tuple[int, int], ...] = ()  # (height, width) of each image: read once per call
    # Images encoded ahead, if the number of kept tokens depends on the data.
    encoded: tuple[Selection, object] | None = None
    in_forward: bool = False
    outer: _Call | None = None  # that of the enclosing call


_call: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("hero_call", default=None)


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
        self, model: nn.Module, processor, encoder: HeroVisionEncoder, tokenizer, image_token_id: int
    ):
        self.model = model
        self.processor = processor
        self.encoder = encoder
        self.config = encoder.config
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self._adapter = adapter_for(model)
        self._last = _PerThread()
        self._undo: list[tuple[object, str, bool, object]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def last(self) -> Selection | None:
        """The selection of this thread's last call, without tokens; ``None`` before the first."""
        return self._last.value

    def count_tokens(self, image_size: Sequence[int]) -> int:
        """Visual tokens of an image of (height, width) pixels; see :func:`hero.count_tokens`."""
        return self.encoder.geometry.layout(image_size).kept_tokens(self.config)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc_info) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore model and processor exactly. A second call does nothing.

        Raises:
            RuntimeError: one of the patched methods was replaced since; undo that first.
        """
        for owner, name, _, _ in self._undo:
            function = getattr(owner.__dict__.get(name), "__func__", owner.__dict__.get(name))
            if name != "_hero" and not getattr(function, "_hero_patch", False):
                raise RuntimeError(
                    f"{type(owner).__name__}.{name} was replaced after attach: undo that first"
                )
        if self._undo:
            self.encoder.remove()
        while self._undo:
            owner, name, was_there, previous = self._undo.pop()
            if was_there:
                owner.__dict__[name] = previous
            else:
                del owner.__dict__[name]
        while self._hooks:
            self._hooks.pop().remove()

    # The methods below are called by the patches that attach puts in place.

    def _put(self, owner: object, name: str, value: object) -> None:
        self._undo.append((owner, name, name in owner.__dict__, owner.__dict__.get(name)))
        owner.__dict__[name] = value

    def _patch(self, patch: Patch) -> None:
        """Put a bound method on an instance, with the signature of the one that it replaces."""
        hidden = getattr(type(patch.owner), patch.name)

        @functools.wraps(hidden)  # generate reads the names of the parameters
        def method(self, *args, **kwargs):
            return patch.function(self, *args, **kwargs)

        method.__dict__["_hero_patch"] = True
        self._put(patch.owner, patch.name, types.MethodType(method, patch.owner))

    def image_tokens(
        self, pixel_values: Tensor, image_sizes, *, feature_layer=None, **kwargs
    ) -> tuple[list[Tensor], object]:
        """Kept tokens of each image, and what the vision tower returned. Sets :attr:`last`."""
        call = _call.get()
        if call is not None and call.encoded is not None:
            selection, output = call.encoded
            images = selection.per_image()
            # Beam search in older transformers repeats the images before they are encoded.
            repeats = len(image_sizes) // len(images)
            return [image for image in images for _ in range(repeats)], output
        text = call.text if call is not None else None
        if call is not None and len(call.sizes) == len(image_sizes):
            image_sizes = call.sizes
        selection, output = self._encode(
            pixel_values, image_sizes, text, feature_layer=feature_layer, **kwargs
        )
        return selection.per_image(), output

    def _encode(self, pixel_values, image_sizes, text, **kwargs) -> tuple[Selection, object]:
        if self.encoder.projector is not self._adapter.projector(self.model):
            raise RuntimeError("the model's projector was replaced after attach: attach again")
        selection, output = self.encoder.run(pixel_values, image_sizes, text, **kwargs)
        self._last.value = dataclasses.replace(
            selection,
            tokens=None,
            **{name: getattr(selection, name).detach() for name in ("index", "budgets", "shares", "scores")},
        )
        return selection, output

    def fit_prompt(self, inputs: dict) -> tuple[dict, _Call | None]:
        """Shorten a prompt to the number of kept tokens, and find the question of each image.

        Args:
            inputs: keyword arguments of ``forward`` or ``generate``.

        Returns:
            the arguments, shortened if the prompt has the stock number of placeholders, and what to pass to
            the image encoder, if there are images to encode.

        Raises:
            ValueError: the placeholders fit neither the stock nor the kept number of tokens.
        """
        ids, sizes = inputs.get("input_ids"), inputs.get("image_sizes")
        if ids is None or sizes is None:
            return inputs, None
        is_image = ids == self.image_token_id
        total = int(is_image.sum())
        pixels = inputs.get("pixel_values")
        if total == 0 and pixels is None:
            return inputs, None
        layouts = self.encoder.geometry.layouts(sizes)
        kept = [layout.kept_tokens(self.config) for layout in layouts]
        full = [layout.full_tokens for layout in layouts]
        if total not in (sum(kept), sum(full)):
            raise ValueError(
                f"input_ids: expected {sum(kept)} image placeholders for the images (processor attached), "
                f"or {sum(full)} (stock processor), got {total}"
            )
        now = kept if total == sum(kept) else full
        call = None
        if pixels is not None:
            text = None
            rows = images_of_rows(is_image, now)
            if self.encoder.needs_text:
                mask = inputs.get("attention_mask")
                text = questions(ids, mask, self.image_token_id, rows, self.tokenizer)
            sizes = tuple(layout.image_size for layout in layouts)
            call = _Call(text, tuple(rows), sizes)
            if self.config.allocation == "floor":
                # The number of kept tokens depends on the data: encode the images first.
                layer = inputs.get("vision_feature_layer")
                selection, output = self._encode(pixels, sizes, text, feature_layer=layer)
                call, kept = _Call(text, tuple(rows), sizes, (selection, output)), selection.lengths
        elif self.config.allocation == "floor":
            raise ValueError(
                "pixel_values: expected the images, since allocation='floor' must see them, got None"
            )
        if now != kept:
            runs = [
                pair
                for layout, *lengths in zip(layouts, now, kept, strict=True)
                for pair in zip(*(self._adapter.runs(layout, length) for length in lengths), strict=True)
            ]
            pad = self.model.generation_config.pad_token_id
            inputs = shrink(inputs, self.image_token_id, runs, pad_token_id=0 if pad is None else pad)
        return inputs, call


def _named(function, args: tuple, kwargs: dict) -> dict:
    """Positional arguments of a method by their names, after ``self``, together with the others."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(function).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _generate(self, *args, **kwargs):
    """``generate`` on a prompt of either length; the result begins with the caller's own prompt."""
    stock = type(self).generate
    kwargs = _named(stock, args, kwargs)
    if kwargs.get("input_ids") is None:
        kwargs["input_ids"] = kwargs.pop("inputs", None)
    prompt = kwargs["input_ids"]
    if prompt is None:
        del kwargs["input_ids"]
    with torch.no_grad():
        kwargs, call = self._hero.fit_prompt(kwargs)
    if call is not None:
        _check_beams(self, kwargs, call)
    shrunk = prompt is not None and kwargs["input_ids"] is not prompt
    if shrunk:
        _shift_lengths(kwargs, prompt.shape[1] - kwargs["input_ids"].shape[1])
    token = _call.set(call)
    try:
        output = stock(self, **kwargs)
    finally:
        _call.reset(token)
    if not shrunk:
        return output
    sequences = output if isinstance(output, Tensor) else output.sequences
    answers = sequences[:, kwargs["input_ids"].shape[1] :]
    repeats = sequences.shape[0] // prompt.shape[0]
    sequences = torch.cat([prompt.repeat_interleave(repeats, dim=0).to(sequences), answers], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


def _shift_lengths(kwargs: dict, shortened: int) -> None:
    """Limits on prompt and answer together keep their meaning when the prompt is shortened."""
    limits = ("max_length", "min_length")
    config = kwargs.get("generation_config")
    if config is not None and any(getattr(config, name, None) for name in limits):
        config = kwargs["generation_config"] = copy.deepcopy(config)
        for name in limits:
            if getattr(config, name, None):
                setattr(config, name, max(getattr(config, name) - shortened, 0))
    for name in limits:
        if kwargs.get(name):
            kwargs[name] = max(kwargs[name] - shortened, 0)


def _check_beams(model: nn.Module, kwargs: dict, call: _Call) -> None:
    """Raise if transformers would mix up beams: before 5.19 it repeats the images of a row one by one."""
    if len(set(call.rows)) == len(call.rows) or _transformers_version() >= (5, 19):
        return
    config = kwargs.get("generation_config") or model.generation_config
    counts = {
        name: kwargs.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    }
    if max(counts.values()) > 1:
        raise ValueError(
            "num_beams, num_return_sequences: expected 1 for several images in a prompt with "
            f"transformers < 5.19, which mixes them up, got {counts}"
        )


def _transformers_version() -> tuple[int, ...]:
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def _before_forward(module: nn.Module, args: tuple, kwargs: dict):
    """Forward pre-hook: shorten the prompt and pass on the questions until the call ends."""
    named = _named(type(module).forward, args, kwargs)
    if named.get("pixel_values") is None:
        return None
    outer = _call.get()
    if outer is not None and outer.encoded is not None:  # generate has encoded and shortened already
        call = outer
    else:
        named, call = module._hero.fit_prompt(named)
    _call.set(dataclasses.replace(call or _Call(), outer=outer, in_forward=True))
    return (), named


def _after_forward(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
    """Forward hook, also called on errors: undo :func:`_before_forward`."""
    if kwargs.get("pixel_values") is None:
        return
    call = _call.get()
    if call is not None and call.in_forward:
        _call.set(call.outer)


def attach(
    model: nn.Module,
    processor=None,
    *,
    config: HeroConfig | None = None,
    relevance: ClipRelevance | None = None,
    tokenizer=None,
    cuda_graphs: bool = False,
    **options,
) -> Handle:
    """Make a model keep only the visual tokens worth keeping, until ``handle.remove()``.

    Instances are patched, never classes; weights, configurations and the attention implementation stay
    as they are. ``generate``, ``forward``, chat templates and pipelines go on working.

    Args:
        model: a supported model, e.g. ``LlavaNextForConditionalGeneration``.
        processor: its processor, which then emits only as many image placeholders as are kept. With
            ``None``, prompts of the stock length are shortened on entry instead.
        config: what to keep, or
        options: arguments of :class:`hero.HeroConfig`, parameters of the policy included:
            ``keep_ratio=0.2, policy="hero", alpha=0.5``.
        relevance: a :class:`hero.ClipRelevance`, to weigh tiles by the question in the prompt.
        tokenizer: the language model's, to read the question; the processor's where ``None``.
        cuda_graphs: encode images by replaying CUDA graphs, as in :class:`hero.HeroVisionEncoder`.

    Returns:
        a handle; ``with hero.attach(...):`` removes it at the end of the block.

    Raises:
        TypeError, ValueError: an unsupported model or processor, options out of range, a relevance
            model without a tokenizer, a model that has hero attached already; each by name.
    """
    if config is not None and options:
        raise ValueError(f"config: expected it or options, got both: {', '.join(options)}")
    if config is not None and not isinstance(config, HeroConfig):
        raise TypeError(f"config: expected hero.HeroConfig, got {config!r}")
    config = HeroConfig(**options) if config is None else config
    adapter = adapter_for(model)
    parts = adapter.parts(model)
    if processor is not None:
        adapter.check_processor(processor, parts)
        tokenizer = processor.tokenizer if tokenizer is None else tokenizer
    for name, target in (("model", model), ("processor", processor)):
        if target is not None and "_hero" in target.__dict__:
            raise ValueError(
                f"{name}: expected one without hero attached, got one with; handle.remove() first"
            )
    if relevance is not None and tokenizer is None:
        raise ValueError(
            "tokenizer: expected the language model's tokenizer (or a processor), with which relevance reads "
            "the question, got None"
        )
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise TypeError(f"tokenizer: expected the language model's tokenizer, got {tokenizer!r}")
    encoder = HeroVisionEncoder(
        parts.vision_tower,
        parts.projector,
        config,
        geometry=parts.geometry,
        image_newline=parts.image_newline,
        relevance=relevance,
        feature_layer=parts.feature_layer,
        cuda_graphs=cuda_graphs,
    )
    handle = Handle(model, processor, encoder, tokenizer, parts.image_token_id)
    patches = [*adapter.model_patches(model), Patch(model, "generate", _generate)]
    handle._put(model, "_hero", handle)
    if processor is not None:
        patches += adapter.processor_patches(processor)
        handle._put(processor, "_hero", ProcessorCounts(config, encoder.geometry))
    for patch in patches:
        if "_hero" not in patch.owner.__dict__:
            handle._put(patch.owner, "_hero", handle)
        handle._patch(patch)
    handle._hooks = [
        model.register_forward_pre_hook(_before_forward, with_kwargs=True),
        model.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
    ]
    return handle
