from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradkern
from gradkern import reference
from gradkern.policies import Layout, Measured, Policy, replay, unit_sums
from tests.policies.streams import apply, layout, measure, stream, weights

INF, NAN = math.inf, math.nan


def coefs(policy: Policy, norms: list[float], names: list[str] | None = None) -> list[float]:
    return replay(policy, [norms], names=names).coef[0].tolist()


@pytest.mark.parametrize(("norm", "coef"), [(0.0, 1.0), (1.9, 1.0), (2.0, 1.0), (8.0, 0.25), (1e150, 2e-150)])
def test_global_norm_scales_to_the_limit(norm: float, coef: float) -> None:
    assert replay(gradkern.GlobalNorm(2.0), [norm]).coef.item() == pytest.approx(coef, rel=1e-15)


def test_global_norm_takes_the_joint_norm_of_all_tensors() -> None:
    # 2² + 3² + 6² = 7²
    assert replay(gradkern.GlobalNorm(3.5), [[2.0, 3.0, 6.0]]).coef.item() == pytest.approx(0.5, rel=1e-15)


def test_global_norm_of_inf_never_clips() -> None:
    assert replay(gradkern.GlobalNorm(INF), [1e150, 0.0]).coef.tolist() == [1.0, 1.0]


def test_global_norm_of_zero_takes_all() -> None:
    assert replay(gradkern.GlobalNorm(0.0), [3.0, 0.0]).coef.tolist() == [0.0, 1.0]


def test_the_inf_norm_is_the_largest_magnitude() -> None:
    policy = gradkern.GlobalNorm(0.5, norm_type=INF)
    rows, total = reference.measure([torch.tensor([0.1, -2.0]), torch.tensor([1.0])])
    decision = policy.decide(Measured(total, rows), policy.init(layout(names="ab", shapes=((2,), (1,)))))
    assert decision.coef is not None
    assert decision.coef.item() == 0.25


def test_norm_over_and_apply_to_choose_tensors_apart() -> None:
    policy = gradkern.GlobalNorm(1.0, norm_over=["a", "b"], apply_to="?")
    assert coefs(policy, [3.0, 4.0, 100.0], ["a", "b", "muon"]) == pytest.approx([0.2, 0.2, 1.0], rel=1e-15)


def test_a_predicate_chooses_by_name() -> None:
    policy = gradkern.GlobalNorm(1.0, norm_over=lambda name: "bias" not in name)
    assert replay(policy, [[4.0, 3.0]], names=["w", "bias"]).coef.item() == 0.25


def test_a_nan_outside_norm_over_does_not_poison_the_norm() -> None:
    policy = gradkern.GlobalNorm(1.0, norm_over="a", apply_to="a")
    rows, total = reference.measure([torch.tensor([4.0]), torch.tensor([NAN])])
    decision = policy.decide(
        Measured(total, rows, propagate=True), policy.init(layout(names="ab", shapes=((1,), (1,))))
    )
    assert decision.coef is not None
    assert decision.coef.tolist() == [0.25, 1.0]


def test_tensor_norm_is_kerass_rule() -> None:
    # Keras: g * c / max(norm, c)
    norms = [0.0, 0.5, 2.0, 7.0]
    expected = [2.0 / max(norm, 2.0) for norm in norms]
    assert coefs(gradkern.TensorNorm(2.0), norms) == pytest.approx(expected, rel=1e-15)


def test_tensor_norm_leaves_others_alone() -> None:
    assert coefs(gradkern.TensorNorm(1.0, apply_to="b*"), [5.0, 5.0], ["a", "b"]) == [1.0, 0.2]


def test_group_norm_takes_the_joint_norm_within_a_group() -> None:
    policy = gradkern.GroupNorm({"a*": 1.0, "b*": 26.0})
    names = ["a1", "b1", "a2", "b2", "c"]
    # 3² + 4² = 5², 5² + 12² = 13²
    assert coefs(policy, [3.0, 5.0, 4.0, 12.0, 99.0], names) == pytest.approx(
        [0.2, 1.0, 0.2, 1.0, 1.0], rel=1e-15
    )


def test_the_first_matching_pattern_takes_a_tensor() -> None:
    policy = gradkern.GroupNorm({"head.weight": 1.0, "*": 2.0})
    assert coefs(policy, [4.0, 4.0], ["head.weight", "head.bias"]) == [0.25, 0.5]


def test_a_group_that_overflows_does_not_touch_another() -> None:
    policy = gradkern.GroupNorm({"a": 1.0, "b": 1.0})
    rows, total = reference.measure([torch.tensor([1e200], dtype=torch.float64), torch.tensor([2.0])])
    decision = policy.decide(Measured(total, rows), policy.init(layout(names="ab", shapes=((1,), (1,)))))
    assert decision.coef is not None
    assert decision.coef.tolist() == [0.0, 0.5]


def test_value_bounds_every_element_by_a_number() -> None:
    policy = gradkern.Value(0.5)
    assert policy.decide(Measured(), policy.init(layout())) == gradkern.policies.Decision(bound=0.5)


def test_value_bounds_only_chosen_tensors() -> None:
    policy = gradkern.Value(0.5, apply_to="rnn.*")
    bound = policy.decide(Measured(), policy.init(layout())).bound
    assert isinstance(bound, torch.Tensor)
    assert bound.dtype == torch.float64
    assert bound.tolist() == [INF, 0.5, 0.5, INF]


def test_block_rms_is_optaxs_rule() -> None:
    shapes = [(4,), (10, 10), (2, 8)]
    norms = [6.0, 10.0, 0.1]
    # optax: g / max(1, RMS(g) / d)
    expected = [
        1.0 / max(1.0, (norm / math.sqrt(math.prod(shape))) / 0.8)
        for norm, shape in zip(norms, shapes, strict=True)
    ]
    assert replay(gradkern.BlockRMS(0.8), [norms], shapes=shapes).coef[0].tolist() == pytest.approx(
        expected, rel=1e-15
    )


def test_block_rms_of_a_tensor_without_elements_is_one() -> None:
    assert replay(gradkern.BlockRMS(), [[0.0]], shapes=[(0, 3)]).coef.tolist() == [[1.0]]


def agc_by_hand(grad: torch.Tensor, weight: torch.Tensor, clipping: float, eps: float) -> torch.Tensor:
    """The paper's rule, unit by unit."""
    units = [(grad, weight)] if grad.dim() < 2 else list(zip(grad, weight, strict=True))
    clipped = []
    for g, w in units:
        g_norm = math.sqrt(sum(x * x for x in g.double().reshape(-1).tolist()))
        w_norm = math.sqrt(sum(x * x for x in w.double().reshape(-1).tolist()))
        limit = clipping * max(w_norm, eps)
        clipped.append(g.double() * (limit / g_norm if g_norm > limit else 1.0))
    return torch.stack(clipped) if grad.dim() > 1 else clipped[0]


@pytest.mark.parametrize("clipping", [0.01, 0.3, 3.0])
def test_agc_is_the_papers_rule_for_each_unit(clipping: float) -> None:
    policy = gradkern.AGC(clipping)
    state = policy.init(layout())
    grads = stream(12)[11]
    decision = policy.decide(measure(grads), state)
    assert decision.unit_coef is not None
    doubles = [grad.double() for grad in grads]
    for grad, weight, clipped in zip(grads, weights(), apply(doubles, decision), strict=True):
        torch.testing.assert_close(clipped, agc_by_hand(grad, weight, clipping, 1e-3), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("grad", "weight", "coef"),
    [
        (5.0, 10.0, 0.2),  # limit 0.1 * 10
        (0.5, 10.0, 1.0),
        (2.0, 0.0, 0.1 * 1e-3 / 2.0),  # eps stands in for a weight of zero
        (4e-7, 0.0, 1.0),  # below the limit of 1e-4
        (0.0, 0.0, 1.0),
    ],
)
def test_agc_in_closed_form(grad: float, weight: float, coef: float) -> None:
    policy = gradkern.AGC(0.1)
    units = unit_sums(
        [torch.tensor([grad], dtype=torch.float64)], [torch.tensor([weight], dtype=torch.float64)]
    )
    decision = policy.decide(Measured(units=units), policy.init(layout(names="w", shapes=((1,),))))
    assert decision.unit_coef is not None
    assert decision.unit_coef.item() == pytest.approx(coef, rel=1e-14)


def test_agc_clips_tiny_gradients_to_the_limit_too() -> None:
    # The authors' max(norm, 1e-6) would give 5e-3 here, and a norm of 0.5e-9 instead of the limit of 1e-8.
    policy = gradkern.AGC(0.01, eps=1e-6)
    units = unit_sums([torch.tensor([1e-7], dtype=torch.float64)], [torch.zeros(1)])
    decision = policy.decide(Measured(units=units), policy.init(layout(names="w", shapes=((1,),))))
    assert decision.unit_coef is not None
    assert decision.unit_coef.item() * 1e-7 == pytest.approx(1e-8, rel=1e-14)


def test_agc_per_tensor_takes_whole_norms() -> None:
    policy = gradkern.AGC(0.1, per="tensor")
    measured = measure(stream(1)[0])
    coef = policy.decide(measured, policy.init(layout())).coef
    assert coef is not None
    for grad, weight, k in zip(stream(1)[0], weights(), coef.tolist(), strict=True):
        limit = 0.1 * max(weight.double().norm().item(), 1e-3)
        assert k == pytest.approx(min(1.0, limit / grad.double().norm().item()), rel=1e-14)


def test_agc_leaves_excluded_tensors_alone() -> None:
    policy = gradkern.AGC(1e-3, exclude=["head.*", "embed.*"])
    state = policy.init(layout())
    decision = policy.decide(measure(stream(1)[0]), state)
    assert decision.unit_coef is not None
    embed, rnn_weight, rnn_bias, head = decision.unit_coef.split(state.layout.unit_counts())
    assert bool((embed == 1).all())
    assert bool((head == 1).all())
    assert bool((rnn_weight < 1).all())
    assert bool((rnn_bias < 1).all())


scales = st.integers(-40, 40).map(lambda exponent: 2.0**exponent)
positive = st.floats(1e-3, 1e3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(norms=st.lists(positive, min_size=1, max_size=4), limit=positive, scale=scales)
def test_scaling_gradients_and_limit_alike_leaves_the_coefficient(
    norms: list[float], limit: float, scale: float
) -> None:
    scaled = [norm * scale for norm in norms]
    rules: list[Callable[[float], Policy]] = [
        gradkern.GlobalNorm,
        gradkern.TensorNorm,
        gradkern.BlockRMS,
        lambda limit: gradkern.GroupNorm({"*": limit}),
    ]
    for rule in rules:
        assert torch.equal(replay(rule(limit), [norms]).coef, replay(rule(limit * scale), [scaled]).coef)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**13])
def test_agc_depends_only_on_the_ratio_of_gradients_to_weights(scale: float) -> None:
    grads, own = stream(1)[0], weights()
    policy = gradkern.AGC(0.1, eps=1e-30)
    state = policy.init(layout())
    before = policy.decide(Measured(units=unit_sums(grads, own)), state).unit_coef
    scaled = unit_sums([grad * scale for grad in grads], [weight * scale for weight in own])
    after = policy.decide(Measured(units=scaled), state).unit_coef
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradkern.GlobalNorm(-1.0), "GlobalNorm: max_norm must not be negative, got -1.0"),
        (lambda: gradkern.GlobalNorm(NAN), "GlobalNorm: max_norm must not be negative, got nan"),
        (lambda: gradkern.GlobalNorm(1.0, norm_type=1.0), "GlobalNorm: norm_type must be 2 or inf, got 1.0"),
        (lambda: gradkern.TensorNorm(-0.5), "TensorNorm: max_norm"),
        (lambda: gradkern.GroupNorm({}), "GroupNorm: limits must name"),
        (lambda: gradkern.GroupNorm({"a": 1.0, "b": -2.0}), r"GroupNorm: limits\['b'\] must not be negative"),
        (lambda: gradkern.Value(-0.5), "Value: clip_value must not be negative"),
        (lambda: gradkern.BlockRMS(0.0), "BlockRMS: threshold must be positive"),
        (lambda: gradkern.AGC(0.0), "AGC: clipping must be positive"),
        (lambda: gradkern.AGC(eps=-1e-3), "AGC: eps must be positive"),
        (lambda: gradkern.AGC(per="channel"), "AGC: per must be 'unit' or 'tensor', got 'channel'"),
    ],
)
def test_an_impossible_parameter_is_refused(make: Callable[[], Policy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradkern.GlobalNorm(None), "GlobalNorm: max_norm must be a number, got None."),
        (lambda: gradkern.BlockRMS("1"), "BlockRMS: threshold must be a number, got '1'."),
        (lambda: gradkern.ZClip(alpha="1"), "ZClip: alpha must be a number, got '1'."),
        (lambda: gradkern.ZClip(warmup=None), "ZClip: warmup must be a number, got None."),
        (lambda: gradkern.ZClip(torch.nn.Linear(300, 300)), "ZClip: z_limit must be a number, got Linear."),
        (lambda: gradkern.GroupNorm({"a": "1"}), "GroupNorm: limits['a'] must be a number, got '1'."),
        (lambda: gradkern.GroupNorm(1.0), "GroupNorm: limits must map patterns of names to norms, for "),
    ],
)
def test_a_parameter_of_another_type_is_refused(make: Callable[[], Policy], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (gradkern.GlobalNorm(1.0, norm_over="rnm.*"), "GlobalNorm: norm_over 'rnm.*' matches no tensor"),
        (
            gradkern.GlobalNorm(1.0, apply_to=["rnn.*", "lstm.*"]),
            "GlobalNorm: apply_to 'lstm.*' matches no tensor",
        ),
        (gradkern.GlobalNorm(1.0, apply_to=lambda name: False), "GlobalNorm: apply_to selects no tensor"),
        (gradkern.TensorNorm(1.0, apply_to="x"), "TensorNorm: apply_to 'x' matches no tensor"),
        (gradkern.GroupNorm({"x": 1.0}), "GroupNorm: pattern 'x' matches no tensor"),
        (
            gradkern.GroupNorm({"*": 1.0, "rnn.*": 1.0}),
            "GroupNorm: pattern 'rnn.*' matches only tensors that earlier",
        ),
        (gradkern.Value(1.0, apply_to="x"), "Value: apply_to 'x' matches no tensor"),
        (gradkern.BlockRMS(1.0, apply_to="x"), "BlockRMS: apply_to 'x' matches no tensor"),
        (gradkern.AGC(exclude="x"), "AGC: exclude 'x' matches no tensor"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(policy: Policy, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        policy.init(layout())
    assert message in str(error.value)


def test_the_message_shows_the_names() -> None:
    names = [f"layer{index}" for index in range(7)]
    policy = gradkern.TensorNorm(1.0, apply_to="x")
    with pytest.raises(ValueError, match=r"The 7 names are 'layer0', .*, 'layer4' and 2 more"):
        policy.init(layout(names=names, shapes=[(1,)] * 7))


@pytest.mark.parametrize(
    ("policy", "clip"),
    [
        (gradkern.GlobalNorm(2.0), (2.0, INF)),
        (gradkern.Value(0.5), (INF, 0.5)),
        (gradkern.GlobalNorm(2.0, norm_type=INF), None),
        (gradkern.GlobalNorm(2.0, norm_over="a"), None),
        (gradkern.GlobalNorm(2.0, apply_to="a"), None),
        (gradkern.Value(0.5, apply_to="a"), None),
        (gradkern.TensorNorm(2.0), None),
        (gradkern.ZClip(), None),
    ],
)
def test_what_clip_alone_can_do_says_so(policy: Policy, clip: tuple[float, float] | None) -> None:
    assert policy.as_clip() == clip


def test_policies_without_tensors_have_nothing_to_do() -> None:
    empty = Layout((), (), torch.device("cpu"))
    rows, total = reference.measure([])
    for policy in (
        gradkern.GlobalNorm(1.0),
        gradkern.TensorNorm(1.0),
        gradkern.AdaGC(),
        gradkern.Percentile(per="tensor"),
    ):
        decision = policy.decide(
            Measured(total, rows, good=gradkern.policies.all_finite(total)), policy.init(empty)
        )
        assert decision.coef is not None
        assert decision.coef.numel() == (1 if policy == gradkern.GlobalNorm(1.0) else 0)


@pytest.mark.parametrize("pattern", [[], ()])
def test_no_pattern_at_all_is_refused(pattern: object) -> None:
    layout = gradkern.policies.Layout(("w",), ((1,),), torch.device("cpu"))
    with pytest.raises(ValueError, match="GlobalNorm: apply_to holds no pattern"):
        gradkern.GlobalNorm(1.0, apply_to=pattern).init(layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [5, [5]])
def test_what_is_no_pattern_is_refused(pattern: object) -> None:
    layout = gradkern.policies.Layout(("w",), ((1,),), torch.device("cpu"))
    with pytest.raises(TypeError, match="GlobalNorm: apply_to must be a pattern"):
        gradkern.GlobalNorm(1.0, apply_to=pattern).init(layout)  # type: ignore[arg-type]
