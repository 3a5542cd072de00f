from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gradkern import reference
from tests.helpers import COMPLEX, INF, NAN, REAL, elements, exact_sum_sq, randn, same_bits
from tests.no_sync import no_host_read


def float64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.t().clone().t(),
    "every other column": lambda x: torch.stack([x, -x], 2).flatten(1)[:, ::2],
    "every other row": lambda x: torch.stack([x, -x], 1).flatten(0, 1)[::2],
    "odd offset": lambda x: torch.cat([x.flatten(), x.flatten()[:3]])[: x.numel()].view(x.shape),
    "sparse rows": lambda x: x.to_sparse(1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 7), (3, 50_000), (50_000, 3), (300, 301)], ids=str)
def test_statistics_do_not_depend_on_the_layout(shape: tuple[int, int], layout: str) -> None:
    grad = randn(*shape)
    row = reference.measure([LAYOUTS[layout](grad)])[0][0].tolist()
    assert row == [
        pytest.approx(exact_sum_sq(elements([grad])), rel=1e-12),
        grad.abs().max().item(),
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_written_in_place(layout: str) -> None:
    grad = randn(300, 301)
    stored = LAYOUTS[layout](grad)
    version = stored._version
    reference.apply_([stored], None, float64(0.5), INF, "keep")
    assert torch.equal(stored.to_dense(), grad * 0.5)
    assert stored._version > version


def test_elements_between_those_of_a_view_are_left_alone() -> None:
    whole = torch.ones(100, 4)
    reference.apply_([whole[:, 1]], None, float64(0.5), INF, "keep")
    assert whole.mean(0).tolist() == [1.0, 0.5, 1.0, 1.0]


def test_an_expanded_gradient_is_measured_as_if_it_were_whole() -> None:
    row = reference.measure([torch.tensor([[2.0]]).expand(1000, 300)])[0][0]
    assert row.tolist() == [4.0 * 300_000, 2.0, 0, 0, 0]


def test_a_sparse_gradient_is_measured_by_its_coalesced_values() -> None:
    grad = torch.sparse_coo_tensor([[0, 2, 0, 1]], [1.0, 5.0, 2.0, 0.0], (4,))
    assert reference.measure([grad])[0][0].tolist() == [34.0, 5.0, 0, 0, 1]


@pytest.mark.parametrize("coalesced", [True, False])
def test_a_sparse_gradient_is_written_on_the_same_object(coalesced: bool) -> None:
    grad = torch.sparse_coo_tensor([[0, 2, 0]], [1.0, 5.0, 2.0], (4,))
    grad = grad.coalesce() if coalesced else grad
    version = grad._version
    reference.apply_([grad], None, float64(0.5), 2.0, "keep")
    assert grad.to_dense().tolist() == [1.5, 0.0, 2.0, 0.0]
    assert grad._version > version


def test_a_sparse_gradient_in_which_nothing_changes_stays_uncoalesced() -> None:
    grad = torch.sparse_coo_tensor([[0, 2, 0]], [1.0, 5.0, 2.0], (4,))
    version = grad._version
    rows, _ = reference.measure([grad])
    reference.apply_([grad], rows, float64(1.0), 6.0, "keep")
    assert not grad.is_coalesced()
    assert grad._version == version


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_a_complex_element_counts_once(dtype: torch.dtype) -> None:
    grad = torch.tensor(
        [3 + 4j, complex(NAN, 1), complex(INF, NAN), complex(0, -INF), complex(-0.0, 0.0), 0 + 1j],
        dtype=dtype,
    )
    assert reference.measure([grad])[0][0].tolist() == [26.0, 5.0, 2, 1, 1]


@pytest.mark.parametrize("conjugated", [False, True])
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_a_complex_gradient_is_scaled_by_parts(dtype: torch.dtype, conjugated: bool) -> None:
    memory = torch.tensor([3 + 4j, complex(-0.0, INF), complex(NAN, 2)], dtype=dtype)
    grad = memory.conj() if conjugated else memory
    sign = -1.0 if conjugated else 1.0
    reference.apply_([grad], None, float64(0.5), INF, "propagate")
    parts = torch.view_as_real(memory.clone()).flatten()
    assert parts[:4].tolist() == [1.5, 2.0, 0.0, INF]
    assert math.copysign(1, parts[2]) == -1
    assert grad[2].imag.item() == sign * 1.0


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_a_complex_element_is_kept_or_zeroed_as_a_whole(dtype: torch.dtype) -> None:
    before = torch.tensor([3 + 4j, complex(2, INF), complex(NAN, 2)], dtype=dtype)
    kept, zeroed = before.clone(), before.clone()
    reference.apply_([kept], None, float64(0.5), INF, "keep")
    reference.apply_([zeroed], None, float64(0.5), INF, "zero")
    assert same_bits(torch.view_as_real(kept[1:]), torch.view_as_real(before[1:]))
    assert zeroed.tolist() == [1.5 + 2j, 0j, 0j]


def test_gradients_made_in_inference_mode_are_written_outside_of_it() -> None:
    with torch.inference_mode():
        grad = torch.ones(5)
    reference.apply_([grad], None, float64(0.5), INF, "keep")
    assert grad.tolist() == [0.5] * 5


def test_gradients_that_require_grad_are_written_without_a_graph() -> None:
    leaf = torch.ones(3, requires_grad=True)
    grad = leaf * 2
    reference.clip_([grad], 1.0, None, 0.0, INF, "keep")
    assert grad.detach().norm().item() == pytest.approx(1.0)
    assert reference.measure([leaf])[0].requires_grad is False


def test_the_coefficient_is_one_division_rounded_once() -> None:
    norms = np.random.default_rng(0).uniform(1, 1e6, 1000)
    coefs = reference.coefficient(torch.from_numpy(norms), 0.7, None, 1e-6)
    assert np.array_equal(coefs.numpy(), 0.7 / (norms + 1e-6))


@pytest.mark.parametrize(
    ("norm", "max_norm", "coef"),
    [
        (2.0, 1.0, 0.5),
        (0.5, 1.0, 1.0),
        (0.0, 0.0, 1.0),
        (0.0, 1.0, 1.0),
        (2.0, 0.0, 0.0),
        (INF, 1.0, 0.0),
        (INF, INF, 1.0),
        (NAN, INF, 1.0),
        (NAN, 1.0, NAN),
    ],
)
def test_the_coefficient_at_its_edges(norm: float, max_norm: float, coef: float) -> None:
    given = reference.coefficient(float64(norm), max_norm, None, 0.0).item()
    assert given == coef or (math.isnan(given) and math.isnan(coef))
    limited = reference.coefficient(float64(norm), INF, torch.tensor(max_norm), 0.0).item()
    assert limited == given or (math.isnan(given) and math.isnan(limited))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 50.0, INF, -1.0, -2.0, -INF])
def test_a_norm_of_any_order_is_that_of_all_elements(order: float, dtype: torch.dtype) -> None:
    grads = [randn(50, dtype=dtype), torch.zeros(0, dtype=dtype), randn(20_000, dtype=dtype, seed=1)]
    norm = reference.power_norm(grads, reference.measure(grads)[1], order).item()
    magnitudes = torch.cat(grads).to(torch.complex128).abs().numpy().astype(np.longdouble)
    assert norm == pytest.approx(float(np.linalg.norm(magnitudes, order)), rel=1e-12)


@pytest.mark.parametrize("order", [1.0, 1.5, 3.0, 50.0, INF, -1.0, -3.0, -INF])
@pytest.mark.parametrize("value", [3e38, 1e-38])
def test_a_norm_of_any_order_neither_overflows_nor_vanishes(value: float, order: float) -> None:
    grad = torch.full((16,), value)
    norm = reference.power_norm([grad], reference.measure([grad])[1], order).item()
    factor = 1.0 if math.isinf(order) else 16 ** (1 / order)
    assert norm == pytest.approx(factor * grad[0].item(), rel=1e-12)


@pytest.mark.parametrize("order", [0.0, 1.0, 3.0, INF, -1.0, -INF])
@pytest.mark.parametrize("odd", [NAN, INF, 0.0])
def test_a_norm_of_any_order_treats_odd_elements_as_torch_does(odd: float, order: float) -> None:
    grad = torch.tensor([1.0, odd, 2.0], dtype=torch.float64)
    norm = reference.power_norm([grad], reference.measure([grad])[1], order)
    expected = torch.linalg.vector_norm(grad, order)
    torch.testing.assert_close(norm, expected, equal_nan=True)


@pytest.mark.parametrize("order", [0.0, 1.0, 2.0, 3.0, INF, -1.0, -INF])
def test_a_norm_of_any_order_of_nothing_is_0(order: float) -> None:
    grads = [torch.zeros(0), torch.zeros(0, 3)]
    assert reference.power_norm(grads, reference.measure(grads)[1], order).item() == 0


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    grads = [
        randn(300_001),
        randn(500, 501).t(),
        randn(200_000, dtype=torch.complex64),
        randn(90_000, 2)[:, 0],
    ]
    torch.set_num_threads(1)
    alone = reference.measure(grads)[0]
    torch.set_num_threads(threads)
    assert same_bits(reference.measure(grads)[0], alone)


@pytest.mark.parametrize("dtype", [*REAL, torch.complex64], ids=str)
@pytest.mark.parametrize("nonfinite", ["keep", "zero", "propagate"])
def test_nothing_waits_for_a_device(nonfinite: str, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        grads = [torch.ones(5, dtype=dtype, device="cuda"), torch.ones(4, 3, dtype=dtype, device="cuda").t()]
        coefs = torch.ones(2, dtype=torch.float64, device="cuda")
        with no_host_read():
            rows, total, _ = reference.clip_(grads, 1.0, None, 0.0, INF, nonfinite)
            reference.apply_(grads, rows, coefs, 0.5 if not dtype.is_complex else INF, nonfinite)
            for order in (0.0, 1.0, 3.0, INF, -INF):
                reference.power_norm(grads, total, order)


_PEAK = """
import resource, sys, torch
from gradkern import ops, reference
torch.set_num_threads(1)
numel, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
small = torch.ones(1 << 15, dtype=dtype)
grad = torch.ones(numel, dtype=dtype)
{0}([small.clone()])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{0}([grad])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
_CALLS = {
    "measuring": "reference.measure",
    "clipping": "(lambda grads: reference.clip_(grads, 1.0, None, 0.0, 1e-5, 'zero'))",
}


def _peak_mib(call: str, numel: int, dtype: str) -> float:
    """MiB by which the highest memory ever in use rises by one call on a gradient of ones."""
    command = [sys.executable, "-c", _PEAK.format(_CALLS[call]), str(numel), dtype]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("call", _CALLS)
def test_a_gradient_of_256_mib_takes_less_than_64_mib_more(call: str) -> None:
    assert _peak_mib(call, 1 << 26, "float32") < 64


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("call", _CALLS)
def test_a_gradient_of_2_gib_takes_less_than_64_mib_more(call: str) -> None:
    assert _peak_mib(call, 1 << 29, "float32") < 64
