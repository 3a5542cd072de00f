"""What a record of a training run holds: every name, its unit and its shape, and the two interfaces to it.

A record is written through `Recorder` and read through `Record`. `MemoryRecord` is both: the recent past of a
run that goes on, for the detectors. `Writer` keeps a run in a file and `Run` reads such a file.

Steps are whole numbers from 0, counted by whoever writes. They grow. A step that goes back (a run resumed
from an earlier checkpoint) takes everything recorded from that step on out of the record, and an event of
kind ``"resumed"`` says so: of two records of the same step the later one wins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Steps: TypeAlias = npt.NDArray[np.int64]
"""``[k]``, strictly growing."""

Values: TypeAlias = npt.NDArray[np.float64]
"""``[k]``, one value for each step. NaN and Inf are values like any other; steps without one are left out."""

Rows: TypeAlias = npt.NDArray[np.float32]
"""``[k, n]``, a row for each step, a column for each name. NaN where a name was not measured at that step."""

Exponents: TypeAlias = npt.NDArray[np.int32]
"""``[k, n, 64]``, a histogram for each step and name."""

EXPONENT_LABELS: Final = ("zero", "subnormal", "nonfinite", *(f"2^{exponent}" for exponent in range(-44, 17)))
"""What the columns of a histogram count, see `EXPONENTS`."""

EXPONENT_COLUMNS: Final = len(EXPONENT_LABELS)

SCALARS: Final[Mapping[str, str]] = {
    "loss": "the loss as it was handed in",
    "lr": "learning rate, the largest of the parameter groups",
    "grad_norm": "2-norm of all gradients before clipping as torch gives it: not finite if they are not",
    "grad_finite_norm": "2-norm of the finite elements of all gradients before clipping",
    "grad_clipped_norm": "2-norm of all gradients after clipping",
    "clip_coef": "what the gradients were multiplied by, 1 where nothing was clipped",
    "clip_threshold": "the largest norm that the clipper allowed",
    "skipped": "1 if the optimizer did not move, else 0",
    "loss_scale": "the scale of the GradScaler that the gradients were divided by",
    "nonfinite_count": "elements of the gradients that are NaN or Inf",
    "data_nonfinite": "elements of the batch, inputs and targets, that are NaN or Inf",
    "data_abs_max": "largest magnitude of the finite inputs of the batch",
    "target_abs_max": "largest magnitude of the finite targets of the batch",
    "data_std": "standard deviation of the finite inputs of the batch",
    "step_ms": "milliseconds from the last step to this one",
    "update_norm": "2-norm of what the optimizer added to all weights",
    "weight_norm": "2-norm of all weights",
}
"""Scalars, one value a step each, float64."""

KINDS: Final[Mapping[str, str]] = {
    "grad_norm": "2-norm of the finite elements of the gradient, before clipping",
    "grad_abs_max": "largest magnitude of the finite elements of the gradient, before clipping",
    "grad_nan": "NaN elements of the gradient, a count",
    "grad_inf": "Inf elements of the gradient, a count",
    "grad_zero": "share of the gradient's elements that are zero, 0 to 1",
    "weight_norm": "2-norm of the finite elements of the weight",
    "weight_abs_max": "largest magnitude of the finite elements of the weight",
    "weight_nan": "NaN elements of the weight, a count",
    "weight_inf": "Inf elements of the weight, a count",
    "update_norm": "2-norm of what the optimizer added to the weight; of a large one from a sample",
    "update_stderr": "standard error of `update_norm`, 0 where nothing was sampled",
    "act_dead": "share of the module's units that were zero for the whole batch, 0 to 1",
    "act_saturated": "share of the module's outputs in the flat part of its activation function, 0 to 1",
    "act_nonfinite": "NaN and Inf elements of the module's output, a count",
    "act_abs_max": "largest magnitude of the finite elements of the module's output",
    "out_grad_norm": "2-norm of the gradient of the unscaled loss by the module's output; Inf if any is NaN",
    "out_grad_unit_above_one": "share of the module's units whose gradient norm is above 1, 0 to 1",
    "out_grad_unit_max": "largest gradient norm of any of the module's units; Inf if one is NaN",
    "out_grad_unit_argmax": "index of that unit, the first one that is not finite; NaN if no unit is finite",
    "time_grad_norm": "2-norm of the gradient of the loss by the hidden state; a column for each time step",
}
"""Rows, float32: one value a step for each parameter, module (what begins with act_ or out_) or time step.

Finite values beyond the range of float32 are recorded as the largest float32: Inf means Inf. Counts are exact
up to 2**24.
"""

EXPONENTS: Final = "exponents"
"""The kind under which the names of `Record.exponents` are found. The 64 columns of a histogram are those of
csrc/core/exponents.h: elements that are zero, that are subnormal in their dtype, that are NaN or Inf; from
column 3 those whose floor(log2(abs(element))) is -44 or less, -43, and so on up to 16 or more. Of a gradient
with more than 65,536 elements a sample is counted."""

EVENTS: Final[Mapping[str, str]] = {
    "skip": "the optimizer was kept from moving",
    "amp_backoff": "a GradScaler found Inf or NaN, skipped the step and lowered its scale",
    "first_nonfinite": "where: data, forward, loss, backward, optimizer or unknown; name: of the tensor",
    "resumed": "from: the first step of the new part; until: the last step of the old part that it replaces, "
    "not there where it replaces nothing",
    "dropped": "count: records that could not be written; reason",
    "thinned": "kind, stride: from now on one row in `stride` steps is kept, to stay within `max_bytes`",
}
"""Kinds of events and what their details hold. Others may be added by whoever writes."""


class Record(Protocol):
    """A training run as the detectors see it. Reading changes nothing; arrays may be read-only views.

    What was never recorded is empty, not an error: a detector asks and looks at the length. A name that is
    neither one of `SCALARS` or `KINDS` nor in the record is a ValueError that lists those that are.
    """

    @property
    def steps(self) -> Steps:
        """Every step with at least one scalar, int64 ``[k]``, growing."""
        ...

    def scalar(self, name: str) -> tuple[Steps, Values]:
        """Steps int64 ``[k]`` and values float64 ``[k]`` of one of `SCALARS`, or of another name put in."""
        ...

    def scalar_names(self) -> list[str]:
        """Names of the scalars that were recorded."""
        ...

    def rows(self, kind: str) -> tuple[Steps, Rows]:
        """Steps int64 ``[k]`` and values float32 ``[k, n]`` of one of `KINDS`, columns as `names(kind)`."""
        ...

    def kinds(self) -> list[str]:
        """Kinds of the rows that were recorded."""
        ...

    def names(self, kind: str) -> list[str]:
        """Names of the columns of `rows(kind)`: of parameters, of modules, or time steps as text."""
        ...

    def exponents(self) -> tuple[Steps, Exponents]:
        """Steps int64 ``[k]`` and histograms int32 ``[k, n, 64]`` of the gradients ``names("exponents")``."""
        ...

    @property
    def meta(self) -> dict[str, Any]:
        """What does not change from step to step, as JSON has it.

        ``parameters``: a list of {name, shape, dtype, module, role ("weight", "bias", "recurrent",
        "embedding", "norm"), requires_grad}; ``modules``: a list of {name, type, order (position in the first
        forward pass), parent, branch (id of the chain it is in, None if parallel)}; ``optimizer``: {type, lr,
        eps, momentum, weight_decay, betas, fused}; ``clip``: {policy, threshold}; ``amp``: {enabled, dtype};
        ``torch``, ``gradkern``, ``python``: versions; ``loss``: {reduction}; ``seq``: {rnn modules}.
        """
        ...

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened, in the order it was put in: {step: int, kind: str, detail: dict}. See `EVENTS`."""
        ...


class Recorder(Protocol):
    """Where a run is recorded. Arrays and dictionaries handed in are copied and may be used again.

    No method waits for a file or a device. They raise `ValueError` for what can only be a mistake in the
    calling code (a row of the wrong length, a kind without names), and for nothing else.
    """

    def put_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars of a step. More of them may follow for the same step, also after later steps."""
        ...

    def put_rows(self, kind: str, step: int, values: npt.ArrayLike) -> None:
        """Record a row: ``[n]`` numbers, in the order of the names of `kind`, NaN where there is none."""
        ...

    def put_table(self, kinds: Sequence[str], step: int, values: npt.ArrayLike) -> None:
        """Record a row of each of `kinds` with the same number of names: ``[len(kinds), n]`` numbers.

        The same as a `put_rows` for each, and where it writes to a file less work for the caller.
        """
        ...

    def put_exponents(self, step: int, values: npt.ArrayLike) -> None:
        """Record histograms: whole numbers ``[n, 64]``, in the order of the names of kind ``"exponents"``."""
        ...

    def put_event(self, step: int, kind: str, detail: Mapping[str, Any] | None = None) -> None:
        """Record an event. The detail must be something that JSON can hold."""
        ...

    def set_meta(self, meta: Mapping[str, Any]) -> None:
        """Set entries of the record's `meta`; entries of other keys stay."""
        ...

    def set_names(self, kind: str, names: Sequence[str]) -> None:
        """Name the columns of a kind, before its first row.

        Called again with other names, the columns that are no longer written stay, behind the new ones.
        """
        ...


def resumed(first: int, last: int) -> dict[str, int]:
    """The detail of the event of a run that goes on at `first`, where `last` was the last step so far."""
    return {"from": first, "until": last} if first <= last else {"from": first}


def union(series: Iterable[Steps]) -> Steps:
    """Every step that is in any of `series`, growing. Fast where they are mostly the same."""
    result = np.empty(0, np.int64)
    for steps in series:
        if not np.array_equal(steps, result):
            result = np.union1d(result, steps)
    return result


def join(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """The columns of a kind whose names changed from `old` to `new`: all of `new`, then what only `old` had.

    >>> from gradkern.record.schema import join
    >>> join(["a", "b"], ["b", "c"])
    ['b', 'c', 'a']
    """
    known = set(new)
    return [*new, *(name for name in old if name not in known)]


def check_scalar(name: str, recorded: Sequence[str]) -> None:
    """ValueError for a name that is neither among `recorded` nor in `SCALARS`."""
    if name not in SCALARS and name not in recorded:
        raise ValueError(
            f"scalar: there is no scalar {name!r}. Recorded are: {', '.join(recorded) or 'none yet'}."
        )


def check_kind(kind: str, recorded: Sequence[str]) -> None:
    """ValueError for a kind of rows that is neither among `recorded` nor in `KINDS`."""
    if kind not in KINDS and kind not in recorded:
        other = "exponents()" if kind == EXPONENTS else "scalar(name)" if kind == "scalars" else ""
        raise ValueError(
            f"rows: there are no rows of kind {kind!r}. Recorded are: {', '.join(recorded) or 'none yet'}."
            + (f" Use {other} for these." if other else "")
        )


def as_row(kind: str, values: npt.ArrayLike, numel: int) -> Rows:
    """`values` as a new float32 ``[numel]`` in which only Inf is Inf. ValueError if the length is another."""
    given = np.asarray(values)
    if given.shape != (numel,):
        raise ValueError(
            f"put_rows: kind {kind!r} has {numel} names, got values of shape {list(given.shape)}. "
            f"Hand one value for each name, or set_names first."
        )
    if given.dtype == np.float32:
        row: Rows = given.copy()
        return row
    with np.errstate(over="ignore"):
        row = given.astype(np.float32)
    if np.isinf(row).any():
        overflown = np.isinf(row) & np.isfinite(given)
        row[overflown] = np.copysign(np.finfo(np.float32).max, given[overflown])
    return row


def as_table(kinds: Sequence[str], values: npt.ArrayLike, widths: Sequence[int]) -> npt.NDArray[Any]:
    """`values`, ``[len(kinds), n]``, as a new array. ValueError if the shape or a kind's width is another."""
    table = np.array(values)
    if table.ndim != 2 or len(table) != len(kinds) or any(width != table.shape[1] for width in widths):
        raise ValueError(
            f"put_table: kinds {list(kinds)} have {list(widths)} names, got values of shape "
            f"{list(table.shape)}. Hand a row for each kind, with one value for each of its names."
        )
    return table


def as_histograms(values: npt.ArrayLike, numel: int) -> Exponents:
    """`values` as a new int32 ``[numel, 64]``, saturated. ValueError if the shape is another."""
    given = np.asarray(values)
    if given.shape != (numel, EXPONENT_COLUMNS):
        raise ValueError(
            f"put_exponents: kind 'exponents' has {numel} names, got values of shape {list(given.shape)}. "
            f"Hand [{numel}, {EXPONENT_COLUMNS}] counts, or set_names('exponents', ...) first."
        )
    histograms: Exponents = np.minimum(given, np.iinfo(np.int32).max).astype(np.int32)
    return histograms


def check_names(kind: str, names: Sequence[str]) -> list[str]:
    """`names` as a list. ValueError if one is there twice."""
    listed = [str(name) for name in names]
    if len(set(listed)) != len(listed):
        twice = next(name for name in listed if listed.count(name) > 1)
        raise ValueError(f"set_names: {twice!r} names two columns of kind {kind!r}. Give each its own name.")
    return listed


def copied(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as it comes back from JSON. What JSON cannot hold becomes its `str`."""
    result: dict[str, Any] = json.loads(json.dumps(dict(value), default=str))
    return result
