"""What a record says of a model: roles, forward order, and what is a chain of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradkern.monitor import Monitor
from gradkern.monitor.meta import optimizer_of, parameters_of, tensors_in


def modules(model: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    with Monitor(model) as monitor:
        model(x).sum().backward()
        monitor.step(1.0)
    found: list[dict[str, Any]] = monitor.record.meta["modules"]
    return found


def branches(model: nn.Module, x: Tensor) -> dict[str, str | None]:
    return {module["name"]: module["branch"] for module in modules(model, x)}


class Net(nn.Module):
    """Two linear layers, put together by `run`."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        result = self.run(self, x)
        assert isinstance(result, Tensor)
        return result


def test_roles_follow_the_module() -> None:
    model = nn.ModuleDict(
        {"e": nn.Embedding(3, 2), "r": nn.GRU(2, 2), "n": nn.LayerNorm(2), "o": nn.Linear(2, 1)}
    )
    roles = {entry["name"]: entry["role"] for entry in parameters_of(model)}
    assert roles == {
        "e.weight": "embedding",
        "r.weight_ih_l0": "weight",
        "r.weight_hh_l0": "recurrent",
        "r.bias_ih_l0": "bias",
        "r.bias_hh_l0": "bias",
        "n.weight": "norm",
        "n.bias": "norm",
        "o.weight": "weight",
        "o.bias": "bias",
    }


def test_a_tied_parameter_is_there_once() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    assert [(entry["name"], entry["module"]) for entry in parameters_of(model)] == [("0.weight", "0")]


def test_modules_come_in_the_order_in_which_they_run() -> None:
    model = Net(lambda net, x: net.a(net.c(net.b(x))))
    assert [module["name"] for module in modules(model, torch.ones(2, 3))] == ["b", "c", "a"]


def test_layers_with_functions_between_them_are_a_chain() -> None:
    found = branches(Net(lambda net, x: net.c(F.relu(net.b(net.a(x).tanh() * 2)))), torch.ones(2, 3))
    assert found == {"a": "a", "b": "a", "c": "a"}


def test_parallel_layers_are_no_chain() -> None:
    found = branches(Net(lambda net, x: net.c(net.a(x) + net.b(x))), torch.ones(2, 3))
    assert found == {"a": None, "b": None, "c": None}


def test_a_residual_connection_ends_a_chain() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        h = net.a(x)
        return net.c(h + net.b(h))

    assert branches(Net(run), torch.ones(2, 3)) == {"a": None, "b": None, "c": None}


def test_a_container_is_in_no_chain() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 1))
    found = branches(model, torch.ones(2, 3))
    assert found == {"0": None, "0.0": "0.0", "0.1": "0.0", "1": "0.0"}


def test_without_a_graph_the_chain_is_known_by_the_tensors_handed_on() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)).requires_grad_(False)
    with Monitor(model) as monitor:
        model(torch.ones(2, 3))
        monitor.step(1.0)
    assert [module["branch"] for module in monitor.record.meta["modules"]] == ["0", "0", "0"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), {"type": "SGD", "lr": 0.1, "momentum": 0.9}),
        (
            lambda p: torch.optim.AdamW(p, 0.1, eps=1e-7),
            {"type": "AdamW", "eps": 1e-7, "betas": [0.9, 0.999]},
        ),
        (lambda p: torch.optim.Adafactor(p), {"type": "Adafactor", "lr": 0.01, "eps": None}),
        (lambda p: torch.optim.Adam(p, torch.tensor(0.5)), {"type": "Adam", "lr": 0.5, "fused": None}),
    ],
)
def test_the_optimizer_is_described(make: Any, expected: dict[str, Any]) -> None:
    found = optimizer_of(make([nn.Parameter(torch.zeros(1))]))
    assert {key: found[key] for key in expected} == expected


def test_a_lazy_module_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter") as caught:
        Monitor(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))
    assert str(caught.value) == (
        "Monitor: parameter '1.weight' has no shape yet: its module is lazy. Run a forward pass first, then "
        "make the optimizer and the Monitor."
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_script_is_refused() -> None:
    with pytest.raises(TypeError) as caught:
        Monitor(nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 1))))
    assert str(caught.value) == (
        "Monitor: module '1' is a RecursiveScriptModule, whose parameters cannot be followed from Python. "
        "Train, and watch, the module it was made from."
    )


def test_tensors_are_found_in_nested_containers() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [len(t) for t in tensors_in([a, {"x": (b, None, "word")}, c])] == [1, 2, 3]
