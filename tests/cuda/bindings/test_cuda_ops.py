"""The CUDA bindings on a fake device: torch's dispatcher, our checks and launches, the stand-in's runtime."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from gradkern import ops

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
COMPILER = shlex.split(os.environ.get("CXX") or "c++")

pytestmark = [
    pytest.mark.skipif(ops.native is None, reason="the operators are defined by the extension"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a device 'cuda' of its own"),
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which(COMPILER[0]) is None, reason="no C++ compiler"
    ),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The run of scenarios.py, with the module that it needs compiled."""
    from torch.utils import cpp_extension

    directory = tmp_path_factory.mktemp("bindings")
    flags = ["-std=c++20", "-O0", "-w", "-fPIC", "-fvisibility=hidden", '-DGRADKERN_CUDA_ARCHS="90"']
    flags += [f"-I{path}" for path in (ROOT / "csrc", HERE.parent / "runtime")]
    torch_flags = [f"-I{path}" for path in [*cpp_extension.include_paths(), sysconfig.get_path("include")]]
    sources = {
        HERE / "fake_device.cpp": torch_flags,
        HERE.parent / "runtime/runtime.cpp": [],
        ROOT / "csrc/cuda/launch.cpp": [],
    }
    objects = []
    for source, more in sources.items():
        objects.append(directory / f"{source.stem}.o")
        subprocess.run([*COMPILER, *flags, *more, "-c", source, "-o", objects[-1]], check=True)
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    module = directory / f"_fake_device{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*COMPILER, "-shared", *objects, *libraries, "-o", module], check=True)
    return subprocess.run(
        [sys.executable, HERE / "scenarios.py", directory],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(ops.__file__).parents[1])},
    )


@pytest.mark.parametrize(
    "name", re.findall(r"^@scenario\ndef (\w+)", (HERE / "scenarios.py").read_text(), re.MULTILINE)
)
def test_on_a_fake_device(name: str, finished: subprocess.CompletedProcess[str]) -> None:
    assert re.search(rf"^ok +{name}$", finished.stdout, re.MULTILINE), finished.stdout + finished.stderr
