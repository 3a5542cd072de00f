"""Builds gradkern: the torch-free library by CMake, then the extension `gradkern._C` with torch's headers.

Where that is impossible the package is installed without the extension, and computes with plain PyTorch.
Either way `gradkern/_build.json` says what was built and why, for `gradkern.backend()` to quote.

Environment variables:
    GRADKERN_BUILD: 0 leaves the extension out on purpose; 1 makes it an error if it cannot be built.
    GRADKERN_CUDA: 0 leaves the CUDA kernels out on purpose; 1 makes it an error if they cannot be built. Else
        they are built wherever nvcc is found, also beside a torch without CUDA, without a GPU or a driver.
    GRADKERN_CUDA_ARCHS: architectures to build them for, as in "80;90"; newer ones are served by PTX.
    CUDA_HOME: the toolkit to use, if not that of the nvcc on PATH.
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
from typing import NamedTuple

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
CUDA_BINDINGS, NO_CUDA_BINDINGS = "csrc/bindings/cuda_ops.cpp", "csrc/bindings/no_cuda.cpp"
CMAKE_MINIMUM = (3, 20)
CUDA_MINIMUM = (12, 1)  # kernel arguments of more than 4 KiB
USUAL_NVCC = "/usr/local/cuda/bin"
CUDA_ARCHS = ["75", "80", "86", "89", "90", "100", "120"]
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


class Toolkit(NamedTuple):
    """What the CUDA kernels are built with."""

    nvcc: str
    include: str  # directory of cuda_runtime_api.h
    cudart: str  # the static runtime library
    archs: list[str]


def find_toolkit(environ: Mapping[str, str]) -> Toolkit | str:
    """The CUDA toolkit, or why the CUDA kernels cannot be built here and what to do about it."""
    asked = environ.get("GRADKERN_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"gradkern: GRADKERN_CUDA must be 0, 1 or not set, got {asked!r}.")
    if asked == "0":
        return f"it was installed with GRADKERN_CUDA=0: unset that {AGAIN}"
    if sys.platform != "linux":
        return "its CUDA kernels are built on Linux only"
    nvcc = find_nvcc(environ)
    if nvcc is None:
        return f"nvcc was not found: install a CUDA toolkit, or `pip install gradkern[cuda-build]`, {AGAIN}"
    # Where nvcc itself takes headers and libraries from; `nvcc` on PATH may be a script that calls another.
    plan = run_quietly([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull])
    found = re.search(r"release (\d+)\.(\d+)", run_quietly([nvcc, "--version"]))
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if found is None or top is None:
        return f"'{nvcc}' does not run: install a CUDA toolkit {AGAIN}"
    if tuple(map(int, found.groups())) < CUDA_MINIMUM:
        wanted = "CUDA {}.{} or newer is needed".format(*CUDA_MINIMUM)
        return f"{wanted}, and '{nvcc}' is of {'.'.join(found.groups())}: install a newer toolkit {AGAIN}"
    root = Path(top[1].strip()).resolve()
    headers = find_file(root, ["include", "targets/*/include"], "cuda_runtime_api.h")
    cudart = find_file(root, ["lib64", "lib", "targets/*/lib"], "libcudart_static.a")
    if headers is None or cudart is None:
        return f"the CUDA runtime was not found beside '{nvcc}': `pip install nvidia-cuda-runtime`, {AGAIN}"
    archs = environ.get("GRADKERN_CUDA_ARCHS", "").replace(",", ";").split(";")
    archs = [arch.strip().removeprefix("sm_") for arch in archs if arch.strip()]
    served = re.findall(r"sm_(\d+)", run_quietly([nvcc, "--list-gpu-code"]))
    unserved = [arch for arch in archs if arch not in served]
    if unserved:
        return f"'{nvcc}' does not know the architectures {', '.join(unserved)} of GRADKERN_CUDA_ARCHS"
    archs = archs or [arch for arch in CUDA_ARCHS if arch in served]
    return Toolkit(nvcc, str(headers.parent), str(cudart), sorted(archs, key=int))


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """The CUDA compiler: of CUDA_HOME, on PATH, in the usual place, or from the packages on PyPI."""
    places = [environ["CUDA_HOME"] + "/bin"] if environ.get("CUDA_HOME") else []
    places += [environ.get("PATH", os.defpath), USUAL_NVCC]
    places += map(str, sorted(Path(sysconfig.get_path("platlib")).glob("nvidia/*/bin"), reverse=True))
    return shutil.which("nvcc", path=os.pathsep.join(places))


def find_file(root: Path, folders: list[str], name: str) -> Path | None:
    """The first file of that name in the folders below `root`, which may be patterns."""
    return next((path for folder in folders for path in sorted(root.glob(f"{folder}/{name}"))), None)


def run_quietly(command: list[str]) -> str:
    """What a program says, on either stream."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout


def build_library(directory: Path, toolkit: Toolkit | None) -> str:
    """Build the torch-free library with CMake and return the archive's path."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", ROOT, "-B", directory, "-DCMAKE_BUILD_TYPE=Release", *generator]
    # Who insists on the extension wants to know; others are better served by a build with warnings.
    configure.append(f"-DGRADKERN_STRICT={'ON' if os.environ.get('GRADKERN_BUILD') == '1' else 'OFF'}")
    if toolkit is None:
        configure.append("-DGRADKERN_NVCC=")
    else:
        configure += [
            f"-DGRADKERN_NVCC={toolkit.nvcc}",
            f"-DGRADKERN_CUDA_INCLUDE={toolkit.include}",
            f"-DGRADKERN_CUDA_ARCHS={';'.join(toolkit.archs)}",
        ]
    build = ["cmake", "--build", directory, "--target", "gradkern_core", "-j", os.environ["MAX_JOBS"]]
    subprocess.run(configure, check=True)
    subprocess.run(build, check=True)
    return str(directory / "libgradkern_core.a")


class BuildGradkern(BuildExtension):
    """Builds the extension if it can be built, and records in `_build.json` what became of it."""

    reason: str | None = None  # why there is no extension
    toolkit: Toolkit | None = None
    cuda_reason = ""  # why it has no CUDA kernels

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
        directory = Path(self.build_temp).absolute() / "core"
        toolkit = find_toolkit(os.environ)
        required = os.environ.get("GRADKERN_CUDA") == "1"
        if isinstance(toolkit, str):
            if required:
                raise SystemExit(
                    f"gradkern: GRADKERN_CUDA=1, but the CUDA kernels cannot be built: {toolkit}."
                )
            self.cuda_reason, self.toolkit = toolkit, None
        else:
            self.toolkit = toolkit
        try:
            library = build_library(directory, self.toolkit)
        except subprocess.CalledProcessError as error:
            if required:
                raise SystemExit(f"gradkern: GRADKERN_CUDA=1, but nvcc failed: {error}.") from error
            if self.toolkit is None or os.environ.get("GRADKERN_BUILD") == "1":
                raise
            self.cuda_reason, self.toolkit = f"nvcc failed ({error}): see its messages above", None
            library = build_library(directory, None)
        for extension in self.extensions:
            extension.extra_objects = [library]
            if self.toolkit is None:
                extension.sources.append(NO_CUDA_BINDINGS)
                continue
            extension.sources.append(CUDA_BINDINGS)
            extension.extra_objects.append(self.toolkit.cudart)
            # torch may have loaded a CUDA runtime of its own: neither is to see the other's functions.
            extension.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")
            extension.extra_link_args += ["-ldl", "-lrt", "-lpthread"]
        super().build_extensions()

    def record(self) -> None:
        """Write `_build.json` to where the extension goes: the wheel or, built in place, the source tree."""
        extension = Path(self.get_ext_fullpath("gradkern._C"))
        if self.reason is not None:
            self.toolkit, self.cuda_reason = None, ""
            print(f"gradkern: built without its extension: {self.reason}.", file=sys.stderr)
            extension.unlink(missing_ok=True)  # of an earlier build, which the record would belie
        elif self.toolkit is None:
            print(f"gradkern: built without its CUDA kernels: {self.cuda_reason}.", file=sys.stderr)
        record = {
            "extension": self.reason is None,
            "reason": self.reason or "",
            "torch": TORCH_VERSION,
            "cuda": self.toolkit is not None,
            "cuda_reason": self.cuda_reason,
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
