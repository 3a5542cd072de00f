"""L1 and L2 penalties on weights, added to the gradients that are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from gradkern import ops
from gradkern.params import Names, Params, as_items, check, describe, shown

Where = str | Sequence[str] | Callable[[str, Tensor], bool]
"""Parameters by name: an `fnmatch` pattern, several of them, or a predicate on (name, parameter)."""


@torch.no_grad()
def add_penalty_(params: Params, *, l1: float = 0.0, l2: float = 0.0, where: Where | None = None) -> Tensor:
    """Add the gradient of ``l1 * sum(abs(w)) + l2 * sum(w ** 2)`` to the gradients of `params`, in place.

    What autograd would give for a loss with that penalty, without a graph over the weights: one pass over
    weights and gradients. Call it after `backward` (after the last one, where gradients are accumulated;
    after `scaler.unscale_`, where they are scaled) and before clipping. A parameter without a gradient gets
    one; a frozen one (`requires_grad` false) takes no part. Nor does a parameter count twice that is passed
    twice.

    Computed in float64 and rounded once to the gradient's dtype. The gradient of ``abs(w)`` at 0 is 0.

    The penalties of Keras' ``kernel_regularizer`` and ``recurrent_regularizer`` are the same sums. A torch
    optimizer's coupled ``weight_decay`` is ``l2=weight_decay / 2``. When not to use it: with Adam, whose
    division by the gradient's size takes most of an L2 penalty away again; take the decoupled decay of
    AdamW.

    Args:
        params: parameters, (name, parameter) pairs, a mapping of names, or a module.
        l1: factor of the sum of magnitudes, not negative. For complex weights, of their moduli.
        l2: factor of the sum of squares, not negative.
        where: which parameters: an `fnmatch` pattern for the name, several of them, or a predicate that is
            given name and parameter, such as `gradkern.recurrent`. All by default.

    Returns:
        The penalty's value before this step, 0-dim float64, to be added to the loss that is logged. On the
        device of the first parameter (the CPU for mps); not waited for.

    Raises:
        ValueError: `l1` or `l2` negative or not finite; a pattern or predicate that selects nothing.
        TypeError: a parameter or gradient of a kind that cannot be added to: a DTensor, sparse, quantised,
            expanded. Nothing has been written.

    Source: Pascanu, Mikolov, Bengio 2013, section 3.1, on recurrent weights (arXiv 1211.5063).

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> gradkern.add_penalty_(weight, l1=0.5, l2=0.25)
    tensor(9.7500, dtype=torch.float64)
    >>> weight.grad
    tensor([ 2.0000, -2.5000])
    >>> rnn = torch.nn.RNN(4, 8)
    >>> penalty = gradkern.add_penalty_(rnn, l2=1e-3, where=gradkern.recurrent)
    >>> [name for name, weight in rnn.named_parameters() if weight.grad is not None]
    ['weight_hh_l0']
    """
    for name, factor in (("l1", l1), ("l2", l2)):
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"add_penalty_: {name} must not be negative, infinite or NaN, got {factor}. "
                "0 leaves this penalty out."
            )
    chosen = [(name, weight) for name, weight in _select(params, where) if weight.requires_grad]
    _check(chosen)
    if not chosen or (l1 == 0 and l2 == 0):
        return torch.zeros((), dtype=torch.float64, device=ops.home([chosen[0][1]]) if chosen else "cpu")
    grads, weights = [], []
    for _, weight in chosen:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        grads.append(weight.grad)
        weights.append(weight.detach())
    return ops.add_penalty_(grads, weights, l1, l2).sum()


def recurrent(name: str, param: Tensor | None = None) -> bool:
    """Whether `name` is that of recurrent weights of RNN, LSTM, GRU or one of their cells: ``weight_hh*``.

    For `add_penalty_(where=...)` and for the patterns of policies, which give the name alone.

    >>> [name for name, weight in torch.nn.LSTM(2, 3).named_parameters() if gradkern.recurrent(name, weight)]
    ['weight_hh_l0']
    """
    return name.rpartition(".")[2].startswith("weight_hh")


def _select(params: Params, where: Where | None) -> list[tuple[str, Tensor]]:
    named: dict[Tensor, str] = {}  # by identity, each once
    for index, item in enumerate(as_items(params, "add_penalty_")):
        name, weight = item if isinstance(item, tuple) and len(item) == 2 else (f"parameters[{index}]", item)
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"add_penalty_: {name} is a {type(weight).__name__}; gradkern needs parameters as tensors "
                "or (name, tensor) pairs, or a module."
            )
        named.setdefault(weight, str(name))
    pairs = [(name, weight) for weight, name in named.items()]
    if where is None:
        return pairs
    if callable(where):
        chosen = [pair for pair in pairs if where(*pair)]
        if not chosen:
            raise ValueError(f"add_penalty_: where selects no parameter. {_known(pairs)}")
        return chosen
    patterns: Sequence[str] = (where,) if isinstance(where, str) else where
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(
            "add_penalty_: where must be a pattern, a list of patterns or a predicate on (name, parameter), "
            f"got {shown(where)}."
        )
    if not patterns:
        raise ValueError(f"add_penalty_: where holds no pattern. Use None for all. {_known(pairs)}")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in pairs):
            raise ValueError(f"add_penalty_: where {pattern!r} matches no parameter. {_known(pairs)}")
    return [pair for pair in pairs if any(fnmatchcase(pair[0], pattern) for pattern in patterns)]


def _known(pairs: Sequence[tuple[str, Tensor]]) -> str:
    shown = ", ".join(repr(name) for name, _ in pairs[:5])
    more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    return (
        f"The {len(pairs)} names are {shown}{more}; `*` stands for any part of a name. "
        "Pass a module or named_parameters() for names of your own."
    )


def _check(chosen: Sequence[tuple[str, Tensor]]) -> None:
    """Raise, naming the parameter, before anything is written."""
    for name, weight in chosen:
        grad = weight.grad
        if type(weight).__name__ == "DTensor":
            raise TypeError(
                f"add_penalty_: '{name}' ({describe(weight)}) is a DTensor; gradkern needs plain "
                "tensors, for the penalty's value would have to be added up over the mesh.\n"
                "Add the penalty to the loss instead, or use the optimizer's weight_decay."
            )
        if not (weight.is_floating_point() or weight.is_complex()) or weight.layout != torch.strided:
            raise TypeError(
                f"add_penalty_: '{name}' ({describe(weight)}) is not a dense floating-point tensor.\n"
                "Leave it out with `where`."
            )
        if grad is not None and grad.layout == torch.sparse_coo:
            raise TypeError(
                f"add_penalty_: gradient of '{name}' ({describe(grad)}) is sparse, but the penalty's "
                "gradient reaches every element; gradkern needs a dense gradient.\n"
                "Leave it out with `where`, or make the layer with sparse=False."
            )
    grads = [(name, weight.grad) for name, weight in chosen if weight.grad is not None]
    names = Names("parameters", [name for name, _ in grads], None, len(grads))
    check(names, [grad for _, grad in grads], "add_penalty_", writes=True, by_value=False)
