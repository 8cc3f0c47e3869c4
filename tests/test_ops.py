"""Dispatch of the operations: by device, and by the ``HERO_*`` switches."""

import inspect
import subprocess
import sys

import pytest
import torch

import hero_kernels as hk
from hero_kernels import _ops

SCORES, BUDGETS = torch.rand(2, 9), torch.tensor([3, 4])


def test_signatures_are_those_of_the_twins():
    for name in hk.reference.__all__:
        operation, twin = getattr(hk, name), getattr(hk.reference, name)
        assert inspect.signature(operation) == inspect.signature(twin)
        assert operation.__doc__ == twin.__doc__ and operation.__doc__


def test_without_kernels_the_twin_runs():
    assert set(hk.implementations("cpu").values()) == {"reference"}
    assert sorted(hk.implementations("cuda")) == sorted(hk.reference.__all__)
    assert torch.equal(hk.segmented_topk(SCORES, BUDGETS), hk.reference.segmented_topk(SCORES, BUDGETS))


def test_a_registered_kernel_runs(monkeypatch):
    def kernel(scores, budgets, valid=None):
        return "kernel"

    monkeypatch.setitem(_ops._KERNELS, ("segmented_topk", "cpu"), kernel)
    assert hk.implementations("cpu")["segmented_topk"] == "kernel"
    assert hk.segmented_topk(SCORES, BUDGETS) == "kernel"
    with pytest.raises(TypeError, match="budgets: expected dtype int32 or int64"):
        hk.segmented_topk(SCORES, BUDGETS.float())  # checked before any implementation
    monkeypatch.setattr(_ops.SWITCHES, "reference", True)
    assert hk.implementations("cpu")["segmented_topk"] == "reference"
    assert torch.equal(hk.segmented_topk(SCORES, BUDGETS).sum(1), BUDGETS)


def test_requiring_a_kernel(monkeypatch):
    """On an accelerator without a kernel: an error, not a silent fallback. The CPU has the twin by design."""
    monkeypatch.setattr(_ops.SWITCHES, "require_kernel", True)
    hk.segmented_topk(SCORES, BUDGETS)
    with pytest.raises(
        RuntimeError, match=r"segmented_topk: HERO_REQUIRE_KERNEL is set and 'meta' has no kernel"
    ):
        hk.segmented_topk(SCORES.to("meta"), BUDGETS.to("meta"))


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("true", True), ("0", False), ("", False), ("off", False)]
)
def test_switches_come_from_the_environment(value, on):
    code = "from hero_kernels._env import SWITCHES; print(SWITCHES.reference, SWITCHES.require_kernel)"
    environment = {"HERO_REFERENCE": value, "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == [str(on), "False"]


def test_kernels_import_neither_hero_nor_transformers():
    code = "import sys, hero_kernels; print(sorted({'hero', 'transformers'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
