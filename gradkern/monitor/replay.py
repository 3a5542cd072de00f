"""Running a step again without leaving a trace of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

RandomState: TypeAlias = tuple[Tensor, list[Tensor]]


def random_state() -> RandomState:
    """The state of torch's generators: of the CPU, and of each GPU that is in use."""
    started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if started else []


def set_random_state(state: RandomState) -> None:
    """Put torch's generators back."""
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever is done to a model inside is undone at the end: weights, buffers, gradients, random numbers.

    Gradients are None at the beginning. Takes a copy of parameters and buffers.
    """
    tensors = [*model.parameters(), *model.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    grads = [(param, param.grad) for param in model.parameters()]
    random = random_state()
    for param, _ in grads:
        param.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                if not _same(tensor, copy):
                    tensor.copy_(copy)
        for param, grad in grads:
            param.grad = grad
        set_random_state(random)


def _same(tensor: Tensor, copy: Tensor) -> bool:
    """Bit for bit, so that a tensor that nobody changed is not written to."""
    if tensor.is_meta:
        return True
    bytes_of = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (tensor, copy)]
    return torch.equal(*bytes_of)


class Replay:
    """What the last step needs to be run again: batch, parameters, buffers, random state.

    A context manager that gives the batch. Inside all is as it was before that step, afterwards as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._batch: Any = None
        self._last: list[Tensor] = []  # what the last step began with, and what the next one does
        self._state = self._copies()
        self._random: RandomState | None = None
        self._random_next = random_state()
        self._now: tuple[list[Tensor], RandomState] | None = None

    def end(self, batch: Any) -> None:
        """The step is over: its batch; and what the next one starts from."""
        self._batch = batch
        self._random, self._random_next = self._random_next, random_state()
        self._last, self._state = self._state, self._copies()

    def check(self) -> None:
        """Raise if there is nothing to replay."""
        if self._random is None:
            raise RuntimeError("Monitor.replay: no step was made yet.")

    def __enter__(self) -> Any:
        self.check()
        assert self._random is not None
        self._now = self._copies(), random_state()
        self._put_back(self._last, self._random)
        return self._batch

    def __exit__(self, *_: object) -> None:
        assert self._now is not None
        self._put_back(*self._now)
        self._now = None

    def _tensors(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]

    def _copies(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors()]

    def _put_back(self, state: list[Tensor], random: RandomState) -> None:
        with torch.no_grad():
            for tensor, copy in zip(self._tensors(), state, strict=True):
                tensor.copy_(copy)
        set_random_state(random)
