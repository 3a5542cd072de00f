from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradkern
from gradkern.policies import Policy, replay
from tests.policies import oracles
from tests.policies.streams import layout, measure, stream

INF, NAN = math.inf, math.nan


def skips(policy: Policy, norms: list[float], losses: list[float] | None = None) -> list[bool]:
    return replay(policy, norms, losses).skip.tolist()


def test_std_in_closed_form() -> None:
    # Of [1, 3]: mean 2, sample standard deviation √2. Three of them reach to 2 + 3√2 = 6.2426...
    policy = gradkern.SkipSpike(3.0, window=4, warmup=2)
    assert skips(policy, [1.0, 3.0, 6.2427]) == [False, False, True]
    assert skips(policy, [1.0, 3.0, 6.2426]) == [False, False, False]


def test_mad_in_closed_form() -> None:
    # Of [1, 2, 4, 8]: median 3, deviations [2, 1, 1, 5], their median 1.5.
    policy = gradkern.SkipSpike(2.0, method="mad", window=8, warmup=4)
    limit = 3 + 2 * 1.4826 * 1.5
    assert skips(policy, [1.0, 2.0, 4.0, 8.0, limit * (1 + 1e-12)])[-1]
    assert not skips(policy, [1.0, 2.0, 4.0, 8.0, limit * (1 - 1e-12)])[-1]


def test_max_norm_holds_from_the_first_step() -> None:
    policy = gradkern.SkipSpike(None, max_norm=10.0)
    assert skips(policy, [11.0, 10.0, 1.0]) == [True, False, False]


def test_either_limit_skips() -> None:
    policy = gradkern.SkipSpike(3.0, window=4, warmup=2, max_norm=100.0)
    assert skips(policy, [200.0, 1.0, 1.1, 50.0]) == [True, False, False, True]


def test_nothing_is_judged_before_the_warm_up_is_over() -> None:
    policy = gradkern.SkipSpike(3.0, window=8)  # half the window: 4
    assert skips(policy, [1.0, 1.1, 50.0, 1.0]) == [False] * 4
    assert skips(policy, [1.0, 1.1, 0.9, 1.0, 50.0])[-1]


@pytest.mark.parametrize("method", ["std", "mad"])
def test_sudden_improvement_is_no_spike(method: str) -> None:
    policy = gradkern.SkipSpike(3.0, method=method, window=8, warmup=3)  # type: ignore[arg-type]
    norms = [1.0, 1.1, 0.9, 1.0, 1e-6, 1.0]
    losses = [2.0, 2.1, 1.9, 2.0, -1e6, 2.0]
    assert skips(policy, norms, losses) == [False] * 6


def test_outliers_do_not_enter_the_history() -> None:
    # Were the first spike remembered, the standard deviation would hide the second.
    policy = gradkern.SkipSpike(6.0, window=8, warmup=4)
    assert skips(policy, [1.0, 1.1, 0.9, 1.0, *[50.0] * 20, 1.0]) == [False] * 4 + [True] * 20 + [False]


def test_a_spike_of_the_loss_alone_skips() -> None:
    policy = gradkern.SkipSpike(6.0, window=8, warmup=4)
    assert skips(policy, [1.0, 1.1, 0.9, 1.0, 1.0], [2.0, 2.1, 1.9, 2.0, 9.0])[-1]


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_skips_at_once(loss: float) -> None:
    policy = gradkern.SkipSpike(6.0, window=8, warmup=4)
    assert skips(policy, [1.0, 1.1, 1.0], [2.0, loss, 2.0]) == [False, True, False]


def test_without_a_loss_only_the_norm_is_remembered() -> None:
    policy = gradkern.SkipSpike(window=8)
    state = policy.init(layout())
    for step, grads in enumerate(stream(3)):
        measured = measure(grads, torch.tensor(2.0) if step == 1 else None)
        policy.decide(measured, state).commit(measured.good)
    assert state.shared["count"].tolist() == [3, 1]


def test_a_loss_may_be_left_out_of_the_judgement() -> None:
    policy = gradkern.SkipSpike(6.0, window=8, warmup=4, loss=False)
    assert not any(skips(policy, [1.0, 1.1, 0.9, 1.0, 1.0], [2.0, 2.1, 1.9, 2.0, NAN]))


def test_a_missing_loss_that_is_needed_is_named() -> None:
    policy = gradkern.SkipSpike(loss=True)
    state = policy.init(layout())
    with pytest.raises(ValueError, match="SkipSpike: loss=True, but no loss was given"):
        policy.decide(measure(stream(1)[0]), state)


def test_a_loss_of_several_numbers_is_refused() -> None:
    policy = gradkern.SkipSpike()
    with pytest.raises(ValueError, match=r"SkipSpike: loss must be one number, got shape \[3\]"):
        policy.decide(measure(stream(1)[0], torch.ones(3)), policy.init(layout()))


def test_a_loss_keeps_no_graph_alive() -> None:
    policy = gradkern.SkipSpike(window=4)
    state = policy.init(layout())
    weight = torch.ones((), requires_grad=True)
    measured = measure(stream(1)[0], weight * 2)
    policy.decide(measured, state).commit(measured.good)
    assert not state.shared["values"].requires_grad
    assert state.shared["values"][1, 0] == 2.0


def test_a_flat_history_allows_for_rounding() -> None:
    policy = gradkern.SkipSpike(6.0, window=8, warmup=4)
    assert skips(policy, [1.0, 1.0, 1.0, 1.0, 1.0059, 1.0061]) == [False] * 5 + [False]
    assert skips(policy, [1.0, 1.0, 1.0, 1.0, 1.0061])[-1]


def test_a_history_of_zero_losses_says_nothing() -> None:
    policy = gradkern.SkipSpike(6.0, window=8, warmup=4)
    assert not any(skips(policy, [1.0] * 6, [0.0] * 5 + [0.1]))


@pytest.mark.parametrize("method", ["std", "mad"])
@pytest.mark.parametrize(("window", "warmup"), [(2, 2), (9, 5), (128, 64)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_rule_step_by_step(method: str, window: int, warmup: int, seed: int) -> None:
    generator = random.Random(seed)
    norms = [
        math.exp(0.2 * generator.gauss(0, 1)) * (20 if generator.random() < 0.03 else 1) for _ in range(300)
    ]
    losses = [
        3 - step / 200 + 0.1 * generator.gauss(0, 1) + (5 if generator.random() < 0.03 else 0)
        for step in range(300)
    ]
    losses[150] = NAN
    oracle = oracles.SkipSpike(4.0, method, window, warmup, 1e-3, signals=2)
    expected = [oracle.step(*signals) for signals in zip(norms, losses, strict=True)]
    policy = gradkern.SkipSpike(4.0, method=method, window=window, warmup=warmup)  # type: ignore[arg-type]
    assert skips(policy, norms, losses) == expected
    assert 1 < sum(expected) < 300


@settings(max_examples=30, deadline=None, derandomize=True)
@given(norms=st.lists(st.floats(1e-2, 1e2), min_size=5, max_size=30), exponent=st.integers(-60, 60))
def test_the_verdict_does_not_depend_on_the_scale(norms: list[float], exponent: int) -> None:
    scaled = [norm * 2.0**exponent for norm in norms]
    for method in ("std", "mad"):
        policy = gradkern.SkipSpike(2.0, method=method, window=6)  # type: ignore[arg-type]
        assert skips(policy, norms) == skips(policy, scaled)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradkern.SkipSpike(None), "z_limit and max_norm are both None"),
        (
            lambda: gradkern.SkipSpike(None, max_norm=1.0, loss=True),
            "the loss is judged by z_limit, which is None",
        ),
        (lambda: gradkern.SkipSpike(-1.0), "z_limit must be positive and finite, got -1.0"),
        (lambda: gradkern.SkipSpike(max_norm=NAN), "max_norm must not be negative, got nan"),
        (lambda: gradkern.SkipSpike(method="iqr"), "method must be 'std' or 'mad', got 'iqr'"),
        (lambda: gradkern.SkipSpike(window=1), "window must be a whole number of at least 2, got 1"),
        (lambda: gradkern.SkipSpike(window=8, warmup=9), "warmup must not exceed window, got 9 > 8"),
        (lambda: gradkern.SkipSpike(warmup=1), "warmup must be a whole number of at least 2"),
        (lambda: gradkern.SkipSpike(least_spread=-1.0), "least_spread must not be negative"),
    ],
)
def test_an_impossible_parameter_is_refused(make: Callable[[], Policy], message: str) -> None:
    with pytest.raises(ValueError, match=f"SkipSpike: {message}"):
        make()
