"""What several tests share: gradients to try, and oracles that owe nothing to gradkern."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)
REAL = (torch.float32, torch.float64, *HALVES)
COMPLEX = (torch.complex64, torch.complex128)

INF, NAN = float("inf"), float("nan")

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def parameters(grads: Sequence[Tensor | None]) -> list[nn.Parameter]:
    """Parameters that have these very tensors as gradients."""
    made = []
    for grad in grads:
        like = torch.zeros(1) if grad is None else grad
        parameter = nn.Parameter(torch.zeros(like.shape, dtype=like.dtype, device=like.device))
        parameter.grad = grad
        made.append(parameter)
    return made


def elements(tensors: Sequence[Tensor]) -> np.ndarray:
    """All elements in float64, flat."""
    flat = [tensor.detach().to_dense().to(torch.float64).numpy().ravel() for tensor in tensors]
    return np.concatenate([np.zeros(0), *flat])


def exact_sum_sq(values: np.ndarray) -> float:
    """The sum of squares, rounded once: squares of float32 are exact in float64, and fsum adds exactly."""
    return math.fsum(np.square(values))


def exact_norm(tensors: Sequence[Tensor]) -> float:
    values = elements(tensors)
    return math.sqrt(exact_sum_sq(values[np.isfinite(values)]))


def bits(tensor: Tensor) -> Tensor:
    """The bits of each element, which tell NaNs and zeros apart."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(_BITS[tensor.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def round_to(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 values that are exact in float32, rounded to the nearest of `dtype`, ties to even."""
    if dtype == torch.float64:
        return values
    single = values.astype(np.float32)
    if dtype == torch.float16:
        single = single.astype(np.float16)
    if dtype == torch.bfloat16:
        raw = single.view(np.uint32).astype(np.uint64)
        rounded = ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
        single = np.where(np.isnan(single), single, rounded)
    return single.astype(np.float64)


def load_setup() -> ModuleType:
    """setup.py as a module, without building anything."""
    path = Path(__file__).resolve().parent.parent / "setup.py"
    spec = importlib.util.spec_from_file_location("gradkern_setup", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
