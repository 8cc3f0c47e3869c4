"""Write the tables and plots of ``docs`` and the README from the records in ``bench/results``.

``python -m bench.report`` replaces what stands between the markers of each benchmark in
``docs/benchmarks.md``, ``docs/quality.md`` and the README, and draws the two plots. ``--check`` writes
nothing and fails if a page or a plot does not show what the records say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .page import inside, replace, source, svg, table
from .records import ROOT
from .report_quality import render_quality

__all__ = ["main", "render", "replace", "table"]

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
Section = tuple[str, Callable[[Mapping], bool], Callable[[Sequence[Mapping]], list[str]]]


# --- helpers ---------------------------------------------------------------------------------------------


def ratio(comparison: Mapping | None) -> str:
    """The median of the ratios within rounds, and its interval."""
    if comparison is None:
        return ""
    low, high = comparison["interval"]
    return f"{comparison['paired']:.3f} ({low:.3f} to {high:.3f})"


def verdict(comparison: Mapping, limit: float) -> str:
    """Whether a ratio is at most a limit, by its whole interval."""
    low, high = comparison["interval"]
    if comparison["pairs"] < 5:
        return "not decided: too few rounds"
    if high <= limit:
        return "met"
    return "missed" if low > limit else "not decided: the interval includes it"


def inverse(comparison: Mapping) -> Mapping:
    low, high = comparison["interval"]
    return {**comparison, "paired": 1 / comparison["paired"], "interval": [1 / high, 1 / low]}


def milliseconds(times: Mapping[str, float] | None) -> str:
    """Median and minimum of seconds, in milliseconds."""
    values = (1000 * times[name] for name in ("median", "min")) if times else ()
    return "{} ({})".format(*(f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in values)) if times else ""


# --- end to end ------------------------------------------------------------------------------------------

BEST, TEXT, GRAPH = "hero 0.2", "hero 0.2 + text", "hero 0.2 (graph)"
HEROES = ("hero 1", "hero 0.5", BEST, "hero 0.1")
VARIANTS = ("stock", "stock again", *HEROES, TEXT, GRAPH, f"{TEXT} (graph)", "released")
TITLES = {
    "7b": "LLaVA-NeXT-7B's shape",
    "clip-l": "CLIP-L tower, small language model",
    "mini": "the bundled mini model",
    "small": "tiny shapes",
}


def where(record: Mapping) -> str:
    machine = record["gpu"]["name"] if record["gpu"] else "CPU"
    return f"{machine}, {TITLES[record['shape_name']]}"


def images(record: Mapping, batch: str) -> str:
    return f"{batch} image{'s' * (batch != '1')}, {record['batches'][batch]['crops']} crops"


def targets(records: Sequence[Mapping]) -> list[str]:
    """One row for each target, from the record that it is about."""
    if not records:
        return ["Not measured yet."]
    gpu = next((one for one in records if one["gpu"] and one["shape_name"] == "7b"), None)
    rows = []

    def row(what: str, measured: str | None, met: str | bool) -> None:
        met = {True: "met", False: "missed"}.get(met, met)
        rows.append([what, measured or "", met if measured else "not measured"])

    def at_most(what: str, limit: float, comparison: Mapping | None) -> None:
        row(what, ratio(comparison), comparison and verdict(comparison, limit))

    def at_least(what: str, limit: float, comparison: Mapping | None) -> None:
        row(what, ratio(comparison), comparison and verdict(inverse(comparison), 1 / limit))

    for batch in ("1", "8"):
        at, found = f", batch {batch}", inside(gpu, "summary", batch)
        counts = inside(gpu, "counts", batch) or {}
        at_most(
            f"1. vision stage at R = 0.2, to stock: at most 0.95{at}", 0.95, inside(found, "vision", BEST)
        )
        at_most(f"1. the same with text relevance: at most 1.00{at}", 1.0, inside(found, "vision", TEXT))
        released = inside(found, "released_vision", TEXT)
        at_least(f"2. vision stage as released, to hero with text: at least 5{at}", 5.0, released)
        peaks = [inside(counts, name, "peak_bytes") for name in ("released", TEXT)]
        memory = None if None in peaks else peaks[0] / max(peaks[1], 1)
        row(f"2. its peak memory, likewise: at least 5{at}", memory and f"{memory:.1f}", (memory or 0) >= 5)
        first = inside(found, "ttft", BEST, "to_stock")
        at_least(f"5. time to first token, stock to R = 0.2: at least 3{at}", 3.0, first and inverse(first))
        for name in (BEST, TEXT):
            waits = inside(counts, name, "waits")
            what = f"6. host-device synchronisations in the vision stage, {name}: none{at}"
            row(what, None if waits is None else f"{waits}", waits == 0)
    for name in (BEST, TEXT):
        one, eight = (inside(gpu, "counts", batch, name, "launches") for batch in ("1", "8"))
        known = one is not None and eight is not None
        # Images of unlike size are put together, and a larger product may be split otherwise.
        what = f"6. launches at batch 1 and 8, {name}: at most 1.05 times as many"
        row(what, f"{one} and {eight}" if known else None, known and eight <= 1.05 * one)
    graph = inside(gpu, "summary", "1", "vision", GRAPH)
    failed = any(f"{GRAPH}, batch 1" in one["what"] for one in inside(gpu, "failed") or ())
    text = f"{ratio(graph)} of stock" if graph else "it failed" if failed else None
    row("6. the vision stage in a CUDA graph, batch 1", text, bool(graph))
    return table(["target", "measured", ""], rows)


def overview(records: Sequence[Mapping]) -> list[str]:
    """For the README: the ratios to stock at R = 0.2 of every batch measured, and where they come from."""
    if not records:
        return ["Not measured yet."]
    records = sorted(records, key=lambda record: not record["gpu"])
    rows, names = [], []
    for record in records:
        gpu, versions = record["gpu"], record["versions"]
        names.append(
            f"{where(record)}: {'GPU' if gpu else record['machine']['cpu']}, torch {versions['torch']}, "
            f"transformers {versions['transformers']}, commit {(record['commit']['hash'] or 'unknown')[:7]}, "
            f"{record['date']}."
        )
        for batch in record["batches"]:
            found = record["summary"].get(batch)
            paths = (("vision", BEST), ("vision", GRAPH), ("ttft", BEST, "to_stock"), ("vision", "released"))
            cells = [ratio(inside(found, *path)) or "not measured" for path in paths]
            rows.append([f"{where(record)}, {images(record, batch)}", *cells])
    if not records[0]["gpu"]:
        rows.append(["GPU", *["not measured"] * 4])
    head = [
        "time to the stock model's",
        "vision stage",
        "with CUDA graphs",
        "first token",
        "released method, rewritten",
    ]
    return [*table(head, rows), "", " ".join(names)]


def losses(record: Mapping) -> str:
    """Where hero is slower than stock, or than the method as released."""

    def slower(comparison: Mapping | None) -> bool:
        return bool(comparison and comparison["pairs"] >= 5 and comparison["interval"][0] > 1)

    found = []
    for batch, one in record["summary"].items():
        for group, what in (("vision", "the vision stage"), ("ttft", "the first token")):
            for name in VARIANTS:
                comparison = inside(one, group, name, *(["to_stock"] if group == "ttft" else []))
                if name.startswith("hero") and slower(comparison):
                    found.append(f"{what} of {name} at batch {batch}, {ratio(comparison)}")
            for name, comparison in one[f"released_{group}"].items():
                comparison = comparison and inverse(comparison)
                if slower(comparison):
                    found.append(f"{what} of {name} at batch {batch} against released, {ratio(comparison)}")
    if not found and max((one["rounds"] for one in record["series"]), default=0) < 5:
        return "Slower than stock or released: too few rounds to say."
    return f"Slower than stock or released, interval above 1: {'; '.join(found) or 'nothing'}."


def end_to_end(record: Mapping) -> list[str]:
    """The tables of ``bench.end_to_end``, one for each batch."""
    lines = source(record)
    head = ["", "tokens", "vision, ms", "to stock", "first token, ms", "to stock"]
    head += ["launches" if record["gpu"] else "operations", "syncs", "peak, MiB"]
    for batch, described in record["batches"].items():
        found, counts = record["summary"].get(batch), record["counts"].get(batch, {})
        if not inside(found, "vision"):
            continue
        rows = []
        for name in VARIANTS:
            if name not in found["vision"] or name == "stock again":
                continue
            first, count = found["ttft"].get(name), counts.get(name)
            rows.append([name, str(described["visual_tokens"].get(name, ""))])
            rows[-1] += [milliseconds(found["times"]["vision"][name]), ratio(found["vision"][name])]
            rows[-1] += [milliseconds(found["times"]["ttft"].get(name)), ratio(inside(first, "to_stock"))]
            launches = "?" if inside(count, "launches") is None else count["launches"]
            rows[-1] += (
                [f"{launches}", f"{count['waits']}", f"{count['peak_bytes'] / 2**20:.0f}"]
                if count
                else [""] * 3
            )
        sizes = ", ".join(dict.fromkeys(f"{height} × {width}" for height, width in described["images"]))
        rounds = max(series["rounds"] for series in record["series"] if series["batch"] == batch)
        again = ratio(found["vision"].get("stock again"))
        lines += ["", f"**{images(record, batch)}** of {sizes} px (height × width); {rounds} rounds"]
        lines[-1] += f"; vision of stock again, to stock: {again}" if again else ""
        lines += ["", *table(head, rows)]
    if record["gpu"]:
        lines += ["", "The first token of a (graph) variant includes recording the graph."]
    lines += ["", losses(record)]
    failed = [f"{one['what']}: {one['reason']}" for one in record["failed"]]
    ended = [record["ended"]] if record.get("ended") else []
    for title, found in (("Failed", failed), ("Left out", record["left_out"]), ("Ended early", ended)):
        if found:
            lines += ["", f"{title}: {'; '.join(found)}."]
    return lines


def end_to_end_plot(records: Sequence[Mapping]) -> str | None:
    """Times relative to stock against the keep ratio, one panel for each batch; ``None`` without records."""
    wanted = [
        (record, batch)
        for record in records
        for batch, one in record["summary"].items()
        if len(set(HEROES) & set(one["vision"])) > 1
    ]
    if not wanted:
        return None
    rows = -(-len(wanted) // 2)

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(rows, 2, squeeze=False).flat)
        for (record, batch), axes in zip(wanted, panels):
            found = record["summary"][batch]
            names = [name for name in HEROES if name in found["vision"]]
            keeps = [float(name.removeprefix("hero ")) for name in names]
            for title, colour, path, end in (
                ("vision stage", "#e07b00", "vision", ()),
                ("first token", "#0b57d0", "ttft", ("to_stock",)),
            ):
                ratios = [inside(found, path, name, *end) for name in names]
                if None not in ratios:
                    middle = [one["paired"] for one in ratios]
                    axes.plot(keeps, middle, "o-", color=colour, label=f"{title} {middle[-1]:.2f}")
                    axes.vlines(keeps, *zip(*(one["interval"] for one in ratios)), color=colour)
            axes.axhline(1, color="#222222", linewidth=1, label="stock")
            axes.set(xscale="log", ylim=(0, None), xlabel="keep ratio")
            axes.set_xticks(keeps, [f"{keep:g}" for keep in keeps])
            axes.minorticks_off()
            axes.invert_xaxis()
            axes.set_title(f"{where(record)}\n{images(record, batch)}", loc="left", fontsize=10)
            axes.legend(fontsize=8)
        for axes in panels[len(wanted) :]:
            axes.remove()
        figure.supylabel("time relative to stock; bars: 95 % intervals", fontsize=9)

    return svg(Figure((9, 3.4 * rows), layout="constrained"), draw)


# --- kernels, commits -----------------------------------------------------------------------------------


def kernels(record: Mapping) -> list[str]:
    """The tables of ``bench/run_device``, of the first shape of each operation; peers relative to ours."""
    ceilings, results = record["ceilings"], record["results"]
    lines = source(record)
    if ceilings:
        lines[-1] += (
            f" Measured in the same run: copy {ceilings['bandwidth'] / 1e12:.2f} TB/s, bf16 matrix product "
            f"{ceilings['flops'] / 1e12:.0f} TFLOP/s, smallest launch {ceilings['launch_us']:.1f} µs."
        )
    tests = record["tests"]
    counts = ", ".join(f"{count} {name}" for name, count in (tests.get("counts") or {}).items())
    lines[-1] += f" GPU tests: {tests['status']} ({counts or tests.get('reason', '')})."
    ours = {(one["op"], one["geometry"], one["crops"], one["variant"]): one.get("us") for one in results}
    shapes = {one["op"]: one["geometry"] for one in reversed(results)}
    crops = sorted({one["crops"] for one in results})
    cells, peers, faster, missing = {}, {}, {}, {}
    for one in results:
        name = f"*{one['variant']}*"
        base = ours.get((one["op"], one["geometry"], one["crops"], one["against"]))
        if one["status"] != "ok":
            missing[f"{one['op']}, {name}, {one['status']}: {one['reason']}"] = None
        elif one["ours"] and one["geometry"] == shapes[one["op"]]:
            cells.setdefault((one["variant"], one["geometry"]), {})[one["crops"]] = microseconds(one)
        elif base:
            less, time = " (does less)" * one["less"], one["us"] / base
            peers.setdefault(one["against"], {}).setdefault(name + less, []).append(time)
            if not one["less"] and time < 1:
                where = f"{name} against {one['against']}"
                place = f"{time:.2f} ({one['geometry']} T = {one['crops']})"
                faster.setdefault(where, []).append(place)
    rows = [[*key, *(found.get(count, "") for count in crops)] for key, found in cells.items()]
    head = ["operation", "shape", *(f"T = {count}" for count in crops)]
    lines += ["", "Microseconds [floor] for T crops:", "", *table(head, rows, names=2)]
    lines += ["", "Time of each peer relative to the operation, smallest to largest over all shapes:", ""]
    for against, times in peers.items():
        ranges = (
            f"{name} " + " to ".join(f"{end:.{1 + (end < 1)}f}" for end in (min(found), max(found)))
            for name, found in times.items()
        )
        lines.append(f"- {against}: {'; '.join(ranges)}")
    texts = "; ".join(f"{what}: {', '.join(places)}" for what, places in faster.items())
    lines += ["", f"Peers that do the same work in less time, relative to the operation: {texts or 'none'}."]
    return [*lines, "", f"Not timed, at one shape at least: {'; '.join(missing) or 'nothing'}."]


def microseconds(one: Mapping) -> str:
    """A time and its floor; † marks calls timed by the host's clock, ‡ inputs that fit into the L2 cache."""
    text = f"{one['us']:.1f}" if one["us"] < 1000 else f"{one['us']:.0f}"
    text += " †" if one["timing"] != "graph" else "" if one["cold"] else " ‡"
    return text + ("" if one["floor_us"] is None else f" [{one['floor_us']:.1f}]")


def compare(record: Mapping) -> list[str]:
    """The table of ``bench.compare``."""
    commits = " and ".join(record["commits"][side][:12] for side in ("base", "head"))
    rows = [
        [
            one["case"],
            milliseconds(one["base"]),
            milliseconds(one["head"]),
            ratio(one),
            f"{one['difference']:.1g}",
        ]
        for one in record["results"]
    ]
    head = ["case", "base, ms", "head, ms", "head / base", "largest difference of results"]
    details = f"{record['rounds']} rounds a pair of processes", f"commits {commits}"
    return [*source(record, *details), "", *table(head, rows)]


# --- pages -----------------------------------------------------------------------------------------------


def each(renderer: Callable[[Mapping], list[str]]) -> Callable[[Sequence[Mapping]], list[str]]:
    """The tables of several records, one after another."""
    return lambda records: [line for record in records for line in ["", *renderer(record)]][1:]


def is_real(record: Mapping) -> bool:
    """Whether a record is one of ``bench.end_to_end`` that says something."""
    return record["benchmark"] == "end_to_end" and not record["small"]


def of_shapes(gpu: bool, mini: bool) -> Callable[[Mapping], bool]:
    return lambda record: (bool(record["gpu"]), record["shape_name"] == "mini") == (gpu, mini)


# Markers -> (benchmark, which of its records, their lines).
SECTIONS: dict[str, Section] = {
    "targets": ("end_to_end", is_real, targets),
    "end_to_end_cpu": ("end_to_end", of_shapes(False, False), each(end_to_end)),
    "end_to_end_mini": ("end_to_end", of_shapes(False, True), each(end_to_end)),
    "end_to_end_gpu": ("end_to_end", of_shapes(True, False), each(end_to_end)),
    "compare": ("compare", lambda record: True, each(compare)),
    "kernels": ("kernels", lambda record: True, each(kernels)),
}
ELSEWHERE = ("quality",)  # records on other pages


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
        found = [record for record in records if record["benchmark"] == benchmark and wanted(record)]
        page = replace(page, name, lines_of(found) if found or name == "targets" else ["Not measured yet."])
    return page


def same(file: Path, text: str) -> bool:
    """Whether a file says what it should. Of a plot the words are compared: lines depend on matplotlib."""
    if not file.exists():
        return False
    found = file.read_text(encoding="utf-8")
    words = re.compile(r">([^<>]*)</text>")
    return words.findall(found) == words.findall(text) if file.suffix == ".svg" else found == text


def main(arguments: Sequence[str]) -> int:
    """Run the command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records")
    help = "page; quality.md is beside it, README.md above"
    parser.add_argument("--page", type=Path, default=PAGE, help=help)
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date; write nothing")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    real = [record for record in records if is_real(record)]
    page, readme = options.page, options.page.resolve().parent.parent / "README.md"
    wanted: dict[Path, str | None] = {page: render(page.read_text(encoding="utf-8"), records)}
    wanted[page.with_suffix(".svg")] = end_to_end_plot(real)
    if readme.exists():
        wanted[readme] = replace(readme.read_text(encoding="utf-8"), "speed", overview(real))
    quality_page = page.with_name("quality.md")
    if quality_page.exists():
        text, plot = render_quality(quality_page.read_text(encoding="utf-8"), records)
        wanted |= {quality_page: text, quality_page.with_suffix(".svg"): plot}
    stale = [file for file, text in wanted.items() if text is not None and not same(file, text)]
    if options.check and stale:
        names = ", ".join(file.name for file in stale)
        print(f"out of date: {names}: run python -m bench.report", file=sys.stderr)
        return 1
    for file in stale:
        file.write_text(wanted[file], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
