"""What the kernels compile to: shared memory, spills, wide accesses. Needs Triton and no GPU.

The operations run on tensors without memory. Their launches are recorded, specialised as by Triton's JIT and
compiled for each target. ``tests/test_compile.py`` asserts on the facts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple
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

from .registry import CLIP, INTERNVIT, SIGLIP, Geometry

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # shared, bytes
REGISTERS = 64 << 10  # of a block of threads on NVIDIA GPUs
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
MOST_CROPS, MOST_PATCHES = 64, 4096  # of an image in the usual number of lanes; of a crop to select from
MORE_CROPS = 256  # of an image at all
MOST_CANDIDATES = 4096  # of a segment
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


# --- what is launched --------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A kernel and its arguments by name, launch options included."""

    kernel: JITFunction
    arguments: Mapping[str, object]

    @property
    def name(self) -> str:
        return self.kernel.__name__


def recorded(run: Callable[[], object], target: str) -> list[Launch]:
    """Return the launches of a case on a target; none is carried out."""
    amd = target.startswith("gfx") and "amd" in _launch.config_names()
    launches = []

    def launch(kernel, grid, **arguments):
        assert all(grid), f"{kernel.__name__}: empty grid {grid}"
        launches.append(Launch(kernel, arguments))

    with (
        mock.patch.object(_launch, "_name_of", lambda device: "amd" if amd else "default"),
        mock.patch.object(_launch, "launch", launch),
        mock.patch.object(_dispatch, "kernel", lambda name, device_type: _dispatch.launcher(name)),
    ):
        run()
    return launches


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention_cases(tower: Geometry, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the attention operations on views as a tower's projections return them."""
    crops, heads, tokens, scale = 5, tower.heads, tower.tokens, tower.scale
    flat = (_empty(crops, tokens, heads * tower.width, dtype=dtype) for _ in range(3))
    q, k, v = (wide.view(crops, tokens, heads, tower.width).transpose(1, 2) for wide in flat)
    cls = q[:, :, :1]
    rows = {"weight": _empty(crops), "out": _empty(crops, heads, tower.patches)}
    columns = {**rows, "out": _empty(crops, heads, tokens)}
    segments = {"weight": _empty(3), "out": _empty(1, heads, tokens), "max_seqlen": tokens}
    segments["cu_seqlens"] = _empty(4, dtype=torch.int32)
    twice = {**rows, "second_softmax": True}
    result = {
        "received": partial(hk.received_attention, q, k, scale, **columns),
        "received, one number": partial(hk.received_attention, q, k, scale, weight=0.5),
        "received, lse": partial(hk.received_attention, q, k, scale, **columns, lse=_empty(*q.shape[:3])),
        "received, segments": partial(hk.received_attention, q[:1], k[:1], scale, **segments),
        "received, segments, lse": partial(
            hk.received_attention, q[:1], k[:1], scale, **segments, lse=_empty(1, *q.shape[1:3])
        ),
    }
    if tower.cls:
        result |= {
            "rows": partial(hk.cls_attention, q, k, scale, **rows),
            "rows, one number": partial(hk.cls_attention, cls, k, scale),
            "rows, second softmax": partial(hk.cls_attention, q, k, scale, **twice),
        }
    if tower.cls and (tower.width <= 128 or dtype != torch.float32):
        result |= {
            "fused": partial(hk.attention_with_cls, q, k, v, scale, **rows),
            "fused, one number": partial(hk.attention_with_cls, q, k, v, scale),
            "fused, second softmax": partial(hk.attention_with_cls, q, k, v, scale, **twice),
        }
    return result


def _segments(tower: Geometry, layout: str) -> Segments:
    """Return a layout: LLaVA-NeXT's images; the most tiles in the usual number of lanes, one after another or
    nine to a row; the most at all in one row, and one tile.
    """
    patches, side = tower.patches, tower.side
    if layout == "anyres":
        images = (
            Segment(5, 0, 2, patches // 5, 4 * patches // 5, (0, 2 * side)),
            Segment(4, 0, 1, patches // 5, 3 * patches // 5, (2, 3 * side)),
            Segment(1, 0, 1, patches, 0, (0, 0), True),
        )
    elif layout == "tiles":
        images = (Segment(MOST_CROPS, MOST_CROPS - 1, 1, patches, 63 * patches // 5),)
    elif layout == "many":
        images = (
            # A row that wide is one of blocks, which are small: larger crops would not fit registers.
            Segment(MORE_CROPS, 0, 255 if side <= 24 else 51, patches, 51 * patches, (0, side)),
            Segment(1, -1, 1, 0, patches),
        )
    else:
        images = (Segment(MOST_CROPS, 0, 9, patches, 63 * patches // 5, (0, 7 * side)),)
    return Segments(images, side)


def _signals(crops: int, *temperatures: float | None) -> list[TileSignal]:
    return [TileSignal(_empty(crops), 0.5, temperature) for temperature in temperatures]


def _gather_cases(tower: Geometry, dtype: torch.dtype, layout: str) -> dict[str, Callable[[], object]]:
    """Return the gathers of one layout, from a tower's output of which CLS is cut off."""
    segments = _segments(tower, layout)
    crops, patches = segments.crops, segments.patches
    features = _empty(crops, tower.tokens, tower.features, dtype=dtype)[:, tower.tokens - patches :]
    scores = _empty(crops, patches)
    counts, valid = _empty(crops, dtype=torch.int32), _empty(crops, patches, dtype=torch.bool)
    ready = {"budgets": TileBudgets(counts, _empty(crops), counts), "valid": valid}
    variants = {
        "": {"signals": _signals(crops, 0.1)},
        ", mask": {"signals": _signals(crops, 0.1, None), "valid": valid},
        ", budgets, mask, ranks": {**ready, "ranks": _empty(crops, patches, dtype=torch.int16)},
    }
    return {
        f"gather {layout}{name}": partial(hk.segmented_topk_gather, features, scores, segments, **given)
        for name, given in variants.items()
    }


def _selection_cases(tower: Geometry, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the operations after the attention."""
    rows = _empty(MOST_CROPS, tower.heads, tower.patches)
    scores = rows[:, 0].contiguous()
    valid, counts = _empty(*scores.shape, dtype=torch.bool), _empty(MOST_CROPS, dtype=torch.int32)
    tiles, one, two = _segments(tower, "tiles"), _signals(MOST_CROPS, 0.1), _signals(MOST_CROPS, 0.1, None)
    many, more = _segments(tower, "many"), _empty(MORE_CROPS + 1, dtype=torch.int32)
    result = {
        "finalize": partial(hk.finalize_scores, rows),
        "finalize, ranks": partial(hk.finalize_scores, rows, valid=valid, rank=True),
        "budgets": partial(hk.tile_budgets, one, counts, tiles),
        "budgets, 4 signals": partial(hk.tile_budgets, two * 2, counts.long(), tiles),
        "budgets, many tiles": partial(hk.tile_budgets, _signals(MORE_CROPS + 1, 0.1, None), more, many),
        "budgets, floor": partial(hk.tile_budgets, two, counts, tiles, allocation="floor"),
    }
    features = _empty(MOST_CROPS, tower.tokens, tower.features, dtype=dtype)[
        :, tower.tokens - tower.patches :
    ]
    result |= {
        "rarity": partial(hk.rarity, features, tiles),
        "rarity, mask": partial(hk.rarity, features, tiles, valid),
        "rarity, narrow": partial(hk.rarity, features[..., :64], tiles, valid),
    }
    if tower.patches <= MOST_PATCHES:
        result |= {
            "topk": partial(hk.segmented_topk, scores, counts),
            "topk, mask": partial(hk.segmented_topk, scores, counts, valid),
            "topk, half precision": partial(hk.segmented_topk, scores.to(dtype), counts.long()),
        }
        for layout in ("anyres", "tiles", "wide", "many"):
            result |= _gather_cases(tower, dtype, layout)
    return result


def _diverse_cases(tower: Geometry, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return each rule on crops, and on as many crops as a segment can hold."""
    crops = MOST_CANDIDATES // tower.patches
    if not crops:
        return {}
    features = _empty(5 * crops, tower.tokens, tower.features, dtype=dtype)[:, tower.tokens - tower.patches :]
    quality = _empty(*features.shape[:2])
    each = {"budgets": _empty(5 * crops, dtype=torch.int32)}
    several = {"budgets": _empty(5, dtype=torch.int64), "valid": _empty(*quality.shape, dtype=torch.bool)}
    several |= {"cu_crops": _empty(6, dtype=torch.int32), "max_crops": crops}
    result = {}
    for rule in ("max_min", "dpp", "coverage"):
        weighed = {} if rule == "max_min" else {"quality": quality}
        for name, given in ((rule, each), (f"{rule}, segments", {**several, **weighed})):
            result[name] = partial(hk.segmented_diverse_topk, features, rule=rule, **given)
    return result


def cases(geometry: str, dtype: str) -> dict[str, Callable[[], object]]:
    """Return what to run for each case at a geometry and dtype, on tensors without memory."""
    tower, kind = GEOMETRIES[geometry], DTYPES[dtype]
    return {**_attention_cases(tower, kind), **_selection_cases(tower, kind), **_diverse_cases(tower, kind)}


# --- what it compiles to -----------------------------------------------------------------------------------


def _specialised(launch: Launch, target: str) -> ASTSource:
    """Return what the JIT compiles for a launch, by the steps of ``JITFunction.run``."""
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
    """Return facts about the code of a launch on a target; several launches may share it."""
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


def _nvidia(cubin: bytes) -> dict[str, int]:
    """Read machine code: spills in bytes per thread; a wide access is one of 16 bytes per thread."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used = subprocess.check_output([folder / "cuobjdump", "--dump-resource-usage", file.name], text=True)
        code = subprocess.check_output([folder / "nvdisasm", "-c", file.name], text=True)
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
    """Read assembly; scalar registers spill to lanes of vector registers, which takes no memory."""

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:?\s+(\d+)", code).group(1))

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", code, re.MULTILINE))

    return {
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "wide_loads": count("(global|buffer)_load_(lds_)?dwordx4"),
        "wide_stores": count("(global|buffer)_store_dwordx4"),
        "instructions": count(r"[sv]_\w+ |(global|buffer|ds|flat)_\w+ "),
    }
