"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

import gradkern
from tests import backends
from tests.backends import Backend

# A slow machine is no failure, and a run repeats the last one.
hypothesis.settings.register_profile("gradkern", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gradkern")


def pytest_report_header() -> str:
    """Say what is being tested."""
    return f"gradkern: {gradkern.backend()}; backends: {', '.join(map(str, backends.ALL))}"


def pytest_sessionstart() -> None:
    """Stop if the extension is not there, or is there, against what GRADKERN_EXPECT says.

    Without it all tests would pass on the reference alone, and nobody would notice.
    """
    expected = os.environ.get("GRADKERN_EXPECT")
    found = "native" if backends.NATIVE else "reference"
    if expected is not None and expected != found:
        pytest.exit(f"GRADKERN_EXPECT={expected}, but gradkern runs as {gradkern.backend()!r}", returncode=1)


@pytest.fixture(params=backends.ALL, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The reference, then the extension on each instruction set; gradkern itself computes with it."""
    with request.param.active():
        yield request.param


@pytest.fixture(params=backends.NATIVE, ids=str)
def native(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The extension on each instruction set. Without the extension the test is skipped."""
    with request.param.active():
        yield request.param


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    """Each test starts from the same random numbers, and leaves torch's settings as they were."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
