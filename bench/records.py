"""Records: JSON files with the numbers of a benchmark and its versions, commit, command and machine.

They contain no host names and no absolute paths.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_NUMBERS = re.compile(r"\[\n[^\[\]{}\"]*\]")  # no string holds a newline
CODE = ("hero", "hero_kernels", "bench", ":!bench/results")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, object]:
    """The commit, and whether the code differs from it; ``None`` outside a git checkout."""
    changes = _git("status", "--porcelain", "--", *CODE)
    return {"hash": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def cpu_name() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _words(arguments: Sequence[str]) -> list[str]:
    """Arguments, absolute paths made relative to the repository or cut to their last part."""
    paths = [Path(word) for word in arguments]
    inside = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name for path in paths]
    return [str(one) if path.is_absolute() else word for word, path, one in zip(arguments, paths, inside)]


def without_folders(text: str) -> str:
    """An error message with absolute paths cut to the part within the repository, or to the file name."""
    text = text.replace(f"{ROOT}{os.sep}", "")
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def fingerprint() -> str:
    """The beginning of a hash of the code, for copies without git."""
    digest = hashlib.sha256()
    for folder in CODE[:3]:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".json") and "results" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def accelerator() -> dict[str, object] | None:
    """The GPU and its driver; ``None`` without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        driver = done.stdout.strip().splitlines()[0] if done.returncode == 0 else None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
        "driver": driver,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
    }


def environment(
    module: str, arguments: Sequence[str], packages: Sequence[str], command: Sequence[str] | None = None
) -> dict[str, object]:
    """Versions, commit, command and machine of a run of ``python -m module arguments``, or of ``command``."""
    import hero

    versions = {"python": platform.python_version(), "hero": hero.__version__}
    for package in packages:
        imported = sys.modules.get(package)
        version = getattr(imported, "__version__", None)
        try:
            versions[package] = str(version) if version else metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    return {
        "command": " ".join([*(command or ("python", "-m", module)), *_words(arguments)]),
        "commit": commit(),
        "versions": versions,
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.system()},
    }


def write(path: str | Path, record: Mapping[str, object]) -> None:
    """Write a record as JSON, lists of numbers on one line. The file is replaced atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    text = re.sub(_NUMBERS, lambda found: " ".join(found[0].split()), json.dumps(record, indent=1))
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
