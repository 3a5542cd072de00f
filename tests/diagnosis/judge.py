"""Running cases and judging what is said about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests.diagnosis import held_faults, held_healthy, suite, user_faults
from tests.diagnosis.runs import Watched, watch
from tests.diagnosis.suite import CASES, Case, make

# Importing these registers their cases.
MODULES = (suite, user_faults, held_faults, held_healthy)


@dataclass(frozen=True)
class Verdict:
    """What was said about a run, against its label."""

    case: Case
    seed: int
    steps: int
    watched: Watched

    @property
    def alarms(self) -> int:
        """Kinds of alarms that were raised at any time, which is what a user would have seen."""
        return len(self.kinds | self.watched.live.keys())

    @property
    def kinds(self) -> set[str]:
        """Kinds of the alarms at the end."""
        return {finding.kind for finding in self.watched.diagnosis.alarms}

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
        _, losses = self.watched.record.scalar("loss")
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
        return self.is_detected and self.watched.diagnosis.category in self.case.causes and not wrong


def run_case(name: str, seed: int) -> Verdict:
    """Train the run of a case under a monitor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        setup = make(name, seed)
        return Verdict(CASES[name], seed, setup.steps, watch(setup))
    finally:
        torch.set_num_threads(threads)
