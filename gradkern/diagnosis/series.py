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
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(logs)]
    places = np.flatnonzero(logs - windows.min(axis=1) >= step)
    late = np.median(windows[places][:, window // 2 :], axis=1)  # Inf where the window is not full
    places = places[(places >= least) & ((places < window) | (logs[places] - late >= step))]
    jumps, errors = np.empty(len(places)), np.empty(len(places))
    early = places < window  # whose windows are shorter
    for index in np.flatnonzero(early):
        level, error = _recent(logs[None, : places[index]])
        jumps[index], errors[index] = logs[places[index]] - level[0], error[0]
    level, errors[~early] = _recent(windows[places[~early]])
    jumps[~early] = logs[places[~early]] - level
    scores = jumps / np.maximum(errors, LEAST_SPREAD)
    return [
        (int(where[places[i]]), float(scores[i]), power10(float(jumps[i])))
        for i in np.flatnonzero((jumps >= step) & (scores >= z))
    ]


def _recent(windows: Floats) -> tuple[Floats, Floats]:
    """Of each row the level of its later half, and the spread around the trend from one half to the other.

    Without the trend the fall of a loss that is learning would pass for noise.
    """
    length = windows.shape[1]
    half = length // 2
    early, late = np.median(windows[:, :half], axis=1), np.median(windows[:, half:], axis=1)
    slope = (late - early) / (length / 2)
    level = windows - slope[:, None] * np.arange(length)
    spreads = [
        MAD_TO_SIGMA * np.median(np.abs(values - np.median(values, axis=1, keepdims=True)), axis=1)
        for values in (level, windows)
    ]
    return late, np.minimum(*spreads)


def fit(x: npt.ArrayLike, y: npt.ArrayLike) -> Line:
    """The least-squares line through the points with finite `y`; slope and r2 are 0 for fewer than 3."""
    slopes, intercepts, shares = fits(x, np.asarray(y, np.float64)[None])
    return Line(float(slopes[0]), float(intercepts[0]), float(shares[0]))


def fits(x: npt.ArrayLike, rows: Floats) -> tuple[Floats, Floats, Floats]:
    """`fit` of each row of ``[k, n]``: slopes, intercepts and r2, ``[k]`` each."""
    xs = np.broadcast_to(np.asarray(x, np.float64), rows.shape)
    kept = np.isfinite(rows)
    number = kept.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        x_mean = np.where(kept, xs, 0.0).sum(axis=1) / number
        y_mean = np.where(kept, rows, 0.0).sum(axis=1) / number
        dx = np.where(kept, xs - x_mean[:, None], 0.0)
        dy = np.where(kept, rows - y_mean[:, None], 0.0)
        xx, xy, yy = (dx * dx).sum(axis=1), (dx * dy).sum(axis=1), (dy * dy).sum(axis=1)
        is_line = (number >= 3) & (xx > 0)
        slopes = np.where(is_line, xy / xx, 0.0)
        shares = np.where(is_line & (yy > 0), xy * xy / (xx * yy), 0.0)
    return slopes, y_mean - slopes * x_mean, shares


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
