"""The environment variables. They are read here and nowhere else.

======================== =================================================================
``HERO_REFERENCE=1``      run the PyTorch reference even where a kernel exists
``HERO_REQUIRE_KERNEL=1`` raise instead of running the reference on an accelerator
``TRITON_INTERPRET=1``    a variable of Triton: run the kernels on the CPU, in its interpreter
======================== =================================================================
"""

import os
from dataclasses import dataclass

__all__ = ["SWITCHES", "Switches"]

_OFF = ("", "0", "false", "no", "off")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in _OFF


@dataclass
class Switches:
    """Values of the switches when the package was imported."""

    reference: bool = False
    require_kernel: bool = False
    interpret: bool = False


SWITCHES = Switches(
    reference=_flag("HERO_REFERENCE"),
    require_kernel=_flag("HERO_REQUIRE_KERNEL"),
    interpret=_flag("TRITON_INTERPRET"),
)
