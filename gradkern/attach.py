"""Clipping inside `optimizer.step()`, and agreeing with a GradScaler on what is skipped."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from gradkern import ops, reference
from gradkern.apply import apply_, is_scalar
from gradkern.errors import NonFiniteGradientError
from gradkern.stats import GradStats
from gradkern.tally import Report

if TYPE_CHECKING:
    from gradkern.stepper import Judged, Stepper

# The optimizers whose fused kernels read two attributes of theirs in every step, float32 and 0-dim:
# `grad_scale`, which they divide gradients by, and `found_inf`, which makes them skip the step if exactly 1.
_TAKES_HANDOVER = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
_HANDOVER = ("grad_scale", "found_inf")
# GradScaler asks for this one: without it, it unscales by itself and leaves out the call of step() where it
# finds an Inf, so that no hook runs and nobody hears of the skip.
_SUPPORT = "_step_supports_amp_scaling"

_ABSENT = object()
_FLOAT32_MAX = torch.finfo(torch.float32).max
_NAMED = 5

_attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class Attachment:
    """A clipper's hooks on an optimizer, and what they have to put back after a step."""

    def __init__(
        self,
        stepper: Stepper,
        optimizer: torch.optim.Optimizer,
        nonfinite: str,
        apply: str,
        max_consecutive_skips: int | None,
    ) -> None:
        self._takes_handover = _is_fused(optimizer)
        _check(stepper, optimizer, apply, self._takes_handover)
        self._stepper = stepper
        self._optimizer = optimizer
        self._nonfinite = nonfinite
        self._apply = apply
        self._max_consecutive_skips = max_consecutive_skips
        self._before: dict[str, object] = {}  # the attributes we changed, as they were and as we left them
        self._left: dict[str, object] = {}
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._mostly_clipped = False
        self._warned = False
        self._step: FrameType | None = None  # the call of step() that we are in
        self._depth = 0  # calls of step() within it
        stepper.follow(optimizer)
        self._support = vars(optimizer).get(_SUPPORT, _ABSENT)
        setattr(optimizer, _SUPPORT, True)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _attached.add(optimizer)

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        self._restore()
        _set(self._optimizer, _SUPPORT, self._support)
        _attached.discard(self._optimizer)
        self._stepper.follow(None)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A subclass whose step() calls that of its base runs all hooks twice, one call within the other. What
        # is left of a step that raised looks alike, but is not running any more.
        caller = sys._getframe(1)
        if self._step is not None and _is_within(caller, self._step):
            self._depth += 1
            return
        self._step, self._depth = caller, 0
        try:
            self._clip(optimizer, args, kwargs)
        except BaseException:
            self._step = None
            raise

    @torch.no_grad()
    def _clip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._recover()
        self._takes_handover = _is_fused(optimizer)  # load_state_dict() may have changed that
        if (args[1] if len(args) > 1 else kwargs.get("closure")) is not None:
            raise ValueError(
                f"Clipper: {_kind(optimizer)}.step() was given a closure, which makes the gradients only "
                "after the clipper has looked. Call backward() first and step() without arguments."
            )
        stepper = self._stepper
        scale, found_inf = (_tensor(optimizer, word) for word in _HANDOVER)
        stepper.refresh()
        if found_inf is not None and scale is None and stepper.backward is not None:
            stepper.backward.forget()  # scaler.unscale_ has written to them, and no version tells of it
        judged = stepper.judge(self._nonfinite, stepper.loss, scale, found_inf)
        stepper.loss = None
        for_all_alike = (
            is_scalar(judged.decision) and self._nonfinite != "zero" and not stepper.tracked.excluded
        )
        if self._apply == "defer" and not self._takes_handover:
            raise _cannot_defer(optimizer)
        if self._apply == "defer" and not for_all_alike:
            raise ValueError(
                f"Clipper: apply='defer' hands one factor for all gradients to {_kind(optimizer)}, but "
                f"{stepper.policy!r} wants more than that (or nonfinite='zero', or clip_grad=False, do). "
                "Use apply='auto'."
            )
        skip = self._verdict(judged, found_inf)
        stepper.remember(judged, skip)
        self._look_back(judged.stats)

        self._before = {word: vars(optimizer).get(word, _ABSENT) for word in _HANDOVER}
        skips = self._skip(skip, found_inf)
        if skips is not True:
            unknown = skip if skips is None else None
            if for_all_alike and self._defers(judged, scale):
                self._defer(judged, scale, unknown)
            else:
                self._write(judged, scale, unknown)
        self._left = {word: vars(optimizer).get(word, _ABSENT) for word in _HANDOVER}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._depth > 0:
            self._depth -= 1
            return
        self._step = None
        self._restore()

    def _verdict(self, judged: Judged, found_inf: Tensor | None) -> Tensor | None:
        """Whether the step is to be skipped, 0-dim bool; None if nobody can want that."""
        verdicts = []
        if self._nonfinite == "skip":
            verdicts.append(judged.good.logical_not())
        if judged.decision.skip is not None:
            verdicts.append(judged.decision.skip)
        if found_inf is not None:
            verdicts.append(found_inf.to(judged.good.device) != 0)
        return None if not verdicts else torch.stack(verdicts).any()

    def _skip(self, skip: Tensor | None, found_inf: Tensor | None) -> bool | None:
        """See to it that a bad step does nothing. Whether it is one; None where only the device knows."""
        optimizer = self._optimizer
        readable = skip is not None and reference.is_readable(skip)
        if skip is None or (readable and not bool(skip)):
            if found_inf is not None:
                _set(optimizer, "found_inf", torch.zeros_like(found_inf) if self._takes_handover else None)
            return False
        if self._takes_handover and _can_skip_first(optimizer):
            # Exactly 1, and one number: anything else is no reason to skip, or an error.
            _set(optimizer, "found_inf", skip.to(torch.float32))
            return True if readable else None
        if not readable:
            self._warn_of_read()
        skipped = bool(skip)
        if found_inf is not None:
            _set(optimizer, "found_inf", None)
        if skipped:
            _set(optimizer, "grad_scale", None)
            self._hide()
        return skipped

    def _hide(self) -> None:
        """Take the gradients away until the step is over: no optimizer moves what has none."""
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._hidden.append((param, param.grad))
                    param.grad = None

    def _defers(self, judged: Judged, scale: Tensor | None) -> bool:
        if not self._takes_handover or self._apply == "eager":
            return False
        coef = judged.decision.coef
        if self._apply == "defer" or scale is not None:
            return True
        if coef is not None and reference.is_readable(coef):
            return coef.item() != 1
        return self._mostly_clipped

    def _defer(self, judged: Judged, scale: Tensor | None, skip: Tensor | None) -> None:
        """Let the optimizer divide by what is left of the loss scale and the coefficient."""
        one = torch.ones_like(judged.seen.total.select(0, 0))
        coef = one if judged.decision.coef is None else judged.decision.coef
        divisor = (one if scale is None else scale.to(one.device, one.dtype)) / coef
        _set(self._optimizer, "grad_scale", divisor.clamp(max=_FLOAT32_MAX).to(torch.float32))
        # What a float32 cannot hold is left to writing. Mostly it can, and this changes nothing.
        rest = torch.where(divisor > _FLOAT32_MAX, _FLOAT32_MAX / divisor, 1.0)
        if not (reference.is_readable(rest) and rest.item() == 1):
            apply_(judged.seen, judged.decision._replace(coef=rest), None, "keep", skip)

    def _write(self, judged: Judged, scale: Tensor | None, skip: Tensor | None) -> None:
        """Scale, and unscale, the gradients themselves."""
        factor = None
        if scale is not None:
            factor = scale.to(judged.seen.total.device, torch.float64).reciprocal()
            _set(self._optimizer, "grad_scale", None)
            ops.apply_(self._stepper.excluded_grads(), None, factor, math.inf, "keep")
        apply_(judged.seen, judged.decision, factor, self._nonfinite, skip)

    def _look_back(self, stats: GradStats) -> None:
        """Act on how things stood some steps ago, which the host can know without waiting."""
        report = self._stepper.tally.late(stats)
        if report is None:
            return
        self._mostly_clipped = report.clipped_share > 0.5
        limit = self._max_consecutive_skips
        if limit is not None and report.consecutive > limit:
            raise _too_many_skips(report, limit)

    def _restore(self) -> None:
        """Put back what `_before_step` took or changed."""
        for param, grad in self._hidden:
            param.grad = grad
        self._hidden.clear()
        for word, value in self._before.items():
            _set(self._optimizer, word, value)
        self._before = {}

    def _recover(self) -> None:
        """The same before a step, if the last one raised, so that no hook ran after it.

        What somebody else has set since stays; gradients of that step are not put over new ones.
        """
        self._hidden.clear()
        for word in list(self._before):
            if vars(self._optimizer).get(word, _ABSENT) is not self._left.get(word, _ABSENT):
                del self._before[word]
        self._restore()

    def _warn_of_read(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"Clipper: whether a step of {_kind(self._optimizer)} is skipped must be read from the "
                "device, one number a step. The fused Adam, AdamW, SGD and Adagrad need no reading "
                "(fused=True); nonfinite='keep' or 'zero' skips nothing.",
                stacklevel=6,
            )


@torch.no_grad()
def unscale_and_clip(
    stepper: Stepper,
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    nonfinite: str,
    loss: Tensor | float | None,
) -> GradStats:
    """See `Clipper.unscale_and_clip`."""
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is not OptState.READY:
        raise RuntimeError(
            "Clipper.unscale_and_clip: the gradients of this optimizer have been unscaled, or stepped, since "
            "the last scaler.update(). Leave out scaler.unscale_(optimizer)."
        )
    scale = scaler._get_scale_async()
    if scale is None:
        raise RuntimeError(
            "Clipper.unscale_and_clip: the scaler has not scaled anything yet. Call backward() on "
            "scaler.scale(loss)."
        )
    stepper.refresh()
    judged = stepper.judge(nonfinite, loss, scale)
    judged.refuse_skip(stepper.policy)
    skip = judged.good.logical_not()  # what the scaler makes of it, with any optimizer
    drops = _is_fused(optimizer) and not _can_skip_first(optimizer) and bool(skip)
    stepper.remember(judged, skip)
    factor = scale.to(judged.seen.total.device, torch.float64).reciprocal()
    apply_(judged.seen, judged.decision, factor, nonfinite)
    ops.apply_(stepper.excluded_grads(), None, factor, math.inf, "keep")
    found_inf = skip.to(scale.device, torch.float32)
    state["found_inf_per_device"] = {scale.device: found_inf}
    state["stage"] = OptState.UNSCALED
    if drops:  # the step would begin a momentum that nobody has written
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = None
    return judged.stats


def _check(stepper: Stepper, optimizer: torch.optim.Optimizer, apply: str, is_fused: bool) -> None:
    """Raise if the two cannot work together."""
    kind = _kind(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"Clipper.attach: needs an optimizer of torch, got {kind}.")
    if not getattr(type(optimizer).step, "hooked", False):
        raise ValueError(
            f"Clipper.attach: {kind}.step() runs no hooks, so that nothing would ever be clipped; it must be "
            "a wrapper around an optimizer. Attach to the one inside."
        )
    if optimizer in _attached:
        raise ValueError(
            f"Clipper.attach: a clipper is attached to this {kind} already. Call its detach() first."
        )
    if stepper.grad_attr != "grad":
        raise ValueError(
            f"Clipper.attach: {kind} steps by .grad, but the clipper looks at .{stepper.grad_attr}. Call the "
            "clipper by hand, before the framework makes .grad of it."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"Clipper.attach: {kind} computes gradients inside its step, several times, by a closure; there "
            "is no moment to clip them. Call gradkern.clip_ at the end of the closure."
        )
    if apply == "defer" and not is_fused:
        raise _cannot_defer(optimizer)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    is_sharded = any(type(tensor).__name__ == "DTensor" for param in params for tensor in (param, param.data))
    if is_fused and is_sharded and isinstance(optimizer, (torch.optim.SGD, torch.optim.Adagrad)):
        raise ValueError(
            f"Clipper.attach: torch has no fused {kind} for sharded parameters (DTensor): its step raises, "
            f"with or without clipping. Use {kind}(..., foreach=True), or a fused Adam or AdamW."
        )


def _cannot_defer(optimizer: torch.optim.Optimizer) -> ValueError:
    return ValueError(
        "Clipper.attach: apply='defer' needs an optimizer that divides the gradients itself: Adam, AdamW, "
        f"SGD or Adagrad with fused=True. For this {_kind(optimizer)} use apply='auto'."
    )


def _is_within(frame: FrameType, outer: FrameType) -> bool:
    caller = frame.f_back
    while caller is not None and caller is not outer:
        caller = caller.f_back
    return caller is not None


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, _TAKES_HANDOVER) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def _can_skip_first(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `found_inf` may skip this step.

    The fused SGD allocates its momentum in its first step and leaves it as it was found in memory if that
    step is skipped. Zeros make it the same as a first step, unless its dampening is to be left out there.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return True
    missing = [
        (param, group["dampening"])
        for group in optimizer.param_groups
        if group["momentum"] != 0
        for param in group["params"]
        if param.grad is not None and optimizer.state[param].get("momentum_buffer") is None
    ]
    if any(dampening != 0 for _, dampening in missing):
        return False
    for param, _ in missing:
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param.grad)
    return True


def _kind(optimizer: object) -> str:
    return type(optimizer).__name__


def _tensor(optimizer: torch.optim.Optimizer, word: str) -> Tensor | None:
    """What a scaler has set. Of an optimizer without gradients it adds up no flags, and sets 0."""
    value = getattr(optimizer, word, None)
    return value if isinstance(value, Tensor) else None


def _set(optimizer: torch.optim.Optimizer, word: str, value: object) -> None:
    if value is not _ABSENT:
        setattr(optimizer, word, value)
    elif word in vars(optimizer):
        delattr(optimizer, word)


def _too_many_skips(report: Report, limit: int) -> NonFiniteGradientError:
    """Says what is wrong with the gradients of the last of the skipped steps."""
    first = report.step - report.consecutive + 1
    rows = report.stats.rows.tolist()
    bad = [
        f"'{name}': {row[2]:.0f} NaN, {row[3]:.0f} Inf"
        for name, row in zip(report.stats.names, rows, strict=True)
        if row[2] + row[3] > 0
    ]
    what = "gradients that are not finite" if bad else "the largest gradients, all finite,"
    shown = bad or [f"'{name}': norm {norm:.4g}" for name, norm in report.stats.worst(_NAMED)]
    more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    error = NonFiniteGradientError(
        f"Clipper: {report.consecutive} steps in a row have been skipped, from step {first} to {report.step} "
        f"(counted from 1; max_consecutive_skips={limit}).\nIn step {report.step}, {what} were "
        f"{', '.join(shown[:_NAMED])}{more}.\n"
        "torch.autograd.set_detect_anomaly(True) finds the operation that makes a NaN; the usual causes are "
        "a learning rate or a loss scale that is too high."
    )
    error.stats = report.stats
    return error
