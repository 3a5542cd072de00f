"""What the loss does over the run. The rules are in `gradkern.diagnosis.health`."""

from __future__ import annotations

import math
from typing import Final

from gradkern.diagnosis import series
from gradkern.diagnosis.findings import Finding
from gradkern.diagnosis.health import (
    CHANCE,
    EXCURSION_SHARE,
    FLAT_SHARE,
    LOST_SHARE,
    RECOVERED,
    chance_level,
    health,
)
from gradkern.diagnosis.view import View
from gradkern.diagnosis.words import count, number
from gradkern.record.schema import Record

# Healthy runs sit on a plateau for a few hundred steps.
PLATEAU: Final = 1000

# A loss at ten times where it began has nothing left of the run.
LOST: Final = 10.0


def loss_diverging(record: Record) -> list[Finding]:
    """The loss is going up: four fifths of what was learned is lost again, beyond its noise.

    Or it is negative and falls ever faster, which nothing that is bounded below does. A warning; an error
    at ten times the first loss.
    """
    view = View.of(record)
    state = health(view)
    if state.diverging is None:
        return []
    if state.unbounded:
        sentence = f"The loss falls without bound, ever faster: it is {number(state.last)}."
    else:
        sentence = (
            f"The loss has been going up since step {state.diverging}: from {number(state.best)} "
            f"to {number(state.last)}; it began at {number(state.start)}."
        )
    is_lost = state.unbounded or state.last >= LOST * max(abs(state.start), 1e-12)
    return [
        Finding(
            "loss_diverging",
            "error" if is_lost else "warning",
            state.diverging,
            (),
            state.last,
            state.best + LOST_SHARE * max(state.start - state.best, 0.0),
            {"start": state.start, "best": state.best, "last": state.last, "noise": state.noise},
            sentence,
        )
    ]


def loss_unstable(record: Record) -> list[Finding]:
    """Large changes of the loss from update to update: it keeps jumping above twice where it began.

    At least three excursions and 2 % of the steps in the second half of the run, with updates above 3 % of
    the weights: smaller ones cannot throw it about, and noise in the batches does. Or first updates of 0.3
    times the weights after which the loss is ten times the first one.
    """
    view = View.of(record)
    state = health(view)
    if state.unstable is None:
        return []
    _, losses = view.scalar("loss")
    highest = series.largest(losses)
    if state.excursions:
        sentence = (
            f"The loss jumps about: {count(state.excursions, 'time')} in the second half of the run it went "
            f"above twice where it began ({number(state.start)}), up to {number(highest)}."
        )
    else:
        sentence = f"The first updates threw the loss from {number(losses[0])} to {number(highest)}."
    return [
        Finding(
            "loss_unstable",
            "warning",
            state.unstable,
            (),
            float(state.excursions),
            EXCURSION_SHARE * state.steps,
            {"start": state.start, "highest": highest},
            sentence,
        )
    ]


def no_traction(record: Record) -> list[Finding]:
    """The loss has not come down: the improvement since the first step is certainly below 5 % of its level.

    A warning if after 1000 steps the loss is that of a guess, ln of the number of outputs. Otherwise
    information: a model that had been trained before looks the same, and so does a plateau that a healthy run
    leaves after a while. The causes of a flat loss are alarms of their own, and need fewer steps.
    """
    view = View.of(record)
    state = health(view)
    if not state.flat:
        return []
    steps, _ = view.scalar("loss")
    chance = chance_level(view)
    is_chance = abs(state.last - chance) <= CHANCE * chance
    words = f", as if it guessed among {round(math.exp(chance))} classes" if is_chance else ""
    fell = state.last < RECOVERED * state.start
    sentence = (
        f"The loss has stood at {number(state.last)} for half of the run{words}."
        if fell
        else f"The loss has not come down in {state.steps} steps: {number(state.start)} at first, "
        f"{number(state.last)} now{words}."
    )
    return [
        Finding(
            "no_traction",
            "warning" if is_chance and state.steps >= PLATEAU else "info",
            int(steps[0]),
            (),
            state.start - state.last,
            FLAT_SHARE * abs(state.start),
            {"start": state.start, "last": state.last, "chance": chance},
            sentence,
        )
    ]
