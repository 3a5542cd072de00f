"""Running a step again without leaving a trace of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gradkern.monitor.passes import Hook, aside, can_train, is_aside, modules_to_wait_on

log = logging.getLogger("gradkern")

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


def check_call(name: str, step_fn: object, model: object) -> None:
    """Raise if a step cannot be run again, for it is no function, or the model is none.

    Raises:
        TypeError: either.
    """
    if not callable(step_fn):
        raise TypeError(
            f"{name}: step_fn must be a function that runs the step, got {type(step_fn).__name__}. Pass a "
            "lambda or a function without arguments, not what it returns."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}.")


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever is done to a model inside is undone at the end: weights, buffers, gradients, random numbers.

    Gradients are None at the beginning. Takes a copy of parameters and buffers. Nothing inside is a step of a
    training run: no monitor looks at it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    grads = [(param, param.grad) for param in model.parameters()]
    random = random_state()
    for param, _ in grads:
        param.grad = None
    try:
        with aside():
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

    Everything is kept once, at the first forward pass in training mode with gradients after `end`, over what
    was kept before. Where none is seen, since it runs compiled or in evaluation mode, that is done when the
    optimizer steps, and the random state is that of the end of the step before. The batch itself is kept, no
    copy of it.

    Args:
        model: whose modules are called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._batch: Any = None
        self._kept: list[Tensor] = []
        self._random = self._random_before = random_state()
        self._is_kept = self._has_step = False
        self._inside = contextlib.ExitStack()
        hook = Hook(self._before_forward)
        self._handles = [
            module.register_forward_pre_hook(hook) for module in modules_to_wait_on(model).values()
        ]

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """The model is stepped by this optimizer."""
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    def end(self, batch: Any) -> None:
        """The step is over: its batch; and from now on the next one may begin."""
        self._batch = batch
        self._has_step, self._is_kept = self._is_kept, False
        self._random_before = random_state()

    def remove(self) -> None:
        """Take the hooks away: nothing more is kept."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def check(self) -> None:
        """Raise if there is nothing to replay."""
        if self._is_kept:
            raise RuntimeError(
                "Monitor.replay: the next step has begun, and what the last one began with is gone. Replay "
                "between monitor.step() and the next forward pass."
            )
        if not self._has_step:
            raise RuntimeError(
                "Monitor.replay: no step was seen yet: neither a forward pass in training mode that runs "
                "without compilation, nor a step of the monitor's optimizer."
            )

    def __enter__(self) -> Any:
        self.check()
        with contextlib.ExitStack() as stack:
            stack.enter_context(aside())
            now = [tensor.detach().clone() for tensor in self._tensors()]
            stack.callback(self._put_back, now, random_state())
            self._put_back(self._kept, self._random)
            self._inside = stack.pop_all()
        return self._batch

    def __exit__(self, *_: object) -> None:
        self._inside.close()

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not self._is_kept and module.training and self._model.training and can_train():
            self._keep(random_state())

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_kept and not is_aside():
            self._keep(self._random_before)

    def _keep(self, random: RandomState) -> None:
        try:
            tensors = self._tensors()
            with torch.no_grad(), _disable_current_modes():
                if [_kind(tensor) for tensor in tensors] != [_kind(copy) for copy in self._kept]:
                    self._kept = []  # before the new ones are there
                    self._kept = [tensor.detach().clone() for tensor in tensors]
                else:
                    for copy, tensor in zip(self._kept, tensors, strict=True):
                        copy.copy_(tensor)
            self._random, self._is_kept = random, True
        except Exception as error:
            self.remove()
            self._kept = []
            log.warning(
                "gradkern: steps are not kept for a replay any more, for that failed: %s: %s",
                type(error).__name__,
                error,
            )

    def _tensors(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]

    def _put_back(self, state: list[Tensor], random: RandomState) -> None:
        with torch.no_grad():
            for tensor, copy in zip(self._tensors(), state, strict=True):
                tensor.copy_(copy)
        set_random_state(random)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
