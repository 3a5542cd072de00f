"""The rows of the benchmark: what is done, by whom, and how fast it has to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, SupportsFloat

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradkern
from benchmarks import shapes
from benchmarks.gradients import Gradients, WrongResult
from benchmarks.machine import Buffer
from benchmarks.measure import Contender
from benchmarks.results import Goal
from benchmarks.rivals import Optax, compiled_clip
from benchmarks.shapes import Shapes
from gradkern import ops

MAX_NORM = 1.0
# Joint norms of gradients that MAX_NORM leaves alone, and of those that it clips.
SMALL_NORM, LARGE_NORM = 0.5, 3.0

# What a norm may be off by, relatively: gradkern's as it promises; the others' because they add up 64 Mi
# squares in float32 (torch: 0.5 %) or round to bfloat16 (torch: 0.4 %; optax, in each addition: 1.6 %).
OUR_TOLERANCE, THEIR_TOLERANCE = 1e-12, 0.02

Rivals = Literal["compiled", "optax"]


@dataclass(frozen=True)
class Setting:
    """How the rows are built: with memory to measure ceilings on, and against which rivals."""

    buffer: Buffer | None = None
    rivals: frozenset[Rivals] = frozenset()


@dataclass(frozen=True)
class Case:
    """One row.

    `start` says where the gradients are when a call begins: in "memory", since there are more of them than
    any cache holds; in "caches", as the contender before has left them; or "flushed": small enough for a
    cache, but all caches are filled with something else before every call.
    `tiny` are the shapes for tests, where the first few cut down would not do. `group` is the table's part.
    """

    key: str
    work: str
    shapes: Callable[[], Shapes]
    build: Callable[[Case, Gradients, Setting], list[Contender]]
    goals: tuple[Goal, ...]
    dtype: torch.dtype = torch.float32
    norm: float = SMALL_NORM
    zeros: float = 0.0
    start: Literal["memory", "caches", "flushed"] = "caches"
    rivals: frozenset[Rivals] = frozenset()
    tiny: Callable[[], Shapes] | None = None
    group: str = "one process's gradients"

    def gradients(self, *, tiny: bool = False) -> Gradients:
        """The gradients of this row; if `tiny` only a few, of a few elements each."""
        found = self.shapes()
        if tiny:
            found = shapes.shrunk(found) if self.tiny is None else self.tiny()
        return Gradients(found, self.dtype, self.norm, self.zeros)

    def contenders(self, gradients: Gradients, setting: Setting) -> list[Contender]:
        """Who does the work."""
        return self.build(self, gradients, setting)


def clip_list(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """Clip by the joint norm, with the list of parameters at hand. Everyone gives the norm, as torch does."""
    params = gradients.params
    return [
        ours(gradients, "clip_", lambda: gradkern.clip_(params, MAX_NORM).norm),
        theirs(gradients, "torch", "torch foreach", lambda: clip_grad_norm_(params, MAX_NORM, foreach=True)),
        theirs(gradients, "torch", "torch loop", lambda: clip_grad_norm_(params, MAX_NORM, foreach=False)),
        *rival_contenders(case, gradients, setting),
        *ceilings(case, gradients, setting),
    ]


def clip_as_written(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """Clip by the joint norm as most training loops write it: the module is walked in every call."""
    module = gradients.module
    return [
        ours(gradients, "clip_", lambda: gradkern.clip_(module.parameters(), MAX_NORM).norm),
        theirs(gradients, "torch", "torch foreach", lambda: clip_grad_norm_(module.parameters(), MAX_NORM)),
    ]


def clip_by_value(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """Clamp every element; about a third of them change."""
    params = gradients.params
    bound = torch.tensor(gradients.norm / math.sqrt(gradients.numel), dtype=gradients.dtype).item()

    def check(_: Any, everything: bool) -> None:
        gradients.check(gradients.norm, 1.0, 0.0, 0.0, bound=bound, everything=everything)

    def contender(kind: str, name: str, call: Callable[[], Any]) -> Contender:
        return Contender(kind, name, call, check, gradients.restore)

    return [
        contender("gradkern", "clip_", lambda: gradkern.clip_(params, clip_value=bound)),
        contender("torch", "torch foreach", lambda: clip_grad_value_(params, bound, foreach=True)),
        contender("torch", "torch loop", lambda: clip_grad_value_(params, bound, foreach=False)),
    ]


def five_statistics(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """Norm, largest magnitude, NaN, Inf and zero counts of every tensor."""
    params, grads = gradients.params, gradients.grads
    expected = torch.tensor(
        [[grad.abs().max().item(), 0, 0, (grad == 0).sum().item()] for grad in gradients.originals],
        dtype=torch.float64,
    )

    def separate() -> list[list[Tensor] | tuple[Tensor, ...]]:
        return [
            torch._foreach_norm(grads),
            torch._foreach_norm(grads, math.inf),
            [grad.isnan().sum() for grad in grads],
            [grad.isinf().sum() for grad in grads],
            [grad.numel() - grad.count_nonzero() for grad in grads],
        ]

    def check(norms: Tensor, others: Tensor, tolerance: float) -> float:
        if not torch.equal(others, expected):
            raise WrongResult("the largest magnitude or a count is wrong")
        norm = torch.linalg.vector_norm(norms).item()
        return gradients.check(norm, 1.0, tolerance, 0.0, everything=False)

    def check_ours(stats: gradkern.GradStats, _: bool) -> float:
        return check(stats.per_tensor.norm, stats.rows[:, 1:], OUR_TOLERANCE)

    def check_separate(columns: list[list[Tensor]], _: bool) -> float:
        norms, *others = (torch.stack(list(column)).double() for column in columns)
        return check(norms, torch.stack(others, 1), THEIR_TOLERANCE)

    return [
        Contender("gradkern", "measure", lambda: gradkern.measure(params), check_ours),
        Contender("torch", "separate torch calls", separate, check_separate),
        *ceilings(case, gradients, setting),
    ]


def norm_only(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """The five statistics beside a kernel of ours that sums squares in double and does nothing else."""
    params = gradients.params
    found = [ours(gradients, "measure", lambda: gradkern.measure(params).norm, coef=1.0)]
    if ops.native is not None:
        measure_norm_only = ops.native.measure_norm_only

        def check(norm: float, everything: bool) -> float:
            return check_clipped(gradients, norm, 1.0, OUR_TOLERANCE, everything)

        found.append(Contender("norm only", "norm only", lambda: measure_norm_only(params), check))
    return found


def ours(gradients: Gradients, name: str, call: Callable[[], Tensor], coef: float | None = None) -> Contender:
    """gradkern. `call` returns the norm; `coef` is what it multiplies by, if not what MAX_NORM asks for."""

    def check(norm: Tensor, everything: bool) -> float:
        expected = exact_coef(gradients) if coef is None else coef
        return check_clipped(gradients, norm, expected, OUR_TOLERANCE, everything)

    return Contender("gradkern", name, call, check, restorer(gradients))


def theirs(gradients: Gradients, kind: str, name: str, call: Callable[[], Tensor]) -> Contender:
    """Another's clipping by MAX_NORM in place; `call` returns the norm."""

    def check(norm: Tensor, everything: bool) -> float:
        return check_clipped(gradients, norm, exact_coef(gradients), THEIR_TOLERANCE, everything)

    return Contender(kind, name, call, check, restorer(gradients))


def rival_contenders(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """torch.compile and optax, as far as the row and the setting want them."""
    found: list[Contender] = []
    wanted = case.rivals & setting.rivals
    if "compiled" in wanted:
        grads = gradients.grads
        found.append(theirs(gradients, "compiled", "torch.compile", lambda: compiled_clip(grads, MAX_NORM)))
    if "optax" in wanted:
        clip = Optax(gradients, MAX_NORM)

        def check(norm: Any, everything: bool) -> float:
            coef = exact_coef(gradients)
            return check_clipped(gradients, norm, coef, THEIR_TOLERANCE, everything, clip.grads())

        found.append(Contender("optax", "optax, jitted", clip, check, clip.restore))
    return found


def exact_coef(gradients: Gradients) -> float:
    """What clipping to MAX_NORM multiplies by."""
    return min(1.0, MAX_NORM / gradients.norm)


def restorer(gradients: Gradients) -> Callable[[], None]:
    """What has to run before each call: nothing, where clipping changes nothing."""
    return (lambda: None) if exact_coef(gradients) == 1 else gradients.restore


def check_clipped(
    gradients: Gradients,
    norm: SupportsFloat,
    coef: float,
    tolerance: float,
    everything: bool,
    grads: Sequence[Tensor] | None = None,
) -> float:
    """Compare with float64: the norm, and the gradients with what they were times `coef`."""
    # Half a unit in the last place, and a little: halves are rounded twice. Whose coefficient is off is
    # allowed that too. Where nothing is clipped, no bit may change.
    rounding = 1.01 * torch.finfo(gradients.dtype).eps / 2 + (tolerance if tolerance > OUR_TOLERANCE else 0)
    return gradients.check(
        float(norm), coef, tolerance, rounding if coef < 1 else 0.0, everything=everything, grads=grads
    )


def ceilings(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """The least that memory allows: to read the gradients, and to write them only if they are clipped."""
    buffer, nbytes = setting.buffer, gradients.nbytes
    if buffer is None or case.start != "memory":
        return []
    clips = exact_coef(gradients) < 1 and case.build is clip_list

    def call() -> None:
        buffer.read(nbytes)
        if clips:
            buffer.scale(nbytes)

    name = "plain read, then scaling in place" if clips else "plain read"
    return [Contender("ceiling", name, call, lambda *_: None)]


BOTH_RIVALS: frozenset[Rivals] = frozenset({"compiled", "optax"})


def small(
    key: str,
    size: str,
    shapes: Callable[[], Shapes],
    goal: Goal,
    rivals: AbstractSet[Rivals] = BOTH_RIVALS,
) -> list[Case]:
    """Gradients that fit into a cache: from there, and from memory."""
    work = f"nothing to clip, {size}"
    return [
        Case(key, work, shapes, clip_list, (goal,), rivals=frozenset(rivals)),
        Case(f"{key}-flushed", work, shapes, clip_list, (Goal("torch"),), start="flushed"),
    ]


CASES = [
    Case(
        "unclipped-f32",
        "nothing to clip, GPT-2 small, float32",
        shapes.gpt2_small,
        clip_list,
        (Goal("torch", floor=3.2, aim=3.6), Goal("ceiling", "share", 0.8, 0.9)),
        start="memory",
        rivals=BOTH_RIVALS,
    ),
    Case(
        "unclipped-bf16",
        "nothing to clip, GPT-2 small, bfloat16",
        shapes.gpt2_small,
        clip_list,
        (Goal("torch", floor=4.4, aim=5.0), Goal("ceiling", "share")),
        dtype=torch.bfloat16,
        start="memory",
        rivals=BOTH_RIVALS,
    ),
    Case(
        "clipped-f32",
        "clipped, GPT-2 small, float32",
        shapes.gpt2_small,
        clip_list,
        (Goal("torch", floor=1.6, aim=1.8), Goal("ceiling", "share")),
        norm=LARGE_NORM,
        start="memory",
        rivals=BOTH_RIVALS,
    ),
    Case(
        "clipped-bf16",
        "clipped, GPT-2 small, bfloat16",
        shapes.gpt2_small,
        clip_list,
        (Goal("torch", floor=2.3, aim=2.7), Goal("ceiling", "share")),
        dtype=torch.bfloat16,
        norm=LARGE_NORM,
        start="memory",
        rivals=BOTH_RIVALS,
    ),
    # torch.compile takes minutes for so many tensors.
    *small("many-small", "2000 tensors of 64", shapes.many_small, Goal("torch", floor=25, aim=40), {"optax"}),
    *small("perceptron", "20 tensors, 0.66 M", shapes.perceptron, Goal("torch", floor=5, aim=8)),
    *small("resnet", "162 tensors, 2 M", shapes.resnet, Goal("torch", floor=6, aim=9)),
    Case(
        "five",
        "all five statistics, GPT-2 small, against separate calls",
        shapes.gpt2_small,
        five_statistics,
        (Goal("torch", floor=30), Goal("ceiling", "share")),
        zeros=0.1,
        start="memory",
    ),
    Case(
        "norm-only",
        "all five statistics, GPT-2 small, in times of the norm alone",
        shapes.gpt2_small,
        norm_only,
        (Goal("norm only", "time", floor=1.1),),
        start="memory",
    ),
    Case(
        "value-f32",
        "by value, GPT-2 small, float32",
        shapes.gpt2_small,
        clip_by_value,
        (Goal("torch"),),
        start="memory",
    ),
    Case(
        "written-f32",
        "as users write it, GPT-2 small, float32",
        shapes.gpt2_small,
        clip_as_written,
        (Goal("torch"),),
        start="memory",
    ),
    Case(
        "written-small",
        "as users write it, 2000 tensors of 64",
        shapes.many_small,
        clip_as_written,
        (Goal("torch"),),
    ),
    Case(
        "one-large",
        "nothing to clip, 1 tensor of 64 Mi",
        partial(shapes.one, 1 << 26),
        clip_list,
        (Goal("torch"), Goal("ceiling", "share")),
        start="memory",
    ),
    Case(
        "one-small", "nothing to clip, 1 tensor of 64", partial(shapes.one, 64), clip_list, (Goal("torch"),)
    ),
]
