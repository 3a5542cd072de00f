"""When the monitor looks: regularly, ever more rarely, and at once at what stands out."""

from __future__ import annotations

import itertools
import math

import pytest

from gradkern.monitor.schedule import AFTER, BURST, MOST, REST, Schedule


def looks(numbers: list[dict[str, float]], first: int = 0) -> list[int]:
    schedule = Schedule(first)
    return [step for step, scalars in enumerate(numbers, first) if schedule.is_due(step, scalars)]


def test_distances_grow_with_the_run_up_to_a_limit() -> None:
    found = looks([{"loss": 1.0}] * 20000)
    distances = [b - a for a, b in itertools.pairwise(found)]
    assert distances == sorted(distances)
    assert max(distances) == MOST


@pytest.mark.parametrize("late", [207, 50_207])
def test_what_stands_out_is_looked_at_at_once_and_later_however_old_the_run(late: int) -> None:
    numbers = [{"loss": 1.0, "grad_norm": 1.0} for _ in range(late + 100)]
    usual = set(looks(numbers))
    numbers[late]["grad_norm"] = 6.0
    assert set(looks(numbers)) - usual == {late, *(late + later for later in AFTER)} - usual


def test_a_late_divergence_is_noticed_although_the_run_began_higher() -> None:
    losses = [20.0] * 10 + [1.0] * 3000 + [2.5] * 10
    assert 3010 in looks([{"loss": loss} for loss in losses])


def test_the_same_height_again_is_nothing_new() -> None:
    numbers = [{"loss": 1.0} for _ in range(100)] + [{"loss": 4.0}] * 100
    assert len(looks(numbers)) <= len(looks([{"loss": 1.0}] * 200)) + 3


def test_every_nan_after_a_sound_step_is_looked_at_at_once() -> None:
    numbers = [{"loss": math.nan if step in (1000, 3000, 5000) else 1.0} for step in range(6000)]
    assert {1000, 3000, 5000} <= set(looks(numbers))


def test_a_run_of_nan_is_looked_at_like_any_other() -> None:
    sound, bad = [{"loss": 1.0}] * 10000, [{"loss": math.nan}] * 10000
    assert len(looks(bad)) <= len(looks(sound)) + 3


def test_looks_at_a_run_that_jumps_all_the_time_are_bounded() -> None:
    numbers = [{"loss": 10.0 ** (step // 100)} for step in range(20000)]
    usual = looks([{"loss": 1.0}] * 20000)
    assert len(looks(numbers)) <= len(usual) + (1 + len(AFTER)) * (BURST + 20000 // REST)


def test_nan_does_not_wait_where_there_were_many_jumps() -> None:
    numbers = [{"loss": 10.0 ** (step // 100)} for step in range(2000)]
    assert 1950 in looks([*numbers[:1950], {"loss": math.nan}])


def test_a_step_that_a_scaler_leaves_out_does_not_stand_out() -> None:
    schedule = Schedule(0)
    schedule.is_due(0, {"grad_norm": math.inf, "loss_scale": 1024.0, "skipped": 1.0})
    assert not schedule.stands_out
    schedule.is_due(1, {"grad_norm": math.inf, "loss_scale": 1024.0, "skipped": 0.0})
    assert schedule.stands_out


def test_the_first_bad_batch_is_looked_at_at_once() -> None:
    numbers: list[dict[str, float]] = [{"loss": 1.0, "data_nonfinite": 0.0} for _ in range(6)]
    numbers[5]["data_nonfinite"] = 1.0
    assert looks(numbers) == [5]


def test_a_resumed_run_begins_to_look_from_its_first_step() -> None:
    assert looks([{"loss": 1.0}] * 30, first=1000) == [1009, 1019, 1029]
