"""Spikes: harmless ones are information, those that undo what was learned are warnings."""

from __future__ import annotations

import pytest

from gradkern.diagnosis import DETECTORS
from tests.diagnosis.synthetic import falling, noisy, only, record_of

gradient_spike = DETECTORS["gradient_spike"]
loss_spike = DETECTORS["loss_spike"]
update_spike = DETECTORS["update_spike"]


def hurt(at: int, steps: int = 200) -> list[float]:
    """A loss that is thrown back to the start at step `at` + 1 and learns anew."""
    return [*falling(at + 1, seed=1), *falling(steps - at - 1, start=4.0, seed=2)]


def spiked(at: int, times: float = 1000.0, steps: int = 200) -> list[float]:
    norms = noisy(steps)
    norms[at] *= times
    return norms


def test_a_gradient_spike_without_harm_is_information() -> None:
    finding = only(gradient_spike(record_of(loss=falling(200), grad_finite_norm=spiked(100))))
    assert (finding.step, finding.severity) == (100, "info")


def test_a_gradient_spike_that_throws_the_loss_back_is_a_warning() -> None:
    finding = only(gradient_spike(record_of(loss=hurt(100), grad_finite_norm=spiked(100))))
    assert (finding.step, finding.severity) == (100, "warning")


def test_a_spike_that_was_clipped_is_information() -> None:
    coefs = [1.0] * 200
    coefs[100] = 1e-3
    record = record_of(loss=hurt(100), grad_finite_norm=spiked(100), clip_coef=coefs)
    assert only(gradient_spike(record)).severity == "info"


def test_a_fivefold_norm_is_no_spike() -> None:
    assert gradient_spike(record_of(loss=falling(200), grad_finite_norm=spiked(100, 5.0))) == []


@pytest.mark.parametrize("seed", range(5))
def test_norms_over_four_orders_of_magnitude_have_no_spikes(seed: int) -> None:
    norms = noisy(2000, noise=2.3, seed=seed)
    assert gradient_spike(record_of(loss=falling(2000), grad_finite_norm=norms)) == []


def test_the_parameter_that_rose_most_is_named_first() -> None:
    rows = {"grad_norm": {"calm": noisy(200, seed=3), "wild": spiked(100)}}
    record = record_of(loss=falling(200), grad_finite_norm=spiked(100), rows=rows)
    assert only(gradient_spike(record)).names == ("wild",)


def test_a_single_high_loss_is_information() -> None:
    losses = falling(200)
    losses[150] = 10.0
    assert only(loss_spike(record_of(loss=losses))).severity == "info"


def test_a_loss_that_stays_up_after_a_spike_is_a_warning() -> None:
    assert only(loss_spike(record_of(loss=hurt(150)))).severity == "warning"


def test_losses_below_zero_have_no_spikes() -> None:
    losses = [value - 1.0 for value in falling(200)]
    losses[150] = 50.0
    assert loss_spike(record_of(loss=losses)) == []


def test_an_update_that_follows_a_jump_of_the_learning_rate_says_so() -> None:
    rates = [0.01] * 100 + [1.0] * 100
    finding = only(update_spike(record_of(loss=hurt(100), update_norm=spiked(100, 100.0), lr=rates)))
    assert finding.severity == "warning"
    assert finding.evidence["lr_ratio"] == pytest.approx(100.0)
