"""Policies whose limits are given once and stay: no history, no state to save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradkern.params import shown
from gradkern.policies.protocol import (
    Decision,
    Layout,
    Measured,
    Needs,
    Pattern,
    Policy,
    State,
    check_limit,
    check_positive,
    clip_coef,
)


@dataclass(frozen=True)
class GlobalNorm(Policy):
    """Scale all gradients by one number, so that their joint norm is at most `max_norm`.

    ``g_i * min(1, max_norm / norm)`` with ``norm`` over all gradients together. It keeps the direction of the
    step. Source: Pascanu, Mikolov, Bengio 2013, algorithm 1 (arXiv 1211.5063). Keras calls it
    ``global_clipnorm`` (and, when the article on exploding gradients was written, ``clipnorm``).

    When not to use it: one group of parameters with much larger gradients than the rest (embeddings, a new
    head) then decides the step of all; use `GroupNorm` or `TensorNorm`. Nor to orthogonalised updates (Muon),
    which forget the scale of their gradient: leave those out with `norm_over` and `apply_to`.

    Args:
        max_norm: largest norm allowed, not negative. From half to ten times the usual norm works (section 3.2
            of the source); `inf` only measures.
        norm_type: 2, or `inf` for the largest magnitude of any element.
        norm_over: the tensors whose joint norm counts; all by default.
        apply_to: the tensors to scale; all by default.

    Raises:
        ValueError: a negative or NaN `max_norm`; another `norm_type` (only the sum of squares and the largest
            magnitude are measured); from `init`, a pattern that matches nothing.

    >>> gradkern.policies.replay(gradkern.GlobalNorm(1.0), [0.5, 4.0]).coef
    tensor([1.0000, 0.2500], dtype=torch.float64)
    """

    max_norm: float
    norm_type: float = 2.0
    norm_over: Pattern | None = None
    apply_to: Pattern | None = None

    def __post_init__(self) -> None:
        check_limit(self, "max_norm", self.max_norm)
        if self.norm_type not in (2.0, math.inf):
            raise ValueError(
                f"GlobalNorm: norm_type must be 2 or inf, got {self.norm_type}. The statistics hold the sum "
                "of squares and the largest magnitude; for another norm use gradkern.clip_grad_norm_."
            )

    @property
    def needs(self) -> Needs:
        """The total, and rows where only some tensors count or are scaled."""
        return Needs(rows=self.norm_over is not None or self.apply_to is not None)

    @property
    def reads_abs_max(self) -> bool:
        """Only with `norm_type=inf`."""
        return self.norm_type != 2.0

    def as_clip(self) -> tuple[float, float] | None:
        """``(max_norm, inf)``, unless it is the Inf-norm or only some tensors take part."""
        plain = self.norm_type == 2.0 and self.norm_over is None and self.apply_to is None
        return (float(self.max_norm), math.inf) if plain else None

    def init(self, layout: Layout) -> State:
        """State without a memory. Raises ValueError where a pattern matches no tensor."""
        constants = {"max_norm": layout.floats(self.max_norm)}
        if self.norm_over is not None:
            constants["norm_over"] = layout.mask(self.norm_over, "GlobalNorm: norm_over")
        if self.apply_to is not None:
            constants["apply_to"] = layout.mask(self.apply_to, "GlobalNorm: apply_to")
        return State(self, layout, constants=constants)

    def decide(self, measured: Measured, state: State) -> Decision:
        """One coefficient; per tensor where `apply_to` leaves some out."""
        chosen = state.constants.get("norm_over")
        total = measured.need_total() if chosen is None else measured.fold(chosen)
        norm = measured.norm_of(total, self.norm_type)
        coef = clip_coef(state.constants["max_norm"], norm)
        return Decision(
            coef=_only(state, coef), info={"norm": norm, "threshold": state.constants["max_norm"]}
        )


@dataclass(frozen=True)
class TensorNorm(Policy):
    """Scale each gradient by itself, so that its own norm is at most `max_norm`: today's Keras ``clipnorm``.

    ``g_i * min(1, max_norm / norm_i)``. Source: the ``clipnorm`` argument of Keras optimizers.

    When not to use it: it changes the direction of the joint step, and one limit for tensors of a hundred and
    of a million elements is rarely right for both; see `BlockRMS`, which takes the size into account.

    Args:
        max_norm: largest norm of each tensor, not negative.
        apply_to: the tensors to scale; all by default.

    Raises:
        ValueError: a negative or NaN `max_norm`; from `init`, a pattern that matches nothing.

    >>> gradkern.policies.replay(gradkern.TensorNorm(1.0), [[0.5, 4.0]]).coef
    tensor([[1.0000, 0.2500]], dtype=torch.float64)
    """

    max_norm: float
    apply_to: Pattern | None = None

    def __post_init__(self) -> None:
        check_limit(self, "max_norm", self.max_norm)

    @property
    def needs(self) -> Needs:
        """Rows."""
        return Needs(total=False, rows=True)

    def init(self, layout: Layout) -> State:
        """State without a memory. Raises ValueError where `apply_to` matches no tensor."""
        constants = {"max_norm": layout.floats(self.max_norm)}
        if self.apply_to is not None:
            constants["apply_to"] = layout.mask(self.apply_to, "TensorNorm: apply_to")
        return State(self, layout, constants=constants)

    def decide(self, measured: Measured, state: State) -> Decision:
        """A coefficient per tensor."""
        limit = state.constants["max_norm"]
        return Decision(coef=_only(state, clip_coef(limit, measured.norms())), info={"threshold": limit})


@dataclass(frozen=True)
class GroupNorm(Policy):
    """`GlobalNorm` for each of several groups of tensors, chosen by name.

    Within a group, ``g_i * min(1, limit / norm)`` with the group's joint norm. A tensor belongs to the first
    pattern that matches its name; one that none matches is left as it is. (Not `torch.nn.GroupNorm`, the
    layer.)

    When not to use it: with groups of equal scale it only makes the joint step turn; `GlobalNorm` does not.

    Args:
        limits: `fnmatch` pattern to largest norm, for instance ``{"embed.*": 0.1, "*": 1.0}``.

    Raises:
        ValueError: no pattern, a negative or NaN limit; from `init`, a pattern that matches nothing, or
            nothing that an earlier one has left.

    >>> policy = gradkern.GroupNorm({"head.*": 1.0})
    >>> gradkern.policies.replay(policy, [[3.0, 4.0, 9.0]], names=["head.weight", "head.bias", "body"]).coef
    tensor([[0.2000, 0.2000, 1.0000]], dtype=torch.float64)
    """

    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.limits, Mapping):
            raise TypeError(
                "GroupNorm: limits must map patterns of names to norms, for instance "
                f"{{'embed.*': 0.1, '*': 1.0}}, got {shown(self.limits)}. One norm for all is GlobalNorm."
            )
        if not self.limits:
            raise ValueError("GroupNorm: limits must name at least one pattern, for instance {'*': 1.0}.")
        for pattern, limit in self.limits.items():
            check_limit(self, f"limits[{pattern!r}]", limit)

    @property
    def needs(self) -> Needs:
        """Rows."""
        return Needs(total=False, rows=True)

    def init(self, layout: Layout) -> State:
        """State without a memory. Raises ValueError where a pattern matches nothing that is left to it."""
        free = [True] * len(layout.names)
        group_of = [len(self.limits)] * len(layout.names)  # the last "group" is that of the others
        members = []
        for group, pattern in enumerate(self.limits):
            taken = layout.select(pattern, "GroupNorm: pattern")
            mine = [a and b for a, b in zip(free, taken, strict=True)]
            if not any(mine):
                raise ValueError(
                    f"GroupNorm: pattern {pattern!r} matches only tensors that earlier patterns have taken. "
                    "The first pattern that matches wins: put the narrower one first."
                )
            members.append(mine)
            free = [a and not b for a, b in zip(free, mine, strict=True)]
            group_of = [group if b else old for old, b in zip(group_of, mine, strict=True)]
        constants = {
            "members": torch.tensor(members, device=layout.device),
            "group_of": torch.tensor(group_of, device=layout.device),
            "limits": layout.floats(list(self.limits.values())),
        }
        return State(self, layout, constants=constants)

    def decide(self, measured: Measured, state: State) -> Decision:
        """A coefficient per tensor, the same within a group."""
        norms = measured.norm_of(measured.fold(state.constants["members"]))
        coefs = clip_coef(state.constants["limits"], norms)
        padded = torch.nn.functional.pad(coefs, (0, 1), value=1.0)
        return Decision(
            coef=padded.index_select(0, state.constants["group_of"]),
            info={"group_norm": norms, "threshold": state.constants["limits"]},
        )


@dataclass(frozen=True)
class Value(Policy):
    """Limit every element: ``clamp(g, -clip_value, clip_value)``, Keras' ``clipvalue``.

    NaN stays NaN; an Inf becomes the bound where non-finite elements take part at all. Element-wise, hence
    last in a `Chain`: what it leaves of the norm is not known without reading again.

    When not to use it: it turns the step towards the coordinates with small gradients. With adaptive
    optimizers (Adam) a norm is the better rule.

    Args:
        clip_value: largest magnitude, not negative. The article on exploding gradients uses 0.5.
        apply_to: the tensors to clamp; all by default.

    Raises:
        ValueError: a negative or NaN `clip_value`; from `init`, a pattern that matches nothing.

    >>> policy = gradkern.Value(0.5)
    >>> state = policy.init(gradkern.policies.Layout(("w",), ((2,),), torch.device("cpu")))
    >>> policy.decide(gradkern.policies.Measured(), state).bound
    0.5
    """

    clip_value: float
    apply_to: Pattern | None = None

    def __post_init__(self) -> None:
        check_limit(self, "clip_value", self.clip_value)

    @property
    def needs(self) -> Needs:
        """Nothing: it can measure and write in one pass."""
        return Needs(total=False)

    @property
    def elementwise(self) -> bool:
        """Yes."""
        return True

    def as_clip(self) -> tuple[float, float] | None:
        """``(inf, clip_value)``, unless only some tensors take part."""
        return (math.inf, float(self.clip_value)) if self.apply_to is None else None

    def init(self, layout: Layout) -> State:
        """State without a memory. Raises ValueError where `apply_to` matches no tensor."""
        constants = {}
        if self.apply_to is not None:
            mask = layout.mask(self.apply_to, "Value: apply_to")
            constants["bound"] = torch.where(mask, float(self.clip_value), math.inf).double()
        return State(self, layout, constants=constants)

    def decide(self, measured: Measured, state: State) -> Decision:
        """A bound, the same on every step: a float, or per tensor where some are left out."""
        return Decision(bound=state.constants.get("bound", float(self.clip_value)))


@dataclass(frozen=True)
class BlockRMS(Policy):
    """Scale each gradient so that the root mean square of its elements is at most `threshold`.

    ``g_i / max(1, RMS(g_i) / threshold)`` with ``RMS(g_i) = norm_i / sqrt(numel_i)``. Unlike `TensorNorm`
    it asks the same of small and large tensors. Source: Shazeer, Stern 2018, section 6 (arXiv 1804.04235),
    there on the update; on the gradient as in optax' ``clip_by_block_rms``.

    When not to use it: with its default it is made for gradients or updates of about unit size. Gradients of
    a mean loss are far smaller, and it then never acts.

    Args:
        threshold: largest root mean square, positive. Default 1.
        apply_to: the tensors to scale; all by default.

    Raises:
        ValueError: a `threshold` that is not positive; from `init`, a pattern that matches nothing.

    >>> policy = gradkern.BlockRMS(0.5)
    >>> gradkern.policies.replay(policy, [[2.0, 2.0]], shapes=[(1,), (16,)]).coef
    tensor([[0.2500, 1.0000]], dtype=torch.float64)
    """

    threshold: float = 1.0
    apply_to: Pattern | None = None

    def __post_init__(self) -> None:
        check_positive(self, "threshold", self.threshold)

    @property
    def needs(self) -> Needs:
        """Rows."""
        return Needs(total=False, rows=True)

    def init(self, layout: Layout) -> State:
        """State without a memory. Raises ValueError where `apply_to` matches no tensor."""
        limits = [self.threshold * math.sqrt(numel) for numel in layout.numels()]
        constants = {"limits": layout.floats(limits)}
        if self.apply_to is not None:
            constants["apply_to"] = layout.mask(self.apply_to, "BlockRMS: apply_to")
        return State(self, layout, constants=constants)

    def decide(self, measured: Measured, state: State) -> Decision:
        """A coefficient per tensor: the limit on the norm is ``threshold * sqrt(numel)``."""
        limits = state.constants["limits"]
        return Decision(coef=_only(state, clip_coef(limits, measured.norms())), info={"threshold": limits})


@dataclass(frozen=True)
class AGC(Policy):
    """Adaptive gradient clipping: no unit's gradient may exceed a share of its weights.

    For each unit, ``g_u * min(1, m_u / norm(g_u))`` with ``m_u = clipping * max(norm(w_u), eps)``. A unit
    is a dim-0 row (one output neuron or channel) of a tensor with two or more dimensions, else the whole
    tensor.
    Source: Brock, De, Smith, Simonyan 2021, section 4 and equation 3 (arXiv 2102.06171). Where a
    gradient is above its limit and below 1e-6 the authors' code divides by 1e-6 instead of the norm and
    overshoots; this does not.

    When not to use it: on the last linear layer (section 4.1 of the source leaves it out; so do here, with
    `exclude`), on freshly zero-initialised layers (`eps` alone lets them start, slowly), and with optimizers
    that normalise the size of the update (Adam, Muon), which need it least.

    Args:
        clipping: share of the weights' norm, positive. 0.01; larger for small batches (section 4.1).
        eps: floor of a weight norm, so that zero weights can move, positive. 1e-3.
        exclude: tensors to leave alone.
        per: "unit", or "tensor" for whole tensors: coarser, and without a pass of its own over the gradients.

    Raises:
        ValueError: `clipping` or `eps` not positive, another `per`; from `init`, an `exclude` that matches
            nothing.

    >>> policy = gradkern.AGC(clipping=0.5)
    >>> layout = gradkern.policies.Layout(("w",), ((2, 3),), torch.device("cpu"))
    >>> units = gradkern.policies.unit_sums([torch.ones(2, 3)], [torch.tensor([[4.0] * 3, [1.0] * 3])])
    >>> policy.decide(gradkern.policies.Measured(units=units), policy.init(layout)).unit_coef
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    clipping: float = 0.01
    eps: float = 1e-3
    exclude: Pattern | None = None
    per: Literal["unit", "tensor"] = "unit"

    def __post_init__(self) -> None:
        check_positive(self, "clipping", self.clipping)
        check_positive(self, "eps", self.eps)
        if self.per not in ("unit", "tensor"):
            raise ValueError(f"AGC: per must be 'unit' or 'tensor', got {self.per!r}.")

    @property
    def needs(self) -> Needs:
        """Sums per unit, or rows of gradients and weights."""
        if self.per == "unit":
            return Needs(total=False, units=True)
        return Needs(total=False, rows=True, weight_rows=True)

    def init(self, layout: Layout) -> State:
        """State without a memory. Raises ValueError where `exclude` matches no tensor."""
        constants = {}
        if self.exclude is not None:
            kept = layout.mask(self.exclude, "AGC: exclude").logical_not()
            constants["apply_to"] = (
                kept if self.per == "tensor" else kept.index_select(0, layout.unit_tensor())
            )
        return State(self, layout, constants=constants)

    def decide(self, measured: Measured, state: State) -> Decision:
        """A coefficient per unit or per tensor."""
        if self.per == "unit":
            units = measured.need_units()
            coef = self._coef(units.grad_sum_sq.sqrt(), units.weight_sum_sq)
            return Decision(unit_coef=_only(state, coef))
        weights = measured.need_weight_rows()
        return Decision(coef=_only(state, self._coef(measured.norms(), weights.select(-1, 0))))

    def _coef(self, grad_norm: Tensor, weight_sum_sq: Tensor) -> Tensor:
        return clip_coef(weight_sum_sq.sqrt().clamp_min(self.eps) * self.clipping, grad_norm)


def _only(state: State, coef: Tensor) -> Tensor:
    """`coef` for the tensors (or units) that the policy applies to, 1 for the others."""
    chosen = state.constants.get("apply_to")
    return coef if chosen is None else torch.where(chosen, coef, 1.0)
