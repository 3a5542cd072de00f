from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradkern
from gradkern.record import RecordError, Run, Writer, blocks, file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A record of a hundred steps of twenty tensors."""
    path = tmp_path / "run.gk"
    with Writer(path) as writer:
        writer.set_meta({"torch": "2.13"})
        for kind in ("grad_norm", "weight_norm"):
            writer.set_names(kind, [f"{i}.weight" for i in range(20)])
        for step in range(100):
            writer.put_scalars(step, {"loss": step, "lr": 0.1})
            writer.put_rows("grad_norm", step, np.full(20, step))
        writer.put_rows("weight_norm", 0, np.ones(20))
    return path


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


def test_run_is_an_attribute_of_gradkern() -> None:
    assert gradkern.Run is Run


def test_importing_gradkern_imports_neither_sqlite3_nor_the_record() -> None:
    # torch itself imports numpy where it finds it.
    code = "import sys, gradkern; print({'sqlite3', 'gradkern.record'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_names_of_what_was_recorded_are_listed(path: Path) -> None:
    with Run.open(path) as run:
        assert (run.scalar_names(), run.kinds()) == (["loss", "lr"], ["grad_norm", "weight_norm"])


def test_opening_changes_nothing(path: Path) -> None:
    before = path.read_bytes()
    with Run.open(path) as run:
        run.rows("grad_norm")
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_path_with_signs_that_mean_something_in_an_address_is_opened(path: Path) -> None:
    odd = path.with_name("50% of #1?mode=x&.gk")
    path.rename(odd)
    with Run.open(odd) as run:
        assert len(run.steps) == 100


def test_a_missing_file_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Run.open: there is no file .*none\.gk"):
        Run.open(tmp_path / "none.gk")
    assert not list(tmp_path.iterdir())


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gk").touch()
    with pytest.raises(RecordError, match=r"Run.open: .*empty\.gk is empty"):
        Run.open(tmp_path / "empty.gk")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gk").write_text("step,loss\n0,1\n")
    with pytest.raises(RecordError, match=r"Run.open: .*text\.gk is not an SQLite file"):
        Run.open(tmp_path / "text.gk")


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    change(tmp_path / "foreign.gk", "CREATE TABLE series (value)")
    with pytest.raises(RecordError, match=r"Run.open: .* but not a record of gradkern"):
        Run.open(tmp_path / "foreign.gk")


def test_a_newer_record_is_refused_with_both_versions(path: Path) -> None:
    change(path, f"PRAGMA user_version = {file.VERSION + 1}")
    with pytest.raises(
        RecordError, match=rf"newer gradkern \(record version 2\); gradkern {gradkern.__version__}"
    ):
        Run.open(path)


@pytest.mark.parametrize("size", [16, 100, 4096, 10_000])
def test_a_file_that_was_cut_off_is_called_damaged(path: Path, size: int) -> None:
    with open(path, "r+b") as out:
        out.truncate(size)
    with pytest.raises(RecordError, match="is damaged"), Run.open(path) as run:
        run.rows("grad_norm")


def test_pages_that_were_overwritten_are_called_damaged(path: Path) -> None:
    with open(path, "r+b") as out:
        out.seek(4096)
        out.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(RecordError, match="is damaged"), Run.open(path) as run:
        run.rows("grad_norm")


@pytest.mark.parametrize("damage", ["data = x'00'", "code = 9", "count = count + 1"])
def test_a_block_that_makes_no_sense_is_called_damaged(path: Path, damage: str) -> None:
    change(path, f"UPDATE blocks SET {damage}")
    with Run.open(path) as run, pytest.raises(RecordError, match="is damaged"):
        run.rows("grad_norm")


def test_a_packed_block_that_makes_no_sense_is_called_damaged(path: Path) -> None:
    change(path, f"UPDATE blocks SET code = {blocks.PACKED}")
    with Run.open(path) as run, pytest.raises(RecordError, match="is damaged"):
        run.scalar("loss")


def test_a_damaged_block_does_not_keep_a_run_from_going_on(path: Path) -> None:
    change(path, f"UPDATE blocks SET code = {blocks.PACKED}")
    with Writer(path) as writer:
        assert writer.go_on({}) == 100


def test_a_run_that_was_closed_is_not_called_damaged(path: Path) -> None:
    with Run.open(path) as run:
        pass
    with pytest.raises(RecordError, match=r"Run: .*run\.gk has been closed\. Open it again with Run\.open\."):
        run.scalar("loss")


@pytest.mark.parametrize("nothing", [None, 3])
def test_what_is_no_path_is_refused(nothing: object) -> None:
    with pytest.raises(TypeError, match=r"Run.open: path must be text or a path, got (NoneType|int)\."):
        Run.open(nothing)  # type: ignore[arg-type]


def test_a_directory_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"Run.open: .* is a directory"):
        Run.open(tmp_path)


def test_damage_elsewhere_leaves_the_rest_readable(path: Path) -> None:
    change(path, "UPDATE blocks SET code = 9 WHERE series = (SELECT id FROM series WHERE kind = 'grad_norm')")
    with Run.open(path) as run:
        assert len(run.scalar("loss")[0]) == 100


def test_a_record_without_its_tables_is_called_damaged(path: Path) -> None:
    change(path, "DROP TABLE series")
    with pytest.raises(RecordError, match="is damaged"):
        Run.open(path)


def test_an_error_says_what_to_do_about_damage(path: Path) -> None:
    change(path, "UPDATE blocks SET code = 9")
    with Run.open(path) as run, pytest.raises(RecordError, match=r"sqlite3 .*run\.gk \.recover"):
        run.rows("grad_norm")
