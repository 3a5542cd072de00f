"""What `Record` promises, of a record in memory and of one in a file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from gradkern.record import Record, Recorder
from tests.record.recording import File, Fill, Memory

Recorded = Callable[[Fill], AbstractContextManager[Record]]


@pytest.fixture(params=["memory", "file"])
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> Recorded:
    return Memory() if request.param == "memory" else File(tmp_path)


def test_scalars_come_back_to_the_bit(recorded: Recorded) -> None:
    values = [0.1, -0.0, 1e-310, 1e300, float("inf"), float("-inf"), float("nan")]

    def fill(recorder: Recorder) -> None:
        for step, value in enumerate(values):
            recorder.put_scalars(step, {"loss": value})

    with recorded(fill) as record:
        steps, got = record.scalar("loss")
        assert (steps.dtype, got.dtype) == (np.int64, np.float64)
        assert steps.tolist() == list(range(len(values)))
        assert got.tobytes() == np.array(values).tobytes()


def test_a_scalar_has_the_steps_it_was_put_at(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        for step in range(6):
            recorder.put_scalars(step, {"loss": step, "weight_norm": -step} if step % 2 else {"loss": step})

    with recorded(fill) as record:
        assert [array.tolist() for array in record.scalar("weight_norm")] == [[1, 3, 5], [-1, -3, -5]]


def test_a_scalar_may_come_after_later_steps(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        for step in range(4):
            recorder.put_scalars(step, {"loss": step})
        for step in range(4):
            recorder.put_scalars(step, {"update_norm": 10 * step})

    with recorded(fill) as record:
        assert record.scalar("update_norm")[1].tolist() == [0, 10, 20, 30]
        assert record.scalar("loss")[1].tolist() == [0, 1, 2, 3]
        assert record.events == []


def test_steps_are_those_of_any_scalar(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.put_scalars(3, {"loss": 1})
        recorder.put_scalars(5, {"lr": 1})
        recorder.put_scalars(9, {"loss": 1})

    with recorded(fill) as record:
        assert record.steps.tolist() == [3, 5, 9]


def test_of_two_values_at_a_step_the_later_wins(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.set_names("grad_norm", ["a"])
        for value in (1, 2):
            recorder.put_scalars(0, {"loss": value})
            recorder.put_rows("grad_norm", 0, [value])

    with recorded(fill) as record:
        assert record.scalar("loss")[1].tolist() == [2]
        assert record.rows("grad_norm")[1].tolist() == [[2]]


def test_rows_come_back_to_the_bit(recorded: Recorded) -> None:
    rows = np.array([[0, -0.0, 1e-45], [np.inf, np.nan, 3e38], [1, 2, 3]], np.float32)

    def fill(recorder: Recorder) -> None:
        recorder.set_names("grad_norm", ["a", "b", "c"])
        for step, row in enumerate(rows):
            recorder.put_rows("grad_norm", 10 * step, row)

    with recorded(fill) as record:
        steps, got = record.rows("grad_norm")
        assert (steps.dtype, got.dtype) == (np.int64, np.float32)
        assert steps.tolist() == [0, 10, 20]
        assert got.tobytes() == rows.tobytes()


def test_a_table_is_a_row_of_each_of_its_kinds(recorded: Recorded) -> None:
    kinds = ["grad_norm", "grad_inf"]

    def fill(recorder: Recorder) -> None:
        for kind in kinds:
            recorder.set_names(kind, ["a", "b", "c"])
        for step in range(3):
            recorder.put_table(kinds, step, np.array([[step, 2, 1e300], [0, 0, step]]))

    with recorded(fill) as record:
        largest = float(np.finfo(np.float32).max)
        assert record.rows("grad_norm")[1].tolist() == [[step, 2, largest] for step in range(3)]
        assert record.rows("grad_inf")[1].tolist() == [[0, 0, step] for step in range(3)]


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (3,)])
def test_a_table_of_another_shape_is_refused(recorded: Recorded, shape: tuple[int, ...]) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.set_names("grad_norm", ["a", "b", "c"])
        recorder.set_names("grad_inf", ["a", "b", "c"])
        with pytest.raises(ValueError, match=r"put_table: kinds .* got values of shape"):
            recorder.put_table(["grad_norm", "grad_inf"], 0, np.zeros(shape))

    with recorded(fill) as record:
        assert len(record.rows("grad_norm")[0]) == 0


def test_rows_that_are_nearly_all_zero_come_back(recorded: Recorded) -> None:
    rows = np.zeros((40, 50), np.float32)
    rows[17, 3] = 5
    rows[39, 49] = np.nan

    def fill(recorder: Recorder) -> None:
        recorder.set_names("grad_nan", [str(i) for i in range(50)])
        for step, row in enumerate(rows):
            recorder.put_rows("grad_nan", step, row)

    with recorded(fill) as record:
        np.testing.assert_array_equal(record.rows("grad_nan")[1], rows)


def test_kinds_have_steps_of_their_own(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.set_names("grad_norm", ["a"])
        recorder.set_names("weight_norm", ["a"])
        for step in range(20):
            recorder.put_rows("grad_norm", step, [step])
            if step % 7 == 3:
                recorder.put_rows("weight_norm", step, [step])

    with recorded(fill) as record:
        assert record.rows("weight_norm")[0].tolist() == [3, 10, 17]
        assert record.rows("grad_norm")[0].tolist() == list(range(20))


def test_names_come_back_in_order(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.set_names("grad_norm", ["b", "ä", "a.0"])
        recorder.put_rows("grad_norm", 0, [1, 2, 3])

    with recorded(fill) as record:
        assert record.names("grad_norm") == ["b", "ä", "a.0"]


def test_other_names_leave_the_old_columns_behind_the_new(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.set_names("grad_norm", ["a", "b"])
        recorder.put_rows("grad_norm", 0, [1, 2])
        recorder.set_names("grad_norm", ["b", "c"])
        recorder.put_rows("grad_norm", 1, [3, 4])

    with recorded(fill) as record:
        assert record.names("grad_norm") == ["b", "c", "a"]
        np.testing.assert_array_equal(record.rows("grad_norm")[1], [[2, np.nan, 1], [3, 4, np.nan]])


def test_exponents_come_back(recorded: Recorded) -> None:
    histograms = np.random.default_rng(0).integers(0, 2**31, (3, 2, 64)).astype(np.int32)

    def fill(recorder: Recorder) -> None:
        recorder.set_names("exponents", ["a", "b"])
        for step, histogram in enumerate(histograms):
            recorder.put_exponents(step, histogram)

    with recorded(fill) as record:
        steps, got = record.exponents()
        assert steps.tolist() == [0, 1, 2]
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, histograms)


def test_exponents_of_other_names_are_zero_where_they_were_not_counted(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.set_names("exponents", ["a"])
        recorder.put_exponents(0, np.ones((1, 64)))
        recorder.set_names("exponents", ["b"])
        recorder.put_exponents(1, 2 * np.ones((1, 64)))

    with recorded(fill) as record:
        assert record.exponents()[1][:, :, 0].tolist() == [[0, 1], [2, 0]]


def test_what_was_never_recorded_is_empty(recorded: Recorded) -> None:
    with recorded(lambda recorder: recorder.put_scalars(0, {"loss": 1})) as record:
        assert [len(array) for array in record.scalar("lr")] == [0, 0]
        assert [len(array) for array in record.rows("grad_norm")] == [0, 0]
        assert record.exponents()[1].shape == (0, 0, 64)
        assert record.names("grad_norm") == []


def test_a_name_that_nothing_has_is_refused_with_those_there_are(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.put_scalars(0, {"loss": 1, "mine": 2})
        recorder.set_names("grad_norm", ["a"])
        recorder.put_rows("grad_norm", 0, [1])

    with recorded(fill) as record:
        with pytest.raises(ValueError, match=r"no scalar 'learning_rate'\. Recorded are: loss, mine\."):
            record.scalar("learning_rate")
        with pytest.raises(ValueError, match=r"no rows of kind 'gradnorm'\. Recorded are: grad_norm\."):
            record.rows("gradnorm")


def test_names_and_kinds_of_what_was_recorded_are_listed(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.put_scalars(0, {"loss": 1, "mine": 2})
        recorder.set_names("exponents", ["a"])
        recorder.set_names("grad_norm", ["a"])
        recorder.set_names("weight_norm", ["a"])
        recorder.put_exponents(0, np.zeros((1, 64)))
        recorder.put_rows("grad_norm", 0, [1])

    with recorded(fill) as record:
        assert (record.scalar_names(), record.kinds()) == (["loss", "mine"], ["grad_norm"])


def test_an_empty_record_is_empty(recorded: Recorded) -> None:
    with recorded(lambda recorder: None) as record:
        assert (record.steps.tolist(), record.meta, record.events) == ([], {}, [])


def test_a_model_without_parameters_has_rows_without_columns(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.set_names("exponents", [])
        recorder.put_exponents(0, np.zeros((0, 64)))

    with recorded(fill) as record:
        assert record.exponents()[1].shape == (1, 0, 64)


def test_meta_is_set_entry_by_entry(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.set_meta({"torch": "2.12", "amp": {"enabled": False}})
        recorder.set_meta({"torch": "2.13"})

    with recorded(fill) as record:
        assert record.meta == {"torch": "2.13", "amp": {"enabled": False}}


def test_events_keep_their_order_and_details(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.put_event(7, "first_nonfinite", {"where": "loss", "value": float("inf")})
        recorder.put_event(5, "skip")

    with recorded(fill) as record:
        assert record.events == [
            {"step": 7, "kind": "first_nonfinite", "detail": {"where": "loss", "value": np.inf}},
            {"step": 5, "kind": "skip", "detail": {}},
        ]


def go_back(recorder: Recorder) -> None:
    recorder.set_names("grad_norm", ["a"])
    for step in range(10):
        recorder.put_scalars(step, {"loss": step})
        recorder.put_rows("grad_norm", step, [step])
        recorder.put_event(step, "skip")
    for step in range(6, 8):
        recorder.put_scalars(step, {"loss": 10 * step})
        recorder.put_rows("grad_norm", step, [10 * step])


def test_going_back_replaces_what_was_recorded_from_that_step_on(recorded: Recorded) -> None:
    with recorded(go_back) as record:
        assert record.scalar("loss")[1].tolist() == [0, 1, 2, 3, 4, 5, 60, 70]
        assert record.rows("grad_norm")[1][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 60, 70]


def test_going_back_takes_later_events_out_and_says_so(recorded: Recorded) -> None:
    with recorded(go_back) as record:
        assert [event["step"] for event in record.events if event["kind"] == "skip"] == list(range(6))
        assert record.events[-1] == {"step": 6, "kind": "resumed", "detail": {"from": 6, "until": 9}}


def refuse(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match=r"put_rows: kind 'act_dead' has no names. Call set_names"):
        recorder.put_rows("act_dead", 0, [1])


def test_a_row_of_a_kind_without_names_is_refused(recorded: Recorded) -> None:
    with recorded(refuse) as record:
        assert len(record.rows("act_dead")[0]) == 0


def test_an_array_may_be_used_again(recorded: Recorded) -> None:
    def fill(recorder: Recorder) -> None:
        recorder.set_names("grad_norm", ["a"])
        row = np.zeros(1, np.float32)
        for step in range(3):
            row[0] = step
            recorder.put_rows("grad_norm", step, row)

    with recorded(fill) as record:
        assert record.rows("grad_norm")[1][:, 0].tolist() == [0, 1, 2]
