"""What is done about findings: said, handed on, clipped, stopped."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

import gradkern
from gradkern.diagnosis import Finding
from gradkern.monitor import Monitor, TrainingStopped
from gradkern.monitor.schedule import LAG


def regression(lr: float = 0.01) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def gradients(model: nn.Module, step: int, factor: float = 1.0) -> torch.Tensor:
    data = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    loss = (model(data[:, :4]) - data[:, 4:]).square().mean() * factor
    loss.backward()
    return loss


def explode(monitor: Monitor, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 60) -> int:
    """Thirty sound steps, then a loss ten times as large at every step. Returns how many were made."""
    for step in range(steps):
        loss = gradients(model, step, 10.0 ** max(step - 29, 0))
        optimizer.step()
        monitor.step(loss)
    return steps


def test_stopping_raises_at_the_end_of_the_step_two_later() -> None:
    model, optimizer = regression()
    monitor = Monitor(model, optimizer, on={"loss_nonfinite": "stop"})
    for step in range(4 + LAG):
        monitor.step(math.nan if step == 4 else gradients(model, step))
        before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TrainingStopped, match="The loss became NaN at step 4") as stopped:
        monitor.step(gradients(model, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert stopped.value.finding.step == 4
    assert stopped.value.diagnosis.alarms
    assert [event["step"] for event in monitor.record.events if event["kind"] == "stopped"] == [4]
    monitor.close()


def test_a_stopped_run_may_go_on() -> None:
    model, optimizer = regression()
    monitor = Monitor(model, optimizer, on={"loss_nonfinite": "stop"})
    for _ in range(LAG):
        monitor.step(math.nan)
    with pytest.raises(TrainingStopped):
        monitor.step(math.nan)
    for _ in range(5):
        monitor.step(1.0)
    monitor.close()
    assert len(monitor.record.steps) == 3 + 5


def test_a_function_is_called_once_with_the_finding() -> None:
    seen: list[tuple[Monitor, Finding]] = []
    model, optimizer = regression()
    with Monitor(model, optimizer, on={"loss_nonfinite": lambda *given: seen.append(given)}) as monitor:
        for _ in range(30):
            monitor.step(math.nan)
    assert [(who is monitor, finding.kind) for who, finding in seen] == [(True, "loss_nonfinite")]


def test_a_severity_stands_for_all_its_kinds_without_an_action_of_their_own() -> None:
    seen: list[str] = []
    model, optimizer = regression()
    on = {"error": lambda _, finding: seen.append(finding.kind), "loss_nonfinite": "log"}
    with Monitor(model, optimizer, on=on) as monitor:
        for step in range(6):
            loss = gradients(model, step, math.nan)
            optimizer.step()
            monitor.step(loss)
    assert "grad_nonfinite" in seen
    assert "loss_nonfinite" not in seen


def test_the_threshold_is_set_to_the_recommendation_recorded_and_put_back() -> None:
    model, optimizer = regression()
    clipper = gradkern.Clipper(model, 1e6).attach(optimizer)
    monitor = Monitor(model, optimizer, clipper=clipper, on={"error": "clip"})
    explode(monitor, model, optimizer)
    assert isinstance(clipper.policy, gradkern.GlobalNorm)
    changed = clipper.policy.max_norm
    assert changed < 100
    events = [event["detail"] for event in monitor.record.events if event["kind"] == "clip_threshold"]
    assert events[0]["from"] == 1e6
    assert events[-1]["to"] == changed
    gradients(model, 0, 1e5)
    optimizer.step()
    assert clipper.metrics()["clipped_norm"] == pytest.approx(changed, rel=1e-12)
    for _ in events:
        assert monitor.undo_clip()
    assert not monitor.undo_clip()
    assert clipper.policy.max_norm == 1e6
    monitor.close()


def test_setting_a_threshold_needs_a_policy_that_has_one() -> None:
    model, _ = regression()
    clipper = gradkern.Clipper(model, gradkern.AGC(0.1))
    with pytest.raises(ValueError, match="sets the threshold of a GlobalNorm"):
        Monitor(model, clipper=clipper, on={"error": "clip"})


def test_a_healthy_run_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = regression()
    with caplog.at_level(logging.INFO, logger="gradkern"), Monitor(model, optimizer) as monitor:
        for step in range(200):
            loss = gradients(model, step)
            optimizer.step()
            monitor.step(loss)
    assert not [finding for finding in monitor.findings if finding.is_alarm]
    assert "gradkern:" not in caplog.text
