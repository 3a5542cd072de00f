"""Measure gradients and clip them: by their joint norm, by value, or both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradkern import ops, reference
from gradkern.errors import NonFiniteGradientError
from gradkern.params import (
    Grads,
    Names,
    Params,
    as_items,
    check,
    check_nonfinite,
    collect,
    labels_of,
    limit_of,
    norm_limit_of,
)
from gradkern.stats import GradStats

# Gradients that an error message names; a model has hundreds, and the worst few tell where to look.
_LISTED = 10

_RAISE_REMEDY = (
    "torch.autograd.set_detect_anomaly(True) finds the operation that made a NaN; nonfinite='keep' or 'zero' "
    "clips the rest and goes on."
)


def clip_(
    params: Params,
    max_norm: float | Tensor | None = None,
    *,
    clip_value: float | None = None,
    nonfinite: str = "keep",
) -> GradStats:
    """Clip the gradients of `params` in place: by their joint 2-norm, by value, or both (norm first).

    Every gradient is read once to be measured and, only where clipping changes something, once more to be
    written. By value alone it measures and writes in one pass. The usual limits are a norm of 1.0 or a value
    of 0.5: `clip_(params, 1.0)`, `clip_(params, clip_value=0.5)`.

    Args:
        params: a module, its parameters (a tensor or an iterable of them), (name, parameter) pairs as
            `module.named_parameters()` yields, or a mapping of names to parameters. Those whose `.grad` is
            None are left out; one that is passed twice counts once.
        max_norm: largest joint 2-norm allowed: gradients are multiplied by `min(1, max_norm / norm)`. A 0-dim
            tensor may be passed; one that is not on the CPU is not checked, since that would wait for it.
        clip_value: largest magnitude allowed of any element, after `max_norm`.
        nonfinite: what becomes of NaN and Inf elements.
            "keep": they stay, bit for bit; all others are clipped by the norm of the finite part.
            "zero": the same, and then they become 0.
            "propagate": torch's arithmetic. An Inf zeroes what is finite, a NaN makes everything NaN.
            "raise": `NonFiniteGradientError` names them, and nothing is written. Waits for the device.

    Returns:
        The statistics of the gradients before clipping, float64, on their device; gradients on the CPU and on
        another device meet on the other. Nothing has waited for a device, unless gradients on the CPU had to
        be clipped by a norm from another device.

    Raises:
        ValueError: a limit is negative or NaN, `nonfinite` is another word, or there is nothing to do.
        TypeError: a gradient cannot be clipped (an integer, an expanded or a distributed tensor, a complex
            one by value), or `params` holds something else than parameters.
        NonFiniteGradientError: under "raise". In no case has a gradient been written.

    Source: Pascanu, Mikolov, Bengio 2013, section 3.2 (arXiv 1211.5063); by value: Mikolov 2012.

    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> weight.grad = torch.tensor([1.0, 2.0, 2.0])
    >>> stats = gradkern.clip_([weight], max_norm=1.5)
    >>> float(stats.norm), float(stats.coef), weight.grad
    (3.0, 0.5, tensor([0.5000, 1.0000, 1.0000]))
    """
    return _clip("clip_", params, max_norm, clip_value, nonfinite, False)


def measure(params: Params) -> GradStats:
    """Measure the gradients of `params` in one read. Never writes, and never waits for a device.

    Takes what `clip_` takes. Expanded gradients can be measured although they cannot be clipped.

    Raises:
        TypeError: something in `params` is no parameter, or its gradient cannot be read.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, float("nan")])
    >>> stats = gradkern.measure({"weight": weight})
    >>> stats.norm.item(), stats.finite_norm.item(), stats["weight"].nan_count.item()
    (nan, 3.0, 1.0)
    """
    return _measure("measure", params, False)


def clip_grads_(
    named_grads: Grads,
    max_norm: float | Tensor | None = None,
    *,
    clip_value: float | None = None,
    nonfinite: str = "keep",
) -> GradStats:
    """`clip_` for gradients themselves: flat buffers, `main_grad`, what `torch.autograd.grad` returns.

    Args:
        named_grads: a tensor, an iterable of tensors or of (name, tensor) pairs, or a mapping of names to
            tensors. Those that are None are left out. All else is as in `clip_`.

    >>> flat = torch.tensor([3.0, -4.0])
    >>> gradkern.clip_grads_({"flat": flat}, clip_value=3.5)
    GradStats(norm=5, abs_max=4, coef=1, 1 tensor)
    >>> flat
    tensor([ 3.0000, -3.5000])
    """
    return _clip("clip_grads_", named_grads, max_norm, clip_value, nonfinite, True)


def measure_grads(named_grads: Grads) -> GradStats:
    """`measure` for gradients themselves, in the forms that `clip_grads_` takes.

    >>> float(gradkern.measure_grads([torch.tensor([3.0]), None, torch.tensor([4.0])]))
    5.0
    """
    return _measure("measure_grads", named_grads, True)


def raise_nonfinite(function: str, stats: GradStats, remedy: str) -> None:
    """Raise `NonFiniteGradientError`, naming the worst gradients, if there are any. Waits for the device."""
    stats.require_values(function)
    if bool(stats.is_finite):
        return
    counts = [
        (int(nan_count), int(inf_count), name)
        for (_, _, nan_count, inf_count, _), name in zip(stats.rows.tolist(), stats.names, strict=True)
        if nan_count + inf_count > 0
    ]
    counts.sort(key=lambda entry: entry[0] + entry[1], reverse=True)
    lines = [
        f"{function}: {len(counts)} of {len(stats.names)} gradients are not finite; nothing was written."
    ]
    for nan_count, inf_count, name in counts[:_LISTED]:
        words = [f"{count} {word}" for count, word in ((nan_count, "NaN"), (inf_count, "Inf")) if count]
        lines.append(f"  '{name}': {', '.join(words)}")
    if len(counts) > _LISTED:
        lines.append(f"  and {len(counts) - _LISTED} more")
    error = NonFiniteGradientError("\n".join([*lines, remedy]))
    error.stats = stats
    raise error


class Gradients:
    """The gradients behind a list of items, to measure and write.

    Where all are plain they are walked in C++, without a Python object for each. Else, and under
    `torch.compile`, they are collected here, and checked before anything is written.

    Attributes:
        names: of those that have a row; there once they have been measured.
    """

    __slots__ = ("_device", "_function", "_grads", "_items", "_of_grads", "names")

    names: Names
    _device: torch.device

    def __init__(self, items: list[object], function: str, of_grads: bool = False) -> None:
        self._items = items
        self._function = function
        self._of_grads = of_grads
        self._grads: list[Tensor] | None = None

    def measure(self, *, writes: bool, by_value: bool = False) -> ops.Measured:
        """Rows and total. `writes`, `by_value`: what is going to happen to them, for the checks."""
        if _can_walk():
            found = ops.native.measure(self._items, self._of_grads)
            if found is not None:
                rows, total, present = found
                self._name(present, rows)
                return rows, total
        grads = self.collect(writes=writes, by_value=by_value)
        with torch.no_grad():
            return ops.measure(grads)

    def clip_(
        self,
        max_norm: float,
        limit: Tensor | None,
        eps: float,
        clip_value: float,
        nonfinite: str,
        writes: bool = True,
    ) -> ops.Clipped:
        """Rows, total and coefficient, as `ops.clip_`."""
        if _can_walk():
            found = ops.native.clip_(self._items, max_norm, limit, eps, clip_value, nonfinite, self._of_grads)
            if found is not None:
                rows, total, coef, present = found
                self._name(present, rows)
                return rows, total, coef
        grads = self.collect(writes=writes, by_value=clip_value < math.inf)
        with torch.no_grad():
            return ops.clip_(grads, max_norm, limit, eps, clip_value, nonfinite)

    def apply_(self, rows: Tensor | None, coef: Tensor, clip_value: float, nonfinite: str) -> None:
        """As `ops.apply_`."""
        walks = self._grads is None and _can_walk()
        if walks and ops.native.apply_(self._items, rows, coef, clip_value, nonfinite, self._of_grads):
            return
        grads = self.collect(writes=True, by_value=clip_value < math.inf)
        with torch.no_grad():
            ops.apply_(grads, rows, coef, clip_value, nonfinite)

    def collect(self, *, writes: bool, by_value: bool = False) -> list[Tensor]:
        """The gradients, checked."""
        if self._grads is None:
            self.names, self._grads = collect(self._items, self._function, self._of_grads)
        check(self.names, self._grads, self._function, writes=writes, by_value=by_value)
        return self._grads

    def any_float64(self) -> bool:
        """Whether one of them is. Only after measuring or clipping."""
        if self._grads is None:
            return bool(ops.native.any_float64(self._items, self._of_grads))
        return any(grad.dtype in (torch.float64, torch.complex128) for grad in self._grads)

    def device(self) -> torch.device:
        """The first one's. Only after measuring or clipping."""
        return self._device if self._grads is None else self._grads[0].device

    def _name(self, present: list[int] | None, rows: Tensor) -> None:
        kind = "grads" if self._of_grads else "parameters"
        self._device = rows.device
        self.names = Names(kind, labels_of(self._items), present, rows.shape[0], self._items)


def _can_walk() -> bool:
    return ops.native is not None and not torch.compiler.is_compiling()


def _clip(
    function: str,
    params: Params | Grads,
    max_norm: float | Tensor | None,
    clip_value: float | None,
    nonfinite: str,
    of_grads: bool,
) -> GradStats:
    norm_limit, limit = norm_limit_of(function, max_norm)
    value_limit = limit_of(function, "clip_value", clip_value)
    check_nonfinite(function, nonfinite)
    if max_norm is None and clip_value is None and nonfinite in ("keep", "propagate"):
        other = "measure_grads" if of_grads else "measure"
        raise ValueError(
            f"{function}: neither max_norm nor clip_value is given, so nothing would be clipped. "
            f"Pass a limit, or call gradkern.{other} to look without writing."
        )
    items = as_items(params, function, of_grads)
    if of_grads:
        _refuse_parameters(function, items)
    by_value = value_limit < math.inf
    writes = norm_limit < math.inf or limit is not None or by_value or nonfinite == "zero"
    gradients = Gradients(items, function, of_grads)
    if nonfinite != "raise":
        rows, total, coef = gradients.clip_(norm_limit, limit, 0.0, value_limit, nonfinite, writes)
        return GradStats(rows, total, gradients.names, coef, value_limit, nonfinite)
    rows, total = gradients.measure(writes=writes, by_value=by_value)
    coef = reference.coefficient(reference.norm_of(total, "keep"), norm_limit, limit, 0.0)
    stats = GradStats(rows, total, gradients.names, coef, value_limit, nonfinite)
    raise_nonfinite(function, stats, _RAISE_REMEDY)
    if writes:
        gradients.apply_(rows, coef, value_limit, "keep")
    return stats


def _measure(function: str, params: Params | Grads, of_grads: bool) -> GradStats:
    gradients = Gradients(as_items(params, function, of_grads), function, of_grads)
    rows, total = gradients.measure(writes=False)
    return GradStats(rows, total, gradients.names)


def _refuse_parameters(function: str, items: Sequence[object]) -> None:
    """Whoever passes parameters here would have their weights clipped. A look at the first is enough."""
    first = items[0] if items else None
    if isinstance(first, tuple) and len(first) == 2:
        first = first[1]
    if isinstance(first, nn.Parameter):
        raise TypeError(
            f"{function}: its first item is a parameter, not a gradient, and would itself be clipped. "
            "To clip the gradients of parameters call gradkern.clip_."
        )
