"""The CUDA kernels, run on the CPU by the executor of this directory: compiling, calling, results."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda-on-cpu"

KERNELS = ["stats", "value", "apply", "unit_sums", "exponents", "penalty"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NONFINITE = ["keep", "zero", "propagate"]
SCOPES = ["global", "tensor", "unit"]
CAPACITIES = [0, 448, 4000]

# As in csrc: the tests choose their sizes around these.
BLOCK = 256
LOADS = 4
CHUNK = 1 << 16

FLAGS = ["-std=c++17", f"-I{ROOT}", f"-I{HERE}", "-fPIC", "-Wall", "-Wextra", "-Werror"]
# -O1 keeps 16-byte accesses whole. Without contraction g++ computes what nvcc computes with -fmad=false.
KERNEL_FLAGS = [
    *FLAGS, "-O1", "-ffp-contract=off", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
    "-Wno-unknown-pragmas", "-include", "cuda_on_cpu.h", "-x", "c++",
]  # fmt: skip


def why_not() -> str | None:
    """Why the executor cannot run here, or None."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "csrc/cuda is not beside the tests"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the executor switches stacks on x86-64 only"
    if shutil.which("g++") is None:
        return "there is no g++"
    return None


class Violation(Exception):
    """The executor stopped a kernel, or found something unwritten behind it."""


def _compile(command: list[str], inputs: list[Path], suffix: str) -> Path:
    """The output of a compiler, made anew when the command or the contents of `inputs` change."""
    digest = hashlib.sha256("\0".join(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    output = CACHE / f"{digest.hexdigest()[:20]}{suffix}"
    if not output.exists():
        partly = output.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(partly)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        partly.replace(output)
    return output


def build(csrc: Path = ROOT / "csrc", strict: bool = True) -> ctypes.CDLL:
    """The kernels below `csrc`, with the executor, as a shared library. `strict`: no warnings."""
    headers = [*sorted((ROOT / "csrc" / "core").glob("*.h")), ROOT / "csrc/cuda/kernels.h", *HERE.glob("*.h")]
    sources = sorted((csrc / "cuda").glob("*.cu*"))
    flags = [flag for flag in KERNEL_FLAGS if strict or flag != "-Werror"]
    objects = [
        _compile(
            ["g++", *FLAGS, "-O2", "-c", str(HERE / "executor.cpp")], [HERE / "executor.cpp", *headers], ".o"
        ),
        _compile(
            ["g++", *FLAGS, "-O1", "-c", str(HERE / "harness.cpp")], [HERE / "harness.cpp", *headers], ".o"
        ),
        _compile(["g++", *flags, "-c", str(csrc / "cuda/kernels.cu")], [*sources, *headers], ".o"),
    ]
    link = ["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *map(str, objects)]
    library = ctypes.CDLL(str(_compile(link, objects, ".so")))
    library.run_case.restype = ctypes.c_char_p
    library.case_bytes.restype = ctypes.c_int64
    assert library.case_bytes() == ctypes.sizeof(_Case)
    return library


def _fields(*groups: tuple[str, Any]) -> list[tuple[str, Any]]:
    return [(name, kind) for names, kind in groups for name in names.split()]


class _Tensor(ctypes.Structure):
    _fields_ = _fields(
        ("data weights", ctypes.c_void_p),
        ("numel units misalignment weights_misalignment dtype", ctypes.c_int64),
    )


class _Case(ctypes.Structure):
    _fields_ = _fields(
        ("kernel capacity launches seed", ctypes.c_int64),
        ("tensors", ctypes.POINTER(_Tensor)),
        ("tensor_count chunk_numel first_offset", ctypes.c_int64),
        ("max_norm eps l1 l2", ctypes.c_double),
        ("limit bounds", ctypes.c_void_p),
        ("nonfinite scope", ctypes.c_int64),
        ("coefs", ctypes.c_void_p),
        ("coef_count", ctypes.c_int64),
        ("known_rows rows total norm coef found_inf grad_scale sums counts values", ctypes.c_void_p),
        ("bytes_read bytes_written first", ctypes.c_int64),
    )


@dataclass
class Result:
    """What a kernel left: the gradients, and the outputs that this kernel has."""

    grads: list[torch.Tensor]
    bytes_read: int = 0  # of gradients and weights
    bytes_written: int = 0
    first: int = -1  # where the first access to them was, in bytes from the first gradient
    outputs: dict[str, np.ndarray] = field(default_factory=dict)

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.outputs[name]
        except KeyError:
            raise AttributeError(name) from None

    def same_bits(self, other: Result) -> bool:
        """Whether everything but the traffic is the same, to the bit."""
        return all(
            torch.equal(bits(a), bits(b)) for a, b in zip(self.grads, other.grads, strict=True)
        ) and all(a.tobytes() == other.outputs[name].tobytes() for name, a in self.outputs.items())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that NaNs and the signs of zeros can be compared."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _units(tensor: torch.Tensor) -> int:
    return tensor.shape[0] if tensor.dim() >= 2 else 1


def run(
    library: ctypes.CDLL,
    kernel: str,
    grads: Sequence[torch.Tensor],
    *,
    seed: int = 0,
    capacity: int = 0,
    launches: int = 1,
    chunk_numel: int = CHUNK,
    first_offset: int = 0,
    misalignment: int = 0,
    max_norm: float = math.inf,
    limit: float | None = None,
    eps: float = 0.0,
    bound: float = math.inf,
    nonfinite: str = "keep",
    scope: str = "global",
    coef: Sequence[float] = (1.0,),
    rows: np.ndarray | None = None,
    weights: Sequence[torch.Tensor] | None = None,
    weights_misalignment: int = 0,
    l1: float = 0.0,
    l2: float = 0.0,
) -> Result:
    """Runs a kernel on copies of `grads`. Misalignments count elements. Raises `Violation`."""
    after = [grad.clone().contiguous() for grad in grads]
    decay = [weight.clone().contiguous() for weight in weights] if weights is not None else None
    tensors = (_Tensor * max(1, len(after)))()
    for i, grad in enumerate(after):
        tensors[i].data = grad.data_ptr() or ctypes.addressof(tensors)
        tensors[i].weights = (decay[i].data_ptr() or ctypes.addressof(tensors)) if decay else None
        tensors[i].numel = grad.numel()
        tensors[i].units = _units(grad)
        tensors[i].misalignment = misalignment * grad.element_size() % 16
        tensors[i].weights_misalignment = weights_misalignment * grad.element_size() % 16
        tensors[i].dtype = DTYPES.index(grad.dtype)

    count = len(after)
    shapes: dict[str, tuple[tuple[int, ...], type]] = {}
    if kernel in ("stats", "value"):
        scalars = ["norm", "coef", "found_inf", "grad_scale"]
        shapes = {"rows": ((count, 5), np.float64), "total": ((5,), np.float64)}
        shapes.update(
            {name: ((), np.float64 if name in ("norm", "coef") else np.float32) for name in scalars}
        )
    elif kernel == "unit_sums":
        shapes = {"sums": ((sum(map(_units, after)),), np.float64)}
    elif kernel == "exponents":
        shapes = {"counts": ((count, 64), np.int64)}
    elif kernel == "penalty":
        shapes = {"values": ((count,), np.float64)}
    result = Result(after, outputs={name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()})

    # By dtype, in the order of DTYPES. torch rounds to nearest even too.
    bounds = np.array(
        [torch.tensor(bound, dtype=torch.float64).to(dtype).double().item() for dtype in DTYPES]
    )
    inputs = {
        "limit": None if limit is None else np.array([limit]),
        "bounds": bounds,
        "coefs": np.array(coef, dtype=np.float64),
        "known_rows": None if rows is None else np.ascontiguousarray(rows, dtype=np.float64),
    }
    case = _Case(
        kernel=KERNELS.index(kernel), capacity=capacity, launches=launches, seed=seed,
        tensors=tensors, tensor_count=count, chunk_numel=chunk_numel, first_offset=first_offset,
        max_norm=max_norm, eps=eps, l1=l1, l2=l2, nonfinite=NONFINITE.index(nonfinite),
        scope=SCOPES.index(scope), coef_count=len(coef),
    )  # fmt: skip
    for name, array in {**inputs, **result.outputs}.items():
        setattr(case, name, None if array is None else array.ctypes.data)
    problem = library.run_case(ctypes.byref(case))
    if problem is not None:
        raise (RuntimeError if problem.startswith(b"harness:") else Violation)(problem.decode())
    result.bytes_read, result.bytes_written, result.first = case.bytes_read, case.bytes_written, case.first
    return result
