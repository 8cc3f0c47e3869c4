"""The CPU benchmark runs end to end on tiny shapes, and its record becomes the tables of the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hero

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 2
KEEP = ("1", "0.5", "0.2")


def _run(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def _report(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return _run("bench.report", "--results", folder, "--page", folder / "page.md", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the record of a small run, and a page for it."""
    folder = tmp_path_factory.mktemp("bench")
    options = ("--small", "--rounds", ROUNDS, "--keep", ",".join(KEEP), "--threads", 1)
    done = _run("bench.cpu_vision", *options, "--out", folder / "cpu.json")
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (folder / "page.md").write_text(page, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def record(folder) -> dict:
    return json.loads((folder / "cpu.json").read_text(encoding="utf-8"))


def _comparisons(value) -> list[dict]:
    """Every comparison anywhere in a summary."""
    if not isinstance(value, dict):
        return []
    if "paired" in value:
        return [value]
    return [found for part in value.values() for found in _comparisons(part)]


def test_record_says_where_it_comes_from(record):
    assert {"python", "hero", "torch", "transformers"} <= set(record["versions"])
    assert record["versions"]["hero"] == hero.__version__
    assert set(record["commit"]) == {"hash", "dirty"}
    assert record["command"].startswith("python -m bench.cpu_vision --small")
    assert record["machine"]["cpu"] and record["threads"] == 1 and record["dtype"] == "float32"
    assert record["small"] and record["rounds"] == ROUNDS and 0 < record["peak_memory_gib"] < 6


def test_record_names_neither_host_nor_folders(record, folder):
    text = json.dumps(record)
    assert str(folder) not in text and str(ROOT) not in text and str(Path.home()) + "/" not in text
    assert "host" not in text.lower()


def test_record_keeps_every_raw_time(record):
    times = record["seconds"]
    tokens = {str(count) for count in record["prompt_tokens"].values()}
    assert {name: len(values) for name, values in times["tower"].items()} == {
        "stock": 2 * ROUNDS,
        "attached": 2 * ROUNDS,
        "captured": 2 * ROUNDS,
        "eager": ROUNDS,
    }
    for group, variants in (("vision", {"stock", *KEEP}), ("ttft", {"stock", *KEEP}), ("prefill", tokens)):
        assert set(times[group]) == variants
        assert all(len(values) == ROUNDS for values in times[group].values())
    stages = {f"{stage} {name}" for stage in ("score", "budget", "select", "project") for name in KEEP}
    assert set(times["stages"]) == {"prepare", "encode", "capture", *stages}
    assert all(value > 0 for group in times.values() for values in group.values() for value in values)


def test_ratios_are_positive_and_inside_their_intervals(record):
    comparisons = _comparisons(record["summary"])
    assert len(comparisons) == 5 + len(KEEP) + 4 * (len(KEEP) + 1)
    for comparison in comparisons:
        low, high = comparison["interval"]
        assert 0 < low <= comparison["paired"] <= high
        assert comparison["of_medians"] > 0 and comparison["of_minima"] > 0
    tower = record["summary"]["tower"]
    assert record["summary"]["tower_ratio"] == tower["attached"]["paired"]
    assert record["summary"]["capture_ratio"] == tower["captured"]["paired"]
    assert 0 < tower["capture_share"]["median"] < 1


def test_token_counts_are_those_of_count_tokens(record):
    shape, image = record["shape"], record["image"]
    size = (image["height"], image["width"])
    sizes = {name: shape[name] for name in ("pinpoints", "crop_size", "patch_size")}
    counts = {
        name: hero.count_tokens(
            hero.HeroConfig(keep_ratio=1.0 if name == "stock" else float(name)), size, **sizes
        )
        for name in ("stock", *KEEP)
    }
    assert record["visual_tokens"] == counts
    text = {record["prompt_tokens"][name] - counts[name] for name in counts}
    assert len(text) == 1 and text.pop() > 0


def test_report_renders_once_and_for_all(folder, record):
    assert _report(folder, "--check").returncode == 1
    assert _report(folder).returncode == 0
    page = (folder / "page.md").read_text(encoding="utf-8")
    for name in KEEP:
        assert re.search(
            rf"^\| keep {re.escape(name)} \| {record['visual_tokens'][name]} \|", page, re.MULTILINE
        )
    assert "a test of the script" in page and "Slower than stock" in page and "not measured" in page
    assert _report(folder).returncode == 0
    assert (folder / "page.md").read_text(encoding="utf-8") == page
    assert _report(folder, "--check").returncode == 0


def test_the_page_shows_the_records():
    done = _run("bench.report", "--check")
    assert done.returncode == 0, done.stderr
