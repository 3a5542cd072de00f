"""The code in docs/monitor.md runs as it is printed, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradkern.diagnosis import DETECTORS

PAGE = Path(__file__).parents[2] / "docs" / "monitor.md"


def test_the_code_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    if not PAGE.exists():
        pytest.skip("docs/ is not part of this installation")
    text = PAGE.read_text(encoding="utf-8")
    blocks = [(m.start(), m.group(1)) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)]
    assert len(blocks) > 5
    names: dict[str, object] = {"__name__": "docs"}
    for begin, block in blocks:
        line = text.count("\n", 0, begin) + 1
        exec(compile("\n" * line + block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "Cause (" in printed
    assert "loss_nonfinite at step" in printed


def test_the_page_names_every_kind() -> None:
    if not PAGE.exists():
        pytest.skip("docs/ is not part of this installation")
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert {kind for row in rows for kind in re.findall(r"`(\w+)`", row.split("|")[1])} == set(DETECTORS)
