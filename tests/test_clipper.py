"""`Clipper` called by hand: what it follows, remembers and refuses. Oracles: `clip_`, and float64."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern
from gradkern import policies
from tests.backends import Backend
from tests.helpers import exact_norm, same_bits
from tests.no_sync import no_host_read
from tests.training import EVERY_POLICY, backward, network

NAN, INF = math.nan, math.inf


def grads_of(model: nn.Module) -> list[Tensor]:
    return [param.grad for param in model.parameters() if param.grad is not None]


def tensors_of(saved: object) -> list[Tensor]:
    """The tensors of a state dict, in order."""
    if isinstance(saved, Tensor):
        return [saved]
    if isinstance(saved, dict):
        saved = list(saved.values())
    return [tensor for part in saved for tensor in tensors_of(part)] if isinstance(saved, list) else []


def weight(*grad: float) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(len(grad)))
    made.grad = torch.tensor(grad)
    return made


# What a call does


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6, INF])
def test_a_number_clips_as_clip_does_to_the_bit(limit: float, backend: Backend) -> None:
    one, other = network(), network()
    backward(one, 0), backward(other, 0)
    mine, theirs = gradkern.Clipper(one, limit)(), gradkern.clip_(other, limit)
    assert all(map(same_bits, grads_of(one), grads_of(other)))
    assert (mine.norm, mine.coef, mine.names) == (theirs.norm, theirs.coef, theirs.names)


@pytest.mark.parametrize("policy", EVERY_POLICY[:-2], ids=repr)
def test_every_policy_writes_what_its_decision_says(policy: policies.Policy, backend: Backend) -> None:
    params = {name: nn.Parameter(torch.full((3, 2), 0.1)) for name in ("rnn", "head", "other")}
    for index, param in enumerate(params.values()):
        param.grad = torch.randn(3, 2) * 10**index
    before = [param.grad.double() for param in params.values()]
    rows = torch.stack(
        [torch.tensor([g.square().sum(), g.abs().max(), 0, 0, 0], dtype=torch.float64) for g in before]
    )
    total = torch.cat((rows[:, :1].sum(0), rows[:, 1:2].amax(0), torch.zeros(3)))
    units = policies.unit_sums(before, list(params.values()))
    weights = torch.tensor(
        [[param.detach().double().square().sum(), 0.1, 0, 0, 0] for param in params.values()]
    )
    measured = policies.Measured(total, rows, weights.double(), units, good=torch.tensor(True))
    layout = policies.Layout(tuple(params), ((3, 2),) * 3, torch.device("cpu"))
    decision = policy.decide(measured, policy.init(layout))

    gradkern.Clipper(params, policy)()

    coef = torch.ones(3) if decision.coef is None else decision.coef.expand(3)
    unit_coef = torch.ones(9) if decision.unit_coef is None else decision.unit_coef
    bound = torch.as_tensor(INF if decision.bound is None else decision.bound).expand(3)
    for index, (param, grad) in enumerate(zip(params.values(), before, strict=True)):
        wanted = grad * coef[index] * unit_coef[3 * index : 3 * index + 3, None]
        wanted = wanted.clamp(-bound[index], bound[index])
        torch.testing.assert_close(param.grad.double(), wanted, rtol=2e-7, atol=0)


@pytest.mark.parametrize("policy", EVERY_POLICY[:-2], ids=repr)
def test_clipped_norm_is_the_norm_that_is_left(policy: policies.Policy) -> None:
    params = {name: nn.Parameter(torch.full((3, 2), 0.1)) for name in ("rnn", "head", "other")}
    for param in params.values():
        param.grad = torch.randn(3, 2)
    stats = gradkern.Clipper(params, policy)()
    left = exact_norm([param.grad for param in params.values()])
    if isinstance(policy, policies.Value):
        assert math.isnan(stats.clipped_norm)
    else:
        assert stats.clipped_norm.item() == pytest.approx(left, rel=1e-6)


def test_nothing_is_written_where_nothing_is_clipped() -> None:
    param = weight(3.0, 4.0)
    clipper = gradkern.Clipper([param], policies.Chain(policies.TensorNorm(5.0), policies.Value(4.0)))
    version = param.grad._version
    clipper()
    assert param.grad._version == version


@pytest.mark.parametrize(
    ("word", "left"), [("keep", [NAN, 0.3, 0.4]), ("zero", [0.0, 0.3, 0.4]), ("propagate", [NAN, NAN, NAN])]
)
@pytest.mark.parametrize("policy", [0.5, policies.TensorNorm(0.5)], ids=repr)
def test_non_finite_words(word: str, left: list[float], policy: policies.Policy | float) -> None:
    param = weight(NAN, 3.0, 4.0)
    gradkern.Clipper([param], policy, nonfinite=word)()
    torch.testing.assert_close(param.grad, torch.tensor(left), equal_nan=True)


def test_raise_names_the_parameter_and_remembers_nothing() -> None:
    param = weight(NAN, 3.0)
    clipper = gradkern.Clipper({"w": param}, policies.ZClip(), nonfinite="raise")
    before = clipper.state_dict()
    with pytest.raises(gradkern.NonFiniteGradientError, match="'w': 1 NaN"):
        clipper()
    assert all(map(torch.equal, tensors_of(clipper.state_dict()), tensors_of(before)))
    assert param.grad[1] == 3.0


def test_a_bad_step_does_not_enter_the_history() -> None:
    param = weight(3.0)
    clipper = gradkern.Clipper([param], policies.Percentile(50))
    clipper()
    before = clipper.state_dict()["policy"]
    param.grad = torch.tensor([INF])
    clipper()
    assert all(map(torch.equal, tensors_of(clipper.state_dict()["policy"]), tensors_of(before)))


def test_a_parameter_without_a_gradient_keeps_its_place_in_the_history() -> None:
    one, other = weight(1.0), weight(5.0)
    clipper = gradkern.Clipper({"one": one, "other": other}, policies.AdaGC(warmup=1, max_norm=1e30))
    clipper()
    one.grad, other.grad = None, torch.tensor([50.0])
    stats = clipper()
    assert stats.names == ["other"]
    assert other.grad.item() == pytest.approx(1.04 * 5.0, rel=1e-6)


def test_no_gradients_at_all_are_a_step_of_norm_zero() -> None:
    clipper = gradkern.Clipper(network(), policies.ZClip())
    assert clipper().norm == 0
    assert clipper.metrics()["norm"] == 0


def test_main_grad_is_clipped_instead_of_grad() -> None:
    param = weight(30.0, 40.0)
    param.main_grad = torch.tensor([3.0, 4.0])
    stats = gradkern.Clipper({"w": param}, 1.0, grad_attr="main_grad")()
    torch.testing.assert_close(param.main_grad, torch.tensor([0.6, 0.8]))
    assert param.grad.tolist() == [30.0, 40.0]
    assert (stats.norm, stats.names) == (5.0, ["w"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_every_dtype(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(2, dtype=dtype))
    param.grad = torch.tensor([3.0, 4.0], dtype=dtype)
    gradkern.Clipper([param], policies.ZClip(max_norm=2.5))()
    assert param.grad.tolist() == [1.5, 2.0]


def test_sparse_gradients_are_clipped_by_their_values() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    gradkern.Clipper(embedding, policies.TensorNorm(1.0))()
    assert exact_norm([embedding.weight.grad]) == pytest.approx(1.0, rel=1e-6)


def test_sparse_gradients_have_no_units() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"'weight'.*is sparse"):
        gradkern.Clipper(embedding, policies.AGC())()


# What it follows


def test_a_frozen_parameter_is_left_out_once_it_has_no_gradient() -> None:
    model = network()
    clipper = gradkern.Clipper(model)
    model[0].requires_grad_(False)
    backward(model, 0)
    assert clipper().names == ["2.weight", "2.bias"]


def test_an_added_layer_is_clipped_and_the_others_keep_their_history() -> None:
    model = network()
    clipper = gradkern.Clipper(model, policies.AdaGC(warmup=1))
    backward(model, 0)
    clipper()
    before = clipper.state_dict()["policy"]["per_tensor"]["gamma"]
    model.append(nn.Linear(3, 3))
    model.zero_grad()
    backward(model, 1)
    assert "3.weight" in clipper().names
    saved = clipper.state_dict()["policy"]
    assert saved["names"][:4] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert saved["per_tensor"]["count"].tolist() == [1, 1, 1, 1, 1, 1]
    assert (saved["per_tensor"]["gamma"][:4] < 2 * before).all()


def test_a_replaced_parameter_is_followed() -> None:
    model = network()
    clipper = gradkern.Clipper(model, 1e-3)
    model[0].weight = nn.Parameter(torch.ones(7, 5))
    backward(model, 0)
    clipper()
    assert exact_norm(grads_of(model)) == pytest.approx(1e-3, rel=1e-6)


def test_a_removed_parameter_no_longer_counts() -> None:
    model = network()
    clipper = gradkern.Clipper(model)
    backward(model, 0)
    model[0].register_parameter("bias", None)
    assert clipper().names == ["0.weight", "2.weight", "2.bias"]


def test_swapped_data_and_another_dtype_are_followed() -> None:
    model = network()
    clipper = gradkern.Clipper(model, policies.TensorNorm(1e-3))
    backward(model, 0)
    clipper()
    model.zero_grad()
    model.double()
    model[0].weight.data = torch.ones(7, 5, dtype=torch.float64)
    backward_double = model(torch.randn(4, 5, dtype=torch.float64)).square().mean()
    backward_double.backward()
    clipper()
    assert all(exact_norm([grad]) <= 1e-3 * (1 + 1e-12) for grad in grads_of(model))


def test_tied_parameters_count_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    model["a"].weight.grad = torch.ones(2, 2)
    assert gradkern.Clipper(model)().norm == 2.0


def test_a_pattern_that_matches_nothing_any_more_raises_until_it_does_again() -> None:
    model = network()
    clipper = gradkern.Clipper(model, policies.GlobalNorm(1.0, apply_to="2.*"))
    last = model.pop(2)
    for _ in range(2):
        with pytest.raises(ValueError, match="matches no tensor"):
            clipper()
    model.add_module("2", last)
    backward(model, 0)
    clipper()


def test_two_threads_clip_two_models() -> None:
    models = [network(seed) for seed in range(2)]
    alone = [network(seed) for seed in range(2)]

    def run(model: nn.Module) -> None:
        clipper = gradkern.Clipper(model, policies.ZClip(max_norm=0.01))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(30):
            optimizer.zero_grad()
            backward(model, step)
            clipper()
            optimizer.step()

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, other in zip(models, alone, strict=True):
        run(other)
        assert all(map(same_bits, model.parameters(), other.parameters()))


# What it tells and saves


def test_metrics_of_a_run() -> None:
    param = weight(3.0, 4.0)
    clipper = gradkern.Clipper([param], 1.0)
    clipper()
    param.grad = torch.tensor([0.3, 0.4])
    clipper()
    metrics = clipper.metrics()
    assert metrics["norm"] == pytest.approx(0.5)
    assert metrics["clipped_norm"] == pytest.approx(0.5)
    assert (metrics["coef"], metrics["threshold"]) == (1.0, 1.0)
    assert (metrics["steps"], metrics["skipped_steps"], metrics["clipped_fraction"]) == (2, 0, 0.5)


def test_metrics_show_threshold_and_z_of_a_policy_that_has_them() -> None:
    clipper = gradkern.Clipper([weight(3.0)], policies.ZClip(max_norm=2.0))
    clipper()
    assert clipper.metrics()["threshold"] == 2.0
    assert clipper.metrics()["z"] == pytest.approx(3e6)


def test_clipped_fraction_is_of_the_last_hundred_steps() -> None:
    param = weight(2.0)
    clipper = gradkern.Clipper([param], 1.0)
    for step in range(130):
        param.grad = torch.tensor([2.0 if step < 60 else 0.5])
        clipper()
    assert clipper.metrics()["clipped_fraction"] == 0.3
    assert clipper.metrics()["steps"] == 130


def test_metrics_before_the_first_step_say_so() -> None:
    with pytest.raises(RuntimeError, match="no step"):
        gradkern.Clipper([weight(1.0)]).metrics()


@pytest.mark.parametrize("policy", EVERY_POLICY[:-2] + EVERY_POLICY[-1:], ids=repr)
def test_saving_and_loading_in_mid_stream_changes_no_bit(policy: policies.Policy) -> None:
    def run(interrupted: bool) -> tuple[list[Tensor], dict[str, float]]:
        params = {name: nn.Parameter(torch.full((3, 2), 0.1)) for name in ("rnn", "head", "other")}
        clipper = gradkern.Clipper(params, policy)
        generator = torch.Generator().manual_seed(3)
        for step in range(200):
            if interrupted and step == 131:
                saved = clipper.state_dict()
                clipper = gradkern.Clipper(params, policy)
                clipper.load_state_dict(saved)
            for param in params.values():
                param.grad = torch.randn(3, 2, generator=generator) * (10 if step % 7 == 0 else 1)
            clipper()
        return [param.grad for param in params.values()], clipper.metrics()

    (whole, metrics), (parts, metrics_of_parts) = run(False), run(True)
    assert all(map(same_bits, whole, parts))
    assert metrics == pytest.approx(metrics_of_parts, nan_ok=True)


def test_a_state_of_other_parameters_is_refused_by_name_and_nothing_is_loaded() -> None:
    clipper = gradkern.Clipper({"a": weight(1.0), "b": weight(1.0)}, policies.AdaGC())
    other = gradkern.Clipper({"a": weight(9.0), "c": weight(9.0)}, policies.AdaGC())
    other()
    before = clipper.state_dict()
    with pytest.raises(ValueError, match=r"Missing: \['b'\]. Unexpected: \['c'\]"):
        clipper.load_state_dict(other.state_dict())
    assert all(map(torch.equal, tensors_of(clipper.state_dict()), tensors_of(before)))


def test_a_state_can_be_loaded_for_the_names_in_both() -> None:
    clipper = gradkern.Clipper({"a": weight(1.0), "b": weight(1.0)}, policies.AdaGC())
    other = gradkern.Clipper({"a": weight(0.5), "c": weight(0.5)}, policies.AdaGC(max_norm=1.0))
    other()
    clipper.load_state_dict(other.state_dict(), strict=False)
    assert clipper.state_dict()["policy"]["per_tensor"]["gamma"].tolist() == [0.5, INF]


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"policy": {}},
        {"policy": {}, "tally": {"counts": torch.zeros(3)}},
        {"policy": None, "tally": None},
    ],
)
def test_what_is_no_state_is_refused(saved: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="load_state_dict"):
        gradkern.Clipper([weight(1.0)]).load_state_dict(saved)


@pytest.mark.parametrize("saved", [None, "run.pt"])
def test_what_is_no_mapping_is_no_state(saved: object) -> None:
    with pytest.raises(TypeError, match=f"needs what state_dict\\(\\) gave, got {saved!r}"):
        gradkern.Clipper([weight(1.0)]).load_state_dict(saved)  # type: ignore[arg-type]


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nonfinite": "drop"}, r"nonfinite must be one of 'keep', .* got 'drop'"),
        ({"apply": "later"}, r"apply must be one of 'auto', .* got 'later'"),
        ({"measure": "during"}, r"measure must be one of 'after', .* got 'during'"),
        ({"micro_batches": 0}, "micro_batches must be a whole number of at least 1, got 0"),
        ({"max_consecutive_skips": -1}, "max_consecutive_skips must be a whole number"),
        ({"measure": "backward", "grad_attr": "main_grad"}, "not 'main_grad'"),
        ({"policy": policies.GlobalNorm(1.0, apply_to="nothing*")}, "matches no tensor"),
        ({"policy": -1.0}, "must not be negative, got -1.0"),
    ],
)
def test_impossible_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradkern.Clipper(network(), **arguments)


def test_skip_needs_an_optimizer_to_skip() -> None:
    param = weight(3.0)
    with pytest.raises(ValueError, match="attach"):
        gradkern.Clipper([param], 1.0, nonfinite="skip")()
    assert param.grad.item() == 3.0


def test_a_policy_that_skips_needs_one_too() -> None:
    param = weight(3.0)
    clipper = gradkern.Clipper([param], policies.Chain(policies.SkipSpike(), policies.GlobalNorm(1.0)))
    with pytest.raises(ValueError, match="attach"):
        clipper()
    assert param.grad.item() == 3.0
    assert clipper.last is None


def test_deferring_needs_an_optimizer_to_defer_to() -> None:
    with pytest.raises(ValueError, match="attach"):
        gradkern.Clipper([weight(3.0)], apply="defer")()


def test_a_loss_that_is_needed_is_asked_for() -> None:
    clipper = gradkern.Clipper([weight(3.0)], policies.SkipSpike(loss=True))
    with pytest.raises(ValueError, match=r"clipper\(loss=loss\)"):
        clipper()


def test_what_is_no_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Clipper: 'w' is of type int"):
        gradkern.Clipper({"w": 3})


def test_a_gradient_that_cannot_be_written_is_named_and_the_others_are_left() -> None:
    one, other = weight(3.0, 4.0), nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(1).expand(2)
    with pytest.raises(TypeError, match=r"'other'.*share memory"):
        gradkern.Clipper({"one": one, "other": other}, 1.0)()
    assert one.grad.tolist() == [3.0, 4.0]


# Devices, compilers, graphs


@pytest.mark.parametrize("has_all", [True, False])
@pytest.mark.parametrize("policy", EVERY_POLICY[:-2] + EVERY_POLICY[-1:], ids=repr)
def test_no_policy_waits_for_a_device(policy: policies.Policy, has_all: bool) -> None:
    with FakeTensorMode():
        params = {
            name: nn.Parameter(torch.zeros(4, 3, device="cuda")) for name in ("rnn", "head", "other.bias")
        }
        clipper = gradkern.Clipper(params, policy)

        def step() -> None:
            for param in params.values():
                param.grad = torch.ones(4, 3, device="cuda")
            if not has_all:
                params["rnn"].grad = None
            stats = clipper(loss=torch.ones((), device="cuda"))
            assert stats.clipped_norm.device.type == "cuda"

        step()  # which gradients there are is uploaded once
        with no_host_read():
            step()


@pytest.mark.parametrize("word", ["keep", "zero", "propagate"])
def test_no_word_waits_for_a_device(word: str) -> None:
    with FakeTensorMode():
        param = nn.Parameter(torch.zeros(4, device="cuda"))
        clipper = gradkern.Clipper([param], 1.0, nonfinite=word)
        param.grad = torch.ones(4, device="cuda")
        with no_host_read():
            clipper()


@pytest.mark.parametrize(
    "policy",
    [
        policies.GlobalNorm(0.01),
        policies.ZClip(max_norm=0.01),
        policies.AdaGC(max_norm=0.01),
        policies.Chain(policies.AGC(), policies.TensorNorm(0.001), policies.Value(1e-4)),
    ],
    ids=repr,
)
def test_a_compiled_step_is_one_graph_and_gives_the_same_bits(policy: policies.Policy) -> None:
    torch._dynamo.reset()
    compiled, eager = network(), network()
    clippers = gradkern.Clipper(compiled, policy), gradkern.Clipper(eager, policy)
    step = torch.compile(lambda: clippers[0]().norm, fullgraph=True, backend="aot_eager")
    for number in range(3):
        for model in (compiled, eager):
            model.zero_grad()
            backward(model, number)
        assert step() == clippers[1]().norm
        assert all(map(same_bits, grads_of(compiled), grads_of(eager)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert clippers[0].metrics()["steps"] == 3


@pytest.mark.parametrize("policy", [p for p in EVERY_POLICY if p.needs.loss == "no"], ids=repr)
def test_state_stays_at_its_addresses_so_that_a_captured_graph_replays(policy: policies.Policy) -> None:
    params = {name: nn.Parameter(torch.full((3, 2), 0.1)) for name in ("rnn", "head", "other")}
    clipper = gradkern.Clipper(params, policy)

    def addresses() -> list[int]:
        stepper = clipper._stepper
        states = [stepper.state, *stepper.state.stages]
        held = [
            tensor
            for state in states
            for part in (state.shared, state.per_tensor)
            for tensor in part.values()
        ]
        return [tensor.data_ptr() for tensor in (*held, stepper.tally.counts, stepper.tally.clipped)]

    before = addresses()
    for _ in range(3):
        for param in params.values():
            param.grad = torch.randn(3, 2)
        clipper()
    assert addresses() == before


def test_it_says_what_it_is() -> None:
    model = nn.Linear(2, 2)
    clipper = gradkern.Clipper(model, gradkern.Value(0.5))
    assert repr(clipper) == f"Clipper({gradkern.Value(0.5)!r}, 2 parameters)"
    clipper.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert repr(clipper).endswith(", 2 parameters, attached)")


def test_metrics_show_the_z_of_the_norm_of_a_chain_that_skips() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = gradkern.Clipper(model, policies.Chain(policies.SkipSpike(), policies.GlobalNorm(1.0)))
    clipper.attach(optimizer)
    backward(model, 0)
    optimizer.step()
    assert "z" in clipper.metrics()
