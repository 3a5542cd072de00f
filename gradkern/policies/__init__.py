"""Policies: from a step's statistics to what is done with its gradients.

| policy | limit on | follows the run | coefficient |
|---|---|---|---|
| `GlobalNorm` | the joint norm | no | one |
| `TensorNorm`, `BlockRMS` | each tensor's norm, root mean square | no | per tensor |
| `GroupNorm` | the joint norm of tensors with matching names | no | per tensor |
| `Value` | every element | no | a bound |
| `AGC` | each unit's norm relative to its weights | with the weights | per unit |
| `Percentile` | the joint norm, or each tensor's | past norms | one, or per tensor |
| `ZClip` | the joint norm | past norms | one |
| `AdaGC` | each tensor's norm | past clipped norms | per tensor |
| `SkipSpike` | norm and loss | past norms and losses | keep or skip |
| `Chain` | what its stages limit | | the product |

The protocol. A policy is asked three things, in this order:

1. ``policy.needs``: which statistics it wants (`Needs`). Known from its parameters alone, so that a caller
   measures nothing in vain.
2. ``policy.init(layout)``: its device state for the tensors of a `Layout` (`State`). Patterns are matched
   here, and one that matches nothing raises. All uploads from the host happen here and only here.
3. ``policy.decide(measured, state)``: a `Decision` from this step's statistics (`Measured`) and the state.
   It is pure. What the policy wants to remember travels in the decision, and ``decision.commit(good)``
   writes it, in place, unless the step is bad or skipped.

A caller's step is therefore::

    measured = Measured(total=total, rows=rows, good=all_finite(total), loss=loss)   # as `needs` asks
    decision = policy.decide(measured, state)
    decision.commit(measured.good)
    ...                                       # multiply by decision.coef, skip where decision.skip, clamp

Rules that hold for every policy here, and that one of your own (a subclass of `Policy`) must keep:

* No host read and no Python branch on a tensor in `decide` and `commit`; a `Decision` holds tensors on the
  gradients' device. State tensors keep their addresses for life, so a captured CUDA graph replays correctly.
* A bad step (`good` false: a NaN or Inf anywhere, a norm beyond float64, or whatever else the caller knows)
  and a skipped one leave the state as it was, bit for bit: a run with such a step goes on like a run
  without it. An empty step (norm 0) does not enter a history of norms either: it says nothing about their
  size.
* Arithmetic is float64, as the statistics are.
* A coefficient is at most 1, and exactly 1 where nothing is clipped. (NaN where `Measured.propagate` says
  so.)

`Layout.names` are the names of *all* tensors the caller looks after, and `Measured.rows` has one row for
each, in that order. A tensor without a gradient this step has a row of zeros: norm 0, coefficient 1,
nothing enters its history. Where tensors come or go for good, make a new state with `init` and give it the
old one's ``state_dict()`` with ``strict=False``: histories follow the names.

Shards and ranks: statistics are global, that is already reduced, so every rank decides alike. Ranks with
different tensors (pipeline parallelism) set `Measured.merge`, for totals that a policy forms from rows
itself.
"""

from __future__ import annotations

from gradkern.params import shown
from gradkern.policies.adaptive import AdaGC, Percentile, ZClip
from gradkern.policies.chain import Chain
from gradkern.policies.constant import AGC, BlockRMS, GlobalNorm, GroupNorm, TensorNorm, Value
from gradkern.policies.protocol import (
    Decision,
    Layout,
    Measured,
    Needs,
    Policy,
    State,
    Units,
    Update,
    all_finite,
    clip_coef,
    unit_sums,
)
from gradkern.policies.replay import Replay, replay
from gradkern.policies.skip import SkipSpike

__all__ = [
    "AGC",
    "AdaGC",
    "BlockRMS",
    "Chain",
    "Decision",
    "GlobalNorm",
    "GroupNorm",
    "Layout",
    "Measured",
    "Needs",
    "Percentile",
    "Policy",
    "Replay",
    "SkipSpike",
    "State",
    "TensorNorm",
    "Units",
    "Update",
    "Value",
    "ZClip",
    "all_finite",
    "as_policy",
    "clip_coef",
    "replay",
    "unit_sums",
]


def as_policy(policy: Policy | float) -> Policy:
    """`policy` itself, or `GlobalNorm` of a number.

    >>> gradkern.policies.as_policy(1.0)
    GlobalNorm(max_norm=1.0, norm_type=2.0, norm_over=None, apply_to=None)
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, (int, float)):
        return GlobalNorm(float(policy))
    advice = ""
    if isinstance(policy, (list, tuple)):
        advice = " Several, one after the other, are a gradkern.Chain(...)."
    elif isinstance(policy, type) and issubclass(policy, Policy):
        advice = f" Make one: {policy.__name__}(...)."
    raise TypeError(
        f"policy must be a number or a policy such as gradkern.GlobalNorm(1.0), got {shown(policy)}.{advice}"
    )
