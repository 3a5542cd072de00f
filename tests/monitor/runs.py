"""Small training runs, with and without a monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradkern
from gradkern.monitor import Monitor


class Net(nn.Module):
    """Dropout, batch norm, an in-place ReLU, a residual connection; with `reentrant`, checkpointing."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(8, 16)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 16))
        self.norm = nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        if self.reentrant is None:
            h = h + self.block(h)
        else:
            h = h + checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.last(self.norm(h))


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(12, 8, generator=generator), torch.randint(0, 3, (12,), generator=generator))
        for _ in range(steps)
    ]


def train(
    model: nn.Module,
    make_monitor: Callable[[nn.Module, torch.optim.Optimizer], Monitor] | None,
    *,
    forward: nn.Module | None = None,
    steps: int = 12,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
) -> tuple[list[Tensor], Monitor | None]:
    """Train from seed 0. Returns weights, buffers, losses, random state at the end; and the monitor."""
    torch.manual_seed(0)
    optimizer = (make_optimizer or (lambda params: torch.optim.AdamW(params, 1e-2)))(model.parameters())
    monitor = None if make_monitor is None else make_monitor(model, optimizer)
    losses = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy((model if forward is None else forward)(x), y)
        loss.backward()
        stats = gradkern.clip_(model.named_parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if monitor is not None:
            monitor.step(loss, stats, batch=(x, y))
    if monitor is not None:
        monitor.close()
    state = [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]
    return [*state, torch.stack(losses), torch.get_rng_state()], monitor
