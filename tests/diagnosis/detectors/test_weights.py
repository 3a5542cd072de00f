"""Weights that grow and updates of the wrong size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradkern.diagnosis import DETECTORS, Finding
from tests.diagnosis.synthetic import falling, flat, only, parameter, record_of

weights_growing = DETECTORS["weights_growing"]
update_ratio_high = DETECTORS["update_ratio_high"]
update_ratio_low = DETECTORS["update_ratio_low"]
unstepped_parameter = DETECTORS["unstepped_parameter"]
update_rounded_away = DETECTORS["update_rounded_away"]
weights_shrinking = DETECTORS["weights_shrinking"]

ONE = {"parameters": [parameter("w", (10, 10))]}


def grown(rate: float, rows: int = 20, start: float = 10.0) -> dict[str, dict[str, list[float]]]:
    norms = [start * rate**place for place in range(rows)]
    return {"weight_norm": {"w": norms}, "weight_abs_max": {"w": [norm / 10 for norm in norms]}}


def test_growth_is_extrapolated_to_the_overflow_of_float32() -> None:
    record = record_of(loss=falling(200), rows=grown(2.0), every=10, meta=ONE)
    overflow = only(weights_growing(record)).evidence["overflow_step"]
    # abs_max is 2**19 at step 190 and doubles every 10 steps.
    assert overflow == pytest.approx(190 + 10 * (math.log2(3.40e38) - 19), rel=1e-6)


def test_growth_in_float16_is_extrapolated_to_its_own_end() -> None:
    meta = {"parameters": [parameter("w", (10, 10), dtype="torch.float16")]}
    record = record_of(loss=falling(80), rows=grown(2.0, rows=8), every=10, meta=meta)
    overflow = only(weights_growing(record)).evidence["overflow_step"]
    assert overflow == pytest.approx(70 + 10 * (math.log2(65504) - 7), rel=1e-6)


def test_growth_that_levels_off_is_silent() -> None:
    norms = [10.0 + 300.0 * (1 - math.exp(-place / 3)) for place in range(20)]
    record = record_of(loss=falling(200), rows={"weight_norm": {"w": norms}}, every=10, meta=ONE)
    assert weights_growing(record) == []


def test_weights_of_ordinary_size_may_grow_tenfold() -> None:
    record = record_of(loss=falling(200), rows=grown(1.2, start=0.1), every=10, meta=ONE)
    assert weights_growing(record) == []


def test_updates_of_half_the_weights_all_the_time_are_too_large() -> None:
    record = record_of(loss=falling(50), update_norm=[0.6] * 50, weight_norm=[1.0] * 50)
    assert only(update_ratio_high(record)).severity == "warning"


def test_updates_of_a_tenth_are_silent_in_a_run_that_learns() -> None:
    record = record_of(loss=falling(50), update_norm=[0.2] * 50, weight_norm=[1.0] * 50)
    assert update_ratio_high(record) == []


def test_updates_of_a_tenth_are_an_error_in_a_run_that_diverges() -> None:
    losses = [1.1**step for step in range(50)]
    record = record_of(loss=losses, update_norm=[0.2] * 50, weight_norm=[1.0] * 50)
    assert only(update_ratio_high(record)).severity == "error"


def test_updates_after_the_loss_is_gone_do_not_count() -> None:
    losses = [1.0] * 20 + [math.nan] * 30
    record = record_of(loss=losses, update_norm=[1e-3] * 25 + [5.0] * 25, weight_norm=[1.0] * 50)
    assert update_ratio_high(record) == []


def test_the_updates_of_sgd_are_known_at_every_step() -> None:
    record = record_of(
        loss=[1.1**step for step in range(40)],
        lr=[0.1] * 40,
        grad_finite_norm=[0.01] * 25 + [20.0] * 15,
        grad_clipped_norm=[0.01] * 25 + [20.0] * 15,
        meta={"optimizer": {"type": "SGD"}},
    )
    record.put_scalars(0, {"weight_norm": 1.0, "update_norm": 1e-3})
    assert only(update_ratio_high(record)).step == 25


def test_a_weight_that_is_zero_has_no_ratio() -> None:
    record = record_of(loss=flat(120), update_norm=[0.2] * 120, weight_norm=[0.0] * 120)
    assert update_ratio_high(record) == []


def small(ratio: float, steps: int = 120) -> dict[str, dict[str, list[float]]]:
    return {"weight_norm": {"w": [1.0] * steps}, "update_norm": {"w": [ratio] * steps}}


def test_tiny_updates_of_a_flat_run_are_a_warning() -> None:
    record = record_of(loss=flat(120), rows=small(1e-7), meta=ONE)
    finding = only(update_ratio_low(record))
    assert finding.severity == "warning"
    assert finding.value == pytest.approx(float(np.float32(1e-7)), rel=1e-6)


def test_tiny_updates_of_a_run_that_learns_are_information() -> None:
    assert only(update_ratio_low(record_of(loss=falling(120), rows=small(1e-8), meta=ONE))).severity == "info"


def test_the_updates_of_fine_tuning_are_silent() -> None:
    assert update_ratio_low(record_of(loss=flat(120), rows=small(5e-4), meta=ONE)) == []


def test_weight_decay_is_part_of_an_update_of_sgd() -> None:
    meta = {"optimizer": {"type": "SGD", "weight_decay": 4.0}}
    record = record_of(loss=flat(130), lr=[0.1] * 130, grad_finite_norm=[0.3] * 130, meta=meta)
    record.put_scalars(0, {"weight_norm": 1.0, "update_norm": 0.4})
    assert only(update_ratio_high(record)).evidence["median"] == pytest.approx(0.1 * math.hypot(4.0, 0.3))


def schedule(end: float, since: int, steps: int = 200) -> dict[str, list[float]]:
    return {"lr": [1e-2 if step < since else end for step in range(steps)]}


def moved(since: int, steps: int = 200) -> dict[str, dict[str, list[float]]]:
    """Updates of ordinary size, and of none any more from a step on."""
    updates = [1e-3 if step < since else 0.0 for step in range(0, steps, 10)]
    return {"weight_norm": {"w": [1.0] * len(updates)}, "update_norm": {"w": updates}}


def test_a_rate_that_fell_too_soon_is_a_warning_since_it_did() -> None:
    losses = falling(200, start=2.0, end=1.5)
    finding = only(
        update_ratio_low(record_of(loss=losses, rows=moved(40), every=10, meta=ONE, **schedule(0.0, 40)))
    )
    assert (finding.severity, finding.step) == ("warning", 40)


@pytest.mark.parametrize(("since", "end"), [(180, 1.5), (40, 0.1)])
def test_a_rate_that_falls_at_the_end_or_when_all_is_learned_is_silent(since: int, end: float) -> None:
    losses = falling(200, start=2.0, end=end)
    record = record_of(loss=losses, rows=moved(since), every=10, meta=ONE, **schedule(0.0, since))
    assert [finding for finding in update_ratio_low(record) if finding.is_alarm] == []


def rounded(
    measured: float, *, dtype: str, kind: str = "SGD", loss: list[float] | None = None
) -> list[Finding]:
    """A matrix with a gradient of 2 at a rate of 0.01, whose measured update is given."""
    rows = {"update_norm": {"w": [measured] * 13}, "grad_norm": {"w": [2.0] * 13}}
    meta = {"parameters": [parameter("w", (8, 8), dtype=dtype)], "optimizer": {"type": kind}}
    return update_rounded_away(
        record_of(loss=loss or flat(130), lr=[0.01] * 130, rows=rows, every=10, meta=meta)
    )


@pytest.mark.parametrize(
    ("dtype", "found"), [("torch.bfloat16", 1), ("torch.float16", 1), ("torch.float32", 0)]
)
def test_updates_of_half_weights_that_do_not_arrive_are_a_warning(dtype: str, found: int) -> None:
    assert [finding.severity for finding in rounded(0.001, dtype=dtype)] == ["warning"] * found


def test_updates_that_arrive_are_silent() -> None:
    assert rounded(0.02, dtype="torch.bfloat16") == []


def test_what_adam_makes_of_noise_is_a_fifth_of_the_rate_an_element() -> None:
    assert only(rounded(0.0015, dtype="torch.bfloat16", kind="Adam")).evidence["expected"] == pytest.approx(
        0.016
    )
    assert rounded(0.002, dtype="torch.bfloat16", kind="Adam") == []


def test_updates_that_do_not_arrive_are_information_while_the_run_learns() -> None:
    assert only(rounded(0.001, dtype="torch.bfloat16", loss=falling(130))).severity == "info"


@pytest.mark.parametrize(("end", "found"), [(0.05, 1), (0.5, 0)])
def test_weights_that_shrink_to_nothing_in_a_flat_run_are_a_warning(end: float, found: int) -> None:
    norms = [float(value) for value in np.geomspace(4.0, 4.0 * end, 13)]
    record = record_of(loss=flat(130), rows={"weight_norm": {"w": norms}}, every=10, meta=ONE)
    assert len(weights_shrinking(record)) == found


def test_weights_that_shrink_in_a_run_that_learns_are_silent() -> None:
    norms = [float(value) for value in np.geomspace(4.0, 0.04, 13)]
    record = record_of(loss=falling(130), rows={"weight_norm": {"w": norms}}, every=10, meta=ONE)
    assert weights_shrinking(record) == []


def test_a_first_update_that_replaces_the_weights_is_a_warning_if_the_loss_hardly_came_down() -> None:
    rows = {"weight_norm": {"w": [1.0] * 13}, "update_norm": {"w": [0.5, *[0.01] * 12]}}
    for end, found in ((1.6, 1), (0.2, 0)):
        scalars = {"loss": falling(130, start=2.0, end=end), "weight_norm": [1.0] * 130}
        scalars["update_norm"] = [0.5, *[0.01] * 129]
        assert len(update_ratio_high(record_of(rows=rows, every=10, meta=ONE, **scalars))) == found


def test_large_updates_before_the_loss_was_at_its_best_did_no_harm() -> None:
    losses = [*falling(60, start=2.0, end=0.01), *[math.nan] * 5]
    record = record_of(loss=losses, update_norm=[0.5] * 5 + [1e-3] * 60, weight_norm=[1.0] * 65)
    assert update_ratio_high(record) == []


def test_an_update_larger_than_the_weights_is_a_warning_in_a_run_that_is_slow() -> None:
    updates = [1e-3] * 50 + [3.0] + [1e-3] * 79
    for end, found in ((1.6, 1), (0.2, 0)):
        losses = falling(130, start=2.0, end=end)
        record = record_of(loss=losses, update_norm=updates, weight_norm=[1.0] * 130)
        assert len(update_ratio_high(record)) == found


@pytest.mark.parametrize(("eps", "found"), [(1.0, 1), (1e-8, 0)])
def test_an_eps_far_above_the_first_gradients_is_why_updates_are_small(eps: float, found: int) -> None:
    meta = {**ONE, "optimizer": {"type": "Adam", "eps": eps}}
    record = record_of(loss=falling(120), grad_clipped_norm=[0.01] * 120, rows=small(1e-5), meta=meta)
    assert len([finding for finding in update_ratio_low(record) if "eps" in finding.evidence]) == found


def test_a_loss_that_is_low_between_two_excursions_excuses_no_update() -> None:
    losses = [1.6, *[12.0] * 20, *[0.5] * 10, *[12.0, 5.0, 0.6, 6.0] * 20]
    record = record_of(loss=losses, update_norm=[2.0] * 20 + [0.05] * 91, weight_norm=[1.0] * 111)
    assert only(update_ratio_high(record)).step == 0


@pytest.mark.parametrize(("count", "found"), [(3, 1), (2, 0)])
def test_three_updates_of_a_third_are_a_warning_in_a_run_that_is_slow(count: int, found: int) -> None:
    updates = [0.4 if step in (20, 30, 40)[:count] else 1e-3 for step in range(130)]
    record = record_of(loss=falling(130, start=2.0, end=1.6), update_norm=updates, weight_norm=[1.0] * 130)
    assert len(update_ratio_high(record)) == found


def test_a_measured_update_of_momentum_goes_before_its_estimate() -> None:
    meta = {"optimizer": {"type": "SGD"}}
    record = record_of(loss=flat(130), lr=[0.1] * 130, grad_finite_norm=[0.3] * 130, meta=meta)
    record.put_scalars(0, {"weight_norm": 1.0, "update_norm": 0.9})
    assert only(update_ratio_high(record)).evidence["largest"] == pytest.approx(0.9)


def left_out(loss: list[float], *, norms: list[float] | None = None) -> list[Finding]:
    """Two matrices with gradients, of which the optimizer holds the second."""
    steps = len(loss) // 10
    rows = {
        "update_norm": {"w": [math.nan] * steps, "v": [1e-3] * steps},
        "weight_norm": {"w": norms or [1.5] * steps, "v": [1.0 + 0.1 * place for place in range(steps)]},
        "grad_norm": {"w": [0.2] * steps, "v": [0.2] * steps},
    }
    meta = {"parameters": [parameter("w"), parameter("v")]}
    return unstepped_parameter(record_of(loss=loss, rows=rows, every=10, meta=meta))


def test_weights_with_gradients_that_no_optimizer_holds_are_a_warning_in_a_run_that_is_slow() -> None:
    finding = only(left_out(flat(130)))
    assert (finding.severity, finding.names) == ("warning", ("w",))


def test_training_the_head_alone_is_information() -> None:
    assert only(left_out(falling(130))).severity == "info"


def test_weights_that_another_optimizer_steps_are_not_left_out() -> None:
    assert left_out(flat(130), norms=[1.5 + 1e-6 * place for place in range(13)]) == []
