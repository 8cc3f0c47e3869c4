"""The tables of ``docs/quality.md`` and its plot, from the record of ``bench.quality``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from matplotlib.figure import Figure

from .page import replace, source, svg, table
from .quality_statistics import BASES

FIRST = "number"  # the kind that comes first and is drawn
TITLES = {FIRST: "Three-digit numbers", "all": "All kinds"}


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


def accuracy(record: Mapping, group: str) -> list[str]:
    """Accuracy of every variant in a group, and what it loses against all tokens."""
    rows = []
    for name, cells in record["summary"][group]["variants"].items():
        texts = [
            f"{100 * cells[keep]['accuracy']['mean']:.1f}"
            + (f", {points(cells[keep]['to_full'])}" if "to_full" in cells[keep] else "")
            for keep in (["1"] if name == "full" else keeps(record))
        ]
        rows.append([label(name), *texts, *[""] * (len(record["keep"]) - len(texts))])
    return table([group, *(f"R = {keep}" for keep in keeps(record))], rows)


def accuracies(record: Mapping, groups: Sequence[str]) -> Iterator[str]:
    for group in groups:
        yield from ("", f"**{TITLES[group]}** ({record['summary'][group]['questions']} questions)", "")
        yield from accuracy(record, group)


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


def quality(record: Mapping) -> list[str]:
    """A record of test questions."""
    variants = record["variants"]
    lines = [*quality_source(record), ""]
    rows = []
    for title, key in (("patches", "patches"), ("patches and newlines", "tokens")):
        rows.append([title, f"{variants['full']['keep']['1'][key]:g}"])
        for keep in keeps(record):
            counts = {one["keep"][keep][key] for name, one in variants.items() if name != "full"}
            rows[-1].append(" to ".join(f"{count:g}" for count in sorted({min(counts), max(counts)})))
    lines += table(["visual tokens", "all", *(f"R = {keep}" for keep in keeps(record))], rows)
    lines += ["", "Accuracy in %, then the paired difference to all tokens in points (95 % interval)."]
    groups = [group for group in (FIRST, "all") if group in record["summary"]]
    lines += accuracies(record, groups)
    for base in BASES[1:]:
        rows = []
        for name in (name for name in variants if name != "full"):
            cells = record["summary"]["all"]["variants"][name]
            gaps = [cells.get(keep, {}).get(f"to_{base}") for keep in ("0.2", "0.1")]
            rows += [[label(name), *map(points, gaps)]] if all(gaps) else []
        title = f"**Difference to {label(base)}**, all kinds, in points, paired"
        lines += ["", title, "", *table(["", "R = 0.2", "R = 0.1"], rows)]
    kinds = [group for group in record["summary"] if group != "all"]
    for keep in ("0.2", "0.1"):
        rows = []
        for name in variants:
            found = [record["summary"][kind]["variants"][name] for kind in kinds]
            cells = [one.get(keep) or one.get("1") for one in found]
            rows.append(
                [label(name), *(f"{100 * one['accuracy']['mean']:.1f}" if one else "" for one in cells)]
            )
        lines += ["", f"**By kind of question**, accuracy in %, R = {keep}", "", *table(["", *kinds], rows)]
    rows = []
    for name in (name for name in variants if name != "full"):
        shares = [variants[name]["keep"].get(keep, {}).get("digits_kept") for keep in keeps(record)]
        rows += [[label(name), *(f"{100 * share:.1f}" for share in shares)]] if None not in shares else []
    title = "**Questions for digits of which a patch of each was kept**, in %"
    return [*lines, "", title, "", *table(["", *(f"R = {keep}" for keep in keeps(record))], rows)]


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
