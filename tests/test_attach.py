"""Clipping inside `optimizer.step()`. Oracle: `clip_` before each step, without the bad batches."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import tensor as dtensor

import gradkern
from gradkern import policies
from tests.helpers import same_bits
from tests.no_sync import no_host_read
from tests.training import (
    EVERY_POLICY,
    FUSED,
    OTHERS,
    MakeOptimizer,
    Optimizer,
    backward,
    largest_difference,
    network,
    train_rnn,
    weights,
)

NAN, INF = math.nan, math.inf
LIMIT = 1.2  # clips between a quarter and all of the steps below

SKIPPERS = FUSED | OTHERS
DAMPED: dict[str, MakeOptimizer] = {
    "damped sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.1, fused=True)
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # thousands of steps so small that a second thread costs more than it saves


def clipped_by_hand(
    make: MakeOptimizer, steps: int, leave_out: Collection[int] = (), micro_batches: int = 1
) -> tuple[nn.Module, Optimizer]:
    model = network()
    optimizer = make(model.parameters())
    for step in range(steps):
        if step in leave_out:
            continue
        optimizer.zero_grad()
        for part in range(micro_batches):
            backward(model, 1000 * part + step)
        gradkern.clip_(model.named_parameters(), LIMIT)
        optimizer.step()
    return model, optimizer


def clipped_in_step(
    make: MakeOptimizer,
    steps: int,
    poison: Collection[int] = (),
    micro_batches: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    unscale_first: bool = False,
    **arguments: Any,
) -> tuple[nn.Module, Optimizer, gradkern.Clipper]:
    model = network()
    optimizer = make(model.parameters())
    clipper = gradkern.Clipper(model, LIMIT, **arguments).attach(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(micro_batches):
            backward(model, 1000 * part + step, 1.0 if scaler is None else scaler.scale(torch.ones(())))
        if step in poison:
            model[0].weight.grad[1, 2] = NAN
        if scaler is None:
            optimizer.step()
            continue
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer, clipper


def scaler_of(initial: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=10**6)


def state_of(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if value is not None]


def same_run(one: tuple[nn.Module, Optimizer], other: tuple[nn.Module, Optimizer]) -> bool:
    """Parameters, moments and step counters, to the bit."""
    mine = [*one[0].parameters(), *map(torch.as_tensor, state_of(one[1]))]
    theirs = [*other[0].parameters(), *map(torch.as_tensor, state_of(other[1]))]
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


# Equal to clipping before the step


@pytest.mark.parametrize("scaled", ["no scaler", "scaler", "unscaled first"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", SKIPPERS)
def test_eager_equals_clip_then_step_to_the_bit(name: str, micro_batches: int, scaled: str) -> None:
    scaler = None if scaled == "no scaler" else scaler_of()
    model, optimizer, clipper = clipped_in_step(
        SKIPPERS[name], 200, (), micro_batches, scaler, scaled == "unscaled first", apply="eager"
    )
    assert same_run((model, optimizer), clipped_by_hand(SKIPPERS[name], 200, (), micro_batches))
    assert clipper.metrics()["clipped_fraction"] > 0.1


@pytest.mark.parametrize("apply", ["defer", "auto"])
@pytest.mark.parametrize("scaled", ["no scaler", "scaler", "unscaled first"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", FUSED)
def test_deferred_equals_clip_then_step(name: str, micro_batches: int, scaled: str, apply: str) -> None:
    scaler = None if scaled == "no scaler" else scaler_of()
    model, _, _ = clipped_in_step(
        FUSED[name], 200, (), micro_batches, scaler, scaled == "unscaled first", apply=apply
    )
    expected, _ = clipped_by_hand(FUSED[name], 200, (), micro_batches)
    assert largest_difference(weights(model), weights(expected)) < 1e-6


@pytest.mark.parametrize("name", FUSED)
def test_a_step_that_is_not_clipped_is_the_plain_step_to_the_bit(name: str) -> None:
    model, plain = network(), network()
    optimizer, plain_optimizer = FUSED[name](model.parameters()), FUSED[name](plain.parameters())
    gradkern.Clipper(model, 1e9).attach(optimizer)
    for step in range(5):
        for one, of_it in ((model, optimizer), (plain, plain_optimizer)):
            of_it.zero_grad()
            backward(one, step)
            of_it.step()
    assert same_run((model, optimizer), (plain, plain_optimizer))


def test_deferring_leaves_the_division_to_the_optimizer() -> None:
    model, handed = network(), []
    optimizer = FUSED["adamw"](model.parameters())
    gradkern.Clipper(model, LIMIT, apply="defer").attach(optimizer)
    optimizer.register_step_pre_hook(lambda *_: handed.append(optimizer.grad_scale.clone()))
    backward(model, 0)
    norm = gradkern.measure(model).norm
    versions = [param.grad._version for param in model.parameters()]
    optimizer.register_step_pre_hook(
        lambda *_: handed.append([param.grad._version for param in model.parameters()])
    )
    optimizer.step()
    assert handed[1] == versions
    assert handed[0].dtype == torch.float32
    assert handed[0].item() == pytest.approx(max(1.0, norm.item() / LIMIT), rel=1e-7)


@pytest.mark.parametrize("policy", EVERY_POLICY[:-2] + EVERY_POLICY[-1:], ids=repr)
@pytest.mark.parametrize("scaled", [False, True])
def test_every_policy_does_in_the_step_what_it_does_by_hand(policy: policies.Policy, scaled: bool) -> None:
    def run(attached: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"rnn": nn.Linear(5, 7), "head": nn.Linear(7, 3)})
        optimizer = FUSED["sgd"](model.parameters())
        clipper = gradkern.Clipper(model, policy, apply="eager")
        if attached:
            clipper.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled and attached, init_scale=256.0)
        for step in range(10):
            optimizer.zero_grad()
            data = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            scaler.scale(model["head"](model["rnn"](data).tanh()).square().mean()).backward()
            if not attached:
                clipper()
            scaler.step(optimizer)
            scaler.update()
        return weights(model)

    assert all(map(same_bits, run(True), run(False)))


# Skipping


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("poison", [(0,), (0, 1, 5), (7,), (19,)], ids=str)
@pytest.mark.parametrize("name", SKIPPERS | DAMPED)
def test_a_run_with_poisoned_batches_ends_as_one_without_them(
    name: str, poison: tuple[int, ...], scaled: bool
) -> None:
    make = (SKIPPERS | DAMPED)[name]
    model, optimizer, clipper = clipped_in_step(
        make, 20, poison, scaler=scaler_of(2.0**20) if scaled else None, apply="eager"
    )
    assert same_run((model, optimizer), clipped_by_hand(make, 20, poison))
    assert clipper.metrics()["skipped_steps"] == len(poison)


@pytest.mark.parametrize("apply", ["auto", "defer"])
@pytest.mark.parametrize("name", FUSED)
def test_a_skipped_step_leaves_no_trace_where_the_division_is_deferred(name: str, apply: str) -> None:
    model, optimizer, _ = clipped_in_step(FUSED[name], 10, (0, 4), apply=apply)
    expected, expected_optimizer = clipped_by_hand(FUSED[name], 10, (0, 4))
    assert largest_difference(weights(model), weights(expected)) < 1e-6
    assert largest_difference(state_of(optimizer), state_of(expected_optimizer)) < 1e-6


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", SKIPPERS)
def test_if_every_step_is_bad_nothing_moves(name: str, scaled: bool) -> None:
    scaler = scaler_of(2.0**20) if scaled else None
    model, optimizer, _ = clipped_in_step(SKIPPERS[name], 6, range(6), scaler=scaler)
    assert all(map(same_bits, model.parameters(), network().parameters()))
    # The fused ones have made their state by then; it must be that of no step at all. Adagrad sums from 0.
    assert all(not torch.as_tensor(value).any() for value in state_of(optimizer))


def test_a_bad_gradient_is_there_again_after_the_step() -> None:
    model, _, _ = clipped_in_step(OTHERS["rmsprop"], 1, (0,))
    assert model[0].weight.grad[1, 2].isnan()
    assert model[2].bias.grad is not None


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_a_bad_step_does_not_enter_the_history(name: str) -> None:
    def histories(poison: Collection[int], steps: int) -> Tensor:
        model = network()
        optimizer = SKIPPERS[name](model.parameters())
        clipper = gradkern.Clipper(model, policies.Percentile(50)).attach(optimizer)
        for step in range(steps):
            optimizer.zero_grad()
            backward(model, step)
            if step in poison:
                model[2].bias.grad[0] = INF
            optimizer.step()
        return clipper.state_dict()["policy"]["shared"]["norms"]

    assert torch.equal(histories((3,), 4), histories((), 3))


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop"])
def test_a_step_that_the_policy_skips_leaves_no_trace(name: str) -> None:
    model = network()
    optimizer = SKIPPERS[name](model.parameters())
    policy = policies.Chain(policies.SkipSpike(None, max_norm=1e3), policies.GlobalNorm(LIMIT))
    gradkern.Clipper(model, policy, apply="eager").attach(optimizer)
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step, 1e6 if step == 2 else 1.0)
        optimizer.step()
    assert same_run((model, optimizer), clipped_by_hand(SKIPPERS[name], 6, (2,)))


def test_the_loss_of_a_step_reaches_the_policy_and_holds_for_that_step() -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    clipper = gradkern.Clipper(model, policies.SkipSpike(warmup=2, loss=True)).attach(optimizer)
    for loss in (1.0, 1.1, 0.9, NAN):
        backward(model, 0)
        clipper.loss = torch.tensor(loss, requires_grad=True)
        assert not clipper.loss.requires_grad
        optimizer.step()
    assert clipper.metrics()["skipped_steps"] == 1
    with pytest.raises(ValueError, match=r"clipper.loss = loss"):
        optimizer.step()


@pytest.mark.parametrize(
    ("word", "left"), [("keep", [NAN, 0.3, 0.4]), ("zero", [0.0, 0.3, 0.4]), ("propagate", [NAN] * 3)]
)
@pytest.mark.parametrize("apply", ["eager", "auto"])
def test_other_words_do_what_they_say_in_the_step(word: str, left: list[float], apply: str) -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([NAN, 3.0, 4.0])
    optimizer = torch.optim.SGD([param], lr=1.0, fused=True)
    gradkern.Clipper([param], 0.5, nonfinite=word, apply=apply).attach(optimizer)
    optimizer.step()
    torch.testing.assert_close(param.detach(), -torch.tensor(left), equal_nan=True)


def test_raise_stops_before_the_optimizer_moves() -> None:
    with pytest.raises(gradkern.NonFiniteGradientError, match=r"'0.weight': 1 NaN"):
        clipped_in_step(FUSED["adamw"], 1, (0,), nonfinite="raise")


def test_too_many_skips_in_a_row_raise_two_steps_later() -> None:
    with pytest.raises(gradkern.NonFiniteGradientError) as raised:
        clipped_in_step(FUSED["adamw"], 20, range(3, 20), max_consecutive_skips=4)
    message = str(raised.value)
    assert "5 steps in a row have been skipped, from step 4 to 8" in message
    assert "'0.weight': 1 NaN" in message
    assert raised.value.stats is not None


@pytest.mark.parametrize("last", [9, 10])
def test_the_limit_on_skips_is_looked_at_with_a_fixed_lag(last: int) -> None:
    """The fifth bad step is number 8, so that nothing is raised before step 10 whatever happens then."""
    raises = pytest.raises(gradkern.NonFiniteGradientError) if last == 10 else contextlib.nullcontext()
    with raises:
        clipped_in_step(FUSED["adamw"], last, range(3, 8), max_consecutive_skips=4)


def test_good_steps_between_bad_ones_start_the_count_anew() -> None:
    _, _, clipper = clipped_in_step(
        FUSED["adamw"], 20, [step for step in range(20) if step % 3], max_consecutive_skips=2
    )
    assert clipper.metrics()["skipped_steps"] == 13


def test_none_sets_no_limit_on_skips() -> None:
    _, _, clipper = clipped_in_step(FUSED["adamw"], 40, range(40), max_consecutive_skips=None)
    assert clipper.metrics()["skipped_steps"] == 40


def test_a_policy_that_skips_for_ever_names_the_largest_gradients() -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    policy = policies.SkipSpike(None, max_norm=0.0)
    gradkern.Clipper(model, policy, max_consecutive_skips=1).attach(optimizer)
    backward(model, 0)
    for _ in range(3):
        optimizer.step()
    with pytest.raises(gradkern.NonFiniteGradientError, match=r"the largest gradients, all finite.*'\d"):
        optimizer.step()


# The contract with fused optimizers and GradScaler, trap by trap


def handed_over(optimizer: Optimizer) -> list[dict[str, object]]:
    """What the optimizer sees in each step, in a list that grows."""
    seen: list[dict[str, object]] = []
    words = ("grad_scale", "found_inf")
    optimizer.register_step_pre_hook(
        lambda *_: seen.append({word: getattr(optimizer, word, None) for word in words})
    )
    return seen


def test_found_inf_is_one_number_of_float32_and_exactly_one() -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    gradkern.Clipper(model).attach(optimizer)
    seen = handed_over(optimizer)
    backward(model, 0)
    model[0].weight.grad.fill_(INF)
    optimizer.step()
    flag = seen[0]["found_inf"]
    assert (flag.shape, flag.dtype, flag.item()) == ((), torch.float32, 1.0)


@pytest.mark.parametrize("apply", ["eager", "defer", "auto"])
@pytest.mark.parametrize("poison", [(), (0,)])
@pytest.mark.parametrize("name", FUSED)
def test_no_attribute_stays_behind(name: str, poison: tuple[int, ...], apply: str) -> None:
    _, optimizer, _ = clipped_in_step(FUSED[name], 2, poison, apply=apply)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_a_step_that_raises_leaves_nothing_behind_for_the_next(name: str) -> None:
    model = network()
    optimizer = SKIPPERS[name](model.parameters())
    gradkern.Clipper(model, LIMIT, apply="auto").attach(optimizer)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for poisoned in (False, True):
        backward(model, 0)
        if poisoned:
            model[0].weight.grad.fill_(NAN)
        handle = optimizer.register_step_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        handle.remove()
        seen = handed_over(optimizer)
        before = weights(model)
        model[0].weight.grad = torch.full((7, 5), 1e-9)
        for param in list(model.parameters())[1:]:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        assert seen[-1] == {"grad_scale": None, "found_inf": None}
        assert largest_difference(before, weights(model)) > 0
        optimizer.zero_grad()


def test_a_flag_that_several_devices_have_raised_still_skips() -> None:
    """GradScaler adds up one flag for each device; the kernels take 2 for no reason to skip."""
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    gradkern.Clipper(model).attach(optimizer)
    backward(model, 0)
    optimizer.found_inf = torch.tensor(2.0)
    optimizer.step()
    assert all(map(same_bits, model.parameters(), network().parameters()))
    assert optimizer.found_inf == 2.0


def test_what_the_scaler_has_found_and_what_the_policy_skips_are_both_skipped() -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    policy = policies.Chain(policies.SkipSpike(None, max_norm=1e3), policies.GlobalNorm(LIMIT))
    clipper = gradkern.Clipper(model, policy).attach(optimizer)
    scaler = scaler_of()
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(torch.ones(()))
        backward(model, step, scaler.get_scale() * {2: 1e6, 4: INF}.get(step, 1.0))
        scaler.step(optimizer)
        scaler.update()
    expected, _ = clipped_by_hand(FUSED["adamw"], 6, (2, 4))
    assert largest_difference(weights(model), weights(expected)) < 1e-6
    assert clipper.metrics()["skipped_steps"] == 2
    assert scaler.get_scale() == 512.0  # once: a spike is no reason to lower the scale


@pytest.mark.parametrize("name", OTHERS)
def test_a_skip_under_a_scaler_is_heard_of_with_every_optimizer(name: str) -> None:
    scaler = scaler_of()
    _, _, clipper = clipped_in_step(OTHERS[name], 4, (1, 2), scaler=scaler)
    assert clipper.metrics()["skipped_steps"] == 2
    assert scaler.get_scale() == 256.0


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_what_is_told_of_scaled_gradients_is_without_the_scale(name: str) -> None:
    def last(scaler: torch.amp.GradScaler | None) -> gradkern.GradStats:
        _, _, clipper = clipped_in_step(SKIPPERS[name], 1, scaler=scaler)
        assert clipper.last is not None
        return clipper.last

    plain, scaled = last(None), last(scaler_of())
    assert scaled.norm.item() == pytest.approx(plain.norm.item(), rel=1e-12)
    assert scaled.abs_max.item() == pytest.approx(plain.abs_max.item(), rel=1e-12)
    assert scaled.coef.item() == pytest.approx(plain.coef.item(), rel=1e-12)


@pytest.mark.parametrize("name", FUSED)
def test_under_a_scaler_unscaling_and_clipping_are_one_division(name: str) -> None:
    model = network()
    optimizer = FUSED[name](model.parameters())
    gradkern.Clipper(model, LIMIT).attach(optimizer)
    seen = handed_over(optimizer)
    scaler = scaler_of()
    backward(model, 0, scaler.scale(torch.ones(())))
    norm = gradkern.measure(model).norm.item() / 1024
    scaler.step(optimizer)
    assert seen[0]["grad_scale"].item() == pytest.approx(1024 * max(1, norm / LIMIT), rel=1e-7)


@pytest.mark.parametrize("name", FUSED)
def test_a_divisor_beyond_float32_is_made_up_for_by_writing(name: str) -> None:
    param = nn.Parameter(torch.zeros(4))
    optimizer = FUSED[name]([param])
    gradkern.Clipper([param], 1e-3, apply="defer").attach(optimizer)
    param.grad = torch.full((4,), 3e38)
    optimizer.step()
    torch.testing.assert_close(param.grad, torch.full((4,), 5e-4), rtol=1e-6, atol=0)


def test_a_limit_of_zero_leaves_nothing_of_the_gradients() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=1.0, fused=True)
    gradkern.Clipper([param], 0.0, apply="defer").attach(optimizer)
    param.grad = torch.ones(2)
    optimizer.step()
    assert param.tolist() == [1.0, 1.0]


def test_coefficients_per_tensor_are_written_and_the_scale_divided_out() -> None:
    one, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([one, other], lr=1.0, fused=True)
    gradkern.Clipper({"one": one, "other": other}, policies.TensorNorm(1.0)).attach(optimizer)
    scaler = scaler_of()
    scaler.scale(torch.ones(()))
    one.grad, other.grad = torch.tensor([4.0 * 1024]), torch.tensor([0.5 * 1024])
    scaler.step(optimizer)
    assert (one.item(), other.item()) == (-1.0, -0.5)


def test_an_element_bound_holds_for_unscaled_elements() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param], lr=1.0, fused=True)
    gradkern.Clipper([param], policies.Value(0.5)).attach(optimizer)
    scaler = scaler_of()
    scaler.scale(torch.ones(()))
    param.grad = torch.tensor([4.0 * 1024, 0.25 * 1024])
    scaler.step(optimizer)
    assert param.tolist() == [-0.5, -0.25]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_sharded_parameters_without_a_fused_kernel_are_refused(kind: type[Optimizer], one_rank: None) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    param = nn.Parameter(dtensor.distribute_tensor(torch.zeros(4), mesh, [dtensor.Shard(0)]))
    with pytest.raises(ValueError, match=rf"no fused {kind.__name__} for sharded parameters.*foreach=True"):
        gradkern.Clipper([param]).attach(kind([param], lr=0.1, fused=True))


@pytest.fixture
def one_rank() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# What it follows


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_groups_that_are_not_to_be_clipped_are_neither_measured_nor_scaled(name: str) -> None:
    model = network()
    optimizer = SKIPPERS[name](model[0].parameters())
    optimizer.add_param_group({"params": list(model[2].parameters()), "clip_grad": False})
    clipper = gradkern.Clipper(model, 1e-3, apply="auto").attach(optimizer)
    backward(model, 0)
    left = [param.grad.clone() for param in model[2].parameters()]
    optimizer.step()
    assert clipper.last.names == ["0.weight", "0.bias"]
    assert gradkern.measure(model[0]).norm.item() == pytest.approx(1e-3, rel=1e-6)
    assert all(map(same_bits, left, (param.grad for param in model[2].parameters())))


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_under_a_scaler_groups_that_are_not_clipped_are_unscaled(name: str) -> None:
    def run(scaler: torch.amp.GradScaler) -> nn.Module:
        model = network()
        optimizer = SKIPPERS[name](model[0].parameters())
        optimizer.add_param_group({"params": list(model[2].parameters()), "clip_grad": False})
        gradkern.Clipper(model, 1e-3, apply="eager").attach(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, 5) * step).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        return model

    one, other = run(scaler_of()), run(torch.amp.GradScaler("cpu", enabled=False))
    assert all(map(same_bits, one.parameters(), other.parameters()))


def test_a_bad_gradient_in_a_group_that_is_not_clipped_skips_the_step() -> None:
    model = network()
    optimizer = FUSED["adamw"](model[0].parameters())
    optimizer.add_param_group({"params": list(model[2].parameters()), "clip_grad": False})
    gradkern.Clipper(model).attach(optimizer)
    backward(model, 0)
    model[2].bias.grad[0] = NAN
    optimizer.step()
    assert all(map(same_bits, model.parameters(), network().parameters()))


def test_the_key_may_change_between_steps() -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    clipper = gradkern.Clipper(model).attach(optimizer)
    backward(model, 0)
    optimizer.step()
    optimizer.param_groups[0]["clip_grad"] = False
    optimizer.step()
    assert clipper.last.names == []


def test_muon_goes_unclipped_beside_a_clipped_optimizer() -> None:
    model = network()
    matrices = [param for param in model.parameters() if param.dim() == 2]
    vectors = [param for param in model.parameters() if param.dim() == 1]
    muon, adamw = torch.optim.Muon([{"params": matrices, "clip_grad": False}]), FUSED["adamw"](vectors)
    clippers = [gradkern.Clipper(model, 1e-3).attach(optimizer) for optimizer in (muon, adamw)]
    backward(model, 0)
    before = [param.grad.clone() for param in matrices]
    muon.step()
    adamw.step()
    assert all(map(same_bits, before, (param.grad for param in matrices)))
    assert [clipper.last.names for clipper in clippers] == [[], ["0.bias", "2.bias"]]


def test_a_clipper_looks_at_what_its_optimizer_steps_and_nothing_else() -> None:
    model = network()
    first, second = FUSED["adamw"](model[0].parameters()), FUSED["sgd"](model[2].parameters())
    clippers = [gradkern.Clipper(model).attach(optimizer) for optimizer in (first, second)]
    backward(model, 0)
    first.step()
    second.step()
    assert [clipper.last.names for clipper in clippers] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]


def test_a_group_added_to_the_optimizer_is_clipped() -> None:
    model = network()
    optimizer = FUSED["adamw"](model[0].parameters())
    clipper = gradkern.Clipper(model, policies.AdaGC(warmup=1)).attach(optimizer)
    backward(model, 0)
    optimizer.step()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.step()
    assert clipper.last.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert clipper.state_dict()["policy"]["per_tensor"]["count"].tolist() == [1, 1, 1, 1]


def test_a_state_loaded_into_the_optimizer_changes_nothing() -> None:
    _, optimizer, _ = clipped_in_step(FUSED["adamw"], 3)
    model, other, clipper = clipped_in_step(FUSED["adamw"], 3)
    other.load_state_dict(optimizer.state_dict())
    backward(model, 3)
    other.step()
    assert len(clipper.last.names) == 4


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_gradients_freed_made_anew_or_swapped_between_steps(name: str) -> None:
    model = network()
    optimizer = SKIPPERS[name](model.parameters())
    clipper = gradkern.Clipper(model, LIMIT).attach(optimizer)
    backward(model, 0)
    optimizer.step()
    model[0].weight.grad = None
    model[0].bias.grad = torch.full((7,), 3.0)
    model[2].weight.grad.data = torch.full((3, 7), NAN)
    model[2].bias.data = model[2].bias.data.clone()
    before = weights(model)
    optimizer.step()
    assert clipper.last.names == ["0.bias", "2.weight", "2.bias"]
    assert all(map(same_bits, before, weights(model)))


def test_bfloat16_models() -> None:
    model = network().bfloat16()
    optimizer = FUSED["adamw"](model.parameters())
    gradkern.Clipper(model, LIMIT).attach(optimizer)
    model(torch.ones(2, 5, dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
    assert gradkern.measure(model).norm.item() == pytest.approx(LIMIT, rel=4e-3)


def test_an_optimizer_without_gradients_steps_as_without_a_clipper() -> None:
    model = network()
    for make in (FUSED["adamw"], OTHERS["rmsprop"]):
        optimizer = make(model.parameters())
        gradkern.Clipper(model).attach(optimizer)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        assert all(map(torch.equal, model.parameters(), before))


# Attaching, detaching, and what is refused


def test_detaching_leaves_the_optimizer_as_it_was() -> None:
    model = network()
    for make in (FUSED["adamw"], OTHERS["rmsprop"]):
        optimizer = make(model.parameters())
        before = {key: value for key, value in vars(optimizer).items() if not key.startswith("_zero_grad")}
        hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
        clipper = gradkern.Clipper(model).attach(optimizer)
        clipper.detach()
        after = {key: value for key, value in vars(optimizer).items() if not key.startswith("_zero_grad")}
        assert after == before
        assert hooks == (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks))


def test_after_detaching_it_can_be_called_by_hand_or_attached_again() -> None:
    model = network()
    optimizer = FUSED["adamw"](model[0].parameters())
    clipper = gradkern.Clipper(model).attach(optimizer)
    clipper.detach()
    backward(model, 0)
    assert len(clipper().names) == 4
    clipper.attach(optimizer)


def test_an_attached_clipper_is_not_called_by_hand() -> None:
    model = network()
    clipper = gradkern.Clipper(model).attach(FUSED["adamw"](model.parameters()))
    backward(model, 0)
    with pytest.raises(RuntimeError, match="it is attached"):
        clipper()


def test_detaching_what_is_not_attached_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not attached"):
        gradkern.Clipper(network()).detach()


def test_attaching_twice_is_refused() -> None:
    model = network()
    optimizer, other = FUSED["adamw"](model.parameters()), FUSED["sgd"](model.parameters())
    clipper = gradkern.Clipper(model).attach(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        clipper.attach(other)
    with pytest.raises(ValueError, match="attached to this AdamW already"):
        gradkern.Clipper(model).attach(optimizer)


def test_an_optimizer_of_other_parameters_is_refused_and_nothing_has_changed() -> None:
    model, other = network(), network()
    optimizer = FUSED["adamw"](other.parameters())
    clipper = gradkern.Clipper(model)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\] of the AdamW"):
        clipper.attach(optimizer)
    backward(model, 0)
    assert len(clipper().names) == 4
    assert len(optimizer._optimizer_step_pre_hooks) == 0


def test_a_pattern_that_matches_nothing_that_is_stepped_is_refused() -> None:
    model = network()
    clipper = gradkern.Clipper(model, policies.GlobalNorm(1.0, apply_to="2.*"))
    with pytest.raises(ValueError, match="matches no tensor"):
        clipper.attach(FUSED["adamw"](model[0].parameters()))
    backward(model, 0)
    assert len(clipper().names) == 4


def test_lbfgs_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="LBFGS computes gradients inside its step"):
        gradkern.Clipper(model).attach(torch.optim.LBFGS(model.parameters()))


def test_a_closure_is_refused() -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    gradkern.Clipper(model).attach(optimizer)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="needs an optimizer of torch, got Linear"):
        gradkern.Clipper(network()).attach(nn.Linear(1, 1))


def test_deferring_to_an_optimizer_that_does_not_divide_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="For this RMSprop"):
        gradkern.Clipper(model, apply="defer").attach(OTHERS["rmsprop"](model.parameters()))


def test_deferring_more_than_one_factor_is_refused_before_anything_is_remembered() -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    clipper = gradkern.Clipper(model, policies.AdaGC(), apply="defer").attach(optimizer)
    backward(model, 0)
    with pytest.raises(ValueError, match="one factor for all gradients"):
        optimizer.step()
    assert clipper.state_dict()["policy"]["per_tensor"]["count"].tolist() == [0, 0, 0, 0]


def test_main_grad_is_not_what_an_optimizer_steps() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"steps by .grad, but the clipper looks at .main_grad"):
        gradkern.Clipper(model, grad_attr="main_grad").attach(FUSED["adamw"](model.parameters()))


# Devices


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks believe that no number of this step can be read."""
    blind = types.SimpleNamespace(is_readable=lambda _: False)
    monkeypatch.setattr(gradkern.attach, "reference", blind)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("poison", [(0,), (0, 1, 5), (7,)], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_a_flag_that_the_host_does_not_know_skips_without_a_trace(
    name: str, poison: tuple[int, ...], scaled: bool, on_a_device: None
) -> None:
    scaler = scaler_of(2.0**20) if scaled else None
    run = clipped_in_step(FUSED[name], 20, poison, scaler=scaler, apply="eager")
    assert same_run(run[:2], clipped_by_hand(FUSED[name], 20, poison))


def test_bad_gradients_are_not_scaled_where_the_host_does_not_know(on_a_device: None) -> None:
    model, _, _ = clipped_in_step(FUSED["adamw"], 1, (0,), apply="eager")
    expected = network()
    backward(expected, 0)
    assert same_bits(model[2].weight.grad, expected[2].weight.grad)


@pytest.mark.parametrize("name", [*OTHERS, *DAMPED])
def test_where_the_host_must_read_the_flag_it_says_so_once(name: str, on_a_device: None) -> None:
    make = (OTHERS | DAMPED)[name]
    with pytest.warns(UserWarning, match="must be read from the device") as warned:
        run = clipped_in_step(make, 10, (0, 3), apply="eager")
    assert len(warned) == 1
    assert same_run(run[:2], clipped_by_hand(make, 10, (0, 3)))


def test_auto_defers_once_most_steps_are_clipped(on_a_device: None) -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    gradkern.Clipper(model, 1e-3).attach(optimizer)
    seen = handed_over(optimizer)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    assert [one["grad_scale"] is not None for one in seen] == [False, False, True, True, True]


def test_auto_writes_while_few_steps_are_clipped(on_a_device: None) -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    gradkern.Clipper(model, 1e9).attach(optimizer)
    seen = handed_over(optimizer)
    for step in range(5):
        backward(model, step)
        optimizer.step()
    assert [one["grad_scale"] for one in seen] == [None] * 5


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=repr)
@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad"])
def test_no_policy_waits_for_a_device_when_attached(name: str, policy: policies.Policy) -> None:
    """The hooks alone: torch's fused kernels, which run between them, want a driver even for fake tensors."""
    with FakeTensorMode():
        params = {part: nn.Parameter(torch.zeros(4, 3, device="cuda")) for part in ("rnn", "head", "other")}
        optimizer = FUSED[name](list(params.values()))
        clipper = gradkern.Clipper(params, policy).attach(optimizer)
        for param in params.values():
            param.grad = torch.ones(4, 3, device="cuda")
        with no_host_read():
            step_hooks(optimizer)
        assert clipper.last.norm.device.type == "cuda"


@pytest.mark.parametrize(
    "policy", [EVERY_POLICY[0], EVERY_POLICY[2], EVERY_POLICY[4], EVERY_POLICY[7]], ids=repr
)
@pytest.mark.parametrize("apply", ["auto", "eager"])
def test_no_scaler_and_no_group_that_is_not_clipped_makes_it_wait(
    policy: policies.Policy, apply: str
) -> None:
    with FakeTensorMode():
        params = {part: nn.Parameter(torch.zeros(4, 3, device="cuda")) for part in ("rnn", "head", "other")}
        optimizer = FUSED["adamw"]([params["rnn"], params["head"]])
        optimizer.add_param_group({"params": [params["other"]], "clip_grad": apply == "auto"})
        gradkern.Clipper(params, policy, apply=apply).attach(optimizer)
        for param in params.values():
            param.grad = torch.ones(4, 3, device="cuda")
        optimizer.grad_scale = torch.ones((), device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
        with no_host_read():
            step_hooks(optimizer)


def test_on_a_device_the_flag_is_handed_over_whatever_it_says() -> None:
    with FakeTensorMode():
        param = nn.Parameter(torch.zeros(4, device="cuda"))
        optimizer = FUSED["adamw"]([param])
        gradkern.Clipper([param]).attach(optimizer)
        param.grad = torch.ones(4, device="cuda")
        with no_host_read():
            seen = step_hooks(optimizer)
        assert (seen["found_inf"].shape, seen["found_inf"].dtype) == ((), torch.float32)
        assert seen["grad_scale"] is None
        assert not hasattr(optimizer, "found_inf")


def test_on_a_device_fused_sgd_starts_from_a_momentum_of_zero() -> None:
    with FakeTensorMode():
        param = nn.Parameter(torch.zeros(4, device="cuda"))
        optimizer = FUSED["sgd"]([param])
        gradkern.Clipper([param]).attach(optimizer)
        param.grad = torch.ones(4, device="cuda")
        with no_host_read():
            step_hooks(optimizer)
        assert optimizer.state[param]["momentum_buffer"].shape == (4,)


def step_hooks(optimizer: Optimizer) -> dict[str, Any]:
    """Run what runs before and after a step; returns what the step would have seen."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        hook(optimizer, (optimizer,), {})
    seen = {word: getattr(optimizer, word, None) for word in ("grad_scale", "found_inf")}
    for hook in optimizer._optimizer_step_post_hooks.values():
        hook(optimizer, (optimizer,), {})
    return seen


# Training


@pytest.fixture(scope="module")
def unclipped_loss() -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loss = train_rnn(None)
    torch.set_num_threads(threads)
    return loss


@pytest.mark.parametrize(
    "policy", [policy for policy in EVERY_POLICY if getattr(policy, "apply_to", None) is None], ids=repr
)
def test_every_policy_trains_what_explodes_without_it(policy: policies.Policy, unclipped_loss: float) -> None:
    loss = train_rnn(policy)
    assert math.isfinite(loss)
    assert loss < 0.5
    assert not unclipped_loss < 2.0


# Optimizers that are not what they were, or not quite torch's


class _Derived(torch.optim.AdamW):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)


@pytest.mark.parametrize("poison", [(), (2,)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_within_a_step_is_clipped_once(fused: bool, scaled: bool, poison: tuple[int, ...]) -> None:
    def base(params: Collection[Tensor]) -> Optimizer:
        return torch.optim.AdamW(params, fused=fused)

    def derived(params: Collection[Tensor]) -> Optimizer:
        return _Derived(params, fused=fused)

    base(network().parameters())  # from here on the hooks run in AdamW.step too
    scaler = scaler_of() if scaled else None
    model, optimizer, clipper = clipped_in_step(derived, 5, poison, scaler=scaler, apply="eager")
    assert same_run((model, optimizer), clipped_by_hand(base, 5, poison))
    assert clipper.metrics()["steps"] == 5


def test_after_a_step_that_raised_the_next_is_clipped() -> None:
    param = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=1.0)
    gradkern.Clipper([param], 1.0).attach(optimizer)
    param.grad = torch.ones(1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    param.grad = torch.full((1,), 5.0)
    optimizer.step()
    assert param.item() == -1.0


@pytest.mark.parametrize("poison", [(), (3,)])
def test_a_loaded_state_that_makes_an_optimizer_not_fused_is_noticed(poison: tuple[int, ...]) -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    gradkern.Clipper(model, LIMIT).attach(optimizer)
    optimizer.load_state_dict(torch.optim.AdamW(network().parameters()).state_dict())
    backward(model, 0)
    if poison:
        model[0].weight.grad.fill_(NAN)
    optimizer.step()
    assert all(map(same_bits, model.parameters(), network().parameters())) == bool(poison)


def test_deferring_to_an_optimizer_that_is_no_longer_fused_is_refused() -> None:
    model = network()
    optimizer = FUSED["adamw"](model.parameters())
    gradkern.Clipper(model, apply="defer").attach(optimizer)
    optimizer.load_state_dict(torch.optim.AdamW(network().parameters()).state_dict())
    backward(model, 0)
    with pytest.raises(ValueError, match="For this AdamW use apply='auto'"):
        optimizer.step()


def test_a_wrapper_that_runs_no_hooks_is_refused() -> None:
    class Wrapper(Optimizer):
        def __init__(self, inside: Optimizer) -> None:
            self.param_groups = inside.param_groups

        def step(self, closure: None = None) -> None:  # type: ignore[override]
            pass

    model = network()
    with pytest.raises(ValueError, match="runs no hooks"):
        gradkern.Clipper(model).attach(Wrapper(FUSED["adamw"](model.parameters())))


@pytest.mark.parametrize("scaled", [False, True])
def test_muon_is_skipped_without_a_trace(scaled: bool) -> None:
    def run(poison: Collection[int]) -> list[Tensor]:
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(4, 3))
        optimizer = torch.optim.Muon([param])
        gradkern.Clipper([param], LIMIT).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for step in (0, 1, 2) if poison else (0, 2):
            scaler.scale(torch.ones(()))
            param.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            if step in poison:
                param.grad[1, 1] = NAN
            # A scale that an update has halved in between must not tell the two apart.
            param.grad *= scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
        return [param.detach(), optimizer.state[param]["momentum_buffer"]]

    assert all(map(same_bits, run((1,)), run(())))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("poison", [(0,), range(6)], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_bad_steps_leave_no_trace_where_gradients_are_accumulated(
    name: str, poison: Collection[int], scaled: bool
) -> None:
    scaler = scaler_of(2.0**20) if scaled else None
    run = clipped_in_step(FUSED[name], 6, poison, micro_batches=3, scaler=scaler, apply="eager")
    if 5 not in poison:
        assert same_run(run[:2], clipped_by_hand(FUSED[name], 6, poison, micro_batches=3))
    else:
        assert all(map(same_bits, run[0].parameters(), network().parameters()))
        assert all(not torch.as_tensor(value).any() for value in state_of(run[1]))
