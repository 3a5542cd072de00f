"""Histograms of base-2 exponents of half-precision gradients, in the columns of csrc/core/exponents.h."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from gradkern.monitor.updates import SAMPLE, place
from gradkern.record.schema import EXPONENT_COLUMNS

FIRST: Final = -44
LAST: Final = FIRST + EXPONENT_COLUMNS - 4

# Fraction bits of the formats; all have 16 bits in all.
_FRACTION: Final = {torch.float16: 10, torch.bfloat16: 7}


def histogram(values: Tensor) -> Tensor:
    """Histogram of a float16 or bfloat16 tensor, float64 ``[64]`` on its device. Waits for nothing.

    Of a tensor with more than `SAMPLE` elements, that of a sample, which is the same every time.

    >>> from gradkern.monitor.exponents import histogram
    >>> counts = histogram(torch.tensor([0.0, 1.0, 1.5, 2.0, float("inf")], dtype=torch.float16))
    >>> counts.nonzero().flatten().tolist(), counts[counts > 0].tolist()
    ([0, 2, 47, 48], [1.0, 1.0, 2.0, 1.0])
    """
    fraction = _FRACTION[values.dtype]
    largest = (1 << (15 - fraction)) - 1
    start, distance, taken = place("", values.numel(), values.shape[-1] if values.dim() else 1, SAMPLE)
    sample = values.detach().reshape(-1)[start::distance][:taken]
    bits = sample.view(torch.int16).to(torch.int32) & 0x7FFF
    biased = bits >> fraction
    exponent = (biased - largest // 2).clamp_(FIRST, LAST)
    column = torch.where(biased == 0, (bits != 0).to(torch.int32), exponent - FIRST + 3)
    column = torch.where(biased == largest, 2, column)
    counts = torch.zeros(EXPONENT_COLUMNS, dtype=torch.int32, device=values.device)
    # Whole numbers, so that the order of the additions does not matter, and no limits to be read on the host.
    return counts.index_add_(0, column, torch.ones_like(column)).to(torch.float64)
