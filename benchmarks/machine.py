"""What the numbers were measured on: the processor, its caches and bandwidths, the software."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradkern
from benchmarks.measure import Contender, Effort, in_turn
from gradkern import ops

# Assumed where Linux does not tell.
_L2_BYTES, _L3_BYTES = 2 << 20, 32 << 20

# Far more than any cache holds.
_BUFFER_BYTES = 512 << 20


@dataclass(frozen=True)
class Machine:
    """Processor and software. Cache sizes in bytes; L2 is that of all cores together."""

    cpu: str
    cores: int
    l2_bytes: int
    l3_bytes: int
    system: str
    python: str
    torch: str
    threads: int
    gradkern: str
    backend: str
    compiler: str
    optax: str

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, L2 {self.l2_bytes >> 20} MiB, L3 {self.l3_bytes >> 20} MiB, "
            f"{self.threads} threads; {self.system}, Python {self.python}, torch {self.torch}, "
            f"gradkern {self.gradkern} ({self.backend}, {self.compiler}), optax {self.optax}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


def describe() -> Machine:
    """This machine, now."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cpu=_cpu(),
        cores=cores,
        l2_bytes=cores * (_cache(2) or _L2_BYTES),
        l3_bytes=_cache(3) or _L3_BYTES,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        gradkern=gradkern.__version__,
        backend=gradkern.backend(),
        compiler=_compiler(),
        optax=_version("optax"),
    )


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown CPU"


def _cache(level: int) -> int | None:
    """Size of a cache of the first core, in bytes."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == str(level):
            size = re.fullmatch(r"(\d+)([KM])", (index / "size").read_text().strip())
            if size:
                return int(size[1]) << (10 if size[2] == "K" else 20)
    return None


def _compiler() -> str:
    """What compiled the extension, as it says itself in its comment section."""
    if ops.native is None:
        return "no extension"
    binary = Path(ops.native.__file__).read_bytes()
    found = re.search(rb"GCC: \([^)]*\) ([\d.]+)", binary)
    if found:
        return f"gcc {found[1].decode()}"
    found = re.search(rb"clang version ([\d.]+)", binary)
    return f"clang {found[1].decode()}" if found else "unknown compiler"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


class Buffer:
    """Memory that holds no gradient: for measuring what the machine can do, and for emptying its caches."""

    def __init__(self, nbytes: int = _BUFFER_BYTES) -> None:
        self.data = torch.zeros(nbytes // 4)
        self.read_name, self._read = _readers()[0]

    def read(self, nbytes: int) -> None:
        """Read `nbytes` of the buffer in the fastest way that `measure_bandwidths` found."""
        self._read(self.data[: nbytes // 4])

    def scale(self, nbytes: int) -> None:
        """Read `nbytes` and write them to where they were."""
        self.data[: nbytes // 4].mul_(1.0)

    def measure_bandwidths(self, effort: Effort) -> dict[str, float]:
        """What the machine reads, scales in place and copies, in GB/s; a copied byte counts twice."""
        other = torch.zeros_like(self.data)
        ways: dict[str, tuple[int, Callable[[], Any]]] = {
            f"read, {name}": (1, partial(call, self.data)) for name, call in _readers()
        }
        ways["scale in place"] = (2, partial(self.data.mul_, 1.0))
        ways["copy"] = (2, partial(other.copy_, self.data))
        contenders = [Contender("ceiling", name, call, lambda *_: None) for name, (_, call) in ways.items()]
        timings = in_turn(contenders, effort, lambda: None)
        found = {
            timing.name: ways[timing.name][0] * self.data.nbytes / timing.median_ms / 1e6
            for timing in timings
        }
        self.read_name, self._read = max(_readers(), key=lambda reader: found[f"read, {reader[0]}"])
        return found

    def evict(self, nbytes: int) -> None:
        """Fill caches of `nbytes` in all, from every thread, with something else than gradients."""
        self.data[: 2 * nbytes // 4].mul_(1.0)


def _readers() -> list[tuple[str, Callable[[Tensor], Any]]]:
    """Ways to read memory and do next to nothing with it; which is the fastest differs between machines."""
    readers: list[tuple[str, Callable[[Tensor], Any]]] = [
        ("torch.sum", torch.sum),
        ("torch.amax of int32", lambda data: torch.amax(data.view(torch.int32))),
    ]
    if ops.native is not None:
        readers.append(("gradkern's read pass", ops.native.read_pass))
    return readers
