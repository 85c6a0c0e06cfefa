"""The one timing loop: callables run in turn, A B C A B C .., so what slows the machine meets them all.

A ratio is taken within each round and the median over the rounds is quoted: a machine that doubles its load
halfway through changes every time and no ratio. Quoting the ratio of two medians would lose that.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Interquartile range over median from which a figure is marked as measured on a noisy machine.
NOISY = 0.15
# Of a case of `bench.adapter_tax`, unless it is told otherwise: after these no further round begins.
SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of some values, and how far they scatter."""

    median: float
    minimum: float
    q1: float
    q3: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation between the sorted values. Raises ValueError for none."""
        if not values:
            raise ValueError("Spread.of: needs at least one value")
        if len(values) == 1:
            return Spread(values[0], values[0], values[0], values[0], 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, min(values), q1, q3, len(values))

    @property
    def noisy(self) -> bool:
        """Whether the middle half of the values is wider than `NOISY` of the median."""
        return self.q3 - self.q1 > NOISY * self.median

    def to_dict(self, scale: float = 1.0) -> dict[str, Any]:
        """JSON-ready, the values times `scale` (1e3: seconds in, milliseconds out) to five digits."""
        values = {"median": self.median, "min": self.minimum, "q1": self.q1, "q3": self.q3}
        return {**{name: float(f"{v * scale:.5g}") for name, v in values.items()}, "noisy": self.noisy}


@dataclass(frozen=True, slots=True)
class Rounds:
    """Seconds of every callable in every round: `seconds[name][round]`."""

    seconds: dict[str, list[float]]

    def __len__(self) -> int:
        return len(next(iter(self.seconds.values())))

    def time(self, name: str) -> Spread:
        """Seconds of one callable over the rounds."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, base: str) -> Spread:
        """Time of `name` over time of `base`, taken round by round."""
        return Spread.of([a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)])


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    at_least: int = 3,
    seconds: float = math.inf,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    timed: Callable[[Callable[[], object]], float] | None = None,
) -> Rounds:
    """Run every callable once per round, in order, and time each call.

    Stops after `rounds`, or once `seconds` (warm-up included) are over and `at_least` rounds are done.
    `timed` runs a callable and gives its seconds: those of `clock`, unless a device is to be asked (see
    `bench._stopwatch`). Garbage collection is off while the clock runs. Raises ValueError for nothing to run
    or no rounds.
    """
    if not runs or min(rounds, at_least) < 1:
        raise ValueError(f"interleave: needs callables and at least one round; got {len(runs)} and {rounds}")

    def by_the_clock(run: Callable[[], object]) -> float:
        before = clock()
        run()
        return clock() - before

    timed = timed or by_the_clock
    taken: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = clock()
        for _ in range(warmup):
            for run in runs.values():
                timed(run)
        for done in range(rounds):
            if done >= at_least and clock() - begin >= seconds:
                break
            for name, run in runs.items():
                taken[name].append(timed(run))
    finally:
        if collecting:
            gc.enable()
    return Rounds(taken)
