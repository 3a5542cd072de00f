"""Histograms of base-2 exponents of half-precision gradients, in the columns of csrc/core/exponents.h."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from gradkern.record.schema import EXPONENT_COLUMNS

FIRST: Final = -44
LAST: Final = FIRST + EXPONENT_COLUMNS - 4

# Fraction bits of the formats; all have 16 bits in all.
_FRACTION: Final = {torch.float16: 10, torch.bfloat16: 7}


def histogram(values: Tensor) -> Tensor:
    """Histogram of a float16 or bfloat16 tensor, float64 ``[64]`` on its device. Waits for nothing.

    >>> from gradkern.monitor.exponents import histogram
    >>> counts = histogram(torch.tensor([0.0, 1.0, 1.5, 2.0, float("inf")], dtype=torch.float16))
    >>> counts.nonzero().flatten().tolist(), counts[counts > 0].tolist()
    ([0, 2, 47, 48], [1.0, 1.0, 2.0, 1.0])
    """
    fraction = _FRACTION[values.dtype]
    largest = (1 << (15 - fraction)) - 1
    bits = values.detach().reshape(-1).view(torch.int16).to(torch.int32) & 0x7FFF
    biased = bits >> fraction
    exponent = (biased - largest // 2).clamp(FIRST, LAST)
    column = exponent - FIRST + 3
    column = torch.where(biased == 0, (bits != 0).to(torch.int32), column)
    column = torch.where(biased == largest, 2, column)
    # Bins around whole numbers; with fixed ends, histc reads nothing on the host. It counts in float32, which
    # is exact up to 2**24 a bin, so large tensors are counted in parts.
    total = torch.zeros(EXPONENT_COLUMNS, dtype=torch.float64, device=values.device)
    for part in torch.split(column.to(torch.float32), 1 << 24):
        total += torch.histc(part, EXPONENT_COLUMNS, -0.5, EXPONENT_COLUMNS - 0.5)
    return total
