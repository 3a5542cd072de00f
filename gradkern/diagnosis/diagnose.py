"""From findings to one root cause, what follows from it, and where it began."""

from __future__ import annotations

import math
from dataclasses import replace
from enum import IntEnum
from typing import Final

import numpy as np

from gradkern.diagnosis.advice import advise
from gradkern.diagnosis.detectors import detect
from gradkern.diagnosis.detectors.precision import uses_fp16
from gradkern.diagnosis.detectors.weights import ORDINARY
from gradkern.diagnosis.findings import Category, Diagnosis, Finding
from gradkern.diagnosis.health import MOVING_UPDATE, health
from gradkern.diagnosis.series import finite, largest, median
from gradkern.diagnosis.view import View
from gradkern.record.schema import Record

# What each kind can be the cause of. Kinds that are not here are signs of something else.
CATEGORIES: Final[dict[str, Category]] = {
    "data_nonfinite": "data",
    "data_scale": "data",
    "fp16_overflow": "dtype",
    "fp16_underflow": "dtype",
    "amp_backoff": "dtype",
    "update_rounded_away": "dtype",
    "update_ratio_high": "optimizer",
    "update_ratio_low": "optimizer",
    "overclipped": "optimizer",
    "clip_starvation": "optimizer",
    "weights_shrinking": "optimizer",
    "unused_parameter": "optimizer",
    "unstepped_parameter": "optimizer",
    "exploding_gradient": "architecture",
    "vanishing_gradient": "architecture",
    "saturated_activation": "architecture",
    "dead_relu": "architecture",
    "zero_gradient": "architecture",
    "symmetric_units": "architecture",
}

# Kinds that rest on rows, which are taken at a cadence of up to 50 steps: they may show that much later than
# what they cause. What rests on every step's numbers may not show later at all.
SLOW: Final = frozenset({
    "update_ratio_high", "saturated_activation", "dead_relu", "zero_gradient", "vanishing_gradient",
    "amp_backoff",
})  # fmt: skip
CADENCE: Final = 50

# The step since which a loss goes up is known to within some steps.
ABOUT: Final = 5

# After a NaN every ReLU is dead, every gradient gone, and every weight "grows": nothing of it is news.
EMPTY_AFTER_NAN: Final = frozenset({
    "dead_relu", "saturated_activation", "zero_gradient", "update_ratio_low", "weights_growing",
    "vanishing_gradient", "fp16_underflow", "unused_parameter", "overclipped", "clip_starvation",
    "norms_above_one",
})  # fmt: skip

# Dead and saturated units are looked at every 50 steps, the gradients that they stop on each.
UNITS: Final = frozenset({"dead_relu", "saturated_activation"})

# What is left where nothing but NaN and Inf was seen.
NONFINITE: Final = frozenset({"loss_nonfinite", "grad_nonfinite", "weights_nonfinite"})

# Kinds that name the place, where the cause itself does not.
NAMING: Final = frozenset({"exploding_gradient", "grad_nonfinite", "weights_nonfinite"})

# A gradient no more than ten times the usual, and outputs that are far from the range of any dtype, do not
# overflow at the next step.
CALM: Final = 10.0
LARGE_OUTPUT: Final = 1e4

# Where no gradient arrives updates are small whatever the learning rate.
BLOCKING: Final = frozenset({
    "vanishing_gradient", "zero_gradient", "dead_relu", "saturated_activation", "overclipped",
    "unused_parameter",
})  # fmt: skip

# A learning rate that rises threefold from one step to the next explains an update that spikes there.
LR_JUMP: Final = 3.0

# An explosion that is three steps old has made the overflow that then comes.
EARLIER: Final = 3

# A loss that was never a tenth lower than at first has only ever gone up.
NEVER_FELL: Final = 0.9


class Rank(IntEnum):
    """Which cause goes before which, where several began in time."""

    DATA = 0
    DTYPE = 1
    OBJECTIVE = 2
    STALLED = 3
    START = 4
    JUMP = 5
    RATE = 6
    GROWTH = 7
    LATER = 8


# There at the start: before updates could have made it so.
AT_START: Final = 0.9


@np.errstate(all="ignore")
def diagnose(record: Record) -> Diagnosis:
    """One root cause of what is wrong with a run, or honestly none, with its consequences and advice.

    Causes are ranked: data; dtype; a loss that has no lower bound; settings that keep every update small
    although there are gradients; what the architecture does at the first step, before any update; learning
    rate and optimizer; what the architecture does later, which large updates may have done to it; and at last
    an operation that makes NaN of sound numbers. A cause must not begin later than the trouble it explains.
    If only signs are left, none of which explains the others, there is no single cause.

    >>> from gradkern.diagnosis import diagnose
    >>> from gradkern.record import MemoryRecord
    >>> record = MemoryRecord()
    >>> for step, loss in enumerate([2.0, 1.0, float("nan")]):
    ...     record.put_scalars(step, {"loss": loss, "data_nonfinite": 3.0 * (step == 2)})
    >>> print(diagnose(record))
    Cause (data): The batch of step 2 holds 3 elements that are NaN or Inf.
    It began at step 2.
    What follows from it:
      - error: The loss became NaN at step 2; it was 1 before.
    What to do:
      1. Find the bad values: 3 elements of the batch of step 2 are NaN or Inf
         assert torch.isfinite(batch).all(), "batch of step 2"
         Against it: nothing; a bad batch that is only skipped comes back in the next epoch
    """
    view = View.of(record)
    if not len(view.steps):
        return Diagnosis(note="Nothing was recorded, so that nothing can be said.")
    found = [finding for finding in detect(view) if not _is_empty(view, finding)]
    alarms = [finding for finding in found if finding.is_alarm]
    infos = [finding for finding in found if not finding.is_alarm]
    if not alarms:
        return Diagnosis(others=infos)
    cause, category = _cause(view, alarms)
    if cause is not None:
        # With a cause, a loss that does not come down is no plateau that may yet end.
        infos, stuck = (
            [f for f in infos if f.kind != "no_traction"],
            [f for f in infos if f.kind == "no_traction"],
        )
        alarms += [replace(finding, severity="warning") for finding in stuck]
    rest = [finding for finding in alarms if finding is not cause]
    if cause is None:
        consequences, others = rest, infos
    else:
        earliest = cause.step - (CADENCE if cause.kind in SLOW else ABOUT)
        consequences = [
            f
            for f in rest
            if f.kind == "no_traction" or (f.step >= earliest and CATEGORIES.get(f.kind) != "data")
        ]
        others = [f for f in rest if f not in consequences] + infos
    return Diagnosis(
        cause,
        category,
        consequences,
        others,
        _began(view, cause, consequences, alarms),
        advise(view, cause, [*alarms, *infos]),
    )


def _is_empty(view: View, finding: Finding) -> bool:
    """Whether the finding says only that the loss was NaN or Inf by then, and stayed so."""
    lost = health(view).nonfinite
    _, losses = view.scalar("loss")
    is_lost = lost is not None and finding.step >= lost and not math.isfinite(losses[-1])
    return is_lost and finding.kind in EMPTY_AFTER_NAN


def _cause(view: View, alarms: list[Finding]) -> tuple[Finding | None, Category | None]:
    ranked = [
        (rank, finding.step - (CADENCE if finding.kind in UNITS else 0), place, category)
        for place, finding in enumerate(alarms)
        for rank, category in [_rank(view, finding, alarms)]
        if rank is not None and not _is_late(view, finding, alarms)
    ]
    if ranked:
        _, _, place, category = min(ranked, key=lambda entry: entry[:3])
        return alarms[place], category
    return _sign_as_cause(view, alarms)


def _rank(view: View, finding: Finding, alarms: list[Finding]) -> tuple[Rank | None, Category | None]:
    """As what a finding could be the cause of the others; None if it could not."""
    kinds = {other.kind for other in alarms}
    category = CATEGORIES.get(finding.kind)
    explodes = any(other.kind == "exploding_gradient" for other in alarms if not _is_training(view, other))
    if _is_training(view, finding):
        return Rank.GROWTH, "optimizer"  # sound at first, it grew under the updates
    if finding.kind == "loss_diverging" and health(view).unbounded:
        return Rank.OBJECTIVE, "optimizer"
    if finding.kind == "loss_unstable" and not finding.value:
        return Rank.JUMP, "optimizer"  # thrown away by the first updates
    if finding.kind == "update_spike":
        ratio = finding.evidence["lr_ratio"]
        jumped = isinstance(ratio, float) and ratio >= LR_JUMP
        return (Rank.JUMP, "optimizer") if jumped else (None, None)
    if finding.kind in ("unused_parameter", "unstepped_parameter"):
        return Rank.STALLED, category
    if finding.kind in ("overclipped", "clip_starvation", "weights_shrinking"):
        return (Rank.RATE if explodes else Rank.STALLED), category
    if finding.kind == "update_ratio_low":
        if _has_gradients(finding) and "overclipped" not in kinds:
            return Rank.STALLED, category
        return (None, None) if kinds & BLOCKING else (Rank.RATE, category)
    if category == "data":
        return Rank.DATA, category
    if category == "dtype":
        first = [other.step for other in alarms if _is_training(view, other)]
        return (None, None) if any(s <= finding.step - EARLIER for s in first) else (Rank.DTYPE, category)
    if category == "architecture":
        return (Rank.START if _is_at_start(view, finding) else Rank.LATER), category
    return (None, None) if category is None else (Rank.RATE, category)


def _is_late(view: View, finding: Finding, alarms: list[Finding]) -> bool:
    """Whether a finding shows after the signs that it would have to explain."""
    # Weights begin to grow long before it hurts, whatever makes them.
    signs = [
        f.step
        for f in alarms
        if f.kind != "weights_growing" and (f.kind not in CATEGORIES or _is_training(view, f))
    ]
    slack = CADENCE if finding.kind in SLOW or _is_training(view, finding) else ABOUT
    return finding.step > min(signs, default=math.inf) + slack


def _has_gradients(finding: Finding) -> bool:
    """Whether updates are small although there are gradients of ordinary size."""
    relative = finding.evidence["relative_gradient"]
    return isinstance(relative, float) and (math.isnan(relative) or relative >= ORDINARY)


def _is_at_start(view: View, finding: Finding) -> bool:
    if finding.step > _first_step(view):
        return False
    at_start = finding.evidence.get("at_start", 1.0)
    return isinstance(at_start, str) or at_start >= AT_START


def _is_training(view: View, finding: Finding) -> bool:
    """Whether it is an explosion that came with the updates."""
    if finding.kind != "exploding_gradient":
        return False
    axis = finding.evidence.get("axis")
    return axis == "training" or (axis == "scale" and finding.step > _first_step(view))


def _first_step(view: View) -> int:
    return int(view.steps[0]) if len(view.steps) else 0


def _sign_as_cause(view: View, alarms: list[Finding]) -> tuple[Finding | None, Category | None]:
    """Signs that speak for themselves where nothing else was found."""
    kinds = {finding.kind for finding in alarms}
    state, early = health(view), finite(view.total_update_ratios[1])[:10]
    for finding in alarms:
        # Small steps that make the loss worse from the first one on go the wrong way.
        is_small = not len(early) or median(early) < MOVING_UPDATE
        if finding.kind == "loss_diverging" and state.best >= NEVER_FELL * state.start > 0 and is_small:
            return finding, "optimizer"
    growing = next((finding for finding in alarms if finding.kind == "weights_growing"), None)
    if growing is not None and all(growing.step <= finding.step for finding in alarms):
        return growing, "optimizer"  # only the optimizer changes weights
    if kinds <= NONFINITE:
        return _operation(view, alarms)
    return None, None


def _operation(view: View, alarms: list[Finding]) -> tuple[Finding | None, Category | None]:
    """NaN or Inf out of nothing: no number before was large, so that an operation has left its domain."""
    first = min(alarms, key=lambda finding: finding.step)
    for name in ("grad_finite_norm", "loss"):
        steps, values = view.scalar(name)
        before = finite(np.abs(values[steps < first.step]))
        if len(before) and before[-1] > CALM * median(before):
            return None, None
    peak_steps, peaks = view.rows("act_abs_max")
    if largest(peaks[peak_steps <= first.step]) > LARGE_OUTPUT:
        return None, None
    origin = next((e["detail"].get("where") for e in view.events if e["kind"] == "first_nonfinite"), None)
    if uses_fp16(view):
        return first, "dtype"  # what is sound in float32 may be 0 or Inf in float16
    return first, "optimizer" if origin == "optimizer" else "architecture"


def _began(
    view: View, cause: Finding | None, consequences: list[Finding], alarms: list[Finding]
) -> dict[str, int | str | None]:
    first = cause or min(alarms, key=lambda finding: finding.step)
    # What rests on rows may have begun before it showed.
    step = min(
        [first.step, *(f.step for f in consequences if first.kind in SLOW and f.kind != "no_traction")]
    )
    named = [name for finding in [first, *alarms] if finding is first or finding.kind in NAMING
             for name in finding.names[:1]]  # fmt: skip
    for event in view.events:
        if event["kind"] == "first_nonfinite" and first.kind in NONFINITE:
            step = min(int(event["step"]), step)
            named.insert(0, str(event["detail"].get("name", "")))
    modules = {module.name for module in view.modules}
    layer = next((view.parameters[n].module if n in view.parameters else n for n in named
                  if n in view.parameters or n in modules), None)  # fmt: skip
    parameter = next((n for n in named if n in view.parameters and view.parameters[n].module == layer), None)
    return {
        "step": step,
        "layer": layer or None,
        "parameter": parameter,
        "unit": _worst_unit(view, layer, step),
    }


def _worst_unit(view: View, layer: str | None, step: int) -> int | None:
    """Which unit of a layer had the largest gradient when it was last looked at, or else soon after."""
    kind = "out_grad_unit_argmax"
    if layer is None or layer not in view.names(kind):
        return None
    steps, rows = view.rows(kind)
    units = rows[:, view.names(kind).index(layer)]
    steps, units = steps[np.isfinite(units)], units[np.isfinite(units)]
    place = max(int(np.searchsorted(steps, step, "right")) - 1, 0)
    return int(units[place]) if len(steps) and steps[place] <= step + CADENCE else None
