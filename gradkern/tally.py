"""What a run has done so far, counted on the device; and reading it on the host without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradkern import reference
from gradkern.stats import GradStats

# Steps that the share of clipped steps is taken over.
WINDOW = 100

# A verdict is read this many steps late, so that reading it never waits for the step in flight, and on every
# rank at the same step, so that all of them raise alike.
LAG = 2


class Report(NamedTuple):
    """How things stood after a step, as numbers of the host."""

    step: int
    skipped: int
    consecutive: int
    clipped_share: float
    stats: GradStats


class Tally:
    """Steps, skipped steps, skipped steps in a row, and which of the last `WINDOW` were clipped.

    Written in place and never read here, so that a captured graph goes on counting when it is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.clipped = torch.zeros(WINDOW, dtype=torch.bool, device=device)
        self._steps, self._skipped, self._consecutive = (
            self.counts.narrow(0, place, 1) for place in range(3)
        )
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, GradStats]] = deque()

    def record(self, clipped: Tensor, skip: Tensor | None) -> None:
        """Count a step: whether it was clipped, and whether it is skipped; 0-dim bool."""
        self.clipped.scatter_(0, torch.remainder(self._steps, WINDOW), clipped.reshape(1))
        self._steps.add_(1)
        if skip is not None:
            self._skipped.add_(skip)
            self._consecutive.add_(1).mul_(skip)

    def late(self, stats: GradStats) -> Report | None:
        """Hand in how things stand now; get how they stood `LAG` steps ago.

        None at first, and where nothing can be read: under fake tensors, in tracing, in a captured graph.
        """
        event = None
        numbers = torch.cat((self.counts, self.clipped.sum(0, keepdim=True)))
        if not reference.is_readable(numbers):
            if not _can_be_read_later(numbers):
                return None
            numbers = numbers.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._pending.append((numbers, event, stats))
        if len(self._pending) <= LAG:
            return None
        numbers, event, stats = self._pending.popleft()
        if event is not None:
            event.synchronize()
        step, skipped, consecutive, clipped = numbers.tolist()
        return Report(step, skipped, consecutive, clipped / max(1, min(step, WINDOW)), stats)

    def state_dict(self) -> dict[str, Any]:
        """A copy, on the device."""
        return {"counts": self.counts.clone(), "clipped": self.clipped.clone()}

    def check(self, saved: Any) -> None:
        """Raise unless this is such a copy."""
        mine = {"counts": self.counts.shape, "clipped": self.clipped.shape}
        entries = saved.items() if isinstance(saved, Mapping) else ()
        theirs = {key: getattr(value, "shape", None) for key, value in entries}
        if theirs != mine:
            raise ValueError(f"load_state_dict: the tally must have the shapes {mine}, got {theirs}.")

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Go on from a copy, in place."""
        for mine, theirs in ((self.counts, saved["counts"]), (self.clipped, saved["clipped"])):
            # Not mine.copy_(), which wants a driver even for the fake tensors of a device.
            torch.ops.aten.copy_.default(mine, theirs)
        self._pending.clear()


def _can_be_read_later(numbers: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and numbers.device.type == "cuda"
        and type(numbers).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch.cuda.is_current_stream_capturing()
    )
