"""Activations and output gradients against autograd in double, on the steps they are looked at."""

from __future__ import annotations

import copy
import io
import math
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import gradkern
from gradkern.monitor import Monitor
from gradkern.monitor.hooks import PART, unit_dim, unit_norms, unit_numbers


def observe(model: nn.Module, x: Tensor, steps: int = 1, **settings: Any) -> Monitor:
    """Steps without learning, so that each is the same; activations of every step unless said otherwise."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, **{"activations_every": 1, **settings}) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    return monitor


def value(monitor: Monitor, kind: str, module: str) -> float:
    _, rows = monitor.record.rows(kind)
    return float(rows[0, monitor.record.names(kind).index(module)])


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_output_gradients_are_those_of_autograd() -> None:
    model, x = two_layers(), torch.randn(5, 3)
    monitor = observe(model, x)
    exact = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    exact.load_state_dict(model.state_dict())
    first = exact[0](x.double())
    second = exact[1](first)
    third = exact[2](second)
    grads = torch.autograd.grad(third.square().sum(), [first, second, third])
    for path, grad in zip("012", grads, strict=True):
        units = grad.norm(dim=0)
        assert value(monitor, "out_grad_norm", path) == pytest.approx(grad.norm().item(), rel=1e-5)
        assert value(monitor, "out_grad_unit_max", path) == pytest.approx(units.max().item(), rel=1e-5)
        assert value(monitor, "out_grad_unit_argmax", path) == units.argmax().item()
        expected = (units > 1).double().mean().item()
        assert value(monitor, "out_grad_unit_above_one", path) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_output_gradients_are_those_of_the_loss_without_its_scale(scale: float) -> None:
    model, x = two_layers(), torch.randn(5, 3)
    expected = value(observe(two_layers(), x), "out_grad_unit_max", "0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    with Monitor(model, optimizer, activations_every=1) as monitor:
        for _ in range(2):
            loss = model(x).square().sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.step(loss, scaler=scaler)
            optimizer.zero_grad()
    assert value(monitor, "out_grad_unit_max", "0") == pytest.approx(expected, rel=1e-6)


def test_the_units_of_images_are_their_channels() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 1)), torch.randn(4, 2, 4, 4)
    monitor = observe(model, x)
    out = model[0](x)
    (grad,) = torch.autograd.grad(model[2](model[1](out)).square().sum(), [out])
    expected = torch.linalg.vector_norm(grad.double(), dim=(0, 2, 3)).max().item()
    assert value(monitor, "out_grad_unit_max", "0") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("module", "shape", "dim"),
    [
        (nn.Conv1d(1, 1, 1), (2, 3, 4), 1),
        (nn.Conv2d(1, 1, 1), (3, 4, 5), 0),
        (nn.BatchNorm1d(3), (2, 3, 4), 1),
        (nn.MaxPool1d(2), (2, 3, 4), 1),
        (nn.Linear(1, 1), (2, 3, 4), 2),
        (nn.Linear(1, 1), (2, 3, 4, 5), 3),
        (nn.ReLU(), (2, 3, 4), 2),
        (nn.ReLU(), (2, 3, 4, 5), 1),
        (nn.Linear(1, 1), (7,), 0),
    ],
)
def test_units_are_channels_of_images_else_the_last_dimension(
    module: nn.Module, shape: tuple[int, ...], dim: int
) -> None:
    assert unit_dim(module, torch.zeros(shape)) % len(shape) == dim


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(2, 8, 3), (4, 2, 16)), (nn.Conv2d(2, 8, 3), (4, 2, 9, 9)), (nn.Linear(3, 8), (4, 5, 5, 3))],
)
def test_dead_units_are_those_of_the_layer_before(
    layer: nn.Module, shape: tuple[int, ...], inplace: bool
) -> None:
    assert isinstance(layer.bias, Tensor)
    layer.bias.data[:7] = -100
    model = nn.Sequential(nn.Sequential(layer), nn.Dropout(0.0), nn.ReLU(inplace))
    assert value(observe(model, torch.randn(shape)), "act_dead", "2") == 0.875


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e-30, 1e30, 1e300])
def test_norms_of_units_stay_in_range(size: float, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    grad = (torch.randn(6, 5, 4, dtype=torch.float64) * size).clamp(-limit, limit).to(dtype)
    scale = grad.abs().max().item() or 1.0
    units = grad.movedim(1, 0).reshape(5, -1).tolist()
    expected = [math.hypot(*(x / scale for x in unit)) * scale for unit in units]
    assert unit_norms(grad, 1).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norms_of_units_of_what_is_read_in_parts(dtype: torch.dtype, dim: int) -> None:
    grad = torch.randn(130, 129, 128).to(dtype)
    assert grad.numel() > 2 * PART
    others = [other for other in range(3) if other != dim]
    expected = grad.double().square().sum(others).sqrt()
    torch.testing.assert_close(unit_norms(grad, dim), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_unit_that_is_not_finite_is_the_worst_and_the_others_keep_their_norms(
    bad: float, dtype: torch.dtype
) -> None:
    grad = torch.tensor([[3.0, 1.0, 9.0, 2.0], [4.0, bad, 0.0, -bad]], dtype=dtype)
    norms = unit_norms(grad, -1).numpy()
    assert norms[[0, 2]].tolist() == [5, 9]
    assert unit_numbers(norms)[2:] == (math.inf, 1)


def test_where_no_unit_is_finite_none_is_named() -> None:
    *_, largest, index = unit_numbers(np.array([math.nan, math.inf]))
    assert largest == math.inf
    assert math.isnan(index)


def test_units_that_are_zero_for_the_whole_batch_are_dead() -> None:
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[1.0], [-1.0], [-1.0], [-2.0]])
    assert value(observe(model, torch.ones(6, 1)), "act_dead", "1") == 0.75


def test_a_unit_that_is_alive_for_one_example_is_not_dead() -> None:
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0], [-1.0]])
    assert value(observe(model, torch.tensor([[-1.0], [1.0]])), "act_dead", "1") == 0


@pytest.mark.parametrize(
    ("module", "inputs", "share"),
    [
        # The slope of tanh is a tenth of its steepest at 1.818, that of the sigmoid at 3.636.
        (nn.Tanh(), [0.0, 1.80, -1.83, 5.0], 0.5),
        (nn.Sigmoid(), [0.0, 3.62, -3.65, 9.0], 0.5),
        (nn.Hardtanh(), [0.0, 0.99, -1.5, 2.0], 0.5),
    ],
)
def test_outputs_in_the_flat_part_are_saturated(module: nn.Module, inputs: list[float], share: float) -> None:
    model = nn.Sequential(nn.Linear(1, 4, bias=False), module, nn.Linear(4, 1))
    model[0].weight.data = torch.tensor(inputs)[:, None]
    assert value(observe(model, torch.ones(1, 1)), "act_saturated", "1") == share


def test_outputs_that_are_not_finite_are_counted_beside_the_largest_that_is() -> None:
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Identity())
    model[0].weight.data = torch.tensor([[1.0], [math.nan], [math.inf], [-3.0]])
    monitor = observe(model, torch.ones(2, 1))
    assert value(monitor, "act_nonfinite", "0") == 4
    assert value(monitor, "act_abs_max", "0") == 3


def test_hooks_are_there_on_their_steps_only() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hooked = []
    with Monitor(model, optimizer, activations_every=3) as monitor:
        for _ in range(7):
            hooked.append(bool(model[0]._forward_pre_hooks))
            loss = model(torch.ones(2, 3)).sum()
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    assert hooked == [True, False, False, True, False, False, True]
    assert monitor.record.rows("act_abs_max")[0].tolist() == [0, 3, 6]


def test_no_activations_are_looked_at_if_that_is_said() -> None:
    model = two_layers()
    assert not observe(model, torch.ones(2, 3), activations_every=0).record.names("act_abs_max")


def test_an_evaluation_is_not_observed() -> None:
    model = two_layers()
    with Monitor(model, activations_every=1) as monitor:
        model.eval()
        model(torch.full((1, 3), 1e9))
        model.train()
        monitor.step(1.0)
        model(torch.ones(1, 3))
        monitor.step(1.0)
    steps, rows = monitor.record.rows("act_abs_max")
    assert steps.tolist() == [1]
    assert rows.max() < 1e3


@pytest.mark.parametrize("every", [1, 2])
def test_evaluations_between_steps_hide_nothing(every: int) -> None:
    model, x = two_layers(), torch.ones(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, activations_every=every) as monitor:
        for _ in range(4):
            model.eval()
            model(1e9 * x)
            model.train()
            with torch.no_grad():
                model(1e9 * x)
            loss = model(x).sum()
            loss.backward()
            optimizer.step()
            model(1e9 * x)
            monitor.step(loss)
    for kind in ("act_abs_max", "out_grad_norm"):
        steps, rows = monitor.record.rows(kind)
        assert steps.tolist() == list(range(0, 4, every))
        assert rows.max() < 1e3


@pytest.mark.parametrize("when", ["before a step", "behind a step"])
def test_evaluations_take_the_path_that_they_take_without_hooks(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = torch.randn(2, 3, 8)
    fast = 0
    forward = torch._transformer_encoder_layer_fwd

    def counted(*args: Any) -> Tensor:
        nonlocal fast
        fast += 1
        return forward(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    with Monitor(model, activations_every=1, keep_batch=True) as monitor:
        if when == "behind a step":
            model(x).sum().backward()
        with torch.no_grad():
            model.eval()(x)
        assert fast == 2
        if when == "before a step":
            model.train()(x).sum().backward()
        monitor.step(1.0)
    assert "1.layers.0.linear1" in monitor.record.names("out_grad_norm")


def test_a_model_that_trains_in_evaluation_mode_is_observed_from_the_second_time_on() -> None:
    monitor = observe(two_layers().eval(), torch.ones(2, 3), steps=3)
    assert monitor.record.rows("out_grad_norm")[0].tolist() == [1, 2]


def test_evaluations_with_gradients_are_not_observed_even_behind_a_step_that_had_no_other_pass() -> None:
    model, x = two_layers(), torch.ones(2, 3)
    with Monitor(model, activations_every=1) as monitor:
        model.eval()(1e9 * x)
        monitor.step(1.0)
        for _ in range(2):
            model.eval()(1e9 * x)
            model.train()(x).sum().backward()
            monitor.step(1.0)
    for kind in ("act_abs_max", "out_grad_norm"):
        steps, rows = monitor.record.rows(kind)
        assert steps.tolist() == [1, 2]
        assert rows.max() < 1e3


def test_parts_of_a_model_may_be_called_by_themselves() -> None:
    model = two_layers()
    with Monitor(model, activations_every=1) as monitor:
        model[2](model[1](model[0](torch.ones(2, 3)))).sum().backward()
        monitor.step(1.0)
    assert monitor.record.names("out_grad_norm") == ["0", "1", "2"]


def test_what_runs_aside_is_not_observed() -> None:
    model, x = two_layers(), torch.ones(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Monitor(model, optimizer, activations_every=1, keep_batch=True) as monitor:
        for _ in range(3):
            loss = model(x).sum()
            loss.backward()
            optimizer.step()
            monitor.step(loss, batch=x)
            with monitor.replay() as given:
                gradkern.trace_nonfinite(lambda: model(1e9 * given).sum(), model)
                model(1e9 * given).sum().backward()
            optimizer.zero_grad()
    for kind in ("act_abs_max", "out_grad_norm"):
        assert monitor.record.rows(kind)[1].max() < 1e3


def test_a_model_can_be_saved_and_copied_at_any_time() -> None:
    model = two_layers()
    with Monitor(model, activations_every=1) as monitor:
        for _ in range(2):
            copy.deepcopy(model)(torch.full((2, 3), 1e9)).sum().backward()
            torch.save(model, io.BytesIO())
            loss = model(torch.ones(2, 3)).sum()
            torch.save(model, io.BytesIO())
            loss.backward()
            copy.deepcopy(model)(torch.full((2, 3), 1e9))
            monitor.step(loss.detach())
    assert monitor.record.rows("act_abs_max")[1].max() < 1e3


def test_hooks_are_gone_when_the_optimizer_has_stepped() -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, activations_every=1) as monitor:
        for _ in range(2):
            loss = model(torch.ones(2, 3)).sum()
            loss.backward()
            optimizer.step()
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
            monitor.step(loss)
    assert monitor.record.rows("out_grad_norm")[0].tolist() == [0, 1]


def test_passes_inside_the_optimizers_step_are_observed() -> None:
    model, x = two_layers(), torch.ones(2, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss.detach()

    with Monitor(model, optimizer, activations_every=1) as monitor:
        monitor.step(optimizer.step(closure))  # type: ignore[arg-type]
    assert monitor.record.rows("out_grad_norm")[0].tolist() == [0]


SAVED: list[Any] = [None, torch.ops.aten.ne.Scalar, torch.ops.aten.addmm.default]


@pytest.mark.parametrize("op", SAVED, ids=["everything", "ne", "addmm"])
def test_selective_checkpointing_keeps_nothing_of_the_monitor(op: Any) -> None:
    def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op is None or func is op
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu, self.last = nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)

        def inner(self, x: Tensor) -> Tensor:
            h = self.relu(self.first(x))
            keep = x.round() != 0
            mean = (h != 0).double().mean(-1, keepdim=True).float()
            return self.last(h * mean + keep.float().mean())

        def forward(self, x: Tensor) -> Tensor:
            contexts = partial(create_selective_checkpoint_contexts, policy)
            out = checkpoint(self.inner, x, use_reentrant=False, context_fn=contexts)
            assert isinstance(out, Tensor)
            return out

    def train(every: int) -> tuple[Tensor, Monitor]:
        torch.manual_seed(0)
        model = Masked()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with Monitor(model, optimizer, activations_every=every) as monitor:
            for _ in range(5):
                optimizer.zero_grad()
                loss = model(torch.randn(6, 3)).square().mean()
                loss.backward()
                optimizer.step()
                monitor.step(loss)
        return torch.cat([param.detach().flatten() for param in model.parameters()]), monitor

    watched, monitor = train(1)
    assert torch.equal(train(0)[0], watched)
    assert monitor.record.names("out_grad_norm") == ["first", "relu", "last"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing_that_is_seen(reentrant: bool) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](checkpoint(lambda h: self[1](self[0](h)), x, use_reentrant=reentrant))

    x = torch.randn(5, 3, requires_grad=True)
    plain = observe(two_layers(), x).record
    other = observe(Checkpointed(*two_layers()), x).record
    for kind in ("out_grad_norm", "out_grad_unit_argmax", "act_abs_max", "act_saturated"):
        assert other.names(kind) == plain.names(kind)
        np.testing.assert_allclose(other.rows(kind)[1], plain.rows(kind)[1], rtol=1e-6)


def test_of_a_recurrent_network_the_outputs_are_looked_at() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    monitor = observe(Last(), torch.randn(4, 5, 2))
    assert monitor.record.names("out_grad_norm") == ["rnn"]


def test_a_module_that_gives_no_tensor_is_passed_over() -> None:
    class Words(nn.Module):
        def forward(self, x: Tensor) -> dict[str, str]:
            return {"what": "nothing"}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.last = Words(), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.words(x)
            return self.last(x)

    assert observe(Net(), torch.ones(2, 3)).record.names("act_abs_max") == ["last"]


def test_autocast_is_recorded() -> None:
    model = two_layers()
    with Monitor(model) as monitor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.ones(2, 3))
        monitor.step(1.0)
    assert monitor.record.meta["amp"] == {"enabled": True, "dtype": "bfloat16"}


def test_under_vmap_nothing_is_looked_at_and_nothing_breaks() -> None:
    model = two_layers()
    x = torch.randn(4, 3)
    expected = model(x)
    with Monitor(model, activations_every=1) as monitor:
        torch.testing.assert_close(torch.func.vmap(model)(x), expected)
        monitor.step(1.0)
    assert not monitor.record.names("act_abs_max")


def test_outputs_are_not_kept_alive() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            kept.append(weakref.ref(h))
            return self.last(h.detach())

    model = Net()
    with Monitor(model, activations_every=1):
        model(torch.ones(2, 3))
        assert kept[0]() is None


class _Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[:, 5] *= ctx.factor
        return grad, None


def test_a_unit_whose_gradient_goes_bad_is_named_with_its_layer() -> None:
    class Spoil(nn.Module):
        factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return _Spoiled.apply(x, self.factor)

    torch.manual_seed(0)
    spoil = Spoil()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), spoil, nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, activations_every=7) as monitor:
        for step in range(40):
            spoil.factor = math.nan if step == 21 else 1.0
            optimizer.zero_grad()
            loss = model(torch.randn(16, 4)).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step(loss)
        began = monitor.diagnosis().began
    assert (began["step"], began["layer"], began["unit"]) == (21, "2", 5)
