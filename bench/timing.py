"""Timing on a machine that is not quiet: interleaved rounds, and comparisons that survive drift.

Standard library only. Variants to compare run one right after the other in every round, in the opposite
order in every other round, so that slow phases of the machine hit all of them alike. Two variants are
compared by the ratio of their medians, by the ratio of their minima, and by the median of the ratios
within rounds with a bootstrap interval: the last is the number to believe.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["CLOCKS", "Clock", "compare", "interval", "quiet_heap", "seconds", "summary", "take_turns"]

# With one thread, the processor's time is blind to other processes taking turns on the same core.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
RESAMPLES = 2000
COVERAGE = 0.95


class Clock:
    """The time that is left."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


@contextlib.contextmanager
def quiet_heap() -> Iterator[None]:
    """Keep what is alive now out of every garbage collection inside the block, so that each is short."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def seconds(function: Callable[[], object], clock: str = "wall") -> float:
    """Seconds of one call; its result is freed outside the timed span, garbage before it."""
    now = CLOCKS[clock]
    gc.collect()
    gc.disable()
    try:
        begin = now()
        result = function()
        elapsed = now() - begin
    finally:
        gc.enable()
    del result
    return elapsed


def take_turns(names: Sequence[str], turn: int) -> list[str]:
    """The order of variants in a turn: as given, then reversed, and so on."""
    return list(names) if turn % 2 == 0 else list(reversed(names))


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and minimum of the rounds."""
    return {"median": statistics.median(times), "min": min(times)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap interval (95 %) of the median, from a fixed seed."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    cut = int(RESAMPLES * (1 - COVERAGE) / 2)
    return medians[cut], medians[-1 - cut]


def compare(times: Sequence[float], base: Sequence[float]) -> Mapping[str, object]:
    """How a variant relates to a baseline measured in the same rounds; below 1, it is faster.

    Args:
        times: of the variant, one a round.
        base: of the baseline, in the same rounds.

    Returns:
        ``paired``, the median of the ratios within rounds; ``interval``, its 95 % bootstrap interval;
        ``pairs``, how many there are; ``of_medians`` and ``of_minima``, the ratios of both.
    """
    ratios = [one / other for one, other in zip(times, base, strict=True)]
    return {
        "paired": statistics.median(ratios),
        "interval": list(interval(ratios)),
        "pairs": len(ratios),
        "of_medians": statistics.median(times) / statistics.median(base),
        "of_minima": min(times) / min(base),
    }
