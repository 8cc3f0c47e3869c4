"""Records: JSON files with the numbers of a benchmark and its versions, commit, command and machine.

They contain no host names and no absolute paths.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_NUMBERS = re.compile(r"\[\n[^\[\]{}\"]*\]")  # no string holds a newline
CODE = ("hero", "hero_kernels", "bench", ":!bench/results")
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy")
COMMIT = "HERO_COMMIT"  # environment variable: the commit of a copy without git


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, object]:
    """The commit, and whether the code differs from it; ``None`` where that is not known."""
    changes = _git("status", "--porcelain", "--", *CODE)
    name = _git("rev-parse", "HEAD") or os.environ.get(COMMIT)
    return {"hash": name, "dirty": None if changes is None else bool(changes)}


def cpu_name() -> str:
    """The processor's model name."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", file.read_text(encoding="utf-8")) if file.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def without_folders(text: str) -> str:
    """A text with absolute paths cut to the part within the repository, or to the file name."""
    text = text.replace(f"{ROOT}{os.sep}", "")
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def reason(error: BaseException) -> str:
    """The type and the first line of an error, without folders."""
    line = (str(error).strip().splitlines() or ["no message"])[0][:300]
    return f"{type(error).__name__}: {without_folders(line)}"


def accelerator() -> dict[str, object] | None:
    """The GPU and its driver; ``None`` without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties, driver = torch.cuda.get_device_properties(0), None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        driver = done.stdout.strip().splitlines()[0] if done.returncode == 0 else None
    memory = properties.total_memory / 2**30
    return {"name": properties.name, "memory_gib": memory, "driver": driver, "hip": torch.version.hip}


def environment(benchmark: str, command: str, arguments: Sequence[str]) -> dict[str, object]:
    """The beginning of a record: its benchmark, date, command, commit, versions and machine."""
    import hero

    versions = {"python": platform.python_version(), "hero": hero.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": without_folders(" ".join([command, *map(str, arguments)])),
        "commit": commit(),
        "versions": versions,
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.system()},
        "gpu": accelerator(),
    }


def write(path: str | Path, record: Mapping[str, object]) -> None:
    """Write a record as JSON, lists of numbers on one line. The file is replaced atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    text = re.sub(_NUMBERS, lambda found: " ".join(found[0].split()), json.dumps(record, indent=1))
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
