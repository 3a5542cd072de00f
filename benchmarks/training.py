"""The rows of the training loop: clipping as a part of a step, and policies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import gradkern
from benchmarks import shapes
from benchmarks.cases import (
    LARGE_NORM,
    MAX_NORM,
    OUR_TOLERANCE,
    THEIR_TOLERANCE,
    Case,
    Setting,
    check_clipped,
    exact_coef,
    ours,
    theirs,
)
from benchmarks.gradients import Gradients, WrongResult
from benchmarks.measure import Contender
from benchmarks.results import Goal
from gradkern import Clipper
from gradkern.policies import Policy

_GROUP = "training loops"

# What gradients are multiplied by in rounds where nothing is to be clipped: exact, and LARGE_NORM is then
# below MAX_NORM.
_QUIET = 0.125

# Adam forgets the scale of its gradient, and so whether it was clipped. With an eps this large the first step
# from zero is, to 1e-6, the gradient itself, and can be checked; it takes as long as any other.
_ADAM_EPS = _ADAM_LR = 2.0**20
_ADAM_ROUNDING = 1e-5


def adamw_step(every: int, case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """A fused AdamW step with clipping, in one round of `every` by LARGE_NORM; never, if that is 0.

    Every step begins at parameters, moments and a step counter of zero. Both ways share them.
    """
    params = gradients.params
    optimizer, plain = (torch.optim.AdamW(params, lr=_ADAM_LR, eps=_ADAM_EPS, fused=True) for _ in range(2))
    plain.state = optimizer.state
    clipper = Clipper(gradients.module, MAX_NORM).attach(optimizer)
    for param in params:
        param.detach().zero_()

    def attached() -> Tensor:
        optimizer.step()
        return _norm(clipper)

    def clip_then_step() -> Tensor:
        norm = clip_grad_norm_(params, MAX_NORM)
        plain.step()
        return norm

    def contender(kind: str, name: str, call: Callable[[], Tensor], tolerance: float) -> Contender:
        rounds, scale = 0, 1.0

        def before() -> None:
            nonlocal rounds, scale
            scale = 1.0 if every and rounds % every == 0 else _QUIET
            rounds += 1
            gradients.restore()
            if scale != 1:
                torch._foreach_mul_(gradients.grads, scale)
            held = [tensor for state in optimizer.state.values() for tensor in state.values()]
            torch._foreach_zero_([*(param.detach() for param in params), *held])

        def check(norm: Tensor, everything: bool) -> float:
            coef = min(1.0, MAX_NORM / (gradients.norm * scale)) * scale
            found = norm.item() / scale
            moments = [optimizer.state[param]["exp_avg"] for param in params]
            rounding = _ADAM_ROUNDING + (tolerance if tolerance > OUR_TOLERANCE else 0)
            beta = optimizer.param_groups[0]["betas"][0]
            for factor, tensors in ((1 - beta, moments), (-1.0, params)):
                error = gradients.check(
                    found, factor * coef, tolerance, rounding, everything=everything, grads=tensors
                )
            return error

        return Contender(kind, name, call, check, before, period=max(every, 1))

    return [
        contender("gradkern", "attached Clipper", attached, OUR_TOLERANCE),
        contender("torch", "clip_grad_norm_, then the step", clip_then_step, THEIR_TOLERANCE),
    ]


def unscale_and_clip(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """Gradients bear a loss scale, which is taken off before they are clipped."""
    params = gradients.params
    optimizer = torch.optim.SGD(params)
    clipper = Clipper(gradients.module, MAX_NORM)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))

    def before() -> None:
        nonlocal scaler
        scaler = torch.amp.GradScaler("cpu")  # one that has not unscaled yet
        scaler.scale(torch.zeros(()))
        gradients.restore()
        torch._foreach_mul_(gradients.grads, scaler.get_scale())

    def unscale_then_clip() -> Tensor:
        scaler.unscale_(optimizer)
        return clip_grad_norm_(params, MAX_NORM)

    def check(norm: Tensor, everything: bool, tolerance: float) -> float:
        found_infs = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        if any(found_inf.item() != 0 for found_inf in found_infs.values()):
            raise WrongResult("the scaler was told of an Inf")
        return check_clipped(gradients, norm, exact_coef(gradients), tolerance, everything)

    def contender(kind: str, name: str, call: Callable[[], Tensor], tolerance: float) -> Contender:
        return Contender(kind, name, call, partial(check, tolerance=tolerance), before)

    def fused() -> Tensor:
        return clipper.unscale_and_clip(scaler, optimizer).norm

    return [
        contender("gradkern", "unscale_and_clip", fused, OUR_TOLERANCE),
        contender("torch", "unscale_, then clip_grad_norm_", unscale_then_clip, THEIR_TOLERANCE),
    ]


def clipper_call(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """A `Clipper` that is kept, on gradients that backward has just made, after a step of an optimizer."""
    module, params = gradients.module, gradients.params
    clipper = Clipper(module, MAX_NORM)
    optimizer = torch.optim.SGD(params, lr=1e-3)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
        pairs = zip(params, gradients.originals, strict=True)
        torch.stack([(param * original).sum() for param, original in pairs]).sum().backward()  # type: ignore[no-untyped-call]

    return [
        replace(ours(gradients, "Clipper", lambda: clipper().norm), before=step),
        replace(
            theirs(
                gradients, "torch", "torch foreach", lambda: clip_grad_norm_(module.parameters(), MAX_NORM)
            ),
            before=step,
        ),
    ]


# Limits that the gradients of the rows stay within, so that only looking and deciding is compared.
_POLICIES: dict[str, Callable[[], Policy]] = {
    "TensorNorm": partial(gradkern.TensorNorm, MAX_NORM),
    "GroupNorm": partial(gradkern.GroupNorm, {"*0*": MAX_NORM, "*": MAX_NORM}),
    "Value": partial(gradkern.Value, MAX_NORM),
    "BlockRMS": gradkern.BlockRMS,
    "AGC": gradkern.AGC,
    "AGC per tensor": partial(gradkern.AGC, per="tensor"),
    "Percentile": gradkern.Percentile,
    "Percentile per tensor": partial(gradkern.Percentile, per="tensor"),
    "ZClip": gradkern.ZClip,
    "AdaGC": gradkern.AdaGC,
    "Chain of ZClip and Value": lambda: gradkern.Chain(gradkern.ZClip(), gradkern.Value(MAX_NORM)),
}
_SKIPPING: dict[str, Callable[[], Policy]] = {
    "SkipSpike": gradkern.SkipSpike,
    "SkipSpike by MAD": partial(gradkern.SkipSpike, method="mad"),
}


class _Idle(torch.optim.Optimizer):
    """Moves nothing: what remains of a step is what is attached to it."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


def policies(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """Every policy beside `GlobalNorm`, and beside measuring alone. Nothing is clipped.

    Policies that skip steps can only be attached, and so have a `GlobalNorm` of their own to stand beside.
    """
    for param in gradients.params:
        param.detach().fill_(100.0)  # AGC looks at weights: gradients are small beside these

    def by_hand(kind: str, name: str, policy: Policy | float) -> Contender:
        clipper = Clipper(gradients.module, policy)
        return replace(ours(gradients, name, lambda: clipper().norm), kind=kind)

    def attached(kind: str, name: str, policy: Policy | float) -> Contender:
        optimizer = _Idle(gradients.params)
        clipper = Clipper(gradients.module, policy).attach(optimizer)

        def call() -> Tensor:
            optimizer.step()
            return _norm(clipper)

        return replace(ours(gradients, name, call), kind=kind)

    found = [by_hand("gradkern", name, policy()) for name, policy in _POLICIES.items()]
    found += [attached("gradkern", name, policy()) for name, policy in _SKIPPING.items()]
    found.append(by_hand("GlobalNorm", "GlobalNorm", MAX_NORM))
    found.append(attached("GlobalNorm attached", "GlobalNorm attached", MAX_NORM))
    measuring = ours(gradients, "measure", lambda: gradkern.measure(gradients.params).norm)
    found.append(replace(measuring, kind="measuring"))
    return found


def policy_goals(floor: float) -> tuple[Goal, ...]:
    """At most `floor` microseconds more than `GlobalNorm`."""
    return (
        *(Goal("GlobalNorm", "extra", floor, of=name) for name in _POLICIES),
        *(Goal("GlobalNorm attached", "extra", floor, of=name) for name in _SKIPPING),
    )


def training_step(case: Case, gradients: Gradients, setting: Setting) -> list[Contender]:
    """Forward, backward, clipping and a fused AdamW step of a small transformer. Nothing is clipped.

    Each contender has a model of its own, for a clipper that measures in backward does so in every backward;
    before a call it is set back to where training begins.
    """
    generator = torch.Generator().manual_seed(0)
    start = {
        name: _initial(name, param.shape, generator) for name, param in gradients.module.named_parameters()
    }
    vocabulary, context = start["wte.weight"].shape[0], start["wpe.weight"].shape[0]
    tokens = torch.randint(vocabulary, (4, context + 1), generator=generator)
    exact = {name: value.double().requires_grad_() for name, value in start.items()}
    gpt_loss(exact, tokens).backward()  # type: ignore[no-untyped-call]
    wanted = {name: value.grad for name, value in exact.items() if value.grad is not None}
    norm = math.sqrt(math.fsum(grad.square().sum().item() for grad in wanted.values()))

    def contender(kind: str, name: str, measure: str | None) -> Contender:
        model = copy.deepcopy(gradients.module)
        params = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(params.values(), lr=_ADAM_LR, eps=_ADAM_EPS, weight_decay=0, fused=True)
        max_norm = 2 * norm
        clipper = None if measure is None else Clipper(model, max_norm, measure=measure).attach(optimizer)

        def before() -> None:
            for name, value in start.items():
                params[name].detach().copy_(value)
            for state in optimizer.state.values():
                torch._foreach_zero_(list(state.values()))

        def call() -> Tensor:
            optimizer.zero_grad()
            gpt_loss(params, tokens).backward()  # type: ignore[no-untyped-call]
            if clipper is not None:
                optimizer.step()
                return _norm(clipper)
            found = clip_grad_norm_(list(params.values()), max_norm)
            optimizer.step()
            return found

        def check(found: Tensor, everything: bool) -> float:
            for name, grad in wanted.items():
                moved = params[name].detach().double() - start[name].double()
                # Backward in float32 is off by this share of the largest element.
                if not bool((moved + grad).abs().max() <= 1e-3 * grad.abs().max() + 1e-6):
                    raise WrongResult(f"{name} has not moved by its gradient")
            error = abs(found.item() - norm) / norm
            if not error <= 1e-4:
                raise WrongResult(f"the norm is {found.item()!r}; float64 gives {norm!r}")
            return error

        return Contender(kind, name, call, check, before)

    return [
        contender("gradkern", "measured in backward", "backward"),
        contender("gradkern", "measured after", "after"),
        contender("torch", "clip_grad_norm_", None),
    ]


def gpt_loss(params: dict[str, Any], tokens: Tensor) -> Tensor:
    """The loss of a transformer of `shapes.gpt` that predicts `tokens[:, 1:]`, ``[batch, context + 1]``."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, params[f"{name}.weight"].T, params[f"{name}.bias"])

    def normed(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"])

    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = F.embedding(inputs, params["wte.weight"]) + params["wpe.weight"]
    heads = max(1, x.shape[-1] // 64)
    block = 0
    while (name := f"h.{block}.attn.c_attn") + ".weight" in params:
        queries_keys_values = linear(normed(x, f"h.{block}.ln_1"), name)
        q, k, v = queries_keys_values.view(*inputs.shape, 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"h.{block}.attn.c_proj")
        hidden = F.gelu(linear(normed(x, f"h.{block}.ln_2"), f"h.{block}.mlp.c_fc"))
        x = x + linear(hidden, f"h.{block}.mlp.c_proj")
        block += 1
    logits = normed(x, "ln_f") @ params["wte.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _initial(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Where a parameter of the transformer begins."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.empty(shape).normal_(0, 0.02, generator=generator)


def _norm(clipper: Clipper) -> Tensor:
    """That of the last step, of a clipper that has stepped."""
    if clipper.last is None:
        raise WrongResult("the clipper has not run")
    return clipper.last.norm


def _adamw(share: str, every: int) -> Case:
    return Case(
        f"adamw-{share}",
        f"clip and fused AdamW step, GPT-2 small, {share} % of steps clipped",
        shapes.gpt2_small,
        partial(adamw_step, every),
        (Goal("torch", floor=1.35, aim=1.45),),
        norm=LARGE_NORM,
        start="memory",
        group=_GROUP,
    )


TRAINING_CASES = [
    _adamw("0", 0),
    _adamw("10", 10),
    _adamw("100", 1),
    Case(
        "unscale",
        "unscale and clip, GPT-2 small, nothing to clip",
        shapes.gpt2_small,
        unscale_and_clip,
        (Goal("torch"),),
        start="memory",
        group=_GROUP,
    ),
    Case(
        "unscale-clipped",
        "unscale and clip, GPT-2 small, clipped",
        shapes.gpt2_small,
        unscale_and_clip,
        (Goal("torch"),),
        norm=LARGE_NORM,
        start="memory",
        group=_GROUP,
    ),
    Case(
        "clipper",
        "Clipper after a step, fresh gradients, 2000 tensors of 64",
        shapes.many_small,
        clipper_call,
        (Goal("torch"), Goal("torch", "each", floor=110)),
        group=_GROUP,
    ),
    Case(
        "policies-148",
        "148 tensors of 64",
        partial(shapes.many_small, 148),
        policies,
        policy_goals(40),
        group=_GROUP,
    ),
    Case(
        "policies-2000",
        "2000 tensors of 64",
        shapes.many_small,
        policies,
        policy_goals(40 + 0.3 * 2000),
        group=_GROUP,
    ),
    Case(
        "policies-gpt2",
        "GPT-2 small",
        shapes.gpt2_small,
        policies,
        tuple(Goal("measuring", "time", floor=1.05, of=name) for name in (*_POLICIES, *_SKIPPING)),
        start="memory",
        group=_GROUP,
    ),
    Case(
        "step",
        "training step of a transformer of 4 M",
        partial(shapes.gpt, width=256, blocks=4, vocabulary=4096, context=64),
        training_step,
        (Goal("torch", of="measured in backward"), Goal("torch", of="measured after")),
        tiny=partial(shapes.gpt, width=8, blocks=2, vocabulary=11, context=5),
        group=_GROUP,
    ),
]
