"""What a detector finds, what a diagnosis says about it, and what advice it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

Severity: TypeAlias = Literal["info", "warning", "error"]

# "info" is for people who look; "warning" is worth an interruption; after an "error" the run is lost unless
# something is changed.
SEVERITIES: Final[tuple[Severity, ...]] = ("info", "warning", "error")

Category: TypeAlias = Literal["data", "dtype", "optimizer", "architecture"]


@dataclass(frozen=True)
class Finding:
    """One thing that a detector saw, with the numbers it rests on.

    Attributes:
        kind: name of the detector, one of `gradkern.diagnosis.DETECTORS`.
        severity: "info", "warning" or "error".
        step: the first step at which it shows.
        names: the parameters or modules it is about, the worst first; empty if it is about the whole run.
        value: what was measured.
        limit: what `value` was compared with.
        evidence: further numbers and words, by name.
        sentence: all of it in one plain sentence.
    """

    kind: str
    severity: Severity
    step: int
    names: tuple[str, ...]
    value: float
    limit: float
    evidence: dict[str, float | str]
    sentence: str

    @property
    def is_alarm(self) -> bool:
        """Whether it is worth an interruption: of severity warning or error."""
        return self.severity != "info"

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON has it. Numbers that are not finite become the words "nan", "inf", "-inf"."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "step": self.step,
            "names": list(self.names),
            "value": _plain(self.value),
            "limit": _plain(self.limit),
            "evidence": {key: _plain(value) for key, value in self.evidence.items()},
            "sentence": self.sentence,
        }

    def __str__(self) -> str:
        return f"{self.severity}: {self.sentence}"


@dataclass(frozen=True)
class Advice:
    """Something to try.

    Attributes:
        title: what to do, in a few words.
        line: the line of code that does it.
        why: the evidence of this run for it.
        against: what speaks against it.
        score: how well the evidence supports it, 0 to 1; advice is sorted by it.
    """

    title: str
    line: str
    why: str
    against: str
    score: float

    def as_dict(self) -> dict[str, Any]:
        """The advice as JSON has it."""
        return {
            "title": self.title,
            "line": self.line,
            "why": self.why,
            "against": self.against,
            "score": round(self.score, 3),
        }


@dataclass(frozen=True)
class Diagnosis:
    """One root cause, or honestly none, what follows from it, and what to do.

    Attributes:
        cause: the finding that the others follow from, None if there is no single one.
        category: "data", "dtype", "optimizer" or "architecture", None without a cause.
        consequences: findings that the cause explains, in the order of their steps.
        others: findings that stand beside it, information included.
        began: where it began: step, layer, parameter, unit; what is not known is None.
        advice: best first.
        note: why it is not known whether something is wrong: nothing was recorded, or not to the end.
    """

    cause: Finding | None = None
    category: Category | None = None
    consequences: list[Finding] = field(default_factory=list)
    others: list[Finding] = field(default_factory=list)
    began: dict[str, int | str | None] = field(default_factory=dict)
    advice: list[Advice] = field(default_factory=list)
    note: str = ""

    @property
    def alarms(self) -> list[Finding]:
        """All findings of severity warning or error, the cause first."""
        first = [] if self.cause is None else [self.cause]
        return [finding for finding in (*first, *self.consequences, *self.others) if finding.is_alarm]

    @property
    def is_healthy(self) -> bool:
        """Whether there is nothing worth an interruption, as far as is known, and enough is known."""
        return not self.alarms and not self.note

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON has it."""
        return {
            "cause": None if self.cause is None else self.cause.as_dict(),
            "category": self.category,
            "consequences": [finding.as_dict() for finding in self.consequences],
            "others": [finding.as_dict() for finding in self.others],
            "began": dict(self.began),
            "advice": [advice.as_dict() for advice in self.advice],
            "note": self.note,
        }

    def __str__(self) -> str:
        lines = [self.note] if self.note else []
        lines += [] if self.note and not self.alarms else [self._headline()]
        if self.cause is not None or self.consequences:
            where = [f"{key} {value}" for key, value in self.began.items() if value is not None]
            if where:
                lines.append(f"It began at {', '.join(where)}.")
        lines += _section("What follows from it:" if self.cause else "What was seen:", self.consequences)
        lines += _section("Beside it:" if self.cause else "To know:", self.others)
        if self.advice:
            lines.append("What to do:")
            for number, advice in enumerate(self.advice, 1):
                lines += [
                    f"  {number}. {advice.title}: {advice.why}",
                    f"     {advice.line}",
                    f"     Against it: {advice.against}",
                ]
        return "\n".join(lines)

    def _headline(self) -> str:
        if self.cause is not None:
            return f"Cause ({self.category}): {self.cause.sentence}"
        if not self.alarms:
            return "Nothing wrong was found."
        return "No single cause explains what was seen."


def _section(title: str, findings: list[Finding]) -> list[str]:
    return [title, *(f"  - {finding}" for finding in findings)] if findings else []


def _plain(value: float | str) -> float | str:
    if isinstance(value, str) or math.isfinite(value):
        return value
    return str(value)
