"""Numbers and names as the sentences of findings have them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float) -> str:
    """`value` with three digits: ``0.0123``, ``41``, ``1.2e+06``, ``NaN``, ``Inf``.

    >>> from gradkern.diagnosis.words import number
    >>> number(1234567.0), number(0.5), number(float("-inf")), number(120)
    ('1.23e+06', '0.5', '-Inf', '120')
    """
    value = float(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    if value == round(value) and abs(value) < 1e5:
        return str(round(value))
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A share of 1 as a percentage: ``7 %``, ``0.2 %``."""
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"


def count(amount: float, one: str, many: str | None = None) -> str:
    """``1 step``, ``3 steps``."""
    word = one if amount == 1 else many or f"{one}s"
    return f"{round(amount) if math.isfinite(amount) else number(amount)} {word}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names in quotes, the first `most` of them: ``'a', 'b', 'c' and 4 more``."""
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
