"""What of a run is kept: pure functions of steps and sizes."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from gradkern.record.schema import Steps

MAX_ROWS: Final = 60_000
"""Rows kept of a kind, besides those around incidents: more than a screen has columns, even zoomed in."""

FLIGHT_BEFORE: Final = 256
"""Steps kept at full resolution up to an incident and with it."""

FLIGHT_AFTER: Final = 32
"""Steps kept at full resolution after an incident: does the run recover? A further incident among them is
taken for the same one, so that a run that fails on every step does not fill the file."""

FIRST_INCIDENTS: Final = 8
LATEST_INCIDENTS: Final = 24

LEAST_ROWS: Final = 64
"""Rows that a kind is left with however little room there is."""


def thinned(steps: Steps, stride: int, bucket: int) -> tuple[npt.NDArray[np.bool_], int]:
    """Which of `steps` stay if one step in `stride` does, and the bucket of the last of them.

    Steps fall into buckets of `stride`; the first step in each stays. `bucket` is that of the step before the
    first, -1 if there is none. Rows that come every tenth step, at whatever offset, thin out like others, and
    thinning by one stride and then by a multiple of it is thinning by the latter. Equal steps stay together.
    """
    buckets = steps // stride
    before = np.concatenate([[bucket], buckets[:-1]])
    fresh = buckets != before
    same = np.concatenate([[False], steps[1:] == steps[:-1]])
    # A step equal to the one before shares its fate.
    where = np.maximum.accumulate(np.where(same, 0, np.arange(len(steps))))
    kept = fresh[where] if len(steps) else fresh
    return kept, int(buckets[-1]) if len(steps) else bucket


def wider(stride: int, span: int, rows: int) -> int:
    """The next stride that leaves at most about half of `rows` that lie within `span` steps."""
    stride *= 2
    while rows > 2 and span // stride > 0.6 * rows:
        stride *= 2
    return stride


def superfluous(incidents: list[int]) -> list[int]:
    """Those of the incidents' numbers, in the order in which they happened, that are no longer kept."""
    return incidents[FIRST_INCIDENTS : max(len(incidents) - LATEST_INCIDENTS, FIRST_INCIDENTS)]
