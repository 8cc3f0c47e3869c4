"""Dispatch of the operations: by device, and by the ``HERO_*`` switches."""

import inspect
import json
import pkgutil
import statistics
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import hero_kernels as hk
from hero_kernels import _dispatch, kernels

pytestmark = pytest.mark.skipif(_dispatch.SWITCHES.interpret, reason="about a CPU without TRITON_INTERPRET")
SCORES, BUDGETS = torch.rand(2, 9), torch.tensor([3, 4])


def test_signatures_are_those_of_the_reference():
    for name in hk.reference.__all__:
        operation, function = getattr(hk, name), getattr(hk.reference, name)
        assert inspect.signature(operation) == inspect.signature(function)
        assert operation.__doc__ and function.__doc__


def test_the_reference_runs_on_a_cpu():
    assert set(hk.implementations("cpu").values()) == {"reference"}
    files = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
    assert set(hk.implementations("cuda")) == set(hk.reference.__all__) == files - {"common"}
    assert torch.equal(hk.segmented_topk(SCORES, BUDGETS), hk.reference.segmented_topk(SCORES, BUDGETS))


def test_a_kernel_runs(monkeypatch):
    def kernel(scores, budgets, valid):
        return "kernel"

    monkeypatch.setattr(_dispatch, "launcher", {"segmented_topk": kernel}.get)
    monkeypatch.setattr(_dispatch.SWITCHES, "interpret", True)
    assert hk.implementations("cpu")["segmented_topk"] == "kernel"
    assert hk.implementations("cpu")["tile_budgets"] == "reference"
    assert hk.segmented_topk(SCORES, BUDGETS) == "kernel"
    with pytest.raises(TypeError, match="budgets: expected dtype int32 or int64"):
        hk.segmented_topk(SCORES, BUDGETS.float())  # checked before any implementation
    monkeypatch.setattr(_dispatch.SWITCHES, "reference", True)
    assert hk.implementations("cpu")["segmented_topk"] == "reference"
    assert torch.equal(hk.segmented_topk(SCORES, BUDGETS).sum(1), BUDGETS)


@pytest.fixture
def launcher_without(monkeypatch):
    """``without(module)`` has the launcher find that module missing."""

    def without(module):
        def missing(name):
            raise ModuleNotFoundError(f"No module named {module.partition('.')[0]!r}", name=module)

        monkeypatch.setattr(_dispatch.importlib, "import_module", missing)

    _dispatch.launcher.cache_clear()
    yield without
    _dispatch.launcher.cache_clear()


def test_without_triton_the_reference_runs_with_a_warning(launcher_without):
    launcher_without("triton.language")
    with pytest.warns(UserWarning, match="no Triton"):
        assert _dispatch.launcher("segmented_topk") is None


def test_a_broken_kernel_is_no_missing_triton(launcher_without):
    launcher_without("other")
    with pytest.raises(ModuleNotFoundError, match="other"):
        _dispatch.launcher("segmented_topk")


def test_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch):
    current = []

    @contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    seen = []
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_dispatch, "launcher", lambda name: lambda **arguments: seen.append([*current]))
    monkeypatch.setattr(_dispatch.SWITCHES, "interpret", True)
    second = torch.device("cuda:1")
    _dispatch.run("segmented_topk", second)
    _dispatch.run("segmented_topk", torch.device("cuda:0"))
    _dispatch.run("segmented_topk", torch.device("cpu"))
    assert seen == [[second], [], []] and not current


RECORD = Path(__file__).parents[1] / "bench" / "results" / "h200_kernels.json"
SHAPES = {"CLIP-L/14-336": (64, 577), "InternViT-300M-448": (64, 1025)}


def test_the_table_of_fused_attention_is_the_record():
    """Medians of the fused kernel and of the fastest backend that leaves rows per head beside it."""
    found = {}
    for row in json.loads(RECORD.read_text(encoding="utf-8"))["results"]:
        variant, is_row = row["variant"], row["op"] == "attention_with_cls" and row["status"] == "ok"
        if is_row and "(per_head)" in variant:
            times = found.setdefault(SHAPES[row["geometry"]], {}).setdefault(str(row["crops"]), [[], []])
            times["SDPA" in variant].append(round(statistics.median(row["times_us"]), 1))
    wanted = {
        shape: {crops: [min(ours), min(others)] for crops, (ours, others) in rows.items()}
        for shape, rows in found.items()
    }
    table = json.loads((Path(hk.__file__).parent / "fused_attention.json").read_text(encoding="utf-8"))
    assert {(row["width"], row["tokens"]): row["us"] for row in table["rows"]} == wanted
    assert {(row["device"], row["dtype"]) for row in table["rows"]} == {("nvidia-h200", "bfloat16")}


def test_fused_attention_is_faster_where_it_was_measured(monkeypatch):
    gpu, half = torch.device("cuda"), torch.bfloat16
    names = {"NVIDIA H200": True, "NVIDIA H200 NVL": True, "NVIDIA H100 80GB HBM3": False}
    monkeypatch.setattr(_dispatch, "launcher", lambda name: print)
    for name, wanted in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        for width, tokens in SHAPES.values():
            assert hk.fused_attention_is_faster(gpu, half, width, tokens) == wanted
            assert not hk.fused_attention_is_faster(gpu, torch.float32, width, tokens)
            assert not hk.fused_attention_is_faster(gpu, half, width, tokens + 1)
            assert not hk.fused_attention_is_faster(torch.device("cpu"), half, width, tokens)
    monkeypatch.setattr(_dispatch, "launcher", lambda name: None)
    assert not hk.fused_attention_is_faster(gpu, half, 64, 577)


def test_requiring_a_kernel(monkeypatch):
    """On an accelerator without a kernel it raises. The CPU runs the reference by design."""
    monkeypatch.setattr(_dispatch.SWITCHES, "require_kernel", True)
    hk.segmented_topk(SCORES, BUDGETS)
    with pytest.raises(
        RuntimeError, match=r"segmented_topk: HERO_REQUIRE_KERNEL is set and 'meta' has no kernel"
    ):
        hk.segmented_topk(SCORES.to("meta"), BUDGETS.to("meta"))


@pytest.mark.parametrize(
    ("value", "on"),
    [
        *(("1", True), ("0", False)),
        *(
            pytest.param(*given, marks=pytest.mark.slow)
            for given in (("true", True), ("", False), ("off", False))
        ),
    ],
)
def test_switches_come_from_the_environment(value, on):
    code = "from hero_kernels._env import SWITCHES as s; print(s.reference, s.require_kernel, s.interpret)"
    environment = {
        "HERO_REFERENCE": value,
        "TRITON_INTERPRET": value,
        "PATH": "",
        "PYTHONPATH": ":".join(sys.path),
    }
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == [str(on), "False", str(on)]


def test_importing_needs_torch_alone():
    """Neither ``hero`` nor transformers, and Triton only once a kernel is to run."""
    wanted = "{'hero', 'transformers', 'hero_kernels.kernels', 'hero_kernels.testing'}"
    code = f"import sys, hero_kernels; print(sorted({wanted} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
