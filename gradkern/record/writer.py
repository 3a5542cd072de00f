"""Keeps a run in a file, from a thread of its own, in batches."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

import numpy.typing as npt

from gradkern.record import file
from gradkern.record.file import RecordError
from gradkern.record.schema import EXPONENTS, as_histograms, as_row, as_table, check_names, copied
from gradkern.record.store import Store

# Half of the second that a killed process may lose: the other half is for writing.
BATCH_SECONDS: Final = 0.5

# A write that takes longer, or a batch that could not be written for longer, costs records.
PATIENCE_SECONDS: Final = 1.0

# A reader may lock the file for longer: it goes on, and memory bridges the time.
LOCKED_SECONDS: Final = 10.0

# Records that wait in memory for the thread, at most.
QUEUE_BYTES: Final = 64 << 20

# The thread is woken before its time when this much waits.
BATCH_BYTES: Final = 8 << 20

# What an entry of the queue takes besides its array, about.
ENTRY_BYTES: Final = 200

LEAST_MAX_BYTES: Final = 1 << 20

log = logging.getLogger("gradkern")


class Writer:
    """A `Recorder` that keeps a run in one SQLite file, which `Run` reads while the run goes on.

    Every method returns at once, whatever the file system does: a thread writes twice a second. Records are
    dropped, and counted in `dropped` and in an event, while a write takes longer than a second, when writing
    has failed for a second (a full disk), and when a reader has locked the file for ten. A process that is
    killed loses at most the last second, never the file. A write-ahead log is used where the file system can
    share one, else a rollback journal.

    Scalars are kept of every step. Of each kind of rows at most 60,000 are: when there are more, the distance
    of steps doubles and every second row goes. Rows of the 256 steps up to an incident and of the 32 steps
    after it are all kept, for the first 8 incidents and the latest 24. Where that goes beyond `max_bytes`,
    the largest kind is thinned further, or an early incident is given up; scalars are thinned at last.

    A file that is there already goes on. If the first step comes before its last, what the file holds from
    that step on is replaced. Give each run, and under `torch.distributed` each rank, a path of its own: while
    a process of this machine writes to a file, it is refused to others. If one on another machine takes it
    over all the same, the first one stops and says so. In the process that writes, open the file with `Run`
    only: any other handle, once closed, takes the locks of SQLite with it.

    Args:
        path: of the file. Its directory is made if it is not there.
        max_bytes: of the file with its journal, at least 1 MiB.

    Raises:
        RecordError: there is a file at `path` that is no record, is damaged, is from a newer gradkern, or is
            being written.
        OSError: there can be no file at `path`.
        ValueError: `max_bytes` is too small.

    >>> import os, tempfile
    >>> from gradkern.record import Run, Writer
    >>> path = os.path.join(tempfile.mkdtemp(), "run.gk")
    >>> with Writer(path) as writer:
    ...     writer.set_names("grad_norm", ["weight", "bias"])
    ...     for step in range(3):
    ...         writer.put_scalars(step, {"loss": 1.0 / (step + 1)})
    ...         writer.put_rows("grad_norm", step, [step, 2.0 * step])
    >>> Run.open(path).rows("grad_norm")[1][-1]
    array([2., 4.], dtype=float32)
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = 1_000_000_000) -> None:
        if max_bytes < LEAST_MAX_BYTES:
            raise ValueError(f"Writer: max_bytes must be at least {LEAST_MAX_BYTES}, got {max_bytes}.")
        self.path = file.as_path(path, "Writer")
        self._store = Store(self.path, max_bytes)
        # One batch must fit into what is left of the file when thinning begins.
        self._batch_bytes = min(BATCH_BYTES, max_bytes // 32)
        self._widths: dict[str, int] = {}
        self._condition = threading.Condition()
        self._queue: deque[tuple[Callable[..., None], tuple[Any, ...], int]] = deque()
        self._queue_bytes = 0
        self._put = self._done = 0  # entries of the queue, ever
        self._dropped = self._announced = self._reported = (
            0  # records; `announced` in an event not yet written
        )
        self._reason = ""
        self._hurry = self._closing = False
        self._busy_since: float | None = None
        self._stopped: Exception | None = None
        self._opened = threading.Event()
        self._open_error: Exception | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="gradkern-record", daemon=True)
        self._thread.start()
        # A file system that hangs is not waited for: the file is opened when it comes back.
        self._opened.wait(PATIENCE_SECONDS)
        if self._open_error is not None:
            raise self._open_error
        atexit.register(self.close)

    def go_on(self, parameters: Mapping[str, Sequence[int]], step: int | None = None) -> int:
        """The first step of the run: `step`, else the one behind the last in the file, 0 in a new one.

        What the file holds from that step on is replaced as soon as the step comes. Waits for a file system
        that is slow, ten seconds at most.

        Args:
            parameters: shapes by name, of the model whose run it is.

        Raises:
            RecordError: before that step the file holds the run of another model: more than half of its
                parameters are not there any more, or have other shapes. The writer is closed.
            OSError: the file could not be opened in time, or not at all. The writer is closed.
        """
        try:
            if not self._opened.wait(LOCKED_SECONDS):
                raise TimeoutError(
                    f"Writer: the file system of {self.path} has not answered for {LOCKED_SECONDS:.0f} "
                    f"seconds. Choose a path on another one."
                )
            if self._open_error is not None:
                raise self._open_error
            first = self._store.last_step + 1 if step is None else step
            before = self._store.parameters
            gone = [name for name, shape in before.items() if list(parameters.get(name, ())) != shape]
            if first > 0 and self._store.last_step >= 0 and len(gone) > len(before) / 2:
                raise RecordError(
                    f"Writer: {self.path} is the record of another model, up to step "
                    f"{self._store.last_step}: {len(gone)} of its {len(before)} parameters are not in this "
                    f"one or have other shapes, {gone[0]!r} {before[gone[0]]} for one. Give this run a path "
                    f"of its own, or remove the file."
                )
            return first
        except BaseException:
            self.close()
            raise

    def put_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Recorder.put_scalars`."""
        floats = {name: float(value) for name, value in values.items()}
        self._enter(self._store.take_scalars, (int(step), floats), 8 * len(floats))

    def put_rows(self, kind: str, step: int, values: npt.ArrayLike) -> None:
        """See `Recorder.put_rows`."""
        if kind not in self._widths:
            raise ValueError(f"put_rows: kind {kind!r} has no names. Call set_names({kind!r}, names) first.")
        row = as_row(kind, values, self._widths[kind])
        self._enter(self._store.take_row, (kind, int(step), row), row.nbytes)

    def put_table(self, kinds: Sequence[str], step: int, values: npt.ArrayLike) -> None:
        """See `Recorder.put_table`. It counts as one record if it is dropped."""
        for kind in kinds:
            if kind not in self._widths:
                raise ValueError(
                    f"put_table: kind {kind!r} has no names. Call set_names({kind!r}, names) first."
                )
        table = as_table(kinds, values, [self._widths[kind] for kind in kinds])
        self._enter(self._take_table, (tuple(kinds), int(step), table), table.nbytes)

    def put_exponents(self, step: int, values: npt.ArrayLike) -> None:
        """See `Recorder.put_exponents`."""
        if EXPONENTS not in self._widths:
            raise ValueError("put_exponents: there are no names. Call set_names('exponents', names) first.")
        histograms = as_histograms(values, self._widths[EXPONENTS])
        self._enter(self._store.take_row, (EXPONENTS, int(step), histograms), histograms.nbytes)

    def put_event(self, step: int, kind: str, detail: Mapping[str, Any] | None = None) -> None:
        """See `Recorder.put_event`."""
        self._enter(self._store.take_event, (int(step), kind, copied(detail or {})), 0)

    def set_meta(self, meta: Mapping[str, Any]) -> None:
        """See `Recorder.set_meta`."""
        self._enter(self._store.take_meta, (copied(meta),), None)

    def set_names(self, kind: str, names: Sequence[str]) -> None:
        """See `Recorder.set_names`."""
        listed = check_names(kind, names)
        self._widths[kind] = len(listed)
        self._enter(self._store.take_names, (kind, listed), None)

    def incident(self, step: int) -> None:
        """Keep the rows of the 256 steps up to `step`, which must have been put, and of 32 after it.

        An incident among those 32 steps is taken for the same one. Of one that is noticed late, what is kept
        are those of these rows that are among the latest 256 steps.
        """
        self._enter(self._store.take_incident, (int(step),), 0)

    @property
    def dropped(self) -> int:
        """How many records could not be written so far. One call of a `put_...` is one record."""
        return self._dropped

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until what was put so far is in the file, `timeout` seconds at most. Returns whether it is."""
        with self._condition:
            until = self._put
            self._hurry = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._done >= until or self._stopped is not None, timeout)
            return self._done >= until and self._stopped is None

    def close(self, timeout: float = 2.0) -> None:
        """Write what waits and close the file, in `timeout` seconds at most. May be called again."""
        atexit.unregister(self.close)
        # A forked child has the object, but neither the thread nor the file.
        if os.getpid() != self._process:
            return
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._condition:
                self._drop(
                    self._put - self._done, "the file system did not answer when the record was closed"
                )

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _enter(self, take: Callable[..., None], values: tuple[Any, ...], size: int | None) -> None:
        """Put an entry into the queue, or drop it. Without a size it is never dropped: later ones need it."""
        busy_since = self._busy_since
        hangs = busy_since is not None and time.monotonic() - busy_since > PATIENCE_SECONDS
        with self._condition:
            if self._closing or self._stopped is not None:
                self._drop(1, "the record is closed" if self._closing else str(self._stopped))
            elif size is not None and (hangs or self._queue_bytes + size > QUEUE_BYTES):
                self._drop(1, "the file system is too slow")
            else:
                entry_bytes = (size or 0) + ENTRY_BYTES
                self._queue.append((take, values, entry_bytes))
                self._queue_bytes += entry_bytes
                self._put += 1
                if self._queue_bytes > self._batch_bytes and not self._hurry:
                    self._hurry = True
                    self._condition.notify_all()

    def _drop(self, count: int, reason: str) -> None:
        if count and not self._dropped:
            log.warning("gradkern: records of %s are lost: %s.", self.path, reason.rstrip("."))
        self._dropped += count
        self._reason = reason

    # The thread.

    def _run(self) -> None:
        try:
            self._open()
        except Exception as error:
            self._open_error = error
            self._stop(error)
            self._store.close()
            self._opened.set()
            return
        self._opened.set()
        try:
            taken, waiting_since, closing = 0, None, False
            while not closing:
                batch, closing = self._next()
                self._busy_since = now = time.monotonic()
                for take, values in batch:
                    take(*values)
                taken += len(batch)
                waiting_since = self._write(now if waiting_since is None else waiting_since, closing)
                self._busy_since = None
                if waiting_since is None:
                    with self._condition:
                        self._done = taken
                        self._condition.notify_all()
            self._busy_since = time.monotonic()
            with contextlib.suppress(sqlite3.Error):
                self._store.settle(PATIENCE_SECONDS)
        except Exception as error:
            self._stop(error)
        finally:
            self._busy_since = None
            with contextlib.suppress(sqlite3.Error):
                self._store.close()

    def _open(self) -> None:
        end = time.monotonic() + LOCKED_SECONDS
        while True:
            try:
                self._store.open()
                return
            except sqlite3.Error as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise OSError(
                        f"Writer: {self.path} cannot be opened: {error}. Choose another path, or try again "
                        f"if another process was just reading it."
                    ) from error
                time.sleep(file.LOCK_SECONDS / 10)

    def _take_table(self, kinds: Sequence[str], step: int, table: npt.NDArray[Any]) -> None:
        for kind, row in zip(kinds, table, strict=True):
            self._store.take_row(kind, step, as_row(kind, row, len(row)))

    def _next(self) -> tuple[list[tuple[Callable[..., None], tuple[Any, ...]]], bool]:
        """Wait for the time of the next batch. Returns it, and whether it is the last."""
        with self._condition:
            self._condition.wait_for(lambda: self._hurry or self._closing, BATCH_SECONDS)
            batch, size = [], 0
            while self._queue and size <= self._batch_bytes:
                take, values, entry_bytes = self._queue.popleft()
                batch.append((take, values))
                size += entry_bytes
            self._queue_bytes -= size
            self._hurry = bool(self._queue)
            return batch, self._closing and not self._queue

    def _write(self, waiting_since: float, closing: bool) -> float | None:
        """Write what waits, if anything does. Returns since when it waits, None if it does not any more."""
        if self._dropped > self._announced:
            detail = {"count": self._dropped - self._announced, "reason": self._reason}
            self._store.take_event(self._store.latest_step, "dropped", detail)
            self._announced = self._dropped
        if not self._store.waits:
            return None
        try:
            self._store.write()
        except sqlite3.Error as error:
            patience = LOCKED_SECONDS if "locked" in str(error) else PATIENCE_SECONDS
            if time.monotonic() - waiting_since < patience and not closing:
                return waiting_since
            with self._condition:
                self._drop(self._store.discard(), str(error))
            self._announced = self._reported
            return None
        self._reported = self._announced
        return None

    def _stop(self, error: Exception) -> None:
        with self._condition:
            self._stopped = error
            self._drop(self._put - self._done, str(error))
            self._queue.clear()
            self._condition.notify_all()
