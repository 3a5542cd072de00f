"""Simple public rules, to compare with: each says at how many places of a record it alarms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gradkern.record import Record


def norm_above_one(record: Record) -> int:
    """The article's sign: the gradient norm of every layer is above 1."""
    _, norms = _weights(record, "grad_norm")
    return _stretches((norms > 1).all(axis=1)) if norms.size else 0


def layer_ratio(record: Record) -> int:
    """AUTOTRAINER: the norm of the first layer's gradient is more than 70 times that of the last."""
    _, norms = _weights(record, "grad_norm")
    with np.errstate(divide="ignore", invalid="ignore"):
        return _stretches(norms[:, 0] / norms[:, -1] > 70) if norms.size else 0


def small_gradient(record: Record) -> int:
    """SageMaker Debugger: a mean |g| below 1e-7 (here the root mean square, which is above the mean)."""
    names, norms = _weights(record, "grad_norm")
    sizes = {p["name"]: math.prod(p["shape"]) for p in record.meta["parameters"]}
    if not norms.size:
        return 0
    return _stretches((norms / np.sqrt([sizes[name] for name in names]) < 1e-7).any(axis=1))


def nan_only(record: Record) -> int:
    """The loss is NaN or Inf."""
    _, losses = record.scalar("loss")
    return int((~np.isfinite(losses)).any())


def six_sigma(record: Record) -> int:
    """OLMo's rule for skipping steps: a loss above the mean of the last 128 by six standard deviations."""
    _, losses = record.scalar("loss")
    flags = []
    for step in range(128, len(losses)):
        window = losses[step - 128 : step]
        flags.append(bool(losses[step] > window.mean() + 6 * window.std()))
    return _stretches(np.array(flags, bool))


RULES: dict[str, Callable[[Record], int]] = {
    "every layer's norm above 1": norm_above_one,
    "first/last layer above 70": layer_ratio,
    "mean gradient below 1e-7": small_gradient,
    "NaN loss only": nan_only,
    "loss 6σ over 128 steps": six_sigma,
}


def _weights(record: Record, kind: str) -> tuple[list[str], np.ndarray]:
    _, rows = record.rows(kind)
    names = record.names(kind)
    roles = {p["name"]: p["role"] for p in record.meta["parameters"]}
    columns = [i for i, name in enumerate(names) if roles[name] in ("weight", "recurrent")]
    columns = [i for i in columns if len(rows) and np.isfinite(rows[0, i])]
    return [names[i] for i in columns], rows[:, columns].astype(np.float64)


def _stretches(flags: np.ndarray) -> int:
    return int(np.count_nonzero(np.diff(np.concatenate([[False], flags]).astype(int)) > 0))
