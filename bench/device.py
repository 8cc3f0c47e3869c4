"""What a GPU machine is asked to do in one call: the GPU tests, the model end to end, the kernels.

``bench/run_device [FOLDER] [--out FILE] [--seconds 570] [--sanitize]`` from a plain checkout: nothing is
installed or fetched, and neither the package nor pytest-benchmark has to be there. Every step runs in a
process of its own and has an end: the tests a share of the time, ``bench.end_to_end`` half of what they
leave, the kernels' benchmarks the rest, each the most important first. What does not fit is recorded as left
out. A kernel that takes its process or the device down is recorded as failed, and the next process goes on
behind it; what was measured before is kept.

The records, ``kernels.json`` and ``end_to_end.json``, are written after every step. The last lines printed
are a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path

from . import record as records
from .end_to_end_page import targets
from .record import ROOT, without_folders
from .timing import Clock

__all__ = ["main"]

SECONDS = 570
TEST_SHARE = 0.3
END_TO_END_SHARE = 0.5  # of what the tests leave; what it does not need goes to the kernels
SANITIZE_SECONDS = 80  # for each tool
STALL_SECONDS = 120  # for one variant: compiling is the longest
END_SECONDS = 15  # kept for writing the record
TESTERS = 6  # processes of pytest, where pytest-xdist is there: each compiles its own kernels
KERNELS_ONLY = {"HERO_REQUIRE_KERNEL": "1"}  # no twin is timed as if it were a kernel
TOOLS = ("memcheck", "racecheck")
SMALL_ROUNDS = 2
PACKAGES = ("torch", "triton", "transformers", "numpy")


def _environ(**more: str) -> dict[str, str]:
    """Of the processes: the checkout is importable, nothing is fetched."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **more}


def _end(process: subprocess.Popen, gently: bool = False) -> None:
    """End a process that was started in a session of its own, and all that it started."""
    for number, patience in ((signal.SIGINT, 15 if gently else 0), (signal.SIGKILL, 15)):
        if patience and process.poll() is None:
            try:
                os.killpg(process.pid, number)
                process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def _run(command: Sequence[str | Path], log: Path, seconds: float, **environ: str) -> int | None:
    """Run with output into a file; the exit status, ``None`` where the time ran out."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=_environ(**environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            _end(process, gently=True)
            return None


# The tests.

OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def gpu_tests() -> list[Path]:
    """Test files with tests for a GPU: marked so in the file, or in one beside it that it imports."""
    texts = {file: file.read_text(encoding="utf-8") for file in sorted((ROOT / "tests").glob("*.py"))}
    marked = [file for file, text in texts.items() if re.search(r"\bmark\.gpu\b", text)]
    names = "|".join(re.escape(file.stem) for file in marked)
    imports = re.compile(rf"^(?:from|import) (?:{names})\b", re.MULTILINE)
    tests = {file: text for file, text in texts.items() if file.name.startswith("test_")}
    return [file for file, text in tests.items() if file in marked or (marked and imports.search(text))]


def read_outcomes(log: str) -> dict[str, object]:
    """How many tests ended how, from the lines of ``pytest -v``, which are there even if it was stopped."""
    counts: dict[str, int] = {}
    unhappy = []
    for line in log.splitlines():
        found = OUTCOME.search(line)
        if found is None or "::" not in line or "%]" not in line:
            continue
        outcome = found[1].lower()
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome in ("failed", "error"):
            unhappy.append(re.search(r"([^\s/\\]*::.*?)(?:\s+(?:FAILED|ERROR)|\s*$)", line)[1])
    return {"counts": counts, "failures": unhappy[:100]}


def run_tests(files: Sequence[Path], folder: Path, seconds: float) -> dict[str, object]:
    """Run the GPU tests of the files."""
    if not files:
        return {"status": "none", "reason": "no test file has tests marked gpu"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "--color=no"]
    command += ["-p", "no:cacheprovider"]
    if util.find_spec("xdist") and not _no_gpu():
        command += ["-n", str(TESTERS)]
    log = folder / "tests.log"
    begin = time.monotonic()
    status = _run([*command, *files], log, seconds, COLUMNS="200")
    result = read_outcomes(log.read_text(encoding="utf-8", errors="replace"))
    fine = status in (0, 5) and not result["failures"]  # 5: none was left to run
    return {
        "status": "ok" if fine else "stopped: out of time" if status is None else "failed",
        "exit": status,
        "seconds": round(time.monotonic() - begin, 1),
        "files": [file.name for file in files],
        **result,
    }


def _no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


# The benchmarks.


class Worker:
    """A process of ``bench.kernels`` and what it says, line by line."""

    def __init__(self, arguments: Sequence[str], log: Path):
        self.log, self.said_all = log, False
        with open(log, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.kernels", *arguments],
                cwd=ROOT,
                env=_environ(**KERNELS_ONLY),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def message(self, seconds: float) -> dict | None:
        """What it says next; ``None`` at its end.

        Raises:
            queue.Empty: nothing for so long.
        """
        while True:
            line = self.lines.get(timeout=max(seconds, 0.01))
            if line is None:
                self.said_all = True
                return None
            try:
                return json.loads(line)
            except ValueError:
                continue  # a library's own words

    def end(self) -> str:
        """End it; how it ended, with the last line of its errors."""
        if self.said_all:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        _end(self.process)
        self.process.wait()
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"exit {self.process.returncode}" + (f", {without_folders(lines[-1])[:200]}" if lines else "")


def _kind(described: Mapping) -> str:
    """The status of what gave no result."""
    return "failed" if described["ours"] else "unavailable"


def run_kernels(
    small: bool, folder: Path, clock: Clock, progress: Callable[[Mapping], None]
) -> dict[str, object]:
    """All benchmarks of the kernels that fit into the time."""
    plan, ceilings, results, notes = None, None, {}, []
    start, idle = 0, 0
    while (plan is None or start < len(plan)) and idle < 3 and clock.left() > 0:
        worker = Worker(["--start", str(start), *(["--small"] if small else [])], folder / "kernels.log")
        current, reason = None, None
        while True:
            try:
                message = worker.message(min(STALL_SECONDS, clock.left()))
            except queue.Empty:
                reason = "out of time" if clock.left() <= 0.5 else f"no answer in {STALL_SECONDS} s"
                break
            if message is None:
                break
            plan = message.get("plan", plan)
            ceilings = message.get("ceilings") or ceilings
            if "note" in message:
                notes.append(message["note"])
            if "begin" in message:
                current = message["begin"]
            if "result" in message:
                results[message["number"]] = message["result"]
                if "reason" in message["result"]:
                    message["result"]["reason"] = without_folders(message["result"]["reason"])
                progress(message["result"])
        ended = worker.end()
        if reason == "out of time":
            break
        if current is None:  # it never came to a variant
            idle += 1
            notes.append(reason or ended)
            continue
        if current not in results and not (ended.startswith("exit 0") and reason is None):
            results[current] = {
                **plan[current],
                "status": _kind(plan[current]),
                "reason": reason or f"its process ended: {ended}",
            }
            progress(results[current])
        if ended.startswith("exit 0") and reason is None:
            start = len(plan)
        else:
            start = current + 1
    for number, described in enumerate(plan or []):
        if number >= start:
            described.update(status="skipped", reason="left out: no time")
        else:
            described.update(status=_kind(described), reason="its inputs could not be made")
        results.setdefault(number, described)
    return {"ceilings": ceilings, "notes": notes, "results": [results[number] for number in sorted(results)]}


# The model end to end.


def run_end_to_end(small: bool, folder: Path, seconds: float, commit: str | None) -> dict[str, object]:
    """``bench.end_to_end`` into ``end_to_end.json``; how that ended."""
    path, log = folder / "end_to_end.json", folder / "end_to_end.log"
    path.unlink(missing_ok=True)
    if not small and _no_gpu():
        return {"status": "not run", "reason": "no GPU"}
    command = [sys.executable, "-m", "bench.end_to_end", "--out", path, "--seconds", f"{seconds:.0f}"]
    command += ["--shape", "small", "--rounds", str(SMALL_ROUNDS)] if small else ["--shape", "7b"]
    command += ["--commit", commit] if commit else []
    begin = time.monotonic()
    status = _run(command, log, seconds + END_SECONDS, **KERNELS_ONLY)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    result: dict[str, object] = {"exit": status, "seconds": round(time.monotonic() - begin, 1)}
    if status == 0:
        return {"status": "ok", **result}
    reason = "out of time" if status is None else f"exit {status}"
    if lines:
        reason += f", {without_folders(lines[-1])[:200]}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"status": "failed", "reason": reason, **result}
    if not record["failed"] or status not in (None, 1):
        record["ended"] = reason
        records.write(path, record)
    stopped = status is None and record["series"]
    return {"status": "stopped: out of time" if stopped else "failed", "reason": reason, **result}


# Sanitizer.


def run_sanitizer(folder: Path, clock: Clock) -> dict[str, object]:
    """memcheck and racecheck over every operation at a small shape."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or _no_gpu():
        return {"status": "unavailable", "reason": "no GPU" if tool else "no compute-sanitizer"}
    check = [sys.executable, "-m", "bench.kernels", "--small", "--check"]
    _run(check, folder / "sanitize-none.log", min(60, clock.left()), **KERNELS_ONLY)  # compiles
    results = {}
    for name in TOOLS:
        log = folder / f"sanitize-{name}.log"
        command = [tool, "--tool", name, "--error-exitcode", "9", *check]
        seconds = min(SANITIZE_SECONDS, clock.left() - END_SECONDS)
        status = _run(command, log, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **KERNELS_ONLY)
        text = log.read_text(encoding="utf-8", errors="replace")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
        results[name] = {
            "exit": status,
            "summary": "; ".join(summary) or "none: stopped" if status is None else "; ".join(summary),
            "checked": text.count('"status": "checked"'),
        }
    fine = all(result["exit"] == 0 for result in results.values())
    return {"status": "ok" if fine else "failed", "tools": results}


# The record.


def table(results: Sequence[Mapping]) -> list[str]:
    """A line for each case: the first of ours, the fastest peer that does as much; what went wrong last."""
    cases: dict[tuple, list[Mapping]] = {}
    for one in results:
        cases.setdefault((one["op"], one["geometry"], one["crops"]), []).append(one)
    lines = []
    for (_, geometry, crops), variants in cases.items():
        ours = next(one for one in variants if one["ours"])
        if ours["status"] != "ok":
            continue
        line = f"{geometry[:9]:9} T={crops:<3} {ours['variant'][:31]:31} {ours['us']:8.1f} us"
        if ours["floor_share"]:
            line += f" {ours['gb_s']:5.0f} GB/s {100 * ours['floor_share']:3.0f}% of floor"
        us = {one["variant"]: one["us"] for one in variants if one["status"] == "ok"}
        peers = [
            (one["us"] / us[one["against"]], one["variant"], one["against"])
            for one in variants
            if one["status"] == "ok" and not one["less"] and one["against"] in us
        ]
        if peers:
            ratio, peer, against = min(peers)
            line += f"; {ratio:.2f}x {peer[:36]}" + (
                "" if against == ours["variant"] else " / " + against[-9:]
            )
        lines.append(line)
    for one in results:
        if one["status"] in ("wrong", "failed"):
            lines.append(
                f"{one['status']}: {one['geometry']} T={one['crops']} {one['variant']}: {one['reason'][:120]}"
            )
    return lines


def _end_to_end_lines(folder: Path) -> list[str]:
    """What the model end to end came to, a line a target."""
    path = folder / "end_to_end.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    failed = [f"failed: {one['what']}: {one['reason']}" for one in found["failed"]]
    return [line for line in targets([found])[2:] if "not measured" not in line] + failed


def _good(record: Mapping) -> bool:
    """Whether nothing failed: a peer that is missing is no failure, nor is time that ran out."""
    bad = [one for one in record["results"] if one["status"] == "wrong" or one["status"] == "failed"]
    steps = (record["tests"], record["sanitizer"] or {}, record["end_to_end"])
    return not bad and bool(record["results"]) and not any(step.get("status") == "failed" for step in steps)


def _path(folder: str | None, out: str | None) -> Path:
    """The record's file."""
    if out:
        return Path(out)
    return Path(folder or ROOT / "out" / "device") / "kernels.json"


def main(arguments: Sequence[str]) -> int:
    """The command: returns the exit status, 0 where every test passed and every result of ours was right."""
    parser = argparse.ArgumentParser(prog="bench/run_device", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", help="folder for kernels.json and logs (default out/device)")
    parser.add_argument("--out", help="JSON file to write; logs go beside it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default {SECONDS})")
    parser.add_argument("--tests", nargs="*", type=Path, help="test files (default: all with GPU tests)")
    parser.add_argument("--small", action="store_true", help="small shapes, to test the script itself")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer on small shapes too")
    parser.add_argument("--commit", help="the commit, where there is no git to ask")
    options = parser.parse_args(arguments)
    clock = Clock(options.seconds)
    path = _path(options.folder, options.out)
    folder = path.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("kernels.log"):
        log.unlink()

    import torch

    gpu = records.accelerator()
    record: dict[str, object] = {
        "benchmark": "kernels",
        "small": options.small,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **records.environment("", arguments, PACKAGES, command=["bench/run_device"]),
        "code": records.fingerprint(),
        "gpu": gpu,
        "dtype": "bfloat16" if gpu else "float32",
        "tests": {"status": "not run"},
        "end_to_end": {"status": "not run"},
        "sanitizer": None,
        "ceilings": None,
        "notes": [],
        "results": [],
    }
    if options.commit:
        record["commit"] = {"hash": options.commit, "dirty": None}
    print(f"{gpu['name'] if gpu else 'no GPU'}, torch {torch.__version__}", flush=True)
    records.write(path, record)

    files = gpu_tests() if options.tests is None else [file.resolve() for file in options.tests]
    record["tests"] = run_tests(files, folder, min(TEST_SHARE * options.seconds, clock.left()))
    print("tests:", record["tests"]["status"], record["tests"].get("counts", ""), flush=True)
    records.write(path, record)

    if options.sanitize:
        record["sanitizer"] = run_sanitizer(folder, clock)
        print("sanitizer:", json.dumps(record["sanitizer"]), flush=True)
        records.write(path, record)

    share = END_TO_END_SHARE * (clock.left() - END_SECONDS)
    record["end_to_end"] = run_end_to_end(options.small, folder, share, options.commit)
    print("end to end:", json.dumps(record["end_to_end"]), flush=True)
    records.write(path, record)

    clock.end -= END_SECONDS

    def progress(result: Mapping) -> None:
        record["results"].append(result)
        records.write(path, record)  # what is measured is not lost, whatever comes

    record.update(run_kernels(options.small, folder, clock, progress))
    records.write(path, record)
    lines = [*_end_to_end_lines(folder), *table(record["results"])]
    skipped = sum(one["status"] == "skipped" for one in record["results"])
    print("\n".join(lines))
    print(f"tests: {record['tests']['status']} {record['tests'].get('counts', '')}; left out: {skipped}")
    for test in record["tests"].get("failures", ())[:10]:
        print("failed:", test)
    return 0 if _good(record) else 1
