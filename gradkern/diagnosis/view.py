"""A record as the detectors look at it: the same interface, read once, and what several of them work out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gradkern.diagnosis import series
from gradkern.diagnosis.series import Floats
from gradkern.record.schema import Exponents, Record, Rows, Steps, Values

T = TypeVar("T")
N = TypeVar("N", bound=np.generic)


@dataclass(frozen=True)
class Parameter:
    """What the record says about a parameter."""

    name: str
    numel: int
    ndim: int
    rows: int
    dtype: str
    module: str
    role: str
    requires_grad: bool


@dataclass(frozen=True)
class Module:
    """What the record says about a module; `order` counts in the first forward pass."""

    name: str
    type: str
    order: int
    branch: str | None


class View:
    """A `Record` that reads another one lazily and once. Not to be kept while the other one is written.

    Args:
        record: the other one.
        until: the last step that is read of it; None for all.
    """

    def __init__(self, record: Record, until: int | None = None) -> None:
        self._record = record
        self._until = until
        self._kept: dict[object, Any] = {}

    @staticmethod
    def of(record: Record) -> View:
        """`record` itself if it is a view, else a new view of it."""
        return record if isinstance(record, View) else View(record)

    def kept(self, key: object, make: Callable[[], T]) -> T:
        """What `make` gave when first asked under `key`."""
        if key not in self._kept:
            self._kept[key] = make()
        value: T = self._kept[key]
        return value

    @property
    def steps(self) -> Steps:
        """See `Record.steps`."""
        return self.kept("steps", lambda: self._cut(self._record.steps, self._record.steps)[0])

    def scalar(self, name: str) -> tuple[Steps, Values]:
        """See `Record.scalar`."""
        return self.kept(("scalar", name), lambda: self._cut(*self._record.scalar(name)))

    def scalar_names(self) -> list[str]:
        """See `Record.scalar_names`."""
        return self.kept("scalar_names", self._record.scalar_names)

    def kinds(self) -> list[str]:
        """See `Record.kinds`."""
        return self.kept("kinds", self._record.kinds)

    def rows(self, kind: str) -> tuple[Steps, Rows]:
        """See `Record.rows`."""
        return self.kept(("rows", kind), lambda: self._cut(*self._record.rows(kind)))

    def names(self, kind: str) -> list[str]:
        """See `Record.names`."""
        return self.kept(("names", kind), lambda: self._record.names(kind))

    def exponents(self) -> tuple[Steps, Exponents]:
        """See `Record.exponents`."""
        return self.kept("exponents", lambda: self._cut(*self._record.exponents()))

    @property
    def meta(self) -> dict[str, Any]:
        """See `Record.meta`."""
        return self.kept("meta", lambda: self._record.meta)

    @property
    def events(self) -> list[dict[str, Any]]:
        """See `Record.events`."""
        return self.kept("events", self._events)

    def _events(self) -> list[dict[str, Any]]:
        until = math.inf if self._until is None else self._until
        return [event for event in self._record.events if event["step"] <= until]

    def _cut(self, steps: Steps, values: npt.NDArray[N]) -> tuple[Steps, npt.NDArray[N]]:
        if self._until is None:
            return steps, values
        end = int(np.searchsorted(steps, self._until, "right"))
        return steps[:end], values[:end]

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters by name. Of one that the record does not describe, only the name is known."""
        return self.kept("parameters", self._parameters)

    def _parameters(self) -> dict[str, Parameter]:
        found = {}
        for entry in self.meta.get("parameters") or []:
            shape = [int(size) for size in entry.get("shape") or []]
            found[str(entry["name"])] = Parameter(
                name=str(entry["name"]),
                numel=math.prod(shape),
                ndim=len(shape),
                rows=shape[0] if shape else 0,
                dtype=str(entry.get("dtype", "")).removeprefix("torch."),
                module=str(entry.get("module", str(entry["name"]).rpartition(".")[0])),
                role=str(entry.get("role", "weight" if len(shape) > 1 else "bias")),
                requires_grad=bool(entry.get("requires_grad", True)),
            )
        for kind in (
            "grad_norm",
            "grad_nan",
            "grad_inf",
            "weight_norm",
            "weight_nan",
            "weight_inf",
            "update_norm",
        ):
            for name in self.names(kind):
                found.setdefault(name, _guess(name))
        return found

    @property
    def modules(self) -> list[Module]:
        """The modules in forward order."""
        return self.kept("modules", self._modules)

    def _modules(self) -> list[Module]:
        found = [
            Module(
                name=str(entry["name"]),
                type=str(entry.get("type", "")),
                order=int(entry["order"]),
                branch=None if entry.get("branch") is None else str(entry["branch"]),
            )
            for entry in self.meta.get("modules") or []
            if entry.get("order") is not None
        ]
        return sorted(found, key=lambda module: module.order)

    @property
    def optimizer(self) -> dict[str, Any]:
        """What the record says about the optimizer."""
        return dict(self.meta.get("optimizer") or {})

    @property
    def has_start(self) -> bool:
        """Whether the record goes back to the beginning of the run: what was learned before is not known."""
        steps, _ = self.scalar("loss")
        return len(steps) > 0 and int(steps[0]) <= 1 and not any(e["kind"] == "resumed" for e in self.events)

    def matrices(self, kind: str) -> list[int]:
        """Columns of `kind` that are weights with two dimensions or more: no biases, norms, embeddings."""
        names = self.names(kind)
        return [
            column
            for column, name in enumerate(names)
            if self.parameters[name].role in ("weight", "recurrent") and self.parameters[name].ndim != 1
        ]

    @property
    def update_ratios(self) -> tuple[Steps, Floats, list[str]]:
        """||update|| / ||weight|| of each weight matrix: steps ``[k]``, ratios ``[k, n]``, names ``[n]``.

        A weight that is 0, as some are at the start, has no ratio: NaN.
        """
        return self.kept("update_ratios", self._update_ratios)

    def _update_ratios(self) -> tuple[Steps, Floats, list[str]]:
        steps, updates = self.rows("update_norm")
        weight_steps, weights = self.rows("weight_norm")
        columns = self.matrices("update_norm")
        places = {name: column for column, name in enumerate(self.names("weight_norm"))}
        columns = [column for column in columns if self.names("update_norm")[column] in places]
        names = [self.names("update_norm")[column] for column in columns]
        if not len(steps) or not len(weight_steps) or not names:
            return steps[:0], np.empty((0, len(names))), names
        own = weights[:, [places[name] for name in names]].astype(np.float64)
        before = series.at(weight_steps, own, steps)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = updates[:, columns].astype(np.float64) / before
        ratios[~(before > 0)] = math.nan
        return steps, ratios, names

    @property
    def total_update_ratios(self) -> tuple[Steps, Floats]:
        """||update|| / ||weights|| of all weights together, where both are known.

        For SGD, where every step's learning rate and gradient norm are known, of every step: its update is
        their product, and that of rate, weight decay and weights, at a right angle to it. Momentum, which
        makes up to 1 / (1 - m) times of it, is in those that were measured only.
        """
        return self.kept("total_update_ratios", self._total_update_ratios)

    def _total_update_ratios(self) -> tuple[Steps, Floats]:
        steps, updates = self.scalar("update_norm")
        weight_steps, weights = self.scalar("weight_norm")
        if not len(weight_steps):
            return steps[:0], np.empty(0)
        if str(self.optimizer.get("type", "")) == "SGD":
            lr_steps, lr = self.scalar("lr")
            grad_steps, norms = self.scalar("grad_clipped_norm")
            if not len(grad_steps):
                grad_steps, norms = self.scalar("grad_finite_norm")
            if len(lr_steps) and len(grad_steps) > len(steps):
                decay = float(self.optimizer.get("weight_decay") or 0.0)
                decayed = decay * series.at(weight_steps, weights, grad_steps) if decay else 0.0
                estimates = np.hypot(norms, decayed) * series.at(lr_steps, lr, grad_steps)
                # With momentum what was measured is more.
                _, places, measured = np.intersect1d(grad_steps, steps, return_indices=True)
                estimates[places] = np.fmax(estimates[places], updates[measured])
                steps, updates = grad_steps, estimates
        before = series.at(weight_steps, weights, steps)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = updates / before
        ratios[~(before > 0)] = math.nan
        return steps, ratios


def _guess(name: str) -> Parameter:
    module, _, last = name.rpartition(".")
    role = "recurrent" if last.startswith("weight_hh") else "bias" if last.startswith("bias") else "weight"
    return Parameter(name, 0, 0, 0, "", module, role, True)
