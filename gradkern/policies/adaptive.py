"""Policies whose limits follow the run. Their histories live on the device, in buffers of fixed size."""

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
    check_number,
    check_positive,
    check_share,
    check_steps,
    clip_coef,
)


@dataclass(frozen=True)
class Percentile(Policy):
    """AutoClip: the limit is a percentile of the norms seen so far.

    ``g * min(1, limit / norm)``, ``limit`` the `percentile`-th percentile of the last `window` norms *before
    clipping*, this step's included, with linear interpolation. Source: Seetharaman, Wichern, Pardo,
    Le Roux 2020 (arXiv 2007.14469), which keeps all norms; here the last `window`, so memory and time stay
    bounded. In the authors' code one NaN norm makes every later limit NaN; here a bad step does not enter.

    When not to use it: with the default it clips nine steps in ten, also when nothing is wrong: that lowers
    the learning rate of plain SGD by as much. To act on outliers only, take a percentile of 90 or more, or
    `ZClip`. Per tensor and with thousands of tensors, its selection takes longer than measuring small ones.

    Args:
        percentile: 0 to 100. 10.
        window: norms remembered. Default 1000, or 100 per tensor (8 bytes each).
        per: "global" for one joint norm, or "tensor" for a history and a limit of each tensor. A zero
            gradient does not enter the history of its tensor.

    Raises:
        ValueError: `percentile` outside 0 to 100, `window` below 1, another `per`.

    >>> gradkern.policies.replay(gradkern.Percentile(50), [1.0, 3.0, 2.0, 8.0]).coef
    tensor([1.0000, 0.6667, 1.0000, 0.3125], dtype=torch.float64)
    """

    percentile: float = 10.0
    window: int | None = None
    per: Literal["global", "tensor"] = "global"

    def __post_init__(self) -> None:
        check_number(self, "percentile", self.percentile)
        if not 0.0 <= self.percentile <= 100.0:
            raise ValueError(f"Percentile: percentile must be between 0 and 100, got {self.percentile}.")
        if self.window is not None:
            check_steps(self, "window", self.window, least=1)
        if self.per not in ("global", "tensor"):
            raise ValueError(f"Percentile: per must be 'global' or 'tensor', got {self.per!r}.")

    @property
    def needs(self) -> Needs:
        """The total, or rows."""
        return Needs(rows=self.per == "tensor")

    def init(self, layout: Layout) -> State:
        """An empty history."""
        window = self.window or (1000 if self.per == "global" else 100)
        histories = len(layout.names) if self.per == "tensor" else 1
        # Unwritten slots are infinitely far on the side where the percentile is not looked for, so that the
        # selection below never picks one before all that are written.
        fill = math.inf if self._is_low else -math.inf
        history = {
            "norms": torch.full((histories, window), fill, dtype=torch.float64, device=layout.device),
            "count": torch.zeros(histories, dtype=torch.int64, device=layout.device),
        }
        # For each size of the sample: the two extremes that the percentile lies between, and how far along.
        ranks = [self._share * max(size - 1, 0) for size in range(window + 1)]
        constants = {
            "ends": torch.tensor([(math.floor(r), math.ceil(r)) for r in ranks], device=layout.device),
            "along": layout.floats([r - math.floor(r) for r in ranks]),
        }
        if self.per == "tensor":
            return State(self, layout, constants=constants, per_tensor=history, unwritten={"norms": fill})
        return State(self, layout, constants=constants, shared=history, unwritten={"norms": fill})

    def decide(self, measured: Measured, state: State) -> Decision:
        """One coefficient, or one per tensor."""
        per_tensor = self.per == "tensor"
        history = state.per_tensor if per_tensor else state.shared
        norms, count = history["norms"], history["count"]
        norm = measured.norms() if per_tensor else measured.norm().unsqueeze(0)
        enters = (norm > 0) & measured.need_good()
        window = norms.shape[-1]
        # Counting on past the window keeps the slot; only the size of the sample stops growing.
        slot = (count % window).unsqueeze(-1)
        counted = count + enters
        entry = torch.where(enters.unsqueeze(-1), norm.unsqueeze(-1), norms.gather(-1, slot))
        limit = self._limit(norms.scatter(-1, slot, entry), counted.clamp_max(window), state)
        coef = clip_coef(limit, norm)
        updates = (Update(norms, norm, enters, slot), Update(count, counted, enters))
        if per_tensor:
            return Decision(coef=coef, info={"threshold": limit}, updates=updates)
        info = {"norm": norm.squeeze(0), "threshold": limit.squeeze(0)}
        return Decision(coef=coef.squeeze(0), info=info, updates=updates)

    @property
    def _is_low(self) -> bool:
        return self.percentile <= 50.0

    @property
    def _share(self) -> float:
        """The part of the norms that is beyond the percentile, on its nearer side."""
        return (self.percentile if self._is_low else 100.0 - self.percentile) / 100.0

    def _limit(self, norms: Tensor, size: Tensor, state: State) -> Tensor:
        """The percentile of the `size` norms that are written in each row; inf where there are none."""
        # The percentile of a smaller sample is never deeper than that of a full window.
        depth = math.ceil(self._share * (norms.shape[-1] - 1)) + 1
        extremes = norms.topk(depth, -1, largest=not self._is_low).values
        first, second = extremes.gather(-1, state.constants["ends"].index_select(0, size)).unbind(-1)
        along = state.constants["along"].index_select(0, size)
        # Between two unwritten slots, inf - inf gives NaN.
        return torch.lerp(first, second, along).nan_to_num(math.inf, math.inf, -math.inf)


@dataclass(frozen=True)
class ZClip(Policy):
    """Clip norms that stand out from a running mean, and the harder the further they do.

    With mean μ and standard deviation σ of past norms and ``z = (norm - μ) / (σ + eps)``: where z exceeds
    `z_limit` the norm is clipped to ``μ + z_limit * σ / (z / z_limit)``. In any case it is clipped to
    `max_norm`. The first `warmup` norms give μ and σ (of the population) and are clipped by `max_norm`
    alone. After that

        μ ← alpha * μ + (1 - alpha) * x,    σ² ← alpha * σ² + (1 - alpha) * (x - μ)²    (with the new μ)

    where x is the norm, or on a spike what it was clipped to by z. Source: Kumar, Owen, Chowdhury, Güra 2025
    (arXiv 2504.02507). The authors' code waits for the device every step, forgets its state on resuming, and
    a NaN norm poisons its mean for good; none of this here.

    When not to use it: with batches so small that large norms are normal (z then exceeds 2.5 all the time),
    or right after a change of data or learning rate, where the old mean is no guide.

    Args:
        z_limit: z above which a norm is a spike, positive. 2.5.
        alpha: how much of the mean and variance stays at each step, in [0, 1). 0.97.
        warmup: norms to begin with, at least 1. 25.
        max_norm: limit that holds besides, not negative; None for none. 1.
        eps: added to σ, not negative. 1e-6; mind that it is absolute when gradients are as small.

    Raises:
        ValueError: a parameter outside its range.

    >>> policy = gradkern.ZClip(warmup=4, max_norm=None)
    >>> gradkern.policies.replay(policy, [1.0, 1.2, 0.8, 1.0, 9.0]).coef
    tensor([1.0000, 1.0000, 1.0000, 1.0000, 0.1128], dtype=torch.float64)
    """

    z_limit: float = 2.5
    alpha: float = 0.97
    warmup: int = 25
    max_norm: float | None = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(self, "z_limit", self.z_limit)
        check_share(self, "alpha", self.alpha)
        check_steps(self, "warmup", self.warmup, least=1)
        if self.max_norm is not None:
            check_limit(self, "max_norm", self.max_norm)
        check_limit(self, "eps", self.eps)

    @property
    def needs(self) -> Needs:
        """The total."""
        return Needs()

    def init(self, layout: Layout) -> State:
        """An empty history."""
        # One row per number of norms seen, the last for all that follow: what a new deviation d = x - μ
        # weighs. μ grows by a*d and σ² becomes (1 - a)*σ² + b*d². In the warm-up this is the recurrence of
        # the exact mean and population variance, b = a(1 - a); afterwards the moving averages above, where
        # x - μ_new = alpha*d gives b = (1 - alpha)*alpha². There is no spike before the warm-up is over.
        steps = [(1 / (n + 1), n / (n + 1) ** 2, math.inf) for n in range(self.warmup)]
        steps.append((1 - self.alpha, (1 - self.alpha) * self.alpha**2, self.z_limit))
        zero = torch.zeros((), dtype=torch.float64, device=layout.device)
        return State(
            self,
            layout,
            constants={
                "steps": layout.floats(steps),
                "max_norm": layout.floats(math.inf if self.max_norm is None else self.max_norm),
            },
            shared={
                "mean": zero,
                "variance": zero.clone(),
                "count": torch.zeros(1, dtype=torch.int64, device=layout.device),
            },
        )

    def decide(self, measured: Measured, state: State) -> Decision:
        """One coefficient."""
        mean, variance, count = state.shared["mean"], state.shared["variance"], state.shared["count"]
        norm = measured.norm()
        seen = count.clamp_max(self.warmup)  # a history may come from a run with a longer warm-up
        a, b, z_limit = state.constants["steps"].index_select(0, seen).squeeze(0).unbind(0)
        std = variance.sqrt()
        z = (norm - mean) / (std + self.eps)
        is_spike = z > z_limit
        spike_limit = mean + std * (self.z_limit * self.z_limit) / z
        x = torch.where(is_spike, spike_limit, norm)
        d = x - mean
        limit = torch.minimum(torch.where(is_spike, spike_limit, math.inf), state.constants["max_norm"])
        enters = norm > 0
        return Decision(
            coef=clip_coef(limit, norm),
            info={"norm": norm, "threshold": limit, "z": z},
            updates=(
                Update(mean, mean + a * d, enters),
                Update(variance, (1 - a) * variance + b * d * d, enters),
                Update(count, (count + 1).clamp_max(self.warmup), enters),
            ),
        )


@dataclass(frozen=True)
class AdaGC(Policy):
    """Clip each tensor relative to a moving average of its own clipped norms.

    In a tensor's first `warmup` steps all of them are scaled by ``min(1, max_norm / norm)`` of the joint
    norm, and γ_i is the smallest clipped norm so far. Afterwards ``g_i * min(1, ratio * γ_i / norm_i)`` and
    ``γ_i ← beta * γ_i + (1 - beta) * clipped norm_i``. Source: Wang et al. 2025, algorithm 1 (arXiv
    2502.11034). There one zero gradient in the warm-up makes γ_i zero, and the tensor never moves again;
    here a zero or missing gradient does not enter, and a tensor without a history is not clipped by one. A
    tensor that joins later has a warm-up of its own.

    When not to use it: norms may grow by at most ``1 + (1 - beta) * (ratio - 1)`` a step, 0.04 % with the
    defaults. Where gradients have reason to grow faster (after a learning-rate warm-up, a change of loss
    weights) it holds them back for thousands of steps.

    Args:
        ratio: limit relative to γ_i, positive; above 1, or γ_i can only fall. 1.04.
        beta: how much of γ_i stays at each step, in [0, 1). 0.99.
        warmup: steps by the joint norm, at least 1. 100.
        max_norm: limit on the joint norm in the warm-up, positive. 1.

    Raises:
        ValueError: a parameter outside its range.

    >>> policy = gradkern.AdaGC(ratio=1.5, warmup=2, max_norm=10.0)
    >>> gradkern.policies.replay(policy, [[1.0, 2.0], [1.0, 2.0], [1.0, 6.0]]).coef
    tensor([[1.0000, 1.0000],
            [1.0000, 1.0000],
            [1.0000, 0.5000]], dtype=torch.float64)
    """

    ratio: float = 1.04
    beta: float = 0.99
    warmup: int = 100
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "ratio", self.ratio)
        check_share(self, "beta", self.beta)
        check_steps(self, "warmup", self.warmup, least=1)
        check_positive(self, "max_norm", self.max_norm)

    @property
    def needs(self) -> Needs:
        """The total and rows."""
        return Needs(rows=True)

    def init(self, layout: Layout) -> State:
        """No history: γ is inf until a tensor's first gradient."""
        count = len(layout.names)
        return State(
            self,
            layout,
            constants={"max_norm": layout.floats(self.max_norm)},
            per_tensor={
                "gamma": torch.full((count,), math.inf, dtype=torch.float64, device=layout.device),
                "count": torch.zeros(count, dtype=torch.int64, device=layout.device),
            },
        )

    def decide(self, measured: Measured, state: State) -> Decision:
        """A coefficient per tensor."""
        gamma, count = state.per_tensor["gamma"], state.per_tensor["count"]
        norm, norms = measured.norm(), measured.norms()
        warming = count < self.warmup
        joint = clip_coef(state.constants["max_norm"], norm)
        limits = self.ratio * gamma
        coef = torch.where(warming, joint, clip_coef(limits, norms))
        clipped = coef * norms
        smallest = torch.minimum(gamma, clipped)
        average = self.beta * gamma + (1 - self.beta) * clipped
        enters = norms > 0
        return Decision(
            coef=coef,
            info={"norm": norm, "threshold": limits},
            updates=(
                Update(gamma, torch.where(warming, smallest, average), enters),
                Update(count, (count + 1).clamp_max(self.warmup), enters),
            ),
        )
