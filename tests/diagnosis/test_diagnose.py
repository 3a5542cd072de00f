"""One cause, what follows from it, where it began, and silence where there is nothing."""

from __future__ import annotations

import json
import math

import pytest

from gradkern.diagnosis import DETECTORS, Diagnosis, diagnose
from gradkern.record import MemoryRecord
from tests.diagnosis.synthetic import falling, flat, layers, noisy, parameter, record_of

LOST = [2.0, 1.8, 1.6, 5.0, 300.0, *[math.nan] * 60]


def test_of_an_empty_record_nothing_can_be_said() -> None:
    found = diagnose(MemoryRecord())
    assert str(found) == "Nothing was recorded, so that nothing can be said."
    assert not found.is_healthy


@pytest.mark.parametrize("kind", DETECTORS)
def test_every_detector_is_silent_on_an_empty_record(kind: str) -> None:
    assert DETECTORS[kind](MemoryRecord()) == []


@pytest.mark.parametrize("kind", DETECTORS)
def test_every_detector_says_what_it_is_and_when_it_fires(kind: str) -> None:
    assert len(DETECTORS[kind].__doc__ or "") > 80


def test_data_come_before_everything_that_follows_from_them() -> None:
    bad = [0.0] * 4 + [3.0] + [0.0] * 60
    record = record_of(loss=LOST, data_nonfinite=bad, nonfinite_count=[0.0] * 4 + [9.0] * 61)
    diagnosis = diagnose(record)
    assert diagnosis.category == "data"
    assert {finding.kind for finding in diagnosis.consequences} == {"loss_nonfinite", "grad_nonfinite"}


def test_data_that_go_bad_after_the_loss_did_are_no_cause() -> None:
    bad = [0.0] * 30 + [3.0] + [0.0] * 34
    assert diagnose(record_of(loss=LOST, data_nonfinite=bad)).category != "data"


def test_after_a_nan_dead_units_are_not_worth_a_word() -> None:
    rows = {"act_dead": {"relu": [0.1, *[1.0] * 12]}}
    diagnosis = diagnose(record_of(loss=LOST, rows=rows, every=5))
    assert "dead_relu" not in {finding.kind for finding in diagnosis.alarms}


def test_growth_through_depth_at_the_first_step_comes_before_the_large_updates_it_makes() -> None:
    rows = {"out_grad_norm": {f"l{i}": [2.0 ** (11 - i)] for i in range(12)}}
    record = record_of(loss=LOST, update_norm=[5.0] * 5, weight_norm=[1.0] * 5, rows=rows, meta=layers(12))
    diagnosis = diagnose(record)
    assert (diagnosis.category, diagnosis.cause and diagnosis.cause.kind) == (
        "architecture",
        "exploding_gradient",
    )


def test_large_updates_come_before_the_units_they_kill() -> None:
    rows = {"act_dead": {"relu": [0.1, *[1.0] * 12]}}
    record = record_of(loss=flat(130), update_norm=[0.5] * 130, weight_norm=[1.0] * 130, rows=rows, every=10)
    assert diagnose(record).category == "optimizer"


def test_signs_that_nothing_explains_have_no_single_cause() -> None:
    losses = falling(150) + [2.0 + 0.05 * step for step in range(150)]
    diagnosis = diagnose(record_of(loss=losses, update_norm=[1e-3] * 300, weight_norm=[1.0] * 300))
    assert diagnosis.cause is None
    assert str(diagnosis).startswith("No single cause")


def test_small_steps_that_only_made_it_worse_go_the_wrong_way() -> None:
    losses = [2.0 * 1.01**step for step in range(200)]
    diagnosis = diagnose(
        record_of(loss=losses, update_norm=[1e-3] * 200, weight_norm=[1.0] * 200, lr=[0.1] * 200)
    )
    assert diagnosis.category == "optimizer"
    assert "Check the sign of the loss" in {advice.title for advice in diagnosis.advice}


def test_float16_that_overflows_in_an_explosion_is_a_consequence_of_it() -> None:
    losses = [2.0 * 1.5**step for step in range(40)] + [math.nan] * 5
    norms = [3.0**step for step in range(40)] + [0.0] * 5
    inf = [0.0] * 40 + [9.0] * 5
    record = record_of(
        loss=losses, grad_finite_norm=norms, nonfinite_count=inf, rows={"grad_inf": {"w": inf}},
        meta={"parameters": [parameter("w", dtype="torch.float16")]},
    )  # fmt: skip
    diagnosis = diagnose(record)
    assert diagnosis.category == "optimizer"
    assert "fp16_overflow" in {finding.kind for finding in diagnosis.consequences}


def test_it_began_in_the_layer_of_the_parameter_that_is_named() -> None:
    counts = {"l0.weight": [0] * 4 + [1] * 61, "l1.weight": [0] * 4 + [1] * 61}
    record = record_of(
        loss=LOST, data_nonfinite=[0.0] * 4 + [1.0] * 61, nonfinite_count=[0.0] * 4 + [2.0] * 61,
        rows={"grad_nan": counts}, meta=layers(2),
    )  # fmt: skip
    assert diagnose(record).began == {"step": 4, "layer": "l1", "parameter": "l1.weight", "unit": None}


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({0: 3.0, 50: 4.0, 100: 5.0}, 4),  # when it was last looked at
        ({0: 3.0, 50: math.nan, 100: 5.0}, 3),  # before it began no unit stood out
        ({100: 5.0, 150: 6.0}, 5),  # soon after
        ({120: 5.0}, None),  # too late
        ({}, None),
    ],
)
def test_the_unit_is_the_worst_one_when_its_layer_was_looked_at(
    units: dict[int, float], expected: int | None
) -> None:
    losses = [*falling(64), *[math.nan] * 60]
    counts = {"l1.weight": [0] * 64 + [1] * 60}
    record = record_of(
        loss=losses, nonfinite_count=[0.0] * 64 + [1.0] * 60, rows={"grad_nan": counts}, meta=layers(2)
    )
    record.set_names("out_grad_unit_argmax", ["l0", "l1"])
    for step, unit in units.items():
        record.put_rows("out_grad_unit_argmax", step, [7, unit])
    began = diagnose(record).began
    assert (began["step"], began["layer"], began["unit"]) == (64, "l1", expected)


def test_a_diagnosis_is_json() -> None:
    text = json.dumps(diagnose(record_of(loss=LOST, grad_finite_norm=noisy(65))).as_dict(), allow_nan=False)
    assert json.loads(text)["consequences"][0]["kind"] == "loss_nonfinite"


def test_a_healthy_run_gets_no_advice() -> None:
    diagnosis = diagnose(record_of(loss=falling(200), grad_finite_norm=noisy(200)))
    assert diagnosis == Diagnosis()


def test_a_norm_that_is_enormous_before_any_update_is_not_the_optimizers() -> None:
    norms = [1e14, *[1e5] * 99]
    assert diagnose(record_of(loss=falling(100), grad_finite_norm=norms)).category == "architecture"


def test_an_enormous_norm_later_is_the_optimizers() -> None:
    norms = [1.0] * 50 + [1e14] * 50
    assert diagnose(record_of(loss=falling(100), grad_finite_norm=norms)).category == "optimizer"


def test_a_loss_without_bound_comes_before_the_units_that_its_weights_saturate() -> None:
    losses = [-(1.1**step) for step in range(150)]
    rows = {"act_saturated": {"l1": [0.2, 1.0, 1.0, 1.0]}}
    diagnosis = diagnose(record_of(loss=losses, rows=rows, every=40))
    assert diagnosis.cause is not None
    assert (diagnosis.category, diagnosis.cause.kind) == ("optimizer", "loss_diverging")


def stalled(gradient: float) -> Diagnosis:
    """Updates that are small everywhere, of a flat run whose gradients vanish through depth."""
    depth = {f"l{i}": [0.4 ** (11 - i)] * 13 for i in range(12)}
    names = [f"l{i}.weight" for i in range(12)]
    rows = {
        "out_grad_norm": depth,
        "grad_norm": {name: [gradient] * 13 for name in names},
        "weight_norm": {name: [1.0] * 13 for name in names},
        "update_norm": {name: [1e-8] * 13 for name in names},
    }
    return diagnose(record_of(loss=flat(130), rows=rows, every=10, meta=layers(12)))


def test_small_updates_in_spite_of_gradients_are_the_rate() -> None:
    assert stalled(0.1).category == "optimizer"


def test_small_updates_for_want_of_gradients_are_not() -> None:
    assert stalled(1e-5).category == "architecture"


def test_nan_out_of_sound_numbers_is_an_operation() -> None:
    losses = [*falling(60), *[math.nan] * 20]
    diagnosis = diagnose(record_of(loss=losses, grad_finite_norm=noisy(80)))
    assert diagnosis.category == "architecture"
    assert diagnosis.advice[0].title == "Find the operation"


def test_nan_at_the_end_of_a_growing_loss_is_not() -> None:
    diagnosis = diagnose(record_of(loss=LOST, grad_finite_norm=noisy(65)))
    assert diagnosis.cause is None


def test_a_loss_that_does_not_come_down_is_a_consequence_of_what_is_found() -> None:
    diagnosis = diagnose(record_of(loss=flat(130), data_std=[60.0] * 130, data_abs_max=[255.0] * 130))
    assert [(finding.kind, finding.severity) for finding in diagnosis.consequences] == [
        ("no_traction", "warning")
    ]


def test_weights_that_grew_before_all_else_are_the_optimizers() -> None:
    rows = {"weight_norm": {"l0.weight": [80.0 * 1.5**place for place in range(20)]}}
    losses = [*falling(100), *[3.0 * 1.02**step for step in range(100)]]
    diagnosis = diagnose(record_of(loss=losses, rows=rows, every=10, meta=layers(1)))
    assert diagnosis.cause is not None
    assert (diagnosis.cause.kind, diagnosis.category) == ("weights_growing", "optimizer")


def test_the_parameter_is_one_of_the_layer() -> None:
    rows = {
        "out_grad_norm": {f"l{i}": [3.0 ** (11 - i)] for i in range(12)},
        "grad_nan": {f"l{i}.weight": [0.0] * 4 + [float(i == 11)] * 61 for i in range(12)},
    }
    record = record_of(loss=LOST, nonfinite_count=[0.0] * 4 + [2.0] * 61, meta=layers(12), rows=rows)
    began = diagnose(record).began
    assert (began["layer"], began["parameter"]) == ("l0", None)


def test_nan_began_where_the_monitor_saw_it_first() -> None:
    record = record_of(loss=[*falling(60), *[math.nan] * 20], grad_finite_norm=noisy(80), meta=layers(3))
    record.put_event(60, "first_nonfinite", {"where": "forward", "name": "l1", "step": 60})
    assert diagnose(record).began["layer"] == "l1"


def test_units_that_died_come_before_the_gradients_that_they_stop() -> None:
    rows = {
        "act_dead": {"l1": [0.1, 0.1, 0.1, 1.0, 1.0, 1.0]},
    }
    record = record_of(loss=falling(300), rows=rows, every=50, meta=layers(2))
    record.set_names("grad_norm", ["l0.weight", "l1.weight"])
    for step in range(300):
        record.put_rows("grad_norm", step, [1.0 if step < 120 else 0.0, 1.0])
    diagnosis = diagnose(record)
    assert diagnosis.cause is not None
    assert (diagnosis.cause.kind, diagnosis.began["step"]) == ("dead_relu", 120)


def test_a_loss_that_the_first_updates_threw_away_is_the_optimizers() -> None:
    losses = [1.4, *[300.0] * 10, *falling(120, start=60.0, end=0.5)]
    diagnosis = diagnose(record_of(loss=losses, update_norm=[8.0] + [1e-3] * 130, weight_norm=[1.0] * 131))
    assert diagnosis.category == "optimizer"


def test_a_loss_that_seems_to_go_up_some_steps_before_a_bad_batch_does_so_because_of_it() -> None:
    losses = [*falling(58), 0.4, 0.4, *[300.0] * 60]
    batches = [1.0] * 60 + [7e3] + [1.0] * 59
    diagnosis = diagnose(record_of(loss=losses, target_abs_max=batches, grad_finite_norm=noisy(120)))
    (diverging,) = [finding for finding in diagnosis.alarms if finding.kind == "loss_diverging"]
    assert diverging.step < 60
    assert diagnosis.category == "data"
