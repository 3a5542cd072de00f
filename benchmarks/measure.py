"""Timing contenders in turn, and what comes of it."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# Who a contender is. A goal names one of these: the fastest of that kind is what gradkern is held against.
KINDS = (
    "gradkern",
    "torch",
    "compiled",
    "optax",
    "ceiling",
    "norm only",
    "measuring",
    "GlobalNorm",
    "GlobalNorm attached",
)


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Contender:
    """One way of doing a row's work.

    `call` alone is timed. `before` runs untimed before every call, `check` untimed after it: it gets what
    `call` returned and whether to look at every element (on the first call) or at a sample, raises
    `WrongResult`, and returns the relative error of the norm (None if the work has no norm).
    `period`: after how many rounds the work repeats, where it is not the same in each.
    """

    kind: str
    name: str
    call: Callable[[], Any]
    check: Callable[[Any, bool], float | None]
    before: Callable[[], None] = _nothing
    period: int = 1


@dataclass
class Timing:
    """The times of one contender, in milliseconds, one per round."""

    kind: str
    name: str
    times_ms: list[float] = field(default_factory=list)
    norm_error: float | None = None
    period: int = 1

    @property
    def median_ms(self) -> float:
        """Half of the rounds took longer; if not all do the same work, the mean of the works' medians."""
        works = [self.times_ms[first :: self.period] for first in range(self.period)]
        return statistics.fmean(statistics.median(times) for times in works if times)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """Half of the rounds lie between these."""
        return quartiles(self.times_ms)


@dataclass(frozen=True)
class Effort:
    """How often a row is repeated: `rounds` times, or for `seconds` within the bounds."""

    seconds: float
    least: int = 7
    most: int = 200
    rounds: int | None = None

    def goes_on(self, rounds: int, started: float) -> bool:
        """Whether there is another round after `rounds` of them."""
        if self.rounds is not None:
            return rounds < self.rounds
        if rounds < self.least:
            return True
        return rounds < self.most and time.perf_counter() - started < self.seconds


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def in_turn(contenders: Sequence[Contender], effort: Effort, evict: Callable[[], None]) -> list[Timing]:
    """Time all contenders once in every round, in an order drawn anew for each.

    So each meets the machine in the same states as the others, and none has always the same predecessor.
    Every call is checked; the first, which is not counted, in every element.

    Args:
        evict: runs untimed before every call, after the contender's own `before`.
    """
    timings = [Timing(contender.kind, contender.name, period=contender.period) for contender in contenders]
    effort = replace(effort, least=max(effort.least, *(contender.period for contender in contenders)))
    for contender, timing in zip(contenders, timings, strict=True):
        contender.before()
        timing.norm_error = contender.check(contender.call(), True)
    order = list(range(len(contenders)))
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        started, rounds = time.perf_counter(), 0
        while effort.goes_on(rounds, started):
            shuffle(order)
            for index in order:
                _time(contenders[index], timings[index], evict)
            rounds += 1
    finally:
        gc.enable()
    return timings


def _time(contender: Contender, timing: Timing, evict: Callable[[], None]) -> None:
    contender.before()
    evict()
    begin = time.perf_counter_ns()
    result = contender.call()
    end = time.perf_counter_ns()
    contender.check(result, False)
    timing.times_ms.append((end - begin) / 1e6)
