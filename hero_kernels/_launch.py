"""The function that launches kernels, and their tuned configurations, which are data.

A configuration file ``configs/NAME.json`` maps a kernel to rows ``{"upto": size, ...}`` in ascending order. A
launch uses the first row with ``size <= upto``; the size is a head width, a number of patches or of features.
``default.json`` serves every GPU without a file of its own, ``amd.json`` AMD GPUs, which do not support
``maxnreg`` (it keeps ptxas from spilling registers for higher occupancy). ``python -m bench.tune`` writes the
file of one GPU, whose rows also have their measured time and its ``source``. It is named after the device,
in lower case with dashes, or the beginning of its name: ``nvidia-h100.json`` serves an "NVIDIA H100 80GB
HBM3". Nothing is tuned in the user's process.

A configuration never depends on the number of crops or images: block sizes fix the order of sums, and a
crop's scores must not depend on the rest of the batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import torch

__all__ = ["config_names", "configuration", "launch", "read_config"]

CONFIGS = resources.files(__package__) / "configs"
NOTES = {"upto", "us", "source"}  # of a row; the rest are launch options


def launch(kernel: Any, grid: Sequence[int], *, enable_fp_fusion: bool, **arguments: object) -> None:
    """Launch a Triton kernel with its arguments by name; nothing is launched on an empty grid.

    ``enable_fp_fusion`` has no default, since versions of Triton differ in theirs. Tests and benchmarks
    replace this function to record launches.
    """
    if all(grid):
        kernel[tuple(grid)](**arguments, enable_fp_fusion=enable_fp_fusion)


def config_names() -> list[str]:
    """Names of the configuration files of the package."""
    return sorted(
        file.name.removesuffix(".json") for file in CONFIGS.iterdir() if file.name.endswith(".json")
    )


@cache
def read_config(name: str) -> dict[str, Any]:
    """The content of a configuration file."""
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def serves(name: str, device_name: str) -> bool:
    """Whether a configuration file is named after a device, or after the first words of its name."""
    return f"{device_name} ".lower().replace(" ", "-").startswith(f"{name}-")


@cache
def _name_of(device: torch.device) -> str:
    """The configuration file of a device."""
    if device.type != "cuda":  # the interpreter
        return "default"
    found = [name for name in config_names() if serves(name, torch.cuda.get_device_name(device))]
    return max(found, key=len, default="amd" if torch.version.hip else "default")


def configuration(kernel: str, size: int, device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel at a size on a device: block sizes, ``num_warps``, ``num_stages``.

    Raises:
        ValueError: the size is larger than the kernel supports.
    """
    return dict(_row(_name_of(device), kernel, size))


@lru_cache(maxsize=1024)
def _row(name: str, kernel: str, size: int) -> tuple[tuple[str, Any], ...]:
    rows = read_config(name)["kernels"][kernel]
    for row in rows:
        if size <= row["upto"]:
            return tuple((key, value) for key, value in row.items() if key not in NOTES)
    what = (
        "rows: expected at most {} patches" if kernel == "finalize" else "key: expected heads at most {} wide"
    )
    raise ValueError(f"{what.format(rows[-1]['upto'])} on a GPU, got {size}")
