"""Shared by all tests: one thread, so that tiny models are quick and results do not hang on the machine."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import torch
except ImportError:  # the packaging tests run without
    pass
else:
    torch.set_num_threads(1)

    from cases import WAYS

    from hero_kernels._env import SWITCHES

    def pytest_runtest_setup(item):
        """Skip tests marked gpu where there is none."""
        if item.get_closest_marker("gpu") and (SWITCHES.interpret or not torch.cuda.is_available()):
            pytest.skip("needs a GPU, and kernels compiled for it")

    @pytest.fixture(params=WAYS, ids=lambda way: way.name)
    def way(request):
        """Each way of running an operation; those that cannot be gone here are skipped, and say why."""
        if reason := request.param.why_not():
            pytest.skip(reason)
        return request.param
