"""The plan of a batch: all tensors and numbers that follow from image sizes and configuration.

A plan is computed on the CPU and copied to the device asynchronously. It holds what the later stages need, so
they do not synchronise with the device.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import hero_kernels as hk
from hero_kernels.segments import to_device

from .config import HeroConfig
from .layout import ImageLayout
from .policies import Pools, Rows
from .signals import Places, places_of

__all__ = [
    "CropPlan",
    "Plan",
    "Plans",
    "check_crops",
    "check_pixels",
    "check_shown_crops",
    "make_plan",
    "with_image",
]

LIMIT = 256  # plans that an encoder keeps


@dataclass(frozen=True, eq=False)
class CropPlan:
    """What the tower and its attention rows need to know of each crop; T crops of P patches.

    Attributes:
        valid: ``[T, P]`` bool, patches that are not padding.
        layer_weights: ``[W, T]`` fp32, the weight of each layer in the policy's attention rows.
        rows: the policy's attention rows; their layers, one after another, are those of ``layer_weights``.
        device: where the tensors are.
    """

    valid: Tensor
    layer_weights: Tensor
    rows: Mapping[str, Rows]
    device: torch.device

    @property
    def weights(self) -> dict[str, dict[int, Tensor]]:
        """``{rows: {layer: [T] fp32}}``, views of ``layer_weights``."""
        each = iter(self.layer_weights.unbind())
        return {name: {layer: next(each) for layer in one.layers} for name, one in self.rows.items()}

    def to(self, device: torch.device) -> CropPlan:
        """The same on another device."""
        if device == self.device:
            return self
        return CropPlan(self.valid.to(device), self.layer_weights.to(device), self.rows, device)


@dataclass(frozen=True, eq=False)
class Plan(CropPlan):
    """What follows from the image sizes of a batch and a configuration, on one device.

    Attributes:
        layouts: the images.
        segments: the same for :mod:`hero_kernels`.
        valid_counts: ``[T]`` int32, the number of valid patches in each crop.
        cu_seqlens: ``[B + 1]`` int32, where the kept tokens of each image begin, with ``allocation="exact"``.
        places: the image of each crop, its thumbnail and tiles.
        pools: the images as pools of patches.
        constants: what :meth:`hero.policies.Policy.constants` returned.
        block_budgets: ``[T]`` int32, :meth:`hero.layout.ImageLayout.block_budgets` of whole images.
        of_crops: the plan of the crops that the encoder sees, where the grid of an image is resized: this
            plan is then that of its cells. Otherwise ``None``.
    """

    layouts: tuple[ImageLayout, ...]
    segments: hk.Segments
    valid_counts: Tensor
    cu_seqlens: Tensor
    places: Places
    pools: Pools
    constants: Mapping[str, Any]
    block_budgets: Tensor | None = None
    of_crops: Plan | None = None
    _moved: dict[torch.device, Plan] = field(default_factory=dict, repr=False)

    @property
    def seen(self) -> Plan:
        """The plan of the crops that the encoder sees."""
        return self if self.of_crops is None else self.of_crops

    def to(self, device: torch.device) -> Plan:
        """The same plan on another device, copied once: the layers of a tower may be on several."""
        if device == self.device:
            return self
        if device not in self._moved:
            self._moved[device] = self._copied(device)
        return self._moved[device]

    @torch.inference_mode(False)  # a plan made in inference mode must also serve calls with gradients
    def _copied(self, device: torch.device) -> Plan:
        self.segments.warm(device)
        names = (
            "valid",
            "valid_counts",
            "cu_seqlens",
            "places",
            "pools",
            "layer_weights",
            "constants",
            "block_budgets",
        )
        tensors = {name: getattr(self, name) for name in names}
        moved = tree_map_only(Tensor, lambda tensor: to_device(tensor, device), tensors)
        of_crops = self.of_crops and self.of_crops._copied(device)
        return replace(self, **moved, of_crops=of_crops, device=device, _moved={})


def make_plan(
    layouts: tuple[ImageLayout, ...], config: HeroConfig, rows: Mapping[str, Rows], device: torch.device
) -> Plan:
    """The plan of a batch.

    Args:
        layouts: of the images.
        config: the configuration.
        rows: the attention rows of its policy (:meth:`hero.policies.Policy.rows`).
        device: where the tensors are needed.
    """
    for layout in layouts:
        if not layout.budget(config)[0] and not layout.tile_quota(config):
            text = f"keep_ratio={config.keep_ratio}, keep_tokens={config.keep_tokens}"
            warnings.warn(f"{text} keeps no patches of an image of {layout}", stacklevel=2)
    of_crops = None
    if any(layout.encoded is not None for layout in layouts):
        seen = tuple(layout.encoded or layout for layout in layouts)
        of_crops = make_plan(seen, config, rows, torch.device("cpu"))
    with torch.inference_mode(False):
        segments = hk.Segments(tuple(_segment(layout, config) for layout in layouts), layouts[0].side)
        is_thumbnail = torch.tensor(
            [flag for one in layouts for flag in one.per_crop(True, [False] * one.tiles)]
        )
        counts = [count for one in layouts for count in one.full_counts]
        weights = [
            torch.where(is_thumbnail, one.thumbnail.get(layer, 0.0), one.tiles.get(layer, 0.0)).float()
            for one in rows.values()
            for layer in one.layers
        ]
        cpu = Plan(
            layouts=layouts,
            segments=segments,
            valid=torch.cat([_valid(layout) for layout in layouts]),
            valid_counts=torch.tensor(counts, dtype=torch.int32),
            cu_seqlens=torch.tensor([*accumulate(segments.lengths, initial=0)], dtype=torch.int32),
            places=places_of(layouts),
            pools=_pools(layouts, segments),
            layer_weights=torch.stack(weights) if weights else torch.empty(0, len(is_thumbnail)),
            rows=rows,
            constants=config.policy.constants(layouts),
            device=torch.device("cpu"),
            block_budgets=_block_budgets(layouts, config),
            of_crops=of_crops,
        )
    if device == cpu.device:
        segments.warm(device)
        return cpu
    return cpu._copied(device)


def _segment(layout: ImageLayout, config: HeroConfig) -> hk.Segment:
    return hk.Segment(
        crops=layout.crops,
        thumbnail=layout.thumbnail_crop,
        grid_width=layout.grid[1] if layout.stitched and layout.tiles else 1,
        thumbnail_tokens=layout.budget(config)[0],
        tile_tokens=layout.tile_quota(config),
        newline_rows=layout.rows if layout.newlines else (0, 0),
        thumbnail_newline=layout.newlines and not layout.tiles,
    )


def _pools(layouts: Sequence[ImageLayout], segments: hk.Segments) -> Pools:
    crops = [layout.crops for layout in layouts]
    tokens = [
        length - image.newlines for length, image in zip(segments.lengths, segments.images, strict=True)
    ]
    cu_crops = torch.tensor([*accumulate(crops, initial=0)], dtype=torch.int32)
    return Pools(cu_crops, torch.tensor(tokens, dtype=torch.int32), max(crops))


def _block_budgets(layouts: Sequence[ImageLayout], config: HeroConfig) -> Tensor | None:
    if not layouts[0].is_whole:
        return None
    budgets = [budget for layout in layouts for budget in layout.block_budgets(config)]
    return torch.tensor(budgets, dtype=torch.int32)


def _valid(layout: ImageLayout) -> Tensor:
    """``[crops, P]`` bool, patches that are not padding."""
    valid = torch.zeros((layout.crops, layout.side, layout.side), dtype=torch.bool)
    whole = (0, layout.side, 0, layout.side)
    for crop, (top, bottom, left, right) in enumerate(layout.per_crop(whole, layout.tile_rectangles)):
        valid[crop, top:bottom, left:right] = True
    return valid.flatten(1)


class Plans:
    """The plans that one encoder used last. Safe to use from several threads; copies start empty."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return Plans, ()

    def __len__(self) -> int:
        return len(self._plans)

    def clear(self) -> None:
        """Drop all plans and their memory."""
        with self._lock:
            self._plans.clear()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """``make()``, or what it returned for this key before."""
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = make()
                if len(self._plans) > LIMIT:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
        return plan


def with_image(problem: ValueError, pixels: Tensor, plan: Plan) -> ValueError:
    """The problem, or, if NaN was found, the first image whose crops, or packed rows, are not finite."""
    bad = ~pixels.isfinite().flatten(1).all(1)
    if "NaN" not in str(problem) or not bool(bad.any()):
        return problem
    images = plan.seen.places.images
    if pixels.dim() == 2:
        tokens = torch.tensor([layout.full_tokens for layout in plan.layouts])
        images = torch.arange(len(tokens)).repeat_interleave(tokens * (len(pixels) // int(tokens.sum())))
    image = int(images[bad.nonzero()[0, 0].to(images.device)])
    return ValueError(f"pixel_values: expected finite numbers, got others in image {image} ({problem})")


def check_pixels(pixel_values: Tensor, size: int) -> None:
    """Check type, dtype and shape of crops of ``size`` pixels, for :meth:`hero.HeroVisionEncoder.prepare`."""
    expected = "[B, crops, 3, S, S] or [T, 3, S, S]"
    if not isinstance(pixel_values, Tensor):
        raise TypeError(f"pixel_values: expected a tensor {expected}, got {type(pixel_values).__name__}")
    shape = tuple(pixel_values.shape)
    if not pixel_values.is_floating_point():
        raise TypeError(f"pixel_values: expected a floating dtype, got {pixel_values.dtype}")
    if len(shape) not in (4, 5):
        raise ValueError(f"pixel_values: expected {expected}, got shape {shape}")
    if shape[-3:] != (3, size, size):
        raise ValueError(f"pixel_values: expected crops of 3 × {size} × {size}, got shape {shape}")


def check_crops(shape: Sequence[int], layouts: Sequence[ImageLayout]) -> None:
    """Check that pixels of this shape hold the crops of the images."""
    counts = [layout.crops for layout in layouts]
    if len(shape) == 4:
        if shape[0] != sum(counts):
            raise ValueError(
                f"image_sizes: expected the sizes of {shape[0]} crops, got those of {sum(counts)}"
            )
    elif shape[0] != len(counts) or shape[1] < max(counts):
        raise ValueError(
            f"image_sizes: expected {shape[0]} images of at most {shape[1]} crops, "
            f"got {len(counts)} images of {counts} crops"
        )


def check_shown_crops(pixels: Tensor, mask: Tensor | None, counts: Sequence[int]) -> None:
    """Check that pixels padded by prompt ``[prompts, crops, ...]`` are the crops that separators announce.

    Args:
        mask: ``[prompts, crops, ...]``, 0 where pixels are padding. Without one, crops of zeros are padding,
            as the stock model has it.
        counts: crops of the images of each prompt that no cache holds.

    Raises:
        ValueError: other crops, or parts of them hidden.
    """
    seen = (pixels if mask is None or mask.dim() < 3 else mask).flatten(2) != 0
    crops = torch.arange(pixels.shape[1]) < torch.tensor(counts)[:, None]
    is_whole = mask is None or bool((seen.all(2) == seen.any(2)).all())
    fits = max(counts) <= pixels.shape[1] and seen.any(2).tolist() == crops.tolist()
    if not is_whole or not fits:
        found = f"{seen.any(2).sum(1).tolist()}{'' if is_whole else ', parts of them hidden'}"
        raise ValueError(
            "pixel_values, pixel_attention_mask: expected the crops that prompts show after "
            "<fake_token_around_image> and <row_1_col_1> or <global-img> and that no cache holds, "
            f"{list(counts)}, got {found}"
        )
