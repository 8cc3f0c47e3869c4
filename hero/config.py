"""How many visual tokens to keep, by which policy, and their number. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._checks import check_choice, check_integer, check_ratio, error
from .layout import Geometry
from .policies import Policy, make_policy
from .tiling import Tiling

__all__ = ["ALLOCATIONS", "DEFAULT_KEEP_RATIO", "HeroConfig", "count_tokens"]

DEFAULT_KEEP_RATIO = 0.2
ALLOCATIONS = ("exact", "floor")
LARGEST_BLOCK = 64  # whose scores the selection kernels hold in registers
ATTENTIONS = ("auto", "native", "fused")


@dataclass(frozen=True, init=False)
class HeroConfig:
    """How many of an image's patch tokens to keep, and by which policy. Immutable and hashable.

    Args:
        keep_ratio: share R of patch tokens kept, in (0, 1]; 0.2 if neither this nor ``keep_tokens`` is given.
            Of each image, ``floor(R·P)`` patches of the thumbnail and ``floor(R·K·P)`` of its K tiles
            together are kept (``"hired"`` gives the thumbnail half, ``"hero+"`` a fifth), padding never;
            newline tokens are kept in addition (docs/method.md, section 3).
        keep_tokens: a number of patch tokens per image instead of a ratio.
        policy: a :class:`hero.policies.Policy`, a name in :data:`hero.policies.POLICIES`, or
            ``"module:Class"``. A name is turned into an object with ``policy_options``.
        allocation: ``"exact"`` keeps exactly as many tokens as the image size determines; ``"floor"`` is the
            released rule, which loses a few to rounding and caps.
        attention: in the layers that score patches, ``"native"`` runs the encoder's own attention and
            computes its CLS rows beside it; ``"fused"`` runs an attention kernel that also returns the rows,
            for encoders with CLS, without attention mask or dropout. ``"auto"`` runs the latter in place of
            SDPA on GPUs where it was measured to be faster (:func:`hero_kernels.fused_attention_is_faster`),
            and never at ``keep_ratio=1``, which is the stock model.
        block: side in tokens, at most 64, of the blocks that act as tiles where images are not cut into crops
            (Qwen2-VL and later); 12 if ``None``. Other models take none.
        policy_options: parameters of the policy, such as ``alpha=0.5`` of ``"hero"``.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range, by name; a parameter that the policy
            does not have.
    """

    keep_ratio: float | None
    keep_tokens: int | None
    policy: Policy
    allocation: str
    attention: str
    block: int | None

    def __init__(
        self,
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
        policy: str | Policy = "hero",
        allocation: str = "exact",
        attention: str = "auto",
        block: int | None = None,
        **policy_options: Any,
    ):
        if keep_ratio is not None and keep_tokens is not None:
            given = f"{keep_ratio!r} and {keep_tokens!r}"
            raise ValueError(f"keep_ratio, keep_tokens: expected one of the two, got {given}")
        if keep_tokens is not None:
            keep_tokens = check_integer("keep_tokens", keep_tokens)
        else:
            ratio = DEFAULT_KEEP_RATIO if keep_ratio is None else keep_ratio
            keep_ratio = check_ratio("keep_ratio", ratio)
        fields = {
            "keep_ratio": keep_ratio,
            "keep_tokens": keep_tokens,
            "policy": make_policy(policy, policy_options),
            "allocation": check_choice("allocation", allocation, ALLOCATIONS),
            "attention": check_choice("attention", attention, ATTENTIONS),
            "block": None if block is None else check_integer("block", block, 1, LARGEST_BLOCK),
        }
        for name, field in fields.items():
            object.__setattr__(self, name, field)

    def to_dict(self) -> dict[str, Any]:
        """A flat dictionary of plain values, fit for JSON: the fields, with the policy as its name and the
        policy's parameters beside it. :meth:`from_dict` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["policy"] = self.policy.name
        if dataclasses.is_dataclass(self.policy):
            values |= {name: _plain(value) for name, value in vars(self.policy).items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeroConfig:
        """The configuration that :meth:`to_dict` wrote.

        Raises:
            TypeError, ValueError: not a mapping, an unknown key, or a value out of range.
        """
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise error(TypeError, "values", "a mapping of options", values)
        return cls(**values)


def count_tokens(
    config: HeroConfig,
    image_size: Sequence[int],
    *,
    geometry: Geometry | None = None,
    tiling: Tiling | Sequence[Sequence[int]] | None = None,
    crop_size: int | None = None,
    patch_size: int | None = None,
) -> int:
    """Visual tokens that an image occupies in the language model, newlines included.

    A pure function of integers, for planning context lengths, memory and cost without a model:
    ``floor(R·P) + min(floor(R·K·P), Σ valid) + rows`` for every policy but ``"hired"`` and ``"hero+"``
    (docs/method.md, 3 and 6). With ``allocation="floor"``, whose count depends on the image's content, an
    upper bound.

    Args:
        config: what to keep.
        image_size: (height, width) in pixels.
        geometry: how the model cuts images; that of LLaVA-NeXT with CLIP-ViT-L/14-336 if ``None``.
        tiling, crop_size, patch_size: fields of the geometry that differ from it.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, by name.
    """
    if not isinstance(config, HeroConfig):
        raise error(TypeError, "config", "hero.HeroConfig", config)
    if geometry is not None and not isinstance(geometry, Geometry):
        raise error(TypeError, "geometry", "hero.Geometry", geometry)
    given: dict[str, Any] = {"tiling": tiling, "crop_size": crop_size, "patch_size": patch_size}
    given = {name: value for name, value in given.items() if value is not None}
    if geometry is not None and given:
        raise ValueError(f"geometry: expected it or {', '.join(given)}, got both")
    return (geometry or Geometry(**given)).layout(image_size).kept_tokens(config)


def _plain(value: Any) -> Any:
    """A parameter as JSON can hold it."""
    if hasattr(value, "_asdict"):
        return value._asdict()
    return list(value) if isinstance(value, tuple) else value
