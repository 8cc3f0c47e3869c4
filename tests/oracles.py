"""Oracles: what the operations compute, written as plain loops in float64, integers and fractions.

They share nothing with :mod:`hero_kernels`, and no speed is wanted of them.
"""

import math
import random
from fractions import Fraction

import numpy as np
import torch

FIXED_POINT = 2**24


def generator(*seed) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(repr(seed)).getrandbits(32))


def first_difference(ours, theirs):
    """Where two lists part, and what stands there; None if they are equal.

    For long lists: with CI set, pytest explains ``==`` by a whole diff, which takes it minutes.
    """
    if ours == theirs:
        return None
    if len(ours) != len(theirs):
        return "lengths", len(ours), len(theirs)
    place = next(i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
    if isinstance(ours[place], list):
        return place, *first_difference(ours[place], theirs[place])
    return place, ours[place], theirs[place]


def softmax(values):
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    whole = math.fsum(powers)
    return [power / whole for power in powers]


def logits_of(query, keys, scale):
    return [scale * math.fsum(q * k for q, k in zip(query, key)) for key in keys]


def oracle_attention(query, key, scale):
    """Probabilities ``[T][H][M][N]`` of tensors ``[T, H, M, D]`` and ``[T, H, N, D]``."""
    return [
        [[softmax(logits_of(row, keys, scale)) for row in rows] for rows, keys in zip(crop_rows, crop_keys)]
        for crop_rows, crop_keys in zip(query.tolist(), key.tolist())
    ]


def oracle_cls(query, key, scale, second_softmax=False):
    """``[T][N - 1]``: attention of token 0 to the others, mean over heads."""
    scores = []
    for heads in oracle_attention(query[:, :, :1], key, scale):
        rows = [rows[0][1:] for rows in heads]
        if second_softmax:
            rows = [softmax(row) for row in rows]
        scores.append([math.fsum(column) / len(rows) for column in zip(*rows)])
    return scores


def oracle_received(query, key, scale):
    """``[T][N]``: attention that each token receives, mean over heads and queries."""
    received = []
    for heads in oracle_attention(query, key, scale):
        rows = [row for rows in heads for row in rows]
        received.append([math.fsum(column) / len(rows) for column in zip(*rows)])
    return received


def oracle_output(query, key, value, scale):
    """``[T][H][N][D]``: the attention output."""
    return [
        [
            [[math.fsum(p * v for p, v in zip(row, column)) for column in zip(*values)] for row in rows]
            for rows, values in zip(heads, crop_values)
        ]
        for heads, crop_values in zip(oracle_attention(query, key, scale), value.tolist())
    ]


def draw_attention(*seed, crops=2, heads=3, tokens=37, width=8, dtype=torch.float32, count=2):
    """``count`` tensors ``[T, H, N, D]`` of a spread that makes attention uneven."""
    draw = generator(*seed)
    return [(torch.randn(crops, heads, tokens, width, generator=draw) * 1.5).to(dtype) for _ in range(count)]


def attention_maps(query, key, scale, dtype=torch.float64):
    """``[T, H, M, N]``: for larger tensors, where loops take too long. In fp32 it is what PyTorch can do."""
    return torch.einsum("thmd,thnd->thmn", query.to(dtype), key.to(dtype)).mul(scale).softmax(-1)


def oracle_order(scores, valid=None):
    """The valid patches of one crop in the order of selection: a stable sort, highest first, NaN last."""
    patches = [patch for patch in range(len(scores)) if valid is None or valid[patch]]
    # Python's sort is stable, and to it −0 equals 0.
    return sorted(patches, key=lambda p: (1, 0.0) if math.isnan(scores[p]) else (0, -scores[p]))


def oracle_keep(scores, budget, valid=None):
    """One crop: which patches are kept."""
    kept = set(oracle_order(scores, valid)[:budget])
    return [patch in kept for patch in range(len(scores))]


def oracle_exact(total, weights, caps):
    """Water-filling by its definition: λ with Σ min(λ·weight, cap) = total, then the largest remainders.

    Once the tiles that have weight are full, those without share what is left equally.
    """
    left = min(total, sum(caps))
    quota = [Fraction(0)] * len(caps)
    for group in ([i for i, w in enumerate(weights) if w], [i for i, w in enumerate(weights) if not w]):
        weight = {tile: weights[tile] or 1 for tile in group}
        group_total = min(left, sum(caps[tile] for tile in group))
        level, water, open_weight = Fraction(0), Fraction(group_total), sum(weight.values())
        for tile in sorted(group, key=lambda tile: Fraction(caps[tile], weight[tile])):
            level = water / open_weight
            if level * weight[tile] < caps[tile]:
                break  # this one does not overflow, nor do those after it
            water -= caps[tile]
            open_weight -= weight[tile]
            level = Fraction(0)
        for tile in group:
            full = open_weight == 0 or level * weight[tile] >= caps[tile]
            quota[tile] = Fraction(caps[tile]) if full else level * weight[tile]
        assert sum(quota[tile] for tile in group) == group_total
        left -= group_total
    budgets = [math.floor(q) for q in quota]
    missing = min(total, sum(caps)) - sum(budgets)
    order = sorted(range(len(caps)), key=lambda tile: (budgets[tile] - quota[tile], tile))
    for tile in order[:missing]:
        budgets[tile] += 1
    cut = [quota[tile] - math.floor(quota[tile]) for tile in order[missing - 1 : missing + 1]]
    tied = missing > 0 and len(cut) == 2 and cut[0] == cut[1]
    return budgets, tied


def oracle_rounds(total, weights, caps):
    """The same by rounds of plain integers, as docs/method.md has it: quicker, and for any weights."""
    budgets, left = [0] * len(caps), min(total, sum(caps))
    active = [tile for tile, cap in enumerate(caps) if cap]
    while True:
        weight = {tile: weights[tile] if any(weights[i] for i in active) else 1 for tile in active}
        whole = sum(weight.values())
        full = [tile for tile in active if left * weight[tile] >= caps[tile] * whole]
        if not full:
            break
        for tile in full:
            budgets[tile] = caps[tile]
            left -= caps[tile]
        active = [tile for tile in active if tile not in full]
    remainder = {}
    for tile in active:
        budgets[tile], remainder[tile] = divmod(left * weight[tile], whole)
    left -= sum(budgets[tile] for tile in active)
    for tile in sorted(active, key=lambda tile: (-remainder[tile], tile))[:left]:
        budgets[tile] += 1
    return budgets


def oracle_floor(total, weights, caps):
    whole = sum(weights)
    return [min(math.floor(Fraction(total * weight, whole)), cap) for weight, cap in zip(weights, caps)]


def oracle_shares(signals, tiles):
    """In float64; a signal is (values, weight, temperature)."""
    whole = math.fsum(weight for _, weight, _ in signals)
    shares = [0.0] * len(tiles)
    for values, weight, temperature in signals:
        values = [values[tile] for tile in tiles]
        if temperature is not None:
            part = softmax([value / temperature for value in values])
        else:
            values = [max(value, 0.0) for value in values]
            total = math.fsum(values)
            part = [value / total if total else 1.0 / len(tiles) for value in values]
        shares = [share + weight / whole * p for share, p in zip(shares, part)]
    return shares


def oracle_weights(shares):
    return [math.floor(Fraction(share) * FIXED_POINT + Fraction(1, 2)) for share in shares]


def oracle_index(keep, segments):
    """The packed sequence of each image, token by token."""
    side, sequences, first = segments.side, [], 0
    for image in segments.images:
        tiles = [crop for crop in range(first, first + image.crops) if crop - first != image.thumbnail]
        thumbnail, stitched = [], []
        if image.thumbnail >= 0:
            crop = first + image.thumbnail
            thumbnail = [crop * side**2 + patch for patch in range(side**2) if keep[crop][patch]]
            if image.thumbnail_newline:
                thumbnail.append(-1)
        for line in range(len(tiles) // image.grid_width * side):
            for column in range(image.grid_width * side):
                crop = tiles[line // side * image.grid_width + column // side]
                patch = line % side * side + column % side
                if keep[crop][patch]:
                    stitched.append(crop * side**2 + patch)
            if image.newline_rows[0] <= line < image.newline_rows[1]:
                stitched.append(-1)
        last = image.thumbnail == image.crops - 1 and len(tiles) > 0
        sequences.append(stitched + thumbnail if last else thumbnail + stitched)
        first += image.crops
    return sequences


def rarities(features, pools, valid, dtype):
    """``[T, P]``: 1 less the mean cosine with the valid patches of a pool, a list of crops; of all pairs."""
    unit = torch.nn.functional.normalize(features.to(dtype).nan_to_num(torch.inf), dim=-1)
    unit[~features.isfinite().all(-1)] = 0.0
    result = unit.new_ones(valid.shape)
    for pool in pools:
        kept = unit[pool][valid[pool]]
        row = result[pool]
        row[valid[pool]] = (1.0 - (kept @ kept.T).mean(1)).clamp_min(0.0)
        result[pool] = row
    return result


def rounded_features(features):
    """``[n, D]`` integers: each vector made 4000 long, rounded half up, above 2048 to even numbers."""
    out = np.zeros(features.shape, dtype=np.int64)
    for row, vector in enumerate(features.double().tolist()):
        length = math.sqrt(math.fsum(x * x for x in vector)) if all(map(math.isfinite, vector)) else 0.0
        if length:
            out[row] = [math.floor(x * 4000.0 / length + 0.5) for x in vector]
    return out.astype(np.float16).astype(np.int64)


def oracle_diverse(features, budget, rule, quality=None, valid=None):
    """One segment ``[n, D]``: the candidates chosen, in order. Similarities are integers; dpp is in fp32."""
    x = rounded_features(features).astype(np.float64)
    products, n = (x @ x.T).astype(np.int64), len(x)
    left = np.ones(n, bool) if valid is None else valid.numpy().copy()
    quality = np.ones(n, np.float32) if quality is None else quality.numpy()
    similar = np.minimum((products + 256) // 512, 32767).astype(np.int32)
    rest, least = products.astype(np.float32) * np.float32(2.0**-24), np.float32(2.0**-16)
    counted, chosen = np.flatnonzero(left), []
    while left.any() and len(chosen) < budget:
        if rule == "max_min":
            near = (
                np.where(np.eye(n, dtype=bool), -32768, similar)[:, counted]
                if not chosen
                else similar[:, chosen]
            )
            values = -near.max(1)
        elif rule == "coverage":
            covered = similar[:, chosen].max(1, initial=0)
            values = np.maximum(similar - covered, 0)[:, counted].sum(1).astype(np.float32) * quality
        else:
            values = np.maximum(rest.diagonal(), least) * quality * quality
        best = max(np.flatnonzero(left), key=lambda i: values[i])  # the first of equal ones
        if rule == "dpp" and rest[best, best] > least:
            column = rest[best] / np.sqrt(rest[best, best])
            rest = rest - column[:, None] * column
        chosen.append(int(best))
        left[best] = False
    return chosen
