"""Measuring as gradients are produced. Oracle: measuring them afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern import policies
from tests.backends import Backend
from tests.helpers import same_bits
from tests.training import EVERY_POLICY, FUSED, backward, network

Measured = list[Tensor]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Every gradient that is read from here on, one by one or in a list, by `Clipper`."""
    from gradkern import backward as module
    from gradkern import ops

    read: Measured = []

    def spy(measure: Callable[..., object]) -> Callable[..., object]:
        def spied(grads: list[Tensor], *rest: object) -> object:
            read.extend(grads)
            return measure(grads, *rest)

        return spied

    class Native:
        """The extension, watched."""

        def __getattr__(self, name: str) -> object:
            found = getattr(native, name)
            return spy(found) if name == "measure" else found

    native = ops.native
    monkeypatch.setattr(ops, "measure", spy(ops.measure))
    if native is not None:
        monkeypatch.setattr(module.ops, "native", Native())
    return read


@pytest.mark.parametrize("policy", [*EVERY_POLICY[:1], *EVERY_POLICY[2:3], *EVERY_POLICY[6:8]], ids=repr)
def test_the_statistics_and_the_clipped_gradients_are_the_same_bits(
    policy: policies.Policy, backend: Backend
) -> None:
    policy = policies.GlobalNorm(0.1) if isinstance(policy, policies.GlobalNorm) else policy
    one, other = network(), network()
    early, late = gradkern.Clipper(one, policy, measure="backward"), gradkern.Clipper(other, policy)
    for step in range(3):
        for model in (one, other):
            model.zero_grad()
            backward(model, step)
        mine, theirs = early(), late()
        assert torch.equal(mine.rows, theirs.rows)
        assert torch.equal(mine.data, theirs.data)
        assert mine.names == theirs.names
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert same_bits(a.grad, b.grad)


def test_no_gradient_is_read_a_second_time(measured: Measured) -> None:
    model = network()
    clipper = gradkern.Clipper(model, measure="backward")
    backward(model, 0)
    assert len(measured) == 4
    clipper()
    assert len(measured) == 4


@pytest.mark.parametrize("how", ["context", "number"])
def test_only_the_last_micro_batch_is_measured(how: str, measured: Measured) -> None:
    model = network()
    clipper = gradkern.Clipper(model, measure="backward", micro_batches=3 if how == "number" else 1)
    for _ in range(2):
        measured.clear()
        model.zero_grad()
        if how == "number":
            for part in range(3):
                backward(model, part)
        else:
            with clipper.accumulating():
                backward(model, 0)
                backward(model, 1)
            backward(model, 2)
        assert len(measured) == 4
        expected = gradkern.measure(model)
        measured.clear()
        assert torch.equal(clipper().rows, expected.rows)
        assert measured == []


def test_a_micro_batch_too_few_is_measured_afterwards() -> None:
    model = network()
    clipper = gradkern.Clipper(model, 1e9, measure="backward", micro_batches=3)
    backward(model, 0)
    assert torch.equal(clipper().rows, gradkern.measure(model).rows)


def touch_in_place(param: nn.Parameter) -> None:
    param.grad.mul_(2)


def touch_by_accumulating(param: nn.Parameter) -> None:
    param.grad += 1.0


def touch_by_replacing(param: nn.Parameter) -> None:
    param.grad = param.grad * 2


def touch_by_clipping(param: nn.Parameter) -> None:
    gradkern.clip_(param, 1e-3)


@pytest.mark.parametrize(
    "touch", [touch_in_place, touch_by_accumulating, touch_by_replacing, touch_by_clipping]
)
def test_a_gradient_touched_after_backward_is_measured_again(
    touch: Callable[[nn.Parameter], None], measured: Measured
) -> None:
    model = network()
    clipper = gradkern.Clipper(model, 1e9, measure="backward")
    backward(model, 0)
    touch(model[0].weight)
    measured.clear()
    stats = clipper()
    assert measured == [model[0].weight.grad] or len(measured) == 1
    assert torch.equal(stats.rows, gradkern.measure(model).rows)


def test_a_second_call_without_backward_measures_afresh() -> None:
    model = network()
    clipper = gradkern.Clipper(model, 0.1, measure="backward")
    backward(model, 0)
    clipper()
    assert clipper().norm.item() == pytest.approx(0.1, rel=1e-6)


def test_a_gradient_removed_after_backward_is_left_out() -> None:
    model = network()
    clipper = gradkern.Clipper(model, measure="backward")
    backward(model, 0)
    model[0].weight.grad = None
    assert clipper().names == ["0.bias", "2.weight", "2.bias"]


def test_an_added_layer_is_measured_in_backward_from_the_next_step_on(measured: Measured) -> None:
    model = network()
    clipper = gradkern.Clipper(model, measure="backward")
    model.append(nn.Linear(3, 3))
    backward(model, 0)
    assert len(clipper().names) == 6
    model.zero_grad()
    backward(model, 1)
    measured.clear()
    clipper()
    assert measured == []


@pytest.mark.parametrize("name", FUSED)
def test_attached_it_steps_as_when_measuring_afterwards(name: str) -> None:
    def run(measure: str) -> list[Tensor]:
        model = network()
        optimizer = FUSED[name](model.parameters())
        gradkern.Clipper(model, 0.5, measure=measure).attach(optimizer)
        for step in range(10):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        return [param.detach() for param in model.parameters()]

    assert all(map(same_bits, run("backward"), run("after")))


def test_a_gradient_that_gives_no_statistics_is_named_in_backward() -> None:
    param = nn.Parameter(torch.zeros(2, dtype=torch.float8_e5m2))
    clipper = gradkern.Clipper({"w": param}, measure="backward")
    with pytest.raises(TypeError, match="gradient of 'w'"):
        param.float().sum().backward()
    assert clipper.last is None


def test_the_hooks_do_not_keep_the_clipper_alive() -> None:
    model = network()
    clipper = gradkern.Clipper(model, measure="backward")
    alive = weakref.ref(clipper)
    del clipper
    gc.collect()
    assert alive() is None
    backward(model, 0)


def test_gradients_are_not_kept_alive_after_the_step() -> None:
    model = network()
    clipper = gradkern.Clipper(model, measure="backward")
    backward(model, 0)
    clipper()
    alive = weakref.ref(model[0].weight.grad)
    model.zero_grad()
    assert alive() is None


def test_under_a_distributed_wrapper_it_is_refused() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(network())
        with pytest.raises(ValueError, match="has not averaged yet"):
            gradkern.Clipper(model, measure="backward")
    finally:
        torch.distributed.destroy_process_group()


def swap_data(param: nn.Parameter) -> None:
    param.grad.data = torch.full_like(param.grad, 3.0)


def retype(param: nn.Parameter) -> None:
    param.grad.data = param.grad.data.half()


@pytest.mark.parametrize("touch", [swap_data, retype])
def test_a_gradient_given_other_memory_is_measured_again(touch: Callable[[nn.Parameter], None]) -> None:
    model = network()
    clipper = gradkern.Clipper(model, 1e9, measure="backward")
    backward(model, 0)
    touch(model[0].weight)
    assert torch.equal(clipper().rows, gradkern.measure(model).rows)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_attached_what_a_scaler_has_unscaled_is_measured_again(name: str) -> None:
    """`unscale_` writes to gradients and leaves their versions as they were."""
    model = network()
    optimizer = FUSED[name](model.parameters())
    clipper = gradkern.Clipper(model, 0.5, measure="backward").attach(optimizer)
    backward(model, 0)
    norm = gradkern.measure(model).norm
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(model, 0, scaler.scale(torch.ones(())))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert clipper.last is not None
    assert clipper.last.norm == norm
