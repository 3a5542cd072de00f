"""What ptxas and the SASS of the CUDA kernels show without a GPU: `make cuda-report`.

Compiles the kernels for every architecture, with warnings as errors, and fails on

- a spill, or any use of a stack;
- more registers than the blocks that a kernel is to have on each SM leave it;
- an access to global memory in a main loop that is narrower than 16 bytes;
- fewer than four loads in flight in a main loop, or less than 45 KiB with all blocks of an SM together: what
  latency times bandwidth asks for on the fastest GPU.

A main loop is an innermost loop that loads at least four times 16 bytes. The narrow accesses of `penalty` are
those to weights that are aligned otherwise than their gradients, which have no better way.

Then it prints what the executor counted, bytes read and written for each byte of gradients, beside the least
that would do, and fails if it is more.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.cuda import kernels

ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
THREADS_PER_SM = {"75": 1024, "86": 1536, "89": 1536, "120": 1536}  # the others: 2048
REGISTERS_PER_SM = 65536
KIB_IN_FLIGHT = 45
SOURCES = kernels.ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v"]

Instruction = tuple[int, str]  # address and text


@dataclass
class Kernel:
    """One kernel on one architecture; the worst over the widths of its addresses."""

    name: str
    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loops: int  # main loops
    in_flight: int  # loads, in the worst of them
    narrowest: int  # access, in bits

    @property
    def blocks(self) -> int:
        """Blocks that the kernel's `__launch_bounds__` name."""
        return _blocks_per_sm()[self.name]

    @property
    def resident(self) -> int:
        """Blocks of it that an SM holds, as far as registers and threads decide."""
        by_registers = REGISTERS_PER_SM // (-(-self.registers // 8) * 8 * kernels.BLOCK)
        return min(by_registers, THREADS_PER_SM.get(self.arch, 2048) // kernels.BLOCK)

    @property
    def kib_in_flight(self) -> float:
        """KiB that the named blocks of an SM have in flight."""
        return self.in_flight * 16 * kernels.BLOCK * self.blocks / 1024

    def failures(self) -> Iterator[str]:
        """What the gates say."""
        where = f"{self.name}_kernel on sm_{self.arch}"
        if self.spilled_bytes:
            yield f"{where}: spills or keeps {self.spilled_bytes} bytes on a stack"
        if self.resident < self.blocks:
            yield f"{where}: {self.registers} registers leave {self.resident} blocks an SM, not {self.blocks}"
        if self.loops < len(kernels.DTYPES):
            yield f"{where}: {self.loops} main loops found, not one for each dtype"
        if self.narrowest < 128 and self.name != "penalty":
            yield f"{where}: an access of {self.narrowest} bits in a main loop"
        if self.in_flight < kernels.LOADS:
            yield f"{where}: {self.in_flight} loads in flight in a main loop"
        if self.kib_in_flight < KIB_IN_FLIGHT:
            yield f"{where}: {self.kib_in_flight} KiB in flight on an SM"


def _blocks_per_sm() -> dict[str, int]:
    """From the sources: the second of every kernel's `__launch_bounds__`."""
    text = "".join(path.read_text() for path in [SOURCES / "kernels.h", *sorted(SOURCES.glob("*.cuh"))])
    constants: dict[str, int] = {}
    for name, value in re.findall(r"constexpr int (k\w*BlocksPerSm) = ([^;]+);", text):
        constants[name] = int(eval(value.replace("/", "//"), {}, constants))
    bounds = re.findall(r"__launch_bounds__\(kBlock, (\w+)\)\s+(\w+)_kernel", text)
    return {kernel: constants[name] for name, kernel in bounds}


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: beside nvcc, where pip puts it, or on the path."""
    beside_nvcc = Path(shutil.which("nvcc") or "/").resolve().parent / name
    from_pip = sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}"))
    return next((str(path) for path in [beside_nvcc, *from_pip] if path.is_file()), shutil.which(name))


def _tool(name: str) -> str:
    found = find_tool(name)
    if found is None:
        sys.exit(
            f"cuda-report: {name} is missing. Install the CUDA toolkit, or `pip install nvidia-cuda-{name}`."
        )
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"cuda-report: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _kernel_name(mangled: str) -> str | None:
    found = re.search(r"cuda\d+(\w+?)_kernelILi\d+E", mangled)
    return found.group(1) if found else None


def _loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Everything between a branch backwards and its target."""
    for address, text in code:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch.group(1), 16) <= address:
            yield [i for i in code if int(branch.group(1), 16) <= i[0] <= address]


def _is_wide_load(text: str) -> bool:
    return re.search(r"\bLDG?\.E\S*\.128", text) is not None


def main_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that load at least four times 16 bytes."""
    loading = [loop for loop in _loops(code) if sum(_is_wide_load(text) for _, text in loop) >= kernels.LOADS]
    spans = [(loop[0][0], loop[-1][0]) for loop in loading]

    def holds_another(span: tuple[int, int]) -> bool:
        return any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)

    return [loop for loop, span in zip(loading, spans, strict=True) if not holds_another(span)]


def loads_in_flight(loop: list[Instruction]) -> int:
    """The most 16-byte loads that are issued before an instruction needs the result of one of them."""
    most = 0
    pending: list[int] = []  # the first of the four registers of each
    for _, text in loop:
        named = [int(register) for register in re.findall(r"\bR(\d+)", text)]
        if _is_wide_load(text):
            target, *address = named
            if not any(first <= register < first + 4 for register in address for first in pending):
                pending.append(target)
                most = max(most, len(pending))
                continue
        if any(first <= register < first + 4 for register in named for first in pending):
            pending = []
    return most


def narrowest_access(loop: list[Instruction]) -> int:
    """Bits of the narrowest access to global memory; 128 if all are wide."""
    bits = [128]
    for _, text in loop:
        access = re.search(r"\b(?:LDG?|STG?|LD|ST)\.E(\S*)", text)
        if access:
            width = re.search(r"\.[US]?(8|16|64|128)\b", access.group(1))
            bits.append(int(width.group(1)) if width else 32)
    return min(bits)


def inspect(arch: str) -> list[Kernel]:
    """Compiles for one architecture and reads what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        said = _run(
            _tool("nvcc"), *FLAGS, f"-arch=sm_{arch}", "-cubin", "-o", cubin, str(SOURCES / "kernels.cu")
        )
        sass = _run(_tool("cuobjdump"), "-sass", cubin)

    code: dict[str, list[Instruction]] = {}
    for function in sass.split("Function : ")[1:]:
        lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+([^;/]+);", function, re.MULTILINE)
        code[function.split("\n", 1)[0].strip()] = [(int(address, 16), text) for address, text in lines]

    found: dict[str, Kernel] = {}
    properties = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
    for mangled, stack, spills, used in re.findall(
        properties + r".*?Used (\d+ registers.*?)\n", said, re.DOTALL
    ):
        name = _kernel_name(mangled)
        if name is None:
            continue
        loops = main_loops(code[mangled])
        shared = re.search(r"(\d+) bytes smem", used)
        kernel = Kernel(
            name,
            arch,
            registers=int(used.split()[0]),
            spilled_bytes=int(stack) + int(spills),
            shared_bytes=int(shared.group(1)) if shared else 0,
            loops=len(loops),
            in_flight=min(map(loads_in_flight, loops), default=0),
            narrowest=min(map(narrowest_access, loops), default=0),
        )
        worst = found.setdefault(name, kernel)
        for figure in ("registers", "spilled_bytes", "shared_bytes"):
            setattr(worst, figure, max(getattr(worst, figure), getattr(kernel, figure)))
        for figure in ("loops", "in_flight", "narrowest"):
            setattr(worst, figure, min(getattr(worst, figure), getattr(kernel, figure)))
    return [found[name] for name in kernels.KERNELS]


def _traffic() -> Iterator[tuple[str, float, float, str]]:
    """Bytes read and written for each byte of gradients, and the floor."""
    library = kernels.build()
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(9001, generator=generator).to(dtype) + 3 for dtype in kernels.DTYPES]
    total = sum(grad.nbytes for grad in grads)
    cases: list[tuple[str, str, dict[str, object], str]] = [
        ("stats", "stats", {}, "1 + 0"),
        ("value, nothing beyond the bound", "value", {"bound": 100.0}, "1 + 0"),
        ("value, everything beyond the bound", "value", {"bound": 1e-3}, "1 + 1"),
        ("apply, coefficient 1", "apply", {"coef": [1.0]}, "0 + 0"),
        ("apply, coefficient below 1", "apply", {"coef": [0.5]}, "1 + 1"),
        ("unit_sums", "unit_sums", {}, "1 + 0"),
        ("exponents", "exponents", {}, "1 + 0"),
        ("penalty, with its weights", "penalty", {"weights": grads, "l2": 0.1}, "2 + 1"),
    ]
    for title, kernel, options, floor in cases:
        found = kernels.run(library, kernel, grads, misalignment=1, **options)  # type: ignore[arg-type]
        yield title, found.bytes_read / total, found.bytes_written / total, floor


def main() -> int:
    """Prints the tables; 1 if a gate fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help="such as 90; all by default")
    failures: list[str] = []
    columns = ["registers", "spilled", "blocks/SM", "named", "shared"]
    columns += ["loops", "in flight", "KiB/SM", "narrowest"]
    print("| kernel    | arch   |", " | ".join(columns), "|")
    print("|-----------|--------|", *("-" * (len(column) + 1) + ":|" for column in columns), sep="")
    for arch in parser.parse_args().architectures:
        for k in inspect(arch):
            figures = (
                k.registers,
                k.spilled_bytes,
                k.resident,
                k.blocks,
                k.shared_bytes,
                k.loops,
                k.in_flight,
            )
            texts = [*map(str, figures), f"{k.kib_in_flight:.0f}", str(k.narrowest)]
            cells = [text.rjust(len(column)) for text, column in zip(texts, columns, strict=True)]
            print(f"| {k.name:9} | sm_{k.arch:3} |", " | ".join(cells), "|")
            failures += k.failures()
    why_not = kernels.why_not()
    if why_not is None:
        print("\n| bytes for each byte of gradients    |  read | written | floor |")
        print("|-------------------------------------|------:|--------:|-------|")
        for title, read, written, floor in _traffic():
            print(f"| {title:35} | {read:5.3f} | {written:7.3f} | {floor} |")
            if (read, written) != tuple(map(float, floor.split(" + "))):
                failures.append(f"{title}: moves {read:.3f} + {written:.3f} bytes, not {floor}")
    else:
        print(f"\nno count of bytes: {why_not}")
    print(*(f"\nFAILED {failure}" for failure in failures) if failures else ["\nall gates passed"], sep="")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
