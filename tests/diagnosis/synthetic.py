"""Records made by hand, for tests of single detectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradkern.diagnosis import Finding
from gradkern.record import MemoryRecord

Rows = Mapping[str, Sequence[float]]


def record_of(
    *,
    rows: Mapping[str, Rows] | None = None,
    every: int = 1,
    events: Sequence[tuple[int, str]] = (),
    meta: Mapping[str, Any] | None = None,
    **scalars: Sequence[float],
) -> MemoryRecord:
    """Scalars by name, one value a step; `rows` by kind and column, one value every `every` steps."""
    record = MemoryRecord()
    record.set_meta(meta or {})
    for name, values in scalars.items():
        for step, value in enumerate(values):
            record.put_scalars(step, {name: value})
    for kind, columns in (rows or {}).items():
        record.set_names(kind, list(columns))
        for place, row in enumerate(zip(*columns.values(), strict=True)):
            record.put_rows(kind, place * every, row)
    for step, kind in events:
        record.put_event(step, kind)
    return record


def parameter(name: str, shape: Sequence[int] = (8, 8), **options: Any) -> dict[str, Any]:
    """A parameter as `Record.meta` has it."""
    role = "weight" if len(shape) > 1 else "bias"
    return {
        "name": name,
        "shape": list(shape),
        "dtype": "torch.float32",
        "module": name.rpartition(".")[0],
        "role": role,
        "requires_grad": True,
        **options,
    }


def layers(count: int, kind: str = "Linear") -> dict[str, Any]:
    """`meta` of a chain of `count` layers named l0, l1, ... with a weight each."""
    return {
        "parameters": [parameter(f"l{i}.weight") for i in range(count)],
        "modules": [
            {"name": f"l{i}", "type": kind, "order": i, "parent": "", "branch": "0"} for i in range(count)
        ],
    }


def falling(
    steps: int, start: float = 2.0, end: float = 0.2, noise: float = 0.05, seed: int = 0
) -> list[float]:
    """The loss of a run that learns."""
    noises = np.random.default_rng(seed).normal(0, noise, steps)
    trend = end + (start - end) * np.exp(-5 * np.arange(steps) / steps)
    return [float(value) for value in np.maximum(trend * (1 + noises), 1e-6)]


def flat(steps: int, level: float = 2.0, noise: float = 0.01, seed: int = 0) -> list[float]:
    """The loss of a run that does not learn."""
    return [float(value) for value in level * (1 + np.random.default_rng(seed).normal(0, noise, steps))]


def noisy(steps: int, level: float = 1.0, noise: float = 0.2, seed: int = 1) -> list[float]:
    """Norms that vary by a factor, around a level."""
    return [float(value) for value in level * np.exp(np.random.default_rng(seed).normal(0, noise, steps))]


def only(found: list[Finding]) -> Finding:
    """The one finding that there is."""
    assert len(found) == 1, [finding.sentence for finding in found]
    return found[0]
