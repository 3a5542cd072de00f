"""Arithmetic on recorded series, robust against what a broken run puts into them.

Medians and median absolute deviations (MAD), never means: one step in a hundred may be anything. NaN and Inf
never enter a window; they have detectors of their own.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# 1.4826 MAD estimates the standard deviation of normal values.
MAD_TO_SIGMA: Final = 1.4826

# Standard error of a median, in standard deviations of normal values over the root of their number.
MEDIAN_ERROR: Final = 1.2533

# The smallest spread in log10 that a window is credited with: 5 %. A series that repeats itself exactly has
# a MAD of 0, and every change would be infinitely unlikely.
LEAST_SPREAD: Final = 0.02

# Smaller values count as this: below it log10 would look at rounding errors.
TINY: Final = 1e-30


class Line(NamedTuple):
    """A straight line through points: its slope, and the share of the variance that it explains."""

    slope: float
    intercept: float
    r2: float


def log10(values: npt.ArrayLike) -> Floats:
    """log10 of magnitudes, 0 counted as `TINY`; NaN and Inf stay what they are."""
    with np.errstate(invalid="ignore"):
        result: Floats = np.log10(np.maximum(np.abs(np.asarray(values, np.float64)), TINY))
    return result


def finite(values: npt.ArrayLike) -> Floats:
    """The finite ones of `values`, flat, float64."""
    flat = np.asarray(values, np.float64).ravel()
    result: Floats = flat[np.isfinite(flat)]
    return result


def median(values: npt.ArrayLike) -> float:
    """The median of the finite values, NaN if there is none."""
    kept = finite(values)
    return float(np.median(kept)) if len(kept) else math.nan


def spread(values: npt.ArrayLike) -> float:
    """1.4826 MAD of the finite values, NaN if there is none."""
    kept = finite(values)
    return MAD_TO_SIGMA * float(np.median(np.abs(kept - np.median(kept)))) if len(kept) else math.nan


def step_noise(values: npt.ArrayLike) -> float:
    """The standard deviation around a slow trend: of the differences of neighbours, over root 2."""
    kept = finite(values)
    return spread(np.diff(kept)) / math.sqrt(2) if len(kept) > 2 else 0.0


def largest(values: npt.ArrayLike) -> float:
    """The largest of the finite values, NaN if there is none."""
    kept = finite(values)
    return float(kept.max()) if len(kept) else math.nan


def smallest(values: npt.ArrayLike) -> float:
    """The smallest of the finite values, NaN if there is none."""
    kept = finite(values)
    return float(kept.min()) if len(kept) else math.nan


def power10(exponent: float) -> float:
    """10 to the power of `exponent`, without overflow."""
    return float(10.0 ** min(max(exponent, -300.0), 300.0))


def row_medians(values: npt.ArrayLike) -> Floats:
    """The median of the finite entries of each column of ``[k, n]``, NaN where there is none."""
    array = np.asarray(values, np.float64)
    result = np.full(array.shape[1], math.nan)
    for column in range(array.shape[1]):
        result[column] = median(array[:, column])
    return result


def robust_z(value: float, window: npt.ArrayLike, least_spread: float = LEAST_SPREAD) -> float:
    """How many robust standard deviations `value` is above the median of a `window` it is not part of.

    >>> from gradkern.diagnosis.series import robust_z
    >>> round(robust_z(10.0, [1.0, 2.0, 3.0, 4.0, 5.0]), 2)
    4.72
    """
    return (value - median(window)) / max(spread(window), least_spread)


def spikes(
    values: npt.ArrayLike, *, window: int, least: int, z: float, ratio: float
) -> list[tuple[int, float, float]]:
    """Positions at which positive values jump up, with the robust z of log10 and the ratio to the median.

    Each value is compared with up to `window` ones before it (at least `least`), itself excluded: a
    spike that is tested inside its own window hides itself. It counts if it is `ratio` times the median of
    the later half of them, and `z` robust standard deviations above it in log10, around their trend.
    """
    given = np.asarray(values, np.float64)
    where = np.flatnonzero(np.isfinite(given) & (given > 0))
    logs = log10(given[where])
    if len(logs) <= least:
        return []
    step = math.log10(ratio)
    # The median of (half of) a window is at least its minimum, which is cheaper and rules almost all out.
    padded = np.concatenate([np.full(window, np.inf), logs])
    lowest = np.lib.stride_tricks.sliding_window_view(padded, window).min(axis=1)[: len(logs)]
    found = []
    for position in np.flatnonzero(logs - lowest >= step):
        if position < least:
            continue
        level, error = _recent(logs[max(0, position - window) : position])
        jump = logs[position] - level
        if jump >= step and (score := jump / max(error, LEAST_SPREAD)) >= z:
            found.append((int(where[position]), score, power10(jump)))
    return found


def _recent(window: Floats) -> tuple[float, float]:
    """The level of the later half of a window, and the spread around the trend from one half to the other.

    Without the trend the fall of a loss that is learning would pass for noise.
    """
    half = len(window) // 2
    early, late = float(np.median(window[:half])), float(np.median(window[half:]))
    slope = (late - early) / (len(window) / 2)
    return late, min(spread(window - slope * np.arange(len(window))), spread(window))


def fit(x: npt.ArrayLike, y: npt.ArrayLike) -> Line:
    """The least-squares line through the points with finite `y`; slope and r2 are 0 for fewer than 3."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    kept = np.isfinite(ys) & np.isfinite(xs)
    xs, ys = xs[kept], ys[kept]
    if len(xs) < 3 or np.ptp(xs) == 0:
        return Line(0.0, float(ys.mean()) if len(ys) else math.nan, 0.0)
    slope, intercept = np.polyfit(xs, ys, 1)
    total = float(np.square(ys - ys.mean()).sum())
    left = float(np.square(ys - (slope * xs + intercept)).sum())
    return Line(float(slope), float(intercept), 1.0 - left / total if total > 0 else 0.0)


def trailing_medians(values: npt.ArrayLike, width: int) -> Floats:
    """The median of each stretch of `width` values, ``[k - width + 1]``; empty for a shorter series."""
    array = np.asarray(values, np.float64)
    if len(array) < width:
        return np.empty(0)
    # A long series is looked at in at most 2000 places: neighbouring stretches are nearly the same.
    windows = np.lib.stride_tricks.sliding_window_view(array, width)
    stride = max(1, len(windows) // 2000, width // 8)
    last = windows[-1:] if (len(windows) - 1) % stride else windows[:0]
    result: Floats = np.median(np.concatenate([windows[::stride], last]), axis=1)
    return result


def runs_of(flags: npt.ArrayLike) -> list[tuple[int, int]]:
    """Stretches of True in `flags`, as (first, one past the last)."""
    padded = np.concatenate([[False], np.asarray(flags, bool), [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return [(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def at(steps: npt.ArrayLike, values: Floats, wanted: npt.ArrayLike) -> Floats:
    """`values` at each of the `wanted` steps: the latest before or at it, else the first; NaN if empty."""
    known = np.asarray(steps)
    if not len(known):
        return np.full(np.shape(np.asarray(wanted)), math.nan)
    result: Floats = values[np.clip(np.searchsorted(known, np.asarray(wanted), "right") - 1, 0, None)]
    return result
