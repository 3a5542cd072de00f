"""A process that is killed loses at most the last second of its record, and never the file."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradkern.record import Run, Writer
from tests.record.victim import NOTE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")

RUNS = 20


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Records of runs that were killed at random moments of their first two seconds."""
    directory = tmp_path_factory.mktemp("killed")
    subprocess.run(
        [sys.executable, "-m", "tests.record.victim", directory, str(RUNS)], check=True, timeout=120
    )
    return [directory / f"run{run}.gk" for run in range(RUNS)]


def notes(path: Path) -> tuple[list[tuple[int, float]], float]:
    """Steps and when they had been put, and when the process was killed."""
    data = path.with_name(path.stem.replace("run", "notes")).read_bytes()
    killed = float(path.with_name(path.stem.replace("run", "killed")).read_text())
    return list(NOTE.iter_unpack(data[: len(data) // NOTE.size * NOTE.size])), killed


@pytest.mark.parametrize("run", range(RUNS))
def test_at_most_the_last_second_is_missing(killed: list[Path], run: int) -> None:
    path = killed[run]
    put, moment = notes(path)
    due = [step for step, at in put if at < moment - 1.0]
    if not path.exists() or not path.stat().st_size:
        assert not due
        return
    with Run.open(path) as record:
        steps, rows = record.rows("grad_norm")
        scalars = record.scalar("loss")
    assert steps.tolist() == list(range(len(steps)))
    assert (rows == steps[:, None]).all()
    np.testing.assert_array_equal(*scalars)
    assert len(steps) >= len(due)
    assert len(scalars[0]) >= len(due)


def test_most_of_the_killed_runs_had_written_something(killed: list[Path]) -> None:
    lengths = []
    for path in killed:
        if path.exists() and path.stat().st_size:
            with Run.open(path) as record:
                lengths.append(len(record.steps))
    assert sum(length > 0 for length in lengths) > RUNS // 2


def test_what_is_left_is_a_sound_database(killed: list[Path]) -> None:
    for path in killed:
        if path.exists() and path.stat().st_size:
            connection = sqlite3.connect(path)
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            connection.close()


def test_a_killed_run_goes_on(killed: list[Path]) -> None:
    path = next(path for path in killed if path.exists() and path.stat().st_size > 1 << 15)
    with Run.open(path) as record:
        last = len(record.steps) - 1
    with Writer(path) as writer:
        writer.put_scalars(last + 1, {"loss": last + 1})
    with Run.open(path) as record:
        assert record.scalar("loss")[0].tolist() == list(range(last + 2))
