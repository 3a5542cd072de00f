"""What every step needs, however it is called: follow the parameters, measure, decide, remember."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradkern import ops, reference
from gradkern.apply import Seen
from gradkern.backward import BackwardRows
from gradkern.clip import raise_nonfinite
from gradkern.params import Names, Params, check, collect, describe, shown
from gradkern.policies import Decision, Layout, Measured, Policy, State, Units, all_finite
from gradkern.stats import GradStats, least
from gradkern.tally import Tally
from gradkern.tracked import Tracked

_RAISE_REMEDY = (
    "nonfinite='keep' clips the rest and goes on; attached to an optimizer, 'skip' leaves the step out."
)


class Judged(NamedTuple):
    """A step's gradients, measured and decided on. Nothing has been written and nothing remembered yet.

    `stats`: without the loss scale that the gradients may bear. `decision`: for the gradients that are there,
    where it says something of each. `good`: 0-dim bool, whether all are finite. `clipped`: 0-dim bool.
    """

    seen: Seen
    stats: GradStats
    decision: Decision
    good: Tensor
    clipped: Tensor

    def refuse_skip(self, policy: Policy) -> None:
        """Raise if the policy is one that leaves steps out, for callers that cannot."""
        if self.decision.skip is not None:
            raise ValueError(
                f"Clipper: {policy!r} leaves out whole steps, which only an attached clipper can do. "
                "Use attach(optimizer)."
            )


class Stepper:
    """A policy, its state, and the parameters it is for, from step to step.

    Args:
        params: what `gradkern.clip_` takes.
        policy: decides.
        grad_attr: the attribute of a parameter that holds its gradient.
        backward: measures gradients as they are produced; None to measure them all when asked.

    Raises:
        ValueError: a pattern of the policy matches no parameter.
    """

    def __init__(self, params: Params, policy: Policy, grad_attr: str, backward: BackwardRows | None) -> None:
        self.policy = policy
        self.grad_attr = grad_attr
        self.backward = backward
        self.tracked = Tracked(params, "Clipper")
        self.loss: Tensor | float | None = None  # of the coming step
        self.last: GradStats | None = None
        self.info: Mapping[str, Tensor] = {}
        self._clip = policy.as_clip()
        self.max_norm = math.inf if self._clip is None else self._clip[0]  # where it is known beforehand
        self._last_present: tuple[list[int], Tensor] | None = None
        device = next((param.device for param in self.tracked.params if param.device.type != "cpu"), None)
        self._lay_out(torch.device("cpu") if device is None or device.type == "mps" else device)

    def refresh(self) -> None:
        """Look for parameters that came or went since the last step; histories follow their names."""
        if torch.compiler.is_compiling() or not self.tracked.refresh():
            return
        try:
            self._move(self.state.layout.device)
        except ValueError:  # a pattern that matches none of those
            self.tracked.forget()
            raise

    def follow(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Look after what `optimizer` steps, or with None after all parameters again.

        Raises:
            ValueError: it steps others, or the policy has a pattern that matches none. Nothing has changed.
        """
        before = self.tracked.optimizer
        self.tracked.follow(optimizer)
        try:
            self._move(self.state.layout.device)
        except ValueError:
            self.tracked.follow(before)
            raise

    def state_dict(self) -> dict[str, Any]:
        """The policy's history by names, and the counts; copies, on the device."""
        return {"policy": self.state.state_dict(), "tally": self.tally.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any], strict: bool) -> None:
        """Go on from there. Raises ValueError before anything is loaded."""
        if not isinstance(saved, Mapping):
            raise TypeError(f"Clipper.load_state_dict: needs what state_dict() gave, got {shown(saved)}.")
        if set(saved) != {"policy", "tally"}:
            found = sorted(map(str, saved))
            raise ValueError(f"Clipper.load_state_dict: needs what state_dict() gave, got the keys {found}.")
        self.tally.check(saved["tally"])
        self.refresh()
        self.state.load_state_dict(saved["policy"], strict)
        self.tally.load_state_dict(saved["tally"])

    def clip_(self, word: str) -> GradStats | None:
        """The whole step in one call of the extension. None, and nothing done, where that cannot be."""
        if self._clip is None or not self._walks_natively():
            return None
        max_norm, clip_value = self._clip
        found = ops.native.clip_(self.tracked.items, max_norm, None, 0.0, clip_value, word)
        if found is None:
            return None
        rows, total, coef, present = found
        if total.device != self.state.layout.device:
            self._move(total.device)
        stats = GradStats(rows, total, self._names(present, rows.shape[0]), coef, clip_value, word)
        clipped = coef < 1
        if clip_value < math.inf:
            clipped = clipped | (total[1] * coef > clip_value)
        self.info = {}
        self.tally.record(clipped, None)
        self.last = stats
        return stats

    def judge(
        self,
        word: str,
        loss: Tensor | float | None,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Judged:
        """Measure and decide. Writes nothing, and waits for a device only under "raise".

        Args:
            word: what becomes of NaN and Inf.
            loss: the step's, for policies that look at it.
            scale: the loss scale that the gradients bear. All that is decided and told is without it.
            found_inf: a scaler's verdict: not 0 where the step is bad.

        Raises:
            ValueError: the policy needs a loss. TypeError: a gradient cannot be clipped.
            NonFiniteGradientError: under "raise".
        """
        if self.policy.needs.loss == "required" and loss is None:
            raise ValueError(
                f"Clipper: {self.policy!r} needs the loss. Call clipper(loss=loss) or, attached, set "
                "clipper.loss = loss before optimizer.step()."
            )
        seen = self._see()
        if self.policy.needs.units:
            seen = seen._replace(grads=seen.collect())
        if seen.total.device != self.state.layout.device:
            self._move(seen.total.device)
        measured = Measured(total=seen.total, rows=seen.rows)
        factor = None if scale is None else scale.to(seen.total.device, torch.float64).reciprocal()
        if factor is not None:
            measured = measured.scaled(factor)
        total, rows = measured.need_total(), measured.need_rows()
        if word == "raise":
            raise_nonfinite("Clipper", GradStats(rows, total, seen.names), _RAISE_REMEDY)
        good = all_finite(total)
        others = self.excluded_grads()
        if others:
            good = good & all_finite(ops.measure(others)[1].to(total.device))
        if found_inf is not None:
            good = good & (found_inf.to(total.device) == 0)
        measured = Measured(total=total, good=good, propagate=word == "propagate", loss=_on(loss, total))
        measured = self._with_needs(measured, rows, seen, factor)
        decision = self.policy.decide(measured, self.state)
        self.info = decision.info
        coef, decision = self._for_present(measured, decision, seen)
        bound = math.inf if decision.bound is None else decision.bound
        told_word = "propagate" if word == "propagate" else "keep"
        stats = GradStats(rows, total, seen.names, coef, bound, told_word)
        return Judged(seen, stats, decision, good, _is_clipped(stats, decision))

    def remember(self, judged: Judged, skip: Tensor | None) -> None:
        """Let the step enter the history and the counts, in place. `skip`: whether it is left out."""
        judged.decision.commit(judged.good)
        clipped = judged.clipped if skip is None else judged.clipped & skip.logical_not()
        self.tally.record(clipped, skip)
        self.last = judged.stats

    def excluded_grads(self) -> list[Tensor]:
        """Gradients that the optimizer steps and nobody clips."""
        return collect(self.tracked.excluded, "Clipper")[1]

    def _walks_natively(self) -> bool:
        """Whether the extension may be tried, which reads `.grad` of the items by itself."""
        plain = self.grad_attr == "grad" and self.backward is None
        return plain and ops.native is not None and not torch.compiler.is_compiling()

    def _see(self) -> Seen:
        """Measure the gradients of the items, whichever way that can be done."""
        items = self.tracked.items
        if self._walks_natively():
            found = ops.native.measure(items)
            if found is not None:
                rows, total, present = found
                return self._seen(rows, total, self._names(present, rows.shape[0]), present, None)
        if self.grad_attr == "grad":
            names, grads = collect(items, "Clipper")
        else:
            held = [(name, getattr(param, self.grad_attr, None)) for name, param in items]
            names, grads = collect(held, "Clipper", of_grads=True)
        check(names, grads, "Clipper", writes=True, by_value=self.policy.elementwise)
        present = list(names.present or ())
        rows, total = self._measure(grads, present)
        return self._seen(rows, total, names, None if len(grads) == len(items) else present, grads)

    def _seen(
        self, rows: Tensor, total: Tensor, names: Names, present: list[int] | None, grads: list[Tensor] | None
    ) -> Seen:
        if not names:  # nothing says where it is
            device = self.state.layout.device
            rows, total = torch.zeros_like(rows, device=device), torch.zeros_like(total, device=device)
        return Seen(rows, total, names, self.tracked.items, present, grads)

    def _measure(self, grads: list[Tensor], present: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows and total; of what backward has measured already as far as it still holds."""
        if self.backward is None or torch.compiler.is_compiling():
            return ops.measure(grads)
        taken = self.backward.take(self.tracked.params)
        rows = [taken[item] for item in present]
        stale = [index for index, row in enumerate(rows) if row is None]
        if len(stale) == len(grads) or len({grad.device for grad in grads}) > 1:
            return ops.measure(grads)
        if stale:
            anew, _ = ops.measure([grads[index] for index in stale])
            for index, row in zip(stale, anew.unsqueeze(1).unbind(), strict=True):
                rows[index] = row
        whole = torch.cat([row for row in rows if row is not None])
        folds = ops.native is not None and reference.is_readable(whole)
        return whole, ops.native.fold(whole) if folds else reference.merge(whole)

    def _with_needs(self, measured: Measured, rows: Tensor, seen: Seen, factor: Tensor | None) -> Measured:
        """`measured` with what else the policy asks for: rows of all parameters, of their weights, units."""
        needs = self.policy.needs
        if needs.rows or needs.units:  # after coefficients per unit, rows tell what is left of a tensor
            measured = measured._replace(rows=self._spread(rows, seen.present))
        if not (needs.weight_rows or needs.units):
            return measured
        weights = self.tracked.params
        if needs.weight_rows:
            measured = measured._replace(weight_rows=self._weight_rows(weights))
        if needs.units:
            full = grads = seen.collect()
            _check_units(self.policy, seen.names, grads)
            if seen.present is not None:
                full = [torch.zeros_like(weight) for weight in weights]
                for index, grad in zip(seen.present, grads, strict=True):
                    full[index] = grad
            sums = ops.unit_sums(full)
            sums = sums if factor is None else sums * factor.square()
            measured = measured._replace(units=Units(sums, ops.unit_sums(weights), self._unit_ends))
        return measured

    def _weight_rows(self, weights: list[Tensor]) -> Tensor:
        if ops.native is not None and not torch.compiler.is_compiling():
            found = ops.native.measure(weights, True)
            if found is not None and found[2] is None:
                rows: Tensor = found[0]
                return rows
        return ops.measure([weight.detach() for weight in weights])[0]

    def _for_present(
        self, measured: Measured, decision: Decision, seen: Seen
    ) -> tuple[Tensor | None, Decision]:
        """The coefficient to tell, that of each norm where units have their own, and the decision for the
        gradients that are there."""
        told = decision.coef
        if decision.unit_coef is not None:
            before = measured._replace(total=None)  # not asked for, and so not worked out
            left = before.scaled(decision.coef, decision.unit_coef, self._owners).need_rows().select(-1, 0)
            was = measured.need_rows().select(-1, 0)
            told = torch.where(was > 0, left / was, 1.0).sqrt()
        if seen.present is None:
            return told, decision
        coef, bound, unit_coef = decision.coef, decision.bound, decision.unit_coef
        index = self._index(seen.present)
        if told is not None and told.dim() > 0:
            told = told.index_select(0, index)
        if coef is not None and coef.dim() > 0:
            coef = coef.index_select(0, index)
        if isinstance(bound, Tensor):
            bound = bound.index_select(0, index)
        if unit_coef is not None:
            per_tensor = torch.split(unit_coef, self.state.layout.unit_counts())
            unit_coef = torch.cat([unit_coef.narrow(0, 0, 0), *(per_tensor[row] for row in seen.present)])
        return told, decision._replace(coef=coef, bound=bound, unit_coef=unit_coef)

    def _spread(self, rows: Tensor, present: list[int] | None) -> Tensor:
        """Rows of all parameters: those without a gradient have zeros."""
        if present is None:
            return rows
        full = rows.new_zeros(len(self.tracked.items), rows.shape[1])
        return full.index_copy_(0, self._index(present), rows)

    def _index(self, present: list[int]) -> Tensor:
        """`present` on the device; uploaded only when it is another than last time."""
        if self._last_present is None or self._last_present[0] != present:
            device = self.state.layout.device
            self._last_present = present, torch.tensor(present, dtype=torch.int64, device=device)
        return self._last_present[1]

    def _names(self, present: list[int] | None, count: int) -> Names:
        return Names("parameters", self._labels, present, count)

    def _move(self, device: torch.device) -> None:
        """Lay out anew, for other parameters or another device; histories and counts go along."""
        if self._layout(device) == self.state.layout:
            self._measure_in_backward()
            return
        saved = self.state_dict() if self.state.layout.device.type != "meta" else None
        self._lay_out(device)
        if saved is not None:
            self.load_state_dict(saved, strict=False)

    def _lay_out(self, device: torch.device) -> None:
        layout = self._layout(device)
        self.state: State = self.policy.init(layout)  # may raise
        self.tally = Tally(device)
        self._labels: list[str | None] = list(layout.names)
        if self.policy.needs.units:
            self._owners = layout.unit_tensor()
            ends = list(accumulate(layout.unit_counts(), initial=0))
            self._unit_ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self._last_present = None
        self._measure_in_backward()

    def _layout(self, device: torch.device) -> Layout:
        items = self.tracked.items
        names = tuple(name for name, _ in items)
        return Layout(names, tuple(tuple(param.shape) for _, param in items), device)

    def _measure_in_backward(self) -> None:
        if self.backward is not None:
            self.backward.follow(self.tracked.items)


def _is_clipped(stats: GradStats, decision: Decision) -> Tensor:
    """Whether anything is scaled down or cut off; 0-dim bool."""
    coef, unit_coef, bound = decision.coef, decision.unit_coef, decision.bound
    clipped = torch.zeros_like(stats.sum_sq, dtype=torch.bool) if coef is None else least(coef) < 1
    if unit_coef is not None:
        clipped = clipped | (least(unit_coef) < 1)
    if isinstance(bound, Tensor) or (bound is not None and bound < math.inf):
        per_tensor = isinstance(bound, Tensor) or (coef is not None and coef.dim() > 0)
        peaks = stats.per_tensor.abs_max if per_tensor else stats.abs_max
        clipped = clipped | (peaks * (1.0 if coef is None else coef) > bound).any()
    return clipped


def _check_units(policy: Policy, names: Names, grads: Sequence[Tensor]) -> None:
    for row, grad in enumerate(grads):
        if grad.layout != torch.strided:
            raise TypeError(
                f"Clipper: gradient of '{names[row]}' ({describe(grad)}) is sparse, but {policy!r} looks at "
                "its units one by one; gradkern needs a dense one for that.\nLeave this parameter out, or "
                "use a policy per tensor."
            )


def _on(loss: Tensor | float | None, like: Tensor) -> Tensor | None:
    """The loss where the statistics are."""
    if loss is None:
        return None
    if not isinstance(loss, Tensor):
        return torch.full_like(like.select(0, 0), loss)
    return loss.detach().to(like.device, non_blocking=True)
