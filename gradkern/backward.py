"""Measuring each gradient when backward has just produced it, instead of all of them afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradkern import ops
from gradkern.params import Names, check
from gradkern.tracked import Item


class _Row(NamedTuple):
    grad: Tensor
    version: int  # of `grad` when it was measured: a later write counts it up
    storage: int  # where its elements were: assigning to `.data` leaves the version alone
    row: Tensor  # float64 [1, 5]


class BackwardRows:
    """Rows of gradients, taken in `post_accumulate_grad_hook`s while the gradients are still in cache.

    A row holds as long as its gradient is the same tensor, with the same memory, not written to since by
    anything that counts its version up. Writing through `.data` does not, nor does `GradScaler.unscale_`:
    whoever knows of such a write calls `forget`.

    Args:
        micro_batches: backward passes that accumulate into one step. Only the last is measured; what a pass
            leaves out or adds costs a second reading, never a wrong row.
    """

    def __init__(self, micro_batches: int = 1) -> None:
        self.micro_batches = micro_batches
        self.paused = False
        self._rows: dict[Tensor, _Row] = {}
        self._passes: dict[Tensor, int] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def follow(self, items: Sequence[Item]) -> None:
        """Measure the gradients of these parameters, and of no others."""
        self.remove()
        for name, param in items:
            if param.requires_grad and param.is_leaf:
                register: Any = param.register_post_accumulate_grad_hook
                self._handles.append(register(_hook(weakref.ref(self), name)))

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def take(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """The row of each parameter's gradient, None where there is no valid one. They can be taken once."""
        rows: list[Tensor | None] = []
        for param in params:
            found, grad = self._rows.get(param), param.grad
            rows.append(found.row if found is not None and _holds(found, grad) else None)
        self.forget()  # rows hold the gradients, whose memory backward may want
        return rows

    def forget(self) -> None:
        """Let no row that has been taken count."""
        self._rows.clear()
        self._passes.clear()

    def measure(self, param: Tensor, name: str) -> None:
        """Called by backward."""
        grad = param.grad
        done = self._passes.get(param, 0) + 1
        self._passes[param] = done
        if grad is None or self.paused or done % self.micro_batches or grad.is_inference():
            return
        found = None if ops.native is None else ops.native.measure([grad], True)
        if found is None:
            check(Names("parameters", [name], None, 1), [grad], "Clipper", writes=False, by_value=False)
            with torch.no_grad():
                found = ops.measure([grad])
        self._rows[param] = _Row(grad, grad._version, _storage(grad), found[0])


def _holds(row: _Row, grad: Tensor | None) -> bool:
    return row.grad is grad and grad._version == row.version and _storage(grad) == row.storage


def _storage(grad: Tensor) -> int:
    """Tells one memory from another, of tensors without any (fake ones) too; 0 of a layout without one."""
    return grad.untyped_storage()._cdata if grad.layout == torch.strided else 0


def _hook(rows: weakref.ref[BackwardRows], name: str) -> Callable[[Tensor], None]:
    """A hook that does not keep the clipper alive that it serves."""

    def measure(param: Tensor) -> None:
        alive = rows()
        if alive is not None:
            alive.measure(param, name)

    return measure
