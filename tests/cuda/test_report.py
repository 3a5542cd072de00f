"""The report reads SASS rightly, and its gates close."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.cuda import kernels, report

FINE = report.Kernel(
    "stats", "90", registers=64, spilled_bytes=0, shared_bytes=0, loops=4, in_flight=4, narrowest=128
)

pytestmark = pytest.mark.skipif(not report.SOURCES.is_dir(), reason="csrc/cuda is not beside the tests")


def listing(*lines: str) -> list[report.Instruction]:
    """Instructions 16 bytes apart, as SASS has them."""
    return [(16 * i, line) for i, line in enumerate(lines)]


LOADS = [f"@!P0 LDG.E.128 R{4 * k}, desc[UR6][R40.64+{hex(4096 * k)}]" for k in range(4)]
USES = [f"FFMA R50, R{4 * k}, R{4 * k}, RZ" for k in range(4)]


def test_loads_count_as_in_flight_until_one_of_them_is_needed() -> None:
    assert report.loads_in_flight(listing(*LOADS, *USES)) == 4
    assert report.loads_in_flight(listing(*LOADS[:2], *USES[:2], *LOADS[2:], *USES[2:])) == 2
    assert report.loads_in_flight(listing(*LOADS[:3], "IMAD R60, R61, R9, RZ", LOADS[3])) == 3


def test_an_address_that_was_itself_loaded_ends_the_flight() -> None:
    assert report.loads_in_flight(listing(LOADS[0], "LDG.E.128 R20, [R2.64]")) == 1


def test_a_main_loop_is_the_innermost_one_with_four_wide_loads() -> None:
    inner = [*LOADS, *USES, "@P1 BRA 0x10"]
    slow = ["LDG.E.128 R20, [R8.64]", "@P2 BRA 0xa0"]
    code = listing("MOV R1, RZ", *inner, *slow, "@P0 BRA 0x0")
    loops = report.main_loops(code)
    assert [(loop[0][0], loop[-1][0]) for loop in loops] == [(0x10, 0x90)]


@pytest.mark.parametrize(
    ("access", "bits"),
    [
        ("LDG.E.128.STRONG.GPU R8, [R2.64]", 128),
        ("LDG.E.64 R8, [R2.64]", 64),
        ("@P0 STG.E [R2.64], R5", 32),
        ("LD.E.U16 R8, [R2.64]", 16),
        ("LDG.E.U8.CONSTANT R8, [R2.64]", 8),
        ("LDS.64 R8, [R2]", 128),
        ("LDL R8, [R1]", 128),
    ],
)
def test_the_width_of_accesses_to_global_memory(access: str, bits: int) -> None:
    assert report.narrowest_access(listing(*LOADS, access)) == bits


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spilled_bytes": 8}, "spills"),
        ({"registers": 65}, "65 registers"),
        ({"loops": 3}, "3 main loops"),
        ({"narrowest": 64}, "an access of 64 bits"),
        ({"in_flight": 3}, "3 loads in flight"),
        ({"name": "penalty", "in_flight": 4}, "32.0 KiB"),
    ],
)
def test_every_gate_closes(change: dict[str, int], says: str) -> None:
    assert not list(FINE.failures())
    failures = list(replace(FINE, **change).failures())
    assert any(says in failure for failure in failures)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.skipif(report.find_tool("cuobjdump") is None, reason="there is no cuobjdump")
def test_the_kernels_meet_every_gate_on_every_architecture() -> None:
    command = [sys.executable, "-m", "tests.cuda.report"]
    done = subprocess.run(command, cwd=kernels.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
