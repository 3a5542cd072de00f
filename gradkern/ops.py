"""The operations on lists of gradients: each gradient by its kernel if it has one, else by the reference.

Also the one place that loads the extension.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradkern import params, reference

Measured = tuple[Tensor, Tensor]
Clipped = tuple[Tensor, Tensor, Tensor]

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load() -> tuple[Any, str]:
    """The extension, or None and why there is none. Never raises."""
    again = "install gradkern again with `pip install --no-build-isolation`"
    try:
        record = json.loads(Path(__file__).with_name("_build.json").read_text())
    except (OSError, ValueError):
        root = Path(__file__).parents[1]
        if (root / "csrc").is_dir():  # the first of all places to import from, for who has just installed it
            return None, (
                f"it was imported from its sources in {root}, where no extension has been built: run Python "
                "in another folder to use the installed package, or build here with "
                "`pip install --no-build-isolation --editable .`"
            )
        return None, f"its extension has not been built: {again}"
    if not record.get("extension"):
        return None, record.get("reason") or f"it was installed without its extension: {again}"
    built, running = record.get("torch"), ".".join(torch.__version__.split(".")[:2])
    if built != running:  # before it is loaded, for that alone could crash
        return None, f"its extension was built for torch {built}, and this is torch {running}: {again}"
    try:
        extension = importlib.import_module("gradkern._C")
    except Exception as error:
        return None, f"its extension cannot be loaded ({error}): {again}"
    return extension, ""


def _cuda_missing() -> str:
    """Why the extension has no CUDA kernels."""
    record = json.loads(Path(__file__).with_name("_build.json").read_text())
    return f"its CUDA kernels were not built: {record.get('cuda_reason') or 'they were left out'}"


native, _missing = _load()
if native is None and "GRADKERN_BUILD=0" not in _missing:
    warnings.warn(
        f"gradkern computes with plain PyTorch, which is right but slow, because {_missing}.", stacklevel=2
    )
elif native is not None and native.isa_problem() is not None:
    warnings.warn(f"gradkern: {native.isa_problem()}; using {native.isa()}.", stacklevel=2)


def backend() -> str:
    """What computes gradients: `cpu avx512`, `cpu avx2`, `cpu portable`, or `reference` and why.

    Where torch can use a GPU, also whether gradkern's kernels can: `cpu avx512, cuda sm_90`, or
    `cpu avx512, no cuda` and why. Where it cannot, `cpu avx512, cuda compiled` if they are in the build.

    >>> gradkern.backend().split()[0] in ("cpu", "reference:")
    True
    """
    if native is None:
        return f"reference: {_missing or 'chosen'}"
    cpu = f"cpu {native.isa()}"
    if not torch.cuda.is_available():
        return cpu if native.cuda_compiled_for() is None else f"{cpu}, cuda compiled"
    device = torch.cuda.current_device()
    problem = _cuda_problem(device)
    if problem:
        return f"{cpu}, no cuda: {problem}"
    return "{}, cuda sm_{}{}".format(cpu, *torch.cuda.get_device_capability(device))


_cuda_problems: dict[int, str] = {}


def _find_cuda_problem(device: int) -> str:
    """Why the kernels cannot work on a CUDA device, and what to do; empty if they can. Warns the first time.

    Where torch has no CUDA only fake tensors say that they are on such a device: they need no driver.
    """
    if device not in _cuda_problems:
        if native.cuda_compiled_for() is None:
            problem = _cuda_missing()
        else:
            problem = native.cuda_problem(device) if torch.cuda.is_available() else ""
        _cuda_problems[device] = problem
        if problem:
            warnings.warn(
                f"gradkern computes gradients on cuda:{device} with plain PyTorch, which is right but slow, "
                f"because {problem.removesuffix('.')}.",
                stacklevel=2,
            )
    return _cuda_problems[device]


# While a function is compiled it is asked as usual, rather than compiled too.
_constant: Callable[[Callable[[int], str]], Callable[[int], str]] = torch.compiler.assume_constant_result
_cuda_problem = _constant(_find_cuda_problem)


def measure(grads: Sequence[Tensor]) -> Measured:
    """As `reference.measure`; of gradients on several devices, on the first that is not the CPU."""
    groups = _groups(grads)
    if len(groups) == 1:
        return _measure(*groups[0], grads)
    meeting = home(grads)
    rows: list[Tensor] = [torch.empty(0)] * len(grads)
    for has_kernel, indices in groups:
        part, _ = _measure(has_kernel, indices, [grads[index] for index in indices])
        # From a GPU to another, or to one from the host: neither has to wait.
        for index, row in zip(indices, part.to(meeting, non_blocking=True).unbind(), strict=True):
            rows[index] = row
    if not rows:
        return reference.measure([])
    stacked = torch.stack(rows)
    return stacked, reference.merge(stacked)


def clip_(
    grads: Sequence[Tensor],
    max_norm: float,
    limit: Tensor | None,
    eps: float,
    clip_value: float,
    nonfinite: str,
) -> Clipped:
    """As `reference.clip_`. The norm is that of all gradients, wherever they are."""
    groups = _groups(grads)
    if len(groups) == 1:
        # The operators take a limit on the host or beside the gradients. To the host it has to be waited for.
        if limit is not None and limit.device.type != "cpu":
            limit = limit.to(_device_of_rows(grads[0]))
        if groups[0][0]:
            clipped: Clipped = torch.ops.gradkern.clip_(grads, max_norm, limit, eps, clip_value, nonfinite)
            return clipped
        return reference.clip_(grads, max_norm, limit, eps, clip_value, nonfinite)
    rows, total = measure(grads)
    coef = reference.coefficient(reference.norm_of(total, nonfinite), max_norm, limit, eps)
    apply_(grads, rows, coef, clip_value, nonfinite)
    return rows, total, coef


def apply_(
    grads: Sequence[Tensor], rows: Tensor | None, coef: Tensor, clip_value: float, nonfinite: str
) -> None:
    """As `reference.apply_`."""
    groups = _groups(grads)
    for has_kernel, indices in groups:
        part, part_rows, part_coef = grads, rows, coef
        if len(groups) > 1:
            part = [grads[index] for index in indices]
            part_rows = None if rows is None else _picked(rows, indices)
            part_coef = coef if coef.dim() == 0 else _picked(coef, indices)
        device = _device_of_rows(part[0])
        there = device.type != "cpu"  # where nothing has to wait for what comes
        part_rows = None if part_rows is None else part_rows.to(device, non_blocking=there)
        part_coef = part_coef.to(device, non_blocking=there)
        apply = torch.ops.gradkern.apply_ if has_kernel else reference.apply_
        apply(part, part_rows, part_coef, clip_value, nonfinite)


def unit_sums(tensors: Sequence[Tensor]) -> Tensor:
    """As `reference.unit_sums`, of tensors on one device."""
    if _have_unit_kernels(tensors):
        sums: Tensor = torch.ops.gradkern.unit_sums(tensors)
        return sums
    return reference.unit_sums(tensors)


def apply_units_(grads: Sequence[Tensor], coef: Tensor, clip_value: float, nonfinite: str) -> None:
    """As `reference.apply_units_`, of gradients on one device."""
    apply = torch.ops.gradkern.apply_units_ if _have_unit_kernels(grads) else reference.apply_units_
    apply(grads, coef, clip_value, nonfinite)


def add_penalty_(grads: Sequence[Tensor], weights: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """As `reference.add_penalty_`; the values on the first device that is not the CPU."""
    groups: dict[tuple[bool, torch.device], list[int]] = {}
    for index, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        alike = grad.dtype == weight.dtype and grad.stride() == weight.stride()
        has_kernel = alike and _has_kernel(grad) and _has_kernel(weight)
        groups.setdefault((has_kernel, grad.device), []).append(index)
    values: list[Tensor] = [torch.empty(0)] * len(grads)
    for (has_kernel, _), indices in groups.items():
        add = torch.ops.gradkern.add_penalty_ if has_kernel else reference.add_penalty_
        part = add([grads[index] for index in indices], [weights[index] for index in indices], l1, l2)
        for index, value in zip(indices, part.to(home(grads), non_blocking=True).unbind(), strict=True):
            values[index] = value
    return torch.stack(values)


def _picked(rows: Tensor, indices: Sequence[int]) -> Tensor:
    """Some rows. Not by an index tensor, which would be copied to the device."""
    apart = rows.unbind()
    return torch.stack([apart[index] for index in indices])


def _measure(has_kernel: bool, indices: Sequence[int], grads: Sequence[Tensor]) -> Measured:
    if has_kernel:
        measured: Measured = torch.ops.gradkern.measure(grads)
        return measured
    return reference.measure(grads)


def _groups(grads: Sequence[Tensor]) -> list[tuple[bool, list[int]]]:
    """Indices of gradients that can be worked on by one call, and whether a kernel can do it."""
    groups: dict[tuple[bool, torch.device], list[int]] = {}
    for index, grad in enumerate(grads):
        groups.setdefault((_has_kernel(grad), grad.device), []).append(index)
    return [(has_kernel, indices) for (has_kernel, _), indices in groups.items()]


def _has_kernel(grad: Tensor) -> bool:
    return (
        has_kernels(grad.device)
        and grad.layout == torch.strided
        and grad.dtype in _KERNEL_DTYPES
        and not params.has_gaps(grad)
        and _is_known(grad)
    )


def has_kernels(device: torch.device) -> bool:
    """Whether the extension can work on a device."""
    if native is None:
        return False
    return device.type == "cpu" or (device.type == "cuda" and not _cuda_problem(device.index or 0))


def _have_unit_kernels(tensors: Sequence[Tensor]) -> bool:
    """Whether there are any, and the units of all, too, lie one behind the other."""
    if native is None or not tensors:
        return False
    if torch.compiler.is_compiling():
        return all(map(_has_unit_kernel, tensors))
    for tensor in tensors:
        # Contiguous tensors of the CPU are by far the most, and told quicker than others. No call per tensor:
        # with many small ones it takes longer than the work.
        kind = type(tensor)
        plain = (
            (kind is Tensor or kind is torch.nn.Parameter)
            and tensor.is_cpu
            and tensor.dtype in _KERNEL_DTYPES
            and tensor.layout is torch.strided
            and tensor.is_contiguous()
            and not tensor.is_neg()
        )
        if not plain and not _has_unit_kernel(tensor):
            return False
    return True


def _has_unit_kernel(tensor: Tensor) -> bool:
    """Whether its units, too, lie one behind the other."""
    in_order = tensor.dim() < 2 or tensor.numel() == 0 or tensor.stride(0) * len(tensor) == tensor.numel()
    return in_order and _has_kernel(tensor)


def _is_known(grad: Tensor) -> bool:
    """Whether it is what it seems: no lazily negated view, no wrapper but those of torch's own tracing."""
    if torch.compiler.is_compiling():
        return True
    if type(grad).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return not grad.is_neg()
    return type(grad).__name__ in ("FakeTensor", "FunctionalTensor")


def home(grads: Sequence[Tensor]) -> torch.device:
    """Where rows of gradients on several devices meet: going to the CPU would wait for the others."""
    devices = [_device_of_rows(grad) for grad in grads]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _device_of_rows(grad: Tensor) -> torch.device:
    return torch.device("cpu") if grad.device.type == "mps" else grad.device


def _fake_measure(grads: list[Tensor]) -> Measured:
    if not grads:
        return reference.measure(grads)
    columns = reference.COLUMNS
    rows = grads[0].new_empty(len(grads), columns, dtype=torch.float64)
    return rows, grads[0].new_empty(columns, dtype=torch.float64)


def _fake_clip_(
    grads: list[Tensor],
    max_norm: float,
    limit: Tensor | None,
    eps: float,
    clip_value: float,
    nonfinite: str,
) -> Clipped:
    rows, total = _fake_measure(grads)
    return rows, total, total.new_empty(())


def _fake_apply_(
    grads: list[Tensor], rows: Tensor | None, coef: Tensor, clip_value: float, nonfinite: str
) -> None:
    return None


def _fake_unit_sums(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(sum(map(reference.unit_count, tensors)), dtype=torch.float64)


def _fake_apply_units_(grads: list[Tensor], coef: Tensor, clip_value: float, nonfinite: str) -> None:
    return None


def _fake_exponents(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty(len(grads), 64, dtype=torch.int64)


def _fake_add_penalty_(grads: list[Tensor], weights: list[Tensor], l1: float, l2: float) -> Tensor:
    return grads[0].new_empty(len(grads), dtype=torch.float64)


if native is not None:
    torch.library.register_fake("gradkern::measure", _fake_measure)
    torch.library.register_fake("gradkern::clip_", _fake_clip_)
    torch.library.register_fake("gradkern::apply_", _fake_apply_)
    torch.library.register_fake("gradkern::unit_sums", _fake_unit_sums)
    torch.library.register_fake("gradkern::apply_units_", _fake_apply_units_)
    torch.library.register_fake("gradkern::exponents", _fake_exponents)
    torch.library.register_fake("gradkern::add_penalty_", _fake_add_penalty_)
