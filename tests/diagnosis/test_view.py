"""A record as detectors look at it."""

from __future__ import annotations

from gradkern.diagnosis.view import View
from gradkern.record import MemoryRecord


def test_a_view_ends_where_it_is_told_to() -> None:
    record = MemoryRecord()
    record.set_names("grad_norm", ["weight"])
    for step in range(5):
        record.put_scalars(step, {"loss": 1.0})
        record.put_rows("grad_norm", step, [1.0])
        record.put_event(step, "skip")
    view = View(record, until=2)
    assert view.steps.tolist() == [0, 1, 2]
    assert view.scalar("loss")[0].tolist() == [0, 1, 2]
    assert view.rows("grad_norm")[1].shape == (3, 1)
    assert [event["step"] for event in view.events] == [0, 1, 2]
    assert View(record).steps.tolist() == list(range(5))
