"""Is the run in trouble? What the loss alone says, which the detectors of causes weigh their evidence by.

Most signs are harmless in a run that learns: large norms, a clip that fires on every step, sparse
activations, a spike. They become alarms when the loss agrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradkern.diagnosis import series
from gradkern.diagnosis.series import Floats
from gradkern.diagnosis.view import View
from gradkern.record.schema import Steps

# Fewer losses than these make no trend.
LEAST_LOSSES: Final = 10

# Of the way that the loss had come down, the share it must have gone back up to count as diverging. A run
# that is only noisy, or is shown harder data, goes back a little; one that has lost four fifths has lost its
# training.
LOST_SHARE: Final = 0.8

# And by how many standard errors. The best of twenty stretches is chosen out of noise, which alone gives 3.
LOST_SIGMAS: Final = 8.0

# And as a multiple of its best level: half as much again.
LOST_FACTOR: Final = 1.5

# Updates of 0.3 times the weights leave nothing of what the loss before them said about the run.
LARGE_UPDATE: Final = 0.3

# And if the loss is ten times the first one after such updates, they did that. So they did at a third as much
# again, over five steps, in a run that afterwards does not get below half of where it began.
THROWN: Final = 10.0
THROWN_FOR_GOOD: Final = 1.3
RECOVERED: Final = 0.5

# Updates above 3 % of the weights can throw a loss about; below, noise in the batches is the likelier reason.
MOVING_UPDATE: Final = 0.03

# An excursion goes above twice the highest of the first losses. At least three of them, and 2 % of the steps,
# in the second half of the run: a batch of one has losses with heavy tails, but they thin out as it learns.
EXCURSION: Final = 2.0
LEAST_EXCURSIONS: Final = 3
EXCURSION_SHARE: Final = 0.02

# A flat loss is one whose improvement is below 5 % of its level with three standard errors to spare, after
# 100 steps. One that has been at the level of a guess for half of the run is flat too, wherever it began.
FLAT_SHARE: Final = 0.05
FLAT_SIGMAS: Final = 3.0
FLAT_LEAST: Final = 100
# Nor is it flat if it has come down by 1 % for certain: that is slow, and slow runs get there.
FLAT_LEAST_GAIN: Final = 0.01
# Nor if nine in ten of the latest losses are below the lowest of the first five, by those 5 %: noise alone
# does so once in 100,000 runs. What is learned within five steps shows in no longer stretch.
FLAT_QUANTILE: Final = 0.9

# A loss within 2 % of ln(classes) is that of a guess; a third of the losses, with fewer of them, within three
# standard errors more.
CHANCE: Final = 0.02

# A negative loss falls without bound if it fell faster in the last third than in the middle one, by half,
# and is far below where it began. Log-likelihoods of densities go down too, ever more slowly.
FALL_FACTOR: Final = 1.5
FALL_DEPTH: Final = 10.0
# A thousand times as far as it began, and still on its way, it falls however it does so: densities of images
# reach about ten times.
FALL_ABYSS: Final = 1000.0


@dataclass(frozen=True)
class Health:
    """What the loss says.

    Attributes:
        steps: how many losses there are.
        start: level of the first losses, NaN if unknown, as the next two.
        best: lowest level since.
        last: level of the latest losses.
        noise: standard deviation from step to step, around the trend, of the latest part.
        nonfinite: first step with a NaN or Inf loss, None if there is none.
        diverging: step since which the loss is going up, None if it is not.
        unbounded: whether it "diverges" downwards, to minus infinity.
        unstable: first step of the excursions, None if there are none.
        excursions: how many there are.
        flat: whether the loss has certainly not improved since the start; False if unknown.
    """

    steps: int
    start: float
    best: float
    last: float
    noise: float
    nonfinite: int | None
    diverging: int | None
    unbounded: bool
    unstable: int | None
    excursions: int
    flat: bool

    @property
    def trouble(self) -> int | None:
        """The first step of what is wrong with the loss, None if nothing is. A flat loss is not among it."""
        found = [step for step in (self.nonfinite, self.diverging, self.unstable) if step is not None]
        return min(found, default=None)

    @property
    def is_slow(self) -> bool:
        """Whether it gets nowhere, or half of the first loss is left after 100 steps. No fault by itself."""
        return self.flat or (self.steps >= FLAT_LEAST and self.last > RECOVERED * self.start > 0)

    @property
    def is_bad(self) -> bool:
        """Whether the run is in trouble or gets nowhere."""
        return self.flat or self.trouble is not None


def health(view: View) -> Health:
    """What the loss of a run says about it."""
    return view.kept("health", lambda: _health(view))


def _health(view: View) -> Health:
    all_steps, all_losses = view.scalar("loss")
    is_finite = np.isfinite(all_losses)
    nonfinite = int(all_steps[~is_finite][0]) if not is_finite.all() else None
    # After the first NaN the rest is its consequence, unless the run came back.
    losses, steps = all_losses[is_finite], all_steps[is_finite]
    nothing = Health(len(losses), math.nan, math.nan, math.nan, 0.0, nonfinite, None, False, None, 0, False)
    if len(losses) < LEAST_LOSSES:
        return nothing

    jumped = _jumped_at_once(view)
    first = float(losses[0])
    start = first if jumped else series.median(losses[:5])
    width = min(max(len(losses) // 20, 5), 200)
    smooth = series.trailing_medians(losses, width)
    best, last = float(smooth.min()), float(smooth[-1])
    noise = series.step_noise(losses[-max(4 * width, 20) :])

    unbounded = _falls_without_bound(losses, start)
    diverging = None
    if unbounded:
        diverging = int(steps[0])
    elif view.has_start or len(losses) >= 4 * width:
        diverging = _diverging(steps, losses, start, best, last, width)
    unstable, excursions = _excursions(view, steps, losses, first if jumped else float(losses[:5].max()))
    if jumped and first > 0 and _is_thrown(losses, last):
        unstable, excursions = int(steps[1]), excursions
    at_chance = _is_at_chance(losses, chance_level(view))
    flat = view.has_start and nonfinite is None and (at_chance or _is_flat(losses, start, jumped))
    return Health(
        len(losses), start, best, last, noise, nonfinite, diverging, unbounded, unstable, excursions, flat
    )


def _jumped_at_once(view: View) -> bool:
    """Whether the first updates were as large as the weights: only the first loss is from before them."""
    if not view.has_start:
        return False
    _, ratios = view.total_update_ratios
    early = series.finite(ratios[:3])
    return len(early) > 0 and float(early.max()) >= LARGE_UPDATE


def _is_thrown(losses: Floats, last: float) -> bool:
    """Whether the first updates, known to be large, have thrown the loss away from where it began."""
    first, after = float(losses[0]), losses[1:6]
    usual = series.power10(float(series.log10(after).mean()))
    is_lasting = usual >= THROWN_FOR_GOOD * first and last >= RECOVERED * first
    return float(np.median(after)) >= THROWN * first or is_lasting


def _diverging(
    steps: Steps, losses: Floats, start: float, best: float, last: float, width: int
) -> int | None:
    rise = last - best
    noise = series.step_noise(losses[: max(len(losses) // 4, 10)])
    tail = series.step_noise(losses[-width:])
    error = series.MEDIAN_ERROR * min(noise, tail) / math.sqrt(width)
    lost = rise >= LOST_SHARE * (start - best) and rise > LOST_SIGMAS * error
    if not lost or rise <= (LOST_FACTOR - 1) * abs(best):
        return None
    if best > 0:
        logs = series.log10(losses)
        log_error = series.MEDIAN_ERROR * series.step_noise(logs[-4 * width :]) / math.sqrt(width)
        if math.log10(last / best) <= LOST_SIGMAS * log_error:
            return None
    # Since the last time that it was near its best.
    near = np.flatnonzero(losses <= best + min(0.1 * rise, 0.5 * abs(best)))
    return int(steps[min(near[-1] + 1, len(steps) - 1)]) if len(near) else int(steps[0])


def _falls_without_bound(losses: Floats, start: float) -> bool:
    third = len(losses) // 3
    if third < LEAST_LOSSES:
        return False
    levels = [series.median(losses[i : i + 5]) for i in (third, 2 * third, len(losses) - 5)]
    depth = -levels[2] / max(abs(start), 1.0)
    if depth > FALL_ABYSS and levels[2] < levels[1] < levels[0]:
        return True
    return depth > FALL_DEPTH and levels[1] - levels[2] > FALL_FACTOR * max(levels[0] - levels[1], 0.0)


def _excursions(view: View, steps: Steps, losses: Floats, highest: float) -> tuple[int | None, int]:
    if highest <= 0:
        return None, 0
    half = len(losses) // 2
    above = losses > EXCURSION * highest
    stretches = series.runs_of(above[half:])
    share = float(above[half:].mean())
    _, ratios = view.total_update_ratios
    moving = series.finite(ratios)
    is_moving = len(moving) > 0 and float(np.quantile(moving, 0.75)) >= MOVING_UPDATE
    if len(stretches) < LEAST_EXCURSIONS or share < EXCURSION_SHARE or not is_moving:
        return None, 0
    return int(steps[np.flatnonzero(above)[0]]), len(stretches)


def _is_flat(losses: Floats, level: float, jumped: bool) -> bool:
    """Whether the loss has certainly not improved, judged by first stretches of several lengths.

    A run that learns in its first ten steps shows it in the short ones, one that is noisy in the long ones.
    """
    if len(losses) < FLAT_LEAST:
        return False
    width = len(losses) // 4
    end = losses[-width:]
    last = float(np.median(end))
    end_noise = series.step_noise(end)
    if jumped:
        error = series.MEDIAN_ERROR * end_noise
        return float(losses[0]) - last + error < FLAT_SHARE * abs(level)
    length = 10
    limit = FLAT_SHARE * abs(level)
    if float(losses[:5].min()) - float(np.quantile(end, FLAT_QUANTILE)) >= limit:
        return False
    while True:
        first = losses[:length]
        noise = max(series.step_noise(first), end_noise)
        error = series.MEDIAN_ERROR * noise * math.sqrt(1 / length + 1 / width)
        improvement = float(np.median(first)) - last
        if improvement - error >= limit:
            return False
        if 2 * length > len(losses) // 2:
            is_moving = improvement > max(FLAT_SIGMAS * error, FLAT_LEAST_GAIN * abs(level))
            return improvement + FLAT_SIGMAS * error < limit and not is_moving
        length *= 2


def chance_level(view: View) -> float:
    """ln(k), the cross-entropy of guessing among the k >= 2 outputs of the last matrix; NaN if unknown."""
    for entry in reversed(view.meta.get("parameters") or []):
        parameter = view.parameters[str(entry["name"])]
        if parameter.role == "weight" and parameter.ndim == 2:
            outputs = int(entry["shape"][0])
            return math.log(outputs) if outputs >= 2 else math.nan
    return math.nan


def _is_at_chance(losses: Floats, chance: float) -> bool:
    """Whether the loss has been that of a guess for half of the run, wherever it began."""
    if len(losses) < FLAT_LEAST or not math.isfinite(chance):
        return False
    late = losses[len(losses) // 2 :]
    slack = FLAT_SIGMAS * series.MEDIAN_ERROR * series.step_noise(late) / math.sqrt(len(late) / 3)
    thirds = [abs(float(np.median(part)) - chance) for part in np.array_split(late, 3)]
    return abs(float(np.median(late)) - chance) <= CHANCE * chance and max(thirds) <= CHANCE * chance + slack
