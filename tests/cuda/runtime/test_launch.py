"""The CUDA launch code against a stand-in for the CUDA runtime: needs a C++ compiler, neither CUDA nor a GPU.

test_launch.cpp says what is right. Here it is built and run, each deliberately broken variant of the launch
code must fail it, and the functions of the runtime that the launch code links are held against a list.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LAUNCH = ROOT / "csrc/cuda/launch.cpp"
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
# Some of the broken variants leave a variable unused, or touch memory they should not: that is their point.
FLAGS = ["-std=c++17", "-O0", "-w", "-ffp-contract=off", '-DGRADKERN_CUDA_ARCHS="75,80,90"']
INCLUDES = [f"-I{HERE}", f"-I{ROOT / 'tests/cpp'}", f"-I{ROOT / 'csrc'}"]

# None of these waits for a device, and under stream capture none is called that CUDA forbids there: the first
# group is always allowed, the second only beside a capture (`BesideCapture`), which the stand-in checks.
ALWAYS_ALLOWED = {
    "cudaDeviceGetAttribute",
    "cudaDriverGetVersion",
    "cudaEventCreateWithFlags",
    "cudaEventDestroy",
    "cudaEventRecord",
    "cudaGetDevice",
    "cudaGetDeviceCount",
    "cudaGetErrorName",
    "cudaGetErrorString",
    "cudaGraphRetainUserObject",
    "cudaLaunchKernel",
    "cudaMemcpyAsync",
    "cudaSetDevice",
    "cudaStreamGetCaptureInfo",
    "cudaStreamGetCaptureInfo_v2",  # its name before CUDA 13
    "cudaStreamGetId",
    "cudaThreadExchangeStreamCaptureMode",
    "cudaUserObjectCreate",
}
BESIDE_CAPTURE = {"cudaEventQuery", "cudaFuncGetAttributes", "cudaHostAlloc", "cudaMalloc"}

# What is broken, and how: the text in launch.cpp, and what takes its place.
MUTANTS: dict[str, tuple[str, str]] = {
    "addresses of the first call are used for ever": (
        "if (const size_t bytes = copied_addresses() * sizeof(void*))",
        "if (const size_t bytes = 0)",
    ),
    "a captured call uses the workspace of eager ones": (
        "capture(graph, target, tensors);",
        "find(target, tensors);",
    ),
    "pinned memory is written again before its copy": (
        "if (passed == cudaErrorNotReady) continue;",
        "if (passed == cudaErrorNotReady) return *slot;",
    ),
    "pinned memory of a graph is written again": (
        "give_to_graph(graph, slot);",
        "slot.owned = false;",
    ),
    "pinned memory of a graph is never given back": (
        "static_cast<Slot*>(slot)->owned.store(false, std::memory_order_release);",
        "",
    ),
    "the chunk table stays though lengths changed": (
        "key.push_back(span.numel << 2 | static_cast<int64_t>(span.dtype));",
        "key.push_back(static_cast<int64_t>(span.dtype));",
    ),
    "the chunk table stays though dtypes changed": (
        "key.push_back(span.numel << 2 | static_cast<int64_t>(span.dtype));",
        "key.push_back(span.numel);",
    ),
    "two streams share a workspace": (
        "key.push_back(static_cast<int64_t>(id));",
        "key.push_back(0);",
    ),
    "memory is taken over from another stream": (
        "block->first.front() != stream_id || ",
        "",
    ),
    "tickets are not cleared": (
        "memset(to + tickets_at, 0, addresses_at - tickets_at);",
        "",
    ),
    "the host waits for a copy": (
        "if (passed == cudaErrorNotReady) continue;",
        "if (passed == cudaErrorNotReady) cudaEventSynchronize(slot->sent);",
    ),
    "an event is queried while a stream is captured": (
        "const BesideCapture beside;\n    for",
        "for",
    ),
    "tables are copied from pageable memory": (
        "cudaMemcpyAsync(block->base() + at, slot.data, bytes",
        "cudaMemcpyAsync(block->base() + at, std::vector<char>(slot.data, slot.data + bytes).data(), bytes",
    ),
    "the device is not made current": ("guard.emplace(target.device);", ""),
    "errors of the runtime go unnoticed": ("if (error == cudaSuccess) return;", "return;"),
    "copied addresses end one too early": (
        "return capacity == 0 ? addresses.size() : 0;",
        "return capacity == 0 ? addresses.size() - 1 : 0;",
    ),
}

pytestmark = pytest.mark.skipif(
    os.name != "posix" or shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ('{COMPILER[0]}')"
)


def compile_to(output: Path, source: Path) -> None:
    subprocess.run([*COMPILER, *FLAGS, *INCLUDES, "-c", source, "-o", output], check=True)


def run(program: Path, launch: Path, objects: list[Path]) -> subprocess.CompletedProcess[str]:
    subprocess.run([*COMPILER, launch, *objects, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The stand-in and the tests, compiled."""
    directory = tmp_path_factory.mktemp("runtime")
    for name in ("runtime", "test_launch"):
        compile_to(directory / f"{name}.o", HERE / f"{name}.cpp")
    return [directory / "runtime.o", directory / "test_launch.o"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launch code, compiled against the stand-in."""
    output = tmp_path_factory.mktemp("launch") / "launch.o"
    compile_to(output, LAUNCH)
    return output


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, objects: list[Path], launch: Path
) -> subprocess.CompletedProcess[str]:
    """The run of all tests in test_launch.cpp."""
    return run(tmp_path_factory.mktemp("run") / "test_launch", launch, objects)


@pytest.mark.parametrize(
    "name", re.findall(r"^LAUNCH_TEST\((\w+)\)", (HERE / "test_launch.cpp").read_text(), re.MULTILINE)
)
def test_launch_code(name: str, finished: subprocess.CompletedProcess[str]) -> None:
    assert re.search(rf"^ok +{name}$", finished.stdout, re.MULTILINE), finished.stdout + finished.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_variant_is_found_out(
    name: str, objects: list[Path], tmp_path: Path, record: list[str]
) -> None:
    text = LAUNCH.read_text()
    right, wrong = MUTANTS[name]
    assert text.count(right) == 1, "the mutant no longer fits the launch code"
    mutant = tmp_path / "launch.cpp"
    mutant.write_text(text.replace(right, wrong).replace('#include "launch.h"', '#include "cuda/launch.h"'))
    compile_to(tmp_path / "launch.o", mutant)
    finished = run(tmp_path / "test_launch", tmp_path / "launch.o", objects)
    killers = re.findall(r"^FAILED (\w+)$", finished.stdout, re.MULTILINE)
    record.append(f"{'killed  ' if killers else 'SURVIVED'} {name}: {len(killers)} tests fail")
    assert killers, "survived"


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What became of each broken variant, printed at the end."""
    lines: list[str] = []
    yield lines
    killed = sum(line.startswith("killed") for line in lines)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, f"mutants of the CUDA launch code: {killed} of {len(lines)} killed", sep="\n")


def test_only_runtime_functions_that_never_wait_are_linked(launch: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    symbols = subprocess.run([nm, "-u", "-C", launch], capture_output=True, text=True, check=True).stdout
    linked = set(re.findall(r"\b(cuda[A-Z]\w*)\(", symbols))
    assert "cudaLaunchKernel" in linked
    assert linked <= ALWAYS_ALLOWED | BESIDE_CAPTURE, linked - ALWAYS_ALLOWED - BESIDE_CAPTURE
