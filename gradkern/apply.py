"""What a policy has decided, done to the gradients: the one place where a `Clipper` writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern import ops, reference
from gradkern.params import Names
from gradkern.policies import Decision


class Seen(NamedTuple):
    """Gradients that were measured, and where they are.

    `rows`: float64 `[gradients, 5]`, and `total` `[5]`, of the gradients as they are, a loss scale included.
    `items`: parameters under their names; `present`: the items that have a gradient, None if all have.
    `grads`: the gradients, unless the extension walks `items` by itself.
    """

    rows: Tensor
    total: Tensor
    names: Names
    items: Sequence[tuple[str, Tensor]]
    present: list[int] | None
    grads: list[Tensor] | None

    def collect(self) -> list[Tensor]:
        """The gradients as a list."""
        if self.grads is not None:
            return self.grads
        # The extension has walked them: all are tensors, and those that are present are there once.
        items = self.items if self.present is None else [self.items[index] for index in self.present]
        return [param.grad for _, param in items if param.grad is not None]


def is_scalar(decision: Decision) -> bool:
    """Whether one factor for all gradients is all that is to be done."""
    has_bound = decision.bound is not None and not _is_inf(decision.bound)
    per_tensor = decision.coef is not None and decision.coef.dim() > 0
    return not (has_bound or per_tensor or decision.unit_coef is not None)


def apply_(
    seen: Seen, decision: Decision, factor: Tensor | None, nonfinite: str, skip: Tensor | None = None
) -> None:
    """Replace each element by `clamp(element * coefficients * factor, -bound, bound)`, where that changes it.

    Args:
        seen: the gradients, as they were measured.
        decision: coefficients and bound; those per tensor or per unit for the items that are present.
        factor: 0-dim float64, for all of them; None for 1.
        nonfinite: "keep", "zero" or "propagate"; under "skip" and "raise", as under "keep".
        skip: 0-dim bool: where it holds nothing is scaled. For devices whose answer the host does not know.
    """
    nonfinite = nonfinite if nonfinite in ("zero", "propagate") else "keep"
    bound = math.inf if decision.bound is None else decision.bound
    coef, unit_coef, rows = decision.coef, decision.unit_coef, seen.rows
    if unit_coef is None and factor is None and _is_inf(bound) and nonfinite != "zero" and _is_one(coef):
        return
    if coef is None:
        coef = torch.ones_like(seen.total.select(0, 0))
    if factor is not None:
        coef = coef * factor
    if skip is not None:
        coef = torch.where(skip, 1.0, coef)
        unit_coef = None if unit_coef is None else torch.where(skip, 1.0, unit_coef)
    is_plain = unit_coef is None and isinstance(bound, float) and seen.grads is None
    if is_plain and ops.native.apply_(seen.items, rows, coef, bound, nonfinite):
        return
    grads = seen.collect()
    if unit_coef is not None:
        ops.apply_units_(grads, unit_coef, math.inf, nonfinite)
        if factor is None and _is_inf(bound) and decision.coef is None:
            return
        rows = torch.full_like(rows, math.inf)  # what is left is not known without another read
    if isinstance(bound, float):
        ops.apply_(grads, rows, coef, bound, nonfinite)
    else:
        _apply_bounds(grads, rows, coef.expand(len(grads)), bound, nonfinite)


def _apply_bounds(grads: list[Tensor], rows: Tensor, coef: Tensor, bounds: Tensor, nonfinite: str) -> None:
    """A bound for each tensor."""
    bounds = bounds.expand(len(grads))
    if reference.is_readable(bounds):
        values = bounds.tolist()
        for bound in set(values):
            chosen = [value == bound for value in values]
            index = torch.tensor([i for i, mine in enumerate(chosen) if mine])
            part = list(compress(grads, chosen))
            ops.apply_(part, rows.index_select(0, index), coef.index_select(0, index), bound, nonfinite)
        return
    ops.apply_(grads, rows, coef, math.inf, nonfinite)
    for grad, bound in zip(grads, bounds.unbind(), strict=True):
        limit = bound.to(grad.device, grad.dtype)
        too_large = grad.abs() > limit
        if nonfinite != "propagate":
            too_large = too_large & (grad.abs() < math.inf)
        torch.ops.aten.copy_.default(grad, torch.where(too_large, torch.copysign(limit, grad), grad))


def _is_one(coef: Tensor | None) -> bool:
    """Whether it is known to change nothing."""
    return coef is None or (coef.dim() == 0 and reference.is_readable(coef) and coef.item() == 1)


def _is_inf(bound: float | Tensor) -> bool:
    return not isinstance(bound, Tensor) and bound == math.inf
