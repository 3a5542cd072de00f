"""Several policies, one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from gradkern.params import shown
from gradkern.policies.protocol import Decision, Layout, Measured, Needs, Policy, State, Update


@dataclass(frozen=True, init=False)
class Chain(Policy):
    """Apply policies in order, each to what the ones before it leave.

    Coefficients compose exactly without another read of the gradients: after a factor k a stage sees
    ``sum_sq * k**2`` and ``abs_max * |k|``, also per tensor and per unit. A step is skipped if any stage
    skips it, and then enters no stage's history. An element-wise policy (`Value`) leaves a norm that is not
    known without reading again, so it comes last.

    When not to use it: two limits of the same kind; the smaller alone does the same.

    Args:
        stages: policies, at least one. Chains among them are taken apart.

    Raises:
        ValueError: no stage; an element-wise policy that is not last; a policy that reads the largest
            magnitude after one with a coefficient per unit, which leaves it unknown.
        TypeError: a stage is not a policy.

    >>> policy = gradkern.Chain(gradkern.SkipSpike(max_norm=100.0), gradkern.GlobalNorm(1.0))
    >>> result = gradkern.policies.replay(policy, [4.0, 200.0])
    >>> result.coef.tolist(), result.skip.tolist()
    ([0.25, 0.005], [False, True])
    """

    stages: tuple[Policy, ...]

    def __init__(self, *stages: Policy) -> None:
        flat: list[Policy] = []
        for stage in stages:
            if not isinstance(stage, Policy):
                advice = "Pass policies one by one, each made by a call: Chain(ZClip(), Value(0.5))."
                if isinstance(stage, (int, float)):
                    advice = f"A number must be named: GlobalNorm({stage!r})."
                raise TypeError(f"Chain: {shown(stage)} is not a policy. {advice}")
            flat.extend(stage.stages if isinstance(stage, Chain) else (stage,))
        if not flat:
            raise ValueError("Chain: needs at least one policy.")
        for earlier, later in pairwise(flat):
            if earlier.elementwise:
                raise ValueError(
                    f"Chain: {type(earlier).__name__} works element by element and must come last, but "
                    f"{type(later).__name__} follows. The norm it leaves is not known without reading again."
                )
        per_unit = False
        for stage in flat:
            if per_unit and stage.reads_abs_max:
                raise ValueError(
                    f"Chain: {stage!r} reads the largest magnitude, which is not known after coefficients "
                    "per unit. Put it before the policy that works per unit."
                )
            per_unit = per_unit or stage.needs.units
        object.__setattr__(self, "stages", tuple(flat))

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.stages))})"

    @property
    def needs(self) -> Needs:
        """What any stage needs; rows too where a later stage must see what coefficients per tensor leave."""
        needs = self.stages[0].needs
        for stage in self.stages[1:]:
            # After coefficients per tensor or unit only the rows can say what is left of the total.
            mixed = (needs.rows or needs.units) and stage.needs.total
            needs = needs.union(stage.needs)
            if mixed:
                needs = needs._replace(rows=True)
        return needs

    @property
    def elementwise(self) -> bool:
        """Whether the last stage is."""
        return self.stages[-1].elementwise

    @property
    def reads_abs_max(self) -> bool:
        """Whether any stage does."""
        return any(stage.reads_abs_max for stage in self.stages)

    def as_clip(self) -> tuple[float, float] | None:
        """For a norm, a value, or a norm and then a value."""
        parts = [stage.as_clip() for stage in self.stages]
        if len(parts) == 1:
            return parts[0]
        if len(parts) == 2 and parts[0] is not None and parts[1] is not None and parts[1][0] == math.inf:
            return parts[0][0], parts[1][1]
        return None

    def init(self, layout: Layout) -> State:
        """The states of the stages."""
        constants = {"unit_tensor": layout.unit_tensor()} if self.needs.units else {}
        return State(self, layout, constants=constants, stages=[stage.init(layout) for stage in self.stages])

    def decide(self, measured: Measured, state: State) -> Decision:
        """The product of the coefficients, any skip, the last stage's bound."""
        coef: Tensor | None = None
        unit_coef: Tensor | None = None
        skip: Tensor | None = None
        bound: float | Tensor | None = None
        info: dict[str, Tensor] = {}
        updates: list[Update] = []
        last = len(self.stages) - 1
        for index, (stage, memory) in enumerate(zip(self.stages, state.stages, strict=True)):
            decision = stage.decide(measured, memory)
            coef = _product(coef, decision.coef)
            unit_coef = _product(unit_coef, decision.unit_coef)
            if decision.skip is not None:
                skip = decision.skip if skip is None else skip | decision.skip
            bound = decision.bound
            for key, value in decision.info.items():
                info[f"{index}.{key}" if key in info else key] = value
            updates.extend(decision.updates)
            if index < last:
                measured = measured.scaled(
                    decision.coef, decision.unit_coef, state.constants.get("unit_tensor")
                )
        return Decision(coef, unit_coef, skip, bound, info, tuple(updates))


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b
