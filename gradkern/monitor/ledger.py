"""From numbers on the host to the record: steps are kept for a moment and put into it in blocks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from gradkern.monitor.hooks import ACT_KINDS, GRAD_KINDS, unit_numbers
from gradkern.monitor.host import Floats, Parcel
from gradkern.record import MemoryRecord, Recorder, Writer

# Steps that are put into the record at once, and the longest time that any waits for it: with the half second
# of the writer a killed process loses less than a second.
BLOCK: Final = 32
BLOCK_SECONDS: Final = 0.4

GRAD_ROWS: Final = ("grad_norm", "grad_abs_max")
GRAD_COUNTS: Final = ("grad_nan", "grad_inf", "grad_zero")
WEIGHT_ROWS: Final = ("weight_norm", "weight_abs_max", "weight_nan", "weight_inf")
UPDATE_ROWS: Final = ("update_norm", "update_stderr")


class Step:
    """What is known of a step, on its way to the record."""

    parcel: Parcel | None = None
    kept: Any = None  # rows on the host that nobody has looked at yet
    rows: Floats | None = None
    total: Sequence[float] | None = None
    columns: list[int] | None = None  # where the rows belong, None for all in order
    ran: bool | None = None  # whether the optimizer was called, None if nobody knows
    # How gradients on the host were clipped; and their norm before that, where somebody else has done it.
    coef: float | None = None
    bound: float = math.inf
    propagates = False
    norm_before: float | None = None

    def __init__(self, number: int) -> None:
        self.number = number
        self.scalars: dict[str, float] = {}
        self.times: dict[str, Any] = {}

    @property
    def is_there(self) -> bool:
        """Whether all its numbers are on the host."""
        seen: Parcel | None = self.times.get("activations")
        return (self.parcel is None or self.parcel.is_there) and (seen is None or seen.is_there)


class Ledger:
    """Puts steps into the history in memory and, if there is one, into the file.

    Args:
        record: the history in memory.
        writer: of the file.
        weights_every: the share of zeros in the gradients is recorded this often.

    Attributes:
        names: of the parameters, in the order of the rows; places: the position of each.
        numels: elements of each parameter.
        kinds: names of the columns of every kind so far.
        meta: the description of the run so far.
    """

    def __init__(self, record: MemoryRecord, writer: Writer | None, weights_every: int) -> None:
        self.record = record
        self._writer = writer
        self._recorders: list[Recorder] = [record] if writer is None else [record, writer]
        self._weights_every = weights_every
        self.names: list[str] = []
        self.places: dict[str, int] = {}
        self.numels: Floats = np.empty(0)
        self.kinds: dict[str, list[str]] = {}
        self.meta: dict[str, Any] = {}
        self._block: list[Step] = []
        self._flushed_at = time.perf_counter()

    def add(self, step: Step) -> None:
        """Keep a step until the next `flush`."""
        self._block.append(step)

    def is_due(self, coming: int) -> bool:
        """Whether it is time to flush what is here, and as many steps that are `coming`."""
        waiting = len(self._block) + coming
        return waiting >= BLOCK or time.perf_counter() - self._flushed_at > BLOCK_SECONDS

    def set_parameters(self, names: Sequence[str], numels: Sequence[int]) -> None:
        """The parameters from now on. To be flushed before."""
        self.names = list(names)
        self.places = {name: place for place, name in enumerate(names)}
        self.numels = np.array([max(numel, 1) for numel in numels], np.float64)

    def flush(self) -> None:
        """Put the waiting steps into the record, and into the file."""
        block, self._block = self._block, []
        self._flushed_at = time.perf_counter()
        if self._writer is not None:
            for step in block:
                self._writer.put_scalars(step.number, step.scalars)
        for name in dict.fromkeys(name for step in block for name in step.scalars):
            found = [(step.number, step.scalars[name]) for step in block if name in step.scalars]
            numbers, values = zip(*found, strict=True)
            self.record.put_scalar_block(name, np.array(numbers), np.array(values, np.float64))
        with_rows = [step for step in block if step.rows is not None]
        if with_rows:
            self._put_gradients(with_rows)
        for step in block:
            if step.times:
                self._put_slow(step)

    def _put_gradients(self, steps: list[Step]) -> None:
        width = len(self.names)
        rows = np.full((len(steps), width, 5), np.nan)
        for place, step in enumerate(steps):
            assert step.rows is not None
            if step.columns is None:
                rows[place] = step.rows
            else:
                kept = [column for column in step.columns if column >= 0]
                rows[place, kept] = (
                    step.rows
                    if len(kept) == len(step.columns)
                    else step.rows[[row for row, column in enumerate(step.columns) if column >= 0]]
                )
        numbers = np.array([step.number for step in steps])
        table = np.stack([np.sqrt(rows[:, :, 0]), rows[:, :, 1]])
        for kind, values in zip(GRAD_ROWS, table, strict=True):
            self.record.put_row_block(kind, numbers, values)
        for place, step in enumerate(steps):
            if self._writer is not None:
                self._writer.put_table(GRAD_ROWS, step.number, table[:, place])
            # Counts are kept where there are any; the share of zeros is looked at as often as the weights.
            if step.scalars["nonfinite_count"] > 0:
                self.put_row("grad_nan", step.number, rows[place, :, 2])
                self.put_row("grad_inf", step.number, rows[place, :, 3])
            if step.number % self._weights_every == 0:
                self.put_row("grad_zero", step.number, rows[place, :, 4] / self.numels)

    def _put_slow(self, step: Step) -> None:
        times = step.times
        weights = times.get("weights")
        if weights is not None and len(weights) == len(self.kinds["weight_norm"]):
            table = weights[:, :4].T.copy()
            np.sqrt(table[0], out=table[0])
            self._put_table(WEIGHT_ROWS, step.number, table)
        updates = times.get("updates")
        if updates is not None and len(updates) == len(self.kinds["update_norm"]):
            self._put_table(UPDATE_ROWS, step.number, updates.T)
        if "exponents" in times:
            self.set_names("exponents", times["exponent_names"])
            for recorder in self._recorders:
                recorder.put_exponents(step.number, times["exponents"])
        if "activations" in times:
            # The scale is not known before the first step that its GradScaler does not skip.
            unknown = math.nan if step.scalars.get("skipped") and step.ran is False else 1.0
            scale = step.scalars.get("loss_scale", unknown)
            self._put_activations(step.number, times["activations"].open(), scale)

    def _put_activations(self, number: int, found: dict[str, Floats], scale: float) -> None:
        columns: dict[str, dict[str, float]] = {kind: {} for kind in (*ACT_KINDS, *GRAD_KINDS)}
        for key, value in found.items():
            what, _, path = key.partition("/")
            if what == "act":
                columns["act_nonfinite"][path] = float(value[2] + value[3])
                columns["act_abs_max"][path] = float(value[1])
            elif what == "out" and scale == scale:
                for kind, number_of in zip(GRAD_KINDS, unit_numbers(value / scale), strict=True):
                    columns[kind][path] = number_of
            elif what != "out":
                columns[what][path] = float(value)
        order = {module["name"]: module["order"] for module in self.meta.get("modules", [])}
        for kind, by_module in columns.items():
            if not by_module:
                continue
            known = self.kinds.get(kind, [])
            if not by_module.keys() <= set(known):
                names = sorted({*known, *by_module}, key=lambda name: order.get(name, len(order)))
                self.set_names(kind, names)
            self.put_row(kind, number, [by_module.get(name, math.nan) for name in self.kinds[kind]])

    def _put_table(self, kinds: Sequence[str], number: int, values: Floats) -> None:
        for recorder in self._recorders:
            recorder.put_table(kinds, number, values)

    def put_row(self, kind: str, number: int, values: Any) -> None:
        """A row of a kind whose names are set."""
        for recorder in self._recorders:
            recorder.put_rows(kind, number, values)

    def set_names(self, kind: str, names: list[str]) -> None:
        """Name the columns of a kind; nothing happens if they are named so already."""
        if self.kinds.get(kind) != names:
            self.kinds[kind] = list(names)
            for recorder in self._recorders:
                recorder.set_names(kind, names)

    def set_meta(self, meta: Mapping[str, Any]) -> None:
        """Set entries of the description of the run."""
        self.meta.update(meta)
        for recorder in self._recorders:
            recorder.set_meta(meta)

    def event(self, number: int, kind: str, detail: Mapping[str, Any]) -> None:
        """Something that happened at a step."""
        for recorder in self._recorders:
            recorder.put_event(number, kind, detail)
