"""Truncated backpropagation through time: long sequences in chunks that carry their state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

T = TypeVar("T")


def truncated_bptt(sequence: T, state: Any, steps: int, *, batch_first: bool = False) -> Chunks[T]:
    """Iterate over a batch of sequences in chunks of `steps` along time, carrying the state across.

    Each chunk starts from the state that the last one ended in, but its gradients stop there: time and memory
    of `backward` depend on `steps` and not on the length of the sequence, and a gradient can grow through at
    most `steps` multiplications. Hand the new state back by assigning it::

        chunks = gradkern.truncated_bptt(inputs, None, steps=50)
        for chunk in chunks:
            output, chunks.state = rnn(chunk, chunks.state)
            loss(output).backward()
            optimizer.step()
            optimizer.zero_grad()

    `chunks.state` is detached when the next chunk is asked for, and when there is none left. Anything else
    that is computed from the whole sequence before the loop (an embedding) keeps its graph: compute it on the
    chunk, or the second `backward` goes through it again and torch complains.

    When not to use it: a dependency over more than `steps` steps gives no gradient, and is learnt only as far
    as the carried state happens to keep it.

    Args:
        sequence: ``[time, batch, ...]``, or a tuple, list or dict of such tensors of equal length in time,
            nested at will, for instance (inputs, targets). Chunks have the same structure and are views.
        state: the state to begin with: a tensor, None, or tuples, lists and dicts of them, nested at will.
        steps: time steps of a chunk, at least 1; the last chunk may be shorter.
        batch_first: time is dimension 1, ``[batch, time, ...]``, of every tensor in `sequence`.

    Returns:
        An iterator over the chunks, with the attribute `state` and ``len()``, the number of all chunks.

    Raises:
        ValueError: `steps` below 1; lengths in time that differ; nothing to cut.
        TypeError: a `PackedSequence`; anything but tensors in `sequence` or `state`.
        RuntimeError: no state was assigned during the last chunk.

    Source: Williams, Peng 1990, "An efficient gradient-based algorithm for on-line training of recurrent
    network trajectories"; Sutskever 2013, section 2.8.6 ("Training recurrent neural networks").

    >>> rnn = torch.nn.GRU(2, 3)
    >>> chunks = gradkern.truncated_bptt(torch.zeros(10, 1, 2), None, steps=4)
    >>> for chunk in chunks:
    ...     output, chunks.state = rnn(chunk, chunks.state)
    ...     print(tuple(chunk.shape))
    (4, 1, 2)
    (4, 1, 2)
    (2, 1, 2)
    >>> chunks.state.requires_grad
    False
    """
    return Chunks(sequence, state, steps, batch_first)


class Chunks(Iterator[T]):
    """The chunks of a sequence in turn, and the state between them; see `truncated_bptt`."""

    def __init__(self, sequence: T, state: Any, steps: int, batch_first: bool) -> None:
        if isinstance(steps, bool) or not hasattr(steps, "__index__") or steps < 1:
            raise ValueError(f"truncated_bptt: steps must be a whole number of at least 1, got {steps!r}.")
        self._dim = 1 if batch_first else 0
        lengths = dict(_lengths(sequence, self._dim, "sequence"))
        if not lengths:
            raise ValueError("truncated_bptt: sequence holds no tensor, so there is nothing to cut.")
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"truncated_bptt: the lengths in time (dimension {self._dim}) differ: "
                f"{', '.join(f'{path} has {length}' for path, length in lengths.items())}. "
                "Cut or pad them to one length; batch_first says which dimension is time."
            )
        self._sequence = sequence
        self._steps = int(steps)
        self._length = next(iter(lengths.values()))
        self._next = 0
        self._state = _detached(state, "state")
        self._is_assigned = True

    @property
    def state(self) -> Any:
        """The state to go on from: assign what the model returned for this chunk."""
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state
        self._is_assigned = True

    def __len__(self) -> int:
        return -(-self._length // self._steps)

    def __next__(self) -> T:
        if not self._is_assigned:
            raise RuntimeError(
                "truncated_bptt: no state was assigned during the last chunk, so the next one would begin "
                "where that one began. Write `output, chunks.state = rnn(chunk, chunks.state)`."
            )
        self._state = _detached(self._state, "state")
        if self._next >= self._length:
            raise StopIteration
        begin, self._next = self._next, min(self._next + self._steps, self._length)
        self._is_assigned = False
        chunk: T = _cut(self._sequence, self._dim, begin, self._next - begin)
        return chunk


def _lengths(sequence: object, dim: int, path: str) -> Iterator[tuple[str, int]]:
    """Where each tensor of `sequence` is, and how long it is in time."""
    if isinstance(sequence, PackedSequence):
        raise TypeError(
            f"truncated_bptt: {path} is a PackedSequence, whose sequences end at different times and lie "
            "interleaved in memory: a cut along time would need a new batch for each chunk.\nPad it with "
            "torch.nn.utils.rnn.pad_packed_sequence, and leave the padding out of the loss."
        )
    if isinstance(sequence, Tensor):
        if sequence.dim() <= dim:
            raise ValueError(
                f"truncated_bptt: {path} has shape {list(sequence.shape)}, without a dimension {dim} for "
                "time."
            )
        yield path, sequence.shape[dim]
    elif isinstance(sequence, dict):
        for key, part in sequence.items():
            yield from _lengths(part, dim, f"{path}[{key!r}]")
    elif isinstance(sequence, (tuple, list)):
        for index, part in enumerate(sequence):
            yield from _lengths(part, dim, f"{path}[{index}]")
    else:
        raise TypeError(
            f"truncated_bptt: {path} is a {type(sequence).__name__}; it must be a tensor, or a tuple, list "
            "or dict of tensors."
        )


def _cut(sequence: Any, dim: int, begin: int, length: int) -> Any:
    if isinstance(sequence, Tensor):
        return sequence.narrow(dim, begin, length)
    if isinstance(sequence, dict):
        return {key: _cut(part, dim, begin, length) for key, part in sequence.items()}
    return _like(sequence, [_cut(part, dim, begin, length) for part in sequence])


def _detached(state: Any, path: str) -> Any:
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, dict):
        return {key: _detached(part, f"{path}[{key!r}]") for key, part in state.items()}
    if isinstance(state, (tuple, list)) and not isinstance(state, PackedSequence):
        return _like(state, [_detached(part, f"{path}[{index}]") for index, part in enumerate(state)])
    raise TypeError(
        f"truncated_bptt: {path} is a {type(state).__name__}; it must be a tensor, None, or a tuple, list or "
        "dict of them, so that it can be detached."
    )


def _like(original: Any, parts: list[Any]) -> Any:
    """`parts` as a list, tuple or named tuple, as `original` is."""
    kind = type(original)
    return kind(*parts) if hasattr(original, "_fields") else kind(parts)
