"""How setup.py finds what the CUDA kernels are built with, and what it says where it does not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers import load_setup

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "and install gradkern again with `pip install --no-build-isolation`"

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="these are not the sources"),
    pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux"),
]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    return load_setup()


@pytest.fixture
def machine(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a machine with a toolkit 12.8 and nothing else."""
    monkeypatch.setattr(setup_py, "USUAL_NVCC", str(tmp_path / "nowhere"))
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(tmp_path / "packages"))
    for file in ("toolkit/include/cuda_runtime_api.h", "toolkit/lib64/libcudart_static.a"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    write_nvcc(tmp_path, "12.8", ["75", "80", "90", "100", "120"])
    return {"PATH": str(tmp_path / "toolkit/bin")}


def write_nvcc(tmp_path: Path, version: str, archs: list[str]) -> None:
    nvcc = tmp_path / "toolkit/bin/nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    codes = "\n".join(f"sm_{arch}" for arch in archs)
    nvcc.write_text(
        f"""#!/bin/sh
case "$1" in
--dryrun) echo '#$ TOP={tmp_path}/toolkit/bin/..' >&2 ;;
--version) echo 'Cuda compilation tools, release {version}, V{version}.93' ;;
--list-gpu-code) echo '{codes}' ;;
esac
"""
    )
    nvcc.chmod(0o755)


def test_a_toolkit_is_found_by_its_nvcc(
    setup_py: ModuleType, machine: dict[str, str], tmp_path: Path
) -> None:
    toolkit = setup_py.find_toolkit(machine)
    assert toolkit.nvcc == str(tmp_path / "toolkit/bin/nvcc")
    assert toolkit.include == str(tmp_path / "toolkit/include")
    assert toolkit.cudart == str(tmp_path / "toolkit/lib64/libcudart_static.a")


def test_cuda_home_comes_first(setup_py: ModuleType, machine: dict[str, str], tmp_path: Path) -> None:
    toolkit = setup_py.find_toolkit({"PATH": "/nowhere", "CUDA_HOME": str(tmp_path / "toolkit")})
    assert toolkit.nvcc == str(tmp_path / "toolkit/bin/nvcc")


def test_nvcc_from_pypi_is_found(setup_py: ModuleType, machine: dict[str, str], tmp_path: Path) -> None:
    packages = tmp_path / "packages/nvidia"
    packages.mkdir(parents=True)
    (packages / "cu13").symlink_to(tmp_path / "toolkit")
    toolkit = setup_py.find_toolkit({"PATH": "/nowhere"})
    assert toolkit.nvcc == str(packages / "cu13/bin/nvcc")


def test_architectures_are_those_that_both_know(setup_py: ModuleType, machine: dict[str, str]) -> None:
    assert setup_py.find_toolkit(machine).archs == ["75", "80", "90", "100", "120"]


@pytest.mark.parametrize("asked", ["100;80", "80,100", "sm_80; sm_100", "80;100;"])
def test_architectures_can_be_chosen(setup_py: ModuleType, machine: dict[str, str], asked: str) -> None:
    assert setup_py.find_toolkit({**machine, "GRADKERN_CUDA_ARCHS": asked}).archs == ["80", "100"]


def test_an_architecture_that_nvcc_does_not_know_is_named(
    setup_py: ModuleType, machine: dict[str, str]
) -> None:
    reason = setup_py.find_toolkit({**machine, "GRADKERN_CUDA_ARCHS": "80;61"})
    assert reason.endswith("nvcc' does not know the architectures 61 of GRADKERN_CUDA_ARCHS")


def test_the_kernels_can_be_declined(setup_py: ModuleType, machine: dict[str, str]) -> None:
    reason = setup_py.find_toolkit({**machine, "GRADKERN_CUDA": "0"})
    assert reason == f"it was installed with GRADKERN_CUDA=0: unset that {AGAIN}"


def test_an_unknown_wish_is_an_error(setup_py: ModuleType, machine: dict[str, str]) -> None:
    with pytest.raises(SystemExit) as error:
        setup_py.find_toolkit({**machine, "GRADKERN_CUDA": "yes"})
    assert str(error.value) == "gradkern: GRADKERN_CUDA must be 0, 1 or not set, got 'yes'."


def test_without_nvcc_the_reason_says_where_it_comes_from(
    setup_py: ModuleType, machine: dict[str, str]
) -> None:
    assert setup_py.find_toolkit({"PATH": "/nowhere"}) == (
        f"nvcc was not found: install a CUDA toolkit, or `pip install gradkern[cuda-build]`, {AGAIN}"
    )


def test_an_old_toolkit_is_refused(setup_py: ModuleType, machine: dict[str, str], tmp_path: Path) -> None:
    write_nvcc(tmp_path, "12.0", ["75"])
    reason = setup_py.find_toolkit(machine)
    assert reason.startswith("CUDA 12.1 or newer is needed, and '")
    assert reason.endswith(f"nvcc' is of 12.0: install a newer toolkit {AGAIN}")


def test_a_toolkit_without_its_runtime_is_refused(
    setup_py: ModuleType, machine: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "toolkit/lib64/libcudart_static.a").unlink()
    reason = setup_py.find_toolkit(machine)
    assert reason.startswith("the CUDA runtime was not found beside '")
    assert reason.endswith(f"`pip install nvidia-cuda-runtime`, {AGAIN}")
