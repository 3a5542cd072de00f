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
    row: Tensor  # float64 [1, 5]


class BackwardRows:
    """Rows of gradients, taken in `post_accumulate_grad_hook`s while the gradients are still in cache.

    A row holds as long as its gradient is the same tensor, not written to since; whatever else happened is
    noticed when the rows are asked for.

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
        self._rows.clear()
        self._passes.clear()

    def take(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """The row of each parameter's gradient, None where there is no valid one. They can be taken once."""
        rows: list[Tensor | None] = []
        for param in params:
            found, grad = self._rows.get(param), param.grad
            valid = found is not None and found.grad is grad and grad._version == found.version
            rows.append(found.row if found is not None and valid else None)
        self._rows.clear()  # they hold the gradients, whose memory backward may want
        self._passes.clear()
        return rows

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
        self._rows[param] = _Row(grad, grad._version, found[0])


def _hook(rows: weakref.ref[BackwardRows], name: str) -> Callable[[Tensor], None]:
    """A hook that does not keep the clipper alive that it serves."""

    def measure(param: Tensor) -> None:
        alive = rows()
        if alive is not None:
            alive.measure(param, name)

    return measure
