"""A run in memory, its recent past in full, for detectors that look at it while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradkern.record import retention
from gradkern.record.schema import (
    EXPONENT_COLUMNS,
    EXPONENTS,
    Exponents,
    Rows,
    Steps,
    Values,
    as_histograms,
    as_row,
    as_table,
    check_kind,
    check_names,
    check_scalar,
    copied,
    join,
    resumed,
    union,
)

# A kind with very many columns keeps at least this many rows, however large they are.
LEAST_ROWS: Final = 8

# So many values of a series, from its start on, are never thinned: how a run began is asked at any time.
FIRST: Final = 512

# Of more events than these, the first quarter and the latest stay.
MAX_EVENTS: Final = 4096


class _Series:
    """A series of up to `limit` values: the first ones, the latest half, and some of those between.

    When the buffer is full, the middle is thinned and the rest moves to a new one. Nothing is written twice
    in a buffer: views handed out stay as they are.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, limit: int) -> None:
        self._limit, self._first = limit, min(FIRST, limit // 8)
        self._end, self._stride = 0, 1
        self._steps: Steps = np.empty(0, np.int64)
        self._values: npt.NDArray[Any] = np.empty((0, *shape), dtype)

    def append(self, step: int, value: npt.NDArray[Any] | float) -> None:
        if self._end == len(self._steps):
            self._grow()
        self._steps[self._end] = step
        self._values[self._end] = value
        self._end += 1

    def extend(self, steps: Steps, values: npt.NDArray[Any]) -> None:
        """Append values of growing steps, all after `last`."""
        begin = 0
        while begin < len(steps):
            if self._end == len(self._steps):
                self._grow()
            count = min(len(steps) - begin, len(self._steps) - self._end)
            self._steps[self._end : self._end + count] = steps[begin : begin + count]
            self._values[self._end : self._end + count] = values[begin : begin + count]
            self._end += count
            begin += count

    def _grow(self) -> None:
        """Give room for a value more."""
        if self._end < self._limit:
            # Little by little, so that a short run takes little memory.
            self._move(slice(self._end), min(max(2 * self._end, 16), self._limit))
            return
        middle = slice(self._first, self._end - self._limit // 2)
        steps = self._steps[middle]
        stays = np.zeros(len(steps), bool)
        if len(steps) > 1:
            stays, _ = retention.thinned(steps, self._stride, -1)
            while stays.sum() > len(steps) // 2:
                self._stride *= 2
                stays, _ = retention.thinned(steps, self._stride, -1)
        kept = np.ones(self._end, bool)
        kept[middle] = stays
        self._move(kept, self._limit)

    def cut(self, step: int) -> None:
        """Forget `step` and what comes after it."""
        end = int(np.searchsorted(self._steps[: self._end], step))
        if end < self._end:
            self._move(slice(end), len(self._steps))

    def _move(self, kept: slice | npt.NDArray[np.bool_], capacity: int) -> None:
        old_steps, old_values = self._steps[: self._end][kept], self._values[: self._end][kept]
        self._end = len(old_steps)
        self._steps = np.empty(capacity, np.int64)
        self._values = np.empty((capacity, *old_values.shape[1:]), old_values.dtype)
        self._steps[: self._end], self._values[: self._end] = old_steps, old_values

    @property
    def last(self) -> int:
        """The latest step, -1 if there is none."""
        return int(self._steps[self._end - 1]) if self._end else -1

    def get(self) -> tuple[Steps, npt.NDArray[Any]]:
        steps, values = self._steps[: self._end], self._values[: self._end]
        steps.flags.writeable = values.flags.writeable = False
        return steps, values


class MemoryRecord:
    """A `Record` and `Recorder` that keeps up to `max_steps` of each scalar, and `max_rows` of each kind.

    Of more, it keeps the start (512, at most an eighth), the latest half, and of what lies between one in as
    many steps as it takes.

    Arrays it gives are read-only views that later records do not change. It is not to be read while another
    thread writes.

    Args:
        max_steps: values kept of each scalar, 16 bytes each.
        max_rows: rows kept of each kind, and histograms.
        max_bytes: memory that the rows of one kind may take: `max_rows` goes down for it, not below 8.

    Raises:
        ValueError: a limit is not positive.

    >>> from gradkern.record import MemoryRecord
    >>> record = MemoryRecord()
    >>> record.set_names("grad_norm", ["weight", "bias"])
    >>> for step in range(3):
    ...     record.put_scalars(step, {"loss": 1.0 / (step + 1)})
    ...     record.put_rows("grad_norm", step, [step, 2.0 * step])
    >>> record.scalar("loss")[1]
    array([1.        , 0.5       , 0.33333333])
    >>> record.rows("grad_norm")[1][-1]
    array([2., 4.], dtype=float32)
    """

    def __init__(self, *, max_steps: int = 65536, max_rows: int = 2048, max_bytes: int = 4 << 20) -> None:
        for name, limit in (("max_steps", max_steps), ("max_rows", max_rows), ("max_bytes", max_bytes)):
            if limit < 1:
                raise ValueError(f"MemoryRecord: {name} must be positive, got {limit}.")
        self._max_steps, self._max_rows, self._max_bytes = max_steps, max_rows, max_bytes
        self._scalars: dict[str, _Series] = {}
        self._rows: dict[str, _Series] = {}
        self._names: dict[str, list[str]] = {}
        self._written: dict[str, int] = {}  # the leading columns of a kind that new rows have
        self._meta: dict[str, Any] = {}
        self._events: list[dict[str, Any]] = []

    def put_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Recorder.put_scalars`."""
        for name, value in values.items():
            if name not in self._scalars:
                self._scalars[name] = _Series((), np.float64, self._max_steps)
            self._append(self._scalars[name], step, float(value))

    def put_scalar_block(self, name: str, steps: Steps, values: Values) -> None:
        """`put_scalars` for many steps at once: `values` ``[k]`` of one scalar at growing `steps` ``[k]``."""
        if name not in self._scalars:
            self._scalars[name] = _Series((), np.float64, self._max_steps)
        series = self._scalars[name]
        if len(steps) and steps[0] > series.last:
            series.extend(steps, values)
        else:
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                self._append(series, step, value)

    def put_row_block(self, kind: str, steps: Steps, values: npt.NDArray[Any]) -> None:
        """`put_rows` for many steps at once: growing `steps` ``[k]``, `values` ``[k, n]``."""
        series = self._named("put_row_block", kind)
        is_plain = len(self._names[kind]) == values.shape[1] == self._written[kind]
        if is_plain and len(steps) and steps[0] > series.last:
            series.extend(steps, as_row(kind, values.ravel(), values.size).reshape(values.shape))
        else:
            for step, row in zip(steps.tolist(), values, strict=True):
                self.put_rows(kind, step, row)

    def put_rows(self, kind: str, step: int, values: npt.ArrayLike) -> None:
        """See `Recorder.put_rows`."""
        series = self._named("put_rows", kind)
        row = as_row(kind, values, self._written[kind])
        if len(row) < len(self._names[kind]):
            row = np.append(row, np.full(len(self._names[kind]) - len(row), np.nan, np.float32))
        self._append(series, step, row)

    def put_table(self, kinds: Sequence[str], step: int, values: npt.ArrayLike) -> None:
        """See `Recorder.put_table`."""
        for kind in kinds:
            self._named("put_table", kind)
        table = as_table(kinds, values, [self._written[kind] for kind in kinds])
        for kind, row in zip(kinds, table, strict=True):
            self.put_rows(kind, step, row)

    def put_exponents(self, step: int, values: npt.ArrayLike) -> None:
        """See `Recorder.put_exponents`."""
        series = self._named("put_exponents", EXPONENTS)
        histograms = as_histograms(values, self._written[EXPONENTS])
        missing = len(self._names[EXPONENTS]) - len(histograms)
        self._append(series, step, np.pad(histograms, [(0, missing), (0, 0)]))

    def put_event(self, step: int, kind: str, detail: Mapping[str, Any] | None = None) -> None:
        """See `Recorder.put_event`."""
        self._events.append({"step": int(step), "kind": kind, "detail": copied(detail or {})})
        if len(self._events) > MAX_EVENTS:
            del self._events[MAX_EVENTS // 4]

    def set_meta(self, meta: Mapping[str, Any]) -> None:
        """See `Recorder.set_meta`."""
        self._meta.update(copied(meta))

    def set_names(self, kind: str, names: Sequence[str]) -> None:
        """See `Recorder.set_names`."""
        new, old = check_names(kind, names), self._names.get(kind, [])
        columns = join(old, new)
        self._written[kind] = len(new)
        self._names[kind] = columns
        if columns == old and kind in self._rows:
            return
        before = self._rows.get(kind)
        inner = (EXPONENT_COLUMNS,) if kind == EXPONENTS else ()
        dtype = np.int32 if kind == EXPONENTS else np.float32
        row_bytes = 4 * max(len(columns), 1) * (EXPONENT_COLUMNS if inner else 1)
        limit = min(self._max_rows, max(self._max_bytes // row_bytes, LEAST_ROWS))
        after = _Series((len(columns), *inner), dtype, limit)
        if before is not None:
            where = [columns.index(name) for name in old]
            for step, value in zip(*before.get(), strict=True):
                row = np.full((len(columns), *inner), 0 if inner else np.nan, dtype)
                row[where] = value
                after.append(int(step), row)
        self._rows[kind] = after

    def _named(self, function: str, kind: str) -> _Series:
        if kind not in self._rows:
            raise ValueError(
                f"{function}: kind {kind!r} has no names. Call set_names({kind!r}, names) first."
            )
        return self._rows[kind]

    def _append(self, series: _Series, step: int, value: npt.NDArray[Any] | float) -> None:
        if step < series.last:
            self._go_back(step)
        elif step == series.last:
            series.cut(step)
        series.append(step, value)

    def _go_back(self, step: int) -> None:
        everything = [*self._scalars.values(), *self._rows.values()]
        until = max(series.last for series in everything)
        for series in everything:
            series.cut(step)
        self._events = [event for event in self._events if event["step"] < step]
        self.put_event(step, "resumed", resumed(step, until))

    @property
    def steps(self) -> Steps:
        """See `Record.steps`."""
        return union(series.get()[0] for series in self._scalars.values())

    def scalar(self, name: str) -> tuple[Steps, Values]:
        """See `Record.scalar`."""
        if name in self._scalars:
            return self._scalars[name].get()
        check_scalar(name, self.scalar_names())
        return np.empty(0, np.int64), np.empty(0)

    def scalar_names(self) -> list[str]:
        """See `Record.scalar_names`."""
        return list(self._scalars)

    def rows(self, kind: str) -> tuple[Steps, Rows]:
        """See `Record.rows`."""
        if kind in self._rows and kind != EXPONENTS:
            return self._rows[kind].get()
        check_kind(kind, self.kinds())
        return np.empty(0, np.int64), np.empty((0, 0), np.float32)

    def kinds(self) -> list[str]:
        """See `Record.kinds`."""
        return [kind for kind, series in self._rows.items() if kind != EXPONENTS and series.last >= 0]

    def names(self, kind: str) -> list[str]:
        """See `Record.names`."""
        return list(self._names.get(kind, []))

    def exponents(self) -> tuple[Steps, Exponents]:
        """See `Record.exponents`."""
        if EXPONENTS in self._rows:
            return self._rows[EXPONENTS].get()
        return np.empty(0, np.int64), np.empty((0, 0, EXPONENT_COLUMNS), np.int32)

    @property
    def meta(self) -> dict[str, Any]:
        """See `Record.meta`."""
        return copied(self._meta)

    @property
    def events(self) -> list[dict[str, Any]]:
        """See `Record.events`."""
        return [dict(event) for event in self._events]
