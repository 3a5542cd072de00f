"""A run as tables for other tools: CSV, and Parquet with pyarrow."""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradkern.record.schema import Record, Steps

# Rows turned into text, or written as one group, at a time.
GROUP_ROWS: Final = 1024


def table(
    record: Record, kind: str | None, names: list[str]
) -> tuple[Steps, list[str], npt.NDArray[Any], Any]:
    """Steps, columns, values ``[k, n]``, and where there is one, bool ``[k, n]``; None if everywhere."""
    if kind is not None:
        columns = record.names(kind)
        if not columns:
            raise ValueError(f"export: there are no rows of kind {kind!r} in {record!r}. See run.kinds().")
        steps, rows = record.rows(kind)
        return steps, columns, rows, None
    steps = record.steps
    values = np.full((len(steps), len(names)), np.nan)
    there = np.zeros(values.shape, bool)
    for column, name in enumerate(names):
        at, series = record.scalar(name)
        where = np.searchsorted(steps, at)
        values[where, column] = series
        there[where, column] = True
    return steps, names, values, there


def to_csv(record: Record, path: str | os.PathLike[str], kind: str | None, names: list[str]) -> None:
    """See `Run.to_csv`."""
    steps, columns, values, there = table(record, kind, names)
    with open(path, "w", newline="", encoding="utf-8") as out:
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


def to_parquet(record: Record, path: str | os.PathLike[str], kind: str | None, names: list[str]) -> None:
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
    steps, columns, values, there = table(record, kind, names)
    arrays = [pyarrow.array(steps)]
    for column in range(len(columns)):
        mask = None if there is None else ~there[:, column]
        arrays.append(pyarrow.array(np.ascontiguousarray(values[:, column]), mask=mask, from_pandas=False))
    whole = pyarrow.Table.from_arrays(arrays, names=["step", *columns])
    parquet.write_table(whole, os.fspath(path))
