from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern


def rnn_and_input(time: int, batch_first: bool = False) -> tuple[nn.RNN, Tensor]:
    torch.manual_seed(0)
    shape = (2, time, 3) if batch_first else (time, 2, 3)
    return nn.RNN(3, 4, batch_first=batch_first).double(), torch.randn(shape).double()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("time", [0, 1, 4, 5, 8, 11])
def test_chunks_cover_the_sequence_in_order(time: int, batch_first: bool) -> None:
    dim = 1 if batch_first else 0
    _, sequence = rnn_and_input(time, batch_first)
    chunks = gradkern.truncated_bptt(sequence, None, 4, batch_first=batch_first)
    parts = []
    for chunk in chunks:
        parts.append(chunk)
        chunks.state = None
    assert len(parts) == len(chunks) == (time + 3) // 4
    assert all(part.shape[dim] == 4 for part in parts[:-1])
    if parts:
        assert torch.equal(torch.cat(parts, dim), sequence)
        assert parts[0].data_ptr() == sequence.data_ptr()


def test_outputs_are_those_of_the_whole_sequence() -> None:
    rnn, sequence = rnn_and_input(11)
    whole, last = rnn(sequence)
    chunks = gradkern.truncated_bptt(sequence, None, 3)
    outputs = []
    for chunk in chunks:
        output, chunks.state = rnn(chunk, chunks.state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(chunks.state, last, rtol=1e-14, atol=1e-15)


def test_gradients_stop_between_chunks() -> None:
    rnn, sequence = rnn_and_input(7)
    chunks = gradkern.truncated_bptt(sequence, None, 3)
    for chunk in chunks:
        output, chunks.state = rnn(chunk, chunks.state)
        output.square().sum().backward()
    by_hand, _ = rnn_and_input(7)
    state = torch.zeros(1, 2, 4).double()
    for begin, end in ((0, 3), (3, 6), (6, 7)):
        output, state = by_hand(sequence[begin:end], state.detach())
        output.square().sum().backward()
    for got, expected in zip(rnn.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad)


def test_one_chunk_is_full_backpropagation_through_time() -> None:
    rnn, sequence = rnn_and_input(7)
    chunks = gradkern.truncated_bptt(sequence, None, 7)
    for chunk in chunks:
        output, chunks.state = rnn(chunk, chunks.state)
        output.sum().backward()
    full, _ = rnn_and_input(7)
    full(sequence)[0].sum().backward()
    for got, expected in zip(rnn.parameters(), full.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad)


def test_within_a_chunk_the_state_keeps_its_graph() -> None:
    rnn, sequence = rnn_and_input(4)
    chunks = gradkern.truncated_bptt(sequence, None, 2)
    next(chunks)
    _, chunks.state = rnn(sequence[:2], chunks.state)
    assert chunks.state.requires_grad
    next(chunks)
    assert not chunks.state.requires_grad


def test_after_the_last_chunk_the_state_is_detached() -> None:
    rnn, sequence = rnn_and_input(4)
    chunks = gradkern.truncated_bptt(sequence, None, 2)
    for chunk in chunks:
        _, chunks.state = rnn(chunk, chunks.state)
    assert not chunks.state.requires_grad


def test_the_state_to_begin_with_is_detached() -> None:
    state = torch.zeros(3, requires_grad=True)
    assert not gradkern.truncated_bptt(torch.zeros(4, 1), state * 2, 2).state.requires_grad


def test_nested_states_keep_their_structure() -> None:
    Memory = namedtuple("Memory", ["h", "c"])
    weight = torch.ones(2, requires_grad=True)
    state: Any = {"layers": [Memory(weight * 2, (weight * 3, None))]}
    chunks = gradkern.truncated_bptt(torch.zeros(4, 1), None, 2)
    next(chunks)
    chunks.state = state
    next(chunks)
    got = chunks.state["layers"][0]
    assert isinstance(got, Memory)
    assert torch.equal(got.h, weight * 2)
    assert not got.h.requires_grad
    assert not got.c[0].requires_grad
    assert got.c[1] is None


def test_lstm_states_are_carried() -> None:
    lstm = nn.LSTM(3, 4)
    sequence = torch.randn(6, 2, 3)
    chunks = gradkern.truncated_bptt(sequence, None, 4)
    for chunk in chunks:
        _, chunks.state = lstm(chunk, chunks.state)
    torch.testing.assert_close(chunks.state, lstm(sequence)[1])


def test_nested_sequences_are_cut_together() -> None:
    inputs, targets = torch.arange(10).reshape(5, 2), torch.arange(5)
    chunks = gradkern.truncated_bptt((inputs, {"targets": targets}), None, 3)
    first = next(chunks)
    chunks.state = None
    second = next(chunks)
    assert torch.equal(first[0], inputs[:3])
    assert torch.equal(first[1]["targets"], targets[:3])
    assert torch.equal(second[0], inputs[3:])


def test_a_forgotten_state_is_noticed() -> None:
    chunks = gradkern.truncated_bptt(torch.zeros(4, 1), None, 2)
    next(chunks)
    with pytest.raises(RuntimeError, match=r"no state was assigned .* `output, chunks.state = rnn"):
        next(chunks)


def test_a_packed_sequence_is_refused_with_a_reason() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 1), torch.zeros(2, 1)])
    with pytest.raises(TypeError, match=r"sequence\[0\] is a PackedSequence, .*\n?.*pad_packed_sequence"):
        gradkern.truncated_bptt((packed, packed), None, 2)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, float("inf"), None])
def test_impossible_steps_are_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"truncated_bptt: steps must be a whole number of at least 1"):
        gradkern.truncated_bptt(torch.zeros(4, 1), None, steps)


@pytest.mark.parametrize(
    ("sequence", "error", "message"),
    [
        (
            (torch.zeros(4, 1), torch.zeros(5)),
            ValueError,
            r"differ: sequence\[0\] has 4, sequence\[1\] has 5",
        ),
        ((), ValueError, "sequence holds no tensor"),
        (torch.zeros(()), ValueError, r"sequence has shape \[\], without a dimension 0"),
        ({"x": "text"}, TypeError, r"sequence\['x'\] is a str"),
    ],
)
def test_a_sequence_that_cannot_be_cut_is_refused(
    sequence: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"truncated_bptt: .*{message}"):
        gradkern.truncated_bptt(sequence, None, 2)


def test_a_state_that_cannot_be_detached_is_refused() -> None:
    chunks = gradkern.truncated_bptt(torch.zeros(4, 1), None, 2)
    next(chunks)
    chunks.state = (torch.zeros(1), "h")
    with pytest.raises(TypeError, match=r"truncated_bptt: state\[1\] is a str"):
        next(chunks)


def test_a_sequence_too_long_for_one_graph_is_learnt_in_chunks() -> None:
    """Delayed copy over 4000 steps: the graph at hand never spans more than 20 of them."""
    torch.manual_seed(0)
    bits = torch.randint(0, 2, (4000, 8, 1)).float()
    targets = torch.roll(bits, 2, 0)
    rnn, head = nn.RNN(1, 16), nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=0.01)
    losses = []
    chunks = gradkern.truncated_bptt((bits, targets), None, 20)
    for chunk, target in chunks:
        output, chunks.state = rnn(chunk, chunks.state)
        loss = nn.functional.binary_cross_entropy_with_logits(head(output), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 200
    assert losses[0] > 0.6
    assert losses[-1] < 0.05
