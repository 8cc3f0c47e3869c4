"""Rewrite the tables of ``docs/benchmarks.md`` from the records in ``bench/results``. Standard library only.

``python -m bench.report`` puts the tables of each benchmark between its markers and leaves everything else
as it is; ``--check`` changes nothing and fails where the page does not show what the records say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .record import ROOT

__all__ = ["main", "render", "replace"]

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
ENOUGH = 5  # pairs: an interval of fewer decides nothing
TOWER_TARGET = 1.02  # the tower with hero attached against without: docs/benchmarks.md


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; numbers, all but the first column, to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _seconds(times: Mapping[str, float]) -> str:
    return f"{times['median']:.3f} ({times['min']:.3f})"


def _milliseconds(times: Mapping[str, float]) -> str:
    return f"{1000 * times['median']:.1f}"


def _ratio(comparison: Mapping) -> str:
    low, high = comparison["interval"]
    return f"{comparison['paired']:.3f} ({low:.3f} to {high:.3f})"


def _against(comparison: Mapping, limit: float) -> str:
    """What a ratio's interval says about an upper limit."""
    low, high = comparison["interval"]
    if comparison["pairs"] < ENOUGH:
        return "not decided: too few rounds"
    if high <= limit:
        return "met"
    return "missed" if low > limit else "not decided: the interval includes it"


def _provenance(record: Mapping) -> list[str]:
    commit, machine = record["commit"], record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    code = (commit["hash"] or "unknown")[:12] + (", with uncommitted changes" if commit["dirty"] else "")
    small = (
        ["**Tiny shapes, a test of the script: these numbers say nothing.**", ""] if record["small"] else []
    )
    clock = {"wall": "wall-clock time", "cpu": "processor time"}[record["clock"]]
    load = " and ".join(f"{value:.1f}" for value in record["load_average"])
    return [
        *small,
        f"- `{record['command']}`, {record['date']}, {record['rounds']} rounds, {clock}",
        f"- {machine['cpu']}, {record['threads']} of {machine['cores']} cores, {machine['system']}, "
        f"{record['dtype']}; peak memory {record['peak_memory_gib']:.1f} GiB; "
        f"load average before and after {load}",
        f"- commit {code}; {versions}",
        "",
    ]


def cpu_vision(record: Mapping) -> list[str]:
    """The tables of ``bench.cpu_vision``."""
    summary, image, shape = record["summary"], record["image"], record["shape"]
    times, tower, vision, ttft = (summary[name] for name in ("times", "tower", "vision", "ttft"))
    keep = list(vision)
    vit, text, size = (shape[name] for name in ("vision", "text", "crop_size"))
    lines = _provenance(record)

    lines += [
        f"Image of {image['height']} × {image['width']} px, {image['crops']} crops of {size} px; "
        f"vision tower of {vit['layers']} layers, {vit['hidden']} wide; language model of {text['layers']} "
        f"layers, {text['hidden']} wide. Seconds are median (minimum); ratios are the median of the ratios "
        "within rounds (95 % bootstrap interval).",
        "",
        "**Vision tower**",
        "",
    ]
    rows = [
        ["stock, SDPA", _seconds(times["tower"]["stock"]), "1"],
        ["stock once more (what the machine resolves)", "", _ratio(tower["control"])],
        ["hero attached", _seconds(times["tower"]["attached"]), _ratio(tower["attached"])],
        [
            "all that stock runs, scores captured",
            _seconds(times["tower"]["captured"]),
            _ratio(tower["captured"]),
        ],
        ["eager, `output_attentions=True`", _seconds(times["tower"]["eager"]), _ratio(tower["eager"])],
    ]
    lines += _table(["tower", "seconds", "to stock"], rows)
    share = tower["capture_share"]["median"]
    lines += [
        "",
        f"Target, at most {TOWER_TARGET} of stock with hero attached: "
        f"**{_against(tower['attached'], TOWER_TARGET)}**; with all that stock runs: "
        f"**{_against(tower['captured'], TOWER_TARGET)}**. Timed inside the tower, the scores take "
        f"{100 * share:.2f} % of it. Eager attention with its maps takes "
        f"{_ratio(tower['eager_to_attached'])} times as long as the tower with hero attached.",
        "",
        "**Vision stage** (`get_image_features`: tower, projector, packing)",
        "",
    ]
    rows = [["stock", str(record["visual_tokens"]["stock"]), _seconds(times["vision"]["stock"]), "1"]]
    rows += [
        [
            f"keep {name}",
            str(record["visual_tokens"][name]),
            _seconds(times["vision"][name]),
            _ratio(vision[name]),
        ]
        for name in keep
    ]
    lines += _table(["stage", "visual tokens", "seconds", "to stock"], rows)

    stages = times["stages"]
    lines += ["", "**Where hero's time goes**, milliseconds, median", ""]
    once = [_milliseconds(stages[name]) for name in ("prepare", "encode", "capture")]
    after = ("score", "budget", "select", "project")
    rows = [
        [f"keep {name}", *once, *(_milliseconds(stages[f"{stage} {name}"]) for stage in after)]
        for name in keep
    ]
    lines += _table(["", "prepare", "encode", "of it scores", *after], rows)

    lines += [
        "",
        "**Time to first token** (`generate`, one token, from processed inputs). *Predicted* is the vision "
        "stage as measured plus the language model alone on as many tokens, over the same for stock; *free* "
        "is the same with the stock vision stage, as if dropping cost nothing.",
        "",
    ]
    rows = []
    for name in ("stock", *keep):
        tokens = record["prompt_tokens"][name]
        rows.append(
            [
                name if name == "stock" else f"keep {name}",
                str(tokens),
                _seconds(times["prefill"][str(tokens)]),
                _seconds(times["ttft"][name]),
                "1" if name == "stock" else _ratio(ttft[name]["to_stock"]),
                f"{ttft[name]['predicted_to_stock']['paired']:.3f}",
                f"{ttft[name]['free_to_stock']['paired']:.3f}",
                _ratio(ttft[name]["to_predicted"]),
            ]
        )
    head = ["", "prompt tokens", "prefill, s", "first token, s", "to stock", "predicted", "free"]
    lines += _table([*head, "measured / predicted"], rows)

    slower = [
        f"the vision stage at keep {name}, {_ratio(vision[name])}" for name in keep if _loses(vision[name])
    ]
    slower += [
        f"the first token at keep {name}, {_ratio(ttft[name]['to_stock'])}"
        for name in keep
        if _loses(ttft[name]["to_stock"])
    ]
    if _loses(tower["attached"]):
        slower.insert(0, f"the tower, {_ratio(tower['attached'])}")
    if record["rounds"] < ENOUGH:
        slower = slower or ["too few rounds to say"]
    lines += ["", f"Slower than stock, interval above 1: {'; '.join(slower) if slower else 'nothing'}."]
    return lines


def _loses(comparison: Mapping) -> bool:
    return comparison["pairs"] >= ENOUGH and comparison["interval"][0] > 1.0


RENDERERS: dict[str, Callable[[Mapping], list[str]]] = {"cpu_vision": cpu_vision}


def replace(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with other lines between the markers of a benchmark.

    Raises:
        ValueError: the page does not have the markers, once each and in order.
    """
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"page: expected {begin} and {end} once each, in this order")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    return "\n".join([before + begin, "", *lines, "", end + after])


def render(page: str, records: Sequence[Mapping]) -> str:
    """The page with the tables of the records; where there is none of a benchmark, it says so.

    Raises:
        ValueError: a record of an unknown benchmark, or a page without its markers.
    """
    unknown = {record["benchmark"] for record in records} - set(RENDERERS)
    if unknown:
        raise ValueError(f"records: expected {', '.join(RENDERERS)}, got {', '.join(sorted(unknown))}")
    for name, renderer in RENDERERS.items():
        parts = [renderer(record) for record in records if record["benchmark"] == name]
        lines = ["Not measured yet."]
        for number, part in enumerate(parts):
            lines = part if number == 0 else [*lines, "", *part]
        page = replace(page, name, lines)
    return page


def main(arguments: Sequence[str]) -> int:
    """The command: returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to rewrite")
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date; write nothing")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    page = options.page.read_text(encoding="utf-8")
    rendered = render(page, records)
    if options.check:
        if rendered != page:
            print("out of date: run python -m bench.report", file=sys.stderr)
        return int(rendered != page)
    options.page.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
