from __future__ import annotations

import numpy as np
import pytest

from gradkern.record import MemoryRecord


def steps_of(limit: int, count: int) -> list[int]:
    record = MemoryRecord(max_steps=limit)
    for step in range(count):
        record.put_scalars(step, {"loss": step})
    steps, values = record.scalar("loss")
    assert steps.tolist() == values.tolist()
    return steps.tolist()


@pytest.mark.parametrize("count", [64, 65, 1000, 100_000])
def test_no_more_than_max_steps_of_a_scalar_are_kept(count: int) -> None:
    assert len(steps_of(64, count)) <= 64


def test_up_to_max_steps_all_are_kept() -> None:
    assert steps_of(64, 64) == list(range(64))


@pytest.mark.parametrize("count", [65, 1000, 100_000])
def test_the_start_is_kept(count: int) -> None:
    assert steps_of(64, count)[:8] == list(range(8))


@pytest.mark.parametrize("count", [65, 1000, 100_000])
def test_the_latest_half_is_kept(count: int) -> None:
    assert steps_of(64, count)[-32:] == list(range(count - 32, count))


def test_between_them_one_in_so_many_steps_is_kept() -> None:
    steps = steps_of(512, 100_000)
    stride = steps[70] - steps[69]
    assert stride & (stride - 1) == 0
    assert set(range(stride, 99_000, stride)) <= set(steps)
    assert 99_000 // stride > 40


def test_the_first_512_of_many_are_kept() -> None:
    steps = steps_of(1 << 13, 20_000)
    assert steps[:512] == list(range(512))
    assert len(set(steps) & set(range(512, 1024))) < 512


def test_a_start_that_was_thinned_around_is_still_there_after_going_back() -> None:
    record = MemoryRecord(max_steps=64)
    for step in [*range(1000), *range(4, 40)]:
        record.put_scalars(step, {"loss": step})
    assert record.scalar("loss")[0].tolist() == list(range(40))


def test_rows_are_kept_like_scalars() -> None:
    record = MemoryRecord(max_rows=16)
    record.set_names("grad_norm", ["a"])
    for step in range(95):
        record.put_rows("grad_norm", step, [step])
    steps, rows = record.rows("grad_norm")
    assert steps.tolist() == rows[:, 0].tolist()
    assert len(steps) <= 16
    assert steps[:2].tolist() == [0, 1]
    assert steps[-8:].tolist() == list(range(87, 95))


def test_large_rows_are_kept_within_max_bytes() -> None:
    record = MemoryRecord(max_bytes=4000 * 20)
    record.set_names("grad_norm", [str(i) for i in range(1000)])
    for step in range(50):
        record.put_rows("grad_norm", step, np.zeros(1000))
    assert record.rows("grad_norm")[1].nbytes <= 4000 * 20
    assert record._rows["grad_norm"]._values.nbytes == 4000 * 20


def test_five_rows_are_kept_however_large_they_are() -> None:
    record = MemoryRecord(max_bytes=1)
    record.set_names("grad_norm", [str(i) for i in range(1000)])
    for step in range(50):
        record.put_rows("grad_norm", step, np.zeros(1000))
    steps = record.rows("grad_norm")[0].tolist()
    assert (steps[0], steps[-4:]) == (0, list(range(46, 50)))


def test_later_records_do_not_change_an_array_that_was_given() -> None:
    record = MemoryRecord(max_steps=16)
    for step in range(16):
        record.put_scalars(step, {"loss": step})
    steps, values = record.scalar("loss")
    for step in range(16, 100):
        record.put_scalars(step, {"loss": step})
    assert steps.tolist() == values.tolist() == list(range(16))


def test_going_back_does_not_change_an_array_that_was_given() -> None:
    record = MemoryRecord()
    for step in range(8):
        record.put_scalars(step, {"loss": step})
    _, values = record.scalar("loss")
    record.put_scalars(2, {"loss": 20})
    assert values.tolist() == list(range(8))


def test_arrays_cannot_be_written_to() -> None:
    record = MemoryRecord()
    record.put_scalars(0, {"loss": 1})
    with pytest.raises(ValueError, match="read-only"):
        record.scalar("loss")[1][0] = 2


def test_meta_that_was_given_can_be_changed_without_changing_the_record() -> None:
    record = MemoryRecord()
    record.set_meta({"clip": {"threshold": 1.0}})
    record.meta["clip"]["threshold"] = 2.0
    assert record.meta == {"clip": {"threshold": 1.0}}


def test_of_very_many_events_the_first_and_the_latest_are_kept() -> None:
    record = MemoryRecord()
    for step in range(10_000):
        record.put_event(step, "skip")
    steps = [event["step"] for event in record.events]
    assert steps == [*range(1024), *range(10_000 - 3072, 10_000)]


def test_a_limit_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MemoryRecord: max_rows must be positive, got 0\."):
        MemoryRecord(max_rows=0)


@pytest.mark.parametrize("limit", [5, 100])
def test_a_block_is_the_same_as_its_steps_one_by_one(limit: int) -> None:
    alone, at_once = (MemoryRecord(max_steps=limit, max_rows=limit) for _ in range(2))
    rng = np.random.default_rng(0)
    for record in (alone, at_once):
        record.set_names("grad_norm", ["a", "b"])
    step = 0
    for size in (1, 3, 0, 9, 40, 2):
        steps = np.arange(step, step + size)
        losses, rows = rng.normal(size=size), 1e40 * rng.normal(size=(size, 2))
        at_once.put_scalar_block("loss", steps, losses)
        at_once.put_row_block("grad_norm", steps, rows)
        for number, loss, row in zip(steps.tolist(), losses, rows, strict=True):
            alone.put_scalars(number, {"loss": loss})
            alone.put_rows("grad_norm", number, row)
        step += size
    # A step back takes what came after it out of both.
    at_once.put_scalar_block("loss", np.array([20, 21]), np.array([1.0, 2.0]))
    alone.put_scalars(20, {"loss": 1.0})
    alone.put_scalars(21, {"loss": 2.0})
    for one, other in (
        (alone.scalar("loss"), at_once.scalar("loss")),
        (alone.rows("grad_norm"), at_once.rows("grad_norm")),
    ):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])
    assert alone.events == at_once.events
