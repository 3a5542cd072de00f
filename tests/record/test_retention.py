from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradkern.record import retention

STEPS = st.lists(st.integers(0, 300), min_size=1, max_size=60, unique=True).map(
    lambda steps: np.array(sorted(steps), np.int64)
)


def kept_by_hand(steps: list[int], stride: int) -> list[int]:
    seen: set[int] = set()
    return [step for step in steps if step // stride not in seen and not seen.add(step // stride)]


@given(STEPS, st.integers(1, 40))
def test_the_first_step_of_each_bucket_stays(steps: npt.NDArray[np.int64], stride: int) -> None:
    kept, _ = retention.thinned(steps, stride, -1)
    assert steps[kept].tolist() == kept_by_hand(steps.tolist(), stride)


@given(STEPS, st.integers(1, 20), st.integers(0, 60))
def test_thinning_in_parts_is_thinning_the_whole(steps: npt.NDArray[np.int64], stride: int, cut: int) -> None:
    first, bucket = retention.thinned(steps[:cut], stride, -1)
    second, _ = retention.thinned(steps[cut:], stride, bucket)
    np.testing.assert_array_equal(np.append(first, second), retention.thinned(steps, stride, -1)[0])


@given(STEPS, st.integers(1, 20))
def test_thinning_twice_is_thinning_by_the_larger_stride(steps: npt.NDArray[np.int64], stride: int) -> None:
    once = steps[retention.thinned(steps, stride, -1)[0]]
    twice = once[retention.thinned(once, 2 * stride, -1)[0]]
    np.testing.assert_array_equal(twice, steps[retention.thinned(steps, 2 * stride, -1)[0]])


@pytest.mark.parametrize("offset", [0, 1, 9])
def test_a_cadence_is_thinned_at_any_offset(offset: int) -> None:
    steps = np.arange(offset, 1000, 10)
    assert retention.thinned(steps, 40, -1)[0].sum() == 25


def test_equal_steps_stay_or_go_together() -> None:
    kept, _ = retention.thinned(np.array([0, 0, 1, 1, 2, 2]), 2, -1)
    assert kept.tolist() == [True, True, False, False, True, True]


def test_the_stride_doubles_for_rows_of_every_step() -> None:
    assert retention.wider(4, 240_000, 60_000) == 8


def test_the_stride_grows_until_it_has_an_effect() -> None:
    assert retention.wider(1, 600_000, 60_000) == 32


@pytest.mark.parametrize("count", [0, 8, 31, 32])
def test_up_to_32_incidents_are_kept(count: int) -> None:
    assert retention.superfluous(list(range(count))) == []


def test_of_more_incidents_the_first_8_and_the_latest_24_are_kept() -> None:
    assert retention.superfluous(list(range(100))) == list(range(8, 76))
