"""Small training runs, watched as a user would watch them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradkern
from gradkern.diagnosis import Diagnosis, Finding
from gradkern.record import Record

Batch = tuple[Tensor, Tensor]
LossFn = Callable[[nn.Module, Tensor, Tensor], Tensor]

# Of a run whose gradients through time are wanted, steps from one probe to the next.
PROBE_EVERY = 50


@dataclass
class Setup:
    """Everything that a run is made of. `batch(step)` gives inputs and targets."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[int], Batch]
    loss: LossFn
    steps: int = 200
    clip: float | None = None
    scheduler: Any = None
    scaler: torch.amp.GradScaler | None = None
    zero_grad: bool = True
    probes_time: bool = False


@dataclass(frozen=True)
class Watched:
    """What a monitor knows of a run at its end."""

    record: Record
    diagnosis: Diagnosis
    live: dict[str, Finding]
    """Alarms while the run went on, by kind: the first of each."""


def watch(setup: Setup) -> Watched:
    """Train under a `gradkern.Monitor` with its default settings."""
    model, optimizer = setup.model, setup.optimizer
    live: dict[str, Finding] = {}

    def keep(monitor: gradkern.Monitor, finding: Finding) -> None:
        live.setdefault(finding.kind, finding)

    with gradkern.Monitor(model, optimizer, on={"warning": keep, "error": keep}) as monitor:
        for step in range(setup.steps):
            x, y = setup.batch(step)
            if setup.probes_time and step % PROBE_EVERY == 0:
                monitor.probe_time(lambda x=x, y=y: setup.loss(model, x, y))
            if setup.zero_grad:
                optimizer.zero_grad()
            loss = setup.loss(model, x, y)
            scaled = setup.scaler.scale(loss) if setup.scaler else loss
            if scaled.requires_grad:
                scaled.backward()
            stats = None
            if setup.scaler:
                setup.scaler.unscale_(optimizer)
            if setup.clip is not None:
                stats = gradkern.clip_(model.named_parameters(), setup.clip)
            if setup.scaler:
                setup.scaler.step(optimizer)
                setup.scaler.update()
            else:
                optimizer.step()
            monitor.step(loss, stats, (x, y), setup.scaler)
            if setup.scheduler is not None:
                setup.scheduler.step()
        return Watched(monitor.record, monitor.diagnosis(), live)
