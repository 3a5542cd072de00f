from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from tests.cuda import kernels

# What is tested here are the sources; an installed package is tested without them.
collect_ignore_glob = [] if (Path(__file__).parents[2] / "csrc").exists() else ["*"]


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The kernels as they are, under the executor."""
    reason = kernels.why_not()
    if reason is not None:
        pytest.skip(reason)
    return kernels.build()
