"""The tables and the picture of ``docs/quality.md``, from a record of ``bench.quality``; standard library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from .page import spread, svg, svg_text, table

__all__ = ["picture", "tables"]

FIRST = "one attribute"  # the group that the targets are about
FEWEST = 30  # questions of a kind that get a panel of their own
PANELS = 3

# Variant -> (colour, width, dash); peers take what is left, in order.
STYLES = {
    "full": ("#222222", 1.2, "2 4"),
    "oracle": ("#2b8a3e", 1.6, "7 4"),
    "hero": ("#0b57d0", 3.4, ""),
    "hero+": ("#d6336c", 3.4, ""),
    "uniform": ("#6b6b6b", 1.8, ""),
    "random": ("#a6a6a6", 1.8, ""),
}
PEERS = ("#e07b00", "#7b4bb7", "#0b8a8a", "#8c5a2b", "#b0a000", "#c0392b")


def label(name: str) -> str:
    """A variant's name as the page has it."""
    for ending, words in (("-no-text", ", no text"), ("-other-question", ", other question")):
        if name.endswith(ending):
            return name.removesuffix(ending) + words
    return "all tokens" if name == "full" else name


def _signed(value: float) -> str:
    """Points with a sign; a true minus."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "+0.0" if text == "−0.0" else text


def _gap(gap: Mapping, sign: int = 1) -> str:
    low, high = sorted(sign * end for end in gap["interval"])
    return f"{_signed(sign * gap['mean'])} ({_signed(low)} to {_signed(high)})"


def _ratios(record: Mapping) -> list[str]:
    return [f"{ratio:g}" for ratio in sorted(record["keep"], reverse=True)]


def _accuracy(record: Mapping, group: str) -> list[str]:
    """Accuracy of every variant in a group, and what it loses against all tokens."""
    part = record["summary"][group]
    rows = []
    for name, cells in part["variants"].items():
        if name == "full":
            whole = cells["1"]["accuracy"]
            low, high = whole["interval"]
            text = f"{100 * whole['mean']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
            rows.append([label(name), text, *[""] * (len(record["keep"]) - 1)])
            continue
        row = [label(name)]
        for ratio in _ratios(record):
            cell = cells[ratio]
            row.append(f"{100 * cell['accuracy']['mean']:.1f}, {_gap(cell['to_full'])}")
        rows.append(row)
    return table([group, *(f"R = {ratio}" for ratio in _ratios(record))], rows)


def _against_hero(record: Mapping, group: str) -> list[str]:
    """Paired differences of hero to every other variant."""
    rows = [
        [label(name), *(_gap(cells[ratio]["to_hero"], -1) for ratio in _ratios(record))]
        for name, cells in record["summary"][group]["variants"].items()
        if name not in ("full", "hero")
    ]
    return table(["hero to", *(f"R = {ratio}" for ratio in _ratios(record))], rows)


def _cost(record: Mapping) -> list[str]:
    """Tokens, and milliseconds a question."""
    ratios = _ratios(record)
    rows = []
    for name, variant in record["variants"].items():
        cells = variant["keep"]
        if name == "full":
            cell = cells["1"]
            text = f"{cell['vision_ms']:.1f} + {cell['prefill_ms']:.1f}"
            rows.append([label(name), text, *[""] * (len(ratios) - 1)])
        else:
            rows.append(
                [
                    label(name),
                    *(
                        f"{cells[ratio]['vision_ms']:.1f} + {cells[ratio]['prefill_ms']:.1f}"
                        for ratio in ratios
                    ),
                ]
            )
    return table(["ms, vision + prefill", *(f"R = {ratio}" for ratio in ratios)], rows)


def _tokens(record: Mapping) -> list[str]:
    """Visual tokens at each keep ratio; where variants differ, the range."""
    rows = []
    for title, key in (("patches", "patches"), ("patches and newlines", "tokens")):
        row = [title, f"{record['variants']['full']['keep']['1'][key]:g}"]
        for ratio in _ratios(record):
            counts = {
                variant["keep"][ratio][key] for name, variant in record["variants"].items() if name != "full"
            }
            row.append(" to ".join(f"{count:g}" for count in sorted({min(counts), max(counts)})))
        rows.append(row)
    return table(["visual tokens", "all", *(f"R = {ratio}" for ratio in _ratios(record))], rows)


def _found(record: Mapping) -> list[str]:
    """How often the tile asked about has the largest share, which caps and keep ratio leave alone."""
    ratio = _ratios(record)[-1]
    found = {
        name: variant["keep"].get(ratio, {}).get("tile_found") for name, variant in record["variants"].items()
    }
    rows = [[label(name), f"{100 * value:.1f}"] for name, value in found.items() if value]
    return table(["", "% of questions"], rows) if rows else ["No variant prefers a tile."]


def _verdict(target: Mapping) -> str:
    """Met or missed by the whole interval; or which way the estimate points."""
    if target["verdict"] != "undecided":
        return target["verdict"]
    side = "met" if target["difference"]["mean"] >= target["limit"] else "missed"
    return f"{side}, but the interval includes the limit"


def _source(record: Mapping, code: str) -> list[str]:
    """Where a record comes from, line by line."""
    machine = record["machine"]
    rows, columns = record["grid"]
    kinds = [name for name in record["kinds"] if name in record["summary"]]
    amounts = ", ".join(f"{record['summary'][kind]['questions']} {kind}" for kind in kinds)
    return [
        f"- `{record['command']}`, {record['date']}, {record['seconds']:.0f} s",
        f"- {machine['cpu']}, {record['workers']} processes of one thread, {machine['system']}, float32",
        code,
        f"- {record['questions']} questions ({amounts}), split {record['split']} (seed {record['seed']}), "
        f"scenes of {rows} × {columns} tiles and {record['objects'][0]} to {record['objects'][1]} objects; "
        f"weights {record['weights']}, questions {record['digest']}",
    ]


def tried(record: Mapping, code: str) -> list[str]:
    """The lines of a record of validation questions, on which settings are chosen.

    Args:
        code: commit and versions, a line.
    """
    lines = [*_source(record, code), ""]
    for group, title in ((FIRST, "One attribute of one object"), ("count", "Counts"), ("all", "All kinds")):
        if group in record["summary"]:
            count = record["summary"][group]["questions"]
            lines += [f"**{title}** ({count} questions)", "", *_accuracy(record, group), ""]
    return lines[:-1]


def tables(record: Mapping, code: str) -> list[str]:
    """The lines between the markers.

    Args:
        code: commit and versions, a line.
    """
    lines = [
        "![Accuracy against visual tokens](quality.svg)",
        "",
        "*One attribute: what digit, colour or shape one object has. Bars are 95 % intervals of hero's "
        "accuracy. A variant that leaves the plot at its foot is marked as below.*",
        "",
        *_source(record, code),
        "",
    ]
    lines += [*_tokens(record), ""]
    if record["targets"]:
        lines += ["**Targets**; points of accuracy, paired", ""]
        lines += [
            *table(
                ["", "difference", "at least", ""],
                [
                    [one["what"], _gap(one["difference"]), _signed(one["limit"]), _verdict(one)]
                    for one in record["targets"]
                ],
            ),
            "",
        ]
    note = "accuracy in %, then the paired difference to all tokens in points (95 % interval)"
    groups = list(record["summary"])
    if FIRST in groups:
        lines += [
            f"**One attribute of one object** ({record['summary'][FIRST]['questions']} questions): {note}",
            "",
            *_accuracy(record, FIRST),
            "",
        ]
        if "hero" in record["variants"]:
            lines += [
                "**hero against the others**, the same questions; above 0, hero is right more often",
                "",
                *_against_hero(record, FIRST),
                "",
            ]
    for group in groups:
        if group == FIRST:
            continue
        title = "All kinds" if group == "all" else f"Kind: {group}"
        count = record["summary"][group]["questions"]
        lines += [f"**{title}** ({count} questions)", "", *_accuracy(record, group), ""]
    lines += [
        "**Is the tile asked about the one with the largest share**; variants with equal shares are left out",
        "",
        *_found(record),
        "",
    ]
    lines += ["**Milliseconds a question**, processor time", "", *_cost(record)]
    return lines


# --- the picture -----------------------------------------------------------------------------------------


def _styles(names: Sequence[str]) -> dict[str, tuple[str, float, str]]:
    styles, free = {}, iter(PEERS * 4)
    for name in names:
        base = name.split("-")[0]
        if name in STYLES:
            styles[name] = STYLES[name]
        elif name.endswith("-no-text") or name.endswith("-other-question"):
            colour = STYLES.get(base, STYLES["hero"])[0]
            styles[name] = (colour, 1.4, "6 3" if name.endswith("-no-text") else "1.5 3")
        else:
            styles[name] = (next(free), 1.8, "")
    return styles


class _Panel:
    """A plot of accuracy against visual tokens, fewer to the right."""

    def __init__(self, record: Mapping, group: str, box: tuple[float, float, float, float], large: bool):
        self.record, self.group, self.large = record, group, large
        self.left, self.top, self.width, self.height = box
        part = record["summary"][group]
        self.count = part["questions"]
        self.series = {
            name: sorted(
                (record["variants"][name]["keep"][ratio]["tokens"], cell["accuracy"])
                for ratio, cell in cells.items()
            )
            for name, cells in part["variants"].items()
        }
        tokens = [token for points in self.series.values() for token, _ in points]
        self.most, self.least = max(tokens), min(tokens)
        # Random choice would squeeze all others together: it may leave the plot at its foot.
        means = [
            accuracy["mean"]
            for name, points in self.series.items()
            for _, accuracy in points
            if name != "random" or len(self.series) == 1
        ]
        self.bottom = max(math.floor(10 * min(means)) / 10 - 0.1, 0.0)
        self.ceiling = max(math.ceil(10 * max(means)) / 10, self.bottom + 0.1)

    def x(self, tokens: float) -> float:
        whole = math.log2(self.most / self.least) or 1.0
        return self.left + self.width * math.log2(self.most / tokens) / whole

    def y(self, accuracy: float) -> float:
        return self.top + self.height * (self.ceiling - accuracy) / (self.ceiling - self.bottom)

    def draw(self, styles: Mapping[str, tuple[str, float, str]]) -> Iterator[str]:
        yield from self._frame()
        clip = f"plot{self.left:.0f}-{self.top:.0f}"
        yield (
            f'<clipPath id="{clip}"><rect x="{self.left - 6}" y="{self.top - 6}" '
            f'width="{self.width + 12}" height="{self.height + 6}"/></clipPath>'
        )
        yield f'<g clip-path="url(#{clip})">'
        back = sorted(self.series, key=lambda name: name == "hero")  # hero on top
        for name in back:
            yield from self._line(name, *styles[name])
        yield "</g>"
        if self.large:
            yield from self._labels(styles)

    def _frame(self) -> Iterator[str]:
        right, foot = self.left + self.width, self.top + self.height
        small = 12 if self.large else 10.5
        step = 0.1 if self.large or self.ceiling - self.bottom < 0.45 else 0.2
        for number in range(int((self.ceiling - self.bottom) / step + 1e-9) + 1):
            value = self.bottom + step * number
            y = self.y(value)
            yield f'<line x1="{self.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e6e6e6"/>'
            yield svg_text(self.left - 8, y + 4, f"{100 * value:.0f} %", small, "#555555", "end")
        full = self.record["variants"]["full"]["keep"]["1"]["tokens"]
        ticks = {full: "all"}
        for ratio in _ratios(self.record):  # variants differ by a token at most: the first speaks for all
            counts = (
                variant["keep"][ratio]["tokens"]
                for variant in self.record["variants"].values()
                if ratio in variant["keep"]
            )
            ticks.setdefault(next(counts, full), f"R = {ratio}")
        for tokens, name in ticks.items():
            x = self.x(tokens)
            yield f'<line x1="{x:.1f}" y1="{foot}" x2="{x:.1f}" y2="{foot + 5}" stroke="#555555"/>'
            yield svg_text(x, foot + 19, f"{tokens:.0f}", small, "#222222", "middle")
            if self.large:
                yield svg_text(x, foot + 34, name, 11, "#777777", "middle")
        yield f'<line x1="{self.left}" y1="{foot}" x2="{right}" y2="{foot}" stroke="#555555"/>'
        title = {"one attribute": "Questions about one attribute of one object"}.get(
            self.group, f"{self.group}"
        )
        yield svg_text(
            self.left,
            self.top - 12,
            f"{title} ({self.count})",
            14 if self.large else 12,
            "#222222",
            weight="600",
        )

    def _line(self, name: str, colour: str, width: float, dash: str) -> Iterator[str]:
        points = self.series[name]
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        if not self.large:
            width = max(1.0, 0.7 * width)
        pen = f'stroke="{colour}" stroke-width="{width:g}"{dashed}'
        if name == "full":
            y = self.y(points[0][1]["mean"])
            yield f'<line x1="{self.left}" y1="{y:.1f}" x2="{self.left + self.width}" y2="{y:.1f}" {pen}/>'
            yield f'<circle cx="{self.x(points[0][0]):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
            return
        places = [(self.x(tokens), self.y(accuracy["mean"])) for tokens, accuracy in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline points="{path}" fill="none" stroke-linejoin="round" {pen}/>'
        if name == "hero" and self.large:
            for (x, _), (_, accuracy) in zip(places, points):
                low, high = (self.y(end) for end in accuracy["interval"])
                yield f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{colour}"/>'
        if not dash:
            for x, y in places:
                radius = (4.5 if name == "hero" else 3) if self.large else 2
                yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'

    def _labels(self, styles: Mapping[str, tuple[str, float, str]]) -> Iterator[str]:
        right = self.left + self.width
        ends = {name: self.y(points[0][1]["mean"]) for name, points in self.series.items()}
        foot = self.top + self.height
        places = spread([min(y, foot) for y in ends.values()], 16, self.top, foot)
        for (name, y), place in zip(ends.items(), places):
            colour, value = styles[name][0], self.series[name][0][1]["mean"]
            below = y > foot
            if not below:
                yield (
                    f'<line x1="{right + 5:.1f}" y1="{y:.1f}" x2="{right + 20:.1f}" y2="{place:.1f}" '
                    f'stroke="{colour}" stroke-width="0.8"/>'
                )
            weight = "700" if name == "hero" else "400"
            text = f"{label(name)}  {100 * value:.0f} %" + (" (below)" if below else "")
            yield svg_text(right + 25, place + 4, text, 12.5, colour, weight=weight)


def picture(record: Mapping) -> str:
    """Accuracy against visual tokens, an SVG: one attribute large, other kinds small below."""
    summary = record["summary"]
    first = FIRST if FIRST in summary else "all"
    others = [
        group
        for group in summary
        if group != "all"
        and group not in record["one_attribute"]
        and group != first
        and summary[group]["questions"] >= FEWEST
    ][:PANELS]
    width, height = 900, 500 + (220 if others else 0)
    styles = _styles(list(record["variants"]))
    panels = [_Panel(record, first, (60, 46, 630, 380), large=True)]
    panels += [
        _Panel(record, group, (60 + 280 * number, 550, 205, 120), large=False)
        for number, group in enumerate(others)
    ]
    lines = []
    for panel in panels:
        lines += panel.draw(styles)
    lines.append(
        svg_text(
            375,
            484,
            "visual tokens of the language model, log scale, fewer to the right",
            12.5,
            "#555555",
            "middle",
        )
    )
    return svg(width, height, lines)
