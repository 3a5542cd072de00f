"""Sudden jumps: of the gradients, the loss and the updates, each against its own past."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from gradkern.diagnosis import series
from gradkern.diagnosis.findings import Finding
from gradkern.diagnosis.health import health
from gradkern.diagnosis.view import View
from gradkern.diagnosis.words import number
from gradkern.record.schema import Record

# Against up to 128 steps before, at least 20. z = 8 in log10: healthy runs of language models reach 4.5.
# Heavy tails of small batches widen the spread themselves.
WINDOW: Final = 128
LEAST: Final = 20
SPIKE_Z: Final = 8.0

# And a visible multiple: a clip or a moment estimate absorbs a few times the usual. Losses move less.
GRADIENT_RATIO: Final = 10.0
UPDATE_RATIO: Final = 10.0
LOSS_RATIO: Final = 3.0

# Harm: of the ten losses afterwards the median is four standard deviations above those before, and a quarter
# of what had been learned is undone. One bad batch whose step did no harm is none of the user's business.
AFTER: Final = 10
# Before it, fewer than for the spike itself: over 128 steps the loss of a run that learns has come down far.
BEFORE: Final = 32
HARM_Z: Final = 4.0
UNDONE: Final = 0.25

# Clipped to a tenth or less, a spike has not reached the weights.
CAUGHT: Final = 0.1


def gradient_spike(record: Record) -> list[Finding]:
    """The gradient norm jumps to 10 times its recent median and 8 robust standard deviations of its log.

    Information, a warning if the loss was harmed for ten steps and the spike was not clipped.
    """
    return _spikes(View.of(record), "gradient_spike", "grad_finite_norm", GRADIENT_RATIO, "gradient norm")


def loss_spike(record: Record) -> list[Finding]:
    """The loss jumps to 3 times its recent median and 8 robust standard deviations of its log, and stays up.

    Information if it comes down within ten steps.
    """
    return _spikes(View.of(record), "loss_spike", "loss", LOSS_RATIO, "loss")


def update_spike(record: Record) -> list[Finding]:
    """The update of all weights jumps to 10 times its recent median; in large runs that precedes the loss.

    Information, a warning if the loss was harmed for ten steps.
    """
    return _spikes(View.of(record), "update_spike", "update_norm", UPDATE_RATIO, "update norm")


def harm(view: View, step: int) -> float:
    """How far the losses of the ten steps after `step` are above those before, in standard deviations.

    0 where less than a quarter of what had been learned is undone; Inf if the loss was NaN or Inf there.
    """
    steps, losses = view.scalar("loss")
    at = int(np.searchsorted(steps, step))
    before, after = losses[max(0, at - BEFORE) : at], losses[at + 1 : at + 1 + AFTER]
    if len(series.finite(before)) < 5 or len(after) < 3:
        return 0.0
    if not np.isfinite(after).any() or not np.isfinite(np.median(after)):
        return math.inf
    usual, reached = series.median(before), series.median(after)
    state = health(view)
    if reached - usual < UNDONE * max(state.start - usual, 0.0) or reached <= usual:
        return 0.0
    if min(usual, reached) > 0:
        return series.robust_z(math.log10(reached), series.log10(before))
    return series.robust_z(reached, before, least_spread=1e-12)


def _spikes(view: View, kind: str, name: str, ratio: float, what: str) -> list[Finding]:
    steps, values = view.scalar(name)
    if kind == "loss_spike" and series.smallest(values) <= 0:
        return []  # a loss below 0 has no logarithm and no multiple
    found = series.spikes(values, window=WINDOW, least=LEAST, z=SPIKE_Z, ratio=ratio)
    if not found:
        return []
    coef_steps, coefs = view.scalar("clip_coef")
    skip_steps, skips = view.scalar("skipped")
    harmful = []
    for position, _, _ in found[:200]:
        step = int(steps[position])
        is_caught = (
            series.at(coef_steps, coefs, [step])[0] <= CAUGHT or series.at(skip_steps, skips, [step])[0] > 0
        )
        if not is_caught and harm(view, step) >= HARM_Z:
            harmful.append((position, _, _))
    chosen = [spike for spike in found if any(spike[0] == bad[0] for bad in harmful)] or found
    position, score, times = max(chosen, key=lambda spike: spike[1]) if not harmful else chosen[0]
    step = int(steps[position])
    names = _risen(view, step) if kind == "gradient_spike" else ()
    _, lrs = view.scalar("lr")
    lr_steps, _ = view.scalar("lr")
    before, now = series.at(lr_steps, lrs, [step - 1, step])
    lr_ratio = float(now / before) if before > 0 else math.nan
    more = f", the largest of {len(found)} jumps" if len(found) > 1 and not harmful else ""
    where = f", most in {names[0]!r}" if names else ""
    hurt = "; the loss was still up ten steps later" if harmful else ""
    return [
        Finding(
            kind,
            "warning" if harmful else "info",
            step,
            names,
            float(values[position]),
            float(values[position]) / times * ratio,
            {
                "z": score,
                "ratio": times,
                "spikes": float(len(found)),
                "harmful": float(len(harmful)),
                "lr_ratio": lr_ratio,
            },
            f"The {what} jumped to {number(values[position])}, {number(times)} times the usual, "
            f"at step {step}{where}{more}{hurt}.",
        )
    ]


def _risen(view: View, step: int) -> tuple[str, ...]:
    """Parameters whose gradients rose most at `step` against their median over the 32 rows before."""
    steps, rows = view.rows("grad_norm")
    at = int(np.searchsorted(steps, step))
    if at >= len(steps) or steps[at] != step or at < 3:
        return ()
    usual = series.row_medians(rows[max(0, at - 32) : at])
    with np.errstate(divide="ignore", invalid="ignore"):
        rise = np.nan_to_num(rows[at] / np.maximum(usual, series.TINY), nan=0.0)
    names = view.names("grad_norm")
    return tuple(names[i] for i in np.argsort(-rise)[:3] if rise[i] > 3)
