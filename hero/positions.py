"""Positions of a shortened prompt, where kept tokens keep those of the full one (M-RoPE).

The full prompt's positions are the stock model's own. All of this runs on the host; only which tokens are
kept comes from the device, and nothing is read back from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hero_kernels.segments import to_device

from .caches import CACHES, cache_of

__all__ = ["Image", "place"]

_ALIGNED = ("input_ids", "mm_token_type_ids", "token_type_ids")


class Image(NamedTuple):
    """An image in a prompt, in the order of the prompts.

    Attributes:
        now, kept, full: its placeholders in the prompt as given, as shortened, and in the stock one.
        tokens: ``[kept]`` int64, which of the stock one's are kept; ``None`` if nobody reads their positions,
            since a cache holds them.
    """

    now: int
    kept: int
    full: int
    tokens: Tensor | None


def place(
    model: nn.Module,
    given: Mapping[str, Any],
    fitted: Mapping[str, Any],
    images: Sequence[Image],
    *,
    image_token_id: int,
    whole: bool,
    device: torch.device,
) -> dict[str, Any]:
    """``position_ids`` of a prompt whose images keep some of their tokens; sets the model's ``rope_deltas``.

    Args:
        model: with ``model.rope_deltas`` and the methods of Qwen2-VL and later.
        given: keyword arguments of ``forward`` or ``generate`` as called, on the CPU.
        fitted: the same with the shortened prompt.
        images: of all prompts.
        whole: whether these are arguments of ``generate``.
        device: of the model's inputs.

    Returns:
        ``fitted`` with positions on the device.
    """
    ids, short = given["input_ids"], fitted["input_ids"]
    mask = given.get("attention_mask")
    past = 0 if mask is None else mask.shape[1] - ids.shape[1]
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, past:].bool()
    now, kept, full = (torch.tensor([one[number] for one in images]) for number in range(3))

    # The full prompt without padding, row after row: the placeholders that are missing stand at the first.
    flat = ids[valid]
    if int((flat == image_token_id).sum()) != int(now.sum()):
        raise ValueError(
            "attention_mask: expected one that shows all image placeholders, got one that hides some"
        )
    first = (flat == image_token_id).nonzero()[:, 0][now.cumsum(0) - now]
    repeats = torch.ones(len(flat), dtype=torch.int64).index_add_(0, first, full - now)
    rows = torch.arange(len(ids))[:, None].expand_as(ids)[valid].repeat_interleave(repeats)
    begins = repeats.cumsum(0)[first] - repeats[first]  # of images in the full prompt
    long = {
        name: given[name][valid].repeat_interleave(repeats)
        for name in _ALIGNED
        if isinstance(given.get(name), Tensor) and given[name].shape == ids.shape
    }

    # Where each token of the shortened prompt stands in it; of an image, at its first token.
    text = long["input_ids"] != image_token_id
    source = torch.arange(len(text))
    stays = text.clone()
    for begin, count in zip(begins.tolist(), kept.tolist(), strict=True):
        stays[begin : begin + count] = True
        source[begin : begin + count] = begin
    source, places = source[stays], (~text)[stays].nonzero()[:, 0]
    in_short = _content(fitted, short)

    in_full = valid if torch.equal(now, full) else _padded(rows, valid)
    padded = {name: _place(values, in_full, 0) for name, values in long.items()}
    asked = {**given, **padded}
    if mask is not None or not bool(in_full.all()):  # a mask would hide packed sequences from the model
        before = in_full[:, :0].long() if mask is None else mask[:, :past]
        asked["attention_mask"] = torch.cat([before, in_full.long()], 1)
    positions = given.get("position_ids")
    if positions is None:
        positions = _stock(model, asked, in_full, whole=whole)
        if positions is not None:  # fewer tokens before the same end
            missing = torch.bincount(rows, minlength=len(ids)) - in_short.sum(1)
            deltas = model.model.rope_deltas.cpu() + missing[:, None]
            model.model.rope_deltas = to_device(deltas, device)
        else:  # what the language model makes of that
            positions = torch.arange(past, past + in_full.shape[1])[None, None]
    is_linear = positions.dim() == 2
    positions = positions[None] if positions.dim() == 2 else positions
    positions = positions[..., -in_full.shape[1] :].expand(-1, len(ids), -1)[:, in_full]

    index = to_device(source, device)
    tokens = [
        torch.arange(one.kept, device=device) if one.tokens is None else one.tokens.to(device)
        for one in images
    ]
    index = index.index_add(0, to_device(places, device), torch.cat(tokens))
    found = to_device(positions[-3:], device)[:, index].expand(3, -1)
    if len(positions) == 4 or is_linear:
        counted = to_device(_counted(positions[0], rows, source), device)
        found = torch.cat([counted[None], found])
    at = to_device(in_short.flatten().nonzero()[:, 0], device)
    out = torch.zeros((len(found), in_short.numel()), dtype=found.dtype, device=device)
    return {**fitted, "position_ids": out.index_copy_(1, at, found).view(-1, *in_short.shape)}


def _stock(model: nn.Module, asked: Mapping[str, Any], inside: Tensor, *, whole: bool) -> Tensor | None:
    """The stock model's positions of the full prompt, on the CPU; it sets ``rope_deltas`` too."""
    if whole:
        rest = {name: value for name, value in asked.items() if name not in ("input_ids", *CACHES)}
        rest.setdefault("attention_mask", inside.long())
        return type(model)._prepare_position_ids_for_generation(model, asked["input_ids"], rest)
    base: Any = model.model
    names = set(inspect.signature(type(base).compute_3d_position_ids).parameters) - {"self"}
    arguments = {name: asked.get(name) for name in names}
    arguments |= dict.fromkeys(names & set(CACHES), cache_of(asked))
    arguments["inputs_embeds"] = torch.empty(*inside.shape, 0)
    return type(base).compute_3d_position_ids(base, **arguments)


def _content(inputs: Mapping[str, Any], ids: Tensor) -> Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :].bool()


def _padded(rows: Tensor, valid: Tensor) -> Tensor:
    """``[B, L]`` bool: where the tokens of rows stand, padded on the side that a prompt is padded on."""
    lengths = torch.bincount(rows, minlength=len(valid))
    width = int(lengths.max()) + int((~valid).sum(1).min())
    column = torch.arange(width)
    if bool(valid[:, -1].all()):
        return column >= width - lengths[:, None]
    return column < lengths[:, None]


def _place(values: Tensor, inside: Tensor, fill: int) -> Tensor:
    placed = values.new_full(inside.shape, fill)
    placed[inside] = values
    return placed


def _counted(positions: Tensor, rows: Tensor, source: Tensor) -> Tensor:
    """Positions of text counted anew, in each sequence of a row: gaps would be read as packed sequences.

    Args:
        positions: of the full prompt.
        rows: the row of each of its tokens.
        source: where each token that stays stands in it.
    """
    begins = (positions.diff(prepend=positions[:1] - 2) != 1) | (rows.diff(prepend=rows[:1] - 1) != 0)
    group = begins.long().cumsum(0)[source].unique_consecutive(return_inverse=True)[1]
    sizes = group.bincount()
    first = positions[begins][begins.long().cumsum(0)[source] - 1]
    return torch.arange(len(group)) - (sizes.cumsum(0) - sizes)[group] + first
