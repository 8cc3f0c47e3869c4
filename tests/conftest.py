"""Shared by all tests: one thread, so that tiny models are fast and results do not depend on the machine.

Tests that cannot run here are deselected: those marked ``gpu`` without a GPU, and those of kernels without a
way to run kernels.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import torch
except ImportError:  # the packaging tests run without
    pass
else:
    torch.set_num_threads(1)

    from cases import GPU, KERNELS, WAYS

    def pytest_generate_tests(metafunc):
        """``way``: each way of running an operation on this machine; ``kernel``: those that run a kernel."""
        for name, ways in (("way", WAYS), ("kernel", KERNELS)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, ways, ids=lambda way: way.name)

    def pytest_collection_modifyitems(config, items):
        """Deselect what cannot run here."""
        runs, cannot = [], []
        for item in items:
            needs_gpu = item.get_closest_marker("gpu") and not GPU
            needs_kernel = "kernel" in item.fixturenames and not KERNELS
            (cannot if needs_gpu or needs_kernel else runs).append(item)
        if cannot:
            items[:] = runs
            config.hook.pytest_deselected(items=cannot)
