"""Each rule as its paper or manual words it, one step at a time in plain Python floats."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence


def coefficient(limit: float, norm: float) -> float:
    return limit / norm if norm > limit else 1.0


class AutoClip:
    def __init__(self, percentile: float, window: int) -> None:
        self.percentile = percentile
        self.norms: deque[float] = deque(maxlen=window)

    def step(self, norm: float) -> float:
        if math.isfinite(norm) and norm > 0:
            self.norms.append(norm)
        if not self.norms:
            return 1.0
        # Hyndman and Fan's definition 7, numpy's default.
        ordered = sorted(self.norms)
        rank = self.percentile / 100 * (len(ordered) - 1)
        low = ordered[math.floor(rank)]
        high = ordered[math.ceil(rank)]
        return coefficient(low + (rank - math.floor(rank)) * (high - low), norm)


class ZClip:
    def __init__(self, z_limit: float, alpha: float, warmup: int, max_norm: float | None, eps: float) -> None:
        self.z_limit, self.alpha, self.warmup, self.eps = z_limit, alpha, warmup, eps
        self.max_norm = math.inf if max_norm is None else max_norm
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def step(self, norm: float) -> float:
        if len(self.first) < self.warmup:
            if norm > 0:
                self.first.append(norm)
            if len(self.first) == self.warmup:
                self.mean = statistics.fmean(self.first)
                self.variance = statistics.pvariance(self.first)
            return coefficient(self.max_norm, norm)
        std = math.sqrt(self.variance)
        z = (norm - self.mean) / (std + self.eps)
        x = norm
        if z > self.z_limit:
            x = self.mean + self.z_limit * std / (z / self.z_limit)
        if norm > 0:
            self.mean = self.alpha * self.mean + (1 - self.alpha) * x
            self.variance = self.alpha * self.variance + (1 - self.alpha) * (x - self.mean) ** 2
        return coefficient(min(x, self.max_norm), norm)


class AdaGC:
    def __init__(self, ratio: float, beta: float, warmup: int, max_norm: float, tensors: int) -> None:
        self.ratio, self.beta, self.warmup, self.max_norm = ratio, beta, warmup, max_norm
        self.gamma = [math.inf] * tensors
        self.seen = [0] * tensors

    def step(self, norms: Sequence[float]) -> list[float]:
        joint = coefficient(self.max_norm, math.sqrt(sum(norm * norm for norm in norms)))
        coefs = []
        for i, norm in enumerate(norms):
            warming = self.seen[i] < self.warmup
            coef = joint if warming else coefficient(self.ratio * self.gamma[i], norm)
            coefs.append(coef)
            if norm > 0:
                clipped = coef * norm
                if warming:
                    self.gamma[i] = min(self.gamma[i], clipped)
                else:
                    self.gamma[i] = self.beta * self.gamma[i] + (1 - self.beta) * clipped
                self.seen[i] += 1
        return coefs


class SkipSpike:
    def __init__(
        self, z_limit: float, method: str, window: int, warmup: int, least_spread: float, signals: int
    ) -> None:
        self.z_limit, self.method, self.warmup, self.least_spread = z_limit, method, warmup, least_spread
        self.kept: list[deque[float]] = [deque(maxlen=window) for _ in range(signals)]

    def step(self, *signals: float) -> bool:
        skip = any(self._is_spike(kept, x) for kept, x in zip(self.kept, signals, strict=True))
        if not skip:
            for kept, x in zip(self.kept, signals, strict=True):
                kept.append(x)
        return skip

    def _is_spike(self, kept: deque[float], x: float) -> bool:
        if not math.isfinite(x):
            return True
        if len(kept) < self.warmup:
            return False
        if self.method == "std":
            centre, spread = statistics.fmean(kept), statistics.stdev(kept)
        else:
            centre = statistics.median(kept)
            spread = 1.4826 * statistics.median(abs(y - centre) for y in kept)
        spread = max(spread, self.least_spread * abs(centre))
        return spread > 0 and (x - centre) / spread > self.z_limit
