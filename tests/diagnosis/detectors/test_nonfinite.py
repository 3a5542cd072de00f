"""NaN and Inf, by step and name."""

from __future__ import annotations

import math

from gradkern.diagnosis import DETECTORS
from tests.diagnosis.synthetic import falling, layers, only, record_of

loss_nonfinite = DETECTORS["loss_nonfinite"]
grad_nonfinite = DETECTORS["grad_nonfinite"]
weights_nonfinite = DETECTORS["weights_nonfinite"]
data_nonfinite = DETECTORS["data_nonfinite"]
amp_backoff = DETECTORS["amp_backoff"]


def test_the_first_nan_loss_is_named_by_its_step() -> None:
    finding = only(loss_nonfinite(record_of(loss=[2.0, 1.5, math.nan, math.nan])))
    assert (finding.step, finding.severity) == (2, "error")


def test_the_loss_before_the_nan_is_in_the_sentence() -> None:
    finding = only(loss_nonfinite(record_of(loss=[2.0, 1.5, math.inf])))
    assert finding.sentence == "The loss became Inf at step 2; it was 1.5 before."


def test_a_run_that_came_back_from_one_nan_is_warned_about_only() -> None:
    losses = [2.0, math.nan, *falling(20)]
    assert only(loss_nonfinite(record_of(loss=losses))).severity == "warning"


def test_a_finite_loss_is_no_finding() -> None:
    assert loss_nonfinite(record_of(loss=[1e30, -1e30, 0.0])) == []


def test_the_last_layer_with_nan_is_named_first() -> None:
    counts = {"l0.weight": [0, 3], "l1.weight": [0, 2], "l2.weight": [0, 0]}
    record = record_of(nonfinite_count=[0, 5], rows={"grad_nan": counts}, meta=layers(3))
    assert only(grad_nonfinite(record)).names == ("l1.weight", "l0.weight")


def test_a_skipped_step_with_nan_gradients_is_a_warning() -> None:
    record = record_of(nonfinite_count=[0, 5, 0], skipped=[0, 1, 0])
    assert only(grad_nonfinite(record)).severity == "warning"


def test_steps_that_a_scaler_took_back_are_no_nonfinite_gradients() -> None:
    record = record_of(nonfinite_count=[5, 0, 0], events=[(0, "amp_backoff")])
    assert grad_nonfinite(record) == []


def test_nan_weights_are_named() -> None:
    rows = {"weight_nan": {"a": [0, 0, 0], "b": [0, 7, 7]}}
    finding = only(weights_nonfinite(record_of(rows=rows, every=10)))
    assert (finding.step, finding.names) == (10, ("b",))


def test_inf_weights_are_found_too() -> None:
    finding = only(weights_nonfinite(record_of(rows={"weight_inf": {"a": [0, 1]}})))
    assert (finding.step, finding.names) == (1, ("a",))


def test_nan_in_a_batch_is_an_error_at_its_step() -> None:
    finding = only(data_nonfinite(record_of(data_nonfinite=[0, 0, 4, 0])))
    assert (finding.step, finding.value, finding.severity) == (2, 4.0, "error")


def test_backing_off_now_and_then_is_information() -> None:
    record = record_of(loss=falling(500), events=[(step, "amp_backoff") for step in (0, 1, 2, 300)])
    assert only(amp_backoff(record)).severity == "info"


def test_losing_every_fifth_step_to_the_scaler_is_a_warning() -> None:
    record = record_of(loss=falling(500), events=[(step, "amp_backoff") for step in range(0, 500, 5)])
    assert only(amp_backoff(record)).severity == "warning"


def test_a_scale_that_has_fallen_to_one_is_a_warning() -> None:
    record = record_of(
        loss=falling(100), loss_scale=[1.0] * 100, events=[(step, "amp_backoff") for step in range(8)]
    )
    assert only(amp_backoff(record)).severity == "warning"


def test_values_that_are_not_finite_and_do_no_harm_are_information() -> None:
    record = record_of(loss=[1.0] * 9, grad_norm=[1.0] * 9, data_nonfinite=[4.0] * 9)
    assert only(DETECTORS["data_nonfinite"](record)).severity == "info"


def test_the_first_batch_that_does_harm_is_named() -> None:
    losses = [1.0, 1.0, math.nan, 1.0]
    finding = only(DETECTORS["data_nonfinite"](record_of(loss=losses, data_nonfinite=[2.0] * 4)))
    assert (finding.severity, finding.step) == ("error", 2)


def test_a_step_whose_loss_is_nan_was_not_lost_to_the_scale() -> None:
    record = record_of(loss=[1.0, math.nan, 1.0], loss_scale=[64.0] * 3, events=[(1, "amp_backoff")])
    assert DETECTORS["amp_backoff"](record) == []
