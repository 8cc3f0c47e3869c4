"""The interfaces of a model family (:class:`Adapter`) and of a vision encoder (:class:`Tower`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._checks import error
from ..config import HeroConfig
from ..layout import Geometry, ImageLayout

__all__ = [
    "Adapter",
    "Parts",
    "Patch",
    "ProcessorCounts",
    "Tower",
    "TowerOutput",
    "hidden_states",
    "is_untouched",
    "parameter",
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
    """

    vision_tower: nn.Module
    projector: nn.Module
    image_newline: Callable[[], Tensor] | None
    geometry: Geometry
    feature_layer: int | tuple[int, ...]
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
        merge: patches along one side of a visual token.
    """

    has_cls: bool = True
    merge: int = 1

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
            states: the hidden states that the features are, 0 the embeddings; several are concatenated.
            cls: whether ``cls`` and ``pooled`` are needed.
            scored: the layers that score patches, whose attention must run.
            whole: call the module, to return its output too.
            kwargs: further arguments of the module, which is then called as well.
        """


class Adapter(ABC):
    """A model family."""

    @abstractmethod
    def parts(self, model: nn.Module) -> Parts:
        """The parts of a model.

        Raises:
            ValueError: an unsupported configuration of the model, by name.
        """

    def image_sizes(self, inputs: Mapping[str, Any], parts: Parts) -> Any:
        """(height, width) of each image that a call of the model encodes or names; ``None`` if there is none.

        Args:
            inputs: keyword arguments of ``forward`` or ``generate``.
        """
        return inputs.get("image_sizes")

    @abstractmethod
    def check_processor(self, processor, parts: Parts) -> None:
        """Raise ``TypeError`` or ``ValueError`` unless the processor cuts images as the model does."""

    @abstractmethod
    def model_patches(self, model: nn.Module) -> list[Patch]:
        """Methods that make the model encode images with hero; ``forward`` of their owners is patched too."""

    @abstractmethod
    def processor_patches(self, processor) -> list[Patch]:
        """Methods that make the processor write as many placeholders as tokens are kept."""

    def runs(self, layout: ImageLayout, length: int) -> list[int]:
        """Lengths of an image's runs of placeholders in the prompt when it has ``length`` tokens.

        One run for each image, unless the family writes separators between tiles.
        """
        return [length]


@dataclass(frozen=True)
class ProcessorCounts:
    """What a patched processor needs to count tokens."""

    config: HeroConfig
    geometry: Geometry

    def tokens(self, image_size: Sequence[int]) -> int:
        """Visual tokens of an image of (height, width) pixels."""
        return self.geometry.layout([int(side) for side in image_size]).kept_tokens(self.config)


def hidden_states(feature_layer: object, depth: int) -> tuple[int, ...]:
    """``feature_layer`` as indices >= 0 of hidden states; 0 is the input of the first layer.

    Raises:
        TypeError, ValueError: not a hidden state, or several, of an encoder of ``depth`` layers.
    """
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


def parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter as it is now, loaded if accelerate has offloaded it.

    ``generate`` encodes images outside the call of the module within which accelerate loads its parameters.
    """
    if not getattr(module, name).is_meta or not hasattr(module, "_hf_hook"):
        return getattr(module, name)
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name)
