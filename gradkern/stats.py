"""What measuring returns: statistics of gradients, still on their device, under names."""

from __future__ import annotations

import difflib
import math
from typing import NoReturn

import torch
from torch import Tensor

from gradkern import reference
from gradkern.params import Names


class Stats:
    """Statistics of some gradient elements, or of several sets of them at once.

    All numbers are float64 tensors of the shape of `Stats`: `()` for one set, `[n]` for n of them. They are
    on the gradients' device (on the CPU for mps). Reading one, with `float()` or `.item()`, waits for the
    device; nothing else does. `float(stats)`, `stats.item()` and `format(stats, ".3f")` give the norm.

    Args:
        data: float64 `[..., 5]`: sum_sq, abs_max, nan_count, inf_count, zero_count.

    >>> grads = gradkern.measure_grads([torch.tensor([3.0, 0.0]), torch.tensor([-4.0])])
    >>> grads.per_tensor.norm
    tensor([3., 4.], dtype=torch.float64)
    >>> float(grads)
    5.0
    """

    __slots__ = ("data",)

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @staticmethod
    def identity(device: torch.device | str = "cpu") -> Stats:
        """The statistics of no elements at all, which change nothing in a merge."""
        return Stats(torch.zeros(reference.COLUMNS, dtype=torch.float64, device=device))

    @property
    def shape(self) -> torch.Size:
        """`()` for one set of elements, `[n]` for n of them."""
        return self.data.shape[:-1]

    @property
    def sum_sq(self) -> Tensor:
        """Sum of the squares of the finite elements."""
        return self.data.select(-1, 0)

    @property
    def abs_max(self) -> Tensor:
        """Largest magnitude of the finite elements."""
        return self.data.select(-1, 1)

    @property
    def nan_count(self) -> Tensor:
        """How many elements are NaN."""
        return self.data.select(-1, 2)

    @property
    def inf_count(self) -> Tensor:
        """How many elements are +Inf or -Inf."""
        return self.data.select(-1, 3)

    @property
    def zero_count(self) -> Tensor:
        """How many elements are zero; of a sparse gradient, of those that it stores."""
        return self.data.select(-1, 4)

    @property
    def norm(self) -> Tensor:
        """The 2-norm as torch gives it: NaN if any element is, else Inf if any element is."""
        return reference.norm_of(self.data)

    @property
    def finite_norm(self) -> Tensor:
        """The 2-norm of the finite elements."""
        return self.sum_sq.sqrt()

    @property
    def is_finite(self) -> Tensor:
        """Whether no element is NaN or Inf; bool."""
        return self.nan_count + self.inf_count == 0

    def merge(self, other: Stats) -> Stats:
        """The statistics of both sets of elements together. Associative, up to the rounding of sum_sq."""
        sum_sq, _, *counts = (self.data + other.data).unbind(-1)
        return Stats(torch.stack([sum_sq, torch.maximum(self.abs_max, other.abs_max), *counts], -1))

    def scaled(self, factor: float | Tensor) -> Stats:
        """What the statistics are once every element has been multiplied by `factor`, finite and not 0."""
        if isinstance(factor, Tensor):
            factor = factor.to(self.data.device, torch.float64)
        else:
            factor = torch.full_like(self.sum_sq, factor)  # by itself a number would be copied to the device
        one = torch.ones_like(factor)
        return Stats(self.data * torch.stack([factor.square(), factor.abs(), one, one, one], -1))

    def item(self) -> float:
        """The norm as a Python float. Waits for the device."""
        return float(self)

    def __float__(self) -> float:
        if self.shape:
            raise TypeError(f"float: these are Stats of {self.shape[0]} tensors; take one of .norm.tolist().")
        return _norm(self._read(self.data))

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    def __repr__(self) -> str:
        if self.shape:
            return f"{type(self).__name__}({self.shape[0]} tensors)"
        if not _has_values(self.data):
            return f"{type(self).__name__}(on {self.data.device}, without values)"
        return f"{type(self).__name__}({_summary(self._read(self.data))})"

    def _read(self, data: Tensor) -> list[float]:
        values: list[float] = data.tolist()
        return values

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} is no number: compare and compute with stats.norm, a tensor on the "
            "gradients' device, or with float(stats), which waits for it."
        )

    __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _refuse
    __neg__ = __pos__ = __abs__ = __int__ = __round__ = __trunc__ = __floor__ = __ceil__ = _refuse

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (int, float, Tensor)):
            self._refuse()
        return self is other

    __hash__ = object.__hash__


class GradStats(Stats):
    """Statistics of gradients before they were clipped: of all together, and of each by its name.

    The totals are 0-dim tensors: `stats.norm`, `.finite_norm`, `.abs_max`, `.nan_count`, `.inf_count`,
    `.zero_count`, `.is_finite`, `.coef`, `.clipped_norm`. The same of each gradient: `stats.per_tensor.norm`,
    float64 `[len(names)]`, and `stats["layer.weight"].norm`. Nothing waits for the device until a number is
    asked for; of the methods, `worst`, `table` and `as_dict` do.

    >>> stats = gradkern.measure_grads({"w": torch.tensor([3.0, 0.0]), "b": torch.tensor([-4.0])})
    >>> stats.names
    ['w', 'b']
    >>> stats["b"].norm
    tensor(4., dtype=torch.float64)
    >>> f"{stats:.2f}"
    '5.00'
    """

    __slots__ = ("_clip_value", "_coef", "_index", "_names", "_nonfinite", "rows")

    def __init__(
        self,
        rows: Tensor,
        total: Tensor,
        names: Names,
        coef: Tensor | None = None,
        clip_value: float | Tensor = math.inf,
        nonfinite: str = "propagate",
    ) -> None:
        self.data = total
        self.rows = rows
        self._names = names
        self._coef = coef
        self._clip_value = clip_value
        self._nonfinite = nonfinite
        self._index: dict[str, int] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the gradients, in the order of the rows. Parameters without a gradient have no row."""
        return self._names.to_list()

    @property
    def per_tensor(self) -> Stats:
        """The statistics of each gradient, of shape `[len(names)]`."""
        return Stats(self.rows)

    @property
    def coef(self) -> Tensor:
        """What gradients were multiplied by: 1 where nothing was clipped.

        0-dim; of a policy that clips each tensor by itself `[len(names)]`, and of one that clips each unit
        the share of each tensor's norm that is left.
        """
        return torch.ones_like(self.sum_sq) if self._coef is None else self._coef

    @property
    def clipped_norm(self) -> Tensor:
        """The norm after clipping, from the norm before it and the coefficient; not measured again.

        Of the finite part under "keep" and "zero", torch's answer under "propagate". NaN where `clip_value`
        has cut elements off: that norm can only be measured.
        """
        coef, propagates = self.coef, self._nonfinite == "propagate"
        if coef.dim() > 0:
            norm = (reference.norm_of(self.rows, self._nonfinite) * coef).square().sum().sqrt()
        else:
            norm = reference.norm_of(self.data, self._nonfinite) * coef
        per_tensor = coef.dim() > 0 or isinstance(self._clip_value, Tensor)
        if not isinstance(self._clip_value, Tensor) and self._clip_value == math.inf:
            return norm
        peaks = self.per_tensor.abs_max if per_tensor else self.abs_max
        cut = (peaks * coef > self._clip_value).any()
        if propagates:
            cut = cut | (self.inf_count > 0)
        return torch.where(cut, math.nan, norm)

    def worst(self, k: int = 10) -> list[tuple[str, float]]:
        """Names and norms of the `k` gradients that stand out: NaN first, then Inf, then by the norm.

        Raises:
            ValueError: `k` is not a whole number from 0 up.

        >>> gradkern.measure_grads([torch.ones(1), torch.tensor([float("inf")]), torch.ones(4)]).worst(2)
        [('grads[1]', inf), ('grads[2]', 2.0)]
        """
        if not isinstance(k, int) or k < 0:
            raise ValueError(f"worst: k must be a whole number from 0 up, got {k!r}.")
        norms = [_norm(row) for row in self._read_rows()]
        order = sorted(range(len(norms)), key=lambda row: _badness(norms[row]), reverse=True)
        return [(self._names[row], norms[row]) for row in order[:k]]

    def table(self) -> str:
        """All gradients and their statistics as text, one a line, with the total below.

        >>> print(gradkern.measure_grads({"w": torch.tensor([3.0, 0.0]), "b": torch.tensor([-4.0])}).table())
        name   norm  abs_max  nan  inf  zero
        w         3        3    0    0     1
        b         4        4    0    0     0
        total     5        4    0    0     1
        """
        lines: list[tuple[str, ...]] = [("name", "norm", "abs_max", "nan", "inf", "zero")]
        total, rows = self._read(self.data), self._read_rows()
        for name, row in zip([*self.names, "total"], [*rows, total], strict=True):
            lines.append((name, f"{_norm(row):.4g}", f"{row[1]:.4g}", *(f"{count:.0f}" for count in row[2:])))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
        )

    def as_dict(self, *, per_tensor: bool = False) -> dict[str, float]:
        """The totals as Python numbers, for a logger; with `per_tensor`, also `norm/<name>` of each gradient.

        `coef` is the smallest, where there are several.

        >>> gradkern.measure_grads([torch.tensor([3.0, -4.0])]).as_dict()["norm"]
        5.0
        """
        last = torch.stack([least(self.coef), self.clipped_norm])
        values = self._read(torch.cat([self.data, last, *([self.rows.flatten()] if per_tensor else [])]))
        found = {"norm": _norm(values), "finite_norm": math.sqrt(values[0])}
        found["abs_max"] = values[1]
        found |= {f"{word}_count": int(values[2 + i]) for i, word in enumerate(("nan", "inf", "zero"))}
        found |= {"coef": values[5], "clipped_norm": values[6]}
        if per_tensor:
            for row, name in enumerate(self.names):
                found[f"norm/{name}"] = _norm(values[7 + 5 * row :])
        return found

    def __getitem__(self, name: str) -> Stats:
        if self._index is None:
            self._index = {known: row for row, known in enumerate(self.names)}
        row = self._index.get(name)
        if row is None:
            close = difflib.get_close_matches(str(name), self._index, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else " stats.names has all of them."
            raise KeyError(f"no gradient named {name!r} was measured.{hint}")
        if len(self._index) < len(self._names) and self.names.count(name) > 1:
            raise KeyError(f"several gradients are named {name!r}; stats.per_tensor has them by position.")
        return Stats(self.rows.select(0, row))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    __iter__ = None  # names are no positions: without this Python would try 0, 1, 2, ...

    def __repr__(self) -> str:
        tensors = f"{len(self._names)} tensor{'' if len(self._names) == 1 else 's'}"
        if not _has_values(self.data):
            return f"GradStats(of {tensors} on {self.data.device}, without values)"
        coef = "" if self._coef is None else f", coef={least(self._coef).item():.4g}"
        return f"GradStats({_summary(self._read(self.data))}{coef}, {tensors})"

    def require_values(self, function: str = "GradStats") -> None:
        """Raise, naming a gradient, if there are no values behind the statistics: on the meta device."""
        if self.data.is_meta:
            raise RuntimeError(
                f"{function}: the gradient of '{self._names[0]}' is on the meta device, which holds no "
                "values, so there is no number to read.\nMaterialise the module first, for example with "
                "module.to_empty(device=...)."
            )

    def _read(self, data: Tensor) -> list[float]:
        self.require_values()
        return super()._read(data)

    def _read_rows(self) -> list[list[float]]:
        values = self._read(self.rows.flatten())
        return [
            values[first : first + reference.COLUMNS] for first in range(0, len(values), reference.COLUMNS)
        ]


def _norm(row: list[float]) -> float:
    if row[2] > 0:
        return math.nan
    return math.inf if row[3] > 0 else math.sqrt(row[0])


def least(coef: Tensor) -> Tensor:
    """The smallest of several coefficients, 0-dim; 1 if there is none."""
    return coef if coef.dim() == 0 else torch.nn.functional.pad(coef, (0, 1), value=1.0).amin()


def _badness(norm: float) -> tuple[bool, float]:
    return (True, math.inf) if math.isnan(norm) else (False, norm)


def _summary(row: list[float]) -> str:
    counts = [
        f"{word}={count:.0f}" for word, count in zip(("nan", "inf"), row[2:4], strict=True) if count > 0
    ]
    if counts:
        counts.insert(0, f"finite_norm={math.sqrt(row[0]):.4g}")
    return ", ".join([f"norm={_norm(row):.4g}", *counts, f"abs_max={row[1]:.4g}"])


def _has_values(data: Tensor) -> bool:
    return not data.is_meta and type(data).__torch_dispatch__ is Tensor.__torch_dispatch__
