"""What the build holds: the kernels of every architecture, and nothing of CUDA that it should not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradkern
from gradkern import ops
from tests.cuda.runtime.test_launch import ALWAYS_ALLOWED, BESIDE_CAPTURE, COMPILER
from tests.helpers import load_setup

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"stats", "value", "apply", "unit_sums", "exponents", "penalty"}
CAPACITIES = {"0", "448", "4000"}

compiled = pytest.mark.skipif(
    ops.native is None or ops.native.cuda_compiled_for() is None, reason="this build has no CUDA kernels"
)


def tool(name: str) -> str:
    """A program of the toolkit or of the compiler; without it the test is skipped."""
    packages = Path(sysconfig.get_path("platlib")).glob("nvidia/*/bin")
    places = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin", *map(str, packages)]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"{name} was not found")
    return found


def says(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def found_toolkit() -> Any:
    """The toolkit that setup.py finds here; without one the test is skipped."""
    toolkit = load_setup().find_toolkit({**os.environ, "GRADKERN_CUDA": ""})
    if isinstance(toolkit, str):
        pytest.skip(toolkit)
    return toolkit


@compiled
def test_the_build_is_for_every_architecture_that_was_asked_for() -> None:
    """All that nvcc knows of ours, unless GRADKERN_CUDA_ARCHS says otherwise."""
    assert sorted(re.findall(r"sm_(\d+)", ops.native.cuda_compiled_for())) == sorted(found_toolkit().archs)


@compiled
def test_the_extension_holds_a_binary_for_every_architecture_and_ptx_for_the_newest() -> None:
    cuobjdump = tool("cuobjdump")
    stated = re.findall(r"sm_(\d+)", ops.native.cuda_compiled_for())
    elf = re.findall(r"\.sm_(\d+)\.cubin", says(cuobjdump, "--list-elf", ops.native.__file__))
    ptx = re.findall(r"\.sm_(\d+)\.ptx", says(cuobjdump, "--list-ptx", ops.native.__file__))
    assert sorted(elf) == sorted(stated)
    assert ptx == [max(stated, key=int)]


@compiled
def test_the_extension_holds_every_kernel_in_every_width_for_every_architecture() -> None:
    symbols = says(tool("cuobjdump"), "-symbols", ops.native.__file__)
    architectures = len(re.findall(r"sm_(\d+)", ops.native.cuda_compiled_for()))
    for kernel in KERNELS:
        for capacity in CAPACITIES:
            name = rf"STO_ENTRY|ENTRY\s+_ZN8gradkern4cuda\d+{kernel}_kernelILi{capacity}E"
            assert len(re.findall(name, symbols)) == architectures, (kernel, capacity)


@compiled
def test_the_runtime_is_inside_and_out_of_sight() -> None:
    """Neither is a CUDA library needed to load the extension, nor does it offer its own to anybody."""
    assert not re.findall(r"\bcuda\w+", says(tool("nm"), "-D", ops.native.__file__))
    assert not re.findall(r"lib(?:cuda|nv)\S*", says(tool("readelf"), "-d", ops.native.__file__))


def test_with_the_real_headers_too_only_functions_that_never_wait_are_linked(tmp_path: Path) -> None:
    toolkit = found_toolkit()
    output = tmp_path / "launch.o"
    source = ROOT / "csrc/cuda/launch.cpp"
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        '-DGRADKERN_CUDA_ARCHS="90"',
        f"-I{toolkit.include}",
    ]
    subprocess.run([*COMPILER, *flags, "-c", source, "-o", output], check=True)
    linked = set(re.findall(r"\bU (cuda\w+)", says(tool("nm"), output)))
    assert "cudaLaunchKernel" in linked
    assert linked <= ALWAYS_ALLOWED | BESIDE_CAPTURE, linked - ALWAYS_ALLOWED - BESIDE_CAPTURE


class Names(TorchDispatchMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.names.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@compiled
@pytest.mark.skipif(torch.version.cuda is not None, reason="on a GPU the self-test shows it")
def test_a_list_on_a_gpu_is_clipped_by_one_operator() -> None:
    with FakeTensorMode():
        grads = [torch.ones(3, device="cuda"), torch.ones(4, 2, device="cuda", dtype=torch.bfloat16)]
        with Names() as seen:
            stats = gradkern.clip_grads_(grads, 1.0)
        assert stats.norm.device.type == "cuda"
    assert seen.names == ["gradkern::clip_"]


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension that was built without CUDA."""
    if ops.native is None:
        pytest.skip("needs the extension")
    monkeypatch.setattr(ops.native, "cuda_compiled_for", lambda: None)
    monkeypatch.setattr(ops, "_cuda_problems", {})
    monkeypatch.setattr(ops, "_cuda_missing", lambda: "its CUDA kernels were not built: nvcc was not found")


@pytest.mark.usefixtures("without_kernels")
def test_a_gpu_without_kernels_is_served_by_the_reference_with_one_warning() -> None:
    with FakeTensorMode():
        grads = [torch.ones(3, device="cuda")]
        with warnings.catch_warnings(record=True) as caught, Names() as seen:
            warnings.simplefilter("always")
            for _ in range(3):
                assert gradkern.measure_grads(grads).norm.device.type == "cuda"
    assert [str(warning.message) for warning in caught] == [
        "gradkern computes gradients on cuda:0 with plain PyTorch, which is right but slow, because its CUDA "
        "kernels were not built: nvcc was not found."
    ]
    assert not any(name.startswith("gradkern::") for name in seen.names)
