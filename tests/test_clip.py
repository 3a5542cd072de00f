from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern
from gradkern import GradStats, NonFiniteGradientError, ops
from tests.backends import Backend
from tests.helpers import HALVES, INF, NAN, REAL, elements, exact_norm, parameters, randn, same_bits
from tests.no_sync import HostReadError, no_host_read

WORDS = ["keep", "zero", "propagate"]
WORDS_AND_RAISE = [*WORDS, "raise"]
EPS = {torch.float32: 2**-23, torch.float64: 2**-52, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20))
    made(randn(16, 30)).square().sum().backward()
    return made


def grads_of(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
def test_the_joint_norm_becomes_max_norm(nonfinite: str, dtype: torch.dtype, backend: Backend) -> None:
    grads = [randn(300, dtype=dtype), randn(70_000, dtype=dtype, seed=1), randn(4, 5, dtype=dtype, seed=2)]
    norm = exact_norm(grads)
    stats = gradkern.clip_(parameters(grads), 1.5, nonfinite=nonfinite)
    assert stats.norm.item() == pytest.approx(norm, rel=1e-14)
    assert stats.coef.item() == pytest.approx(1.5 / norm, rel=1e-14)
    assert exact_norm(grads) == pytest.approx(1.5, rel=EPS[dtype] / 4)


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
def test_a_norm_within_its_limit_changes_no_bit_and_no_version(nonfinite: str, backend: Backend) -> None:
    grads = [randn(300), randn(40, dtype=torch.bfloat16), torch.tensor([-0.0, 0.0])]
    before = [grad.clone() for grad in grads]
    norm = exact_norm(grads)
    for limits in ({"max_norm": 1.001 * norm}, {"max_norm": INF}, {"clip_value": 1e3}):
        stats = gradkern.clip_(parameters(grads), nonfinite=nonfinite, **limits)
        assert stats.coef.item() == 1.0
    assert all(same_bits(grad, old) for grad, old in zip(grads, before, strict=True))
    assert [grad._version for grad in grads] == [0, 0, 0]


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
def test_only_written_gradients_have_a_new_version(nonfinite: str, backend: Backend) -> None:
    grads = [torch.zeros(3), torch.ones(3), torch.zeros(0)]
    gradkern.clip_(parameters(grads), 1.0, nonfinite=nonfinite)
    assert [grad._version for grad in grads] == [0, 1, 0]


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_values_are_clamped_after_the_norm(dtype: torch.dtype, backend: Backend) -> None:
    grad = torch.tensor([30.0, -40.0, 0.0], dtype=dtype)
    gradkern.clip_(parameters([grad]), 5.0, clip_value=3.5)
    expected = torch.tensor([3.0, -3.5, 0.0], dtype=dtype)
    torch.testing.assert_close(grad, expected, rtol=EPS[dtype], atol=0)
    assert grad[1] == expected[1]


def test_by_value_alone_the_limit_of_the_article_works(backend: Backend) -> None:
    grad = torch.tensor([0.75, -0.25, -3.0])
    stats = gradkern.clip_(parameters([grad]), clip_value=0.5)
    assert grad.tolist() == [0.5, -0.25, -0.5]
    assert stats.coef.item() == 1.0
    assert stats.abs_max.item() == 3.0


def test_a_limit_of_0_makes_everything_0(backend: Backend) -> None:
    grads = [torch.tensor([3.0, -4.0]), torch.tensor([5.0])]
    gradkern.clip_(parameters(grads[:1]), 0.0)
    gradkern.clip_(parameters(grads[1:]), clip_value=0.0)
    assert [grad.abs().sum().item() for grad in grads] == [0.0, 0.0]


@pytest.mark.parametrize(
    "limit", [2.5, torch.tensor(2.5), torch.tensor(2.5, dtype=torch.float64), np.float32(2.5)]
)
def test_max_norm_may_be_a_number_of_any_kind(limit: object, backend: Backend) -> None:
    grad = torch.tensor([3.0, -4.0])
    assert gradkern.clip_(parameters([grad]), limit).coef.item() == 0.5
    assert grad.tolist() == [1.5, -2.0]


# Defects of torch's clipping, and what is right, with each word for NaN and Inf.


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
def test_elements_of_1e20_are_clipped_and_not_lost(nonfinite: str, backend: Backend) -> None:
    grad = torch.full((4,), 1e20)
    stats = gradkern.clip_(parameters([grad]), 1.0, nonfinite=nonfinite)
    assert stats.norm.item() == pytest.approx(2e20, rel=1e-7)
    assert grad.tolist() == [0.5] * 4


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
def test_four_elements_at_the_largest_float32_are_clipped(nonfinite: str, backend: Backend) -> None:
    grad = torch.full((4,), 3e38)
    assert gradkern.clip_(parameters([grad]), 1.0, nonfinite=nonfinite).norm.item() == pytest.approx(6e38)
    assert grad.tolist() == [0.5] * 4


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
def test_elements_of_1e_25_have_a_norm(nonfinite: str, backend: Backend) -> None:
    grad = torch.full((4,), 1e-25)
    assert gradkern.clip_(parameters([grad]), 1e-25, nonfinite=nonfinite).norm.item() == pytest.approx(2e-25)
    assert grad.tolist() == pytest.approx([0.5e-25] * 4, rel=1e-7)


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
def test_a_norm_beyond_float16_is_finite(nonfinite: str, backend: Backend) -> None:
    grad = torch.full((4,), 60000.0, dtype=torch.float16)
    assert gradkern.clip_(parameters([grad]), 2.0, nonfinite=nonfinite).norm.item() == 120000.0
    assert grad.tolist() == [1.0] * 4


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_neither_norm_nor_coefficient_is_rounded_to_half(
    dtype: torch.dtype, nonfinite: str, backend: Backend
) -> None:
    grad = randn(10_000, dtype=dtype)
    norm = exact_norm([grad])
    stats = gradkern.clip_(parameters([grad]), 0.77, nonfinite=nonfinite)
    assert stats.norm.item() == pytest.approx(norm, rel=1e-14)
    assert exact_norm([grad]) == pytest.approx(0.77, rel=2**-11)


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_norm_of_many_elements_does_not_drift(
    dtype: torch.dtype, nonfinite: str, backend: Backend
) -> None:
    grad = torch.full((1 << 22,), 1.411, dtype=dtype)
    stats = gradkern.clip_(parameters([grad]), INF, nonfinite=nonfinite)
    assert stats.norm.item() == pytest.approx(2048 * grad[0].item(), rel=1e-12)


ODD = [([INF], "Inf"), ([-INF], "-Inf"), ([NAN], "NaN"), ([INF, NAN, -INF], "all")]
ODD_PARAMS = pytest.mark.parametrize("odd", [odd for odd, _ in ODD], ids=[name for _, name in ODD])


@ODD_PARAMS
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_keep_clips_what_is_finite_and_leaves_the_rest(
    dtype: torch.dtype, odd: list[float], backend: Backend
) -> None:
    grads = [torch.tensor([300.0, *odd, -400.0], dtype=dtype), torch.tensor([1200.0], dtype=dtype)]
    stats = gradkern.clip_(parameters(grads), 1.0)
    values = elements(grads)
    assert stats.finite_norm.item() == 1300.0
    assert stats.norm.item() == INF or math.isnan(stats.norm.item())
    assert np.array_equal(values[1:-2], odd, equal_nan=True)
    assert np.linalg.norm(values[np.isfinite(values)]) == pytest.approx(1.0, rel=EPS[dtype])


@ODD_PARAMS
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_zero_clips_what_is_finite_and_zeroes_the_rest(
    dtype: torch.dtype, odd: list[float], backend: Backend
) -> None:
    grads = [torch.tensor([300.0, *odd, -400.0], dtype=dtype), torch.tensor([1200.0], dtype=dtype)]
    gradkern.clip_(parameters(grads), 1.0, nonfinite="zero")
    values = elements(grads)
    assert np.array_equal(values[1:-2], np.zeros(len(odd)))
    assert np.linalg.norm(values) == pytest.approx(1.0, rel=EPS[dtype])


def test_zero_without_a_limit_only_zeroes(backend: Backend) -> None:
    grads = [torch.tensor([300.0, NAN]), torch.tensor([7.0])]
    gradkern.clip_(parameters(grads), nonfinite="zero")
    assert [grad.tolist() for grad in grads] == [[300.0, 0.0], [7.0]]
    assert [grad._version for grad in grads] == [1, 0]


@ODD_PARAMS
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_propagate_does_what_torch_does(dtype: torch.dtype, odd: list[float], backend: Backend) -> None:
    ours = [torch.tensor([300.0, *odd, -400.0], dtype=dtype), torch.tensor([1200.0], dtype=dtype)]
    theirs = [grad.clone() for grad in ours]
    gradkern.clip_(parameters(ours), 1.0, nonfinite="propagate")
    torch.nn.utils.clip_grad_norm_(parameters(theirs), 1.0)
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(ours, theirs, strict=True))
    assert any(grad.isnan().any() for grad in ours)


@ODD_PARAMS
@pytest.mark.parametrize("nonfinite", WORDS)
def test_by_value_odd_elements_follow_the_word(nonfinite: str, odd: list[float], backend: Backend) -> None:
    grad = torch.tensor([3.0, *odd, -4.0])
    gradkern.clip_(parameters([grad]), clip_value=0.5, nonfinite=nonfinite)
    expected = {
        "keep": odd,
        "zero": [0.0] * len(odd),
        "propagate": [x if math.isnan(x) else math.copysign(0.5, x) for x in odd],
    }[nonfinite]
    assert np.array_equal(elements([grad]), [0.5, *expected, -0.5], equal_nan=True)


@ODD_PARAMS
@pytest.mark.parametrize("nonfinite", WORDS)
def test_without_a_limit_on_the_norm_an_inf_harms_nothing(
    nonfinite: str, odd: list[float], backend: Backend
) -> None:
    grad = torch.tensor([3.0, *odd, -4.0])
    gradkern.clip_(parameters([grad]), INF, nonfinite=nonfinite)
    expected = [0.0] * len(odd) if nonfinite == "zero" else odd
    assert np.array_equal(elements([grad]), [3.0, *expected, -4.0], equal_nan=True)


@pytest.mark.parametrize("nonfinite", ["keep", "zero"])
@pytest.mark.parametrize("large", [1e10, 1e30, 3e38])
def test_beside_an_inf_the_finite_part_never_exceeds_max_norm(
    large: float, nonfinite: str, backend: Backend
) -> None:
    grads = [torch.full((1000,), large), torch.tensor([INF, 1.0])]
    gradkern.clip_(parameters(grads), 1.0, nonfinite=nonfinite)
    assert exact_norm(grads) == pytest.approx(1.0, rel=1e-7)


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
def test_empty_tensors_contribute_nothing(nonfinite: str, backend: Backend) -> None:
    grads = [torch.zeros(0), torch.tensor([3.0, -4.0]), torch.zeros(3, 0, 2)]
    stats = gradkern.clip_(parameters(grads), 1.0, clip_value=0.7, nonfinite=nonfinite)
    assert stats.per_tensor.norm.tolist() == [0.0, 5.0, 0.0]
    assert grads[1].tolist() == pytest.approx([0.6, -0.7])


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
@pytest.mark.parametrize("params", [[], [None], [None, None]], ids=["no parameters", "one", "two"])
def test_without_any_gradient_there_is_nothing_to_do(
    params: list[None], nonfinite: str, backend: Backend
) -> None:
    for limits in ({"max_norm": 1.0}, {"clip_value": 1.0}):
        stats = gradkern.clip_(parameters(params), nonfinite=nonfinite, **limits)
        assert (stats.names, float(stats), stats.coef.item(), stats.clipped_norm.item()) == (
            [],
            0.0,
            1.0,
            0.0,
        )


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
def test_zero_gradients_stay_as_they_are(nonfinite: str, backend: Backend) -> None:
    grad = torch.tensor([0.0, -0.0])
    stats = gradkern.clip_(parameters([grad]), 0.0, clip_value=0.0, nonfinite=nonfinite)
    assert same_bits(grad, torch.tensor([0.0, -0.0]))
    assert (grad._version, stats.coef.item()) == (0, 1.0)


@pytest.mark.parametrize("nonfinite", WORDS_AND_RAISE)
def test_sparse_gradients_are_clipped_by_their_coalesced_values(nonfinite: str, backend: Backend) -> None:
    embedding = nn.Embedding(10, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    grad = embedding.weight.grad
    assert not grad.is_coalesced()
    stats = gradkern.clip_(embedding, 1.0, nonfinite=nonfinite)
    assert stats.norm.item() == pytest.approx(math.sqrt(10))
    assert embedding.weight.grad is grad
    assert grad.to_dense().norm().item() == pytest.approx(1.0)
    assert grad.to_dense()[1].tolist() == pytest.approx([2 / math.sqrt(10)] * 2)


# What must work.


def _gap(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 1e6)], -1)[..., 0]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "0-dim": lambda: torch.tensor(3.0),
    "channels last": lambda: randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last 3d": lambda: randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "permuted": lambda: randn(4, 5, 6).permute(2, 0, 1),
    "transposed": lambda: randn(300, 301).t(),
    "odd offset": lambda: randn(1001)[1:],
    "odd bytes": lambda: torch.frombuffer(
        bytearray(b"_") + randn(1000).numpy().tobytes(), offset=1, dtype=torch.float32
    ),
    "odd halves": lambda: randn(1001, dtype=torch.bfloat16)[1:],
    "gaps": lambda: _gap(randn(300, 301)),
    "every other row": lambda: randn(300, 31)[::2],
    "sparse": lambda: randn(20, 3).to_sparse(),
    "sparse rows": lambda: randn(20, 3).to_sparse(1),
    "complex": lambda: randn(300, dtype=torch.complex64),
    "float64": lambda: randn(300, dtype=torch.float64),
    "negated view": lambda: torch.imag(randn(300, dtype=torch.complex64).conj()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_clipped_as_if_it_were_contiguous(layout: str, backend: Backend) -> None:
    grad = LAYOUTS[layout]()
    before = grad.clone().to_dense().to(torch.complex128)
    norm = before.abs().square().sum().sqrt().item()
    (parameter,) = parameters([None])
    wrapped = torch.zeros(grad.shape, dtype=grad.dtype)
    wrapped.grad = grad
    stats = gradkern.clip_([wrapped, parameter], norm / 2)
    assert stats.norm.item() == pytest.approx(norm, rel=1e-14)
    assert wrapped.grad is grad
    after = grad.clone().to_dense().to(torch.complex128)
    torch.testing.assert_close(after, before / 2, rtol=2**-8 if grad.dtype in HALVES else 2**-23, atol=0)


def test_all_dtypes_and_layouts_are_clipped_by_one_norm(backend: Backend) -> None:
    grads = [make() for make in LAYOUTS.values()]
    grads += [randn(33, dtype=torch.float16), torch.zeros(0)]
    norm = math.sqrt(sum(grad.to_dense().to(torch.complex128).abs().square().sum().item() for grad in grads))
    stats = gradkern.clip_grads_(grads, 1.0)
    assert stats.norm.item() == pytest.approx(norm, rel=1e-13)
    assert stats.names == [f"grads[{index}]" for index in range(len(grads))]
    after = math.sqrt(sum(grad.to_dense().to(torch.complex128).abs().square().sum().item() for grad in grads))
    assert after == pytest.approx(1.0, rel=1e-3)


def test_gradients_that_require_grad_are_clipped_outside_of_the_graph(backend: Backend) -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    (grad,) = torch.autograd.grad(weight.square().sum() / 2, weight, create_graph=True)
    assert grad.requires_grad
    gradkern.clip_grads_({"w": grad}, 1.0)
    assert grad.tolist() == pytest.approx([0.6, 0.8])
    weight.grad = grad
    assert not gradkern.measure(weight).norm.requires_grad


@pytest.mark.parametrize("inside", [True, False])
def test_inference_tensors_are_clipped_in_and_out_of_inference_mode(inside: bool, backend: Backend) -> None:
    with torch.inference_mode():
        grads = [torch.full((4,), 1.0), torch.full((4, 2), 1.0)[:, 0]]
        if inside:
            gradkern.clip_grads_(grads, 1.0)
    if not inside:
        gradkern.clip_grads_(grads, 1.0)
    assert exact_norm(grads) == pytest.approx(1.0)


def test_ordinary_gradients_are_clipped_in_inference_mode(backend: Backend) -> None:
    (parameter,) = parameters([torch.full((4,), 1.0)])
    with torch.inference_mode():
        gradkern.clip_(parameter, 1.0)
    assert parameter.grad.tolist() == [0.5] * 4


def test_gradients_may_change_places_between_calls(backend: Backend) -> None:
    params = parameters([torch.full((5,), float(k)) for k in range(1, 9)])
    shuffle = random.Random(0)
    for _ in range(5):
        grads = [parameter.grad for parameter in params]
        shuffle.shuffle(grads)
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = grad
        stats = gradkern.clip_(params, 1e9)
        assert stats.per_tensor.abs_max.tolist() == [grad[0].item() for grad in grads]


def test_gradients_themselves_are_clipped_in_place(backend: Backend) -> None:
    flat = torch.tensor([3.0, -4.0])
    stats = gradkern.clip_grads_([("flat", flat), ("none", None)], 1.0)
    assert flat.tolist() == pytest.approx([0.6, -0.8])
    assert stats.names == ["flat"]


def test_measuring_never_writes(backend: Backend) -> None:
    grads = [torch.tensor([3.0, NAN, -4.0]), torch.tensor([INF])]
    stats = gradkern.measure(parameters(grads))
    assert gradkern.measure_grads(grads).finite_norm.item() == stats.finite_norm.item() == 5.0
    assert [grad._version for grad in grads] == [0, 0]


# NaN and Inf as an error.


def test_raise_names_the_worst_gradients_and_writes_nothing(backend: Backend) -> None:
    grads = [torch.tensor([3.0, NAN, NAN]), torch.tensor([1.0]), torch.tensor([INF, NAN, -INF, 1.0])]
    named = dict(zip(["a", "b", "c"], parameters(grads), strict=True))
    before = [grad.clone() for grad in grads]
    with pytest.raises(NonFiniteGradientError) as caught:
        gradkern.clip_(named, 1.0, clip_value=0.1, nonfinite="raise")
    assert str(caught.value) == (
        "clip_: 2 of 3 gradients are not finite; nothing was written.\n"
        "  'c': 1 NaN, 2 Inf\n"
        "  'a': 2 NaN\n"
        "torch.autograd.set_detect_anomaly(True) finds the operation that made a NaN; nonfinite='keep' or "
        "'zero' clips the rest and goes on."
    )
    assert isinstance(caught.value, RuntimeError)
    assert all(same_bits(grad, old) for grad, old in zip(grads, before, strict=True))
    assert [grad._version for grad in grads] == [0, 0, 0]
    assert caught.value.stats["c"].finite_norm.item() == 1.0


def test_raise_lists_ten_and_counts_the_others(backend: Backend) -> None:
    with pytest.raises(NonFiniteGradientError) as caught:
        gradkern.clip_grads_(
            [torch.tensor([NAN])] * 1 + [torch.tensor([INF]) for _ in range(46)], nonfinite="raise"
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "clip_grads_: 47 of 47 gradients are not finite; nothing was written."
    assert lines[1:11] == ["  'grads[0]': 1 NaN"] + [f"  'grads[{index}]': 1 Inf" for index in range(1, 10)]
    assert lines[11] == "  and 37 more"
    assert len(lines) == 13


def test_raise_without_a_limit_only_looks(backend: Backend) -> None:
    grad = torch.tensor([3.0, -4.0])
    stats = gradkern.clip_(parameters([grad]), nonfinite="raise")
    assert (float(stats), stats.coef.item(), grad._version) == (5.0, 1.0, 0)


# Properties.

normal = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
any_float = st.floats(width=32)
lists = st.lists(st.lists(normal, max_size=40), min_size=1, max_size=6)
in_turn = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@in_turn
@given(lists, st.floats(1e-3, 1e3))
def test_clipping_twice_moves_no_element_by_more_than_its_rounding(
    backend: Backend, values: list[list[float]], max_norm: float
) -> None:
    grads = [torch.tensor(row, dtype=torch.float32) for row in values]
    gradkern.clip_grads_(grads, max_norm)
    once = [grad.clone() for grad in grads]
    again = gradkern.clip_grads_(grads, max_norm)
    # The norm may exceed its limit by the rounding of the elements, but by no more.
    assert again.coef.item() >= 1 - 2**-24
    for grad, old in zip(grads, once, strict=True):
        torch.testing.assert_close(grad, old, rtol=2**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_clipping_a_constant_twice_changes_no_bit(dtype: torch.dtype, backend: Backend) -> None:
    grad = torch.full((1000,), 1.411, dtype=dtype)
    gradkern.clip_grads_(grad, 0.1)
    once = grad.clone()
    gradkern.clip_grads_(grad, 0.1)
    assert same_bits(grad, once)


@in_turn
@given(st.lists(any_float, min_size=1, max_size=60), st.data())
def test_any_split_of_the_gradients_gives_the_same_result(
    backend: Backend, values: list[float], data: st.DataObject
) -> None:
    whole = torch.tensor(values, dtype=torch.float32)
    cuts = data.draw(st.lists(st.integers(0, len(values)), max_size=4).map(sorted))
    parts = [part.clone() for part in whole.tensor_split(cuts)]
    joint = gradkern.clip_grads_([whole], 1.0, clip_value=0.5)
    split = gradkern.clip_grads_(parts, 1.0, clip_value=0.5)
    assert split.data[1:].tolist() == joint.data[1:].tolist()
    assert split.data[0].item() == pytest.approx(joint.data[0].item(), rel=1e-15)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=2**-23, atol=1e-44, equal_nan=True)


@in_turn
@given(st.lists(any_float, max_size=60))
def test_whatever_the_input_the_finite_part_is_within_max_norm(backend: Backend, values: list[float]) -> None:
    grad = torch.tensor(values, dtype=torch.float32)
    gradkern.clip_grads_([grad], 1.0)
    assert exact_norm([grad]) <= 1 + 2**-22


@in_turn
@given(st.lists(any_float, max_size=60), st.sampled_from(WORDS))
def test_a_limit_that_is_not_reached_changes_no_bit(
    backend: Backend, values: list[float], nonfinite: str
) -> None:
    grad = torch.tensor(values, dtype=torch.float32)
    if nonfinite != "keep":
        grad = grad.nan_to_num()
    before = grad.clone()
    gradkern.clip_grads_([grad], 1e60, clip_value=3.5e38, nonfinite=nonfinite)
    assert same_bits(grad, before)


# Devices, fake tensors and graphs.


@pytest.mark.parametrize("nonfinite", WORDS)
@pytest.mark.parametrize("dtype", [*REAL, torch.complex64], ids=str)
def test_no_call_waits_for_a_device(dtype: torch.dtype, nonfinite: str) -> None:
    with FakeTensorMode():
        params = parameters([torch.ones(3, dtype=dtype, device="cuda"), torch.ones(4, 2, device="cuda").t()])
        limit = torch.ones((), device="cuda")
        with no_host_read():
            gradkern.clip_(params, 1.0, nonfinite=nonfinite)
            gradkern.clip_(params, limit, nonfinite=nonfinite)
            if not dtype.is_complex:
                gradkern.clip_(params, 1.0, clip_value=0.5, nonfinite=nonfinite)
            norm = gradkern.measure(params).norm
    assert norm.device.type == "cuda"


def test_raise_is_the_word_that_waits() -> None:
    with FakeTensorMode():
        params = parameters([torch.ones(3, device="cuda")])
        with no_host_read(), pytest.raises(HostReadError):
            gradkern.clip_(params, 1.0, nonfinite="raise")


def test_fake_tensors_on_the_cpu_are_clipped_as_in_a_trace(backend: Backend) -> None:
    with FakeTensorMode():
        stats = gradkern.clip_(parameters([torch.ones(3), torch.ones(2, 2)]), 1.0)
        assert stats.clipped_norm.shape == ()
    assert repr(stats) == "GradStats(of 2 tensors on cpu, without values)"


@pytest.mark.parametrize("nonfinite", WORDS)
def test_meta_gradients_are_clipped_without_values(nonfinite: str, backend: Backend) -> None:
    network = nn.Linear(3, 2, device="meta")
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter)
    stats = gradkern.clip_(network, 1.0, clip_value=0.5, nonfinite=nonfinite)
    assert (stats.names, stats.per_tensor.norm.shape) == (["weight", "bias"], (2,))


def test_raise_says_which_meta_gradient_cannot_be_looked_at(backend: Backend) -> None:
    (parameter,) = parameters([torch.ones(3, device="meta")])
    with pytest.raises(RuntimeError) as caught:
        gradkern.clip_({"w": parameter}, 1.0, nonfinite="raise")
    assert str(caught.value) == (
        "clip_: the gradient of 'w' is on the meta device, which holds no values, so there is no number to "
        "read.\nMaterialise the module first, for example with module.to_empty(device=...)."
    )


LIMITS: dict[str, dict[str, object]] = {
    "norm": {"max_norm": 1.0},
    "value": {"clip_value": 0.01},
    "both": {"max_norm": 1.0, "clip_value": 0.01, "nonfinite": "zero"},
    "propagate": {"max_norm": 1.0, "nonfinite": "propagate"},
    "tensor": {"max_norm": torch.tensor(0.7)},
    "no change": {"max_norm": 1e9},
}


def compiled(function: Callable[..., object], backend: str) -> Callable[..., object]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def assert_compiled_equals_eager(limits: dict[str, object], compiler: str) -> None:
    torch.manual_seed(0)
    one = model()
    torch.manual_seed(0)
    other = model()
    found = compiled(lambda: gradkern.clip_(one, **limits), compiler)()
    expected = gradkern.clip_(other, **limits)
    assert isinstance(found, GradStats)
    assert found.names == expected.names
    torch.testing.assert_close(found.rows, expected.rows, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.coef, expected.coef, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.clipped_norm, expected.clipped_norm, rtol=1e-14, atol=0, equal_nan=True)
    torch.testing.assert_close(grads_of(one), grads_of(other), rtol=2**-23, atol=0)


@pytest.fixture(params=["native", "reference"])
def computes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Graphs hold one operator for every instruction set, so two of the backends are enough."""
    if request.param == "reference":
        monkeypatch.setattr(ops, "native", None)
    elif ops.native is None:
        pytest.skip("the extension is not there")
    return request.param


@pytest.mark.parametrize("limits", LIMITS)
def test_compiled_clipping_is_one_graph_and_equals_eager(limits: str, computes: str) -> None:
    assert_compiled_equals_eager(LIMITS[limits], "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("limits", LIMITS)
def test_clipping_compiled_by_inductor_equals_eager(limits: str, computes: str) -> None:
    assert_compiled_equals_eager(LIMITS[limits], "inductor")


@pytest.mark.parametrize(
    "params",
    [
        lambda module: module.parameters(),
        lambda module: module.named_parameters(),
        lambda module: list(module.parameters()) * 2,
        lambda module: dict(module.named_parameters()),
    ],
    ids=["parameters", "named_parameters", "list, twice", "mapping"],
)
def test_any_form_of_parameters_compiles(params: Callable[[nn.Module], object], computes: str) -> None:
    network = model()
    stats = compiled(lambda: gradkern.clip_(params(network), 1.0), "aot_eager")()
    assert len(stats.names) == 4
    assert exact_norm(grads_of(network)) == pytest.approx(1.0, rel=1e-6)


def test_statistics_can_be_used_inside_the_compiled_function(computes: str) -> None:
    params = list(model().parameters())

    def step(x: Tensor) -> tuple[Tensor, GradStats]:
        stats = gradkern.clip_(params, 1.0)
        return x * stats.norm + stats.per_tensor.abs_max.sum(), stats

    norm = exact_norm([parameter.grad for parameter in params])
    largest = sum(parameter.grad.abs().max().item() for parameter in params)
    x, stats = compiled(step, "aot_eager")(torch.ones(2, dtype=torch.float64))
    assert x.tolist() == pytest.approx([norm + largest] * 2)
    assert float(stats) == pytest.approx(norm)


def test_a_compiled_function_takes_new_gradients_every_step(computes: str) -> None:
    params = parameters([torch.zeros(3), torch.zeros(2, 2)])
    clip = compiled(lambda: gradkern.clip_(params, 1.0), "aot_eager")
    for step in range(1, 4):
        for parameter in params:
            parameter.grad = torch.full_like(parameter, float(step))
        assert clip().norm.item() == pytest.approx(step * math.sqrt(7))
        assert params[0].grad[0].item() == pytest.approx(1 / math.sqrt(7))


def test_gradients_without_a_kernel_compile_too(computes: str) -> None:
    grads = [randn(30, dtype=torch.complex64), randn(40, 6)[:, ::2], randn(50)]
    stats = compiled(lambda: gradkern.clip_grads_(grads, 1.0), "aot_eager")()
    after = math.sqrt(sum(grad.to(torch.complex128).abs().square().sum().item() for grad in grads))
    assert (len(stats.names), after) == (3, pytest.approx(1.0, rel=1e-6))
