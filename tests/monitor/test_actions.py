"""What is done about findings: said, handed on, clipped, stopped."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import gradkern
from gradkern.diagnosis import Finding
from gradkern.monitor import Monitor, TrainingStopped
from gradkern.monitor.actions import ClipThreshold, Voice
from gradkern.monitor.schedule import LAG
from gradkern.record import MemoryRecord


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
    assert not caplog.records


def test_the_first_alarm_says_where_more_is_to_be_had(caplog: pytest.LogCaptureFixture) -> None:
    voice = Voice("")
    for kind in ("loss_nonfinite", "grad_nonfinite"):
        voice.find(Finding(kind, "error", 0, (), 0.0, 0.0, {}, f"{kind}."))
    assert caplog.messages == [
        "loss_nonfinite. monitor.diagnosis() says what it comes from and what to do.",
        "grad_nonfinite.",
    ]


def test_a_sentence_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    voice = Voice("")
    for severity in ("warning", "error"):
        voice.find(Finding("loss_nonfinite", severity, 0, (), 0.0, 0.0, {}, "Lost."))
    assert len(caplog.records) == 1


def test_lines_begin_with_the_name_of_the_monitor(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = regression()
    with Monitor(model, optimizer, name="critic") as monitor:
        for _ in range(4):
            monitor.step(math.nan)
    assert caplog.messages
    assert all(message.startswith("critic: ") for message in caplog.messages)


def test_where_logging_is_not_set_up_lines_begin_with_gradkern() -> None:
    code = """
from gradkern.monitor.actions import Voice
Voice("critic").tell("Clipping at 1.")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "gradkern: critic: Clipping at 1.\n"


def test_a_warning_that_would_be_an_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Voice("").warn("stats must be a norm.", stacklevel=1)
    assert caplog.messages == ["stats must be a norm."]


def test_a_rank_without_a_recommendation_meets_the_others_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer = regression()
    clipper = gradkern.Clipper(model, 1e6).attach(optimizer)
    monkeypatch.setattr("gradkern.monitor.actions.recommend_threshold", None)
    finding = Finding("grad_nonfinite", "error", 0, (), 0.0, 0.0, {}, "")
    done = ClipThreshold(clipper).recommend(MemoryRecord(), finding, lambda own: min(own, 3.0))
    assert done is not None
    assert done["to"] == 3.0


@pytest.mark.parametrize("on", ["stop", ["error"]])
def test_actions_that_are_no_mapping_are_refused(on: object) -> None:
    with pytest.raises(
        TypeError, match="on must be a mapping from kinds or severities of findings to actions"
    ):
        Monitor(regression()[0], on=on)  # type: ignore[arg-type]
