"""What came of a run: goals, whether they are met, and the JSON file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.measure import Timing, quartiles

# "speedup": how many times as fast as the rival. "share": the same, in percent, of a ceiling. "time": at most
# how many times as long as the rival. "extra": at most how many microseconds longer. "each": at most how many
# nanoseconds a tensor, whatever the rival takes.
Form = Literal["speedup", "share", "time", "extra", "each"]


@dataclass(frozen=True)
class Goal:
    """What gradkern has to reach against the fastest contender of the kind `against`.

    Without a floor the ratio is reported and nothing is demanded. `of` names the one of gradkern's contenders
    that it is about, where they do different things; else it is the fastest.
    """

    against: str
    form: Form = "speedup"
    floor: float | None = None
    aim: float | None = None
    of: str = ""

    def words(self, value: float | None) -> str:
        """A ratio, a floor or an aim as the table shows it."""
        if value is None:
            return "–"
        if self.form == "share":
            return f"{value:.0%}"
        if self.form in ("extra", "each"):
            return f"{value:.0f} {'µs' if self.form == 'extra' else 'ns'}"
        return f"{value:.2f}×" if self.form == "time" or value < 10 else f"{value:.1f}×"

    def reaches(self, value: float, limit: float | None) -> bool | None:
        """Whether `value` is as good as `limit`; None if there is no limit."""
        if limit is None:
            return None
        return value >= limit if self.form in ("speedup", "share") else value <= limit

    def value(self, ours_ms: float, rival_ms: float, tensors: int) -> float:
        """What `form` says, of two times."""
        if self.form == "extra":
            return (ours_ms - rival_ms) * 1e3
        if self.form == "each":
            return ours_ms * 1e6 / tensors
        return ours_ms / rival_ms if self.form == "time" else rival_ms / ours_ms


@dataclass
class Row:
    """One row's work and what it took."""

    key: str
    group: str
    work: str
    tensors: int
    numel: int
    start: str
    goals: tuple[Goal, ...]
    timings: list[Timing]

    def fastest(self, kind: str, name: str = "") -> Timing | None:
        """The contender of this kind with the smallest median; only among those called `name`, if given."""
        found = [timing for timing in self.timings if timing.kind == kind and name in ("", timing.name)]
        return min(found, key=lambda timing: timing.median_ms) if found else None

    def title(self, goal: Goal) -> str:
        """The work, and whose if several of gradkern's are compared."""
        return f"{self.work}: {goal.of}" if goal.of else self.work

    def ratio(self, goal: Goal) -> float | None:
        """What `goal` is about, of the medians. None if a contender did not take part."""
        ours, rival = self.fastest("gradkern", goal.of), self.fastest(goal.against)
        if ours is None or rival is None:
            return None
        return goal.value(ours.median_ms, rival.median_ms, self.tensors)

    def ratio_quartiles(self, goal: Goal) -> tuple[float, float] | None:
        """Half of the rounds gave a ratio between these."""
        ours, rival = self.fastest("gradkern", goal.of), self.fastest(goal.against)
        if ours is None or rival is None:
            return None
        pairs = zip(ours.times_ms, rival.times_ms, strict=True)
        return quartiles([goal.value(*pair, self.tensors) for pair in pairs])

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
            "group": self.group,
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
                    "of": goal.of,
                    "ratio": self.ratio(goal),
                    "verdict": self.verdict(goal),
                }
                for goal in self.goals
            ],
            "timings": [
                {
                    "kind": timing.kind,
                    "name": timing.name,
                    "period": timing.period,
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
            Goal(goal["against"], goal["form"], goal["floor"], goal["aim"], goal["of"])
            for goal in content["goals"]
        )
        timings = [
            Timing(*(timing[name] for name in ("kind", "name", "times_ms", "norm_error", "period")))
            for timing in content["timings"]
        ]
        plain = {name: content[name] for name in ("key", "group", "work", "tensors", "numel", "start")}
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


def spread(timing: Timing) -> float:
    """Half the distance between the quartiles, relative to the median."""
    lower, upper = timing.quartiles_ms
    return (upper - lower) / 2 / timing.median_ms
