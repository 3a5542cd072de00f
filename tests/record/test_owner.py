from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from gradkern.record.owner import Owner

NAME = "from gradkern.record.owner import Owner; print(Owner.new().text, flush=True); input()"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """Another process, which waits to be told to end."""
    with subprocess.Popen(
        [sys.executable, "-c", NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        yield started


def named(process: subprocess.Popen[str]) -> Owner:
    assert process.stdout is not None
    owner = Owner.parse(process.stdout.readline())
    assert owner is not None
    return owner


def test_an_owner_comes_back_from_its_text() -> None:
    owner = Owner.new()
    assert Owner.parse(owner.text) == owner


@pytest.mark.parametrize("text", [None, "", "0f1e2d3c4b5a6978", "1234567890123456", "{}"])
def test_what_names_no_process_is_nobody(text: str | None) -> None:
    assert Owner.parse(text) is None


def test_a_process_that_runs_is_alive(process: subprocess.Popen[str]) -> None:
    assert named(process).is_alive


def test_a_process_that_has_ended_is_not(process: subprocess.Popen[str]) -> None:
    owner = named(process)
    process.communicate("\n")
    assert not owner.is_alive


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says so")
def test_a_process_that_has_ended_but_was_not_waited_for_is_not(process: subprocess.Popen[str]) -> None:
    owner = named(process)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not owner.is_alive


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says so")
def test_another_process_with_the_same_number_is_not_the_owner(process: subprocess.Popen[str]) -> None:
    assert not dataclasses.replace(named(process), began="1").is_alive


def test_of_a_process_on_another_machine_nothing_is_expected(process: subprocess.Popen[str]) -> None:
    assert not dataclasses.replace(named(process), machine="elsewhere").is_alive


def test_an_owner_of_this_process_is_alive_until_it_is_released() -> None:
    owner = Owner.new()
    assert owner.is_alive
    owner.release()
    assert not owner.is_alive
