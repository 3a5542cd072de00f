"""Names that the examples in gradkern's docstrings may use. The fixtures of the tests are in tests/."""

from __future__ import annotations

import pytest
import torch

import gradkern


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, gradkern=gradkern)
