"""Exact 95 % intervals for shares and rates, by bisection on the distributions themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

TAIL = 0.025


def share(hits: int, total: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a binomial share."""
    if total == 0:
        return 0.0, 1.0
    low = 0.0 if hits == 0 else _solve(lambda p: 1 - _binomial(hits - 1, total, p) - TAIL, 0.0, 1.0)
    high = 1.0 if hits == total else _solve(lambda p: TAIL - _binomial(hits, total, p), 0.0, 1.0)
    return low, high


def rate(events: int, exposure: float) -> tuple[float, float]:
    """Garwood interval of a Poisson rate: events by unit of exposure."""
    top = events + 10 * math.sqrt(events + 1) + 10
    low = 0.0 if events == 0 else _solve(lambda m: 1 - _poisson(events - 1, m) - TAIL, 0.0, top)
    high = _solve(lambda m: TAIL - _poisson(events, m), 0.0, top)
    return low / exposure, high / exposure


def _solve(rising: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _binomial(most: int, total: int, p: float) -> float:
    """P(X <= most)."""
    if p <= 0 or p >= 1:
        return float(p <= 0 or most >= total)
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        + k * math.log(p) + (total - k) * math.log1p(-p)
        for k in range(most + 1)
    ]  # fmt: skip
    return math.fsum(math.exp(value) for value in logs)


def _poisson(most: int, mean: float) -> float:
    """P(X <= most)."""
    if mean <= 0:
        return 1.0
    return math.fsum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(most + 1))
