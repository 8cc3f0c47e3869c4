"""Shared by all tests: one thread, so that tiny models are fast and results do not depend on the machine.

Tests that cannot run here are deselected: those marked ``gpu`` without a GPU, and those of kernels without a
way to run kernels.
"""

import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

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
                marks = {"cuda": [pytest.mark.gpu]}
                every = [pytest.param(way, id=way.name, marks=marks.get(way.device, [])) for way in ways]
                metafunc.parametrize(name, every)

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


@pytest.fixture
def server(tmp_path):
    """The address of an HTTP server of the files in ``tmp_path``."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
