from __future__ import annotations

import numpy as np
import pytest

from gradkern.record import schema


def test_join_keeps_the_new_columns_in_front() -> None:
    assert schema.join(["a", "b", "c"], ["c", "d"]) == ["c", "d", "a", "b"]


def test_a_row_is_a_copy() -> None:
    given = np.ones(3, np.float32)
    row = schema.as_row("grad_norm", given, 3)
    given[0] = 5
    assert row[0] == 1


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_finite_value_beyond_float32_stays_finite(sign: float) -> None:
    row = schema.as_row("grad_norm", [sign * 1e300, sign * np.inf], 2)
    np.testing.assert_array_equal(row, [sign * np.finfo(np.float32).max, sign * np.inf])


def test_a_row_of_another_length_names_the_kind_and_both_lengths() -> None:
    with pytest.raises(ValueError, match=r"put_rows: kind 'grad_norm' has 2 names, got .* \[3\]"):
        schema.as_row("grad_norm", [1, 2, 3], 2)


def test_counts_beyond_int32_saturate() -> None:
    histograms = schema.as_histograms(np.full((1, 64), 2**40), 1)
    assert histograms[0, 0] == 2**31 - 1


def test_histograms_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"put_exponents: .* has 2 names, got .* \[2, 63\]"):
        schema.as_histograms(np.zeros((2, 63)), 2)


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="set_names: 'a' names two columns of kind 'grad_norm'"):
        schema.check_names("grad_norm", ["a", "b", "a"])


def test_what_json_cannot_hold_becomes_text() -> None:
    assert schema.copied({"dtype": np.dtype("float32")}) == {"dtype": "float32"}
