"""Blocks: consecutive steps of a series as bytes.

A file of one row a step would be half empty once every second row is taken out; blocks are written anew and
stay dense. Numbers are little-endian, in C order.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradkern.record.schema import Steps

RAW: Final = 0
"""The values as they are."""

SPARSE: Final = 1
"""Flat indices, uint32, of all values that are not +0, then these values."""

PACKED: Final = 2
"""The first bytes of all values, then the second bytes and so on, deflated: exponents resemble each other."""


def encode_steps(steps: Steps) -> bytes | None:
    """Steps as bytes; None if their distances are equal: the first, the last and the count then say all."""
    if len(steps) < 3 or (np.diff(steps) == steps[1] - steps[0]).all():
        return None
    return steps.astype("<i8").tobytes()


def decode_steps(data: bytes | None, first: int, last: int, count: int) -> Steps:
    """The reverse of `encode_steps`."""
    if data is not None:
        return np.frombuffer(data, "<i8")
    return first + (last - first) // max(count - 1, 1) * np.arange(count, dtype=np.int64)


def encode(values: npt.NDArray[Any], *, pack: bool) -> tuple[int, bytes]:
    """A code and the bytes of `values`, of 4 or 8 bytes each. Packing takes time."""
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    if pack and values.size:
        return PACKED, zlib.compress(values.view(np.uint8).reshape(values.size, -1).T.tobytes(), 1)
    # By their bits, so that -0 and every NaN come back as they were.
    bits = values.reshape(-1).view(f"<u{values.itemsize}")
    if np.count_nonzero(bits) * (4 + values.itemsize) < values.nbytes and values.size < 1 << 32:
        indices = np.flatnonzero(bits)
        return SPARSE, indices.astype("<u4").tobytes() + bits[indices].tobytes()
    return RAW, values.tobytes()


def decode(code: int, data: bytes, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The reverse of `encode`. ValueError if the bytes cannot be those of such values."""
    kind = np.dtype(dtype).newbyteorder("<")
    if code == RAW:
        return np.frombuffer(data, kind).reshape(shape)
    size = int(np.prod(shape))
    if code == SPARSE:
        count = len(data) // (4 + kind.itemsize)
        values = np.zeros(size, kind)
        values[np.frombuffer(data, "<u4", count)] = np.frombuffer(data, kind, count, 4 * count)
        return values.reshape(shape)
    if code == PACKED:
        try:
            planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(kind.itemsize, size)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        unpacked: npt.NDArray[Any] = np.ascontiguousarray(planes.T).view(kind).reshape(shape)
        return unpacked
    raise ValueError(f"unknown code {code}")
