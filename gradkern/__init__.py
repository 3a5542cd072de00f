"""Gradients: how big are they, are they sound, and what should be done about it?

>>> model = torch.nn.Linear(2, 1)
>>> model(torch.ones(4, 2)).sum().backward()
>>> stats = gradkern.clip_(model.parameters(), 1.0)
>>> print(f"{stats:.3f}", stats.names)
6.928 ['parameters[0]', 'parameters[1]']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradkern._version import __version__
from gradkern.clip import clip_, clip_grads_, measure, measure_grads
from gradkern.clipper import Clipper
from gradkern.drop_in import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from gradkern.errors import NonFiniteGradientError
from gradkern.ops import backend
from gradkern.penalty import add_penalty_, recurrent
from gradkern.policies import (
    AGC,
    AdaGC,
    BlockRMS,
    Chain,
    GlobalNorm,
    GroupNorm,
    Percentile,
    SkipSpike,
    TensorNorm,
    Value,
    ZClip,
)
from gradkern.sequence import truncated_bptt
from gradkern.stats import GradStats, Stats

if TYPE_CHECKING:
    from gradkern.monitor import Monitor, TrainingStopped, probe_time, trace_nonfinite
    from gradkern.record import Run

__all__ = [
    "AGC",
    "AdaGC",
    "BlockRMS",
    "Chain",
    "Clipper",
    "GlobalNorm",
    "GradStats",
    "GroupNorm",
    "Monitor",
    "NonFiniteGradientError",
    "Percentile",
    "Run",
    "SkipSpike",
    "Stats",
    "TensorNorm",
    "TrainingStopped",
    "Value",
    "ZClip",
    "__version__",
    "add_penalty_",
    "backend",
    "clip_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "measure",
    "measure_grads",
    "probe_time",
    "recurrent",
    "trace_nonfinite",
    "truncated_bptt",
]

# Modules of what is imported only when it is asked for: it needs numpy and sqlite3, which clipping does not.
_LAZY = {
    "Monitor": "gradkern.monitor",
    "Run": "gradkern.record",
    "TrainingStopped": "gradkern.monitor",
    "probe_time": "gradkern.monitor",
    "trace_nonfinite": "gradkern.monitor",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gradkern' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise ImportError(
            f"gradkern.{name} needs numpy, which is not installed: pip install 'gradkern[monitor]' "
            "(or: pip install numpy)"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
