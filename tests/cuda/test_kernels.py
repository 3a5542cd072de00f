"""The CUDA kernels against a float64 oracle, on the CPU. Every run is also watched for accesses that are out
of bounds, unaligned or uninitialised, and for races: see executor.h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import CDLL

import numpy as np
import pytest
import torch

from tests.cuda import kernels, oracle
from tests.cuda.kernels import BLOCK, CHUNK, DTYPES, LOADS, NONFINITE, Result, bits

# `sum_sq` of the float32 sums, from the comment on `Tally`; the norm is within half of it.
SUM_SQ_ERROR = 6.1e-7
HALVES = [torch.bfloat16, torch.float16]
WORD = pytest.mark.parametrize("nonfinite", NONFINITE)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(library: CDLL, kernel: str, grads: Sequence[torch.Tensor], **options: object) -> Result:
    return kernels.run(library, kernel, grads, **options)  # type: ignore[arg-type]


def width(dtype: torch.dtype) -> int:
    return 16 // torch.tensor([], dtype=dtype).element_size()


def randn(shape: int | tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers, with zeros of both signs in between."""
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    values.view(-1)[3::17] = 0.0
    values.view(-1)[8::17] = -0.0
    return values.to(dtype)


def edge_sizes(dtype: torch.dtype) -> list[int]:
    """Around a vector, one load of every thread, and a batch of every thread."""
    vector = width(dtype)
    edges = [vector, BLOCK * vector, BLOCK * LOADS * vector]
    return [0, 1, *(edge + by for edge in edges for by in (-1, 0, 1))]


def spoil(grad: torch.Tensor, where: Sequence[int]) -> torch.Tensor:
    """NaN, Inf and -Inf in turn at these places, where the tensor has them."""
    spoiled = grad.clone()
    for turn, place in enumerate(where):
        if -grad.numel() <= place < grad.numel():
            spoiled.view(-1)[place] = (math.nan, math.inf, -math.inf)[turn % 3]
    return spoiled


def assert_rows(found: np.ndarray, grads: Sequence[torch.Tensor]) -> None:
    expected = oracle.rows(grads)
    for grad, mine, theirs in zip(grads, found, expected, strict=True):
        within = 1e-12 if grad.dtype == torch.float64 else SUM_SQ_ERROR
        assert mine[0] == pytest.approx(theirs[0], rel=within, abs=0)
    np.testing.assert_array_equal(found[:, 1:], expected[:, 1:])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, but that one NaN is as good as another."""
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(bits(found.nan_to_num(7.0)), bits(expected.nan_to_num(7.0)))


@pytest.mark.parametrize("misalignment", [0, 1, -1])
@DTYPE
def test_stats_are_those_of_float64_at_every_edge(
    library: CDLL, dtype: torch.dtype, misalignment: int
) -> None:
    grads = [randn(numel, dtype) for numel in edge_sizes(dtype)]
    found = run(library, "stats", grads, misalignment=misalignment)
    assert_rows(found.rows, grads)


@pytest.mark.parametrize("chunk_numel", [1001, 1 << 14])
@DTYPE
def test_stats_do_not_depend_on_where_chunks_begin(
    library: CDLL, dtype: torch.dtype, chunk_numel: int
) -> None:
    sizes = [chunk_numel - 1, chunk_numel, chunk_numel + 1, 5 * chunk_numel // 2]
    grads = [randn(numel, dtype) for numel in sizes]
    found = run(library, "stats", grads, chunk_numel=chunk_numel)
    assert_rows(found.rows, grads)


def test_stats_of_a_list_of_mixed_dtypes_come_from_one_launch(library: CDLL) -> None:
    grads = [randn(numel, dtype) for numel in (0, 5, 3000) for dtype in DTYPES]
    found = run(library, "stats", grads, misalignment=1)
    assert_rows(found.rows, grads)
    expected = oracle.merge(oracle.rows(grads))
    np.testing.assert_allclose(found.total, expected, rtol=SUM_SQ_ERROR)


@pytest.mark.parametrize("misalignment", [0, 1])
@DTYPE
def test_stats_count_nan_and_inf_wherever_they_are(
    library: CDLL, dtype: torch.dtype, misalignment: int
) -> None:
    vector = width(dtype)
    whole = BLOCK * LOADS * vector
    places = [
        [0],
        [-1],
        [1, 0],
        [-1, -2, -3],
        [vector, whole],
        [whole - 1],
        [5, 6, 7, 8],
        list(range(99, 999)),
    ]
    grads = [
        spoil(randn(numel, dtype), where) for where in places for numel in (vector + 1, whole + vector + 3)
    ]
    grads.append(torch.full((whole,), math.nan, dtype=dtype))
    found = run(library, "stats", grads, misalignment=misalignment)
    assert_rows(found.rows, grads)


# Squares that round the same way at every addition. A search over all float16 and the like of float32 found
# 1.79 and 1.63 to be the worst for sums as short as ours, 1.94 and 1.886 for those twice as long or more.
@pytest.mark.parametrize("value", [1 / 3, 0.1, 1.79003906, 1.63311195, 1.94335938, 1.88597405, 3e-3, 65000.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_stats_of_a_constant_are_as_good_as_short_sums_are(
    library: CDLL, dtype: torch.dtype, value: float
) -> None:
    grad = torch.full((CHUNK + 4321,), value, dtype=dtype)
    found = run(library, "stats", [grad])
    expected = math.sqrt(grad.numel()) * grad[0].double().item()
    assert found.norm == pytest.approx(expected, rel=0.8e-7, abs=0)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, v) for v in (1e-45, 1e-40, 1e-30, 2.2e-18, 1e20, 3e38)]
    + [(torch.bfloat16, v) for v in (1e-40, 1e-25, 2.2e-18, 1e30)]
    + [(torch.float16, 6e-8), (torch.float16, 65504.0), (torch.float64, 1e-150), (torch.float64, 1e150)],
    ids=str,
)
def test_stats_neither_overflow_nor_vanish(library: CDLL, dtype: torch.dtype, value: float) -> None:
    grad = torch.full((3001,), value, dtype=dtype)
    grad[::5] = 0
    grad[1::5] = 1e-3 * grad[1]
    assert_rows(run(library, "stats", [grad]).rows, [grad])


@DTYPE
def test_stats_of_zeros_count_every_one(library: CDLL, dtype: torch.dtype) -> None:
    grads = [torch.zeros(numel, dtype=dtype) for numel in edge_sizes(dtype)]
    assert_rows(run(library, "stats", grads).rows, grads)


@pytest.mark.parametrize("grads", [[], [torch.zeros(0)], [torch.zeros(0)] * 300], ids=len)
def test_stats_of_nothing_are_the_identity(library: CDLL, grads: list[torch.Tensor]) -> None:
    found = run(library, "stats", grads, max_norm=1.0)
    assert not found.rows.any()
    assert not found.total.any()
    assert (found.norm, found.coef, found.found_inf, found.grad_scale) == (0, 1, 0, 1)


@pytest.mark.parametrize("seed", range(6))
def test_stats_are_the_same_bits_on_every_schedule(library: CDLL, seed: int) -> None:
    grads = [spoil(randn(numel, dtype), [70]) for numel in (9, 5000) for dtype in DTYPES]
    first = run(library, "stats", grads, chunk_numel=1 << 10)
    other = run(library, "stats", grads, chunk_numel=1 << 10, seed=seed, launches=2)
    assert first.same_bits(other)


@pytest.mark.parametrize("capacity", kernels.CAPACITIES)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_every_kernel_finds_addresses_wherever_they_are(library: CDLL, kernel: str, capacity: int) -> None:
    grads = [randn((4, 50), dtype) for dtype in DTYPES]
    options = {"coef": [0.5], "bound": 1.0, "l1": 0.5, "weights": [randn((4, 50), dtype) for dtype in DTYPES]}
    direct = run(library, kernel, grads, **options)
    assert direct.same_bits(run(library, kernel, grads, **options, capacity=capacity))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["stats", "value", "apply", "exponents", "penalty"])
def test_every_kernel_reaches_elements_beyond_32_bits(library: CDLL, kernel: str, dtype: torch.dtype) -> None:
    grads = [randn(5000, dtype)]
    options = {"coef": [0.5], "bound": 1.0, "l2": 0.5, "weights": [randn(5000, dtype)]}
    near = run(library, kernel, grads, **options)
    assert near.same_bits(run(library, kernel, grads, **options, first_offset=3 << 31))


def test_stats_read_every_byte_once_and_write_none(library: CDLL) -> None:
    grads = [randn(numel, dtype) for numel in (1, 77, 9000) for dtype in DTYPES]
    found = run(library, "stats", grads, misalignment=1)
    assert found.bytes_read == sum(grad.nbytes for grad in grads)
    assert found.bytes_written == 0


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("where", [[], [3], [3, 4], [3, 4, 5]], ids=str)
@WORD
def test_stats_tell_what_follows_from_the_total(
    library: CDLL, nonfinite: str, where: list[int], eps: float
) -> None:
    grads = [spoil(randn(100, torch.float64), where), randn(50, torch.float64)]
    total = oracle.merge(oracle.rows(grads))
    for max_norm, limit in ((0.5, None), (1e6, None), (math.inf, None), (math.inf, 0.25), (0.0, None)):
        found = run(library, "stats", grads, max_norm=max_norm, limit=limit, eps=eps, nonfinite=nonfinite)
        coef = oracle.coef(total, max_norm if limit is None else limit, eps, nonfinite)
        assert found.norm == pytest.approx(oracle.norm(total), rel=1e-14, nan_ok=True)
        assert found.coef == pytest.approx(coef, rel=1e-14, nan_ok=True)
        assert found.found_inf == (1 if where else 0)
        scale = np.float32(np.float64(1) / found.coef) if found.coef != 0 else np.float32(np.inf)
        assert found.grad_scale == pytest.approx(scale, rel=0, nan_ok=True)


@pytest.mark.parametrize("misalignment", [0, 1])
@WORD
@DTYPE
def test_value_clamps_every_element_and_measures_it_first(
    library: CDLL, dtype: torch.dtype, nonfinite: str, misalignment: int
) -> None:
    bound = 0.7
    places = [0, 1, 2, 40, 41, 42, -1, -2, -3]
    grads = [spoil(randn(numel, dtype), where) for numel in edge_sizes(dtype) for where in ([], places)]
    found = run(library, "value", grads, bound=bound, nonfinite=nonfinite, misalignment=misalignment)
    for grad, after in zip(grads, found.grads, strict=True):
        assert_same(after, oracle.clipped(grad, 1.0, bound, nonfinite))
    measured = run(library, "stats", grads, nonfinite=nonfinite, misalignment=misalignment)
    assert found.rows.tobytes() == measured.rows.tobytes()


@pytest.mark.parametrize("nonfinite", ["keep", "propagate"])
@DTYPE
def test_value_leaves_the_bits_of_every_nan(library: CDLL, dtype: torch.dtype, nonfinite: str) -> None:
    grad = torch.full((200,), math.inf, dtype=dtype)
    bits(grad)[:100] += torch.arange(1, 101, dtype=bits(grad).dtype)
    grad[50:100].neg_()
    assert grad.isnan().sum() == 100
    found = run(library, "value", [grad], bound=1e-3, nonfinite=nonfinite)
    assert torch.equal(bits(found.grads[0])[:100], bits(grad)[:100])


def test_value_writes_only_vectors_that_change(library: CDLL) -> None:
    grad = torch.full((4096,), 0.5)
    grad[[64, 65, 1000, 4095]] = 2.0
    found = run(library, "value", [grad], bound=1.0)
    assert found.bytes_read == grad.nbytes
    assert found.bytes_written == 3 * 16


@WORD
def test_value_without_a_bound_writes_only_to_zero(library: CDLL, nonfinite: str) -> None:
    grad = spoil(randn(5000, torch.float32), [50, 51])
    found = run(library, "value", [grad], nonfinite=nonfinite)
    assert found.bytes_written == (16 if nonfinite == "zero" else 0)


@pytest.mark.parametrize("seed", range(4))
def test_value_is_the_same_bits_on_every_schedule(library: CDLL, seed: int) -> None:
    grads = [spoil(randn(numel, dtype), [70]) for numel in (9, 5000) for dtype in DTYPES]
    first = run(library, "value", grads, bound=0.5, chunk_numel=1 << 10)
    again = run(library, "value", grads, bound=0.5, chunk_numel=1 << 10, seed=seed)
    assert first.same_bits(again)


COEFS = [0.5, 1 / 3, 0.999, 1e-3, 1e-30, 1e-40, 1e-300, 0.0]


@pytest.mark.parametrize("coef", COEFS)
@WORD
@DTYPE
def test_apply_multiplies_then_clamps(library: CDLL, dtype: torch.dtype, nonfinite: str, coef: float) -> None:
    places = [0, 1, 2, 40, 41, 42, -1, -2, -3]
    for scale, bound in ((1.0, math.inf), (1e3, 0.3)):
        grads = [spoil(randn(numel, dtype, scale), places) for numel in edge_sizes(dtype)[-4:]]
        found = run(library, "apply", grads, coef=[coef], bound=bound, nonfinite=nonfinite, misalignment=1)
        for grad, after in zip(grads, found.grads, strict=True):
            assert_same(after, oracle.clipped(grad, coef, bound, nonfinite))


@DTYPE
def test_apply_rounds_products_of_every_magnitude_once(library: CDLL, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    powers = torch.logspace(
        math.log10(info.smallest_normal) - 3, math.log10(info.max), 5000, dtype=torch.float64
    )
    grad = (
        powers * (1 + torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    ).to(dtype)
    found = run(library, "apply", [grad], coef=[0.7312345678901234], nonfinite="propagate")
    assert_same(found.grads[0], oracle.clipped(grad, 0.7312345678901234, math.inf, "propagate"))


def test_apply_with_a_coefficient_of_nan_poisons_all_under_propagate_alone(library: CDLL) -> None:
    grad = spoil(randn(100, torch.float32), [5])
    poisoned = run(library, "apply", [grad], coef=[math.nan], nonfinite="propagate")
    assert poisoned.grads[0].isnan().all()


@pytest.mark.parametrize("scope", ["global", "tensor", "unit"])
@DTYPE
def test_apply_touches_nothing_where_the_coefficient_is_1(
    library: CDLL, dtype: torch.dtype, scope: str
) -> None:
    grads = [spoil(randn((3, 700), dtype), [3, 4]), randn(5, dtype)]
    found = run(library, "apply", grads, scope=scope, coef=[1.0] * 4, nonfinite="propagate")
    assert found.bytes_read == found.bytes_written == 0


def test_apply_spares_tensors_whose_rows_show_no_change(library: CDLL) -> None:
    grads = [0.1 * torch.ones(1000), torch.zeros(1000), torch.ones(1000)]
    rows = oracle.rows(grads)
    clamped = run(library, "apply", grads, coef=[1.0], bound=0.5, rows=rows)
    assert clamped.bytes_read == grads[2].nbytes
    scaled = run(library, "apply", grads, coef=[0.5], rows=rows)
    assert scaled.bytes_read == grads[0].nbytes + grads[2].nbytes


def test_apply_reads_and_writes_every_byte_once(library: CDLL) -> None:
    grads = [randn(numel, dtype).abs() + 1 for numel in (1, 77, 9000) for dtype in DTYPES]
    found = run(library, "apply", grads, coef=[0.5], misalignment=1)
    assert found.bytes_read == found.bytes_written == sum(grad.nbytes for grad in grads)


def test_apply_starts_with_what_was_measured_last(library: CDLL) -> None:
    grads = [torch.ones(1 << 15), torch.ones(1 << 15)]
    found = run(library, "apply", grads, coef=[0.5], chunk_numel=1 << 10)
    blocks = 4  # as many as run at once on the one SM of the executor's grids
    assert found.first >= sum(grad.nbytes for grad in grads) - blocks * (4 << 10)


@DTYPE
def test_apply_takes_a_coefficient_for_each_tensor(library: CDLL, dtype: torch.dtype) -> None:
    grads = [randn(numel, dtype) for numel in (3, 0, 2000, 700)]
    coefs = [0.5, 0.1, 1.0, 0.25]
    found = run(library, "apply", grads, scope="tensor", coef=coefs)
    for grad, coef, after in zip(grads, coefs, found.grads, strict=True):
        assert_same(after, oracle.clipped(grad, coef, math.inf, "keep"))
    assert found.bytes_read == grads[0].nbytes + grads[3].nbytes


UNIT_SHAPES = [(3, 5), (300, 7), (70, 1), (8, 1031), (7, 2048), (2, CHUNK + 5), (5000,), (1, 3), (0, 4)]


@WORD
@DTYPE
def test_apply_takes_a_coefficient_for_each_unit(library: CDLL, dtype: torch.dtype, nonfinite: str) -> None:
    grads = [spoil(randn(shape, dtype), [0, 6, 11]) for shape in UNIT_SHAPES]
    units = [grad.shape[0] if grad.dim() > 1 else 1 for grad in grads]
    coefs = torch.rand(sum(units), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coefs[::3] = 1.0
    options = {"coef": coefs.tolist(), "bound": 0.5, "nonfinite": nonfinite}
    found = run(library, "apply", grads, scope="unit", misalignment=1, **options)
    for grad, after, mine in zip(grads, found.grads, coefs.split(units), strict=True):
        scale = mine.reshape(-1, *[1] * (grad.dim() - 1)).expand(grad.shape)
        assert_same(after, oracle.clipped(grad, scale, 0.5, nonfinite))


@pytest.mark.parametrize("misalignment", [0, 1])
@DTYPE
def test_unit_sums_are_those_of_float64(library: CDLL, dtype: torch.dtype, misalignment: int) -> None:
    tensors = [spoil(randn(shape, dtype), [0, 6, 11]) for shape in UNIT_SHAPES]
    found = run(library, "unit_sums", tensors, misalignment=misalignment, launches=2)
    within = 1e-12 if dtype == torch.float64 else SUM_SQ_ERROR
    np.testing.assert_allclose(found.sums, oracle.unit_sums(tensors), rtol=within)


@pytest.mark.parametrize("seed", range(4))
def test_unit_sums_are_the_same_bits_on_every_schedule(library: CDLL, seed: int) -> None:
    tensors = [randn((2, 3 * CHUNK), torch.bfloat16), randn((100, 30), torch.float32)]
    first = run(library, "unit_sums", tensors)
    assert first.same_bits(run(library, "unit_sums", tensors, seed=seed))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_exponents_of_every_half(library: CDLL, dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    found = run(library, "exponents", [every, every[:1001]], misalignment=1)
    assert found.counts[0].tolist() == oracle.exponents(every).tolist()
    assert found.counts[1].tolist() == oracle.exponents(every[:1001]).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exponents_of_every_power_of_two(library: CDLL, dtype: torch.dtype) -> None:
    powers = torch.tensor([2.0], dtype=torch.float64) ** torch.arange(-1074, 1024, dtype=torch.float64)
    near = torch.cat(
        [powers, powers * (1 - 2**-20), -powers, torch.zeros(2), torch.tensor([math.nan, math.inf])]
    )
    grads = [near.to(dtype), near[:7].to(dtype)]
    found = run(library, "exponents", grads, chunk_numel=500)
    assert found.counts.tolist() == [oracle.exponents(grad).tolist() for grad in grads]


@pytest.mark.parametrize("weights_misalignment", [0, 1])
@DTYPE
def test_penalty_adds_its_gradient_and_returns_its_value(
    library: CDLL, dtype: torch.dtype, weights_misalignment: int
) -> None:
    grads = [randn(numel, dtype) for numel in (0, 1, 9, 3000, 9000)]
    weights = [randn(grad.numel(), dtype, 0.3).flip(0) for grad in grads]
    options = {"weights": weights, "weights_misalignment": weights_misalignment, "l1": 0.01, "l2": 0.02}
    found = run(library, "penalty", grads[1:], **{**options, "weights": weights[1:]}, chunk_numel=4096)
    for grad, weight, after, value in zip(grads[1:], weights[1:], found.grads, found.values, strict=True):
        assert_same(after, oracle.penalised(grad, weight, 0.01, 0.02))
        assert value == pytest.approx(oracle.penalty(weight, 0.01, 0.02), rel=1e-12)


def test_penalty_reads_both_and_writes_one(library: CDLL) -> None:
    grads = [randn(9000, dtype) for dtype in DTYPES]
    found = run(library, "penalty", grads, weights=grads, l1=1.0)
    assert found.bytes_read == 2 * sum(grad.nbytes for grad in grads)
    assert found.bytes_written == sum(grad.nbytes for grad in grads)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("kernel", ["apply", "exponents", "penalty"])
def test_every_other_kernel_gives_the_same_bits_on_every_schedule(
    library: CDLL, kernel: str, seed: int
) -> None:
    grads = [spoil(randn(numel, dtype), [70]) for numel in (9, 5000) for dtype in DTYPES]
    weights = [randn(numel, dtype, 0.3) for numel in (9, 5000) for dtype in DTYPES]
    options = {"coef": [0.5], "bound": 0.3, "weights": weights, "l1": 0.1, "l2": 0.2, "chunk_numel": 1 << 10}
    first = run(library, kernel, grads, **options)
    assert first.same_bits(run(library, kernel, grads, **options, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_random_lists_of_random_tensors(library: CDLL, seed: int) -> None:
    generator = np.random.default_rng(seed)

    def tensor() -> torch.Tensor:
        dtype = DTYPES[generator.integers(4)]
        numel = int(generator.choice([0, 1, 7, 300, 5000, 20000]) * generator.uniform(0.5, 1.5))
        units = int(generator.choice([0, 1, 3, 19]))
        shape = (units, numel // units) if units else numel
        grad = randn(shape, dtype, float(generator.choice([1e-3, 1.0, 30.0])))
        where = generator.integers(0, 20000, int(generator.integers(0, 4))) % max(grad.numel(), 1)
        return spoil(grad, where.tolist())

    grads = [tensor() for _ in range(generator.integers(1, 12))] + [torch.ones(3)]
    options = {
        "seed": seed,
        "misalignment": int(generator.integers(8)),
        "chunk_numel": int(generator.choice([1000, 1 << 14])),
        "nonfinite": NONFINITE[generator.integers(3)],
        "bound": float(generator.choice([0.5, math.inf])),
    }
    measured = run(library, "stats", grads, launches=2, max_norm=1.0, **options)
    assert_rows(measured.rows, grads)
    clamped = run(library, "value", grads, **options)
    assert clamped.rows.tobytes() == measured.rows.tobytes()
    coef = 0.37
    scaled = run(library, "apply", grads, coef=[coef], rows=measured.rows, **options)
    for grad, by_value, by_norm in zip(grads, clamped.grads, scaled.grads, strict=True):
        assert_same(by_value, oracle.clipped(grad, 1.0, options["bound"], options["nonfinite"]))
        assert_same(by_norm, oracle.clipped(grad, coef, options["bound"], options["nonfinite"]))
    filled = [grad for grad in grads if grad.numel() > 0]
    sums = run(library, "unit_sums", filled, **options).sums
    np.testing.assert_allclose(sums, oracle.unit_sums(filled), rtol=SUM_SQ_ERROR)
    counts = run(library, "exponents", grads, **options).counts
    assert counts.sum(axis=1).tolist() == [grad.numel() for grad in grads]
    assert counts[:, 0].tolist() == measured.rows[:, 4].tolist()
    weights = [0.1 * grad.nan_to_num(1.0).flip(0) for grad in filled]
    penalised = run(library, "penalty", filled, weights=weights, l1=0.1, l2=0.2, **options)
    for grad, weight, after in zip(filled, weights, penalised.grads, strict=True):
        assert_same(after, oracle.penalised(grad, weight, 0.1, 0.2))
