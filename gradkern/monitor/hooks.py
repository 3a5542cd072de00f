"""Forward activations and output gradients of modules, on the steps on which they are looked at.

Hooks are there for single steps only: they are added before a step that is to be observed and taken away
after it, so that all other steps run as if there were no monitor. They read detached values and give nothing
back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from gradkern import ops
from gradkern.monitor.host import Floats, Parcel, is_plain
from gradkern.monitor.meta import ForwardOrder, tensors_in

log = logging.getLogger("gradkern")

ACT_KINDS: Final = ("act_dead", "act_saturated", "act_nonfinite", "act_abs_max")
GRAD_KINDS: Final = ("out_grad_norm", "out_grad_unit_above_one", "out_grad_unit_max", "out_grad_unit_argmax")

# Functions that are zero on a half line, where nothing passes back.
_CAN_DIE: Final = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardswish)

# In the flat part a function's slope is below a tenth of its steepest.
FLAT: Final = 0.1


# The slope of tanh at output y is 1 - y², that of the sigmoid, as a share of its steepest, 1 - (2y - 1)².
_STEEP: Final = math.sqrt(1 - FLAT)


def _flat_tanh(out: Tensor) -> Tensor:
    return out.abs() > _STEEP


def _flat_sigmoid(out: Tensor) -> Tensor:
    return (out - 0.5).abs() > 0.5 * _STEEP


def _flat_softsign(out: Tensor) -> Tensor:
    return out.abs() > 1 - math.sqrt(FLAT)


def _flat_hardtanh(out: Tensor) -> Tensor:
    return out.abs() >= 1


def _flat_hardsigmoid(out: Tensor) -> Tensor:
    return (out <= 0) | (out >= 1)


_SATURATES: Final[dict[type[nn.Module], Callable[[Tensor], Tensor]]] = {
    nn.Tanh: _flat_tanh,
    nn.Sigmoid: _flat_sigmoid,
    nn.Softsign: _flat_softsign,
    nn.Hardtanh: _flat_hardtanh,
    nn.Hardsigmoid: _flat_hardsigmoid,
}


class Observer:
    """Looks at what the modules of a model give and get back, for one step at a time.

    Of each module the first call of the step is looked at, and of an output with several tensors the first.
    Code that runs compiled is not looked at: there the hooks leave nothing in the graph. Under activation
    checkpointing the forward pass counts once, and gradients come from whichever pass backward runs through.

    Args:
        model: whose modules, itself left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []
        self._parcel = Parcel()
        self._seen: set[str] = set()
        self._order: ForwardOrder | None = ForwardOrder()
        self._modules: list[dict[str, Any]] | None = None
        self._amp: dict[str, Any] | None = None
        self._failed = False

    @property
    def is_on(self) -> bool:
        """Whether hooks are there."""
        return bool(self._handles)

    def add(self) -> None:
        """Add the hooks, for the coming step."""
        if self._handles or self._failed:
            return
        self._parcel, self._seen = Parcel(), set()
        self._handles.append(self._model.register_forward_pre_hook(self._begin))
        for path, module in self._model.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave(path)))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> Parcel | None:
        """What was seen since `add`, None if nothing was. Names are ``kind/module``."""
        if self._order is not None and self._seen:
            self._modules, self._order = self._order.modules(), None
        return self._parcel if self._seen else None

    def take_modules(self) -> tuple[list[dict[str, Any]], dict[str, Any] | None] | None:
        """Once, after the first observed pass: the modules in forward order, and the state of autocast."""
        found, self._modules = self._modules, None
        return None if found is None else (found, self._amp)

    def _begin(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        # An evaluation between two steps is none of ours, and must take the same path as without hooks.
        if not module.training:
            self.remove()
            return
        device = next((p.device.type for p in module.parameters()), "cpu")
        if self._amp is None:
            enabled = torch.is_autocast_enabled(device)
            dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.") if enabled else None
            self._amp = {"enabled": enabled, "dtype": dtype}

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling():
                return
            order = self._order
            if order is None or _in_backward() or not self._handles:
                return
            try:
                order.enter(path, module, tensors_in((args, kwargs)))
            except Exception as error:
                self._give_up(error)

        return enter

    def _leave(self, path: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling():
                return
            if not self._handles:
                return
            try:
                self._look(path, module, output)
            except Exception as error:
                self._give_up(error)

        return leave

    def _look(self, path: str, module: nn.Module, output: Any) -> None:
        outputs = tensors_in(output)
        again = _in_backward()
        if self._order is not None and not again:
            self._order.leave(path, outputs)
        if not outputs or torch._C._get_tracing_state() is not None:
            return
        out = outputs[0]
        if not is_plain(out) or not out.is_floating_point():
            return
        key = f"{'backward' if again else 'forward'}/{path}"
        if key in self._seen:
            return
        self._seen.add(key)
        if not again:
            with torch.no_grad():
                self._measure(path, module, out.detach())
        if out.requires_grad:
            dim = unit_dim(module, out)
            out.register_hook(lambda grad: self._look_back(path, dim, grad))  # type: ignore[no-untyped-call]

    def _measure(self, path: str, module: nn.Module, out: Tensor) -> None:
        rows, _ = ops.measure([out])
        self._parcel.put(f"act/{path}", rows[0])
        if isinstance(module, _CAN_DIE) and out.dim() > 0 and out.numel():
            dim = unit_dim(module, out)
            alive = (out != 0).movedim(dim, -1).reshape(-1, out.shape[dim]).any(0)
            self._parcel.put(f"act_dead/{path}", 1 - alive.double().mean())
        flat = _SATURATES.get(type(module))
        if flat is None and isinstance(module, nn.RNN) and module.nonlinearity == "tanh":
            flat = _flat_tanh
        if flat is not None and out.numel():
            self._parcel.put(f"act_saturated/{path}", torch.count_nonzero(flat(out)) / out.numel())

    def _look_back(self, path: str, dim: int, grad: Tensor) -> None:
        try:
            if not is_plain(grad):
                return
            if grad.numel():
                with torch.no_grad():
                    self._parcel.put(f"out/{path}", unit_norms(grad.detach(), dim))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        self.remove()
        log.warning(
            "gradkern: activations are not observed any more, for that failed: %s: %s",
            type(error).__name__,
            error,
        )


def unit_norms(grad: Tensor, dim: int) -> Tensor:
    """Norms of the units of a gradient, which are along `dim`: ``[units]``, float64 (on MPS float32).

    Squares of such elements could leave the range: those are divided by the largest first.
    """
    exact = torch.float32 if grad.device.type == "mps" else torch.float64
    if grad.dim() == 0:
        grad = grad.reshape(1)
    scale: Tensor | float = 1.0
    if grad.dtype == exact:
        scale = grad.abs().amax().nan_to_num(nan=1.0, posinf=1.0).clamp(min=torch.finfo(exact).tiny)
        squares = (grad / scale).square_()
    else:
        squares = grad.to(exact).square_()
    others = [other for other in range(grad.dim()) if other != dim % grad.dim()]
    return (squares.sum(others) if others else squares).sqrt() * scale


def unit_numbers(norms: Floats) -> tuple[float, float, float, float]:
    """What is recorded of the norms of units, in the order of `GRAD_KINDS`.

    A unit that is NaN counts as Inf: NaN would say that nothing was measured, and says so of the index where
    no unit is finite, for then none of them stands out.

    >>> from gradkern.monitor.hooks import unit_numbers
    >>> unit_numbers(np.array([3.0, 0.0, 4.0, 0.0]))
    (5.0, 0.5, 4.0, 2.0)
    """
    sizes = np.where(np.isnan(norms), np.inf, norms)
    worst = int(sizes.argmax())
    index = float(worst) if np.isfinite(sizes).any() else math.nan
    return float(np.linalg.norm(sizes)), float((norms > 1).mean()), float(sizes[worst]), index


def unit_dim(module: nn.Module, out: Tensor) -> int:
    """The dimension of an output along which its units are: channels of images, else the last one."""
    kind = type(module).__name__
    channels = out.dim() >= 4 or (out.dim() == 3 and kind.startswith(("Conv", "BatchNorm", "InstanceNorm")))
    return 1 if channels else -1


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
