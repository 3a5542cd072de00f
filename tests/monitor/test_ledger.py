"""What the monitor keeps is bounded, however long the run and however many its parameters."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from gradkern.monitor import Monitor
from gradkern.monitor.ledger import BLOCK
from gradkern.record.memory import MemoryRecord


def held_bytes(record: MemoryRecord) -> int:
    series = [*record._scalars.values(), *record._rows.values()]
    return sum(one._steps.nbytes + one._values.nbytes for one in series)


def test_a_full_history_takes_less_than_64_megabytes() -> None:
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(1)) for i in range(1000)})
    monitor = Monitor(model, activations_every=0)
    record = monitor._record
    numbers = np.arange(100_000)
    for name in range(17):
        record.put_scalar_block(f"s{name}", numbers, np.zeros(len(numbers)))
    kinds = list(monitor._ledger.kinds)
    for kind in kinds:
        for begin in range(0, 4000, BLOCK):
            steps = np.arange(begin, begin + BLOCK)
            record.put_row_block(kind, steps, np.zeros((BLOCK, 1000), np.float32))
    assert len(kinds) == 11
    assert held_bytes(record) < 64 << 20
    monitor.close()


def test_no_more_than_a_block_waits_for_the_record() -> None:
    model = nn.Linear(1, 1)
    with Monitor(model, activations_every=0) as monitor:
        for _ in range(10 * BLOCK):
            monitor.step(1.0)
            assert len(monitor._ledger._block) < BLOCK
            assert len(monitor._pending) <= 2
