"""Prompts: shorten runs of image placeholders to the number of kept tokens, and find each image's question.

A processor without hero writes as many placeholders as the stock model needs. These functions remove the
surplus from ``input_ids`` and the tensors aligned with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .relevance import question_of

__all__ = ["images_of_rows", "questions", "shrink"]

# Tensors aligned with input_ids, and what fills their padding.
_ALIGNED = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}


def images_of_rows(is_image: Tensor, lengths: Sequence[int]) -> list[int]:
    """The row of each image, from its number of placeholders.

    Args:
        is_image: ``[B, L]`` bool.
        lengths: placeholders of each image, in order.

    Raises:
        ValueError: an image's placeholders do not lie in one row.
    """
    ends = list(accumulate(is_image.sum(1).tolist()))
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


def shrink(
    inputs: Mapping[str, Any],
    image_token_id: int,
    runs: Sequence[tuple[int, int]],
    *,
    pad_token_id: int,
) -> dict[str, Any]:
    """Shorten runs of placeholders in a batch of prompts.

    Rows are padded again to the longest of them, on the side they were padded on, or on the left.

    Args:
        inputs: keyword arguments of the model with ``input_ids`` ``[B, L]``; ``attention_mask``,
            ``labels``, ``token_type_ids``, ``mm_token_type_ids`` and ``position_ids`` follow where given.
        image_token_id: the placeholder.
        runs: (length now, length wanted) of each run of placeholders, in order.
        pad_token_id: fills ``input_ids``.

    Returns:
        a copy of ``inputs`` with the shortened tensors.

    Raises:
        ValueError: ``attention_mask`` of another rank.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [B, L], got shape {tuple(mask.shape)}")
    length = ids.shape[1]
    past, mask = mask[:, :-length], mask[:, -length:]  # a mask may begin with what a cache holds

    now = torch.tensor([run[0] for run in runs])
    wanted = torch.tensor([run[1] for run in runs])
    place = torch.arange(int(now.sum())) - (now.cumsum(0) - now).repeat_interleave(now)
    surplus = (place >= wanted.repeat_interleave(now)).to(ids.device)
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[ids == image_token_id] = ~surplus

    left = bool((mask[:, 0] == 0).any()) or not bool((mask[:, -1] == 0).any())
    content = mask.bool()
    order = content if left else content.flip(1)
    padding = (order.long().cumsum(1) == 0).sum(1)  # padding of each row, at the padded side
    common = int(padding.min())
    column = torch.arange(length, device=ids.device)
    outside = column < padding[:, None] if left else column >= length - padding[:, None]
    keep &= ~outside
    new_length = int(keep.sum(1).max()) + common

    def repack(values: Tensor, fill: int) -> Tensor:
        packed = values.new_full((values.shape[0], new_length), fill)
        for row, (kept, old) in enumerate(zip(keep, values, strict=True)):
            kept_values = old[kept]
            if left:
                packed[row, new_length - len(kept_values) :] = kept_values
            else:
                packed[row, : len(kept_values)] = kept_values
        return packed

    shortened = dict(inputs)
    shortened["input_ids"] = repack(ids, pad_token_id)
    new_mask = repack(mask, 0)
    shortened["attention_mask"] = torch.cat([past, new_mask], dim=1)
    for name, fill in _ALIGNED.items():
        values = inputs.get(name)
        if isinstance(values, Tensor) and values.shape == ids.shape:
            shortened[name] = repack(values, fill)
    if inputs.get("position_ids") is not None:
        # Positions with gaps would be read as packed sequences: count them anew.
        positions = shortened["attention_mask"].long().cumsum(1) - 1
        shortened["position_ids"] = positions.clamp_min(0)[:, -new_length:]
    return shortened
