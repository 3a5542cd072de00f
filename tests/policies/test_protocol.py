from __future__ import annotations

import io
import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern
from gradkern.policies import (
    Decision,
    Layout,
    Measured,
    Needs,
    State,
    Units,
    all_finite,
    as_policy,
    clip_coef,
    unit_sums,
)
from tests.no_sync import no_host_read
from tests.policies.streams import (
    NAMES,
    POLICIES,
    SHAPES,
    WITH_HISTORY,
    apply,
    layout,
    loss_of,
    measure,
    run,
    same_bits,
    same_decision,
    stream,
    tensors_of,
)

# Policies with a coefficient, one per unit apart: sums per unit cover finite elements only.
SCALING = [
    name for name in POLICIES if not name.startswith(("Value", "SkipSpike", "Chain")) and name != "AGC"
]


def poisoned(grads: list[Tensor], value: float) -> list[Tensor]:
    bad = [grad.clone() for grad in grads]
    bad[1].view(-1)[5] = value
    return bad


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_on_a_device_never_waits_for_it(name: str) -> None:
    policy = POLICIES[name]()
    with FakeTensorMode():
        state = policy.init(layout("cuda"))
        double = {"dtype": torch.float64, "device": "cuda"}
        unit_count = sum(state.layout.unit_counts())
        offsets = torch.zeros(len(NAMES) + 1, dtype=torch.int64, device="cuda")
        measured = Measured(
            total=torch.ones(5, **double),
            rows=torch.ones(len(NAMES), 5, **double),
            weight_rows=torch.ones(len(NAMES), 5, **double),
            units=Units(torch.ones(unit_count, **double), torch.ones(unit_count, **double), offsets),
            loss=torch.ones((), device="cuda"),
        )
        with no_host_read():
            for _ in range(3):
                assert measured.total is not None
                good = all_finite(measured.total)
                decision = policy.decide(measured._replace(good=good), state)
                decision.commit(good)
    for part in (decision.coef, decision.unit_coef, decision.skip, *decision.info.values()):
        assert part is None or part.device.type == "cuda"


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_needs_only_what_it_says(name: str) -> None:
    policy = POLICIES[name]()
    needs = policy.needs
    everything = measure(stream(1)[0], loss_of(0))
    only = Measured(
        total=everything.total if needs.total else None,
        rows=everything.rows if needs.rows else None,
        weight_rows=everything.weight_rows if needs.weight_rows else None,
        units=everything.units if needs.units else None,
        loss=everything.loss if needs.loss == "required" else None,
        good=everything.good,
    )
    state = policy.init(layout())
    policy.decide(only, state).commit(only.good)


@pytest.mark.parametrize("name", POLICIES)
def test_deciding_writes_nothing(name: str) -> None:
    policy = POLICIES[name]()
    state = policy.init(layout())
    grads = stream(12)
    run(policy, state, enumerate(grads))
    before = [tensor.clone() for tensor in tensors_of(state)]
    measured = measure(grads[3], loss_of(3))
    assert same_decision(policy.decide(measured, state), policy.decide(measured, state))
    assert all(map(same_bits, before, tensors_of(state)))


@pytest.mark.parametrize("name", WITH_HISTORY)
def test_state_keeps_its_addresses(name: str) -> None:
    policy = POLICIES[name]()
    state = policy.init(layout())
    addresses = [tensor.data_ptr() for tensor in tensors_of(state)]
    run(policy, state, enumerate(stream(12)))
    state.load_state_dict(state.state_dict())
    assert [tensor.data_ptr() for tensor in tensors_of(state)] == addresses


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", WITH_HISTORY)
def test_a_run_with_bad_steps_goes_on_like_one_without(name: str, value: float) -> None:
    policy = POLICIES[name]()
    clean = list(enumerate(stream(40)))
    stream_with_bad: list[tuple[int, list[Tensor]]] = []
    for step, grads in clean:
        if step in (0, 4, 5, 20):  # the very first, about the end of warm-ups, two in a row, and later
            stream_with_bad.append((-1, poisoned(grads, value)))
        stream_with_bad.append((step, grads))
    with_bad, without = policy.init(layout()), policy.init(layout())
    decisions = run(policy, with_bad, stream_with_bad)
    kept = [decision for (step, _), decision in zip(stream_with_bad, decisions, strict=True) if step >= 0]
    assert all(map(same_decision, kept, run(policy, without, clean)))
    assert all(map(same_bits, tensors_of(with_bad), tensors_of(without)))


def test_a_norm_beyond_float64_makes_a_step_bad() -> None:
    total = torch.tensor([float("inf"), 1e200, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert not all_finite(total)


@pytest.mark.parametrize("name", WITH_HISTORY)
def test_resuming_in_mid_stream_gives_the_same_bits(name: str) -> None:
    policy = POLICIES[name]()
    grads = list(enumerate(stream(200)))
    uninterrupted = policy.init(layout())
    expected = run(policy, uninterrupted, grads)
    state = policy.init(layout())
    got = run(policy, state, grads[:77])
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    resumed = POLICIES[name]().init(layout())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    got += run(policy, resumed, grads[77:])
    assert all(map(same_decision, got, expected))
    assert all(map(same_bits, tensors_of(resumed), tensors_of(uninterrupted)))


def test_a_state_dict_is_a_copy() -> None:
    policy = gradkern.ZClip(warmup=2)
    state = policy.init(layout())
    saved = state.state_dict()
    run(policy, state, enumerate(stream(5)))
    assert saved["shared"]["count"].item() == 0


def filled() -> State:
    policy = gradkern.Chain(gradkern.AdaGC(warmup=2), gradkern.ZClip(warmup=2))
    state = policy.init(layout())
    run(policy, state, enumerate(stream(5)))
    return state


def test_histories_follow_the_names() -> None:
    old = filled()
    policy = gradkern.Chain(gradkern.AdaGC(warmup=2), gradkern.ZClip(warmup=2))
    names = ("head.weight", "new.weight", "embed.weight")
    new = policy.init(Layout(names, ((), (2,), (5, 4)), torch.device("cpu")))
    new.load_state_dict(old.state_dict(), strict=False)
    gamma = dict(zip(NAMES, old.stages[0].per_tensor["gamma"].tolist(), strict=True))
    expected = [gamma["head.weight"], float("inf"), gamma["embed.weight"]]
    assert new.stages[0].per_tensor["gamma"].tolist() == expected
    assert new.stages[0].per_tensor["count"].tolist() == [2, 0, 2]
    assert torch.equal(new.stages[1].shared["mean"], old.stages[1].shared["mean"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapper_are_recognised(prefix: str) -> None:
    names = tuple(prefix + name for name in layout().names)
    state = gradkern.AdaGC().init(layout(names=names))
    with pytest.raises(ValueError, match=r"Make both clippers of the module inside it, or both of"):
        state.load_state_dict(gradkern.AdaGC().init(layout()).state_dict())


def test_other_tensors_are_listed_and_nothing_is_loaded() -> None:
    saved = filled().state_dict()
    policy = gradkern.Chain(gradkern.AdaGC(warmup=2), gradkern.ZClip(warmup=2))
    names = ("embed.weight", "extra.b", "extra.a", "head.weight")
    state = policy.init(layout(names=names))
    before = [tensor.clone() for tensor in tensors_of(state)]
    message = "Missing: ['extra.a', 'extra.b']. Unexpected: ['rnn.bias', 'rnn.weight']."
    with pytest.raises(ValueError, match=re.escape(message)):
        state.load_state_dict(saved)
    assert all(map(same_bits, before, tensors_of(state)))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (gradkern.ZClip(), "saved by Chain, but this is ZClip. Build"),
        (gradkern.Chain(gradkern.AdaGC(warmup=2)), "has 1 stages, saved were 2"),
        (
            gradkern.Chain(gradkern.AdaGC(), gradkern.Percentile()),
            "saved by ZClip, but Chain stage 1 is Percentile",
        ),
    ],
)
def test_the_state_of_another_policy_is_refused_whole(policy: gradkern.policies.Policy, message: str) -> None:
    state = policy.init(layout())
    before = [tensor.clone() for tensor in tensors_of(state)]
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(filled().state_dict(), strict=False)
    assert all(map(same_bits, before, tensors_of(state)))


def test_a_history_of_another_length_is_refused() -> None:
    saved = gradkern.Percentile(window=5).init(layout()).state_dict()
    with pytest.raises(ValueError, match=r"Percentile.norms has shape \[1, 5\], not \[1, 6\].*window"):
        gradkern.Percentile(window=6).init(layout()).load_state_dict(saved)


def test_a_history_of_another_kind_is_refused() -> None:
    saved = gradkern.Percentile(per="tensor").init(layout()).state_dict()
    with pytest.raises(ValueError, match=r"keeps .*, saved were"):
        gradkern.Percentile().init(layout()).load_state_dict(saved)


def test_something_else_than_a_state_dict_is_refused() -> None:
    with pytest.raises(ValueError, match="'names' is missing"):
        gradkern.ZClip().init(layout()).load_state_dict({"lr": 0.1})


@pytest.mark.parametrize(
    "name", ["GlobalNorm", "TensorNorm", "GroupNorm", "Value", "BlockRMS", "AGC", "AGC_tensor"]
)
def test_clipping_twice_changes_nothing(name: str) -> None:
    policy = POLICIES[name]()
    names, shapes = ("embed.w", "rnn.w", "head.w"), ((64, 64), (32, 8, 4), (300,))
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    state = policy.init(layout(names=names, shapes=shapes))

    def decide(grads: list[Tensor]) -> Decision:
        rows, total = gradkern.reference.measure(grads)
        weights = [torch.ones(shape) for shape in shapes]
        weight_rows, _ = gradkern.reference.measure(weights)
        return policy.decide(Measured(total, rows, weight_rows, unit_sums(grads, weights)), state)

    once = apply(grads, decide(grads))
    assert not any(map(torch.equal, grads[:2], once[:2]))
    assert all(map(torch.equal, once, apply(once, decide(once))))


@pytest.mark.parametrize("name", POLICIES)
def test_an_empty_step_changes_nothing_and_is_not_remembered(name: str) -> None:
    policy = POLICIES[name]()
    state = policy.init(layout())
    run(policy, state, enumerate(stream(10)))
    before = [tensor.clone() for tensor in tensors_of(state)]
    measured = measure([torch.zeros(shape) for shape in SHAPES], torch.tensor(0.0))
    decision = policy.decide(measured, state)
    decision.commit(measured.good)
    for coef in (decision.coef, decision.unit_coef):
        assert coef is None or bool((coef == 1.0).all())
    assert decision.skip is None or not decision.skip
    assert all(map(same_bits, before, tensors_of(state)))


@pytest.mark.parametrize("name", POLICIES)
def test_no_coefficient_enlarges_a_gradient(name: str) -> None:
    policy = POLICIES[name]()
    for decision in run(policy, policy.init(layout()), enumerate(stream(60))):
        for coef in (decision.coef, decision.unit_coef):
            assert coef is None or bool(((coef >= 0) & (coef <= 1)).all())


@pytest.mark.parametrize("name", SCALING)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_under_propagate_the_coefficient_is_that_of_torchs_norm(name: str, value: float) -> None:
    policy = POLICIES[name]()
    state = policy.init(layout())
    run(policy, state, enumerate(stream(10)))
    measured = measure(poisoned(stream(1)[0], value), propagate=True)
    coef = policy.decide(measured, state).coef
    assert coef is not None
    hit = coef if coef.dim() == 0 else coef[1]
    assert hit.isnan() if value != value else hit == 0.0


@pytest.mark.parametrize("name", POLICIES)
def test_a_compiled_step_decides_as_an_eager_one(name: str) -> None:
    policy = POLICIES[name]()
    compiled_state, eager_state = policy.init(layout()), policy.init(layout())

    def step(measured: Measured, state: State) -> Decision:
        decision = policy.decide(measured, state)
        decision.commit(measured.good)
        return decision

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for index, grads in enumerate(stream(3)):
        measured = measure(grads, loss_of(index))
        assert same_decision(compiled(measured, compiled_state), step(measured, eager_state))
    assert all(map(same_bits, tensors_of(compiled_state), tensors_of(eager_state)))


def test_clip_coef_is_exactly_one_within_the_limit() -> None:
    norms = torch.tensor([0.0, 0.5, 1.0, 4.0, float("inf"), float("nan")], dtype=torch.float64)
    coef = clip_coef(torch.tensor(1.0, dtype=torch.float64), norms)
    assert coef[:5].tolist() == [1.0, 1.0, 1.0, 0.25, 0.0]
    assert coef[5].isnan()


def test_a_limit_of_zero_takes_all() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    assert clip_coef(zero, torch.tensor([0.0, 2.0], dtype=torch.float64)).tolist() == [1.0, 0.0]


def test_unit_sums_are_of_rows_and_of_whole_vectors() -> None:
    nan = float("nan")
    grads = [
        torch.tensor([[1.0, 2.0], [nan, 3.0]]),
        torch.tensor([2.0, 2.0]),
        torch.tensor(3.0),
        torch.zeros(0, 2),
        torch.zeros(2, 0),
    ]
    units = unit_sums(grads, [torch.ones_like(grad) for grad in grads])
    assert units.grad_sum_sq.tolist() == [5.0, 9.0, 8.0, 9.0, 0.0, 0.0]
    assert units.weight_sum_sq.tolist() == [2.0, 2.0, 2.0, 1.0, 0.0, 0.0]
    assert units.offsets.tolist() == [0, 2, 3, 4, 4, 6]


def test_unit_tensor_names_the_owner_of_each_unit() -> None:
    assert layout().unit_tensor().tolist() == [0] * 5 + [1] * 3 + [2, 3]


def test_needs_unite() -> None:
    left, right = Needs(total=False, rows=True, loss="optional"), Needs(units=True, loss="required")
    assert left.union(right) == Needs(True, True, False, True, "required")


def test_what_was_not_measured_is_named() -> None:
    policy = gradkern.TensorNorm(1.0)
    with pytest.raises(ValueError, match="needs `rows`"):
        policy.decide(Measured(), policy.init(layout()))


def test_a_history_asks_whether_the_step_is_good() -> None:
    policy = gradkern.ZClip()
    state = policy.init(layout())
    decision = policy.decide(measure(stream(1)[0])._replace(good=None), state)
    with pytest.raises(ValueError, match="`good` is None"):
        decision.commit(None)


def test_a_number_is_a_norm_limit() -> None:
    assert as_policy(2) == gradkern.GlobalNorm(2.0)
    policy = gradkern.ZClip()
    assert as_policy(policy) is policy
    with pytest.raises(TypeError, match="number or a policy"):
        as_policy("1.0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got the class ZClip. Make one: ZClip\(\.\.\.\)"):
        as_policy(gradkern.ZClip)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got list. Several, .* are a gradkern.Chain\(\.\.\.\)"):
        as_policy([policy, gradkern.Value(0.5)])  # type: ignore[arg-type]


def test_ranks_with_different_tensors_complete_a_total() -> None:
    # The other rank holds a gradient of norm 4 that belongs to the chosen ones.
    other = torch.tensor([16.0, 4.0, 0.0, 0.0, 0.0], dtype=torch.float64)

    def merge(total: Tensor) -> Tensor:
        merged = total + other
        merged[..., 1] = torch.maximum(total[..., 1], other[1])
        return merged

    policy = gradkern.GlobalNorm(1.0, norm_over="a")
    state = policy.init(layout(names=("a", "b"), shapes=((1,), (1,))))
    rows, total = gradkern.reference.measure([torch.tensor([3.0]), torch.tensor([9.0])])
    decision = policy.decide(Measured(total, rows, merge=merge), state)
    assert decision.coef is not None
    assert decision.coef.item() == pytest.approx(1 / 5, rel=1e-15)
