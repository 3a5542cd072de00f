"""Robust arithmetic on series, against numpy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradkern.diagnosis import series


def test_spread_estimates_the_standard_deviation_of_normal_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 100_000)
    assert series.spread(values) == pytest.approx(2.0, rel=0.01)


def test_step_noise_does_not_see_a_trend() -> None:
    noise = np.random.default_rng(0).normal(0.0, 1.0, 100_000)
    assert series.step_noise(noise + np.linspace(0, 1000, 100_000)) == pytest.approx(1.0, rel=0.02)


def test_medians_leave_out_what_is_not_finite() -> None:
    assert series.median([1.0, math.nan, 3.0, math.inf]) == 2.0


def test_the_median_of_nothing_is_nan() -> None:
    assert math.isnan(series.median([math.nan]))


def test_a_spike_is_found_though_it_would_hide_in_its_own_window() -> None:
    values = [1.0, 1.1, 0.9, 1.05, 0.95] * 8
    values[-1] = 1000.0
    found = series.spikes(values, window=128, least=20, z=8.0, ratio=10.0)
    assert [position for position, _, _ in found] == [39]


def test_the_ratio_of_a_spike_is_to_the_median_before_it() -> None:
    values = [2.0, 4.0, 8.0] * 10 + [400.0]
    ((_, _, ratio),) = series.spikes(values, window=128, least=20, z=1.0, ratio=10.0)
    assert ratio == pytest.approx(100.0, rel=1e-12)


def test_nan_and_inf_enter_no_window() -> None:
    values = [1.0, math.nan, 1.1, math.inf, 0.9] * 10 + [1000.0]
    found = series.spikes(values, window=128, least=20, z=8.0, ratio=10.0)
    assert [position for position, _, _ in found] == [50]


def test_wide_series_have_no_spikes() -> None:
    values = 10.0 ** np.random.default_rng(0).normal(0, 1, 2000)
    assert series.spikes(values, window=128, least=20, z=8.0, ratio=10.0) == []


@pytest.mark.parametrize("position", [20, 21, 127, 128, 129, 299])
def test_a_spike_is_found_wherever_it_is(position: int) -> None:
    values = np.exp(np.random.default_rng(0).normal(0, 0.1, 300))
    values[position] = 100.0
    found = series.spikes(values, window=128, least=20, z=8.0, ratio=10.0)
    assert [place for place, _, _ in found] == [position]


def test_no_spike_before_the_window_has_its_least() -> None:
    values = [1.0] * 19 + [1e6]
    assert series.spikes(values, window=128, least=20, z=8.0, ratio=10.0) == []


def test_a_line_is_fitted_exactly() -> None:
    line = series.fit([0, 1, 2, 3], [1.0, 3.0, 5.0, 7.0])
    assert (line.slope, line.intercept, line.r2) == pytest.approx((2.0, 1.0, 1.0), abs=1e-12)


def test_a_fit_leaves_out_what_is_not_finite() -> None:
    line = series.fit([0, 1, 2, 3], [1.0, math.nan, 5.0, 7.0])
    assert line.slope == pytest.approx(2.0, rel=1e-12)


def test_two_points_explain_nothing() -> None:
    assert series.fit([0, 1], [1.0, 2.0]).r2 == 0.0


def test_trailing_medians_end_with_the_last_window() -> None:
    values = np.arange(10_001, dtype=float)
    assert series.trailing_medians(values, 101)[-1] == 9950.0


def test_runs_of_flags_are_their_stretches() -> None:
    assert series.runs_of([True, False, True, True, False]) == [(0, 1), (2, 4)]


def test_at_gives_the_latest_value_before_a_step() -> None:
    assert series.at([0, 10, 20], np.array([1.0, 2.0, 3.0]), [0, 9, 10, 25]).tolist() == [1.0, 1.0, 2.0, 3.0]


def test_zeros_are_no_level_to_spike_from() -> None:
    values = [0.0] * 40 + [1.0] * 10
    assert series.spikes(values, window=32, least=20, z=8.0, ratio=10.0) == []


@pytest.mark.parametrize("seed", range(20))
def test_spikes_are_those_of_the_definition_position_by_position(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.exp(rng.standard_t(2, 400) * rng.random())
    values[rng.integers(0, 400, 5)] *= 100
    values[rng.integers(0, 400, 3)] = math.nan
    where = np.flatnonzero(np.isfinite(values))
    logs = np.log10(values[where])
    expected = []
    for position in range(20, len(logs)):
        window = logs[max(0, position - 128) : position]
        half = len(window) // 2
        early, late = np.median(window[:half]), np.median(window[half:])
        level = window - (late - early) / (len(window) / 2) * np.arange(len(window))
        error = min(1.4826 * np.median(np.abs(part - np.median(part))) for part in (level, window))
        jump = logs[position] - late
        if jump >= math.log10(3.0) and jump / max(error, 0.02) >= 4.0:
            expected.append(int(where[position]))
    found = series.spikes(values, window=128, least=20, z=4.0, ratio=3.0)
    assert [place for place, _, _ in found] == expected


def test_lines_of_rows_are_those_of_each_row() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(6, 9)) + np.arange(9)
    rows[2, 3:5] = math.nan
    slopes, intercepts, shares = series.fits(np.arange(9), rows)
    for row, slope, intercept, share in zip(rows, slopes, intercepts, shares, strict=True):
        kept = np.isfinite(row)
        expected = np.polyfit(np.arange(9)[kept], row[kept], 1)
        assert (slope, intercept) == pytest.approx(tuple(expected), rel=1e-10)
        assert share == pytest.approx(np.corrcoef(np.arange(9)[kept], row[kept])[0, 1] ** 2, rel=1e-10)
