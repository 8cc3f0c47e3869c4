"""Shared by all tests: one thread, so that tiny models are quick and results do not hang on the machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import torch
except ImportError:  # the packaging tests run without
    pass
else:
    torch.set_num_threads(1)
