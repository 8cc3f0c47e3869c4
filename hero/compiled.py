"""The encoder under ``torch.compile``: one graph, in which image sizes are symbolic integers.

Two operators take the sizes: one tells what the tower must know of each crop, one runs all stages between
the tower and the projector. They make the plan while they run, so the graph does not depend on the sizes. Of
a padded batch the tower runs the padding too: the compiler does not know how many crops are real.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hero_kernels import Finalized
from hero_kernels._library import features_gradient, no_gradient

from ._checks import error
from .cuda_graphs import Path
from .plan import CropPlan, Plan, check_crops, check_pixels
from .policies import Policy
from .selection import Encoded, Selection

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
    image_sizes: Tensor | Sequence[Sequence[int]],
    text: Tensor | None,
    **kwargs,
) -> tuple[Selection, Any]:
    """All stages in code that is being compiled. Packed encoders run as they are: the graph breaks.

    Returns:
        what :meth:`hero.HeroVisionEncoder.run` does.

    Raises:
        TypeError, ValueError: what only eager code takes, by name.
    """
    if encoder.kind.is_packed:
        return torch.compiler.disable(encoder.run)(pixel_values, image_sizes, text, **kwargs)
    check_pixels(pixel_values, encoder.geometry.crop_size)
    if text is not None and not isinstance(text, Tensor):
        raise TypeError("text: expected embeddings [B, E] in compiled code, got strings")
    if encoder.cuda_graphs is not None and encoder.cuda_graphs.required:
        raise ValueError("cuda_graphs: expected 'auto' or False in compiled code, got True")
    if encoder.config.allocation != "exact":
        expected = "'exact' in compiled code, where no shape may depend on data"
        raise error(ValueError, "allocation", expected, encoder.config.allocation)
    if encoder.geometry.resized_beyond is not None:
        raise ValueError("geometry: expected one that resizes no grids in compiled code, got resized_beyond")
    table, pairs = _sizes(image_sizes)
    sizes = [side for pair in pairs for side in pair]
    padded = pixel_values.shape[1] if pixel_values.ndim == 5 else -1
    pixel_values = pixel_values.flatten(0, 1) if pixel_values.ndim == 5 else pixel_values
    count = sum(len(rows.layers) for rows in encoder.rows.values())
    valid, weights = _plan(pixel_values, table, sizes, name, count, padded)
    plan = CropPlan(valid, weights, encoder.rows, pixel_values.device)
    encoded = encoder.encode(pixel_values, plan, **kwargs)
    replaces = type(encoder.config.policy).replace is not Policy.replace
    if replaces and torch.is_grad_enabled() and encoded.features.requires_grad:
        expected = "eager code or torch.no_grad() with a policy that replaces features"
        raise ValueError(f"policy {encoder.config.policy.name!r}: expected {expected}, got gradients")
    found = list(encoded.attention.values())
    others = encoded.cls, encoded.pooled, encoded.keys, encoded.patches, text
    *tensors, _ = _choose(
        encoded.features,
        [one.scores for one in found],
        [one.entropy for one in found],
        encoded.pixel_values.detach(),
        *(None if one is None else one.detach() for one in others),
        table,
        sizes,
        name,
        padded,
    )
    path = Path(False, "compiled code", encoded.attention_ran)
    return encoder.selection(pairs if table is None else table, tensors, path), encoded.output


def _sizes(image_sizes: Any) -> tuple[Tensor | None, list[tuple[int, int]]]:
    """The sizes as a tensor, or as pairs.

    Operators read a tensor's values; an integer is compiled as a constant until it is seen to change.
    """
    if isinstance(image_sizes, Tensor):
        if image_sizes.shape[0] == 0:
            raise ValueError("image_sizes: expected at least one image, got none")
        return image_sizes.clone(), []
    expected = "image_sizes: expected a tensor [B, 2] or pairs of integers in compiled code"
    if not isinstance(image_sizes, (list, tuple)):
        raise TypeError(f"{expected}, got another type")
    if len(image_sizes) == 0:
        raise ValueError("image_sizes: expected at least one image, got none")
    for size in image_sizes:
        if not isinstance(size, (list, tuple)) or len(size) != 2 or isinstance(size[0], Tensor):
            raise TypeError(f"{expected}, got other elements")
    return None, [(height, width) for height, width in image_sizes]


def _plan_of(
    name: str, pixel_values: Tensor, table: Tensor | None, sizes: Sequence[int], padded: int
) -> tuple[Plan, Tensor | None]:
    """The plan, and where its crops are among those of a batch that is padded to so many crops an image."""
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    plan = _ENCODERS[name].plan(pairs if table is None else table, pixel_values.device)
    rest = pixel_values.shape[1:]
    shape = pixel_values.shape if padded < 0 else (len(pixel_values) // max(padded, 1), padded, *rest)
    check_crops(shape, plan.layouts)
    if len(plan.places.images) == len(pixel_values):
        return plan, None
    return plan, plan.places.images * padded + plan.places.crops


@torch.library.custom_op("hero::plan", mutates_args=(), **_UNSAFE)
def _plan(
    crops: Tensor, table: Tensor | None, sizes: Sequence[int], name: str, count: int, padded: int
) -> tuple[Tensor, Tensor]:
    """``[T, P]`` bool, valid patches, and ``[count, T]`` fp32, the weights of the layers; 0 for padding."""
    plan, places = _plan_of(name, crops, table, sizes, padded)
    if places is None:
        return plan.valid.clone(), plan.layer_weights.clone()
    valid = plan.valid.new_zeros((len(crops), plan.valid.shape[1]))
    weights = plan.layer_weights.new_zeros((count, len(crops)))
    return valid.index_copy(0, places, plan.valid), weights.index_copy(1, places, plan.layer_weights)


@_plan.register_fake
def _(crops, table, sizes, name, count, padded):
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
    padded: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a selection, tokens before the projector; and ``[total]`` int64, the row's source among
    the features, −1 for none."""
    encoder = _ENCODERS[name]
    plan, places = _plan_of(name, pixel_values, table, sizes, padded)

    def real(tensor: Tensor | None) -> Any:
        return tensor if tensor is None or places is None else tensor[places.to(tensor.device)]

    attention = {
        rows: Finalized(real(mean), real(spread), None)
        for rows, mean, spread in zip(plan.rows, scores, entropy, strict=True)
    }
    encoded = Encoded(
        features=real(features),
        cls=real(cls),
        pooled=real(pooled),
        attention=attention,
        pixel_values=real(pixel_values),
        keys=real(keys),
        patches=real(patches),
    )
    tensors, _ = encoder.choose(encoded, plan, encoder.text_embeddings(plan, text))
    source = tensors[1].long()
    if places is not None:
        count = features.shape[1]
        moved = places.to(source.device)[source.clamp_min(0) // count] * count + source % count
        source = torch.where(source < 0, source, moved)
    # An operator returns neither its inputs, as these scores may be, nor what outlives it.
    return *tensors[:-1], tensors[-1].clone(), plan.to(features.device).cu_seqlens.clone(), source


@_choose.register_fake
def _(features, scores, entropy, pixel_values, cls, pooled, keys, patches, text, table, sizes, name, padded):
    total = torch.library.get_ctx().new_dynamic_size()
    crops, count, width = features.shape
    if padded != -1:
        crops = torch.library.get_ctx().new_dynamic_size()

    def empty(*shape, dtype=torch.float32):
        return features.new_empty(shape, dtype=dtype)

    return (
        empty(total, width, dtype=features.dtype),
        empty(total, dtype=torch.int32),
        empty(crops, dtype=torch.int32),
        empty(crops),
        empty(crops, count),
        empty((len(sizes) // 2 if table is None else len(table)) + 1, dtype=torch.int32),
        empty(total, dtype=torch.int64),
    )


def _save(ctx, inputs, output):
    ctx.shape = inputs[0].shape
    ctx.others = [no_gradient(value) for value in inputs[1:]]
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, grad, *_):
    return features_gradient(grad, *ctx.saved_tensors, ctx.shape), *ctx.others


_choose.register_autograd(_gradients, setup_context=_save)
