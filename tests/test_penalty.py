from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern
from gradkern import penalty, reference
from tests.no_sync import no_host_read


def autograd(
    weights: list[Tensor], grads: list[Tensor | None], l1: float, l2: float
) -> tuple[Tensor, list[Tensor]]:
    """The penalty and the penalised gradients by autograd, in float64."""
    leaves = [
        weight.detach().to(torch.complex128 if weight.is_complex() else torch.float64).requires_grad_()
        for weight in weights
    ]
    value = torch.zeros((), dtype=torch.float64)
    for leaf in leaves:
        value = value + l1 * leaf.abs().sum() + l2 * leaf.abs().square().sum()
    value.backward()
    total = []
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf.grad is not None
        total.append(leaf.grad if grad is None else leaf.grad + grad)
    return value.detach(), total


def parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(
        torch.randn(shape, generator=generator, dtype=torch.float64 if not dtype.is_complex else dtype).to(
            dtype
        )
    )
    weight.grad = torch.randn(shape, generator=generator).to(dtype)
    return weight


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
)
@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_it_equals_autograd_on_the_penalised_loss(dtype: torch.dtype, l1: float, l2: float) -> None:
    weights = [parameter((5, 3), dtype, 1), parameter((7,), dtype, 2), parameter((), dtype, 3)]
    value, expected = autograd(list(weights), [weight.grad for weight in weights], l1, l2)
    got = gradkern.add_penalty_(weights, l1=l1, l2=l2)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, value, rtol=1e-14, atol=0)
    for weight, grad in zip(weights, expected, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(
            weight.grad, grad.to(dtype), rtol=1e-15 if dtype == torch.float64 else 0, atol=0
        )


def test_in_closed_form() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -4.0, 0.0]))
    weight.grad = torch.tensor([1.0, 1.0, 1.0])
    assert gradkern.add_penalty_(weight, l1=2.0, l2=0.5).item() == 2 * 7 + 0.5 * 25
    assert weight.grad.tolist() == [1 + 2 + 3, 1 - 2 - 4, 1]


def test_missing_gradients_are_created() -> None:
    weight = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    gradkern.add_penalty_(weight, l2=0.5)
    assert weight.grad is not None
    assert torch.equal(weight.grad, weight)
    assert weight.grad.stride() == weight.stride()
    assert not weight.grad.requires_grad


def test_frozen_parameters_take_no_part() -> None:
    weight = nn.Parameter(torch.ones(3), requires_grad=False)
    assert gradkern.add_penalty_([weight], l2=1.0).item() == 0.0
    assert weight.grad is None


def test_a_parameter_passed_twice_counts_once() -> None:
    weight = nn.Parameter(torch.ones(3))
    assert gradkern.add_penalty_([("a", weight), ("b", weight)], l2=1.0).item() == 3.0
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0, 2.0, 2.0]


def test_no_penalty_touches_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    assert gradkern.add_penalty_([weight]).item() == 0.0
    assert weight.grad is None


def test_no_parameters_have_no_penalty() -> None:
    assert gradkern.add_penalty_([], l1=1.0).item() == 0.0


def test_the_penalty_left_out_does_not_see_an_infinite_weight() -> None:
    weight = nn.Parameter(torch.tensor([math.inf, 1.0]))
    assert gradkern.add_penalty_(weight, l1=0.5).item() == math.inf
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.5, 0.5]


def test_large_and_strided_tensors_are_done_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SLICE_NUMEL", 7)
    weight = nn.Parameter(parameter((6, 5, 4)).detach().permute(2, 0, 1))
    weight.grad = parameter((4, 12, 5), seed=4).detach()[:, ::2]
    value, expected = autograd([weight], [weight.grad.clone()], 0.1, 0.2)
    torch.testing.assert_close(gradkern.add_penalty_(weight, l1=0.1, l2=0.2), value, rtol=1e-14, atol=0)
    assert torch.equal(weight.grad, expected[0].float())


def test_weights_stay_as_they_are() -> None:
    weight = parameter((10,))
    before, version = weight.detach().clone(), weight._version
    gradkern.add_penalty_(weight, l1=0.5, l2=0.5)
    assert torch.equal(weight, before)
    assert weight._version == version


def test_the_gradients_version_tells_of_the_change() -> None:
    weight = parameter((10,))
    assert weight.grad is not None
    version = weight.grad._version
    gradkern.add_penalty_(weight, l2=0.5)
    assert weight.grad._version > version


def test_on_a_device_nothing_is_waited_for() -> None:
    with FakeTensorMode():
        weight = nn.Parameter(torch.ones(3, device="cuda"))
        weight.grad = torch.ones(3, device="cuda")
        with no_host_read():
            value = gradkern.add_penalty_([("w", weight)], l1=0.1, l2=0.1)
    assert value.device.type == "cuda"
    assert value.shape == ()


# where


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, 3, num_layers=2, bidirectional=True)
        self.lstm = nn.LSTM(2, 3, proj_size=2)
        self.gru = nn.GRU(2, 3)
        self.cells = nn.ModuleList([nn.RNNCell(2, 3), nn.LSTMCell(2, 3), nn.GRUCell(2, 3)])
        self.head = nn.Linear(3, 1)


def reached(model: nn.Module, where: penalty.Where | None) -> list[str]:
    gradkern.add_penalty_(model, l2=1.0, where=where)
    return [name for name, weight in model.named_parameters() if weight.grad is not None]


def test_recurrent_selects_the_recurrent_weights_of_every_kind() -> None:
    assert reached(Model(), gradkern.recurrent) == [
        "rnn.weight_hh_l0",
        "rnn.weight_hh_l0_reverse",
        "rnn.weight_hh_l1",
        "rnn.weight_hh_l1_reverse",
        "lstm.weight_hh_l0",
        "gru.weight_hh_l0",
        "cells.0.weight_hh",
        "cells.1.weight_hh",
        "cells.2.weight_hh",
    ]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("head.*", ["head.weight", "head.bias"]),
        (
            ["*.weight_hh", "head.bias"],
            ["cells.0.weight_hh", "cells.1.weight_hh", "cells.2.weight_hh", "head.bias"],
        ),
        (lambda name, weight: weight.shape == (1, 3), ["head.weight"]),
    ],
)
def test_where_selects(where: penalty.Where, names: list[str]) -> None:
    assert reached(Model(), where) == names


def test_where_none_selects_all() -> None:
    assert len(reached(Model(), None)) == len(list(Model().parameters()))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("weight_xx*", "where 'weight_xx*' matches no parameter. The 2 names are 'weight', 'bias'"),
        (["weight", "bais"], "where 'bais' matches no parameter"),
        (lambda name, weight: False, "where selects no parameter"),
        (gradkern.recurrent, "where selects no parameter"),
    ],
)
def test_a_where_that_selects_nothing_is_refused(where: penalty.Where, message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        gradkern.add_penalty_(model, l2=1.0, where=where)
    assert message in str(error.value)
    assert model.weight.grad is None


@pytest.mark.parametrize("factors", [{"l1": -1.0}, {"l2": -1e-9}, {"l1": math.nan}, {"l2": math.inf}])
def test_an_impossible_factor_is_refused(factors: dict[str, float]) -> None:
    (name,) = factors
    with pytest.raises(ValueError, match=f"add_penalty_: {name} must not be negative, infinite or NaN"):
        gradkern.add_penalty_([nn.Parameter(torch.ones(2))], **factors)


def sparse() -> nn.Parameter:
    weight = nn.Parameter(torch.ones(4, 2))
    weight.grad = torch.ones(4, 2).to_sparse(1)
    return weight


def expanded() -> nn.Parameter:
    weight = nn.Parameter(torch.ones(4, 2))
    weight.grad = torch.ones(1, 2).expand(4, 2)
    return weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sparse, r"gradient of 'bad' \(float32 \[4, 2\], cpu\) is sparse"),
        (expanded, r"gradient of 'bad' .* share memory"),
        (lambda: nn.Parameter(torch.ones(2).to_sparse()), "'bad' .* is not a dense floating-point tensor"),
    ],
)
def test_what_cannot_be_added_to_is_named_before_anything_is_written(
    make: Callable[[], nn.Parameter], message: str
) -> None:
    good = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=f"add_penalty_: {message}"):
        gradkern.add_penalty_([("good", good), ("bad", make())], l2=1.0)
    assert good.grad is None


def test_something_that_is_no_parameter_is_named() -> None:
    with pytest.raises(TypeError, match=r"add_penalty_: parameters\[0\] is a Linear"):
        gradkern.add_penalty_([nn.Linear(1, 1)], l2=1.0)  # type: ignore[list-item]


@pytest.mark.parametrize(("where", "kind"), [([], ValueError), (5, TypeError), ([5], TypeError)])
def test_where_must_hold_patterns(where: object, kind: type[Exception]) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(kind, match="add_penalty_: where"):
        gradkern.add_penalty_(weight, l2=1.0, where=where)  # type: ignore[arg-type]
    assert weight.grad is None
