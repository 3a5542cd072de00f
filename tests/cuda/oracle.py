"""What the kernels should give, in plain float64 torch and numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

SUM_SQ, ABS_MAX, NAN_COUNT, INF_COUNT, ZERO_COUNT = range(5)


def row(grad: torch.Tensor) -> np.ndarray:
    x = grad.double().flatten()
    finite = x[x.isfinite()]
    return np.array(
        [
            math.fsum((finite * finite).tolist()),
            finite.abs().max().item() if finite.numel() else 0.0,
            x.isnan().sum().item(),
            x.isinf().sum().item(),
            (x == 0).sum().item(),
        ]
    )


def rows(grads: Sequence[torch.Tensor]) -> np.ndarray:
    return np.array([row(grad) for grad in grads]).reshape(len(grads), 5)


def merge(rows: np.ndarray) -> np.ndarray:
    total = rows.sum(axis=0)
    total[ABS_MAX] = rows[:, ABS_MAX].max(initial=0.0)
    return total


def norm(total: np.ndarray) -> float:
    """As torch gives it."""
    return math.nan if total[NAN_COUNT] else math.inf if total[INF_COUNT] else math.sqrt(total[SUM_SQ])


def coef(total: np.ndarray, max_norm: float, eps: float, nonfinite: str) -> float:
    size = norm(total) if nonfinite == "propagate" else math.sqrt(total[SUM_SQ])
    if size == 0 or max_norm == math.inf:
        return 1.0
    return float(np.minimum(1.0, max_norm / (size + eps)))


def clipped(grad: torch.Tensor, coef: torch.Tensor | float, bound: float, nonfinite: str) -> torch.Tensor:
    """`clamp(grad * coef, -bound, bound)`, the product as the contract wants it. `coef` may be a tensor."""
    scale = torch.as_tensor(coef, dtype=torch.float64)
    limit = torch.tensor(bound, dtype=torch.float64).to(grad.dtype)
    product = (grad.double() * scale).to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    if grad.element_size() == 2:
        normal = (scale == 0) | ~(scale.float() < torch.finfo(torch.float32).tiny)
        product = torch.where(normal, grad.float() * scale.float(), product)
    after = product.to(grad.dtype).clamp(-limit, limit)
    after = torch.where((scale == 1) & ~grad.isinf() & ~(grad.abs() > limit), grad, after)
    if nonfinite != "propagate":
        after = torch.where(grad.isfinite(), after, 0 if nonfinite == "zero" else grad)
    return after


def unit_sums(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    sums = []
    for tensor in tensors:
        units = tensor if tensor.dim() >= 2 else tensor.reshape(1, -1)
        sums += [row(unit)[SUM_SQ] for unit in units]
    return np.array(sums)


def exponents(grad: torch.Tensor) -> np.ndarray:
    counts = np.zeros(64, dtype=np.int64)
    tiny = torch.finfo(grad.dtype).tiny
    for x in grad.double().flatten().tolist():
        if not math.isfinite(x):
            column = 2
        elif x == 0:
            column = 0
        elif abs(x) < tiny:
            column = 1
        else:
            exponent = math.frexp(x)[1] - 1  # frexp's fraction lies in [0.5, 1)
            column = 3 + min(max(exponent, -44), 16) + 44
        counts[column] += 1
    return counts


def penalised(grad: torch.Tensor, weight: torch.Tensor, l1: float, l2: float) -> torch.Tensor:
    w = weight.double()
    sign = torch.where(w == 0, w, w.sign())  # as on the CPU, a zero keeps its own sign
    total = grad.double() + (l1 * sign + 2 * l2 * w)
    return total.to(torch.float64 if grad.dtype == torch.float64 else torch.float32).to(grad.dtype)


def penalty(weight: torch.Tensor, l1: float, l2: float) -> float:
    w = weight.double().flatten()
    return math.fsum((l1 * w.abs() + l2 * w * w).tolist())
