"""Statistics of a record of ``bench.quality``: accuracy, paired differences, intervals and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hero.policies import POLICIES

from .mini import scenes

__all__ = ["answers_of", "bits", "difference", "estimate", "summarise", "targets", "unbits"]

RESAMPLES = 10_000


def estimate(values: np.ndarray) -> dict[str, object]:
    """Mean of values in {−1, 0, 1}, its standard error and its 95 % percentile bootstrap interval.

    A resample of such values is drawn as three counts. The seed is fixed.
    """
    values = np.asarray(values, dtype=np.int8)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values: expected a list of at least one, got shape {values.shape}")
    if np.abs(values).max() > 1:
        raise ValueError("values: expected −1, 0 and 1 alone")
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
    values = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    if len(values) != -(-count // 8) * 8:
        raise ValueError(f"text: expected the bits of {count} answers, got {len(text)} digits")
    return values[:count].astype(bool)


def groups_of(record: Mapping) -> dict[str, np.ndarray]:
    """Questions of each group: one attribute, each kind, all."""
    kinds = {name: unbits(text, record["questions"]) for name, text in record["kinds"].items()}
    one = [kind for name, kind in kinds.items() if name in scenes.ONE_ATTRIBUTE]
    groups = {"one attribute": np.any(one, axis=0)} if one else {}
    return {**groups, **kinds, "all": np.ones(record["questions"], dtype=bool)}


def answers_of(record: Mapping) -> dict[tuple[str, str], np.ndarray]:
    """Right answers of each (variant, keep ratio)."""
    return {
        (name, ratio): unbits(cell["right"], record["questions"])
        for name, variant in record["variants"].items()
        for ratio, cell in variant["keep"].items()
    }


def summarise(record: Mapping) -> dict[str, object]:
    """Accuracy of each group, variant and keep ratio, and paired differences to ``full`` and ``hero``.

    The oracle stands where every question of a group is about boxes.
    """
    right, boxed = answers_of(record), unbits(record["boxed"], record["questions"])
    summary = {}
    for group, members in groups_of(record).items():
        if not members.any():
            continue
        cells: dict[str, dict[str, object]] = {}
        for (name, ratio), values in right.items():
            if record["variants"][name]["oracle"] and not boxed[members].all():
                continue
            cell = {"accuracy": estimate(values[members])}
            for base, key in (("full", ("full", "1")), ("hero", ("hero", ratio))):
                if key in right and name not in ("full", base):
                    cell[f"to_{base}"] = difference(values[members], right[key][members])
            cells.setdefault(name, {})[ratio] = cell
        summary[group] = {"questions": int(members.sum()), "variants": cells}
    return summary


def targets(record: Mapping) -> list[dict[str, object]]:
    """The differences that the page judges, with their limits, as far as they were measured.

    Those of ``hero`` are about one attribute; those of ``hero+`` about all questions and about counts.
    """
    right, groups = answers_of(record), groups_of(record)
    one, everything, found = "one attribute", "all", []

    def target(what: str, keep: str, name: str, other: str, limit: float, group: str) -> None:
        first, second = (name, keep), (other, "1" if other == "full" else keep)
        if first in right and second in right and group in groups:
            gap = difference(right[first][groups[group]], right[second][groups[group]])
            low, high = gap["interval"]
            verdict = "met" if low >= limit else "missed" if high < limit else "undecided"
            what = f"{what}, R = {keep}, {group}"
            found.append({"what": what, "difference": gap, "limit": limit, "verdict": verdict})

    def misled(name: str, group: str) -> None:
        for keep in record["keep"]:
            what = f"{name} with another scene's question to equal budgets"
            target(what, f"{keep:g}", f"{name}-other-question", "uniform", -0.01, group)

    peers = [
        name
        for name, variant in record["variants"].items()
        if name in POLICIES and variant["text"] == "none" and name not in ("hero", "hero+", "random")
    ]
    target("hero to all tokens", "0.2", "hero", "full", -0.01, one)
    target("hero to random", "0.2", "hero", "random", 0.10, one)
    for name in peers:
        target(f"hero to {name}", "0.2", "hero", name, 0.0, one)
    if peers and ("hero", "0.05") in right and one in groups:
        best = max(peers, key=lambda name: right[name, "0.05"][groups[one]].mean())
        target(f"hero to the best peer, {best}", "0.05", "hero", best, 0.05, one)
    misled("hero", one)
    target("hero+ to hero", "0.1", "hero+", "hero", 0.0, everything)
    if "count" in groups and ("full", "1") in right:
        fifth = float(right["full", "1"][groups["count"]].mean()) / 5
        target("hero+ to all tokens", "0.2", "hero+", "full", -fifth, "count")
    misled("hero+", everything)
    return found
