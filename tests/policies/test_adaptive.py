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

INF, NAN = math.inf, math.nan


def norms_of_a_run(steps: int, seed: int) -> list[float]:
    """Norms that fall slowly, scatter, and jump now and then."""
    generator = random.Random(seed)
    return [
        math.exp(-step / 200 + 0.3 * generator.gauss(0, 1))
        * (generator.choice([3.0, 30.0, 3000.0]) if generator.random() < 0.05 else 1.0)
        for step in range(steps)
    ]


def coefs(policy: Policy, norms: list[float]) -> list[float]:
    return replay(policy, norms).coef.tolist()


# Percentile


@pytest.mark.parametrize(
    ("percentile", "norms", "expected"),
    [
        # Median: of [1], [1 3], [1 2 3], [1 2 3 8].
        (50.0, [1.0, 3.0, 2.0, 8.0], [1.0, 2 / 3, 1.0, 2.5 / 8]),
        # Tenth: 1; 1 + 0.1 * 9; 1 + 0.2 * 4 between 1 and 5; 1 + 0.3 * 4.
        (10.0, [1.0, 10.0, 5.0, 100.0], [1.0, 1.9 / 10, 1.8 / 5, 2.2 / 100]),
        # The smallest and the largest so far.
        (0.0, [4.0, 2.0, 8.0], [1.0, 1.0, 2 / 8]),
        (100.0, [4.0, 2.0, 8.0], [1.0, 1.0, 1.0]),
        # Ninetieth of [1 2]: 1 + 0.9; of [1 2 10]: 2 + 0.8 * 8.
        (90.0, [1.0, 2.0, 10.0], [1.0, 1.9 / 2, 8.4 / 10]),
    ],
)
def test_percentile_in_closed_form(percentile: float, norms: list[float], expected: list[float]) -> None:
    assert coefs(gradkern.Percentile(percentile), norms) == pytest.approx(expected, rel=1e-14)


def test_percentile_forgets_what_left_the_window() -> None:
    # The smallest of the last three: 1 counts for three steps.
    norms = [1.0, 5.0, 5.0, 5.0, 5.0]
    assert coefs(gradkern.Percentile(0.0, window=3), norms) == pytest.approx(
        [1.0, 0.2, 0.2, 1.0, 1.0], rel=1e-15
    )


def test_a_bad_first_step_has_no_limit() -> None:
    assert coefs(gradkern.Percentile(50.0), [NAN, 2.0, INF, 4.0])[1:] == pytest.approx(
        [1.0, 1.0, 0.75], rel=1e-15
    )


@pytest.mark.parametrize("percentile", [0.0, 10.0, 49.9, 50.0, 50.1, 75.0, 95.0, 100.0])
@pytest.mark.parametrize("window", [1, 2, 7, 100])
def test_percentile_is_autoclip_over_a_window(percentile: float, window: int) -> None:
    norms = norms_of_a_run(250, seed=window)
    norms[3] = norms[120] = NAN
    norms[50] = 0.0
    oracle = oracles.AutoClip(percentile, window)
    expected = [oracle.step(norm) for norm in norms]
    got = coefs(gradkern.Percentile(percentile, window=window), norms)
    finite = [index for index, norm in enumerate(norms) if math.isfinite(norm)]
    assert [got[index] for index in finite] == pytest.approx([expected[index] for index in finite], rel=1e-13)


def test_percentile_per_tensor_keeps_histories_apart() -> None:
    first, second = norms_of_a_run(150, 1), norms_of_a_run(150, 2)
    second[10:20] = [0.0] * 10  # no gradient for a while
    oracle = [oracles.AutoClip(30.0, 20), oracles.AutoClip(30.0, 20)]
    expected = [[oracle[0].step(a), oracle[1].step(b)] for a, b in zip(first, second, strict=True)]
    policy = gradkern.Percentile(30.0, window=20, per="tensor")
    got = replay(policy, [list(pair) for pair in zip(first, second, strict=True)]).coef
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


# ZClip


def test_zclip_in_closed_form_after_the_warm_up() -> None:
    # μ = 1, σ² = (0 + 0.04 + 0.04 + 0) / 4 = 0.02. z = 8 / σ, limit 1 + 2.5² σ / z = 1 + 6.25 * 0.02 / 8.
    policy = gradkern.ZClip(warmup=4, max_norm=None, eps=0.0)
    expected = [1.0, 1.0, 1.0, 1.0, (1 + 6.25 * 0.02 / 8) / 9]
    assert coefs(policy, [1.0, 1.2, 0.8, 1.0, 9.0]) == pytest.approx(expected, rel=1e-14)


def test_zclip_updates_by_what_a_spike_was_clipped_to() -> None:
    # After [1, 3]: μ = 2, σ = 1. Spike 12: z = 10, clipped to 2 + 4 * 1 / 10 = 2.4 (z_limit 2).
    # α = 1/2: μ = 2.2, σ² = 0.5 + 0.5 * 0.2² = 0.52. Norm 5: z = 2.8 / σ > 2, limit 2.2 + 4 * 0.52 / 2.8.
    policy = gradkern.ZClip(2.0, alpha=0.5, warmup=2, max_norm=None, eps=0.0)
    expected = [1.0, 1.0, 2.4 / 12, (2.2 + 4 * 0.52 / 2.8) / 5]
    assert coefs(policy, [1.0, 3.0, 12.0, 5.0]) == pytest.approx(expected, rel=1e-14)


def test_zclip_updates_by_the_norm_itself_below_the_limit() -> None:
    # After [1, 3]: μ = 2, σ = 1. Norm 4 has z = 2, which is not above 2: no spike. α = 1/2: μ = 3,
    # σ² = 0.5 + 0.5 = 1. Then 6: z = 3, limit 3 + 4 / 3.
    policy = gradkern.ZClip(2.0, alpha=0.5, warmup=2, max_norm=None, eps=0.0)
    assert coefs(policy, [1.0, 3.0, 4.0, 6.0]) == pytest.approx([1.0, 1.0, 1.0, (3 + 4 / 3) / 6], rel=1e-14)


def test_zclip_clips_by_max_norm_alone_in_the_warm_up() -> None:
    policy = gradkern.ZClip(warmup=3, max_norm=2.0)
    assert coefs(policy, [1.0, 100.0, 4.0]) == [1.0, 0.02, 0.5]


def test_zclip_never_exceeds_max_norm() -> None:
    policy = gradkern.ZClip(warmup=2, max_norm=0.5)
    got = (
        torch.tensor(norms_of_a_run(100, 3), dtype=torch.float64)
        * replay(policy, norms_of_a_run(100, 3)).coef
    )
    assert bool((got <= 0.5 * (1 + 1e-15)).all())


def test_zclip_of_a_constant_norm_lets_it_pass() -> None:
    assert coefs(gradkern.ZClip(warmup=3, max_norm=None, eps=0.0), [2.0] * 20) == [1.0] * 20


def test_zclip_with_a_warm_up_of_one_starts_from_that_norm() -> None:
    # μ = 2, σ = 0: any larger norm is a spike and is clipped to the mean.
    policy = gradkern.ZClip(warmup=1, max_norm=None, eps=0.0)
    assert coefs(policy, [2.0, 8.0]) == [1.0, 0.25]


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("warmup", [1, 2, 25])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_zclip_is_the_papers_rule(max_norm: float | None, warmup: int, seed: int) -> None:
    norms = norms_of_a_run(300, seed)
    norms[warmup - 1] = norms[warmup] = norms[100] = NAN
    norms[101] = INF
    norms[60] = 0.0
    oracle = oracles.ZClip(2.5, 0.97, warmup, max_norm, 1e-6)
    got = coefs(gradkern.ZClip(warmup=warmup, max_norm=max_norm), norms)
    for norm, coef in zip(norms, got, strict=True):
        if math.isfinite(norm):
            assert coef == pytest.approx(oracle.step(norm), rel=1e-12)


# AdaGC


def test_adagc_in_closed_form() -> None:
    # Warm-up of two by a joint limit of 5: norms (3, 4) pass; (6, 8) are halved. γ = min: (3, 4).
    # Then ratio 1.5 allows (4.5, 6): (9, 5) becomes (4.5, 5). β = 0.5: γ = (3.75, 4.5), which allows
    # (5.625, 6.75).
    policy = gradkern.AdaGC(1.5, beta=0.5, warmup=2, max_norm=5.0)
    norms = [[3.0, 4.0], [6.0, 8.0], [9.0, 5.0], [9.0, 9.0]]
    expected = [[1.0, 1.0], [0.5, 0.5], [0.5, 1.0], [5.625 / 9, 6.75 / 9]]
    torch.testing.assert_close(
        replay(policy, norms).coef, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_adagc_survives_a_zero_gradient_in_the_warm_up() -> None:
    # As the paper has it, γ would be 0 and the tensor would never move again.
    policy = gradkern.AdaGC(1.5, beta=0.5, warmup=2, max_norm=10.0)
    assert coefs(policy, [0.0, 2.0, 2.0, 9.0]) == pytest.approx([1.0, 1.0, 1.0, 3.0 / 9], rel=1e-15)


def test_adagc_gives_a_tensor_that_joins_late_a_warm_up_of_its_own() -> None:
    policy = gradkern.AdaGC(1.5, beta=0.5, warmup=2, max_norm=100.0)
    norms = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 7.0], [1.0, 50.0], [1.0, 50.0]]
    # The joint limit never acts; γ of the second is min(7, 50) and allows 10.5.
    assert replay(policy, norms).coef[:, 1].tolist() == pytest.approx([1.0] * 5 + [10.5 / 50], rel=1e-15)


def test_adagc_does_not_let_a_missing_gradient_lower_its_average() -> None:
    policy = gradkern.AdaGC(1.5, beta=0.5, warmup=1, max_norm=100.0)
    assert coefs(policy, [4.0, *[0.0] * 50, 6.0]) == [1.0] * 52


@pytest.mark.parametrize("warmup", [1, 10, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_adagc_is_the_papers_rule(warmup: int, seed: int) -> None:
    norms = [list(step) for step in zip(*(norms_of_a_run(250, 10 * seed + i) for i in range(3)), strict=True)]
    norms[5][1] = norms[150][2] = 0.0
    norms[warmup] = [1.0, NAN, 1.0]
    oracle = oracles.AdaGC(1.04, 0.99, warmup, 1.0, tensors=3)
    got = replay(gradkern.AdaGC(warmup=warmup), norms).coef.tolist()
    for step, coef in zip(norms, got, strict=True):
        if all(map(math.isfinite, step)):
            assert coef == pytest.approx(oracle.step(step), rel=1e-12)


# All


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    norms=st.lists(st.floats(1e-2, 1e2), min_size=3, max_size=30),
    exponent=st.integers(-60, 60),
)
def test_rules_without_an_absolute_limit_do_not_depend_on_the_scale(
    norms: list[float], exponent: int
) -> None:
    scaled = [norm * 2.0**exponent for norm in norms]
    for policy in (
        gradkern.ZClip(warmup=3, max_norm=None, eps=0.0),
        gradkern.Percentile(30.0, window=5),
        gradkern.Percentile(70.0, window=5, per="tensor"),
    ):
        assert coefs(policy, norms) == coefs(policy, scaled)
    by_scale = gradkern.AdaGC(warmup=3, max_norm=2.0**exponent)
    assert coefs(gradkern.AdaGC(warmup=3), norms) == coefs(by_scale, scaled)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradkern.Percentile(101.0), "Percentile: percentile must be between 0 and 100, got 101.0"),
        (lambda: gradkern.Percentile(NAN), "Percentile: percentile must be between 0 and 100"),
        (
            lambda: gradkern.Percentile(window=0),
            "Percentile: window must be a whole number of at least 1, got 0",
        ),
        (lambda: gradkern.Percentile(window=2.5), "Percentile: window must be a whole number"),
        (lambda: gradkern.Percentile(per="group"), "Percentile: per must be 'global' or 'tensor'"),
        (lambda: gradkern.ZClip(0.0), "ZClip: z_limit must be positive"),
        (lambda: gradkern.ZClip(alpha=1.0), "ZClip: alpha must be at least 0 and below 1, got 1.0"),
        (lambda: gradkern.ZClip(warmup=0), "ZClip: warmup must be a whole number of at least 1"),
        (lambda: gradkern.ZClip(max_norm=-1.0), "ZClip: max_norm must not be negative"),
        (lambda: gradkern.ZClip(eps=-1.0), "ZClip: eps must not be negative"),
        (lambda: gradkern.AdaGC(0.0), "AdaGC: ratio must be positive"),
        (lambda: gradkern.AdaGC(beta=-0.1), "AdaGC: beta must be at least 0"),
        (lambda: gradkern.AdaGC(warmup=0), "AdaGC: warmup"),
        (lambda: gradkern.AdaGC(max_norm=0.0), "AdaGC: max_norm must be positive"),
    ],
)
def test_an_impossible_parameter_is_refused(make: Callable[[], Policy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def state_after(policy: Policy, norms: list[float]) -> dict[str, object]:
    """A policy's saved state after steps with these norms."""
    layout = gradkern.policies.Layout(("w",), ((1,),), torch.device("cpu"))
    state = policy.init(layout)
    for norm in norms:
        total = torch.tensor([norm * norm, norm, 0, 0, 0], dtype=torch.float64)
        policy.decide(measured_of(total), state).commit(torch.tensor(True))
    return state.state_dict()


def measured_of(total: torch.Tensor) -> gradkern.policies.Measured:
    return gradkern.policies.Measured(total, total.unsqueeze(0), good=torch.tensor(True))


@pytest.mark.parametrize(("before", "after"), [(90.0, 10.0), (10.0, 90.0)])
def test_a_history_serves_another_percentile(before: float, after: float) -> None:
    policy = gradkern.Percentile(after)
    state = policy.init(gradkern.policies.Layout(("w",), ((1,),), torch.device("cpu")))
    state.load_state_dict(state_after(gradkern.Percentile(before), [1.0, 2.0, 3.0, 4.0]))
    total = torch.tensor([25.0, 5.0, 0, 0, 0], dtype=torch.float64)
    threshold = policy.decide(measured_of(total), state).info["threshold"].item()
    assert threshold == pytest.approx({10.0: 1.4, 90.0: 4.6}[after], rel=1e-12)


def test_a_history_of_zclip_serves_a_shorter_warm_up() -> None:
    norms = [1.0, 1.2, 0.8, 1.0, 1.1]
    policy = gradkern.ZClip(warmup=2, max_norm=None)
    state = policy.init(gradkern.policies.Layout(("w",), ((1,),), torch.device("cpu")))
    state.load_state_dict(state_after(gradkern.ZClip(warmup=5, max_norm=None), norms))
    total = torch.tensor([81.0, 9.0, 0, 0, 0], dtype=torch.float64)
    expected = replay(gradkern.ZClip(warmup=5, max_norm=None), [*norms, 9.0]).coef[-1]
    assert torch.equal(policy.decide(measured_of(total), state).coef, expected)
