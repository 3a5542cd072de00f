"""Which operation made the first NaN or Inf: one step, run again with every operation watched."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradkern.monitor.meta import tensors_in
from gradkern.monitor.replay import check_call, untouched

_TORCH: Final = os.path.dirname(torch.__file__) + os.sep
_GRADKERN: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

# What they give was never computed, and may be anything.
_UNINITIALISED: Final = ("empty", "new_empty", "resize", "set_", "alias", "detach", "view", "as_strided")


@dataclass(frozen=True)
class Origin:
    """Where the first NaN or Inf came from.

    Attributes:
        direction: "forward", "backward", or "input": it was there before any operation.
        module: path of the module that ran, or whose backward ran; "" outside all modules.
        op: the operation, in torch's words: "aten.log.default"; of an input, the first that read it.
        name: of an input, the parameter or buffer; "" if it is none of them (the batch, most likely).
        nan_count: NaN elements that came out; inf_count: Inf elements.
        shapes: of the tensors that went in.
        ranges: smallest and largest finite value of each of them.
        source: file, line and text of the code that called it; of a backward operation, of its forward one.
    """

    direction: Literal["forward", "backward", "input"]
    module: str
    op: str
    name: str = ""
    nan_count: int = 0
    inf_count: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    ranges: list[tuple[float, float]] = field(default_factory=list)
    source: str = ""

    def __str__(self) -> str:
        counts = [f"{n} {word}" for n, word in ((self.nan_count, "NaN"), (self.inf_count, "Inf")) if n]
        inputs = ", ".join(
            f"{list(shape)} in [{low:.4g}, {high:.4g}]"
            for shape, (low, high) in zip(self.shapes, self.ranges, strict=True)
        )
        where = f" in module {self.module!r}" if self.module else ""
        if self.direction == "input":
            what = repr(self.name) if self.name else "an input that is neither parameter nor buffer"
            head = f"{' and '.join(counts)} were there from the start: {what}, read by {self.op}{where}"
        else:
            made = f"{' and '.join(counts)} from {inputs or 'no tensor'}"
            head = f"{self.op}{where}, {self.direction}, made {made}"
        return head + (f"\n  {self.source}" if self.source else "")


def trace_nonfinite(step_fn: Callable[[], object], model: nn.Module) -> Origin | None:
    """Run a step again, and name the first operation that made a NaN or Inf from finite inputs.

    Of several, the one whose result reached the loss or, if that is finite, the gradients: a mask of -Inf
    that a softmax takes away is no fault. Compiled code is run without compilation. Every operation's inputs
    and results are read, and parameters and buffers copied; at the end these, gradients and random state are
    as they were.

    Args:
        step_fn: runs the forward pass and, if gradients are the question, `backward()`; not the optimizer's
            step. It should return the loss. To repeat a step that is over, run this inside
            `monitor.replay()`, which puts back what that step began with.
        model: whose modules, parameters and buffers are named.

    Returns:
        The origin, or None if the loss and all gradients are finite.

    Raises:
        TypeError: `step_fn` is no function, or `model` no module.

    >>> class Log(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x.log()
    >>> model = torch.nn.Sequential(torch.nn.ReLU(), Log())
    >>> origin = gradkern.trace_nonfinite(lambda: model(torch.tensor([2.0, -1.0])).sum(), model)
    >>> origin.op, origin.module, origin.inf_count, origin.ranges
    ('aten.log.default', '1', 1, [(0.0, 2.0)])
    """
    check_call("trace_nonfinite", step_fn, model)
    watch = _Watch(model)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(_eager())
        stack.enter_context(watch.hooks())
        with watch:
            result = step_fn()
        return watch.verdict(result)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at what every operation takes and gives; remembers of bad values where they come from."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._names = {
            _key(tensor): name
            for name, tensor in [*model.named_buffers(), *model.named_parameters()]
            if tensor.layout == torch.strided
        }
        self._stack: list[str] = []
        self._forward: dict[int, tuple[str, str]] = {}  # by number of the autograd node: module, source
        self._origins: list[Origin] = []
        self._taint: dict[int, int] = {}  # by storage: which origin
        self._kept: list[Any] = []  # storages that keys belong to

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow which module runs."""
        handles = []
        for path, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(self._push(path)))
            handles.append(module.register_forward_hook(self._pop, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _push(self, path: str) -> Callable[..., None]:
        def push(module: nn.Module, args: Any) -> None:
            self._stack.append(path)

        return push

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_backward = torch._C._current_graph_task_id() != -1 and not self._stack
        if not is_backward:
            number = torch._C._autograd._get_sequence_nr() - 1
            if number not in self._forward:  # operations that follow without a node of their own are not it
                self._forward[number] = self._stack[-1] if self._stack else "", _source()
        given = [tensor for tensor in tensors_in((args, kwargs), limit=1 << 20) if _is_checked(tensor)]
        mutates = func._schema.is_mutable
        bad_before = [tensor for tensor in given if not _is_finite(tensor)] if mutates else None
        before = [_range(tensor) for tensor in given] if mutates else None
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(_UNINITIALISED):
            return result
        out = [tensor for tensor in tensors_in(result, limit=1 << 20) if _is_checked(tensor)]
        bad = [tensor for tensor in out if not _is_finite(tensor)]
        if bad:
            bad_given = [t for t in given if not _is_finite(t)] if bad_before is None else bad_before
            self._note(func, args, kwargs, given, bad_given, bad, before, is_backward)
        return result

    def _note(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        bad_given: list[Tensor],
        bad: list[Tensor],
        ranges: list[tuple[float, float]] | None,
        is_backward: bool,
    ) -> None:
        known = [self._taint[_key(t)] for t in bad_given if _key(t) in self._taint]
        if known:
            origin = min(known)
        else:
            module, source = self._place(is_backward)
            looked_at = bad_given or bad
            nan_count = sum(int(t.isnan().sum()) for t in looked_at)
            inf_count = sum(int((~t.isfinite()).sum()) for t in looked_at) - nan_count
            name = next((self._names[_key(t)] for t in bad_given if _key(t) in self._names), "")
            direction: Literal["forward", "backward", "input"] = "backward" if is_backward else "forward"
            if bad_given:
                direction = "input"
            self._origins.append(
                Origin(
                    direction,
                    module,
                    str(func),
                    name,
                    nan_count,
                    inf_count,
                    [tuple(t.shape) for t in given],
                    ranges if ranges is not None else [_range(t) for t in given],
                    source,
                )
            )
            origin = len(self._origins) - 1
            for tensor in bad_given:
                self._mark(tensor, origin)
        for tensor in bad:
            self._mark(tensor, origin)

    def _mark(self, tensor: Tensor, origin: int) -> None:
        key = _key(tensor)
        if key not in self._taint:
            self._kept.append(tensor.untyped_storage())
        self._taint[key] = origin

    def _place(self, is_backward: bool) -> tuple[str, str]:
        if not is_backward:
            return self._stack[-1] if self._stack else "", _source()
        node = torch._C._current_autograd_node()
        if node is None:
            return "", ""
        return self._forward.get(node._sequence_nr(), ("", ""))

    def verdict(self, result: object) -> Origin | None:
        """The origin of what went wrong with the result, else with the gradients."""
        ends = [t.detach() for t in tensors_in(result) if _is_checked(t)]
        grads = [p.grad.detach() for p in self._model.parameters() if p.grad is not None]
        for tensors in (ends, [grad for grad in grads if _is_checked(grad)]):
            bad = [tensor for tensor in tensors if not _is_finite(tensor)]
            found = [self._taint[_key(tensor)] for tensor in bad if _key(tensor) in self._taint]
            if found:
                return self._origins[min(found)]
            if bad and self._origins:
                return self._origins[0]
        return self._origins[0] if self._origins and not ends and not grads else None


@contextmanager
def _eager() -> Iterator[None]:
    """Run what is compiled without compilation. Nothing to do where nothing has been compiled."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_checked(tensor: Tensor) -> bool:
    return (
        (tensor.is_floating_point() or tensor.is_complex())
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and tensor.numel() > 0
    )


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _range(tensor: Tensor) -> tuple[float, float]:
    values = tensor.detach().abs() if tensor.is_complex() else tensor.detach()
    kept = values[values.isfinite()].to(torch.float64) if values.device.type != "mps" else values
    return (float(kept.amin()), float(kept.amax())) if kept.numel() else (float("nan"), float("nan"))


def _source() -> str:
    """File, line and text of the innermost frame that belongs to neither torch nor gradkern."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((_TORCH, _GRADKERN)) and not path.startswith("<frozen"):
            text = linecache.getline(path, frame.f_lineno).strip()
            return f"{path}:{frame.f_lineno}, in {frame.f_code.co_name}: {text}"
        if frame.f_back is None:
            return ""
        frame = frame.f_back
    return ""
