"""README.md: its blocks of code run as printed, and what it points to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import gradkern

PAGE = Path(__file__).parent.parent / "README.md"

if not PAGE.exists():  # an installed package is tested without its documentation
    pytest.skip("the README is not here", allow_module_level=True)


def test_all_blocks_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    torch.set_num_threads(1)
    exec("".join(blocks), {})
    out = capsys.readouterr().out
    assert out.count("0.weight") == 2  # the worst, and the table
    assert "'skipped_steps': 0.0" in out


def test_every_function_it_names_exists() -> None:
    names = set(re.findall(r"\bgradkern\.(\w+)\(?", PAGE.read_text())) - {"selftest", "demo"}
    assert names
    assert [name for name in sorted(names) if not hasattr(gradkern, name)] == []


def test_every_file_it_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE.read_text())
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"`make ([\w-]+)`", PAGE.read_text()))
    makefile = (PAGE.parent / "Makefile").read_text()
    assert targets
    assert [name for name in sorted(targets) if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
