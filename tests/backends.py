"""What computes: the reference, or the extension on one instruction set. The tests run on each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern import ops, reference


@dataclass(frozen=True)
class Backend:
    """The operations of the design on plain dense CPU gradients, straight from who computes them.

    While it is active, gradkern's own functions compute with it too.
    """

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def is_native(self) -> bool:
        return self.name != "reference"

    def measure(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self._operations().measure(list(grads))

    def clip_(
        self,
        grads: Sequence[Tensor],
        max_norm: float = math.inf,
        limit: Tensor | None = None,
        eps: float = 0.0,
        clip_value: float = math.inf,
        nonfinite: str = "keep",
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._operations().clip_(list(grads), max_norm, limit, eps, clip_value, nonfinite)

    def apply_(
        self,
        grads: Sequence[Tensor],
        rows: Tensor | None,
        coef: Tensor,
        clip_value: float = math.inf,
        nonfinite: str = "keep",
    ) -> None:
        self._operations().apply_(list(grads), rows, coef, clip_value, nonfinite)

    @contextmanager
    def active(self) -> Iterator[None]:
        native = ops.native
        if not self.is_native:
            ops.native = None
            try:
                yield
            finally:
                ops.native = native
            return
        isa = native.isa()
        native.set_isa(self.name)
        try:
            yield
        finally:
            native.set_isa(isa)

    def _operations(self):  # noqa: ANN202 - a module or torch's namespace of operators
        return torch.ops.gradkern if self.is_native else reference


REFERENCE = Backend("reference")
NATIVE = [Backend(isa) for isa in (ops.native.isas() if ops.native is not None else [])]
ALL = [REFERENCE, *NATIVE]
