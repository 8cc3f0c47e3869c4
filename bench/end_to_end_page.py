"""The tables and the picture of ``bench.end_to_end`` in ``docs/benchmarks.md``, from its records alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from .page import against, clock, code, loses, ratio, small, spread, svg, svg_text, table

__all__ = ["overview", "picture", "tables", "targets"]

STAGES = ("text", "encode", "capture", "score", "budget", "select", "project", "pack")
HEADS = {"capture": "of it scores"}
# Variants of bench.end_to_end, as the tables list them.
HEROES = ("hero 1", "hero 0.5", "hero 0.2", "hero 0.1")
BEST, TEXT, GRAPH = "hero 0.2", "hero 0.2 + text", "hero 0.2 (graph)"
ORDER = ("stock", "stock again", *HEROES, TEXT, GRAPH, "hero 0.2 + text (graph)", "released")
TITLES = {
    "7b": "LLaVA-NeXT-7B's shape",
    "clip-l": "CLIP-L tower, small language model",
    "mini": "the bundled mini model",
    "small": "tiny shapes",
}

# Limits of the targets, as docs/benchmarks.md states them.
VISION, VISION_TEXT, RELEASED, MEMORY, FIRST_TOKEN = 0.95, 1.0, 5.0, 5.0, 3.0
TOWER, PREDICTED = 1.02, 1.05
LAUNCHES = 1.05  # images of unlike size are put together, and a larger product may be split otherwise


def where(record: Mapping) -> str:
    """What a record is about, in a few words."""
    machine = record["gpu"]["name"] if record["gpu"] else "CPU"
    return f"{machine}, {TITLES[record['shape_name']]}"


# --- targets ---------------------------------------------------------------------------------------------

NOT_MEASURED = ("", "not measured")


def _inverse(comparison: Mapping) -> Mapping:
    low, high = comparison["interval"]
    return {**comparison, "paired": 1 / comparison["paired"], "interval": [1 / high, 1 / low]}


def _at_most(comparison: Mapping | None, limit: float) -> tuple[str, str]:
    """A ratio, measured and judged."""
    return NOT_MEASURED if comparison is None else (ratio(comparison), against(comparison, limit))


def _at_least(comparison: Mapping | None, limit: float) -> tuple[str, str]:
    """A ratio that should be large."""
    if comparison is None:
        return NOT_MEASURED
    return ratio(comparison), against(_inverse(comparison), 1 / limit)


def _plain(measured: str | None, met: bool) -> tuple[str, str]:
    """What does not vary from round to round."""
    return NOT_MEASURED if measured is None else (measured, "met" if met else "missed")


def _inside(record: Mapping | None, *path: str):
    """What stands at a path in a record, ``None`` where any part of the path is missing."""
    for key in path:
        record = record.get(key) if record else None
    return record


def _of_gpu(record: Mapping | None, batch: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """The targets of a batch on a GPU."""
    at = f", batch {batch}"
    vision = _inside(record, "summary", batch, "vision")
    counts = _inside(record, "counts", batch) or {}
    yield (
        f"1. vision stage at R = 0.2, to stock: at most {VISION}{at}",
        _at_most(_inside(vision, BEST), VISION),
    )
    yield (
        f"1. the same with text relevance: at most {VISION_TEXT:.2f}{at}",
        _at_most(_inside(vision, TEXT), VISION_TEXT),
    )
    released = _inside(record, "summary", batch, "released_vision", TEXT)
    yield (
        f"2. vision stage as released, to hero with text: at least {RELEASED:g}{at}",
        _at_least(released, RELEASED),
    )
    peaks = [_inside(counts, name, "peak_bytes") for name in ("released", TEXT)]
    memory = peaks[0] / max(peaks[1], 1) if None not in peaks else None
    yield (
        f"2. its peak memory, likewise: at least {MEMORY:g}{at}",
        _plain(memory and f"{memory:.1f}", bool(memory and memory >= MEMORY)),
    )
    first = _inside(record, "summary", batch, "ttft", BEST, "to_stock")
    yield (
        f"5. time to first token, stock to R = 0.2: at least {FIRST_TOKEN:g}{at}",
        _at_least(first and _inverse(first), FIRST_TOKEN),
    )
    for name in (BEST, TEXT):
        waits = _inside(counts, name, "waits")
        yield (
            f"6. the host waits for the GPU in the vision stage, {name}: never{at}",
            _plain(None if waits is None else f"{waits} times", waits == 0),
        )


def targets(records: Sequence[Mapping]) -> list[str]:
    """One row for each target of ``bench.end_to_end``, from the record it is about."""
    if not records:
        return ["Not measured yet."]
    gpu = next((one for one in records if one["gpu"] and one["shape_name"] == "7b"), None)
    cpu = next((one for one in records if one["shape_name"] == "clip-l" and not one["gpu"]), None)
    rows = [row for batch in ("1", "8") for row in _of_gpu(gpu, batch)]
    for name in (BEST, TEXT):
        one, eight = (_inside(gpu, "counts", batch, name, "launches") for batch in ("1", "8"))
        known = one is not None and eight is not None
        what = f"6. launches at batch 1 and 8, {name}: at most {LAUNCHES} times as many"
        met = known and eight <= LAUNCHES * one
        rows.append((what, _plain(f"{one} and {eight}" if known else None, met)))
    graph = _inside(gpu, "summary", "1", "vision", GRAPH)
    failed = any(f"{GRAPH}, batch 1" in one["what"] for one in _inside(gpu, "failed") or ())
    text = f"{ratio(graph)} of stock" if graph else "it failed" if failed else None
    rows.append(("6. the vision stage in a CUDA graph, batch 1", _plain(text, bool(graph))))
    tower = _inside(cpu, "summary", "1", "stages", "tower", BEST)
    rows.append((f"7. CPU: the tower with hero, to stock: at most {TOWER}", _at_most(tower, TOWER)))
    first = _inside(cpu, "summary", "1", "ttft", BEST, "to_predicted")
    what = f"7. CPU: time to first token, to what the token count predicts: at most {PREDICTED}"
    rows.append((what, _at_most(first, PREDICTED)))
    return table(["target", "measured", ""], [[what, *found] for what, found in rows])


def overview(records: Sequence[Mapping]) -> list[str]:
    """What dropping at R = 0.2 does to each batch that was measured, in a line: for the README."""
    if not records:
        return ["Not measured yet."]
    rows = []
    for record in sorted(records, key=lambda record: not record["gpu"]):
        for batch, described in record["batches"].items():
            found, crops = record["summary"].get(batch), described["crops"]
            ratios = [
                _inside(found, "vision", BEST),
                _inside(found, "ttft", BEST, "to_stock"),
                _inside(found, "vision", "released"),
            ]
            images = "1 image" if batch == "1" else f"{batch} images"
            cells = ["not measured" if one is None else ratio(one) for one in ratios]
            rows.append([f"{where(record)}, {images}, {crops} crops", *cells])
    if not any(record["gpu"] for record in records):
        rows.append(["GPU", *["not measured"] * 3])
    head = [
        "time to the stock model's",
        "vision stage",
        "first token",
        "vision stage of the method as released",
    ]
    return table(head, rows)


# --- tables ----------------------------------------------------------------------------------------------


def _ms(times: Mapping[str, float] | None) -> str:
    if times is None:
        return ""
    median, least = 1000 * times["median"], 1000 * times["min"]
    digits = 0 if median >= 1000 else 1 if median >= 100 else 2
    return f"{median:.{digits}f} ({least:.{digits}f})"


def _to_stock(comparison: Mapping | None, name: str) -> str:
    if name == "stock":
        return "1"
    return "" if comparison is None else ratio(comparison)


def _source(record: Mapping) -> list[str]:
    """Where a record comes from, line by line."""
    machine, gpu = record["machine"], record["gpu"]
    lines = [*small(record), f"- `{record['command']}`, {record['date']}, {clock(record)}"]
    if gpu:
        lines.append(f"- {gpu['name']}, driver {gpu['driver']}, {record['dtype']}; host {machine['cpu']}")
    else:
        load = " and ".join(f"{value:.1f}" for value in record["load_average"])
        lines.append(
            f"- {machine['cpu']}, {record['threads']} of {machine['cores']} cores, {machine['system']}, "
            f"{record['dtype']}; peak memory {record['peak_memory_gib']:.1f} GiB; "
            f"load average before and after {load}"
        )
    return [*lines, f"{code(record)}; code {record['code']}"]


def _shape(record: Mapping) -> str:
    vit, text = record["shape"]["vision"], record["shape"]["text"]
    return (
        f"Crops of {record['shape']['crop_size']} px; vision tower of {vit['layers']} layers, "
        f"{vit['hidden']} wide; language model of {text['layers']} layers, {text['hidden']} wide. "
        "Times are milliseconds, median (minimum); ratios are the median of the ratios within rounds "
        "(95 % bootstrap interval)."
    )


def _order(record: Mapping) -> list[str]:
    """Variants as the tables list them."""
    measured = {name for batch in record["summary"].values() for name in batch["vision"]}
    return [name for name in ORDER if name in measured]


def _vision(record: Mapping, batch: str) -> list[str]:
    found, counts = record["summary"][batch], record["counts"].get(batch, {})
    tokens, rows = record["batches"][batch]["visual_tokens"], []
    for name in _order(record):
        if name not in found["vision"]:
            continue
        count = counts.get(name)
        costs = [""] * 3
        if count:
            launches = "?" if count["launches"] is None else str(count["launches"])
            costs = [launches, str(count["waits"]), f"{count['peak_bytes'] / 2**20:.1f}"]
        times = found["times"]["vision"][name]
        rows.append(
            [
                name,
                str(tokens.get(name, "")),
                _ms(times),
                _to_stock(found["vision"][name], name),
                *costs,
            ]
        )
    launches = "launches" if record["gpu"] else "operations"
    return table(["vision stage", "tokens", "ms", "to stock", launches, "waits", "peak, MiB"], rows)


def _stages(record: Mapping, batch: str) -> list[str]:
    found = record["summary"][batch]["stages"]
    names = [name for name in _order(record) if name in found["seconds"] and name != "stock again"]
    if not names:
        return []
    rows = []
    for name in names:
        spans = found["seconds"][name]
        cells = [f"{1000 * spans[stage]:.2f}" if stage in spans else "" for stage in STAGES]
        rows.append([name, *cells, _to_stock(found["tower"].get(name), name)])
    head = [HEADS.get(stage, stage) for stage in STAGES]
    return ["", *table(["stages, ms", *head, "encode to stock"], rows)]


def _first_token(record: Mapping, batch: str) -> list[str]:
    found, prompts = record["summary"][batch], record["batches"][batch]["prompt_tokens"]
    rows = []
    for name in _order(record):
        one = found["ttft"].get(name)
        if one is None:
            continue
        predicted, to_predicted = one.get("predicted_to_stock"), one.get("to_predicted")
        rows.append(
            [
                name,
                str(prompts[name]),
                _ms(found["times"]["prefill"].get(name)),
                _ms(found["times"]["ttft"][name]),
                _to_stock(one["to_stock"], name),
                f"{predicted['paired']:.3f}" if predicted else "",
                ratio(to_predicted) if to_predicted else "",
                f"{found['decode'][name]:.1f}" if name in found["decode"] else "",
            ]
        )
    if not rows:
        return []
    head = ["first token", "prompt", "prefill, ms", "first token, ms", "to stock", "predicted"]
    return ["", *table([*head, "measured / predicted", "tokens/s after"], rows)]


def _profiles(record: Mapping, batch: str) -> list[str]:
    lines = []
    for name, profile in record["profiles"].get(batch, {}).items():
        rows = [
            [
                f"`{one['name']}`",
                str(one["calls"]),
                f"{one['us']:.0f}",
                f"{100 * one['us'] / profile['us']:.1f}",
            ]
            for one in profile["top"]
        ]
        head = [f"{name}: {profile['launches']} on the GPU, {profile['us']:.0f} µs", "calls", "µs", "%"]
        lines += ["", *table(head, rows)]
    return lines


def _losses(record: Mapping) -> str:
    """Where hero is slower than stock, or than the method as released."""
    found = []
    for batch, one in record["summary"].items():
        for group, what in (("vision", "the vision stage"), ("ttft", "the first token")):
            for name in _order(record):
                comparison = one[group].get(name)
                comparison = comparison and (comparison if group == "vision" else comparison["to_stock"])
                if name.startswith("hero") and loses(comparison):
                    found.append(f"{what} of {name} at batch {batch}, {ratio(comparison)}")
            for name, comparison in one[f"released_{group}"].items():
                if comparison and loses(_inverse(comparison)):
                    found.append(
                        f"{what} of {name} at batch {batch} against released, {ratio(_inverse(comparison))}"
                    )
    rounds = max((one["rounds"] for one in record["series"]), default=0)
    if not found and rounds < 5:
        return "Slower than stock or released: too few rounds to say."
    return f"Slower than stock or released, interval above 1: {'; '.join(found) or 'nothing'}."


def tables(record: Mapping) -> list[str]:
    """The lines of a record."""
    lines = _source(record)
    if record["shape"]:
        lines += ["", _shape(record)]
    for batch, one in record["batches"].items():
        if not record["summary"].get(batch, {}).get("vision"):
            continue
        sizes = ", ".join(dict.fromkeys(f"{height} × {width}" for height, width in one["images"]))
        rounds = max(series["rounds"] for series in record["series"] if series["batch"] == batch)
        lines += [
            "",
            f"**Batch {batch}**: {one['crops']} crops; {sizes} px (height × width); {rounds} rounds",
            "",
            *_vision(record, batch),
            *_stages(record, batch),
            *_first_token(record, batch),
            *_profiles(record, batch),
        ]
    lines += ["", _losses(record)]
    for title, found in (
        ("Failed", [f"{one['what']}: {one['reason']}" for one in record["failed"]]),
        ("Left out", record["left_out"]),
        ("Ended early", [record["ended"]] if record.get("ended") else []),
    ):
        if found:
            lines += ["", f"{title}: {'; '.join(found)}."]
    return lines


# --- the picture -----------------------------------------------------------------------------------------

FIRST_COLOUR, VISION_COLOUR, TEXT_COLOUR = "#0b57d0", "#e07b00", "#7b4bb7"
COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 2, 450, 326


class _Panel:
    """Time relative to stock against the keep ratio, of a batch of a record."""

    def __init__(self, record: Mapping, batch: str, left: float, top: float):
        self.record, self.batch = record, batch
        self.left, self.top, self.width, self.height = left + 52, top + 50, 270, 220
        found = record["summary"][batch]
        self.lines: dict[str, list[tuple[float, Mapping]]] = {}
        for title, pick in (
            ("first token", lambda name: _inside(found, "ttft", name, "to_stock")),
            ("vision stage", lambda name: _inside(found, "vision", name)),
            ("predicted", lambda name: _inside(found, "ttft", name, "predicted_to_stock")),
        ):
            points = [(float(name.removeprefix("hero ")), pick(name)) for name in HEROES if pick(name)]
            self.lines[title] = sorted(points, key=lambda point: -point[0])
        self.marks = {
            "first token, text": _inside(found, "ttft", TEXT, "to_stock"),
            "vision stage, text": _inside(found, "vision", TEXT),
        }
        ends = [one["interval"][1] for points in self.lines.values() for _, one in points]
        ends += [one["paired"] for one in self.marks.values() if one]
        self.ceiling = max(math.ceil(5 * max(ends, default=1.0) + 0.01) / 5, 1.2)
        ratios = [keep for points in self.lines.values() for keep, _ in points]
        self.least = min(ratios, default=0.1)

    def x(self, keep: float) -> float:
        return self.left + self.width * math.log(keep) / min(math.log(self.least), -1e-9)

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - value / self.ceiling)

    def draw(self) -> Iterator[str]:
        yield from self._frame()
        for title, colour in (("vision stage", VISION_COLOUR), ("first token", FIRST_COLOUR)):
            yield from self._line(title, colour)
        dotted = " ".join(
            f"{self.x(keep):.1f},{self.y(one['paired']):.1f}" for keep, one in self.lines["predicted"]
        )
        yield (
            f'<polyline points="{dotted}" fill="none" stroke="{FIRST_COLOUR}" stroke-width="1.3" '
            f'stroke-dasharray="2 4"/>'
        )
        for title, colour in (("vision stage, text", VISION_COLOUR), ("first token, text", FIRST_COLOUR)):
            one = self.marks[title]
            if one:
                x, y = self.x(0.2), self.y(one["paired"])
                yield (
                    f'<path d="M{x:.1f} {y - 6:.1f} l6 6 l-6 6 l-6 -6 z" fill="#ffffff" stroke="{colour}" '
                    f'stroke-width="1.8"/>'
                )
        yield from self._labels()

    def _frame(self) -> Iterator[str]:
        right, foot = self.left + self.width, self.top + self.height
        images = "1 image" if self.batch == "1" else f"{self.batch} images"
        crops = self.record["batches"][self.batch]["crops"]
        yield svg_text(self.left - 40, self.top - 30, where(self.record), 13, "#222222", weight="600")
        yield svg_text(self.left - 40, self.top - 13, f"{images}, {crops} crops", 12, "#555555")
        step = 0.2 if self.ceiling <= 1.6 else 0.5
        for number in range(int(self.ceiling / step + 1e-9) + 1):
            y = self.y(number * step)
            yield f'<line x1="{self.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e6e6e6"/>'
            yield svg_text(self.left - 7, y + 4, f"{number * step:.1f}", 11.5, "#555555", "end")
        y = self.y(1.0)
        yield (
            f'<line x1="{self.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#222222" '
            f'stroke-width="1.2"/>'
        )
        for keep in sorted({keep for points in self.lines.values() for keep, _ in points}):
            x = self.x(keep)
            yield f'<line x1="{x:.1f}" y1="{foot}" x2="{x:.1f}" y2="{foot + 5}" stroke="#555555"/>'
            yield svg_text(x, foot + 18, f"{keep:g}", 11.5, "#222222", "middle")
        yield f'<line x1="{self.left}" y1="{foot}" x2="{right}" y2="{foot}" stroke="#555555"/>'

    def _line(self, title: str, colour: str) -> Iterator[str]:
        points = [(self.x(keep), one) for keep, one in self.lines[title]]
        path = " ".join(f"{x:.1f},{self.y(one['paired']):.1f}" for x, one in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.6"/>'
        for x, one in points:
            low, high = (self.y(end) for end in one["interval"])
            yield f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{colour}"/>'
            yield f'<circle cx="{x:.1f}" cy="{self.y(one["paired"]):.1f}" r="3.6" fill="{colour}"/>'

    def _labels(self) -> Iterator[str]:
        right = self.left + self.width
        wanted = {"stock": (1.0, "#222222")}
        colours = {"first token": FIRST_COLOUR, "vision stage": VISION_COLOUR}
        for title, colour in colours.items():
            if self.lines[title]:
                wanted[title] = (self.lines[title][-1][1]["paired"], colour)
        places = spread([self.y(value) for value, _ in wanted.values()], 15, self.top, self.top + self.height)
        for (title, (value, colour)), place in zip(wanted.items(), places):
            words = title if title == "stock" else f"{title} {value:.2f}"
            yield svg_text(right + 9, place + 4, words, 12, colour)


def picture(records: Sequence[Mapping]) -> str | None:
    """Time to first token and vision stage relative to stock, a panel a batch; ``None`` without records."""
    wanted = [
        (record, batch)
        for record in records
        for batch, one in record["summary"].items()
        if len(set(HEROES) & set(one["vision"])) > 1
    ]
    if not wanted:
        return None
    rows = math.ceil(len(wanted) / COLUMNS)
    lines = []
    for number, (record, batch) in enumerate(wanted):
        row, column = divmod(number, COLUMNS)
        lines += _Panel(record, batch, 8 + column * PANEL_WIDTH, row * PANEL_HEIGHT).draw()
    foot = rows * PANEL_HEIGHT - 4
    key = (
        "time relative to stock against the keep ratio, log scale; bars: 95 % intervals; "
        "dotted: first token as predicted; diamonds: with text"
    )
    lines.append(svg_text(COLUMNS * PANEL_WIDTH / 2, foot, key, 12, "#555555", "middle"))
    return svg(COLUMNS * PANEL_WIDTH, foot + 16, lines)
