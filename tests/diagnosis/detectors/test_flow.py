"""Growth and decay of gradients, against sequences with known factors."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gradkern.diagnosis import DETECTORS
from tests.diagnosis.synthetic import falling, flat, layers, noisy, only, parameter, record_of

exploding = DETECTORS["exploding_gradient"]
vanishing = DETECTORS["vanishing_gradient"]
norms_above_one = DETECTORS["norms_above_one"]

DIVERGING = [2.0 * 1.2**step for step in range(60)]


def depth(factor: float, count: int = 12, rows: int = 3) -> dict[str, dict[str, list[float]]]:
    """||dL/doutput|| of a chain whose gradients change by `factor` a layer towards the input."""
    return {"out_grad_norm": {f"l{i}": [factor ** (count - 1 - i)] * rows for i in range(count)}}


def time(factor: float, length: int = 40) -> dict[str, dict[str, list[float]]]:
    return {"time_grad_norm": {str(t): [factor ** (length - 1 - t)] for t in range(length)}}


def test_the_factor_a_layer_is_that_of_the_chain() -> None:
    finding = only(exploding(record_of(loss=falling(50), rows=depth(2.0), every=10, meta=layers(12))))
    assert finding.value == pytest.approx(2.0, rel=1e-6)
    assert finding.names == ("l0",)


def test_growth_through_depth_is_a_warning_while_the_run_learns_and_an_error_when_it_does_not() -> None:
    severities = [
        only(exploding(record_of(loss=loss, rows=depth(2.0), every=10, meta=layers(12)))).severity
        for loss in (falling(60), DIVERGING)
    ]
    assert severities == ["warning", "error"]


def test_a_mild_factor_through_depth_is_silent() -> None:
    assert exploding(record_of(loss=falling(50), rows=depth(1.2), every=10, meta=layers(12))) == []


def test_parallel_branches_are_no_chain() -> None:
    meta = layers(12)
    for module in meta["modules"]:
        module["branch"] = None
    assert exploding(record_of(loss=falling(50), rows=depth(3.0), every=10, meta=meta)) == []


def test_one_large_layer_is_no_growth_through_depth() -> None:
    rows = {"out_grad_norm": {f"l{i}": [1e5 if i == 5 else 1.0] * 3 for i in range(12)}}
    assert exploding(record_of(loss=falling(50), rows=rows, every=10, meta=layers(12))) == []


def test_the_factor_a_time_step_is_that_of_the_sequence() -> None:
    finding = only(exploding(record_of(loss=falling(50), rows=time(1.3))))
    assert finding.evidence["axis"] == "time"
    assert finding.value == pytest.approx(1.3, rel=1e-5)


def test_gradients_that_grow_with_a_diverging_loss_are_exploding() -> None:
    norms = [1.0] * 20 + [2.0**step for step in range(40)]
    finding = only(exploding(record_of(loss=DIVERGING, grad_finite_norm=norms)))
    assert (finding.severity, finding.evidence["axis"], finding.step) == ("error", "training", 22)


def test_gradients_that_grow_a_thousandfold_while_the_loss_falls_are_silent() -> None:
    norms = [1.0] * 20 + [min(2.0**step, 1000.0) for step in range(40)]
    assert exploding(record_of(loss=falling(60), grad_finite_norm=norms)) == []


def test_a_norm_of_1e12_is_exploding_whatever_the_loss_does() -> None:
    finding = only(exploding(record_of(loss=falling(60), grad_finite_norm=[1e12] * 60)))
    assert finding.evidence["axis"] == "scale"


def test_vanishing_through_depth_needs_a_flat_loss() -> None:
    rows = depth(0.3, rows=12)
    kinds = [
        [
            finding.severity
            for finding in vanishing(record_of(loss=loss, rows=rows, every=10, meta=layers(12)))
        ]
        for loss in (falling(120), flat(120))
    ]
    assert kinds == [[], ["warning"]]


def test_vanishing_by_a_hundred_millionth_needs_no_flat_loss() -> None:
    finding = only(
        vanishing(record_of(loss=falling(120), rows=depth(0.1, rows=12), every=10, meta=layers(12)))
    )
    assert finding.value == pytest.approx(1e-11, rel=1e-5)


def test_a_network_that_leaves_its_plateau_is_not_vanishing() -> None:
    rows = {
        "out_grad_norm": {f"l{i}": [0.1 ** (11 - i)] * 4 + [1.0] * 8 for i in range(12)},
    }
    assert vanishing(record_of(loss=falling(120), rows=rows, every=10, meta=layers(12))) == []


def test_forgetting_over_time_is_information_while_the_run_learns() -> None:
    assert only(vanishing(record_of(loss=falling(120), rows=time(0.7)))).severity == "info"


def test_forgetting_over_time_is_a_warning_if_nothing_is_learned() -> None:
    assert only(vanishing(record_of(loss=flat(120), rows=time(0.7)))).severity == "warning"


def test_absent_gradients_of_a_flat_run_are_vanishing() -> None:
    record = record_of(loss=flat(120), grad_finite_norm=[1e-12] * 120)
    assert only(vanishing(record)).evidence["axis"] == "scale"


def test_small_gradients_of_a_run_that_has_converged_are_silent() -> None:
    record = record_of(loss=falling(200, end=1e-6), grad_finite_norm=[1.0] * 20 + [1e-12] * 180)
    assert vanishing(record) == []


def test_norms_above_one_everywhere_are_information_in_a_run_that_learns() -> None:
    rows = {"grad_norm": {f"l{i}.weight": noisy(60, 50.0, seed=i) for i in range(3)}}
    assert only(norms_above_one(record_of(loss=falling(60), rows=rows, meta=layers(3)))).severity == "info"


def test_norms_above_one_are_a_warning_when_the_loss_diverges() -> None:
    rows = {"grad_norm": {f"l{i}.weight": noisy(60, 50.0, seed=i) for i in range(3)}}
    assert only(norms_above_one(record_of(loss=DIVERGING, rows=rows, meta=layers(3)))).severity == "warning"


def test_one_layer_below_one_is_enough_for_silence() -> None:
    rows = {"grad_norm": {f"l{i}.weight": noisy(60, 50.0 if i else 0.5, seed=i) for i in range(3)}}
    assert norms_above_one(record_of(loss=DIVERGING, rows=rows, meta=layers(3))) == []


def test_the_share_of_nodes_above_one_is_evidence() -> None:
    rows = {
        "grad_norm": {"l0.weight": [5.0] * 10},
        "out_grad_norm": {"l0": [3.0] * 10},
        "out_grad_unit_above_one": {"l0": [0.75] * 10},
    }
    meta = {"parameters": [parameter("l0.weight")]}
    finding = only(norms_above_one(record_of(loss=falling(10), rows=rows, meta=meta)))
    assert finding.evidence["unit_share"] == 0.75
    assert math.isclose(finding.value, 5.0)


def at_start(kind: str, values: dict[str, float], **options: Any) -> dict[str, Any]:
    """A record of four layers that diverges, with one row of `kind` from before any update."""
    return {
        "loss": DIVERGING,
        "rows": {kind: {n: [v] for n, v in values.items()}},
        "meta": layers(4),
        **options,
    }


def test_outputs_that_are_a_thousand_times_the_inputs_before_any_update_are_an_explosion() -> None:
    outputs = {"l0": 20.0, "l1": 300.0, "l2": 300.0, "l3": 3000.0}
    finding = only(exploding(record_of(**at_start("act_abs_max", outputs, data_abs_max=[3.0] * 60))))
    assert finding.evidence["axis"] == "forward"
    assert (finding.step, finding.names, finding.value) == (0, ("l3",), pytest.approx(1000.0))


def test_large_outputs_of_large_inputs_are_none() -> None:
    outputs = {f"l{i}": 3000.0 for i in range(4)}
    assert exploding(record_of(**at_start("act_abs_max", outputs, data_abs_max=[900.0] * 60))) == []


def test_large_outputs_are_silent_while_the_run_learns() -> None:
    outputs = {"l0": 20.0, "l1": 300.0, "l2": 300.0, "l3": 3000.0}
    record = record_of(**at_start("act_abs_max", outputs) | {"loss": falling(60)})
    assert exploding(record) == []


def test_the_first_layer_that_overflows_in_the_first_forward_pass_is_named() -> None:
    record = record_of(**at_start("act_abs_max", {"l0": 9.0, "l1": 1e30, "l2": 1.0, "l3": 1.0}))
    record.set_names("act_nonfinite", ["l0", "l1", "l2", "l3"])
    record.put_rows("act_nonfinite", 0, [0.0, 3.0, 8.0, 8.0])
    assert only(exploding(record)).names == ("l1",)


@pytest.mark.parametrize(("first", "found"), [(5e4, 1), (50.0, 0)])
def test_relative_gradients_that_grow_a_thousandfold_on_the_way_back_are_an_explosion(
    first: float, found: int
) -> None:
    grads = {"l0.weight": first, "l1.weight": 1.0, "l2.weight": 1.0, "l3.weight": 1.0}
    record = record_of(**at_start("grad_norm", grads))
    record.set_names("weight_norm", list(grads))
    record.put_rows("weight_norm", 0, [2.0] * 4)
    findings = exploding(record)
    assert len(findings) == found
    assert [finding.evidence["axis"] for finding in findings] == ["uneven"] * found


def test_outputs_that_are_ten_thousand_times_the_inputs_are_a_warning_in_any_run() -> None:
    outputs = {"l0": 3.0, "l1": 300.0, "l2": 3000.0, "l3": 6e4}
    record = record_of(**at_start("act_abs_max", outputs) | {"loss": falling(60)})
    assert only(exploding(record)).severity == "warning"


def test_a_first_loss_far_above_the_targets_makes_outputs_of_a_hundred_times_a_warning() -> None:
    outputs = {"l0": 3.0, "l1": 30.0, "l2": 100.0, "l3": 900.0}
    for first, found in ((1e8, 1), (10.0, 0)):
        losses = [first * 0.9**step for step in range(60)]
        options = at_start("act_abs_max", outputs, target_abs_max=[2.0] * 60) | {"loss": losses}
        assert len(exploding(record_of(**options))) == found


def test_gradients_that_were_large_at_first_and_came_down_did_not_grow() -> None:
    norms = [300.0, 50.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, math.nan]
    assert exploding(record_of(loss=[*falling(8), math.nan], grad_finite_norm=norms)) == []
