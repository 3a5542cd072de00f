"""Gradients to be clipped, what they were before, and a check in float64 of what became of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.shapes import Shapes

# Elements that are widened to float64 at a time: a cache holds all that is made of so few, and torch does not
# call its other threads for them.
_SLICE = 1 << 15
# What a check looks at where it does not look at everything.
_SAMPLED_TENSORS = 32
_SAMPLED_ELEMENTS = 16


class WrongResult(AssertionError):
    """A timed call gave another result than float64 arithmetic."""


class Gradients:
    """Parameters with gradients of the shapes and the joint norm asked for, the same numbers in every run.

    `zeros` is the share of elements, those at the beginning of each tensor, that are zero. The parameters'
    own values are never touched, and so take no memory.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, norm: float, zeros: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        numel = sum(math.prod(shape) for shape in shapes.values())
        deviation = norm / math.sqrt(numel * (1 - zeros))
        self.dtype = dtype
        self.module = nn.Module()
        self.params: list[nn.Parameter] = []
        self.originals: list[Tensor] = []
        for name, shape in shapes.items():
            original = torch.empty(shape).normal_(0, deviation, generator=generator)
            original.flatten()[: round(zeros * original.numel())] = 0
            param = nn.Parameter(torch.empty(shape, dtype=dtype))
            self.originals.append(original.to(dtype))
            param.grad = self.originals[-1].clone()
            self.params.append(param)
            _register(self.module, name, param)
        self.norm = exact_norm(self.originals)

    @property
    def numel(self) -> int:
        """Elements in all."""
        return sum(original.numel() for original in self.originals)

    @property
    def nbytes(self) -> int:
        """Bytes of all gradients."""
        return sum(original.nbytes for original in self.originals)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients of all parameters."""
        return [param.grad for param in self.params if param.grad is not None]

    def restore(self) -> None:
        """Undo all clipping."""
        torch._foreach_copy_(self.grads, self.originals)

    def check(
        self,
        norm: float,
        coef: float,
        tolerance: float,
        rounding: float,
        *,
        everything: bool,
        bound: float = math.inf,
        grads: Sequence[Tensor] | None = None,
    ) -> float:
        """Compare with float64: `norm`, and the gradients with `clamp(original * coef, ±bound)`.

        Args:
            tolerance, rounding: by how much the norm and each gradient may be off, relatively.
            everything: look at all elements, not at some drawn by chance.
            grads: what to look at instead of the parameters' gradients.

        Returns:
            By how much the norm is off, relatively.

        Raises:
            WrongResult: by more than that.
        """
        error = abs(norm - self.norm) / self.norm
        if not error <= tolerance:
            raise WrongResult(f"the norm is {norm!r}, off by {error:.1e}; float64 gives {self.norm!r}")
        found = self.grads if grads is None else grads
        for grad, original in self._all(found) if everything else self._some(found):
            if coef == 1 and bound == math.inf and torch.equal(grad, original):
                continue  # exact, and a fraction of the work
            expected = (original.double() * coef).clamp_(-bound, bound)
            # 1e-37: what is rounded to a denormal number is off by more, relatively.
            right = (grad.double() - expected).abs_() <= expected.abs_().mul_(rounding).add_(1e-37)
            if not bool(right.all()):
                raise WrongResult(
                    f"{int((~right).sum())} elements are not within {rounding:.1e} of float64's"
                )
        return error

    def _all(self, grads: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for grad, original in zip(grads, self.originals, strict=True):
            yield from zip(_slices(grad), _slices(original), strict=True)

    def _some(self, grads: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index in random.sample(range(len(grads)), min(len(grads), _SAMPLED_TENSORS)):
            places = torch.randint(grads[index].numel(), (_SAMPLED_ELEMENTS,))
            yield grads[index].flatten()[places], self.originals[index].flatten()[places]


def exact_norm(tensors: list[Tensor]) -> float:
    """The joint 2-norm in float64."""
    squares = (part.double().square_().sum().item() for tensor in tensors for part in _slices(tensor))
    return math.sqrt(math.fsum(squares))


def _slices(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.flatten(), _SLICE)


def _register(module: nn.Module, name: str, param: nn.Parameter) -> None:
    """Make `param` known to `module` under a dotted name, as a real model nests its modules."""
    *path, last = name.split(".")
    for step in path:
        if not hasattr(module, step):
            module.add_module(step, nn.Module())
        module = module.get_submodule(step)
    module.register_parameter(last, param)
