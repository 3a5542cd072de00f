"""Running cases and judging what is said about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gradkern.diagnosis import Diagnosis, detect, diagnose
from gradkern.record import Record
from gradkern.record.schema import Exponents, Rows, Steps, Values
from tests.diagnosis.runs import record_run
from tests.diagnosis.suite import CASES, Case, make

# A monitor looks while the run goes on: after each of these steps, and each time the run is a fifth longer.
LOOKS = [10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100]
while LOOKS[-1] < 10**6:
    LOOKS.append(LOOKS[-1] * 6 // 5)


class Prefix:
    """A record as it was after some steps."""

    def __init__(self, record: Record, steps: int) -> None:
        self._record, self._end = record, steps

    @property
    def steps(self) -> Steps:
        return self._record.steps[: np.searchsorted(self._record.steps, self._end)]

    def scalar(self, name: str) -> tuple[Steps, Values]:
        steps, values = self._record.scalar(name)
        end = np.searchsorted(steps, self._end)
        return steps[:end], values[:end]

    def rows(self, kind: str) -> tuple[Steps, Rows]:
        steps, values = self._record.rows(kind)
        end = np.searchsorted(steps, self._end)
        return steps[:end], values[:end]

    def names(self, kind: str) -> list[str]:
        return self._record.names(kind)

    def exponents(self) -> tuple[Steps, Exponents]:
        steps, values = self._record.exponents()
        end = np.searchsorted(steps, self._end)
        return steps[:end], values[:end]

    @property
    def meta(self) -> dict[str, Any]:
        return self._record.meta

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for event in self._record.events if event["step"] < self._end]


@dataclass(frozen=True)
class Verdict:
    """What was said about a run, against its label."""

    case: Case
    seed: int
    steps: int
    record: Record
    diagnosis: Diagnosis
    live: dict[str, tuple[int, str]]
    """Of a healthy run, kinds of all alarms while it went on: at which look first, and the sentence."""

    @property
    def alarms(self) -> int:
        """Kinds of alarms that were raised at any time, which is what a user would have seen."""
        return len(self.kinds | self.live.keys())

    @property
    def kinds(self) -> set[str]:
        """Kinds of the alarms at the end."""
        return {finding.kind for finding in self.diagnosis.alarms}

    @property
    def is_detected(self) -> bool:
        """An alarm of one of the kinds that it must be."""
        return bool(self.kinds & set(self.case.must))

    @property
    def is_as_labelled(self) -> bool:
        """Of a healthy run, whether it turned out healthy, by its losses alone; of others True.

        A seed may make a run that was meant to learn fail. Whoever says so is right: such runs are counted
        apart, by a rule that no detector has a part in.
        """
        if not self.case.is_healthy:
            return True
        _, losses = self.record.scalar("loss")
        if not np.isfinite(losses).all():
            return False
        first, last = float(np.median(losses[:10])), float(np.median(losses[-(len(losses) // 10) :]))
        slack = 1.2 if self.case.outcome == "stays" else 0.9 if first > 0 else 1.0
        return last < slack * first

    @property
    def is_right(self) -> bool:
        """Detected, and with the right root cause; of a healthy run, silence."""
        if self.case.is_healthy:
            return not self.alarms
        wrong = self.kinds & set(self.case.must_not)
        return self.is_detected and self.diagnosis.category in self.case.causes and not wrong


def run_case(name: str, seed: int) -> Verdict:
    """Train the run of a case, record it and diagnose it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        setup = make(name, seed)
        record = record_run(setup, rows_every=CASES[name].rows_every)
    finally:
        torch.set_num_threads(threads)
    live: dict[str, tuple[int, str]] = {}
    for look in LOOKS if CASES[name].is_healthy else []:
        if look >= setup.steps:
            break
        for finding in detect(Prefix(record, look)):
            if finding.is_alarm:
                live.setdefault(finding.kind, (look, finding.sentence))
    return Verdict(CASES[name], seed, setup.steps, record, diagnose(record), live)
