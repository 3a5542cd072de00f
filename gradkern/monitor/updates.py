"""How far a step moved every weight: ||update|| per tensor, of large ones from a fixed sample."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gradkern import ops

# Elements that are looked at of one tensor, at most.
SAMPLE: Final = 65536

# Bytes that the copies from before a step may take, all tensors together.
COPY_BYTES: Final = 32 << 20


class UpdateSampler:
    """Copies a sample of every weight before a step and measures the difference after it.

    Of a tensor of up to `SAMPLE` elements all of them; of a larger one every k-th, from a start that a hash
    of its name gives: the same ones in every run. k is odd and shares no small factor with the last
    dimension, so that the sample does not sit in a few columns.
    """

    def __init__(self) -> None:
        self._key: list[tuple[int, tuple[int, ...]]] = []
        self._places: list[tuple[int, int, int]] = []  # of each tensor: start, distance, elements taken
        self._before: list[Tensor] = []

    @property
    def is_open(self) -> bool:
        """Whether there is a copy from before a step."""
        return bool(self._before)

    def before(self, names: Sequence[str], weights: Sequence[Tensor]) -> None:
        """Copy. `weights` are dense; on any device."""
        key = [(id(weight), tuple(weight.shape)) for weight in weights]
        if key != self._key:
            most = max(min(SAMPLE, COPY_BYTES // (8 * max(len(weights), 1))), 256)
            self._places = [
                place(name, weight.numel(), weight.shape[-1] if weight.dim() else 1, most)
                for name, weight in zip(names, weights, strict=True)
            ]
            self._key = key
        self._before = [
            _sample(weight, spot).clone() for weight, spot in zip(weights, self._places, strict=True)
        ]

    def after(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Sums over the sampled elements of each tensor, and how many were sampled of how many.

        float64 ``[n, 3]``: the sum of squares of the difference, the sum of its fourth powers, and how many
        of the differences are not finite. Still on the device. The copies are let go.
        """
        differences = []
        for before, weight, spot in zip(self._before, weights, self._places, strict=True):
            now = _sample(weight, spot)
            wide = torch.float64 if now.dtype == torch.float64 else torch.float32
            differences.append(now.to(wide) - before.to(wide))
        self._before = []
        rows, _ = ops.measure(differences)
        squares, _ = ops.measure([difference.double().square_() for difference in differences])
        sums = torch.stack([rows[:, 0], squares[:, 0], rows[:, 2] + rows[:, 3]], 1)
        return sums, [
            (taken, weight.numel()) for (_, _, taken), weight in zip(self._places, weights, strict=True)
        ]

    def forget(self) -> None:
        """Let the copies go: there was no step."""
        self._before = []


def place(name: str, numel: int, columns: int, most: int) -> tuple[int, int, int]:
    """Start, distance and number of the sampled elements of a tensor.

    >>> from gradkern.monitor.updates import place
    >>> place("weight", 100, 10, 1000)
    (0, 1, 100)
    >>> start, distance, taken = place("weight", 1_000_000, 1000, 1000)
    >>> distance, start < distance, start + (taken - 1) * distance < 1_000_000
    (1001, True, True)
    """
    if numel <= most:
        return 0, 1, numel
    distance = -(-numel // most)
    while distance % 2 == 0 or any(columns % d == 0 and distance % d == 0 for d in (3, 5, 7)):
        distance += 1
    start = zlib.crc32(name.encode()) % distance
    return start, distance, -(-(numel - start) // distance)


def norm_and_error(sum_sq: float, sum_4: float, taken: int, numel: int) -> tuple[float, float]:
    """The norm of all `numel` elements from a sample of `taken`, and its standard error.

    >>> from gradkern.monitor.updates import norm_and_error
    >>> norm_and_error(25.0, 337.0, 2, 2)
    (5.0, 0.0)
    """
    if taken == 0:
        return 0.0, 0.0
    norm = math.sqrt(sum_sq * numel / taken)
    if taken == numel or norm == 0 or taken < 2:
        return norm, 0.0
    variance = max(sum_4 / taken - (sum_sq / taken) ** 2, 0.0) * taken / (taken - 1)
    # Of the estimated sum of squares; the sample is drawn without putting anything back.
    error = numel * math.sqrt(variance / taken * (1 - taken / numel))
    return norm, error / (2 * norm)


def _sample(weight: Tensor, spot: tuple[int, int, int]) -> Tensor:
    start, distance, taken = spot
    flat = weight.detach()
    if not flat.is_contiguous():
        # Some other order of dimensions, but one block of memory: any order of elements will do.
        order = sorted(range(flat.dim()), key=flat.stride, reverse=True)
        flat = flat.permute(order)
    flat = flat.reshape(-1)
    return flat if taken == flat.numel() else flat[start::distance][:taken]
