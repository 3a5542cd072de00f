"""Two ranks, of which one sees a bad loss: both stop, after the same step, even if a monitor has failed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

import gradkern
from gradkern.monitor.schedule import Schedule

RANK = """
import json, math, sys
import torch
import torch.distributed as dist
import gradkern

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
broken, asks = int(sys.argv[4]), sys.argv[5] == "True"
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
clipper = gradkern.Clipper(model, 1e6).attach(optimizer)
on = {"loss_nonfinite": "stop", "grad_nonfinite": "clip"}
monitor = gradkern.Monitor(model, optimizer, clipper=clipper, on=on)
made = 0
try:
    for step in range(60):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).square().mean().backward()
        bad = rank == 1 and step == 25
        if bad:
            model.weight.grad.fill_(math.nan)
        optimizer.step()
        if rank == 0 and step == broken:
            monitor._reader = None
        if asks and rank == 0 and step % 7 == 0:
            str(monitor.diagnosis()), monitor.findings, monitor.record
        made = step
        monitor.step(math.nan if bad else 1.0)
except gradkern.TrainingStopped as stopped:
    result = [made, stopped.finding.kind, stopped.finding.step, clipper.policy.max_norm]
else:
    result = [made, None, None, None]
with open(out, "w") as file:
    json.dump(result, file)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed")
@pytest.mark.parametrize(("broken", "asks"), [(-1, False), (-1, True), (12, False), (21, False)])
def test_all_ranks_do_the_same_after_the_same_step(broken: int, asks: bool, tmp_path: Path) -> None:
    # With `broken`, the monitor of the rank that saw nothing fails at that step; with `asks`, it is asked for
    # its diagnosis now and then, as a rank that prints does.
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RANK,
                str(rank),
                str(tmp_path / "store"),
                str(tmp_path / f"{rank}.json"),
                str(broken),
                str(asks),
            ]
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[:3] == [41, "loss_nonfinite", 25]
    assert first[3] < 1e6


def test_where_the_other_ranks_are_gone_each_acts_for_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(findings: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("gradkern.monitor.agreement.is_needed", lambda: True)
    monkeypatch.setattr("gradkern.monitor.agreement.gather", gone)
    seen: list[str] = []
    on = {"loss_nonfinite": lambda _, finding: seen.append(finding.kind)}
    with gradkern.Monitor(nn.Linear(1, 1), on=on) as monitor:
        for _ in range(60):
            monitor.step(math.nan)
    assert seen == ["loss_nonfinite"]
    assert (
        caplog.text.count("The other ranks cannot be reached: RuntimeError: Connection closed by peer.") == 1
    )


def test_a_monitor_that_has_failed_does_not_raise_when_the_other_ranks_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(findings: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("gradkern.monitor.agreement.is_needed", lambda: True)
    monkeypatch.setattr("gradkern.monitor.agreement.gather", gone)
    monitor = gradkern.Monitor(nn.Linear(1, 1), on={"error": "log"})
    monitor._take_rate = None  # type: ignore[assignment,method-assign]
    with pytest.warns(UserWarning, match="the monitor failed at step 0"):
        monitor.step(1.0)
    for _ in range(30):
        monitor.step(1.0)
    monitor.close()


def test_ranks_meet_at_steps_that_do_not_depend_on_numbers() -> None:
    schedule = Schedule(0, every=20)
    assert [step for step in range(60) if schedule.is_due(step, {"loss": 10.0**step})] == [19, 39, 59]
