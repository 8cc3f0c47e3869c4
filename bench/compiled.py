"""What the kernels compile to at the shipped configurations: registers, shared memory, spills, wide accesses.

Needs Triton and no GPU. ``python -m bench.compiled --out bench/results/compiled.json`` compiles for every
target and writes the record; ``--page docs/kernels.md`` then shows it there. The launches are those of the
operations themselves, recorded on tensors without memory, so no signature is written down twice, and they
are specialised as Triton's JIT does it. ``tests/test_compile.py`` asserts on the same facts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import hero_kernels as hk
from hero_kernels import Segment, Segments, TileBudgets, TileSignal, _dispatch, _launch

from . import records, report
from .registry import CLIP, INTERNVIT, SIGLIP, Geometry

__all__ = [
    "CHOSEN",
    "DTYPES",
    "GEOMETRIES",
    "LIMITS",
    "TARGETS",
    "Launch",
    "cases",
    "compiled",
    "main",
    "recorded",
]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # shared, bytes
GEOMETRIES = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "internvit": INTERNVIT,
    "clip-h": Geometry("CLIP-H/14-224", layers=32, heads=16, tokens=257, width=80, features=1280),
    "internvit-6b": Geometry("InternViT-6B-448", layers=45, heads=25, tokens=1025, width=128, features=3200),
    "projected": Geometry("CLIP-L/14-336, projected", 24, heads=16, tokens=577, width=64, features=4096),
    "most-patches": Geometry("4096 patches", layers=24, heads=16, tokens=4097, width=64, features=8192),
    "widest": Geometry("7744 patches, heads of 256", 24, heads=4, tokens=7745, width=256, features=1024),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHOSEN = {  # what the record holds: a case of each kernel as the models run it
    "clip": (
        "rows",
        "fused",
        "finalize, ranks",
        "topk, mask",
        "budgets",
        "gather anyres",
        "gather anyres, mask, ranks",
        "gather tiles, mask",
        "gather wide, mask",
    ),
    "siglip": ("received", "finalize, ranks", "gather tiles, mask", "gather wide, mask"),
    "internvit": ("rows", "fused", "topk, mask", "gather tiles, mask"),
}
MOST_CROPS = 64  # of an image
MOST_PATCHES = 4096  # to select from
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


# --- what is launched --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel and its arguments by name, launch options included."""

    kernel: JITFunction
    arguments: Mapping[str, object]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@contextmanager
def _recording(config: str) -> Iterator[list[Launch]]:
    """The launches made inside, with configuration file ``config``; none is carried out."""
    launches = []

    def launch(kernel, grid, **arguments):
        assert all(grid), f"{kernel.__name__}: empty grid {grid}"
        launches.append(Launch(kernel, arguments))

    with (
        mock.patch.object(_launch, "_name_of", lambda device: config),
        mock.patch.object(_launch, "launch", launch),
        mock.patch.object(_dispatch, "kernel", lambda name, device_type: _dispatch.launcher(name)),
    ):
        yield launches


def recorded(run: Callable[[], object], target: str) -> list[Launch]:
    """The launches of a case on a target."""
    amd = target.startswith("gfx") and "amd" in _launch.config_names()
    with _recording("amd" if amd else "default") as launches:
        run()
    return launches


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention_cases(tower: Geometry, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Scores from queries and keys, which are views as a tower's projections leave them."""
    cls_attention, fused, received = hk.cls_attention, hk.attention_with_cls, hk.received_attention
    crops, heads, tokens = 5, tower.heads, tower.tokens
    flat = (_empty(crops, tokens, heads * tower.width, dtype=dtype) for _ in range(3))
    q, k, v = (wide.view(crops, tokens, heads, tower.width).transpose(1, 2) for wide in flat)
    scale, weight = tower.scale, _empty(crops)
    rows = _empty(crops, heads, tower.patches)
    columns = _empty(crops, heads, tokens)
    every = {"weight": weight}
    result = {
        "received": lambda: received(q, k, scale, out=columns, **every),
        "received, one number": lambda: received(q, k, scale, weight=0.5),
    }
    if tower.cls:
        result |= {
            "rows": lambda: cls_attention(q, k, scale, out=rows, **every),
            "rows, one number": lambda: cls_attention(q[:, :, :1], k, scale),
            "rows, second softmax": lambda: cls_attention(
                q, k, scale, weight=weight, out=rows, second_softmax=True
            ),
        }
    if tower.cls and (tower.width <= 128 or dtype != torch.float32):
        result |= {
            "fused": lambda: fused(q, k, v, scale, out=rows, **every),
            "fused, one number": lambda: fused(q, k, v, scale),
            "fused, second softmax": lambda: fused(
                q, k, v, scale, weight=weight, out=rows, second_softmax=True
            ),
        }
    return result


def _segments(tower: Geometry, layout: str) -> Segments:
    """Three layouts: images of LLaVA-NeXT; the most tiles, one after another; the most, nine to a row."""
    patches, side = tower.patches, tower.side
    if layout == "anyres":
        images = (
            Segment(5, 0, 2, patches // 5, 4 * patches // 5, (0, 2 * side)),
            Segment(4, 0, 1, patches // 5, 3 * patches // 5, (2, 3 * side)),
            Segment(1, 0, 1, patches, 0, (0, 0), True),
        )
    elif layout == "tiles":
        images = (Segment(MOST_CROPS, MOST_CROPS - 1, 1, patches, 63 * patches // 5),)
    else:
        images = (Segment(MOST_CROPS, 0, 9, patches, 63 * patches // 5, (0, 7 * side)),)
    return Segments(images, side)


def _signals(crops: int, *temperatures: float | None) -> list[TileSignal]:
    return [TileSignal(_empty(crops), 0.5, temperature) for temperature in temperatures]


def _gather_cases(tower: Geometry, dtype: torch.dtype, layout: str) -> dict[str, Callable[[], object]]:
    """Budgets, top-k and gather of one layout, of a tower's output: without CLS it is a view."""
    segments = _segments(tower, layout)
    crops, patches = segments.crops, segments.patches
    features = _empty(crops, tower.tokens, tower.features, dtype=dtype)[:, tower.tokens - patches :]
    scores = _empty(crops, patches)
    mask = {"valid": _empty(crops, patches, dtype=torch.bool)}
    ranks = {"ranks": _empty(crops, patches, dtype=torch.int16)}
    counts = _empty(crops, dtype=torch.int32)
    signals = {"signals": _signals(crops, 0.1)}
    budgets = {"budgets": TileBudgets(counts, _empty(crops), counts)}
    variants = {
        "": signals,
        ", mask": {"signals": _signals(crops, 0.1, None), **mask},
        ", ranks": {**signals, **ranks},
        ", mask, ranks": {**signals, **mask, **ranks, "valid_counts": counts},
        ", budgets": budgets,
        ", budgets, mask, ranks": {**budgets, **mask, **ranks},
    }
    return {
        f"gather {layout}{name}": lambda given=given: hk.segmented_topk_gather(
            features, scores, segments, **given
        )
        for name, given in variants.items()
    }


def _selection_cases(tower: Geometry, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What follows from rows and scores."""
    finalize, topk, budgets = hk.finalize_scores, hk.segmented_topk, hk.tile_budgets
    rows = _empty(MOST_CROPS, tower.heads, tower.patches)
    scores = rows[:, 0].contiguous()
    valid = _empty(*scores.shape, dtype=torch.bool)
    counts = _empty(MOST_CROPS, dtype=torch.int32)
    tiles = _segments(tower, "tiles")
    result = {
        "finalize": lambda: finalize(rows),
        "finalize, ranks": lambda: finalize(rows, valid=valid, rank=True),
        "budgets": lambda: budgets(_signals(MOST_CROPS, 0.1), counts, tiles),
        "budgets, 4 signals": lambda: budgets(_signals(MOST_CROPS, *[0.1, None] * 2), counts.long(), tiles),
        "budgets, floor": lambda: budgets(_signals(MOST_CROPS, 0.1, None), counts, tiles, allocation="floor"),
    }
    if tower.patches <= MOST_PATCHES:
        result |= {
            "topk": lambda: topk(scores, counts),
            "topk, mask": lambda: topk(scores, counts, valid),
            "topk, half precision": lambda: topk(scores.to(dtype), counts.long()),
        }
        for layout in ("anyres", "tiles", "wide"):
            result |= _gather_cases(tower, dtype, layout)
    return result


def cases(geometry: str, dtype: str) -> dict[str, Callable[[], object]]:
    """Name of each case at a geometry and dtype -> what to run, on tensors without memory."""
    tower, kind = GEOMETRIES[geometry], DTYPES[dtype]
    return {**_attention_cases(tower, kind), **_selection_cases(tower, kind)}


# --- what it compiles to -----------------------------------------------------------------------------------


def _specialised(launch: Launch, target: str) -> ASTSource:
    """What the JIT compiles for a launch, by the steps of ``JITFunction.run``."""
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, _ = binder(**launch.arguments)
    names = [parameter.name for parameter in kernel.params]
    kinds, given = [kind for kind, _ in special], [attribute for _, attribute in special]
    constants = find_paths_if(kinds, lambda _, kind: kind == "constexpr")
    attributes = find_paths_if(given, lambda _, attribute: isinstance(attribute, str))
    values = [bound[name] for name in names]
    return ASTSource(
        kernel,
        dict(zip(names, kinds, strict=True)),
        {path: get_iterable_path(values, path) for path in constants},
        {path: backend.parse_attr(get_iterable_path(given, path)) for path in attributes},
    )


_KNOWN: dict[tuple[str, ...], dict[str, int]] = {}


def compiled(launch: Launch, target: str) -> dict[str, int]:
    """Facts about the code of a launch on a target; several launches may share it."""
    source = _specialised(launch, target)
    options = {name: value for name, value in launch.arguments.items() if name not in source.signature}
    key = (target, launch.name, *map(repr, (source.signature, source.constants, source.attrs, options)))
    if key not in _KNOWN:
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
            if VERSION < (3, 4) and target.startswith("gfx"):  # came without a linker; assembly is enough
                os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true"))
            kernel = triton.compile(source, target=TARGETS[target], options=options)
        facts = _amd(kernel.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(kernel.asm["cubin"])
        _KNOWN[key] = {"shared": kernel.metadata.shared, **facts}
    return _KNOWN[key]


def _tool(name: str, *arguments: str) -> str:
    """Output of a program that comes with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def _nvidia(cubin: bytes) -> dict[str, int]:
    """From the machine code: spills in bytes a thread; a wide access is one of 16 bytes a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", used).groups()
    )
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)

    def count(pattern: str) -> int:
        return sum(re.match(pattern, name) is not None for name in names)

    def wide(name: str) -> int:
        return count(rf"{name}\.E.*\.128") + 2 * count(rf"{name}\.E.*\.256")

    return {
        "registers": registers,
        "spills": stack + local,
        "wide_loads": wide("LDG") + wide("LDGSTS"),
        "wide_stores": wide("STG"),
        "instructions": sum(name != "NOP" for name in names),
    }


def _amd(code: str) -> dict[str, int]:
    """From the assembly; scalar registers spill to lanes of vector registers, which takes no memory."""

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:?\s+(\d+)", code).group(1))

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", code, re.MULTILINE))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "scalar_spills": number("sgpr_spill_count"),
        "wide_loads": count("(global|buffer)_load_(lds_)?dwordx4"),
        "wide_stores": count("(global|buffer)_store_dwordx4"),
        "instructions": count(r"[sv]_\w+ |(global|buffer|ds|flat)_\w+ "),
    }


# --- the record --------------------------------------------------------------------------------------------


def facts(dtype: str = "bf16") -> Iterator[dict[str, object]]:
    """A row for each launch of the chosen cases on each target."""
    for geometry, names in CHOSEN.items():
        every = cases(geometry, dtype)
        for name in names:
            for target in TARGETS:
                for launch in recorded(every[name], target):
                    yield {
                        "tower": GEOMETRIES[geometry].name,
                        "case": name,
                        "kernel": launch.name.removesuffix("_kernel"),
                        "target": target,
                        **compiled(launch, target),
                    }


def tables(content: Mapping) -> list[str]:
    """The section of the page: for each tower a table of its launches."""
    targets = list(TARGETS)
    commit = content["commit"]
    code = (commit["hash"] or "unknown")[:12] + (", with uncommitted changes" if commit["dirty"] else "")
    lines = [
        f"`{content['command']}`, {content['date']}, commit {code}, Triton {content['versions']['triton']}, "
        f"{content['dtype']}.",
        "",
        "Each cell: registers a thread, shared memory, instructions; bytes a thread spilled, if any.",
    ]
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in content["launches"]:
        shared = row["shared"]
        shared = f"{shared / 1024:.4g} KiB" if shared >= 1024 else f"{shared} B"
        cell = f"{row['registers']} · {shared} · {row['instructions']}"
        cell += f" · spills {row['spills']} B" if row["spills"] else ""
        cells.setdefault((row["tower"], row["kernel"], row["case"]), {})[row["target"]] = cell
    for tower in dict.fromkeys(tower for tower, _, _ in cells):
        lines += ["", f"**{tower}**", "", "| kernel | case | " + " | ".join(targets) + " |"]
        lines += ["| --- | --- |" + " ---: |" * len(targets)]
        lines += [
            f"| `{kernel}` | {case} | " + " | ".join(cell[target] for target in targets) + " |"
            for (of, kernel, case), cell in cells.items()
            if of == tower
        ]
    return lines


def main(arguments: Sequence[str]) -> int:
    """The command: returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="compile, and write the record here")
    parser.add_argument(
        "--record", type=Path, default=report.RESULTS / "compiled.json", help="record to show"
    )
    parser.add_argument("--page", type=Path, help="page to show the record on")
    options = parser.parse_args(arguments)
    if not (options.out or options.page):
        parser.error("expected --out, --page or both")
    if options.out:
        content = {
            "benchmark": "compiled",
            **records.environment("bench.compiled", arguments, ("torch", "triton")),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "dtype": "bf16",
            "launches": list(facts("bf16")),
        }
        records.write(options.out, content)
    if options.page:
        content = json.loads((options.out or options.record).read_text(encoding="utf-8"))
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(report.replace(page, "compiled", tables(content)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
