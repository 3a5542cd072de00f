"""The first operation that makes a NaN or Inf is named, and everything is put back."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradkern
from gradkern.monitor import Monitor, Origin


class Calls(nn.Module):
    """A module that runs a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def trace(function: Callable[[Tensor], Tensor], x: Tensor) -> Origin | None:
    """A step of a model with a function in its middle."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), Calls(function), nn.Linear(3, 1))
    nn.init.eye_(model[0].weight)

    def step() -> Tensor:
        loss = model(x).sum()
        loss.backward()
        return loss

    return gradkern.trace_nonfinite(step, model)


def found(function: Callable[[Tensor], Tensor], x: Tensor) -> Origin:
    origin = trace(function, x)
    assert origin is not None
    return origin


def test_a_forward_nan_is_named_with_its_inputs() -> None:
    origin = found(lambda x: x.sqrt(), torch.tensor([[1.0, -4.0, 9.0]]))
    assert (origin.op, origin.direction, origin.module) == ("aten.sqrt.default", "forward", "1")
    assert (origin.nan_count, origin.inf_count) == (1, 0)
    assert origin.shapes == [(1, 3)]
    assert origin.ranges == [(-4.0, 9.0)]


def test_a_forward_inf_is_named() -> None:
    origin = found(lambda x: x.exp(), torch.tensor([[1.0, 1000.0, 2000.0]]))
    assert (origin.op, origin.nan_count, origin.inf_count) == ("aten.exp.default", 0, 2)


def test_the_line_of_the_source_is_that_of_the_operation() -> None:
    def divide(x: Tensor) -> Tensor:
        return x / x.sum()  # the line

    origin = found(divide, torch.zeros(1, 3))
    assert __file__ in origin.source
    assert "return x / x.sum()  # the line" in origin.source


def test_a_backward_inf_is_named_with_the_line_of_its_forward_operation() -> None:
    def root(x: Tensor) -> Tensor:
        return x.sqrt()  # steep at 0

    origin = found(root, torch.tensor([[1.0, 0.0, 4.0]]))
    assert (origin.direction, origin.module) == ("backward", "1")
    assert origin.op == "aten.div.Tensor"
    assert "steep at 0" in origin.source


def test_operations_that_no_gradient_passes_are_not_blamed_for_the_backward_of_those_before() -> None:
    def root(x: Tensor) -> Tensor:
        out = x.sqrt()  # steep at 0
        assert (out.detach() >= 0).all()
        return out

    origin = found(root, torch.tensor([[1.0, 0.0, 4.0]]))
    assert (origin.direction, origin.module) == ("backward", "1")
    assert "steep at 0" in origin.source


def test_an_operation_in_place_is_judged_by_what_it_was_given() -> None:
    origin = found(lambda x: (x * 1).log_(), torch.tensor([[1.0, -2.0, 3.0]]))
    assert (origin.op, origin.ranges) == ("aten.log_.default", [(-2.0, 3.0)])


def test_a_mask_that_a_softmax_takes_away_is_no_fault() -> None:
    def attend(x: Tensor) -> Tensor:
        mask = torch.zeros_like(x).masked_fill(torch.tensor([False, True, False]), -math.inf)
        return (x + mask).softmax(-1)

    assert trace(attend, torch.ones(1, 3)) is None


def test_a_fault_beside_a_harmless_mask_is_named() -> None:
    def attend(x: Tensor) -> Tensor:
        mask = torch.zeros_like(x).masked_fill(torch.tensor([False, True, False]), -math.inf)
        return (x + mask).softmax(-1) + (x - 2).log()

    origin = found(attend, torch.ones(1, 3))
    assert origin.op == "aten.log.default"


def test_a_bad_batch_is_an_input() -> None:
    origin = found(lambda x: x, torch.tensor([[1.0, math.nan, 1.0]]))
    assert (origin.direction, origin.name, origin.nan_count) == ("input", "", 1)


def test_a_bad_weight_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].bias.data[1] = math.inf
    origin = gradkern.trace_nonfinite(lambda: model(torch.ones(1, 2)).sum(), model)
    assert origin is not None
    assert (origin.direction, origin.name) == ("input", "0.bias")


def test_nothing_is_named_where_all_is_finite() -> None:
    assert trace(lambda x: x.tanh(), torch.ones(1, 3)) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_operations_under_checkpointing_are_named(reentrant: bool) -> None:
    def checkpointed(x: Tensor) -> Tensor:
        out = checkpoint(lambda h: (h * 1).sqrt(), x, use_reentrant=reentrant)
        assert isinstance(out, Tensor)
        return out

    origin = found(checkpointed, torch.tensor([[1.0, -4.0, 9.0]]))
    assert (origin.op, origin.module) == ("aten.sqrt.default", "1")


def test_a_compiled_model_is_traced_without_compilation() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(2, 2), Calls(lambda x: (x * 0).log()))
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.ones(1, 2))
    origin = gradkern.trace_nonfinite(lambda: compiled(torch.ones(1, 2)).sum(), model)
    assert origin is not None
    assert (origin.op, origin.module) == ("aten.log.default", "1")


def test_everything_is_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model(torch.randn(4, 3)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads if g is not None]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()

    def step() -> Tensor:
        loss = model(torch.randn(4, 3) * 5).sum().log() * math.nan
        loss.backward()
        model[0].weight.data += 1
        return loss

    assert gradkern.trace_nonfinite(step, model) is not None
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(a is b.grad for a, b in zip(grads, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, (g for g in grads if g is not None), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_in_the_step_leaves_no_hooks() -> None:
    model = nn.Linear(2, 2)

    def step() -> Tensor:
        model(torch.ones(1, 2))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gradkern.trace_nonfinite(step, model)
    assert not model._forward_hooks


def test_the_last_step_of_a_run_is_traced_by_its_replay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.Dropout(0.5), Calls(lambda h: (h.abs() + 1).log()), nn.Linear(8, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    with Monitor(model, optimizer, keep_batch=True) as monitor:
        for number in range(4):
            x, y = torch.randn(4, 3), torch.randn(4, 1)
            if number == 3:
                x[2, 1] = 1e30
                y[0] = 1e30
            optimizer.zero_grad()
            loss = loss_of(x, y)
            loss.backward()
            optimizer.step()
            monitor.step(loss, batch=(x, y))
        with monitor.replay() as (x, y):
            origin = gradkern.trace_nonfinite(lambda: loss_of(x, y), model)
    assert origin is not None
    assert origin.op == "aten.mse_loss.default"
    assert origin.inf_count == 1
    assert "return F.mse_loss(model(x), y)" in origin.source
