"""How gradients change back through the time steps of a recurrent network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradkern.monitor.replay import check_call, untouched


def probe_time(step_fn: Callable[[], Tensor], model: nn.Module, *, module: str | None = None) -> Tensor:
    """‖∂L/∂h_t‖ of a recurrent network: how strongly the loss depends on each of its hidden states.

    The network is run again one time step at a time, since the fused kernels keep no state in between, and
    differentiated once. Everything is put back: parameters, buffers, gradients, random state.

    Args:
        step_fn: runs the forward pass and returns the loss, one number.
        model: with one RNN, LSTM or GRU (or a cell of one), single-direction, without projections.
        module: the path of the one to look at, if there are several.

    Returns:
        float64 ``[time]`` on the device of the hidden states. Batch, units and layers are taken together; of
        an LSTM it is the hidden, not the cell state. If the network is called several times, the steps follow
        one another in the order of the calls. 0 where the loss does not depend on a state.

    Raises:
        TypeError: `step_fn` is no function, or `model` no module.
        ValueError: there is no such module, there are several, or it is of a kind that cannot be stepped; the
            loss is no single number.

    >>> rnn = torch.nn.RNN(2, 3)
    >>> norms = gradkern.probe_time(lambda: rnn(torch.ones(5, 1, 2))[0][-1].sum(), rnn)
    >>> norms.shape, round(float(norms[-1]), 3)
    (torch.Size([5]), 1.732)
    """
    check_call("probe_time", step_fn, model)
    path, chosen = _choose(model, module)
    _check(path, chosen)
    with untouched(model), torch.enable_grad(), _stepped(chosen) as states:
        loss = step_fn()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"probe_time: step_fn must return the loss, one number, got {type(loss).__name__}"
                f"{list(loss.shape) if isinstance(loss, Tensor) else ''}."
            )
        if not states:
            raise ValueError(
                f"probe_time: step_fn did not call {_words(path)}. It must run the forward pass of the model."
            )
        flat = [state for step in states for state in step]
        if not loss.requires_grad or not flat[0].requires_grad:
            raise ValueError(
                "probe_time: the loss does not depend on anything that requires a gradient. Run step_fn "
                "without torch.no_grad()."
            )
        try:
            grads = torch.autograd.grad(loss, flat, allow_unused=True)
        except RuntimeError as error:
            raise ValueError(
                f"probe_time: the loss cannot be differentiated ({error}). step_fn must not call backward()."
            ) from error
    exact = torch.float32 if flat[0].device.type == "mps" else torch.float64
    norms = [
        torch.zeros((), dtype=exact, device=flat[0].device)
        if grad is None
        else torch.linalg.vector_norm(grad, dtype=exact)
        for grad in grads
    ]
    result, begin = [], 0
    for step in states:
        result.append(torch.linalg.vector_norm(torch.stack(norms[begin : begin + len(step)])))
        begin += len(step)
    return torch.stack(result)


def _choose(model: nn.Module, wanted: str | None) -> tuple[str, nn.Module]:
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    }
    if wanted is not None:
        if wanted not in found:
            there = ", ".join(_words(path) for path in found) or "none"
            raise ValueError(
                f"probe_time: there is no RNN, LSTM or GRU at module={wanted!r}. The model has: {there}."
            )
        return wanted, found[wanted]
    if not found:
        raise ValueError("probe_time: the model has no RNN, LSTM or GRU of torch: there are no time steps.")
    if len(found) > 1:
        raise ValueError(
            "probe_time: the model has several recurrent modules; pass module=, one of "
            f"{', '.join(map(repr, found))}."
        )
    return next(iter(found.items()))


def _words(path: str) -> str:
    return repr(path) if path else "the model itself (module='')"


def _check(path: str, module: nn.Module) -> None:
    if isinstance(module, nn.RNNCellBase):
        return
    assert isinstance(module, nn.RNNBase)
    reason = None
    if module.bidirectional:
        reason = "it is bidirectional: its two directions have different steps that depend on each time"
    elif module.proj_size:
        reason = "it projects its hidden state (proj_size)"
    elif type(module) not in (nn.RNN, nn.LSTM, nn.GRU):
        reason = f"{type(module).__name__} may compute something else than the class it is derived from"
    if reason:
        raise ValueError(f"probe_time: {_words(path)} cannot be run step by step: {reason}.")


@contextmanager
def _stepped(module: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Hidden states of a module, a list for each time step, in the order in which they are made."""
    states: list[list[Tensor]] = []
    if isinstance(module, nn.RNNCellBase):

        def see(cell: nn.Module, args: Any, output: Any) -> None:
            states.append([output[0] if isinstance(output, tuple) else output])

        handle = module.register_forward_hook(see)
        try:
            yield states
        finally:
            handle.remove()
        return
    assert isinstance(module, nn.RNNBase)
    rnn: nn.RNNBase = module

    def forward(given: Any, hx: Any = None) -> Any:
        if not isinstance(given, Tensor):
            raise ValueError(
                "probe_time: a PackedSequence cannot be run step by step, for its sequences end at different "
                "times. Pass padded sequences, or a batch of one length."
            )
        return _run(rnn, given, hx, states)

    module.__dict__["forward"] = forward
    try:
        yield states
    finally:
        del module.__dict__["forward"]


def _run(rnn: nn.RNNBase, given: Tensor, hx: Any, states: list[list[Tensor]]) -> Any:
    """What the module computes, one step after the other."""
    is_lstm = isinstance(rnn, nn.LSTM)
    is_single = given.dim() == 2
    x = given.unsqueeze(1) if is_single else given.transpose(0, 1) if rnn.batch_first else given
    if hx is None:
        hidden = x.new_zeros(rnn.num_layers, x.shape[1], rnn.hidden_size)
        cell = torch.zeros_like(hidden)
    else:
        parts = hx if is_lstm else (hx, hx)
        hidden, cell = (part.unsqueeze(1) if is_single else part for part in parts)
    begin = len(states)
    states += [[] for _ in range(x.shape[0])]
    last_hidden, last_cell = [], []
    for layer in range(rnn.num_layers):
        weights = [getattr(rnn, f"{kind}_l{layer}") for kind in ("weight_ih", "weight_hh")]
        biases = [getattr(rnn, f"{kind}_l{layer}") if rnn.bias else None for kind in ("bias_ih", "bias_hh")]
        h, c = hidden[layer], cell[layer]
        outputs = []
        for time in range(x.shape[0]):
            if is_lstm:
                h, c = torch.lstm_cell(x[time], (h, c), *weights, *biases)
            elif isinstance(rnn, nn.GRU):
                h = torch.gru_cell(x[time], h, *weights, *biases)
            elif getattr(rnn, "nonlinearity", "tanh") == "relu":
                h = torch.rnn_relu_cell(x[time], h, *weights, *biases)
            else:
                h = torch.rnn_tanh_cell(x[time], h, *weights, *biases)
            states[begin + time].append(h)
            outputs.append(h)
        x = torch.stack(outputs)
        if layer < rnn.num_layers - 1:
            x = F.dropout(x, rnn.dropout, rnn.training)
        last_hidden.append(h)
        last_cell.append(c)
    out_hidden, out_cell = torch.stack(last_hidden), torch.stack(last_cell)
    out = x.squeeze(1) if is_single else x.transpose(0, 1) if rnn.batch_first else x
    if is_single:
        out_hidden, out_cell = out_hidden.squeeze(1), out_cell.squeeze(1)
    return out, ((out_hidden, out_cell) if is_lstm else out_hidden)
