"""What is right: plain arithmetic in float64 on the CPU that shares nothing with the rest of gradkern."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy, in float64."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def rows(grads: Sequence[Tensor]) -> Tensor:
    """float64 `[len(grads), 5]`: sum of squares, largest magnitude, NaN, Inf and zero elements."""
    return torch.tensor([_row(grad) for grad in grads], dtype=torch.float64).reshape(-1, 5)


def _row(grad: Tensor) -> list[float]:
    x = on_cpu(grad).flatten()
    finite = x[x.isfinite()]
    return [
        finite.square().sum().item(),
        finite.abs().max().item() if len(finite) else 0.0,
        x.isnan().sum().item(),
        x.isinf().sum().item(),
        (x == 0).sum().item(),
    ]


def clipped(grad: Tensor, coef: float, clip_value: float, nonfinite: str) -> Tensor:
    """`clamp(grad * coef, -clip_value, clip_value)`, rounded once, to the nearest even of the dtype."""
    before = grad.detach().cpu()
    x = before.double()
    # Halves are multiplied in float32, of which rounding to a half hides the error.
    product = (before.float() * coef).double() if grad.dtype in HALVES else x * coef
    bound = (
        torch.tensor(clip_value, dtype=torch.float64).to(grad.dtype).item()
        if clip_value < math.inf
        else math.inf
    )
    after = (x if coef == 1 else product).clamp(-bound, bound).to(grad.dtype)
    if nonfinite == "propagate":
        return after
    return torch.where(before.isfinite(), after, before if nonfinite == "keep" else torch.zeros_like(before))


def unit_sums(tensor: Tensor) -> Tensor:
    """Sums of the squares of the finite elements of each slice along dim 0; of all, in one dimension."""
    x = on_cpu(tensor)
    x = torch.where(x.isfinite(), x, 0.0)
    return x.flatten(1).square().sum(1) if tensor.dim() > 1 else x.square().sum().reshape(1)


def exponents(grad: Tensor) -> list[int]:
    """Elements that are zero, subnormal, not finite; then of each exponent from -44 to 16, or beyond."""
    counts = [0] * 64
    tiny = torch.finfo(grad.dtype).tiny
    for x in on_cpu(grad).flatten().tolist():
        if x == 0:
            counts[0] += 1
        elif not math.isfinite(x):
            counts[2] += 1
        elif abs(x) < tiny:
            counts[1] += 1
        else:
            counts[3 + min(max(math.frexp(x)[1] - 1, -44), 16) + 44] += 1
    return counts
