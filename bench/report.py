"""Rewrite the tables of ``docs`` and the README from the records in ``bench/results``. Standard library only.

``python -m bench.report`` puts the tables of each benchmark between its markers, in ``docs/benchmarks.md``
or, of ``bench.quality``, in ``docs/quality.md``, with a picture beside either, and leaves everything else as
it is; ``--check`` changes nothing and fails where a page or picture does not show what the records say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import end_to_end_page, quality_page
from .page import clock, code, ratio, small, table
from .record import ROOT

__all__ = ["main", "render", "render_quality", "replace"]

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"


def _microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _tests(record: Mapping) -> str:
    """How the GPU tests of a run ended."""
    tests = record["tests"]
    if not tests.get("counts"):
        return tests["status"] + (f" ({tests['reason']})" if "reason" in tests else "")
    return (
        f"{tests['status']} (" + ", ".join(f"{count} {name}" for name, count in tests["counts"].items()) + ")"
    )


def _machine(record: Mapping) -> list[str]:
    """Where a run of the kernels took place, and the ceilings it was held against."""
    gpu, ceilings = record["gpu"], record["ceilings"]
    lines = [*small(record), f"- `{record['command']}`, {record['date']}, {record['dtype']}"]
    if gpu is None:
        lines.append(
            f"- no GPU: the PyTorch twins, on {record['machine']['cpu']}, {record['machine']['system']}"
        )
    else:
        lines.append(
            f"- {gpu['name']}, {gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_mib']:.0f} MiB, "
            f"driver {gpu['driver']}, {'HIP ' + gpu['hip'] if gpu['hip'] else 'CUDA ' + str(gpu['cuda'])}"
        )
    if ceilings:
        lines.append(
            f"- measured in the same run: copy {ceilings['bandwidth'] / 1e12:.2f} TB/s (in and out), bf16 "
            f"matrix product {ceilings['flops'] / 1e12:.0f} TFLOP/s, smallest launch in a graph "
            f"{ceilings['launch_us']:.1f} µs"
        )
    sanitizer = record["sanitizer"]
    if sanitizer:
        parts = [f"{name} {tool['summary']}" for name, tool in sanitizer.get("tools", {}).items()]
        lines.append(f"- compute-sanitizer: {'; '.join(parts) or sanitizer['reason']}")
    return [*lines, f"- GPU tests: {_tests(record)}", f"{code(record)}; code {record['code']}", ""]


def _row(one: Mapping, ours: Mapping[tuple, float]) -> list[str]:
    """A line of the kernels' table."""
    name = one["variant"] if one["ours"] else f"*{one['variant']}*"
    head = [f"{one['geometry']}, T = {one['crops']}", name]
    if one["status"] != "ok":
        return [*head, f"**{one['status']}**" if one["status"] != "skipped" else "left out", *[""] * 5]
    base = ours.get((one["geometry"], one["crops"], one["against"]))
    ratio = f"{one['us'] / base:.2f}" if base else ""
    return [
        *head,
        _microseconds(one["us"]) + (" †" if one["timing"] != "graph" else "" if one["cold"] else " ‡"),
        f"{one['gb_s']:.0f}",
        "" if one["floor_us"] is None else _microseconds(one["floor_us"]),
        "" if one["floor_share"] is None else f"{100 * one['floor_share']:.0f} %",
        f"({ratio})" if ratio and one["less"] else ratio,
        _microseconds(one["eager_us"]) if "eager_us" in one else "",
    ]


def _faster_peers(results: Sequence[Mapping], ours: Mapping[tuple, float]) -> list[str]:
    """Peers that do as much in less time."""
    lines = []
    for one in results:
        base = ours.get((one["geometry"], one["crops"], one["against"])) if one["status"] == "ok" else None
        if base and not one["less"] and one["us"] < base:
            where, ratio = f"{one['geometry']}, T = {one['crops']}", one["us"] / base
            lines.append(f"- {where}: *{one['variant']}* takes {ratio:.2f} of {one['against']}")
    return lines


def _reasons(results: Sequence[Mapping]) -> list[str]:
    """What was not timed and why, one line for each reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in results:
        if one["status"] not in ("ok", "skipped"):
            where = f"{one['geometry']} T = {one['crops']}"
            found.setdefault((f"{one['variant']}: {one['status']}", one["reason"]), []).append(where)
    return [f"- {what}: {reason} ({'; '.join(where)})" for (what, reason), where in found.items()]


def kernels(record: Mapping) -> list[str]:
    """The tables of ``bench/run_device``."""
    lines = _machine(record)
    by_op: dict[str, list[Mapping]] = {}
    for one in record["results"]:
        by_op.setdefault(one["op"], []).append(one)
    head = ["shape", "", "µs", "GB/s", "floor, µs", "of floor", "to ours", "eager, µs"]
    losses, reasons = [], _reasons(record["results"])
    for op, results in by_op.items():
        ours = {
            (one["geometry"], one["crops"], one["variant"]): one["us"]
            for one in results
            if one["ours"] and one["status"] == "ok"
        }
        rows = table(head, [_row(one, ours) for one in results])
        rows[1] = rows[1].replace("| --- | ---: |", "| --- | --- |", 1)
        lines += [f"**{op}**", "", *rows, ""]
        losses += _faster_peers(results, ours)
    lines += ["**Where a peer that does as much is faster**", "", *(losses or ["Nowhere in this run."]), ""]
    lines += ["**Not timed**", "", *(reasons or ["Nothing was missing."])]
    skipped = sum(one["status"] == "skipped" for one in record["results"])
    return [*lines, *([f"- {skipped} more: left out, the time of the run was over"] if skipped else [])]


def dispatch(record: Mapping) -> list[str]:
    """The table of ``bench.dispatch``."""
    machine = record["machine"]
    rows = []
    for name, ways in record["us"].items():
        values = [ways["public"], ways["operator"], ways["launcher"]]
        rows.append([f"`{name}`", *("not measured" if value is None else f"{value:.1f}" for value in values)])
    return [
        f"- `{record['command']}`, {record['date']}, {record['rounds']} rounds of {record['repeats']} calls, "
        "medians, processor time",
        f"- {machine['cpu']}, one thread, {machine['system']}",
        code(record),
        "",
        *table(["µs of the host", "checks and routing", "`torch.ops` instead", "with the launcher"], rows),
    ]


def _milliseconds(times: Mapping[str, float]) -> str:
    values = (1000 * times[name] for name in ("median", "min"))
    return "{} ({})".format(*(f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values))


def compare(record: Mapping) -> list[str]:
    """The table of ``bench.compare``."""
    base, head = (record["commits"][side][:12] for side in ("base", "head"))
    rows = [
        [
            one["case"],
            _milliseconds(one["base"]),
            _milliseconds(one["head"]),
            ratio(one),
            "0" if one["difference"] == 0 else f"{one['difference']:.1g}",
        ]
        for one in record["results"]
    ]
    machine = record["machine"]
    return [
        f"- `{record['command']}`, {record['date']}, {record['rounds']} rounds a pair of processes, "
        f"{clock(record)}",
        f"- {machine['cpu']}, {machine['system']}; commits {base} and {head}",
        "",
        *table(["case", "base, ms", "head, ms", "head / base", "largest difference of results"], rows),
    ]


def _each(renderer: Callable[[Mapping], list[str]]) -> Callable[[Sequence[Mapping]], list[str]]:
    """The tables of several records, one after another."""

    def render_all(records: Sequence[Mapping]) -> list[str]:
        parts = [renderer(record) for record in records]
        return [line for number, part in enumerate(parts) for line in ([""] * (number > 0) + part)]

    return render_all


def _is_real(record: Mapping) -> bool:
    """Whether a record is one of ``bench.end_to_end`` that says something."""
    return record["benchmark"] == "end_to_end" and not record["small"]


def _targets(records: Sequence[Mapping]) -> list[str]:
    lines = end_to_end_page.targets(records)
    if end_to_end_page.picture(records):
        lines += ["", "![Time relative to stock against the keep ratio](benchmarks.svg)"]
    return lines


# Markers -> (benchmark, which of its records, their lines).
SECTIONS: dict[str, tuple[str, Callable[[Mapping], bool], Callable[[Sequence[Mapping]], list[str]]]] = {
    "targets": ("end_to_end", _is_real, _targets),
    "end_to_end_cpu": (
        "end_to_end",
        lambda record: not record["gpu"] and record["shape_name"] != "mini",
        _each(end_to_end_page.tables),
    ),
    "end_to_end_mini": (
        "end_to_end",
        lambda record: not record["gpu"] and record["shape_name"] == "mini",
        _each(end_to_end_page.tables),
    ),
    "end_to_end_gpu": ("end_to_end", lambda record: bool(record["gpu"]), _each(end_to_end_page.tables)),
    "dispatch": ("dispatch", lambda record: True, _each(dispatch)),
    "compare": ("compare", lambda record: True, _each(compare)),
    "kernels": ("kernels", lambda record: True, _each(kernels)),
}
NO_GPU = "Not measured: no GPU was available so far."
MISSING = {"kernels": NO_GPU, "end_to_end_gpu": NO_GPU}
ELSEWHERE = ("compiled", "quality")  # records on other pages


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
    records = [record for record in records if record["benchmark"] not in ELSEWHERE]
    known = {benchmark for benchmark, _, _ in SECTIONS.values()}
    unknown = {record["benchmark"] for record in records} - known
    if unknown:
        raise ValueError(f"records: expected {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    for name, (benchmark, wanted, lines_of) in SECTIONS.items():
        of_it = [record for record in records if record["benchmark"] == benchmark and wanted(record)]
        lines = lines_of(of_it) if of_it or name == "targets" else [MISSING.get(name, "Not measured yet.")]
        page = replace(page, name, lines)
    return page


def render_readme(page: str, records: Sequence[Mapping]) -> str:
    """The README with the one table of speed that it states."""
    return replace(page, "speed", end_to_end_page.overview([one for one in records if _is_real(one)]))


def render_quality(page: str, records: Sequence[Mapping]) -> tuple[str, str | None]:
    """The page of ``bench.quality``: the tables and the picture of its record, ``None`` without one.

    A record of validation questions is where settings were chosen; its tables stand apart, under ``tried``.

    Raises:
        ValueError: several records of a split, or a page without its markers.
    """
    records = [record for record in records if record["benchmark"] == "quality"]
    splits = [record["split"] for record in records]
    if len(set(splits)) < len(splits):
        raise ValueError(f"records: expected one of quality a split, got {', '.join(splits)}")
    picture = None
    for name, split, lines_of in (
        ("quality", "test", quality_page.tables),
        ("tried", "validation", quality_page.tried),
    ):
        lines = ["Not measured yet."]
        for record in records:
            if record["split"] == split:
                lines = lines_of(record, code(record))
                picture = quality_page.picture(record) if split == "test" else picture
        page = replace(page, name, lines)
    return page, picture


def main(arguments: Sequence[str]) -> int:
    """The command: returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="page; quality.md lies beside it, README.md above"
    )
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date; write nothing")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    wanted = {options.page: render(options.page.read_text(encoding="utf-8"), records)}
    picture = end_to_end_page.picture([one for one in records if _is_real(one)])
    if picture is not None:
        wanted[options.page.with_suffix(".svg")] = picture
    readme = options.page.resolve().parent.parent / "README.md"
    if readme.exists():
        wanted[readme] = render_readme(readme.read_text(encoding="utf-8"), records)
    quality = options.page.with_name("quality.md")
    if quality.exists():
        wanted[quality], picture = render_quality(quality.read_text(encoding="utf-8"), records)
        if picture is not None:
            wanted[quality.with_suffix(".svg")] = picture
    stale = [
        file for file, text in wanted.items() if not file.exists() or file.read_text(encoding="utf-8") != text
    ]
    if options.check:
        if stale:
            names = ", ".join(file.name for file in stale)
            print(f"out of date: {names}: run python -m bench.report", file=sys.stderr)
        return int(bool(stale))
    for file in stale:
        file.write_text(wanted[file], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
