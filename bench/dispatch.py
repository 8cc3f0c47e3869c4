"""Host time of calling an operation before anything is computed: checks, routing, dispatcher, launcher.

Each operation is called eagerly on CPU tensors, in three ways that leave out the computation; checks of
values, which are skipped on a GPU, are left out too:

- ``public``: the public function with an implementation that returns a ready result: checks and routing;
- ``operator``: ``torch.ops.hero_kernels`` with the same implementation, as compiled code calls it;
- ``launcher``: the public function with the kernel's launcher and a launch that does nothing: also
  allocating outputs, strides and the configuration. Triton's own launch comes on top.

``python -m bench.dispatch --out bench/results/dispatch.json``; then ``python -m bench.report``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

import torch

import hero_kernels as hk
from hero_kernels import _library, _ops
from hero_kernels._env import SWITCHES

from .bench_attention import make_attention
from .bench_selection import make_selection
from .record import environment, write
from .registry import SMALL, SMALL_BATCHES, Shape
from .timing import positive, quiet_heap, take_turns

WAYS = ("public", "operator", "launcher")


def calls() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return ``{operation: (public call, the same through torch.ops)}`` at a small shape."""
    shape = Shape(SMALL, SMALL_BATCHES[0], 4)
    device, segments, scale = torch.device("cpu"), shape.segments, shape.geometry.scale
    a, s = make_attention(shape, device, 0), make_selection(shape, segments, device, 0)
    rows = {"weight": 1.0, "out": a.rows, "second_softmax": False}
    gather = {"valid": s.valid, "budgets": None, "signals": s.signals, "allocation": "exact"}
    gather |= {"ranks": None, "valid_counts": s.counts}
    arguments = {
        "cls_attention": ((a.query, a.key, scale), rows),
        "attention_with_cls": ((a.query, a.key, a.value, scale), rows),
        "received_attention": ((a.query, a.key, scale), {"weight": 1.0, "out": None}),
        "finalize_scores": ((a.rows,), {"valid": a.valid, "rank": True}),
        "tile_budgets": ((s.signals, s.counts, segments), {"allocation": "exact"}),
        "segmented_topk": ((s.scores, s.budgets.budgets, s.valid), {}),
        "segmented_topk_gather": ((s.features, s.scores, segments), gather),
    }
    return {
        name: tuple(partial(getattr(module, name), *given, **named) for module in (hk, _library))
        for name, (given, named) in arguments.items()
    }


@contextlib.contextmanager
def ready(public: Callable[[], object]) -> Iterator[None]:
    """Make the implementation of an operation return what it returned once."""
    with mock.patch.object(_ops, "_run", wraps=_ops._run) as implementation:
        public()
        (arguments, options) = implementation.call_args
    result = _ops._run(*arguments, **options)
    with mock.patch.object(_ops, "_run", lambda *arguments, **options: result):
        yield


@contextlib.contextmanager
def unlaunched() -> Iterator[None]:
    """Make the launchers launch nothing, and CPU tensors reach them.

    Raises:
        ImportError: Triton is not installed.
    """
    names = ("common", *_ops._MODULES.values())
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(SWITCHES, "interpret", True))
        for module in [importlib.import_module(f"hero_kernels.kernels.{name}") for name in names]:
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", lambda *args, **options: None))
        yield


def measure(rounds: int, repeats: int) -> dict[str, object]:
    """Return ``times_us`` by operation and way, ``us``, their medians, and ``missing`` ways with reasons."""
    times: dict[str, dict[str, list[float]]] = {}
    reasons: dict[str, str] = {}
    no_values = mock.patch.object(_ops, "_check_cpu", lambda name, expected, values, fits: None)
    with torch.no_grad(), no_values, quiet_heap():
        for name, (public, operator) in calls().items():
            times[name] = {way: [] for way in WAYS}
            for turn in range(rounds + 1):  # the first warms up
                for way in take_turns(WAYS, turn):
                    call = operator if way == "operator" else public
                    try:
                        with unlaunched() if way == "launcher" else ready(public):
                            begin = time.process_time()
                            for _ in range(repeats):
                                call()
                            spent = 1e6 * (time.process_time() - begin) / repeats
                    except (ImportError, AttributeError) as error:
                        reasons[f"{name} {way}"] = str(error).splitlines()[0]
                        continue
                    if turn:
                        times[name][way].append(spent)
    medians = {
        name: {way: statistics.median(values) if values else None for way, values in ways.items()}
        for name, ways in times.items()
    }
    return {"us": medians, "times_us": times, "missing": reasons}


def main(arguments: Sequence[str]) -> dict:
    """Run the command and return the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=positive, default=11, help="measured rounds (default 11)")
    parser.add_argument("--repeats", type=positive, default=1000, help="calls in a round (default 1000)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = {
        "benchmark": "dispatch",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **environment("bench.dispatch", arguments, ("torch", "triton")),
        "rounds": options.rounds,
        "repeats": options.repeats,
        **measure(options.rounds, options.repeats),
    }
    write(options.out, record)
    for name, ways in record["us"].items():
        print(f"{name:24}", *(f"{way} {us:.1f} us" for way, us in ways.items() if us is not None))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
