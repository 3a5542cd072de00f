"""What the last step began with, put back for as long as it is asked for."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradkern.monitor import Monitor
from gradkern.monitor.replay import Replay


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 1))


def test_dropout_repeats_although_the_batch_was_drawn_after_the_last_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = torch.randn(50, 4)
    with Monitor(model, optimizer, keep_batch=True) as monitor:
        for _ in range(3):
            x = data[torch.randint(0, 50, (8,))]
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step(loss, batch=x)
            with monitor.replay() as given:
                assert torch.equal(model(given).square().mean(), loss)


@pytest.mark.parametrize("known", [True, False])
def test_the_first_training_pass_of_several_is_what_a_step_began_with(known: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(8, 4)
    with Monitor(model, optimizer if known else None, keep_batch=True) as monitor:
        for _ in range(2):
            model.eval()(x)
            with torch.no_grad():
                model.train()(x)
            losses = [model(x).square().mean() for _ in range(2)]
            sum(losses).backward()  # type: ignore[union-attr]
            optimizer.step()
            monitor.step(losses[0].detach(), batch=x)
        with monitor.replay() as given:
            assert torch.equal(model(given).square().mean(), losses[0])


def test_where_no_pass_is_seen_the_optimizers_step_says_when() -> None:
    torch._dynamo.reset()
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    forward = torch.compile(model, backend="eager")
    x = torch.randn(8, 4)
    with Monitor(model, optimizer, keep_batch=True) as monitor:
        for _ in range(2):
            loss = forward(x).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step(loss, batch=x)
        with monitor.replay():
            torch.testing.assert_close(model(x).square().mean(), loss)


def test_one_copy_of_parameters_and_buffers_is_held() -> None:
    def held() -> int:
        gc.collect()
        return sum(
            t.numel() for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.numel() > 1e5
        )

    model = nn.Linear(1000, 1000)
    replay = Replay(model)
    before = held()
    for _ in range(3):
        model(torch.ones(1, 1000))
        replay.end(None)
    assert held() - before == 1000 * 1000
    with replay:
        assert held() - before == 2 * 1000 * 1000
    assert held() - before == 1000 * 1000


def test_what_is_kept_follows_the_models_dtype() -> None:
    model = nn.Linear(4, 1)
    replay = Replay(model)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)(torch.ones(2, 4, dtype=dtype))
        replay.end(None)
        now = [param.clone() for param in model.parameters()]
        with replay:
            assert all(torch.equal(a, b) for a, b in zip(now, model.parameters(), strict=True))


def test_when_the_next_step_has_begun_the_last_one_is_gone() -> None:
    model = network()
    with Monitor(model, keep_batch=True) as monitor:
        with pytest.raises(RuntimeError, match="no step was seen yet"):
            monitor.replay()
        model(torch.randn(8, 4))
        monitor.step(1.0)
        monitor.replay()
        model(torch.randn(8, 4))
        with pytest.raises(RuntimeError, match="the next step has begun"):
            monitor.replay()


def test_an_error_inside_puts_everything_back() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, keep_batch=True) as monitor:
        loss = F.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 1))
        loss.backward()
        optimizer.step()
        monitor.step(loss)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(KeyError), monitor.replay():
            raise KeyError
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_if_a_copy_cannot_be_made_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(self: Any) -> Any:
        raise torch.OutOfMemoryError

    model = network()
    with Monitor(model, keep_batch=True) as monitor:
        monkeypatch.setattr(Tensor, "clone", no_memory)
        model(torch.randn(8, 4))
        monkeypatch.undo()
        monitor.step(1.0)
        assert "steps are not kept for a replay any more" in caplog.text
        with pytest.raises(RuntimeError, match="no step was seen"):
            monitor.replay()
