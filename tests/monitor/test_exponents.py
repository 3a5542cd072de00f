"""Histograms of exponents against a count by log2 in double."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradkern.monitor import Monitor
from gradkern.monitor.exponents import FIRST, LAST, histogram
from gradkern.monitor.updates import SAMPLE


def counted(values: Tensor) -> list[int]:
    counts = [0] * 64
    for value in values.double().flatten().tolist():
        if value == 0:
            counts[0] += 1
        elif not math.isfinite(value):
            counts[2] += 1
        elif abs(value) < torch.finfo(values.dtype).tiny:
            counts[1] += 1
        else:
            counts[3 + min(max(math.frexp(value)[1] - 1, FIRST), LAST) - FIRST] += 1
    return counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_the_format_is_in_its_column(dtype: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert histogram(values).tolist() == counted(values)


def test_an_empty_tensor_has_an_empty_histogram() -> None:
    assert histogram(torch.zeros(0, dtype=torch.float16)).sum() == 0


def test_of_a_large_tensor_a_sample_is_counted() -> None:
    values = torch.cat([torch.zeros(1000, 100), torch.ones(1000, 300)], 1).to(torch.bfloat16)
    counts = histogram(values)
    assert SAMPLE / 2 < counts.sum() <= SAMPLE
    assert counts[0] / counts.sum() == pytest.approx(0.25, rel=0.02)
    assert torch.equal(counts, histogram(values))


def test_the_monitor_records_those_of_half_precision_gradients() -> None:
    model = nn.Linear(2, 3).to(torch.bfloat16)
    with Monitor(model, weights_every=2) as monitor:
        for _ in range(3):
            model.weight.grad = torch.tensor([[1, 2], [0, 4], [-8, 1e-3]], dtype=torch.bfloat16)
            monitor.step(1.0)
    steps, histograms = monitor.record.exponents()
    assert steps.tolist() == [0, 2]
    assert monitor.record.names("exponents") == ["weight"]
    assert histograms[0, 0].tolist() == counted(model.weight.grad)
