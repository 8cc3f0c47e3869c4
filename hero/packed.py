"""Encoders that take images packed into one sequence, whole (Qwen2-VL and later): tokens to blocks and back.

All images go through the encoder in one call. Blocks of an image's tokens then act as its tiles, so budgets
and selection are those of other encoders.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hero_kernels as hk
from hero_kernels.segments import to_device

from . import attention_rows
from ._checks import error
from .layout import ImageLayout
from .plan import Plan
from .selection import Encoded, Selection
from .signals import mean_features

__all__ = ["check_pixels", "encode", "kept_output", "pixels_of_blocks"]


class PackedPlan(NamedTuple):
    """What follows from the sizes of packed images, on one device; N tokens, T blocks of P places.

    Attributes:
        packed: the images, in patches.
        inputs: arguments of the encoder that follow from sizes.
        order: ``[N]`` int64, where each token is in the encoder's own order; ``None`` if in its place.
        blocks: ``[T, P]`` int64, the token at each place of a block; 0 where there is none.
        numbers: ``[T, P]`` int64, the same among the tokens of its image.
    """

    packed: attention_rows.Packed
    inputs: dict[str, Any]
    order: Tensor | None
    blocks: Tensor
    numbers: Tensor


def check_pixels(encoder: Any, pixel_values: Any, layouts: Sequence[ImageLayout]) -> Tensor:
    """The pixels ``[patches, channels]`` of packed images, as the encoder takes them.

    Raises:
        TypeError, ValueError: another type, rank, dtype or shape.
    """
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        raise error(TypeError, "pixel_values", "a floating tensor [patches, channels]", pixel_values)
    kind, tower = encoder.kind, encoder.vision_tower
    patches = kind.merge_size(tower) ** 2 * sum(layout.full_tokens for layout in layouts)
    shape = patches, kind.channels(tower)
    if tuple(pixel_values.shape) != shape:
        expected = f"{shape}, the patches of {', '.join(map(str, layouts))}"
        raise error(ValueError, "pixel_values", expected, tuple(pixel_values.shape))
    return pixel_values


def plan_of(encoder: Any, plan: Plan, device: torch.device) -> PackedPlan:
    """The plan of packed images on a device; the encoder keeps it."""
    kind, tower = encoder.kind, encoder.vision_tower
    is_flash = kind.is_flash(tower)

    def make() -> PackedPlan:
        merge = kind.merge_size(tower)
        grids = [(1, merge * one.rows[1], merge * one.columns[1]) for one in plan.layouts]
        inputs, order = kind.inputs(tower, grids, device)
        lengths = tuple(height * width for _, height, width in grids)
        places = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)
        firsts = accumulate((layout.full_tokens for layout in plan.layouts), initial=0)
        numbers = [_blocks_of(layout) for layout in plan.layouts]
        blocks = torch.cat([own + first for own, first in zip(numbers, firsts, strict=False)])
        packed = attention_rows.Packed(lengths, to_device(places, device))
        tables = (to_device(table, device) for table in (blocks, torch.cat(numbers)))
        return PackedPlan(packed, inputs, order, *tables)

    return encoder.plans.get(("packed", plan.layouts, device, is_flash), make)


def _blocks_of(layout: ImageLayout) -> Tensor:
    """``[blocks, P]`` int64: the tokens of an image in its blocks."""
    (rows, columns), (down, across), side = (layout.rows[1], layout.columns[1]), layout.grid, layout.side
    tokens = torch.arange(rows * columns).view(rows, columns)
    tokens = torch.nn.functional.pad(tokens, (0, across * side - columns, 0, down * side - rows))
    return tokens.view(down, side, across, side).transpose(1, 2).reshape(down * across, side * side)


def encode(
    encoder: Any, pixel_values: Tensor, plan: Plan, *, feature_layer: Any = None, whole: bool = True, **kwargs
) -> Encoded:
    """:meth:`hero.HeroVisionEncoder.encode` of packed images: always the whole encoder, which merges too."""
    kind, tower = encoder.kind, encoder.vision_tower
    own = plan_of(encoder, plan, pixel_values.device)
    collectors = {
        name: attention_rows.Collector(rows.tiles, received=True, packed=own.packed)
        for name, rows in encoder.rows.items()
    }
    with attention_rows.collect(list(collectors.values()), encoder.observed):
        output = kind.run(tower, pixel_values, own.inputs, **kwargs)
    features, attention = output.pooler_output, {}
    plan = plan.to(features.device)
    for name, collector in collectors.items():
        scores = collector.result()[0].mean(0).view(-1, kind.merge_size(tower) ** 2).mean(1)
        scores = scores if own.order is None else scores[own.order]
        attention[name] = hk.finalize_scores(
            in_blocks(scores, own).to(features.device)[:, None], valid=plan.valid
        )
    features = in_blocks(features, own)
    return Encoded(
        features=features,
        cls=mean_features(features, plan.valid) if encoder.needs_cls else None,
        pooled=None,
        attention=attention,
        pixel_values=pixel_values,
        output=output,
        is_projected=True,
    )


def in_blocks(values: Tensor, plan: PackedPlan) -> Tensor:
    """Values of tokens ``[N, ...]`` as those of blocks ``[T, P, ...]``."""
    return values[plan.blocks.to(values.device)]


def kept_output(encoder: Any, output: Any, selection: Selection, plan: Plan) -> Any:
    """What the encoder returned, restricted to the tokens of a selection, a list of tensors an image.

    Its attribute ``hero_kept`` has the numbers of the kept tokens of each image, in raster order.
    """
    own = plan_of(encoder, plan, selection.index.device)
    places, lengths = selection.index.long(), selection.lengths
    rows = own.blocks.flatten()[places]
    output = copy.copy(output)
    output.pooler_output = selection.per_image()
    if getattr(output, "deepstack_features", None) is not None:
        levels = output.deepstack_features
        output.deepstack_features = [level[rows.to(level.device)].split(lengths) for level in levels]
    output.hero_kept = own.numbers.flatten()[places].split(lengths)
    return output


def pixels_of_blocks(encoder: Any, pixel_values: Tensor, plan: Plan) -> Tensor:
    """``[T, 3, S, S]``: packed pixels as an image of each block, 0 beyond the last row and column."""
    own, merge = plan_of(encoder, plan, pixel_values.device), encoder.kind.merge_size(encoder.vision_tower)
    side, size = encoder.geometry.side, encoder.geometry.patch_size // merge
    tokens = pixel_values.view(-1, merge, merge, 3, pixel_values.shape[1] // (3 * size * size), size, size)
    blocks = in_blocks(tokens[:, :, :, :, 0], own) * plan.valid.to(tokens)[..., None, None, None, None, None]
    blocks = blocks.unflatten(1, (side, side)).permute(0, 5, 1, 3, 6, 2, 4, 7)
    return blocks.reshape(len(blocks), 3, side * merge * size, -1)
