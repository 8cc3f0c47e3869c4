"""Top-k, packing in stitched raster order, and gather: ragged batches, one launch.

    tokens[row] = features[index[row]],  index = the kept patches and newlines of each image in the order in
    which the model packs them (docs/method.md, 4 and 5)

Shapes: features [T, P, D] in any dtype and strides; scores [T, P] in fp32, fp16 or bf16, or ranks [T, P]
int16; valid [T, P] bytes or None, valid_counts [T] int32 or int64 or None, budgets [T] int32 or int64, table
[B, columns] int32, all contiguous; tokens [rows, D], index [rows] int32.

Grid (programs of the longest image, B), known on the host. The rows of an image fall into bands: the
thumbnail, or one grid row of tiles, whose patch rows interleave. A program writes up to ROWS rows of one band
and computes by itself which: from the budgets of its image (one lane per crop) where its band begins; from
scores (top-k) or ranks the kept patches of each tile of the band, as one bit mask per patch row. Counts of
bits give the place of every patch row, and the n-th set bit the source of a row. Then it copies its rows, 16
bytes per access. Programs exchange nothing; no sort, no atomics, no host-device synchronisation.

Budgets are an input: with ``signals``, :mod:`.tile_budgets` is launched first, since a second launch takes
less time than every program computing them again; so is a count of the mask where the counts are not given.

Bytes: kept features in and out, 2·total·D of their dtype; the scores, T·P·4, or the ranks, T·P·2, once for
each program of a band, mostly from L2.

Source: the packing of LLaVA-NeXT (``pack_image_features`` in transformers); the kernel is our own.
"""

import torch
import triton
import triton.language as tl

from .. import _launch
from ..segments import Gathered, Segment, Segments
from .common import (
    CROPS,
    FIRST_CROP,
    FIRST_ROW,
    GRID_WIDTH,
    NEWLINE_BEGIN,
    NEWLINE_END,
    TABLE_ROWS,
    THUMBNAIL,
    THUMBNAIL_NEWLINE,
    WIDTH,
    as_bytes,
    order_key,
    power_of_2,
    valid_patches,
)
from .segmented_topk import check_patches, topk_mask
from .tile_budgets import LANES, check_crops, tile_budgets

MAX_FEATURES = 8192


@triton.jit
def kept_patches(
    scores,
    ranks,
    valid,
    crop,  # int64
    k,  # int32, at most the valid patches
    side,
    patches,
    SIDE_PAD: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``[SIDE_PAD, SIDE_PAD]``: which patches of a crop are kept, by patch row and column."""
    row = tl.arange(0, SIDE_PAD)[:, None]
    column = tl.arange(0, SIDE_PAD)[None, :]
    patch = row * side + column
    ok = valid_patches(valid, crop, patch, (row < side) & (column < side), patches)
    if ranks is not None:
        rank = tl.load(ranks + crop * patches + patch, mask=ok, other=0)
        return ok & (rank < k)
    else:
        score = tl.load(scores + crop * patches + patch, mask=ok, other=0.0)
        return topk_mask(order_key(score, ok), patch, k, WIDE)


@triton.jit
def segmented_topk_gather_kernel(
    features,
    scores,
    ranks,
    valid,
    valid_counts,
    budgets,
    table,
    tokens,
    index,
    feature_strides,
    side,
    patches,
    width,
    LANES: tl.constexpr,
    SIDE_PAD: tl.constexpr,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    image = table + tl.program_id(1) * WIDTH
    crops = tl.load(image + CROPS)
    promised = tl.load(image + TABLE_ROWS)
    if program <= promised // ROWS + crops + 1:
        first = tl.load(image + FIRST_CROP)
        thumbnail = tl.load(image + THUMBNAIL)
        grid_width = tl.load(image + GRID_WIDTH)
        newline_begin = tl.load(image + NEWLINE_BEGIN)
        newline_end = tl.load(image + NEWLINE_END)
        thumbnail_newline = tl.load(image + THUMBNAIL_NEWLINE)

        # Kept patches, one lane per crop. Lanes are in sequence order, also with the thumbnail last.
        lane = tl.arange(0, LANES)
        inside = lane < crops
        is_thumbnail = inside & (lane == thumbnail)
        is_tile = inside & (lane != thumbnail)
        if valid_counts is not None:
            cap = tl.load(valid_counts + first + lane, mask=inside, other=0)
            cap = tl.minimum(cap, patches).to(tl.int64)
        else:
            cap = tl.where(inside, patches, 0).to(tl.int64)
        budget = tl.load(budgets + first + lane, mask=inside, other=0).to(tl.int64)
        kept_here = tl.where(inside, tl.maximum(tl.minimum(budget, cap), 0), 0).to(tl.int32)

        # Where each band ends among the rows of the image, held at the lane of the band's last crop.
        first_tile = (thumbnail == 0).to(tl.int32)
        thumbnail_band = tl.where(thumbnail > 0, (crops - 1) // grid_width, thumbnail)
        tile = lane - first_tile
        band = tl.where(is_thumbnail, thumbnail_band, first_tile + tile // grid_width)
        is_last = is_thumbnail | (is_tile & (tile % grid_width == grid_width - 1))
        top = tile // grid_width * side  # of a tile band, in stitched patch rows
        newlines = tl.minimum(top + side, newline_end) - tl.maximum(top, newline_begin)
        newlines = tl.where(is_thumbnail, thumbnail_newline, tl.maximum(newlines, 0))
        end = tl.cumsum(kept_here + tl.where(is_last, newlines, 0), 0)

        # The rows of this program: each band starts a new block of ROWS; rows that stay empty are a last
        # band.
        mine = tl.sum((is_last & (end // ROWS + band + 1 <= program)).to(tl.int32), 0)
        begin = tl.max(tl.where(is_last & (band < mine), end, 0), 0)
        stop = tl.max(tl.where(is_last & (band == mine), end, 0), 0)
        block = (program - mine) * ROWS
        j = block + tl.arange(0, ROWS)
        is_band = mine <= tl.max(tl.where(is_last, band, -1), 0)
        stop = tl.where(is_band, tl.minimum(stop, promised), promised)
        live = (j >= begin) & (j < stop)
        row_base = tl.load(image + FIRST_ROW).to(tl.int64)

        # The kept patches of the band: for each patch row and tile a bit mask of columns, and its count.
        is_stitched = mine != thumbnail_band
        lead = tl.where(is_stitched, first_tile + (mine - first_tile) * grid_width, thumbnail)
        width_of_band = tl.minimum(tl.where(is_stitched, grid_width, 1), crops - lead)
        r = tl.arange(0, SIDE_PAD)
        g = tl.arange(0, BAND)
        words = tl.zeros([SIDE_PAD, BAND], tl.int64)
        counts = tl.zeros([SIDE_PAD, BAND], tl.int32)
        for i in range(0, width_of_band):
            kept_of_tile = tl.sum(tl.where(lane == lead + i, kept_here, 0), 0)
            crop_of_tile = (first + lead + i).to(tl.int64)
            keep = kept_patches(
                scores, ranks, valid, crop_of_tile, kept_of_tile, side, patches, SIDE_PAD, WIDE
            )
            word = tl.sum(keep.to(tl.int64) << tl.arange(0, SIDE_PAD).to(tl.int64)[None, :], 1)
            words = tl.where(g[None, :] == i, word[:, None], words)
            counts = tl.where(g[None, :] == i, tl.sum(keep.to(tl.int32), 1)[:, None], counts)

        # Where each patch row ends, including its newline.
        length = tl.sum(counts, 1)
        stitched = (mine - first_tile) * side + r
        has_newline = tl.where(
            is_stitched,
            (r < side) & (stitched >= newline_begin) & (stitched < newline_end),
            (r == side - 1) & (thumbnail_newline != 0),
        ).to(tl.int32)
        row_end = tl.cumsum(length + has_newline, 0)

        # The source of each row: patch row, place in it, tile, place in that tile, column.
        row = tl.sum((row_end[None, :] <= (j - begin)[:, None]).to(tl.int32), 1)
        here = r[None, :] == row[:, None]
        place = j - begin - tl.sum(tl.where(here, (row_end - length - has_newline)[None, :], 0), 1)
        is_patch = place < tl.sum(tl.where(here, length[None, :], 0), 1)
        if BAND * SIDE_PAD <= 256:
            row_words = tl.sum(tl.where(here[:, :, None], words[None, :, :], 0), 1)
            row_counts = tl.sum(tl.where(here[:, :, None], counts[None, :, :], 0), 1)
            # A cumulative sum; Triton up to 3.6 cannot take tl.cumsum of a reduction of three dimensions.
            up_to = g[None, :, None] >= g[None, None, :]
            ends = tl.sum(tl.where(up_to, row_counts[:, None, :], 0), 2)
        else:  # row by row: all at once would not fit into registers
            step = tl.arange(0, ROWS)
            row_words = tl.zeros([ROWS, BAND], tl.int64)
            row_counts = tl.zeros([ROWS, BAND], tl.int32)
            for i in range(0, ROWS):
                wanted = (r == tl.sum(tl.where(step == i, row, 0), 0))[:, None]
                one_word = tl.sum(tl.where(wanted, words, 0), 0)[None, :]
                one_count = tl.sum(tl.where(wanted, counts, 0), 0)[None, :]
                row_words = tl.where(step[:, None] == i, one_word, row_words)
                row_counts = tl.where(step[:, None] == i, one_count, row_counts)
            ends = tl.cumsum(row_counts, 1)
        column_tile = tl.sum((ends <= place[:, None]).to(tl.int32), 1)
        of_tile = g[None, :] == column_tile[:, None]
        place -= tl.sum(tl.where(of_tile, ends - row_counts, 0), 1)
        bits = tl.sum(tl.where(of_tile, row_words, 0), 1)[:, None] >> r.to(tl.int64)[None, :]
        column = tl.sum((tl.cumsum((bits & 1).to(tl.int32), 1) <= place[:, None]).to(tl.int32), 1)

        found = live & is_patch
        crop = first + lead + column_tile
        patch = row * side + column
        source = tl.where(is_patch, crop * patches + patch, tl.where(is_band, -1, -2))
        tl.store(index + row_base + j, source, mask=live)
        base = features + crop.to(tl.int64) * feature_strides[0] + patch.to(tl.int64) * feature_strides[1]
        d = tl.arange(0, COLUMNS)
        out = tokens + (row_base + j) * width
        for chunk in tl.static_range(CHUNKS):
            feature = chunk * COLUMNS + d
            in_d = (feature < width)[None, :]
            value = tl.load(
                base[:, None] + feature[None, :] * feature_strides[2], mask=found[:, None] & in_d, other=0.0
            )
            tl.store(out[:, None] + feature[None, :], value, mask=live[:, None] & in_d)


def check_features(features) -> None:
    """Raise ``ValueError`` for rows that one program cannot copy."""
    if features.shape[2] > MAX_FEATURES:
        raise ValueError(f"features: expected at most {MAX_FEATURES} wide on a GPU, got {features.shape[2]}")


def floor_segments(segments: Segments, budgets, valid_counts) -> Segments:
    """Segments whose lengths are those of the budgets; synchronises with the device to read them."""
    kept = torch.minimum(budgets.budgets, valid_counts).clamp(0, segments.patches).tolist()
    images = []
    for first, image in zip(segments.first_crops, segments.images, strict=False):
        counts = kept[first : first + image.crops]
        thumbnail = counts[image.thumbnail] if image.thumbnail >= 0 else 0
        images.append(image._replace(thumbnail_tokens=thumbnail, tile_tokens=sum(counts) - thumbnail))
    return Segments(tuple(images), segments.side)


def programs_of(image: Segment, length: int, rows: int) -> int:
    """Upper bound on the programs of an image: the last block of each band may be partial."""
    bands = image.tiles // image.grid_width + (image.thumbnail >= 0)
    return length // rows + bands + 1


def segmented_topk_gather(
    features, scores, segments, valid, budgets, signals, allocation, ranks, valid_counts
):
    check_crops(segments)
    check_patches(scores)
    check_features(features)
    device = scores.device
    crops, patches, width = features.shape
    if valid_counts is None and valid is not None:
        valid_counts = valid.sum(1, dtype=torch.int32)
    if valid_counts is None and (budgets is None or allocation != "exact"):
        valid_counts = torch.full((crops,), patches, dtype=torch.int32, device=device)
    if budgets is None:
        budgets = tile_budgets(signals, valid_counts, segments, allocation)
    if allocation != "exact":
        segments = floor_segments(segments, budgets, valid_counts)
    options = _launch.configuration("segmented_topk_gather", patches, device)
    columns = min(options.pop("COLUMNS"), power_of_2(width, 16))
    total = sum(segments.lengths)
    tokens = torch.empty((total, width), dtype=features.dtype, device=device)
    index = torch.empty((total,), dtype=torch.int32, device=device)
    images = zip(segments.images, segments.lengths, strict=True)
    _launch.launch(
        segmented_topk_gather_kernel,
        (max(programs_of(*image, options["ROWS"]) for image in images), len(segments.images)),
        features=features,
        scores=scores.contiguous() if ranks is None else None,
        ranks=None if ranks is None else ranks.contiguous(),
        valid=as_bytes(valid),
        valid_counts=None if valid_counts is None else valid_counts.contiguous(),
        budgets=budgets.budgets.contiguous(),
        table=segments.table(device),
        tokens=tokens,
        index=index,
        feature_strides=features.stride(),
        side=segments.side,
        patches=patches,
        width=width,
        LANES=LANES,
        SIDE_PAD=power_of_2(segments.side, 4),
        BAND=power_of_2(max(min(image.grid_width, image.crops) for image in segments.images)),
        COLUMNS=columns,
        CHUNKS=triton.cdiv(width, columns),
        WIDE=patches > 1023,
        enable_fp_fusion=True,
        **options,
    )
    return Gathered(tokens, index, segments.lengths, budgets)
