"""At which steps a monitor looks at its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

# Verdicts on a step are taken this many steps later, so that its numbers are on the host without waiting.
LAG: Final = 2

# A young run is looked at at distances that grow with it, so that all looks together cost about three times
# what the last one does. What a look costs stops growing when the record in memory is full, and so do they.
GROWTH: Final = 1.5
LEAST: Final = 10
MOST: Final = 1024

# Numbers that are this many times the largest of the recent past are looked at at once, and again when it has
# become clear what came of them. Noise makes the largest of a hundred losses, not of their median.
GRADIENT_JUMP: Final = 5.0
LOSS_JUMP: Final = 2.0
AFTER: Final = (12, 60)

# The recent past: what was largest counts half after so many steps.
MEMORY: Final = 100
DECAY: Final = 0.5 ** (1 / MEMORY)

# A run that jumps all the time is looked at for it so many times in a row, then once in so many steps. What
# comes between waits for the next regular look.
BURST: Final = 4
REST: Final = 4096


class Schedule:
    """Says when to look: regularly, and at once at what stands out.

    What stands out is the first NaN or Inf after a sound step, or more than a multiple of what was largest
    lately. Where too much does it is left to the regular looks. NaN does not wait for jumps.

    Args:
        first: the first step.
        every: look after each so many steps instead, whatever the numbers are.

    Attributes:
        stands_out: whether the step that was asked about last does.

    >>> from gradkern.monitor.schedule import Schedule
    >>> schedule = Schedule(0)
    >>> [step for step in range(40) if schedule.is_due(step, {"loss": 1.0})]
    [9, 19, 29]
    """

    def __init__(self, first: int, every: int | None = None) -> None:
        self.stands_out = False
        self._every = every
        self._first = first
        self._regular = first + LEAST - 1
        self._extra: list[int] = []
        self._is_bad = False
        self._recent: dict[str, float] = {}
        self._paid = {"nonfinite": first, "jump": first}  # when the looks so far are paid for, one per `REST`

    def is_due(self, step: int, scalars: Mapping[str, float]) -> bool:
        """Whether to look after `step`, whose numbers these are. To be asked once for every step."""
        what = self._what_stands_out(scalars)
        self.stands_out = what is not None
        if self._every is not None:
            return (step - self._first + 1) % self._every == 0
        due = what is not None and self._paid[what] <= step + (BURST - 1) * REST
        if due and what is not None:
            self._paid[what] = max(self._paid[what], step) + REST
            self._extra = sorted({*self._extra, *(step + later for later in AFTER)})
        while self._extra and self._extra[0] <= step:
            self._extra.pop(0)
            due = True
        if step >= self._regular:
            distance = max(int((step - self._first) * (GROWTH - 1)), LEAST)
            self._regular = step + min(distance, MOST)
            due = True
        return due

    def _what_stands_out(self, scalars: Mapping[str, float]) -> str | None:
        loss, norm = scalars.get("loss"), scalars.get("grad_norm")
        was_bad, self._is_bad = self._is_bad, _is_bad(loss, norm, scalars)
        if self._is_bad:
            return None if was_bad else "nonfinite"
        found = None
        for name, value, jump in (("grad_norm", norm, GRADIENT_JUMP), ("loss", loss, LOSS_JUMP)):
            if value is None or not math.isfinite(value):
                continue
            value, recent = abs(value), self._recent.get(name, math.inf) * DECAY
            if value > jump * recent > 0:
                found = "jump"
            self._recent[name] = value if recent == math.inf else max(value, recent)
        return found


def _is_bad(loss: float | None, norm: float | None, scalars: Mapping[str, float]) -> bool:
    """Whether NaN or Inf came up where none belongs. What a GradScaler leaves out is at its place."""
    if loss is not None and not math.isfinite(loss):
        return True
    is_scaler = "loss_scale" in scalars and scalars.get("skipped", 0.0) > 0
    if norm is not None and not math.isfinite(norm) and not is_scaler:
        return True
    return scalars.get("data_nonfinite", 0.0) > 0
