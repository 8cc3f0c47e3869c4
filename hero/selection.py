"""What the vision encoder returns, and what its stages pass on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hero_kernels import Finalized, Gathered

from .config import HeroConfig
from .cuda_graphs import Path
from .layout import Geometry, ImageLayout
from .policies import Replacement

__all__ = ["Encoded", "Selection", "with_replaced"]


@dataclass(frozen=True)
class Encoded:
    """What :meth:`hero.HeroVisionEncoder.encode` returns for T crops, or cells, of P patches.

    Attributes:
        features: ``[T, P, C]``, the features that the model uses, without CLS; may be a strided view.
        cls: ``[T, C]``, the last layer at CLS before the final layer norm; ``None`` if no signal needs it.
        pooled: ``[T, C]``, the same after it.
        attention: the policy's attention rows by name, finalised (:class:`hero_kernels.Finalized`).
        pixel_values: ``[T, 3, S, S]``, the crops.
        output: what the tower returned; ``None`` if only the layers needed were run.
        keys: ``[T, P, D]`` fp32, the key of each patch in the features' last layer, averaged over heads, if
            the policy needs it.
        patches: ``[T, P, C]``, the last layer at the patches, if the policy compares them with the question
            and CLIP shares the tower's weights.
        is_projected: whether the features went through the projector, as those of resized grids.
        attention_ran: what the layers that score patches ran, ``"native"`` or ``"fused"``.
    """

    features: Tensor
    cls: Tensor | None
    pooled: Tensor | None
    attention: Mapping[str, Finalized]
    pixel_values: Tensor
    output: object | None = field(repr=False, default=None)
    keys: Tensor | None = None
    patches: Tensor | None = None
    is_projected: bool = False
    attention_ran: str = "native"


@dataclass(frozen=True)
class Selection:
    """The visual tokens kept of a batch of images, packed, and how they were chosen.

    T crops of P tokens. Where a grid is resized (LLaVA-OneVision), cells take the place of its tiles.

    Attributes:
        tokens: ``[total, D]`` projected features and newlines, image after image; ``None`` in
            ``handle.last``, which keeps no features in memory.
        cu_seqlens: ``[B + 1]`` int32, where each image begins.
        index: ``[total]`` int32, ``crop · P + patch`` of each row, −1 for a newline.
        budgets: ``[T]`` int32, patches kept of each crop.
        shares: ``[T]`` fp32, each tile's share of its image's tile tokens before caps; 0 for thumbnails.
        scores: ``[T, P]`` fp32, the patch scores.
        images: (height, width) in pixels, or layout, of each image.
        geometry: how the images were cut.
        config: what was kept.
        counts: rows of each image where they follow from the data (``allocation="floor"``).
        path: how the vision tower ran: whether from a CUDA graph, why not, and with which attention.
    """

    tokens: Tensor | None
    cu_seqlens: Tensor
    index: Tensor
    budgets: Tensor
    shares: Tensor
    scores: Tensor
    images: Sequence[tuple[int, int] | ImageLayout]
    geometry: Geometry
    config: HeroConfig
    counts: Sequence[int] | None = None
    path: Path | None = None

    # Computed when they are read: under torch.compile the sizes are symbols of the graph.

    @property
    def layout(self) -> tuple[ImageLayout, ...]:
        """The images of the batch."""
        return self.geometry.layouts(self.images)

    @property
    def image_sizes(self) -> list[tuple[int, int] | None]:
        """(height, width) of each image in pixels; ``None`` where the call does not tell it."""
        return [layout.image_size for layout in self.layout]

    @property
    def lengths(self) -> list[int]:
        """Rows of each image."""
        if self.counts is not None:
            return list(self.counts)
        return [layout.kept_tokens(self.config) for layout in self.layout]

    @property
    def policy(self) -> str:
        """The name of the policy."""
        return self.config.policy.name

    def per_image(self) -> list[Tensor]:
        """The tokens of each image, ``[n_i, D]``.

        Raises:
            ValueError: the selection has no tokens, as ``handle.last``.
        """
        if self.tokens is None:
            raise ValueError("tokens: expected those of an encoder's result, got None: handle.last has none")
        return list(self.tokens.split(self.lengths))

    def keep_mask(self) -> Tensor:
        """``[T, P]`` bool, true for kept patches."""
        keep = torch.zeros(self.scores.numel(), dtype=torch.bool, device=self.index.device)
        keep[self.index[self.index >= 0].long()] = True
        return keep.view_as(self.scores)


def with_replaced(gathered: Gathered, replaced: Replacement) -> Gathered:
    """Kept features, of which a policy has replaced some."""
    place = gathered.index.clamp_min(0).long()
    slot = replaced.slots.flatten()[place].masked_fill(gathered.index < 0, -1)
    values = replaced.values[place // replaced.slots.shape[1], slot.clamp_min(0)]
    tokens = torch.where((slot >= 0)[:, None], values, gathered.tokens)
    return gathered._replace(tokens=tokens)
