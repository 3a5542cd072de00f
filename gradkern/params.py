"""From what users pass as parameters to named gradients: names, checks and the messages of both."""

from __future__ import annotations

import math
import sys
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

Params: TypeAlias = (
    Tensor | nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]
)
"""Parameters as a tensor, an iterable of tensors, (name, tensor) pairs, a mapping of names, or a module."""

Grads: TypeAlias = (
    Tensor | Iterable[Tensor | None] | Iterable[tuple[str, Tensor | None]] | Mapping[str, Tensor | None]
)
"""Gradients themselves in the same forms, but no module. Those that are None are skipped."""

NONFINITE_WORDS = ("keep", "zero", "propagate", "raise")

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


class Names:
    """Names of the gradients that gave a row, in order. Costs next to nothing until somebody asks.

    Attributes:
        keeps_ids: of the class: somebody wants to know which items those without names were.
        ids: the id() of each item then, and not the items, which would keep a model alive. Else None.
    """

    __slots__ = ("_count", "_kind", "_labels", "ids", "present")

    keeps_ids: ClassVar[bool] = False

    def __init__(
        self,
        kind: str,
        labels: Sequence[str | None] | None,
        present: Sequence[int] | None,
        count: int,
        items: Sequence[object] = (),
    ) -> None:
        self._kind = kind  # what an item without a name is called: kind[index]
        self._labels = labels  # one per item, or None if no item has a name
        self.present = present  # items that gave a row, or None if all of them did
        self._count = count
        keeps = Names.keeps_ids and labels is None and not torch.compiler.is_compiling()
        self.ids = tuple(map(id, items)) if keeps else None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> str:
        item = row if self.present is None else self.present[row]
        label = None if self._labels is None else self._labels[item]
        return f"{self._kind}[{item}]" if label is None else label

    def to_list(self) -> list[str]:
        """All names."""
        return [self[row] for row in range(self._count)]


def as_items(params: Params | Grads, function: str, of_grads: bool = False) -> list[object]:
    """`params` as a list of tensors and (name, tensor) pairs; not yet looked into.

    Warns, as torch does, of a generator that has nothing left to give.
    """
    if type(params) is list:
        return params
    if isinstance(params, nn.Module) and not of_grads:
        return list(params.named_parameters())
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, Mapping):
        return list(params.items())
    wanted = "gradients" if of_grads else "parameters"
    if isinstance(params, (str, bytes, nn.Module)) or not isinstance(params, Iterable):
        hint = ""
        if isinstance(params, torch.optim.Optimizer):
            hint = "\nPass [p for group in optimizer.param_groups for p in group['params']] for all it steps."
        elif isinstance(params, nn.Module):
            hint = "\nFor the gradients of its parameters there is the function that takes parameters."
        raise TypeError(
            f"{function}: {wanted} must be a tensor, or an iterable or mapping of tensors, "
            f"got {type(params).__name__}.{hint}"
        )
    items: list[object] = list(params)
    if not items and isinstance(params, types.GeneratorType):
        _warn(
            f"{function}: {wanted} is a generator with nothing left in it, so nothing is done. "
            "model.parameters() can be walked once only: call it anew for every step, or keep a list."
        )
    return items


def labels_of(items: Sequence[object]) -> list[str | None] | None:
    """Names given with the items, by a look at the first. None if they have none."""
    if not items or type(items[0]) is not tuple:
        return None
    return [item[0] if type(item) is tuple else None for item in items]


def collect(items: Sequence[object], function: str, of_grads: bool = False) -> tuple[Names, list[Tensor]]:
    """The gradients of `items`, each once, with their names. Those that are None are left out."""
    kind = "grads" if of_grads else "parameters"
    labels: list[str | None] = []
    present: list[int] = []
    grads: list[Tensor] = []
    seen: set[Tensor] = set()  # by identity
    for index, item in enumerate(items):
        label: str | None
        tensor: object
        label, tensor = item if _is_pair(item) else (None, item)
        labels.append(label)
        if of_grads:
            if tensor is None:
                continue
            grad = tensor
        else:
            grad = tensor.grad if isinstance(tensor, Tensor) else tensor
            if grad is None and isinstance(tensor, Tensor):
                continue
        if not isinstance(grad, Tensor):
            name = f"{kind}[{index}]" if label is None else f"'{label}'"
            raise TypeError(_not_a_tensor(function, name, tensor, of_grads))
        if grad in seen:
            continue
        seen.add(grad)
        present.append(index)
        grads.append(grad)
    if not grads and not of_grads:
        _warn_of_bare_tensors(items, function)
    if labels.count(None) == len(labels):
        return Names(kind, None, present, len(grads), items), grads
    return Names(kind, labels, present, len(grads)), grads


def check(names: Names, grads: Sequence[Tensor], function: str, *, writes: bool, by_value: bool) -> None:
    """Raise, naming the parameter, if some gradient cannot be measured or, where asked, not be written."""
    for row, grad in enumerate(grads):
        problem = _problem(grad, writes, by_value)
        if problem is None:
            continue
        what, needs, remedy = problem
        raise TypeError(
            f"{function}: gradient of {_quoted(names, row)} ({describe(grad)}) {what}; "
            f"gradkern needs {needs}.\n{remedy}"
        )
    meta = [grad.device.type == "meta" for grad in grads]
    if any(meta) and not all(meta):
        row = meta.index(True)
        raise TypeError(
            f"{function}: gradient of {_quoted(names, row)} ({describe(grads[row])}) holds no values, while "
            f"that of {_quoted(names, meta.index(False))} does; gradkern needs all or none of them on the "
            "meta device.\nMaterialise the module with module.to_empty(device=...) and load its state."
        )


def describe(tensor: Tensor) -> str:
    """Dtype, shape and device for a message: `float32 [50257, 768], cpu`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, {tensor.device}"


def limit_of(function: str, name: str, value: object) -> float:
    """A limit as a float, `inf` for None. Raises if it is negative, NaN or no number."""
    if value is None:
        return math.inf
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{function}: {name} must be a number, got {shown(value)}.") from None
    if number >= 0:
        return number
    fault = "be NaN" if math.isnan(number) else "be negative"
    raise ValueError(
        f"{function}: {name} must not {fault}, got {number}. Pass a number from 0 up; "
        "float('inf') sets no limit."
    )


def norm_limit_of(function: str, value: object) -> tuple[float, Tensor | None]:
    """The same for `max_norm`, which may be a 0-dim tensor.

    One whose value cannot be read without waiting for a device, or without breaking a graph, is returned as
    it is in second place, and not validated.
    """
    if not isinstance(value, Tensor):
        return limit_of(function, "max_norm", value), None
    if value.dim() != 0 or value.is_complex():
        raise ValueError(
            f"{function}: max_norm must be a number or a real 0-dim tensor, got {describe(value)}."
        )
    if value.device.type == "meta":
        raise ValueError(
            f"{function}: max_norm is on the meta device, which holds no value. Pass a number, or a tensor "
            "that was made outside of torch.device('meta')."
        )
    if torch.compiler.is_compiling() or value.device.type != "cpu" or _is_wrapper(value):
        return math.inf, value
    return limit_of(function, "max_norm", value.detach()), None


def check_nonfinite(function: str, word: object) -> None:
    """Raise unless `word` is one of `NONFINITE_WORDS`."""
    if word not in NONFINITE_WORDS:
        raise ValueError(
            f"{function}: nonfinite must be 'keep', 'zero', 'propagate' or 'raise', got {word!r}."
        )


def has_gaps(tensor: Tensor) -> bool:
    """Whether a strided tensor is other than one dense block of memory, in whatever order of dimensions."""
    return not tensor.is_contiguous() and _extent(tensor) != tensor.numel()  # empty ones are contiguous


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last in memory; 0 if two indices may share a place."""
    extent = 1
    dims = sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )
    for stride, size in dims:
        if stride < extent:
            return 0
        extent += stride * (size - 1)
    return extent


def _problem(grad: Tensor, writes: bool, by_value: bool) -> tuple[str, str, str] | None:
    """What is wrong with a gradient, what is needed, and what to do about it. None if all is well."""
    if type(grad).__name__ == "DTensor":
        return (
            "is a DTensor",
            "plain tensors, for it does not yet know how to add up over a device mesh",
            "Use torch.nn.utils.clip_grad_norm_ for this model, or pass to_local() of each gradient to "
            "gradkern.clip_grads_ if the norm of this rank's part is meant.",
        )
    if grad.dtype not in _DTYPES:
        return (
            "is not of a floating-point type that gradkern reads",
            "float32, float64, bfloat16, float16, complex64 or complex128",
            "Leave this parameter out, or give it a gradient of such a type.",
        )
    if grad.layout not in (torch.strided, torch.sparse_coo) or grad.is_nested:
        layout = "nested" if grad.is_nested else str(grad.layout).removeprefix("torch.")
        return (
            f"is stored as {layout}",
            "dense (strided) or sparse_coo gradients",
            "Convert it first, for example by p.grad = p.grad.to_dense().",
        )
    if by_value and grad.is_complex():
        return (
            "is complex, so its elements cannot be clamped to a range",
            "real gradients to clip by value",
            "Clip it by its norm, or leave this parameter out.",
        )
    if writes and grad.layout == torch.strided and not grad.is_contiguous() and _extent(grad) == 0:
        return (
            f"has elements that share memory (strides {list(grad.stride())}, as expand() makes them)",
            "a place for each element to write to",
            "Give it memory of its own first: p.grad = p.grad.contiguous(). gradkern.measure reads it as is.",
        )
    return None


def _not_a_tensor(function: str, name: str, item: object, of_grads: bool) -> str:
    hint, kind = "", type(item).__name__
    if isinstance(item, tuple):
        kind = f"({', '.join(type(part).__name__ for part in item)})"
    if isinstance(item, Mapping) and "params" in item:
        hint = "\nFor all groups: [p for group in optimizer.param_groups for p in group['params']]."
    elif isinstance(item, nn.Module) and not of_grads:
        hint = "\nPass one module, or chain the parameters of several: itertools.chain(a.parameters(), ...)."
    elif isinstance(item, tuple):
        hint = "\nIn a pair the name, a string, comes first, as module.named_parameters() has it."
    wanted = "gradients" if of_grads else "parameters"
    forms = f"{wanted} as tensors or (name, tensor) pairs" + ("" if of_grads else ", or a module")
    return f"{function}: {name} is of type {kind}; gradkern needs {forms}.{hint}"


def shown(value: object) -> str:
    """A wrong value as the user wrote it, or its type if it is no short one."""
    written = repr(value)
    if len(written) < 40 and "\n" not in written:
        return written
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _warn_of_bare_tensors(items: Sequence[object], function: str) -> None:
    """Whoever passes gradients where parameters are meant would never be told that nothing is clipped."""
    if not items or torch.compiler.is_compiling():
        return
    tensors = [item[1] if _is_pair(item) else item for item in items]
    if any(isinstance(tensor, nn.Parameter) or tensor.requires_grad for tensor in tensors):  # type: ignore[attr-defined]
        return
    _warn(
        f"{function}: none of the {len(items)} tensors passed has a gradient or requires one, so nothing is "
        "done. For gradients themselves there are gradkern.clip_grads_ and gradkern.measure_grads."
    )


def _warn(message: str) -> None:
    """Warn at the line that called gradkern."""
    stacklevel, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == "gradkern":
        stacklevel, frame = stacklevel + 1, frame.f_back
    warnings.warn(message, stacklevel=stacklevel)


def _quoted(names: Names, row: int) -> str:
    return f"'{names[row]}'"


def _is_pair(item: object) -> TypeGuard[tuple[str, object]]:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _is_wrapper(tensor: Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
