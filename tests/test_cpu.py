"""The CPU kernels through their operators: the same bits everywhere, and the right ones.

The oracle is numpy on the elements as float64, which holds every float32 and half exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from gradkern.ops import native

if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
ISAS = native.isas()
BLOCK, CHUNK = 2048, 65536  # kBlock of kernels.inl, kChunkNumel of plan.h
EDGES = [
    0,
    *(edge + by for edge in (1, 16, 32, 64, BLOCK, CHUNK, 2 * CHUNK) for by in (-1, 0, 1) if edge + by),
]

op = torch.ops.gradkern


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def gradient(numel: int, dtype: torch.dtype, special: bool = False) -> Tensor:
    """Normal deviates with zeros of both signs; with `special`, also NaN and both Inf, wherever they fit."""
    grad = torch.randn(numel, generator=torch.Generator().manual_seed(numel), dtype=torch.float64).to(dtype)
    put = [0.0, -0.0, *([math.nan, math.inf, -math.inf] if special else [])]
    for step, value in zip((2, 3, 5, 7, 11), put, strict=False):
        if numel > step:
            grad[numel // step] = value
    return grad


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def exact_row(grad: Tensor) -> list[float]:
    values = grad.detach().double().flatten().numpy()
    finite = values[np.isfinite(values)]
    return [
        math.fsum(finite * finite)
        if grad.dtype != torch.float64
        else float(np.sum(np.square(finite, dtype=np.longdouble))),
        float(np.abs(finite).max(initial=0.0)),
        float(np.isnan(values).sum()),
        float(np.isinf(values).sum()),
        float((values == 0).sum()),
    ]


def bits(grad: Tensor) -> bytes:
    return bytes(grad.detach().contiguous().view(-1).view(torch.uint8).numpy())


def clipped(grad: Tensor, max_norm: float, clip_value: float, nonfinite: str) -> tuple[bytes, bytes, bytes]:
    grad = grad.clone()
    rows, _, coef = op.clip_([grad], max_norm, None, 0.0, clip_value, nonfinite)
    return bits(rows), bits(coef), bits(grad)


def all_clips(grad: Tensor) -> list[tuple[bytes, bytes, bytes]]:
    limits = [(1.0, math.inf), (math.inf, 0.1), (1.0, 1e-3), (1e-42, math.inf)]
    words = ["keep", "zero", "propagate"]
    return [clipped(grad, *limit, word) for limit, word in itertools.product(limits, words)]


# Right.


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", EDGES)
def test_a_row_is_exact_at_every_edge(numel: int, dtype: torch.dtype, special: bool, isa: str) -> None:
    grad = gradient(numel, dtype, special)
    row = op.measure([grad])[0][0].tolist()
    expected = exact_row(grad)
    assert row[0] == pytest.approx(expected[0], rel=1e-12, abs=0)
    assert row[1:] == expected[1:]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_precision_pattern_is_measured_exactly(dtype: torch.dtype, isa: str) -> None:
    patterns = every_pattern(dtype)
    row, expected = op.measure([patterns])[0][0].tolist(), exact_row(patterns)
    assert row[0] == pytest.approx(expected[0], rel=1e-14, abs=0)
    assert row[1:] == expected[1:]


@pytest.mark.parametrize("dtype", HALVES)
def test_each_half_precision_pattern_alone_has_its_square(dtype: torch.dtype, isa: str) -> None:
    patterns = every_pattern(dtype)
    rows, _ = op.measure(list(patterns[::7].split(1)))
    values = patterns[::7].double()
    assert torch.equal(rows[:, 0], torch.where(values.isfinite(), values.square(), 0.0))


@pytest.mark.parametrize("coef", [0.3, 0.7071, 1e-3])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_precision_pattern_is_scaled_in_float32_and_rounded_to_nearest_even(
    dtype: torch.dtype, coef: float, isa: str
) -> None:
    patterns = every_pattern(dtype)
    grad = patterns.clone()
    op.apply_([grad], None, torch.tensor(coef, dtype=torch.float64), math.inf, "keep")
    product = (patterns.float() * torch.tensor(coef, dtype=torch.float32)).to(dtype)
    expected = torch.where(patterns.isfinite(), product, patterns)
    assert bits(grad) == bits(expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_precision_pattern_is_clamped_and_nothing_else_moves(dtype: torch.dtype, isa: str) -> None:
    patterns = every_pattern(dtype)
    grad = patterns.clone()
    op.clip_([grad], math.inf, None, 0.0, 0.75, "keep")
    outside = patterns.isfinite() & (patterns.abs() > 0.75)
    expected = torch.where(outside, torch.copysign(torch.tensor(0.75, dtype=dtype), patterns), patterns)
    assert bits(grad) == bits(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_rounded_once(dtype: torch.dtype, isa: str) -> None:
    grad = gradient(5000, dtype)
    expected = (grad.double() * 0.1234567890123).to(dtype)
    op.apply_([grad], None, torch.tensor(0.1234567890123, dtype=torch.float64), math.inf, "keep")
    assert bits(grad) == bits(expected)


def test_a_coefficient_below_the_range_of_float32_is_not_lost(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        grad = torch.full((100,), 2.0**120, dtype=dtype)
        op.apply_([grad], None, torch.tensor(2.0**-160, dtype=torch.float64), math.inf, "keep")
        assert grad.unique().tolist() == [2.0**-40]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", ["keep", "zero", "propagate"])
def test_one_pass_by_value_equals_measuring_then_clamping(dtype: torch.dtype, word: str, isa: str) -> None:
    grad = gradient(3 * BLOCK + 5, dtype, special=True)
    once, twice = grad.clone(), grad.clone()
    rows, total, _ = op.clip_([once], math.inf, None, 0.0, 0.5, word)
    measured, measured_total = op.measure([twice])
    op.apply_([twice], measured, torch.ones((), dtype=torch.float64), 0.5, word)
    assert bits(once) == bits(twice)
    assert torch.equal(rows, measured)
    assert torch.equal(total, measured_total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_address_will_do(dtype: torch.dtype, isa: str) -> None:
    numel = BLOCK + 77
    grad = gradient(numel, dtype, special=True)
    expected = all_clips(grad)
    for offset in range(33):
        memory = torch.empty(numel + 64, dtype=dtype)
        shifted = memory[offset : offset + numel]
        shifted.copy_(grad)
        rows, _, _ = op.clip_([shifted], 1.0, None, 0.0, math.inf, "keep")
        assert (bits(rows), bits(shifted)) == (expected[0][0], expected[0][2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_beside_a_gradient_is_not_touched(dtype: torch.dtype, isa: str) -> None:
    memory = torch.full((300,), 7.0, dtype=dtype)
    op.clip_([memory[50:217]], 1.0, None, 0.0, 1e-3, "zero")
    assert memory[:50].eq(7).all()
    assert memory[217:].eq(7).all()


# The same bits.


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("numel", [1, 31, 1000, BLOCK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits(dtype: torch.dtype, numel: int, special: bool) -> None:
    grad = gradient(numel, dtype, special)
    before, found = native.isa(), []
    for name in ISAS:
        native.set_isa(name)
        found.append(all_clips(grad))
    native.set_isa(before)
    assert all(result == found[0] for result in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, isa: str) -> None:
    grads = [gradient(numel, dtype, True) for numel in (5 * CHUNK + 3, 1, 0, 700, CHUNK, 2 * CHUNK + 1)]
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for word in ("keep", "propagate"):
            fresh = [grad.clone() for grad in grads]
            rows, total, coef = op.clip_(fresh, 1.0, None, 0.0, 0.01, word)
            found.append((word, bits(rows), bits(total), bits(coef), *map(bits, fresh)))
    assert len(set(found)) == 2  # one for each word


def test_flushing_of_denormals_changes_nothing(isa: str) -> None:
    tiny = torch.full((64, 3000), 1e-40)
    tiny[:, ::7] = 1e-30
    grads = list(tiny.unbind())
    expected = [bits(part) for part in op.measure(grads)]
    scaled = [grad * 0.5 for grad in grads]
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert [bits(part) for part in op.measure(grads)] == expected
    op.apply_(grads, None, torch.tensor(0.5, dtype=torch.float64), math.inf, "keep")
    assert list(map(bits, grads)) == list(map(bits, scaled))


def test_addresses_may_change_places_between_calls() -> None:
    grads = [torch.full((1000,), float(value)) for value in range(1, 9)]
    rows, _ = op.measure(grads)
    shuffled, _ = op.measure(grads[::-1])
    assert torch.equal(rows.flip(0), shuffled)


# Precise.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.411, 1e-25, 3e38, 1e-41])
@pytest.mark.parametrize("numel", [1, 1000, 2**20, 2**26])
def test_a_constant_is_summed_to_1e_12(numel: int, value: float, dtype: torch.dtype) -> None:
    if not math.isfinite(torch.tensor(value, dtype=dtype).item()):
        value = 60000.0
    grad = torch.full((1,), value, dtype=dtype).expand(numel).contiguous()
    sum_sq = op.measure([grad])[0][0, 0].item()
    assert sum_sq == pytest.approx(numel * grad[0].double().item() ** 2, rel=1e-12, abs=0)


def test_huge_and_tiny_in_turn_are_summed_to_1e_12(isa: str) -> None:
    grad = torch.tensor([3e38, 1e-38, 1.0]).repeat(100_000)
    expected = math.fsum(value * value for value in grad[:3].double().tolist()) * 100_000
    assert op.measure([grad])[0][0, 0].item() == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements_are_measured_and_clipped() -> None:
    numel = 2**31 + 17
    grad = torch.empty(numel, dtype=torch.bfloat16)
    pattern = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    for part in grad.split(2**20):
        part.copy_(pattern[: part.numel()])
    grad[-1] = math.nan
    sums = [math.fsum(part.double().square().tolist()) for part in (pattern, pattern[:16])]
    row = op.measure([grad])[0][0].tolist()
    assert row[0] == pytest.approx(2**11 * sums[0] + sums[1], rel=1e-12, abs=0)
    assert row[2] == 1
    expected = (pattern.float() * torch.tensor(0.5)).bfloat16()
    op.apply_([grad], None, torch.tensor(0.5, dtype=torch.float64), math.inf, "keep")
    assert all(torch.equal(part, expected[: part.numel()]) for part in grad[:-1].split(2**20))


# Only what changes.


def version(grad: Tensor) -> int:
    return grad._version


def test_only_what_changes_is_written() -> None:
    small, large, empty = torch.full((10,), 0.1), torch.full((10,), 5.0), torch.empty(0)
    before = [version(grad) for grad in (small, large, empty)]
    op.clip_([small, large, empty], math.inf, None, 0.0, 1.0, "keep")
    assert [version(grad) for grad in (small, large, empty)] == [before[0], before[1] + 1, before[2]]


def test_a_norm_within_its_limit_writes_nothing() -> None:
    grad = torch.ones(4)
    before = version(grad)
    op.clip_([grad], 2.0, None, 0.0, 1.0, "keep")
    assert version(grad) == before


def test_zeros_are_not_written_when_the_others_are_scaled() -> None:
    zeros, ones = torch.zeros(10), torch.ones(10)
    before = version(zeros)
    op.clip_([zeros, ones], 0.1, None, 0.0, math.inf, "keep")
    assert version(zeros) == before
    assert version(ones) == 1


@pytest.mark.parametrize("dtype", HALVES)
def test_payloads_of_nan_and_signs_of_zero_survive(dtype: torch.dtype, isa: str) -> None:
    patterns = every_pattern(dtype)
    quiet = patterns[~patterns.isfinite() | (patterns == 0)].repeat(3)
    grad = torch.cat([quiet, torch.ones(50, dtype=dtype)])
    op.clip_([grad], 1.0, None, 0.0, 0.01, "keep")
    assert bits(grad[: quiet.numel()]) == bits(quiet)
