"""The object for training loops: it measures, decides by a policy, and applies, step after step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradkern.apply import apply_
from gradkern.attach import Attachment, unscale_and_clip
from gradkern.backward import BackwardRows
from gradkern.params import Params
from gradkern.policies import Policy, as_policy
from gradkern.stats import GradStats, least
from gradkern.stepper import Stepper
from gradkern.tally import WINDOW

_WORDS = ("keep", "zero", "propagate", "raise", "skip")
_APPLY = ("auto", "eager", "defer")


class Clipper:
    """Clips the gradients of a model on every step, by a policy.

    Either call it between `backward()` and `optimizer.step()`, or `attach` it to the optimizer once. It
    follows the model: parameters may be frozen, added, replaced, or given another dtype or device between
    steps; the policy's histories go on under their names.

    Args:
        model_or_params: a module, or what `gradkern.clip_` takes, under names that stay the same from run to
            run if its state is to be saved.
        policy: a policy of `gradkern`, or a number: the largest joint norm.
        nonfinite: what becomes of NaN and Inf.
            "keep", "zero", "propagate", "raise": as in `gradkern.clip_`; "keep" if called by hand.
            "skip": the optimizer does not move, neither parameters nor state. Needs `attach`, and is the rule
            then.
        apply: how gradients are scaled by an attached clipper. Measuring reads them once. For N bytes of
            gradients, beyond what the optimizer itself reads:
            "eager": they are written only if something is clipped (2N then, else 0), bit for bit as by
            `gradkern.clip_`.
            "defer": a fused Adam, AdamW, SGD or Adagrad divides while it reads them (it then writes all of
            them: N on every step, 2 % of a step on the CPU), by a float32; only for a policy with one
            coefficient for all.
            "auto": "defer" where that is possible and pays: on the CPU on steps that are clipped; elsewhere
            when most of the last 100 steps were; and under a GradScaler, whose division it then shares.
        measure: "after" backward, all at once; or in "backward", each gradient as it is produced: no pass of
            its own. Not for gradients that are reduced afterwards (DistributedDataParallel).
        micro_batches: backward passes that accumulate for a step; with measure="backward" only the last is
            measured. `accumulating` does the same where their number varies.
        grad_attr: the attribute of a parameter that holds its gradient, for frameworks with `main_grad`.
        max_consecutive_skips: an attached clipper raises once more steps than this were skipped in a row.
            None: never.

    Raises:
        ValueError, TypeError: an argument is impossible, or a pattern of the policy matches no parameter.

    >>> model = torch.nn.Linear(2, 1)
    >>> clipper = gradkern.Clipper(model, 0.5)
    >>> model(torch.ones(4, 2)).sum().backward()
    >>> stats = clipper()
    >>> f"{stats:.2f}", f"{stats.clipped_norm:.2f}"
    ('6.93', '0.50')
    """

    def __init__(
        self,
        model_or_params: Params,
        policy: Policy | float = 1.0,
        *,
        nonfinite: str | None = None,
        apply: str = "auto",
        measure: str = "after",
        micro_batches: int = 1,
        grad_attr: str = "grad",
        max_consecutive_skips: int | None = 20,
    ) -> None:
        _check_word("nonfinite", nonfinite, (None, *_WORDS))
        _check_word("apply", apply, _APPLY)
        _check_word("measure", measure, ("after", "backward"))
        _check_count("micro_batches", micro_batches)
        if max_consecutive_skips is not None:
            _check_count("max_consecutive_skips", max_consecutive_skips)
        if measure == "backward" and grad_attr != "grad":
            raise ValueError(
                f"Clipper: measure='backward' sees what backward leaves in .grad, not {grad_attr!r}. "
                "Use measure='after'."
            )
        if measure == "backward" and isinstance(model_or_params, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "Clipper: measure='backward' would measure gradients that DistributedDataParallel has not "
                "averaged yet. Use measure='after'."
            )
        self._apply = apply
        self._nonfinite = nonfinite
        self._max_consecutive_skips = max_consecutive_skips
        self._backward = BackwardRows(micro_batches) if measure == "backward" else None
        self._stepper = Stepper(model_or_params, as_policy(policy), grad_attr, self._backward)
        self._attachment: Attachment | None = None

    @torch.no_grad()
    def __call__(self, loss: Tensor | float | None = None) -> GradStats:
        """Measure the gradients, decide, and clip them in place. Waits for no device (except under "raise").

        Args:
            loss: this step's loss, one number, for policies that look at it.

        Returns:
            The statistics before clipping, as `gradkern.clip_` returns them; also in `last`.

        Raises:
            RuntimeError: the clipper is attached to an optimizer.
            ValueError: "skip", or a policy that skips, without `attach`; a policy needs `loss`.
            NonFiniteGradientError: under "raise".
            TypeError: a gradient cannot be clipped. In every case nothing has been written or remembered.
        """
        if self._attachment is not None:
            raise RuntimeError(
                "Clipper: it is attached, and clips inside optimizer.step(); called by hand it would clip "
                "twice. Leave out this call, or detach() it first."
            )
        if self._apply == "defer":
            raise ValueError(
                "Clipper: apply='defer' hands over to a fused optimizer. Use attach(optimizer), or 'auto'."
            )
        word = self._nonfinite or "keep"
        if word == "skip":
            raise ValueError(
                "Clipper: nonfinite='skip' leaves out the optimizer's step, which this call cannot do. Use "
                "attach(optimizer), or another word: 'keep', 'zero', 'propagate', 'raise'."
            )
        stepper = self._stepper
        stepper.refresh()
        clipped = None if word == "raise" else stepper.clip_(word)
        if clipped is not None:
            return clipped
        judged = stepper.judge(word, loss)
        judged.refuse_skip(stepper.policy)
        stepper.remember(judged, None)
        apply_(judged.seen, judged.decision, None, word)
        return judged.stats

    def __repr__(self) -> str:
        attached = "" if self._attachment is None else ", attached"
        return f"Clipper({self.policy!r}, {len(self._stepper.tracked.items)} parameters{attached})"

    @property
    def policy(self) -> Policy:
        """What decides."""
        return self._stepper.policy

    @property
    def last(self) -> GradStats | None:
        """The statistics of the last step, before clipping."""
        return self._stepper.last

    @property
    def loss(self) -> Tensor | float | None:
        """Attached, the loss of the coming step, for policies that look at it: `clipper.loss = loss`.

        Holds for one step. Kept without its graph.
        """
        return self._stepper.loss

    @loss.setter
    def loss(self, loss: Tensor | float | None) -> None:
        self._stepper.loss = loss.detach() if isinstance(loss, Tensor) else loss

    def attach(self, optimizer: torch.optim.Optimizer) -> Clipper:
        """Clip inside every `optimizer.step()` from now on. Returns the clipper.

        Works for any optimizer of torch's kind that takes no closure, subclasses that call `super().step()`
        and wrappers that run the hooks of `torch.optim.Optimizer` among them; under a GradScaler too (call
        neither `scaler.unscale_` nor anything else for it). It clips what the optimizer steps, whatever else
        the model has; of several optimizers each takes a clipper of its own. Groups with the key
        `clip_grad=False` are neither measured nor scaled (though their NaN still skip the step).

        A bad step is skipped without a host read by the fused Adam, AdamW, SGD and Adagrad, and on the CPU by
        every optimizer. On another device with another optimizer one flag a step is read on the host, and a
        warning says so once. A GradScaler then no longer leaves out the call of `step` by itself.

        Raises:
            ValueError: a closure is needed (LBFGS), the optimizer steps parameters that are not the
                clipper's, the clipper or the optimizer is attached already, or apply="defer" without a fused
                optimizer. Nothing has changed.

        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        >>> clipper = gradkern.Clipper(model, 1.0).attach(optimizer)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> clipper.metrics()["clipped_norm"]
        1.0
        """
        if self._attachment is not None:
            raise ValueError("Clipper.attach: it is attached already. Call detach() first.")
        word = self._nonfinite or "skip"
        self._attachment = Attachment(
            self._stepper, optimizer, word, self._apply, self._max_consecutive_skips
        )
        return self

    def detach(self) -> None:
        """Undo `attach`: the optimizer is left as it was."""
        if self._attachment is None:
            raise RuntimeError("Clipper.detach: it is not attached.")
        attachment, self._attachment = self._attachment, None
        attachment.remove()

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around the backward passes of all micro-batches but the last: with measure="backward" they need
        not be measured. Otherwise it does nothing.

        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = gradkern.Clipper(model, measure="backward")
        >>> with clipper.accumulating():
        ...     model(torch.ones(4, 2)).sum().backward()
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> float(clipper()["bias"].norm)
        8.0
        """
        if self._backward is None:
            yield
            return
        before, self._backward.paused = self._backward.paused, True
        try:
            yield
        finally:
            self._backward.paused = before

    @torch.no_grad()
    def unscale_and_clip(
        self,
        scaler: torch.amp.GradScaler,
        optimizer: torch.optim.Optimizer,
        loss: Tensor | float | None = None,
    ) -> GradStats:
        """`scaler.unscale_(optimizer)` and clipping in one: a read, and one pass that writes (3N, not 5N).

        Clips what the optimizer steps, from now on only that, and tells the scaler whether an Inf or NaN
        was found; call `scaler.step(optimizer)` and `scaler.update()` afterwards, as ever. Gradients may be
        of any dtype. Waits for no device, except that a fused SGD with dampening is asked once, before its
        first step, whether it may take it.

        Raises:
            TypeError: `optimizer` is none of torch.
            RuntimeError: they have been unscaled already, or the clipper is attached.
            ValueError: the optimizer steps parameters that are not the clipper's; and as for a call.

        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scaler = torch.amp.GradScaler("cpu")
        >>> clipper = gradkern.Clipper(model, 1.0)
        >>> scaler.scale(model(torch.ones(4, 2)).sum()).backward()
        >>> stats = clipper.unscale_and_clip(scaler, optimizer)
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> f"{stats:.2f}"
        '6.93'
        """
        if self._attachment is not None:
            raise RuntimeError(
                "Clipper.unscale_and_clip: it is attached, and does this inside scaler.step(optimizer)."
            )
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "Clipper.unscale_and_clip: needs a GradScaler and an optimizer, in this order, got "
                f"{type(scaler).__name__} and {type(optimizer).__name__}."
            )
        followed = self._stepper.tracked.optimizer
        if followed is None:
            self._stepper.follow(optimizer)
        elif followed is not optimizer:
            raise ValueError(
                f"Clipper.unscale_and_clip: it looks after a {type(followed).__name__} already. Of several "
                "optimizers each takes a Clipper of its own."
            )
        if not scaler.is_enabled():
            return self(loss)
        return unscale_and_clip(self._stepper, scaler, optimizer, self._nonfinite or "keep", loss)

    def metrics(self) -> dict[str, float]:
        """The last step and the run in numbers, for a logger. Waits for the device; nothing else does.

        norm, clipped_norm, coef (the smallest, where there are several), steps, skipped_steps,
        clipped_fraction (of the last 100 steps), and of policies that have them threshold and z.

        Raises:
            RuntimeError: no step has been taken yet.
        """
        stats, tally, info = self._stepper.last, self._stepper.tally, self._stepper.info
        if stats is None:
            raise RuntimeError("Clipper.metrics: no step has been clipped yet. Call it after the first step.")
        numbers = {"norm": stats.norm, "clipped_norm": stats.clipped_norm, "coef": least(stats.coef)}
        steps, skipped, _ = tally.counts.unbind()
        numbers["clipped_fraction"] = tally.clipped.sum().double() / steps.clamp(1, WINDOW)
        numbers |= {"skipped_steps": skipped, "steps": steps}
        if self._stepper.max_norm < math.inf:
            numbers["threshold"] = torch.full_like(stats.norm, self._stepper.max_norm)
        numbers |= {word: info[word] for word in ("threshold", "z") if word in info and info[word].dim() == 0}
        values = torch.stack([number.to(torch.float64) for number in numbers.values()]).tolist()
        return dict(zip(numbers, values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The policy's history, by names of parameters, and the counts: a copy, still on the device."""
        return self._stepper.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any], strict: bool = True) -> None:
        """Go on where `state_dict()` was taken.

        Args:
            saved: from a clipper with the same policy.
            strict: the names must be the same. Otherwise those in both keep their histories: for a model that
                has gained or lost layers.

        Raises:
            ValueError: saved by something else or (strict) for other parameters, whose names are listed.
                Nothing has been loaded.
        """
        self._stepper.load_state_dict(saved, strict)


def _check_word(name: str, word: object, known: tuple[object, ...]) -> None:
    if word not in known:
        words = ", ".join(repr(one) for one in known if one is not None)
        raise ValueError(f"Clipper: {name} must be one of {words}, got {word!r}.")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Clipper: {name} must be a whole number of at least 1, got {value!r}.")
