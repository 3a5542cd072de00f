"""Thresholds recommended from the run itself, against numpy's percentiles."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradkern.diagnosis import diagnose, recommend_threshold
from tests.diagnosis.synthetic import flat, layers, noisy, parameter, record_of


def test_the_threshold_is_the_90th_percentile_of_the_norms() -> None:
    norms = noisy(300)
    threshold = recommend_threshold(record_of(grad_finite_norm=norms, grad_norm=norms))
    assert threshold.max_norm == pytest.approx(np.quantile(norms, 0.9), rel=1e-12)
    assert threshold.steps == 300


def test_spikes_and_nan_do_not_raise_the_threshold() -> None:
    norms = noisy(300)
    usual = [value for step, value in enumerate(norms) if step not in (100, 200)]
    norms[100], norms[200] = 1e6, math.nan
    threshold = recommend_threshold(record_of(grad_finite_norm=norms, grad_norm=norms))
    assert threshold.max_norm == pytest.approx(np.quantile(usual, 0.9), rel=1e-12)


def test_it_says_how_often_it_would_have_fired_spikes_and_nan_included() -> None:
    norms = [1.0] * 98 + [1e6, math.inf]
    threshold = recommend_threshold(record_of(grad_finite_norm=[1.0] * 98 + [1e6, 1.0], grad_norm=norms))
    assert threshold.share == pytest.approx(0.02)


def test_half_to_ten_times_the_average_norm_is_given() -> None:
    norms = noisy(300)
    threshold = recommend_threshold(record_of(grad_finite_norm=norms, grad_norm=norms))
    assert (threshold.low, threshold.high) == pytest.approx(
        (0.5 * np.mean(norms), 10 * np.mean(norms)), rel=1e-12
    )


def test_only_steps_before_the_trouble_count() -> None:
    norms = noisy(100) + [100.0] * 100
    threshold = recommend_threshold(record_of(grad_finite_norm=norms, grad_norm=norms), before=100)
    assert threshold.max_norm == pytest.approx(np.quantile(norms[:100], 0.9), rel=1e-12)


def test_without_ordinary_steps_it_is_the_articles_value() -> None:
    norms = [3.0, 300.0, 3e6]
    assert recommend_threshold(record_of(grad_finite_norm=norms, grad_norm=norms), before=1).max_norm == 1.0


def test_with_sgd_a_clipped_step_moves_the_weights_by_one_percent_at_most() -> None:
    norms = [500.0] * 50
    record = record_of(
        grad_finite_norm=norms, grad_norm=norms, lr=[0.01] * 50, weight_norm=[6.0] * 50,
        meta={"optimizer": {"type": "SGD", "momentum": 0.9}},
    )  # fmt: skip
    assert recommend_threshold(record).max_norm == pytest.approx(0.01 * 6.0 * 0.1 / 0.01, rel=1e-12)


def test_a_value_clip_is_the_90th_percentile_of_the_largest_elements() -> None:
    peaks = noisy(300)
    rows = {"grad_abs_max": {"a": peaks, "b": [1e-3] * 300}}
    threshold = recommend_threshold(record_of(loss=[1.0] * 300, rows=rows), of="value")
    assert threshold.max_norm == pytest.approx(np.quantile(np.float32(peaks), 0.9), rel=1e-6)


def test_all_advice_has_a_line_a_reason_and_what_speaks_against_it() -> None:
    losses = [2.0 * 1.2**step for step in range(60)]
    norms = [1.0] * 25 + [2.0**step for step in range(35)]
    record = record_of(
        loss=losses, grad_finite_norm=norms, grad_norm=norms, lr=[0.1] * 60, update_norm=[0.5] * 60,
        weight_norm=[1.0] * 60, rows={"grad_abs_max": {"w": norms}}, meta={"parameters": [parameter("w")]},
    )  # fmt: skip
    advice = diagnose(record).advice
    assert {"Lower the learning rate"} < {entry.title for entry in advice}
    assert all(entry.line and entry.why and entry.against and 0 < entry.score <= 1 for entry in advice)


def test_a_recurrent_net_that_explodes_is_to_be_probed_through_time() -> None:
    meta = {"parameters": [parameter("rnn.weight_hh_l0", role="recurrent")]}
    record = record_of(loss=[1.5**step for step in range(40)], lr=[0.1] * 40, meta=meta)
    assert "Look at the time steps" in {entry.title for entry in diagnose(record).advice}


def test_advice_is_sorted_by_its_score() -> None:
    losses = [2.0 * 1.2**step for step in range(60)]
    norms = [1.0] * 25 + [2.0**step for step in range(35)]
    record = record_of(loss=losses, grad_finite_norm=norms, grad_norm=norms, lr=[0.1] * 60)
    scores = [entry.score for entry in diagnose(record).advice]
    assert scores == sorted(scores, reverse=True)


def test_a_lower_learning_rate_is_aimed_at_the_first_large_update_not_at_the_last() -> None:
    record = record_of(
        loss=[1.5**step for step in range(40)], lr=[1.0] * 40, weight_norm=[1.0] * 40,
        update_norm=[min(0.3 * 10.0**step, 1e30) for step in range(40)],
    )  # fmt: skip
    (advice,) = [entry for entry in diagnose(record).advice if entry.title == "Lower the learning rate"]
    assert advice.line == "for group in optimizer.param_groups: group['lr'] *= 1e-02"


def test_norms_of_zero_make_no_threshold() -> None:
    norms = [0.0] * 50
    assert recommend_threshold(record_of(grad_finite_norm=norms, grad_norm=norms)).max_norm == 1.0


def test_norms_after_an_explosion_make_no_threshold() -> None:
    norms = [2.0**step for step in range(60)]
    diagnosis = diagnose(
        record_of(loss=[1.5**step for step in range(60)], grad_finite_norm=norms, grad_norm=norms)
    )
    (clip,) = [entry for entry in diagnosis.advice if entry.title.startswith("Clip at")]
    assert clip.title == "Clip at 1"


def test_a_clip_that_is_tighter_already_is_not_advised() -> None:
    norms = noisy(60) + [1e4] * 60
    losses = [1.1**step for step in range(120)]
    for now, found in ((0.5, 0), (50.0, 1)):
        record = record_of(loss=losses, grad_finite_norm=norms, grad_norm=norms, clip_threshold=[now] * 120)
        titles = [entry.title for entry in diagnose(record).advice]
        assert sum(title.startswith("Clip at") for title in titles) == found


def test_a_run_without_any_gradient_is_told_to_look_at_its_calls() -> None:
    record = record_of(loss=flat(120), rows={"grad_norm": {"l0.weight": [math.nan] * 120}}, meta=layers(1))
    diagnosis = diagnose(record)
    assert diagnosis.advice[0].title == "Look at the order of the calls"
