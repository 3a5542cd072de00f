"""The suite of `test_kernels.py` fails for every broken variant of the kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from ctypes import CDLL
from typing import Any

import pytest

from tests.cuda import kernels, test_kernels
from tests.cuda.mutants import MUTANTS, Mutant

pytestmark = pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))


def cases(test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """The arguments of every case of a parametrized test."""
    axes = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names = mark.args[0] if isinstance(mark.args[0], tuple) else (mark.args[0],)
        axes.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in mark.args[1]])
    for chosen in itertools.product(*axes):
        yield {name: value for values in chosen for name, value in values.items()}


def first_failure(library: CDLL, mutant: Mutant) -> str | None:
    """The first test of the mutant's kernel that fails."""
    named = (f"test_{mutant.kernel}", "test_every")
    tests = [test for name, test in vars(test_kernels).items() if name.startswith(named)]
    for test in sorted(tests, key=lambda test: not test.__name__.startswith(f"test_{mutant.first}")):
        for arguments in cases(test):
            if arguments.get("capacity", 0) != 0 or arguments.get("kernel", mutant.kernel) != mutant.kernel:
                continue  # not compiled
            try:
                test(library, **arguments)
            except kernels.Violation as violation:
                return f"{test.__name__}: {violation}"
            except AssertionError:
                return f"{test.__name__}: wrong result"
    return None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_suite_fails_for_every_mutant(mutant: Mutant, record: list[str]) -> None:
    failure = first_failure(mutant.build(), mutant)
    record.append(f"{'killed  ' if failure else 'SURVIVED'} {mutant.name}: {failure}")
    assert failure is not None


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What became of each mutant, printed at the end."""
    lines: list[str] = []
    yield lines
    killed = sum(line.startswith("killed") for line in lines)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, f"mutants of the CUDA kernels: {killed} of {len(lines)} killed", sep="\n")
