"""The detectors: functions from a `Record` to what they find in it, by kind.

Each looks at recorded numbers only, can be called alone, and gives at most a few findings, the worst first.
Thresholds are named constants beside it, each with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from gradkern.diagnosis.detectors.clipping import clip_starvation, overclipped
from gradkern.diagnosis.detectors.data import data_scale
from gradkern.diagnosis.detectors.flow import exploding_gradient, norms_above_one, vanishing_gradient
from gradkern.diagnosis.detectors.loss import loss_diverging, loss_unstable, no_traction
from gradkern.diagnosis.detectors.nonfinite import (
    amp_backoff,
    data_nonfinite,
    grad_nonfinite,
    loss_nonfinite,
    weights_nonfinite,
)
from gradkern.diagnosis.detectors.precision import fp16_overflow, fp16_underflow
from gradkern.diagnosis.detectors.spikes import gradient_spike, loss_spike, update_spike
from gradkern.diagnosis.detectors.units import (
    dead_relu,
    saturated_activation,
    symmetric_units,
    unused_parameter,
    zero_gradient,
)
from gradkern.diagnosis.detectors.weights import (
    unstepped_parameter,
    update_ratio_high,
    update_ratio_low,
    update_rounded_away,
    weights_growing,
    weights_shrinking,
)
from gradkern.diagnosis.findings import Finding
from gradkern.diagnosis.view import View
from gradkern.record.schema import Record

DETECTORS: Final[dict[str, Callable[[Record], list[Finding]]]] = {
    detector.__name__: detector
    for detector in (
        loss_nonfinite,
        grad_nonfinite,
        weights_nonfinite,
        data_nonfinite,
        amp_backoff,
        exploding_gradient,
        norms_above_one,
        vanishing_gradient,
        gradient_spike,
        loss_spike,
        update_spike,
        loss_diverging,
        loss_unstable,
        no_traction,
        weights_growing,
        weights_shrinking,
        update_ratio_high,
        update_ratio_low,
        update_rounded_away,
        dead_relu,
        saturated_activation,
        symmetric_units,
        zero_gradient,
        unused_parameter,
        unstepped_parameter,
        overclipped,
        clip_starvation,
        fp16_underflow,
        fp16_overflow,
        data_scale,
    )
}
"""Every detector by the kind of its findings."""


@np.errstate(all="ignore")  # a broken run holds numbers of any size
def detect(record: Record) -> list[Finding]:
    """Run all detectors over a record. Findings come in the order of their steps, errors first at the same.

    Reads each series once. Nothing is kept: called again on a longer record it looks at all of it anew.

    >>> from gradkern.diagnosis import detect
    >>> from gradkern.record import MemoryRecord
    >>> record = MemoryRecord()
    >>> for step, loss in enumerate([2.0, 1.0, float("nan")]):
    ...     record.put_scalars(step, {"loss": loss})
    >>> [finding.sentence for finding in detect(record)]
    ['The loss became NaN at step 2; it was 1 before.']
    """
    view = View.of(record)
    found = [finding for detector in DETECTORS.values() for finding in detector(view)]
    rank = {"error": 0, "warning": 1, "info": 2}
    return sorted(found, key=lambda finding: (finding.step, rank[finding.severity]))
