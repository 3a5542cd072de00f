"""A clip is at fault only where the run shows it."""

from __future__ import annotations

import pytest

from gradkern.diagnosis import DETECTORS
from tests.diagnosis.synthetic import falling, flat, only, parameter, record_of

overclipped = DETECTORS["overclipped"]
clip_starvation = DETECTORS["clip_starvation"]


def test_a_clip_that_leaves_a_hundredth_of_a_flat_run_is_a_warning() -> None:
    record = record_of(loss=flat(200), clip_coef=[0.01] * 200, grad_finite_norm=[5.0] * 200)
    assert only(overclipped(record)).value == pytest.approx(0.01)


def test_a_clip_that_fires_on_every_step_of_a_run_that_learns_is_silent() -> None:
    record = record_of(loss=falling(200), clip_coef=[0.001] * 200, grad_finite_norm=[5.0] * 200)
    assert overclipped(record) == []


def test_a_mild_clip_is_not_why_a_run_is_flat() -> None:
    assert overclipped(record_of(loss=flat(200), clip_coef=[0.3] * 200)) == []


def adam(kind: str, clipped: float) -> list[str]:
    record = record_of(
        loss=falling(50),
        grad_finite_norm=[1.0] * 50,
        grad_clipped_norm=[clipped] * 50,
        meta={"parameters": [parameter("w", (10, 10))], "optimizer": {"type": kind, "eps": 1e-8}},
    )
    return [finding.severity for finding in clip_starvation(record)]


def test_elements_below_eps_starve_adam() -> None:
    # 100 elements: a norm of 1e-8 is 1e-9 an element.
    assert adam("AdamW", 1e-8) == ["warning"]


def test_elements_above_eps_do_not() -> None:
    assert adam("AdamW", 1e-6) == []


def test_sgd_has_no_eps_to_starve_by() -> None:
    assert adam("SGD", 1e-8) == []
