"""Run everything that needs a GPU in one call: the GPU tests, the model end to end, the kernels.

``bench/run_device [FOLDER] [--seconds 570]`` from a plain checkout: nothing is installed or downloaded. Each
step is a process with a time limit: the tests get a share of the time, ``bench.end_to_end`` half of the rest,
``bench.kernels`` what remains. A kernel that takes its process or the device down is recorded as failed, and
a new process continues after it. ``kernels.json`` and ``end_to_end.json`` are written as the steps go.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path

from . import records
from .kernels import BROKEN, new_record
from .records import ROOT, without_folders
from .timing import Clock

SECONDS = 570
STEPS = ("tests", "end_to_end")  # before the kernels
TEST_SHARE, END_TO_END_SHARE = 0.3, 0.5
END_SECONDS = 15  # for writing the record
TESTERS = 6  # processes of pytest, if pytest-xdist is installed
KERNELS_ONLY = {"HERO_REQUIRE_KERNEL": "1"}  # never time the reference instead of a kernel


def run(command: Sequence[str | Path], log: Path, seconds: float, **environ: str) -> int | None:
    """Run a command with its output in a file; return its exit status, or ``None`` if time ran out."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environ = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environ}
    begin, seconds = time.monotonic(), max(seconds, 1)
    limit = ["timeout", "--signal=INT", "--kill-after=15", f"{seconds}"]
    with open(log, "ab") as output:
        status = subprocess.run(
            [*limit, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    return None if status and time.monotonic() - begin >= seconds else status


def ending(status: int | None, log: Path) -> str:
    """Describe how a process ended, with the last line of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    how = "out of time" if status is None else f"exit {status}"
    return how + (f", {without_folders(lines[-1])[:200]}" if lines else "")


# --- the steps -------------------------------------------------------------------------------------------

OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def gpu_tests() -> list[Path]:
    """Return the test files with GPU tests: marked in the file, or in a module beside it that it imports."""
    texts = {file: file.read_text(encoding="utf-8") for file in sorted((ROOT / "tests").glob("*.py"))}
    marked = [file for file, text in texts.items() if re.search(r"\bmark\.gpu\b", text)]
    names = "|".join(re.escape(file.stem) for file in marked)
    imports = re.compile(rf"^(?:from|import) (?:{names})\b", re.MULTILINE)
    tests = {file: text for file, text in texts.items() if file.name.startswith("test_")}
    return [file for file, text in tests.items() if file in marked or (marked and imports.search(text))]


def read_outcomes(log: str) -> dict[str, object]:
    """Count the outcomes in the output of ``pytest -v``, which is there even if pytest was stopped."""
    counts: dict[str, int] = {}
    failures = []
    for line in log.splitlines():
        found = OUTCOME.search(line)
        if found is None or "::" not in line or "%]" not in line:
            continue
        outcome = found[1].lower()
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome in ("failed", "error"):
            failures.append(re.search(r"([^\s/\\]*::.*?)(?:\s+(?:FAILED|ERROR)|\s*$)", line)[1])
    return {"counts": counts, "failures": failures}


def run_tests(files: Sequence[Path], folder: Path, seconds: float, gpu: bool) -> dict[str, object]:
    """Run the GPU tests in the files."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "--color=no"]
    command += ["-p", "no:cacheprovider", *(["-n", str(TESTERS)] if gpu and util.find_spec("xdist") else [])]
    log, begin = folder / "tests.log", time.monotonic()
    status = run([*command, *files], log, seconds, COLUMNS="200")
    result = read_outcomes(log.read_text(encoding="utf-8", errors="replace"))
    fine = status in (0, 5) and not result["failures"]  # 5: no tests
    return {
        "status": "ok" if fine else "stopped: out of time" if status is None else "failed",
        "exit": status,
        "seconds": round(time.monotonic() - begin, 1),
        "files": [file.name for file in files],
        **result,
    }


def run_end_to_end(small: bool, folder: Path, seconds: float, commit: str | None) -> dict[str, object]:
    """Run the model end to end; its record says what failed and what was left out."""
    path, log = folder / "end_to_end.json", folder / "end_to_end.log"
    command = [sys.executable, "-m", "bench.end_to_end", "--out", path, "--seconds", f"{seconds - 10:.0f}"]
    command += ["--shape", "small", "--rounds", "2"] if small else ["--shape", "7b"]
    command += ["--commit", commit] if commit else []
    status = run(command, log, seconds, **KERNELS_ONLY)
    if status == 0:
        return {"status": "ok"}
    reason = ending(status, log)
    if not path.exists():
        return {"status": "failed", "reason": reason}
    record = json.loads(path.read_text(encoding="utf-8"))
    if not record["failed"] or status not in (None, 1):
        record["ended"] = reason
        records.write(path, record)
    stopped = status is None and record["series"]
    return {"status": "stopped: out of time" if stopped else "failed", "reason": reason}


def run_kernels(path: Path, clock: Clock) -> dict:
    """Run ``bench.kernels`` until every variant has a result or time is over; return the record."""
    while clock.left() > 1:
        command = [sys.executable, "-m", "bench.kernels", "--out", path, "--seconds", f"{clock.left():.0f}"]
        log, before = path.with_suffix(".log"), path.read_bytes()
        status = run(command, log, clock.left() + END_SECONDS / 2, **KERNELS_ONLY)
        record = json.loads(path.read_text(encoding="utf-8"))
        if status in (0, 1) and all(one["status"] != "skipped" for one in record["results"]):
            return record
        if status != BROKEN:  # which has told the reason itself
            for one in record["results"]:
                if one.get("reason") == "the process ended here":
                    one["reason"] += f": {ending(status, log)}"
        if path.read_bytes() == before:  # it did not get to a variant
            record["notes"].append(ending(status, log))
            records.write(path, record)
            return record
        records.write(path, record)
    return json.loads(path.read_text(encoding="utf-8"))


# --- the command -----------------------------------------------------------------------------------------


def lines(record: Mapping, folder: Path) -> list[str]:
    """Return a line per comparison with stock and per result of ours, then what went wrong."""
    found, failed = [], [f"failed: {test}" for test in record["tests"].get("failures", ())]
    if (folder / "end_to_end.json").exists():
        model = json.loads((folder / "end_to_end.json").read_text(encoding="utf-8"))
        failed += [f"failed: {one['what']}: {one['reason']}" for one in model["failed"]]
        for batch, one in model.get("summary", {}).items():
            for name, to_stock in one["vision"].items():
                found.append(f"batch {batch}, {name:24} {to_stock['paired']:.3f} of stock")
    for one in record["results"]:
        name = f"{one['geometry'][:9]:9} T={one['crops']:<3} {one['variant'][:42]:42}"
        if one["status"] == "ok" and one["ours"]:
            share = f" {100 * one['floor_share']:4.0f}% of floor" if one["floor_share"] else ""
            found.append(f"{name} {one['us']:9.1f} us{share}")
        elif one["status"] in ("wrong", "failed"):
            failed.append(f"{name} {one['status']}: {one['reason'][:120]}")
    return found + failed


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 if every test passed and our results were right."""
    parser = argparse.ArgumentParser(prog="bench/run_device", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "out" / "device")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default {SECONDS})")
    parser.add_argument("--tests", nargs="*", type=Path, help="test files (default: all with GPU tests)")
    parser.add_argument("--small", action="store_true", help="small shapes, to test the script itself")
    parser.add_argument("--commit", help="the commit, if there is no git")
    options = parser.parse_args(arguments)
    clock, folder = Clock(options.seconds), options.folder.resolve()
    path = folder / "kernels.json"
    folder.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        log.unlink()
    record = new_record(options.small, arguments, command=["bench/run_device"])
    if options.commit:
        record["commit"] = {"hash": options.commit, "dirty": None}
    print(record["gpu"]["name"] if record["gpu"] else "no GPU", record["versions"], flush=True)
    files = gpu_tests() if options.tests is None else [file.resolve() for file in options.tests]
    records.write(path, record)
    for name in STEPS:
        left = clock.left() - END_SECONDS
        if name == "tests":
            record[name] = run_tests(files, folder, TEST_SHARE * left, bool(record["gpu"]))
        else:
            record[name] = run_end_to_end(options.small, folder, END_TO_END_SHARE * left, options.commit)
        print(f"{name.replace('_', ' ')}: {record[name]['status']}", record[name], flush=True)
        records.write(path, record)
    clock.end -= END_SECONDS
    record = run_kernels(path, clock)
    print("\n".join(lines(record, folder)))
    states = {one["status"] for one in record["results"]} | {record[name]["status"] for name in STEPS}
    return int(not record["results"] or bool(states & {"wrong", "failed"}))
