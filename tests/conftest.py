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

    @pytest.fixture(params=WAYS, ids=lambda way: way.name)
    def way(request):
        """Each way of running an operation; those that cannot be gone here are skipped, and say why."""
        if reason := request.param.why_not():
            pytest.skip(reason)
        return request.param
