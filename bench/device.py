"""Run everything that needs a GPU in one call: the GPU tests, compute-sanitizer, the model end to end, the
kernels.

``bench/run_device [FOLDER] [--seconds 570]`` from a plain checkout: nothing is installed or downloaded. Each
step is a process with a time limit: the tests get at most half of the time, compute-sanitizer, if it is on
``PATH``, a third of the rest and at most three minutes (``--tests`` without files skips both),
``bench.end_to_end`` half of the rest, ``bench.kernels`` what remains. A kernel that takes its process or the
device down is recorded as failed, and a new process continues after it. ``kernels.json`` and
``end_to_end.json`` are written as the steps go; SIGINT and SIGTERM end the run with what they have. For a
copy without git, the environment variable ``HERO_COMMIT`` names the commit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib import util
from pathlib import Path

from . import records
from .kernels import ENDED, new_record
from .records import ROOT
from .timing import Clock

SECONDS = 570
TEST_SHARE, SANITIZER_SHARE, END_TO_END_SHARE = 0.5, 1 / 3, 0.5
SANITIZER_SECONDS = 180
TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer
SANITIZED = ROOT / "tests" / "test_kernels.py::test_sanitized"
END_SECONDS = 15  # for a process to end and to write its record
TESTERS = min(16, len(os.sched_getaffinity(0)))  # processes of pytest, if pytest-xdist is installed
INTERRUPTED = threading.Event()


def run(
    command: Sequence[str | Path], log: Path, seconds: float, under: Sequence[str] = (), **variables: str
) -> dict[str, object]:
    """Run a Python module with its output in a file; return its status, and the last line if it failed.

    Args:
        under: a command that runs Python, such as compute-sanitizer's.
        variables: environment variables.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environ = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if command[0] != "pytest":
        environ["HERO_REQUIRE_KERNEL"] = "1"  # never time the reference instead of a kernel
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*under, sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env={**os.environ, **environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # signals reach the processes it starts
            # A shell ignores SIGINT in what it starts in the background, and so would every child.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    clock, stopped = Clock(max(seconds, 1)), None
    while process.poll() is None and not stopped:
        stopped = "interrupted" if INTERRUPTED.wait(0.1) else "out of time" if clock.left() <= 0 else None
    if stopped:
        end(process)
    elif process.returncode == 0:
        return {"status": "ok"}
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    ending = records.without_folders(lines[-1])[:200] if lines else "no output"
    if stopped:
        return {"status": f"stopped: {stopped}", "reason": f"{stopped}, {ending}"}
    return {"status": "failed", "reason": f"exit {process.returncode}, {ending}"}


def end(process: subprocess.Popen) -> None:
    """Interrupt a process and those it started; kill them if they take too long to end."""
    for signal_, seconds in ((signal.SIGINT, END_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal_)
            process.wait(seconds)


def gpu_tests() -> list[Path]:
    """Return the test files that mark GPU tests, or import those that do; the others may lack a package."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marks = re.compile(r"\bmark\.gpu\b|^from test_", re.MULTILINE)
    return [file for file in files if marks.search(file.read_text(encoding="utf-8"))]


def run_tests(files: Sequence[Path], folder: Path, seconds: float) -> dict[str, object]:
    """Run the tests marked ``gpu``; the result has the counts and failures of pytest's summary."""
    if not files:
        return {"status": "not run"}
    log = folder / "tests.log"
    command = ["pytest", "-q", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    command += ["-m", "gpu and not exhaustive"]
    command += ["-n", str(TESTERS), "--dist", "worksteal"] if util.find_spec("xdist") else []
    result = run([*command, *files], log, seconds)
    text = log.read_text(encoding="utf-8", errors="replace")
    summary = (re.findall(r"^(?:=+ )?(\d+ .*) in [\d.]+s", text, re.MULTILINE) or [""])[-1]
    counts = {
        name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|errors?|skipped|x\w+)", summary)
    }
    failures = re.findall(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+::.*?)(?: - |$)", text, re.MULTILINE)
    return {**result, "counts": counts, "failures": failures}


def run_sanitizer(folder: Path, seconds: float) -> dict[str, dict[str, object]]:
    """Run every kernel, once per dtype, under compute-sanitizer; a result has the summary that it prints."""
    found, clock, results = shutil.which("compute-sanitizer"), Clock(seconds), {}
    if not found:
        return {tool: {"status": "not run", "reason": "no compute-sanitizer on PATH"} for tool in TOOLS}
    for left, tool in zip(range(len(TOOLS), 0, -1), TOOLS, strict=True):
        log = folder / f"{tool}.log"
        result = run(
            ["pytest", "-q", "--tb=short", "--color=no", "-p", "no:cacheprovider", SANITIZED],
            log,
            clock.left() / left,
            under=[found, "--tool", tool, "--error-exitcode", "9"],
            HERO_REQUIRE_KERNEL="1",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # else memory beside a tensor is valid, too
        )
        text = log.read_text(encoding="utf-8", errors="replace")
        summaries = re.findall(r"^=+ (.*SUMMARY: .*?)\s*$", text, re.MULTILINE)
        results[tool] = {**result, "summary": summaries[-1] if summaries else None}
    return results


def run_end_to_end(small: bool, folder: Path, seconds: float) -> dict[str, object]:
    """Run the model end to end; its record says what failed, what was left out and how it ended."""
    path = folder / "end_to_end.json"
    command = ["bench.end_to_end", "--out", path, "--seconds", f"{seconds - END_SECONDS:.0f}"]
    command += ["--shape", "small", "--rounds", "2"] if small else ["--shape", "7b"]
    result = run(command, folder / "end_to_end.log", seconds)
    if result["status"] != "ok" and path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        records.write(path, {**record, "ended": result["reason"]})
    return result


def run_kernels(path: Path, clock: Clock) -> dict:
    """Run ``bench.kernels`` until every variant has a result or time is over; return the record."""
    while True:
        before = path.read_bytes()
        command = ["bench.kernels", "--out", path, "--seconds", f"{clock.left() - END_SECONDS / 2:.0f}"]
        result = run(command, path.with_suffix(".log"), clock.left())
        record = json.loads(path.read_text(encoding="utf-8"))
        for one in record["results"]:
            if one.get("reason") == ENDED:
                one["reason"] += f": {result['reason']}"
        done = all(one["status"] != "skipped" for one in record["results"])
        stuck = path.read_bytes() == before
        if stuck and not done:
            record["notes"].append(result.get("reason", "no time"))
        records.write(path, record)
        if done or stuck or clock.left() < 1 or INTERRUPTED.is_set():
            return record


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 if every test passed and our results were right."""
    parser = argparse.ArgumentParser(prog="bench/run_device", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "out" / "device")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default {SECONDS})")
    parser.add_argument("--tests", nargs="*", type=Path, default=gpu_tests(), help="test files")
    parser.add_argument("--small", action="store_true", help="small shapes, to test the script itself")
    options = parser.parse_args(arguments)
    clock, folder = Clock(options.seconds - END_SECONDS), options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.log"), folder / "end_to_end.json"):
        old.unlink(missing_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: INTERRUPTED.set())
    path, record = folder / "kernels.json", new_record(options.small, "bench/run_device", arguments)
    print(record["gpu"]["name"] if record["gpu"] else "no GPU", record["versions"], flush=True)
    records.write(path, record)
    tests = [file.resolve() for file in options.tests]
    record["tests"] = run_tests(tests, folder, TEST_SHARE * clock.left())
    records.write(path, record)
    print("tests:", record["tests"], flush=True)
    record["sanitizer"] = {tool: {"status": "not run"} for tool in TOOLS}
    if tests:
        seconds = min(SANITIZER_SECONDS, SANITIZER_SHARE * clock.left())
        record["sanitizer"] = run_sanitizer(folder, seconds)
    records.write(path, record)
    for tool, result in record["sanitizer"].items():
        print(f"compute-sanitizer {tool}:", result, flush=True)
    model = run_end_to_end(options.small, folder, END_TO_END_SHARE * clock.left())
    print("end to end:", model, flush=True)
    record = run_kernels(path, clock)
    wrong = [one for one in record["results"] if one["status"] in ("wrong", "failed")]
    for one in wrong:
        print("kernels:", one["op"], one["geometry"], one["crops"], one["variant"], one["reason"])
    print(f"kernels: {len(record['results'])} results, {len(wrong)} wrong or failed", *record["notes"])
    steps = (record["tests"], model, *record["sanitizer"].values())
    failed = any(step["status"] == "failed" for step in steps)
    return int(failed or bool(wrong) or not record["results"])
