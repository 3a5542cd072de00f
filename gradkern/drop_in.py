"""The functions of `torch.nn.utils` that clip gradients, with their signatures and torch's arithmetic.

Where torch is right they give its results. Where it is not they are right: sums do not overflow or vanish,
the norm of half-precision gradients is not rounded to their dtype, empty and sparse gradients work, and what
is passed twice counts once. `foreach` is accepted and changes nothing: there is one implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gradkern import reference
from gradkern.clip import Gradients, raise_nonfinite
from gradkern.errors import NonFiniteGradientError
from gradkern.params import Params, as_items, describe, limit_of, norm_limit_of
from gradkern.stats import GradStats, Stats

# torch divides by norm + 1e-6, so that a norm of 0 gives a coefficient.
_EPS = 1e-6
_REMEDY = "Pass error_if_nonfinite=False to clip all the same, with torch's arithmetic."
_FLOAT32_MAX = torch.finfo(torch.float32).max


def clip_grad_norm_(
    parameters: Params,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`: scale gradients in place by their joint norm.

    Args:
        parameters: a tensor or an iterable of them, as torch takes; a module or names with parameters too.
        max_norm: largest norm allowed; a 0-dim tensor on a device is used without waiting for it. With `inf`
            nothing is ever written, also where gradients are Inf.
        norm_type: order of the norm: any number, `inf` and `-inf` too.
        error_if_nonfinite: raise instead of scaling by a norm that is NaN or Inf. Waits for the device.
        foreach: has no effect.

    Returns:
        The norm before clipping, 0-dim: float64 if a gradient is, else float32. On the CPU it is float64 also
        where float32 would overflow; elsewhere only a wait for the device could tell, and it is Inf.

    Raises:
        NonFiniteGradientError: a `RuntimeError`, under `error_if_nonfinite`, naming the gradients.
        ValueError: a limit is negative or NaN.
        TypeError: a gradient cannot be clipped. In no case has a gradient been written.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, -4.0])
    >>> gradkern.clip_grad_norm_(weight, max_norm=10.0)
    tensor(5.)
    """
    function = "clip_grad_norm_"
    limit, limit_tensor = norm_limit_of(function, _given(function, "max_norm", max_norm))
    order = _order(function, norm_type)
    gradients = Gradients(as_items(parameters, function), function)
    writes = limit < math.inf or limit_tensor is not None
    if order == 2 and not error_if_nonfinite:
        _, total, _ = gradients.clip_(limit, limit_tensor, _EPS, math.inf, "propagate", writes)
        return _as_torch(gradients, _norm(gradients, total, order))
    rows, total = gradients.measure(writes=writes)
    norm = _norm(gradients, total, order)
    if error_if_nonfinite:
        _raise_nonfinite(function, GradStats(rows, total, gradients.names), norm, order)
    if writes:
        coef = reference.coefficient(norm, limit, limit_tensor, _EPS)
        gradients.apply_(rows, coef, math.inf, "propagate")
    return _as_torch(gradients, norm)


def clip_grad_value_(parameters: Params, clip_value: float, foreach: bool | None = None) -> None:
    """`torch.nn.utils.clip_grad_value_`: clamp the elements of gradients in place.

    A NaN stays, an Inf becomes the limit. Without any gradients there is nothing to do, and no error.

    Args:
        parameters: as in `clip_grad_norm_`.
        clip_value: largest magnitude allowed.
        foreach: has no effect.

    Raises:
        ValueError: the limit is negative or NaN.
        TypeError: a gradient is complex, or cannot be clipped for another reason. Nothing was written.

    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> weight.grad = torch.tensor([0.25, -4.0, float("inf")])
    >>> gradkern.clip_grad_value_(weight, 0.5)
    >>> weight.grad
    tensor([ 0.2500, -0.5000,  0.5000])
    """
    function = "clip_grad_value_"
    limit = limit_of(function, "clip_value", _given(function, "clip_value", clip_value))
    gradients = Gradients(as_items(parameters, function), function)
    gradients.clip_(math.inf, None, 0.0, limit, "propagate", writes=limit < math.inf)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.get_total_norm`: the norm of all elements of `tensors` together. Never writes.

    Arguments, result and errors as in `clip_grad_norm_`, of the tensors themselves and not their gradients.

    >>> gradkern.get_total_norm([torch.tensor([3.0, -4.0]), torch.tensor([])], float("inf"))
    tensor(4.)
    """
    function = "get_total_norm"
    order = _order(function, norm_type)
    gradients = Gradients(as_items(tensors, function, of_grads=True), function, of_grads=True)
    rows, total = gradients.measure(writes=False)
    norm = _norm(gradients, total, order)
    if error_if_nonfinite:
        _raise_nonfinite(function, GradStats(rows, total, gradients.names), norm, order)
    return _as_torch(gradients, norm)


def clip_grads_with_norm_(
    parameters: Params, max_norm: float, total_norm: Tensor | float, foreach: bool | None = None
) -> None:
    """`torch.nn.utils.clip_grads_with_norm_`: scale gradients in place by a norm known already.

    Multiplies by `min(1, max_norm / (total_norm + 1e-6))`, by nothing if the norm is 0 or the limit `inf`.

    Args:
        parameters, max_norm: as in `clip_grad_norm_`.
        total_norm: the norm, 0-dim, as `get_total_norm` returns it.
        foreach: has no effect.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, -4.0])
    >>> gradkern.clip_grads_with_norm_(weight, 1.0, torch.tensor(10.0))
    >>> weight.grad
    tensor([ 0.3000, -0.4000])
    """
    function = "clip_grads_with_norm_"
    limit, limit_tensor = norm_limit_of(function, _given(function, "max_norm", max_norm))
    if not isinstance(total_norm, Tensor):
        try:
            total_norm = torch.tensor(float(total_norm), dtype=torch.float64)
        except (TypeError, ValueError):
            raise TypeError(f"{function}: total_norm must be a number, got {total_norm!r}.") from None
    elif total_norm.dim() != 0 or total_norm.is_complex():
        raise ValueError(
            f"{function}: total_norm must be a number or a real 0-dim tensor, got {describe(total_norm)}."
        )
    gradients = Gradients(as_items(parameters, function), function)
    if limit == math.inf and limit_tensor is None:
        gradients.collect(writes=False)
        return
    if total_norm.device.type == "meta" and not all(
        grad.device.type == "meta" for grad in gradients.collect(writes=True)
    ):
        raise ValueError(
            f"{function}: total_norm is on the meta device, which holds no value, while the gradients have "
            "some. Pass the norm that get_total_norm returns for these gradients."
        )
    device = "cpu" if total_norm.device.type == "mps" else total_norm.device
    norm = total_norm.detach().to(device=device, dtype=torch.float64)
    gradients.apply_(None, reference.coefficient(norm, limit, limit_tensor, _EPS), math.inf, "propagate")


def _given(function: str, name: str, limit: object) -> object:
    """torch has no way to say "no limit" by None."""
    if limit is None:
        raise TypeError(f"{function}: {name} must be a number, got None; float('inf') sets no limit.")
    return limit


def _order(function: str, norm_type: float) -> float:
    try:
        order = float(norm_type)
    except (TypeError, ValueError):
        raise TypeError(f"{function}: norm_type must be a number, got {norm_type!r}.") from None
    if math.isnan(order):
        raise ValueError(f"{function}: norm_type must not be NaN; the usual ones are 2.0, 1.0, inf.")
    return order


def _norm(gradients: Gradients, total: Tensor, order: float) -> Tensor:
    """The norm in float64. Orders 2 and inf are known from the total alone."""
    if order == 2 and reference.is_readable(total):
        return torch.tensor(float(Stats(total)), dtype=torch.float64)  # fewer calls than in tensors
    grads = [] if order in (2, math.inf) else gradients.collect(writes=False)
    return reference.power_norm(grads, total, order)


def _as_torch(gradients: Gradients, norm: Tensor) -> Tensor:
    """The norm in the dtype, and on the device, that torch returns it in."""
    if len(gradients.names) == 0:
        return torch.tensor(0.0)
    if gradients.any_float64():
        return norm.to(gradients.device())
    if reference.is_readable(norm) and _FLOAT32_MAX < norm.item() < math.inf:
        return norm
    return norm.to(gradients.device(), torch.float32)


def _raise_nonfinite(function: str, stats: GradStats, norm: Tensor, order: float) -> None:
    raise_nonfinite(function, stats, _REMEDY)
    if not math.isfinite(norm.item()):
        raise NonFiniteGradientError(
            f"{function}: the norm of order {order} is beyond float64, although all elements are finite; "
            f"nothing was written.\n{_REMEDY}"
        )
