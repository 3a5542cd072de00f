"""A run that was recorded, or is being recorded, in a file."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gradkern.record import blocks, export, file
from gradkern.record.schema import (
    EXPONENT_COLUMNS,
    EXPONENTS,
    KINDS,
    Exponents,
    Rows,
    Steps,
    Values,
    check_kind,
    check_scalar,
    join,
    union,
)
from gradkern.record.store import MISSING_BITS, SCALARS


class Run:
    """A `Record` in a file, opened with `Run.open`. Each answer is what the file holds at that moment.

    Raises:
        RecordError: from every method, if what it needs of the file is damaged or cannot be read just now.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._scalars: dict[str, tuple[Steps, Values]] = {}
        self._scalars_of: int | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open the record at `path`, also while a run writes to it. Nothing in it is changed.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such file.
            RecordError: the file is not a record, is damaged, or was written by a newer gradkern.
        """
        where = file.as_path(path, "Run.open")
        return cls(where, file.open_for_reading(where, "Run.open"))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Run.open({str(self.path)!r})"

    @property
    def steps(self) -> Steps:
        """See `Record.steps`."""
        return union(steps for steps, _ in self._all_scalars().values())

    def scalar(self, name: str) -> tuple[Steps, Values]:
        """See `Record.scalar`."""
        found = self._all_scalars()
        if name not in found:
            check_scalar(name, list(found))
        return found.get(name, (np.empty(0, np.int64), np.empty(0)))

    def scalar_names(self) -> list[str]:
        """See `Record.scalar_names`."""
        return list(self._all_scalars())

    def kinds(self) -> list[str]:
        """See `Record.kinds`."""
        found = self._query(
            "SELECT kind FROM series WHERE kind NOT IN (?, ?) ORDER BY id", SCALARS, EXPONENTS
        )
        return [kind for (kind,) in found]

    def rows(self, kind: str) -> tuple[Steps, Rows]:
        """See `Record.rows`. Thinned, and at full resolution around incidents: distances of steps differ."""
        if kind not in KINDS:
            check_kind(kind, self.kinds())
        return self._series(kind, "f4", ())

    def names(self, kind: str) -> list[str]:
        """See `Record.names`."""
        found = self._query(
            "SELECT l.names FROM layouts l JOIN series s ON s.id = l.series WHERE s.kind = ? ORDER BY l.id",
            kind,
        )
        columns: list[str] = []
        with file.damage(self.path, "Run"):
            for (names,) in found:
                columns = join(columns, json.loads(names))
        return columns

    def exponents(self) -> tuple[Steps, Exponents]:
        """See `Record.exponents`."""
        return self._series(EXPONENTS, "i4", (EXPONENT_COLUMNS,))

    @property
    def meta(self) -> dict[str, Any]:
        """See `Record.meta`."""
        found = self._query("SELECT key, value FROM meta WHERE key <> '.writer'")
        with file.damage(self.path, "Run"):
            return {key: json.loads(value) for key, value in found}

    @property
    def events(self) -> list[dict[str, Any]]:
        """See `Record.events`."""
        found = self._query("SELECT step, kind, detail FROM events ORDER BY id")
        with file.damage(self.path, "Run"):
            return [
                {"step": step, "kind": kind, "detail": json.loads(detail)} for step, kind, detail in found
            ]

    @property
    def incidents(self) -> list[int]:
        """Steps of the incidents around which all rows were kept."""
        return [step for (step,) in self._query("SELECT step FROM incidents ORDER BY id")]

    def to_csv(self, path: str | os.PathLike[str], kind: str | None = None) -> None:
        """Write a table: column ``step``, then one for each scalar, or each name of a `kind` of rows.

        Of kind ``"exponents"`` a name has a column for each of the 64 counts, ``weight:2^-3`` for one. A
        scalar that a step has no value of is empty; NaN and Inf are ``nan``, ``inf`` and ``-inf``. Numbers
        read back are the same numbers. The directory is made if it is not there.

        Raises:
            ValueError: there are no rows of that kind, or `path` is that of the record.
        """
        export.to_csv(self, path, kind)

    def to_parquet(self, path: str | os.PathLike[str], kind: str | None = None) -> None:
        """Write the table of `to_csv` as Parquet, int64, float64, float32 or int32, null for no value.

        Raises:
            ValueError: there are no rows of that kind, or `path` is that of the record.
            ImportError: pyarrow is not installed.
        """
        export.to_parquet(self, path, kind)

    def _query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with file.damage(self.path, "Run"):
            return self._connection.execute(statement, values).fetchall()

    def _blocks(
        self, kind: str, dtype: str, inner: tuple[int, ...]
    ) -> list[tuple[list[str], Steps, npt.NDArray[Any]]]:
        """Names, steps and values of every block of a series, in the order in which they were written."""
        found = self._query(
            "SELECT l.names, b.first, b.last, b.count, b.code, b.steps, b.data FROM blocks b"
            " JOIN series s ON s.id = b.series JOIN layouts l ON l.id = b.layout"
            " WHERE s.kind = ? ORDER BY b.first, b.id",
            kind,
        )
        result = []
        with file.damage(self.path, "Run"):
            known: dict[str, list[str]] = {}
            for text, first, last, count, code, steps, data in found:
                if text not in known:
                    known[text] = json.loads(text)
                names = known[text]
                values = blocks.decode(code, data, (count, len(names), *inner), dtype)
                result.append((names, blocks.decode_steps(steps, first, last, count), values))
        return result

    def _series(self, kind: str, dtype: str, inner: tuple[int, ...]) -> tuple[Steps, npt.NDArray[Any]]:
        found = self._blocks(kind, dtype, inner)
        columns = self.names(kind)
        at = {name: column for column, name in enumerate(columns)}
        steps = np.concatenate([np.empty(0, np.int64), *(block[1] for block in found)])
        # Of equal steps the last: rows around incidents are there twice, and later ones win.
        order = np.argsort(steps, kind="stable")
        in_order = steps[order]
        last = np.append(in_order[1:] != in_order[:-1], True)[: len(order)]
        # Where each row goes; -1 for those that go nowhere.
        target = np.full(len(steps), -1)
        target[order[last]] = np.arange(int(last.sum()))
        values = np.full((int(last.sum()), len(columns), *inner), np.nan if dtype == "f4" else 0, dtype)
        begin = 0
        while found:
            names, block_steps, block_values = found.pop(0)
            where = target[begin : begin + len(block_steps)]
            begin += len(block_steps)
            kept = where >= 0
            if names == columns:
                values[where[kept]] = block_values[kept]
            else:
                values[where[kept][:, None], np.array([at[name] for name in names])] = block_values[kept]
        return in_order[last], values

    def _all_scalars(self) -> dict[str, tuple[Steps, Values]]:
        version = self._query("PRAGMA data_version")[0][0]
        if version == self._scalars_of:
            return self._scalars
        steps: dict[str, list[Steps]] = {}
        values: dict[str, list[Values]] = {}
        for names, block_steps, block_values in self._blocks(SCALARS, "f8", ()):
            there = np.ascontiguousarray(block_values).view(np.uint64) != MISSING_BITS
            for column, name in enumerate(names):
                present = there[:, column]
                if present.any():
                    steps.setdefault(name, []).append(block_steps[present])
                    values.setdefault(name, []).append(block_values[present, column])
        result = {}
        for name in self.names(SCALARS):
            if name not in steps:
                continue
            all_steps, all_values = np.concatenate(steps[name]), np.concatenate(values[name])
            order = np.argsort(all_steps, kind="stable")
            all_steps, all_values = all_steps[order], all_values[order]
            last = np.append(all_steps[1:] != all_steps[:-1], True)
            result[name] = all_steps[last], all_values[last]
        self._scalars, self._scalars_of = result, version
        return result
