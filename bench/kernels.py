"""The benchmarks of the kernels without pytest: JSON lines, what there is to do, then each variant.

``python -m bench.kernels [--small] [--check] [--start N]``. ``bench/run_device`` starts it, reads the lines,
and where a kernel took the process or the device down, starts it again behind that variant.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from . import bench_attention, bench_selection
from .measure import Case, default_device, describe, device_ceilings, measure, numbered, sets_of

__all__ = ["BROKEN", "all_cases", "main"]

BROKEN = 3  # exit status: the device no longer answers in this process


def all_cases(small: bool, device: torch.device) -> list[Case]:
    """The cases of every benchmark file, the most important first."""
    cases = [*bench_attention.cases(small, device), *bench_selection.cases(small, device)]
    order = {shape: number for number, shape in enumerate(dict.fromkeys(case.shape for case in cases))}
    return sorted(cases, key=lambda case: order[case.shape])


def _say(**message: object) -> None:
    print(json.dumps(message), flush=True)


def _answers(device: torch.device) -> bool:
    """Whether the device still answers; after an illegal access it does not."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(arguments: Sequence[str]) -> int:
    """The command: returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--check", action="store_true", help="check the results of ours alone, time nothing")
    parser.add_argument("--start", type=int, default=0, help="number of the first variant")
    options = parser.parse_args(arguments)
    device = default_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    current, sets = None, []
    with torch.no_grad():
        plan = list(numbered(all_cases(options.small, device)))
        _say(plan=[describe(case, variant) for _, case, variant in plan])
        if not options.check:
            found = device_ceilings(device)
            _say(ceilings=found and found._asdict())
        for number, case, variant in plan:
            if number < options.start or (options.check and not variant.ours):
                continue
            _say(begin=number)
            if case is not current:
                sets.clear()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                current = case
                try:
                    sets = [case.make(0)] if options.check else sets_of(case, device)
                except RuntimeError as error:  # no memory, or no operator that the inputs need
                    _say(note=f"{case.name}: no inputs, {str(error).splitlines()[0]}")
            if sets:
                _say(number=number, result=measure(case, variant, sets, device, time=not options.check))
            if not _answers(device):
                return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
