"""Small training runs, and what a monitor would have recorded of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import gradkern
from gradkern.record import MemoryRecord, Record

Batch = tuple[Tensor, Tensor]
LossFn = Callable[[nn.Module, Tensor, Tensor], Tensor]

# Units whose activation function passes on less than a tenth of its steepest slope count as saturated.
FLAT = 0.1

PARAMETER_KINDS = (
    *("grad_norm", "grad_abs_max", "grad_nan", "grad_inf", "grad_zero"),
    *("weight_norm", "weight_abs_max", "weight_nan", "weight_inf", "update_norm", "update_stderr"),
)
OPTIMIZER = ("lr", "eps", "momentum", "weight_decay", "betas", "fused")


@dataclass
class Setup:
    """Everything that a run is made of. `batch(step)` gives inputs and targets."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[int], Batch]
    loss: LossFn
    steps: int = 200
    clip: float | None = None
    scheduler: Any = None
    scaler: torch.amp.GradScaler | None = None
    zero_grad: bool = True
    time_probe: Callable[[nn.Module, Tensor, Tensor, LossFn], list[float]] | None = None
    amp: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def record_run(setup: Setup, *, rows_every: int = 10) -> Record:
    """Train and record: scalars and rows of gradients every step, other rows every `rows_every` steps."""
    recorder = _Recorder(setup, rows_every)
    for step in range(setup.steps):
        recorder.step(step)
    return recorder.record


class _Recorder:
    def __init__(self, setup: Setup, rows_every: int) -> None:
        self.setup, self.every = setup, rows_every
        self.record = MemoryRecord(max_steps=10**6, max_rows=4096, max_bytes=1 << 26)
        self.named = {name: p for name, p in setup.model.named_parameters() if p.requires_grad}
        self.modules = {name: m for name, m in setup.model.named_modules() if name}
        self.acts: dict[str, dict[str, float]] = {}
        self.grads: dict[str, dict[str, float]] = {}
        self.first: list[tuple[str, Tensor, Tensor]] = []
        names = list(self.named)
        for kind in PARAMETER_KINDS:
            self.record.set_names(kind, names)

    def step(self, step: int) -> None:
        setup, record = self.setup, self.record
        model, optimizer = setup.model, setup.optimizer
        full = step % self.every == 0
        x, y = setup.batch(step)
        if setup.zero_grad:
            optimizer.zero_grad()
        with self._hooked(full):
            loss = setup.loss(model, x, y)
            scaled = setup.scaler.scale(loss) if setup.scaler else loss
            if scaled.requires_grad:
                scaled.backward()
        if step == 0:
            self._describe(step)
        scalars = {
            "loss": float(loss.detach()),
            "lr": float(optimizer.param_groups[0]["lr"]),
            **_of_batch(x, y),
        }
        if setup.scaler:
            scalars["loss_scale"] = setup.scaler.get_scale()
            setup.scaler.unscale_(optimizer)
        scalars |= self._gradients(step)
        if setup.clip is not None:
            stats = gradkern.clip_(self.named.items(), setup.clip, nonfinite="keep")
            scalars |= {
                "clip_coef": float(stats.coef),
                "grad_clipped_norm": float(stats.clipped_norm),
                "clip_threshold": setup.clip,
            }
        else:
            scalars["grad_clipped_norm"] = scalars["grad_finite_norm"]
        if setup.time_probe is not None and step % (5 * self.every) == 0:
            norms = setup.time_probe(model, x, y, setup.loss)
            record.set_names("time_grad_norm", [str(i) for i in range(len(norms))])
            record.put_rows("time_grad_norm", step, norms)
        before = [p.detach().clone() for p in self.named.values()] if full else []
        skipped = False
        if setup.scaler:
            scale = setup.scaler.get_scale()
            setup.scaler.step(optimizer)
            setup.scaler.update()
            skipped = setup.scaler.get_scale() < scale
            if skipped:
                record.put_event(step, "amp_backoff", {"scale": setup.scaler.get_scale()})
        else:
            optimizer.step()
        scalars["skipped"] = float(skipped)
        if full:
            scalars |= self._weights(step, before)
        record.put_scalars(step, scalars)
        if setup.scheduler is not None:
            setup.scheduler.step()

    def _gradients(self, step: int) -> dict[str, float]:
        stats = gradkern.measure(self.named.items())
        rows = dict(zip(stats.names, stats.rows.tolist(), strict=True))
        columns = [rows.get(name) for name in self.named]
        nan = math.nan
        sizes = {name: max(p.numel(), 1) for name, p in self.named.items()}
        self.record.put_rows("grad_norm", step, [math.sqrt(r[0]) if r else nan for r in columns])
        self.record.put_rows("grad_abs_max", step, [r[1] if r else nan for r in columns])
        self.record.put_rows("grad_nan", step, [r[2] if r else nan for r in columns])
        self.record.put_rows("grad_inf", step, [r[3] if r else nan for r in columns])
        zero = [r[4] / sizes[name] if r else nan for name, r in zip(self.named, columns, strict=True)]
        self.record.put_rows("grad_zero", step, zero)
        half = [n for n, p in self.named.items() if p.dtype in (torch.float16, torch.bfloat16)]
        if half and step % self.every == 0:
            self.record.set_names("exponents", half)
            self.record.put_exponents(step, [_exponents(self.named[name].grad) for name in half])
        return {
            "grad_norm": float(stats.norm),
            "grad_finite_norm": float(stats.finite_norm),
            "nonfinite_count": float(stats.nan_count + stats.inf_count),
        }

    def _weights(self, step: int, before: list[Tensor]) -> dict[str, float]:
        weights = [p.detach().double() for p in self.named.values()]
        finite = [torch.where(w.isfinite(), w, 0.0) for w in weights]
        moved = [
            torch.nan_to_num(w - b.double(), nan=0.0, posinf=0.0, neginf=0.0).norm().item()
            for w, b in zip(weights, before, strict=True)
        ]
        norms = [w.norm().item() for w in finite]
        self.record.put_rows("weight_norm", step, norms)
        self.record.put_rows(
            "weight_abs_max", step, [float(w.abs().max()) if w.numel() else 0.0 for w in finite]
        )
        self.record.put_rows("weight_nan", step, [float(w.isnan().sum()) for w in weights])
        self.record.put_rows("weight_inf", step, [float(w.isinf().sum()) for w in weights])
        self.record.put_rows("update_norm", step, moved)
        self.record.put_rows("update_stderr", step, [0.0] * len(moved))
        for kind in ("act_dead", "act_saturated", "act_nonfinite", "act_abs_max"):
            self._put_modules(kind, step, self.acts)
        for kind in ("out_grad_norm", "out_grad_unit_above_one", "out_grad_unit_max"):
            self._put_modules(kind, step, self.grads)
        return {
            "update_norm": math.sqrt(sum(value**2 for value in moved)),
            "weight_norm": math.sqrt(sum(value**2 for value in norms)),
        }

    def _put_modules(self, kind: str, step: int, values: dict[str, dict[str, float]]) -> None:
        names = [
            name for name in self.modules if kind in values.get(name, {}) or name in self.record.names(kind)
        ]
        if names:
            self.record.set_names(kind, names)
            self.record.put_rows(kind, step, [values.get(name, {}).get(kind, math.nan) for name in names])

    @contextmanager
    def _hooked(self, full: bool) -> Iterator[None]:
        self.acts, self.grads, self.first = {}, {}, []
        if not full:
            yield
            return
        handles = [m.register_forward_hook(self._hook(name)) for name, m in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if not isinstance(out, Tensor) or not out.is_floating_point():
                return
            if isinstance(inputs[0] if inputs else None, Tensor):
                self.first.append((name, inputs[0], out))
            self.acts[name] = _activations(module, out.detach())
            if out.requires_grad:
                out.register_hook(lambda grad: self.grads.__setitem__(name, _units(grad.detach())))

        return hook

    def _describe(self, step: int) -> None:
        model, optimizer = self.setup.model, self.setup.optimizer
        group = optimizer.param_groups[0]
        owners = {name: name.rpartition(".")[0] for name, _ in model.named_parameters()}
        self.record.set_meta({
            "parameters": [
                {
                    "name": name,
                    "shape": list(p.shape),
                    "dtype": str(p.dtype),
                    "module": owners[name],
                    "role": _role(name, p, dict(model.named_modules()).get(owners[name])),
                    "requires_grad": p.requires_grad,
                }
                for name, p in model.named_parameters()
            ],
            "modules": self._order(),
            "optimizer": {
                "type": type(optimizer).__name__,
                **{key: group.get(key) for key in OPTIMIZER},
            },
            "clip": {"policy": "GlobalNorm" if self.setup.clip else None, "threshold": self.setup.clip},
            "amp": self.setup.amp,
        })  # fmt: skip

    def _order(self) -> list[dict[str, Any]]:
        """Siblings whose input is the output of the one before are a chain."""
        found: list[dict[str, Any]] = []
        chains: dict[str, str] = {}
        outputs: dict[str, Tensor] = {}
        for place, (name, given, out) in enumerate(self.first):
            parent = name.rpartition(".")[0]
            before = outputs.get(parent)
            if before is None or before is not given:
                chains[parent] = f"{parent}:{place}"
            outputs[parent] = out
            found.append({
                "name": name, "type": type(self.modules[name]).__name__, "order": place, "parent": parent,
                "branch": chains[parent],
            })  # fmt: skip
        return found


def _of_batch(x: Tensor, y: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    bad = 0.0
    for tensor, name in ((x, "data"), (y, "target")):
        values = tensor.detach()
        if values.is_floating_point():
            bad += float((~values.isfinite()).sum())
            values = values[values.isfinite()]
            if values.numel() and name == "data":
                found["data_std"] = float(values.float().std(correction=0))
        if values.numel():
            found[f"{name}_abs_max"] = float(values.abs().max())
    return found | {"data_nonfinite": bad}


def _activations(module: nn.Module, out: Tensor) -> dict[str, float]:
    found = {"act_nonfinite": float((~out.isfinite()).sum())}
    finite = out[out.isfinite()]
    found["act_abs_max"] = float(finite.abs().max()) if finite.numel() else math.nan
    if isinstance(module, nn.ReLU | nn.LeakyReLU):
        found["act_dead"] = float((_by_unit(out) == 0).all(0).float().mean())
    if isinstance(module, nn.Tanh):
        found["act_saturated"] = float((1 - out.square() < FLAT).float().mean())
    if isinstance(module, nn.Sigmoid):
        found["act_saturated"] = float((4 * out * (1 - out) < FLAT).float().mean())
    return found


def _by_unit(values: Tensor) -> Tensor:
    """``[rows, units]``: channels of an image, else the last dimension."""
    if values.dim() == 4:
        return values.movedim(1, -1).reshape(-1, values.shape[1])
    return values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.reshape(1, -1)


def _units(grad: Tensor) -> dict[str, float]:
    units = _by_unit(torch.nan_to_num(grad.double(), nan=0.0, posinf=0.0, neginf=0.0)).norm(dim=0)
    return {
        "out_grad_norm": float(units.norm()),
        "out_grad_unit_above_one": float((units > 1).double().mean()),
        "out_grad_unit_max": float(units.max()) if units.numel() else math.nan,
    }


def _role(name: str, param: Tensor, module: nn.Module | None) -> str:
    last = name.rpartition(".")[2]
    if last.startswith("weight_hh"):
        return "recurrent"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d):
        return "norm"
    return "bias" if param.dim() < 2 else "weight"


def _exponents(grad: Tensor | None) -> list[int]:
    histogram = [0] * 64
    if grad is None:
        return histogram
    values = grad.detach().flatten()
    smallest = torch.finfo(grad.dtype).tiny
    magnitude = values.double().abs()
    finite = values.isfinite()
    histogram[0] = int((magnitude == 0).sum())
    histogram[1] = int(((magnitude > 0) & (magnitude < smallest)).sum())
    histogram[2] = int((~finite).sum())
    normal = magnitude[finite & (magnitude >= smallest)]
    for exponent in torch.floor(torch.log2(normal)).clamp(-44, 16).to(torch.int64).tolist():
        histogram[3 + exponent + 44] += 1
    return histogram


def monitored_run(setup: Setup, *, rows_every: int = 10) -> Record:
    """The same as `record_run`, recorded by `gradkern.Monitor` as users would."""
    model, optimizer = setup.model, setup.optimizer
    monitor = gradkern.Monitor(model, optimizer, weights_every=rows_every, activations_every=rows_every)
    record = monitor.record
    with monitor:
        for step in range(setup.steps):
            x, y = setup.batch(step)
            if setup.zero_grad:
                optimizer.zero_grad()
            loss = setup.loss(model, x, y)
            scaled = setup.scaler.scale(loss) if setup.scaler else loss
            if scaled.requires_grad:
                scaled.backward()
            stats = None
            if setup.scaler:
                setup.scaler.unscale_(optimizer)
            if setup.clip is not None:
                stats = gradkern.clip_(model.named_parameters(), setup.clip)
            if setup.scaler:
                setup.scaler.step(optimizer)
                setup.scaler.update()
            else:
                optimizer.step()
            monitor.step(loss, stats=stats, batch=(x, y), scaler=setup.scaler)
            if setup.scheduler is not None:
                setup.scheduler.step()
    return record
