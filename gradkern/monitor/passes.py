"""Which forward passes belong to training, and hooks on modules that stay out of their copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_aside = 0


@contextmanager
def aside() -> Iterator[None]:
    """What runs inside is no training step: a step run again, a probe."""
    global _aside
    _aside += 1
    try:
        yield
    finally:
        _aside -= 1


def can_train() -> bool:
    """Whether a forward pass that begins now may be one of a training step: gradients are asked for."""
    return not _aside and torch.is_grad_enabled() and torch._C._get_tracing_state() is None


def is_aside() -> bool:
    """Whether what runs is no training step."""
    return _aside > 0


def modules_to_wait_on(model: nn.Module) -> dict[str, nn.Module]:
    """Modules on which hooks leave an evaluation as it is, by path.

    An `nn.TransformerEncoderLayer` computes in another way where it or a module inside it has one.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    inside = {id(module) for layer in layers for module in layer.modules()}
    return {
        path: module
        for path, module in model.named_modules()
        if id(module) not in inside and not isinstance(module, torch.jit.ScriptModule)
    }


class Hook:
    """A hook on a module, forward or before it, that code which is compiled does not see.

    A copy of the module, made by `copy.deepcopy` or by pickling it, has none of it: there it does nothing and
    takes itself away when the module is called.

    Args:
        function: called with what torch gives a hook; gives nothing back. None in a copy.
    """

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __call__(self, module: nn.Module, *given: Any) -> None:
        """What torch calls."""
        if torch.compiler.is_compiling():
            return
        if self._function is not None:
            self._function(module, *given)
            return
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()

    @property
    def __name__(self) -> str:
        # Of hooks, torch.jit.script alone asks for it, to compile them.
        raise AttributeError(
            "gradkern: torch.jit.script compiles the hooks of a model too, and cannot compile those that the "
            "monitor has there for the coming step. Script the model between optimizer.step() and "
            "monitor.step(), or make the Monitor with activations_every=0 and without keep_batch."
        )
