"""What the loss alone says, on curves that are known to be good or bad."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradkern.diagnosis import DETECTORS
from tests.diagnosis.synthetic import falling, flat, only, parameter, record_of

diverging = DETECTORS["loss_diverging"]
unstable = DETECTORS["loss_unstable"]
no_traction = DETECTORS["no_traction"]

CLASSIFIER = {"parameters": [parameter("head.weight", (10, 8))]}


def test_a_loss_that_goes_up_all_the_time_diverges() -> None:
    losses = [2.0 * 1.02**step for step in range(200)]
    finding = only(diverging(record_of(loss=losses)))
    assert finding.value == pytest.approx(np.median(losses[-10:]), rel=1e-12)


def test_a_loss_that_lost_all_it_had_learned_diverges_since_its_best_step() -> None:
    losses = falling(200, end=0.2, noise=0.0) + [min(0.25 * 1.1**step, 3.0) for step in range(100)]
    assert 190 <= only(diverging(record_of(loss=losses))).step <= 203


def test_ten_times_the_first_loss_is_an_error() -> None:
    assert only(diverging(record_of(loss=[1.05**step for step in range(200)]))).severity == "error"


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_noisy_loss_that_falls_does_not_diverge(noise: float, seed: int) -> None:
    assert diverging(record_of(loss=falling(500, noise=noise, seed=seed))) == []


def test_a_loss_that_goes_back_half_way_does_not_diverge() -> None:
    assert diverging(record_of(loss=falling(200) + flat(100, 1.0))) == []


def test_heavy_tails_around_a_converged_level_do_not_diverge() -> None:
    losses = 10.0 ** np.random.default_rng(0).normal(-4, 1, 2000)
    losses[:20] = 2.0
    assert diverging(record_of(loss=losses.tolist())) == []


def test_a_loss_that_falls_to_minus_infinity_ever_faster_diverges() -> None:
    finding = only(diverging(record_of(loss=[1.0 - 0.001 * step**2 for step in range(300)])))
    assert "without bound" in finding.sentence


def test_a_log_likelihood_that_levels_off_below_zero_does_not_diverge() -> None:
    assert diverging(record_of(loss=[value - 5.0 for value in falling(300)])) == []


def bouncing(steps: int = 300) -> list[float]:
    losses = falling(steps)
    for step in range(20, steps, 12):
        losses[step] = 20.0
    return losses


def moving(ratio: float, steps: int = 300) -> dict[str, list[float]]:
    return {"update_norm": [ratio] * steps, "weight_norm": [1.0] * steps}


def test_a_loss_that_keeps_jumping_above_its_start_is_unstable() -> None:
    assert only(unstable(record_of(loss=bouncing(), **moving(0.1)))).step == 20


def test_jumps_that_the_updates_are_too_small_for_come_from_the_batches() -> None:
    assert unstable(record_of(loss=bouncing(), **moving(0.001))) == []


def test_first_updates_that_throw_the_loss_to_ten_times_are_unstable() -> None:
    losses = [1.4, 300.0, 500.0, 200.0, 100.0, 50.0, *falling(100)]
    finding = only(unstable(record_of(loss=losses, **moving(0.9, 3))))
    assert finding.sentence == "The first updates threw the loss from 1.4 to 500."


def test_a_flat_loss_has_no_traction() -> None:
    assert only(no_traction(record_of(loss=flat(200)))).severity == "info"


def test_a_loss_at_ln_10_with_ten_outputs_is_that_of_a_guess() -> None:
    finding = only(no_traction(record_of(loss=flat(1200, math.log(10)), meta=CLASSIFIER)))
    assert finding.severity == "warning"
    assert "guessed among 10 classes" in finding.sentence


def test_a_plateau_of_some_hundred_steps_is_information() -> None:
    record = record_of(loss=flat(400, math.log(10)), meta=CLASSIFIER)
    assert only(no_traction(record)).severity == "info"


def test_a_run_that_fell_to_the_level_of_a_guess_has_no_traction_either() -> None:
    losses = falling(300, start=300.0, end=2.4) + flat(900, math.log(10))
    assert only(no_traction(record_of(loss=losses, meta=CLASSIFIER))).severity == "warning"


@pytest.mark.parametrize("noise", [0.01, 0.3, 0.8])
def test_a_run_that_learns_has_traction(noise: float) -> None:
    assert no_traction(record_of(loss=falling(400, noise=noise))) == []


def test_a_run_that_learned_all_in_its_first_steps_has_traction() -> None:
    assert no_traction(record_of(loss=falling(30) + flat(5000, 0.2, 0.05))) == []


def test_nothing_is_said_of_the_traction_of_a_run_that_was_resumed() -> None:
    assert no_traction(record_of(loss=flat(200), events=[(0, "resumed")])) == []


def test_a_hundred_noisy_steps_are_too_few_to_say_that_nothing_was_learned() -> None:
    assert no_traction(record_of(loss=flat(100, noise=0.5))) == []


def test_a_loss_a_thousand_times_below_zero_and_still_falling_has_no_bound() -> None:
    losses = [-1.0] * 5 + [-10.0 * step for step in range(295)]
    finding = only(diverging(record_of(loss=losses)))
    assert "without bound" in finding.sentence


@pytest.mark.parametrize(("end", "found"), [(1.9, 1), (0.2, 0)])
def test_first_updates_that_double_the_loss_are_unstable_unless_the_run_recovers(
    end: float, found: int
) -> None:
    losses = [2.0, *[4.0] * 10, *falling(90, start=3.0, end=end)]
    record = record_of(loss=losses, update_norm=[0.5] * 101, weight_norm=[1.0] * 101)
    assert len(unstable(record)) == found


def test_a_noisy_loss_around_that_of_a_guess_is_one() -> None:
    losses = flat(160, level=math.log(4), noise=0.025, seed=2)
    meta = {"parameters": [parameter("w", (4, 8))]}
    assert only(no_traction(record_of(loss=losses, meta=meta))).evidence["chance"] == math.log(4)


def test_what_is_learned_within_five_steps_is_traction() -> None:
    losses = [1.4, 1.1, 0.6, 0.2, 0.06, *[1e-4] * 145]
    assert no_traction(record_of(loss=losses)) == []
