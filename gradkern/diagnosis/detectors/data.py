"""Data on a scale that a network does not start from, and single batches that are off it."""

from __future__ import annotations

from typing import Final

import numpy as np

from gradkern.diagnosis import series
from gradkern.diagnosis.detectors.spikes import HARM_Z, LEAST, SPIKE_Z, WINDOW, harm
from gradkern.diagnosis.detectors.units import dead_relu, zero_gradient
from gradkern.diagnosis.findings import Finding
from gradkern.diagnosis.health import health
from gradkern.diagnosis.view import View
from gradkern.diagnosis.words import number
from gradkern.record.schema import Record

# Initialisations assume inputs of standard deviation 1. At 10 the first layer's gradients are 10 times and
# the curvature 100 times what they should be. Images from 0 to 255 have about 60.
INPUT_STD: Final = 10.0
INPUT_PEAK: Final = 100.0
# At a thousand, with a first layer that passes a tenth of it on, nothing behind it is as it was meant to be.
INPUT_STD_HUGE: Final = 1e3
PASSED_ON: Final = 0.1
# At a hundredth the network sees its biases only, and gradients of its first layer are as small.
INPUT_STD_TINY: Final = 0.01

# Targets of a regression: a squared error of 100 x 100 has gradients 100 times the usual. Class numbers and
# tokens are larger but their loss is not: it must be a tenth of the target at least.
TARGET_PEAK: Final = 100.0
TARGET_LOSS: Final = 0.1

# Outputs that have come to a hundredth of the targets after 100 steps are on their way.
UNDERWAY: Final = 100
OUT_OF_REACH: Final = 0.01

# Batches whose largest values differ by a factor of 100, and losses by ten, one in ten against another: some
# of the data are in another unit, or fill values. Heavy tails make a factor of ten.
TWO_UNITS: Final = 100.0
TWO_LOSSES: Final = 10.0

# One batch against those before: ten times their largest value.
BATCH_RATIO: Final = 10.0

# Hidden units that are saturated or dead at the very first step, because of what comes in.
BLOCKED: Final = 0.9


def data_scale(record: Record) -> list[Finding]:
    """Inputs or targets far from unit scale, or one batch ten times larger than all before it.

    Inputs with a standard deviation of 10 or a largest value of 100, regression targets of 100: information,
    for a normalising first layer makes up for it; a warning if the loss is bad, the first hidden layer is
    saturated or dead at the first step, or a layer is cut off altogether later; if inputs have a standard
    deviation of 1000 and the first layer passes it on; or if half of the first loss is left after 100 steps
    and targets are 100 times the outputs. Inputs with a standard deviation of 0.01: a warning if the loss is
    flat. Batches that differ by a factor of 100, one in ten against another: a warning if losses do by ten.
    A single batch: information, a warning if the loss was harmed.
    """
    view = View.of(record)
    return [*_scale(view), *(_mixed(view) or _batch(view))]


def _scale(view: View) -> list[Finding]:
    steps, _ = view.scalar("data_abs_max")
    if not len(steps):
        steps, _ = view.scalar("target_abs_max")
    if not len(steps):
        return []
    state = health(view)
    peak = series.median(view.scalar("data_abs_max")[1][:50])
    std = series.median(view.scalar("data_std")[1][:50])
    target = series.median(view.scalar("target_abs_max")[1][:50])
    _, losses = view.scalar("loss")
    first_loss = series.median(losses[:5])
    tokens = any(p.role == "embedding" for p in view.parameters.values())
    inputs = not tokens and (std >= INPUT_STD or peak >= INPUT_PEAK)
    targets = target >= TARGET_PEAK and first_loss >= TARGET_LOSS * target
    if not tokens and not targets and 0 < std <= INPUT_STD_TINY and state.flat:
        return [_too_small(int(steps[0]), std, peak)]
    if not inputs and not targets:
        return []
    is_alarm = state.is_bad or (targets and state.is_slow and _is_out_of_reach(view, target))
    if inputs and not is_alarm:
        is_alarm = (
            (std >= INPUT_STD_HUGE and _passes_on(view, peak)) or _is_blocked(view) or _is_cut_off(view)
        )
    parts = []
    if inputs:
        parts.append(f"Inputs reach {number(peak)} (standard deviation {number(std)})")
    if targets:
        parts.append(f"{'t' if inputs else 'T'}argets reach {number(target)}")
    return [
        Finding(
            "data_scale",
            "warning" if is_alarm else "info",
            int(steps[0]),
            (),
            max(std / INPUT_STD if inputs else 0.0, target / TARGET_PEAK if targets else 0.0),
            1.0,
            {
                "data_abs_max": peak,
                "data_std": std,
                "target_abs_max": target,
                "what": "both" if inputs and targets else "inputs" if inputs else "targets",
            },
            f"{' and '.join(parts)}; networks start from values around 1.",
        )
    ]


def _too_small(step: int, std: float, peak: float) -> Finding:
    return Finding(
        "data_scale",
        "warning",
        step,
        (),
        std,
        INPUT_STD_TINY,
        {"data_abs_max": peak, "data_std": std, "what": "inputs"},
        f"Inputs have a standard deviation of {number(std)}; networks start from values around 1, and the "
        "loss does not come down.",
    )


def _is_out_of_reach(view: View, target: float) -> bool:
    """Whether outputs are nowhere near the targets after some steps."""
    steps, peaks = view.rows("act_abs_max")
    names = view.names("act_abs_max")
    last = view.modules[-1].name if view.modules else ""
    if not len(steps) or last not in names or int(steps[-1]) < UNDERWAY:
        return False
    return bool(peaks[-1, names.index(last)] < OUT_OF_REACH * target)


def _passes_on(view: View, peak: float) -> bool:
    """Whether the first module that has weights gives, at the first step, outputs as large as the inputs."""
    owners = {parameter.module for parameter in view.parameters.values()}
    steps, peaks = view.rows("act_abs_max")
    names = view.names("act_abs_max")
    first = next((module.name for module in view.modules if module.name in owners), None)
    if first not in names or not len(steps):
        return False
    return bool(peaks[0, names.index(first)] >= PASSED_ON * peak)


def _mixed(view: View) -> list[Finding]:
    """Batches of which some are in another unit, on and on."""
    _, losses = view.scalar("loss")
    late = losses[len(losses) // 2 :]
    if len(series.finite(late)) < UNDERWAY // 2 or not series.smallest(late) > 0:
        return []
    low, high = np.quantile(series.finite(late), [0.1, 0.9])
    for name, what in (("data_abs_max", "inputs"), ("target_abs_max", "targets")):
        steps, values = view.scalar(name)
        known = series.finite(values)
        if len(known) < UNDERWAY:
            continue
        small, large = np.quantile(known, [0.1, 0.9])
        if large < TWO_UNITS * small or not small > 0 or high < TWO_LOSSES * low:
            continue
        return [
            Finding(
                "data_scale",
                "warning",
                int(steps[int(np.argmax(values >= large))]),
                (),
                float(large / small),
                TWO_UNITS,
                {"ratio": float(large / small), "what": f"{what} of a batch"},
                f"The {what} of one batch in ten reach {number(float(large))} or more, those of one in ten "
                f"{number(float(small))} or less, and the loss jumps with them.",
            )
        ]
    return []


def _is_blocked(view: View) -> bool:
    for kind in ("act_saturated", "act_dead"):
        _, rows = view.rows(kind)
        names = view.names(kind)
        if not len(rows):
            continue
        measured = [
            m.name for m in view.modules if m.name in names and np.isfinite(rows[0, names.index(m.name)])
        ]
        # The last module is the output, which may be where it should.
        hidden = [name for name in measured if name != view.modules[-1].name]
        if hidden and rows[0, names.index(hidden[0])] >= BLOCKED:
            return True
    return False


def _is_cut_off(view: View) -> bool:
    """Whether no gradient passes any more, which is how large inputs end with ReLU."""
    return any(finding.is_alarm for finding in [*dead_relu(view), *zero_gradient(view)])


def _batch(view: View) -> list[Finding]:
    found: list[Finding] = []
    for name, what in (("data_abs_max", "inputs"), ("target_abs_max", "targets")):
        steps, values = view.scalar(name)
        jumps = series.spikes(values, window=WINDOW, least=LEAST, z=SPIKE_Z, ratio=BATCH_RATIO)
        harmful = [jump for jump in jumps[:200] if harm(view, int(steps[jump[0]])) >= HARM_Z]
        if not jumps:
            continue
        position, score, times = harmful[0] if harmful else jumps[0]
        step = int(steps[position])
        hurt = "; the loss was still up ten steps later" if harmful else ""
        found.append(
            Finding(
                "data_scale",
                "warning" if harmful else "info",
                step,
                (),
                float(values[position]),
                float(values[position]) / times * BATCH_RATIO,
                {"z": score, "ratio": times, "batches": float(len(jumps)), "what": f"{what} of a batch"},
                f"The {what} of the batch of step {step} reach {number(values[position])}, "
                f"{number(times)} times the usual{hurt}.",
            )
        )
    return found
