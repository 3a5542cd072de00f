"""The norms of the gradients by the hidden states, against what autograd says of a network written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern

KINDS: list[type[nn.RNNBase]] = [nn.RNN, nn.LSTM, nn.GRU]


def written_out(rnn: nn.RNN, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A one-layer tanh network in double, by its formula: outputs ``[time, batch, units]`` and its states."""
    weights = {name: p.detach().double() for name, p in rnn.named_parameters()}
    h = torch.zeros(x.shape[1], rnn.hidden_size, dtype=torch.float64, requires_grad=True)
    states: list[Tensor] = []
    for given in x.double():
        h = torch.tanh(
            given @ weights["weight_ih_l0"].T
            + weights["bias_ih_l0"]
            + h @ weights["weight_hh_l0"].T
            + weights["bias_hh_l0"]
        )
        states.append(h)
    return torch.stack(states), states


def test_norms_are_those_of_the_network_written_out() -> None:
    rnn = nn.RNN(2, 5)
    x = torch.randn(7, 3, 2)
    norms = gradkern.probe_time(lambda: rnn(x)[0].square().sum(), rnn)
    out, states = written_out(rnn, x)
    grads = torch.autograd.grad(out.square().sum(), states)
    expected = torch.stack([grad.norm() for grad in grads])
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_run_step_by_step_it_computes_the_same(kind: Any, batch_first: bool, layers: int) -> None:
    rnn = kind(2, 4, num_layers=layers, batch_first=batch_first)
    x = torch.randn(3, 5, 2)
    losses = []

    def step() -> Tensor:
        out, hidden = rnn(x)
        last = hidden[0] + hidden[1] if isinstance(hidden, tuple) else hidden
        losses.append(out.square().sum() + last.sum())
        return losses[-1]

    step()
    norms = gradkern.probe_time(step, rnn)
    assert len(norms) == (5 if batch_first else 3)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_a_state_that_the_loss_does_not_see_has_norm_0() -> None:
    rnn = nn.GRU(2, 4)
    norms = gradkern.probe_time(lambda: rnn(torch.ones(6, 1, 2))[0][2].sum(), rnn)
    assert (norms[:3] > 0).all()
    assert norms[3:].tolist() == [0, 0, 0]


def test_weights_below_one_make_gradients_fade() -> None:
    rnn = nn.RNN(1, 4, nonlinearity="relu", bias=False)
    nn.init.ones_(rnn.weight_ih_l0)
    nn.init.eye_(rnn.weight_hh_l0)
    rnn.weight_hh_l0.data *= 0.5
    norms = gradkern.probe_time(lambda: rnn(torch.ones(5, 1, 1))[0][-1].sum(), rnn)
    assert norms.tolist() == [2 * 0.5**4, 2 * 0.5**3, 2 * 0.5**2, 2 * 0.5, 2]


def test_initial_states_are_taken() -> None:
    rnn = nn.LSTM(2, 3)
    start = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    losses = []

    def step() -> Tensor:
        losses.append(rnn(torch.ones(2, 4, 2), start)[0].sum())
        return losses[-1]

    step()
    gradkern.probe_time(step, rnn)
    torch.testing.assert_close(losses[0], losses[1])


def test_a_sequence_without_batch_is_taken() -> None:
    rnn = nn.LSTM(2, 3)
    shapes = []

    def step() -> Tensor:
        out, (hidden, cell) = rnn(torch.ones(4, 2))
        shapes.append((out.shape, hidden.shape, cell.shape))
        return out.sum()

    step()
    assert len(gradkern.probe_time(step, rnn)) == 4
    assert shapes[0] == shapes[1]


def test_the_calls_of_a_cell_are_its_steps() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for given in x:
                state = self.cell(given, state)
            assert state is not None
            return state[0]

    net = Net()
    assert len(gradkern.probe_time(lambda: net(torch.ones(5, 2, 2)).sum(), net)) == 5


def test_dropout_repeats_and_everything_is_put_back() -> None:
    model = nn.GRU(2, 4, num_layers=2, dropout=0.5)
    random = torch.get_rng_state()
    x = torch.ones(3, 2, 2)
    first = gradkern.probe_time(lambda: model(x)[0].sum(), model)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(first, gradkern.probe_time(lambda: model(x)[0].sum(), model))
    assert "forward" not in model.__dict__
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "no RNN, LSTM or GRU"),
        (nn.LSTM(2, 3, bidirectional=True), "it is bidirectional"),
        (nn.LSTM(2, 3, proj_size=1), "projects its hidden state"),
        (nn.ModuleList([nn.GRU(2, 3), nn.GRU(2, 3)]), "pass module=, one of '0', '1'"),
    ],
)
def test_what_cannot_be_stepped_is_refused_with_a_reason(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradkern.probe_time(lambda: torch.zeros(()), model)


def test_a_module_that_is_not_there_is_refused_with_those_that_are() -> None:
    rnn = nn.GRU(2, 3)
    with pytest.raises(ValueError, match=r"module='rnn'. The model has: the model itself \(module=''\)"):
        gradkern.probe_time(lambda: torch.zeros(()), rnn, module="rnn")
    with pytest.raises(ValueError, match=r"module='1'. The model has: '0'"):
        gradkern.probe_time(lambda: torch.zeros(()), nn.Sequential(rnn, nn.ReLU()), module="1")


def test_a_step_that_does_not_call_the_network_is_refused() -> None:
    loss = torch.zeros((), requires_grad=True)
    with pytest.raises(ValueError, match="step_fn did not call the model itself"):
        gradkern.probe_time(lambda: loss, nn.GRU(2, 3))


@pytest.mark.parametrize("function", [gradkern.probe_time, gradkern.trace_nonfinite])
def test_a_result_in_place_of_a_function_is_refused(function: Any) -> None:
    name = function.__name__
    with pytest.raises(TypeError, match=f"{name}: step_fn must be a function .* got Tensor"):
        function(torch.zeros(()), nn.GRU(2, 3))
    with pytest.raises(TypeError, match=f"{name}: model must be a torch.nn.Module, got str"):
        function(lambda: None, "model")


def test_packed_sequences_are_refused_with_a_reason() -> None:
    rnn = nn.GRU(2, 3)
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(4, 2, 2), [4, 2])
    with pytest.raises(ValueError, match="a PackedSequence cannot be run step by step"):
        gradkern.probe_time(lambda: rnn(packed)[0].data.sum(), rnn)
    assert "forward" not in rnn.__dict__


def test_a_loss_that_was_differentiated_already_is_refused() -> None:
    rnn = nn.RNN(2, 3)

    def step() -> Tensor:
        loss = rnn(torch.ones(4, 2, 2))[0].square().sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="must not call backward"):
        gradkern.probe_time(step, rnn)


def test_the_monitor_records_the_profile() -> None:
    rnn = nn.RNN(2, 3)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.01)
    with gradkern.Monitor(rnn, optimizer) as monitor:
        monitor.step(1.0)
        norms = monitor.probe_time(lambda: rnn(torch.ones(4, 2, 2))[0].sum())
    steps, rows = monitor.record.rows("time_grad_norm")
    assert steps.tolist() == [0]
    torch.testing.assert_close(torch.from_numpy(rows[0].copy()), norms.float())
