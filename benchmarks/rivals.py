"""Clipping as others do it: torch compiled, and optax jitted. Each in the form that is fastest for it."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.gradients import Gradients


def has_optax() -> bool:
    """Whether optax can be measured here."""
    return importlib.util.find_spec("optax") is not None


def _clip(grads: list[Tensor], max_norm: float) -> Tensor:
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


# On gradients, not on parameters as `clip_grad_norm_` takes them: that takes longer to compile and to run.
compiled_clip = torch.compile(_clip, fullgraph=True)


class Optax:
    """`optax.clip_by_global_norm`, jitted, with gradients donated so that it may clip them in place.

    A call returns the norm, once the gradients are there. `restore` has to run before each.
    """

    def __init__(self, gradients: Gradients, max_norm: float) -> None:
        import jax  # type: ignore[import-not-found, unused-ignore]
        import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]
        import optax  # type: ignore[import-not-found, unused-ignore]

        clip = optax.clip_by_global_norm(max_norm)

        def step(grads: list[Any]) -> Any:
            clipped, _ = clip.update(grads, clip.init(grads))
            return clipped, optax.tree.norm(grads)

        dtype = jnp.bfloat16 if gradients.dtype == torch.bfloat16 else jnp.float32
        self._originals = [jnp.asarray(grad.float().numpy(), dtype) for grad in gradients.originals]
        self._step = jax.jit(step, donate_argnums=0)
        self._copy = jax.jit(lambda arrays: [jnp.copy(array) for array in arrays])
        self._wait = jax.block_until_ready
        self._grads: list[Any] = []

    def restore(self) -> None:
        """Undo all clipping."""
        self._grads = self._wait(self._copy(self._originals))

    def __call__(self) -> Any:
        """Clip."""
        self._grads, norm = self._wait(self._step(self._grads))
        return norm

    def grads(self) -> list[Tensor]:
        """The gradients as they are now, without a copy."""
        return [from_dlpack(grad) for grad in self._grads]
