"""Data off the scale, all of it or one batch."""

from __future__ import annotations

import pytest

from gradkern.diagnosis import DETECTORS
from tests.diagnosis.synthetic import falling, flat, layers, noisy, only, parameter, record_of

data_scale = DETECTORS["data_scale"]


def test_large_inputs_are_information_in_a_run_that_learns() -> None:
    record = record_of(loss=falling(120), data_std=[60.0] * 120, data_abs_max=[255.0] * 120)
    assert only(data_scale(record)).severity == "info"


def test_large_inputs_are_a_warning_in_a_flat_run() -> None:
    record = record_of(loss=flat(120), data_std=[60.0] * 120, data_abs_max=[255.0] * 120)
    assert only(data_scale(record)).severity == "warning"


def test_large_regression_targets_are_seen_in_the_loss() -> None:
    record = record_of(
        loss=flat(120, 1e5), data_std=[1.0] * 120, data_abs_max=[3.0] * 120, target_abs_max=[500.0] * 120
    )
    assert only(data_scale(record)).evidence["what"] == "targets"


def test_class_numbers_are_no_large_targets() -> None:
    record = record_of(
        loss=flat(120, 7.0), data_std=[1.0] * 120, data_abs_max=[3.0] * 120, target_abs_max=[50_000.0] * 120
    )
    assert data_scale(record) == []


def test_tokens_are_no_large_inputs() -> None:
    meta = {"parameters": [parameter("e.weight", role="embedding")]}
    record = record_of(loss=flat(120), data_abs_max=[50_000.0] * 120, meta=meta)
    assert data_scale(record) == []


def test_standardised_inputs_are_silent() -> None:
    assert data_scale(record_of(loss=flat(120), data_std=[1.0] * 120, data_abs_max=[4.5] * 120)) == []


def test_units_that_large_inputs_block_at_the_first_step_are_a_warning() -> None:
    meta = {
        "modules": [{"name": name, "type": "Tanh", "order": i, "branch": "0"} for i, name in enumerate("ab")]
    }
    rows = {"act_saturated": {"a": [0.98] * 3, "b": [0.1] * 3}}
    record = record_of(
        loss=falling(30), data_std=[60.0] * 30, data_abs_max=[255.0] * 30, rows=rows, every=10, meta=meta
    )
    assert only(data_scale(record)).severity == "warning"


def one_batch(loss: list[float]) -> str:
    peaks = noisy(200, 3.0, 0.05)
    peaks[100] = 3000.0
    finding = only(data_scale(record_of(loss=loss, data_abs_max=peaks, data_std=[1.0] * 200)))
    assert finding.step == 100
    return finding.severity


def test_one_large_batch_without_harm_is_information() -> None:
    assert one_batch(falling(200)) == "info"


def test_one_large_batch_that_undid_the_training_is_a_warning() -> None:
    assert one_batch([*falling(101), *falling(99, start=5.0)]) == "warning"


@pytest.mark.parametrize(("output", "found"), [(5.0, "warning"), (3e4, "info")])
def test_targets_that_the_outputs_do_not_come_near_are_a_warning(output: float, found: str) -> None:
    meta = {"modules": [{"name": "head", "type": "Linear", "order": 0, "branch": "0"}]}
    record = record_of(
        loss=falling(130, start=1e11, end=8e10), target_abs_max=[5e5] * 130,
        rows={"act_abs_max": {"head": [output] * 13}}, every=10, meta=meta,
    )  # fmt: skip
    assert only(data_scale(record)).severity == found


def test_inputs_of_a_ten_thousandth_are_a_warning_in_a_flat_run() -> None:
    record = record_of(loss=flat(120), data_std=[1e-4] * 120, data_abs_max=[4e-4] * 120)
    assert only(data_scale(record)).severity == "warning"


def test_small_inputs_are_silent_in_a_run_that_learns() -> None:
    assert data_scale(record_of(loss=falling(120), data_std=[1e-4] * 120, data_abs_max=[4e-4] * 120)) == []


@pytest.mark.parametrize(("output", "found"), [(6e5, "warning"), (3.0, "info")])
def test_enormous_inputs_are_a_warning_unless_the_first_layer_brings_them_down(
    output: float, found: str
) -> None:
    record = record_of(
        loss=falling(130), data_std=[1e5] * 130, data_abs_max=[1e6] * 130,
        rows={"act_abs_max": {"l0": [output] * 3, "l1": [1.0] * 3}}, every=50, meta=layers(2),
    )  # fmt: skip
    assert only(data_scale(record)).severity == found


@pytest.mark.parametrize(("low", "found"), [(2.0, "warning"), (500.0, "info")])
def test_batches_of_two_units_are_a_warning_if_the_loss_jumps_with_them(low: float, found: str) -> None:
    falls = falling(200, start=1.0, end=0.01)
    losses = [fall * (low**2 if step % 4 else 1e6) for step, fall in enumerate(falls)]
    targets = [low if step % 4 else 1e3 for step in range(200)]
    (finding,) = [f for f in data_scale(record_of(loss=losses, target_abs_max=targets)) if f.step < 5]
    assert finding.severity == found
