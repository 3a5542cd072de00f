from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern
from gradkern import GradStats, Stats
from tests.backends import Backend
from tests.helpers import INF, NAN, parameters
from tests.no_sync import no_host_read

counts = st.integers(0, 2**40).map(float)
WORDS = ["sum_sq", "abs_max", "nan_count", "inf_count", "zero_count", "norm", "finite_norm", "is_finite"]
rows = st.tuples(st.floats(0, 1e300), st.floats(0, 1e150), counts, counts, counts)


def stats_of(row: tuple[float, ...]) -> Stats:
    return Stats(torch.tensor(row, dtype=torch.float64))


def example() -> GradStats:
    return gradkern.measure_grads(
        {
            "embed.weight": torch.tensor([3.0, 0.0, -0.0]),
            "head.bias": torch.tensor([-4.0]),
            "empty": torch.zeros(0),
        }
    )


@given(rows, rows, rows)
def test_merging_is_associative_and_commutative(
    a: tuple[float, ...], b: tuple[float, ...], c: tuple[float, ...]
) -> None:
    left = stats_of(a).merge(stats_of(b)).merge(stats_of(c)).data
    right = stats_of(a).merge(stats_of(c).merge(stats_of(b))).data
    assert left[1:].tolist() == right[1:].tolist()
    assert left[0].item() == pytest.approx(right[0].item(), rel=1e-15)


@given(rows)
def test_the_identity_changes_nothing(row: tuple[float, ...]) -> None:
    assert Stats.identity().merge(stats_of(row)).data.tolist() == list(row)
    assert stats_of(row).merge(Stats.identity()).data.tolist() == list(row)


def test_merging_is_what_measuring_both_sets_gives() -> None:
    one, other = torch.tensor([3.0, NAN, 0.0]), torch.tensor([-4.0, INF])
    merged = gradkern.measure_grads([one]).merge(gradkern.measure_grads([other]))
    assert merged.data.tolist() == gradkern.measure_grads([torch.cat([one, other])]).data.tolist()


@pytest.mark.parametrize("factor", [0.5, -2.0, torch.tensor(0.25)], ids=str)
def test_scaling_is_what_measuring_scaled_gradients_gives(factor: float | Tensor) -> None:
    grads = [torch.tensor([3.0, NAN, 0.0]), torch.tensor([-4.0, INF])]
    scaled = gradkern.measure_grads(grads).scaled(factor)
    assert scaled.data.tolist() == gradkern.measure_grads([grad * factor for grad in grads]).data.tolist()


def test_each_tensor_may_be_scaled_by_a_factor_of_its_own() -> None:
    scaled = gradkern.measure_grads([torch.ones(4), torch.ones(9)]).per_tensor.scaled(
        torch.tensor([2.0, 3.0])
    )
    assert scaled.norm.tolist() == [4.0, 9.0]


@pytest.mark.parametrize(
    ("elements", "norm", "finite_norm", "is_finite"),
    [
        ([3.0, -4.0], 5.0, 5.0, True),
        ([3.0, -4.0, INF], INF, 5.0, False),
        ([3.0, -4.0, -INF], INF, 5.0, False),
        ([3.0, -4.0, NAN], NAN, 5.0, False),
        ([3.0, -4.0, INF, NAN], NAN, 5.0, False),
        ([], 0.0, 0.0, True),
    ],
)
def test_the_norm_is_that_of_torch_and_the_finite_norm_leaves_out_the_rest(
    elements: list[float], norm: float, finite_norm: float, is_finite: bool, backend: Backend
) -> None:
    stats = gradkern.measure_grads([torch.tensor(elements)])
    for found in (stats, stats["grads[0]"], stats.per_tensor):
        assert found.norm.item() == norm or (math.isnan(found.norm.item()) and math.isnan(norm))
        assert found.finite_norm.item() == finite_norm
        assert found.is_finite.item() is is_finite


def test_totals_are_0_dim_and_rows_have_one_number_per_tensor() -> None:
    stats = example()
    assert {getattr(stats, word).shape for word in WORDS} == {torch.Size([])}
    assert {getattr(stats.per_tensor, word).shape for word in WORDS} == {torch.Size([3])}
    assert stats.per_tensor.norm.tolist() == [3.0, 4.0, 0.0]
    assert stats.per_tensor.zero_count.tolist() == [2.0, 0.0, 0.0]
    assert {stats.norm.dtype, stats.coef.dtype, stats.clipped_norm.dtype} == {torch.float64}


def test_a_tensor_is_found_by_its_name() -> None:
    assert example()["head.bias"].abs_max.item() == 4.0
    assert "head.bias" in example()
    assert "head" not in example()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("head.bais", "no gradient named 'head.bais' was measured. Did you mean 'head.bias'?"),
        ("x", "no gradient named 'x' was measured. stats.names has all of them."),
        (0, "no gradient named 0 was measured. stats.names has all of them."),
    ],
)
def test_a_name_that_is_not_there_gets_a_suggestion(name: str, message: str) -> None:
    with pytest.raises(KeyError) as caught:
        example()[name]
    assert caught.value.args == (message,)


def test_a_name_that_several_have_is_no_answer() -> None:
    stats = gradkern.measure_grads([("a", torch.ones(1)), ("a", torch.ones(2)), ("b", torch.ones(4))])
    assert float(stats["b"]) == 2.0
    with pytest.raises(KeyError) as caught:
        stats["a"]
    assert caught.value.args == ("several gradients are named 'a'; stats.per_tensor has them by position.",)


def test_stats_cannot_be_walked_by_position() -> None:
    with pytest.raises(TypeError):
        list(example())


def test_float_item_and_format_give_the_norm() -> None:
    stats = example()
    assert (float(stats), stats.item(), f"{stats:.3f}", f"{stats['embed.weight']:g}") == (
        5.0,
        5.0,
        "5.000",
        "3",
    )
    assert math.isfinite(stats)


def test_stats_of_several_tensors_are_no_single_number() -> None:
    with pytest.raises(TypeError) as caught:
        float(example().per_tensor)
    assert str(caught.value) == "float: these are Stats of 3 tensors; take one of .norm.tolist()."


REFUSED: dict[str, Callable[[GradStats], object]] = {
    "<": lambda stats: stats < 1.0,
    ">=": lambda stats: stats >= 1,
    "==": lambda stats: stats == 5.0,
    "!=": lambda stats: stats != 5.0,
    "+": lambda stats: stats + 1.0,
    "sum": lambda stats: sum([stats, stats]),
    "*": lambda stats: 2 * stats,
    "/": lambda stats: stats / 2,
    "**": lambda stats: stats**2,
    "-": lambda stats: -stats,
    "abs": lambda stats: abs(stats),
    "round": lambda stats: round(stats, 3),
    "int": lambda stats: int(stats),
    "max": lambda stats: max(stats, 1.0),
    "tensor <": lambda stats: torch.ones(()) < stats,
}


@pytest.mark.parametrize("operation", REFUSED)
def test_comparing_and_computing_point_to_the_norm(operation: str) -> None:
    with pytest.raises(TypeError) as caught:
        REFUSED[operation](example())
    assert str(caught.value) == (
        "GradStats is no number: compare and compute with stats.norm, a tensor on the gradients' device, "
        "or with float(stats), which waits for it."
    )


def test_stats_can_be_told_apart_and_kept_in_sets() -> None:
    stats, other = example(), example()
    assert stats == stats
    assert stats != other
    assert stats is not None
    assert len({stats, other, stats}) == 2


def test_what_is_printed_is_short_and_counts_what_is_odd() -> None:
    assert repr(example()) == "GradStats(norm=5, abs_max=4, 3 tensors)"
    assert str(gradkern.measure_grads([torch.tensor([1.0, NAN, INF, INF])])) == (
        "GradStats(norm=nan, finite_norm=1, nan=1, inf=2, abs_max=1, 1 tensor)"
    )
    assert repr(gradkern.clip_grads_([torch.tensor([3.0, -4.0])], 1.0)) == (
        "GradStats(norm=5, abs_max=4, coef=0.2, 1 tensor)"
    )
    assert repr(example()["head.bias"]) == "Stats(norm=4, abs_max=4)"
    assert repr(example().per_tensor) == "Stats(3 tensors)"


@pytest.mark.parametrize("k", [-1, 1.5, "2"])
def test_how_many_are_worst_is_a_whole_number_from_zero_up(k: object) -> None:
    with pytest.raises(ValueError, match=r"^worst: k must be a whole number from 0 up, got "):
        gradkern.measure_grads([torch.ones(1)]).worst(k)  # type: ignore[arg-type]


def test_the_worst_are_nan_then_inf_then_the_largest() -> None:
    stats = gradkern.measure_grads(
        {
            "small": torch.tensor([1.0]),
            "inf": torch.tensor([INF]),
            "large": torch.tensor([7.0]),
            "nan": torch.tensor([NAN, 5.0]),
        }
    )
    worst = stats.worst()
    assert [name for name, _ in worst] == ["nan", "inf", "large", "small"]
    assert worst[1:] == [("inf", INF), ("large", 7.0), ("small", 1.0)]
    assert stats.worst(3) == worst[:3]
    assert stats.worst(0) == []


def test_the_table_has_a_line_for_every_tensor_and_the_total() -> None:
    assert example().table() == (
        "name          norm  abs_max  nan  inf  zero\n"
        "embed.weight     3        3    0    0     2\n"
        "head.bias        4        4    0    0     0\n"
        "empty            0        0    0    0     0\n"
        "total            5        4    0    0     2"
    )


def test_a_dictionary_for_a_logger_holds_plain_numbers() -> None:
    stats = gradkern.clip_grads_({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([-4.0])}, 2.5)
    totals = {
        "norm": 5.0,
        "finite_norm": 5.0,
        "abs_max": 4.0,
        "nan_count": 0,
        "inf_count": 0,
        "zero_count": 1,
        "coef": 0.5,
        "clipped_norm": 2.5,
    }
    assert stats.as_dict() == totals
    assert stats.as_dict(per_tensor=True) == totals | {"norm/a": 3.0, "norm/b": 4.0}
    assert {type(value) for value in stats.as_dict().values()} == {int, float}


CLIPPED: list[tuple[list[float], dict[str, object], float]] = [
    ([3.0, -4.0], {"max_norm": 1.0}, 1.0),
    ([3.0, -4.0], {"max_norm": 10.0}, 5.0),
    ([3.0, -4.0], {"clip_value": 4.0}, 5.0),
    ([3.0, -4.0], {"clip_value": 3.5}, NAN),
    ([3.0, -4.0], {"max_norm": 2.5, "clip_value": 2.0}, 2.5),
    ([3.0, -4.0], {"max_norm": 2.5, "clip_value": 1.9}, NAN),
    ([3.0, -4.0, INF], {"max_norm": 2.5}, 2.5),
    ([3.0, -4.0, NAN], {"max_norm": 2.5, "nonfinite": "zero"}, 2.5),
    ([3.0, -4.0, INF], {"clip_value": 5.0}, 5.0),
    ([3.0, -4.0, INF], {"clip_value": 5.0, "nonfinite": "propagate"}, NAN),
    ([3.0, -4.0, INF], {"max_norm": 2.5, "nonfinite": "propagate"}, NAN),
    ([3.0, -4.0, INF], {"max_norm": INF, "nonfinite": "propagate"}, INF),
    ([3.0, -4.0, NAN], {"max_norm": INF, "nonfinite": "propagate"}, NAN),
]


@pytest.mark.parametrize(("elements", "limits", "expected"), CLIPPED, ids=str)
def test_the_norm_after_clipping_is_exact_or_nan(
    elements: list[float], limits: dict[str, object], expected: float, backend: Backend
) -> None:
    grad = torch.tensor(elements, dtype=torch.float64)
    stats = gradkern.clip_grads_([grad], **limits)
    found = stats.clipped_norm.item()
    assert found == pytest.approx(expected, rel=1e-15, nan_ok=True)
    if not math.isnan(found):
        after = gradkern.measure_grads([grad])
        propagates = limits.get("nonfinite") == "propagate"
        assert (after.norm if propagates else after.finite_norm).item() == pytest.approx(found, rel=1e-15)


def test_measured_gradients_have_a_coefficient_of_1() -> None:
    assert example().coef.item() == 1.0
    assert example().clipped_norm.item() == 5.0


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda stats: pickle.loads(pickle.dumps(stats))]
)
def test_stats_can_be_copied_and_pickled(copied: Callable[[GradStats], GradStats]) -> None:
    (parameter,) = parameters([torch.tensor([3.0, -4.0])])
    stats = copied(gradkern.clip_({"w": parameter}, 1.0))
    assert (stats.names, float(stats), stats.coef.item(), stats["w"].norm.item()) == (["w"], 5.0, 0.2, 5.0)


def test_stats_keep_neither_parameters_nor_gradients_alive() -> None:
    (parameter,) = parameters([torch.ones(1000)])
    alive = [weakref.ref(parameter), weakref.ref(parameter.grad)]
    stats = gradkern.measure([("w", parameter)]), gradkern.measure([parameter])
    del parameter
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert [found.names for found in stats] == [["w"], ["parameters[0]"]]


META_MESSAGE = (
    "GradStats: the gradient of 'w' is on the meta device, which holds no values, so there is no number to "
    "read.\n"
    "Materialise the module first, for example with module.to_empty(device=...)."
)


@pytest.mark.parametrize(
    "read",
    [float, GradStats.item, "{:.3f}".format, GradStats.worst, GradStats.table, GradStats.as_dict],
    ids=["float", "item", "format", "worst", "table", "as_dict"],
)
def test_a_meta_tensor_has_no_value(read: Callable[[GradStats], object], backend: Backend) -> None:
    stats = gradkern.clip_({"w": parameters([torch.ones(3, device="meta")])[0]}, 1.0)
    assert stats.norm.is_meta
    with pytest.raises(RuntimeError) as caught:
        read(stats)
    assert str(caught.value) == META_MESSAGE


def test_what_has_no_values_can_be_printed() -> None:
    stats = gradkern.measure_grads([torch.ones(3, device="meta")])
    assert repr(stats) == "GradStats(of 1 tensor on meta, without values)"
    assert repr(stats["grads[0]"]) == "Stats(on meta, without values)"


def test_no_property_waits_for_a_device() -> None:
    with FakeTensorMode():
        grads = [torch.ones(3, device="cuda"), torch.ones(4, device="cuda")]
        with no_host_read():
            stats = gradkern.clip_grads_(grads, 1.0, clip_value=0.5)
            found = [getattr(stats, word) for word in [*WORDS, "coef", "clipped_norm"]]
            found += [getattr(stats.per_tensor, word) for word in WORDS]
            found += [stats["grads[1]"].norm, stats.scaled(0.5).merge(stats).norm]
    assert {value.device.type for value in found} == {"cuda"}
