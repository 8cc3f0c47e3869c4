"""Prompts: shorten runs of image placeholders to the number of kept tokens, and find each image's question.

A processor without hero writes as many placeholders as the stock model needs. These functions remove the
surplus from ``input_ids`` and the tensors aligned with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .relevance import question_of

__all__ = ["deal", "images_of_rows", "questions", "shrink"]

# Tensors aligned with input_ids, and what fills their padding.
_ALIGNED = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
_KNOWN = {*_ALIGNED, "input_ids", "attention_mask", "position_ids", "shift_labels", "pixel_values"}


def images_of_rows(
    is_image: Tensor, lengths: Sequence[int], before: Sequence[tuple[int, int]] = ()
) -> list[int]:
    """The row of each image, from its number of placeholders.

    Args:
        is_image: ``[B, L]`` bool.
        lengths: placeholders of each image, in order.
        before: (row, placeholders) of other images, which stand before these in their rows.

    Raises:
        ValueError: an image's placeholders do not lie in one row.
    """
    counts = is_image.sum(1).tolist()
    for row, length in before:
        counts[row] -= length
    ends = list(accumulate(counts))
    rows, row = [], 0
    for number, end in enumerate(accumulate(lengths)):
        while end > ends[row]:
            row += 1
        begin_of_row = ends[row - 1] if row else 0
        if end - lengths[number] < begin_of_row:
            raise ValueError(
                f"input_ids: expected the {lengths[number]} placeholders of image {number} in one row, "
                f"got {end - begin_of_row} of them in row {row}"
            )
        rows.append(row)
    return rows


def questions(
    input_ids: Tensor, attention_mask: Tensor | None, image_token_id: int, rows: Sequence[int], tokenizer
) -> list[str]:
    """The question of each image: the user's words in its row, ``""`` if there are none.

    Args:
        input_ids, attention_mask: ``[B, L]``.
        rows: the row of each image.
        tokenizer: that of the language model.
    """
    texts = {}
    for row in sorted(set(rows)):
        ids = input_ids[row]
        keep = ids != image_token_id
        if attention_mask is not None:
            keep &= attention_mask[row, -len(ids) :].bool()
        texts[row] = question_of(tokenizer.decode(ids[keep], skip_special_tokens=False))
    return [texts[row] for row in rows]


Image: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], Any]


def deal(inputs: Mapping[str, Any], images: Sequence[Image]) -> tuple[dict[str, Any], list[Image]]:
    """Move placeholders among the runs of each image. Runs may be and become empty; separators stay between.

    Args:
        inputs: as in :func:`shrink`.
        images: row, lengths of the runs now and as wanted, and the :class:`hero.models.Shown` of each image.

    Returns:
        a copy of ``inputs``, and the images with runs as wanted, but for a surplus in the last one.
    """
    ids, dealt = inputs["input_ids"], []
    _check_aligned(inputs, ids)
    order = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    for row, now, wanted, shown in images:
        lengths = (*wanted[:-1], sum(now) - sum(wanted[:-1]))
        free = iter([at for begin, length in shown.runs for at in range(begin, begin + length)])
        columns: list[int] = []
        at = first = shown.runs[0][0]
        for (begin, length), count in zip(shown.runs, lengths, strict=True):
            columns += [*range(at, begin), *(next(free) for _ in range(count))]
            at = begin + length
        order[row, first:at] = torch.tensor(columns)
        dealt.append((row, lengths, wanted, shown))
    order = order.to(ids.device)
    moved = dict(inputs)
    for name in ("input_ids", *_ALIGNED):
        if isinstance(inputs.get(name), Tensor) and inputs[name].shape == ids.shape:
            moved[name] = inputs[name].gather(1, order.to(inputs[name].device))
    if inputs.get("shift_labels") is not None:
        moved["shift_labels"] = _of_next(inputs["shift_labels"], lambda labels: labels.gather(1, order))
    return moved, dealt


def _of_next(labels: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Labels of the next position after positions were moved: it may be another one now."""
    ignored = torch.full_like(labels[:, :1], -100)
    moved = move(torch.cat([ignored, labels[:, :-1]], dim=1))
    return torch.cat([moved[:, 1:], labels[:, -1:]], dim=1)


def _check_aligned(inputs: Mapping[str, Any], ids: Tensor) -> None:
    for name, value in inputs.items():
        if name not in _KNOWN and isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            expected = "input_ids with as many placeholders as tokens are kept, or None"
            raise ValueError(f"{name}: expected {expected}, got a tensor that cannot be shortened with them")


def shrink(
    inputs: Mapping[str, Any],
    image_token_id: int,
    runs: Sequence[tuple[int, int]],
    *,
    pad_token_id: int,
    cached: Sequence[int] = (),
) -> dict[str, Any]:
    """Shorten runs of placeholders in a batch of prompts.

    Rows are padded again to the longest of them, on the side they were padded on, or on the left; where they
    begin with what a cache holds, on the left of what is new.

    Args:
        inputs: keyword arguments of the model with ``input_ids`` ``[B, L]``. What refers to positions
            follows: ``attention_mask``, ``position_ids``, ``cache_position``, ``labels``, ``shift_labels``,
            ``token_type_ids``, ``mm_token_type_ids``, and ``logits_to_keep`` as a tensor of positions.
        image_token_id: the placeholder.
        runs: (length now, length wanted) of each run of placeholders, in order.
        pad_token_id: fills ``input_ids``.
        cached: lengths of the cache that holds the beginning of the prompts, before each turn and now.

    Returns:
        a copy of ``inputs`` with the shortened tensors.

    Raises:
        ValueError: an argument that cannot be shortened, by name.
    """
    ids = inputs["input_ids"]
    given = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else given
    if mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [B, L], got shape {tuple(mask.shape)}")
    if len(mask) != len(ids) or mask.shape[1] < ids.shape[1]:
        expected = f"one for input_ids of {tuple(ids.shape)}"
        raise ValueError(f"attention_mask: expected {expected}, got shape {tuple(mask.shape)}")
    _check_aligned(inputs, ids)
    length = ids.shape[1]
    past, mask = mask[:, :-length], mask[:, -length:]  # a mask may begin with what a cache holds
    is_image = ids == image_token_id

    now = torch.tensor([run[0] for run in runs])
    wanted = torch.tensor([run[1] for run in runs])
    place = torch.arange(int(now.sum())) - (now.cumsum(0) - now).repeat_interleave(now)
    surplus = (place >= wanted.repeat_interleave(now)).to(ids.device)
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[is_image] = ~surplus

    content = mask.bool() | is_image  # stock fills placeholders that the mask covers
    left = not bool(content[:, 0].all()) or bool(content[:, -1].all())
    order = content if left else content.flip(1)
    padding = (order.long().cumsum(1) == 0).sum(1)  # padding of each row, at the padded side
    common = int(padding.min())
    column = torch.arange(length, device=ids.device)
    outside = column < padding[:, None] if left else column >= length - padding[:, None]
    keep &= ~outside
    # What a cache holds stays at its places: it was padded anew at the beginning of each turn.
    parts: list[tuple[int, int, int]] = []  # columns from, to, and how many they become
    begin, padded = 0, common
    for place in cached if left else ():
        at = sum(width for _, _, width in parts)
        found = (keep[:, begin:].long().cumsum(1).amax(0) + padded == place - at).nonzero()
        if len(found):
            end = begin + int(found[0]) + 1
            parts.append((begin, end, place - at))
            begin, padded = end, 0
    parts.append((begin, length, int(keep[:, begin:].sum(1).max()) + padded))
    new_length = sum(width for _, _, width in parts)

    def repack(values: Tensor, fill: int) -> Tensor:
        packed = values.new_full((values.shape[0], new_length), fill)
        for row, (kept, old) in enumerate(zip(keep, values, strict=True)):
            at = 0
            for begin, end, width in parts:
                at += width
                kept_values = old[begin:end][kept[begin:end]]
                if left:
                    packed[row, at - len(kept_values) : at] = kept_values
                else:
                    packed[row, : len(kept_values)] = kept_values
        return packed

    shortened = dict(inputs)
    shortened["input_ids"] = repack(ids, pad_token_id)
    new_mask = repack(mask, 0)
    if given is not None or not bool(new_mask.all()):
        shortened["attention_mask"] = torch.cat([past, new_mask], dim=1)
    for name, fill in _ALIGNED.items():
        values = inputs.get(name)
        if isinstance(values, Tensor) and values.shape == ids.shape:
            shortened[name] = repack(values, fill)
    labels = inputs.get("shift_labels")
    if labels is not None:
        shortened["shift_labels"] = _of_next(labels, lambda labels: repack(labels, -100))
    positions = inputs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise ValueError(f"position_ids: expected [B, L], got shape {tuple(positions.shape)}")
    if positions is not None:
        before, after = (
            (torch.cat([past, one], dim=1).long().cumsum(1) - 1).clamp_min(0)[:, -one.shape[1] :]
            for one in (mask, new_mask)
        )
        offsets = (positions - before)[mask.bool()]
        if len(offsets) and bool((offsets != offsets[0]).any()):
            raise ValueError(
                "position_ids: expected None, or positions that count what the attention mask shows, for a "
                "prompt that is shortened"
            )
        # Positions with gaps would be read as packed sequences: count them anew.
        shortened["position_ids"] = after + (offsets[0] if len(offsets) else 0)
    if inputs.get("cache_position") is not None:
        shortened["cache_position"] = inputs["cache_position"][:new_length]
    columns = inputs.get("logits_to_keep")
    if isinstance(columns, Tensor):
        ranks = keep.long().cumsum(1) - 1
        moved = (ranks + (new_length - keep.sum(1, keepdim=True) if left else 0))[:, columns]
        if not bool(keep[:, columns].all()) or bool((moved != moved[:1]).any()):
            raise ValueError(
                "logits_to_keep: expected positions that are kept, and the same in every row after surplus "
                f"placeholders are dropped, got {columns.tolist()}"
            )
        shortened["logits_to_keep"] = moved[0]
    return shortened
