"""The benchmarks run end to end on tiny shapes, and their records become the tables of the page."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hero

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # an installed package brings no benchmarks
    sys.path.insert(0, str(ROOT))

from bench import bench_attention, bench_selection, device, kernels, registry  # noqa: E402
from bench.measure import Unavailable, Variant, Wrong, measure  # noqa: E402

ROUNDS = 2
KEEP = ("1", "0.5", "0.2")


def _run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return _command("-m", *arguments)


def _command(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, arguments)]
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


# --- kernels ---------------------------------------------------------------------------------------------

A_TEST = """
import pytest

@pytest.mark.MARK
@pytest.mark.parametrize("number", [1, 2])
def test_number(number):
    assert number == 1
"""


@pytest.fixture(scope="module")
def device_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder that ``bench/run_device`` filled, and what it printed."""
    folder = tmp_path_factory.mktemp("device")
    test = folder / "test_one.py"
    test.write_text(A_TEST.replace("MARK", "gpu"), encoding="utf-8")
    done = _command("bench/run_device", folder, "--small", "--seconds", 100, "--tests", test)
    assert (folder / "kernels.json").exists(), done.stderr
    return folder, done


@pytest.fixture(scope="module")
def device_record(device_run) -> dict:
    return json.loads((device_run[0] / "kernels.json").read_text(encoding="utf-8"))


needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the smoke run of a machine without a GPU"
)


@needs_no_gpu
def test_device_record_has_every_variant(device_record):
    """Nothing is dropped silently: ours were right and timed, a peer was too or says why not."""
    cpu = torch.device("cpu")
    every = [(case.op, variant.name) for case in kernels.all_cases(True, cpu) for variant in case.variants]
    assert [(one["op"], one["variant"]) for one in device_record["results"]] == every
    for one in device_record["results"]:
        if one["ours"]:
            assert one["status"] == "ok", one
        if one["status"] == "ok":
            assert one["us"] > 0 and one["times_us"] and one["bytes"] > 0 and one["gb_s"] > 0
            assert one["floor_us"] is None and one["floor_share"] is None  # no ceilings on a CPU
        else:
            assert one["status"] == "unavailable" and one["reason"] and "us" not in one
    peers = {one["variant"] for one in device_record["results"] if one["status"] == "ok" and not one["ours"]}
    assert {"eager, maps kept", "loop over crops, as released", "index_select alone"} <= peers


@needs_no_gpu
def test_device_record_says_where_it_comes_from(device_record, device_run):
    folder, done = device_run
    assert device_record["command"].startswith("bench/run_device ") and device_record["gpu"] is None
    assert {"python", "hero", "torch", "triton", "transformers"} <= set(device_record["versions"])
    assert device_record["small"] and len(device_record["code"]) == 16
    text = json.dumps(device_record)
    assert str(folder) not in text and str(ROOT) not in text and str(Path.home()) + "/" not in text
    assert "tests: failed" in done.stdout


@needs_no_gpu
def test_device_reports_a_failed_test(device_record, device_run):
    """A red test is in the record and in the exit status."""
    tests, done = device_record["tests"], device_run[1]
    assert tests["status"] == "failed" and tests["counts"] == {"passed": 1, "failed": 1}
    assert len(tests["failures"]) == 1 and tests["failures"][0] == "test_one.py::test_number[2]"
    assert done.returncode == 1 and "test_number[2]" in done.stdout


@needs_no_gpu
def test_report_renders_kernels(device_run, device_record):
    folder = device_run[0]
    page = ROOT / "docs" / "benchmarks.md"
    (folder / "page.md").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "compiled.json").write_text('{"benchmark": "compiled"}', encoding="utf-8")
    assert _report(folder).returncode == 0
    text = (folder / "page.md").read_text(encoding="utf-8")
    for one in device_record["results"]:
        assert one["variant"] in text
    assert "Where a peer that does as much is faster" in text and "cuDNN needs a GPU" in text
    assert _report(folder, "--check").returncode == 0


def test_least_bytes_and_operations():
    """The formulas at five crops of CLIP-L/14-336, against numbers worked out by hand."""
    shape = next(shape for shape in registry.shapes(False) if shape.geometry == registry.CLIP)
    assert shape.batch.crops == 5 and shape.segments.lengths == (115 + 460 + 48,)
    assert shape.activations() == 5 * 16 * 577 * 64 * 2  # 5.9 MB of keys
    assert shape.cls_sums().bytes == 5908480 + 5 * 16 * (128 + 4) + 2 * 5 * 576 * 4
    assert shape.attention().flops == 4 * 5 * 16 * 577**2 * 64
    moved = (575 + 623) * 1024 * 2  # rows in, rows and newlines out
    assert shape.gather().bytes == moved + 5 * 576 * (4 + 1) + 623 * 4
    assert {shape.batch.crops for shape in registry.shapes(False)} == {5, 10, 40, 160}


def test_floor_is_the_larger_of_two_times():
    ceilings = registry.Ceilings(bandwidth=1e12, flops=1e14, launch_us=2.0)
    assert registry.floor_us(registry.Cost(10**6, 0), ceilings) == pytest.approx(1.0)
    assert registry.floor_us(registry.Cost(10**6, 10**9), ceilings) == pytest.approx(10.0)
    assert registry.floor_us(registry.Cost(1), None) is None


def _case_of(variant: Variant):
    case = next(bench_selection.cases(True, torch.device("cpu")))
    ours = next(one for one in case.variants if one.ours)
    return measure(case, variant, [case.make(0)], torch.device("cpu")), ours


def _wrong(inputs, result):
    raise Wrong("rows: 3 of 4 elements differ")


def _unavailable(inputs):
    raise Unavailable("no such library")


@pytest.mark.parametrize(
    ("variant", "status", "reason"),
    [
        (Variant("x", lambda inputs: 0, _wrong, ours=True), "wrong", "rows: 3 of 4 elements differ"),
        (Variant("x", lambda inputs: 0, _wrong), "wrong", "rows: 3 of 4 elements differ"),
        (Variant("x", _unavailable, _wrong), "unavailable", "no such library"),
        (Variant("x", lambda inputs: 1 / 0, _wrong), "unavailable", "ZeroDivisionError: division by zero"),
        (
            Variant("x", lambda inputs: 1 / 0, _wrong, ours=True),
            "failed",
            "ZeroDivisionError: division by zero",
        ),
    ],
)
def test_no_time_without_a_right_result(variant, status, reason):
    record, _ = _case_of(variant)
    assert (record["status"], record["reason"]) == (status, reason)
    assert not {"us", "times_us", "gb_s"} & set(record)


@pytest.mark.parametrize("module", [bench_attention, bench_selection])
def test_checks_catch_a_wrong_result(module):
    """Every check but those of peers timed for scale refuses what another seed's inputs give."""
    cpu = torch.device("cpu")
    refused = 0
    for case in module.cases(True, cpu):
        inputs, others = case.make(0), case.make(1)
        for variant in case.variants:
            try:
                result = variant.call(others)
            except Unavailable:
                continue
            if "for scale" in variant.name:
                continue
            if case.op == "tile_budgets":  # the weights come with the result, the shares are compared
                assert not torch.equal(result.shares, inputs.budgets.shares)
            with pytest.raises(Wrong):
                variant.check(inputs, result)
            refused += 1
    assert refused >= 8


class _Scripted:
    """A worker that follows a script: messages of each process in turn; ``"hang"`` says nothing more."""

    def __init__(self, processes):
        self.processes = list(processes)
        self.starts = []

    def __call__(self, arguments, log):
        self.starts.append(int(arguments[arguments.index("--start") + 1]))
        self.messages, self.ended = self.processes.pop(0)
        self.messages = iter(self.messages)
        return self

    def message(self, seconds):
        message = next(self.messages, None)
        if message == "hang":
            raise queue.Empty
        return message

    def end(self):
        return self.ended


def test_a_dead_process_costs_one_variant(monkeypatch, tmp_path):
    """Neither a crash nor a hang nor a broken device keeps the rest from being measured."""
    plan = [{"variant": str(number), "ours": number != 1} for number in range(5)]
    ready = {"plan": plan}

    def ok(number):
        return [{"begin": number}, {"number": number, "result": {**plan[number], "status": "ok"}}]

    script = _Scripted(
        [
            ([ready, *ok(0), {"begin": 1}], "exit -11, Segmentation fault"),
            ([ready, {"begin": 2}, "hang"], "exit -9"),
            ([ready, {"begin": 3}, {"number": 3, "result": {**plan[3], "status": "failed"}}], "exit 3"),
            ([ready, *ok(4)], "exit 0"),
        ]
    )
    monkeypatch.setattr(device, "Worker", script)
    seen = []
    result = device.run_kernels(True, tmp_path, device.Clock(60), seen.append)
    assert script.starts == [0, 2, 3, 4]
    assert [one["status"] for one in result["results"]] == ["ok", "unavailable", "failed", "failed", "ok"]
    assert (
        "Segmentation fault" in result["results"][1]["reason"]
        and "no answer" in result["results"][2]["reason"]
    )
    assert [one["variant"] for one in seen] == ["0", "1", "2", "3", "4"]


def test_what_does_not_fit_is_left_out(monkeypatch, tmp_path):
    plan = [{"variant": str(number), "ours": True} for number in range(3)]
    script = _Scripted([([{"plan": plan}, {"begin": 0}, "hang"], "exit -9")])
    monkeypatch.setattr(device, "Worker", script)
    result = device.run_kernels(True, tmp_path, device.Clock(0.4), lambda result: None)
    assert [one["status"] for one in result["results"]] == ["skipped"] * 3
    assert {one["reason"] for one in result["results"]} == {"left out: no time"}


@pytest.mark.parametrize(
    "line",
    [
        "tests/test_a.py::test_b[1-x] FAILED                      [ 12%]",
        "[gw3] [ 12%] FAILED tests/test_a.py::test_b[1-x] ",
    ],
)
def test_outcomes_are_read_from_either_form(line):
    log = f"{line}\nFAILED tests/test_a.py::test_b[1-x] - assert 0\n= 1 failed in 0.1s ="
    assert device.read_outcomes(log) == {
        "counts": {"failed": 1},
        "failures": ["test_a.py::test_b[1-x]"],
    }


def test_gpu_tests_are_found():
    """Those marked in their own file, and those whose ways come from a module beside them."""
    names = {file.name for file in device.gpu_tests()}
    assert "test_kernels.py" in names and "test_bench.py" not in names and "cases.py" not in names


def test_dispatch_measures_every_operation(tmp_path):
    done = _run("bench.dispatch", "--rounds", 1, "--repeats", 20, "--out", tmp_path / "dispatch.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "dispatch.json").read_text(encoding="utf-8"))
    import hero_kernels

    assert set(record["us"]) == set(hero_kernels.reference.__all__)
    assert all(ways["public"] > 0 and ways["operator"] > 0 for ways in record["us"].values())


@needs_no_gpu
def test_the_cases_run_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    files = ("bench/bench_attention.py", "bench/bench_selection.py")
    done = _run(
        "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-disable-gc", *files
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed, \d+ skipped", done.stdout)
