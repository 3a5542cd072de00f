"""What a policy sees (`Measured`), keeps (`State`) and answers (`Decision`); see `gradkern.policies`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from gradkern.params import shown

SUM_SQ, ABS_MAX, NAN_COUNT, INF_COUNT, ZERO_COUNT = range(5)
COLUMNS = 5

Pattern = str | Sequence[str] | Callable[[str], bool]
"""Tensors by name: an `fnmatch` pattern, several of them, or a predicate on the name."""


class Needs(NamedTuple):
    """The statistics a policy reads.

    `total`: the merge of all rows. `rows`: one row per tensor. `weight_rows`: the same five columns of the
    *weights*. `units`: per-unit sums of squares of gradients and weights (`Units`). `loss`: the step's loss:
    "optional" is used when given, "required" must be.
    """

    total: bool = True
    rows: bool = False
    weight_rows: bool = False
    units: bool = False
    loss: Literal["no", "optional", "required"] = "no"

    def union(self, other: Needs) -> Needs:
        """What is needed to serve both."""
        order = ("no", "optional", "required")
        return Needs(
            self.total or other.total,
            self.rows or other.rows,
            self.weight_rows or other.weight_rows,
            self.units or other.units,
            max(self.loss, other.loss, key=order.index),
        )


class Layout(NamedTuple):
    """The tensors a state is for: names, (global) shapes, and the device the statistics live on."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    device: torch.device

    def floats(self, values: Sequence[float] | Sequence[Sequence[float]] | float) -> Tensor:
        """`values` as float64 on the device."""
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def numels(self) -> list[int]:
        """Number of elements of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    def unit_counts(self) -> list[int]:
        """Number of units of each tensor, see `Units`."""
        return [_unit_count(shape) for shape in self.shapes]

    def unit_tensor(self) -> Tensor:
        """The tensor that each unit belongs to, int64 ``[units]``."""
        owners = [tensor for tensor, count in enumerate(self.unit_counts()) for _ in range(count)]
        return torch.tensor(owners, dtype=torch.int64, device=self.device)

    def mask(self, pattern: Pattern, parameter: str) -> Tensor:
        """`select` as bool ``[tensors]`` on the device."""
        return torch.tensor(self.select(pattern, parameter), device=self.device)

    def select(self, pattern: Pattern, parameter: str) -> list[bool]:
        """Which tensors `pattern` names. `parameter` ("GlobalNorm: apply_to") begins the error message.

        Raises:
            ValueError: the pattern, or one of several, matches no name.
        """
        if callable(pattern):
            chosen = [bool(pattern(name)) for name in self.names]
            if not any(chosen):
                raise ValueError(f"{parameter} selects no tensor. {self._known()}")
            return chosen
        patterns: Sequence[str] = (pattern,) if isinstance(pattern, str) else pattern
        if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
            raise TypeError(
                f"{parameter} must be a pattern, a list of patterns or a predicate on names, got "
                f"{shown(pattern)}."
            )
        if not patterns:
            raise ValueError(f"{parameter} holds no pattern. Use None for all tensors.")
        for one in patterns:
            if not any(fnmatchcase(name, one) for name in self.names):
                raise ValueError(f"{parameter} {one!r} matches no tensor. {self._known()}")
        return [any(fnmatchcase(name, one) for one in patterns) for name in self.names]

    def _known(self) -> str:
        shown = ", ".join(repr(name) for name in self.names[:5])
        more = f" and {len(self.names) - 5} more" if len(self.names) > 5 else ""
        return f"The {len(self.names)} names are {shown}{more}; `*` stands for any part of a name."


class Units(NamedTuple):
    """Sums of squares per unit, the units of all tensors one after the other.

    A unit is a dim-0 row of a tensor with two or more dimensions (an output neuron, an output channel), and
    the whole tensor otherwise. Like `Stats.sum_sq` the sums cover finite elements only, whatever
    `Measured.propagate` says.

    `grad_sum_sq`, `weight_sum_sq`: float64 ``[units]``. `offsets`: int64 ``[tensors + 1]``; tensor i owns the
    units ``offsets[i]`` to ``offsets[i + 1]``.
    """

    grad_sum_sq: Tensor
    weight_sum_sq: Tensor
    offsets: Tensor


class Measured(NamedTuple):
    """One step's statistics, on the gradients' device, before anything is clipped.

    `total`: float64 ``[5]``; `rows` and `weight_rows`: float64 ``[tensors, 5]`` in the layout's order;
    `loss`: 0-dim; `good`: 0-dim bool, see `all_finite`; each where `Needs` asks for it (`good` wherever there
    is a history). `propagate`: norms are torch's (NaN or Inf where an element is) and poison the coefficient;
    otherwise norms are those of the finite elements. `merge`: completes partial totals ``[..., 5]`` over
    ranks that hold *different* tensors (pipeline parallelism); not needed where every rank has every row.
    """

    total: Tensor | None = None
    rows: Tensor | None = None
    weight_rows: Tensor | None = None
    units: Units | None = None
    loss: Tensor | None = None
    good: Tensor | None = None
    propagate: bool = False
    merge: Callable[[Tensor], Tensor] | None = None

    def need_total(self) -> Tensor:
        """`total`, or an error if it was not measured."""
        return _given("total", self.total)

    def need_rows(self) -> Tensor:
        """`rows`, or an error if they were not measured."""
        return _given("rows", self.rows)

    def need_weight_rows(self) -> Tensor:
        """`weight_rows`, or an error if they were not measured."""
        return _given("weight_rows", self.weight_rows)

    def need_units(self) -> Units:
        """`units`, or an error if they were not measured."""
        return _given("units", self.units)

    def need_good(self) -> Tensor:
        """`good`, or an error if it was not given."""
        return _given("good", self.good)

    def norm(self) -> Tensor:
        """Joint 2-norm, 0-dim."""
        return self.norm_of(self.need_total())

    def norms(self) -> Tensor:
        """2-norm of each tensor, ``[tensors]``."""
        return self.norm_of(self.need_rows())

    def norm_of(self, stats: Tensor, norm_type: float = 2.0) -> Tensor:
        """2-norm or Inf-norm of stats ``[..., 5]``: ``[...]``."""
        norm = stats.select(-1, SUM_SQ).sqrt() if norm_type == 2.0 else stats.select(-1, ABS_MAX)
        if self.propagate:
            norm = torch.where(stats.select(-1, INF_COUNT) > 0, torch.inf, norm)
            norm = torch.where(stats.select(-1, NAN_COUNT) > 0, torch.nan, norm)
        return norm

    def fold(self, chosen: Tensor | None = None) -> Tensor:
        """The merge of the rows, or of the chosen ones: bool ``[..., tensors]`` gives stats ``[..., 5]``."""
        rows = self.need_rows()
        if chosen is not None:
            rows = torch.where(chosen.unsqueeze(-1), rows, 0.0)
        total = rows.sum(-2)
        if rows.shape[-2] > 0:
            peak = rows.select(-1, ABS_MAX).amax(-1, keepdim=True)
            total = torch.cat((total.narrow(-1, SUM_SQ, 1), peak, total.narrow(-1, NAN_COUNT, 3)), -1)
        return total if self.merge is None else self.merge(total)

    def scaled(
        self, coef: Tensor | None, unit_coef: Tensor | None = None, unit_tensor: Tensor | None = None
    ) -> Measured:
        """The statistics after multiplying by `coef` (0-dim or ``[tensors]``) and `unit_coef` (``[units]``).

        Exact, without reading a gradient: ``sum_sq * k**2`` and ``abs_max * |k|``. After a per-unit
        coefficient `abs_max` is only an upper bound (`Chain` refuses stages that would read it). What
        cannot be worked out is left out: the total after a coefficient per tensor without rows, units without
        `unit_tensor` (which is `Layout.unit_tensor()`).
        """
        total, rows, units = self.total, self.rows, self.units
        if coef is not None:
            if rows is not None:
                rows = _scale(rows, coef)
            if coef.dim() > 0 and units is not None:
                owner = unit_tensor
                units = None if owner is None else _scale_units(units, coef.index_select(0, owner))
            elif units is not None:
                units = _scale_units(units, coef)
        if unit_coef is not None:
            units = _scale_units(_given("units", units), unit_coef)
            if rows is not None:
                # A sum in a fixed order, where index_add_ on a GPU adds in any.
                sums = torch.segment_reduce(
                    units.grad_sum_sq, "sum", offsets=units.offsets, unsafe=True, initial=0
                )
                rows = torch.cat((sums.unsqueeze(-1), rows.narrow(-1, ABS_MAX, 4)), -1)
        after = self._replace(rows=rows, units=units)
        if total is None or (coef is None and unit_coef is None):
            return after
        if unit_coef is None and coef is not None and coef.dim() == 0:
            return after._replace(total=_scale(total, coef))
        return after._replace(total=None if rows is None else after.fold())


class Update(NamedTuple):
    """A value to remember: `target` becomes `value`, where `where` (bool, or everywhere) holds.

    With `slot` (int64, one entry along the last dimension) only that place of `target` is written: a ring
    buffer's next entry.
    """

    target: Tensor
    value: Tensor
    where: Tensor | None = None
    slot: Tensor | None = None


class Decision(NamedTuple):
    """What to do with this step's gradients. Everything is on the device; None says "no part in it".

    `coef`: float64, 0-dim for all or ``[tensors]``. `unit_coef`: float64 ``[units]``, multiplies as well.
    `skip`: bool, 0-dim: leave parameters and optimizer state alone. `bound`: largest magnitude of an element
    after the coefficients, a float for all or float64 ``[tensors]`` (inf where there is none). An element
    becomes ``clamp(element * coef * unit_coef, -bound, bound)``.
    `info`: numbers worth showing: "norm", "threshold", "z"; 0-dim or one per tensor, group or signal.
    `updates`: what `commit` writes.
    """

    coef: Tensor | None = None
    unit_coef: Tensor | None = None
    skip: Tensor | None = None
    bound: float | Tensor | None = None
    info: Mapping[str, Tensor] = {}
    updates: tuple[Update, ...] = ()

    def commit(self, good: Tensor | None) -> None:
        """Let the step enter the history, in place, where it is `good` (0-dim bool) and not skipped."""
        if not self.updates:
            return
        if good is None:
            raise ValueError(
                "Decision.commit: `good` is None, but a bad step must not enter the history. "
                "Pass all_finite(total)."
            )
        keep = good if self.skip is None else good & self.skip.logical_not()
        enters, condition = keep, None
        for target, value, where, slot in self.updates:
            if where is not condition:  # mostly the same one throughout
                enters, condition = keep if where is None else keep & where, where
            if slot is None:
                torch.where(enters, value, target, out=target)
            else:
                old = target.gather(-1, slot)
                target.scatter_(-1, slot, torch.where(enters.unsqueeze(-1), value.unsqueeze(-1), old))


T = TypeVar("T")


def _given(what: str, value: T | None) -> T:
    if value is None:
        raise ValueError(
            f"decide: the policy needs `{what}`, which is None. Measure what `policy.needs` asks for."
        )
    return value


def all_finite(total: Tensor) -> Tensor:
    """Whether a step may enter a history, 0-dim bool: no NaN, no Inf, and a norm that float64 can hold."""
    sum_sq, _, nan_count, inf_count, _ = total.unbind()
    return (nan_count + inf_count == 0) & (sum_sq < math.inf)


def clip_coef(limit: Tensor, norm: Tensor) -> Tensor:
    """``min(1, limit / norm)``; exactly 1 where the norm is 0 or within the limit, NaN where it is NaN."""
    return torch.where(norm <= limit, 1.0, limit / norm)


class State:
    """A policy's memory: device tensors that are only ever written in place.

    `constants` follow from the policy and the layout and are not saved. `shared` belongs to the run as a
    whole. `per_tensor` has one entry along dim 0 for each of `layout.names`, and is saved and restored by
    name. `stages` are the states of a chain's stages. `unwritten` says what stands where nothing is written
    yet: the infinities of a loaded history, begun under another parameter perhaps, become this.
    """

    def __init__(
        self,
        policy: Policy,
        layout: Layout,
        *,
        constants: Mapping[str, Tensor] | None = None,
        shared: Mapping[str, Tensor] | None = None,
        per_tensor: Mapping[str, Tensor] | None = None,
        stages: Sequence[State] = (),
        unwritten: Mapping[str, float] | None = None,
    ) -> None:
        self.policy = type(policy).__name__
        self.layout = layout
        self.constants = dict(constants or {})
        self.shared = dict(shared or {})
        self.per_tensor = dict(per_tensor or {})
        self.stages = tuple(stages)
        self.unwritten = dict(unwritten or {})

    def state_dict(self) -> dict[str, Any]:
        """A copy that `load_state_dict` takes, on the same device. Reads nothing on the host."""
        return {"names": list(self.layout.names), **self._saved()}

    def load_state_dict(self, saved: Mapping[str, Any], strict: bool = True) -> None:
        """Restore from `state_dict()`, in place; per-tensor histories go to the tensors of the same name.

        Args:
            strict: the names must be the same. Otherwise tensors unknown to `saved` keep what they have, and
                tensors unknown to this state are dropped: for a model that gained or lost layers.

        Raises:
            ValueError: saved by another policy, with other history lengths, or (strict) for other names,
                which are listed. Nothing has been loaded.
        """
        for key in ("names", "policy"):
            if not isinstance(saved, Mapping) or key not in saved:
                raise ValueError(
                    f"load_state_dict: {key!r} is missing, so this was not saved by a policy's state_dict()."
                )
        mine, theirs = self.layout.names, list(saved["names"])
        missing = sorted(set(mine) - set(theirs))
        unexpected = sorted(set(theirs) - set(mine))
        if strict and (missing or unexpected):
            advice = "Pass strict=False to restore the histories of the names that are in both."
            if sorted(map(_unwrapped, missing)) == sorted(map(_unwrapped, unexpected)):
                advice = (
                    "They differ by the prefix of a wrapper (DistributedDataParallel, torch.compile). Make "
                    "both clippers of the module inside it, or both of the wrapper."
                )
            raise ValueError(
                f"load_state_dict: saved for other tensors. Missing: {missing}. Unexpected: {unexpected}. "
                f"{advice}"
            )
        position = {name: index for index, name in enumerate(theirs)}
        pairs = [(row, position[name]) for row, name in enumerate(mine) if name in position]
        for target, source in self._plan(saved, len(theirs), pairs, self.policy):
            target.copy_(source)

    def _saved(self) -> dict[str, Any]:
        saved: dict[str, Any] = {"policy": self.policy}
        if self.shared:
            saved["shared"] = {key: value.clone() for key, value in self.shared.items()}
        if self.per_tensor:
            saved["per_tensor"] = {key: value.clone() for key, value in self.per_tensor.items()}
        if self.stages:
            saved["stages"] = [stage._saved() for stage in self.stages]
        return saved

    def _called(self, place: str) -> str:
        return f"this is {self.policy}" if place == self.policy else f"{place} is {self.policy}"

    def _plan(
        self, saved: Mapping[str, Any], count: int, pairs: list[tuple[int, int]], place: str
    ) -> list[tuple[Tensor, Tensor]]:
        """All copies to make, every one checked before the first is made."""
        if saved.get("policy") != self.policy:
            raise ValueError(
                f"load_state_dict: saved by {saved.get('policy')}, but {self._called(place)}. "
                "Build the policy that was saved."
            )
        plan: list[tuple[Tensor, Tensor]] = []
        rows, sources = [row for row, _ in pairs], [source for _, source in pairs]
        for part, mine, lead in (("shared", self.shared, ()), ("per_tensor", self.per_tensor, (count,))):
            theirs: Mapping[str, Tensor] = saved.get(part, {})
            if set(theirs) != set(mine):
                raise ValueError(
                    f"load_state_dict: {place} keeps {sorted(mine)}, saved were {sorted(theirs)}. "
                    "Build the policy with the parameters it was saved with."
                )
            for key, target in mine.items():
                source = theirs[key]
                wanted = (*lead, *target.shape[len(lead) :])
                shape = getattr(source, "shape", ())
                if not isinstance(source, Tensor) or tuple(shape) != wanted:
                    raise ValueError(
                        f"load_state_dict: {place}.{key} has shape {list(shape)}, not {list(wanted)}. "
                        "Build the policy with the window it was saved with."
                    )
                if key in self.unwritten:
                    source = torch.where(source.abs() < math.inf, source, self.unwritten[key])
                if not lead or (rows == sources and len(rows) == len(target) == count):
                    plan.append((target, source))
                else:
                    plan.extend(
                        (target[row], source[other]) for row, other in zip(rows, sources, strict=True)
                    )
        stages: Sequence[Mapping[str, Any]] = saved.get("stages", ())
        if len(stages) != len(self.stages):
            raise ValueError(
                f"load_state_dict: {place} has {len(self.stages)} stages, saved were {len(stages)}. "
                "Build the chain that was saved."
            )
        for index, (stage, theirs_stage) in enumerate(zip(self.stages, stages, strict=True)):
            plan.extend(stage._plan(theirs_stage, count, pairs, f"{place} stage {index}"))
        return plan


@dataclass(frozen=True)
class Policy:
    """Base of all policies; see this module's text for the protocol. A policy's parameters never change."""

    @property
    def needs(self) -> Needs:
        """The statistics `decide` reads."""
        return Needs()

    @property
    def elementwise(self) -> bool:
        """Whether the decision bounds elements: what is left then is unknown without reading again."""
        return False

    @property
    def reads_abs_max(self) -> bool:
        """Whether `decide` reads `abs_max`, which a per-unit coefficient leaves unknown."""
        return False

    def as_clip(self) -> tuple[float, float] | None:
        """``(max_norm, clip_value)`` where ``gradkern.clip_`` alone does what this policy does, else None."""
        return None

    def init(self, layout: Layout) -> State:
        """Fresh state for these tensors. Raises ValueError where a pattern matches none of them."""
        return State(self, layout)

    def decide(self, measured: Measured, state: State) -> Decision:
        """The decision for one step. Reads nothing on the host and writes nothing."""
        raise NotImplementedError


def unit_sums(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Units:
    """`Units` of these gradients and weights, in plain PyTorch: what the fused op must give.

    >>> tensors = [torch.ones(2, 3), torch.ones(4)]
    >>> units = gradkern.policies.unit_sums(tensors, tensors)
    >>> units.grad_sum_sq.tolist(), units.weight_sum_sq.tolist(), units.offsets.tolist()
    ([3.0, 3.0, 4.0], [3.0, 3.0, 4.0], [0, 2, 3])
    """
    counts = [_unit_count(grad.shape) for grad in grads]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    device = grads[0].device if grads else torch.device("cpu")
    return Units(_sum_sq_per_unit(grads), _sum_sq_per_unit(weights), offsets.to(device))


def _sum_sq_per_unit(tensors: Sequence[Tensor]) -> Tensor:
    sums = [torch.zeros(0, dtype=torch.float64)]
    for tensor in tensors:
        square = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
        square = torch.view_as_real(square).square().sum(-1) if square.is_complex() else square.square()
        units = _unit_count(tensor.shape)
        finite = torch.where(tensor.isfinite(), square, 0.0)
        sums.append(finite.reshape(units, tensor.numel() // max(units, 1)).sum(1))
    return torch.cat(sums[1:] or sums)


def _unit_count(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _scale_units(units: Units, coef: Tensor) -> Units:
    return units._replace(grad_sum_sq=units.grad_sum_sq * coef.square())


def _unwrapped(name: str) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _scale(stats: Tensor, coef: Tensor) -> Tensor:
    """Stats ``[..., 5]`` after multiplying what they describe by `coef` ``[...]`` or 0-dim."""
    factors = torch.stack((coef.square(), coef.abs()), -1)
    return torch.cat((stats.narrow(-1, SUM_SQ, 2) * factors, stats.narrow(-1, NAN_COUNT, 3)), -1)


def check_number(policy: Policy, parameter: str, value: object) -> None:
    """Refuse what cannot be compared with a number."""
    try:
        value < 0  # type: ignore[operator]  # noqa: B015
    except TypeError:
        name = type(policy).__name__
        raise TypeError(f"{name}: {parameter} must be a number, got {shown(value)}.") from None


def check_limit(policy: Policy, parameter: str, value: float) -> None:
    """Refuse a limit that is negative or NaN."""
    check_number(policy, parameter, value)
    if not value >= 0:
        raise ValueError(
            f"{type(policy).__name__}: {parameter} must not be negative, got {value}. Use inf for no limit."
        )


def check_positive(policy: Policy, parameter: str, value: float) -> None:
    """Refuse a number that is not positive and finite."""
    check_number(policy, parameter, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{type(policy).__name__}: {parameter} must be positive and finite, got {value}.")


def check_share(policy: Policy, parameter: str, value: float) -> None:
    """Refuse a smoothing factor outside [0, 1)."""
    check_number(policy, parameter, value)
    if not 0 <= value < 1:
        raise ValueError(
            f"{type(policy).__name__}: {parameter} must be at least 0 and below 1, got {value}. It is the "
            "share of the old average that stays at each step."
        )


def check_steps(policy: Policy, parameter: str, value: int, least: int) -> None:
    """Refuse a number of steps that is no whole number or below `least`."""
    check_number(policy, parameter, value)
    if not hasattr(value, "__index__") or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{type(policy).__name__}: {parameter} must be a whole number of at least {least}, got {value}."
        )
