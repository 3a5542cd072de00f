"""Norms of updates against all elements in double, and the sample's error against what it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradkern.monitor import Monitor
from gradkern.monitor.updates import SAMPLE, UpdateSampler, norms_and_errors, place


def update(before: torch.Tensor, after: torch.Tensor, name: str = "w") -> tuple[float, float]:
    sampler = UpdateSampler()
    weight = before.clone()
    sampler.before([name], [weight])
    weight.copy_(after)
    sums, sizes = sampler.after([weight])
    norm, error = norms_and_errors(sums.numpy(), sizes)[0].tolist()
    return norm, error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 5), (3, 4, 5)])
def test_a_small_tensor_is_measured_whole(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    before, after = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    norm, error = update(before, after)
    assert norm == pytest.approx((after.double() - before.double()).norm().item(), rel=1e-6)
    assert error == 0


def test_the_order_of_dimensions_does_not_matter() -> None:
    before = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    after = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    norm, _ = update(before, after)
    assert norm == pytest.approx((after.double() - before.double()).norm().item(), rel=1e-6)


@pytest.mark.parametrize("columns", [1000, 768, 4096, 105])
def test_a_sample_lies_within_five_of_its_standard_errors(columns: int) -> None:
    rows = 10 * SAMPLE // columns
    before = torch.zeros(rows, columns)
    # Rows and columns of very different scale: a sample that sits in a few of either would be far off.
    after = torch.randn(rows, columns) * torch.logspace(-2, 0, columns) * torch.logspace(0, -2, rows)[:, None]
    norm, error = update(before, after)
    exact = after.double().norm().item()
    assert 0 < error < 0.05 * exact
    assert abs(norm - exact) < 5 * error


def test_no_more_than_the_promised_elements_are_taken() -> None:
    for numel in (SAMPLE, SAMPLE + 1, 10 * SAMPLE + 3):
        start, distance, taken = place("w", numel, 1, SAMPLE)
        assert taken <= SAMPLE
        assert start + (taken - 1) * distance < numel


def test_whole_and_sampled_tensors_are_measured_side_by_side() -> None:
    names = ["large", "small", "empty"]
    before = [torch.zeros(10 * SAMPLE), torch.zeros(3, 2), torch.zeros(0)]
    sampler = UpdateSampler()
    sampler.before(names, before)
    found = norms_and_errors(*map(np.asarray, sampler.after([weight + 2 for weight in before])))
    assert found[:, 0].tolist() == pytest.approx([2 * math.sqrt(10 * SAMPLE), 2 * math.sqrt(6), 0])
    assert found[:, 1].tolist() == [0, 0, 0]


def test_copies_of_many_tensors_stay_within_their_memory() -> None:
    weights = [torch.zeros(SAMPLE // 4, dtype=torch.float16) for _ in range(600)]
    sampler = UpdateSampler()
    sampler.before([str(i) for i in range(600)], weights)
    assert sum(copy.numel() * copy.element_size() for copy in sampler._before) <= 32 << 20


def test_the_record_has_the_norm_of_each_update() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    moved = []
    with Monitor(model, optimizer, weights_every=3) as monitor:
        for _ in range(7):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 3)).square().mean()
            loss.backward()
            before = [p.detach().double() for p in model.parameters()]
            optimizer.step()
            after = [p.detach().double() for p in model.parameters()]
            moved.append([(a - b).norm().item() for a, b in zip(after, before, strict=True)])
            monitor.step(loss)
    steps, rows = monitor.record.rows("update_norm")
    assert steps.tolist() == [0, 3, 6]
    for step, row in zip(steps.tolist(), rows.tolist(), strict=True):
        assert row == pytest.approx(moved[step], rel=1e-5)
    total = monitor.record.scalar("update_norm")[1]
    assert total[-1] == pytest.approx(math.sqrt(sum(norm**2 for norm in moved[6])), rel=1e-5)


def test_without_an_optimizer_updates_are_taken_from_call_to_call() -> None:
    model = nn.Linear(2, 1, bias=False)
    with Monitor(model, weights_every=1) as monitor:
        for step in range(3):
            model.weight.data += step
            monitor.step(1.0)
    assert monitor.record.rows("update_norm")[1][:, 0] == pytest.approx([0, math.sqrt(2), 2 * math.sqrt(2)])
