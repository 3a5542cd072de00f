"""Float16: what is lost at either end of its range."""

from __future__ import annotations

import math

import pytest

from gradkern.diagnosis import DETECTORS, Finding
from gradkern.record import MemoryRecord
from tests.diagnosis.synthetic import falling, flat, only, parameter, record_of

fp16_overflow = DETECTORS["fp16_overflow"]
fp16_underflow = DETECTORS["fp16_underflow"]

HALF = {"parameters": [parameter("w", dtype="torch.float16")]}
SINGLE = {"parameters": [parameter("w")]}


def histograms(zero: int, subnormal: int, normal: int, loss: list[float]) -> list[Finding]:
    record = record_of(loss=loss, meta=HALF)
    record.set_names("exponents", ["w"])
    for step in range(0, len(loss), 10):
        record.put_exponents(step, [[zero, subnormal, 0, *[0] * 30, normal, *[0] * 30]])
    return fp16_underflow(record)


def test_gradients_that_are_mostly_rounded_to_zero_are_a_warning_in_a_flat_run() -> None:
    finding = only(histograms(60, 30, 10, flat(120)))
    assert finding.severity == "warning"
    assert finding.value == pytest.approx(0.6)


def test_nine_tenths_rounded_to_zero_are_a_warning_in_any_run() -> None:
    assert only(histograms(95, 4, 1, falling(120))).severity == "warning"


def test_zeros_of_dead_units_are_no_underflow() -> None:
    assert histograms(80, 1, 19, flat(120)) == []


def test_ordinary_float16_gradients_are_silent() -> None:
    assert histograms(10, 30, 60, flat(120)) == []


def test_float32_gradients_do_not_underflow() -> None:
    rows = {"grad_zero": {"w": [0.99] * 120}, "grad_abs_max": {"w": [1e-9] * 120}}
    assert fp16_underflow(record_of(loss=flat(120), rows=rows, meta=SINGLE)) == []


def test_without_histograms_zeros_and_a_small_largest_element_are_enough() -> None:
    rows = {"grad_zero": {"w": [0.7] * 120}, "grad_abs_max": {"w": [1e-6] * 120}}
    assert only(fp16_underflow(record_of(loss=flat(120), rows=rows, meta=HALF))).severity == "warning"


def overflow(meta: dict[str, object], *, backoff: bool = False) -> list[Finding]:
    rows = {"grad_inf": {"w": [0.0, 0.0, 3.0, 0.0]}}
    events = [(2, "amp_backoff")] if backoff else []
    return fp16_overflow(record_of(loss=[1.0] * 4, rows=rows, meta=meta, events=events))


def test_inf_in_a_float16_gradient_is_an_overflow() -> None:
    finding = only(overflow(HALF))
    assert (finding.step, finding.names, finding.severity) == (2, ("w",), "error")


def test_inf_in_a_float32_gradient_is_none() -> None:
    assert overflow(SINGLE) == []


def test_an_inf_that_the_scaler_took_back_is_none() -> None:
    assert overflow(HALF, backoff=True) == []


def test_bad_data_are_not_an_overflow() -> None:
    rows = {"grad_inf": {"w": [0.0, 3.0]}}
    record = record_of(loss=[1.0, math.nan], data_nonfinite=[0, 1], rows=rows, meta=HALF)
    assert fp16_overflow(record) == []


def test_activations_near_the_end_of_float16_are_information() -> None:
    rows = {"act_abs_max": {"m": [100.0, 40000.0]}}
    finding = only(fp16_overflow(record_of(loss=[1.0] * 2, rows=rows, meta=HALF)))
    assert (finding.severity, finding.names) == ("info", ("m",))


def test_a_loss_lost_next_to_such_activations_is_an_overflow() -> None:
    rows = {"act_abs_max": {"m": [40000.0]}}
    finding = only(fp16_overflow(record_of(loss=[1.0, math.nan], rows=rows, meta=HALF)))
    assert (finding.severity, finding.step) == ("error", 1)


def test_an_empty_record_says_nothing() -> None:
    assert fp16_overflow(MemoryRecord()) == fp16_underflow(MemoryRecord()) == []


@pytest.mark.parametrize(("last_subnormal", "found"), [(90, 1), (0, 0)])
def test_gradients_that_are_all_zero_underflowed_if_the_last_layer_is_at_the_floor(
    last_subnormal: int, found: int
) -> None:
    record = record_of(
        loss=falling(120),
        meta={"parameters": [parameter(name, dtype="torch.float16") for name in ("a", "b", "c")]},
    )
    record.set_names("exponents", ["a", "b", "c"])
    none = [100, *[0] * 63]
    last = [10, last_subnormal, 0, *[0] * 30, 90 - last_subnormal, *[0] * 30]
    for step in range(0, 120, 10):
        record.put_exponents(step, [none, none, last])
    assert len(fp16_underflow(record)) == found


def test_a_lost_loss_with_finite_gradients_is_an_overflow_of_its_sum() -> None:
    record = record_of(loss=[9e4, 8e4, math.inf], nonfinite_count=[0.0, 0.0, 0.0], meta=HALF)
    assert only(fp16_overflow(record)).names == ()
