"""Weights that run away, and updates that are too large or too small for them."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from gradkern.diagnosis import series
from gradkern.diagnosis.detectors.clipping import ADAPTIVE
from gradkern.diagnosis.findings import Finding
from gradkern.diagnosis.health import LARGE_UPDATE, RECOVERED, health
from gradkern.diagnosis.series import Floats
from gradkern.diagnosis.view import View
from gradkern.diagnosis.words import listed, number
from gradkern.record.schema import Record, Steps

# Growth: ten times the first weights, to a root mean square of 10. Trained weights stay below 1; embeddings
# and gains begin at 1.
GROWN: Final = 10.0
GROWN_RMS: Final = 10.0

# Growth that goes on: the second half of the run still grows at half the rate of the whole, in log.
STILL_GROWING: Final = 0.5

# The largest finite number of each dtype.
LARGEST: Final = {"float16": 65504.0, "bfloat16": 3.39e38, "float32": 3.40e38, "float64": 1.80e308}

# Of the weights, an update. A thousandth is usual and a hundredth is fast; at a tenth ten steps replace
# them. An alarm only if the loss is bad; at half of them, over the whole run, nothing that was learned stays.
RATIO_HIGH: Final = 0.1
RATIO_HIGH_ALONE: Final = 0.5
LASTING: Final = 20

# Single losses may be low by chance.
BEST: Final = 5

# In float32 a millionth of a weight is a few units in the last place: 10,000 such steps move it by 1 %.
RATIO_LOW: Final = 1e-6
# With a flat loss, this is slow: 1000 steps move the weights by 1 %.
RATIO_SLOW: Final = 1e-5

# A gradient of a thousandth of its weight is an ordinary one: if updates are small all the same, it is not
# for want of gradient.
ORDINARY: Final = 1e-3

# Significant bits are few in these; a tenth of an update is what arrives when most elements do not. Adam's
# updates are a fifth of the learning rate, for gradients that are all noise: (1 - 0.9) / (1 + 0.9) in square.
HALVES: Final = ("float16", "bfloat16")
ROUNDED_AWAY: Final = 0.1
NOISE_LEFT: Final = 0.2

# Weights that are a quarter of what they were pass a sixteenth through two layers.
SHRUNK: Final = 0.25

# Adam divides by sqrt(v) + eps: with eps at a hundred times the size of the first gradients it is plain
# momentum at a hundredth of the rate. An alarm if what moves is less than usual too.
EPS_RULES: Final = 100.0
EPS_UPDATE: Final = 1e-3

# Norms in float64 of weights that are stepped do not agree five times.
UNSTEPPED_ROWS: Final = 5

# A schedule that has taken the rate down by a factor of 1000 for half of a run ended too soon, unless little
# of the loss was left.
RATE_FELL: Final = 1e3
LEFT: Final = 0.1

# An update larger than the weights leaves nothing of them, at whatever step, nor do three of 0.3.
REPLACED: Final = 1.0
REPLACED_OFTEN: Final = 3


def weights_growing(record: Record) -> list[Finding]:
    """A weight has grown tenfold, to a root mean square of 10, and is not slowing down.

    Extrapolated, log-linearly, to the overflow of its dtype. A warning; an error if that is nearer than the
    steps already run, or weights are a million times the first.
    """
    view = View.of(record)
    steps, rows = view.rows("weight_norm")
    if len(steps) < 2 or not view.has_start:
        return []
    names = view.names("weight_norm")
    found: list[tuple[float, Finding]] = []
    for column, name in enumerate(names):
        parameter = view.parameters[name]
        norms = rows[:, column].astype(np.float64)
        kept = np.isfinite(norms) & (norms > 0)
        if kept.sum() < 2 or parameter.role not in ("weight", "recurrent", "embedding"):
            continue
        at, logs = steps[kept].astype(np.float64), series.log10(norms[kept])
        size = math.sqrt(max(parameter.numel, 1))
        growth, rms = series.power10(logs[-1] - logs[0]), series.power10(logs[-1]) / size
        if growth < GROWN or rms < GROWN_RMS:
            continue
        half = len(logs) // 2
        whole = (logs[-1] - logs[0]) / (at[-1] - at[0])
        recent = (logs[-1] - logs[half]) / (at[-1] - at[half]) if at[-1] > at[half] else whole
        if len(logs) >= 6 and recent < STILL_GROWING * whole:
            continue
        rate = max(recent, whole) if len(logs) < 6 else recent
        largest = LARGEST.get(parameter.dtype, LARGEST["float32"])
        peaks = _column(view, "weight_abs_max", name)
        peak = float(peaks[-1]) if len(peaks) and peaks[-1] > 0 else rms
        left = (math.log10(largest) - math.log10(peak)) / rate
        overflow = at[-1] + left
        onset = int(at[np.flatnonzero(logs >= logs[0] + 0.3)[0]])
        is_near = left <= at[-1] - at[0] or growth >= 1e6
        found.append((
            growth,
            Finding(
                "weights_growing",
                "error" if is_near else "warning",
                onset,
                (name,),
                growth,
                GROWN,
                {"rms": rms, "abs_max": peak, "decades_per_100_steps": 100 * rate, "overflow_step": overflow},
                f"{name!r} has grown {number(growth)} times since the start and goes on: at this rate it "
                f"leaves {parameter.dtype or 'float32'} at step {number(round(overflow))}.",
            ),
        ))  # fmt: skip
    found.sort(key=lambda pair: -pair[0])
    return [finding for _, finding in found[:3]]


def update_ratio_high(record: Record) -> list[Finding]:
    """Updates are a tenth of the weights or more while the loss is bad, or half of them all the time.

    With a bad loss a tenth of the steps, one step of 0.3, or one on the way to a NaN is enough, of those
    since the loss was at its best. A warning too if half of the first loss is left after 100 steps, and the
    first step changed most matrices by 0.3, or any three did, or one step was larger than the weights.

    The usual cause is the learning rate. Zero weights, which have no ratio, are left out.
    """
    view = View.of(record)
    steps, ratios = view.total_update_ratios
    kept = np.isfinite(ratios)
    steps, ratios = steps[kept], ratios[kept]
    state = health(view)
    if not len(ratios):
        return []
    # Until the loss is gone: afterwards every number is one of its consequences.
    if state.nonfinite is not None and (steps <= state.nonfinite).any():
        ratios, steps = ratios[steps <= state.nonfinite], steps[steps <= state.nonfinite]
    usual = series.median(ratios)
    is_lasting = usual >= RATIO_HIGH_ALONE and len(ratios) >= LASTING
    if not is_lasting:  # what a run has learned well after did it no harm
        ratios, steps = _since_best(view, ratios, steps)
    high = ratios >= RATIO_HIGH
    worst = float(np.max(ratios))
    share = float(high.mean())
    is_hard = share >= 0.1 or worst >= LARGE_UPDATE or (state.nonfinite is not None and bool(high.any()))
    is_often = int((ratios >= LARGE_UPDATE).sum()) >= REPLACED_OFTEN
    is_replaced = state.is_slow and (worst >= REPLACED or is_often or _is_overwritten(view))
    if not is_lasting and not (state.is_bad and is_hard) and not is_replaced:
        return []
    if not high.any():
        high = ratios == worst
    first = int(steps[np.flatnonzero(high)[0]])
    names = _moved_most(view, first)
    lr_steps, lrs = view.scalar("lr")
    lr = float(series.at(lr_steps, lrs, [first])[0])
    rate = f" at a learning rate of {number(lr)}" if math.isfinite(lr) else ""
    often = f" (usually {number(usual)})" if number(usual) != number(worst) else ""
    return [
        Finding(
            "update_ratio_high",
            "error" if state.trouble is not None else "warning",
            first,
            names,
            worst if not is_lasting else usual,
            RATIO_HIGH_ALONE if is_lasting else RATIO_HIGH,
            {"median": usual, "largest": worst, "first": float(ratios[high][0]), "share": share, "lr": lr},
            f"Updates reach {number(worst)} times the weights{often} from step {first} on{rate}; a "
            "thousandth is usual.",
        )
    ]


def unstepped_parameter(record: Record) -> list[Finding]:
    """Weights that get gradients, that the optimizer does not hold, and that nothing else changes either.

    Their norm is the same to the last digit in five measurements or more. Information: whoever trains only
    the head of a network does the same; a warning if half of the first loss is left after 100 steps.
    """
    view = View.of(record)
    steps, updates = view.rows("update_norm")
    _, weights = view.rows("weight_norm")
    _, grads = view.rows("grad_norm")
    names, known = view.names("update_norm"), view.names("grad_norm")
    if len(steps) < UNSTEPPED_ROWS or len(weights) < UNSTEPPED_ROWS or names != view.names("weight_norm"):
        return []
    held = np.count_nonzero(np.isfinite(updates), axis=0)
    changed: Floats = np.ptp(weights, axis=0)
    columns = [
        c for c in view.matrices("update_norm") if changed[c] == 0 and not held[c] and names[c] in known
    ]
    left = [names[c] for c in columns if np.nan_to_num(grads[:, known.index(names[c])]).any()]
    if not left or not held.any():
        return []
    return [
        Finding(
            "unstepped_parameter",
            "warning" if health(view).is_slow else "info",
            int(steps[0]),
            tuple(left[:5]),
            float(len(left)),
            0.0,
            {"parameters": float(len(left))},
            f"Gradients come to {listed(left)}, which the optimizer does not hold.",
        )
    ]


def update_rounded_away(record: Record) -> list[Finding]:
    """Updates of half-precision weights are lost: elements too small to change what they are added to.

    Bfloat16 has 8 significant bits and float16 11: less than a 512th (4096th) of a weight is rounded away. In
    half of the matrices of such a dtype the update is below a tenth of learning rate times gradient for SGD,
    or of a fifth of the learning rate an element for Adam and its kin, which is what their noise leaves.
    Information, a warning if the loss is flat. The remedy is to keep float32 weights.
    """
    view = View.of(record)
    steps, updates = view.rows("update_norm")
    names = view.names("update_norm")
    halves = [c for c in view.matrices("update_norm") if view.parameters[names[c]].dtype in HALVES]
    expected = _expected_updates(view, [names[c] for c in halves])
    if len(steps) < 3 or not halves or expected is None:
        return []
    measured = series.row_medians(updates[:, halves])
    shares = np.where(expected > 0, measured / expected, math.nan)
    bad = np.flatnonzero(shares < ROUNDED_AWAY)
    if not len(bad) or 2 * len(bad) < len(halves):
        return []
    order = bad[np.argsort(shares[bad])]
    worst = names[halves[order[0]]]
    dtype = view.parameters[worst].dtype
    return [
        Finding(
            "update_rounded_away",
            "warning" if health(view).flat else "info",
            int(steps[0]),
            tuple(names[halves[i]] for i in order[:5]),
            float(shares[order[0]]),
            ROUNDED_AWAY,
            {"matrices": float(len(bad)), "expected": float(expected[order[0]])},
            f"Of the updates of {worst!r} and {len(bad) - 1} other matrices at most "
            f"{number(float(shares[order[-1]]))} arrives: {dtype} rounds the rest away.",
        )
    ]


def _expected_updates(view: View, names: list[str]) -> Floats | None:
    """The norm of an update of each of these, by the rule of the optimizer; None if it is not known."""
    _, lrs = view.scalar("lr")
    lr, kind = series.median(lrs), str(view.optimizer.get("type", ""))
    _, grads = view.rows("grad_norm")
    known = {name: column for column, name in enumerate(view.names("grad_norm"))}
    if not lr > 0 or not len(grads) or any(name not in known for name in names):
        return None
    if kind == "SGD":
        return lr * series.row_medians(grads[:, [known[name] for name in names]])
    if kind in ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop"):
        return lr * NOISE_LEFT * np.sqrt([float(view.parameters[name].numel) for name in names])
    return None


def weights_shrinking(record: Record) -> list[Finding]:
    """All weight matrices together are a quarter of what they were at first, and the loss does not come down.

    Or half of it is left, and there is weight decay. That, or a penalty, is stronger than the gradients. A
    warning.
    """
    view = View.of(record)
    steps, rows = view.rows("weight_norm")
    columns = view.matrices("weight_norm")
    decay = float(view.optimizer.get("weight_decay") or 0.0)
    state = health(view)
    if len(steps) < 3 or not columns or not view.has_start or not (state.is_slow if decay else state.flat):
        return []
    norms = np.sqrt(np.square(rows[:, columns].astype(np.float64)).sum(axis=1))
    if not norms[0] > 0 or not norms[-1] <= SHRUNK * norms[0]:
        return []
    onset = int(steps[np.flatnonzero(norms <= 0.5 * norms[0])[0]])
    names = [view.names("weight_norm")[c] for c in columns]
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.nan_to_num(rows[-1, columns] / rows[0, columns], nan=1.0)
    return [
        Finding(
            "weights_shrinking",
            "warning",
            onset,
            tuple(names[i] for i in np.argsort(left)[:3]),
            float(norms[-1] / norms[0]),
            SHRUNK,
            {"first": float(norms[0]), "last": float(norms[-1]), "weight_decay": decay},
            f"The weights have shrunk to {number(float(norms[-1] / norms[0]))} of what they were, and the "
            f"loss does not come down; the weight decay is {number(decay)}.",
        )
    ]


def _since_best(view: View, ratios: Floats, steps: Steps) -> tuple[Floats, Steps]:
    """Those since the lowest loss, by the median of five, if that was half of the first; else all.

    All too if the loss was in trouble before: then it was low between two excursions.
    """
    loss_steps, losses = view.scalar("loss")
    known = np.isfinite(losses)
    losses, loss_steps = losses[known], loss_steps[known]
    if len(losses) < BEST:
        return ratios, steps
    levels = np.median(np.lib.stride_tricks.sliding_window_view(losses, BEST), axis=1)
    lowest = int(np.argmin(levels))
    if not levels[lowest] <= RECOVERED * losses[0]:
        return ratios, steps
    best = int(loss_steps[lowest + BEST // 2])
    trouble = health(view).trouble
    if trouble is not None and trouble < best:
        return ratios, steps
    kept = steps >= min(best, int(steps[-1]))  # of rows at a cadence the last one
    return ratios[kept], steps[kept]


def _is_overwritten(view: View) -> bool:
    """Whether the first update has replaced what most matrices were initialised with."""
    steps, ratios, _ = view.update_ratios
    if not len(steps) or not view.has_start or int(steps[0]) > int(view.steps[0]):
        return False
    known = series.finite(ratios[0])
    return len(known) > 0 and series.median(known) >= LARGE_UPDATE


def update_ratio_low(record: Record) -> list[Finding]:
    """Updates are below a millionth of the weights (a hundred thousandth if the loss is flat) all the time.

    Information, a warning if the loss is flat. A warning too if they have become so for half of the run
    because the learning rate fell to a thousandth, with more than a tenth of the first loss left; or if
    updates of Adam are below 1e-3 and its eps is 100 times the size of the first gradients.
    """
    view = View.of(record)
    steps, ratios, names = view.update_ratios
    if len(steps) < 3 or not names or not view.has_start:
        return []
    if found := _frozen(view) or _ruled_by_eps(view):
        return found
    medians = series.row_medians(ratios)
    known = np.isfinite(medians)
    if not known.any():
        return []
    flat = health(view).flat
    limit = RATIO_SLOW if flat else RATIO_LOW
    highest = series.largest(medians)
    if highest >= limit:
        return []
    lr_steps, lrs = view.scalar("lr")
    lr = series.median(lrs) if len(lr_steps) else math.nan
    rate = f" The learning rate is {number(lr)}." if math.isfinite(lr) else ""
    order = np.argsort(np.where(known, medians, np.inf))
    return [
        Finding(
            "update_ratio_low",
            "warning" if flat else "info",
            int(steps[0]),
            tuple(names[i] for i in order[:3] if known[i]),
            highest,
            limit,
            {"median": series.median(medians), "lr": lr, "relative_gradient": _relative_gradient(view)},
            f"Updates are at most {number(highest)} of the weights in every layer; "
            f"a thousandth is usual.{rate}",
        )
    ]


def _frozen(view: View) -> list[Finding]:
    """Whether the rate has fallen so far, so early, that the run stands still."""
    steps, ratios, names = view.update_ratios
    lr_steps, lrs = view.scalar("lr")
    state = health(view)
    peak = series.largest(lrs)
    if len(steps) < 10 or not peak > 0 or not state.last > LEFT * state.start > 0:
        return []
    late = ratios[len(steps) // 2 :]
    highest, before = series.largest(late), series.largest(ratios)
    low = np.flatnonzero(lrs > peak / RATE_FELL)
    since = int(lr_steps[min(int(low[-1]) + 1, len(lr_steps) - 1)])
    if not highest < RATIO_LOW or since > int(steps[len(steps) // 2]) or before < RATIO_SLOW:
        return []
    lr = float(lrs[-1])
    return [
        Finding(
            "update_ratio_low",
            "warning",
            since,
            tuple(names[:3]),
            highest,
            RATIO_LOW,
            {"median": series.median(late), "lr": lr, "peak_lr": peak, "relative_gradient": math.nan},
            f"The learning rate fell from {number(peak)} to {number(lr)}, below a thousandth since step "
            f"{since}: updates are at most {number(highest)} of the weights, and the loss stands at "
            f"{number(state.last)} of the {number(state.start)} that it began with.",
        )
    ]


def _ruled_by_eps(view: View) -> list[Finding]:
    """Whether an adaptive optimizer does not adapt, because its eps is larger than any gradient."""
    steps, ratios, names = view.update_ratios
    _, norms = view.scalar("grad_clipped_norm")
    kind, eps = str(view.optimizer.get("type", "")), view.optimizer.get("eps")
    elements = sum(p.numel for p in view.parameters.values() if p.requires_grad)
    early = series.median(norms[:10])
    if kind not in ADAPTIVE or not isinstance(eps, float) or not elements or not early > 0:
        return []
    size, highest = early / math.sqrt(elements), series.largest(series.row_medians(ratios))
    if eps < EPS_RULES * size or not highest < EPS_UPDATE:
        return []
    return [
        Finding(
            "update_ratio_low",
            "warning",
            int(steps[0]),
            tuple(names[:3]),
            highest,
            EPS_UPDATE,
            {
                "eps": eps,
                "size": size,
                "lr": series.median(view.scalar("lr")[1]),
                "relative_gradient": math.nan,
            },
            f"The eps of {kind} is {number(eps)} where gradients are {number(size)} an element: it does not "
            f"adapt, and updates are at most {number(highest)} of the weights.",
        )
    ]


def _relative_gradient(view: View) -> float:
    """Of the weight whose gradient is the largest for its size, that ratio, median over the steps."""
    grad_steps, grads = view.rows("grad_norm")
    weight_steps, weights = view.rows("weight_norm")
    known = {name: column for column, name in enumerate(view.names("weight_norm"))}
    columns = [c for c in view.matrices("grad_norm") if view.names("grad_norm")[c] in known]
    if not len(grad_steps) or not len(weight_steps) or not columns:
        return math.nan
    own = weights[:, [known[view.names("grad_norm")[c]] for c in columns]].astype(np.float64)
    before = series.at(weight_steps, own, grad_steps)
    ratios = grads[:, columns] / np.where(before > 0, before, math.nan)
    return series.largest(series.row_medians(ratios))


def _column(view: View, kind: str, name: str) -> np.ndarray:
    _, rows = view.rows(kind)
    names = view.names(kind)
    return series.finite(rows[:, names.index(name)]) if name in names and len(rows) else np.empty(0)


def _moved_most(view: View, step: int) -> tuple[str, ...]:
    steps, ratios, names = view.update_ratios
    if not len(steps):
        return ()
    row = np.nan_to_num(ratios[max(int(np.searchsorted(steps, step, "right")) - 1, 0)], nan=-1.0)
    return tuple(names[i] for i in np.argsort(-row)[:3] if row[i] > 0)
