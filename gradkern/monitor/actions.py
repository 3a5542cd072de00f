"""What a monitor does about a finding: say so, call somebody, lower the clipping threshold, or stop."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from gradkern.diagnosis import DETECTORS, Diagnosis, Finding, recommend_threshold
from gradkern.policies import GlobalNorm
from gradkern.record import Record

if TYPE_CHECKING:
    from gradkern.clipper import Clipper
    from gradkern.monitor.monitor import Monitor

log = logging.getLogger("gradkern")

Action: TypeAlias = str | Callable[["Monitor", Finding], object]
"""``"log"``, ``"stop"``, ``"clip"``, or a function that is called with the monitor and the finding."""

WORDS: Final = ("log", "stop", "clip")

# Besides the kinds, findings can be chosen by how bad they are.
GROUPS: Final = ("info", "warning", "error")


class TrainingStopped(RuntimeError):
    """A finding came up for which the monitor had been told to stop. Raised when the step is over.

    Attributes:
        finding: what came up.
        diagnosis: what is wrong with the run, as far as it was known.
    """

    def __init__(self, finding: Finding, diagnosis: Diagnosis) -> None:
        super().__init__(f"{finding.sentence}\n{diagnosis}")
        self.finding = finding
        self.diagnosis = diagnosis


def check(on: Mapping[str, Action] | None) -> dict[str, Action]:
    """The actions, checked."""
    if on is not None and not isinstance(on, Mapping):
        raise TypeError(
            f"Monitor: on must be a mapping from kinds or severities of findings to actions, got {on!r}. "
            "Pass for instance on={'error': 'stop'}."
        )
    chosen = dict(on or {})
    for kind, action in chosen.items():
        if kind not in DETECTORS and kind not in GROUPS:
            known = ", ".join([*GROUPS, *DETECTORS])
            raise ValueError(f"Monitor: on has no kind {kind!r}. There are: {known}.")
        if not callable(action) and action not in WORDS:
            raise ValueError(
                f"Monitor: on[{kind!r}] must be 'log', 'clip', 'stop' or a function of the monitor and the "
                f"finding, got {action!r}."
            )
    return chosen


def check_clipper(clipper: object) -> None:
    """TypeError if it is none."""
    from gradkern.clipper import Clipper

    if not isinstance(clipper, Clipper):
        raise TypeError(
            f"Monitor: clipper must be a gradkern.Clipper, got {clipper!r}. Pass for instance "
            "clipper=gradkern.Clipper(model, 1.0)."
        )


def choose(on: Mapping[str, Action], finding: Finding) -> Action | None:
    """What to do about a finding: its kind goes before its severity. Alarms are logged if nothing is said."""
    if finding.kind in on:
        return on[finding.kind]
    if finding.severity in on:
        return on[finding.severity]
    return "log" if finding.is_alarm else None


class Voice:
    """What a monitor has to say: each sentence once, and which monitor it is.

    Args:
        name: of the monitor, empty for none.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: set[str] = set()
        self._has_alarmed = False

    def find(self, finding: Finding) -> None:
        """Log a finding: errors and warnings as such. The first of these says where more is to be had."""
        level = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}[finding.severity]
        more = ""
        if finding.is_alarm and not self._has_alarmed:
            self._has_alarmed, more = True, " monitor.diagnosis() says what it comes from and what to do."
        if self._is_new(finding.sentence):
            log.log(level, "%s%s%s", self._begin, finding.sentence, more)

    def tell(self, sentence: str) -> None:
        """Log what was done or could not be done."""
        if self._is_new(sentence):
            log.warning("%s%s", self._begin, sentence)

    def warn(self, sentence: str, stacklevel: int) -> None:
        """Warn of a mistake. Where warnings are errors it is logged: nothing is raised."""
        if not self._is_new(sentence):
            return
        try:
            warnings.warn(f"gradkern: {self._who}{sentence}", stacklevel=stacklevel + 1)
        except Exception:
            log.warning("%s%s", self._begin, sentence)

    def _is_new(self, sentence: str) -> bool:
        is_new = sentence not in self._said
        self._said.add(sentence)
        return is_new

    @property
    def _who(self) -> str:
        return f"{self._name}: " if self._name else ""

    @property
    def _begin(self) -> str:
        # Where logging is set up its lines name the logger. Else Python prints the bare sentence.
        return self._who if log.hasHandlers() else f"gradkern: {self._who}"


class ClipThreshold:
    """Sets a clipper's threshold to what the run itself recommends, and puts it back.

    Args:
        clipper: with a `GlobalNorm` policy, attached or called by hand.

    Raises:
        ValueError: there is no clipper, or its policy has no single threshold.
    """

    def __init__(self, clipper: Clipper | None) -> None:
        if clipper is None:
            raise ValueError(
                "Monitor: the action 'clip' sets a clipper's threshold, and there is none. Pass "
                "Monitor(..., clipper=gradkern.Clipper(model))."
            )
        if not isinstance(clipper.policy, GlobalNorm):
            raise ValueError(
                f"Monitor: the action 'clip' sets the threshold of a GlobalNorm, not of {clipper.policy!r}. "
                "Give the clipper that policy, or pass a function of your own."
            )
        self._clipper = clipper
        self._before: list[float] = []

    def recommend(
        self, record: Record, finding: Finding, agree: Callable[[float], float] | None = None
    ) -> dict[str, Any] | None:
        """Lower the threshold if the recommendation is lower. Returns what was done, None for nothing.

        `agree` makes of the recommendations of all ranks one.
        """
        # A rank that has no recommendation must meet the others all the same.
        limit, why = math.inf, "another rank recommends it"
        with contextlib.suppress(Exception):
            wanted = recommend_threshold(record, finding.step if finding.step > 0 else None)
            limit, why = wanted.max_norm, wanted.why
        limit = limit if agree is None else agree(limit)
        old = self.threshold
        if not (0 < limit < old):
            return None
        self._before.append(old)
        self._set(limit)
        return {"from": _plain(old), "to": limit, "why": why, "finding": finding.kind}

    def undo(self) -> dict[str, Any] | None:
        """Put the threshold back to what it was before the last change. None if there was none."""
        if not self._before:
            return None
        now = self.threshold
        self._set(self._before.pop())
        return {"from": now, "to": _plain(self.threshold), "why": "undone"}

    @property
    def threshold(self) -> float:
        """The largest joint norm that the clipper allows."""
        policy = self._clipper.policy
        assert isinstance(policy, GlobalNorm)
        return policy.max_norm

    def _set(self, max_norm: float) -> None:
        stepper = self._clipper._stepper
        assert isinstance(stepper.policy, GlobalNorm)
        stepper.policy = replace(stepper.policy, max_norm=max_norm)
        stepper._clip = stepper.policy.as_clip()
        stepper.max_norm = math.inf if stepper._clip is None else stepper._clip[0]
        stepper.state.constants["max_norm"].fill_(max_norm)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
