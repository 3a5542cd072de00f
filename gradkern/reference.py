"""The operations of gradkern in plain PyTorch.

Their specification, the oracle of the tests, and the way for every gradient without a kernel: other devices,
sparse, complex, or with gaps between its elements. Computes in float64 and in slices, never in a float64
copy of a whole gradient. Speed is not its purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# sum_sq, abs_max, nan_count, inf_count, zero_count: the members of `Stats` in csrc/core/stats.h.
COLUMNS = 5

# On a device every slice is a dozen launches; 4 Mi elements are 32 MiB in float64.
SLICE_NUMEL = 1 << 22
# On the CPU a slice that stays in cache is faster, and torch adds up less than 32 Ki elements on one thread:
# the bits of a sum do not depend on the number of threads.
CPU_SLICE_NUMEL = 1 << 14


def is_readable(tensor: Tensor) -> bool:
    """Whether looking at a value neither waits for a device nor breaks a graph."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        # FakeTensors and other wrappers bring their own; a plain tensor has the disabled one.
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


@torch.no_grad()
def measure(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Statistics of each gradient, float64 `[len(grads), 5]`, and of all together, float64 `[5]`.

    On the gradients' device; on the CPU for mps, which has no float64. Gradients that require grad are fine.

    >>> rows, total = measure([torch.tensor([3.0, -4.0]), torch.tensor([0.0, float("nan")])])
    >>> rows.tolist()
    [[25.0, 4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 1.0]]
    >>> total.tolist()
    [25.0, 4.0, 1.0, 0.0, 1.0]
    """
    if not grads:
        return torch.zeros(0, COLUMNS, dtype=torch.float64), torch.zeros(COLUMNS, dtype=torch.float64)
    rows = torch.stack([_row(stored_values(grad)) for grad in grads])
    return rows, merge(rows)


def merge(rows: Tensor) -> Tensor:
    """The statistics of several disjoint sets together: `[n, 5]` (n at least 1) to `[5]`."""
    sum_sq, _, *counts = rows.sum(0).unbind()
    return torch.stack([sum_sq, rows.select(1, 1).amax(), *counts])


@torch.no_grad()
def clip_(
    grads: Sequence[Tensor],
    max_norm: float,
    limit: Tensor | None,
    eps: float,
    clip_value: float,
    nonfinite: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Measure, decide, apply. Returns rows and total as `measure` does, and the coefficient.

    `limit`, a 0-dim tensor, replaces `max_norm`. No limit is `inf`. `nonfinite`: keep, zero or propagate.

    >>> grad = torch.tensor([3.0, -4.0])
    >>> rows, total, coef = clip_([grad], 1.0, None, 0.0, math.inf, "keep")
    >>> coef.item(), grad
    (0.2, tensor([ 0.6000, -0.8000]))
    """
    rows, total = measure(grads)
    coef = coefficient(norm_of(total, nonfinite), max_norm, limit, eps)
    apply_(grads, rows, coef, clip_value, nonfinite)
    return rows, total, coef


def norm_of(stats: Tensor, nonfinite: str = "propagate") -> Tensor:
    """The 2-norm of statistics `[..., 5]`: torch's answer under "propagate", else that of the finite part."""
    sum_sq, _, nan_count, inf_count, _ = stats.unbind(-1)
    norm = sum_sq.sqrt()
    if nonfinite == "propagate":
        norm = torch.where(inf_count > 0, math.inf, norm)
        norm = torch.where(nan_count > 0, math.nan, norm)
    return norm


def coefficient(norm: Tensor, max_norm: float, limit: Tensor | None, eps: float) -> Tensor:
    """`min(1, max_norm / (norm + eps))`; exactly 1 if the norm is 0 or the limit `inf`. NaN stays NaN."""
    # As a tensor: `number / tensor` is a reciprocal and a product in torch, rounded twice.
    limit = torch.full_like(norm, max_norm) if limit is None else limit.detach().to(norm.device, norm.dtype)
    coef = (limit / (norm + eps)).clamp(max=1)
    return torch.where((norm == 0) | (limit == math.inf), 1.0, coef)


@torch.no_grad()
def apply_(
    grads: Sequence[Tensor], rows: Tensor | None, coef: Tensor, clip_value: float, nonfinite: str
) -> None:
    """Replace every element by `clamp(element * coef, -clip_value, clip_value)`, in place.

    `coef`: float64, 0-dim or one per gradient. `rows`, as measured, tell where nothing would change: there
    nothing is written. On a device that cannot be asked without waiting, everything is written.

    >>> grad = torch.tensor([3.0, float("nan"), -4.0])
    >>> apply_([grad], None, torch.tensor(0.5, dtype=torch.float64), 1.75, "zero")
    >>> grad
    tensor([ 1.5000,  0.0000, -1.7500])
    """
    writes = [True] * len(grads)
    if is_readable(coef):
        stats = [[math.inf] * COLUMNS] * len(grads) if rows is None else rows.tolist()
        factors = coef.expand(len(grads)).tolist()
        for index, grad in enumerate(grads):
            writes[index] = _changes(stats[index], factors[index], _rounded(clip_value, grad), nonfinite)
    for grad, factor, write in zip(grads, coef.expand(len(grads)).unbind(), writes, strict=True):
        if write:
            _write(grad, factor, clip_value, nonfinite)


def unit_count(tensor: Tensor) -> int:
    """Units of a tensor: its slices along dim 0 if it has two or more dimensions, else the whole of it."""
    return len(tensor) if tensor.dim() > 1 else 1


@torch.no_grad()
def unit_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of the finite elements of each unit, those of all tensors in one: float64 `[units]`.

    >>> unit_sums([torch.tensor([[3.0, 4.0], [1.0, float("inf")]]), torch.tensor([2.0, 1.0])]).tolist()
    [25.0, 1.0, 5.0]
    """
    sums = []
    for tensor in tensors:
        for piece in _unit_pieces(tensor):
            square = _magnitude(piece).square()
            finite = torch.where(square < math.inf, square, 0.0)
            sums.append(finite.reshape(unit_count(piece), piece.numel() // max(1, unit_count(piece))).sum(1))
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def apply_units_(grads: Sequence[Tensor], coef: Tensor, clip_value: float, nonfinite: str) -> None:
    """As `apply_`, with a coefficient for each unit, float64 `[units]`.

    >>> grad = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    >>> apply_units_([grad], torch.tensor([0.5, 1.0], dtype=torch.float64), math.inf, "keep")
    >>> grad
    tensor([[1.5000, 2.0000],
            [1.0000, 2.0000]])
    """
    can_skip = clip_value == math.inf and nonfinite != "zero" and is_readable(coef)
    first = 0
    for grad in grads:
        for piece in _unit_pieces(grad):
            part = coef.narrow(0, first, unit_count(piece))
            first += unit_count(piece)
            if not (can_skip and bool((part == 1).all())):
                _assign(piece, _clipped(piece, _per_unit(part, piece), clip_value, nonfinite))


def _per_unit(coef: Tensor, piece: Tensor) -> Tensor:
    """A coefficient for each unit in a shape that multiplies the units."""
    return coef.view(-1, *[1] * (piece.dim() - 1)) if piece.dim() > 1 else coef.view(())


def _unit_pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views of whole units that together cover `tensor`, each of limited size if its units are."""
    if tensor.dim() < 2 or tensor.numel() == 0:
        return (tensor,)
    return torch.split(tensor, max(1, SLICE_NUMEL * len(tensor) // tensor.numel()))


@torch.no_grad()
def power_norm(grads: Sequence[Tensor], total: Tensor, order: float) -> Tensor:
    """The norm of any order of all elements together: 0-dim float64, torch's answer for NaN and Inf.

    `total` as measured. Order 0 counts the elements that are not zero. Negative orders are dominated by the
    smallest magnitude, and 0 where an element is. Empty tensors contribute nothing.

    >>> grads = [torch.tensor([3.0, -4.0]), torch.tensor([])]
    >>> power_norm(grads, measure(grads)[1], 1.0)
    tensor(7., dtype=torch.float64)
    """
    values = [stored_values(grad) for grad in grads]
    _, abs_max, nan_count, inf_count, zero_count = total.unbind()
    if order == 2:
        return norm_of(total)
    if order == 0:
        return sum(part.numel() for part in values) - zero_count
    if order == math.inf:
        norm = torch.where(inf_count > 0, math.inf, abs_max)
    else:
        pieces = [piece for part in values for piece in _pieces(part)]
        if not pieces:
            return torch.zeros_like(abs_max)
        if order > 0:
            pivot = abs_max
        else:
            pivot = torch.stack([_magnitude(piece).amin().to(total.device) for piece in pieces]).amin()
        if order == -math.inf:
            norm = pivot
        else:
            # Relative to the element that matters most no power overflows or vanishes that should not.
            pivot = torch.where((pivot > 0) & (pivot < math.inf), pivot, 1.0)
            sums = [(_magnitude(piece) / pivot).pow(order).sum().to(total.device) for piece in pieces]
            norm = pivot * torch.stack(sums).sum().pow(1 / order)
    return torch.where(nan_count > 0, math.nan, norm)


@torch.no_grad()
def add_penalty_(grads: Sequence[Tensor], weights: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """Add the gradient of ``l1 * sum(abs(w)) + l2 * sum(w ** 2)`` to the gradients of the weights.

    Returns the value of each weight's penalty, float64 `[len(grads)]`, on the device of the first.

    >>> grad = torch.zeros(2)
    >>> add_penalty_([grad], [torch.tensor([3.0, -4.0])], 0.5, 0.25), grad
    (tensor([9.7500], dtype=torch.float64), tensor([ 2.0000, -2.5000]))
    """
    values = [_penalised(grad, weight, l1, l2) for grad, weight in zip(grads, weights, strict=True)]
    return torch.stack([value.to(values[0].device) for value in values])


def stored_values(grad: Tensor) -> Tensor:
    """The elements of a gradient as a strided tensor: of a sparse one, its coalesced values."""
    return grad.coalesce()._values() if grad.layout == torch.sparse_coo else grad


def _pieces(tensor: Tensor) -> list[Tensor]:
    """Views that together cover `tensor`, each of limited size, in any layout. None for an empty tensor."""
    most = SLICE_NUMEL
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        most = CPU_SLICE_NUMEL
    if tensor.numel() <= most:
        return [tensor] if tensor.numel() > 0 else []
    if tensor.is_contiguous():
        return list(torch.split(tensor.view(-1), most))
    dim = next(dim for dim, size in enumerate(tensor.shape) if size > 1)
    step = max(1, most * tensor.shape[dim] // tensor.numel())
    return [piece for part in torch.split(tensor, step, dim) for piece in _pieces(part)]


def _magnitude(piece: Tensor) -> Tensor:
    """Magnitudes in float64; of a complex element its modulus."""
    if piece.device.type == "mps":
        piece = piece.cpu()
    return piece.to(torch.complex128 if piece.is_complex() else torch.float64).abs()


def _row(values: Tensor) -> Tensor:
    pieces = _pieces(values)
    device = "cpu" if values.device.type == "mps" else values.device
    # One tensor for all parts: small ones of their own, made between the large temporaries and kept, would
    # leave holes in the heap that no later temporary fits.
    parts = torch.zeros(max(1, len(pieces)), COLUMNS, dtype=torch.float64, device=device)
    for index, piece in enumerate(pieces):
        _assign(parts.select(0, index), _part(piece))
    return merge(parts)


def _part(piece: Tensor) -> Tensor:
    magnitude = _magnitude(piece)
    # A complex element is NaN if either part is, else Inf if either part is.
    nan = piece.isnan().to(magnitude.device)
    nonfinite = piece.isfinite().logical_not().to(magnitude.device)
    finite = magnitude.masked_fill(nonfinite, 0.0)
    inf_count = nonfinite & nan.logical_not()
    columns = [finite.square().sum(), finite.amax(), nan.sum(), inf_count.sum(), (magnitude == 0).sum()]
    return torch.stack([column.to(torch.float64) for column in columns])


def _rounded(bound: float, grad: Tensor) -> float:
    """`bound` as the nearest number of the gradient's dtype, which is what an element can be clamped to."""
    if grad.dtype in (torch.float64, torch.complex128):
        return bound
    dtype = torch.float32 if grad.is_complex() else grad.dtype
    return torch.tensor(bound, dtype=torch.float32).to(dtype).item()


def _changes(stats: list[float], coef: float, bound: float, nonfinite: str) -> bool:
    """Whether anything changes in a tensor with these statistics: `changes()` of csrc/core/clip.h."""
    _, abs_max, nan_count, inf_count, _ = stats
    has_nonfinite = nan_count > 0 or inf_count > 0
    if nonfinite == "zero" and has_nonfinite:
        return True
    propagates = nonfinite == "propagate" and has_nonfinite
    if coef != 1:
        return abs_max > 0 or propagates or math.isnan(coef)
    return not abs_max <= bound or (propagates and inf_count > 0 and bound < math.inf)


def _write(grad: Tensor, coef: Tensor, clip_value: float, nonfinite: str) -> None:
    if grad.layout == torch.sparse_coo:
        coalesced = grad.coalesce()
        _write(coalesced._values(), coef, clip_value, nonfinite)
        if coalesced is grad:
            torch.autograd.graph.increment_version(grad)  # its values are a tensor of their own
        else:
            grad.copy_(coalesced)
    elif _is_locked(grad):
        with torch.inference_mode():
            _write(grad, coef, clip_value, nonfinite)
    else:
        for piece in _pieces(grad):
            _assign(piece, _clipped(piece, coef, clip_value, nonfinite))


def _is_locked(grad: Tensor) -> bool:
    """Whether it was made in inference mode, outside of which torch refuses to write to it."""
    if torch.compiler.is_compiling():
        return False
    return grad.is_inference() and not torch.is_inference_mode_enabled()


def _clipped(piece: Tensor, coef: Tensor, clip_value: float, nonfinite: str) -> Tensor:
    if piece.is_complex():
        # By parts: as a complex number the coefficient would turn an Inf into NaN.
        parts = [_scaled(piece.real, coef), _scaled(piece.imag, coef)]
        new = torch.complex(parts[0], parts[1])
    else:
        new = _scaled(piece, coef)
        if clip_value < math.inf:
            bound = torch.full((), clip_value, dtype=torch.float32, device=piece.device)
            if piece.dtype == torch.float64:
                bound = bound.to(piece.dtype).fill_(clip_value)
            bound = bound.to(piece.dtype)
            new = torch.where(new.abs() > bound, torch.copysign(bound, new), new)
    if nonfinite == "keep":
        return torch.where(piece.isfinite(), new, piece)
    if nonfinite == "zero":
        return torch.where(piece.isfinite(), new, 0)
    return new


def _scaled(piece: Tensor, coef: Tensor) -> Tensor:
    """The product, in float64 and rounded once for float32 and float64.

    In float32 for half precision, whose rounding hides that, unless the coefficient is no normal float32.
    """
    has_float64 = piece.device.type != "mps"
    if piece.dtype not in (torch.float16, torch.bfloat16):
        wide = torch.float64 if has_float64 else torch.float32
        return (piece.to(wide) * coef.to(piece.device, wide)).to(piece.dtype)
    factor = coef.to(piece.device, torch.float32)
    product = piece.float() * factor
    if has_float64:
        exact = (piece.double() * coef.to(piece.device)).float()
        product = torch.where(factor < torch.finfo(torch.float32).tiny, exact, product)
    return product.to(piece.dtype)


def _assign(target: Tensor, values: Tensor) -> None:
    # Not target.copy_(), which wants a driver even for the fake tensors of a device.
    torch.ops.aten.copy_.default(target, values)


def _penalised(grad: Tensor, weight: Tensor, l1: float, l2: float) -> Tensor:
    """The penalty's value of one tensor, 0-dim float64; its gradient is added to `grad`."""
    home = torch.device("cpu") if weight.device.type == "mps" else weight.device
    values = [torch.zeros((), dtype=torch.float64, device=home)]
    for grad_piece, weight_piece in _pairs_of_pieces(grad, weight):
        wide = torch.complex128 if weight.is_complex() else torch.float64
        w = weight_piece.to(home).to(wide)
        # A term that is not wanted is left out, not multiplied by 0: a weight may be Inf.
        value, gradient = torch.zeros((), dtype=torch.float64, device=w.device), torch.zeros_like(w)
        if l1 != 0:
            value = value + l1 * w.abs().sum()
            gradient = gradient + l1 * w.sgn()
        if l2 != 0:
            value = value + l2 * (w.real.square() + w.imag.square() if w.is_complex() else w.square()).sum()
            gradient = gradient + 2 * l2 * w
        values.append(value)
        # Not copy_(), which wants a driver even for the fake tensors of a device.
        torch.ops.aten.copy_.default(grad_piece, grad_piece.to(w.device).to(wide) + gradient)
    return torch.stack(values).sum()


def _pairs_of_pieces(grad: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same elements of both, each of limited size, whatever their strides."""
    if weight.numel() <= SLICE_NUMEL:
        if weight.numel() > 0:
            yield grad, weight
        return
    dim = next(dim for dim, size in enumerate(weight.shape) if size > 1)
    step = max(1, SLICE_NUMEL * weight.shape[dim] // weight.numel())
    for parts in zip(torch.split(grad, step, dim), torch.split(weight, step, dim), strict=True):
        yield from _pairs_of_pieces(*parts)
