"""Building and installing as users do it: whatever is missing, the package works and says why."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gradkern import ops
from tests.helpers import load_setup

ROOT = Path(__file__).resolve().parents[1]
AGAIN = "and install gradkern again with `pip install --no-build-isolation`"
NO_TORCH = "ModuleNotFoundError: No module named 'torch'"
TRY_OUT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gradkern
import torch
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.tensor([3.0, 4.0])
norm = float(gradkern.clip_([parameter], 1.0))
print(json.dumps({
    "backend": gradkern.backend(),
    "file": gradkern.__file__,
    "norm": norm,
    "clipped": parameter.grad.tolist(),
    "warnings": [str(warning.message) for warning in caught if "gradkern" in str(warning.message)],
}))
"""

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="these are not the sources"),
]


# What stands in the way of a build.


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    return load_setup()


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that has a C++ compiler `c++` and CMake 3.20, and nothing else."""
    for name, says in {"c++": "a compiler", "cmake": "cmake version 3.20.0"}.items():
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\necho '{says}'\n")
        tool.chmod(0o755)
    return {"PATH": str(tmp_path)}


def test_nothing_stands_in_the_way_of_a_complete_machine(
    setup_py: ModuleType, machine: dict[str, str]
) -> None:
    assert setup_py.obstacle(machine, None) is None


def test_a_build_that_is_asked_for_meets_the_same_obstacles(
    setup_py: ModuleType, machine: dict[str, str]
) -> None:
    assert setup_py.obstacle({**machine, "GRADKERN_BUILD": "1"}, None) is None
    assert setup_py.obstacle({**machine, "GRADKERN_BUILD": "1"}, NO_TORCH) is not None


def test_a_build_can_be_declined(setup_py: ModuleType, machine: dict[str, str]) -> None:
    expected = f"it was installed with GRADKERN_BUILD=0: unset that {AGAIN}"
    assert setup_py.obstacle({**machine, "GRADKERN_BUILD": "0"}, None) == expected


def test_an_unknown_wish_is_an_error(setup_py: ModuleType, machine: dict[str, str]) -> None:
    with pytest.raises(SystemExit) as error:
        setup_py.obstacle({**machine, "GRADKERN_BUILD": "yes"}, None)
    assert str(error.value) == "gradkern: GRADKERN_BUILD must be 0, 1 or not set, got 'yes'."


def test_without_torch_the_reason_names_isolation(setup_py: ModuleType, machine: dict[str, str]) -> None:
    assert setup_py.obstacle(machine, NO_TORCH) == (
        f"torch could not be imported while gradkern was being built ({NO_TORCH}), as in pip's isolated "
        f"builds: install torch, setuptools, cmake and ninja {AGAIN}"
    )


def test_without_a_compiler_the_reason_says_to_install_one(
    setup_py: ModuleType, machine: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "c++").unlink()
    expected = f"no C++ compiler was found ('c++'): install g++ or clang (or set CXX) {AGAIN}"
    assert setup_py.obstacle(machine, None) == expected


def test_the_compiler_is_the_one_that_cxx_names(setup_py: ModuleType, machine: dict[str, str]) -> None:
    assert setup_py.obstacle({**machine, "CXX": "c++ -pipe"}, None) is None
    reason = setup_py.obstacle({**machine, "CXX": "icpx -pipe"}, None)
    assert reason.startswith("no C++ compiler was found ('icpx'): ")


def test_without_python_headers_the_reason_names_them(
    setup_py: ModuleType, machine: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(tmp_path))
    expected = f"Python's headers were not found: install them (Debian, Ubuntu: python3-dev) {AGAIN}"
    assert setup_py.obstacle(machine, None) == expected


@pytest.mark.parametrize("says", [None, "cmake version 3.19.8", "cmake version 2.8", "no version at all"])
def test_without_a_recent_cmake_the_reason_says_which(
    setup_py: ModuleType, machine: dict[str, str], tmp_path: Path, says: str | None
) -> None:
    (tmp_path / "cmake").unlink()
    if says is not None:
        (tmp_path / "cmake").write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / "cmake").chmod(0o755)
    expected = f"CMake 3.20 or newer was not found: `pip install cmake` {AGAIN}"
    assert setup_py.obstacle(machine, None) == expected


def test_the_stub_names_what_the_extension_offers() -> None:
    if ops.native is None:
        pytest.skip("there is no extension")
    stub = ast.parse((ROOT / "gradkern" / "_C.pyi").read_text())
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    values = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert functions | values == {name for name in vars(ops.native) if not name.startswith("_")}


# Building and installing.


@dataclass(frozen=True)
class Built:
    """A wheel and what pip said while it was built."""

    wheel: Path
    output: str

    def record(self) -> dict[str, object]:
        with zipfile.ZipFile(self.wheel) as archive:
            record: dict[str, object] = json.loads(archive.read("gradkern/_build.json"))
        return record

    def names(self) -> list[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.namelist()


def run(*command: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the environment changed by `environ`, away from GRADKERN_* of the test run."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GRADKERN_")}
    # PYTHONPATH would let the sources shadow what has been installed.
    inherited.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def build(tree: Path, out: Path, *options: str, **environ: str) -> Built:
    done = run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", *options, "--wheel-dir", out, tree),
        cwd=out.parent,
        **environ,
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = out.glob("*.whl")
    return Built(wheel, done.stdout)


def unpack(archive: Path, into: Path) -> Path:
    with tarfile.open(archive) as source:
        source.extractall(into)
    (tree,) = into.iterdir()
    return tree


class Environment:
    """A virtual environment with this run's torch in it, and nothing else of this run's."""

    def __init__(self, path: Path) -> None:
        done = run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
        assert done.returncode == 0, done.stdout
        self.python = path / "bin" / "python"
        site_packages = path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        self.package = site_packages / "gradkern"
        # The directory alone: files like those of an editable installation are not followed from there.
        site_packages.joinpath("torch.pth").write_text(str(Path(torch.__file__).parents[1]))

    def install(self, *what: str | Path, **environ: str) -> None:
        done = run(
            *(sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", *what),
            cwd=self.python.parent,
            **environ,
        )
        assert done.returncode == 0, done.stdout

    def try_out(self) -> dict[str, object]:
        """Import gradkern and clip with it, where no compiler can be found."""
        done = run(self.python, "-c", TRY_OUT, cwd=self.python.parent, PATH="/nowhere")
        assert done.returncode == 0, done.stdout
        result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        assert result["norm"] == 5.0
        assert result["clipped"] == pytest.approx([0.6, 0.8], rel=1e-7)
        return result


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution. Everything below is built from it, so that it has to be complete."""
    temporary = tmp_path_factory.mktemp("sdist")
    # From a copy without what other builds have left in the tree.
    ignored = shutil.ignore_patterns(
        *(".*cache", ".git", ".venv", ".hypothesis", "__pycache__"),
        *("build", "dist", "*.egg-info", "_C.*.so", "_build.json"),
    )
    tree = Path(shutil.copytree(ROOT, temporary / "tree", ignore=ignored))
    done = run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", temporary, cwd=tree)
    assert done.returncode == 0, done.stdout
    (archive,) = temporary.glob("*.tar.gz")
    return archive


@pytest.fixture
def tree(sdist: Path, tmp_path: Path) -> Path:
    return unpack(sdist, tmp_path / "sources")


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture(scope="module")
def native(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel with the extension."""
    temporary = tmp_path_factory.mktemp("native")
    tree = unpack(sdist, temporary / "sources")
    return build(tree, temporary / "wheels", "--no-build-isolation", GRADKERN_BUILD="1")


def test_the_wheel_works_without_a_compiler(native: Built, environment: Environment) -> None:
    environment.install(native.wheel)
    result = environment.try_out()
    assert str(result["backend"]).startswith("cpu ")
    assert result["file"] == str(environment.package / "__init__.py")
    assert result["warnings"] == []


def test_the_wheel_is_for_this_python_and_machine(native: Built) -> None:
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert native.wheel.name.split("-")[2:4] == [tag, tag]
    assert native.wheel.name.endswith(f"{sysconfig.get_platform().replace('-', '_')}.whl")


def test_the_wheel_records_what_was_built(native: Built) -> None:
    torch_version = ".".join(torch.__version__.split(".")[:2])
    record = native.record()
    assert (record["extension"], record["reason"], record["torch"]) == (True, "", torch_version)
    nvcc_is_here = shutil.which("nvcc") is not None and os.environ.get("GRADKERN_CUDA") != "0"
    assert record["cuda"] is (record["cuda_reason"] == "")
    assert record["cuda"] or not nvcc_is_here


def test_the_wheel_holds_the_package_and_nothing_else(native: Built) -> None:
    names = [name for name in native.names() if ".dist-info/" not in name]
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("gradkern/**/*.py")}
    extension = f"gradkern/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    others = {"gradkern/py.typed", "gradkern/_C.pyi", "gradkern/_build.json", extension}
    assert set(names) == sources | others


def test_the_wheel_carries_its_licence(native: Built) -> None:
    assert [name for name in native.names() if name.endswith("/LICENSE")]


def test_an_extension_for_another_torch_is_refused(native: Built, environment: Environment) -> None:
    environment.install(native.wheel)
    path = environment.package / "_build.json"
    path.write_text(json.dumps({**native.record(), "torch": "1.0"}))
    result = environment.try_out()
    assert str(result["backend"]).startswith("reference: its extension was built for torch 1.0, and this is ")
    assert len(result["warnings"]) == 1  # type: ignore[arg-type]


def test_an_isolated_build_installs_the_reference_and_says_why(
    tree: Path, tmp_path: Path, environment: Environment
) -> None:
    built = build(tree, tmp_path / "wheels")
    reason = built.record()["reason"]
    assert str(reason).startswith("torch could not be imported while gradkern was being built (")
    assert built.wheel.name.endswith("-py3-none-any.whl")
    environment.install(built.wheel)
    result = environment.try_out()
    assert result["backend"] == f"reference: {reason}"
    assert result["warnings"] == [
        f"gradkern computes with plain PyTorch, which is right but slow, because {reason}."
    ]


def test_without_a_compiler_the_reference_is_installed(
    tree: Path, tmp_path: Path, environment: Environment
) -> None:
    built = build(tree, tmp_path / "wheels", "--no-build-isolation", CXX="/nowhere/c++")
    reason = f"no C++ compiler was found ('/nowhere/c++'): install g++ or clang (or set CXX) {AGAIN}"
    assert built.record()["reason"] == reason
    assert built.record()["extension"] is False
    assert f"gradkern: built without its extension: {reason}." in built.output
    assert built.wheel.name.endswith("-py3-none-any.whl")
    environment.install(built.wheel)
    assert environment.try_out()["backend"] == f"reference: {reason}"


def broken_compiler(directory: Path) -> str:
    path = directory / "broken-c++"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def test_where_compiling_fails_the_reference_is_installed(tree: Path, tmp_path: Path) -> None:
    built = build(tree, tmp_path / "wheels", "--no-build-isolation", CXX=broken_compiler(tmp_path))
    assert str(built.record()["reason"]).startswith("compiling it failed (")
    assert built.wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in built.names() if name.endswith(".so")]


@pytest.mark.parametrize("obstacle", ["missing", "broken"])
def test_a_build_that_was_asked_for_may_not_fail_silently(tree: Path, tmp_path: Path, obstacle: str) -> None:
    compiler = broken_compiler(tmp_path) if obstacle == "broken" else "/nowhere/c++"
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    done = run(*command, cwd=tree, GRADKERN_BUILD="1", CXX=compiler)
    assert done.returncode != 0
    assert "gradkern: GRADKERN_BUILD=1, but the extension cannot be built: " in done.stdout


def test_an_editable_installation_records_its_reason_in_the_tree(
    tree: Path, environment: Environment
) -> None:
    environment.install("--no-build-isolation", "--editable", tree, GRADKERN_BUILD="0")
    record = json.loads((tree / "gradkern" / "_build.json").read_text())
    assert record["extension"] is False
    result = environment.try_out()
    assert result["file"] == str(tree / "gradkern" / "__init__.py")
    assert result["backend"] == f"reference: it was installed with GRADKERN_BUILD=0: unset that {AGAIN}"
    assert result["warnings"] == []  # it is what was asked for


def test_declining_the_extension_removes_that_of_an_earlier_build(tree: Path) -> None:
    extension = tree / "gradkern" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    extension.write_bytes(b"left over")
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, GRADKERN_BUILD="0")
    assert done.returncode == 0, done.stdout
    assert not extension.exists()
