"""The command: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import machine, plot, rivals, table
from benchmarks.cases import CASES, Case, Rivals, Setting
from benchmarks.machine import Buffer, Machine
from benchmarks.measure import Effort, in_turn
from benchmarks.results import Results, Row
from benchmarks.training import TRAINING_CASES

# What the rounds of a row may take; building it and the least number of rounds come on top.
SECONDS, QUICK_SECONDS = 4.0, 1.0

ROWS = [*CASES, *TRAINING_CASES]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure gradkern against torch, in turn, and print a markdown table.",
    )
    keys = [case.key for case in ROWS]
    parser.add_argument("--quick", action="store_true", help="few rounds and no torch.compile: a first look")
    parser.add_argument("--only", nargs="+", metavar="ROW", help=f"these rows alone: {', '.join(keys)}")
    parser.add_argument("--repeat", type=int, metavar="N", help="rounds of each row (else by time)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch and gradkern")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="(%(default)s)")
    parser.add_argument("--png", type=Path, default=Path("benchmark.png"), help="(%(default)s)")
    parser.add_argument("--load", type=Path, metavar="JSON", help="show a saved run and measure nothing")
    options = parser.parse_args(arguments)
    for name in ("repeat", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    unknown = [key for key in options.only or [] if key not in keys]
    if unknown:
        parser.error(f"--only: there is no row {unknown[0]!r}; there are {', '.join(keys)}")
    if options.load is not None and not options.load.is_file():
        parser.error(f"--load: there is no file {options.load}")
    return options


def measure_row(case: Case, setting: Setting, effort: Effort, facts: Machine) -> Row:
    """Build the gradients of a row, time all contenders in turn, and let the gradients go again."""
    gradients, buffer = case.gradients(), setting.buffer

    def evict() -> None:
        if buffer is not None and case.start == "flushed":
            buffer.evict(facts.l2_bytes + facts.l3_bytes)

    timings = in_turn(case.contenders(gradients, setting), effort, evict)
    tensors, numel = len(gradients.params), gradients.numel
    return Row(case.key, case.group, case.work, tensors, numel, case.start, case.goals, timings)


def run(options: argparse.Namespace) -> Results:
    """Measure what the options ask for, saying on stderr what is being measured."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    chosen: set[Rivals] = set()
    if not options.quick:
        chosen.add("compiled")
    if rivals.has_optax():
        chosen.add("optax")
    effort = Effort(
        QUICK_SECONDS if options.quick else SECONDS,
        least=3 if options.quick else 7,
        rounds=options.repeat,
    )
    facts, buffer = machine.describe(), Buffer()
    say("bandwidths")
    bandwidths = buffer.measure_bandwidths(Effort(min(effort.seconds, 3.0), rounds=options.repeat))
    rows = []
    for case in ROWS:
        if not options.only or case.key in options.only:
            say(case.key)
            rows.append(measure_row(case, Setting(buffer, frozenset(chosen)), effort, facts))
    return Results(str(facts), facts.as_dict(), bandwidths, rows)


def say(text: str) -> None:
    """Tell what is going on, without getting into the table."""
    print(f"measuring: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON and the picture."""
    options = parse(arguments)
    if options.load is not None:
        results = Results.load(options.load)
    else:
        results = run(options)
        results.save(options.json)
    print(table.markdown(results))
    if importlib.util.find_spec("matplotlib") is None:
        say("no picture: matplotlib is not installed (pip install matplotlib)")
    else:
        plot.draw(results, options.png)


if __name__ == "__main__":
    main()
