"""How far a step moved every weight: ||update|| per tensor, of large ones from a fixed sample."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gradkern.clip import measure_grads
from gradkern.monitor.host import Floats

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
        self._key: list[tuple[str, torch.Size]] = []
        self._places: list[tuple[int, int, int]] = []  # of each tensor: start, distance, elements taken
        self._sizes: Floats = np.empty((0, 2))
        self._before: list[Tensor] = []  # negated: that copies all of them in one call

    @property
    def is_open(self) -> bool:
        """Whether there is a copy from before a step."""
        return bool(self._before)

    def before(self, names: Sequence[str], weights: Sequence[Tensor]) -> None:
        """Copy. `weights` are dense; on any device."""
        key = [(name, weight.shape) for name, weight in zip(names, weights, strict=True)]
        if key != self._key:
            most = max(min(SAMPLE, COPY_BYTES // (8 * max(len(weights), 1))), 256)
            self._places = [
                place(name, math.prod(shape), shape[-1] if shape else 1, most) for name, shape in key
            ]
            taken = [spot[2] for spot in self._places]
            self._sizes = np.array([taken, [math.prod(shape) for _, shape in key]], np.float64).T
            self._key = key
        samples = [
            sample.float() if sample.dtype in (torch.float16, torch.bfloat16) else sample
            for sample in map(_sample, weights, self._places)
        ]
        self._before = list(torch._foreach_neg(samples)) if samples else []

    def after(self, weights: Sequence[Tensor]) -> tuple[Tensor, Floats]:
        """Sums over the sampled elements of each tensor, and how many were sampled of how many, ``[n, 2]``.

        float64 ``[n, 2]``, still on the device: the sum of squares of the difference; and that of its fourth
        powers, from which the error follows, if any tensor was sampled. The copies are let go.
        """
        differences, self._before = self._before, []
        torch._foreach_add_(differences, list(map(_sample, weights, self._places)))
        sums = measure_grads(differences).rows[:, :2]
        if any(distance > 1 for _, distance, _ in self._places):
            squares = [difference.double().square_() for difference in differences]
            sums = torch.stack([sums[:, 0], measure_grads(squares).rows[:, 0]], 1)
        return sums, self._sizes

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


@np.errstate(all="ignore")
def norms_and_errors(sums: Floats, sizes: Floats) -> Floats:
    """The norm of each update and its standard error, ``[n, 2]``, from what `UpdateSampler.after` gives.

    >>> from gradkern.monitor.updates import norms_and_errors
    >>> norms_and_errors(np.array([[25.0, 337.0]]), np.array([[2.0, 2.0]]))
    array([[5., 0.]])
    """
    result = np.sqrt(sums)
    result[:, 1] = 0.0
    rows = sizes[:, 0] < sizes[:, 1]
    if rows.any():
        (sum_sq, sum_4), (taken, numel) = sums[rows].T, sizes[rows].T
        norms = np.sqrt(sum_sq * numel / taken)
        variances = np.maximum(sum_4 / taken - (sum_sq / taken) ** 2, 0.0) * taken / np.maximum(taken - 1, 1)
        # Of the estimated sum of squares; the sample is drawn without putting anything back.
        errors = numel * np.sqrt(variances / taken * (1 - taken / numel))
        result[rows] = np.stack([norms, np.where(norms > 0, errors / (2 * norms), 0.0)], 1)
    return result


def _sample(weight: Tensor, spot: tuple[int, int, int]) -> Tensor:
    start, distance, taken = spot
    if distance == 1:
        return weight
    # Some other order of dimensions, but one block of memory: any order of elements will do.
    order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
    return weight.permute(order).reshape(-1)[start::distance][:taken]
