"""Statistics of a record of ``bench.quality``: accuracy, paired differences and intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 10_000
BASES = ("full", "hero+", "hero+-no-text")


def estimate(values: np.ndarray) -> dict[str, object]:
    """Mean of values in {−1, 0, 1}, its standard error and its 95 % percentile bootstrap interval.

    A resample of such values is drawn as three counts. The seed is fixed.
    """
    count = len(values)
    shares = np.array([(values == value).sum() for value in (-1, 0, 1)]) / count
    draws = np.random.default_rng(0).multinomial(count, shares, RESAMPLES)
    low, high = np.percentile((draws[:, 2] - draws[:, 0]) / count, (2.5, 97.5))
    error = values.std(ddof=1) / count**0.5 if count > 1 else float("nan")
    return {
        "mean": round(float(values.mean()), 5),
        "se": round(float(error), 5) if count > 1 else None,
        "interval": [round(float(low), 5), round(float(high), 5)],
    }


def difference(one: np.ndarray, other: np.ndarray) -> dict[str, object]:
    """:func:`estimate` of the paired difference ``one − other`` of right answers."""
    return estimate(one.astype(np.int8) - other.astype(np.int8))


def bits(values: Sequence[bool]) -> str:
    """Right and wrong as hexadecimal digits, the first question in the highest bit."""
    return np.packbits(np.asarray(values, dtype=bool)).tobytes().hex()


def unbits(text: str, count: int) -> np.ndarray:
    """What :func:`bits` wrote, ``[count]`` bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:count].astype(bool)


def groups_of(record: Mapping) -> dict[str, np.ndarray]:
    """Questions of each group: each kind, all."""
    kinds = {name: unbits(text, record["questions"]) for name, text in record["kinds"].items()}
    return {**kinds, "all": np.ones(record["questions"], dtype=bool)}


def answers_of(record: Mapping) -> dict[tuple[str, str], np.ndarray]:
    """Right answers of each (variant, keep ratio)."""
    return {
        (name, ratio): unbits(cell["right"], record["questions"])
        for name, variant in record["variants"].items()
        for ratio, cell in variant["keep"].items()
    }


def summarise(record: Mapping) -> dict[str, object]:
    """Accuracy of each group, variant and keep ratio, and paired differences to ``BASES``."""
    right, summary = answers_of(record), {}
    for group, members in groups_of(record).items():
        if not members.any():
            continue
        cells: dict[str, dict[str, object]] = {}
        for (name, ratio), values in right.items():
            cell = {"accuracy": estimate(values[members])}
            for base in BASES:
                key = base, "1" if base == "full" else ratio
                if key in right and name not in ("full", base):
                    cell[f"to_{base}"] = difference(values[members], right[key][members])
            cells.setdefault(name, {})[ratio] = cell
        summary[group] = {"questions": int(members.sum()), "variants": cells}
    return summary
