"""Budgets, top-k, packing in stitched raster order, and gather: ragged batches, one launch.

    tokens[row] = features[index[row]],  index = the kept patches and newlines of each image in the order in
    which the model packs them (docs/method.md, 3 to 5)

Grid (programs of the longest image, B), known on the host. The rows of an image fall into bands: the
thumbnail, or one grid row of tiles, whose patch rows interleave. A program writes up to ROWS rows of one
band and finds out by itself which: the budgets of its image (a lane a crop, unless they are given), where
its band begins, the patches kept of each tile of the band (top-k, unless ranks are given), by patch row, as
the bits of a word. Counting gives the place of every patch row, and the n-th set bit of a word the source
of a row. Then it copies its rows, 16 bytes an access. Nothing is exchanged between programs, nothing is
sorted, no atomics, and the host waits for nothing.

Bytes: kept features in and out, 2·total·D of their dtype; besides the scores, T·P·4, or the ranks, T·P·2,
once for each program of a band, mostly from L2.
"""

import torch
import triton
import triton.language as tl

from .._launch import configuration, launch
from ..segments import Gathered, Segment, Segments
from .budgets import LANES, budgets_of, check_crops, empty_budgets, shares_of, signal_arguments, tile_budgets
from .common import (
    CROPS,
    FIRST_CROP,
    FIRST_ROW,
    GRID_WIDTH,
    NEWLINE_BEGIN,
    NEWLINE_END,
    THUMBNAIL,
    THUMBNAIL_NEWLINE,
    WIDTH,
    mask_arguments,
    order_key,
    power_of_2,
)
from .common import ROWS as TABLE_ROWS
from .topk import check_patches, topk_mask

MAX_FEATURES = 8192


@triton.jit
def count_valid(valid, stride_vt, stride_vp, first, crops, patches, lane, P_PAD: tl.constexpr):
    """Valid patches of each crop of an image, where no one has counted them."""
    p = tl.arange(0, P_PAD)
    counts = tl.zeros(lane.shape, tl.int64)
    for i in range(0, crops):
        row = valid + (first + i).to(tl.int64) * stride_vt + p.to(tl.int64) * stride_vp
        count = tl.sum((tl.load(row, mask=p < patches, other=0) != 0).to(tl.int32), 0)
        counts = tl.where(lane == i, count, counts)
    return counts


@triton.jit
def keep_of(
    scores,
    ranks,
    valid,
    stride_st,
    stride_sp,
    stride_rt,
    stride_rp,
    stride_vt,
    stride_vp,
    crop,  # int64
    k,  # int32, at most the valid patches
    side,
    SIDE_PAD: tl.constexpr,
    HAS_VALID: tl.constexpr,
    RANKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``[R, C]``: which patches of a crop are kept, by patch row and column."""
    row = tl.arange(0, SIDE_PAD)[:, None]
    column = tl.arange(0, SIDE_PAD)[None, :]
    patch = row * side + column
    place = patch.to(tl.int64)
    ok = (row < side) & (column < side)
    if HAS_VALID:
        ok = ok & (tl.load(valid + crop * stride_vt + place * stride_vp, mask=ok, other=0) != 0)
    if RANKED:
        rank = tl.load(ranks + crop * stride_rt + place * stride_rp, mask=ok, other=0)
        return ok & (rank < k)
    else:
        score = tl.load(scores + crop * stride_st + place * stride_sp, mask=ok, other=0.0)
        return topk_mask(order_key(score, ok), patch, k, WIDE)


@triton.jit
def segmented_topk_gather_kernel(
    features,
    scores,
    ranks,
    valid,
    valid_counts,
    given,
    table,
    stride_ft,
    stride_fp,
    stride_fd,
    stride_st,
    stride_sp,
    stride_rt,
    stride_rp,
    stride_vt,
    stride_vp,
    stride_counts,
    stride_given,
    signal_0,
    signal_1,
    signal_2,
    signal_3,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    weight_0,
    weight_1,
    weight_2,
    weight_3,
    temperature_0,
    temperature_1,
    temperature_2,
    temperature_3,
    budgets,
    shares,
    weights,
    tokens,
    index,
    side,
    patches,
    width,
    LANES: tl.constexpr,
    SIGNALS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SIDE_PAD: tl.constexpr,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    RANKED: tl.constexpr,
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

        # Budgets, a lane a crop. Lanes stand in the order of the sequence, a thumbnail last included.
        lane = tl.arange(0, LANES)
        inside = lane < crops
        is_thumbnail = inside & (lane == thumbnail)
        is_tile = inside & (lane != thumbnail)
        if HAS_COUNTS:
            cap = tl.load(valid_counts + (first + lane) * stride_counts, mask=inside, other=0).to(tl.int64)
        elif HAS_VALID:
            cap = count_valid(valid, stride_vt, stride_vp, first, crops, patches, lane, SIDE_PAD * SIDE_PAD)
        else:
            cap = tl.where(inside, patches, 0).to(tl.int64)
        if SIGNALS > 0:
            share = shares_of(
                signal_0,
                signal_1,
                signal_2,
                signal_3,
                stride_0,
                stride_1,
                stride_2,
                stride_3,
                weight_0,
                weight_1,
                weight_2,
                weight_3,
                temperature_0,
                temperature_1,
                temperature_2,
                temperature_3,
                first + lane,
                is_tile,
                SIGNALS,
                SOFTMAX,
            )
            budget, weight = budgets_of(share, cap, lane, is_tile, image, True)
            if program == 0:
                tl.store(budgets + first + lane, budget.to(tl.int32), mask=inside)
                tl.store(shares + first + lane, share, mask=inside)
                tl.store(weights + first + lane, weight.to(tl.int32), mask=inside)
        else:
            budget = tl.load(given + (first + lane) * stride_given, mask=inside, other=0).to(tl.int64)
        kept_here = tl.where(inside, tl.maximum(tl.minimum(budget, cap), 0), 0).to(tl.int32)

        # Where bands end among the rows of the image, at the lane of a band's last crop.
        first_tile = (thumbnail == 0).to(tl.int32)
        thumbnail_band = tl.where(thumbnail > 0, (crops - 1) // grid_width, thumbnail)
        tile = lane - first_tile
        band = tl.where(is_thumbnail, thumbnail_band, first_tile + tile // grid_width)
        is_last = is_thumbnail | (is_tile & (tile % grid_width == grid_width - 1))
        top = tile // grid_width * side  # of a tile band, in stitched patch rows
        newlines = tl.minimum(top + side, newline_end) - tl.maximum(top, newline_begin)
        newlines = tl.where(is_thumbnail, thumbnail_newline, tl.maximum(newlines, 0))
        end = tl.cumsum(kept_here + tl.where(is_last, newlines, 0), 0)

        # This program's rows: bands begin a new block of ROWS, the rows that nothing fills are a last band.
        mine = tl.sum((is_last & (end // ROWS + band + 1 <= program)).to(tl.int32), 0)
        begin = tl.max(tl.where(is_last & (band < mine), end, 0), 0)
        stop = tl.max(tl.where(is_last & (band == mine), end, 0), 0)
        block = (program - mine) * ROWS
        j = block + tl.arange(0, ROWS)
        is_band = mine <= tl.max(tl.where(is_last, band, -1), 0)
        stop = tl.where(is_band, tl.minimum(stop, promised), promised)
        live = (j >= begin) & (j < stop)
        row_base = tl.load(image + FIRST_ROW).to(tl.int64)

        # The kept patches of the band: of each patch row and tile their columns, as bits, and their number.
        is_stitched = mine != thumbnail_band
        lead = tl.where(is_stitched, first_tile + (mine - first_tile) * grid_width, thumbnail)
        width_of_band = tl.minimum(tl.where(is_stitched, grid_width, 1), crops - lead)
        r = tl.arange(0, SIDE_PAD)
        g = tl.arange(0, BAND)
        words = tl.zeros([SIDE_PAD, BAND], tl.int64)
        counts = tl.zeros([SIDE_PAD, BAND], tl.int32)
        for i in range(0, width_of_band):
            keep = keep_of(
                scores,
                ranks,
                valid,
                stride_st,
                stride_sp,
                stride_rt,
                stride_rp,
                stride_vt,
                stride_vp,
                (first + lead + i).to(tl.int64),
                tl.sum(tl.where(lane == lead + i, kept_here, 0), 0),
                side,
                SIDE_PAD,
                HAS_VALID,
                RANKED,
                WIDE,
            )
            word = tl.sum(keep.to(tl.int64) << tl.arange(0, SIDE_PAD).to(tl.int64)[None, :], 1)
            words = tl.where(g[None, :] == i, word[:, None], words)
            counts = tl.where(g[None, :] == i, tl.sum(keep.to(tl.int32), 1)[:, None], counts)

        # Where each patch row ends, its newline included.
        length = tl.sum(counts, 1)
        stitched = (mine - first_tile) * side + r
        has_newline = tl.where(
            is_stitched,
            (r < side) & (stitched >= newline_begin) & (stitched < newline_end),
            (r == side - 1) & (thumbnail_newline != 0),
        ).to(tl.int32)
        row_end = tl.cumsum(length + has_newline, 0)

        # The source of each row: patch row, place in it, tile, place in that, column.
        row = tl.sum((row_end[None, :] <= (j - begin)[:, None]).to(tl.int32), 1)
        here = r[None, :] == row[:, None]
        place = j - begin - tl.sum(tl.where(here, (row_end - length - has_newline)[None, :], 0), 1)
        is_patch = place < tl.sum(tl.where(here, length[None, :], 0), 1)
        if BAND * SIDE_PAD <= 256:
            row_words = tl.sum(tl.where(here[:, :, None], words[None, :, :], 0), 1)
            row_counts = tl.sum(tl.where(here[:, :, None], counts[None, :, :], 0), 1)
            # A cumulative sum, which Triton up to 3.6 cannot take of what was reduced from three dimensions.
            up_to = g[None, :, None] >= g[None, None, :]
            ends = tl.sum(tl.where(up_to, row_counts[:, None, :], 0), 2)
        else:  # too much for the registers at once
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
        base = features + crop.to(tl.int64) * stride_ft + patch.to(tl.int64) * stride_fp
        d = tl.arange(0, COLUMNS)
        out = tokens + (row_base + j) * width
        for chunk in tl.static_range(CHUNKS):
            feature = chunk * COLUMNS + d
            in_d = (feature < width)[None, :]
            value = tl.load(
                base[:, None] + feature[None, :] * stride_fd, mask=found[:, None] & in_d, other=0.0
            )
            tl.store(out[:, None] + feature[None, :], value, mask=live[:, None] & in_d)


def check_features(features) -> None:
    """A row is copied by one program, all at once."""
    if features.shape[2] > MAX_FEATURES:
        raise ValueError(f"features: expected at most {MAX_FEATURES} wide on a GPU, got {features.shape[2]}")


def floor_segments(segments: Segments, budgets, valid_counts) -> Segments:
    """Segments that promise what the budgets hold, which is waited for."""
    kept = torch.minimum(budgets.budgets, valid_counts).tolist()
    images = []
    for first, image in zip(segments.first_crops, segments.images, strict=False):
        counts = kept[first : first + image.crops]
        thumbnail = counts[image.thumbnail] if image.thumbnail >= 0 else 0
        images.append(image._replace(thumbnail_tokens=thumbnail, tile_tokens=sum(counts) - thumbnail))
    return Segments(tuple(images), segments.side)


def programs_of(image: Segment, length: int, rows: int) -> int:
    """Upper bound of the programs of an image: each band, and the end, may leave one half empty."""
    bands = image.tiles // image.grid_width + (image.thumbnail >= 0)
    return length // rows + bands + 1


def segmented_topk_gather(
    features,
    scores,
    segments,
    *,
    valid=None,
    budgets=None,
    signals=None,
    allocation="exact",
    ranks=None,
    valid_counts=None,
):
    check_crops(segments)
    check_patches(scores)
    check_features(features)
    device = scores.device
    crops, patches, width = features.shape
    if allocation != "exact":
        if valid_counts is None:
            valid_counts = torch.full((crops,), patches, device=device) if valid is None else valid.sum(1)
        if budgets is None:
            budgets = tile_budgets(signals, valid_counts, segments, allocation=allocation)
        segments = floor_segments(segments, budgets, valid_counts)
    made = empty_budgets(crops, device) if budgets is None else budgets
    arguments, flags = signal_arguments(signals if budgets is None else (), scores)
    side = segments.side
    side_pad = power_of_2(side, 4)
    options = configuration("segmented_topk_gather", patches, device)
    band = power_of_2(max(image.grid_width for image in segments.images))
    total = sum(segments.lengths)
    tokens = torch.empty((total, width), dtype=features.dtype, device=device)
    index = torch.empty((total,), dtype=torch.int32, device=device)
    mask, *mask_strides = mask_arguments(valid, scores)
    columns = min(options.pop("COLUMNS"), power_of_2(width, 16))
    lengths = zip(segments.images, segments.lengths, strict=True)
    given = scores if budgets is None else budgets.budgets
    launch(
        segmented_topk_gather_kernel,
        (max(programs_of(*image, options["ROWS"]) for image in lengths), len(segments.images)),
        *(features, scores, scores if ranks is None else ranks, mask),
        *(scores if valid_counts is None else valid_counts, given, segments.table(device)),
        *(*features.stride(), *scores.stride(), *((0, 0) if ranks is None else ranks.stride())),
        *(*mask_strides, 0 if valid_counts is None else valid_counts.stride(0)),
        *(0 if budgets is None else given.stride(0), *arguments),
        *((scores,) * 3 if budgets is not None else made),
        *(tokens, index, side, patches, width),
        LANES=LANES,
        SIDE_PAD=side_pad,
        BAND=band,
        COLUMNS=columns,
        CHUNKS=triton.cdiv(width, columns),
        HAS_VALID=valid is not None,
        HAS_COUNTS=valid_counts is not None,
        RANKED=ranks is not None,
        WIDE=patches > 1023,
        enable_fp_fusion=False,  # shares as the twin adds them
        **flags,
        **options,
    )
    return Gathered(tokens, index, segments.lengths, made)
