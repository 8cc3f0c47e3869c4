"""What calls of an attached model do: shorten the prompt, pass the question on, keep the caller's view.

``forward`` and ``generate`` accept prompts with as many image placeholders as tokens are kept, and stock
prompts, which are shortened.
"""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ._checks import error
from .caches import Held, cache_of, check_held, check_whole, held_of_sizes, images_in, record
from .generation import as_called, restored, setting
from .layout import ImageLayout
from .positions import Image, place
from .prompt import deal, images_of_rows, questions, shrink
from .selection import Selection

__all__ = ["Call", "current_call", "forward", "generate"]

Handle: TypeAlias = Any  # a hero.Handle, whose module imports this one


@dataclass(frozen=True)
class Call:
    """What one call of the model passes to its image encoder."""

    handle: Handle
    text: list[str] | None = None  # the question of each image
    rows: tuple[int, ...] = ()  # the prompt of each image
    layouts: tuple[ImageLayout, ...] = ()  # of each image: sizes are read once per call
    runs: tuple[tuple[int, ...], ...] = ()  # the lengths of its runs of placeholders
    held: tuple[Held, ...] = ()  # images that the cache holds already
    start: int = 0  # length of the cache
    prompts: int = 0  # how many
    # Images encoded ahead, if the number of kept tokens depends on the data.
    encoded: tuple[Selection, object] | None = None
    deltas: Tensor | None = None  # where positions of later turns begin, for families that keep positions

    def repeated(self, pixel_values: Tensor, image_sizes: Any) -> tuple[list[int], list[int]]:
        """The images, and the prompt of each, as older transformers repeat them for beams and sequences."""
        adapter = self.handle.adapter
        if adapter.has_run_per_crop or adapter.keeps_positions:  # images of a prompt after another
            repeats = len(pixel_values) // self.prompts
            if adapter.keeps_positions:
                repeats = len(image_sizes) // len(self.layouts)
            pairs = [
                (number, row * repeats + copy)
                for row in sorted(set(self.rows))
                for copy in range(repeats)
                for number, own in enumerate(self.rows)
                if own == row
            ]
            return [number for number, _ in pairs], [row for _, row in pairs]
        given, own = len(pixel_values), sum(layout.crops for layout in self.layouts)
        if image_sizes is not None:
            given, own = len(image_sizes), len(self.layouts)
        order = [number for number in range(len(self.layouts)) for _ in range(given // own)]
        return order, list(self.rows)


_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("hero_call", default=None)


def current_call(handle: Handle) -> Call | None:
    """The call of a handle's model that is running, if there is one."""
    call = _call.get()
    return call if call is not None and call.handle is handle else None


def named(function: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Positional arguments of a method by their names, after ``self``, together with the others."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(function).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def features_of(inputs: Mapping[str, Any]) -> Any:
    """Image features that the caller computed ahead, or ``None``."""
    return (inputs.get("mm_encoder_outputs") or {}).get("image")


def forward(self: nn.Module, original: Callable, *args, **kwargs):
    """``forward`` of the model, or of the model inside it, on a prompt of either length."""
    inputs = named(type(self).forward, args, kwargs)
    if inputs.get("pixel_values") is None and features_of(inputs) is None and "keep_ratios" not in inputs:
        return original(**inputs)
    handle = self._hero
    call = outer = current_call(handle)
    if outer is None:  # neither generate nor an enclosing forward has shortened the prompt
        inputs, call = fit_prompt(handle, inputs, whole=False)
    token = _call.set(call or Call(handle))
    try:
        output = original(**inputs)
    except ValueError as problem:
        if "image tokens do not match" not in str(problem) or "hero is attached" in str(problem):
            raise
        raise ValueError(f"{problem}. hero is attached: prompts need the number of kept tokens") from problem
    finally:
        _call.reset(token)
    if outer is None and call is not None:
        record(call, inputs, output)
    return output


def generate(self: nn.Module, original: Callable, *args, **kwargs):
    """``generate`` on a prompt of either length; the result begins with the caller's own prompt."""
    kwargs = named(type(self).generate, args, kwargs)
    if kwargs.get("input_ids") is None:
        kwargs["input_ids"] = kwargs.pop("inputs", None)
    prompt = kwargs["input_ids"]
    if prompt is None:
        del kwargs["input_ids"]
    elif kwargs.get("attention_mask") is None:
        mask = _mask_of_padding(self, prompt, kwargs)
        kwargs |= {} if mask is None else {"attention_mask": mask}
    handle = self._hero
    with torch.no_grad():
        kwargs, call = fit_prompt(handle, kwargs, whole=True)
    if call is not None:
        _check_generation(self, kwargs, call)
    shrunk = prompt is not None and kwargs["input_ids"] is not prompt
    if shrunk:
        as_called(self, kwargs, prompt)
    token, output = _call.set(call), None
    try:
        output = original(**kwargs)
    finally:
        _call.reset(token)
        if call is not None:
            record(call, kwargs, output)  # an interrupted call has filled the cache too
    if not shrunk:
        return output
    sequences = output if isinstance(output, Tensor) else output.sequences
    sequences = restored(prompt, kwargs["input_ids"].shape[1], sequences)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


# --- prompts ---------------------------------------------------------------------------------------------


def fit_prompt(handle: Handle, inputs: dict, *, whole: bool) -> tuple[dict, Call | None]:
    """Shorten a prompt to the number of kept tokens, and find the question of each image.

    Args:
        inputs: keyword arguments of ``forward`` or ``generate``.
        whole: whether ``input_ids`` begin with what the cache holds, as those of ``generate`` do.

    Returns:
        the arguments but hero's own, shortened if the prompt has the stock number of placeholders, and
        what to pass to the image encoder, if there are images to encode.

    Raises:
        ValueError: the placeholders fit neither the stock nor the kept number of tokens; a cache of another
            selection; an argument that is missing or cannot be shortened.
    """
    ids, pixels, features = inputs.get("input_ids"), inputs.get("pixel_values"), features_of(inputs)
    encoder, config, adapter = handle.encoder, handle.config, handle.adapter
    is_new = pixels is not None or features is not None
    cache = cache_of(inputs)
    in_cache, start = images_in(cache, is_new=is_new)
    held = in_cache if whole else ()
    if held and held[0].deltas is not None:  # other calls may have replaced them since
        handle.model.model.rope_deltas = held[0].deltas
    if ids is not None and not (isinstance(ids, Tensor) and ids.dim() == 2):
        raise error(ValueError, "input_ids", "a tensor [B, L]", ids)
    if features is not None and not adapter.takes_features:
        raise error(ValueError, "mm_encoder_outputs", "None: pixel_values, from which hero selects", "some")
    if pixels is not None and not isinstance(pixels, Tensor):
        raise error(TypeError, "pixel_values", "a tensor", pixels)
    given, device = inputs, None if ids is None else ids.device
    if adapter.keeps_positions and is_new:
        if whole and start and pixels is not None:
            raise ValueError(
                "pixel_values: expected None beside a cache, where the stock model fails too, and "
                "mm_encoder_outputs={'image': model.model.get_image_features(...)} of the new images with "
                "image_grid_thw of all images, got pixels"
            )
        inputs = _on_host(inputs)
        ids = inputs.get("input_ids")
    on_host = inputs
    old, new = handle.shown(ids, held) if is_new or held else ((), ())
    layouts = handle.layouts(inputs, new)
    if inputs.get("keep_ratios") is not None and not layouts:
        raise error(ValueError, "keep_ratios", "None without images", inputs["keep_ratios"])
    inputs = {name: value for name, value in inputs.items() if name not in adapter.ours}
    if is_new and layouts is None:
        raise ValueError("image_sizes: expected (height, width) of each image, got None")
    layouts = layouts or ()
    if ids is None and is_new and layouts:
        return inputs, replace(_of_embeddings(handle, inputs, layouts), held=in_cache, start=start)
    is_image = None if ids is None else ids == handle.image_token_id
    total = int(is_image.sum()) if is_image is not None and (layouts or held) else 0
    if total == 0 and not (is_new and layouts):
        return _on_device(inputs, on_host, given, device), None
    if not is_new:  # all images are in the cache
        held, layouts = held_of_sizes(handle, held, layouts), ()
    check_held(handle, held)
    every = (*(one.layout for one in held), *layouts)
    written = [adapter.runs(layout, layout.equal_counts(config)) for layout in every]
    full = [adapter.runs(layout, layout.full_counts) for layout in every]
    before = [one.runs for one in held]
    kept = [*before, *written[len(held) :]]
    if features is not None:
        kept = [*before, *((len(tokens),) for tokens in features.pooler_output)]
        if adapter.keeps_positions and not hasattr(features, "hero_kept"):
            expected = "what get_image_features returned with hero attached"
            raise error(ValueError, "mm_encoder_outputs", expected, "others")
    seen = [tuple(length for _, length in image.runs) for image in (*old, *new)]

    if adapter.reads_prompt and total != sum(map(sum, seen)):
        expected = f"{sum(map(sum, seen))} image placeholders, in the runs of images"
        raise error(ValueError, "input_ids", expected, total)

    def fits(runs: list[tuple[int, ...]]) -> bool:
        return runs == seen if adapter.reads_prompt else sum(map(sum, runs)) == total

    now = next(filter(fits, (kept, written, full)), None)
    if now is None:
        counts = f" in runs of {seen}" if adapter.reads_prompt else ""
        raise ValueError(
            f"input_ids: expected {sum(map(sum, written))} image placeholders for the images (processor "
            f"attached), or {sum(map(sum, full))} (stock processor), got {total}{counts}"
            + (f"; the cache holds {len(held)} images" if whole and cache is not None else "")
        )
    call, rows, output = None, [image.row for image in new], features
    if is_new:
        text = None
        if not adapter.reads_prompt:
            places = [(one.row, sum(runs)) for one, runs in zip(held, now, strict=False)]
            lengths = [sum(runs) for runs in now[len(held) :]]
            rows = images_of_rows(is_image, lengths, places)
        if encoder.needs_text:
            text = questions(ids, inputs.get("attention_mask"), handle.image_token_id, rows, handle.tokenizer)
        own, prompts = tuple(kept[len(held) :]), 0 if ids is None else len(ids)
        call = Call(handle, text, tuple(rows), layouts, own, in_cache, start, prompts)
        encodes_first = adapter.has_run_per_crop or adapter.keeps_positions
        if features is None and (config.allocation == "floor" or encodes_first):
            # The prompt, its runs or its positions, depends on what is kept: encode the images first.
            layer = adapter.feature_layer(inputs.get("vision_feature_layer"))
            crops = adapter.crops(pixels, layouts, rows, handle.parts)
            selection, output = handle.encode(crops, layouts, text, feature_layer=layer)
            runs = tuple(adapter.runs_of(selection))
            kept = [*before, *runs]
            call = replace(call, encoded=(selection, output), runs=runs)
    kept_tokens = getattr(output, "hero_kept", None) or [None] * len(layouts)
    placed = [*(one.row for one in held), *rows], now, kept, full, (*old, *new) or now
    images = [_Image(*one) for one in zip(*placed, [*[None] * len(held), *kept_tokens], strict=True)]
    images.sort(key=attrgetter("row"))
    starts = {*(one.start for one in held), start if whole else 0} - {0}
    moves = adapter.keeps_positions and is_new and kept != full
    inputs = _shortened(handle, inputs, images, sorted(starts), whole=whole, moves=moves, device=device)
    if in_cache and whole:
        check_whole(held, inputs["input_ids"][:, :start] == handle.image_token_id)
    if moves and call is not None:
        call = replace(call, deltas=handle.model.model.rope_deltas)
    return _on_device(inputs, on_host, given, device), call


class _Image(NamedTuple):
    """An image of a prompt: its row, the lengths of its runs now, as kept and in the stock prompt, where they
    are, and which tokens are kept, if it was encoded.
    """

    row: int
    now: tuple[int, ...]
    kept: tuple[int, ...]
    full: tuple[int, ...]
    shown: Any
    tokens: Tensor | None


def _shortened(
    handle: Handle,
    inputs: dict[str, Any],
    images: Sequence[_Image],
    cached: Sequence[int],
    *,
    whole: bool,
    moves: bool,
    device: torch.device | None,
) -> dict[str, Any]:
    """A prompt with as many placeholders as tokens are kept.

    Args:
        images: of all rows, in order.
        cached: lengths of the cache before each turn and now.
        moves: whether kept tokens keep the positions of the full prompt.
    """
    given, fits = dict(inputs), all(one.now == one.kept for one in images)
    positions, length = inputs.get("position_ids"), inputs["input_ids"].shape[1]
    if moves and positions is not None and positions.shape[-1] != length:
        raise error(ValueError, "position_ids", f"None, or {length} a row", tuple(positions.shape))
    moves = moves and not (fits and positions is not None)
    if moves:  # positions are made from the full prompt's
        inputs.pop("position_ids", None)
    if not fits:
        parts: Any = [(one.row, one.now, one.kept, one.shown) for one in images]
        if handle.adapter.has_run_per_crop:
            inputs, parts = deal(inputs, parts)
        pairs = [pair for _, now, kept, _ in parts for pair in zip(now, kept, strict=True)]
        pad = handle.model.generation_config.pad_token_id
        inputs = shrink(
            inputs, handle.image_token_id, pairs, pad_token_id=0 if pad is None else pad, cached=cached
        )
    if not moves:
        return inputs
    shorter = [Image(sum(one.now), sum(one.kept), sum(one.full), one.tokens) for one in images]
    options = {"image_token_id": handle.image_token_id, "whole": whole, "device": device}
    return place(handle.model, given, inputs, shorter, **options)


def _on_host(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with all but pixels and embeddings on the CPU."""
    stay = ("pixel_values", "pixel_values_videos", "inputs_embeds")
    return {
        name: value.cpu() if isinstance(value, Tensor) and name not in stay else value
        for name, value in inputs.items()
    }


def _on_device(
    inputs: Mapping[str, Any], on_host: Mapping[str, Any], given: Mapping[str, Any], device: Any
) -> dict[str, Any]:
    """What :func:`_on_host` moved, back: as given where it is still the same. New inputs go to the device."""
    if on_host is given:  # nothing was moved
        return dict(inputs)
    back = {}
    for name, value in inputs.items():
        before = given.get(name)
        if value is on_host.get(name):
            value = before
        elif isinstance(value, Tensor):
            value = value.to(before.device if isinstance(before, Tensor) else device)
        back[name] = value
    return back


def _of_embeddings(handle: Handle, inputs: dict, layouts: tuple[ImageLayout, ...]) -> Call:
    """The call of a prompt that is given as embeddings, which cannot be shortened."""
    embeddings, weight = inputs.get("inputs_embeds"), handle.model.get_input_embeddings().weight
    lengths = tuple(layout.kept_tokens(handle.config) for layout in layouts)
    if handle.encoder.needs_text:
        raise ValueError("inputs_embeds: expected input_ids, from which relevance reads the question")
    rows = list(range(len(layouts)))
    if embeddings is not None and handle.config.allocation == "exact":
        is_image = (embeddings == weight[handle.image_token_id]).all(-1)
        total = int(is_image.sum())
        if total != sum(lengths):
            raise ValueError(
                f"inputs_embeds: expected those of {sum(lengths)} image placeholders, as many as tokens are "
                f"kept, or input_ids, which are shortened, got {total} placeholders"
            )
        rows = images_of_rows(is_image, lengths)
    return Call(handle, None, tuple(rows), layouts, tuple((length,) for length in lengths))


def _mask_of_padding(model: nn.Module, ids: Tensor, kwargs: dict) -> Tensor | None:
    """The mask that ``generate`` infers from padding if it gets none: shortening changes the padding."""
    pad, eos = (setting(model, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else [eos]):
        return None
    mask = ids != pad
    return None if bool(mask.all()) else mask.long()


# --- what generate is given ------------------------------------------------------------------------------


def _check_generation(model: nn.Module, kwargs: Mapping[str, Any], call: Call) -> None:
    """Raise where older transformers would silently answer without an image or mix up beams."""
    if not call.layouts:
        return
    if setting(model, kwargs, "prefill_chunk_size") is not None and _transformers_version() < (5, 23):
        raise ValueError(
            "prefill_chunk_size: expected None for images with transformers < 5.23, which drops them"
        )
    if not call.handle.adapter.mixes_up_beams(call.layouts, call.rows, _transformers_version()):
        return
    names = ("num_beams", "num_return_sequences")
    counts = {name: setting(model, kwargs, name) or 1 for name in names}
    if max(counts.values()) > 1:
        raise ValueError(
            "num_beams, num_return_sequences: expected 1 for these images with transformers < 5.19, which "
            f"mixes them up, got {counts}"
        )


def _transformers_version() -> tuple[int, ...]:
    import transformers

    return tuple(int(part) for part in transformers.__version__.split(".")[:2])
