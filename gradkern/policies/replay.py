"""What a policy would have done on norms that are on record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.policies.protocol import COLUMNS, SUM_SQ, Layout, Measured, Policy, all_finite


class Replay(NamedTuple):
    """`coef`: float64 ``[steps]`` or ``[steps, tensors]``. `skip`: bool ``[steps]``."""

    coef: Tensor
    skip: Tensor


def replay(
    policy: Policy,
    norms: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    losses: Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> Replay:
    """Run `policy` over recorded norms, to choose its parameters without training again.

    Args:
        policy: any policy that reads norms only.
        norms: the norms before clipping, ``[steps]`` of a single tensor, or ``[steps, tensors]``. NaN and Inf
            stand for a step with such a gradient.
        losses: ``[steps]``.
        names: the tensors' names, for policies with patterns.
        shapes: their shapes, for policies that read sizes.

    Returns:
        The coefficients and skips of each step, on the CPU.

    Raises:
        ValueError: the policy needs weights, units, a loss that is not given, or the largest magnitude.

    >>> gradkern.policies.replay(gradkern.GlobalNorm(2.0), [1.0, 4.0])
    Replay(coef=tensor([1.0000, 0.5000], dtype=torch.float64), skip=tensor([False, False]))
    """
    recorded = torch.as_tensor(norms, dtype=torch.float64, device="cpu")
    per_tensor = recorded if recorded.dim() == 2 else recorded.unsqueeze(-1)
    steps, count = per_tensor.shape
    needs = policy.needs
    if needs.units or needs.weight_rows or policy.reads_abs_max:
        raise ValueError(
            f"replay: {type(policy).__name__} reads more than norms; a record of norms cannot replay it."
        )
    if losses is not None and len(losses) != steps:
        raise ValueError(f"replay: losses has {len(losses)} steps, norms {steps}. Give one loss per step.")
    layout = Layout(
        tuple(names) if names is not None else tuple(map(str, range(count))),
        tuple(shapes) if shapes is not None else ((1,),) * count,
        torch.device("cpu"),
    )
    if len(layout.names) != count or len(layout.shapes) != count:
        raise ValueError(f"replay: norms are of {count} tensors; give as many names and shapes.")
    state = policy.init(layout)
    coefs, skips = [], []
    for step in range(steps):
        norm = per_tensor[step]
        rows = torch.zeros(count, COLUMNS, dtype=torch.float64)
        rows[:, SUM_SQ] = torch.where(norm.isfinite(), norm.square(), 0.0)
        rows[:, 2] = norm.isnan()
        rows[:, 3] = norm.isinf()
        total = rows.sum(0)
        loss = None if losses is None else torch.tensor(losses[step], dtype=torch.float64)
        measured = Measured(total=total, rows=rows, loss=loss, good=all_finite(total))
        decision = policy.decide(measured, state)
        decision.commit(measured.good)
        coef = torch.ones((), dtype=torch.float64) if decision.coef is None else decision.coef
        coefs.append(coef.squeeze() if recorded.dim() == 1 else coef)
        skips.append(torch.zeros(()).bool() if decision.skip is None else decision.skip)
    coef = torch.stack(coefs) if coefs else torch.zeros(0, dtype=torch.float64)
    return Replay(coef, torch.stack(skips) if skips else torch.zeros(0, dtype=torch.bool))
