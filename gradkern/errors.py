"""The exceptions of gradkern that Python has no name for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradkern.stats import GradStats


class NonFiniteGradientError(RuntimeError):
    """Gradients hold NaN or Inf, and the caller asked for an error. No gradient has been written.

    A `RuntimeError`, as torch raises under `error_if_nonfinite`.

    Attributes:
        stats: what was measured, to look further; None if the error was made without (by unpickling).
    """

    stats: GradStats | None = None
