"""Dead, saturated, gradientless and unused."""

from __future__ import annotations

import math

import pytest

from gradkern.diagnosis import DETECTORS
from tests.diagnosis.synthetic import falling, flat, layers, only, parameter, record_of

dead_relu = DETECTORS["dead_relu"]
saturated = DETECTORS["saturated_activation"]
zero_gradient = DETECTORS["zero_gradient"]
unused = DETECTORS["unused_parameter"]
symmetric = DETECTORS["symmetric_units"]

ORDER = {
    "modules": [
        {"name": name, "type": "Tanh", "order": place, "parent": "", "branch": "0"}
        for place, name in enumerate(("first", "second", "last"))
    ]
}


def test_a_module_without_a_living_unit_is_a_warning_in_any_run() -> None:
    rows = {"act_dead": {"a": [0.1] * 12, "b": [0.2] * 3 + [1.0] * 9}}
    finding = only(dead_relu(record_of(loss=falling(120), rows=rows, every=10)))
    assert (finding.names, finding.step, finding.severity) == (("b",), 30, "warning")


def test_sparse_units_are_information_in_a_run_that_learns() -> None:
    rows = {"act_dead": {"a": [0.95] * 12}}
    assert only(dead_relu(record_of(loss=falling(120), rows=rows, every=10))).severity == "info"


def test_sparse_units_are_a_warning_in_a_flat_run() -> None:
    rows = {"act_dead": {"a": [0.95] * 12}}
    assert only(dead_relu(record_of(loss=flat(120), rows=rows, every=10))).severity == "warning"


def test_four_fifths_of_the_units_at_zero_are_what_relu_does() -> None:
    assert dead_relu(record_of(loss=flat(120), rows={"act_dead": {"a": [0.8] * 12}}, every=10)) == []


def test_units_that_come_back_are_not_dead() -> None:
    rows = {"act_dead": {"a": [1.0] * 4 + [0.3] * 8}}
    assert dead_relu(record_of(loss=flat(120), rows=rows, every=10)) == []


def test_units_saturated_since_the_first_step_are_a_warning_in_any_run() -> None:
    rows = {"act_saturated": {"first": [0.99] * 12}}
    assert (
        only(saturated(record_of(loss=falling(120), rows=rows, every=10, meta=ORDER))).severity == "warning"
    )


def test_units_that_saturate_while_the_run_learns_are_information() -> None:
    rows = {"act_saturated": {"first": [0.2] + [0.99] * 11}}
    assert only(saturated(record_of(loss=falling(120), rows=rows, every=10, meta=ORDER))).severity == "info"


def test_the_last_module_saturates_rightly() -> None:
    rows = {"act_saturated": {"first": [0.1] * 12, "last": [1.0] * 12}}
    assert saturated(record_of(loss=flat(120), rows=rows, every=10, meta=ORDER)) == []


def test_the_first_saturated_module_is_named_first() -> None:
    rows = {"act_saturated": {"second": [1.0] * 12, "first": [0.97] * 12}}
    finding = only(saturated(record_of(loss=flat(120), rows=rows, every=10, meta=ORDER)))
    assert finding.names == ("first", "second")


def test_a_gradient_of_zero_for_fifty_steps_is_a_warning() -> None:
    rows = {"grad_norm": {"l0.weight": [1.0] * 20 + [0.0] * 60, "l1.weight": [1.0] * 80}}
    finding = only(zero_gradient(record_of(loss=falling(80), rows=rows, meta=layers(2))))
    assert (finding.names, finding.step) == (("l0.weight",), 20)


def test_a_gradient_that_is_zero_now_and_then_is_silent() -> None:
    rows = {"grad_norm": {"l0.weight": [0.0, 0.0, 0.0, 1e-9] * 20}}
    assert zero_gradient(record_of(loss=falling(80), rows=rows, meta=layers(1))) == []


def test_a_gradient_that_is_all_nan_is_not_zero() -> None:
    rows = {"grad_norm": {"l0.weight": [0.0] * 80}, "grad_nan": {"l0.weight": [64.0] * 80}}
    assert zero_gradient(record_of(loss=[math.nan] * 80, rows=rows, meta=layers(1))) == []


def test_rare_embeddings_have_no_zero_gradient() -> None:
    meta = {"parameters": [parameter("e.weight", role="embedding")]}
    rows = {"grad_norm": {"e.weight": [0.0] * 80}}
    assert zero_gradient(record_of(loss=falling(80), rows=rows, meta=meta)) == []


def test_a_parameter_that_never_got_a_gradient_is_information() -> None:
    rows = {"grad_norm": {"l0.weight": [1.0] * 5, "l1.weight": [math.nan] * 5}}
    finding = only(unused(record_of(loss=falling(5), rows=rows, meta=layers(2))))
    assert (finding.names, finding.severity) == (("l1.weight",), "info")


def test_a_frozen_parameter_is_not_unused() -> None:
    meta = {"parameters": [parameter("a.weight"), parameter("b.weight", requires_grad=False)]}
    rows = {"grad_norm": {"a.weight": [1.0] * 5, "b.weight": [math.nan] * 5}}
    assert unused(record_of(loss=falling(5), rows=rows, meta=meta)) == []


@pytest.mark.parametrize(("largest", "found"), [(1.0, 1), (1.1, 0)])
def test_units_of_a_hidden_module_that_all_get_the_same_gradient_are_a_warning(
    largest: float, found: int
) -> None:
    norm = math.sqrt(8)  # of eight units of 1
    rows = {
        "out_grad_norm": {"l0": [norm] * 12, "l1": [norm] * 12, "l2": [norm] * 12},
        "out_grad_unit_max": {"l0": [largest] * 12, "l1": [2.0] * 12, "l2": [1.0] * 12},
    }
    findings = symmetric(record_of(loss=flat(120), rows=rows, every=10, meta=layers(3)))
    assert [finding.names for finding in findings] == [("l0",)] * found


def test_units_that_are_alike_in_a_run_that_learns_are_silent() -> None:
    rows = {"out_grad_norm": {"l0": [math.sqrt(8)] * 12}, "out_grad_unit_max": {"l0": [1.0] * 12}}
    assert symmetric(record_of(loss=falling(120), rows=rows, every=10, meta=layers(2))) == []


def test_a_gradient_of_zero_in_a_run_that_has_learned_all_is_information() -> None:
    rows = {"grad_norm": {"l0.weight": [1.0] * 20 + [0.0] * 60}}
    losses = falling(20) + [0.0] * 60
    assert only(zero_gradient(record_of(loss=losses, rows=rows, meta=layers(1)))).severity == "info"


@pytest.mark.parametrize("nothing", [0.0, math.nan])
def test_ten_steps_without_any_gradient_are_an_error(nothing: float) -> None:
    rows = {"grad_norm": {"l0.weight": [nothing] * 12, "l1.weight": [nothing] * 12}}
    assert only(unused(record_of(loss=flat(12), rows=rows, meta=layers(2)))).severity == "error"


def test_a_loss_of_zero_has_no_gradient() -> None:
    rows = {"grad_norm": {"l0.weight": [0.0] * 12}}
    assert unused(record_of(loss=[0.0] * 12, rows=rows, meta=layers(1))) == []
