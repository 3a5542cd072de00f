"""Units that do nothing: dead, saturated, without gradient, or not used at all."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from gradkern.diagnosis import series
from gradkern.diagnosis.findings import Finding, Severity
from gradkern.diagnosis.health import health
from gradkern.diagnosis.view import View
from gradkern.diagnosis.words import count, listed, percent
from gradkern.record.schema import Record, Rows, Steps

# Sparse activations are the point of ReLU, and a small batch leaves many units at zero by chance. Nine in ten
# over the last half of the run is an alarm if the loss is bad too; all of them, always, is one by itself: no
# gradient passes.
DEAD: Final = 0.9
DEAD_ALONE: Final = 1.0
LEAST_ROWS: Final = 2

# Nine outputs in ten in the flat part of tanh or sigmoid: what passes back is below a tenth. The last layer
# of a network that has converged is saturated rightly and is left out.
SATURATED: Final = 0.9

# At the first step, before anything was learned, 95 % is an initialisation or a scale of the inputs that is
# wrong; if it stays so it is an alarm whatever the loss does.
SATURATED_ALONE: Final = 0.95

# Of random weights no two units have gradients that agree to one in a thousand, let alone eight.
SYMMETRIC: Final = 1e-3
SYMMETRIC_LEAST: Final = 8

# A gradient that is exactly zero on each of 50 steps: not sparsity, which varies with the batch.
ZERO_STEPS: Final = 50

# A loss that is a hundredth of the first one has gradients of zero where hinges and differences are.
DONE: Final = 0.01

# So many steps without any gradient are no accident.
NO_GRADIENT_STEPS: Final = 10


def dead_relu(record: Record) -> list[Finding]:
    """Units of a module give zero for the whole batch, so that nothing reaches their weights.

    Nine in ten of a module, median of the last half of the measurements: information, a warning if the loss
    is bad. All units at every measurement of that half: a warning, an error if the loss is bad.
    """
    view = View.of(record)
    steps, rows = view.rows("act_dead")
    if len(steps) < LEAST_ROWS:
        return []
    recent = rows[len(rows) // 2 :].astype(np.float64)
    medians = series.row_medians(recent)
    bad = [int(i) for i in np.argsort(-np.nan_to_num(medians, nan=-1.0)) if medians[i] >= DEAD]
    if not bad:
        return []
    names = view.names("act_dead")
    worst = bad[0]
    all_dead = series.smallest(recent[:, worst]) >= DEAD_ALONE
    is_bad = health(view).is_bad
    severity: Severity = ("error" if is_bad else "warning") if all_dead else ("warning" if is_bad else "info")
    bad.sort(key=lambda column: _order(view, names[column]))
    if all_dead:
        bad = [column for column in bad if series.smallest(recent[:, column]) >= DEAD_ALONE]
    column = bad[0]
    onset = int(steps[np.flatnonzero(rows[:, column] >= DEAD)[0]])
    share = float(medians[column])
    return [
        Finding(
            "dead_relu",
            severity,
            onset,
            tuple(names[i] for i in bad[:5]),
            share,
            DEAD_ALONE if all_dead else DEAD,
            {"modules": float(len(bad)), "at_start": float(rows[0, column])},
            f"{percent(share)} of the units of {names[column]!r} have been zero for whole batches since step "
            f"{onset}{_more(len(bad) - 1)}.",
        )
    ]


def saturated_activation(record: Record) -> list[Finding]:
    """Nine tenths of a hidden module's outputs are in the flat part of tanh or sigmoid.

    Median of the measurements. Information, a warning if the loss is bad or half of it is left after 100
    steps, or 95 % from the first step on.
    """
    view = View.of(record)
    steps, rows = view.rows("act_saturated")
    if len(steps) < LEAST_ROWS:
        return []
    names = view.names("act_saturated")
    last = view.modules[-1].name if view.modules else ""
    medians = series.row_medians(rows)
    bad = [i for i in range(len(names)) if medians[i] >= SATURATED and names[i] != last]
    if not bad:
        return []
    bad.sort(key=lambda column: _order(view, names[column]))
    column = bad[0]
    onset = int(steps[np.flatnonzero(rows[:, column] >= SATURATED)[0]])
    is_blocked = view.has_start and min(float(rows[0, column]), float(medians[column])) >= SATURATED_ALONE
    return [
        Finding(
            "saturated_activation",
            "warning" if health(view).is_bad or health(view).is_slow or is_blocked else "info",
            onset,
            tuple(names[i] for i in bad[:5]),
            float(medians[column]),
            SATURATED,
            {"modules": float(len(bad)), "at_start": float(rows[0, column])},
            f"{percent(float(medians[column]))} of the outputs of {names[column]!r} have been in the flat "
            f"part of the activation function since step {onset}.",
        )
    ]


def zero_gradient(record: Record) -> list[Finding]:
    """Every element of a weight's gradient is exactly zero on each of 50 steps or more.

    A warning; information in a run with a hundredth of its first loss, which has learned what there is.
    Embeddings are left out, and so are weights that have no gradient (`unused_parameter`).
    """
    view = View.of(record)
    steps, rows = view.rows("grad_norm")
    if len(steps) < ZERO_STEPS:
        return []
    names = view.names("grad_norm")
    rows = _sound(view, steps, rows)
    zero = np.nan_to_num(rows, nan=1.0)[-ZERO_STEPS:] == 0
    bad = [
        i for i in view.matrices("grad_norm") if zero[:, i].all() and view.parameters[names[i]].requires_grad
    ]
    if not bad:
        return []
    column = bad[0]
    moving = np.flatnonzero(np.nan_to_num(rows[:, column], nan=1.0) != 0)
    onset = int(steps[moving[-1] + 1]) if len(moving) else int(steps[0])
    found = tuple(names[i] for i in bad)
    everything = len(bad) == len(view.matrices("grad_norm"))
    state = health(view)
    is_done = 0 <= state.last <= DONE * state.start
    return [
        Finding(
            "zero_gradient",
            "info" if is_done else "warning",
            onset,
            found[:5],
            float(len(bad)),
            0.0,
            {"parameters": float(len(bad)), "all": "yes" if everything else "no"},
            f"The gradient of {listed(found)} has been exactly zero since step {onset}.",
        )
    ]


def symmetric_units(record: Record) -> list[Finding]:
    """All units of a hidden module get the same gradient, and go on to: they were initialised alike.

    The largest unit's norm times the root of their number is the norm of all, to one in a thousand, at the
    first measurement and the last, for 8 units or more. A warning if half of the first loss is left; units
    of which only the mean is used get the same gradient too.
    """
    view = View.of(record)
    steps, norms = view.rows("out_grad_norm")
    _, largest = view.rows("out_grad_unit_max")
    names = view.names("out_grad_norm")
    if len(steps) < LEAST_ROWS or largest.shape != norms.shape or not health(view).is_slow:
        return []
    widths = {p.module: p.rows for p in view.parameters.values() if p.role == "weight" and p.ndim > 1}
    last = max((m.order for m in view.modules if m.name in widths), default=-1)
    alike = []
    for column, name in enumerate(names):
        width = widths.get(name, 0)
        ends = norms[[0, -1], column].astype(np.float64)
        if width < SYMMETRIC_LEAST or _order(view, name) >= last or not (ends > 0).all():
            continue
        spread = largest[[0, -1], column] * math.sqrt(width) / ends
        if (np.abs(spread - 1) <= SYMMETRIC).all():
            alike.append(name)
    if not alike:
        return []
    alike.sort(key=lambda name: _order(view, name))
    return [
        Finding(
            "symmetric_units",
            "warning",
            int(steps[0]),
            tuple(alike[:5]),
            float(len(alike)),
            0.0,
            {"modules": float(len(alike))},
            f"All {widths[alike[0]]} units of {alike[0]!r} get the same gradient{_more(len(alike) - 1)}: "
            "they began alike and stay so.",
        )
    ]


def unused_parameter(record: Record) -> list[Finding]:
    """A parameter that asks for a gradient never got one. Information: a backbone may be used without it.

    An error if for 10 steps no parameter at all had one that is not zero when the optimizer stepped.
    """
    view = View.of(record)
    steps, rows = view.rows("grad_norm")
    if len(steps) < 2:
        return []
    names = view.names("grad_norm")
    if len(steps) >= NO_GRADIENT_STEPS and names and not np.nan_to_num(rows).any():
        return _nothing(view, steps, rows)
    known = {name for column, name in enumerate(names) if not np.isnan(rows[:, column]).all()}
    unused = tuple(
        name for name, p in view.parameters.items() if p.requires_grad and name not in known and p.numel > 0
    )
    if not unused or not known:
        return []
    return [
        Finding(
            "unused_parameter",
            "info",
            int(steps[0]),
            unused[:5],
            float(len(unused)),
            0.0,
            {"parameters": float(len(unused))},
            f"{count(len(unused), 'parameter')} never got a gradient: {listed(unused)}.",
        )
    ]


def _nothing(view: View, steps: Steps, rows: Rows) -> list[Finding]:
    """No gradient anywhere, if the loss says that there should be one."""
    _, counts = view.scalar("nonfinite_count")
    _, losses = view.scalar("loss")
    if (counts > 0).any() or not np.isfinite(losses).all() or (len(losses) and losses[-1] == 0):
        return []
    return [
        Finding(
            "unused_parameter",
            "error",
            int(steps[0]),
            (),
            float(len(rows[0])),
            0.0,
            {"parameters": float(len(rows[0]))},
            f"No parameter had a gradient in {len(steps)} steps when the optimizer stepped.",
        )
    ]


def _sound(view: View, steps: Steps, norms: Rows) -> Rows:
    """`norms` without those of gradients that hold NaN or Inf, whose finite part may well be 0."""
    result: Rows = norms.copy()
    for kind in ("grad_nan", "grad_inf"):
        count_steps, counts = view.rows(kind)
        if view.names(kind) != view.names("grad_norm") or not len(count_steps):
            continue
        _, here, there = np.intersect1d(steps, count_steps, return_indices=True)
        bad = np.zeros(result.shape, bool)
        bad[here] = counts[there] > 0
        result[bad] = math.nan
    return result


def _order(view: View, name: str) -> float:
    orders = view.kept("orders", lambda: {module.name: module.order for module in view.modules})
    return orders.get(name, math.inf)


def _more(others: int) -> str:
    return f", and so in {count(others, 'other module')}" if others else ""
