"""Watches a training run: records it, recognises what goes wrong as it happens, and says why."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from gradkern import ops
from gradkern.clip import measure, measure_grads
from gradkern.diagnosis import Diagnosis, Finding, detect, diagnose
from gradkern.diagnosis.findings import SEVERITIES
from gradkern.diagnosis.view import View
from gradkern.monitor import actions, agreement, around
from gradkern.monitor.actions import Action, ClipThreshold, TrainingStopped
from gradkern.monitor.exponents import histogram
from gradkern.monitor.hooks import Observer
from gradkern.monitor.host import Floats, Parcel, is_plain, kept
from gradkern.monitor.ledger import GRAD_COUNTS, GRAD_ROWS, UPDATE_ROWS, WEIGHT_ROWS, Ledger, Step
from gradkern.monitor.meta import check_model, clip_of, describe, parameters_of, tensors_in
from gradkern.monitor.probe import probe_time
from gradkern.monitor.reading import Reader, norm_of
from gradkern.monitor.replay import Replay
from gradkern.monitor.schedule import LAG, Schedule
from gradkern.monitor.sinks import Outlet, Sink
from gradkern.monitor.updates import UpdateSampler
from gradkern.params import Names
from gradkern.record import MemoryRecord, Record, Writer
from gradkern.stats import GradStats
from gradkern.stepper import Stepper
from gradkern.tracked import Tracked

if TYPE_CHECKING:
    from gradkern.clipper import Clipper

Loss: TypeAlias = Tensor | float
Batch: TypeAlias = Any

# The history in memory: 17 scalars of 16 bytes a step, 15 kinds of rows. All of it is looked at each time, in
# 20 to 40 ms. Half is the recent past, more than between two looks.
MAX_STEPS: Final = 3 << 11
MAX_ROW_BYTES: Final = 3 << 19

# A finite gradient can make weights that are not only if it is enormous: the square of a norm from which on
# every step is looked at before the optimizer makes it.
ALERT: Final = 1e12

# The file gets steps that take longer one by one: a block of them would wait for longer than `BLOCK_SECONDS`.
SLOW_MS: Final = 50.0

# What the arguments of `step` must be.
_WANTED: Final = {
    "loss": "one number, a tensor or a float",
    "stats": "what gradkern.clip_ or a Clipper gave, or the norm that torch gave: one number from 0 up",
    "batch": "tensors in tuples, lists or mappings",
    "scaler": "the torch.amp.GradScaler of the run",
}

# Monitors that watch. Of those that look at the same parameters the latest is the one that is meant.
_WATCHING: Final[weakref.WeakSet[Monitor]] = weakref.WeakSet()

# Keys of a batch given as a mapping that hold what is to be predicted.
_TARGETS: Final = frozenset({"target", "targets", "label", "labels", "y"})


class Monitor:
    """Records a training run and names what goes wrong in it. Changes no gradient and never stops the loop.

    Call `step` once per training step, after `optimizer.step()`; or `attach` it to the optimizer. Findings
    come up two steps after the numbers they rest on, so that nothing waits for the step in flight. If the
    monitor itself fails, it says so once and is quiet from then on. A new monitor of the same parameters
    closes the one before it; what is open when the process ends is closed then.

    Every step: loss, learning rate, clipping, and norm and largest magnitude of every gradient. Every
    `weights_every` steps: norms of the weights and of their updates (of a tensor with more than 65,536
    elements from a sample), and exponents of half-precision gradients. Every `activations_every` steps:
    activations and output gradients of every module, by hooks that are there for that step only. Code that
    runs under `torch.compile` has no activations.

    Args:
        model: a module. Names are those of its parameters and modules.
        optimizer: what steps it. With it, updates are taken around its step, gradients before it, and skips
            are seen.
        path: of a file for `gradkern.Run`; None records in memory only.
        every: record gradients of every so many steps.
        weights_every: the same for weights and updates.
        activations_every: the same for activations and output gradients; 0 for never.
        sinks: where numbers are sent. See `gradkern.monitor.Sink`.
        sink_every: steps between two calls of the sinks.
        per_tensor: send `grad_norm/<parameter>` to the sinks too.
        on: what to do about findings: {kind or severity: "log", "clip", "stop", or a function of the
            monitor and the finding}. Warnings and errors are logged by default. Under `torch.distributed` all
            ranks must be given the same: they exchange findings every 20 steps, and all do the same then.
        clipper: the `gradkern.Clipper` of this model, called by hand. Its statistics are taken, so that
            gradients are not measured twice. One that is attached to the optimizer is found without it.
        keep_batch: keep the batch of the last step (itself, no copy of it) and what that step began with, to
            `replay` it. One copy of parameters and buffers on their device, written over at the first forward
            pass of every step; a replay takes another one while it is open.
        max_bytes: of the file.
        name: what the lines that are logged begin with, to tell several monitors apart.
        first_step: the number of the first step, where a run goes on from a checkpoint. What the file at
            `path` holds from there on is replaced. None: behind the last step in the file, 0 in a new one.

    Raises:
        ValueError, TypeError: an argument is impossible, or the optimizer or the clipper is that of another
            model.
        OSError, RecordError: there can be no file at `path`.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> with gradkern.Monitor(model, optimizer) as monitor:
    ...     for step in range(3):
    ...         optimizer.zero_grad()
    ...         loss = model(torch.ones(4, 2)).square().sum() * (float("nan") if step == 2 else 1.0)
    ...         loss.backward()
    ...         optimizer.step()
    ...         monitor.step(loss)
    >>> [finding.step for finding in monitor.findings if finding.kind == "loss_nonfinite"]
    [2]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        every: int = 1,
        weights_every: int = 10,
        activations_every: int = 50,
        sinks: Sequence[Sink] = (),
        sink_every: int = 10,
        per_tensor: bool = False,
        on: Mapping[str, Action] | None = None,
        clipper: Clipper | None = None,
        keep_batch: bool = False,
        max_bytes: int = 1_000_000_000,
        name: str = "",
        first_step: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Monitor: model must be a torch.nn.Module, got {type(model).__name__}.")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"Monitor: optimizer must be one of torch's, got {type(optimizer).__name__}.")
        for argument, number, least in (
            ("every", every, 1),
            ("weights_every", weights_every, 1),
            ("activations_every", activations_every, 0),
            ("sink_every", sink_every, 1),
            ("max_bytes", max_bytes, 1),
            ("first_step", 0 if first_step is None else first_step, 0),
        ):
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise ValueError(
                    f"Monitor: {argument} must be a whole number from {least} up, got {number!r}."
                )
        check_model(model)
        if not isinstance(keep_batch, bool):
            raise TypeError(f"Monitor: keep_batch must be True or False, got {keep_batch!r}.")
        self._closed = False
        self._on = actions.check(on)
        self._voice = actions.Voice(name)
        self._threshold = ClipThreshold(clipper) if "clip" in self._on.values() else None
        compiled = getattr(model, "_orig_mod", None)  # of torch.compile(model)
        self._model: nn.Module = compiled if isinstance(compiled, nn.Module) else model
        self._tracked = Tracked(self._model, "Monitor")
        Names.keeps_ids = True
        if optimizer is not None:
            self._check_shared(_stepped_by(optimizer), f"the {type(optimizer).__name__}")
        if clipper is not None:
            actions.check_clipper(clipper)
            self._check_shared(clipper._stepper.tracked.params, "the Clipper")
        self._clipper = clipper
        self._stepper = None if clipper is None else clipper._stepper
        self._hook_count = 0  # of the optimizer, when it was looked at for a clipper last
        self._scaler: Callable[[], torch.amp.GradScaler | None] = lambda: None
        self._optimizer: torch.optim.Optimizer | None = None
        self._handles: list[Any] = []
        self._attached = False
        self._every, self._weights_every, self._activations_every = every, weights_every, activations_every
        self._outlet = Outlet(sinks, sink_every, per_tensor)

        self._retire(_stepped_by(optimizer) if optimizer is not None else self._tracked.params)
        self._record = MemoryRecord(max_steps=MAX_STEPS, max_bytes=MAX_ROW_BYTES)
        self._writer = None if path is None else Writer(path, max_bytes=max_bytes)
        self._ledger = Ledger(self._record, self._writer, weights_every)
        self._reader = Reader(self._ledger)
        self._next = first_step or 0
        if self._writer is not None:
            shapes = {entry["name"]: entry["shape"] for entry in parameters_of(self._model)}
            self._next = self._writer.go_on(shapes, first_step)
        self._first = self._next
        self._weights: list[tuple[int, str, Tensor]] = []
        self._seen_names: tuple[Any, ...] | None = None
        self._seen_columns: list[int] | None = None

        self._pending: deque[Step] = deque()  # those of which no verdict was taken
        self._unread: deque[Step] = deque()  # those whose numbers were not read
        self._is_away = False  # whether numbers come from a device
        self._last_time = time.perf_counter()
        self._agrees = bool(self._on.keys()) and agreement.is_needed()
        self._schedule = Schedule(self._first, agreement.EVERY if self._agrees else None)
        self._found: dict[tuple[str, str], Finding] = {}
        self._done: dict[str, int] = {}  # how bad what was acted on was at worst, by kind
        self._findings: list[Finding] = []
        self._failure = ""
        self._left_out: set[str] = set()

        self.loss: Loss | None = None
        self.batch: Batch | None = None
        self._handed = False
        self._own_stats: GradStats | None = None
        self._own_weights: Tensor | None = None
        self._own_updates: tuple[Tensor, Floats] | None = None
        self._own_exponents: tuple[list[str], Tensor] | None = None
        self._suspect: Tensor | None = None
        self._ran = False  # whether the optimizer was called since the last step
        self._found_inf: Tensor | None = None
        self._sampler = UpdateSampler()
        self._moved: list[int] = []  # which of the weights the optimizer steps
        self._observer = Observer(self._model)
        self._scale: Tensor | None = None
        self._asked = self._first - 1  # the last step of which it was asked whether to look
        self._is_alert = True
        self._off = False
        self._replay = Replay(self._model) if keep_batch else None

        self._describe(optimizer)
        if optimizer is not None:
            self._hook(optimizer)
        self._prepare()
        _WATCHING.add(self)
        self._process = os.getpid()
        # After that of the writer, so that it comes before it.
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    # What users call.

    def step(
        self,
        loss: Loss | None = None,
        stats: GradStats | Tensor | float | None = None,
        batch: Batch | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """End a training step. Call it after `optimizer.step()`, and after `scaler.update()`.

        Args:
            loss: one number.
            stats: what `gradkern.clip_` or a `Clipper` gave for this step; or the norm before clipping, as
                torch gives it: what is left of each gradient is scaled back by it. Without it gradients are
                measured here, in one read, as they were when the optimizer stepped.
            batch: tensors in tuples, lists or mappings, to look at data. A pair is (inputs, targets).
            scaler: of mixed precision; one that calls the optimizer is found without it.

        What cannot be used is left out, and said once.

        Raises:
            TrainingStopped: a finding came up for which `on` says "stop". Nothing else is ever raised.
        """
        if self._attached or self._closed:
            self._voice.warn(
                "Monitor.step: the monitor is closed; nothing is recorded any more."
                if self._closed
                else "Monitor.step: the monitor is attached: every optimizer.step() ends a step already. "
                "Leave out this call, and set monitor.loss before optimizer.step().",
                stacklevel=2,
            )
            return
        self._end(loss, stats, batch, scaler)

    def attach(self, optimizer: torch.optim.Optimizer) -> Monitor:
        """End a step with every `optimizer.step()` from now on. Returns the monitor.

        Set `monitor.loss = loss`, and `monitor.batch` if data are to be looked at, before `optimizer.step()`.
        Each holds for one step. Steps on which a GradScaler does not call the optimizer are not seen.

        Raises:
            ValueError: the monitor has an optimizer already.

        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = gradkern.Monitor(model).attach(optimizer)
        >>> monitor.loss = model(torch.ones(4, 2)).square().sum()
        >>> monitor.loss.backward()
        >>> optimizer.step()
        >>> monitor.close()
        >>> monitor.record.steps
        array([0])
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"Monitor.attach: needs an optimizer of torch, got {type(optimizer).__name__}.")
        if self._optimizer is not None and self._optimizer is not optimizer:
            raise ValueError("Monitor.attach: it watches another optimizer already; make a second Monitor.")
        if self._attached:
            raise ValueError("Monitor.attach: it is attached already. Leave out this call.")
        if self._optimizer is not None:
            raise ValueError(
                "Monitor.attach: it has an optimizer already, and waits for monitor.step(loss) after each "
                "step. To attach it, make it without: Monitor(model).attach(optimizer)."
            )
        self._check_shared(_stepped_by(optimizer), f"the {type(optimizer).__name__}")
        self._hook(optimizer)
        self._describe(optimizer)
        self._sampler.forget()  # it is taken around the optimizer's step from now on
        self._attached = True
        return self

    @property
    def findings(self) -> list[Finding]:
        """What has been found in the run so far, in the order of the steps. Waits for the device."""
        self._catch_up()
        return list(self._findings)

    def diagnosis(self) -> Diagnosis:
        """One root cause, what follows from it, and what to do. Waits for the device."""
        self._catch_up()
        found = diagnose(self._record)
        if self._failure:
            return replace(found, note=self._failure)
        if "loss" in self._left_out and "loss" not in self._record.scalar_names():
            return replace(found, note=f"No loss was recorded: it must be {_WANTED['loss']}.")
        return found

    @property
    def record(self) -> Record:
        """The recent past of the run, all steps so far included. Waits for the device."""
        self._catch_up(look=False)
        return self._record

    def undo_clip(self) -> bool:
        """Put the clipper's threshold back to what it was before the last action "clip", if there was one."""
        done = None if self._threshold is None else self._threshold.undo()
        if done is not None:
            self._ledger.event(self._next, "clip_threshold", done)
        return done is not None

    def replay(self) -> Replay:
        """The last step, to be run again: with `keep_batch`, a context manager that gives its batch.

        Inside, parameters, buffers and random state are as they were before that step; afterwards they are as
        they are now. See `gradkern.trace_nonfinite`.

        Raises:
            RuntimeError: `keep_batch` is off, no step was made yet, or the next one has begun.
        """
        if self._replay is None:
            raise RuntimeError("Monitor.replay: nothing was kept. Make the Monitor with keep_batch=True.")
        self._replay.check()
        return self._replay

    def probe_time(self, step_fn: Callable[[], Tensor], *, module: str | None = None) -> Tensor:
        """`gradkern.probe_time` of the watched model, put into the record, where the detectors find it.

        Call it now and then, beside the training steps: it takes a forward and a backward pass, step by step.
        """
        norms = probe_time(step_fn, self._model, module=module)
        if not self._off:
            self._ledger.set_names("time_grad_norm", [str(time) for time in range(len(norms))])
            self._ledger.put_row("time_grad_norm", max(self._next - 1, 0), norms.cpu().numpy())
        return norms

    def close(self) -> None:
        """Record what is left, look at it, and take everything away again. May be called twice.

        What is found now is logged and given to functions of `on`: too late to stop, or to clip.
        """
        if self._closed:
            return
        if os.getpid() != self._process:
            self._closed = self._off = True  # a forked child, which has neither the run nor the file
            return
        self._catch_up(close=True)
        self._closed = self._off = True
        atexit.unregister(self._at_exit)
        try:
            self._take_away()
            self._outlet.close()
        finally:
            if self._writer is not None:
                self._writer.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Forgotten without `close`: what it holds is written, and its file can be opened again.
        with contextlib.suppress(Exception):
            self.close()

    # A step, on the loop's thread. Nothing here waits for a device.

    def _end(
        self,
        loss: Loss | None,
        stats: GradStats | Tensor | float | None,
        batch: Batch | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        was_off = self._off
        try:
            if not was_off:
                self._take(loss, stats, batch, scaler)
        except TrainingStopped:
            raise
        except Exception as error:
            self._fail(error)
        if self._off and self._agrees and not self._closed:
            self._next += was_off
            self._keep_meeting()

    def _take(
        self,
        loss: Loss | None,
        stats: GradStats | Tensor | float | None,
        batch: Batch | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        number = self._next
        self._next += 1
        step = Step(number)
        if self._is_weights_step(number) and not self._refresh():
            self._follow_freezing()
        now = time.perf_counter()
        if number > self._first:
            step.scalars["step_ms"] = 1000 * (now - self._last_time)
        self._last_time = now
        try:
            self._take_loss(step, loss)
        except Exception:
            self._leave_out("loss", loss)
        self._take_rate(step)
        if not (stats is None or isinstance(stats, GradStats) or _is_norm(stats)):
            self._leave_out("stats", stats)
            stats = None
        self._take_stats(step, stats)
        try:
            scaler = self._scaler() if scaler is None else scaler
            if scaler is not None and scaler.is_enabled():
                self._take_scale(step, scaler)
        except Exception:
            self._leave_out("scaler", scaler)
        self._take_verdict(step)
        try:
            if batch is not None:
                self._take_batch(step, batch)
        except Exception:
            self._leave_out("batch", batch)
        if self._optimizer is None and self._is_weights_step(number):
            self._without_optimizer()
        self._take_extras(step)
        if self._observer.is_on:
            self._take_activations(step)
        if step.parcel is not None:
            step.parcel.send()
            self._is_away = self._is_away or step.parcel.is_away
        if self._replay is not None:
            self._replay.end(batch)
        self._prepare()
        self._pending.append(step)
        self._unread.append(step)
        self._settle(step.scalars.get("step_ms", 0.0))

    def _leave_out(self, argument: str, value: object) -> None:
        """Say once that an argument of `step` cannot be used."""
        if argument not in self._left_out:
            self._left_out.add(argument)
            what = type(value).__name__ + (f" {list(value.shape)}" if isinstance(value, Tensor) else "")
            self._voice.warn(
                f"Monitor.step: {argument} must be {_WANTED[argument]}; got {what}. It is left out.",
                stacklevel=5,
            )

    def _prepare(self) -> None:
        """Get ready for the step `self._next`."""
        if self._activations_every and self._next % self._activations_every == 0:
            self._observer.add()
        if self._optimizer is None and self._is_weights_step(self._next):
            with torch.no_grad():
                self._own_weights = self._measure_weights()
                self._sampler.before([name for _, name, _ in self._weights], [w for _, _, w in self._weights])

    def _is_weights_step(self, number: int) -> bool:
        return number % self._weights_every == 0

    def _parcel(self, step: Step) -> Parcel:
        if step.parcel is None:
            step.parcel = Parcel()
        return step.parcel

    def _take_loss(self, step: Step, loss: Loss | None) -> None:
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"loss must be one number, got {list(loss.shape)}")
            if loss.is_cpu:
                step.scalars["loss"] = float(loss.item())
            else:
                self._parcel(step).put("loss", loss)
        elif loss is not None:
            step.scalars["loss"] = float(loss)

    def _take_rate(self, step: Step) -> None:
        if self._optimizer is None:
            return
        on_host, away = [], []
        for group in self._optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, Tensor) and not rate.is_cpu:
                away.append(rate.reshape(()))
            elif rate is not None:
                on_host.append(float(rate))
        if on_host:
            step.scalars["lr"] = max(on_host)
        elif away:
            self._parcel(step).put("lr", torch.stack(away).amax())

    def _take_stats(self, step: Step, stats: GradStats | Tensor | float | None) -> None:
        own, self._own_stats = self._own_stats, None
        self._handed = isinstance(stats, GradStats)
        if stats is None and self._stepper is not None:
            stats = self._stepper.last
            self._take_clipper(step, self._stepper)
        if step.number % self._every:
            return
        if isinstance(stats, GradStats):
            found = stats
        else:
            if own is None:
                self._refresh()
                with torch.no_grad():
                    own = measure(self._tracked.items)
            found = own
            if isinstance(stats, Tensor) and not stats.is_cpu:
                self._parcel(step).put("norm_before", stats.reshape(()))
            elif stats is not None:
                step.norm_before = float(stats.item() if isinstance(stats, Tensor) else stats)
        step.columns = self._columns(found)
        coef = found._coef
        is_simple = coef is None or coef.dim() == 0
        if found.rows.is_cpu and is_simple and not isinstance(found._clip_value, Tensor):
            step.kept, step.total = kept(found.rows), found.data.tolist()
            self._is_alert = not step.total[0] < ALERT
            step.coef = 1.0 if coef is None else coef.item()
            step.bound, step.propagates = found._clip_value, found._nonfinite == "propagate"
            step.scalars["grad_norm"] = norm_of(step.total) if step.norm_before is None else step.norm_before
            return
        parcel = self._parcel(step)
        parcel.put("rows", found.rows)
        parcel.put("total", found.data)
        if coef is not None:
            parcel.put("coef", coef)
        if coef is not None or isinstance(found._clip_value, Tensor):
            parcel.put("clipped_norm", found.clipped_norm)

    def _take_clipper(self, step: Step, stepper: Stepper) -> None:
        threshold = stepper.info.get("threshold")
        if stepper.max_norm < math.inf:
            step.scalars["clip_threshold"] = stepper.max_norm
        elif threshold is not None and threshold.dim() == 0:
            self._parcel(step).put("clip_threshold", threshold)
        self._parcel(step).put("tally", stepper.tally.counts)

    def _take_scale(self, step: Step, scaler: torch.amp.GradScaler) -> None:
        scale = scaler._get_scale_async()
        if scale is None:
            return
        parcel = self._parcel(step)
        parcel.put("scale", scale)
        if self._scale is None:
            step.times["backoff"] = scaler.get_backoff_factor()
        elif not self._attached:  # else update() is still to come
            parcel.put("scale_before", self._scale)
        self._scale = scale.clone()
        self._reader.is_scaled = True
        if self._scaler() is not scaler:
            self._scaler = weakref.ref(scaler)

    def _take_verdict(self, step: Step) -> None:
        """Whether the optimizer was called; and if a bad step left the weights alone, how they are."""
        ran, self._ran = self._ran, False
        if self._optimizer is None or not getattr(type(self._optimizer).step, "hooked", False):
            return
        step.ran = ran
        is_bad = step.total is not None and step.total[2] + step.total[3] > 0
        is_sound = not is_bad and math.isfinite(step.scalars.get("loss", 0.0))
        if is_sound or self._reader.origin_known or self._suspect is not None:
            return
        tally = None if self._stepper is None else self._stepper.tally.counts
        if not ran or (tally is not None and tally.is_cpu and tally[2].item() > 0):
            with torch.no_grad():
                self._suspect = self._measure_weights()

    @torch.no_grad()
    def _take_batch(self, step: Step, batch: Batch) -> None:
        inputs, targets = _split(batch)
        for word, tensors in (("data", inputs), ("target", targets)):
            kept = [t for t in tensors if is_plain(t) and t.is_floating_point() and t.numel()]
            if not kept:
                continue
            _, total = ops.measure([tensor.detach() for tensor in kept])
            parcel = self._parcel(step)
            parcel.put(word, total)
            if total.is_cpu:
                bad = total[2:4].sum().item()
                step.scalars["data_nonfinite"] = step.scalars.get("data_nonfinite", 0.0) + bad
            if word == "data" and self._is_weights_step(step.number):
                wide = torch.float32 if total.device.type == "mps" else torch.float64
                sums = [torch.nansum(t.detach(), dtype=wide).to(total.device) for t in kept]
                parcel.put("data_sum", torch.stack(sums).sum())
            step.times[f"{word}_numel"] = sum(tensor.numel() for tensor in kept)

    def _take_extras(self, step: Step) -> None:
        """Of this step, what was measured around the optimizer."""
        if self._own_weights is not None:
            self._parcel(step).put("weights", self._own_weights)
            self._own_weights = None
        if self._own_updates is not None:
            sums, sizes = self._own_updates
            self._parcel(step).put("updates", sums)
            step.times["sizes"] = sizes
            if len(sizes) < len(self._weights):
                step.times["moved"] = self._moved
            self._own_updates = None
        if self._own_exponents is not None:
            step.times["exponent_names"], counts = self._own_exponents
            self._parcel(step).put("exponents", counts)
            self._own_exponents = None
        if self._suspect is not None:
            self._parcel(step).put("suspect", self._suspect)
            self._suspect = None
        if self._found_inf is not None:
            self._parcel(step).put("found_inf", self._found_inf.reshape(()))
            self._found_inf = None

    def _take_activations(self, step: Step) -> None:
        seen = self._observer.take()
        modules = self._observer.take_modules()
        if modules is not None:
            self._ledger.set_meta({"modules": modules[0], "amp": modules[1] or {}})
        if seen is not None:
            seen.send()
            step.times["activations"] = seen

    @torch.no_grad()
    def _without_optimizer(self) -> None:
        """Updates from one call of `step` to the next, where no optimizer says when it steps."""
        self._own_exponents = self._measure_exponents()
        if self._sampler.is_open:
            self._own_updates = self._sampler.after([weight for _, _, weight in self._weights])

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._ran = True
        if self._off:
            return
        try:
            # Most steps have nothing to be seen here, and every call counts.
            if self._observer.is_on and (args[1] if len(args) > 1 else kwargs.get("closure")) is None:
                self._observer.remove()  # no forward pass comes any more
            if len(optimizer._optimizer_step_pre_hooks) != self._hook_count:
                self._look_for_clipper(optimizer)
            measures = not self._handed and self._stepper is None and self._next % self._every == 0
            is_quiet = not (measures or self._is_alert or self._next % self._weights_every == 0)
            is_quiet = is_quiet and getattr(optimizer, "found_inf", None) is None
            if is_quiet and (self._reader.origin_known or not self._last_is_nonfinite()):
                return
            with torch.no_grad():
                self._look_before(optimizer, args, kwargs)
        except Exception as error:
            self._fail(error)

    def _look_before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._refresh()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            self._found_inf = found_inf.clone()
        if not self._reader.is_scaled:
            self._look_for_scaler()
        is_bad: bool | None = None
        measures = not self._handed and self._stepper is None and closure is None
        if measures and self._next % self._every == 0:
            stats = measure(self._tracked.items)
            scale = getattr(optimizer, "grad_scale", None)
            if isinstance(scale, Tensor):  # the optimizer is going to divide by it
                inverse = scale.to(stats.data.device, torch.float64).reshape(()).reciprocal()
                stats = GradStats(
                    stats.per_tensor.scaled(inverse).data, stats.scaled(inverse).data, stats._names
                )
            self._own_stats = stats
            if not self._reader.origin_known and stats.data.device.type == "cpu":
                _, _, nan_count, inf_count, _ = stats.data.tolist()
                is_bad = nan_count + inf_count > 0
        if self._is_weights_step(self._next):
            self._own_weights = self._measure_weights()
            self._own_exponents = self._measure_exponents()
            held = {id(param) for group in optimizer.param_groups for param in group["params"]}
            self._moved = [i for i, (_, _, weight) in enumerate(self._weights) if id(weight) in held]
            moved = [self._weights[i] for i in self._moved]
            self._sampler.before([name for _, name, _ in moved], [weight for _, _, weight in moved])
        if not self._reader.origin_known and (self._last_is_nonfinite() if is_bad is None else is_bad):
            # Whether weights were sound is known now, and not any more after the step.
            self._suspect = self._measure_weights()

    def _look_for_clipper(self, optimizer: torch.optim.Optimizer) -> None:
        """Find a clipper that is attached to the optimizer and was not handed over."""
        self._hook_count = len(optimizer._optimizer_step_pre_hooks)
        if self._clipper is None:
            self._stepper = around.attached_stepper(optimizer)
            policy = None if self._stepper is None else self._stepper.policy
            self._ledger.set_meta({"clip": clip_of(policy)})

    def _look_for_scaler(self) -> None:
        """Find the GradScaler that calls the optimizer, for scales and to know who skips."""
        scaler = around.calling_scaler()
        has_flag = self._found_inf is not None and self._stepper is None  # a clipper sets it too
        self._reader.is_scaled = scaler is not None or has_flag
        if scaler is not None:
            self._scaler = weakref.ref(scaler)
            scale = scaler._get_scale_async()
            self._scale = None if scale is None else scale.clone()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._off:
            return
        if self._sampler.is_open:
            try:
                with torch.no_grad():
                    self._own_updates = self._sampler.after([self._weights[i][2] for i in self._moved])
            except Exception as error:
                self._fail(error)
        if self._attached:
            loss, batch, self.loss, self.batch = self.loss, self.batch, None, None
            self._end(loss, None, batch, None)

    def _last_is_nonfinite(self) -> bool:
        """Whether an element of the last gradient is NaN or Inf: after a bad loss all of them are.

        Only on the CPU, where looking waits for nothing.
        """
        for _, param in reversed(self._tracked.items):
            grad = param.grad
            if grad is None:
                continue
            if type(grad) is not Tensor or not grad.is_cpu:
                return False
            try:
                return not math.isfinite(abs(grad.as_strided((1,), (1,)).item()))
            except Exception:  # it has no elements, or they cannot be read
                return False
        return False

    def _measure_weights(self) -> Tensor | None:
        return measure_grads([weight for _, _, weight in self._weights]).rows if self._weights else None

    def _measure_exponents(self) -> tuple[list[str], Tensor] | None:
        halves = [
            (name, param.grad)
            for name, param in self._tracked.items
            if param.dtype in (torch.float16, torch.bfloat16)
            and param.grad is not None
            and is_plain(param.grad)
            and param.grad.numel()
        ]
        if not halves:
            return None
        return [name for name, _ in halves], torch.stack([histogram(grad) for _, grad in halves])

    def _refresh(self) -> bool:
        """Look whether parameters came or went. On most steps that takes longer than it is worth."""
        changed = self._tracked.refresh()
        if changed:
            self._describe(self._optimizer)
        return changed

    def _columns(self, stats: GradStats) -> list[int] | None:
        """Where the rows of `stats` belong among the names of the record; None: all, in that order."""
        # Walking all names on every step would cost as much as measuring.
        names = stats._names
        key = (names._labels, names.present, names.ids, len(names))
        if key != self._seen_names:
            self._refresh()
            columns = self._places(names)
            is_all = columns == list(range(len(self._ledger.names)))
            self._seen_names, self._seen_columns = key, None if is_all else columns
        return self._seen_columns

    def _places(self, names: Names) -> list[int]:
        """The column of each row; -1 for none of ours. Parameters without names are known by identity."""
        if names._labels is None:
            mine = {id(param): place for place, param in enumerate(self._tracked.params)}
            ids = names.ids or ()
            rows = range(len(names)) if names.present is None else names.present
            return [mine.get(ids[row], -1) if row < len(ids) else -1 for row in rows]
        return [self._place(name) for name in names.to_list()]

    def _place(self, name: str) -> int:
        """The column of a name; -1 if it is none of ours."""
        for known in (name, name.removeprefix("_orig_mod."), name.removeprefix("module.")):
            if known in self._ledger.places:
                return self._ledger.places[known]
        return -1

    # On the host, when the numbers are there.

    def _settle(self, step_ms: float) -> None:
        """Hand on what is on the host, and take the verdict on the step `LAG` steps ago."""
        step = self._pending.popleft() if len(self._pending) > LAG else None
        until = -1 if step is None else step.number
        # On the CPU many steps at once take less time than one by one; what a verdict rests on is known.
        waits = not (self._is_away or self._outlet or self._reader.is_scaled is not False)
        if not waits:
            self._read(until)
        due = step is not None and self._schedule.is_due(step.number, step.scalars)
        stands_out = step is not None and self._schedule.stands_out and self._writer is not None
        is_slow = self._writer is not None and step_ms > SLOW_MS
        if due or stands_out or is_slow or self._ledger.is_due(len(self._unread) if waits else 0):
            self._read(until)
            self._ledger.flush()
        if step is None:
            return
        if stands_out and self._writer is not None:
            self._writer.incident(step.number)
        if due:
            self._decide(step.number)
        self._asked = step.number

    def _read(self, until: int) -> None:
        """Make sense of the numbers of the steps up to `until`, and of later ones that are there already."""
        while self._unread and (self._unread[0].number <= until or self._unread[0].is_there):
            step = self._unread.popleft()
            values = {} if step.parcel is None else step.parcel.open()
            self._reader.read(step, values)
            self._ledger.add(step)
            if self._outlet:
                self._outlet.tell(step, self._ledger.names)
            if not self._reader.origin_known:
                self._reader.look_for_origin(step, values)

    def _describe(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Names and description of parameters as they are now."""
        if self._ledger.names:
            self._read(self._next)
            self._ledger.flush()
        self._ledger.set_parameters(self._tracked.names, [param.numel() for param in self._tracked.params])
        self._seen_names = None
        self._weights = [
            (place, name, param)
            for place, (name, param) in enumerate(self._tracked.items)
            if is_plain(param) and param.is_floating_point() and _is_dense(param)
        ]
        self._sampler.forget()
        self._own_weights = self._own_updates = self._suspect = None
        if self._ledger.names:
            for kind in (*GRAD_ROWS, *GRAD_COUNTS):
                self._ledger.set_names(kind, self._ledger.names)
            for kind in (*WEIGHT_ROWS, *UPDATE_ROWS):
                self._ledger.set_names(kind, [name for _, name, _ in self._weights])
        policy = None if self._stepper is None else self._stepper.policy
        self._ledger.set_meta(describe(self._model, optimizer, policy))
        self._trained = [param.requires_grad for param in self._tracked.params]

    def _follow_freezing(self) -> None:
        """What was frozen or thawed is so in the description of the run too."""
        trained = [param.requires_grad for param in self._tracked.params]
        if trained != self._trained:
            self._trained = trained
            self._ledger.set_meta({"parameters": parameters_of(self._model)})

    # Findings.

    def _look(self, until: int) -> list[Finding]:
        """Run the detectors over the record up to a step. Gives back what nothing was done about yet."""
        found = detect(View(self._record, until))
        for finding in found:
            self._found.setdefault(_key(finding), finding)
        # What the bounded history has forgotten was found all the same.
        kinds = {finding.kind for finding in found}
        old = [finding for finding in self._found.values() if finding.kind not in kinds and finding.is_alarm]
        self._findings = sorted([*found, *old], key=lambda finding: finding.step)
        fresh, done = [], dict(self._done)
        for finding in found:
            if _badness(finding) > done.get(finding.kind, -1):
                done[finding.kind] = _badness(finding)
                fresh.append(finding)
        return fresh

    def _decide(self, number: int) -> None:
        """Look at the record, and do what is to be done after step `number`."""
        fresh = self._look(number)
        self._keep_rows(fresh)
        todo = self._agreed(fresh) if self._agrees else fresh
        self._asked = number
        self._do(number, todo)

    def _keep_rows(self, fresh: list[Finding]) -> None:
        """Have the file keep the rows from around alarms."""
        for finding in fresh:
            if finding.is_alarm and self._writer is not None:
                self._writer.incident(finding.step)

    def _do(self, number: int, todo: list[Finding]) -> None:
        """Do all that is to be done; stopping comes last."""
        for finding in todo:
            self._done[finding.kind] = max(_badness(finding), self._done.get(finding.kind, -1))
        stops = [finding for finding in todo if self._act(number, finding)]
        if stops:
            known = Diagnosis() if self._off else diagnose(View(self._record, number))
            raise TrainingStopped(stops[-1], known)

    def _agreed(self, fresh: list[Finding]) -> list[Finding]:
        """The findings of all ranks, so that all of them do the same. Waits for the other ranks."""
        try:
            found = agreement.gather(fresh)
        except Exception as error:
            self._part(error)
            return fresh
        for finding in found:
            self._found.setdefault(_key(finding), finding)
        return found

    def _least(self, value: float) -> float:
        try:
            return agreement.least(value)
        except Exception as error:
            self._part(error)
            return value

    def _part(self, error: Exception) -> None:
        """The other ranks are gone: meeting them again would only be waited for."""
        self._agrees = False
        self._voice.tell(
            f"The other ranks cannot be reached: {type(error).__name__}: {error}. Findings are acted on by "
            "this rank alone from now on."
        )

    def _keep_meeting(self) -> None:
        """A monitor that has failed goes on to meet those of the other ranks, which would wait for it."""
        while self._agrees and self._asked < self._next - 1 - LAG:
            self._asked += 1
            if self._schedule.is_due(self._asked, {}):
                self._do(self._asked, self._agreed([]))

    def _act(self, number: int, finding: Finding, *, is_last: bool = False) -> bool:
        """Do what is to be done about a finding. Returns whether that is to stop.

        When the monitor closes (`is_last`) there is nothing left to stop or clip, and ranks do not meet.
        """
        action = actions.choose(self._on, finding)
        if action is None:
            return False
        self._voice.find(finding)
        if is_last and (self._agrees or not callable(action)):
            return False
        if action == "stop":
            self._ledger.event(number, "stopped", {"finding": finding.kind})
            return True
        if action == "clip" and self._threshold is not None:
            done = self._threshold.recommend(self._record, finding, self._least if self._agrees else None)
            if done is not None:
                self._ledger.event(number, "clip_threshold", done)
                self._voice.tell(f"Clipping at {done['to']:.4g} from now on: {done['why']}.")
        elif callable(action):
            try:
                action(self, finding)
            except TrainingStopped:
                if not is_last:
                    raise
            except Exception as error:
                self._voice.tell(f"The action on {finding.kind} failed: {type(error).__name__}: {error}")
        return False

    def _catch_up(self, *, look: bool = True, close: bool = False) -> None:
        """Read and record every step so far, and look at all of it. The verdicts on them keep their time.

        With `close` it is time for all verdicts.
        """
        if self._closed:
            return
        try:
            self._read(self._next)
            self._ledger.flush()
            fresh = self._look(self._next) if look else []
        except Exception as error:
            self._fail(error)
            return
        if close:
            for step in self._pending:
                self._schedule.is_due(step.number, step.scalars)
                if self._schedule.stands_out and self._writer is not None:
                    self._writer.incident(step.number)
            self._keep_rows(fresh)
            for finding in fresh:
                self._act(self._next - 1, finding, is_last=True)

    # Coming and going.

    def _check_shared(self, params: Iterable[Tensor], whose: str) -> None:
        """Refuse what belongs to another model."""
        ours, theirs = {id(param) for param in self._tracked.params}, {id(param) for param in params}
        if ours and theirs and not ours & theirs:
            raise ValueError(
                f"Monitor: {whose} holds none of the model's {len(ours)} parameters. Was the model made anew "
                "after it? Make it of this model's parameters. If it steps copies of them, leave it out."
            )

    def _retire(self, params: Iterable[Tensor]) -> None:
        """Close the monitors that watch any of these parameters: those of a cell that is run again."""
        ours = {id(param) for param in params}
        for other in list(_WATCHING):
            if not other._closed and ours & {id(param) for param in other._watched()}:
                other.close()
                if other._next > other._first:
                    self._voice.tell(
                        "A new Monitor watches the same parameters: the one before it was closed after "
                        f"step {other._next - 1}."
                    )

    def _watched(self) -> list[Tensor]:
        return self._tracked.params if self._optimizer is None else _stepped_by(self._optimizer)

    def _hook(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if self._replay is not None:
            self._replay.watch(optimizer)

    def _take_away(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._observer.remove()
        if self._replay is not None:
            self._replay.remove()
        self._sampler.forget()
        self._own_stats = self._own_weights = None

    def _fail(self, error: Exception) -> None:
        """Say once that the monitor has failed, and go quiet."""
        if self._off:
            return
        self._off = True
        try:
            self._take_away()
        except Exception as another:
            error = another
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = (
            ""
            if trace is None
            else f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
        )
        what, step = f"{type(error).__name__}: {error}{where}", max(self._next - 1, self._first)
        self._failure = f"The monitor failed at step {step} and has seen nothing since. {what}"
        self._voice.warn(
            f"the monitor failed at step {step} and is quiet from now on; training is not affected. {what}",
            stacklevel=4,
        )


def _close(reference: weakref.ref[Monitor]) -> None:
    """At the end of the process, if the monitor is still there: an exception has ended the run, perhaps."""
    monitor = reference()
    if monitor is not None:
        with contextlib.suppress(Exception):
            monitor.close()


def _key(finding: Finding) -> tuple[str, str]:
    return finding.kind, finding.severity


def _badness(finding: Finding) -> int:
    return SEVERITIES.index(finding.severity)


def _stepped_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _is_norm(stats: object) -> bool:
    if isinstance(stats, Tensor):
        return stats.numel() == 1 and not stats.is_complex()
    return isinstance(stats, (int, float, np.floating)) and not stats < 0


def _split(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and targets of a batch."""
    if isinstance(batch, Mapping):
        targets = [item for key, item in batch.items() if str(key).lower() in _TARGETS]
        return tensors_in([i for k, i in batch.items() if str(k).lower() not in _TARGETS]), tensors_in(
            targets
        )
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return tensors_in(batch[0]), tensors_in(batch[1])
    return tensors_in(batch), []


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is one block of memory, in whatever order of dimensions."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()
