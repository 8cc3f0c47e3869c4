"""What the generated pages share: Markdown tables, the line that names a record's origin, and plots."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


def table(head: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> list[str]:
    """A Markdown table. The first ``names`` columns are aligned to the left, the others to the right."""
    lines = [head, ["---"] * names + ["---:"] * (len(head) - names), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def source(record: Mapping, *details: str) -> list[str]:
    """The line that says where a record comes from: command, date, machine, commit, versions."""
    gpu, machine, commit = record.get("gpu"), record["machine"], record["commit"]
    parts = [f"`{record['command']}`", record["date"], *details]
    if "clock" in record:
        parts.append({"wall": "wall-clock time", "cpu": "processor time"}[record["clock"]])
    if gpu:
        parts.append(f"{gpu['name']}, driver {gpu['driver']}, host {machine['cpu']}")
    else:
        parts.append(f"{machine['cpu']}, {machine['system']}")
    parts += [record["dtype"]] if "dtype" in record else []
    changed = " with uncommitted changes" * bool(commit["dirty"])
    parts.append(f"commit {(commit['hash'] or 'unknown')[:12]}{changed}")
    parts += [f"{name} {version}" for name, version in record["versions"].items()]
    small = ["**Tiny shapes, a test of the script: these numbers say nothing.**", ""]
    return [*(small if record.get("small") else []), ", ".join(parts) + "."]


def replace(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with other lines between the markers of a benchmark.

    Raises:
        ValueError: the page does not have the markers once each and in order.
    """
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"page: expected {begin} and {end} once each, in this order")
    before, rest = page.split(begin)
    return "\n".join([before + begin, "", *lines, "", end + rest.split(end)[1]])


def svg(figure: Figure, draw: Callable[[Figure], None]) -> str:
    """What a function draws on a figure, as an SVG with text as text, the same on every run."""
    with rc_context({"svg.hashsalt": "hero", "svg.fonttype": "none", "font.size": 10}):
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
