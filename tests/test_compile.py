"""Every kernel compiles for every target at the shipped configurations, and to what it should: no spills,
wide accesses, shared memory that fits. No GPU needed; what is compiled are the launches that the launchers
make (:mod:`bench.compiled`).

The fast tests compile each kernel once for one target; the slow ones CLIP and the widest heads in bf16 for
all targets, and a few cases besides; ``-m exhaustive`` everything, on the Triton that is installed.
"""

import pkgutil
from functools import cache

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from hero_kernels import _launch, kernels
from hero_kernels._env import SWITCHES

if SWITCHES.interpret:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from bench import compiled
from bench.compiled import LIMITS, REGISTERS, TARGETS, recorded

ALL = ("clip bf16", "siglip bf16", "internvit bf16", "clip-h bf16", "internvit-6b bf16", "projected bf16")
ALL += ("most-patches bf16", "widest bf16", "clip fp16", "clip fp32", "siglip fp32", "internvit-6b fp32")
ALL += ("widest fp32",)
USUAL = ("clip bf16", "internvit-6b bf16")
EVERY_KERNEL = ("rows", "fused", "received", "finalize, ranks", "budgets", "topk", "gather anyres, mask")
EVERY_KERNEL += ("rarity, mask", "rarity, narrow", "budgets, many tiles", "max_min", "coverage", "dpp")
FAST = {
    "sm_90": {"clip bf16": EVERY_KERNEL, "siglip bf16": ("received, segments",)},
    "gfx942": {"clip bf16": ("rows",)},
}
CHAINS = ("max_min, segments", "coverage, segments", "dpp, segments")
SLOW = {
    "sm_90": {
        "siglip bf16": ("received", "received, lse", "gather tiles, mask", *CHAINS),
        "clip fp32": ("fused",),
    }
}  # beside USUAL


@cache
def cases_of(place):
    return compiled.cases(*place.split())


def wanted():
    """(target, place, case) of every test: ``FAST``; ``SLOW`` and the usual towers; the rest by hand."""
    for target in TARGETS:
        for place in ALL:
            few, more = (cases.get(target, {}).get(place, ()) for cases in (FAST, SLOW))
            for case in cases_of(place):
                marks = () if case in few else (pytest.mark.slow,)
                if case not in (*few, *more) and place not in USUAL:
                    marks = (pytest.mark.slow, pytest.mark.exhaustive)
                yield pytest.param(target, place, case, marks=marks, id=f"{target}-{place}-{case}")


def elements(launch):
    """Elements that a program must at least load in wide accesses, and store so; and a tensor of them."""
    given = launch.arguments
    if launch.name == "cls_attention_kernel":
        return given["BLOCK"] * given["D_PAD"], 0, given["key"]
    if launch.name == "attention_with_cls_kernel":
        block = max(given["BLOCK"], given["BLOCK_M"] + 2 * given["BLOCK_N"])
        return block * given["D_PAD"], 0, given["key"]
    if launch.name in ("received_log_sums_kernel", "received_columns_kernel"):
        return (given["BLOCK_M"] + given["BLOCK_N"]) * (given["MAIN"] + given["REST"]), 0, given["key"]
    if launch.name == "round_features_kernel":
        rows = given["ROWS"] * given["width"]
        return rows, 0, given["features"]
    if launch.name in ("unit_sums_kernel", "rarity_kernel"):
        return given["ROWS"] * given["width"], 0, given["features"]
    if launch.name == "pool_means_kernel":
        return given["ROWS"] * given["COLUMNS"], 0, given["sums"]
    if launch.name == "similarities_kernel":
        return 2 * given["BLOCK"] * given["BLOCK_D"], 0, given["rounded"]
    if launch.name in ("max_min_kernel", "coverage_kernel"):
        return given["N_PAD"], 0, given["similarities"]
    if launch.name == "dpp_kernel":
        return given["N_PAD"], given["N_PAD"], given["covariance"]
    if launch.name == "gather_rows_kernel":
        rows = given["ROWS"] * given["COLUMNS"] * given["CHUNKS"]
        return rows, rows, given["features"]
    return 0, 0, None  # too little to matter


def check(launch, target):
    facts = compiled.compiled(launch, target)
    what = f"{launch.name} {facts}"
    assert facts["instructions"] > 50, f"empty: {what}"
    assert not facts["spills"], what
    assert facts["shared"] <= LIMITS[target], what
    threads = 32 * launch.arguments["num_warps"]
    assert target.startswith("gfx") or facts["registers"] * threads <= REGISTERS, what
    loads, stores, tensor = elements(launch)
    lanes = launch.arguments["num_warps"] * TARGETS[target].warp_size
    for name, number in (("wide_loads", loads), ("wide_stores", stores)):
        if number:
            least = max(1, number * tensor.element_size() // (16 * lanes))
            assert facts[name] >= least, f"expected {least} {name} or more: {what}"


@pytest.mark.parametrize("target, place, case", list(wanted()))
def test_kernels_compile(target, place, case):
    launches = recorded(cases_of(place)[case], target)
    assert launches
    for launch in launches:
        check(launch, target)


def test_every_configuration_is_compiled(monkeypatch):
    """The cases above reach every row of every configuration file that a target gets."""
    reached, row_of = {}, _launch._row

    def row(name, kernel, size):
        found = row_of(name, kernel, size)
        reached.setdefault((name, kernel), set()).add(size)
        return found

    monkeypatch.setattr(_launch, "_row", row)
    for target in TARGETS:
        for place in ALL:
            for case in cases_of(place).values():
                recorded(case, target)
    for name in {name for name, _ in reached}:
        for kernel, rows in _launch.read_config(name)["kernels"].items():
            below = 0
            for row in rows:
                sizes = reached.get((name, kernel), ())
                assert any(below < size <= row["upto"] for size in sizes), f"{name}: {kernel} {row} unused"
                below = row["upto"]


def test_every_kernel_is_launched():
    """None is left out above: of what is named ``_kernel`` all is recorded."""
    every = cases_of("clip bf16").values()
    launched = {launch.name for case in every for launch in recorded(case, "sm_90")}
    modules = [vars(kernels)[module.name] for module in pkgutil.iter_modules(kernels.__path__)]
    assert launched == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def test_fusion_is_off_where_kernels_must_round_alike():
    """The passes of received attention as each other; shares, and what covers, as the reference."""
    every = [launch for case in cases_of("clip bf16").values() for launch in recorded(case, "sm_90")]
    off = {launch.name for launch in every if not launch.arguments["enable_fp_fusion"]}
    rows = {"received_log_sums_kernel", "received_columns_kernel", "tile_budgets_kernel"}
    chains = {"max_min_kernel", "coverage_kernel", "dpp_kernel", "dpp_update_kernel"}
    assert off == {*rows, *chains, "round_features_kernel", "similarities_kernel"}
    assert off.isdisjoint(launch.name for launch in every if launch.arguments["enable_fp_fusion"])


def test_no_kernel_takes_more_than_20_runtime_parameters():
    """Nor does a device function: strides and signals are tuples, absent tensors are ``None``."""
    modules = [vars(kernels)[module.name] for module in pkgutil.iter_modules(kernels.__path__)]
    functions = {x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    assert len(functions) > 15
    for function in functions:
        runtime = [parameter.name for parameter in function.params if not parameter.is_constexpr]
        assert len(runtime) <= 20, f"{function.__name__}: {runtime}"


def test_launches_are_specialised_as_by_the_jit():
    """Divisible strides are known to be, a stride of one is a constant, 72 is not divisible by 16."""
    *_, select, gather = recorded(cases_of("siglip bf16")["gather tiles"], "sm_90")
    selected, source = (compiled._specialised(launch, "sm_90") for launch in (select, gather))
    assert source.signature["features"] == "*bf16" and selected.signature["scores"] == "*fp32"
    kinds, strides = source.signature["feature_strides"], gather.arguments["feature_strides"]
    assert kinds[2] == "constexpr" and strides[2] == 1
    names = list(source.signature)
    divisible = {
        (names[path[0]], *path[1:])
        for path, found in source.attrs.items()
        if ["tt.divisibility", 16] in found
    }
    assert {("features",), ("feature_strides", 0), ("feature_strides", 1), ("width",)} <= divisible
    assert ("patches",) not in divisible and source.signature["patches"] == "i32"
