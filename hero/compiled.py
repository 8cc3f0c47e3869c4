"""The encoder under ``torch.compile``: one graph, in which image sizes are symbolic integers.

Three operators take the sizes: one tells which crops belong to images, one what the tower must know of each
crop, one runs all stages between the tower and the projector. They make the plan while they run, so the graph
does not depend on the sizes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hero_kernels import Finalized

from ._checks import error
from .plan import CropPlan, Plan, check_crops, check_pixels
from .policies import Policy
from .selection import Encoded

__all__ = ["register", "run"]

_ENCODERS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
# They make plans on the host, which the replay of a CUDA graph would leave out.
_UNSAFE: dict[str, Any] = (
    {"tags": torch.Tag.cudagraph_unsafe} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


def register(encoder: Any) -> str:
    """A new name, by which the operators find an encoder: they take no Python objects."""
    name = f"encoder {next(_NUMBERS)}"
    _ENCODERS[name] = encoder
    return name


def run(
    encoder: Any,
    name: str,
    pixel_values: Tensor,
    image_sizes: Sequence[Sequence[int]],
    text: Tensor | None,
    **kwargs,
) -> tuple[tuple[Tensor, ...], Any, Encoded]:
    """All stages but the projection, in code that is being compiled.

    Returns:
        tokens, index, budgets, shares, scores and ``cu_seqlens`` of a :class:`hero.Selection`, its sizes, and
        what was encoded.

    Raises:
        TypeError, ValueError: what only eager code takes, by name.
    """
    check_pixels(pixel_values, encoder.geometry.crop_size)
    if text is not None and not isinstance(text, Tensor):
        raise TypeError("text: expected embeddings [B, E] in compiled code, got strings")
    if encoder.cuda_graphs is not None and encoder.cuda_graphs.required:
        raise ValueError("cuda_graphs: expected 'auto' or False in compiled code, got True")
    if encoder.config.allocation != "exact":
        expected = "'exact' in compiled code, where no shape may depend on data"
        raise error(ValueError, "allocation", expected, encoder.config.allocation)
    # Operators read a tensor's values; an integer is compiled as a constant until it is seen to change.
    table = image_sizes.clone() if isinstance(image_sizes, Tensor) else None
    pairs = [(height, width) for height, width in image_sizes] if table is None else []
    sizes = [side for pair in pairs for side in pair]
    if pixel_values.ndim == 5:
        pixel_values = pixel_values.flatten(0, 1).index_select(0, _crops(pixel_values, table, sizes, name))
    count = sum(len(rows.layers) for rows in encoder.rows.values())
    valid, weights = _plan(pixel_values, table, sizes, name, count)
    plan = CropPlan(valid, weights, encoder.rows, pixel_values.device)
    encoded = encoder.encode(pixel_values, plan, **kwargs)
    replaces = type(encoder.config.policy).replace is not Policy.replace
    if replaces and torch.is_grad_enabled() and encoded.features.requires_grad:
        expected = "eager code or torch.no_grad() with a policy that replaces features"
        raise ValueError(f"policy {encoder.config.policy.name!r}: expected {expected}, got gradients")
    found = list(encoded.attention.values())
    others = encoded.cls, encoded.pooled, encoded.keys, encoded.patches, text
    tensors = _choose(
        encoded.features,
        [one.scores for one in found],
        [one.entropy for one in found],
        encoded.pixel_values.detach(),
        *(None if one is None else one.detach() for one in others),
        table,
        sizes,
        name,
    )
    return tensors, pairs if table is None else table, encoded


def _plan_of(name: str, pixel_values: Tensor, table: Tensor | None, sizes: Sequence[int]) -> Plan:
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    plan = _ENCODERS[name].plan(pairs if table is None else table, pixel_values.device)
    check_crops(pixel_values.shape, plan.layouts)
    return plan


@torch.library.custom_op("hero::crops", mutates_args=(), **_UNSAFE)
def _crops(pixel_values: Tensor, table: Tensor | None, sizes: Sequence[int], name: str) -> Tensor:
    """``[T]`` int64, which crops of ``[B, crops, 3, S, S]`` are not padding."""
    places = _plan_of(name, pixel_values, table, sizes).places
    return places.images * pixel_values.shape[1] + places.crops


@_crops.register_fake
def _(pixel_values, table, sizes, name):
    return pixel_values.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.custom_op("hero::plan", mutates_args=(), **_UNSAFE)
def _plan(
    crops: Tensor, table: Tensor | None, sizes: Sequence[int], name: str, count: int
) -> tuple[Tensor, Tensor]:
    """``[T, P]`` bool, valid patches, and ``[count, T]`` fp32, the weights of the layers."""
    plan = _plan_of(name, crops, table, sizes)
    return plan.valid.clone(), plan.layer_weights.clone()


@_plan.register_fake
def _(crops, table, sizes, name, count):
    patches = _ENCODERS[name].geometry.side ** 2
    valid = crops.new_empty((crops.shape[0], patches), dtype=torch.bool)
    return valid, crops.new_empty((count, crops.shape[0]), dtype=torch.float32)


@torch.library.custom_op("hero::choose", mutates_args=(), **_UNSAFE)
def _choose(
    features: Tensor,
    scores: Sequence[Tensor],
    entropy: Sequence[Tensor],
    pixel_values: Tensor,
    cls: Tensor | None,
    pooled: Tensor | None,
    keys: Tensor | None,
    patches: Tensor | None,
    text: Tensor | None,
    table: Tensor | None,
    sizes: Sequence[int],
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a selection, tokens before the projector."""
    encoder = _ENCODERS[name]
    plan = _plan_of(name, pixel_values, table, sizes)
    attention = {
        rows: Finalized(mean, spread, None)
        for rows, mean, spread in zip(plan.rows, scores, entropy, strict=True)
    }
    encoded = Encoded(features, cls, pooled, attention, pixel_values, None, keys, patches)
    tensors, _ = encoder.choose(encoded, plan, encoder.text_embeddings(plan, text))
    # An operator returns neither its inputs, as these scores may be, nor what outlives it.
    return *tensors[:-1], tensors[-1].clone(), plan.to(features.device).cu_seqlens.clone()


@_choose.register_fake
def _(features, scores, entropy, pixel_values, cls, pooled, keys, patches, text, table, sizes, name):
    total = torch.library.get_ctx().new_dynamic_size()
    crops, count, width = features.shape

    def empty(*shape, dtype=torch.float32):
        return features.new_empty(shape, dtype=dtype)

    return (
        empty(total, width, dtype=features.dtype),
        empty(total, dtype=torch.int32),
        empty(crops, dtype=torch.int32),
        empty(crops),
        empty(crops, count),
        empty((len(sizes) // 2 if table is None else len(table)) + 1, dtype=torch.int32),
    )


def _save(ctx, inputs, output):
    ctx.shape = inputs[0].shape
    ctx.others = [
        [None] * len(value) if isinstance(value, list) and value and isinstance(value[0], Tensor) else None
        for value in inputs[1:]
    ]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, grad, *_):
    """The gradient of each row goes to the row's source; no two rows have the same source."""
    (index,) = ctx.saved_tensors
    crops, patches, width = ctx.shape
    place = torch.where(index < 0, crops * patches, index).long()
    features = grad.new_zeros((crops * patches + 1, width)).index_copy(0, place, grad)
    return features[:-1].view(ctx.shape), *ctx.others


_choose.register_autograd(_gradients, setup_context=_save)
