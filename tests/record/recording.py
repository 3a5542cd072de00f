"""Records to test with: the two that detectors read, filled alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gradkern.record import MemoryRecord, Record, Recorder, Run, Writer

Fill = Callable[[Recorder], Any]


class Memory:
    """Filled in memory."""

    def __call__(self, fill: Fill) -> contextlib.AbstractContextManager[Record]:
        record = MemoryRecord()
        fill(record)
        return contextlib.nullcontext(record)

    def __str__(self) -> str:
        return "memory"


class File:
    """Written to a file, and read from it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "run.gk"

    @contextlib.contextmanager
    def __call__(self, fill: Fill) -> Iterator[Record]:
        with Writer(self.path) as writer:
            fill(writer)
        with Run.open(self.path) as run:
            yield run
