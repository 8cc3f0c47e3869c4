"""The options of ``--hf-overrides '{"hero": {...}}'`` and of a request."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from .. import HeroConfig, HeroVisionEncoder, __version__
from .._checks import check_integer, check_ratio, error
from ..layout import Geometry
from ..models import internvl, tower_for
from ..models.llava import check_strategy
from .geometry import known

__all__ = ["KEEP_RATIO", "OPTIONS", "Options", "build_tower", "is_asked_for", "of_processor", "read_ratio"]

OPTIONS = "hero"
KEEP_RATIO = "hero_keep_ratio"
MOST_CROPS = 32


def is_asked_for(hf_config: Any) -> bool:
    """Whether a model's configuration has options of hero, and so tokens are to be dropped."""
    return getattr(hf_config, "hero", None) is not None


@dataclass(frozen=True)
class Options:
    """What to keep, and how an engine encodes images.

    Attributes:
        config: what to keep of an image, unless its request says otherwise.
        max_crops: crops that the vision tower encodes at once. An image is never divided.
    """

    config: HeroConfig
    max_crops: int = MOST_CROPS

    @classmethod
    def read(cls, hf_config: Any) -> Options:
        """The options in a model's configuration, if they are asked for there.

        Raises:
            ValueError: an unknown option or one out of range, by name; an option by which the tokens of an
                image would depend on more than the image.
        """
        given = hf_config.hero
        if not isinstance(given, Mapping):
            raise error(ValueError, "hf_overrides, hero", "a mapping of options", given)
        for name in ("relevance", "second_pass"):
            if name in given:
                raise ValueError(
                    f"hf_overrides, hero: {name}: expected none, since selection by the question is not "
                    "supported: vLLM's caches would give a question the tokens that were kept for another"
                )
        try:
            most = check_integer("max_crops", given.get("max_crops", MOST_CROPS))
            config = HeroConfig(**{name: value for name, value in given.items() if name != "max_crops"})
            config.policy.needs(with_relevance=False)
            if config.allocation != "exact":
                expected = "'exact', whose number of tokens follows from the image size"
                raise error(ValueError, "allocation", expected, config.allocation)
        except (TypeError, ValueError) as problem:
            raise ValueError(f"hf_overrides, hero: {problem}") from problem
        return cls(config, most)

    def check(self, hf_config: Any, geometry: Geometry) -> None:
        """Raise ``ValueError`` for options that do not fit the vision encoder of a model."""
        try:
            with torch.device("meta"):
                self.encoder(build_tower(hf_config), None, hf_config, geometry, None)
        except (TypeError, ValueError) as problem:
            raise ValueError(f"hf_overrides, hero: {problem}") from problem

    def encoder(
        self,
        tower: nn.Module,
        projector: nn.Module | None,
        hf_config: Any,
        geometry: Geometry,
        newline: Callable[[], Tensor] | None,
    ) -> HeroVisionEncoder:
        """The encoder of a model.

        Raises:
            TypeError, ValueError: as :class:`hero.HeroVisionEncoder`.
        """
        hf_config = known(hf_config)
        strategy, layer = hf_config.vision_feature_select_strategy, hf_config.vision_feature_layer
        check_strategy(strategy, tower_for(tower))
        if hf_config.model_type == "internvl":
            layer = internvl.feature_layer(layer, strategy)
        return HeroVisionEncoder(
            tower,
            projector,
            self.config,
            geometry=geometry,
            image_newline=newline,
            feature_layer=tuple(layer) if isinstance(layer, list) else layer,
            cuda_graphs=False,  # they would be captured after vLLM has measured and divided the memory
        )

    @property
    def key(self) -> str:
        """What tells tokens kept by these options from tokens kept by others, for vLLM's caches."""
        kind = type(self.config.policy)
        own = {"hero": __version__, "class": f"{kind.__module__}:{kind.__qualname__}"}
        return json.dumps({**self.config.to_dict(), **own}, sort_keys=True, default=repr)


def build_tower(hf_config: Any) -> nn.Module:
    """A model's vision tower as transformers has it, in torch's default dtype, with random weights."""
    config = copy.deepcopy(known(hf_config).vision_config)
    tower = AutoModel.from_config(config, dtype=torch.get_default_dtype(), attn_implementation="sdpa")
    return tower.eval().requires_grad_(False)


def of_processor(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a request without those of hero, as vLLM's own processor takes them."""
    return {name: value for name, value in options.items() if name not in (OPTIONS, KEEP_RATIO)}


def read_ratio(options: Mapping[str, object]) -> tuple[int, int]:
    """``hero_keep_ratio`` of a request as numerator and denominator, which no cast rounds; (0, 0) for none.

    Args:
        options: ``mm_processor_kwargs`` of the request.

    Raises:
        ValueError: not a number in (0, 1]; another option that begins with ``hero_``.
    """
    for name in options:
        if name.startswith("hero_") and name != KEEP_RATIO:
            raise ValueError(f"{name}: expected {KEEP_RATIO}, the only option of hero for one request")
    ratio = options.get(KEEP_RATIO)
    if ratio is None:
        return 0, 0
    try:
        exact = Fraction(check_ratio(KEEP_RATIO, ratio)).limit_denominator(10**9)
    except TypeError as problem:
        raise ValueError(str(problem)) from problem
    return max(exact, Fraction(1, 10**9)).as_integer_ratio()
