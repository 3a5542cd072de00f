from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import gradkern
from gradkern.policies import Chain, Measured, Policy, replay
from tests.policies.streams import POLICIES, apply, layout, loss_of, measure, same_bits, stream, tensors_of

# Every pair of these is a chain; what a stage sees must be what measuring its input again would give.
MULTIPLICATIVE = [
    "GlobalNorm",
    "GlobalNorm_inf",
    "GlobalNorm_parts",
    "TensorNorm",
    "GroupNorm",
    "BlockRMS",
    "AGC",
    "AGC_tensor",
    "Percentile",
    "Percentile_tensor",
    "ZClip",
    "AdaGC",
]


def allowed(first: str, second: str) -> bool:
    return not (first == "AGC" and second == "GlobalNorm_inf")


PAIRS = [(a, b) for a in MULTIPLICATIVE for b in [*MULTIPLICATIVE, "Value", "SkipSpike_std"] if allowed(a, b)]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_chain_decides_as_if_it_measured_between_its_stages(first: str, second: str) -> None:
    a, b = POLICIES[first](), POLICIES[second]()
    chain = Chain(a, b)
    chain_state, a_state, b_state = chain.init(layout()), a.init(layout()), b.init(layout())
    for step, grads32 in enumerate(stream(14)):
        grads = [grad.double() for grad in grads32]
        measured = measure(grads, loss_of(step))
        together = chain.decide(measured, chain_state)
        one = a.decide(measured, a_state)
        halfway = apply(grads, one)
        two = b.decide(measure(halfway, loss_of(step)), b_state)
        for got, expected in zip(apply(grads, together), apply(halfway, two), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        if two.skip is not None:
            assert together.skip is not None
            assert together.skip.item() == two.skip.item()
        together.commit(measured.good)
        kept = None if two.skip is None else two.skip.logical_not()
        assert measured.good is not None
        good = measured.good if kept is None else measured.good & kept
        one.commit(good)
        two.commit(measured.good)


def test_two_norm_limits_are_the_smaller_one() -> None:
    norms = [0.5, 1.5, 3.0, 10.0]
    both = replay(Chain(gradkern.GlobalNorm(2.0), gradkern.GlobalNorm(1.0)), norms).coef
    torch.testing.assert_close(both, replay(gradkern.GlobalNorm(1.0), norms).coef, rtol=1e-15, atol=0)


def test_the_order_of_stages_matters() -> None:
    # Norms (3, 4). First each to 3, joint 3√2, then to 2; or first to 2, where each is within 3 already.
    each, joint = gradkern.TensorNorm(3.0), gradkern.GlobalNorm(2.0)
    norms = [[3.0, 4.0]]
    root = math.sqrt(2)
    assert replay(Chain(each, joint), norms).coef[0].tolist() == pytest.approx(
        [2 / (3 * root), 0.75 * 2 / (3 * root)]
    )
    assert replay(Chain(joint, each), norms).coef[0].tolist() == pytest.approx([0.4, 0.4])


def test_a_skipped_step_enters_no_history() -> None:
    chain = Chain(gradkern.ZClip(warmup=2), gradkern.Percentile(), gradkern.SkipSpike(None, max_norm=0.5))
    state = chain.init(layout())
    measured = measure(stream(1)[0])
    decision = chain.decide(measured, state)
    before = [tensor.clone() for tensor in tensors_of(state)]
    decision.commit(measured.good)
    assert decision.skip is not None
    assert decision.skip.item()
    assert all(map(same_bits, before, tensors_of(state)))


def test_any_stage_may_skip() -> None:
    low, high = gradkern.SkipSpike(None, max_norm=1.0), gradkern.SkipSpike(None, max_norm=9.0)
    for chain in (Chain(low, high), Chain(high, low)):
        assert replay(chain, [0.5, 5.0, 50.0]).skip.tolist() == [False, True, True]


def test_the_bound_comes_last() -> None:
    chain = Chain(gradkern.GlobalNorm(1.0), gradkern.Value(0.25))
    decision = chain.decide(measure(stream(1)[0]), chain.init(layout()))
    assert decision.bound == 0.25
    assert decision.coef is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain(), "needs at least one policy"),
        (
            lambda: Chain(gradkern.Value(0.5), gradkern.GlobalNorm(1.0)),
            "Value works element by element and must come last, but GlobalNorm follows",
        ),
        (lambda: Chain(gradkern.Value(0.5), gradkern.Value(0.4)), "but Value follows"),
        (
            lambda: Chain(Chain(gradkern.Value(0.5)), gradkern.SkipSpike(None, max_norm=1.0)),
            "but SkipSpike follows",
        ),
        (
            lambda: Chain(
                gradkern.AGC(), gradkern.TensorNorm(1.0), gradkern.GlobalNorm(1.0, norm_type=math.inf)
            ),
            "reads the largest magnitude, which is not known after coefficients per unit",
        ),
    ],
)
def test_an_impossible_order_is_refused(make: Callable[[], Policy], message: str) -> None:
    with pytest.raises(ValueError, match=f"Chain: .*{message}"):
        make()


def test_a_stage_must_be_a_policy() -> None:
    with pytest.raises(
        TypeError, match=r"Chain: 1.0 is not a policy. A number must be named: GlobalNorm\(1.0\)"
    ):
        Chain(gradkern.ZClip(), 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Chain: list is not a policy. Pass policies one by one"):
        Chain([gradkern.ZClip(), gradkern.Value(0.5)])  # type: ignore[arg-type]


def test_chains_within_chains_are_taken_apart() -> None:
    a, b, c = gradkern.GlobalNorm(1.0), gradkern.ZClip(), gradkern.Value(0.5)
    assert Chain(a, Chain(b, c)) == Chain(a, b, c) == Chain(Chain(Chain(a), b), c)
    assert repr(Chain(b)) == f"Chain({b!r})"


def test_rows_are_needed_only_where_a_later_stage_reads_a_total() -> None:
    assert Chain(gradkern.AGC(), gradkern.GlobalNorm(1.0)).needs.rows
    assert not Chain(gradkern.AGC(), gradkern.Value(0.5)).needs.rows
    assert not Chain(gradkern.GlobalNorm(1.0), gradkern.ZClip()).needs.rows


@pytest.mark.parametrize(
    ("chain", "clip"),
    [
        (Chain(gradkern.GlobalNorm(2.0)), (2.0, math.inf)),
        (Chain(gradkern.GlobalNorm(2.0), gradkern.Value(0.5)), (2.0, 0.5)),
        (Chain(gradkern.GlobalNorm(2.0), gradkern.GlobalNorm(1.0)), None),
        (Chain(gradkern.ZClip(), gradkern.Value(0.5)), None),
        (Chain(gradkern.GlobalNorm(2.0), gradkern.TensorNorm(1.0), gradkern.Value(0.5)), None),
    ],
)
def test_what_clip_alone_can_do_says_so(chain: Chain, clip: tuple[float, float] | None) -> None:
    assert chain.as_clip() == clip


def test_the_numbers_of_later_stages_keep_their_own_names() -> None:
    chain = Chain(gradkern.ZClip(), gradkern.GlobalNorm(0.25))
    info = chain.decide(measure(stream(1)[0]), chain.init(layout())).info
    assert set(info) == {"norm", "threshold", "z", "1.norm", "1.threshold"}
    assert info["1.threshold"].item() == 0.25


def test_a_per_unit_stage_leaves_an_upper_bound_of_the_magnitude() -> None:
    measured = measure(stream(1)[0])
    assert measured.units is not None
    half = torch.full_like(measured.units.grad_sum_sq, 0.5)
    after = measured.scaled(None, half)
    assert after.rows is not None
    assert measured.rows is not None
    torch.testing.assert_close(after.rows[:, 0], measured.rows[:, 0] / 4, rtol=1e-14, atol=0)
    assert torch.equal(after.rows[:, 1:], measured.rows[:, 1:])


def test_what_cannot_be_worked_out_is_left_out() -> None:
    measured = measure(stream(1)[0])._replace(rows=None)
    after = measured.scaled(torch.full((4,), 0.5, dtype=torch.float64))
    assert after.total is None
    assert after.units is None
    assert Measured().scaled(torch.tensor(0.5)) == Measured()
