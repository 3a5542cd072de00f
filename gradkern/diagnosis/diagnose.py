"""From findings to one root cause, what follows from it, and where it began."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from gradkern.diagnosis.advice import advise
from gradkern.diagnosis.detectors import detect
from gradkern.diagnosis.findings import Category, Diagnosis, Finding
from gradkern.diagnosis.health import MOVING_UPDATE, health
from gradkern.diagnosis.series import finite, median
from gradkern.diagnosis.view import View
from gradkern.record.schema import Record

# What each kind can be the cause of. Kinds that are not here are signs of something else.
CATEGORIES: Final[dict[str, Category]] = {
    "data_nonfinite": "data",
    "data_scale": "data",
    "fp16_overflow": "dtype",
    "fp16_underflow": "dtype",
    "amp_backoff": "dtype",
    "update_ratio_high": "optimizer",
    "update_ratio_low": "optimizer",
    "overclipped": "optimizer",
    "clip_starvation": "optimizer",
    "exploding_gradient": "architecture",
    "vanishing_gradient": "architecture",
    "saturated_activation": "architecture",
    "dead_relu": "architecture",
    "zero_gradient": "architecture",
}

# Kinds that rest on rows, which are taken at a cadence of up to 50 steps: they may show that much later than
# what they cause. What rests on every step's numbers may not show later at all.
SLOW: Final = frozenset({
    "update_ratio_high", "saturated_activation", "dead_relu", "zero_gradient", "vanishing_gradient",
    "amp_backoff",
})  # fmt: skip
CADENCE: Final = 50

# After a NaN every ReLU is dead, every gradient gone, and every weight "grows": nothing of it is news.
EMPTY_AFTER_NAN: Final = frozenset({
    "dead_relu", "saturated_activation", "zero_gradient", "update_ratio_low", "weights_growing",
    "vanishing_gradient", "fp16_underflow", "unused_parameter", "overclipped", "clip_starvation",
    "norms_above_one",
})  # fmt: skip

# Where no gradient arrives updates are small whatever the learning rate.
BLOCKING: Final = frozenset(
    {"vanishing_gradient", "zero_gradient", "dead_relu", "saturated_activation", "overclipped"}
)

# A learning rate that rises threefold from one step to the next explains an update that spikes there.
LR_JUMP: Final = 3.0

# An explosion that is three steps old has made the overflow that then comes.
EARLIER: Final = 3

# A loss that was never a tenth lower than at first has only ever gone up.
NEVER_FELL: Final = 0.9

# There at the start: before updates could have made it so.
AT_START: Final = 0.9


@np.errstate(all="ignore")
def diagnose(record: Record) -> Diagnosis:
    """One root cause of what is wrong with a run, or honestly none, with its consequences and advice.

    Causes are ranked: data, then dtype, then what the architecture does at the first step before any update,
    then optimizer and learning rate, then what the architecture does later, which large updates may have done
    to it. A cause must not begin later than the trouble it explains. If only signs are left, none of which
    explains the others, there is no single cause.

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
    found = [finding for finding in detect(view) if not _is_empty(view, finding)]
    alarms = [finding for finding in found if finding.is_alarm]
    infos = [finding for finding in found if not finding.is_alarm]
    if not alarms:
        return Diagnosis(others=infos)
    cause, category = _cause(view, alarms)
    rest = [finding for finding in alarms if finding is not cause]
    if cause is None:
        consequences, others = rest, infos
    else:
        earliest = cause.step - (CADENCE if cause.kind in SLOW else 0)
        consequences = [f for f in rest if f.step >= earliest and CATEGORIES.get(f.kind) != "data"]
        others = [f for f in rest if f not in consequences] + infos
    return Diagnosis(
        cause,
        category,
        consequences,
        others,
        _began(view, cause, alarms),
        advise(view, cause, [*alarms, *infos]),
    )


def _is_empty(view: View, finding: Finding) -> bool:
    """Whether the finding says only that the loss was NaN or Inf by then, and stayed so."""
    lost = health(view).nonfinite
    _, losses = view.scalar("loss")
    is_lost = lost is not None and finding.step >= lost and not math.isfinite(losses[-1])
    return is_lost and finding.kind in EMPTY_AFTER_NAN


def _cause(view: View, alarms: list[Finding]) -> tuple[Finding | None, Category | None]:
    signs = [f.step for f in alarms if f.kind not in CATEGORIES or _is_training(f)]
    onset = min(signs, default=math.inf)
    candidates: list[tuple[float, int, Finding, Category]] = []
    explosions = [f.step for f in alarms if _is_training(f)]
    is_blocked = any(f.kind in BLOCKING for f in alarms)
    for finding in alarms:
        category = _category(finding)
        if category is None:
            continue
        if finding.step > onset + (CADENCE if finding.kind in SLOW or _is_training(finding) else 0):
            continue
        if finding.kind == "update_ratio_low" and is_blocked:
            continue
        if category == "dtype" and any(step <= finding.step - EARLIER for step in explosions):
            continue
        candidates.append((_rank(view, finding, category), finding.step, finding, category))
    if candidates:
        _, _, cause, category = min(candidates, key=lambda entry: entry[:2])
        return cause, category
    return _sign_as_cause(view, alarms)


def _category(finding: Finding) -> Category | None:
    if _is_training(finding):
        return "optimizer"  # sound at first, it grew under the updates
    if finding.kind == "update_spike":
        ratio = finding.evidence["lr_ratio"]
        return "optimizer" if isinstance(ratio, float) and ratio >= LR_JUMP else None
    return CATEGORIES.get(finding.kind)


def _rank(view: View, finding: Finding, category: Category) -> float:
    if category == "data":
        return 0
    if category == "dtype":
        return 1
    if category == "architecture":
        return 2 if _is_at_start(view, finding) else 5
    # Clipping that starves the update, a jump of the rate, then the size of the updates.
    return {"overclipped": 3.0, "clip_starvation": 3.0, "update_spike": 3.1, "exploding_gradient": 4}.get(
        finding.kind, 3.5
    )


def _is_at_start(view: View, finding: Finding) -> bool:
    steps = view.steps
    first = int(steps[0]) if len(steps) else 0
    if finding.step > first:
        return False
    at_start = finding.evidence.get("at_start", 1.0)
    return isinstance(at_start, str) or at_start >= AT_START


def _is_training(finding: Finding) -> bool:
    return finding.kind == "exploding_gradient" and finding.evidence.get("axis") in ("training", "scale")


def _sign_as_cause(view: View, alarms: list[Finding]) -> tuple[Finding | None, Category | None]:
    """Signs that speak for themselves where nothing else was found."""
    for finding in alarms:
        # Small steps that make the loss worse from the first one on go the wrong way.
        state, early = health(view), finite(view.total_update_ratios[1])[:10]
        is_small = not len(early) or median(early) < MOVING_UPDATE
        never_fell = state.best >= NEVER_FELL * state.start > 0
        if finding.kind == "loss_diverging" and (state.unbounded or (never_fell and is_small)):
            return finding, "optimizer"
    growing = [finding for finding in alarms if finding.kind == "weights_growing"]
    if growing and len({finding.kind for finding in alarms}) == 1:
        return growing[0], "optimizer"
    return None, None


def _began(view: View, cause: Finding | None, alarms: list[Finding]) -> dict[str, int | str | None]:
    first = cause or min(alarms, key=lambda finding: finding.step)
    began: dict[str, int | str | None] = {"step": first.step, "layer": None, "parameter": None, "unit": None}
    named = [
        first,
        *(f for f in alarms if f.kind in ("exploding_gradient", "grad_nonfinite", "weights_nonfinite")),
    ]
    modules = {module.name for module in view.modules}
    for finding in named:
        for name in finding.names[:1]:
            if name in view.parameters and began["parameter"] is None:
                began["parameter"] = name
                began["layer"] = began["layer"] or view.parameters[name].module
            elif name in modules and began["layer"] is None:
                began["layer"] = name
    for event in view.events:
        if event["kind"] == "first_nonfinite" and cause is None:
            began["step"] = min(int(event["step"]), first.step)
    return began
