"""Numbers reach each sink under their names, at the rate asked for, with NaN and Inf shown."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradkern
from gradkern.monitor import JsonLinesSink, LogSink, MlflowSink, Monitor, Sink, TensorBoardSink, WandbSink
from gradkern.monitor.sinks import Outlet, Window


class Kept:
    """What users write in five lines."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, values: dict[str, float]) -> None:
        self.calls.append((step, values))


def run(
    sinks: list[Sink], steps: int = 20, spoil: Callable[[int], float] = lambda step: 1.0, **settings: Any
) -> None:
    """Gradients of norm 2 before and 1 after clipping, times `spoil`; losses 0, 1, 2, ..."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Monitor(model, optimizer, sinks=sinks, **settings) as monitor:
        for step in range(steps):
            model.weight.grad = torch.full((1, 1), 2.0 * spoil(step))
            stats = gradkern.clip_(model.named_parameters(), 1.0)
            monitor.step(step * spoil(step), stats)


def test_a_sink_is_called_at_its_rate_and_no_more() -> None:
    sink = Kept()
    run([sink], 20, sink_every=10)
    assert [step for step, _ in sink.calls] == [9, 19]


def test_what_is_left_is_written_at_the_end() -> None:
    sink = Kept()
    run([sink], 25, sink_every=10)
    assert [(step, values["loss"]) for step, values in sink.calls] == [(9, 4.5), (19, 14.5), (24, 22.0)]


def test_a_monitor_that_saw_nothing_writes_nothing() -> None:
    sink = Kept()
    run([sink], 0)
    assert sink.calls == []


def test_names_and_numbers_are_those_promised() -> None:
    sink = Kept()
    run([sink], 10, per_tensor=True)
    assert sink.calls[0][1] == {
        "loss": 4.5,
        "lr": 0.5,
        "grad/norm": 2.0,
        "grad/norm_clipped": 1.0,
        "grad/clip_coef": 0.5,
        "grad/clipped_fraction": 1.0,
        "grad/nonfinite": 0.0,
        "grad_norm/weight": 2.0,
    }


def test_one_inf_is_shown_and_poisons_no_average() -> None:
    sink = Kept()
    run([sink], 10, lambda step: math.inf if step == 4 else 1.0)
    (shown_at, shown), (averaged_at, averaged) = sink.calls
    assert (shown_at, shown["grad/norm"], shown["loss"]) == (4, math.inf, math.inf)
    assert (averaged_at, averaged["grad/norm"], averaged["grad/nonfinite"]) == (9, 2.0, 1.0)
    assert averaged["loss"] == pytest.approx(41 / 9)


def test_a_stretch_without_a_finite_number_is_shown_as_it_is() -> None:
    sink = Kept()
    run([sink], 10, lambda step: math.nan)
    assert [step for step, _ in sink.calls] == [0, 9]
    assert math.isnan(sink.calls[1][1]["grad/norm"])


def test_a_nan_at_the_end_of_a_window_takes_the_place_of_the_means() -> None:
    sink = Kept()
    run([sink], 10, lambda step: math.nan if step == 9 else 1.0)
    ((at, values),) = sink.calls
    assert at == 9
    assert math.isnan(values["grad/norm"])
    assert math.isnan(values["loss"])
    assert values["lr"] == 0.5


def test_a_nan_at_the_very_end_is_not_averaged_away() -> None:
    sink = Kept()
    run([sink], 13, lambda step: math.nan if step == 12 else 1.0)
    assert [step for step, _ in sink.calls] == [9, 12, 12]
    assert all(math.isnan(values["grad/norm"]) for _, values in sink.calls[1:])


@pytest.mark.parametrize("value", [0.01, 0.1, 1e-5, 0.3])
def test_the_mean_of_a_constant_is_that_constant(value: float) -> None:
    window = Window()
    for _ in range(10):
        window.add({"lr": value})
    assert window.take() == {"lr": value}


def test_skipped_steps_are_counted() -> None:
    window = Window()
    for skipped in (0.0, 1.0, 1.0):
        window.add({"skipped": skipped})
    assert window.take() == {"grad/skipped": 2.0}
    assert window.take() == {}


def test_a_sink_that_fails_is_left_out_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def write(self, step: int, values: dict[str, float]) -> None:
            raise OSError("no space")

    sink = Kept()
    run([Broken(), sink], 20)
    assert len(sink.calls) == 2
    assert caplog.text.count("Broken failed and is not written to any more: OSError: no space") == 1


def test_the_log_gets_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mine"):
        run([LogSink("mine")], 10)
    assert [record.getMessage() for record in caplog.records if record.name == "mine"] == [
        "step 9: loss 4.5, lr 0.5, norm 2, norm clipped 1, clip coef 0.5, nonfinite 0"
    ]


def test_json_lines_are_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    run([JsonLinesSink(tmp_path / "run.jsonl")], 10, lambda step: math.nan if step == 0 else 1.0)
    lines = (tmp_path / "run.jsonl").read_text().splitlines()

    def refuse(word: str) -> None:
        raise ValueError(word)

    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["step"], first["grad/norm"]) == (0, "nan")
    assert (second["step"], second["grad/norm"]) == (9, 2.0)


def test_the_directory_of_json_lines_is_made(tmp_path: Path) -> None:
    run([JsonLinesSink(tmp_path / "runs" / "today" / "run.jsonl")], 10)
    assert len((tmp_path / "runs" / "today" / "run.jsonl").read_text().splitlines()) == 1


def test_json_lines_without_a_path_are_refused() -> None:
    with pytest.raises(TypeError, match=r"JsonLinesSink: path must be text or a path, got NoneType\."):
        JsonLinesSink(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("sinks", [LogSink(), 3])
def test_what_is_no_list_of_sinks_is_refused(sinks: object) -> None:
    with pytest.raises(
        TypeError, match=r"Monitor: sinks must be a list of sinks, got .*\. Pass sinks=\[...\]"
    ):
        Outlet(sinks, 10, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("sink", [LogSink, print])
def test_what_is_no_sink_is_refused(sink: object) -> None:
    with pytest.raises(TypeError, match=r"Monitor: a sink needs a method write\(step, values\), got "):
        Outlet([sink], 10, False)  # type: ignore[list-item]


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra gradkern[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run([TensorBoardSink(tmp_path)], 20)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("grad/norm")] == [(9, 2.0), (19, 2.0)]


class Rows:
    """A run of W&B as far as rows are concerned: one is open, `log` adds to it and, by default, ends it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._open: dict[str, Any] = {}
        self._local_step = 0

    def define_metric(self, name: str, step_metric: str) -> None:
        pass

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        if step is not None:
            assert step >= self._local_step  # else W&B drops the data
            if step > self._local_step:
                self.end()
                self._local_step = step
        self._open.update(data)
        if commit or (step is None and commit is None):
            self.end()
            self._local_step += 1

    def end(self) -> None:
        if self._open:
            self.rows.append({"_step": self._local_step, **self._open})
        self._open = {}


def test_wandb_does_not_shift_the_steps_of_the_rest_of_the_run() -> None:
    rows = Rows()
    sink = WandbSink(rows)
    for step in range(40):
        if step % 10 == 9:
            sink.write(step, {"loss": 0.5})
        rows.log({"loss": step})
    assert [row["loss"] for row in rows.rows] == list(range(40))
    assert [row["_step"] for row in rows.rows] == list(range(40))
    assert [row["gradkern/step"] for row in rows.rows if "gradkern/loss" in row] == [9, 19, 29, 39]


@pytest.mark.parametrize("first", ["sinks", "user"])
def test_wandb_leaves_steps_that_are_given_alone(first: str) -> None:
    rows = Rows()
    sinks = [WandbSink(rows), WandbSink(rows)]
    for step in range(40):
        if first == "user":
            rows.log({"loss": step}, step=step)
        for number, sink in enumerate(sinks):
            sink.write(step, {f"grad/{number}": step})
        if first == "sinks":
            rows.log({"loss": step}, step=step)
    rows.end()
    assert [(row["_step"], row["loss"]) for row in rows.rows if "loss" in row] == [(i, i) for i in range(40)]
    for number in range(2):
        assert [row[f"grad/{number}"] for row in rows.rows if f"grad/{number}" in row] == list(range(40))


def test_wandb_keeps_every_call_where_nothing_else_is_logged() -> None:
    rows = Rows()
    sink = WandbSink(rows)
    for step in range(5):
        sink.write(step, {"grad/norm": step})
    rows.end()
    assert [row["grad/norm"] for row in rows.rows] == list(range(5))


def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra gradkern[wandb]")
    monkeypatch.setenv("WANDB_SILENT", "true")
    offline = wandb.init(mode="offline", dir=str(tmp_path), project="test")
    run([WandbSink()], 20)
    offline.log({})  # ends the row that the last values are in
    assert offline.summary["grad/norm"] == 2.0
    assert offline.summary["gradkern/step"] == 19
    offline.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_without_a_run_says_what_to_do() -> None:
    pytest.importorskip("wandb", reason="needs the extra gradkern[wandb]")
    with pytest.raises(ValueError, match=r"Call wandb.init\(\) first"):
        WandbSink()


def test_mlflow_reads_back_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra gradkern[mlflow]")
    monkeypatch.setitem(os.environ, "MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as active:
        run([MlflowSink()], 20)
        mlflow.flush_async_logging()
    history = mlflow.MlflowClient().get_metric_history(active.info.run_id, "grad/norm")
    assert [(metric.step, metric.value) for metric in history] == [(9, 2.0), (19, 2.0)]


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda path: TensorBoardSink(path), "tensorboard"),
        (lambda path: WandbSink(), "wandb"),
        (lambda path: MlflowSink(), "mlflow"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    make: Callable[[Path], Sink], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.delitem(__import__("sys").modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'gradkern\[{package}\]'"):
        make(tmp_path)
