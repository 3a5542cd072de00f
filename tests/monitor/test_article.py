"""The article's example, watched: the run is named, and advice that is followed as printed mends it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.diagnosis import Advice, Diagnosis

STEPS = 400


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(500, 20)
    return x, x @ (100 * torch.rand(20, 1))


def train(advice: Advice | None = None) -> tuple[float, float, Diagnosis]:
    """The regression of the article's sequel, with one line of advice put where such a line goes.

    Returns the loss on all data before and after, and the diagnosis.
    """
    torch.set_num_threads(1)
    x, y = data()
    model = nn.Sequential(nn.Linear(20, 25), nn.ReLU(), nn.Linear(25, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scope = {"gradkern": gradkern, "torch": torch, "model": model, "optimizer": optimizer}
    scope |= {"y": y}
    clips = advice is not None and advice.line.startswith("gradkern.clip_")
    if advice is not None and not clips:
        exec(advice.line, scope)
    y = scope["y"]

    def whole_loss() -> float:
        with torch.no_grad():
            return nn.functional.mse_loss(model(x), y).item()

    before = whole_loss()
    with gradkern.Monitor(model, optimizer) as monitor:
        for _ in range(STEPS):
            rows = torch.randint(0, 500, (32,))
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            loss.backward()
            if clips:
                exec(advice.line, scope)
            optimizer.step()
            monitor.step(loss, batch=(x[rows], y[rows]))
        return before, whole_loss(), monitor.diagnosis()


@pytest.fixture(scope="module")
def exploded() -> tuple[float, float, Diagnosis]:
    return train()


def test_left_alone_it_explodes(exploded: tuple[float, float, Diagnosis]) -> None:
    assert not math.isfinite(exploded[1])


def test_the_explosion_is_named_with_its_step_and_layer(exploded: tuple[float, float, Diagnosis]) -> None:
    diagnosis = exploded[2]
    assert diagnosis.cause is not None
    kinds = {diagnosis.cause.kind, *(finding.kind for finding in diagnosis.consequences)}
    assert "exploding_gradient" in kinds
    assert diagnosis.began["layer"] in ("0", "2")
    assert isinstance(diagnosis.began["step"], int)
    assert diagnosis.began["step"] < 10


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_every_piece_of_advice_followed_as_printed_mends_it(
    exploded: tuple[float, float, Diagnosis], rank: int
) -> None:
    advice = exploded[2].advice[rank]
    before, after, _ = train(advice)
    assert after < before, advice.title


class Log(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.log()


def watch_a_bad_batch(
    at: int, look: Callable[[gradkern.Monitor, nn.Module], None]
) -> tuple[gradkern.Monitor, list[Tensor]]:
    """A fused AdamW run. The batch of one step holds a zero, of which the network takes the logarithm.

    The loss stays finite, its gradient does not.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(Log(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    clipper = gradkern.Clipper(model, 1.0).attach(optimizer)
    monitor = gradkern.Monitor(model, optimizer, clipper=clipper, keep_batch=True)
    weights = []
    for step in range(at + 5):
        x = torch.rand(16, 6) + 0.5
        if step == at:
            x[3, 2] = 0.0
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss.backward()
        optimizer.step()
        monitor.step(loss, batch=(x, x.sum(1, keepdim=True)))
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
        if step == at:
            look(monitor, model)
    monitor.close()
    return monitor, weights


def test_a_bad_batch_is_skipped_named_by_step_and_parameter_and_traced_to_its_operation() -> None:
    origins = []

    def look(monitor: gradkern.Monitor, model: nn.Module) -> None:
        with monitor.replay() as (inputs, targets):

            def again() -> Tensor:
                loss = nn.functional.mse_loss(model(inputs), targets)
                loss.backward()
                return loss

            origins.append(gradkern.trace_nonfinite(again, model))

    monitor, weights = watch_a_bad_batch(12, look)
    assert torch.equal(weights[12], weights[11])
    assert not torch.equal(weights[13], weights[12])
    assert weights[-1].isfinite().all()
    steps, skipped = monitor.record.scalar("skipped")
    assert steps[skipped > 0].tolist() == [12]
    (bad,) = [finding for finding in monitor.findings if finding.kind == "grad_nonfinite"]
    assert (bad.step, bad.names[0]) == (12, "1.weight")
    assert (origins[0].op, origins[0].module, origins[0].direction) == ("aten.log.default", "0", "forward")
