from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern
from gradkern import NonFiniteGradientError
from tests.backends import Backend
from tests.helpers import COMPLEX, HALVES, INF, NAN, REAL, elements, exact_norm, parameters, randn, same_bits
from tests.no_sync import no_host_read

ORDERS = [2.0, 1.0, 3.0, 0.5, INF, -INF, -1.0, "inf", 2]
# How far torch itself may be from exact: sums of float32, norms and coefficients rounded to half.
TORCH_RTOL = {
    torch.float32: 1e-5,
    torch.float64: 1e-13,
    torch.bfloat16: 0.02,
    torch.float16: 2e-3,
    torch.complex64: 1e-5,
    torch.complex128: 1e-13,
}

FUNCTIONS = ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"]


def healthy(dtype: torch.dtype) -> list[Tensor]:
    return [randn(30, dtype=dtype), randn(4, 5, dtype=dtype, seed=1), randn(1, dtype=dtype, seed=2)]


def clones(grads: list[Tensor]) -> list[Tensor]:
    return [grad.clone() for grad in grads]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_those_of_torch(name: str) -> None:
    ours = inspect.signature(getattr(gradkern, name)).parameters
    theirs = inspect.signature(getattr(torch.nn.utils, name)).parameters
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


# Where torch is right.


@pytest.mark.parametrize("norm_type", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_clipping_by_norm_agrees_with_torch(
    max_norm: float, dtype: torch.dtype, norm_type: float, backend: Backend
) -> None:
    ours, theirs = healthy(dtype), healthy(dtype)
    norm = gradkern.clip_grad_norm_(parameters(ours), max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(parameters(theirs), max_norm, norm_type)
    rtol = TORCH_RTOL[dtype]
    torch.testing.assert_close(norm, expected, rtol=rtol, atol=0, check_dtype=dtype not in HALVES)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=0)


@pytest.mark.parametrize("norm_type", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
def test_the_total_norm_agrees_with_torch(dtype: torch.dtype, norm_type: float, backend: Backend) -> None:
    norm = gradkern.get_total_norm(healthy(dtype), norm_type)
    expected = torch.nn.utils.get_total_norm(healthy(dtype), norm_type)
    torch.testing.assert_close(
        norm, expected, rtol=TORCH_RTOL[dtype], atol=0, check_dtype=dtype not in HALVES
    )


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
def test_clipping_by_a_known_norm_agrees_with_torch(dtype: torch.dtype, backend: Backend) -> None:
    ours, theirs = healthy(dtype), healthy(dtype)
    norm = torch.tensor(7.0, dtype=torch.float64)
    gradkern.clip_grads_with_norm_(parameters(ours), 3.0, norm)
    torch.nn.utils.clip_grads_with_norm_(parameters(theirs), 3.0, norm)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=TORCH_RTOL[dtype], atol=0)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("clip_value", [0.5, 0.1, 0.0, 100.0])
def test_clipping_by_value_gives_the_bits_of_torch(
    clip_value: float, dtype: torch.dtype, backend: Backend
) -> None:
    ours = [*healthy(dtype), torch.tensor([NAN, INF, -INF, 0.0], dtype=dtype)]
    theirs = clones(ours)
    assert gradkern.clip_grad_value_(parameters(ours), clip_value) is None
    torch.nn.utils.clip_grad_value_(parameters(theirs), clip_value)
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(elements([one]), elements([other]), equal_nan=True)


@pytest.mark.parametrize("coef_of_torch", ["clip_grad_norm_", "clip_grads_with_norm_"])
def test_the_coefficient_has_the_small_addend_of_torch(coef_of_torch: str, backend: Backend) -> None:
    grad = torch.tensor([3e-6, 4e-6], dtype=torch.float64)
    if coef_of_torch == "clip_grad_norm_":
        gradkern.clip_grad_norm_(parameters([grad]), 1e-6)
    else:
        gradkern.clip_grads_with_norm_(parameters([grad]), 1e-6, 5e-6)
    assert grad.tolist() == pytest.approx([3e-6 / 6, 4e-6 / 6], rel=1e-12)


@pytest.mark.parametrize("odd", [[INF], [NAN], [INF, NAN]], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, INF])
def test_nan_and_inf_propagate_as_in_torch(norm_type: float, odd: list[float], backend: Backend) -> None:
    ours = [torch.tensor([300.0, *odd, -400.0]), torch.tensor([1200.0])]
    theirs = clones(ours)
    norm = gradkern.clip_grad_norm_(parameters(ours), 1.0, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(parameters(theirs), 1.0, norm_type)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    assert np.array_equal(elements(ours), elements(theirs), equal_nan=True)


@pytest.mark.parametrize("name", ["clip_grad_norm_", "get_total_norm"])
def test_no_gradients_have_a_norm_of_0(name: str, backend: Backend) -> None:
    function = getattr(gradkern, name)
    norms = [function([], 1.0)]
    if name == "clip_grad_norm_":
        norms.append(function(parameters([None, None]), 1.0))
    assert [(norm.item(), norm.dtype, norm.shape) for norm in norms] == [(0.0, torch.float32, ())] * len(
        norms
    )


def test_a_single_tensor_is_enough(backend: Backend) -> None:
    (parameter,) = parameters([torch.tensor([3.0, -4.0])])
    assert gradkern.clip_grad_norm_(parameter, 1.0).item() == 5.0
    gradkern.clip_grad_value_(parameter, 0.7)
    gradkern.clip_grads_with_norm_(parameter, 1.0, torch.tensor(2.0))
    assert parameter.grad.tolist() == pytest.approx([0.3, -0.35], rel=1e-5)
    assert gradkern.get_total_norm(parameter.grad, 1.0).item() == pytest.approx(0.65, rel=1e-5)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_changes_nothing(foreach: bool | None, backend: Backend) -> None:
    grads = [torch.tensor([3.0, -4.0]), torch.sparse_coo_tensor([[0]], [12.0], (3,))]
    params = [grad.new_zeros(grad.shape) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    assert gradkern.get_total_norm(grads, foreach=foreach).item() == 13.0
    assert gradkern.clip_grad_norm_(params, 6.5, foreach=foreach).item() == 13.0
    gradkern.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0), foreach=foreach)
    gradkern.clip_grad_value_(params, 0.8, foreach=foreach)
    assert grads[0].tolist() == pytest.approx([0.75, -0.8], rel=1e-6)
    assert grads[1].to_dense()[0].item() == pytest.approx(0.8)


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_an_exhausted_generator_is_warned_of(name: str, backend: Backend) -> None:
    walked = (parameter for parameter in ())
    with pytest.warns(UserWarning, match=f"^{name}: parameters is a generator with nothing left") as caught:
        getattr(gradkern, name)(walked, 1.0)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(gradkern, name)([], 1.0)


@pytest.mark.parametrize("max_norm", [2.5, "2.5", torch.tensor(2.5), np.float64(2.5)], ids=repr)
def test_max_norm_may_be_all_that_torch_takes(max_norm: object, backend: Backend) -> None:
    (parameter,) = parameters([torch.tensor([3.0, -4.0])])
    gradkern.clip_grad_norm_(parameter, max_norm)
    assert parameter.grad.tolist() == pytest.approx([1.5, -2.0], rel=1e-6)


# The dtype of the norm.


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32], torch.float32),
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.complex64], torch.float32),
        ([torch.float64], torch.float64),
        ([torch.bfloat16, torch.float64], torch.float64),
        ([torch.complex128], torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])
def test_the_norm_has_the_dtype_of_torch_but_at_least_float32(
    norm_type: float, dtypes: list[torch.dtype], expected: torch.dtype, backend: Backend
) -> None:
    grads = [torch.ones(2, dtype=dtype) for dtype in dtypes]
    assert gradkern.get_total_norm(grads, norm_type).dtype == expected
    assert gradkern.clip_grad_norm_(parameters(grads), 1.0, norm_type).dtype == expected
    assert gradkern.clip_grad_norm_(list(zip("ab", parameters(grads), strict=False)), 1.0).dtype == expected


def test_a_norm_beyond_float32_comes_back_in_float64(backend: Backend) -> None:
    grads = [torch.full((4,), 3e38)]
    for norm in (gradkern.get_total_norm(grads), gradkern.clip_grad_norm_(parameters(grads), 1.0)):
        assert norm.dtype == torch.float64
        assert norm.item() == pytest.approx(6e38, rel=1e-7)


# Defects of torch, one by one.


def test_elements_of_1e20_are_clipped_and_not_lost(backend: Backend) -> None:
    grad = torch.full((4,), 1e20)
    assert gradkern.clip_grad_norm_(parameters([grad]), 1.0).item() == pytest.approx(2e20)
    assert grad.tolist() == [0.5] * 4


def test_elements_of_1e_25_have_a_norm(backend: Backend) -> None:
    assert gradkern.get_total_norm([torch.full((4,), 1e-25)]).item() == pytest.approx(2e-25)


def test_a_norm_beyond_float16_is_finite(backend: Backend) -> None:
    grad = torch.full((4,), 60000.0, dtype=torch.float16)
    assert gradkern.clip_grad_norm_(parameters([grad]), 2.0).item() == 120000.0
    assert grad.tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_neither_norm_nor_coefficient_is_rounded_to_half(dtype: torch.dtype, backend: Backend) -> None:
    grad = randn(10_000, dtype=dtype)
    norm = gradkern.clip_grad_norm_(parameters([grad]), 0.77)
    assert norm.item() == pytest.approx(exact_norm([randn(10_000, dtype=dtype)]), rel=2**-24)
    assert exact_norm([grad]) == pytest.approx(0.77, rel=2**-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_norm_of_many_elements_does_not_drift(dtype: torch.dtype, backend: Backend) -> None:
    grad = torch.full((1 << 22,), 1.411, dtype=dtype)
    assert gradkern.get_total_norm([grad]).item() == pytest.approx(2048 * grad[0].item(), rel=2**-24)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])
@pytest.mark.parametrize("odd", [INF, NAN])
def test_with_a_limit_of_inf_nothing_is_ever_written(odd: float, norm_type: float, backend: Backend) -> None:
    grad = torch.tensor([3.0, odd, -4.0])
    before = grad.clone()
    norm = gradkern.clip_grad_norm_(parameters([grad]), INF, norm_type)
    gradkern.clip_grads_with_norm_(parameters([grad]), INF, norm)
    assert same_bits(grad, before)
    assert grad._version == 0
    assert not norm.isfinite()


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.0, 3.0, INF, -INF, -1.0])
def test_an_empty_tensor_contributes_nothing_to_any_norm(norm_type: float, backend: Backend) -> None:
    full, empty = torch.tensor([3.0, -4.0]), torch.zeros(0, 3)
    norm = gradkern.clip_grad_norm_(parameters([empty, full]), 1e6, norm_type)
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(full, norm_type).item())
    assert gradkern.get_total_norm([empty], norm_type).item() == 0.0


def test_without_any_gradient_clipping_by_value_does_nothing(backend: Backend) -> None:
    assert gradkern.clip_grad_value_(parameters([None, None]), 1.0) is None
    assert gradkern.clip_grads_with_norm_(parameters([None]), 1.0, torch.tensor(2.0)) is None


def test_sparse_gradients_work(backend: Backend) -> None:
    embedding = nn.Embedding(10, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    assert gradkern.clip_grad_norm_(embedding.parameters(), 1.0).item() == pytest.approx(math.sqrt(10))
    gradkern.clip_grad_value_(embedding.parameters(), 0.5)
    assert embedding.weight.grad.is_sparse
    assert embedding.weight.grad.to_dense().max().item() == 0.5


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, INF])
def test_a_parameter_that_is_passed_twice_counts_once(norm_type: float, backend: Backend) -> None:
    (parameter,) = parameters([torch.tensor([3.0, -4.0])])
    alone = gradkern.get_total_norm([parameter.grad], norm_type).item()
    assert gradkern.clip_grad_norm_([parameter, parameter], alone / 2, norm_type).item() == alone
    assert parameter.grad.tolist() == pytest.approx([1.5, -2.0], rel=1e-5)


def test_order_0_counts_the_elements_that_are_not_0(backend: Backend) -> None:
    grads = [torch.tensor([3.0, 0.0, -4.0]), torch.tensor([1.0, 1.0, NAN]), torch.zeros(4)]
    assert gradkern.get_total_norm(grads[:1], 0).item() == 2.0
    assert gradkern.get_total_norm([*grads[:1], torch.ones(5)], 0).item() == 7.0


@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])
@pytest.mark.parametrize("name", ["clip_grad_norm_", "get_total_norm"])
def test_a_non_finite_norm_names_its_parameters(name: str, norm_type: float, backend: Backend) -> None:
    grads = [torch.tensor([3.0]), torch.tensor([INF, NAN, NAN])]
    call: Callable[[], object] = {
        "clip_grad_norm_": lambda: gradkern.clip_grad_norm_(
            parameters(grads), 1.0, norm_type, error_if_nonfinite=True
        ),
        "get_total_norm": lambda: gradkern.get_total_norm(grads, norm_type, error_if_nonfinite=True),
    }[name]
    kind = "parameters" if name == "clip_grad_norm_" else "grads"
    with pytest.raises(NonFiniteGradientError) as caught:
        call()
    assert str(caught.value) == (
        f"{name}: 1 of 2 gradients are not finite; nothing was written.\n"
        f"  '{kind}[1]': 2 NaN, 1 Inf\n"
        "Pass error_if_nonfinite=False to clip all the same, with torch's arithmetic."
    )
    assert [grad._version for grad in grads] == [0, 0]


def test_a_norm_beyond_float64_is_an_error_that_blames_no_element(backend: Backend) -> None:
    grad = torch.full((4,), 1e200, dtype=torch.float64)
    with pytest.raises(NonFiniteGradientError) as caught:
        gradkern.clip_grad_norm_(parameters([grad]), 1.0, error_if_nonfinite=True)
    assert str(caught.value) == (
        "clip_grad_norm_: the norm of order 2.0 is beyond float64, although all elements are finite; "
        "nothing was written.\nPass error_if_nonfinite=False to clip all the same, with torch's arithmetic."
    )
    assert grad.tolist() == [1e200] * 4


def test_healthy_gradients_pass_the_check(backend: Backend) -> None:
    grad = torch.tensor([3.0, -4.0])
    assert gradkern.clip_grad_norm_(parameters([grad]), 2.5, error_if_nonfinite=True).item() == 5.0
    assert grad.tolist() == pytest.approx([1.5, -2.0], rel=1e-6)


# Wrong calls.

NO_LIMIT = "Pass a number from 0 up; float('inf') sets no limit."


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda p: gradkern.clip_grad_norm_(p, -1.0),
            ValueError,
            f"clip_grad_norm_: max_norm must not be negative, got -1.0. {NO_LIMIT}",
        ),
        (
            lambda p: gradkern.clip_grads_with_norm_(p, NAN, torch.tensor(1.0)),
            ValueError,
            f"clip_grads_with_norm_: max_norm must not be NaN, got nan. {NO_LIMIT}",
        ),
        (
            lambda p: gradkern.clip_grad_value_(p, -0.5),
            ValueError,
            f"clip_grad_value_: clip_value must not be negative, got -0.5. {NO_LIMIT}",
        ),
        (
            lambda p: gradkern.clip_grad_norm_(p, 1.0, "two"),
            TypeError,
            "clip_grad_norm_: norm_type must be a number, got 'two'.",
        ),
        (
            lambda p: gradkern.clip_grad_norm_(p, 1.0, NAN),
            ValueError,
            "clip_grad_norm_: norm_type must not be NaN; the usual ones are 2.0, 1.0, inf.",
        ),
        (
            lambda p: gradkern.clip_grad_norm_([p, 1], 1.0),
            TypeError,
            "clip_grad_norm_: parameters[1] is of type int; gradkern needs parameters as tensors or "
            "(name, tensor) pairs, or a module.",
        ),
        (
            lambda p: gradkern.clip_grad_norm_(p, None),
            TypeError,
            "clip_grad_norm_: max_norm must be a number, got None; float('inf') sets no limit.",
        ),
        (
            lambda p: gradkern.clip_grad_value_(p, None),
            TypeError,
            "clip_grad_value_: clip_value must be a number, got None; float('inf') sets no limit.",
        ),
        (
            lambda p: gradkern.clip_grads_with_norm_(p, 1.0, None),
            TypeError,
            "clip_grads_with_norm_: total_norm must be a number, got None.",
        ),
        (
            lambda p: gradkern.clip_grads_with_norm_(p, 1.0, torch.ones(2)),
            ValueError,
            "clip_grads_with_norm_: total_norm must be a number or a real 0-dim tensor, got float32 [2], "
            "cpu.",
        ),
        (
            lambda p: gradkern.clip_grads_with_norm_(p, 1.0, torch.tensor(9.0, device="meta")),
            ValueError,
            "clip_grads_with_norm_: total_norm is on the meta device, which holds no value, while the "
            "gradients have some. Pass the norm that get_total_norm returns for these gradients.",
        ),
    ],
)
def test_a_wrong_argument_is_refused_and_nothing_is_written(
    call: Callable[[nn.Parameter], object], error: type[Exception], message: str, backend: Backend
) -> None:
    (parameter,) = parameters([torch.tensor([3.0, -4.0])])
    with pytest.raises(error) as caught:
        call(parameter)
    assert str(caught.value) == message
    assert parameter.grad.tolist() == [3.0, -4.0]


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"])
def test_a_gradient_that_cannot_be_written_is_named(name: str, backend: Backend) -> None:
    good, bad = parameters([torch.tensor([3.0, -4.0]), torch.ones(1).expand(3)])
    rest = (torch.tensor(2.0),) if name == "clip_grads_with_norm_" else ()
    with pytest.raises(
        TypeError, match=rf"^{name}: gradient of 'parameters\[1\]' \(float32 \[3\], cpu\) has"
    ):
        getattr(gradkern, name)([good, bad], 0.5, *rest)
    assert good.grad.tolist() == [3.0, -4.0]


def test_complex_gradients_cannot_be_clipped_by_value(backend: Backend) -> None:
    with pytest.raises(TypeError, match=r"^clip_grad_value_: gradient of 'parameters\[0\]'.* is complex"):
        gradkern.clip_grad_value_(parameters([torch.tensor([1j])]), 0.5)


# Devices and graphs.


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.0, 3.0, INF, -INF])
def test_nothing_waits_for_a_device(norm_type: float) -> None:
    with FakeTensorMode():
        params = parameters([torch.ones(3, device="cuda"), torch.ones(4, 2, device="cuda").t()])
        grads = [parameter.grad for parameter in params]
        limit = torch.ones((), device="cuda")
        with no_host_read():
            norm = gradkern.get_total_norm(grads, norm_type)
            clipped = gradkern.clip_grad_norm_(params, limit, norm_type)
            gradkern.clip_grads_with_norm_(params, 1.0, norm)
            gradkern.clip_grad_value_(params, 0.5)
    assert {(found.device.type, found.dtype) for found in (norm, clipped)} == {("cuda", torch.float32)}


@pytest.mark.parametrize("norm_type", [2.0, 3.0, INF])
def test_compiled_functions_are_one_graph_and_equal_eager(norm_type: float) -> None:
    def step(params: list[nn.Parameter]) -> Tensor:
        norm = gradkern.clip_grad_norm_(params, 1.0, norm_type)
        gradkern.clip_grads_with_norm_(params, 1.0, norm)
        gradkern.clip_grad_value_(params, 0.01)
        return norm + gradkern.get_total_norm([parameter.grad for parameter in params], norm_type)

    one, other = parameters(healthy(torch.float32)), parameters(healthy(torch.float32))
    torch._dynamo.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(one)
    torch.testing.assert_close(found, step(other), rtol=1e-6, atol=0)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2**-23, atol=0)
