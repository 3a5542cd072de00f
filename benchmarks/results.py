"""What came of a run: goals, whether they are met, and the JSON file."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.measure import Timing, quartiles

# "speedup": how many times as fast as the rival. "share": the same, in percent, of a ceiling. "time": at most
# how many times as long as the rival.
Form = Literal["speedup", "share", "time"]


@dataclass(frozen=True)
class Goal:
    """What gradkern has to reach against the fastest contender of the kind `against`.

    Without a floor the ratio is reported and nothing is demanded.
    """

    against: str
    form: Form = "speedup"
    floor: float | None = None
    aim: float | None = None

    def words(self, value: float | None) -> str:
        """A ratio, a floor or an aim as the table shows it."""
        if value is None:
            return "–"
        if self.form == "share":
            return f"{value:.0%}"
        return f"{value:.2f}×" if self.form == "time" or value < 10 else f"{value:.1f}×"

    def reaches(self, value: float, limit: float | None) -> bool | None:
        """Whether `value` is as good as `limit`; None if there is no limit."""
        if limit is None:
            return None
        return value <= limit if self.form == "time" else value >= limit


@dataclass
class Row:
    """One row's work and what it took."""

    key: str
    work: str
    tensors: int
    numel: int
    start: str
    goals: tuple[Goal, ...]
    timings: list[Timing]

    def fastest(self, kind: str) -> Timing | None:
        """The contender of this kind with the smallest median."""
        found = [timing for timing in self.timings if timing.kind == kind]
        return min(found, key=lambda timing: timing.median_ms) if found else None

    def ratio(self, goal: Goal) -> float | None:
        """What `goal` is about: the ratio of the medians. None if a contender did not take part."""
        ours, rival = self.fastest("gradkern"), self.fastest(goal.against)
        if ours is None or rival is None:
            return None
        return _ratio(goal, ours.median_ms, rival.median_ms)

    def ratio_quartiles(self, goal: Goal) -> tuple[float, float] | None:
        """Half of the rounds gave a ratio between these."""
        ours, rival = self.fastest("gradkern"), self.fastest(goal.against)
        if ours is None or rival is None:
            return None
        return quartiles([_ratio(goal, *pair) for pair in zip(ours.times_ms, rival.times_ms, strict=True)])

    def verdict(self, goal: Goal) -> str:
        """ "aim", "floor", "missed", or "" where nothing is demanded or nothing was measured."""
        value = self.ratio(goal)
        if value is None or goal.floor is None:
            return ""
        if goal.reaches(value, goal.floor if goal.aim is None else goal.aim):
            return "aim" if goal.aim is not None else "floor"
        return "floor" if goal.reaches(value, goal.floor) else "missed"

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "key": self.key,
            "work": self.work,
            "tensors": self.tensors,
            "numel": self.numel,
            "start": self.start,
            "goals": [
                {
                    "against": goal.against,
                    "form": goal.form,
                    "floor": goal.floor,
                    "aim": goal.aim,
                    "ratio": self.ratio(goal),
                    "verdict": self.verdict(goal),
                }
                for goal in self.goals
            ],
            "timings": [
                {
                    "kind": timing.kind,
                    "name": timing.name,
                    "median_ms": timing.median_ms,
                    "quartiles_ms": timing.quartiles_ms,
                    "norm_error": timing.norm_error,
                    "times_ms": [round(ms, 5) for ms in timing.times_ms],
                }
                for timing in self.timings
            ],
        }

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Row:
        """What `as_dict` was made of."""
        goals = tuple(
            Goal(goal["against"], goal["form"], goal["floor"], goal["aim"]) for goal in content["goals"]
        )
        timings = [
            Timing(timing["kind"], timing["name"], timing["times_ms"], timing["norm_error"])
            for timing in content["timings"]
        ]
        plain = {name: content[name] for name in ("key", "work", "tensors", "numel", "start")}
        return Row(**plain, goals=goals, timings=timings)


@dataclass
class Results:
    """A whole run. `machine` is a description, `bandwidths` are in GB/s."""

    machine: str
    machine_facts: dict[str, Any]
    bandwidths: dict[str, float]
    rows: list[Row]

    def save(self, path: Path) -> None:
        """Write everything, each round's times included."""
        content = {
            "machine": self.machine,
            "machine_facts": self.machine_facts,
            "bandwidths_gb_per_s": self.bandwidths,
            "rows": [row.as_dict() for row in self.rows],
        }
        text = json.dumps(content, indent=1)
        # A list of numbers goes on one line.
        text = re.sub(r"\[[-\d.e,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
        path.write_text(text + "\n")

    @staticmethod
    def load(path: Path) -> Results:
        """What `save` wrote."""
        content = json.loads(path.read_text())
        return Results(
            content["machine"],
            content["machine_facts"],
            content["bandwidths_gb_per_s"],
            [Row.from_dict(row) for row in content["rows"]],
        )


def _ratio(goal: Goal, ours_ms: float, rival_ms: float) -> float:
    return ours_ms / rival_ms if goal.form == "time" else rival_ms / ours_ms


def spread(timing: Timing) -> float:
    """Half the distance between the quartiles, relative to the median."""
    lower, upper = timing.quartiles_ms
    return (upper - lower) / 2 / statistics.median(timing.times_ms)
