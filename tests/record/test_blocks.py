from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradkern.record import blocks

STEPS = st.lists(st.integers(0, 2**60), min_size=1, max_size=20, unique=True).map(
    lambda steps: np.array(sorted(steps), np.int64)
)
DTYPES = st.sampled_from(["f4", "f8", "i4"]).map(np.dtype)
VALUES = DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_side=0, max_dims=3)))


@given(STEPS)
def test_steps_come_back(steps: npt.NDArray[np.int64]) -> None:
    data = blocks.encode_steps(steps)
    np.testing.assert_array_equal(blocks.decode_steps(data, int(steps[0]), int(steps[-1]), len(steps)), steps)


def test_steps_of_equal_distance_take_no_bytes() -> None:
    assert blocks.encode_steps(np.arange(7, 7000, 13)) is None


@given(VALUES, st.booleans())
def test_values_come_back_to_the_bit(values: npt.NDArray[Any], pack: bool) -> None:
    code, data = blocks.encode(values, pack=pack)
    assert blocks.decode(code, data, values.shape, values.dtype).tobytes() == values.tobytes()


@pytest.mark.parametrize("pack", [False, True])
def test_the_payload_of_a_nan_comes_back(pack: bool) -> None:
    bits = np.array([0x7FF8_0000_0000_0000, 0xFFF8_1234_5678_9ABC, 0, 0], np.uint64)
    code, data = blocks.encode(bits.view(np.float64), pack=pack)
    np.testing.assert_array_equal(blocks.decode(code, data, (4,), "f8").view(np.uint64), bits)


def test_zeros_take_no_bytes() -> None:
    assert blocks.encode(np.zeros((10, 1000), np.float32), pack=False) == (blocks.SPARSE, b"")


def test_few_counts_take_eight_bytes_each() -> None:
    counts = np.zeros((10, 1000), np.float32)
    counts[3, [5, 7]] = 1
    assert len(blocks.encode(counts, pack=False)[1]) == 16


def test_dense_rows_take_four_bytes_a_value() -> None:
    code, data = blocks.encode(np.ones((10, 1000), np.float32), pack=False)
    assert (code, len(data)) == (blocks.RAW, 40_000)


def test_histograms_pack_to_less_than_half() -> None:
    histograms = np.zeros((1, 100, 64), np.int32)
    histograms[..., 20:40] = np.random.default_rng(0).integers(0, 5000, (1, 100, 20))
    assert len(blocks.encode(histograms, pack=True)[1]) < histograms.nbytes / 2


def test_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        blocks.decode(blocks.RAW, b"\0" * 12, (2, 2), "f4")


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown code 9"):
        blocks.decode(9, b"", (0,), "f4")
