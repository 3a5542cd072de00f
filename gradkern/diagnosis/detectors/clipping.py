"""Clipping that costs more than it gives."""

from __future__ import annotations

import math
from typing import Final

from gradkern.diagnosis import series
from gradkern.diagnosis.findings import Finding
from gradkern.diagnosis.health import health
from gradkern.diagnosis.view import View
from gradkern.diagnosis.words import number, percent
from gradkern.record.schema import Record

# A clip that fires on nearly all steps is only another learning rate, and many runs learn so. It is at fault
# if it takes all but a fiftieth and the loss does not move.
OVER_SHARE: Final = 0.9
OVER_COEF: Final = 0.02

# Adam divides by sqrt(v) + eps: at an element size of eps the update is half of what it should be.
STARVED: Final = 1.0

# Of optimizers without eps in their rule there is nothing to say.
ADAPTIVE: Final = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad")


def overclipped(record: Record) -> list[Finding]:
    """The clip leaves less than a fiftieth of the gradient, on 90 % of the steps, and the loss is flat.

    Without a flat loss it is nobody's business: the clip then sets the learning rate.
    """
    view = View.of(record)
    steps, coefs = view.scalar("clip_coef")
    known = series.finite(coefs)
    if len(known) < 20:
        return []
    share, usual = float((known < 1).mean()), series.median(known)
    if share < OVER_SHARE or usual > OVER_COEF or not health(view).flat:
        return []
    _, thresholds = view.scalar("clip_threshold")
    _, norms = view.scalar("grad_finite_norm")
    threshold, norm = series.median(thresholds), series.median(norms)
    limit = f", threshold {number(threshold)}" if math.isfinite(threshold) else ""
    return [
        Finding(
            "overclipped",
            "warning",
            int(steps[0]),
            (),
            usual,
            OVER_COEF,
            {"share": share, "threshold": threshold, "norm": norm},
            f"The clip fires on {percent(share)} of the steps and leaves {number(usual)} of the gradient "
            f"(norm {number(norm)}{limit}), and the loss does not come down.",
        )
    ]


def clip_starvation(record: Record) -> list[Finding]:
    """After clipping the elements of the gradient are smaller than the optimizer's eps, which then rules.

    By the root mean square over all elements, median over the steps, where it is above eps without the clip.
    """
    view = View.of(record)
    steps, clipped = view.scalar("grad_clipped_norm")
    _, norms = view.scalar("grad_finite_norm")
    eps = view.optimizer.get("eps")
    kind = str(view.optimizer.get("type", ""))
    elements = sum(p.numel for p in view.parameters.values() if p.requires_grad)
    if len(steps) < 20 or not eps or kind not in ADAPTIVE or not elements:
        return []
    after = series.median(clipped) / math.sqrt(elements)
    before = series.median(norms) / math.sqrt(elements)
    if after > STARVED * float(eps) or before <= STARVED * float(eps):
        return []
    return [
        Finding(
            "clip_starvation",
            "warning",
            int(steps[0]),
            (),
            after,
            STARVED * float(eps),
            {"before": before, "after": after, "eps": float(eps)},
            f"Clipped gradients are {number(after)} an element, below the eps of {kind} "
            f"({number(float(eps))}): its steps shrink with them. Before the clip they are {number(before)}.",
        )
    ]
