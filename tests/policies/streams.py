"""Policies to try and streams of gradients to try them on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

import gradkern
from gradkern import reference
from gradkern.policies import Decision, Layout, Measured, Policy, State, all_finite, unit_sums

NAMES = ("embed.weight", "rnn.weight", "rnn.bias", "head.weight")
SHAPES = ((5, 4), (3, 2, 2), (7,), ())

# Small windows and warm-ups, so that a short stream crosses every edge.
POLICIES: dict[str, Callable[[], Policy]] = {
    "GlobalNorm": lambda: gradkern.GlobalNorm(1.0),
    "GlobalNorm_inf": lambda: gradkern.GlobalNorm(0.5, norm_type=float("inf")),
    "GlobalNorm_parts": lambda: gradkern.GlobalNorm(1.0, norm_over="rnn.*", apply_to=["rnn.*", "embed.*"]),
    "TensorNorm": lambda: gradkern.TensorNorm(1.0),
    "GroupNorm": lambda: gradkern.GroupNorm({"rnn.*": 0.5, "*": 2.0}),
    "Value": lambda: gradkern.Value(0.5),
    "Value_parts": lambda: gradkern.Value(0.5, apply_to="rnn.*"),
    "BlockRMS": lambda: gradkern.BlockRMS(0.5),
    "AGC": lambda: gradkern.AGC(0.1, exclude="head.*"),
    "AGC_tensor": lambda: gradkern.AGC(0.1, per="tensor"),
    "Percentile": lambda: gradkern.Percentile(30.0, window=9),
    "Percentile_tensor": lambda: gradkern.Percentile(80.0, window=9, per="tensor"),
    "ZClip": lambda: gradkern.ZClip(warmup=5, max_norm=4.0),
    "AdaGC": lambda: gradkern.AdaGC(warmup=5),
    "SkipSpike_std": lambda: gradkern.SkipSpike(z_limit=2.0, window=8),
    "SkipSpike_mad": lambda: gradkern.SkipSpike(z_limit=3.0, window=8, method="mad", max_norm=30.0),
    "SkipSpike_norm": lambda: gradkern.SkipSpike(None, max_norm=5.0),
    "Chain": lambda: gradkern.Chain(
        gradkern.SkipSpike(z_limit=2.5, window=8),
        gradkern.AGC(0.5),
        gradkern.AdaGC(warmup=3),
        gradkern.ZClip(warmup=4),
        gradkern.Percentile(70.0, window=6, per="tensor"),
        gradkern.Value(0.5),
    ),
}
WITH_HISTORY = [
    name
    for name in POLICIES
    if name.startswith(("Percentile", "ZClip", "AdaGC", "SkipSpike_s", "SkipSpike_m", "Chain"))
]


def layout(
    device: str = "cpu", names: Sequence[str] = NAMES, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Layout:
    return Layout(tuple(names), tuple(shapes), torch.device(device))


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def stream(steps: int, seed: int = 0) -> list[list[Tensor]]:
    """Gradients of each step: the size wanders, and now and then it jumps."""
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for step in range(steps):
        size = 1.0 + 0.5 * torch.rand((), generator=generator)
        if step % 13 == 11:
            size = size * 40.0
        grads.append([size * torch.randn(shape, generator=generator) for shape in SHAPES])
    return grads


def loss_of(step: int) -> Tensor:
    return torch.tensor(3.0 - 0.01 * step + (20.0 if step % 17 == 15 else 0.0))


def measure(grads: Sequence[Tensor], loss: Tensor | None = None, **options: object) -> Measured:
    """All that any policy needs, by the reference."""
    rows, total = reference.measure(grads)
    weight_rows, _ = reference.measure(weights())
    return Measured(
        total=total,
        rows=rows,
        weight_rows=weight_rows,
        units=unit_sums(grads, weights()),
        loss=loss,
        good=all_finite(total),
        **options,  # type: ignore[arg-type]
    )


def apply(grads: Sequence[Tensor], decision: Decision) -> list[Tensor]:
    """New gradients: the product in double, rounded once, then the clamp."""
    clipped = []
    first_unit = 0
    for index, grad in enumerate(grads):
        out = grad.double()
        if decision.coef is not None:
            out = out * (decision.coef if decision.coef.dim() == 0 else decision.coef[index])
        if decision.unit_coef is not None:
            units = grad.shape[0] if grad.dim() > 1 else 1
            of_unit = decision.unit_coef[first_unit : first_unit + units]
            first_unit += units
            out = out * (of_unit.reshape(-1, *[1] * (grad.dim() - 1)) if grad.dim() > 1 else of_unit[0])
        if isinstance(decision.bound, float):
            out = out.clamp(-decision.bound, decision.bound)
        elif decision.bound is not None:
            out = out.clamp(-decision.bound[index], decision.bound[index])
        clipped.append(out.to(grad.dtype))
    return clipped


def run(policy: Policy, state: State, grads: Iterable[tuple[int, Sequence[Tensor]]]) -> list[Decision]:
    """Decide and commit for each (step, gradients)."""
    decisions = []
    for step, one in grads:
        measured = measure(one, loss_of(step))
        decision = policy.decide(measured, state)
        decision.commit(measured.good)
        decisions.append(decision)
    return decisions


def tensors_of(state: State) -> list[Tensor]:
    """Everything the state remembers."""
    own = [*state.shared.values(), *state.per_tensor.values()]
    return own + [tensor for stage in state.stages for tensor in tensors_of(stage)]


def same_bits(a: Tensor | float | None, b: Tensor | float | None) -> bool:
    """Equal to the last bit, NaN included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and torch.equal(a.nan_to_num(-7.25), b.nan_to_num(-7.25))
            and torch.equal(a.isnan(), b.isnan())
        )
    return a == b


def same_decision(a: Decision, b: Decision) -> bool:
    return all(
        same_bits(getattr(a, part), getattr(b, part)) for part in ("coef", "unit_coef", "skip", "bound")
    )
