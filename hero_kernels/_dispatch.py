"""Which implementation of an operation runs: the Triton kernel or the PyTorch reference.

CUDA and ROCm devices run the kernels of :mod:`hero_kernels.kernels`; every other device, or any device
without Triton, runs :mod:`hero_kernels.reference`. The ``HERO_*`` variables (:mod:`hero_kernels._env`)
override this.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import _launch, reference
from ._env import SWITCHES

__all__ = ["fused_attention_is_faster", "implementations", "is_plain", "kernel", "launcher", "run"]


@cache
def launcher(name: str) -> Callable | None:
    """The function that launches the kernel of an operation; ``None``, with a warning, without Triton."""
    try:
        module = importlib.import_module(f"{__package__}.kernels.{name}")
    except ImportError as error:
        if not (error.name or "").startswith("triton"):
            raise
        warnings.warn(f"hero_kernels: no Triton ({error}), the PyTorch reference runs instead", stacklevel=2)
        return None
    return getattr(module, name)


def kernel(name: str, device_type: str) -> Callable | None:
    """The launcher that serves an operation on a device type, if any."""
    if SWITCHES.reference or not (device_type == "cuda" or (device_type == "cpu" and SWITCHES.interpret)):
        return None
    return launcher(name)


def run(name: str, device: torch.device, **arguments):
    """Run an operation on checked arguments, with the kernel or the reference.

    Triton launches on the current device, so that of the tensors is made current.

    Raises:
        RuntimeError: ``HERO_REQUIRE_KERNEL`` is set and the accelerator has no kernel.
    """
    launch = kernel(name, device.type)
    if launch is not None:
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(**arguments)
        with torch.cuda.device(device):
            return launch(**arguments)
    if SWITCHES.require_kernel and device.type != "cpu":
        raise RuntimeError(
            f"hero_kernels.{name}: HERO_REQUIRE_KERNEL is set and {device.type!r} has no kernel"
        )
    return getattr(reference, name)(**arguments)


@cache
def _measured_attention() -> frozenset[tuple[str, str, int, int]]:
    """Where :func:`hero_kernels.attention_with_cls` was fastest for every number of crops measured."""
    text = (resources.files(__package__) / "fused_attention.json").read_text(encoding="utf-8")
    return frozenset(
        (row["device"], row["dtype"], row["width"], row["tokens"])
        for row in json.loads(text)["rows"]
        if all(fused <= other for fused, other in row["us"].values())
    )


@torch.compiler.assume_constant_result
def fused_attention_is_faster(device: torch.device, dtype: torch.dtype, width: int, tokens: int) -> bool:
    """Whether :func:`hero_kernels.attention_with_cls` was measured to be faster than PyTorch's attention with
    :func:`hero_kernels.cls_attention` beside it (``fused_attention.json``).

    It does not depend on the number of crops, so that a crop's result does not either.

    Args:
        width: D of a head.
        tokens: N of a crop, CLS included.
    """
    if device.type != "cuda" or kernel("attention_with_cls", "cuda") is None:
        return False
    name, wanted = torch.cuda.get_device_name(device), (str(dtype).removeprefix("torch."), width, tokens)
    return any(row[1:] == wanted and _launch.serves(row[0], name) for row in _measured_attention())


def implementations(device: str = "cpu") -> dict[str, str]:
    """``{operation: "kernel" or "reference"}`` on a device type such as ``"cpu"`` or ``"cuda"``."""
    return {name: "kernel" if kernel(name, device) else "reference" for name in reference.__all__}


def is_plain(tensors: Sequence[Tensor | None], differentiable: Sequence[Tensor] = ()) -> bool:
    """Whether :func:`run` can be called directly.

    Otherwise the call goes through the operator of :mod:`hero_kernels._library`: under ``torch.compile``, for
    tensor subclasses and dispatch modes, and where a kernel has to take part in autograd. Gradients run
    through the ``differentiable`` tensors only.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    if any(tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return False
    if not any(tensor.requires_grad for tensor in differentiable) or not torch.is_grad_enabled():
        return True
    return kernel("cls_attention", differentiable[0].device.type) is None  # the reference is differentiable
