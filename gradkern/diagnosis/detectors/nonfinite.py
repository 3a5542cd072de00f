"""NaN and Inf: in the loss, the gradients, the weights, the data; and those that a GradScaler makes."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from gradkern.diagnosis.findings import Finding, Severity
from gradkern.diagnosis.view import View
from gradkern.diagnosis.words import count, listed, number
from gradkern.record.schema import Record

# A GradScaler doubles its scale every 2000 good steps and halves it on a bad one: at rest it skips about one
# step in 2000, and a dozen at the start while it comes down from 65536. One in ten is neither.
BACKOFF_SHARE: Final = 0.1
BACKOFF_LEAST: Final = 20

# At this scale halving has helped nothing: the gradients overflow without any scale at all.
LEAST_SCALE: Final = 1.0


def loss_nonfinite(record: Record) -> list[Finding]:
    """The loss is NaN or Inf. There is no threshold: no step can be made towards it.

    An error; a warning if it was so at no more than three steps and the run went on.
    """
    view = View.of(record)
    steps, losses = view.scalar("loss")
    bad = np.flatnonzero(~np.isfinite(losses))
    if not len(bad):
        return []
    first = int(bad[0])
    step, value = int(steps[first]), float(losses[first])
    before = f"; it was {number(losses[first - 1])} before" if first else " already"
    came_back = len(bad) <= 3 and bool(np.isfinite(losses[-1])) and len(losses) - int(bad[-1]) > 3
    severity: Severity = "warning" if came_back else "error"
    return [
        Finding(
            "loss_nonfinite",
            severity,
            step,
            (),
            value,
            math.inf,
            {"steps": float(len(bad)), "before": float(losses[first - 1]) if first else math.nan},
            f"The loss became {number(value)} at step {step}{before}.",
        )
    ]


def grad_nonfinite(record: Record) -> list[Finding]:
    """A gradient holds NaN or Inf at a step that no GradScaler took back.

    An error if the optimizer took the step, a warning if it was skipped. The parameter named first is the
    last in forward order that is affected: backward, what is above it was still sound.
    """
    view = View.of(record)
    steps, counts = view.scalar("nonfinite_count")
    if not len(steps):
        steps, norms = view.scalar("grad_norm")
        counts = (~np.isfinite(norms)).astype(np.float64)
    bad = [int(step) for step in steps[counts > 0] if int(step) not in _scaled_back(view)]
    if not bad:
        return []
    step = bad[0]
    amount = float(counts[steps == step][0])
    names, where = _affected(view, "grad", step)
    skipped_steps, skipped = view.scalar("skipped")
    is_skipped = set(skipped_steps[skipped > 0].tolist()) >= set(bad)
    elements = f"{count(amount, 'element')} of the gradients" if amount >= 1 else "The gradients"
    first = f", first in {names[0]!r}" if names else ""
    tail = "; the step was skipped" if is_skipped else ""
    return [
        Finding(
            "grad_nonfinite",
            "warning" if is_skipped else "error",
            step,
            names,
            amount,
            0.0,
            {"steps": float(len(bad)), "parameters": float(where)},
            f"{elements} became NaN or Inf at step {step}{first}{tail}.",
        )
    ]


def weights_nonfinite(record: Record) -> list[Finding]:
    """A weight holds NaN or Inf: every later loss does too. Names the first tensors in which it was seen."""
    view = View.of(record)
    found = []
    for kind in ("weight_nan", "weight_inf"):
        steps, rows = view.rows(kind)
        if len(steps) and (rows > 0).any():
            found.append(int(steps[np.flatnonzero((rows > 0).any(axis=1))[0]]))
    if not found:
        return []
    step = min(found)
    names, where = _affected(view, "weight", step)
    return [
        Finding(
            "weights_nonfinite",
            "error",
            step,
            names,
            float(where),
            0.0,
            {"parameters": float(where)},
            f"Weights were NaN or Inf at step {step}: {listed(names)}.",
        )
    ]


def data_nonfinite(record: Record) -> list[Finding]:
    """A batch, inputs or targets, holds NaN or Inf, and nothing that is computed from it is sound.

    An error; information while loss and gradients of those steps are finite: a mask of -Inf, or NaN for a
    target that is missing, is taken out before it does harm.
    """
    view = View.of(record)
    steps, counts = view.scalar("data_nonfinite")
    bad = np.flatnonzero(counts > 0)
    if not len(bad):
        return []
    hurt = [place for place in bad.tolist() if _is_lost(view, int(steps[place]))]
    first = hurt[0] if hurt else int(bad[0])
    step, amount = int(steps[first]), float(counts[first])
    often = f", and in {count(len(bad) - 1, 'later batch', 'later batches')}" if len(bad) > 1 else ""
    return [
        Finding(
            "data_nonfinite",
            "error" if hurt else "info",
            step,
            (),
            amount,
            0.0,
            {"batches": float(len(bad))},
            f"The batch of step {step} holds {count(amount, 'element')} that "
            f"{'is' if amount == 1 else 'are'} NaN or Inf{often}{'' if hurt else '; the loss took no harm'}.",
        )
    ]


def _is_lost(view: View, step: int) -> bool:
    """Whether the loss or a gradient is NaN or Inf at a step, or neither was recorded."""
    found = []
    for name in ("loss", "grad_norm", "nonfinite_count"):
        steps, values = view.scalar(name)
        here = values[steps == step]
        found += (here > 0 if name == "nonfinite_count" else ~np.isfinite(here)).tolist()
    return any(found) or not found


def amp_backoff(record: Record) -> list[Finding]:
    """A GradScaler skipped steps and lowered its scale, which is how it finds the right one: information.

    A warning once more than one step in ten is lost, of 20 or more, or the scale has fallen to 1.
    """
    view = View.of(record)
    lost = sorted(_scaled_back(view))
    if not lost:
        return []
    total = max(len(view.steps), 1)
    share = len(lost) / total
    _, scales = view.scalar("loss_scale")
    scale = float(scales[-1]) if len(scales) else math.nan
    many = share > BACKOFF_SHARE and len(lost) >= BACKOFF_LEAST
    is_used_up = scale <= LEAST_SCALE and len(lost) >= 5
    tail = (
        f" The scale is down to {number(scale)}: the gradients overflow without it too."
        if is_used_up
        else ""
        if many
        else " This is how it finds its scale."
    )
    return [
        Finding(
            "amp_backoff",
            "warning" if many or is_used_up else "info",
            lost[0],
            (),
            float(len(lost)),
            BACKOFF_SHARE * total,
            {"share": share, "loss_scale": scale},
            f"The GradScaler skipped {count(len(lost), 'step')} of {total} (first {lost[0]}), "
            f"whose scaled gradients overflowed.{tail}",
        )
    ]


def _scaled_back(view: View) -> set[int]:
    """Steps that a GradScaler skipped because of its scale: not those whose loss itself was NaN or Inf."""

    def find() -> set[int]:
        steps, losses = view.scalar("loss")
        lost = set(steps[~np.isfinite(losses)].tolist())
        return {event["step"] for event in view.events if event["kind"] == "amp_backoff"} - lost

    return view.kept("scaled_back", find)


def _affected(view: View, what: str, step: int) -> tuple[tuple[str, ...], int]:
    """Parameters with NaN or Inf at `step`: five names, the last in forward order first; and how many."""
    bad: dict[str, float] = {}
    for kind in (f"{what}_nan", f"{what}_inf"):
        steps, rows = view.rows(kind)
        at = np.flatnonzero(steps == step)
        if len(at):
            bad.update((view.names(kind)[i], 1.0) for i in np.flatnonzero(rows[at[0]] > 0))
    order = {module.name: module.order for module in view.modules}
    places = {name: place for place, name in enumerate(view.parameters)}
    forward = sorted(
        bad,
        key=lambda name: (order.get(view.parameters[name].module, -1), places.get(name, -1)),
        reverse=True,
    )
    return tuple(forward[:5]), len(bad)
