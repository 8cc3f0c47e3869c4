"""Pieces that pages are made of: Markdown tables, how numbers are written, text in an SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

__all__ = [
    "ENOUGH",
    "against",
    "clock",
    "code",
    "loses",
    "ratio",
    "small",
    "spread",
    "svg",
    "svg_text",
    "table",
]

ENOUGH = 5  # pairs: an interval of fewer decides nothing
FONT = "font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; numbers, all but the first column, to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def ratio(comparison: Mapping) -> str:
    """The median of the ratios within rounds, and its interval."""
    low, high = comparison["interval"]
    return f"{comparison['paired']:.3f} ({low:.3f} to {high:.3f})"


def against(comparison: Mapping, limit: float) -> str:
    """What a ratio's interval says about an upper limit."""
    low, high = comparison["interval"]
    if comparison["pairs"] < ENOUGH:
        return "not decided: too few rounds"
    if high <= limit:
        return "met"
    return "missed" if low > limit else "not decided: the interval includes it"


def loses(comparison: Mapping | None) -> bool:
    """Whether a ratio is above 1 by its whole interval."""
    return comparison is not None and comparison["pairs"] >= ENOUGH and comparison["interval"][0] > 1.0


def code(record: Mapping) -> str:
    """Commit and versions."""
    commit = record["commit"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    text = (commit["hash"] or "unknown")[:12] + (", with uncommitted changes" if commit["dirty"] else "")
    return f"- commit {text}; {versions}"


def clock(record: Mapping) -> str:
    """What times a record holds."""
    return {"wall": "wall-clock time", "cpu": "processor time"}[record["clock"]]


def small(record: Mapping) -> list[str]:
    """A warning above a record of tiny shapes."""
    if not record["small"]:
        return []
    return ["**Tiny shapes, a test of the script: these numbers say nothing.**", ""]


def svg_text(
    x: float, y: float, words: str, size: float, colour: str, anchor: str = "start", weight: str = "400"
) -> str:
    """Words in a picture, ``y`` their base line."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(words)}</text>'
    )


def svg(width: float, height: float, lines: Sequence[str]) -> str:
    """A picture on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" {FONT}>'
    )
    ground = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, ground, *lines, "</svg>"]) + "\n"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to those wanted as a least gap between neighbours allows, within limits."""
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    groups: list[list[float]] = []  # [sum of wanted starts, members]
    for place in order:
        groups.append([wanted[place], 1.0])
        while len(groups) > 1:
            (above, many), (below, few) = groups[-2:]
            if above / many + gap * (many + 1) / 2 + gap * (few - 1) / 2 <= below / few:
                break
            groups[-2:] = [[above + below, many + few]]
    placed = []
    for total, members in groups:
        start = total / members - gap * (members - 1) / 2
        placed += [start + gap * number for number in range(int(members))]
    for number, place in enumerate(placed):
        placed[number] = max(place, low + gap * number)
    for number in range(len(placed) - 1, -1, -1):
        placed[number] = min(placed[number], high - gap * (len(placed) - 1 - number))
    result = [0.0] * len(wanted)
    for place, number in zip(placed, order):
        result[number] = place
    return result
