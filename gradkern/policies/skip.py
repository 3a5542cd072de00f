"""Leaving out steps whose gradient or loss stands out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradkern.policies.protocol import (
    Decision,
    Layout,
    Measured,
    Needs,
    Policy,
    State,
    Update,
    check_limit,
    check_positive,
    check_steps,
)

# The median absolute deviation of a normal distribution is its standard deviation divided by this.
_MAD_TO_STD = 1.4826


@dataclass(frozen=True)
class SkipSpike(Policy):
    """Skip a step whose norm, or whose loss, is far above those of the steps before it.

    A step is skipped where its norm exceeds `max_norm`, or where ``(x - centre) / spread`` exceeds
    `z_limit` for x the norm or the loss. Centre and spread are of the last `window` steps that were kept,
    this one excluded: mean and standard deviation (``method="std"``), or median and 1.4826 times the median
    absolute deviation (``method="mad"``). A loss that is not finite is a spike.

    Sources: the step-skipping optimizer of OLMo-core (6 σ of the last 128); Megatron-LM's fixed threshold on
    the norm; robust z-scores as in Iglewicz, Hoaglin 1993. Unlike some of these it looks upwards only, so
    that a sudden *improvement* is no spike; a skipped step does not enter the history; and a history that
    hardly varies counts as varying by `least_spread`, or every rounding difference would be a spike.

    When not to use it: as the only protection. It knows nothing until `warmup` steps are in, and cannot
    tell a lasting change of level (another data set, a learning-rate restart) from a spike: it then skips
    every step until the caller gives up. Put a norm limit after it in a `Chain`.

    Args:
        z_limit: spreads above the centre that make a spike, positive; None for `max_norm` alone. 6.
        method: "std" or "mad". A history with outliers of its own needs "mad".
        window: steps remembered, at least 2. 128.
        warmup: steps before z is judged; half the window by default.
        max_norm: largest norm that is not skipped, whatever the history; None for none.
        loss: True: the loss is needed. False: it is not looked at. None: it is looked at when given.
        least_spread: spread counted at least, relative to the centre, not negative. 1e-3.

    Raises:
        ValueError: a parameter outside its range; neither `z_limit` nor `max_norm`; from `decide`, no loss
            although ``loss=True``.

    >>> policy = gradkern.SkipSpike(z_limit=6.0, window=8, warmup=3)
    >>> gradkern.policies.replay(policy, [1.0, 1.2, 0.8, 50.0, 1.1, 0.01]).skip
    tensor([False, False, False,  True, False, False])
    """

    z_limit: float | None = 6.0
    method: Literal["std", "mad"] = "std"
    window: int = 128
    warmup: int | None = None
    max_norm: float | None = None
    loss: bool | None = None
    least_spread: float = 1e-3

    def __post_init__(self) -> None:
        if self.z_limit is None and self.max_norm is None:
            raise ValueError(
                "SkipSpike: z_limit and max_norm are both None, so nothing would ever be skipped. Give one."
            )
        if self.z_limit is None and self.loss:
            raise ValueError(
                "SkipSpike: the loss is judged by z_limit, which is None. Give one, or leave loss out."
            )
        if self.z_limit is not None:
            check_positive(self, "z_limit", self.z_limit)
        if self.max_norm is not None:
            check_limit(self, "max_norm", self.max_norm)
        if self.method not in ("std", "mad"):
            raise ValueError(f"SkipSpike: method must be 'std' or 'mad', got {self.method!r}.")
        check_steps(self, "window", self.window, least=2)
        if self.warmup is not None:
            check_steps(self, "warmup", self.warmup, least=2)
            if self.warmup > self.window:
                raise ValueError(
                    f"SkipSpike: warmup must not exceed window, got {self.warmup} > {self.window}: "
                    "the history would never be long enough."
                )
        check_limit(self, "least_spread", self.least_spread)

    @property
    def needs(self) -> Needs:
        """The total, and the loss as `loss` says."""
        if self.z_limit is None or self.loss is False:
            return Needs()
        return Needs(loss="required" if self.loss else "optional")

    def init(self, layout: Layout) -> State:
        """An empty history of the norm, and of the loss unless it is not looked at."""
        constants = {}
        if self.max_norm is not None:
            constants["max_norm"] = layout.floats(self.max_norm)
        if self.z_limit is None:
            return State(self, layout, constants=constants)
        # For each number n of values in a history: n and n - 1 to divide by, and the z that is a spike, which
        # is inf until the warm-up is over.
        least = self.warmup if self.warmup is not None else max(2, self.window // 2)
        sizes = range(self.window + 1)
        constants["sizes"] = layout.floats(
            [(max(n, 1), max(n - 1, 1), self.z_limit if n >= least else math.inf) for n in sizes]
        )
        middle = [(max(n - 1, 0) // 2, n // 2) for n in sizes]
        constants["middle"] = torch.tensor(middle, device=layout.device)
        signals = 1 if self.needs.loss == "no" else 2
        history = {
            # NaN where nothing is written: left out of sums, and last in order.
            "values": torch.full((signals, self.window), math.nan, dtype=torch.float64, device=layout.device),
            "count": torch.zeros(signals, dtype=torch.int64, device=layout.device),
        }
        return State(self, layout, constants=constants, shared=history)

    def decide(self, measured: Measured, state: State) -> Decision:
        """Keep or skip; gradients are not scaled."""
        norm = measured.norm()
        too_large = None if self.max_norm is None else norm > state.constants["max_norm"]
        if self.z_limit is None:
            return Decision(skip=too_large, info={"norm": norm})
        values, count = state.shared["values"], state.shared["count"]
        loss = self._loss(measured)
        if loss is None:
            x, values, count = norm.unsqueeze(0), values.narrow(0, 0, 1), count.narrow(0, 0, 1)
        else:
            x = torch.stack((norm, loss))
        size = count.clamp_max(self.window)
        n, n_less_1, z_limit = state.constants["sizes"].index_select(0, size).unbind(-1)
        if self.method == "std":
            centre = values.nansum(-1) / n
            spread = ((values - centre.unsqueeze(-1)).square().nansum(-1) / n_less_1).sqrt()
        else:
            middle = state.constants["middle"].index_select(0, size)
            centre = _median(values, middle)
            spread = _MAD_TO_STD * _median((values - centre.unsqueeze(-1)).abs(), middle)
        scale = torch.maximum(spread, centre.abs() * self.least_spread)
        z = (x - centre) / scale
        # Where the scale is 0, in a history of zeros, z says nothing.
        skip = ((z > z_limit) & (scale > 0)).any()
        if too_large is not None:
            skip = skip | too_large
        if loss is not None:
            skip = skip | (loss.abs() < math.inf).logical_not()
        enters = norm > 0  # of an empty step the loss does not enter either
        return Decision(
            skip=skip,
            info={"norm": norm, "z": z.select(0, 0)} | ({} if loss is None else {"loss_z": z.select(0, 1)}),
            updates=(
                Update(values, x, enters, (count % self.window).unsqueeze(-1)),
                Update(count, count + 1, enters),
            ),
        )

    def _loss(self, measured: Measured) -> Tensor | None:
        """The loss to judge, 0-dim float64; None where there is none or it is not looked at."""
        loss = measured.loss
        if loss is None and self.loss:
            raise ValueError(
                "SkipSpike: loss=True, but no loss was given. "
                "Pass the step's loss, as clipper(loss=loss) does."
            )
        if loss is None or self.loss is False:
            return None
        if loss.numel() != 1:
            raise ValueError(
                f"SkipSpike: loss must be one number, got shape {list(loss.shape)}. Pass its mean or sum."
            )
        return loss.detach().double().reshape(())


def _median(values: Tensor, middle: Tensor) -> Tensor:
    """Median of each row, the mean of the two values at the places `middle` in order. NaN comes last."""
    return values.sort(-1).values.gather(-1, middle).mean(-1)
