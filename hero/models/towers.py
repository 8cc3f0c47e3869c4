"""The interfaces of vision encoders: of crops (:class:`Tower`), or packed (:class:`PackedTower`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import error
from ..config import HeroConfig
from ..layout import Geometry, ImageLayout, grid_pinpoints
from ..tiling import Blocks, Pinpoints

__all__ = [
    "AnyTower",
    "PackedTower",
    "Tower",
    "TowerOutput",
    "hidden_states",
    "is_untouched",
    "square",
    "unwrapped",
]

BLOCK = 12  # tokens along a side, about a crop of LLaVA-NeXT
CAPTURING = "transformers.utils.output_capturing"


class TowerOutput(NamedTuple):
    """What :meth:`Tower.run` returns; T crops.

    Attributes:
        features: ``[T, P, C]``, without CLS; may be a strided view.
        cls: ``[T, C]``, the last layer at CLS before the final layer norm; ``None`` if not needed.
        pooled: ``[T, C]``, the same after it.
        output: what the module returned; ``None`` if only the layers needed were run.
    """

    features: Tensor
    cls: Tensor | None
    pooled: Tensor | None
    output: object | None


class AnyTower(ABC):
    """A kind of vision encoder.

    Attributes:
        has_cls: whether it has a CLS token; without one, patches are scored by received attention.
        takes_clip_pixels: whether its pixels are normalised as CLIP's, unless a processor tells otherwise.
        is_packed: whether it is a :class:`PackedTower`.
    """

    has_cls: bool = True
    takes_clip_pixels: bool = False
    is_packed: bool = False

    @abstractmethod
    def attention_modules(self, tower: nn.Module) -> dict[int, nn.Module]:
        """``{layer: attention module}`` of every layer, in order."""

    def scoring_layers(self, tower: nn.Module) -> tuple[int, ...] | None:
        """The layers whose attention sees whole images; ``None`` if that is not a question.

        Raises:
            ValueError: there is none.
        """
        return None

    def layouts(self, tower: nn.Module, image_sizes: Any, geometry: Geometry) -> Any:
        """Images as :meth:`hero.Geometry.layouts` takes them."""
        return image_sizes

    @abstractmethod
    def geometry_of(
        self, tower: nn.Module, geometry: Geometry | None, config: HeroConfig
    ) -> tuple[Geometry, int]:
        """How images are cut, and the tower's patches along one side of a token.

        Args:
            geometry: that of the model; ``None`` for a default.

        Raises:
            TypeError, ValueError: another one than the tower takes, or options that do not concern it.
        """


class PackedTower(AnyTower):
    """A kind of vision encoder that takes whole images packed into one sequence, and merges patches."""

    has_cls = False
    is_packed = True

    @abstractmethod
    def merge_size(self, tower: nn.Module) -> int:
        """Patches along one side of a token."""

    @abstractmethod
    def token_size(self, tower: nn.Module) -> int:
        """Pixels along one side of a token."""

    @abstractmethod
    def channels(self, tower: nn.Module) -> int:
        """Numbers in a patch of packed pixels: colours, frames and pixels."""

    @abstractmethod
    def is_flash(self, tower: nn.Module) -> bool:
        """Whether its attention takes all images in one call."""

    @abstractmethod
    def inputs(
        self, tower: nn.Module, grids: Sequence[tuple[int, int, int]], device: torch.device
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Arguments that follow from sizes, so that the tower computes and reads none of them.

        Args:
            grids: (frames, rows, columns) of patches of each image.

        Returns:
            the arguments, and where each token is in the tower's own order, ``None`` if in its place.
        """

    @abstractmethod
    def run(self, tower: nn.Module, pixel_values: Tensor, inputs: Mapping[str, Any], **kwargs) -> Any:
        """What the tower returns, with the merged tokens of all images as ``pooler_output``."""

    def layouts(self, tower, image_sizes, geometry):
        """From ``image_grid_thw`` ``[B, 3]``: frames, one an image, rows and columns of patches."""
        if isinstance(image_sizes, Sequence) and all(isinstance(one, ImageLayout) for one in image_sizes):
            return image_sizes
        merge, expected = self.merge_size(tower), "[images, 3], (1, rows, columns) of patches"
        grids = torch.as_tensor(image_sizes)
        if grids.dim() != 2 or grids.shape[1] != 3 or grids.is_floating_point():
            raise error(ValueError, "image_grid_thw", expected, tuple(grids.shape))
        for grid in grids.tolist():
            if grid[0] != 1 or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
                raise error(ValueError, "image_grid_thw", f"{expected}, multiples of {merge}", grid)
        return [geometry.of_tokens(rows // merge, columns // merge) for _, rows, columns in grids.tolist()]

    def geometry_of(self, tower, geometry, config):
        layers, policy, size = "thumbnail_layers", config.policy, self.token_size(tower)
        if getattr(policy, layers, None) != getattr(type(policy), layers, None):
            raise error(TypeError, layers, "none, since there are no thumbnails", getattr(policy, layers))
        tiling = Blocks() if geometry is None else geometry.tiling
        if not isinstance(tiling, Blocks) or (geometry is not None and geometry.patch_size != size):
            raise error(ValueError, "geometry", f"Blocks of tokens of {size} px", geometry)
        side = BLOCK if config.block is None else config.block
        return Geometry(side * size, size, tiling, "none", newlines=False), self.merge_size(tower)


class Tower(AnyTower):
    """A kind of vision encoder that takes crops of one size."""

    @abstractmethod
    def geometry(self, tower: nn.Module) -> tuple[int, int]:
        """(crop size, patch size) in pixels."""

    def geometry_of(self, tower, geometry, config):
        if config.block is not None:
            raise error(ValueError, "block", "None for images that are cut into crops", config.block)
        crop_size, patch_size = self.geometry(tower)
        if geometry is None:
            geometry = Geometry(crop_size, patch_size, Pinpoints(grid_pinpoints(crop_size)))
        merge, rest = divmod(geometry.patch_size, patch_size)
        if geometry.crop_size != crop_size or rest or (crop_size // patch_size) % merge:
            expected = f"crops of {crop_size} px and patches of {patch_size} px, or several merged"
            raise error(ValueError, "geometry", expected, (geometry.crop_size, geometry.patch_size))
        return geometry, merge

    @abstractmethod
    def is_plain(self, tower: nn.Module) -> bool:
        """Whether running the tower runs its class's code alone: no wrapper, hooks or replaced methods."""

    @abstractmethod
    def run(
        self,
        tower: nn.Module,
        pixel_values: Tensor,
        states: Sequence[int],
        *,
        cls: bool = True,
        scored: Sequence[int] = (),
        whole: bool = False,
        **kwargs,
    ) -> TowerOutput:
        """Encode crops.

        Args:
            pixel_values: ``[T, 3, S, S]``.
            states: the hidden states that the features are, 0 the embeddings; several are concatenated. The
                one after the last layer's is the last layer's after the tower's last norm.
            cls: whether ``cls`` and ``pooled`` are needed.
            scored: the layers that score patches, whose attention must run.
            whole: call the module, to return its output too.
            kwargs: further arguments of the module, which is then called as well.
        """


def hidden_states(feature_layer: object, depth: int) -> tuple[int, ...]:
    """``feature_layer`` as indices >= 0 of hidden states; 0 is the input of the first layer.

    ``"last_hidden_state"``, the last layer after the encoder's last norm, is ``depth + 1``.

    Raises:
        TypeError, ValueError: not a hidden state, or several, of an encoder of ``depth`` layers.
    """
    if feature_layer == "last_hidden_state":
        return (depth + 1,)
    layers = (feature_layer,) if isinstance(feature_layer, int) else feature_layer
    expected = f"hidden states in [{-depth - 1}, {depth}], at least one"
    if not isinstance(layers, Sequence) or any(type(layer) is not int for layer in layers):
        raise error(TypeError, "feature_layer", expected, feature_layer)
    if not layers or not all(-depth - 1 <= layer <= depth for layer in layers):
        raise error(ValueError, "feature_layer", expected, feature_layer)
    return tuple(layer % (depth + 1) for layer in layers)


def is_untouched(module: nn.Module) -> bool:
    """Whether a module has its class's ``forward`` and no hooks of the user's.

    Those of transformers' own output capturing do nothing unless outputs are asked for.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    hooks += (*module._backward_hooks.values(), *module._backward_pre_hooks.values())
    return "forward" not in module.__dict__ and all(one.__module__ == CAPTURING for one in hooks)


def unwrapped(tower: nn.Module) -> nn.Module:
    """The vision encoder inside a wrapper: of ``torch.compile``, or of PEFT's ``modules_to_save``."""
    while True:
        if hasattr(tower, "_orig_mod"):
            tower = tower._orig_mod
        elif hasattr(tower, "modules_to_save") and hasattr(tower, "original_module"):
            active = [] if tower.disable_adapters else tower.active_adapters
            names = [name for name in active if name in tower.modules_to_save]
            tower = tower.modules_to_save[names[0]] if names else tower.original_module
        else:
            return tower


def square(name: str, size: Any) -> int:
    """A side in pixels, from an integer or from two equal ones.

    Raises:
        ValueError: two different ones.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if sides[0] != sides[-1]:
        raise error(ValueError, name, "the side of a square", size)
    return int(sides[0])
