"""Policies decide which visual tokens are kept: one frozen dataclass a file (docs/method.md, section 6).

Importing them needs the standard library only. A policy of your own is a subclass of :class:`Policy`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from .._checks import error
from .base import PATCHES, LayerPolicy, Needs, Observed, Policy, Pools, Replacement, Rows, Scored
from .cdpruner import CDPruner
from .coverage import CoveragePolicy
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .globalcom2 import GlobalCom2
from .hero import Hero, SignalWeights
from .hero_plus import HeroPlus
from .hired import HiRED
from .random import Random
from .scope import Scope
from .uniform import Uniform
from .visionzip import VisionZip

__all__ = [
    "PATCHES",
    "POLICIES",
    "CDPruner",
    "CoveragePolicy",
    "DivPrune",
    "FasterVLM",
    "GlobalCom2",
    "Hero",
    "HeroPlus",
    "HiRED",
    "LayerPolicy",
    "Needs",
    "Observed",
    "Policy",
    "Pools",
    "Random",
    "Replacement",
    "Rows",
    "Scope",
    "Scored",
    "SignalWeights",
    "Uniform",
    "VisionZip",
    "make_policy",
    "supported_rows",
]

_BUILT_IN = (
    Hero,
    HeroPlus,
    HiRED,
    FasterVLM,
    VisionZip,
    GlobalCom2,
    DivPrune,
    CDPruner,
    Scope,
    Uniform,
    Random,
)
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in _BUILT_IN}
"""The policies of this package by name."""


def make_policy(policy: str | Policy, options: dict[str, Any] | None = None) -> Policy:
    """The policy that a name and its options describe.

    Args:
        policy: a name in :data:`POLICIES`, ``"module:Class"`` of a subclass of :class:`Policy`, or an object,
            which is returned as it is.
        options: parameters of the policy.

    Raises:
        TypeError: a parameter that the policy does not have, or that is of the wrong type.
        ValueError: an unknown name, or a parameter out of range.
    """
    options = options or {}
    if isinstance(policy, Policy):
        if options:
            raise TypeError(
                f"{', '.join(options)}: expected as parameters of the policy object, got beside {policy!r}"
            )
        return policy
    expected = (
        f"one of {', '.join(map(repr, POLICIES))}, 'module:Class' or an instance of hero.policies.Policy"
    )
    if not isinstance(policy, str):
        raise error(TypeError, "policy", expected, policy)
    found: Any = POLICIES.get(policy)
    if found is None and ":" in policy:
        module, _, name = policy.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as problem:
            raise ValueError(f"policy: expected {expected}, got {policy!r}: {problem}") from problem
        if not (isinstance(found, type) and issubclass(found, Policy)):
            raise error(TypeError, "policy", expected, found)
    if found is None:
        raise error(ValueError, "policy", expected, policy)
    fields = [field.name for field in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else []
    unknown = [name for name in options if name not in fields]
    if unknown:
        given = {name: options[name] for name in unknown}
        own = ", ".join(fields) or "none"
        raise TypeError(
            f"{', '.join(unknown)}: expected options among keep_ratio, keep_tokens, policy, allocation, "
            f"attention, block and the parameters of policy {policy!r} ({own}), got {given}"
        )
    return found(**options)


def supported_rows(
    policy: Policy,
    needs: Needs,
    depth: int,
    feature_layer: int,
    scoring: Sequence[int] | None,
    *,
    has_cls: bool,
    has_thumbnail: bool,
) -> dict[str, Rows]:
    """The attention rows of a policy, if it is defined for an encoder and its images.

    Args:
        policy: the policy.
        needs: what else it reads (:meth:`Policy.needs`).
        depth, feature_layer, scoring: as in :meth:`LayerPolicy.rows`.
        has_cls: whether the encoder has a CLS token.
        has_thumbnail: whether images have a thumbnail.

    Raises:
        TypeError, ValueError: it is not, by name.
    """
    for required, given, where in (
        ("requires_cls", has_cls, "an encoder without CLS"),
        ("requires_thumbnail", has_thumbnail, "images without a thumbnail"),
    ):
        if getattr(policy, required) and not given:
            others = ", ".join(repr(name) for name, one in POLICIES.items() if not getattr(one, required))
            raise ValueError(f"policy: expected one of {others} for {where}, got {policy.name!r}")
    if needs.second_softmax and not has_cls:
        raise error(ValueError, "second_softmax", "False for an encoder without CLS", True)
    if scoring is not None and isinstance(policy, LayerPolicy):
        rows = policy.rows(depth, feature_layer, scoring)
    else:
        rows = policy.rows(depth, feature_layer)
    name = f"policy {policy.name!r}"
    if not isinstance(rows, Mapping) or not all(isinstance(one, Rows) for one in rows.values()):
        raise error(TypeError, name, "rows() to return a dictionary of Rows", rows)
    if scoring is not None:  # these have no thumbnails
        rows = {key: one._replace(thumbnail={}) for key, one in rows.items() if one.tiles}
    layers = {layer for one in rows.values() for layer in one.layers}
    if not layers <= set(range(depth)):
        raise error(ValueError, name, f"rows() to name layers in [0, {depth})", sorted(layers))
    if scoring is not None and not layers <= set(scoring):
        expected = f"rows() to name layers with full attention, {list(scoring)}"
        raise error(ValueError, name, expected, sorted(layers))
    return dict(rows)
