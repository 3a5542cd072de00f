from __future__ import annotations

import itertools
import logging
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradkern.record import RecordError, Run, Writer, file, retention, store, writer

NAMES = [f"layer{i}.weight" for i in range(10)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.gk"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a second otherwise takes little."""
    monkeypatch.setattr(writer, "BATCH_SECONDS", 0.01)
    monkeypatch.setattr(writer, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(writer, "LOCKED_SECONDS", 0.1)


def put(recorder: Writer, steps: Any, incidents: Any = ()) -> None:
    """The row of a step is the step."""
    recorder.set_names("grad_norm", NAMES)
    at = set(incidents)
    for step in steps:
        recorder.put_scalars(step, {"loss": step})
        recorder.put_rows("grad_norm", step, np.full(len(NAMES), step))
        if step in at:
            recorder.incident(step)
        if step % 1000 == 999:
            assert recorder.flush()


def row_steps(path: Path) -> list[int]:
    with Run.open(path) as run:
        steps, rows = run.rows("grad_norm")
        assert (rows == steps[:, None]).all()
        return steps.tolist()


# Reading along


def test_what_was_flushed_is_read_while_the_run_goes_on(path: Path) -> None:
    with Writer(path) as recorder:
        put(recorder, range(5))
        assert recorder.flush()
        with Run.open(path) as run:
            assert run.scalar("loss")[0].tolist() == list(range(5))
            put(recorder, range(5, 9))
            assert recorder.flush()
            assert run.scalar("loss")[0].tolist() == list(range(9))


def test_records_reach_the_file_unasked(path: Path, impatient: None) -> None:
    written = threading.Event()
    with Writer(path) as recorder:
        write = recorder._store.write
        recorder._store.write = lambda: (write(), written.set())  # type: ignore[method-assign, assignment]
        put(recorder, range(3))
        assert written.wait(30)


def test_a_closed_record_is_one_file(path: Path) -> None:
    with Writer(path) as recorder:
        put(recorder, range(5))
    assert [entry.name for entry in path.parent.iterdir()] == ["run.gk"]


def test_a_closed_record_can_be_read_where_nothing_can_be_written(path: Path) -> None:
    with Writer(path) as recorder:
        put(recorder, range(5))
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        assert row_steps(path) == list(range(5))
    finally:
        path.parent.chmod(0o755)


def test_small_batches_make_no_small_blocks(path: Path) -> None:
    with Writer(path) as recorder:
        for step in range(30):
            put(recorder, [step])
            assert recorder.flush()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM blocks").fetchone() == (2,)


def test_a_program_that_ends_without_closing_loses_nothing(path: Path) -> None:
    code = "import sys; from gradkern.record import Writer; Writer(sys.argv[1]).put_scalars(7, {'loss': 1})"
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=120)
    with Run.open(path) as run:
        assert run.steps.tolist() == [7]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="takes a fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_closing_in_a_forked_child_leaves_the_parents_record_alone(path: Path) -> None:
    with Writer(path) as recorder:
        put(recorder, range(3))
        child = os.fork()
        if child == 0:
            recorder.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        put(recorder, range(3, 6))
    assert row_steps(path) == list(range(6))


def test_closing_twice_does_nothing(path: Path) -> None:
    recorder = Writer(path)
    recorder.close()
    recorder.close()
    assert recorder.dropped == 0


def test_what_comes_after_closing_is_dropped_and_counted(path: Path) -> None:
    recorder = Writer(path)
    recorder.close()
    recorder.put_scalars(0, {"loss": 1})
    assert recorder.dropped == 1


# Retention


def test_rows_are_thinned_by_powers_of_two(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_ROWS", 200)
    with Writer(path) as recorder:
        put(recorder, range(5000))
    steps = row_steps(path)
    stride = steps[1]
    assert stride & (stride - 1) == 0
    assert steps == list(range(0, 5000, stride))
    assert len(steps) > 75


def test_there_are_never_more_than_max_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_ROWS", 400)
    with Writer(path) as recorder:
        for begin in range(0, 3000, 20):
            put(recorder, range(begin, begin + 20))
            assert recorder.flush()
            assert len(row_steps(path)) <= 400


def test_scalars_of_every_step_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_ROWS", 200)
    with Writer(path) as recorder:
        put(recorder, range(5000))
    with Run.open(path) as run:
        assert run.scalar("loss")[1].tolist() == list(range(5000))


def test_rows_around_an_incident_are_all_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_ROWS", 200)
    with Writer(path) as recorder:
        put(recorder, range(5000), incidents=[3000])
    kept = set(row_steps(path))
    assert kept.issuperset(range(3000 - 255, 3000 + 33))
    assert len(kept) < 200 + 288


def test_rows_around_the_first_8_and_the_latest_24_incidents_are_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MAX_ROWS", 200)
    incidents = list(range(300, 12_300, 300))
    with Writer(path) as recorder:
        put(recorder, range(12_400), incidents)
    kept = set(row_steps(path))
    full = [step for step in incidents if kept.issuperset(range(step - 255, step + 33))]
    assert full == incidents[:8] + incidents[-24:]
    with Run.open(path) as run:
        assert run.incidents == full


def test_an_incident_on_every_step_is_one_incident_in_33_steps(path: Path) -> None:
    with Writer(path) as recorder:
        put(recorder, range(990), incidents=range(990))
    with Run.open(path) as run:
        assert run.incidents == list(range(0, 990, 33))


def test_an_incident_that_is_noticed_late_is_kept_as_far_as_it_is_known(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MAX_ROWS", 200)
    with Writer(path) as recorder:
        put(recorder, range(3000), incidents=[2990])
        recorder.incident(2900)
        put(recorder, range(3000, 6000))
    assert set(row_steps(path)).issuperset([*range(2744, 2933), *range(2990, 3023)])
    with Run.open(path) as run:
        assert run.incidents == [2990, 2900]


def test_the_file_with_its_log_stays_below_max_bytes(path: Path) -> None:
    limit = 2 << 20
    names = [f"layer{i}.weight" for i in range(100)]
    log = path.with_name("run.gk-wal")
    random = np.random.default_rng(0).random((64, 100)).astype(np.float32)
    with Writer(path, max_bytes=limit) as recorder:
        for kind in ("grad_norm", "grad_abs_max"):
            recorder.set_names(kind, names)
        for step in range(6000):
            recorder.put_scalars(step, {"loss": step, "lr": 0.1})
            recorder.put_rows("grad_norm", step, random[step % 64])
            recorder.put_rows("grad_abs_max", step, random[step % 63])
            if step % 600 == 300:
                recorder.incident(step)
            if step % 50 == 0:
                assert recorder.flush()
                assert path.stat().st_size + (log.stat().st_size if log.exists() else 0) <= limit
        assert recorder.dropped == 0
    with Run.open(path) as run:
        assert len(run.scalar("loss")[0]) == 6000
        assert len(run.rows("grad_norm")[0]) > 500
        assert "thinned" in {event["kind"] for event in run.events}


@pytest.mark.slow
def test_a_million_steps_of_a_thousand_tensors_stay_below_a_gigabyte(path: Path) -> None:
    names = [f"layer{i}.weight" for i in range(1000)]
    log = path.with_name("run.gk-wal")
    random = np.random.default_rng(0).lognormal(size=(64, 1000)).astype(np.float32)
    zeros = np.zeros(1000, np.float32)
    with Writer(path) as recorder:
        for kind in ("grad_norm", "grad_abs_max", "grad_nan", "grad_inf"):
            recorder.set_names(kind, names)
        for step in range(1_000_000):
            recorder.put_scalars(
                step, {"loss": float(random[step % 64, step % 1000]), "lr": 0.1, "clip_coef": 1.0}
            )
            recorder.put_rows("grad_norm", step, random[step % 64])
            recorder.put_rows("grad_abs_max", step, random[step % 63])
            recorder.put_rows("grad_nan", step, zeros)
            recorder.put_rows("grad_inf", step, zeros)
            if step % 20_000 == 19_000:
                recorder.incident(step)
            if step % 500 == 0:
                assert recorder.flush(60)
                assert path.stat().st_size + (log.stat().st_size if log.exists() else 0) <= 1_000_000_000
        assert recorder.flush(60)
        assert recorder.dropped == 0
    with Run.open(path) as run:
        assert len(run.steps) == 1_000_000
        steps, rows = run.rows("grad_norm")
        assert len(run.incidents) == 32
        assert 30_000 < len(steps) < 60_000 + 32 * 288
        np.testing.assert_array_equal(rows[::100], random[steps[::100] % 64])


# Going on


def test_a_record_goes_on_where_it_ended(path: Path) -> None:
    for begin in (0, 10, 20):
        with Writer(path) as recorder:
            put(recorder, range(begin, begin + 10))
    assert row_steps(path) == list(range(30))


def test_going_on_is_an_event(path: Path) -> None:
    for begin in (0, 10):
        with Writer(path) as recorder:
            put(recorder, range(begin, begin + 10))
    with Run.open(path) as run:
        assert run.events == [{"step": 10, "kind": "resumed", "detail": {"from": 10}}]


@pytest.mark.parametrize("begin", [0, 1, 57, 99])
def test_steps_that_come_again_replace_what_is_in_the_file(path: Path, begin: int) -> None:
    with Writer(path) as recorder:
        put(recorder, range(100))
    with Writer(path) as recorder:
        recorder.set_names("grad_norm", NAMES)
        recorder.put_rows("grad_norm", begin, np.full(len(NAMES), -1))
    with Run.open(path) as run:
        steps, rows = run.rows("grad_norm")
        assert steps.tolist() == list(range(begin + 1))
        assert rows[:, 0].tolist() == [*range(begin), -1]
        assert run.scalar("loss")[0].tolist() == list(range(begin))
        assert run.events[-1]["detail"] == {"from": begin, "until": 99}


def test_an_event_put_before_the_first_step_of_the_new_part_stays(path: Path) -> None:
    with Writer(path) as recorder:
        put(recorder, range(10))
    with Writer(path) as recorder:
        recorder.put_event(5, "skip")
        put(recorder, range(5, 10))
    with Run.open(path) as run:
        assert [event["kind"] for event in run.events] == ["resumed", "skip"]


def test_incidents_from_the_replaced_part_are_forgotten(path: Path) -> None:
    with Writer(path) as recorder:
        put(recorder, range(1000), incidents=[300, 700])
    with Writer(path) as recorder:
        put(recorder, [500])
    with Run.open(path) as run:
        assert run.incidents == [300]


def test_going_on_keeps_the_stride(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_ROWS", 200)
    with Writer(path) as recorder:
        put(recorder, range(1000))
    with sqlite3.connect(path) as connection:
        (stride,) = connection.execute("SELECT stride FROM series WHERE kind = 'grad_norm'").fetchone()
    connection.close()
    assert stride > 1
    with Writer(path) as recorder:
        put(recorder, range(1000, 1100))
    assert row_steps(path) == list(range(0, 1100, stride))


def test_thinning_that_was_interrupted_is_taken_up_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_ROWS", 3000)
    with Writer(path) as recorder:
        put(recorder, range(2000))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE series SET stride = 8 WHERE kind = 'grad_norm'")
    connection.close()
    with Writer(path) as recorder:
        put(recorder, range(2000, 2008))
        assert recorder.flush()
    assert row_steps(path) == list(range(0, 2008, 8))


def test_other_names_for_a_record_from_its_start_leave_no_columns_of_the_old(path: Path) -> None:
    with Writer(path) as recorder:
        put(recorder, range(10))
    with Writer(path) as recorder:
        recorder.set_names("grad_norm", ["other"])
        recorder.put_rows("grad_norm", 0, [1])
    with Run.open(path) as run:
        assert run.names("grad_norm") == ["other"]


SHAPES = {"weight": [3, 2], "bias": [3]}
META = {"parameters": [{"name": name, "shape": shape} for name, shape in SHAPES.items()]}


def test_a_new_record_begins_at_0(path: Path) -> None:
    with Writer(path) as recorder:
        assert recorder.go_on(SHAPES) == 0


def begin(path: Path, steps: int) -> None:
    with Writer(path) as recorder:
        recorder.set_meta(META)
        put(recorder, range(steps))


def test_a_run_goes_on_behind_the_last_step(path: Path) -> None:
    begin(path, 10)
    with Writer(path) as recorder:
        assert recorder.go_on(SHAPES) == 10


def test_a_run_goes_on_at_the_step_it_says(path: Path) -> None:
    begin(path, 10)
    with Writer(path) as recorder:
        assert recorder.go_on(SHAPES, 6) == 6


def test_a_record_of_very_many_steps_is_not_read_to_go_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(path, 10)
    monkeypatch.setattr(store.blocks, "decode", None)
    with Writer(path) as recorder:
        assert recorder.go_on(SHAPES) == 10


@pytest.mark.parametrize("shapes", [{"0.weight": [3, 2], "0.bias": [3]}, {"weight": [9, 2], "bias": [9]}])
def test_another_model_is_refused(path: Path, shapes: dict[str, list[int]]) -> None:
    begin(path, 10)
    recorder = Writer(path)
    with pytest.raises(
        RecordError,
        match=r"the record of another model, up to step 9: 2 of its 2 parameters are not in this one or have "
        r"other shapes, 'weight' \[3, 2\] for one. Give this run a path of its own",
    ):
        recorder.go_on(shapes)
    assert not recorder._thread.is_alive()
    assert row_steps(path) == list(range(10))


def test_a_model_that_has_grown_is_not_another_one(path: Path) -> None:
    begin(path, 10)
    with Writer(path) as recorder:
        assert recorder.go_on({**SHAPES, "head": [7]}) == 10


def test_another_model_may_replace_the_whole_record(path: Path) -> None:
    begin(path, 10)
    with Writer(path) as recorder:
        assert recorder.go_on({"other": [1]}, 0) == 0


def test_a_file_system_that_never_answers_is_an_error(
    path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    opened = store.Store.open
    monkeypatch.setattr(store.Store, "open", lambda self: (answers.wait(), opened(self)))
    recorder = Writer(path)
    with pytest.raises(TimeoutError, match=r"run\.gk has not answered for 0 seconds"):
        recorder.go_on(SHAPES)
    answers.set()
    recorder._thread.join()


def test_a_file_that_is_locked_when_it_is_opened_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(path, 10)
    opened, tries = store.Store.open, itertools.count()

    def locked_once(self: store.Store) -> None:
        if not next(tries):
            raise sqlite3.OperationalError("database is locked")
        opened(self)

    monkeypatch.setattr(store.Store, "open", locked_once)
    with Writer(path) as recorder:
        assert recorder.go_on(SHAPES) == 10


def test_a_file_that_stays_locked_is_refused_and_not_taken_for_a_new_one(
    path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(path, 10)

    def locked(self: store.Store) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(store.Store, "open", locked)
    with pytest.raises(OSError, match=r"run\.gk cannot be opened: database is locked"):
        Writer(path).go_on(SHAPES)
    assert row_steps(path) == list(range(10))


# Two processes

JOURNALS = pytest.mark.parametrize("system", ["ext4", "nfs4"])


@JOURNALS
def test_while_a_process_writes_another_is_refused(
    path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "file_system", lambda path: system)
    with Writer(path) as recorder:
        put(recorder, range(5))
        code = "import sys; from gradkern.record import Writer; Writer(sys.argv[1])"
        second = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120
        )
        assert f"run.gk is being written by process {os.getpid()} on " in second.stderr
        assert "Give this run a path of its own" in second.stderr
        put(recorder, range(5, 10))
    assert recorder.dropped == 0
    assert row_steps(path) == list(range(10))


def test_a_second_writer_of_this_process_is_refused(path: Path) -> None:
    with Writer(path) as recorder:
        with pytest.raises(RecordError, match=rf"is being written by process {os.getpid()} \(this one\) on"):
            Writer(path)
        put(recorder, range(5))
    assert row_steps(path) == list(range(5))


@JOURNALS
def test_a_process_that_was_killed_holds_nothing(
    path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, sys; from gradkern.record import Writer; writer = Writer(sys.argv[1]);"
        "writer.put_scalars(0, {'loss': 0}); writer.flush(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, path], timeout=120)
    monkeypatch.setattr(file, "file_system", lambda path: system)
    with Writer(path) as recorder:
        recorder.put_scalars(1, {"loss": 1})
    with Run.open(path) as run:
        assert run.scalar("loss")[0].tolist() == [0, 1]


def test_a_writer_that_failed_to_open_holds_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: store.Store) -> None:
        raise OSError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "_load", broken)
        with pytest.raises(OSError, match="broken"):
            Writer(path)
    with Writer(path) as recorder:
        put(recorder, range(5))
    assert row_steps(path) == list(range(5))


def test_a_writer_whose_file_another_machine_takes_over_stops_and_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store.Owner, "is_alive", False)
    with Writer(path) as first, Writer(path) as second:
        put(second, range(8))
        assert second.flush()
        put(first, range(20))
        assert not first.flush()
        assert first.dropped > 0
    assert "has been taken over by process" in caplog.text
    assert caplog.text.count("Give each run a path of its own.\n") == 1
    assert row_steps(path) == list(range(8))


READ = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT 1 FROM series'); c.close()"


def test_a_reader_that_leaves_does_not_take_the_log_with_it(path: Path) -> None:
    with Writer(path) as recorder:
        put(recorder, range(5))
        assert recorder.flush()
        if recorder._store.journal != "wal":
            pytest.skip("no write-ahead log on this file system")
        Run.open(path).close()
        log = file.number_of_log(path)
        subprocess.run([sys.executable, "-c", READ, path], check=True, timeout=120)
        assert file.number_of_log(path) == log


def test_a_writer_whose_log_was_removed_loses_nothing(path: Path) -> None:
    with Writer(path) as recorder:
        put(recorder, range(5))
        assert recorder.flush()
        if recorder._store.journal != "wal":
            pytest.skip("no write-ahead log on this file system")
        for begin in (5, 10):
            path.read_bytes()  # its closing drops the locks of this process
            log = file.number_of_log(path)
            subprocess.run([sys.executable, "-c", READ, path], check=True, timeout=120)
            assert file.number_of_log(path) != log
            put(recorder, range(begin, begin + 5))
            assert recorder.flush()
            assert row_steps(path) == list(range(begin + 5))
    assert row_steps(path) == list(range(15))


# Trouble


def limit_pages(recorder: Writer, pages: int) -> None:
    """A disk that is full: SQLite's own answer to it, from its own limit."""
    assert recorder._opened.wait(30)
    connection = recorder._store._connection
    assert connection is not None
    connection.execute(f"PRAGMA max_page_count = {pages}")


def fill_the_disk(recorder: Writer) -> int:
    """Put steps until one is dropped. Returns the step."""
    recorder.set_names("grad_norm", NAMES)
    limit_pages(recorder, 1)
    for step in itertools.count():
        recorder.put_rows("grad_norm", step, np.full(len(NAMES), step))
        recorder.flush(0.01)
        if recorder.dropped:
            return step
    raise AssertionError


def test_a_full_disk_drops_records_and_counts_them(path: Path, impatient: None) -> None:
    with Writer(path) as recorder:
        fill_the_disk(recorder)


def test_the_record_goes_on_when_the_disk_has_room_again(path: Path, impatient: None) -> None:
    with Writer(path) as recorder:
        step = fill_the_disk(recorder)
        limit_pages(recorder, 1 << 20)
        put(recorder, range(step + 1, step + 11))
        assert recorder.flush()
    assert row_steps(path)[-10:] == list(range(step + 1, step + 11))


def test_what_was_dropped_is_an_event_with_its_count(path: Path, impatient: None) -> None:
    with Writer(path) as recorder:
        fill_the_disk(recorder)
        limit_pages(recorder, 1 << 20)
        assert recorder.flush()
        put(recorder, [10_000])
        assert recorder.flush()
        dropped = recorder.dropped
    with Run.open(path) as run:
        details = [event["detail"] for event in run.events if event["kind"] == "dropped"]
    assert sum(detail["count"] for detail in details) == dropped
    assert "full" in details[0]["reason"]


def test_the_loss_of_records_is_logged_once(
    path: Path, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gradkern"), Writer(path) as recorder:
        step = fill_the_disk(recorder)
        before = recorder.dropped
        while recorder.dropped == before:
            step += 1
            recorder.put_rows("grad_norm", step, np.full(len(NAMES), step))
            recorder.flush(0.01)
    assert len([record for record in caplog.records if record.name == "gradkern"]) == 1


class Hanging:
    """A file system that answers no more, until it does."""

    def __init__(self, recorder: Writer) -> None:
        self.answers = threading.Event()
        self.hangs = threading.Event()
        self._write = recorder._store.write
        recorder._store.write = self  # type: ignore[method-assign, assignment]

    def __call__(self) -> None:
        self.hangs.set()
        self.answers.wait()
        self._write()


def test_a_hanging_file_system_drops_records_and_blocks_nobody(path: Path, impatient: None) -> None:
    with Writer(path) as recorder:
        hanging = Hanging(recorder)
        put(recorder, [0])
        assert hanging.hangs.wait(30)
        step = 1
        while not recorder.dropped:
            recorder.put_rows("grad_norm", step, np.zeros(len(NAMES)))
            step += 1
        assert not hanging.answers.is_set()
        hanging.answers.set()


def test_names_are_not_dropped_while_the_file_system_hangs(path: Path, impatient: None) -> None:
    with Writer(path) as recorder:
        hanging = Hanging(recorder)
        recorder.put_scalars(0, {"loss": 1})
        assert hanging.hangs.wait(30)
        while not recorder.dropped:
            recorder.put_scalars(0, {"loss": 1})
        recorder.set_names("grad_norm", NAMES)
        hanging.answers.set()
        assert recorder.flush()
        put(recorder, [1])
    assert row_steps(path) == [1]


def test_closing_does_not_wait_for_a_hanging_file_system(path: Path, impatient: None) -> None:
    recorder = Writer(path)
    hanging = Hanging(recorder)
    put(recorder, range(3))
    assert hanging.hangs.wait(30)
    recorder.close(timeout=0.1)
    assert not hanging.answers.is_set()
    assert recorder.dropped > 0
    hanging.answers.set()
    recorder._thread.join()


def test_a_file_system_that_hangs_from_the_start_is_not_waited_for(
    path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    opened = store.Store.open
    monkeypatch.setattr(store.Store, "open", lambda self: (answers.wait(), opened(self)))
    recorder = Writer(path)
    put(recorder, range(3))
    answers.set()
    assert recorder.flush()
    recorder.close()
    assert row_steps(path) == [0, 1, 2]


def test_a_lasting_reader_does_not_let_the_log_grow(path: Path, impatient: None) -> None:
    log = path.with_name("run.gk-wal")
    with Writer(path, max_bytes=1 << 20) as recorder:
        assert recorder._opened.wait(30)
        if recorder._store.journal != "wal":
            pytest.skip("no write-ahead log on this file system")
        put(recorder, range(10))
        assert recorder.flush()
        reader = sqlite3.connect(path)
        cursor = reader.execute("SELECT * FROM blocks")
        cursor.fetchone()
        step = 10
        while not recorder.dropped:
            put(recorder, [step])
            recorder.flush(0.05)
            step += 1
            assert log.stat().st_size < 1 << 19
        cursor.close()
        reader.close()


def test_a_slow_reader_costs_no_records(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BATCH_SECONDS", 0.01)
    monkeypatch.setattr(writer, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(writer, "LOCKED_SECONDS", 60.0)
    monkeypatch.setattr(file, "LOCK_SECONDS", 0.01)
    monkeypatch.setattr(file, "file_system", lambda path: "nfs4")
    failed = threading.Event()
    with Writer(path) as recorder:
        put(recorder, range(100))
        assert recorder.flush()
        write = recorder._store.write

        def watched() -> None:
            try:
                write()
            except sqlite3.OperationalError:
                failed.set()
                raise

        recorder._store.write = watched  # type: ignore[method-assign]
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM blocks").fetchone()
        monkeypatch.setattr(writer, "PATIENCE_SECONDS", 60.0)  # of the queue: only the file is slow
        put(recorder, range(100, 200))
        assert failed.wait(30)
        reader.execute("COMMIT")
        reader.close()
        assert recorder.flush(30)
        assert recorder.dropped == 0
    assert row_steps(path) == list(range(200))


def test_a_file_that_is_full_is_thinned_until_it_is_not(path: Path, impatient: None) -> None:
    names = [f"layer{i}.weight" for i in range(100)]
    with Writer(path, max_bytes=2 << 20) as recorder:
        recorder.set_names("grad_norm", names)
        for step in range(2000):
            recorder.put_rows("grad_norm", step, np.random.default_rng(step).random(100))
        assert recorder.flush()
        # As if the file had come from a writer that was allowed more: nothing fits, and it is too large.
        recorder._store.max_bytes = 1 << 20
        connection = recorder._store._connection
        assert connection is not None
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        limit_pages(recorder, pages)
        step = 2000
        while recorder._store._series["grad_norm"].stride == 1:
            recorder.put_rows("grad_norm", step, np.random.default_rng(step).random(100))
            recorder.flush(0.01)
            step += 1
        before = recorder.dropped
        recorder.put_rows("grad_norm", 10_000, np.zeros(100))
        assert recorder.flush()
        assert recorder.dropped == before
    with Run.open(path) as run:
        assert run.rows("grad_norm")[0][-1] == 10_000


# Refusals


def test_a_foreign_database_is_not_written_to(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (value)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(RecordError, match=r"Writer: .* not a record of gradkern"):
        Writer(path)
    assert path.read_bytes() == before


def test_a_file_of_another_kind_is_not_written_to(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(RecordError, match=r"Writer: .* is not an SQLite file"):
        Writer(path)
    assert path.read_text() == "precious"


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"Writer: .* is a directory"):
        Writer(tmp_path)


def test_directories_are_made(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "today" / "run.gk"
    with Writer(path) as recorder:
        put(recorder, [0])
    assert row_steps(path) == [0]


def test_a_limit_too_small_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"Writer: max_bytes must be at least 1048576, got 1000\."):
        Writer(path, max_bytes=1000)


# Journals


def test_a_network_file_system_gets_a_rollback_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "file_system", lambda path: "nfs4")
    with Writer(path) as recorder:
        put(recorder, range(5))
        assert recorder.flush()
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        connection.close()
        assert row_steps(path) == list(range(5))
        put(recorder, range(5, 10))
    assert row_steps(path) == list(range(10))
