"""Watching training runs: the monitor, what it does about findings, and where it sends its numbers.

Needs numpy. Nothing in gradkern that clips or measures imports this package.
"""

from __future__ import annotations

from gradkern.monitor.actions import TrainingStopped
from gradkern.monitor.monitor import Monitor
from gradkern.monitor.probe import probe_time
from gradkern.monitor.sinks import JsonLinesSink, LogSink, MlflowSink, Sink, TensorBoardSink, WandbSink
from gradkern.monitor.trace import Origin, trace_nonfinite

__all__ = [
    "JsonLinesSink",
    "LogSink",
    "MlflowSink",
    "Monitor",
    "Origin",
    "Sink",
    "TensorBoardSink",
    "TrainingStopped",
    "WandbSink",
    "probe_time",
    "trace_nonfinite",
]
