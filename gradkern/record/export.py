"""A run as tables for other tools: CSV, and Parquet with pyarrow."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gradkern.record.file import as_path
from gradkern.record.schema import EXPONENT_LABELS, EXPONENTS, Steps

if TYPE_CHECKING:
    from gradkern.record.run import Run

# Rows turned into text, or written as one group, at a time.
GROUP_ROWS: Final = 1024


def table(record: Run, kind: str | None) -> tuple[Steps, list[str], npt.NDArray[Any], Any]:
    """Steps, columns, values ``[k, n]``, and where there is one, bool ``[k, n]``; None if everywhere."""
    if kind == EXPONENTS:
        steps, histograms = record.exponents()
        columns = [f"{name}:{label}" for name in record.names(kind) for label in EXPONENT_LABELS]
        return steps, columns, histograms.reshape(len(steps), len(columns)), None
    if kind is not None:
        if kind not in record.kinds():
            raise ValueError(
                f"export: there are no rows of kind {kind!r} in {record!r}. Recorded are: "
                f"{', '.join(record.kinds()) or 'none'}. Scalars come without a kind, histograms as "
                f"'exponents'."
            )
        steps, rows = record.rows(kind)
        return steps, record.names(kind), rows, None
    steps, names = record.steps, record.scalar_names()
    values = np.full((len(steps), len(names)), np.nan)
    there = np.zeros(values.shape, bool)
    for column, name in enumerate(names):
        at, series = record.scalar(name)
        where = np.searchsorted(steps, at)
        values[where, column] = series
        there[where, column] = True
    return steps, names, values, there


def target(record: Run, path: str | os.PathLike[str], function: str) -> Path:
    """Where a table goes; its directory is made. ValueError if the record is there."""
    where = as_path(path, function)
    beside = {record.path.with_name(record.path.name + ending) for ending in ("-wal", "-shm", "-journal")}
    if where.absolute() in {other.absolute() for other in beside} or (
        where.exists() and where.samefile(record.path)
    ):
        raise ValueError(f"{function}: {where} is the record itself, which would be lost. Name another file.")
    where.parent.mkdir(parents=True, exist_ok=True)
    return where


def to_csv(record: Run, path: str | os.PathLike[str], kind: str | None) -> None:
    """See `Run.to_csv`."""
    steps, columns, values, there = table(record, kind)
    with open(target(record, path, "to_csv"), "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["step", *columns])
        for begin in range(0, len(steps), GROUP_ROWS):
            group = slice(begin, begin + GROUP_ROWS)
            writer.writerows(_text(steps[group], values[group], None if there is None else there[group]))


def _text(steps: Steps, values: npt.NDArray[Any], there: npt.NDArray[np.bool_] | None) -> Iterator[list[str]]:
    """Rows of text. Numbers have as many digits as it takes to read the same number back."""
    for i, step in enumerate(steps.tolist()):
        row = [str(value) for value in values[i]]
        if there is not None:
            row = [text if known else "" for text, known in zip(row, there[i], strict=True)]
        yield [str(step), *row]


def to_parquet(record: Run, path: str | os.PathLike[str], kind: str | None) -> None:
    """See `Run.to_parquet`."""
    try:
        # Without its types, which not everybody who checks ours has.
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            "to_parquet: Parquet files are written with pyarrow, which is not installed. "
            "Install it with `pip install gradkern[parquet]`, or use to_csv."
        ) from error
    steps, columns, values, there = table(record, kind)
    arrays = [pyarrow.array(steps)]
    for column in range(len(columns)):
        mask = None if there is None else ~there[:, column]
        arrays.append(pyarrow.array(np.ascontiguousarray(values[:, column]), mask=mask, from_pandas=False))
    whole = pyarrow.Table.from_arrays(arrays, names=["step", *columns])
    parquet.write_table(whole, target(record, path, "to_parquet"))
