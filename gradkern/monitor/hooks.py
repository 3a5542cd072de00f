"""Forward activations and output gradients of modules, on the steps on which they are looked at.

Hooks are there for single steps only: they are added before a step that is to be observed and taken away
when the optimizer steps, so that all other steps run as if there were no monitor. They read detached values
and give nothing back.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gradkern import ops
from gradkern.monitor.host import Floats, Parcel, is_plain
from gradkern.monitor.meta import ForwardOrder, tensors_in
from gradkern.monitor.passes import Hook, can_train, is_aside, modules_to_wait_on

log = logging.getLogger("gradkern")

ACT_KINDS: Final = ("act_dead", "act_saturated", "act_nonfinite", "act_abs_max")
GRAD_KINDS: Final = ("out_grad_norm", "out_grad_unit_above_one", "out_grad_unit_max", "out_grad_unit_argmax")

# Functions that are zero on a half line, where nothing passes back.
_CAN_DIE: Final = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardswish)

# Elements that are widened to float64 at once: on the CPU what its caches hold, elsewhere 16 times as many.
PART: Final = 1 << 16

# In the flat part a function's slope is below a tenth of its steepest.
FLAT: Final = 0.1


# These give 1 where an output is in the flat part, else 0. The slope of tanh at output y is 1 - y², that of
# the sigmoid, as a share of its steepest, 1 - (2y - 1)².
_STEEP: Final = math.sqrt(1 - FLAT)


def _flat_tanh(out: Tensor) -> Tensor:
    return out.abs().gt_(_STEEP)


def _flat_sigmoid(out: Tensor) -> Tensor:
    return (out - 0.5).abs_().gt_(0.5 * _STEEP)


def _flat_softsign(out: Tensor) -> Tensor:
    return out.abs().gt_(1 - math.sqrt(FLAT))


def _flat_hardtanh(out: Tensor) -> Tensor:
    return out.abs().ge_(1)


def _flat_hardsigmoid(out: Tensor) -> Tensor:
    return (out <= 0).logical_or_(out >= 1)


_SATURATES: Final[dict[type[nn.Module], Callable[[Tensor], Tensor]]] = {
    nn.Tanh: _flat_tanh,
    nn.Sigmoid: _flat_sigmoid,
    nn.Softsign: _flat_softsign,
    nn.Hardtanh: _flat_hardtanh,
    nn.Hardsigmoid: _flat_hardsigmoid,
}


class Observer:
    """Looks at what the modules of a model give and get back, for one step at a time.

    The step begins with the first forward pass that trains: in training mode, with gradients. Evaluations
    and passes without gradients before it are passed over, and compute as without hooks; the evaluation mode
    counts only for a model whose last observed step had no other. Of each module the first call of the step
    is looked at, and of an output with several tensors the first. Code that runs compiled is not looked at:
    there the hooks leave nothing in the graph. Under activation checkpointing the forward pass counts once,
    and gradients come from whichever pass backward runs through.

    Args:
        model: whose modules, itself left out.

    Attributes:
        is_on: whether a step is looked at: from `add` to `take`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.is_on = False
        self._model = model
        self._handles: list[Any] = []
        self._waiting: dict[str, nn.Module] = {}  # those that have hooks before the step begins
        self._parcel = Parcel()
        self._seen: set[str] = set()
        self._followed: set[str] = set()  # modules whose output gradients come
        self._dims: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by output: along which its units are
        self._order: ForwardOrder | None = ForwardOrder()
        self._modules: list[dict[str, Any]] | None = None
        self._amp: dict[str, Any] | None = None
        self._mode: bool | None = None  # whether the model is training in this step; None: it did not begin
        self._was_called = self._trains_in_eval = False
        self._failed = False

    def add(self) -> None:
        """Add the hooks, for the coming step."""
        if self.is_on or self._failed:
            return
        self.is_on = True
        self._parcel, self._seen, self._followed, self._dims = Parcel(), set(), set(), {}
        self._mode, self._was_called = None, False
        self._waiting = modules_to_wait_on(self._model)
        for path, module in self._waiting.items():
            self._add_enter(path, module)

    def _add_enter(self, path: str, module: nn.Module) -> None:
        hook = Hook(partial(self._enter, path))
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _begin(self) -> None:
        """The step begins: add the other hooks."""
        self._mode = self._model.training
        for path, module in self._model.named_modules():
            if not path or isinstance(module, torch.jit.ScriptModule):
                continue
            if path not in self._waiting:
                self._add_enter(path, module)
            self._handles.append(module.register_forward_hook(Hook(partial(self._leave, path))))
        if self._amp is None:
            device = next((p.device.type for p in self._model.parameters()), "cpu")
            enabled = torch.is_autocast_enabled(device)
            dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.") if enabled else None
            self._amp = {"enabled": enabled, "dtype": dtype}

    def remove(self) -> None:
        """Take the hooks away: the step's passes are over."""
        if self._handles:
            self._trains_in_eval = self._was_called if self._mode is None else not self._mode
        for handle in self._handles:
            handle.remove()
        self._handles, self._dims, self._waiting = [], {}, {}

    def take(self) -> Parcel | None:
        """The step is over: what was seen, None if nothing was. Names are ``kind/module``."""
        self.remove()
        self.is_on = False
        if self._order is not None and self._seen:
            self._modules, self._order = self._order.modules(), None
        return self._parcel if self._seen else None

    def take_modules(self) -> tuple[list[dict[str, Any]], dict[str, Any] | None] | None:
        """Once, after the first observed pass: the modules in forward order, and the state of autocast."""
        found, self._modules = self._modules, None
        return None if found is None else (found, self._amp)

    def _belongs(self, module: nn.Module) -> bool:
        """Whether a call of a module is part of the step. The first that is begins it."""
        if not self._handles or is_aside():
            return False
        if self._mode is None:
            if not can_train():
                return False
            if not (self._trains_in_eval or (module.training and self._model.training)):
                self._was_called = True
                return False
            self._begin()
        elif self._model.training != self._mode:
            if self._mode or not can_train():  # an evaluation behind the step's passes
                self.remove()
                return False
            self._mode = True  # what was seen was an evaluation, and the model trains in training mode
            self._parcel, self._seen, self._followed = Parcel(), set(), set()
        return True

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        try:
            if self._belongs(module) and path and self._order is not None and not _in_backward():
                self._order.enter(path, module, tensors_in((args, kwargs)))
        except Exception as error:
            self._give_up(error)

    def _leave(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        try:
            if self._belongs(module):
                self._look(path, module, args, output)
        except Exception as error:
            self._give_up(error)

    def _look(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs = tensors_in(output)
        again = _in_backward()
        if self._order is not None and not again:
            self._order.leave(path, outputs)
        if not outputs or torch._C._get_tracing_state() is not None:
            return
        out = outputs[0]
        if not is_plain(out) or not out.is_floating_point():
            return
        dim = self._unit_dim(module, args, out)
        if not again and path not in self._seen:
            self._seen.add(path)
            with _alone():
                self._measure(path, module, out.detach(), dim)
        if out.requires_grad and path not in self._followed:
            self._followed.add(path)
            out.register_hook(partial(self._look_back, path, dim))  # type: ignore[no-untyped-call]

    def _unit_dim(self, module: nn.Module, args: Any, out: Tensor) -> int:
        """The dimension of the units of an output; an activation function has that of the layer before it."""
        given = next(
            (
                known[1]
                for tensor in (out, *tensors_in(args, limit=1))
                if (known := self._dims.get(id(tensor))) is not None
                and known[0]() is tensor
                and tensor.shape == out.shape
            ),
            None,
        )
        dim = unit_dim(module, out, given)
        self._dims[id(out)] = weakref.ref(out), dim
        return dim

    def _measure(self, path: str, module: nn.Module, out: Tensor, dim: int) -> None:
        rows, _ = ops.measure([out])
        self._parcel.put(f"act/{path}", rows[0])
        if isinstance(module, _CAN_DIE) and out.dim() > 0 and out.numel():
            alive = (out != 0).movedim(dim, -1).reshape(-1, out.shape[dim]).any(0)
            self._parcel.put(f"act_dead/{path}", 1 - alive.double().mean())
        flat = _SATURATES.get(type(module))
        if flat is None and isinstance(module, nn.RNN) and module.nonlinearity == "tanh":
            flat = _flat_tanh
        if flat is not None and out.numel():
            self._parcel.put(f"act_saturated/{path}", flat(out).mean(dtype=torch.float32))

    def _look_back(self, path: str, dim: int, grad: Tensor) -> None:
        try:
            if is_plain(grad) and grad.numel() and not is_aside():
                with _alone():
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

    Squares of such elements could leave the range: those are divided by the largest first. Others are widened
    part by part, for a whole one of half precision would take four times the memory.
    """
    exact = torch.float32 if grad.device.type == "mps" else torch.float64
    if grad.dim() < 2:
        return grad.reshape(-1).to(exact).abs()
    scale: Tensor | None = None
    if grad.dtype == exact:
        scale = grad.abs().amax().nan_to_num(nan=1.0, posinf=1.0).clamp(min=torch.finfo(exact).tiny)
    others = [other for other in range(grad.dim()) if other != dim % grad.dim()]
    longest = max(others, key=lambda other: grad.shape[other])
    sums = torch.zeros(grad.shape[dim], dtype=exact, device=grad.device)
    most = PART if grad.is_cpu else 16 * PART
    for part in torch.split(grad, max(most * grad.shape[longest] // grad.numel(), 1), longest):
        wide = part.to(exact) if scale is None else part / scale
        sums += wide.square_().sum(others)
    return sums.sqrt() if scale is None else sums.sqrt() * scale


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


def unit_dim(module: nn.Module, out: Tensor, given: int | None = None) -> int:
    """The dimension of an output along which its units are.

    Layers that mix units know it, others leave it as it is `given` them. Where nobody knows, it is the
    channels of images, else the last one.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return min(1, out.dim() - 1)
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase)):
        return -1
    if given is not None:
        return given
    return 1 if out.dim() >= 4 or (out.dim() == 3 and "Pool" in type(module).__name__) else -1


@contextmanager
def _alone() -> Iterator[None]:
    """Arithmetic inside is seen by nobody: neither by autograd nor by modes that count operations.

    Selective activation checkpointing is such a mode. It would keep our results among those of the model.
    """
    with torch.no_grad(), _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext():
        yield


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
