"""Whatever a record holds, detectors neither raise nor warn, and a diagnosis can be read."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from gradkern.diagnosis import diagnose, recommend_threshold
from gradkern.record import MemoryRecord
from gradkern.record.schema import KINDS, SCALARS
from tests.diagnosis.synthetic import layers

STRANGE = [0.0, 1.0, -1.0, 1e-30, 1e30, 1e300, np.nan, np.inf, -np.inf]


def strange(seed: int) -> MemoryRecord:
    """A record with any subset of the series, of numbers that no run would give."""
    rng = np.random.default_rng(seed)
    record = MemoryRecord()
    meta = layers(5)
    for entry in meta["parameters"]:
        entry["dtype"] = str(rng.choice(["torch.float16", "torch.float32", ""]))
        entry["role"] = str(rng.choice(["weight", "bias", "recurrent", "embedding"]))
    optimizer = {"type": str(rng.choice(["SGD", "Adam"])), "eps": 1e-8, "momentum": 0.9}
    record.set_meta({**meta, "optimizer": optimizer} if rng.random() < 0.8 else {})
    steps = int(rng.choice([1, 2, 5, 30, 200]))
    often = float(rng.choice([0.1, 0.9, 1.0]))

    def number() -> float:
        return float(rng.choice(STRANGE)) if rng.random() < often else float(rng.lognormal(0, 2))

    for name in SCALARS:
        if rng.random() < 0.7:
            for step in range(int(rng.integers(3)), steps):
                record.put_scalars(step, {name: number()})
    for kind in KINDS:
        if rng.random() < 0.7:
            modules = kind.startswith(("act_", "out_"))
            names = [f"l{i}" if modules else f"l{i}.weight" for i in range(5)]
            record.set_names(kind, names)
            for step in range(0, steps, int(rng.choice([1, 7]))):
                record.put_rows(kind, step, [number() for _ in names])
    if rng.random() < 0.5:
        record.put_event(steps // 2, "amp_backoff")
    return record


@pytest.mark.parametrize("seed", range(60))
def test_strange_records_are_diagnosed_without_an_error_or_a_warning(seed: int) -> None:
    record = strange(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnosis = diagnose(record)
        recommend_threshold(record)
    assert str(diagnosis)
    json.dumps(diagnosis.as_dict(), allow_nan=False)
