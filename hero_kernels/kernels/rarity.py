"""How unlike each patch is to the others of its image: 1 less its mean cosine with them.

    u_i = x_i / |x_i|                   0 where i is not valid, or |x_i|² is not a normal number of fp32
    m   = Σ_i u_i / count               over the valid patches i of a pool: an image's tiles, or its thumbnail
    q_j = max(0, 1 − u_j · m)           which is 1 − mean_i cos(x_j, x_i)

Shapes: table [B, columns] int32, features [T, P, D] floating point, any strides, valid [T, P] bytes or None;
rarity [T, P] fp32. Workspaces: scales [T, P] fp32, which are 1 / |x|; sums [T, slots, D] fp32 and counts
[T, slots] int32 of blocks of ROWS · STEPS patches; means [2 B, D] fp32, of tiles and of the thumbnail.

1. ``unit_sums_kernel``, grid (slots, T): the scales, and the sum of each block.
2. ``pool_means_kernel``, grid (blocks of columns, 2, B): the means. The crops of a pool are consecutive.
3. ``rarity_kernel``, grid (slots, most crops of an image, B): products with the means.

Blocks begin with their crop and a pool is summed from its first one on: the batch decides nothing.

Bytes: twice T·P·D of the features, of which padding is not read; the sums are a small part.

Source: our own (``hero.policies.hero_plus``).
"""

import torch
import triton
import triton.language as tl

from .. import _launch
from .common import (
    CROPS,
    FIRST_CROP,
    THUMBNAIL,
    WIDTH,
    as_bytes,
    blocks,
    check_width,
    power_of_2,
    valid_patches,
)

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def vectors(features, strides, t, p, some, width, D_PAD: tl.constexpr):
    """``[ROWS, D_PAD]``: the features of patches p in fp32, zero where not ``some``."""
    d = tl.arange(0, D_PAD)[None, :]
    place = t * strides[0] + p.to(tl.int64) * strides[1] + d.to(tl.int64) * strides[2]
    return tl.load(features + place, mask=some & (d < width), other=0.0).to(tl.float32)


@triton.jit
def unit_sums_kernel(
    features,
    valid,
    scales,
    sums,
    counts,
    strides,
    patches,
    width,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    D_PAD: tl.constexpr,
):
    t = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS * STEPS
    total = tl.zeros([ROWS, D_PAD], tl.float32)
    count = tl.zeros([ROWS, 1], tl.int32)
    for step in range(0, STEPS):
        p = first + step * ROWS + tl.arange(0, ROWS)[:, None]
        ok = valid_patches(valid, t, p, p < patches, patches)
        x = vectors(features, strides, t, p, ok, width, D_PAD)
        square = tl.sum(x * x, 1)[:, None]
        some = (square >= TINY) & (square < float("inf"))  # NaN is neither
        scale = tl.where(some, tl.rsqrt(tl.where(some, square, 1.0)), 0.0)
        total += tl.where(some, x, 0.0) * scale
        count += ok.to(tl.int32)
        tl.store(scales + t * patches + p, scale, mask=p < patches)
    slot = t * tl.num_programs(0) + tl.program_id(0)
    d = tl.arange(0, D_PAD)
    tl.store(sums + slot * width + d, tl.sum(total, 0), mask=d < width)
    tl.store(counts + slot, tl.sum(tl.sum(count, 1), 0))


@triton.jit
def pool_means_kernel(table, sums, counts, means, slots, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    image = table + tl.program_id(2) * WIDTH
    thumbnail = tl.load(image + THUMBNAIL)
    begin = (thumbnail == 0).to(tl.int32)
    crops = tl.load(image + CROPS) - (thumbnail >= 0).to(tl.int32)
    if tl.program_id(1) == 1:
        begin = tl.maximum(thumbnail, 0)
        crops = (thumbnail >= 0).to(tl.int32)
    first = (tl.load(image + FIRST_CROP) + begin).to(tl.int64) * slots
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for start in range(0, crops * slots, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < crops * slots
        count += tl.load(counts + first + row, mask=inside, other=0)
        place = sums + (first + row)[:, None] * width + d
        total += tl.load(place, mask=inside[:, None] & (d < width), other=0.0)
    mean = tl.sum(total, 0)[None, :] / tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    pool = (tl.program_id(2) * 2 + tl.program_id(1)).to(tl.int64)
    tl.store(means + pool * width + d, mean, mask=d < width)


@triton.jit
def rarity_kernel(
    table,
    features,
    scales,
    means,
    rarity,
    strides,
    patches,
    width,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    D_PAD: tl.constexpr,
):
    image = table + tl.program_id(2) * WIDTH
    crop = tl.program_id(1)
    if crop < tl.load(image + CROPS):
        t = (tl.load(image + FIRST_CROP) + crop).to(tl.int64)
        pool = tl.program_id(2) * 2 + (crop == tl.load(image + THUMBNAIL)).to(tl.int32)
        first = tl.program_id(0) * ROWS * STEPS
        d = tl.arange(0, D_PAD)[None, :]
        mean = tl.load(means + pool.to(tl.int64) * width + d, mask=d < width, other=0.0)
        for step in range(0, STEPS):
            p = first + step * ROWS + tl.arange(0, ROWS)[:, None]
            scale = tl.load(scales + t * patches + p, mask=p < patches, other=0.0)
            x = vectors(features, strides, t, p, scale > 0.0, width, D_PAD)
            cosine = tl.sum(x * mean, 1)[:, None] * scale
            tl.store(rarity + t * patches + p, tl.maximum(1.0 - cosine, 0.0), mask=p < patches)


def rarity(features, segments, valid):
    crops, patches, width = features.shape
    check_width(features)
    device, images = features.device, len(segments.images)
    options = _launch.configuration("rarity", width, device)
    slots = blocks(patches, options["ROWS"] * options["STEPS"])
    scales, found = (torch.empty((crops, patches), dtype=torch.float32, device=device) for _ in range(2))
    sums = torch.empty((crops, slots, width), dtype=torch.float32, device=device)
    counts = torch.empty((crops, slots), dtype=torch.int32, device=device)
    means = torch.empty((2 * images, width), dtype=torch.float32, device=device)
    table = segments.table(device)
    shared = {"features": features, "strides": features.stride(), "patches": patches, "scales": scales}
    shared |= {"width": width, "D_PAD": power_of_2(width, 16), "enable_fp_fusion": True, **options}
    _launch.launch(
        unit_sums_kernel, (slots, crops), valid=as_bytes(valid), sums=sums, counts=counts, **shared
    )
    columns = _launch.configuration("pool_means", width, device)
    _launch.launch(
        pool_means_kernel,
        (blocks(width, columns["COLUMNS"]), 2, images),
        table=table,
        sums=sums,
        counts=counts,
        means=means,
        slots=slots,
        width=width,
        enable_fp_fusion=True,
        **columns,
    )
    grid = slots, segments.most_crops, images
    _launch.launch(rarity_kernel, grid, table=table, means=means, rarity=found, **shared)
    return found
