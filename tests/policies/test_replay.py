from __future__ import annotations

import math

import pytest
import torch

import gradkern
from gradkern.policies import replay


def test_a_replay_is_what_a_run_would_have_decided() -> None:
    result = replay(gradkern.GlobalNorm(2.0), [1.0, 8.0, 0.0])
    assert result.coef.tolist() == [1.0, 0.25, 1.0]
    assert result.skip.tolist() == [False, False, False]


def test_norms_per_tensor_give_coefficients_per_tensor() -> None:
    norms = torch.tensor([[1.0, 4.0], [8.0, 2.0]])
    assert replay(gradkern.TensorNorm(2.0), norms).coef.tolist() == [[1.0, 0.5], [0.25, 1.0]]


def test_a_policy_that_scales_nothing_has_coefficients_of_one() -> None:
    assert replay(gradkern.SkipSpike(None, max_norm=1.0), [0.5, 2.0]).coef.tolist() == [1.0, 1.0]


def test_bad_steps_stand_for_themselves() -> None:
    result = replay(gradkern.Percentile(0.0), [math.nan, 2.0, math.inf, 4.0])
    assert result.coef[1::2].tolist() == [1.0, 0.5]


def test_no_steps_give_nothing() -> None:
    result = replay(gradkern.GlobalNorm(1.0), [])
    assert result.coef.shape == result.skip.shape == (0,)


def test_every_replay_starts_afresh() -> None:
    policy = gradkern.ZClip(warmup=2)
    assert torch.equal(replay(policy, [1.0, 2.0, 9.0]).coef, replay(policy, [1.0, 2.0, 9.0]).coef)


@pytest.mark.parametrize(
    "policy", [gradkern.AGC(), gradkern.AGC(per="tensor"), gradkern.GlobalNorm(1.0, norm_type=math.inf)]
)
def test_a_policy_that_reads_more_than_norms_is_refused(policy: gradkern.policies.Policy) -> None:
    with pytest.raises(ValueError, match=r"replay: .* reads more than norms"):
        replay(policy, [1.0])


def test_losses_must_match_the_steps() -> None:
    with pytest.raises(ValueError, match="replay: losses has 1 steps, norms 2"):
        replay(gradkern.SkipSpike(), [1.0, 2.0], [1.0])


def test_names_must_match_the_tensors() -> None:
    with pytest.raises(ValueError, match="replay: norms are of 1 tensors"):
        replay(gradkern.GlobalNorm(1.0), [1.0], names=["a", "b"])
