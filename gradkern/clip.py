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
    items = as_items(params, function, of_grads, stacklevel=4)
    if of_grads:
        _refuse_parameters(function, items)

    if ops.native is not None and nonfinite != "raise" and not torch.compiler.is_compiling():
        found = ops.native.clip_(items, norm_limit, limit, 0.0, value_limit, nonfinite, of_grads)
        if found is not None:
            rows, total, coef, present = found
            names = Names(_kind(of_grads), labels_of(items), present, rows.shape[0])
            return GradStats(rows, total, names, coef, value_limit, nonfinite)

    names, grads = collect(items, function, of_grads)
    by_value = value_limit < math.inf
    writes = norm_limit < math.inf or limit is not None or by_value or nonfinite == "zero"
    check(names, grads, function, writes=writes, by_value=by_value)
    with torch.no_grad():
        if nonfinite != "raise":
            rows, total, coef = ops.clip_(grads, norm_limit, limit, 0.0, value_limit, nonfinite)
            return GradStats(rows, total, names, coef, value_limit, nonfinite)
        rows, total = ops.measure(grads)
        coef = reference.coefficient(reference.norm_of(total, "keep"), norm_limit, limit, 0.0)
        stats = GradStats(rows, total, names, coef, value_limit, nonfinite)
        raise_nonfinite(function, stats, _RAISE_REMEDY)
        if writes:
            ops.apply_(grads, rows, coef, value_limit, "keep")
        return stats


def _measure(function: str, params: Params | Grads, of_grads: bool) -> GradStats:
    items = as_items(params, function, of_grads, stacklevel=4)
    if ops.native is not None and not torch.compiler.is_compiling():
        found = ops.native.measure(items, of_grads)
        if found is not None:
            rows, total, present = found
            return GradStats(rows, total, Names(_kind(of_grads), labels_of(items), present, rows.shape[0]))
    names, grads = collect(items, function, of_grads)
    check(names, grads, function, writes=False, by_value=False)
    with torch.no_grad():
        rows, total = ops.measure(grads)
    return GradStats(rows, total, names)


def _kind(of_grads: bool) -> str:
    return "grads" if of_grads else "parameters"


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
