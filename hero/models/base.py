"""The interfaces of a model family (:class:`Adapter`) and of a vision encoder (:class:`Tower`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import error
from ..config import HeroConfig
from ..layout import Geometry, ImageLayout
from . import processors

__all__ = [
    "Adapter",
    "Parts",
    "Patch",
    "Shown",
    "Tower",
    "TowerOutput",
    "check_tokens",
    "hidden_states",
    "is_untouched",
    "parameter",
    "runs_of",
    "square",
    "token_blocks",
    "unwrapped",
]

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


@dataclass(frozen=True)
class Parts:
    """What an adapter finds in a model.

    Attributes:
        image_newline: returns the newline; called at each use, as modules may load their parameters for it.
        feature_layer: as :class:`hero.HeroVisionEncoder` takes it.
    """

    vision_tower: nn.Module
    projector: nn.Module
    image_newline: Callable[[], Tensor] | None
    geometry: Geometry
    feature_layer: int | str | tuple[int, ...]
    image_token_id: int


@dataclass(frozen=True)
class Patch:
    """A method to put on one instance, and to take off again.

    Attributes:
        function: takes the instance, the method that it hides, and the arguments of the call.
    """

    owner: object
    name: str
    function: Callable


class Tower(ABC):
    """A kind of vision encoder.

    Attributes:
        has_cls: whether it has a CLS token; without one, patches are scored by received attention.
        takes_clip_pixels: whether its pixels are normalised as CLIP's, unless a processor tells otherwise.
    """

    has_cls: bool = True
    takes_clip_pixels: bool = False

    @abstractmethod
    def attention_modules(self, tower: nn.Module) -> dict[int, nn.Module]:
        """``{layer: attention module}`` of every layer, in order."""

    @abstractmethod
    def geometry(self, tower: nn.Module) -> tuple[int, int]:
        """(crop size, patch size) in pixels."""

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


class Shown(NamedTuple):
    """An image as a prompt shows it.

    Attributes:
        row: its prompt.
        runs: (column, length) of its runs of placeholders, which may be empty.
        grid: (rows, columns) of its tiles, if the prompt tells it.
    """

    row: int
    runs: tuple[tuple[int, int], ...]
    grid: tuple[int, int] | None = None


class Adapter(ABC):
    """A model family.

    Attributes:
        reads_prompt: whether only the prompt tells which crops make an image (:meth:`shown`). Otherwise
            that follows from the other arguments, and runs of placeholders may touch.
        has_run_per_crop: whether each crop has a run of placeholders of its own, between separators. Their
            lengths depend on the image's content, so images are encoded before the prompt is complete.
        takes_frames_for_images: whether frames of videos come as images, and would be thinned like them.
        ours: inputs that attached processors add for hero alone, and that the stock model must not see.
    """

    reads_prompt: bool = False
    has_run_per_crop: bool = False
    takes_frames_for_images: bool = False
    ours: tuple[str, ...] = ("keep_ratios",)

    @abstractmethod
    def parts(self, model: nn.Module) -> Parts:
        """The parts of a model.

        Raises:
            ValueError: an unsupported configuration of the model, by name.
        """

    @abstractmethod
    def layouts(
        self, inputs: Mapping[str, Any], parts: Parts, config: HeroConfig, shown: Sequence[Shown]
    ) -> Sequence[tuple[int, int] | ImageLayout] | Any | None:
        """Layout, or (height, width), of each image that a call encodes or names; ``None`` if there is none.

        Args:
            inputs: keyword arguments of ``forward`` or ``generate``.
            config: what is kept.
            shown: the images of the prompts that no cache holds, for families with ``reads_prompt``.

        Raises:
            ValueError: an argument that is missing or does not fit, by name.
        """

    def shown(self, ids: Tensor, parts: Parts, tokenizer: Any) -> list[Shown]:
        """The images of prompts ``[B, L]``, for families with ``reads_prompt``."""
        return []

    def feature_layer(self, layer: Any) -> Any:
        """``vision_feature_layer`` of a call as the encoder takes it; ``None`` if it is the model's."""
        return layer

    def runs(self, layout: ImageLayout, counts: Sequence[int]) -> tuple[int, ...]:
        """Lengths of an image's runs of placeholders when its crops keep so many tokens."""
        return tuple(counts) if self.has_run_per_crop else (sum(counts) + layout.newline_count,)

    def runs_of(self, selection: Any) -> list[tuple[int, ...]]:
        """Lengths of the runs of each image of a :class:`hero.Selection`."""
        if not self.has_run_per_crop:
            return [(length,) for length in selection.lengths]
        budgets = iter(selection.budgets.tolist())
        return [tuple(next(budgets) for _ in range(layout.crops)) for layout in selection.layout]

    def crops(
        self, pixel_values: Tensor, layouts: Sequence[ImageLayout], rows: Sequence[int], parts: Parts
    ) -> Tensor:
        """Pixels of a call as the encoder takes them (:meth:`hero.HeroVisionEncoder.prepare`).

        Args:
            rows: the prompt of each image.
        """
        return pixel_values

    def mixes_up_beams(
        self, layouts: Sequence[ImageLayout], rows: Sequence[int], version: tuple[int, ...]
    ) -> bool:
        """Whether this version of transformers assigns images to the wrong beams or sequences."""
        return version < (5, 19) and len(set(rows)) < len(rows)

    @abstractmethod
    def check_processor(self, processor, parts: Parts) -> Geometry:
        """The geometry of the model's images as a processor cuts them.

        Raises:
            TypeError, ValueError: a processor of another family, or one that does not cut as the model does.
        """

    @abstractmethod
    def model_patches(self, model: nn.Module) -> list[Patch]:
        """Methods that make the model encode images with hero; ``forward`` of their owners is patched too."""

    def processor_patches(self, processor) -> list[Patch]:
        """Methods that make the processor write as many placeholders as tokens are kept."""
        patches: dict[str, Callable] = {
            "_merge_kwargs": processors.merge_kwargs,
            "_process_images": processors.process_images,
            "_get_num_multimodal_tokens": processors.num_multimodal_tokens,
        }
        if self.takes_frames_for_images:
            patches["_process_videos"] = processors.refuse_videos
        return [
            Patch(processor, name, function)
            for name, function in patches.items()
            if hasattr(type(processor), name)
        ]

    def cut(self, processor, geometry: Geometry, options: Mapping[str, Any]) -> Geometry:
        """The geometry of images that a processor cuts with options given at the call."""
        return geometry

    def other_tokens(self, processor, count: int, layout: ImageLayout) -> int:
        """Tokens of an image besides placeholders, of ``count`` that the stock processor plans."""
        return count - layout.full_tokens

    @abstractmethod
    def processed(
        self, processor, geometry: Geometry, outputs: dict[str, Any], images: Any
    ) -> Sequence[ImageLayout]:
        """Layouts of images as the processor has just cut them, in the order of the prompt.

        Args:
            geometry: what :meth:`cut` returned.
            outputs: what its image processor returned. An adapter may add what its model is told.
            images: what its image processor was given.
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


def runs_of(is_image: Tensor) -> list[tuple[int, int, int]]:
    """(row, column, length) of each run of placeholders, from ``[B, L]`` bool."""
    edges = torch.nn.functional.pad(is_image.int(), (1, 1)).diff(dim=1)
    begins, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return [(row, begin, end - begin) for (row, begin), (_, end) in zip(begins, ends, strict=True)]


def token_blocks(tokens: list[Tensor], return_dict: bool = True) -> Any:
    """What ``get_image_features`` returns where its features must be one tensor: the tokens as ``[n, 1, D]``.

    ``generate`` counts the entries of each image as those of a list, and older versions take no list.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output = BaseModelOutputWithPooling(pooler_output=torch.cat(tokens)[:, None])
    return output if return_dict else output.to_tuple()


def check_tokens(name: str, tokens: int, geometry: Geometry) -> None:
    """Raise ``ValueError`` unless a processor counts as many tokens a crop as the model has."""
    if tokens != geometry.side**2:
        raise error(ValueError, f"{name} of the processor", f"{geometry.side**2}", tokens)


def square(name: str, size: Any) -> int:
    """A side in pixels, from an integer or from two equal ones.

    Raises:
        ValueError: two different ones.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if sides[0] != sides[-1]:
        raise error(ValueError, name, "the side of a square", size)
    return int(sides[0])


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter as it is now, loaded if accelerate has offloaded it.

    ``generate`` encodes images outside the call of the module within which accelerate loads its parameters.
    """
    if not getattr(module, name).is_meta or not hasattr(module, "_hf_hook"):
        return getattr(module, name)
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name)
