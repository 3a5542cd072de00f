"""What else is at work around the step of an optimizer: a GradScaler, a clipper that is attached."""

from __future__ import annotations

import sys
from types import FrameType

import torch

from gradkern.attach import Attachment
from gradkern.stepper import Stepper

# Between a hook of an optimizer and the scaler are the step's wrapper, that of a learning rate schedule, and
# what a framework puts around them.
DEPTH = 8


def calling_scaler() -> torch.amp.GradScaler | None:
    """The GradScaler whose `step` is running; to be asked in a hook that an optimizer calls in its step."""
    if torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe(1)
    for _ in range(DEPTH):
        if frame is None:
            return None
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler = frame.f_locals["self"]
            return scaler if isinstance(scaler, torch.amp.GradScaler) else None
        frame = frame.f_back
    return None


def attached_stepper(optimizer: torch.optim.Optimizer) -> Stepper | None:
    """What decides in the `gradkern.Clipper` that is attached to an optimizer, if one is."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Attachment):
            return owner._stepper
    return None
