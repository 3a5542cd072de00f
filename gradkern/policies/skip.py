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

    Sources: OLMo 2's skipped steps (6 σ of the last 128; arXiv 2501.00656); Megatron-LM's fixed threshold
    on the norm; robust z-scores as Iglewicz, Hoaglin 1993. Unlike some of these it looks upwards only, so
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
        signals = 1 if self.needs.loss == "no" else 2
        constants["slots"] = torch.arange(self.window, device=layout.device)
        history = {
            "values": torch.zeros(signals, self.window, dtype=torch.float64, device=layout.device),
            "count": torch.zeros(signals, dtype=torch.int64, device=layout.device),
        }
        return State(self, layout, constants=constants, shared=history)

    def decide(self, measured: Measured, state: State) -> Decision:
        """Keep or skip; gradients are not scaled."""
        norm = measured.norm()
        skip = None
        if self.max_norm is not None:
            skip = norm > state.constants["max_norm"]
        if self.z_limit is None:
            return Decision(skip=skip, info={"norm": norm})
        signals = [norm]
        if len(state.shared["count"]) > 1:
            signals.append(self._loss(measured, norm))
        x = torch.stack(signals)
        values, count = state.shared["values"], state.shared["count"]
        sample = count.clamp_max(self.window)
        centre, spread = self._level(values, sample, state.constants["slots"])
        scale = torch.maximum(spread, centre.abs() * self.least_spread)
        # A scale of zero (a history of zeros) says nothing: 0/0 and x/0 both become NaN, which is no spike.
        z = (x - centre) / torch.where(scale > 0, scale, math.nan)
        is_spike = ((z > self.z_limit) & (sample >= self._least())).any()
        skip = is_spike if skip is None else skip | is_spike
        if measured.loss is not None and len(signals) > 1:
            skip = skip | ~signals[1].isfinite()
        # A missing loss is NaN here and enters no history; nor does an empty step.
        enters = x.isfinite() & (norm > 0)
        slot = (count % self.window).unsqueeze(-1)
        return Decision(
            skip=skip,
            info={"norm": norm, "z": z[0], "threshold": centre[0] + self.z_limit * scale[0]},
            updates=(Update(values, x, enters, slot), Update(count, count + 1, enters)),
        )

    def _least(self) -> int:
        return self.warmup if self.warmup is not None else max(2, self.window // 2)

    def _loss(self, measured: Measured, norm: Tensor) -> Tensor:
        if measured.loss is not None:
            if measured.loss.numel() != 1:
                raise ValueError(
                    f"SkipSpike: loss must be one number, got shape {list(measured.loss.shape)}. "
                    "Pass its mean or sum."
                )
            return measured.loss.detach().to(norm.dtype).reshape(())
        if self.loss:
            raise ValueError(
                "SkipSpike: loss=True, but no loss was given. "
                "Pass the step's loss, as clipper(loss=loss) does."
            )
        return torch.full_like(norm, math.nan)

    def _level(self, values: Tensor, sample: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and spread of the first `sample` values of each signal."""
        written = slots < sample.unsqueeze(-1)
        if self.method == "mad":
            centre = _median(torch.where(written, values, math.inf), sample)
            deviations = (values - centre.unsqueeze(-1)).abs()
            return centre, _MAD_TO_STD * _median(torch.where(written, deviations, math.inf), sample)
        centre = values.sum(-1) / sample.clamp_min(1)
        deviations = torch.where(written, values - centre.unsqueeze(-1), 0.0)
        return centre, (deviations.square().sum(-1) / (sample - 1).clamp_min(1)).sqrt()


def _median(values: Tensor, sample: Tensor) -> Tensor:
    """Median of the `sample` smallest of each row; the mean of the middle two where their number is even."""
    middle = torch.stack(((sample - 1).clamp_min(0) // 2, sample // 2), -1)
    return values.sort(-1).values.gather(-1, middle).mean(-1)
