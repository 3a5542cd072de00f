"""Where the numbers of a monitored run can be sent: logging, JSON lines, TensorBoard, W&B, MLflow, your own.

A sink has one method. It is called on the loop's thread with numbers that the host has already.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from gradkern.monitor.ledger import Step

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("gradkern")

# What is shown on one line of a log; the rest is for charts.
_SHOWN: Final = (
    "loss",
    "lr",
    "grad/norm",
    "grad/norm_clipped",
    "grad/clip_coef",
    "grad/nonfinite",
    "grad/skipped",
)


class Sink(Protocol):
    """Takes the numbers of a step.

    Names: ``loss``, ``lr``, ``grad/norm`` (before clipping), ``grad/norm_clipped``, ``grad/clip_coef``,
    ``grad/clipped_fraction`` (of the steps since the last call), ``grad/nonfinite`` (NaN and Inf elements
    since then), ``grad/skipped`` (steps since then), and where asked for, ``grad_norm/<parameter>``. Numbers
    are means of the finite values since the last call. The first step since then on which one is NaN or Inf
    is written by itself, as it is; at the end of a window, its NaN and Inf take the place of the means. What
    is left when the monitor is closed is written then.

    A method ``close()``, if there is one, is called when the monitor is closed.
    """

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers up to `step`."""
        ...


class LogSink:
    """Writes a line to Python's `logging`, which shows it only where it is set up for `level`.

    Python by itself shows warnings and errors; `logging.basicConfig(level=logging.INFO)` shows these too.

    >>> import logging
    >>> from gradkern.monitor import LogSink
    >>> LogSink(level=logging.DEBUG).write(3, {"loss": 0.25, "grad/norm": 1.5})
    """

    def __init__(self, logger: str = "gradkern", level: int = logging.INFO) -> None:
        self._log = logging.getLogger(logger)
        self._level = level

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Sink.write`."""
        if self._log.isEnabledFor(self._level):
            shown = ", ".join(
                f"{name.removeprefix('grad/').replace('_', ' ')} {values[name]:.4g}"
                for name in _SHOWN
                if name in values
            )
            self._log.log(self._level, "step %d: %s", step, shown)


class JsonLinesSink:
    """Appends a JSON object per line: ``{"step": 3, "grad/norm": 1.5}``.

    NaN and Inf, which JSON has no numbers for, become the words "nan", "inf" and "-inf".

    Args:
        path: of the file; it and its directory are made if they are not there, else it is appended to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"JsonLinesSink: path must be text or a path, got {type(path).__name__}.")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Sink.write`."""
        plain: dict[str, Any] = {
            name: value if math.isfinite(value) else str(float(value)) for name, value in values.items()
        }
        self._file.write(json.dumps({"step": step, **plain}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Writes scalars with a `SummaryWriter` of `torch.utils.tensorboard`.

    Args:
        writer: a writer, or the directory for a new one, which needs the package `tensorboard`.
    """

    def __init__(self, writer: SummaryWriter | str | os.PathLike[str]) -> None:
        if isinstance(writer, (str, os.PathLike)):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(_missing("TensorBoardSink", "tensorboard")) from error
            writer = SummaryWriter(str(writer))
        self._writer = writer

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Sink.write`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what waits."""
        self._writer.flush()


class WandbSink:
    """Logs to a run of Weights & Biases.

    The step is among the values (``gradkern/step``) and their x axis; loss and learning rate are called
    ``gradkern/loss`` and ``gradkern/lr`` beside your own. Values go into the row that your next `run.log`
    ends, so that the steps W&B counts stay yours. Only where none came since the last call, a row is ended.

    Args:
        run: what `wandb.init` gave; by default the run that is active.
    """

    def __init__(self, run: Any = None) -> None:
        if run is None:
            try:
                run = importlib.import_module("wandb").run
            except ImportError as error:
                raise ImportError(_missing("WandbSink", "wandb")) from error
        if run is None:
            raise ValueError("WandbSink: no run is active. Call wandb.init() first, or pass a run.")
        self._run = run
        self._row: int | None = -1  # the row of W&B that our latest values are in
        for pattern in ("gradkern/loss", "gradkern/lr", "grad/*", "grad_norm/*"):
            run.define_metric(pattern, step_metric="gradkern/step")

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Sink.write`."""
        if self._row == self._open_row():
            # They would take the place of those before.
            self._run.log({}, commit=True)
        named = {name if "/" in name else f"gradkern/{name}": value for name, value in values.items()}
        self._run.log({"gradkern/step": step, **named}, commit=False)
        self._row = self._open_row()

    def _open_row(self) -> int | None:
        # `run.step` would ask another process and wait for its answer. Unknown, every call gets a row.
        row: int | None = getattr(self._run, "_local_step", None)
        return row


class MlflowSink:
    """Logs metrics to MLflow.

    MLflow takes no ``[`` or ``]`` in names: they become ``(`` and ``)``.

    Args:
        run_id: of the run; by default the active one, or one that MLflow begins.
        client: a `MlflowClient`; by default a new one.
    """

    def __init__(self, run_id: str | None = None, client: Any = None) -> None:
        try:
            mlflow = importlib.import_module("mlflow")
        except ImportError as error:
            raise ImportError(_missing("MlflowSink", "mlflow")) from error
        self._metric = mlflow.entities.Metric
        self._client = client or mlflow.MlflowClient()
        self._run_id = run_id or (mlflow.active_run() or mlflow.start_run()).info.run_id

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `Sink.write`."""
        now = int(1000 * time.time())
        metrics = [
            self._metric(name.replace("[", "(").replace("]", ")"), value, now, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics, synchronous=False)


class Outlet:
    """Calls sinks at a bounded rate, and leaves out those that fail.

    Args:
        sinks: to be called. TypeError if one cannot be.
        every: steps between two calls.
        per_tensor: whether the norm of every gradient is sent too.
    """

    def __init__(self, sinks: Sequence[Sink], every: int, per_tensor: bool) -> None:
        if callable(getattr(sinks, "write", None)) or not isinstance(sinks, Iterable):
            raise TypeError(f"Monitor: sinks must be a list of sinks, got {sinks!r}. Pass sinks=[...].")
        for sink in sinks:
            if isinstance(sink, type) or not callable(getattr(sink, "write", None)):
                raise TypeError(f"Monitor: a sink needs a method write(step, values), got {sink!r}.")
        self._sinks, self._every, self._per_tensor = list(sinks), every, per_tensor
        self._window = Window()
        self._last: tuple[Step, Sequence[str]] | None = None
        self._bad_at: int | None = None  # the first step since the last call with NaN or Inf

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def tell(self, step: Step, names: Sequence[str]) -> None:
        """Take a step; call the sinks if it is time. `names`: of the parameters."""
        self._last = step, names
        self._window.add(step.scalars)
        is_bad = any(
            not math.isfinite(step.scalars.get(name, 0.0))
            for name in ("loss", "grad_norm", "grad_clipped_norm")
        )
        is_first = is_bad and self._bad_at is None
        if is_first:
            self._bad_at = step.number
        if (step.number + 1) % self._every == 0:
            self._write_window(step, names)
        elif is_first:
            self._write(step, names, _values_of(step))

    def _write_window(self, step: Step, names: Sequence[str]) -> None:
        """Write the means of a window that ends with `step`."""
        values = self._window.take()
        if self._bad_at == step.number:
            values.update((name, v) for name, v in _values_of(step).items() if not math.isfinite(v))
        self._bad_at = None
        if values:
            self._write(step, names, values)

    def _write(self, step: Step, names: Sequence[str], values: dict[str, float]) -> None:
        if self._per_tensor and step.rows is not None:
            columns = range(len(step.rows)) if step.columns is None else step.columns
            for row, column in zip(step.rows.tolist(), columns, strict=True):
                norm = math.nan if row[2] > 0 else math.inf if row[3] > 0 else math.sqrt(row[0])
                if column >= 0:
                    values[f"grad_norm/{names[column]}"] = norm
        for sink in list(self._sinks):
            try:
                sink.write(step.number, dict(values))
            except Exception as error:
                self._sinks.remove(sink)
                log.warning(
                    "gradkern: %s failed and is not written to any more: %s: %s",
                    type(sink).__name__,
                    type(error).__name__,
                    error,
                )

    def close(self) -> None:
        """Write what is left, and close the sinks that can be closed."""
        if self._last is not None:
            self._write_window(*self._last)
            self._last = None
        for sink in self._sinks:
            close = getattr(sink, "close", None)
            if callable(close):
                try:
                    close()
                except Exception as error:
                    log.warning("gradkern: closing %s failed: %s", type(sink).__name__, error)


class Window:
    """Sums up the scalars of the steps between two calls of the sinks."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, scalars: Mapping[str, float]) -> None:
        """Take the scalars of a step, under the names of the record."""
        for name, value in scalars.items():
            self._values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """The numbers for the sinks, under their names. Begins anew."""
        values, self._values = self._values, {}
        found = {}
        for name, target in _MEANS.items():
            if name in values:
                found[target] = _mean(values[name])
        if "clip_coef" in values:
            coefs = values["clip_coef"]
            found["grad/clipped_fraction"] = sum(coef < 1 for coef in coefs) / len(coefs)
        for name, target in _SUMS.items():
            if name in values:
                found[target] = sum(values[name])
        return found


_MEANS: Final = {
    "loss": "loss",
    "lr": "lr",
    "grad_norm": "grad/norm",
    "grad_clipped_norm": "grad/norm_clipped",
    "clip_coef": "grad/clip_coef",
}
_SUMS: Final = {"nonfinite_count": "grad/nonfinite", "skipped": "grad/skipped"}


def _values_of(step: Step) -> dict[str, float]:
    """The numbers of one step, as they are."""
    window = Window()
    window.add(step.scalars)
    return window.take()


def _mean(values: list[float]) -> float:
    """Of the finite values; of none of them finite, the last one."""
    finite = [value for value in values if math.isfinite(value)]
    # Rounded, the mean of equal values need not be among them.
    return min(max(math.fsum(finite) / len(finite), min(finite)), max(finite)) if finite else values[-1]


def _missing(sink: str, package: str) -> str:
    return f"{sink} needs {package}, which is not installed. Install it: pip install 'gradkern[{package}]'."
