"""The tables of ``docs/quality.md`` and its plot, from the record of ``bench.quality``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from .page import replace, source, svg, table
from .quality_statistics import BASES

FIRST = "number"  # the kind that comes first and is drawn


def label(name: str) -> str:
    """A variant's name as the page has it."""
    for ending, words in (("-no-text", ", no text"), ("-other-question", ", other question")):
        if name.endswith(ending):
            return name.removesuffix(ending) + words
    return "all tokens" if name == "full" else name


def signed(value: float) -> str:
    """Points with a sign; a true minus."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "+0.0" if text == "−0.0" else text


def points(gap: Mapping) -> str:
    return "{} ({} to {})".format(*map(signed, (gap["mean"], *gap["interval"])))


def keeps(record: Mapping) -> list[str]:
    return [f"{keep:g}" for keep in sorted(record["keep"], reverse=True)]


def quality_source(record: Mapping) -> list[str]:
    summary, (rows, columns) = record["summary"], record["grid"]
    amounts = ", ".join(f"{summary[kind]['questions']} {kind}" for kind in record["kinds"] if kind in summary)
    return [
        *source(record, f"{record['seconds']:.0f} s"),
        "",
        f"{record['questions']} questions ({amounts}), split {record['split']} (seed {record['seed']}), "
        f"scenes of {rows} × {columns} tiles; model trained with seed {record['trained']}, weights "
        f"{record['weights']}, questions {record['digest']}",
    ]


def shown(variant: str, keep: str, groups: Sequence[Mapping]) -> str:
    """Accuracy in % in each group of questions at a keep ratio."""
    return " / ".join(f"{100 * group[variant][keep]['accuracy']['mean']:.1f}" for group in groups)


def quality(record: Mapping) -> list[str]:
    """A record of test questions."""
    variants, summary, ratios = record["variants"], record["summary"], keeps(record)
    dropping = {name: one["keep"] for name, one in variants.items() if name != "full"}
    at = [f"R = {keep}" for keep in ratios]
    lines = [*quality_source(record), ""]
    rows = []
    for title, key in (("patches", "patches"), ("patches and newlines", "tokens")):
        rows.append([title, f"{variants['full']['keep']['1'][key]:g}"])
        for keep in ratios:
            counts = {cells[keep][key] for cells in dropping.values()}
            rows[-1].append(" to ".join(f"{count:g}" for count in sorted({min(counts), max(counts)})))
    lines += table(["visual tokens", "all", *at], rows)

    groups = [summary[group]["variants"] for group in (FIRST, "all") if group in summary]
    rows = [[label("full"), shown("full", "1", groups), *[""] * (len(ratios) - 1)]]
    for name, cells in dropping.items():
        rows.append([label(name)])
        for keep in ratios:
            kept = cells[keep]["digits_kept"]
            rows[-1].append(shown(name, keep, groups) + ("" if kept is None else f" / {100 * kept:.1f}"))
    title = "**Accuracy** in %: three-digit numbers / all kinds / digits kept, the share of questions"
    lines += ["", f"{title} for digits of which a patch of each was kept", "", *table(["", *at], rows)]

    bases = [base for base in BASES[1:] if base in variants]
    ends = [keep for keep in ("0.2", "0.1") if keep in ratios]
    rows = []
    for name in dropping:
        cells = summary["all"]["variants"][name]
        gaps = [cells[keep].get(f"to_{base}") for base in bases for keep in ends]
        rows.append([label(name), *("" if gap is None else points(gap) for gap in gaps)])
    lines += ["", "**Difference**, all kinds, in points, paired (95 % interval)", ""]
    lines += table(["", *(f"to {label(base)}, R = {keep}" for base in bases for keep in ends)], rows)

    kinds = {kind: [one["variants"]] for kind, one in summary.items() if kind != "all"}
    rows = [[label("full"), *(shown("full", "1", group) for group in kinds.values())]]
    for name in dropping:
        cells = (" / ".join(shown(name, keep, group) for keep in ends) for group in kinds.values())
        rows.append([label(name), *cells])
    title = f"**By kind of question**, accuracy in % at R = {' / '.join(ends)}"
    return [*lines, "", title, "", *table(["", *kinds], rows)]


def quality_plot(record: Mapping) -> str:
    """Accuracy on three-digit numbers against visual tokens."""
    variants = record["variants"]
    part = record["summary"].get(FIRST, record["summary"]["all"])
    styles = {"full": ("#222222", ":"), "hero": ("#0b57d0", "-"), "hero+": ("#d6336c", "-")}
    styles |= {"uniform": ("#6b6b6b", "-"), "random": ("#a6a6a6", "-")}
    peers = [name for name in variants if label(name) == name and name not in styles]
    styles |= {name: (f"C{number % 10}", "-") for number, name in enumerate(peers)}
    for name in variants:
        base, _, ending = label(name).partition(", ")
        if ending:
            styles[name] = styles.get(base, styles["hero"])[0], "--" if ending == "no text" else ":"

    def draw(figure: Figure) -> None:
        axes, lines, ticks = figure.subplots(), {}, {}
        for name, cells in part["variants"].items():
            tokens = [variants[name]["keep"][keep]["tokens"] for keep in cells]
            means = [100 * cell["accuracy"]["mean"] for cell in cells.values()]
            (colour, dash), width = styles[name], 2.4 if name in ("hero", "hero+") else 1.2
            text = f"{label(name)}  {means[-1]:.0f} %"
            style = {"color": colour, "linestyle": dash, "linewidth": width, "marker": ".", "label": text}
            lines[means[-1], name] = axes.plot(tokens, means, **style)[0]
            if name == "full":
                axes.axhline(means[0], color=colour, linestyle=dash, linewidth=width)
            if name == "hero":
                bars = [cell["accuracy"]["interval"] for cell in cells.values()]
                axes.vlines(tokens, *([100 * end for end in side] for side in zip(*bars)), color=colour)
            for keep, count in zip(cells, tokens):  # variants differ by a token at most
                ticks.setdefault(keep, count)
        lowest = min((mean for mean, name in lines if name != "random"), default=0)
        axes.set_ylim(bottom=max(lowest - 8, 0))  # random choice may leave the plot at its foot
        axes.set_xscale("log")
        axes.set_xticks(list(ticks.values()), [f"{count:.0f}" for count in ticks.values()])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_title(f"Three-digit numbers ({part['questions']} questions)", loc="left", fontsize=11)
        axes.set(xlabel="visual tokens of the language model, log scale", ylabel="accuracy, %")
        order = [lines[end] for end in sorted(lines, key=lambda end: -end[0])]
        figure.legend(handles=order, loc="outside right upper", frameon=False, labelspacing=0.7)

    return svg(Figure((9, 5), layout="constrained"), draw)


def render_quality(page: str, records: Sequence[Mapping]) -> tuple[str, str | None]:
    """The page of ``bench.quality``, and the plot of its first record of test questions.

    Raises:
        ValueError: several records of one training, or a page without its markers.
    """
    found = [one for one in records if one["benchmark"] == "quality" and one["split"] == "test"]
    found.sort(key=lambda one: one["trained"])
    seeds = [one["trained"] for one in found]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"records: expected one of quality for each seed of training, got {seeds}")
    lines = ["![Accuracy against visual tokens](quality.svg)"] if found else ["Not measured yet."]
    for record in found:
        lines += ["", f"### Trained with seed {record['trained']}", "", *quality(record)]
    page = replace(page, "quality", lines)
    return page, quality_plot(found[0]) if found else None
