"""Choose the launch options of every kernel by their time on this GPU: ``hero_kernels/configs/NAME.json``.

``python -m bench.tune NAME [--seconds N]``. NAME is the device's name in lower case with dashes, or its
beginning: ``nvidia-h100`` for an "NVIDIA H100 80GB HBM3". Run again, it continues with the rows that have no
time yet; delete the file to begin anew.

The search starts at a row of ``default.json`` and changes one option at a time, warps and block sizes by a
factor of two and stages by one, as long as calls get faster. Rows that do not compile or return wrong results
are skipped. Options must not depend on the number of crops: the geometric mean of 5 and 160 crops decides,
with that of packed images, 1 and 4, where they use the row too.
Rows that no benchmark uses keep the values of ``default.json`` and have no time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hero_kernels import _launch

from . import records
from .kernels import all_cases, measure, sets_of
from .registry import INTERNVIT, REAL_BATCHES, Case, Variant, default_device
from .timing import Clock, positive, wait

LEFT_OUT = REAL_BATCHES[1:-1]  # the fewest crops and the most are timed
GAIN = 0.98  # of the time: a smaller gain is noise
MOST = {"num_warps": 16, "num_stages": 5}

Row = dict[str, Any]
Config = Mapping[str, list[Row]]  # the rows of each kernel
Place = tuple[str, int]  # of a row: its kernel and ``upto``


def neighbours(row: Row) -> Iterator[Row]:
    """Return the rows that differ in one option; ``STAGES`` is always ``num_stages``."""
    for name in sorted(row.keys() - _launch.NOTES - {"maxnreg", "STAGES"}):
        value = row[name]
        for other in (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2):
            if 1 <= other <= MOST.get(name, other):
                stages = {"STAGES": other} if name == "num_stages" and "STAGES" in row else {}
                yield row | {name: other} | stages


def search(row: Row, time: Callable[[Row], Mapping[str, float] | None], clock: Clock) -> Row | None:
    """Return the fastest row that single changes lead to, with its times; ``None`` if the clock ran out.

    ``time`` returns microseconds by shape, or ``None`` for a row that cannot be used.
    """
    known: dict[str, Mapping[str, float] | None] = {}

    def cost(one: Row) -> float:
        key = json.dumps(one)
        if key not in known:
            known[key] = time(one)
        return statistics.geometric_mean(known[key].values()) if known[key] else math.inf

    best, before = row, None
    while best is not before:
        before = best
        for other in neighbours(before):
            if clock.left() <= 0:
                return None
            best = other if cost(other) < GAIN * cost(best) else best
    return best | {"us": known[json.dumps(best)]} if cost(best) < math.inf else None


@contextlib.contextmanager
def lookups(config: Config, place: Place | None = None, row: Row | None = None) -> Iterator[set[Place]]:
    """Collect the places of the rows that launches look up; at one place they get another row."""
    seen: set[Place] = set()

    def look_up(name: str, kernel: str, size: int) -> tuple[tuple[str, Any], ...]:
        found = next(one for one in config[kernel] if size <= one["upto"])
        seen.add((kernel, found["upto"]))
        found = row if place == (kernel, found["upto"]) else found
        return tuple((key, value) for key, value in found.items() if key not in _launch.NOTES)

    with mock.patch.object(_launch, "_row", look_up):
        yield seen


def users(config: Config, cases: Iterable[Case]) -> dict[Place, dict[int, tuple[Case, Variant]]]:
    """Return by row and number of crops our variant that uses the row and the fewest others."""
    found = []
    for case in cases:
        inputs = case.make(0)
        for variant in case.variants:
            if variant.ours:
                with lookups(config) as seen:
                    variant.call(inputs)
                found += [(len(seen), place, case, variant) for place in sorted(seen)]
    result: dict[Place, dict[int, tuple[Case, Variant]]] = defaultdict(dict)
    for _, place, case, variant in sorted(found, key=lambda one: one[0]):
        result[place].setdefault(case.shape.crops, (case, variant))
    return result


def tune(path: Path, device: torch.device, clock: Clock, source: str, small: bool = False) -> int:
    """Write a file with every row that is in use and has no time yet, measured; return how many are left."""
    config, left = json.loads(json.dumps(_launch.read_config("default")["kernels"])), 0
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))["kernels"]
        done = {(kernel, row["upto"]): row for kernel in old for row in old[kernel] if "us" in row}
        config = {
            kernel: [done.get((kernel, row["upto"]), row) for row in config[kernel]] for kernel in config
        }
    cases = [one for one in all_cases(small, device) if one.shape.geometry != INTERNVIT]  # CLIP's rows
    found = users(config, [one for one in cases if one.shape.batch not in LEFT_OUT])
    for place, every in found.items():
        rows = config[place[0]]
        number = [row["upto"] for row in rows].index(place[1])
        if "us" in rows[number]:
            continue
        timed = [(case, variant, sets_of(case, device)) for case, variant in every.values()]

        def time(row: Row, place=place, timed=timed) -> dict[str, float] | None:
            us = {}
            for case, variant, sets in timed:
                with lookups(config, place, row) as seen:
                    result = measure(case, variant, sets, device)
                assert place in seen, f"{place}: the launch did not look up its options"
                wait()  # raises if the device does not respond any more
                if result["status"] != "ok":
                    return None
                us[f"T={case.shape.crops}"] = round(result["us"], 2)
            return us

        best = search(rows[number], time, clock)
        print(*place, best or "not measured: no time, or no row works", flush=True)
        left += best is None
        if best is not None:
            rows[number] = best | {"source": source}
            write(path, config)
    return left


def write(path: Path, config: Config) -> None:
    """Write a configuration file, one row on a line."""
    kernels = [
        f'  "{kernel}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for kernel, rows in config.items()
    ]
    source = "bench.tune measured the rows that have a time; the others are those of default.json"
    text = f'{{\n "source": "{source}",\n "kernels": {{\n' + ",\n".join(kernels) + "\n }\n}\n"
    path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 if every row was measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the file: the device's name or its beginning, as nvidia-h100")
    parser.add_argument("--seconds", type=positive, default=540, help="time limit (default 540)")
    options = parser.parse_args(arguments)
    clock, record = Clock(options.seconds), records.environment("tune", "bench.tune", arguments)
    if record["gpu"] is None:
        parser.error("no GPU: options are chosen by their times on one")
    name, device = record["gpu"]["name"], default_device()
    if not _launch.serves(options.name, name):
        parser.error(f"name: expected the beginning of {name!r}, in lower case with dashes")
    versions = [f"{package} {record['versions'].get(package)}" for package in ("torch", "triton")]
    source = ", ".join([name, *versions, f"commit {record['commit']['hash']}", record["date"]])
    with torch.no_grad():
        return int(
            tune(records.ROOT / f"hero_kernels/configs/{options.name}.json", device, clock, source) > 0
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
