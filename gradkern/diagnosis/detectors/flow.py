"""How gradients flow: growing or shrinking over training, through depth, through time steps, and in scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from gradkern.diagnosis import series
from gradkern.diagnosis.findings import Finding, Severity
from gradkern.diagnosis.health import chance_level, health
from gradkern.diagnosis.series import Floats
from gradkern.diagnosis.view import View
from gradkern.diagnosis.words import listed, number, percent
from gradkern.record.schema import Record

# Over training: gradients a hundred times the first ones, while the loss is in trouble. Networks that start
# on a plateau grow a hundredfold too, but their loss goes down.
GROWTH: Final = 100.0
# It begins after the last step on which they were within three times the first ones.
QUIET: Final = 3.0
# Whatever the loss does: nothing that learns grows ten-thousandfold without its loss going down.
GROWTH_ALONE: Final = 1e4

# Before any update, a network that keeps its signal gives outputs of the size of its inputs, and residual
# branches that add up ten times that. Gradients on the way back are magnified by the same weights.
FORWARD_GROWTH: Final = 100.0
# At ten thousand the first loss means nothing, whether it comes down or not. Nor does a loss that begins at
# 100 times a guess, or (squared) at 100 times the targets, if outputs have grown too: sums do one of the two.
FORWARD_ALONE: Final = 1e4
FIRST_LOSS: Final = 100.0

# Before any update, gradients of one weight, for its size, against those of another: three decades more, and
# no learning rate suits both.
UNEVEN: Final = 1e3

# In absolute scale: the largest sums over large batches stay far below, and the square of ten times as much
# leaves the range of float32 sums of squares by a factor of 1e18 only.
ABSOLUTE: Final = 1e10

# Depth: fewer layers make no fit. A factor of 1.3 a layer is a layer whose weights are 30 % too large. With
# 1000 from end to end no learning rate suits both ends. A line must explain four fifths of the variance:
# networks with one wide or strided layer make a step, not a line.
DEPTH_LEAST: Final = 4
DEPTH_FACTOR: Final = 1.3
DEPTH_TOTAL: Final = 1e3
DEPTH_R2: Final = 0.8

# torch's default initialisation loses a factor 0.41 a layer (ReLU), 1e-4 over ten layers, and such networks
# still get going with Adam; with a loss that does not move, 1e-3 is enough to say why.
VANISHED: Final = 1e-3
VANISHED_ALONE: Final = 1e-7
# Of all measurements: a network that leaves its plateau behind has no problem any more.
VANISHED_SHARE: Final = 0.8

# Time: 5 % a step is a factor 130 over 100 steps.
TIME_LEAST: Final = 5
TIME_FACTOR: Final = 1.05
TIME_TOTAL: Final = 1e3
TIME_R2: Final = 0.7

# "Consistently above 1.0": on 95 % of the steps.
ABOVE_SHARE: Final = 0.95

# Gradients this small at the start, with float32 weights of ordinary size, do not change them.
ABSENT: Final = 1e-8


class Chain(NamedTuple):
    """Layers of one chain in forward order, and log10 of a norm at each: ``[k, n]`` at `steps` ``[k]``."""

    names: list[str]
    steps: np.ndarray
    logs: Floats


def exploding_gradient(record: Record) -> list[Finding]:
    """Gradients that grow without need: over training, through depth, through time steps, or in scale.

    Over training (an error): 100 times the first ones while the loss diverges, jumps about or is gone, or
    10,000 times without an improvement. Through depth: log of ||dL/doutput|| of the layers of a chain fits
    a line that grows by 1.3 a layer towards the input and by 1000 in all. Through time: the same of
    ||dL/dh_t||, 1.05 a step. The last two are there at the first step, before any update: warnings, errors
    once the loss is in trouble. In scale: a norm of 1e10, an error.

    Where there is no chain to fit, a run in trouble is looked at before its first update: forward, outputs
    100 times the inputs or beyond float32; or uneven, relative gradients of one weight 1000 times those of
    the last one. Outputs of 10,000 times are a warning in any run, and those of 100 times if the first loss
    is as far off.
    """
    view = View.of(record)
    start = [*_over_depth(view), *_over_time(view)] or _forward(view) or _uneven(view)
    found = [*start, *_over_training(view)]
    return found or _in_scale(view)


def vanishing_gradient(record: Record) -> list[Finding]:
    """Gradients that fade towards the input, or the first time step, so that nothing is learned there.

    Through depth: the fit of `exploding_gradient` with a falling line, on 80 % of the measurements; a
    warning below 1e-3 from end to end if the loss is flat, and below 1e-7 whatever it does. Through time:
    information, unless the loss is flat, or half of it is left and 1e-7 arrives. In scale: a joint norm below
    1e-8 all the time, if the loss is flat.
    """
    view = View.of(record)
    return [*_vanishing_depth(view), *_vanishing_time(view), *_absent(view)]


def norms_above_one(record: Record) -> list[Finding]:
    """The article's sign: gradients consistently above 1.0 for each node and layer.

    Every layer's ||dL/dW||, and ||dL/doutput|| where it is recorded, is above 1 on 95 % of the steps. A sum
    over the batch makes that true of healthy runs: information, a warning once the loss is in trouble.
    """
    view = View.of(record)
    steps, rows = view.rows("grad_norm")
    columns = view.matrices("grad_norm")
    if len(steps) < 2 or not columns:
        return []
    norms = rows[:, columns].astype(np.float64)
    shares = _share_above(norms)
    out_steps, out_rows = view.rows("out_grad_norm")
    out_shares = _share_above(out_rows.astype(np.float64)) if len(out_steps) else np.ones(0)
    if not len(shares) or min(*shares, 1.0) < ABOVE_SHARE or min([*out_shares, 1.0]) < ABOVE_SHARE:
        return []
    medians = series.row_medians(norms)
    order = np.argsort(-medians)
    names = tuple(view.names("grad_norm")[columns[i]] for i in order)
    lowest = series.smallest(medians)
    trouble = health(view).trouble
    _, units = view.rows("out_grad_unit_above_one")
    share = series.median(units) if units.size else math.nan
    nodes = f", and so is that of {percent(share)} of the nodes" if share > 0 else ""
    return [
        Finding(
            "norms_above_one",
            "info" if trouble is None else "warning",
            int(steps[0]),
            names[:5],
            lowest,
            1.0,
            {"layers": float(len(columns)), "unit_share": share, "largest": float(medians[order[0]])},
            f"The gradient norm of every layer is above 1 (the smallest {number(lowest)}, "
            f"the largest {number(medians[order[0]])} in {names[0]!r}){nodes}.",
        )
    ]


def _share_above(norms: Floats) -> Floats:
    """The share of the measurements of each column above 1; columns that were never measured are left out."""
    measured = np.isfinite(norms)
    shares: Floats = ((norms > 1) & measured).sum(0)[measured.any(0)] / measured.sum(0)[measured.any(0)]
    return shares


def chain(view: View) -> Chain | None:
    """The longest chain of layers with weights: ||dL/doutput||, or where it is not recorded ||dL/dW||."""
    return view.kept("chain", lambda: _chain(view))


def _chain(view: View) -> Chain | None:
    weighted = {
        p.module for p in view.parameters.values() if p.role in ("weight", "recurrent") and p.ndim != 1
    }
    branches: dict[str, list[str]] = {}
    for module in view.modules:
        is_layer = any(name == module.name or name.startswith(f"{module.name}.") for name in weighted)
        if module.branch is not None and is_layer:
            branches.setdefault(module.branch, []).append(module.name)
    if not branches:
        return None
    layers = max(branches.values(), key=len)
    steps, rows = view.rows("out_grad_norm")
    known = {name: column for column, name in enumerate(view.names("out_grad_norm"))}
    if not len(steps):
        steps, rows = view.rows("grad_norm")
        names = view.names("grad_norm")
        known = {view.parameters[names[c]].module: c for c in view.matrices("grad_norm")}
    layers = [name for name in layers if name in known]
    if len(layers) < DEPTH_LEAST or not len(steps):
        return None
    # A long record is looked at in at most 200 places.
    picked = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 200)).astype(int))
    norms = rows[picked][:, [known[name] for name in layers]].astype(np.float64)
    norms[norms == 0] = math.nan
    return Chain(layers, np.asarray(steps[picked]), series.log10(norms))


def _lines(logs: Floats) -> tuple[Floats, Floats]:
    """Slope and r2 of the line of each row; 0 for rows with fewer than `DEPTH_LEAST` finite values."""
    slopes, _, shares = series.fits(np.arange(logs.shape[1]), logs)
    enough = np.isfinite(logs).sum(axis=1) >= DEPTH_LEAST
    return np.where(enough, slopes, 0.0), np.where(enough, shares, 0.0)


def _over_depth(view: View) -> list[Finding]:
    layers = chain(view)
    if layers is None:
        return []
    slopes, shares = _lines(layers.logs)
    spans = len(layers.names) - 1
    least = max(math.log10(DEPTH_FACTOR), math.log10(DEPTH_TOTAL) / spans)
    holds = (shares >= DEPTH_R2) & (-slopes >= least)
    trouble = health(view).trouble
    if not holds.any() or (holds.mean() < 0.5 and (trouble is None or not holds[0])):
        return []
    first = int(np.flatnonzero(holds)[0])
    slope, share = float(slopes[first]), float(shares[first])
    factor, total = series.power10(-slope), series.power10(-slope * spans)
    return [
        Finding(
            "exploding_gradient",
            "warning" if trouble is None else "error",
            int(layers.steps[first]),
            (layers.names[0],),
            factor,
            DEPTH_FACTOR,
            {"axis": "depth", "factor": factor, "r2": share, "layers": float(spans + 1), "total": total},
            f"From {layers.names[-1]!r} down to {layers.names[0]!r} gradients grow by a factor of "
            f"{number(factor)} a layer, {number(total)} in all, at step {layers.steps[first]}.",
        )
    ]


def _profile(view: View) -> tuple[int, Floats] | None:
    """First step and the log10 of ||dL/dh_t||, the median over the measurements."""
    steps, rows = view.rows("time_grad_norm")
    if not len(steps):
        return None
    norms = rows.astype(np.float64)
    norms[norms == 0] = math.nan
    logs = series.row_medians(series.log10(norms[:8]))
    return (int(steps[0]), logs) if np.isfinite(logs).sum() >= TIME_LEAST else None


def _over_time(view: View) -> list[Finding]:
    profile = _profile(view)
    if profile is None:
        return []
    step, logs = profile
    line = series.fit(np.arange(len(logs)), logs)
    factor, total = series.power10(-line.slope), series.power10(-line.slope * (len(logs) - 1))
    if line.r2 < TIME_R2 or factor < TIME_FACTOR or total < TIME_TOTAL:
        return []
    return [
        Finding(
            "exploding_gradient",
            "warning" if health(view).trouble is None else "error",
            step,
            tuple(p.name for p in view.parameters.values() if p.role == "recurrent")[:5],
            factor,
            TIME_FACTOR,
            {"axis": "time", "factor": factor, "r2": line.r2, "steps": float(len(logs)), "total": total},
            f"Back through {len(logs)} time steps gradients grow by a factor of {number(factor)} a step, "
            f"{number(total)} in all, at step {step}.",
        )
    ]


def _at_first(view: View, kind: str) -> dict[str, float]:
    """The row of `kind` from before any update, by name; empty if there is none."""
    steps, rows = view.rows(kind)
    if not len(steps) or not view.has_start or int(steps[0]) > int(view.steps[0]):
        return {}
    found = zip(view.names(kind), rows[0].astype(np.float64).tolist(), strict=True)
    return {name: value for name, value in found if not math.isnan(value)}


def _forward(view: View) -> list[Finding]:
    trouble = health(view).trouble
    peaks, bad = _at_first(view, "act_abs_max"), _at_first(view, "act_nonfinite")
    order = [module.name for module in view.modules if module.name in peaks]
    inputs = series.largest(view.scalar("data_abs_max")[1][:1])
    data_bad = series.largest(view.scalar("data_nonfinite")[1][:1])
    if not order or data_bad > 0:
        return []
    base = max(inputs if math.isfinite(inputs) else peaks[order[0]], 1.0)
    lost = next((name for name in order if bad.get(name, 0.0) > 0), None)
    worst = max(order, key=lambda name: peaks[name])
    growth = peaks[worst] / base
    if growth < (FORWARD_GROWTH if trouble is not None or _starts_far_off(view) else FORWARD_ALONE):
        return []
    # Up to the first that overflowed: finite outputs behind it say nothing.
    end = f"to NaN and Inf in {lost!r}" if lost else f"to {number(peaks[worst])} in {worst!r}"
    step = int(view.steps[0])
    return [
        Finding(
            "exploding_gradient",
            "warning" if trouble is None else "error",
            step,
            (lost or worst,),
            growth,
            FORWARD_GROWTH,
            {"axis": "forward", "inputs": base, "peak": peaks[worst], "nonfinite": float(lost is not None)},
            f"Before any update outputs grow from {number(base)} {end}, at step {step}: what magnifies them "
            "magnifies gradients on the way back.",
        )
    ]


def _starts_far_off(view: View) -> bool:
    """Whether the first loss is far above what a network that knows nothing has."""
    first = series.largest(view.scalar("loss")[1][:1])
    target = series.largest(view.scalar("target_abs_max")[1][:1])
    if math.isfinite(target):
        return math.sqrt(max(first, 0.0)) >= FIRST_LOSS * max(target, 1.0)
    return first >= FIRST_LOSS * chance_level(view)


def _uneven(view: View) -> list[Finding]:
    if health(view).trouble is None:
        return []
    grads, weights = _at_first(view, "grad_norm"), _at_first(view, "weight_norm")
    order = {module.name: module.order for module in view.modules}
    relative = {
        name: grads[name] / weights[name]
        for name in (view.names("grad_norm")[column] for column in view.matrices("grad_norm"))
        if grads.get(name, 0.0) > 0 and weights.get(name, 0.0) > 0 and view.parameters[name].module in order
    }
    if len(relative) < 2:
        return []
    last = max(relative, key=lambda name: order[view.parameters[name].module])
    worst = max(relative, key=lambda name: relative[name])
    ratio = relative[worst] / relative[last]
    if ratio < UNEVEN:
        return []
    step = int(view.steps[0])
    return [
        Finding(
            "exploding_gradient",
            "error",
            step,
            (worst,),
            ratio,
            UNEVEN,
            {"axis": "uneven", "relative": relative[worst], "last": relative[last]},
            f"Before any update the gradient of {worst!r} is {number(relative[worst])} times the weight, and "
            f"that of {last!r}, the last one, {number(relative[last])}: on the way back it grew "
            f"{number(ratio)} times.",
        )
    ]


def _over_training(view: View) -> list[Finding]:
    steps, norms = view.scalar("grad_finite_norm")
    if not len(steps):
        steps, norms = view.scalar("grad_norm")
    state = health(view)
    if len(steps) < 2 or not view.has_start:
        return []
    base = series.median(norms[: max(1, min(10, len(norms) // 4))])
    if not base > 0:
        return []
    growth = norms / base
    is_lost = state.trouble is not None and not state.unbounded
    level = series.median(growth[-5:])
    is_worse = math.isfinite(state.start) and state.last >= state.start
    # From a quiet step on: what was as large at first, and came down, did not grow.
    large = np.flatnonzero(
        (growth >= GROWTH) & (np.minimum.accumulate(np.nan_to_num(growth, nan=np.inf)) <= QUIET)
    )
    # Before or while the loss shows it: gradients that only grew long after it had gone are no cause.
    if not len(large) or not (is_lost or (level >= GROWTH_ALONE and is_worse)):
        return []
    reached = int(large[0])
    onset = int(np.flatnonzero(growth[:reached] <= QUIET)[-1]) + 1
    peak = series.largest(norms)
    names = _largest(view, int(steps[reached]))
    where = f", most in {names[0]!r}" if names else ""
    return [
        Finding(
            "exploding_gradient",
            "error",
            int(steps[onset]),
            names,
            peak / base,
            GROWTH,
            {"axis": "training", "first": base, "peak": peak, "hundredfold_at": float(steps[reached])},
            f"From step {steps[onset]} on the gradients grew from {number(base)} to {number(peak)}{where}.",
        )
    ]


def _in_scale(view: View) -> list[Finding]:
    steps, norms = view.scalar("grad_finite_norm")
    large = np.flatnonzero(norms >= ABSOLUTE)
    if not len(large):
        return []
    step, norm = int(steps[large[0]]), float(norms[large[0]])
    names = _largest(view, step)
    where = f", most of it in {names[0]!r}" if names else ""
    return [
        Finding(
            "exploding_gradient",
            "error",
            step,
            names,
            norm,
            ABSOLUTE,
            {"axis": "scale"},
            f"The gradient norm is {number(norm)} at step {step}{where}.",
        )
    ]


def _largest(view: View, step: int) -> tuple[str, ...]:
    """Parameters by the norm of their gradient at `step` or just before, up to three."""
    steps, rows = view.rows("grad_norm")
    if not len(steps):
        return ()
    row = np.nan_to_num(rows[max(int(np.searchsorted(steps, step, "right")) - 1, 0)], nan=-1.0)
    return tuple(view.names("grad_norm")[i] for i in np.argsort(-row)[:3] if row[i] > 0)


def _vanishing_depth(view: View) -> list[Finding]:
    layers = chain(view)
    if layers is None:
        return []
    spans = len(layers.names) - 1
    slopes, shares = _lines(layers.logs)
    state = health(view)
    limit = VANISHED if state.flat else VANISHED_ALONE
    least = max(math.log10(DEPTH_FACTOR), -math.log10(limit) / spans)
    fitting = (shares >= DEPTH_R2) & (slopes >= least)
    # Where nothing at all passes there is no line; that is for `dead_relu` and `zero_gradient` to say.
    measured = np.isfinite(layers.logs).sum(axis=1) >= DEPTH_LEAST
    if measured.sum() < 2 or fitting[measured].mean() < VANISHED_SHARE:
        return []
    slope = float(np.median(slopes[fitting]))
    factor, total = series.power10(-slope), series.power10(-slope * spans)
    return [
        Finding(
            "vanishing_gradient",
            "warning",
            int(layers.steps[np.flatnonzero(fitting)[0]]),
            (layers.names[0],),
            total,
            limit,
            {"axis": "depth", "factor": factor, "layers": float(spans + 1), "total": total},
            f"From {layers.names[-1]!r} down to {layers.names[0]!r} gradients shrink by a factor of "
            f"{number(factor)} a layer: {number(total)} of them is left.",
        )
    ]


def _vanishing_time(view: View) -> list[Finding]:
    profile = _profile(view)
    if profile is None:
        return []
    step, logs = profile
    line = series.fit(np.arange(len(logs)), logs)
    factor, total = series.power10(-line.slope), series.power10(-line.slope * (len(logs) - 1))
    if line.r2 < TIME_R2 or total > VANISHED:
        return []
    state = health(view)
    severity: Severity = "warning" if state.flat or (state.is_slow and total <= VANISHED_ALONE) else "info"
    return [
        Finding(
            "vanishing_gradient",
            severity,
            step,
            tuple(p.name for p in view.parameters.values() if p.role == "recurrent")[:5],
            total,
            VANISHED,
            {"axis": "time", "factor": factor, "steps": float(len(logs)), "total": total},
            f"Back through {len(logs)} time steps gradients shrink by a factor of {number(factor)} a step: "
            f"{number(total)} of them reaches the first.",
        )
    ]


def _absent(view: View) -> list[Finding]:
    steps, norms = view.scalar("grad_finite_norm")
    if not len(steps) or not health(view).flat or not view.has_start:
        return []
    level = series.median(norms)
    if not 0 < level < ABSENT:
        return []
    names: Sequence[str] = _largest(view, int(steps[0]))
    return [
        Finding(
            "vanishing_gradient",
            "warning",
            int(steps[0]),
            tuple(names),
            level,
            ABSENT,
            {"axis": "scale"},
            f"The gradients are as good as absent from the first step on: their norm is {number(level)}"
            f"{f', most of it in {listed(names, 1)}' if names else ''}.",
        )
    ]
