"""What a model, its optimizer and its clipper are, in words that a record keeps."""

from __future__ import annotations

import platform
import weakref
from collections.abc import Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from gradkern._version import __version__

if TYPE_CHECKING:
    from gradkern.policies import Policy

RECURRENT: Final = (nn.RNNBase, nn.RNNCellBase)
EMBEDDINGS: Final = (nn.Embedding, nn.EmbeddingBag)

# A walk back through the graph from a module's input ends after this many operations. Between two layers
# there are a few dozen at most.
WALK: Final = 4096


def check_model(model: nn.Module) -> None:
    """Raise if a module cannot be watched."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"Monitor: {f'module {path!r}' if path else 'model'} is a {type(module).__name__}, whose "
                "parameters cannot be followed from Python. Train, and watch, the module it was made from."
            )
    for name, param in model.named_parameters():
        if nn.parameter.is_lazy(param):
            raise ValueError(
                f"Monitor: parameter {name!r} has no shape yet: its module is lazy. Run a forward pass "
                "first, then make the optimizer and the Monitor."
            )


def describe(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, policy: Policy | None
) -> dict[str, Any]:
    """The part of `Record.meta` that is known before the first forward pass."""
    return {
        "parameters": parameters_of(model),
        "optimizer": optimizer_of(optimizer),
        "clip": clip_of(policy),
        "torch": torch.__version__,
        "gradkern": __version__,
        "python": platform.python_version(),
        "seq": {"rnn": [name for name, module in model.named_modules() if isinstance(module, RECURRENT)]},
    }


def parameters_of(model: nn.Module) -> list[dict[str, Any]]:
    """Name, shape, dtype, module, role and requires_grad of every parameter, each once."""
    owners = {
        id(param): (path, module)
        for path, module in reversed(list(model.named_modules()))
        for param in module.parameters(recurse=False)
    }
    return [
        {
            "name": name,
            "shape": list(param.shape),
            "dtype": str(param.dtype).removeprefix("torch."),
            "module": owners[id(param)][0],
            "role": role(name, param, owners[id(param)][1]),
            "requires_grad": param.requires_grad,
        }
        for name, param in model.named_parameters()
    ]


def role(name: str, param: Tensor, module: nn.Module) -> str:
    """What a parameter is for: "weight", "bias", "recurrent", "embedding" or "norm".

    >>> from gradkern.monitor.meta import role
    >>> rnn = torch.nn.RNN(2, 3)
    >>> [role(name, param, rnn) for name, param in rnn.named_parameters()]
    ['weight', 'recurrent', 'bias', 'bias']
    """
    last = name.rpartition(".")[2]
    if isinstance(module, RECURRENT) and last.startswith("weight_hh"):
        return "recurrent"
    if isinstance(module, EMBEDDINGS):
        return "embedding"
    if "Norm" in type(module).__name__:
        return "norm"
    return "bias" if last.startswith("bias") or param.dim() < 2 else "weight"


def optimizer_of(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Type and the settings that a diagnosis looks at, of the first group."""
    if optimizer is None:
        return {}
    group = optimizer.param_groups[0]
    found: dict[str, Any] = {"type": type(optimizer).__name__}
    for key in ("lr", "eps", "momentum", "weight_decay", "betas", "fused"):
        found[key] = _plain(group.get(key))
    if not isinstance(found["eps"], (float, NoneType)):
        found["eps"] = None  # Adafactor's are two, and neither is Adam's
    return found


def _plain(value: object) -> float | bool | list[Any] | None:
    """A setting as a record keeps it; None for what has no number on the host."""
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):  # a learning rate that lives on the device is recorded every step
        return float(value) if value.device.type == "cpu" and value.numel() == 1 else None
    if isinstance(value, bool):
        return value
    return float(value) if isinstance(value, (int, float)) else None


def clip_of(policy: Policy | None) -> dict[str, Any]:
    """Policy of a clipper and threshold, as far as they are known beforehand."""
    if policy is None:
        return {"policy": None, "threshold": None}
    plain = policy.as_clip()
    threshold = None if plain is None or plain[0] == float("inf") else plain[0]
    return {"policy": repr(policy), "threshold": threshold}


class ForwardOrder:
    """In which order modules run, and which of them follow one another without a branch.

    Told of every module's inputs and output during one forward pass. A module follows those whose outputs its
    inputs were computed from, with no module between; that is read from the graph, or where none is recorded
    from the identity of the tensors. It continues a chain if it follows one module and is the only one to do
    so: residual connections and parallel branches are no chains.
    """

    def __init__(self) -> None:
        self._order: dict[str, str] = {}
        self._parents: dict[str, set[str]] = {}
        self._by_node: dict[Any, str] = {}
        # Not kept alive: with activation checkpointing that would be all the memory that it saves.
        self._by_tensor: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def enter(self, path: str, module: nn.Module, inputs: list[Tensor]) -> None:
        """A module begins; only the first time counts."""
        if path in self._order:
            return
        self._order[path] = type(module).__name__
        if any(True for _ in module.children()):
            return
        found: set[str] = set()
        for tensor in inputs:
            seen = self._by_tensor.get(id(tensor))
            if seen is not None and seen[0]() is tensor:
                found.add(seen[1])
            elif tensor.grad_fn is not None:
                found |= self._walk(tensor.grad_fn)
        self._parents[path] = found

    def leave(self, path: str, outputs: list[Tensor]) -> None:
        """A module has given its output."""
        if path not in self._parents:
            return
        for tensor in outputs:
            self._by_tensor[id(tensor)] = weakref.ref(tensor), path
            if tensor.grad_fn is not None:
                self._by_node[tensor.grad_fn] = path

    def _walk(self, start: Any) -> set[str]:
        found: set[str] = set()
        seen = {start}
        waiting = [start]
        while waiting and len(seen) < WALK:
            node = waiting.pop()
            name = self._by_node.get(node)
            if name is not None:
                found.add(name)
                continue
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)
        return found

    def modules(self) -> list[dict[str, Any]]:
        """The modules that ran, as `Record.meta` has them. `branch` is the id of a chain."""
        children: dict[str, set[str]] = {}
        for path, parents in self._parents.items():
            for parent in parents:
                children.setdefault(parent, set()).add(path)
        branch: dict[str, str] = {}
        for path, parents in self._parents.items():
            only = next(iter(parents)) if len(parents) == 1 else None
            continues = only is not None and children.get(only) == {path}
            branch[path] = branch[only] if continues and only is not None else path
        lengths: dict[str, int] = {}
        for name in branch.values():
            lengths[name] = lengths.get(name, 0) + 1
        return [
            {
                "name": path,
                "type": kind,
                "order": order,
                "parent": path.rpartition(".")[0],
                "branch": branch[path] if path in branch and lengths[branch[path]] > 1 else None,
            }
            for order, (path, kind) in enumerate(self._order.items())
        ]


def tensors_in(value: Any, limit: int = 64) -> list[Tensor]:
    """Tensors in nested tuples, lists and mappings, in order, up to `limit`."""
    found: list[Tensor] = []
    _gather(value, found, limit, 0)
    return found


def _gather(value: Any, found: list[Tensor], limit: int, depth: int) -> None:
    if len(found) >= limit or depth > 6:
        return
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            _gather(item, found, limit, depth + 1)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _gather(item, found, limit, depth + 1)
