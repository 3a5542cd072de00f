"""The record of a training run: scalars of every step, rows of every parameter, and what happened.

Needs numpy. Nothing in gradkern that clips or measures imports this package.
"""

from __future__ import annotations

from gradkern.record.file import RecordError
from gradkern.record.memory import MemoryRecord
from gradkern.record.run import Run
from gradkern.record.schema import Record, Recorder
from gradkern.record.writer import Writer

__all__ = ["MemoryRecord", "Record", "RecordError", "Recorder", "Run", "Writer"]
