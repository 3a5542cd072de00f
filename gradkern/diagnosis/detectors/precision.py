"""Half precision: numbers that are too large or too small for float16."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from gradkern.diagnosis import series
from gradkern.diagnosis.findings import Finding
from gradkern.diagnosis.health import health
from gradkern.diagnosis.view import View
from gradkern.diagnosis.words import listed, number, percent
from gradkern.record.schema import Record

# The largest float16. A value above a quarter of it is one doubling or two from Inf.
FP16_LARGEST: Final = 65504.0
NEAR_LARGEST: Final = FP16_LARGEST / 4

# Half of the elements rounded to zero, and of those that are left half subnormal: the distribution ends in
# float16's floor. Zeros alone come from ReLU.
UNDERFLOWN: Final = 0.5
SUBNORMAL: Final = 0.5
# Three quarters gone at this share of subnormals is an alarm whatever the loss does.
UNDERFLOWN_ALONE: Final = 0.9

# The exponent of float16's smallest normal number, 2**-14, as a magnitude; its smallest subnormal is 2**-24.
SMALLEST_NORMAL: Final = 2.0**-14


def fp16_overflow(record: Record) -> list[Finding]:
    """Float16 became Inf or NaN although the numbers would have fitted float32 or bfloat16.

    Inf in float16 gradients, or non-finite activations under float16, without a GradScaler that took the step
    back, while what was finite at that step or the one before is below float32's range by far. An error.
    Information if activations come within a factor 4 of 65504.
    """
    view = View.of(record)
    if not uses_fp16(view):
        return []
    excused = {event["step"] for event in view.events if event["kind"] == "amp_backoff"}
    steps, rows = view.rows("grad_inf")
    halves = [i for i, name in enumerate(view.names("grad_inf")) if _is_fp16(view, name)]
    hit: tuple[int, tuple[str, ...], float] | None = None
    if halves:
        for at in np.flatnonzero((rows[:, halves] > 0).any(axis=1)).tolist() if len(steps) else []:
            if int(steps[at]) not in excused:
                names = tuple(view.names("grad_inf")[i] for i in halves if rows[at, i] > 0)
                hit = (int(steps[at]), names, float(rows[at, halves].sum()))
                break
    act_steps, acts = view.rows("act_nonfinite")
    bad_acts = np.flatnonzero((acts > 0).any(axis=1)) if len(act_steps) else np.empty(0, int)
    if len(bad_acts) and (hit is None or int(act_steps[bad_acts[0]]) <= hit[0]):
        at = int(bad_acts[0])
        order = {m.name: m.order for m in view.modules}
        columns = sorted(
            np.flatnonzero(acts[at] > 0), key=lambda i: order.get(view.names("act_nonfinite")[i], 1 << 30)
        )
        names = tuple(view.names("act_nonfinite")[i] for i in columns)
        hit = (int(act_steps[at]), names, float(acts[at].sum()))
    lost = health(view).nonfinite
    if lost is not None and lost not in excused and (hit is None or hit[0] > lost):
        # Between two measurements: what was measured before must fit float32 with room to spare, and either
        # be near the end of float16 already or be seen beyond it afterwards.
        peak_steps, peaks = view.rows("act_abs_max")
        before = peaks[peak_steps <= lost] if len(peak_steps) else peaks
        norm_steps, norms = view.scalar("grad_finite_norm")
        norm = series.finite(norms[norm_steps < lost][-1:])
        is_near = before.size > 0 and series.largest(before[-1:]) >= NEAR_LARGEST
        if is_near or (hit is not None and (not len(norm) or norm[0] < FP16_LARGEST)):
            names = (
                (
                    view.names("act_abs_max")[
                        int(np.nanargmax(np.where(np.isfinite(before[-1]), before[-1], -1.0)))
                    ],
                )
                if is_near
                else hit[1]
                if hit
                else ()
            )
            hit = (lost, names, math.nan)
        elif hit is None and _is_sound_but_for_the_loss(view, lost):
            hit = (lost, (), 1.0)
    if hit is not None:
        step, names, amount = hit
        # What was lost already in other ways is no overflow: NaN in float32 weights or data before it.
        data_steps, data = view.scalar("data_nonfinite")
        if (data[data_steps <= step] > 0).any():
            return []
        return [
            Finding(
                "fp16_overflow",
                "error",
                step,
                names[:5],
                amount,
                FP16_LARGEST,
                {"loss_scale": _scale(view)},
                f"Float16 overflowed at step {step} in {listed(names) if names else 'the loss'}: it ends at "
                "65504, bfloat16 does not.",
            )
        ]
    _, peaks = view.rows("act_abs_max")
    highest = series.largest(peaks)
    if not highest >= NEAR_LARGEST:
        return []
    place, column = divmod(int(np.argmax(np.where(np.isfinite(peaks), peaks, -1.0))), peaks.shape[1])
    name = view.names("act_abs_max")[column]
    step = int(view.rows("act_abs_max")[0][place])
    return [
        Finding(
            "fp16_overflow",
            "info",
            step,
            (name,),
            highest,
            NEAR_LARGEST,
            {},
            f"Outputs of {name!r} reach {number(highest)} at step {step}; float16 ends at 65504.",
        )
    ]


def _is_sound_but_for_the_loss(view: View, step: int) -> bool:
    """Whether the gradients of a loss that is Inf are finite, as they are if only its sum left the range."""
    steps, counts = view.scalar("nonfinite_count")
    return bool((counts[steps == step] == 0).any())


def fp16_underflow(record: Record) -> list[Finding]:
    """Float16 gradients are rounded to zero: half of the elements are zero and half of the rest subnormal.

    Medians over the steps, in at least half of the float16 weights; zeros without subnormals come from ReLU.
    Information, a warning if the loss is flat or nine in ten are gone.
    """
    view = View.of(record)
    shares = _from_histograms(view)
    if shares is None:
        shares = _from_rows(view)
    if shares is None:
        return []
    step, names, zero, subnormal = shares
    bad = [i for i in range(len(names)) if zero[i] >= UNDERFLOWN and subnormal[i] >= SUBNORMAL]
    gone = [i for i in range(len(names)) if zero[i] >= 1.0]
    # Where everything is gone there is nothing subnormal left to see: it counts beside a layer that shows it.
    # And where not even the last layer has a gradient, though the loss is not zero.
    # And where what is left is all subnormal, as in the last layer of a net in which nothing goes further.
    floored = [i for i in range(len(names)) if subnormal[i] >= SUBNORMAL]
    bad = sorted({*bad, *gone}) if bad or floored or len(gone) == len(names) else []
    if len(bad) * 2 < len(names) or not bad:
        return []
    worst = max(bad, key=lambda i: zero[i])
    share = float(np.median([zero[i] for i in bad]))
    is_alarm = health(view).flat or share >= UNDERFLOWN_ALONE
    return [
        Finding(
            "fp16_underflow",
            "warning" if is_alarm else "info",
            step,
            tuple(names[i] for i in sorted(bad, key=lambda i: -zero[i])[:5]),
            share,
            UNDERFLOWN,
            {"subnormal": float(np.median([subnormal[i] for i in bad])), "loss_scale": _scale(view)},
            f"{percent(float(zero[worst]))} of the float16 gradient of {names[worst]!r} is rounded to zero, "
            "and what is left is next to it.",
        )
    ]


def _from_histograms(view: View) -> tuple[int, list[str], list[float], list[float]] | None:
    steps, histograms = view.exponents()
    names = view.names("exponents")
    columns = [i for i, name in enumerate(names) if _is_fp16(view, name) and view.parameters[name].ndim != 1]
    if not len(steps) or not columns:
        return None
    totals = histograms[:, columns].sum(axis=2).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = histograms[:, columns, 0] / totals
        subnormal = histograms[:, columns, 1] / (totals - histograms[:, columns, 0])
    zeros, subnormals = series.row_medians(zero), np.nan_to_num(series.row_medians(subnormal))
    return int(steps[0]), [names[i] for i in columns], zeros.tolist(), subnormals.tolist()


def _from_rows(view: View) -> tuple[int, list[str], list[float], list[float]] | None:
    """Without histograms: the share of zeros, and whether even the largest element is below 2**-14."""
    steps, zeros = view.rows("grad_zero")
    peak_steps, peaks = view.rows("grad_abs_max")
    names = view.names("grad_zero")
    known = {name: i for i, name in enumerate(view.names("grad_abs_max"))}
    columns = [
        i for i, name in enumerate(names)
        if name in known and view.parameters[name].ndim != 1 and (_is_fp16(view, name) or _is_scaleless(view))
    ]  # fmt: skip
    if not len(steps) or not len(peak_steps) or not columns:
        return None
    kept = [names[i] for i in columns]
    largest = series.row_medians(peaks[:, [known[name] for name in kept]])
    below = [1.0 if 0 < value < SMALLEST_NORMAL else 0.0 for value in largest]
    return int(steps[0]), kept, series.row_medians(zeros[:, columns]).tolist(), below


def _is_fp16(view: View, name: str) -> bool:
    return view.parameters[name].dtype == "float16"


def _amp(view: View) -> bool:
    amp = view.meta.get("amp") or {}
    return bool(amp.get("enabled")) and str(amp.get("dtype", "")).removeprefix("torch.") == "float16"


def _is_scaleless(view: View) -> bool:
    """Whether float32 weights get gradients that float16 autocast made, without a scale."""
    return _amp(view) and not len(view.scalar("loss_scale")[0])


def uses_fp16(view: View) -> bool:
    """Whether anything is computed in float16."""
    return _amp(view) or any(p.dtype == "float16" for p in view.parameters.values())


def _scale(view: View) -> float:
    _, scales = view.scalar("loss_scale")
    return float(scales[-1]) if len(scales) else math.nan
