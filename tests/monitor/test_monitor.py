"""The monitor as a whole: it changes nothing, never raises, and records what happened."""

from __future__ import annotations

import gc
import logging
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradkern
from gradkern.monitor import LogSink, Monitor
from gradkern.monitor.schedule import LAG
from tests.monitor.runs import Net, batches, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Monitor:
    return Monitor(model, optimizer, weights_every=2, activations_every=3)


def made(seed: int = 0, reentrant: bool | None = None) -> Net:
    torch.manual_seed(seed)
    return Net(reentrant)


def simple() -> tuple[nn.Linear, torch.optim.SGD]:
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def broken(monitor: Monitor) -> None:
    monitor._take_rate = None  # type: ignore[assignment,method-assign]


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(torch.ones(4, 2)).square().mean() * factor
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_monitored_run_ends_with_the_bits_of_an_unmonitored_one(reentrant: bool | None) -> None:
    plain, _ = train(made(reentrant=reentrant), None)
    watched, monitor = train(made(reentrant=reentrant), everything)
    assert monitor is not None
    assert len(monitor.record.rows("out_grad_norm")[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


@pytest.mark.parametrize("reentrant", [None, False])
def test_a_compiled_run_ends_with_the_bits_of_an_unmonitored_one(reentrant: bool | None) -> None:
    def compiled(make_monitor: Any) -> tuple[list[torch.Tensor], Monitor | None]:
        torch._dynamo.reset()
        model = made(reentrant=reentrant)
        return train(model, make_monitor, forward=torch.compile(model, backend="aot_eager"))

    plain, _ = compiled(None)
    watched, monitor = compiled(everything)
    assert monitor is not None
    assert len(monitor.record.rows("update_norm")[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_hooks_leave_nothing_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    model = made()
    alone = torch.compile(model, backend=backend)
    alone(batches(1)[0][0])
    torch._dynamo.reset()
    other = made()
    with Monitor(other):
        torch.compile(other, backend=backend)(batches(1)[0][0])
    assert len(graphs) == 2
    assert graphs[0] == graphs[1]


def test_hooks_that_come_and_go_cost_one_more_compilation_at_most() -> None:
    torch._dynamo.reset()
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    forward = torch.compile(model, backend=backend)
    with Monitor(model, optimizer, activations_every=2) as monitor:
        for x, _ in batches(9):
            optimizer.zero_grad()
            loss = forward(x).sum()
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    assert compiled <= 2


def test_gradients_are_not_written() -> None:
    model, optimizer = simple()
    with Monitor(model, optimizer, weights_every=1, activations_every=1) as monitor:
        for _ in range(4):
            loss = one_step(model, optimizer)
            assert model.weight.grad is not None
            before = model.weight.grad.clone(), model.weight.grad._version
            monitor.step(loss)
            assert torch.equal(before[0], model.weight.grad)
            assert before[1] == model.weight.grad._version


def test_scalars_are_those_of_the_step() -> None:
    model, optimizer = simple()
    losses, norms = [], []
    with Monitor(model, optimizer) as monitor:
        for step in range(40):
            optimizer.zero_grad()
            loss = (model(torch.ones(4, 2)) - step).square().mean()
            loss.backward()
            norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())))
            stats = gradkern.clip_(model, 2.0)
            optimizer.step()
            losses.append(loss.item())
            monitor.step(loss, stats)
    record = monitor.record
    assert record.scalar("loss")[1].tolist() == losses
    assert record.scalar("lr")[1].tolist() == [0.01] * 40
    np.testing.assert_allclose(record.scalar("grad_norm")[1], norms, rtol=1e-12)
    np.testing.assert_allclose(record.scalar("grad_clipped_norm")[1], np.minimum(norms, 2.0), rtol=1e-12)
    np.testing.assert_allclose(record.scalar("clip_coef")[1], np.minimum(1, 2 / np.array(norms)), rtol=1e-12)


def test_rows_are_those_of_each_parameter() -> None:
    model, optimizer = simple()
    with Monitor(model, optimizer) as monitor:
        for _ in range(3):
            loss = one_step(model, optimizer)
            monitor.step(loss)
    steps, rows = monitor.record.rows("grad_norm")
    assert monitor.record.names("grad_norm") == ["weight", "bias"]
    assert steps.tolist() == [0, 1, 2]
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    expected = [model.weight.grad.double().norm().item(), model.bias.grad.double().abs().item()]
    np.testing.assert_allclose(rows[-1], expected, rtol=1e-7)


def test_a_parameter_without_gradient_is_a_gap() -> None:
    model, optimizer = simple()
    model.weight.requires_grad_(False)
    with Monitor(model, optimizer) as monitor:
        monitor.step(one_step(model, optimizer))
    assert np.isnan(monitor.record.rows("grad_norm")[1][0]).tolist() == [True, False]


def test_parameters_may_come_while_it_runs() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer) as monitor:
        monitor.step(one_step(model, optimizer))
        model.append(nn.Linear(2, 1))
        optimizer.add_param_group({"params": list(model[1].parameters())})
        monitor.step(one_step(model, optimizer))
    assert monitor.record.names("grad_norm") == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert np.isnan(monitor.record.rows("grad_norm")[1]).tolist() == [[False] * 2 + [True] * 2, [False] * 4]


def test_a_bad_loss_is_found_two_steps_later_and_not_before() -> None:
    model, optimizer = simple()
    found: list[tuple[int, int]] = []
    number = -1
    monitor = Monitor(model, optimizer, on={"loss_nonfinite": lambda _, f: found.append((number, f.step))})
    for number in range(9):
        bad = number == 5
        loss = one_step(model, optimizer) if not bad else torch.tensor(math.nan)
        monitor.step(loss)
        if number < 5 + LAG:
            assert not found
    monitor.close()
    assert found == [(5 + LAG, 5)]


def test_attached_every_optimizer_step_is_a_step() -> None:
    model, optimizer = simple()
    monitor = Monitor(model).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        monitor.loss = model(torch.ones(4, 2)).square().mean()
        monitor.loss.backward()
        optimizer.step()
    monitor.close()
    assert monitor.record.steps.tolist() == [0, 1, 2]
    assert len(monitor.record.scalar("loss")[0]) == 3
    optimizer.step()
    assert monitor.record.steps.tolist() == [0, 1, 2]


def test_attaching_a_monitor_that_has_its_optimizer_is_refused() -> None:
    model, optimizer = simple()
    with Monitor(model, optimizer) as monitor, pytest.raises(ValueError, match="has an optimizer already"):
        monitor.attach(optimizer)


def test_attaching_twice_says_what_to_do() -> None:
    model, optimizer = simple()
    monitor = Monitor(model).attach(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        monitor.attach(optimizer)
    monitor.close()


def test_closing_takes_every_hook_away() -> None:
    model, optimizer = simple()
    monitor = Monitor(model, optimizer)
    assert model._forward_pre_hooks
    monitor.close()
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_failure_is_said_once_and_never_raised() -> None:
    model, optimizer = simple()
    monitor = Monitor(model, optimizer)
    broken(monitor)
    with pytest.warns(UserWarning, match="the monitor failed at step 0 .* TypeError: ") as caught:
        monitor.step(1.0)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step(one_step(model, optimizer))
        monitor.close()


def test_a_failure_is_not_raised_where_warnings_are_errors(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = simple()
    monitor = Monitor(model, optimizer)
    broken(monitor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.step(1.0)
    assert "the monitor failed at step 0" in caplog.text


def test_a_monitor_that_has_failed_does_not_call_the_run_healthy() -> None:
    model, optimizer = simple()
    monitor = Monitor(model, optimizer)
    for _ in range(5):
        monitor.step(1.0)
    broken(monitor)
    with pytest.warns(UserWarning, match="the monitor failed at step 5"):
        monitor.step(1.0)
    assert str(monitor.diagnosis()).startswith(
        "The monitor failed at step 5 and has seen nothing since. Type"
    )
    assert not monitor.diagnosis().is_healthy
    monitor.close()


def test_before_the_first_step_nothing_can_be_said() -> None:
    with Monitor(nn.Linear(1, 1)) as monitor:
        assert str(monitor.diagnosis()) == "Nothing was recorded, so that nothing can be said."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"loss": torch.ones(3)},
            "loss must be one number, a tensor or a float; got Tensor [3]. It is left out.",
        ),
        ({"stats": {"norm": 1.0}}, "stats must be what gradkern.clip_ or a Clipper gave, .* got dict"),
        ({"stats": -1.0}, "stats must be what gradkern.clip_ or a Clipper gave, .* got float"),
        ({"scaler": True}, "scaler must be the torch.amp.GradScaler of the run; got bool"),
    ],
)
def test_an_argument_that_cannot_be_used_is_left_out_and_said_once(
    arguments: dict[str, Any], message: str
) -> None:
    model, optimizer = simple()
    with Monitor(model, optimizer) as monitor:
        loss = one_step(model, optimizer)
        with pytest.warns(UserWarning, match="Monitor.step: " + message.replace("[", r"\[")) as caught:
            monitor.step(**{"loss": loss, **arguments})
        assert [warning.filename for warning in caught] == [__file__]
        monitor.step(**{"loss": one_step(model, optimizer), **arguments})
        monitor.step(one_step(model, optimizer))
    assert monitor.record.steps.tolist() == [0, 1, 2]
    assert (monitor.record.scalar("grad_norm")[1] > 0).all()
    assert monitor.record.scalar("loss")[0][-1] == 2


def test_a_run_of_which_every_loss_was_left_out_is_not_called_healthy() -> None:
    model, optimizer = simple()
    with Monitor(model, optimizer) as monitor:
        one_step(model, optimizer)
        with pytest.warns(UserWarning, match="loss must be one number"):
            monitor.step(torch.ones(3))
    assert str(monitor.diagnosis()) == "No loss was recorded: it must be one number, a tensor or a float."


@pytest.mark.parametrize("what", ["closed", "attached"])
def test_a_step_that_does_not_count_says_so_once(what: str) -> None:
    model, optimizer = simple()
    monitor = Monitor(model).attach(optimizer)
    if what == "closed":
        monitor.close()
    with pytest.warns(UserWarning, match=f"Monitor.step: the monitor is {what}"):
        monitor.step(1.0)
    monitor.step(1.0)
    monitor.close()
    assert len(monitor.record.steps) == 0


def test_asking_does_not_take_the_place_of_acting(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = simple()
    monitor = Monitor(model, optimizer, on={"loss_nonfinite": "stop"})
    for step in range(5 + LAG):
        monitor.step(math.nan if step == 5 else 1.0)
        assert [finding.kind for finding in monitor.findings] == ["loss_nonfinite"] * (step >= 5)
    with pytest.raises(gradkern.TrainingStopped):
        monitor.step(1.0)
    monitor.close()


def test_an_action_may_ask_for_the_diagnosis() -> None:
    model, optimizer = simple()
    asked: list[str] = []
    on = {
        "grad_nonfinite": lambda monitor, _: asked.append(str(monitor.diagnosis())),
        "loss_nonfinite": "stop",
    }
    with Monitor(model, optimizer, on=on) as monitor:
        for step in range(4 + LAG):
            monitor.step(one_step(model, optimizer, math.nan if step == 4 else 1.0))
        with pytest.raises(gradkern.TrainingStopped):
            monitor.step(1.0)
    assert len(asked) == 1


def test_what_is_found_at_the_end_is_logged_and_handed_on(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    model, optimizer = simple()
    on = {"grad_nonfinite": lambda _, finding: seen.append(finding.kind), "loss_nonfinite": "stop"}
    with Monitor(model, optimizer, on=on) as monitor:
        for step in range(6):
            monitor.step(one_step(model, optimizer, math.nan if step == 5 else 1.0))
    assert "The loss became NaN at step 5" in caplog.text
    assert seen == ["grad_nonfinite"]


def test_rows_around_every_trouble_are_kept(tmp_path: Path) -> None:
    model, optimizer = simple()
    with Monitor(model, optimizer, path=tmp_path / "run.gk") as monitor:
        for step in range(300):
            loss = one_step(model, optimizer)
            monitor.step(math.nan if step in (100, 200, 299) else loss)
    assert gradkern.Run.open(tmp_path / "run.gk").incidents == [100, 200, 299]


@pytest.mark.parametrize("has_optimizer", [False, True])
def test_a_new_monitor_closes_the_one_before(has_optimizer: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = simple()
    first = Monitor(model, optimizer if has_optimizer else None)
    first.step(1.0)
    with Monitor(model, optimizer) as second:
        second.step(1.0)
    assert len(optimizer._optimizer_step_pre_hooks) == 0
    assert caplog.messages == [
        "A new Monitor watches the same parameters: the one before it was closed after step 0."
    ]
    assert first.record.steps.tolist() == [0]


def test_a_new_monitor_goes_on_in_the_file_of_the_one_before(tmp_path: Path) -> None:
    model, optimizer = simple()
    for _ in range(3):
        monitor = Monitor(model, optimizer, path=tmp_path / "run.gk")
        for _ in range(5):
            monitor.step(one_step(model, optimizer))
    monitor.close()
    assert gradkern.Run.open(tmp_path / "run.gk").steps.tolist() == list(range(15))


def test_monitors_of_other_parameters_stay(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    parts = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    with Monitor(model, parts[0]), Monitor(model, parts[1]):
        assert not caplog.messages


def test_a_monitor_that_is_forgotten_is_written_and_its_file_free_again(tmp_path: Path) -> None:
    for _ in range(2):
        model, optimizer = simple()
        monitor = Monitor(model, optimizer, path=tmp_path / "run.gk")
        monitor.step(one_step(model, optimizer))
        del model, optimizer, monitor
        gc.collect()
    assert gradkern.Run.open(tmp_path / "run.gk").steps.tolist() == [0, 1]


ENDING = """
import os, signal, sys, time
import torch
import gradkern

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
monitor = gradkern.Monitor(model, optimizer, path=sys.argv[1])
for step in range(6 if sys.argv[2] == "slow" else 40):
    optimizer.zero_grad()
    loss = model(torch.ones(4, 2)).square().mean()
    loss.backward()
    optimizer.step()
    monitor.step(loss)
    if sys.argv[2] == "slow":
        time.sleep(0.3)
if sys.argv[2] == "slow":
    time.sleep(0.7)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "raises":
    raise RuntimeError("the loop's own")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(("how", "steps"), [("slow", 6), ("raises", 40), ("ends", 40)])
def test_what_was_recorded_outlives_the_process(how: str, steps: int, tmp_path: Path) -> None:
    # "slow": killed a second after a step of its own length, with two steps of which no verdict was taken.
    path = tmp_path / "run.gk"
    subprocess.run([sys.executable, "-c", ENDING, path, how], capture_output=True, check=False)
    assert gradkern.Run.open(path).steps.tolist() == list(range(steps))


def test_a_failing_action_does_not_reach_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    def action(monitor: Monitor, finding: Any) -> None:
        raise RuntimeError("mine")

    model, optimizer = simple()
    with Monitor(model, optimizer, on={"loss_nonfinite": action}) as monitor:
        for _ in range(4):
            monitor.step(math.nan)
    assert "The action on loss_nonfinite failed: RuntimeError: mine" in caplog.text


def test_alarms_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = simple()
    with caplog.at_level(logging.INFO, logger="gradkern"), Monitor(model, optimizer) as monitor:
        for _ in range(20):
            monitor.step(math.nan)
    assert caplog.text.count("The loss became NaN at step 0") == 1


def test_a_run_is_kept_in_a_file(tmp_path: Path) -> None:
    model, optimizer = simple()
    with Monitor(model, optimizer, path=tmp_path / "run.gk", weights_every=5) as monitor:
        for _ in range(11):
            monitor.step(one_step(model, optimizer))
    run = gradkern.Run.open(tmp_path / "run.gk")
    memory = monitor.record
    assert run.steps.tolist() == list(range(11))
    assert np.array_equal(run.rows("grad_norm")[1], memory.rows("grad_norm")[1])
    assert np.array_equal(run.rows("update_norm")[0], [0, 5, 10])
    assert run.meta["parameters"] == memory.meta["parameters"]


def test_a_resumed_run_goes_on_behind_the_last_step(tmp_path: Path) -> None:
    model, optimizer = simple()
    for _ in range(2):
        with Monitor(model, optimizer, path=tmp_path / "run.gk") as monitor:
            for _ in range(4):
                monitor.step(one_step(model, optimizer))
    assert gradkern.Run.open(tmp_path / "run.gk").steps.tolist() == list(range(8))


def test_a_run_that_goes_on_from_a_checkpoint_is_numbered_from_there(tmp_path: Path) -> None:
    model, optimizer = simple()
    for first in (0, 3):
        with Monitor(model, optimizer, path=tmp_path / "run.gk", first_step=first) as monitor:
            for step in range(first, 6):
                monitor.step(float(first + step))
    assert monitor.record.steps.tolist() == [3, 4, 5]
    assert gradkern.Run.open(tmp_path / "run.gk").scalar("loss")[1].tolist() == [0, 1, 2, 6, 7, 8]


def test_the_norm_that_torch_gives_is_taken_as_the_one_before_clipping() -> None:
    model, optimizer = simple()
    with Monitor(model, optimizer) as monitor:
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 2)) - 100).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        monitor.step(loss, norm)
    assert monitor.record.scalar("grad_norm")[1].tolist() == [norm.item()]
    assert monitor.record.scalar("grad_clipped_norm")[1][0] == pytest.approx(1, rel=1e-5)


def test_a_clipper_is_read_instead_of_measuring_again() -> None:
    model, optimizer = simple()
    clipper = gradkern.Clipper(model, 0.5).attach(optimizer)
    with Monitor(model, optimizer, clipper=clipper) as monitor:
        for step in range(4):
            monitor.step(one_step(model, optimizer, math.nan if step == 2 else 1e4))
    record = monitor.record
    assert record.scalar("skipped")[1].tolist() == [0, 0, 1, 0]
    assert record.scalar("clip_threshold")[1].tolist() == [0.5] * 4
    assert np.isnan(record.scalar("grad_norm")[1][2])
    assert [event["kind"] for event in record.events].count("skip") == 1


def test_a_step_that_a_scaler_skips_is_a_back_off() -> None:
    model, optimizer = simple()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Monitor(model, optimizer) as monitor:
        for step in range(5):
            optimizer.zero_grad()
            loss = model(torch.ones(4, 2)).square().mean() * (math.inf if step == 3 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.step(loss, scaler=scaler)
    record = monitor.record
    assert record.scalar("skipped")[1].tolist() == [0, 0, 0, 1, 0]
    assert record.scalar("loss_scale")[1].tolist() == [1024, 1024, 1024, 1024, 512]
    assert [(e["step"], e["kind"]) for e in record.events if e["kind"] == "amp_backoff"] == [
        (3, "amp_backoff")
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_recorded_without_the_loss_scale(fused: bool) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = model(torch.ones(4, 2)).square().mean()
    expected = torch.stack([g.double().norm() for g in torch.autograd.grad(loss, list(model.parameters()))])
    loss = model(torch.ones(4, 2)).square().mean()
    with Monitor(model, optimizer) as monitor:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        monitor.step(loss, scaler=scaler)
    np.testing.assert_allclose(monitor.record.rows("grad_norm")[1][0], expected, rtol=1e-6)


def test_data_are_looked_at() -> None:
    model, optimizer = simple()
    x, y = torch.tensor([[1.0, -3.0], [2.0, 4.0]]), torch.tensor([[7.0], [math.nan]])
    with Monitor(model, optimizer) as monitor:
        monitor.step(one_step(model, optimizer), batch=(x, y))
        monitor.step(one_step(model, optimizer), batch={"x": x, "label": y})
    record = monitor.record
    assert record.scalar("data_abs_max")[1].tolist() == [4, 4]
    assert record.scalar("target_abs_max")[1].tolist() == [7, 7]
    assert record.scalar("data_nonfinite")[1].tolist() == [1, 1]


def test_the_spread_of_inputs_is_their_standard_deviation() -> None:
    model, optimizer = simple()
    x = torch.randn(50, 2) * 3 + 100
    with Monitor(model, optimizer) as monitor:
        monitor.step(one_step(model, optimizer), batch=x)
    assert monitor.record.scalar("data_std")[1][0] == pytest.approx(
        x.double().std(correction=0).item(), rel=1e-9
    )


def origin(steps: int, spoil: Callable[[int, nn.Module, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, activations_every=1) as monitor:
        for step in range(steps):
            x = spoil(step, model, torch.ones(4, 2))
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step(loss, batch=x)
    return next(e["detail"] for e in monitor.record.events if e["kind"] == "first_nonfinite")


def test_bad_data_come_first() -> None:
    found = origin(6, lambda step, _, x: x * (math.nan if step == 4 else 1))
    assert (found["where"], found["step"]) == ("data", 4)


def test_weights_that_went_bad_before_the_step_are_named() -> None:
    def spoil(step: int, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if step == 3:
            model[2].weight.data[0, 1] = math.inf
        return x

    found = origin(6, spoil)
    assert (found["where"], found["name"], found["step"]) == ("optimizer", "2.weight", 3)


def test_a_module_that_makes_a_nan_is_named() -> None:
    class Bad(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 0).log() * 0

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), Bad(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer) as monitor:
        monitor.step(one_step(model, optimizer))
    found = next(e["detail"] for e in monitor.record.events if e["kind"] == "first_nonfinite")
    assert (found["where"], found["name"]) == ("forward", "1")


def test_a_gradient_that_goes_bad_in_backward_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda grad: grad * math.inf)

    model[0].register_forward_hook(spoil)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer) as monitor:
        monitor.step(one_step(model, optimizer))
    found = next(e["detail"] for e in monitor.record.events if e["kind"] == "first_nonfinite")
    assert (found["where"], found["name"]) == ("backward", "0.bias")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be a whole number from 1 up"),
        ({"on": {"nonsense": "log"}}, "on has no kind 'nonsense'"),
        ({"on": {"error": "sing"}}, "'log', 'clip', 'stop' or a function"),
        ({"on": {"error": "clip"}}, "Pass Monitor"),
        ({"max_bytes": 0}, "max_bytes must be a whole number from 1 up"),
        ({"first_step": -1}, "first_step must be a whole number from 0 up"),
        (
            {"optimizer": simple()[1]},
            "the SGD holds none of the model's 2 parameters. Was the model made anew",
        ),
        (
            {"clipper": gradkern.Clipper(nn.Linear(1, 1))},
            "the Clipper holds none of the model's 2 parameters",
        ),
    ],
)
def test_an_impossible_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Monitor(nn.Linear(1, 1), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipper": 1.0}, "clipper must be a gradkern.Clipper, got 1.0"),
        ({"keep_batch": "yes"}, "keep_batch must be True or False, got 'yes'"),
        ({"sinks": LogSink()}, "Pass sinks="),
    ],
)
def test_an_argument_of_another_type_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Monitor(nn.Linear(1, 1), **arguments)


def test_an_optimizer_of_another_model_is_not_attached() -> None:
    with (
        Monitor(nn.Linear(1, 1)) as monitor,
        pytest.raises(ValueError, match="holds none of the model's 2 parameters"),
    ):
        monitor.attach(simple()[1])


def test_replaying_the_last_step_repeats_it_to_the_bit() -> None:
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with Monitor(model, optimizer, keep_batch=True) as monitor:
        for x, y in batches(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            monitor.step(loss, batch=(x, y))
        after = [p.detach().clone() for p in [*model.parameters(), *model.buffers()]]
        random = torch.get_rng_state()
        with monitor.replay() as (x, y):
            again = F.cross_entropy(model(x), y)
        assert torch.equal(again, loss)
        now = [*model.parameters(), *model.buffers()]
        assert all(torch.equal(a, b) for a, b in zip(after, now, strict=True))
        assert torch.equal(random, torch.get_rng_state())


def test_importing_gradkern_does_not_import_the_monitor() -> None:
    code = "import sys, gradkern; print([m for m in ('gradkern.monitor', 'sqlite3') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["Monitor", "Run", "TrainingStopped"])
def test_without_numpy_it_says_what_to_install(name: str) -> None:
    code = f"import sys; sys.modules['numpy'] = None; import gradkern; gradkern.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    wanted = f"gradkern.{name} needs numpy, which is not installed: pip install 'gradkern[monitor]'"
    assert wanted in done.stderr
