"""Who else is at work around the step of an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gradkern
from gradkern.monitor.around import attached_stepper, calling_scaler


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_is_found_in_a_hook_even_behind_a_schedule(fused: bool) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    found: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: found.append(calling_scaler()))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    optimizer.step()
    assert found == [scaler, None]


def test_a_clipper_is_found_while_it_is_attached() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert attached_stepper(optimizer) is None
    clipper = gradkern.Clipper(model).attach(optimizer)
    assert attached_stepper(optimizer) is clipper._stepper
    clipper.detach()
    assert attached_stepper(optimizer) is None
