"""What an operation costs the host before anything is computed: checks, routing, launcher, dispatcher.

Three ways of calling each operation with what would do the work taken out, in eager mode, on CPU tensors
(checks that look at values are left out, since a GPU's are not looked at):

- ``public``: the public function with an implementation that returns a ready result: checks and routing;
- ``operator``: ``torch.ops.hero_kernels``, as compiled and fake tensors take it, with the same
  implementation: what torch's dispatcher costs instead of the checks;
- ``launcher``: the public function with the kernel's own launcher and a launch that does nothing: what is
  public, and allocating outputs, strides and the configuration. Triton's launch comes on top.

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
from unittest import mock

import torch

import hero_kernels as hk
from hero_kernels import _library, _ops
from hero_kernels._env import SWITCHES

from .bench_attention import make_attention
from .bench_selection import make_selection
from .record import environment, write
from .registry import SMALL, SMALL_BATCHES, Shape
from .timing import quiet_heap, take_turns

__all__ = ["main", "measure"]

WAYS = ("public", "operator", "launcher")


def calls() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """``{operation: (public call, the same through torch.ops)}`` at a small shape."""
    shape = Shape(SMALL, SMALL_BATCHES[0], 4)
    device = torch.device("cpu")
    segments = shape.segments
    a, s = make_attention(shape, device, 0), make_selection(shape, segments, device, 0)
    scale = shape.geometry.scale
    rows = {"weight": 1.0, "out": a.rows}
    own = {**rows, "second_softmax": False}
    gather = {"valid": s.valid, "budgets": None, "signals": s.signals, "allocation": "exact"}
    gather |= {"ranks": None, "valid_counts": s.counts}
    arguments = {
        "cls_attention": ((a.query, a.key, scale), own),
        "attention_with_cls": ((a.query, a.key, a.value, scale), own),
        "received_attention": ((a.query, a.key, scale), {**rows, "out": None}),
        "finalize_scores": ((a.rows,), {"valid": a.valid, "rank": True}),
        "tile_budgets": ((s.signals, s.counts, segments), {"allocation": "exact"}),
        "segmented_topk": ((s.scores, s.budgets.budgets, s.valid), {}),
        "segmented_topk_gather": ((s.features, s.scores, segments), gather),
    }

    def call(function, positional, named):
        return lambda: function(*positional, **named)

    return {
        name: tuple(call(getattr(module, name), *given) for module in (hk, _library))
        for name, given in arguments.items()
    }


@contextlib.contextmanager
def ready(name: str, public: Callable[[], object]) -> Iterator[None]:
    """The implementation of an operation returns what it returned once."""
    result = []
    run = _ops._run

    def keep(*arguments, **options):
        result[:] = [run(*arguments, **options)]
        return result[0]

    with mock.patch.object(_ops, "_run", keep):
        public()
    with mock.patch.object(_ops, "_run", lambda *arguments, **options: result[0]):
        yield


@contextlib.contextmanager
def unlaunched(name: str) -> Iterator[None]:
    """The launcher of an operation's kernel launches nothing.

    Raises:
        ImportError: no Triton here.
    """
    names = ("common", *_ops._MODULES.values())
    modules = [importlib.import_module(f"hero_kernels.kernels.{module}") for module in names]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(SWITCHES, "interpret", True))  # CPU tensors reach kernels
        for module in modules:
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", lambda *args, **options: None))
        yield


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call, many in a row, of the processor: blind to others who take turns on it."""
    begin = time.process_time()
    for _ in range(repeats):
        call()
    return 1e6 * (time.process_time() - begin) / repeats


def measure(rounds: int, repeats: int) -> dict[str, object]:
    """``times_us``: raw, by operation and way; ``us``: their medians, ``None`` where a way is missing."""
    times: dict[str, dict[str, list[float]]] = {}
    reasons: dict[str, str] = {}
    no_values = mock.patch.object(_ops, "_check_cpu", lambda name, expected, values, fits: None)
    with torch.no_grad(), no_values, quiet_heap():
        for name, (public, operator) in calls().items():
            times[name] = {way: [] for way in WAYS}
            for turn in range(rounds + 1):  # the first warms up
                for way in take_turns(WAYS, turn):
                    call = operator if way == "operator" else public
                    context = unlaunched(name) if way == "launcher" else ready(name, public)
                    try:
                        with context:
                            spent = microseconds(call, repeats)
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
    """The command: returns the record it wrote."""
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds (default 11)")
    parser.add_argument("--repeats", type=int, default=1000, help="calls in a round (default 1000)")
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
        numbers = "  ".join(
            f"{way} {'-' if value is None else f'{value:.1f}'}" for way, value in ways.items()
        )
        print(f"{name:24} {numbers} us")
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
