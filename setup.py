"""Builds gradkern: the torch-free library by CMake, then the extension `gradkern._C` with torch's headers.

Where that is impossible the package is installed without the extension, and computes with plain PyTorch.
Either way `gradkern/_build.json` says what was built and why, for `gradkern.backend()` to quote.

Environment variables:
    GRADKERN_BUILD: 0 leaves the extension out on purpose; 1 makes it an error if it cannot be built.
    MAX_JOBS: compilers run at a time; as many as there are processors if not given.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones do not understand our pyproject.toml
    raise SystemExit(
        f"gradkern: building needs setuptools 77 or newer, found {setuptools.__version__}: "
        "`pip install --upgrade setuptools`."
    )
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BINDINGS = ["csrc/bindings/module.cpp", "csrc/bindings/ops.cpp", "csrc/bindings/unit_ops.cpp"]
CMAKE_MINIMUM = (3, 20)
AGAIN = "and install gradkern again with `pip install --no-build-isolation`"

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except Exception as error:  # whatever a broken torch raises: the package itself can still be installed
    TORCH_ERROR: str | None = f"{type(error).__name__}: {error}"
    TORCH_VERSION = ""
    BuildExtension, CppExtension = build_ext, setuptools.Extension
else:
    TORCH_ERROR = None
    TORCH_VERSION = ".".join(torch.__version__.split(".")[:2])


def cmake_version(path: str) -> tuple[int, ...] | None:
    """Version of the `cmake` found on `path`; None if there is none, or it does not run."""
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        return None
    answer = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", answer)
    return tuple(map(int, found.groups())) if found else None


def obstacle(environ: Mapping[str, str], torch_error: str | None) -> str | None:
    """Why the extension cannot be built here, and what to do about it; None if nothing is in the way."""
    asked = environ.get("GRADKERN_BUILD", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"gradkern: GRADKERN_BUILD must be 0, 1 or not set, got {asked!r}.")
    if asked == "0":
        return f"it was installed with GRADKERN_BUILD=0: unset that {AGAIN}"
    if sys.platform == "win32":
        return "its extension is built on Linux and macOS only: on Windows, use WSL"
    if torch_error is not None:
        return (
            f"torch could not be imported while gradkern was being built ({torch_error}), as in pip's "
            f"isolated builds: install torch, setuptools, cmake and ninja {AGAIN}"
        )
    path = environ.get("PATH", os.defpath)
    compiler = shlex.split(environ.get("CXX") or "c++")[0]
    if shutil.which(compiler, path=path) is None:
        return f"no C++ compiler was found ('{compiler}'): install g++ or clang (or set CXX) {AGAIN}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return f"Python's headers were not found: install them (Debian, Ubuntu: python3-dev) {AGAIN}"
    found = cmake_version(path)
    if found is None or found < CMAKE_MINIMUM:
        wanted = "CMake {}.{} or newer was not found".format(*CMAKE_MINIMUM)
        return f"{wanted}: `pip install cmake` {AGAIN}"
    return None


def build_library(directory: Path) -> str:
    """Build the torch-free library with CMake and return the archive's path."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", ROOT, "-B", directory, "-DCMAKE_BUILD_TYPE=Release", *generator]
    build = ["cmake", "--build", directory, "--target", "gradkern_core", "-j", os.environ["MAX_JOBS"]]
    subprocess.run(configure, check=True)
    subprocess.run(build, check=True)
    return str(directory / "libgradkern_core.a")


class BuildGradkern(BuildExtension):
    """Builds the extension if it can be built, and records in `_build.json` what became of it."""

    reason: str | None = None  # why there is no extension

    def run(self) -> None:
        """Build, or say why not."""
        self.reason = obstacle(os.environ, TORCH_ERROR)
        if self.reason is None:
            try:
                super().run()
            except Exception as error:  # setuptools, CMake and ninja each have their own
                self.reason = (
                    f"compiling it failed ({error}): see the compiler's messages with "
                    "`pip install -v --no-build-isolation`"
                )
        if self.reason is not None and os.environ.get("GRADKERN_BUILD") == "1":
            raise SystemExit(f"gradkern: GRADKERN_BUILD=1, but the extension cannot be built: {self.reason}.")
        self.record()

    def build_extensions(self) -> None:
        """Build the library, then the extension from it."""
        for extension in self.extensions:
            extension.extra_objects = [build_library(Path(self.build_temp).absolute() / "core")]
        super().build_extensions()

    def record(self) -> None:
        """Write `_build.json` to where the extension goes: the wheel or, built in place, the source tree."""
        extension = Path(self.get_ext_fullpath("gradkern._C"))
        if self.reason is not None:
            print(f"gradkern: built without its extension: {self.reason}.", file=sys.stderr)
            extension.unlink(missing_ok=True)  # of an earlier build, which the record would belie
        record = {
            "extension": self.reason is None,
            "reason": self.reason or "",
            "torch": TORCH_VERSION,
            "cuda": False,
        }
        extension.parent.mkdir(parents=True, exist_ok=True)
        (extension.parent / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        """What installing has to take along: the extension only if there is one."""
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        """The same for editable installations."""
        mapping = super().get_output_mapping()
        return {built: source for built, source in mapping.items() if os.path.exists(built)}


class Wheel(bdist_wheel):
    """Tags a wheel without the extension as one for every Python and machine."""

    def get_tag(self) -> tuple[str, str, str]:
        """Asked for when everything has been built."""
        if self.get_finalized_command("build_ext").reason is not None:
            return "py3", "none", "any"
        return super().get_tag()


def extension() -> setuptools.Extension:
    """The binding. Its flags are those of torch's own extensions and what the kernels' contract needs."""
    if TORCH_ERROR is not None:
        return setuptools.Extension("gradkern._C", BINDINGS)
    compile_args = ["-O2", "-g0", "-Wall", "-fvisibility=hidden", "-ffp-contract=off"]
    if sys.platform == "linux":
        # Without it at::parallel_for is a plain loop. Not given to the linker: the threads are to be those of
        # the OpenMP that torch has loaded, not of a second one.
        compile_args.append("-fopenmp")
    headers = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*/*.h"))]
    return CppExtension(
        "gradkern._C",
        BINDINGS,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=compile_args,
        depends=headers,
    )


if __name__ == "__main__":
    # The tools of a virtual environment (cmake, ninja) are to be found also where nobody activated it.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    # torch starts two compilers more than there are processors, and each needs over a gigabyte.
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    setuptools.setup(ext_modules=[extension()], cmdclass={"build_ext": BuildGradkern, "bdist_wheel": Wheel})
