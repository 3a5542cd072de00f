from __future__ import annotations

import ctypes

import pytest

from tests.cuda import kernels


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The kernels as they are, under the executor."""
    reason = kernels.why_not()
    if reason is not None:
        pytest.skip(reason)
    return kernels.build()
