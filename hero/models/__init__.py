"""Model families: the one place that knows what hero must know of each.

A family is a module with an :class:`Adapter`; an encoder is a module with a :class:`Tower`. Both are
looked up by class name and imported on use, so that the core imports no family and no transformers.

The seam is cut for families to come: a tower says whether it has a CLS token (without one, patches are
scored by received attention and crops by their mean feature) and how many patches merge into a token
(scores pool the same way); a geometry says where the thumbnail stands and whether tiles are stitched;
``runs`` says how an image's tokens are spread over its runs of placeholders in the text.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from hero_kernels import Finalized

from ..config import HeroConfig
from ..layout import Geometry, ImageLayout
from ..packing import Cut

__all__ = ["Adapter", "Encoded", "Parts", "Patch", "Tower", "adapter_for", "tower_for"]

_ADAPTERS = {"LlavaNextForConditionalGeneration": "llava_next"}
_TOWERS = {"CLIPVisionModel": "clip"}


@dataclass(frozen=True)
class Encoded:
    """What a vision encoder made of a batch of T crops.

    Attributes:
        features: ``[T, P, C]``, the features the model uses, without CLS; may be a strided view.
        cls: ``[T, C]``, the last layer at CLS, before the post layer norm; may be ``None`` where no
            signal needs it.
        pooled: ``[T, C]``, the same after it.
        scores: ``[T, P]`` fp32, attention of CLS to patches (docs/method.md, 1); like the next two ``None``
            where the policy looks at none.
        entropy: ``[T]`` fp32, of the scores over the patches that are not padding.
        ranks: ``[T, P]`` int16, the order of the scores, where the policy wants it.
        pixel_values: ``[T, 3, S, S]``, the crops.
        output: what the tower returned; ``None`` where only the layers needed were run.
        maps: the attention maps that the policy asked for, by name, the scores among them.
        keys: ``[T, P, D]`` fp32, each patch's key in the last layer of the features, averaged over heads, if
            the policy wants it.
        patches: ``[T, P, C]``, the last layer at the patches, if the policy compares them with the question
            and CLIP has the tower's weights.
        valid: ``[T, P]`` bool, the patches that may be kept; ``None`` where the tower dropped none, for all
            that are not padding.
    """

    features: Tensor
    cls: Tensor | None
    pooled: Tensor | None
    scores: Tensor | None
    entropy: Tensor | None
    ranks: Tensor | None
    pixel_values: Tensor
    output: object | None
    maps: Mapping[str, Finalized] = field(default_factory=dict)
    keys: Tensor | None = None
    patches: Tensor | None = None
    valid: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """What an adapter finds in a model."""

    vision_tower: nn.Module
    projector: nn.Module
    image_newline: Tensor | None
    geometry: Geometry
    feature_layer: int | tuple[int, ...]
    image_token_id: int


@dataclass(frozen=True)
class Patch:
    """A method to put on one instance, and to take off again."""

    owner: object
    name: str
    function: Callable


class Tower(ABC):
    """A kind of vision encoder."""

    has_cls: bool = True
    merge: int = 1  # patches along one side of a visual token

    @abstractmethod
    def attention_modules(self, tower: nn.Module) -> dict[int, nn.Module]:
        """``{layer: attention module}`` of every layer, in order."""

    @abstractmethod
    def geometry(self, tower: nn.Module) -> tuple[int, int]:
        """(crop size, patch size) in pixels."""

    @abstractmethod
    def run(
        self,
        tower: nn.Module,
        pixel_values: Tensor,
        feature_layer: int | Sequence[int],
        *,
        cls: bool = True,
        scored: Sequence[int] = (),
        cut: Cut | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, object | None]:
        """Encode crops: (features, cls, pooled, output) as in :class:`Encoded`.

        Args:
            cls: whether cls and pooled are needed.
            scored: the layers whose attention is captured: they must run.
            cut: where patches are dropped on the way; their features are zero.
            kwargs: what a caller asks of the tower beyond; then it runs whole.

        Raises:
            ValueError: a cut in a tower that must run whole.
        """


class Adapter(ABC):
    """A model family."""

    @abstractmethod
    def parts(self, model: nn.Module) -> Parts:
        """The parts of a model.

        Raises:
            ValueError: the model is configured in a way that is not supported, by name.
        """

    @abstractmethod
    def projector(self, model: nn.Module) -> nn.Module:
        """The projector of a model as it is now."""

    @abstractmethod
    def check_processor(self, processor, parts: Parts) -> None:
        """Raise ``ValueError`` unless the processor cuts images as the model does."""

    @abstractmethod
    def model_patches(self, model: nn.Module) -> list[Patch]:
        """Methods that make the model encode with hero."""

    @abstractmethod
    def processor_patches(self, processor) -> list[Patch]:
        """Methods that make the processor emit as many placeholders as are kept."""

    def runs(self, layout: ImageLayout, length: int) -> list[int]:
        """Lengths of the image's runs of placeholders in the text when it has ``length`` tokens.

        One run an image, unless the family writes separators between tiles.
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


def _find(kind: str, argument: str, table: dict[str, str], value: object):
    for cls in type(value).__mro__:
        if cls.__name__ in table:
            return importlib.import_module(f"{__name__}.{table[cls.__name__]}")
    raise ValueError(f"{argument}: expected {kind} ({', '.join(table)}), got {type(value).__name__}")


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises:
        ValueError: an unsupported model; the message names those supported.
    """
    return _find("a supported model", "model", _ADAPTERS, model).ADAPTER


def tower_for(vision_tower: nn.Module) -> Tower:
    """The kind of a vision encoder, compiled or not.

    Raises:
        ValueError: an unsupported encoder; the message names those supported.
    """
    vision_tower = getattr(vision_tower, "_orig_mod", vision_tower)
    return _find("a supported vision encoder", "vision_tower", _TOWERS, vision_tower).TOWER
