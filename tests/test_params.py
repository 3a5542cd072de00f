from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern
from gradkern.params import NONFINITE_WORDS, Names, as_items, collect, has_gaps, labels_of
from tests.backends import Backend
from tests.helpers import INF, NAN, parameters, same_bits


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    made(torch.ones(1, 3)).sum().backward()
    return made


NAMED = ["0.weight", "0.bias", "1.weight", "1.bias"]
NUMBERED = [f"parameters[{index}]" for index in range(4)]

FORMS: dict[str, tuple[Callable[[nn.Module], object], list[str]]] = {
    "module": (lambda module: module, NAMED),
    "named_parameters": (lambda module: module.named_parameters(), NAMED),
    "list of pairs": (lambda module: list(module.named_parameters()), NAMED),
    "mapping": (lambda module: dict(module.named_parameters()), NAMED),
    "parameters": (lambda module: module.parameters(), NUMBERED),
    "list": (lambda module: list(module.parameters()), NUMBERED),
    "tuple": (lambda module: tuple(module.parameters()), NUMBERED),
    "ParameterList": (lambda module: nn.ParameterList(module.parameters()), ["0", "1", "2", "3"]),
    "tensor": (lambda module: module[0].weight, ["parameters[0]"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_may_come_in_any_form(form: str, backend: Backend) -> None:
    pass_as, names = FORMS[form]
    assert gradkern.measure(pass_as(model())).names == names


GRAD_FORMS: dict[str, tuple[object, list[str]]] = {
    "list": ([torch.ones(1), None, torch.ones(1)], ["grads[0]", "grads[2]"]),
    "pairs": ([("a", torch.ones(1)), ("b", None), ("c", torch.ones(1))], ["a", "c"]),
    "mapping": ({"a": torch.ones(1), "b": None}, ["a"]),
    "tuple": ((torch.ones(1), torch.ones(1)), ["grads[0]", "grads[1]"]),
    "tensor": (torch.ones(1), ["grads[0]"]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("form", GRAD_FORMS)
def test_gradients_may_come_in_any_form(form: str, backend: Backend) -> None:
    grads, names = GRAD_FORMS[form]
    assert gradkern.measure_grads(grads).names == names


def test_parameters_without_a_gradient_have_no_row(backend: Backend) -> None:
    stats = gradkern.measure(parameters([None, torch.ones(2), None, torch.ones(3)]))
    assert stats.names == ["parameters[1]", "parameters[3]"]


@pytest.mark.parametrize("nonfinite", NONFINITE_WORDS)
def test_a_parameter_that_is_passed_twice_counts_once_under_its_first_name(
    nonfinite: str, backend: Backend
) -> None:
    (parameter,) = parameters([torch.full((4,), 1.0)])
    stats = gradkern.clip_([("encoder", parameter), ("decoder", parameter)], 1.0, nonfinite=nonfinite)
    assert stats.names == ["encoder"]
    assert float(stats) == 2.0
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.5] * 4


def test_two_parameters_with_one_gradient_are_clipped_once(backend: Backend) -> None:
    grad = torch.full((4,), 1.0)
    gradkern.clip_(parameters([grad, grad]), 1.0)
    assert grad.tolist() == [0.5] * 4


def test_names_and_bare_parameters_may_be_mixed() -> None:
    pair, bare = parameters([torch.ones(1), torch.ones(1, dtype=torch.complex64)])
    assert gradkern.measure([("a", pair), bare]).names == ["a", "parameters[1]"]


def test_names_cost_nothing_until_asked_for() -> None:
    items = [torch.ones(1)] * 3
    assert labels_of(items) is None
    assert Names("grads", None, [0, 2], 2).to_list() == ["grads[0]", "grads[2]"]


def test_an_exhausted_generator_is_warned_of(backend: Backend) -> None:
    walked = model().parameters()
    list(walked)
    message = (
        "clip_: parameters is a generator with nothing left in it, so nothing is done. "
        "model.parameters() can be walked once only: call it anew for every step, or keep a list."
    )
    with pytest.warns(UserWarning, match="clip_: parameters is a generator") as caught:
        stats = gradkern.clip_(walked, 1.0)
    assert [str(warning.message) for warning in caught] == [message]
    assert caught[0].filename == __file__
    assert stats.names == []


@pytest.mark.parametrize("function", ["clip_", "clip_grad_norm_", "clip_grad_value_"])
def test_gradients_in_place_of_parameters_are_warned_of(function: str, backend: Backend) -> None:
    message = (
        f"{function}: none of the 2 tensors passed has a gradient or requires one, so nothing is done. "
        "For gradients themselves there are gradkern.clip_grads_ and gradkern.measure_grads."
    )
    with pytest.warns(UserWarning, match=function) as caught:
        getattr(gradkern, function)([torch.ones(1), torch.ones(2)], 1.0)
    assert [str(warning.message) for warning in caught] == [message]
    assert caught[0].filename == __file__


def test_frozen_parameters_are_not_warned_of(backend: Backend) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gradkern.clip_(nn.Linear(2, 2).requires_grad_(False), 1.0).names == []


def test_a_limit_that_requires_grad_is_taken_as_a_number(backend: Backend) -> None:
    (parameter,) = parameters([torch.tensor([3.0, -4.0])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gradkern.clip_(parameter, torch.tensor(2.5, requires_grad=True)).coef.item() == 0.5


@pytest.mark.parametrize("nothing", [[], (), {}, nn.ReLU()], ids=["list", "tuple", "dict", "module"])
def test_an_empty_list_is_not_warned_of(nothing: object, backend: Backend) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(gradkern.clip_(nothing, 1.0)) == 0.0


def test_a_list_is_not_copied() -> None:
    items: list[Tensor] = [torch.ones(1)]
    assert as_items(items, "clip_") is items


@pytest.mark.parametrize(
    ("tensor", "gaps"),
    [
        (torch.zeros(3, 4), False),
        (torch.zeros(3, 4).t(), False),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), False),
        (torch.zeros(3, 1, 4).transpose(0, 1), False),
        (torch.zeros(()), False),
        (torch.zeros(0, 3), False),
        (torch.zeros(3, 4)[:, :3], True),
        (torch.zeros(3, 4)[::2], True),
        (torch.zeros(1).expand(3), True),
        (torch.zeros(3, 1).expand(3, 2), True),
        (torch.zeros(4).as_strided((3, 2), (1, 1)), True),
    ],
    ids=str,
)
def test_a_layout_is_dense_if_it_fills_its_memory_once(tensor: Tensor, gaps: bool) -> None:
    assert has_gaps(tensor) is gaps


NEEDS_PARAMETERS = "gradkern needs parameters as tensors or (name, tensor) pairs, or a module."


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (3.0, "clip_: parameters must be a tensor, or an iterable or mapping of tensors, got float."),
        ("w", "clip_: parameters must be a tensor, or an iterable or mapping of tensors, got str."),
        (None, "clip_: parameters must be a tensor, or an iterable or mapping of tensors, got NoneType."),
        (
            torch.optim.SGD([torch.zeros(1, requires_grad=True)]),
            "clip_: parameters must be a tensor, or an iterable or mapping of tensors, got SGD.\n"
            "Pass [p for group in optimizer.param_groups for p in group['params']] for all it steps.",
        ),
        (
            [torch.zeros(1), 3.0],
            f"clip_: parameters[1] is of type float; {NEEDS_PARAMETERS}",
        ),
        (
            {"scale": 3},
            f"clip_: 'scale' is of type int; {NEEDS_PARAMETERS}",
        ),
        (
            torch.optim.SGD([torch.zeros(1, requires_grad=True)]).param_groups,
            f"clip_: parameters[0] is of type dict; {NEEDS_PARAMETERS}\n"
            "For all groups: [p for group in optimizer.param_groups for p in group['params']].",
        ),
        (
            [(torch.zeros(1), "w")],
            f"clip_: parameters[0] is of type (Tensor, str); {NEEDS_PARAMETERS}\n"
            "In a pair the name, a string, comes first, as module.named_parameters() has it.",
        ),
        (
            [nn.ReLU(), nn.ReLU()],
            f"clip_: parameters[0] is of type ReLU; {NEEDS_PARAMETERS}\n"
            "Pass one module, or chain the parameters of several: itertools.chain(a.parameters(), ...).",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_parameter_is_refused(params: object, message: str, backend: Backend) -> None:
    with pytest.raises(TypeError) as caught:
        gradkern.clip_(params, 1.0)
    assert str(caught.value) == message


def test_gradients_in_place_of_a_module_are_asked_for() -> None:
    with pytest.raises(TypeError) as caught:
        gradkern.measure_grads(nn.Sequential(nn.ReLU()))
    assert str(caught.value) == (
        "measure_grads: gradients must be a tensor, or an iterable or mapping of tensors, got Sequential.\n"
        "For the gradients of its parameters there is the function that takes parameters."
    )


NEEDS_FLOATS = (
    "is not of a floating-point type that gradkern reads; gradkern needs float32, float64, bfloat16, "
    "float16, complex64 or complex128.\nLeave this parameter out, or give it a gradient of such a type."
)
NEEDS_MEMORY = (
    "gradkern needs a place for each element to write to.\n"
    "Give it memory of its own first: p.grad = p.grad.contiguous(). gradkern.measure reads it as is."
)

BAD_GRADS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "integer": (
        lambda: torch.ones(3, dtype=torch.int64),
        f"clip_: gradient of 'w' (int64 [3], cpu) {NEEDS_FLOATS}",
    ),
    "bool": (
        lambda: torch.ones(2, 2, dtype=torch.bool),
        f"clip_: gradient of 'w' (bool [2, 2], cpu) {NEEDS_FLOATS}",
    ),
    "float8": (
        lambda: torch.ones(3).to(torch.float8_e4m3fn),
        f"clip_: gradient of 'w' (float8_e4m3fn [3], cpu) {NEEDS_FLOATS}",
    ),
    "compressed": (
        lambda: torch.ones(2, 2).to_sparse_csr(),
        "clip_: gradient of 'w' (float32 [2, 2], cpu) is stored as sparse_csr; gradkern needs dense "
        "(strided) or sparse_coo gradients.\nConvert it first, for example by p.grad = p.grad.to_dense().",
    ),
    "expanded": (
        lambda: torch.ones(1).expand(3),
        "clip_: gradient of 'w' (float32 [3], cpu) has elements that share memory "
        f"(strides [0], as expand() makes them); {NEEDS_MEMORY}",
    ),
    "overlapping": (
        lambda: torch.ones(4).as_strided((3, 2), (1, 1)),
        "clip_: gradient of 'w' (float32 [3, 2], cpu) has elements that share memory "
        f"(strides [1, 1], as expand() makes them); {NEEDS_MEMORY}",
    ),
    "meta": (
        lambda: torch.ones(3, device="meta"),
        "clip_: gradient of 'w' (float32 [3], meta) holds no values, while that of 'good' does; "
        "gradkern needs all or none of them on the meta device.\n"
        "Materialise the module with module.to_empty(device=...) and load its state.",
    ),
}


def bad_parameter(grad: Tensor) -> Tensor:
    """A tensor with this gradient; torch lets it be of any kind as long as both are alike."""
    tensor = torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
    tensor = tensor.to_sparse_csr() if grad.layout == torch.sparse_csr else tensor
    tensor.grad = grad
    return tensor


@pytest.mark.parametrize("kind", BAD_GRADS)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_gradient_that_cannot_be_clipped_is_named_and_nothing_is_written(
    kind: str, backend: Backend
) -> None:
    make, message = BAD_GRADS[kind]
    (good,) = parameters([torch.tensor([30.0, NAN, 40.0])])
    before = good.grad.clone()
    with pytest.raises(TypeError) as caught:
        gradkern.clip_([("good", good), ("w", bad_parameter(make()))], 1.0, nonfinite="zero")
    assert str(caught.value) == message
    assert same_bits(good.grad, before)
    assert good.grad._version == 0


def test_a_complex_gradient_is_refused_by_value_only(backend: Backend) -> None:
    (parameter,) = parameters([torch.tensor([3 + 4j])])
    with pytest.raises(TypeError) as caught:
        gradkern.clip_({"w": parameter}, 1.0, clip_value=0.5)
    assert str(caught.value) == (
        "clip_: gradient of 'w' (complex64 [1], cpu) is complex, so its elements cannot be clamped to a "
        "range; gradkern needs real gradients to clip by value.\n"
        "Clip it by its norm, or leave this parameter out."
    )
    assert parameter.grad.tolist() == [3 + 4j]
    gradkern.clip_({"w": parameter}, 1.0)
    assert parameter.grad.abs().item() == pytest.approx(1.0)


def test_a_distributed_gradient_is_refused_with_a_remedy() -> None:
    class DTensor(Tensor):
        pass

    grad = torch.ones(3).as_subclass(DTensor)
    with pytest.raises(TypeError) as caught:
        gradkern.measure_grads({"w": grad})
    assert str(caught.value) == (
        "measure_grads: gradient of 'w' (float32 [3], cpu) is a DTensor; gradkern needs plain tensors, for "
        "it does not yet know how to add up over a device mesh.\n"
        "Use torch.nn.utils.clip_grad_norm_ for this model, or pass to_local() of each gradient to "
        "gradkern.clip_grads_ if the norm of this rank's part is meant."
    )


def test_an_expanded_gradient_is_refused_wherever_it_might_be_written(backend: Backend) -> None:
    (parameter,) = parameters([torch.tensor(1e-3).expand(3)])
    for limits in ({"max_norm": 1.0}, {"clip_value": 1.0}, {"nonfinite": "zero"}):
        with pytest.raises(TypeError, match="share memory"):
            gradkern.clip_(parameter, **limits)
    assert gradkern.clip_(parameter, INF).per_tensor.norm.item() == pytest.approx(1e-3 * math.sqrt(3))


NO_LIMIT = "Pass a number from 0 up; float('inf') sets no limit."


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        (
            {"max_norm": -1.0},
            ValueError,
            f"clip_: max_norm must not be negative, got -1.0. {NO_LIMIT}",
        ),
        (
            {"max_norm": NAN},
            ValueError,
            f"clip_: max_norm must not be NaN, got nan. {NO_LIMIT}",
        ),
        (
            {"clip_value": -0.5},
            ValueError,
            f"clip_: clip_value must not be negative, got -0.5. {NO_LIMIT}",
        ),
        (
            {"max_norm": torch.tensor(-2.0)},
            ValueError,
            f"clip_: max_norm must not be negative, got -2.0. {NO_LIMIT}",
        ),
        (
            {"max_norm": torch.ones(2)},
            ValueError,
            "clip_: max_norm must be a number or a real 0-dim tensor, got float32 [2], cpu.",
        ),
        (
            {"max_norm": torch.tensor(1.0, device="meta")},
            ValueError,
            "clip_: max_norm is on the meta device, which holds no value. Pass a number, or a tensor that "
            "was made outside of torch.device('meta').",
        ),
        ({"max_norm": "much"}, TypeError, "clip_: max_norm must be a number, got 'much'."),
        ({"max_norm": nn.ReLU()}, TypeError, "clip_: max_norm must be a number, got ReLU()."),
        ({"max_norm": model()}, TypeError, "clip_: max_norm must be a number, got Sequential."),
        ({"clip_value": [1.0]}, TypeError, "clip_: clip_value must be a number, got [1.0]."),
        (
            {"max_norm": 1.0, "nonfinite": "skipp"},
            ValueError,
            "clip_: nonfinite must be 'keep', 'zero', 'propagate' or 'raise', got 'skipp'.",
        ),
        (
            {"max_norm": 1.0, "nonfinite": None},
            ValueError,
            "clip_: nonfinite must be 'keep', 'zero', 'propagate' or 'raise', got None.",
        ),
        (
            {},
            ValueError,
            "clip_: neither max_norm nor clip_value is given, so nothing would be clipped. Pass a limit, "
            "or call gradkern.measure to look without writing.",
        ),
        (
            {"nonfinite": "propagate"},
            ValueError,
            "clip_: neither max_norm nor clip_value is given, so nothing would be clipped. Pass a limit, "
            "or call gradkern.measure to look without writing.",
        ),
    ],
    ids=str,
)
def test_a_bad_limit_or_word_is_refused_and_nothing_is_written(
    limits: dict[str, object], error: type[Exception], message: str, backend: Backend
) -> None:
    (parameter,) = parameters([torch.tensor([3.0, -4.0])])
    with pytest.raises(error) as caught:
        gradkern.clip_(parameter, **limits)
    assert str(caught.value) == message
    assert parameter.grad.tolist() == [3.0, -4.0]


def test_parameters_in_place_of_gradients_are_not_clipped_themselves(backend: Backend) -> None:
    (parameter,) = parameters([torch.ones(1)])
    parameter.data.fill_(100.0)
    for given in ([parameter], {"w": parameter}, parameter):
        with pytest.raises(TypeError) as caught:
            gradkern.clip_grads_(given, 1.0)
        assert str(caught.value) == (
            "clip_grads_: its first item is a parameter, not a gradient, and would itself be clipped. "
            "To clip the gradients of parameters call gradkern.clip_."
        )
    assert parameter.item() == 100.0


def test_collecting_reads_no_value() -> None:
    names, grads = collect([("w", parameters([torch.ones(2, device="meta")])[0])], "clip_")
    assert (names.to_list(), [grad.shape for grad in grads]) == (["w"], [(2,)])
