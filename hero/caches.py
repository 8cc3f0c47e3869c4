"""What a key-value cache holds: the images of earlier turns are noted on it.

So a later turn either continues on it or is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, TypeAlias

from torch import Tensor

from .config import HeroConfig
from .layout import ImageLayout

__all__ = ["CACHES", "Held", "cache_of", "check_held", "check_whole", "held_of_sizes", "images_in", "record"]

Handle: TypeAlias = Any  # a hero.Handle, whose module imports this one
CACHES = ("past_key_values", "cache")  # the names of the argument before and since transformers 5.24
_HELD = "_hero_images"


@dataclass(frozen=True)
class Held:
    """An image in a key-value cache: its layout and runs, what decided on them, and where it is."""

    layout: ImageLayout
    runs: tuple[int, ...]
    config: HeroConfig
    row: int = 0
    start: int = 0  # length of the cache before the turn of the image
    deltas: Tensor | None = field(default=None, compare=False)  # ``rope_deltas`` of the model after this turn

    @property
    def length(self) -> int:
        """Its tokens."""
        return sum(self.runs)


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, or ``None``."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def images_in(cache: Any, *, is_new: bool) -> tuple[tuple[Held, ...], int]:
    """The images that a cache still holds, which may have been cropped since, and its length.

    Args:
        cache: may be ``None``.
        is_new: whether a call has new images. Otherwise the length is only read where there are old ones.

    Raises:
        ValueError: it was cropped within an image.
    """
    held = getattr(cache, _HELD, ())
    length = int(cache.get_seq_length()) if cache is not None and (is_new or held) else 0
    for one in held:
        if one.start < length < one.start + one.length:
            raise ValueError(
                f"past_key_values: expected a cache that holds an image of {one.layout}, or was "
                f"cropped to {one.start} positions, before its turn, got one cropped to {length}"
            )
    return tuple(one for one in held if one.start < length), length


def held_of_sizes(handle: Handle, held: tuple[Held, ...], layouts: Sequence[ImageLayout]) -> tuple[Held, ...]:
    """The images in the cache, where the caller gives their sizes again or not at all.

    Raises:
        ValueError: other images than the cache holds, or a cache that was filled without hero, or none.
    """
    if layouts and not held:
        if any(layout.kept_tokens(handle.config) != layout.full_tokens for layout in layouts):
            raise ValueError(
                "pixel_values: expected the images, or a cache that was filled with hero attached and holds "
                "them, got neither"
            )
        runs = (handle.adapter.runs(layout, layout.full_counts) for layout in layouts)
        return tuple(Held(*one, handle.config) for one in zip(layouts, runs, strict=True))
    if layouts and [str(one.layout) for one in held] != [str(one) for one in layouts]:
        sizes = [str(one.layout) for one in held], [str(one) for one in layouts]
        raise ValueError(
            f"image_sizes: expected those of the images in the cache, {sizes[0]}, got {sizes[1]}"
        )
    return held


def check_held(handle: Handle, held: Sequence[Held]) -> None:
    """Raise ``ValueError`` if the cache was filled by another configuration than the handle's."""
    config = handle.config
    for one in held:
        exact = config.allocation == one.config.allocation == "exact"
        if one.length != one.layout.kept_tokens(config) if exact else one.config != config:
            now, then = config.to_dict(), one.config.to_dict()
            changed = {name for name in {*now, *then} if now.get(name) != then.get(name)}
            now, then = ({name: one[name] for name in sorted(changed & set(one))} for one in (now, then))
            count = one.layout.kept_tokens(config)
            raise ValueError(
                f"past_key_values: expected {count} tokens of an image of {one.layout} {now}, got "
                f"{one.length} {then}: start a new cache"
            )


def check_whole(held: Sequence[Held], is_image: Tensor) -> None:
    """Raise ``ValueError`` if a cache was cropped before or within an image that it should hold.

    Args:
        is_image: ``[B, length]`` bool, the placeholders among what the cache holds.
    """
    wanted = [sum(one.length for one in held if one.row == row) for row in range(len(is_image))]
    found = is_image.sum(1).tolist()
    if found != wanted:
        raise ValueError(
            f"past_key_values: expected a cache that holds {wanted} tokens of images in its prompts, got one "
            f"cropped to {is_image.shape[1]} positions, with {found} of them: crop to before an image's turn"
        )


def record(call: Any, inputs: Mapping[str, Any], output: object) -> None:
    """Note on the cache which images it holds after a call."""
    cache = cache_of(inputs)
    if cache is None:
        cache = cache_of({name: getattr(output, name, None) for name in CACHES})
    if cache is None or int(cache.get_seq_length()) <= call.start:
        return
    new = (
        Held(layout, runs, call.handle.config, row, call.start)
        for layout, runs, row in zip(call.layouts, call.runs, call.rows, strict=True)
    )
    held = (replace(one, deltas=call.deltas) for one in (*call.held, *new))
    setattr(cache, _HELD, tuple(sorted(held, key=attrgetter("row"))))
