"""Clippers and GradScaler. Oracle: `scaler.unscale_`, then `clip_`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

import gradkern
from gradkern import policies
from tests.helpers import same_bits
from tests.training import FUSED, OTHERS, MakeOptimizer, backward, network

LIMIT = 0.5
EVERY = FUSED | OTHERS


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def scaler_of(initial: float = 1024.0, enabled: bool = True) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=7, enabled=enabled)


def run(
    make: MakeOptimizer, fused: bool, poison: tuple[int, ...] = (), enabled: bool = True
) -> tuple[list[Tensor], float]:
    """Weights after some steps, and the last scale."""
    model = network()
    optimizer, scaler = make(model.parameters()), scaler_of(enabled=enabled)
    clipper = gradkern.Clipper(model, LIMIT)
    for step in range(20):
        optimizer.zero_grad()
        backward(model, step, scaler.scale(torch.ones(())))
        if step in poison:
            model[2].weight.grad[0, 0] = math.inf
        if fused:
            clipper.unscale_and_clip(scaler, optimizer)
        else:
            scaler.unscale_(optimizer)
            gradkern.clip_(model, LIMIT)
        scaler.step(optimizer)
        scaler.update()
    return [param.detach() for param in model.parameters()], scaler.get_scale()


@pytest.mark.parametrize(("poison", "enabled"), [((), True), ((), False), ((0,), True), ((3, 4), True)])
@pytest.mark.parametrize("name", [name for name in EVERY if name != "sgd"])
def test_it_is_unscaling_and_then_clipping_to_the_bit(
    name: str, poison: tuple[int, ...], enabled: bool
) -> None:
    (mine, scale), (theirs, other) = (run(EVERY[name], fused, poison, enabled) for fused in (True, False))
    assert all(map(same_bits, mine, theirs))
    assert scale == other


@pytest.mark.parametrize("poison", [(0,), (3, 4)])
def test_fused_sgd_survives_a_skipped_first_step(poison: tuple[int, ...]) -> None:
    """After `scaler.unscale_` its momentum would be what was found in memory, so that it is no oracle."""
    model = network()
    optimizer = FUSED["sgd"](model.parameters())
    for step in set(range(20)) - set(poison):
        optimizer.zero_grad()
        backward(model, step)
        gradkern.clip_(model, LIMIT)
        optimizer.step()
    assert all(map(same_bits, run(FUSED["sgd"], True, poison)[0], model.parameters()))


def test_gradients_are_read_once_and_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradkern import ops

    model = network()
    optimizer, scaler = EVERY["rmsprop"](model.parameters()), scaler_of()
    clipper = gradkern.Clipper(model, LIMIT)
    backward(model, 0, scaler.scale(torch.ones(())))
    versions = [param.grad._version for param in model.parameters()]
    calls = []
    native = ops.native
    if native is None:
        pytest.skip("the reference counts as it likes")

    class Watched:
        def __getattr__(self, name: str) -> object:
            if name in ("measure", "apply_", "clip_"):
                calls.append(name)
            return getattr(native, name)

    monkeypatch.setattr(ops, "native", Watched())
    clipper.unscale_and_clip(scaler, optimizer)
    assert calls == ["measure", "apply_"]
    assert [param.grad._version for param in model.parameters()] == [version + 1 for version in versions]


def test_it_tells_what_the_gradients_are_without_the_scale() -> None:
    model = network()
    optimizer, scaler = EVERY["rmsprop"](model.parameters()), scaler_of()
    backward(model, 0)
    expected = gradkern.measure(model)
    model.zero_grad()
    backward(model, 0, scaler.scale(torch.ones(())))
    stats = gradkern.Clipper(model, LIMIT).unscale_and_clip(scaler, optimizer)
    assert stats.norm.item() == pytest.approx(expected.norm.item(), rel=1e-12)
    assert gradkern.measure(model).norm.item() == pytest.approx(LIMIT, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_scaler_hears_of_a_bad_gradient_and_the_policy_does_not(bad: float) -> None:
    model = network()
    optimizer, scaler = EVERY["plain adamw"](model.parameters()), scaler_of()
    clipper = gradkern.Clipper(model, policies.ZClip())
    backward(model, 0, scaler.scale(torch.ones(())))
    model[0].bias.grad[0] = bad
    clipper.unscale_and_clip(scaler, optimizer)
    state = scaler._per_optimizer_states[id(optimizer)]
    assert state["stage"] is OptState.UNSCALED
    assert [flag.item() for flag in state["found_inf_per_device"].values()] == [1.0]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(map(same_bits, model.parameters(), network().parameters()))
    assert clipper.state_dict()["policy"]["shared"]["count"].item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_unscaled_too(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(2, dtype=dtype))
    optimizer, scaler = torch.optim.SGD([param], lr=1.0), scaler_of()
    scaler.scale(torch.ones(()))
    param.grad = torch.tensor([3.0 * 1024, 4.0 * 1024], dtype=dtype)
    gradkern.Clipper([param], 2.5).unscale_and_clip(scaler, optimizer)
    scaler.step(optimizer)
    assert param.tolist() == [-1.5, -2.0]


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_attached_half_precision_gradients_are_unscaled_too(name: str) -> None:
    model = network().bfloat16()
    optimizer, scaler = EVERY[name](model.parameters()), scaler_of()
    gradkern.Clipper(model, LIMIT, apply="eager").attach(optimizer)
    scaler.scale(model(torch.ones(4, 5, dtype=torch.bfloat16)).square().sum()).backward()
    scaler.step(optimizer)
    assert gradkern.measure(model).norm.item() == pytest.approx(LIMIT, rel=4e-3)


def test_groups_that_are_not_clipped_are_unscaled() -> None:
    model = network()
    optimizer, scaler = EVERY["momentum sgd"](model[0].parameters()), scaler_of()
    optimizer.add_param_group({"params": list(model[2].parameters()), "clip_grad": False})
    backward(model, 0)
    expected = model[2].weight.grad.clone()
    model.zero_grad()
    backward(model, 0, scaler.scale(torch.ones(())))
    gradkern.Clipper(model, 1e-3).unscale_and_clip(scaler, optimizer)
    assert same_bits(model[2].weight.grad, expected)
    assert gradkern.measure(model[0]).norm.item() == pytest.approx(1e-3, rel=1e-6)


def test_measured_in_backward_it_is_the_same() -> None:
    def grads(measure: str) -> list[Tensor]:
        model = network()
        optimizer, scaler = EVERY["rmsprop"](model.parameters()), scaler_of()
        clipper = gradkern.Clipper(model, LIMIT, measure=measure)
        backward(model, 0, scaler.scale(torch.ones(())))
        clipper.unscale_and_clip(scaler, optimizer)
        return [param.grad for param in model.parameters()]

    assert all(map(same_bits, grads("backward"), grads("after")))


def test_unscaling_twice_is_refused() -> None:
    model = network()
    optimizer, scaler = EVERY["rmsprop"](model.parameters()), scaler_of()
    clipper = gradkern.Clipper(model)
    backward(model, 0, scaler.scale(torch.ones(())))
    scaler.unscale_(optimizer)
    left = model[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match="have been unscaled"):
        clipper.unscale_and_clip(scaler, optimizer)
    assert same_bits(model[0].weight.grad, left)


def test_a_scaler_that_has_scaled_nothing_is_refused() -> None:
    model = network()
    backward(model, 0)
    with pytest.raises(RuntimeError, match="has not scaled anything"):
        gradkern.Clipper(model).unscale_and_clip(scaler_of(), EVERY["rmsprop"](model.parameters()))


def test_arguments_in_the_wrong_order_are_refused() -> None:
    model = network()
    message = "a GradScaler and an optimizer, in this order, got RMSprop and GradScaler"
    with pytest.raises(TypeError, match=message):
        gradkern.Clipper(model).unscale_and_clip(EVERY["rmsprop"](model.parameters()), scaler_of())


def test_an_attached_clipper_refuses_it() -> None:
    model = network()
    optimizer = EVERY["rmsprop"](model.parameters())
    clipper = gradkern.Clipper(model).attach(optimizer)
    with pytest.raises(RuntimeError, match="it is attached"):
        clipper.unscale_and_clip(scaler_of(), optimizer)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    optimizer, scaler = EVERY["rmsprop"](network().parameters()), scaler_of()
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="not among the clipper's"):
        gradkern.Clipper(network()).unscale_and_clip(scaler, optimizer)


def test_of_several_optimizers_each_takes_its_own_clipper() -> None:
    model = network()
    first, second = EVERY["rmsprop"](model[0].parameters()), EVERY["rmsprop"](model[2].parameters())
    scaler, clipper = scaler_of(), gradkern.Clipper(model)
    backward(model, 0, scaler.scale(torch.ones(())))
    clipper.unscale_and_clip(scaler, first)
    with pytest.raises(ValueError, match="looks after a RMSprop already"):
        clipper.unscale_and_clip(scaler, second)
    gradkern.Clipper(model).unscale_and_clip(scaler, second)


def test_autocast_and_a_scaler_around_a_whole_run() -> None:
    model = network()
    optimizer, scaler = FUSED["adamw"](model.parameters()), scaler_of(2.0**16)
    clipper = gradkern.Clipper(model, LIMIT).attach(optimizer)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(torch.ones(4, 5)) - 1.0).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert clipper.metrics()["steps"] == 100


def test_a_step_that_the_scaler_leaves_out_counts_as_skipped() -> None:
    model = network()
    optimizer, scaler = EVERY["rmsprop"](model.parameters()), scaler_of()
    clipper = gradkern.Clipper(model, LIMIT)
    for bad in (False, True):
        model.zero_grad()
        backward(model, 0, scaler.scale(torch.ones(())))
        if bad:
            model[0].bias.grad[0] = math.nan
        clipper.unscale_and_clip(scaler, optimizer)
        scaler.step(optimizer)
        scaler.update()
    metrics = clipper.metrics()
    assert (metrics["steps"], metrics["skipped_steps"]) == (2, 1)


def test_a_damped_fused_sgd_survives_a_skipped_first_step() -> None:
    def damped(params: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.1, fused=True)  # type: ignore[arg-type]

    model = network()
    optimizer = damped(model.parameters())
    for step in range(1, 20):
        optimizer.zero_grad()
        backward(model, step)
        gradkern.clip_(model, LIMIT)
        optimizer.step()
    assert all(map(same_bits, run(damped, True, (0,))[0], model.parameters()))
