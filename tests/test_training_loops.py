"""docs/training-loops.md: every block of code runs as printed, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "training-loops.md"

if not PAGE.exists():  # an installed package is tested without its documentation
    pytest.skip("the page is not here", allow_module_level=True)


def sections() -> list[tuple[str, str]]:
    """The heading above each block of code, and the block."""
    found, heading = [], ""
    for title, code in re.findall(
        r"^#+ ([^\n]+)$|^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    ):
        heading = title or heading
        if code:
            found.append((heading, code))
    return found


def test_all_blocks_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    names: dict[str, object] = {}
    for heading, code in sections():
        exec(compile(code, f"{PAGE.name}: {heading}", "exec"), names)
    assert "clipped_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "word",
    [
        "clip_(",
        "attach(",
        "GradScaler",
        "step % 4",
        "Chain(",
        'measure="backward"',
        "recurrent",
        "truncated_bptt(",
    ],
)
def test_the_page_shows(word: str) -> None:
    assert any(word in code for _, code in sections())
