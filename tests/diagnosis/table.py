"""The held-out table: `python -m tests.diagnosis.table`.

Runs the half of the cases that nobody looked at while thresholds were chosen, and fresh seeds of the other
half, and prints how many faults were found, with the right root cause, and how many healthy runs were
disturbed, beside simple public rules on the same runs. Markdown, with exact 95 % intervals.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from tests.diagnosis import intervals
from tests.diagnosis.judge import Verdict, run_case
from tests.diagnosis.rules import RULES
from tests.diagnosis.suite import CASES

# Seeds below 100 were looked at.
FIRST_SEED = 101

OURS = "gradkern, root cause right"
FOUND = "gradkern, fault found"


@dataclass(frozen=True)
class Outcome:
    """What is kept of a verdict: a record of 20,000 steps is large."""

    name: str
    split: str
    seed: int
    steps: int
    is_healthy: bool
    is_as_labelled: bool
    is_detected: bool
    is_right: bool
    alarms: int
    rules: dict[str, int]
    said: str


def outcome_of(verdict: Verdict) -> Outcome:
    case, watched = verdict.case, verdict.watched
    return Outcome(
        case.name,
        case.split,
        verdict.seed,
        verdict.steps,
        case.is_healthy,
        verdict.is_as_labelled,
        verdict.is_detected,
        verdict.is_right,
        verdict.alarms,
        {name: rule(watched.record) for name, rule in RULES.items()},
        f"{watched.diagnosis.category}, {', '.join(sorted(verdict.kinds)) or 'silent'}"
        + (f"; while it ran {sorted(watched.live)}" if case.is_healthy and watched.live else ""),
    )


def collect(healthy_seeds: int, fault_seeds: int, long_seeds: int, splits: Sequence[str]) -> list[Outcome]:
    found = []
    for name, case in CASES.items():
        count = long_seeds if case.slow else healthy_seeds if case.is_healthy else fault_seeds
        if case.split not in splits:
            continue
        for seed in range(FIRST_SEED, FIRST_SEED + count):
            begin = time.perf_counter()
            found.append(outcome_of(run_case(name, seed)))
            print(f"{name} {seed}: {found[-1].said} ({time.perf_counter() - begin:.1f} s)", file=sys.stderr)
    return found


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table of all outcomes, then the misses by name."""
    healthy = [o for o in outcomes if o.is_healthy and o.is_as_labelled]
    faults = [o for o in outcomes if not o.is_healthy]
    failed = [o for o in outcomes if o.is_healthy and not o.is_as_labelled]
    steps = sum(o.steps for o in healthy)
    lines = [
        f"{len(faults)} faulty runs, {len(healthy)} healthy ones with {steps} steps.",
        "",
        "| rule | faults found | precision | healthy runs disturbed | false alarms a run | in 10⁶ steps |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows: list[tuple[str, int, int, int, int]] = []
    disturbed, false = sum(o.alarms > 0 for o in healthy), sum(o.alarms for o in healthy)
    rows.append((OURS, sum(o.is_right for o in faults), sum(o.alarms > 0 for o in faults), disturbed, false))
    rows.append(
        (FOUND, sum(o.is_detected for o in faults), sum(o.alarms > 0 for o in faults), disturbed, false)
    )
    for rule in RULES:
        hits = sum(o.rules[rule] > 0 for o in faults)
        disturbed, false = sum(o.rules[rule] > 0 for o in healthy), sum(o.rules[rule] for o in healthy)
        rows.append((rule, hits, hits, disturbed, false))
    for name, right, alarmed, disturbed, false in rows:
        low, high = intervals.rate(false, len(healthy) or 1)
        step_low, step_high = intervals.rate(false, steps / 1e6 or 1)
        per_run, per_step = false / (len(healthy) or 1), false / (steps / 1e6 or 1)
        lines.append(
            f"| {name} | {_share(right, len(faults))} | {_share(alarmed, alarmed + disturbed)} | "
            f"{_share(disturbed, len(healthy))} | {per_run:.2g} ({low:.2g}–{high:.2g}) | "
            f"{per_step:.3g} ({step_low:.2g}–{step_high:.2g}) |"
        )
    lines += ["", "Not right:", ""]
    lines += [f"- {o.name} ({o.split}) {o.seed}: {o.said}" for o in [*faults, *healthy] if not o.is_right]
    if failed:
        lines += ["", "Meant to be healthy, but did not learn (not counted above):", ""]
        lines += [f"- {o.name} ({o.split}) {o.seed}: {o.said}" for o in failed]
    return "\n".join(lines)


def _share(hits: int, total: int) -> str:
    low, high = intervals.share(hits, total)
    value = 100 * hits / total if total else 0.0
    return f"{hits}/{total} = {value:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The held-out table of the diagnosis.")
    parser.add_argument("--healthy-seeds", type=int, default=5)
    parser.add_argument("--fault-seeds", type=int, default=3)
    parser.add_argument("--long-seeds", type=int, default=1)
    parser.add_argument("--split", choices=("held", "tune", "all"), default="all")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    splits = ("tune", "held") if options.split == "all" else (options.split,)
    outcomes = collect(options.healthy_seeds, options.fault_seeds, options.long_seeds, splits)
    for split, title in (
        ("held", "Cases that nobody tuned on"),
        ("tune", "Fresh seeds of the cases tuned on"),
    ):
        chosen = [o for o in outcomes if o.split == split]
        if chosen:
            print(f"### {title}\n\n{markdown(chosen)}\n")
    if len(splits) > 1:
        print(f"### Both\n\n{markdown(outcomes)}")


if __name__ == "__main__":
    main()
