"""At which steps a monitor looks at its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

# Verdicts on a step are taken this many steps later, so that its numbers are on the host without waiting.
LAG: Final = 2

# Looking takes time that grows with the record. At distances that grow with it too, looking at a run of k
# steps costs in all about three times what looking once at its end does.
GROWTH: Final = 1.5
LEAST: Final = 10
MOST: Final = 4096

# Numbers that are this many times the largest so far are looked at at once, and again when it has become
# clear what came of them.
GRADIENT_JUMP: Final = 10.0
LOSS_JUMP: Final = 3.0
AFTER: Final = (12, 60)


class Schedule:
    """Says when to look: regularly at growing distances, and at once at what stands out.

    What stands out must exceed all before it by a factor, or for NaN and Inf come twice as often as when
    last looked, so that a run of any length is looked at a bounded number of times.

    Args:
        first: the first step.
        every: look after each so many steps instead, whatever the numbers are.

    >>> from gradkern.monitor.schedule import Schedule
    >>> schedule = Schedule(0)
    >>> [step for step in range(40) if schedule.is_due(step, {"loss": 1.0})]
    [9, 19, 29]
    """

    def __init__(self, first: int, every: int | None = None) -> None:
        self._every = every
        self._regular = first + LEAST - 1
        self._extra: list[int] = []
        self._nonfinite, self._next_nonfinite = 0, 1
        self._largest: dict[str, float] = {}
        self._first = first

    def is_due(self, step: int, scalars: Mapping[str, float]) -> bool:
        """Whether to look after `step`, whose numbers these are. To be asked once for every step."""
        if self._every is not None:
            return (step - self._first + 1) % self._every == 0
        due = self._stands_out(step, scalars)
        if due:
            self._extra = sorted({*self._extra, *(step + later for later in AFTER)})
        while self._extra and self._extra[0] <= step:
            self._extra.pop(0)
            due = True
        if step >= self._regular:
            distance = max(int((step - self._first) * (GROWTH - 1)), LEAST)
            self._regular = step + min(distance, MOST)
            due = True
        return due

    def _stands_out(self, step: int, scalars: Mapping[str, float]) -> bool:
        loss, norm = scalars.get("loss"), scalars.get("grad_norm")
        is_bad = (loss is not None and not math.isfinite(loss)) or (
            norm is not None and not math.isfinite(norm)
        )
        if is_bad or scalars.get("data_nonfinite", 0.0) > 0:
            self._nonfinite += 1
            if self._nonfinite >= self._next_nonfinite:
                self._next_nonfinite = 2 * self._nonfinite
                return True
            return False
        due = False
        for name, value, jump in (("grad_norm", norm, GRADIENT_JUMP), ("loss", loss, LOSS_JUMP)):
            if value is None:
                continue
            value = abs(value)
            largest = self._largest.get(name)
            if largest is None or value > largest:
                due = due or (largest is not None and largest > 0 and value > jump * largest)
                # Creeping up is noticed by the regular looks; the mark moves in jumps only.
                if largest is None or value > jump * largest or step - self._first < LEAST:
                    self._largest[name] = value
        return due
