"""A record as its writing thread sees it: what has come but is not written, and the file."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradkern.record import blocks, file, retention
from gradkern.record.owner import Owner
from gradkern.record.schema import EXPONENT_COLUMNS, EXPONENTS, Steps, resumed

SCALARS: Final = "scalars"

# Blocks are written anew until they have this size, so that slow steps give no small ones.
TAIL_BYTES: Final = 32 << 10

# How much is read at once when rows are thinned; about half of it becomes one block.
MERGE_BYTES: Final = 512 << 10

# How much is thinned in one batch if more must be: enough to be done within a minute, little enough not to be
# felt. Always more than the batch brings.
THIN_BYTES: Final = 4 << 20

# Rows of a kind held in memory for an incident that may come take no more than this, nor than this share of
# the file, since an incident writes those of all kinds at once.
RING_BYTES: Final = 16 << 20
RING_SHARE: Final = 128

MAX_EVENTS: Final = 20_000

# Stands for "no value" among scalars, where NaN is a value: a NaN with a payload that no arithmetic makes.
MISSING_BITS: Final = 0x7FF8_6772_6164_6B00
MISSING: Final = np.array([MISSING_BITS], np.uint64).view(np.float64)


@dataclass
class _Layout:
    """Names of the columns of a series. `number` is its row in the file, None while it has none."""

    names: list[str]
    number: int | None = None


@dataclass
class _Chunk:
    """Rows that wait to be written as one block. `incident` is None for the thinned history."""

    layout: _Layout
    incident: int | None
    steps: list[int] = field(default_factory=list)
    rows: list[npt.NDArray[Any]] = field(default_factory=list)


@dataclass
class _Tail:
    """The latest block of a series, which grows."""

    number: int
    layout: _Layout
    steps: Steps
    values: npt.NDArray[Any]
    bytes: int


class _Series:
    """One series: how it is thinned, what waits to be written, and the latest steps at full resolution."""

    def __init__(self, kind: str, ring_limit: int) -> None:
        self.kind = kind
        self._ring_limit = ring_limit
        self.dtype = np.dtype({SCALARS: "f8", EXPONENTS: "i4"}.get(kind, "f4"))
        self.inner = (EXPONENT_COLUMNS,) if kind == EXPONENTS else ()
        self.layout = _Layout([])
        self.last = -1
        self.kept = -1  # the last step of the thinned history
        self.waiting: list[_Chunk] = []
        self.ring: deque[tuple[int, npt.NDArray[Any], _Layout]] = deque()
        self.ring_bytes = 0
        # Blocks up to this number are still to be thinned; None if none are.
        self.thin_until: int | None = None
        self.thin_bucket = -1
        self.forget()

    def forget(self) -> None:
        """Forget what the file knows better."""
        self.number: int | None = None
        self.stride = 1
        self.rows = 0
        self.bytes = 0
        self.tail: _Tail | None = None
        self.forget_layouts(set())

    def forget_layouts(self, left: set[int]) -> None:
        """Forget the numbers of layouts that are not `left` in the file."""
        for layout in (
            self.layout,
            *(chunk.layout for chunk in self.waiting),
            *(entry[2] for entry in self.ring),
        ):
            if layout.number not in left:
                layout.number = None

    def put(self, step: int, row: npt.NDArray[Any], incident: int | None) -> None:
        """Take a row in: to be written if it is the first of its bucket, or under an incident."""
        if self.keeps(step):
            self.wait(self.layout, None, step, row)
            self.kept = step
        if incident is not None:
            self.wait(self.layout, incident, step, row)
        self.ring.append((step, row, self.layout))
        self.ring_bytes += row.nbytes
        while self.ring[0][0] <= step - retention.FLIGHT_BEFORE or self.ring_bytes > self._ring_limit:
            self.ring_bytes -= self.ring.popleft()[1].nbytes
            if not self.ring:
                break
        self.last = step

    def keeps(self, step: int) -> bool:
        """Whether the thinned history keeps this step, the first of its bucket: see `retention.thinned`."""
        return self.kept < 0 or step == self.kept or step // self.stride != self.kept // self.stride

    def wait(self, layout: _Layout, incident: int | None, step: int, row: npt.NDArray[Any]) -> None:
        """Add a row to what waits to be written."""
        for chunk in reversed(self.waiting):
            if chunk.incident == incident:
                if chunk.layout is layout:
                    break
                chunk = _Chunk(layout, incident)
                self.waiting.append(chunk)
                break
        else:
            chunk = _Chunk(layout, incident)
            self.waiting.append(chunk)
        chunk.steps.append(step)
        chunk.rows.append(row)

    def cut(self, step: int) -> None:
        """Forget `step` and what came after it."""
        for chunk in self.waiting:
            pairs = [(s, row) for s, row in zip(chunk.steps, chunk.rows, strict=True) if s < step]
            chunk.steps, chunk.rows = [s for s, _ in pairs], [row for _, row in pairs]
        self.waiting = [chunk for chunk in self.waiting if chunk.steps]
        self.ring = deque(entry for entry in self.ring if entry[0] < step)
        self.ring_bytes = sum(row.nbytes for _, row, _ in self.ring)
        self.last = min(self.last, step - 1)
        if self.kept >= step:
            self.kept = -1


class Store:
    """Takes records in (`take_...`, in memory) and writes them in one transaction (`write`).

    For one thread. If `write` raises sqlite3.Error, nothing has been written, what waits goes on waiting, and
    the next `write` looks first at what is in the file. `discard` gives it up.

    Args:
        path: of the file, which may be there already: then it goes on.
        max_bytes: of the file and its journal.

    Attributes:
        last_step: the last one that was in the file when it was opened, -1 for none.
        parameters: shapes by name, of the model that the file is of; empty if it does not say.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.journal = ""
        self._connection: sqlite3.Connection | None = None
        self._known = False
        self._owner = Owner.new()
        self._claimed = False
        self._log: int | None = None  # the number of the file that is the write-ahead log
        self._series: dict[str, _Series] = {}
        self._scalars: dict[int, dict[str, float]] = {}
        self._last: dict[str, int] = {}  # of each scalar
        self._meta: dict[str, Any] = {}
        self._events: list[tuple[int, str, str]] = []
        self._cut: int | None = None
        self._until = -1  # `last_step`; -1 once it is settled what becomes of it
        self.last_step = -1
        self.parameters: dict[str, list[int]] = {}
        self._incidents: list[int] = []
        self._new_incidents: list[tuple[int, int]] = []
        self._incident_steps: deque[int] = deque(maxlen=retention.LATEST_INCIDENTS)
        self._next_incident = 1
        self._flight: tuple[int, int] | None = None  # the latest incident and its last step
        self.latest_step = 0
        # A log that is copied back only now and then takes room beside the file.
        self._journal_room = min(max_bytes // 6, 32 << 20)

    def open(self) -> None:
        """Open or create the file. RecordError if there is another there; sqlite3.Error, OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_dir():
            raise IsADirectoryError(f"Writer: {self.path} is a directory. Name a file, for instance in it.")
        if self.path.exists() and self.path.stat().st_size:
            file.open_for_reading(self.path, "Writer").close()
        self.journal = file.journal_for(self.path)
        self._connect()
        with file.damage(self.path, "Writer"):
            self._load()
            found = self._execute("SELECT value FROM meta WHERE key = 'parameters'").fetchone()
            for entry in json.loads(found[0]) if found else ():
                self.parameters[str(entry["name"])] = list(entry["shape"])
        self._until = self.last_step = max((s.last for s in self._series.values()), default=-1)

    def _connect(self) -> None:
        """Connect to the file and claim it."""
        connection = file.connect(self.path, write=True, locks=self.journal != "unlocked")
        try:
            connection.execute("PRAGMA cache_size = -4096")
            # Some builds of SQLite overwrite what is deleted, which would double what thinning writes.
            connection.execute("PRAGMA secure_delete = OFF")
            # Some builds move pages so as to give room back, which only the next rows would take again.
            connection.execute("PRAGMA auto_vacuum = NONE")
            file.set_journal(connection, self.journal)
            with _transaction(connection):
                if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in file.TABLES.split(";"):
                        connection.execute(statement)
                self._claim_file(connection)
            if self.journal == "wal":
                # So that a copy of the file without its log is a record, of whatever age.
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            (page,) = connection.execute("PRAGMA page_size").fetchone()
            connection.execute(f"PRAGMA max_page_count = {(self.max_bytes - self._journal_room) // page}")
            connection.execute(f"PRAGMA journal_size_limit = {self._journal_room // 2}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {min(1000, self._journal_room // 4 // page)}")
            self._page = page
        except BaseException:
            connection.close()
            raise
        self._connection, self._claimed = connection, True
        self._log = file.number_of_log(self.path)

    def close(self) -> None:
        """Close the file, and leave it without anything beside it if nobody reads it just now."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._execute("DELETE FROM meta WHERE key = '.writer' AND value = ?", self._owner.text)
                self._connection.execute("PRAGMA journal_mode = DELETE")
            self._connection.close()
            self._connection = None
        self._owner.release()

    # What comes in.

    def take_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a step."""
        for name, value in values.items():
            self._come(step, self._last.get(name, -1))
            self._last[name] = step
            self._scalars.setdefault(step, {})[name] = value

    def take_row(self, kind: str, step: int, row: npt.NDArray[Any]) -> None:
        """A row, or histograms, under the names that the kind has now."""
        series = self._of(kind)
        self._come(step, series.last)
        flying = self._flight is not None and step <= self._flight[1]
        series.put(step, row, self._flight[0] if flying and self._flight is not None else None)

    def take_names(self, kind: str, names: list[str]) -> None:
        """The names of the rows that follow."""
        series = self._of(kind)
        if names != series.layout.names:
            series.layout = _Layout(names)

    def take_meta(self, meta: Mapping[str, Any]) -> None:
        """Entries of meta."""
        self._meta.update(meta)

    def take_event(self, step: int, kind: str, detail: Mapping[str, Any]) -> None:
        """An event."""
        self._events.append((step, kind, json.dumps(detail)))

    def take_incident(self, step: int) -> None:
        """Keep what is known around `step`, unless it is part of an incident."""
        if any(at <= step <= at + retention.FLIGHT_AFTER for at in self._incident_steps):
            return
        self._incident_steps.append(step)
        number = self._next_incident
        self._next_incident += 1
        if self._flight is None or step + retention.FLIGHT_AFTER > self._flight[1]:
            self._flight = (number, step + retention.FLIGHT_AFTER)
        self._new_incidents.append((number, step))
        for series in self._series.values():
            for at, row, layout in series.ring:
                if step - retention.FLIGHT_BEFORE < at <= step + retention.FLIGHT_AFTER:
                    series.wait(layout, number, at, row)

    def _of(self, kind: str) -> _Series:
        if kind not in self._series:
            self._series[kind] = _Series(kind, min(RING_BYTES, self.max_bytes // RING_SHARE))
        return self._series[kind]

    def _come(self, step: int, last: int) -> None:
        """Look whether the run has gone back."""
        if self._until >= 0:
            until, self._until = self._until, -1
            events, self._events = self._events, []
            self._go_back(step, until)
            self._events += events
        elif step < last:
            self._go_back(step, max([*self._last.values(), *(s.last for s in self._series.values())]))
        self.latest_step = max(self.latest_step, step)

    def _go_back(self, step: int, until: int) -> None:
        for series in self._series.values():
            series.cut(step)
        self._scalars = {at: values for at, values in self._scalars.items() if at < step}
        self._last = {name: min(last, step - 1) for name, last in self._last.items()}
        self._events = [event for event in self._events if event[0] < step]
        gone = {number for number, at in self._new_incidents if at >= step}
        self._new_incidents = [(number, at) for number, at in self._new_incidents if number not in gone]
        for series in self._series.values():
            series.waiting = [chunk for chunk in series.waiting if chunk.incident not in gone]
        self._flight = None
        self._incident_steps.clear()
        self.latest_step = step
        self._cut = step if self._cut is None else min(self._cut, step)
        self.take_event(step, "resumed", resumed(step, until))

    # What goes out.

    @property
    def waits(self) -> bool:
        """Whether `write` has anything to do."""
        return bool(
            self._scalars
            or self._events
            or self._meta
            or self._new_incidents
            or self._cut is not None
            or any(s.waiting or s.thin_until is not None for s in self._series.values())
        )

    def discard(self) -> int:
        """Give up what waits, but for meta and incidents. Returns how many records that were."""
        count = sum(kind != "dropped" for _, kind, _ in self._events) + len(self._scalars)
        for series in self._series.values():
            count += sum(len(chunk.steps) for chunk in series.waiting)
            series.waiting = []
        self._events, self._scalars = [], {}
        return count

    def write(self) -> None:
        """Thin what has become too much, and write what waits. See the class."""
        known, self._known = self._known, False
        self._keep_log()
        connection = self._connection
        assert connection is not None
        self._bound_log(connection)
        self._make_room(connection, known)
        with _transaction(connection):
            self._claim_file(connection)
            if self._scalars:
                self._line_up_scalars()
            for series in self._series.values():
                for chunk in series.waiting:
                    self._write_chunk(series, chunk)
            self._write_rest()
        self._known = True
        self._meta, self._events, self._new_incidents = {}, [], []
        for series in self._series.values():
            series.waiting = []

    def settle(self, seconds: float) -> None:
        """Write until nothing is left to thin, for about `seconds` at most."""
        end = time.monotonic() + seconds
        strides: list[int] = []
        while time.monotonic() < end:
            before, strides = strides, [series.stride for series in self._series.values()]
            if strides == before and all(series.thin_until is None for series in self._series.values()):
                return
            self.write()

    def _make_room(self, connection: sqlite3.Connection, known: bool) -> None:
        """Cut and thin, in a transaction of its own: where the file is full this is what helps."""
        passes = [(series, series.thin_until, series.thin_bucket) for series in self._series.values()]
        waiting = sum(row.nbytes for s in self._series.values() for chunk in s.waiting for row in chunk.rows)
        try:
            with _transaction(connection):
                if not known:
                    self._load()
                self._claim_file(connection)
                if self._cut is not None:
                    self._cut_file(self._cut)
                self._relieve()
                self._thin(min(max(THIN_BYTES, 3 * waiting), self._journal_room // 3))
        except BaseException:
            for series, until, bucket in passes:
                series.thin_until, series.thin_bucket = until, bucket
            raise
        self._cut = None

    def _execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        assert self._connection is not None
        return self._connection.execute(statement, values)

    def _load(self) -> None:
        """Look at what the file holds, when it has been opened or a transaction has failed."""
        for series in self._series.values():
            series.forget()
        for number, kind, stride in self._execute("SELECT id, kind, stride FROM series").fetchall():
            fresh = kind not in self._series
            series = self._of(kind)
            series.number, series.stride = number, stride
            rows, size, last, newest = self._execute(
                "SELECT total(count), total(bytes), max(last), max(id) FROM blocks"
                " WHERE series = ? AND incident IS NULL",
                number,
            ).fetchone()
            series.rows, series.bytes = int(rows), int(size)
            if fresh and stride > 1:
                series.thin_until = newest
            layout = self._execute(
                "SELECT id, names FROM layouts WHERE series = ? ORDER BY id DESC", number
            ).fetchone()
            if layout and (fresh or json.loads(layout[1]) == series.layout.names):
                series.layout.names, series.layout.number = json.loads(layout[1]), layout[0]
            if fresh and last is not None:
                series.last = series.kept = last
        self._incidents = [n for (n,) in self._execute("SELECT id FROM incidents ORDER BY id").fetchall()]
        self._next_incident = max([self._next_incident - 1, *self._incidents]) + 1

    def _claim_file(self, connection: sqlite3.Connection) -> None:
        """Write our name into the file. RecordError if another writer's is there that may write to it."""
        (text,) = connection.execute("SELECT max(value) FROM meta WHERE key = '.writer'").fetchone()
        if text == self._owner.text:
            return
        other = Owner.parse(text)
        if self._claimed:
            raise file.RecordError(
                f"Writer: {self.path} has been taken over by {other or 'an older gradkern'}. Nothing more is "
                f"recorded here. Give each run a path of its own."
            )
        if other is not None and other.is_alive:
            raise file.RecordError(
                f"Writer: {self.path} is being written by {other}. Give this run a path of its own (under "
                f"torch.distributed: each rank), or close what writes there first, as `monitor.close()` does."
            )
        connection.execute("REPLACE INTO meta VALUES ('.writer', ?)", (self._owner.text,))

    def _keep_log(self) -> None:
        """Connect anew if the write-ahead log is no longer where others look for it.

        A process that closes any other handle of the file loses SQLite's locks on it. The next reader to
        leave then takes itself for the last one, and removes the log.
        """
        if self._connection is not None and self._log != file.number_of_log(self.path):
            # What only the removed log has goes into the file.
            self._execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._connection.close()
            self._connection = None
        if self._connection is None:
            self._connect()

    def _bound_log(self, connection: sqlite3.Connection) -> None:
        """A reader that never ends keeps the write-ahead log from being used again."""
        if self.journal != "wal":
            return
        try:
            size = self.path.with_name(self.path.name + "-wal").stat().st_size
        except OSError:
            return
        if size > self._journal_room:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            if self.path.with_name(self.path.name + "-wal").stat().st_size > self._journal_room:
                raise sqlite3.OperationalError("database is locked by a reader that does not end")

    def _line_up_scalars(self) -> None:
        """Turn scalars by step into rows with a column for each name that has occurred."""
        series = self._of(SCALARS)
        known = set(series.layout.names)
        fresh = [name for values in self._scalars.values() for name in values if name not in known]
        if fresh:
            series.layout = _Layout([*series.layout.names, *dict.fromkeys(fresh)])
        columns = {name: column for column, name in enumerate(series.layout.names)}
        for step in sorted(self._scalars):
            row = np.repeat(MISSING, len(columns))
            for name, value in self._scalars[step].items():
                row[columns[name]] = value
            if series.keeps(step):
                series.wait(series.layout, None, step, row)
                series.kept = max(series.kept, step)
            series.last = max(series.last, step)
        self._scalars = {}

    def _write_chunk(self, series: _Series, chunk: _Chunk) -> None:
        if series.number is None:
            series.number = self._execute(
                "INSERT INTO series (kind, dtype, stride) VALUES (?, ?, ?)",
                series.kind,
                series.dtype.str,
                series.stride,
            ).lastrowid
        if chunk.layout.number is None:
            chunk.layout.number = self._execute(
                "INSERT INTO layouts (series, names) VALUES (?, ?)",
                series.number,
                json.dumps(chunk.layout.names),
            ).lastrowid
        steps, values = np.array(chunk.steps, np.int64), np.stack(chunk.rows)
        if chunk.incident is not None:
            self._insert(series, chunk.layout, steps, values, chunk.incident, pack=series.kind == EXPONENTS)
            return
        tail = series.tail
        if tail is not None and tail.layout is chunk.layout:
            self._execute("DELETE FROM blocks WHERE id = ?", tail.number)
            series.bytes -= tail.bytes
            series.rows -= len(tail.steps)
            steps, values = np.concatenate([tail.steps, steps]), np.concatenate([tail.values, values])
            order = np.argsort(steps, kind="stable")
            if (order[1:] < order[:-1]).any():
                steps, values = steps[order], values[order]
        full = values.nbytes >= TAIL_BYTES
        pack = series.kind == EXPONENTS or (full and series.kind == SCALARS)
        before = series.bytes
        number = self._insert(series, chunk.layout, steps, values, None, pack=pack)
        series.tail = None if full else _Tail(number, chunk.layout, steps, values, series.bytes - before)

    def _insert(
        self,
        series: _Series,
        layout: _Layout,
        steps: Steps,
        values: npt.NDArray[Any],
        incident: int | None,
        *,
        pack: bool,
    ) -> int:
        code, data = blocks.encode(values, pack=pack)
        at = blocks.encode_steps(steps)
        size = len(data) + len(at or b"")
        number = self._execute(
            "INSERT INTO blocks (series, incident, layout, first, last, count, bytes, code, steps, data)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            series.number,
            incident,
            layout.number,
            int(steps[0]),
            int(steps[-1]),
            len(steps),
            size,
            code,
            at,
            data,
        ).lastrowid
        assert number is not None
        if incident is None:
            series.rows += len(steps)
            series.bytes += size
        return number

    def _write_rest(self) -> None:
        """Meta, events, incidents."""
        for key, value in self._meta.items():
            self._execute("REPLACE INTO meta VALUES (?, ?)", key, json.dumps(value))
        for step, kind, detail in self._events:
            self._execute("INSERT INTO events (step, kind, detail) VALUES (?, ?, ?)", step, kind, detail)
        if self._events:
            # Of too many the first quarter and the latest stay.
            self._execute(
                "DELETE FROM events WHERE id IN (SELECT id FROM events ORDER BY id LIMIT"
                " max(0, (SELECT count(*) FROM events) - ?) OFFSET ?)",
                MAX_EVENTS,
                MAX_EVENTS // 4,
            )
        for number, step in self._new_incidents:
            self._execute("REPLACE INTO incidents VALUES (?, ?)", number, step)
            self._incidents.append(number)
        for number in retention.superfluous(self._incidents):
            self._drop_incident(number)

    def _drop_incident(self, number: int) -> None:
        self._execute("DELETE FROM blocks WHERE incident = ?", number)
        self._execute("DELETE FROM incidents WHERE id = ?", number)
        self._incidents = [kept for kept in self._incidents if kept != number]

    def _read(self, series: _Series, row: tuple[Any, ...]) -> tuple[Steps, npt.NDArray[Any]]:
        first, last, count, code, at, data, columns = row
        with file.damage(self.path, "Writer"):
            values = blocks.decode(code, data, (count, columns, *series.inner), series.dtype)
            return blocks.decode_steps(at, first, last, count), values

    def _cut_file(self, step: int) -> None:
        """Take `step` and what comes after it out of the file, but not what came in since."""
        for series in self._series.values():
            if series.number is None:
                continue
            series.tail = None
            found = self._execute(
                "SELECT b.id, b.incident, b.layout, b.first, b.last, b.count, b.code, b.steps, b.data,"
                " json_array_length(l.names) FROM blocks b JOIN layouts l ON l.id = b.layout"
                " WHERE b.series = ? AND b.last >= ?",
                series.number,
                step,
            ).fetchall()
            for number, incident, layout, *row in found:
                steps, values = self._read(series, tuple(row))
                self._execute("DELETE FROM blocks WHERE id = ?", number)
                kept = steps < step
                if kept.any():
                    pack = row[3] == blocks.PACKED
                    self._insert(series, _Layout([], layout), steps[kept], values[kept], incident, pack=pack)
            rows, size = self._execute(
                "SELECT total(count), total(bytes) FROM blocks WHERE series = ? AND incident IS NULL",
                series.number,
            ).fetchone()
            series.rows, series.bytes = int(rows), int(size)
        # Names under which there is no row any more are none of this run's.
        self._execute("DELETE FROM layouts WHERE id NOT IN (SELECT layout FROM blocks)")
        left = {number for (number,) in self._execute("SELECT id FROM layouts").fetchall()}
        for series in self._series.values():
            series.forget_layouts(left)
        self._execute("DELETE FROM events WHERE step >= ?", step)
        for (number,) in self._execute("SELECT id FROM incidents WHERE step >= ?", step).fetchall():
            self._drop_incident(number)

    # Thinning.

    def _relieve(self) -> None:
        """Decide what to thin from now on, if anything has become too much."""
        for series in self._series.values():
            # A little before it is too much: thinning takes several batches.
            if series.kind != SCALARS and series.rows > retention.MAX_ROWS * 15 // 16:
                self._widen(series)
        (pages,) = self._execute("PRAGMA page_count").fetchone()
        (free,) = self._execute("PRAGMA freelist_count").fetchone()
        if (pages - free) * self._page < 0.9 * (self.max_bytes - self._journal_room):
            return
        if any(series.thin_until is not None for series in self._series.values()):
            return
        flights = self._execute("SELECT total(bytes) FROM blocks WHERE incident IS NOT NULL").fetchone()[0]
        thinnable = [s for s in self._series.values() if s.rows > retention.LEAST_ROWS]
        # Scalars come last: they are the run's history, and small.
        largest = max(thinnable, key=lambda s: s.bytes / (4 if s.kind == SCALARS else 1), default=None)
        if flights > (largest.bytes if largest else 0) and len(self._incidents) > 1:
            middle = min(retention.FIRST_INCIDENTS, len(self._incidents) // 2)
            self._drop_incident(self._incidents[middle])
        elif largest is not None:
            self._widen(largest)
            self.take_event(self.latest_step, "thinned", {"kind": largest.kind, "stride": largest.stride})

    def _widen(self, series: _Series) -> None:
        """Double the stride of a series, and begin to thin what is there."""
        if series.thin_until is not None or series.number is None:
            return
        first, last, newest = self._execute(
            "SELECT min(first), max(last), max(id) FROM blocks WHERE series = ? AND incident IS NULL",
            series.number,
        ).fetchone()
        if newest is None:
            return
        series.stride = retention.wider(series.stride, last - first, series.rows)
        self._execute("UPDATE series SET stride = ? WHERE id = ?", series.stride, series.number)
        series.tail, series.thin_until, series.thin_bucket = None, newest, -1

    def _thin(self, budget: int) -> None:
        """Thin up to `budget` bytes of the series that are being thinned."""
        for series in self._series.values():
            while budget > 0 and series.thin_until is not None:
                budget -= self._thin_some(series)

    def _thin_some(self, series: _Series) -> int:
        """Thin the next few blocks of a series. Returns the bytes that were read."""
        found: list[tuple[Any, ...]] = []
        size = 0
        for row in self._execute(
            "SELECT b.id, b.layout, b.bytes, b.first, b.last, b.count, b.code, b.steps, b.data,"
            " json_array_length(l.names) FROM blocks b JOIN layouts l ON l.id = b.layout"
            " WHERE b.series = ? AND b.incident IS NULL AND b.id <= ? ORDER BY b.first, b.id",
            series.number,
            series.thin_until,
        ):
            if found and (size + row[2] > min(MERGE_BYTES, self._journal_room // 6) or row[1] != found[0][1]):
                break
            found.append(row)
            size += row[2]
        if not found:
            series.thin_until = None
            return 0
        parts = [self._read(series, row[3:]) for row in found]
        steps = np.concatenate([part[0] for part in parts])
        values = np.concatenate([part[1] for part in parts])
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        kept, series.thin_bucket = retention.thinned(steps, series.stride, series.thin_bucket)
        self._execute(f"DELETE FROM blocks WHERE id IN ({','.join(str(row[0]) for row in found)})")
        series.rows -= len(steps)
        series.bytes -= size
        if kept.any():
            pack = found[0][6] == blocks.PACKED
            self._insert(series, _Layout([], found[0][1]), steps[kept], values[kept], None, pack=pack)
        return size


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself after some errors, a full disk among them.
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise
