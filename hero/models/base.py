"""The interface of a model family (:class:`Adapter`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import error
from ..config import DEFAULT_KEEP_RATIO, HeroConfig
from ..layout import Geometry, ImageLayout
from . import processors

__all__ = [
    "Adapter",
    "Parts",
    "Patch",
    "Shown",
    "check_tokens",
    "parameter",
    "runs_of",
    "token_blocks",
]


@dataclass(frozen=True)
class Parts:
    """What an adapter finds in a model.

    Attributes:
        image_newline: returns the newline; called at each use, as modules may load their parameters for it.
        feature_layer: as :class:`hero.HeroVisionEncoder` takes it.
    """

    vision_tower: nn.Module
    projector: nn.Module | None
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


class Shown(NamedTuple):
    """An image as a prompt shows it.

    Attributes:
        row: its prompt.
        runs: (column, length) of its runs of placeholders, which may be empty.
        grid: (rows, columns) of its tiles, if the prompt tells it.
        number: which of the images of all prompts it is.
    """

    row: int
    runs: tuple[tuple[int, int], ...]
    grid: tuple[int, int] | None = None
    number: int = 0


class Adapter(ABC):
    """A model family.

    Attributes:
        reads_prompt: whether only the prompt tells which crops make an image (:meth:`shown`). Otherwise
            that follows from the other arguments, and runs of placeholders may touch.
        has_run_per_crop: whether each crop has a run of placeholders of its own, between separators. Their
            lengths depend on the image's content, so images are encoded before the prompt is complete.
        takes_frames_for_images: whether frames of videos come as images, and would be thinned like them.
        takes_features: whether features that were computed ahead are taken as ``mm_encoder_outputs``.
        keeps_positions: whether tokens keep the positions of the full prompt, which depend on what is kept.
        keep_ratio: what :func:`hero.attach` keeps by default.
        ours: inputs that attached processors add for hero alone, and that the stock model must not see.
    """

    reads_prompt: bool = False
    has_run_per_crop: bool = False
    takes_frames_for_images: bool = False
    takes_features: bool = True
    keeps_positions: bool = False
    keep_ratio: float = DEFAULT_KEEP_RATIO
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


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter as it is now, loaded if accelerate has offloaded it.

    ``generate`` encodes images outside the call of the module within which accelerate loads its parameters.
    """
    if not getattr(module, name).is_meta or not hasattr(module, "_hf_hook"):
        return getattr(module, name)
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name)
