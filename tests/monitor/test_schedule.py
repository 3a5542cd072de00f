"""When the monitor looks: regularly, ever more rarely, and at once at what stands out."""

from __future__ import annotations

import itertools
import math

from gradkern.monitor.schedule import AFTER, MOST, Schedule


def looks(numbers: list[dict[str, float]], first: int = 0) -> list[int]:
    schedule = Schedule(first)
    return [step for step, scalars in enumerate(numbers, first) if schedule.is_due(step, scalars)]


def test_distances_grow_with_the_run() -> None:
    found = looks([{"loss": 1.0}] * 20000)
    distances = [b - a for a, b in itertools.pairwise(found)]
    assert distances == sorted(distances)
    assert max(distances) <= MOST
    assert len(found) < 40


def test_what_stands_out_is_looked_at_at_once_and_later() -> None:
    numbers = [{"loss": 1.0, "grad_norm": 1.0} for _ in range(400)]
    numbers[207]["grad_norm"] = 11.0
    usual = set(looks([{"loss": 1.0, "grad_norm": 1.0}] * 400))
    assert set(looks(numbers)) - usual == {207, *(207 + later for later in AFTER)}


def test_the_same_height_again_is_nothing_new() -> None:
    numbers = [{"loss": 1.0} for _ in range(100)] + [{"loss": 4.0}] * 100
    assert looks(numbers)[-1] < 200
    assert len(looks(numbers)) <= len(looks([{"loss": 1.0}] * 200)) + 3


def test_a_run_of_nan_is_looked_at_a_logarithmic_number_of_times() -> None:
    assert len(looks([{"loss": math.nan}] * 10000)) < 30 + 14 * 3


def test_the_first_bad_batch_is_looked_at_at_once() -> None:
    numbers: list[dict[str, float]] = [{"loss": 1.0, "data_nonfinite": 0.0} for _ in range(6)]
    numbers[5]["data_nonfinite"] = 1.0
    assert looks(numbers) == [5]


def test_a_resumed_run_begins_to_look_from_its_first_step() -> None:
    assert looks([{"loss": 1.0}] * 30, first=1000) == [1009, 1019, 1029]
