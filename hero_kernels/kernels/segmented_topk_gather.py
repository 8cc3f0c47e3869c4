"""Top-k, packing in stitched raster order, and gather: ragged batches, two launches.

    tokens[row] = features[index[row]],  index = the kept patches and newlines of each image in the order in
    which the model packs them (docs/method.md, 4 and 5)

Shapes: features [T, P, D] in any dtype and strides; scores [T, P] in fp32, fp16 or bf16, or ranks [T, P]
int16; valid [T, P] bytes or None, valid_counts [T] int32 or int64 or None, budgets [T] int32 or int64, table
[B, columns] int32, all contiguous; tokens [rows, D], index [rows] int32.

``select_kernel``, grid (bands of the longest image, B). The rows of an image fall into bands: the thumbnail,
or one grid row of tiles, whose patch rows interleave. A program finds the kept patches of each tile of its
band, from scores (top-k) or ranks, as one bit mask per patch row. A sum over the budgets of earlier crops
shows where the band begins, cumulative sums of bits where each patch goes, and it scatters the index.

``gather_rows_kernel``, grid (blocks of ROWS rows): copies the rows that the index names, 16 bytes per access,
and writes zeros for newlines and empty rows.

No sort, no atomics, no host-device synchronisation: every row has one owner, and all sizes are known on the
host. Budgets are an input: with ``signals``, :mod:`.tile_budgets` is launched first; so is a count of the
mask where the counts are not given.

Bytes: the scores, T·P·4, or the ranks, T·P·2, once; kept features in and out, 2·total·D of their dtype; the
index out and in.

Source: the packing of LLaVA-NeXT (``pack_image_features`` in transformers); the kernels are our own.
"""

import torch
import triton
import triton.language as tl

from .. import _launch
from ..segments import Gathered, Segments
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
    blocks,
    order_key,
    power_of_2,
    valid_patches,
)
from .segmented_topk import check_patches, topk_mask
from .tile_budgets import lanes_of, tile_budgets

MAX_FEATURES = 8192
FILL = tl.constexpr(1024)  # empty rows written at once


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
def select_kernel(
    scores,
    ranks,
    valid,
    valid_counts,
    budgets,
    table,
    index,
    side,
    patches,
    LANES: tl.constexpr,
    SIDE_PAD: tl.constexpr,
    BAND: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``index`` of one band: ``crop · P + patch`` of kept patches, −1 for newlines, −2 for empty rows."""
    band = tl.program_id(0)
    image = table + tl.program_id(1) * WIDTH
    first = tl.load(image + FIRST_CROP)
    promised = tl.load(image + TABLE_ROWS)
    crops = tl.load(image + CROPS)
    thumbnail = tl.load(image + THUMBNAIL)
    grid_width = tl.load(image + GRID_WIDTH)
    newline_begin = tl.load(image + NEWLINE_BEGIN)
    newline_end = tl.load(image + NEWLINE_END)
    thumbnail_newline = tl.load(image + THUMBNAIL_NEWLINE)
    first_tile = (thumbnail == 0).to(tl.int32)
    grid_height = (crops - (thumbnail >= 0).to(tl.int32)) // grid_width
    thumbnail_band = tl.where(thumbnail > 0, grid_height, thumbnail)
    bands = grid_height + (thumbnail >= 0).to(tl.int32)
    if band < bands:
        # The crops of the band, and the newline of each of its patch rows.
        is_stitched = band != thumbnail_band
        lead = tl.where(is_stitched, first_tile + (band - first_tile) * grid_width, thumbnail)
        tiles = tl.where(is_stitched, grid_width, 1)
        r = tl.arange(0, SIDE_PAD)
        top = (band - first_tile) * side  # stitched patch rows of the tiles before the band
        has_newline = tl.where(
            is_stitched,
            (r < side) & (top + r >= newline_begin) & (top + r < newline_end),
            (r == side - 1) & (thumbnail_newline != 0),
        ).to(tl.int32)

        # Where the band begins and ends among the rows of the image; crops are in sequence order.
        lane = tl.arange(0, LANES)
        inside = lane < crops
        kept = tl.load(budgets + first + lane, mask=inside, other=0)
        if valid_counts is not None:
            kept = tl.minimum(kept, tl.load(valid_counts + first + lane, mask=inside, other=0))
        kept = tl.maximum(tl.minimum(kept, patches), 0).to(tl.int32)
        begin = tl.sum(tl.where(lane < lead, kept, 0), 0)
        begin += tl.maximum(tl.minimum(top, newline_end) - newline_begin, 0)
        begin += tl.where((thumbnail == 0) & (band > 0), thumbnail_newline, 0)
        end = begin + tl.sum(tl.where((lane >= lead) & (lane < lead + tiles), kept, 0), 0)
        end = tl.minimum(end + tl.sum(has_newline, 0), promised)

        # The kept patches: for each patch row and tile a bit mask of columns; and how many a patch row has.
        g = tl.arange(0, BAND)
        column = tl.arange(0, SIDE_PAD)[None, :]
        words = tl.zeros([SIDE_PAD, BAND], tl.int64)
        length = tl.zeros([SIDE_PAD], tl.int32)
        for i in range(0, tiles):
            crop = (first + lead + i).to(tl.int64)
            k = tl.sum(tl.where(lane == lead + i, kept, 0), 0)
            keep = kept_patches(scores, ranks, valid, crop, k, side, patches, SIDE_PAD, WIDE)
            word = tl.sum(keep.to(tl.int64) << column.to(tl.int64), 1)
            words = tl.where(g[None, :] == i, word[:, None], words)
            length += tl.sum(keep.to(tl.int32), 1)

        # Rows of the image after each patch row, its newline included; then each tile fills its part.
        row_end = begin + tl.cumsum(length + has_newline, 0)
        place = row_end - length - has_newline
        index += tl.load(image + FIRST_ROW).to(tl.int64)
        for i in range(0, tiles):
            word = tl.sum(tl.where(g[None, :] == i, words, 0), 1)
            bit = ((word[:, None] >> column.to(tl.int64)) & 1).to(tl.int32)
            row = place[:, None] + tl.cumsum(bit, 1) - bit
            source = (first + lead + i) * patches + r[:, None] * side + column
            tl.store(index + row, source, mask=(bit != 0) & (row < end))
            place += tl.sum(bit, 1)
        tl.store(index + place, tl.full([SIDE_PAD], -1, tl.int32), mask=(has_newline != 0) & (place < end))

        # The last band fills what budgets and masks leave of the promised rows.
        filled = tl.minimum(tl.max(row_end, 0), end)
        end = tl.where(band == bands - 1, promised, end)
        for start in range(filled, end, FILL):
            row = start + tl.arange(0, FILL)
            tl.store(index + row, tl.full([FILL], -2, tl.int32), mask=row < end)


@triton.jit
def gather_rows_kernel(
    features,
    index,
    tokens,
    feature_strides,
    total,
    patches,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """``tokens[row] = features[index[row]]``, 0 where the index is negative."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    source = tl.load(index + row, mask=row < total, other=-1)
    crop = source // patches
    base = features + crop.to(tl.int64) * feature_strides[0]
    base += (source - crop * patches).to(tl.int64) * feature_strides[1]
    out = tokens + row.to(tl.int64) * width
    for chunk in tl.static_range(CHUNKS):
        feature = chunk * COLUMNS + d
        place = base[:, None] + feature[None, :] * feature_strides[2]
        in_d = (feature < width)[None, :]
        value = tl.load(place, mask=(source >= 0)[:, None] & in_d, other=0.0)
        tl.store(out[:, None] + feature[None, :], value, mask=(row < total)[:, None] & in_d)


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


def segmented_topk_gather(
    features, scores, segments, valid, budgets, signals, allocation, ranks, valid_counts
):
    lanes = lanes_of(segments)
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
    total = segments.total
    tokens = torch.empty((total, width), dtype=features.dtype, device=device)
    index = torch.empty((total,), dtype=torch.int32, device=device)
    _launch.launch(
        select_kernel,
        (segments.bands, len(segments.images)),
        scores=scores.contiguous() if ranks is None else None,
        ranks=None if ranks is None else ranks.contiguous(),
        valid=as_bytes(valid),
        valid_counts=None if valid_counts is None else valid_counts.contiguous(),
        budgets=budgets.budgets.contiguous(),
        table=segments.table(device),
        index=index,
        side=segments.side,
        patches=patches,
        LANES=lanes,
        SIDE_PAD=power_of_2(segments.side, 4),
        BAND=power_of_2(segments.widest_band),
        WIDE=patches > 1023,
        enable_fp_fusion=True,
        **_launch.configuration("select", patches, device),
    )
    options = _launch.configuration("gather_rows", width, device)
    options["COLUMNS"] = min(options["COLUMNS"], power_of_2(width, 16))
    _launch.launch(
        gather_rows_kernel,
        (blocks(total, options["ROWS"]),),
        features=features,
        index=index,
        tokens=tokens,
        feature_strides=features.stride(),
        total=total,
        patches=patches,
        width=width,
        CHUNKS=blocks(width, options["COLUMNS"]),
        enable_fp_fusion=True,
        **options,
    )
    return Gathered(tokens, index, segments.lengths, budgets)
