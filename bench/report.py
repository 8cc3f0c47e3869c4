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
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from . import timing
from .page import replace, source, svg, table
from .records import ROOT
from .report_quality import render_quality

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"


# --- helpers ---------------------------------------------------------------------------------------------


def ratio(comparison: Mapping | None) -> str:
    """The median of the ratios within rounds, and its interval."""
    if comparison is None:
        return ""
    low, high = comparison["interval"]
    return f"{comparison['paired']:.3f} ({low:.3f} to {high:.3f})"


def milliseconds(times: Mapping[str, float] | None) -> str:
    """Median and minimum of seconds, in milliseconds."""
    values = (1000 * times[name] for name in ("median", "min")) if times else ()
    return "{} ({})".format(*(f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in values)) if times else ""


# --- end to end ------------------------------------------------------------------------------------------

BEST, TEXT, EAGER, GRAPH = "hero 0.2", "hero 0.2 + text", "hero 0.2 (eager)", "hero 0.2 (graph)"
HEROES = ("hero 1", "hero 0.5", BEST, "hero 0.1")
VARIANTS = ("stock", "stock again", "stock, compiled", *HEROES, TEXT, EAGER, GRAPH)
VARIANTS += (f"{TEXT} (eager)", f"{TEXT} (graph)", "released")
TITLES = {
    "7b": "LLaVA-NeXT-7B's shape",
    "clip-l": "CLIP-L tower, small language model",
    "small": "tiny shapes",
}


def where(record: Mapping) -> str:
    machine = record["gpu"]["name"] if record["gpu"] else f"CPU ({record['machine']['cpu']})"
    return f"{machine}, {TITLES[record['shape_name']]}"


def images(record: Mapping, batch: str) -> str:
    return f"{batch} image{'s' * (batch != '1')}, {record['batches'][batch]['crops']} crops"


def overview(records: Sequence[Mapping]) -> list[str]:
    """For the README: the ratios to stock at R = 0.2 of every batch measured, and where they come from."""
    if not records:
        return ["Not measured yet."]
    records = sorted(records, key=lambda record: not record["gpu"])
    rows, names = [], []
    for record in records:
        versions, commit = record["versions"], record["commit"]["hash"] or "unknown"
        words = [f"{name} {versions[name]}" for name in ("torch", "transformers")]
        words += [f"commit {commit[:7]}", record["date"]]
        names.append(f"{where(record)}: {', '.join(words)}.")
        for batch in record["batches"]:
            found = record["summary"].get(batch, {"vision": {}, "ttft": {}})
            # Before 0.2.0 CUDA graphs were not the default.
            plain, graph = (EAGER, BEST) if EAGER in found["vision"] else (BEST, GRAPH)
            paths = (("vision", plain), ("vision", graph), ("ttft", BEST), ("vision", "released"))
            cells = [ratio(found[group].get(name)) or "not measured" for group, name in paths]
            rows.append([f"{where(record)}, {images(record, batch)}", *cells])
    if not records[0]["gpu"]:
        rows.append(["GPU", *["not measured"] * 4])
    head = ["time to the stock model's", "vision stage", "with CUDA graphs", "first token"]
    return [*table([*head, "the paper's code, reimplemented"], rows), "", " ".join(names)]


def end_to_end(record: Mapping) -> list[str]:
    """The tables of ``bench.end_to_end``, one for each batch."""
    lines = source(record)
    head = ["", "tokens", "vision, ms", "to stock", "first token, ms", "to stock", "peak, MiB"]
    for batch, described in record["batches"].items():
        if batch not in record["summary"]:
            continue
        found, peaks, rows = record["summary"][batch], record["peak_bytes"][batch], []
        for name in VARIANTS:
            if name not in found["vision"] or name == "stock again":
                continue
            rows.append([name, str(described["visual_tokens"].get(name, ""))])
            for group in ("vision", "ttft"):
                rows[-1] += [milliseconds(found["times"][group].get(name)), ratio(found[group].get(name))]
            rows[-1].append(f"{peaks[name] / 2**20:.0f}" if name in peaks else "")
        sizes = ", ".join(dict.fromkeys(f"{height} × {width}" for height, width in described["images"]))
        rounds = max(series["rounds"] for series in record["series"] if series["batch"] == batch)
        again = ratio(found["vision"].get("stock again"))
        lines += ["", f"**{images(record, batch)}** of {sizes} px (height × width); {rounds} rounds"]
        lines[-1] += f"; vision of stock again, to stock: {again}" if again else ""
        lines += ["", *table(head, rows)]
        unseen = [f"{name} {ratio(one)}" for name, one in found.get("unseen", {}).items() if name != "stock"]
        if unseen:
            lines += ["", f"Vision with image sizes not seen before, to stock: {'; '.join(unseen)}."]
    if record["gpu"] and "attached" not in record:  # then hero was attached anew in each round
        lines += ["", "The first token of a (graph) variant includes recording the graph."]
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
            panel = ("vision stage", "#e07b00", "vision"), ("first token", "#0b57d0", "ttft")
            for title, colour, group in panel:
                ratios = [found[group].get(name) for name in names]
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


# --- towers ----------------------------------------------------------------------------------------------

TOWERS = {
    "llava_next": "CLIP-L/14-336 (LLaVA-NeXT)",
    "llava_onevision": "SigLIP-so400m/14-384, 26 layers (LLaVA-OneVision)",
    "internvl": "InternViT-300M/14-448 (InternVL3), 2 × 2 merged",
    "smolvlm": "SigLIP-so400m/14-384, 27 layers (SmolVLM), 3 × 3 merged",
    "qwen2_5_vl": "Qwen2.5-VL-7B's, 32 layers, 2 × 2 merged, one image whole",
    "qwen3_vl": "Qwen3-VL-8B's, 27 layers, 2 × 2 merged, one image whole",
}


def towers(record: Mapping) -> list[str]:
    """The table of ``bench.towers``: each tower's times to stock, and the cost of its scores."""
    policies, rows = record["towers"][0]["to stock"], []
    for one in record["towers"]:
        stock, kept = one["tokens"]
        seconds = timing.summary(one["seconds"]["stock"])["median"]
        rows.append([TOWERS[one["family"]], f"{stock} → {kept}", f"{seconds:.3g}"])
        rows[-1] += [ratio(one["to stock"][name]) for name in policies] + [ratio(one["rows"])]
    head = ["tower", "tokens", "stock, s", *(f"{name} to stock" for name in policies), "uniform to random"]
    details = f"{record['threads']} thread", f"{record['towers'][0]['rows']['pairs']} rounds"
    return [*source(record, *details), "", *table(head, rows)]


# --- kernels --------------------------------------------------------------------------------------------


def kernels(record: Mapping) -> list[str]:
    """The tables of ``bench/run_device``, of the first shape of each operation; peers relative to ours."""
    ceilings, results = record["ceilings"], record["results"]
    lines = source(record)
    if ceilings:
        copies = ceilings.get("copies") or {}  # not in old records
        ways = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in copies.items())
        lines[-1] += (
            f" Measured in the same run: copy {ceilings['bandwidth'] / 1e12:.2f} TB/s"
            f"{f' ({ways})' if ways else ''}, bf16 matrix product "
            f"{ceilings['flops'] / 1e12:.0f} TFLOP/s, smallest launch {ceilings['launch_us']:.1f} µs."
        )
    tests = record["tests"]
    counts = ", ".join(f"{count} {name}" for name, count in (tests.get("counts") or {}).items())
    lines[-1] += f" GPU tests: {tests['status']} ({counts or tests.get('reason', '')})."
    for tool, result in (record.get("sanitizer") or {}).items():
        found = result.get("summary") or result.get("reason")
        lines[-1] += f" compute-sanitizer {tool}: {result['status']}{f' ({found})' if found else ''}."
    ours = {(one["op"], one["geometry"], one["crops"], one["variant"]): one.get("us") for one in results}
    shapes = {one["op"]: one["geometry"] for one in reversed(results)}
    crops = sorted({one["crops"] for one in results})
    cells, peers, missing = {}, {}, {}
    for one in results:
        name = f"*{one['variant']}*"
        base = ours.get((one["op"], one["geometry"], one["crops"], one["against"]))
        if one["status"] != "ok":
            missing[f"{one['op']}, {name}, {one['status']}: {one['reason']}"] = None
        elif one["ours"] and one["geometry"] == shapes[one["op"]]:
            cells.setdefault((one["variant"], one["geometry"]), {})[one["crops"]] = microseconds(one)
        elif base:
            name += " (does less)" * one["less"]
            peers.setdefault(one["against"], {}).setdefault(name, []).append(one["us"] / base)
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
    return [*lines, "", f"Not timed, at one shape at least: {'; '.join(missing) or 'nothing'}."]


def microseconds(one: Mapping) -> str:
    """A time and its floor; † marks calls timed by the host's clock, ‡ inputs that fit into the L2 cache."""
    text = f"{one['us']:.1f}" if one["us"] < 1000 else f"{one['us']:.0f}"
    text += " †" if one["timing"] != "graph" else "" if one["cold"] else " ‡"
    return text + ("" if one["floor_us"] is None else f" [{one['floor_us']:.1f}]")


# --- pages -----------------------------------------------------------------------------------------------


def is_real(record: Mapping) -> bool:
    """Whether a record is one of ``bench.end_to_end`` that says something."""
    return record["benchmark"] == "end_to_end" and not record["small"]


def render(page: str, records: Sequence[Mapping]) -> str:
    """The page with the tables of the records; where there is none of a benchmark, it says so.

    Raises:
        ValueError: a record of an unknown benchmark, or a page without its markers.
    """
    sections: dict[str, list[str]] = {"end_to_end_cpu": [], "end_to_end_gpu": [], "towers": [], "kernels": []}
    for record in records:
        if record["benchmark"] == "end_to_end":
            sections["end_to_end_gpu" if record["gpu"] else "end_to_end_cpu"] += ["", *end_to_end(record)]
        elif record["benchmark"] in ("towers", "kernels"):
            lines = (towers if record["benchmark"] == "towers" else kernels)(record)
            sections[record["benchmark"]] += ["", *lines]
        elif record["benchmark"] != "quality":  # which has a page of its own
            raise ValueError(f"records: expected a known benchmark, got {record['benchmark']!r}")
    for name, lines in sections.items():
        page = replace(page, name, lines[1:] or ["Not measured yet."])
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
