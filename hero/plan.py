"""What a batch's layouts and a configuration imply, as tensors on a device: made once, then looked up.

Nothing after this asks the host for anything, and nothing here asks the device: on a GPU the tensors are
copied from pinned memory, without waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

import hero_kernels as hk
from hero_kernels.segments import to_device

from .config import HeroConfig
from .layout import ImageLayout
from .packing import Packing, packing_of
from .policies import SCORES, policy_of
from .scoring import Places, places_of

__all__ = ["Plan", "plan_of"]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a batch's layouts and a configuration imply, as tensors on a device; T crops of P patches.

    Attributes:
        layouts: the images.
        segments: the same for the operations.
        valid: ``[T, P]`` bool, patches that are not padding.
        caps: ``[T]`` int32, the most that can be kept of each crop: fewer where the encoder drops patches.
        packing: what goes on through an encoder that drops patches; ``None`` where none is dropped.
        cu_seqlens: ``[B + 1]`` int32, where each image's kept tokens begin, if sizes alone decide that.
        places: where crops belong.
        maps: ``{map: {layer: [T] fp32}}``, weight of a layer in a map of each crop.
        ranked: the maps whose order is wanted.
        constants: what the policy makes of layouts alone (:meth:`hero.policies.Policy.constants`).
        device: where the tensors are.
        config, depth, feature_layer: what :func:`plan_of` was asked for.
    """

    layouts: tuple[ImageLayout, ...]
    segments: hk.Segments
    valid: Tensor
    caps: Tensor
    packing: Packing | None
    cu_seqlens: Tensor
    places: Places
    maps: Mapping[str, Mapping[int, Tensor]]
    ranked: frozenset[str]
    constants: Mapping[str, Tensor | tuple[Tensor, ...]]
    device: torch.device
    config: HeroConfig
    depth: int
    feature_layer: int

    @property
    def layer_weights(self) -> Mapping[int, Tensor]:
        """``{layer: [T] fp32}``, weight of a layer in the score of each crop."""
        return self.maps[SCORES]

    def on(self, device: torch.device) -> Plan:
        """The same on another device: a tower's layers may sit on several."""
        if device == self.device:
            return self
        return plan_of(self.layouts, self.config, self.depth, device, self.feature_layer)


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


def _caps(layout: ImageLayout, config: HeroConfig) -> list[int]:
    caps = [layout.patches] * layout.crops
    caps[layout.first_tile : layout.first_tile + layout.tiles] = layout.tile_caps(config)
    return caps


def _valid(layout: ImageLayout) -> Tensor:
    """``[crops, P]`` bool, patches that are not padding."""
    crops = torch.ones((layout.crops, layout.side, layout.side), dtype=torch.bool)
    tiles = crops[layout.first_tile : layout.first_tile + layout.tiles]
    tiles.zero_()
    for tile, (top, bottom, left, right) in zip(tiles, layout.tile_rectangles, strict=True):
        tile[top:bottom, left:right] = True
    return crops.flatten(1)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # a plan made in a call without gradients serves those that have them
def plan_of(
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
    policy = policy_of(config.policy)
    segments = hk.Segments(tuple(_segment(layout, config) for layout in layouts), layouts[0].side)
    valid = torch.cat([_valid(layout) for layout in layouts])
    is_thumbnail = torch.tensor(
        [crop == layout.thumbnail_crop for layout in layouts for crop in range(layout.crops)]
    )
    asked = policy.maps(config, depth, feature_layer)
    segments.warm(device)

    packing = packing_of(layouts, config)

    def put(values: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(values, Tensor):
            return to_device(values, device)
        return type(values)(*(to_device(value, device) for value in values))

    return Plan(
        layouts=layouts,
        segments=segments,
        valid=put(valid),
        caps=put(
            torch.tensor([cap for layout in layouts for cap in _caps(layout, config)], dtype=torch.int32)
        ),
        packing=None
        if packing is None
        else replace(
            packing, **{name: put(value) for name, value in vars(packing).items() if name != "blocks"}
        ),
        cu_seqlens=put(torch.tensor([*accumulate(segments.lengths, initial=0)], dtype=torch.int32)),
        places=put(places_of(layouts)),
        maps={
            name: {
                layer: put(
                    torch.where(
                        is_thumbnail, one.thumbnail.get(layer, 0.0), one.tiles.get(layer, 0.0)
                    ).float()
                )
                for layer in one.layers
            }
            for name, one in asked.items()
        },
        ranked=frozenset(name for name, one in asked.items() if one.ranked),
        constants={name: put(values) for name, values in policy.constants(layouts).items()},
        device=device,
        config=config,
        depth=depth,
        feature_layer=feature_layer,
    )
