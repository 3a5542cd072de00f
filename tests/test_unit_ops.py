"""Operators on units, exponents and weights, on the CPU. Oracle: plain PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gradkern.ops import native

if native is None:
    pytest.skip("the extension is not built", allow_module_level=True)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EXACT = {torch.float32: 6e-8, torch.float64: 2e-16, torch.bfloat16: 4e-3, torch.float16: 5e-4}

op = torch.ops.gradkern


@pytest.fixture(autouse=True, params=native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def tensors(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Matrices with short, long and very long rows, a vector, a number, nothing, and channels-last."""
    torch.manual_seed(seed)
    shapes = [(5, 7), (9,), (3, 70000), (0, 4), (), (2000, 33), (4, 0)]
    made = [torch.randn(shape).to(dtype) for shape in shapes]
    return [*made, torch.randn(4, 3, 3, 3).to(dtype).to(memory_format=torch.channels_last)]


def units_of(tensor: Tensor) -> list[Tensor]:
    return list(tensor) if tensor.dim() > 1 else [tensor]


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_sums_are_exact(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    expected = [unit.double().square().sum() for tensor in given for unit in units_of(tensor)]
    torch.testing.assert_close(op.unit_sums(given), torch.stack(expected), rtol=1e-12, atol=0)


def test_unit_sums_cover_the_finite_elements() -> None:
    given = torch.tensor([[3.0, math.nan, 4.0], [math.inf, -math.inf, 2.0]])
    assert op.unit_sums([given]).tolist() == [25.0, 4.0]


def test_units_that_lie_interleaved_are_refused() -> None:
    with pytest.raises(RuntimeError, match="do not lie one behind the other"):
        op.unit_sums([torch.ones(3, 4).t()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_unit_is_multiplied_by_its_own_coefficient(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    count = sum(len(units_of(tensor)) for tensor in given)
    coef = torch.rand(count, dtype=torch.float64)
    expected = [tensor.double() for tensor in given]
    coefs = iter(coef)
    for tensor in expected:
        for unit in units_of(tensor):
            unit.mul_(next(coefs))
    op.apply_units_(given, coef, math.inf, "keep")
    for tensor, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(
            tensor.double(), wanted, rtol=EXACT[dtype], atol=1e-7 if dtype == torch.float16 else 0
        )


def test_a_unit_with_coefficient_one_keeps_its_bits_and_a_tensor_of_them_its_version() -> None:
    first, second = torch.randn(3, 50), torch.randn(2, 50)
    before = first.clone(), second.clone()
    op.apply_units_([first, second], torch.tensor([1.0, 0.5, 1, 1, 1], dtype=torch.float64), math.inf, "keep")
    assert torch.equal(first[[0, 2]], before[0][[0, 2]])
    assert torch.equal(second, before[1])
    assert (first._version, second._version) == (1, 0)


def test_an_empty_gradient_is_never_counted_as_written() -> None:
    grads = [torch.zeros(0), torch.zeros(2, 0), torch.ones(2)]
    op.apply_units_(grads, torch.full((4,), 0.5, dtype=torch.float64), 0.25, "zero")
    assert [grad._version for grad in grads] == [0, 0, 1]


def test_units_are_clamped_after_they_are_scaled_and_what_is_not_finite_stays() -> None:
    grad = torch.tensor([[4.0, math.nan, -8.0], [1.0, math.inf, 0.25]])
    op.apply_units_([grad], torch.tensor([0.5, 1], dtype=torch.float64), 3.0, "keep")
    torch.testing.assert_close(
        grad, torch.tensor([[2.0, math.nan, -3.0], [1.0, math.inf, 0.25]]), equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponents_are_those_of_frexp(dtype: torch.dtype) -> None:
    given = torch.randn(70001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = (given * torch.logspace(-7, 7, 70001, base=10, dtype=torch.float64)).to(dtype)
    given[:3] = torch.tensor([0.0, -0.0, math.nan])
    given[3] = -math.inf
    values = given.double()
    normal = values.isfinite() & (values.abs() >= torch.finfo(dtype).tiny)
    exponent = (torch.frexp(values[normal]).exponent - 1).clamp(-44, 16)
    expected = torch.bincount(exponent + 47, minlength=64)
    expected[0] = (values == 0).sum()
    expected[1] = (values.isfinite() & (values != 0) & ~normal).sum()
    expected[2] = (~values.isfinite()).sum()
    assert torch.equal(
        op.exponents([given, given[:0]]), torch.stack([expected, torch.zeros(64, dtype=torch.int64)])
    )


def penalised(grad: Tensor, weight: Tensor, l1: float, l2: float) -> Tensor:
    """The sum of `grad` and of what autograd gives for the penalty, in float64."""
    wide = weight.double().requires_grad_()
    (added,) = torch.autograd.grad(l1 * wide.abs().sum() + l2 * wide.square().sum(), wide)
    return grad.double() + added


@pytest.mark.parametrize(("l1", "l2"), [(0.1, 0.0), (0.0, 0.3), (0.01, 0.02)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_penalty_adds_its_gradient_and_returns_its_value(dtype: torch.dtype, l1: float, l2: float) -> None:
    grads, weights = tensors(dtype, 1), tensors(dtype, 2)
    weights[2][0, :9] = 0
    expected = [penalised(grad, weight, l1, l2) for grad, weight in zip(grads, weights, strict=True)]
    values = op.add_penalty_(grads, weights, l1, l2)
    for grad, weight, wanted, value in zip(grads, weights, expected, values, strict=True):
        torch.testing.assert_close(grad.double(), wanted.to(dtype).double(), rtol=EXACT[dtype], atol=0)
        wide = weight.double()
        assert value.item() == pytest.approx(
            (l1 * wide.abs().sum() + l2 * wide.square().sum()).item(), rel=1e-12
        )


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("unit_sums", ()),
        ("apply_units_", (torch.full((6,), 0.5, dtype=torch.float64), 0.25, "keep")),
        ("exponents", ()),
        ("add_penalty_", ([torch.ones(33), torch.ones(4, 5), torch.ones(0)], 0.1, 0.2)),
    ],
)
def test_torch_finds_no_fault_with_the_operators(name: str, more: tuple[object, ...]) -> None:
    given = [torch.randn(33), torch.randn(4, 5), torch.randn(0)]
    torch.library.opcheck(getattr(op, name).default, (given, *more))


def test_the_sign_of_a_zero_weight_is_zero_and_of_nan_is_nan() -> None:
    grad = torch.zeros(40)
    weight = torch.tensor([0.0, -0.0, math.nan, -1e-45, math.inf]).repeat(8)
    op.add_penalty_([grad], [weight], 0.5, 0.0)
    torch.testing.assert_close(grad[:5], torch.tensor([0.0, 0.0, math.nan, -0.5, 0.5]), equal_nan=True)
