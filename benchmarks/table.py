"""The results as markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.results import Goal, Results, Row, spread

NOTES = """\
Times are medians ± half the distance between the quartiles, in milliseconds; behind a ratio stand the
quartiles of the rounds' own ratios. In every round each contender is called once, in an order drawn anew, and
what it returns is compared with float64. Against torch means against the faster of its foreach and its loop;
the JSON file has both. "From" says where gradients are when a call begins: in memory, since there are more
than any cache holds; in caches, as the call before has left them; or flushed from the caches into memory. The
ceiling is a plain read of as many bytes, and scaling them in place where gradients are clipped. All of it was
measured in one run. A ratio in µs is how much longer gradkern takes than what it stands against; one in ns is
its time for each tensor. Ratios on a CPU say nothing about a GPU."""


def markdown(results: Results) -> str:
    """The machine, the table, and how to read it."""
    bandwidths = ", ".join(f"{name} {value:.1f} GB/s" for name, value in results.bandwidths.items())
    return "\n\n".join(
        [
            f"{results.machine}.\n{bandwidths[:1].upper()}{bandwidths[1:]}.",
            *_speeds(results.rows),
            NOTES,
            "By how much the norm is off, relatively:",
            _errors(results.rows),
            summary(results.rows),
        ]
    )


def summary(rows: Sequence[Row]) -> str:
    """How many floors and aims are met, and which floors are not."""
    verdicts = [(row, goal, row.verdict(goal)) for row in rows for goal in row.goals]
    demanded = [found for found in verdicts if found[2]]
    aimed = [found for found in demanded if found[1].aim is not None]
    text = (
        f"Floors met: {sum(verdict != 'missed' for *_, verdict in demanded)} of {len(demanded)}. "
        f"Aims met: {sum(verdict == 'aim' for *_, verdict in aimed)} of {len(aimed)}."
    )
    for row, goal, verdict in demanded:
        if verdict == "missed":
            found, floor = goal.words(row.ratio(goal)), goal.words(goal.floor)
            text += f"\nMissed: {row.title(goal)}: {found} where {floor} is demanded."
    return text


def _speeds(rows: Sequence[Row]) -> list[str]:
    """A heading and a table for each group of rows."""
    groups = dict.fromkeys(row.group for row in rows)
    parts = []
    for group in groups:
        parts += [f"**{group}**", _speed([row for row in rows if row.group == group])]
    return parts


def _speed(rows: Sequence[Row]) -> str:
    header = ["work", "from", "gradkern", "against", "", "ratio", "floor", "aim", "met"]
    others = {"compiled": "torch.compile", "optax": "optax"}
    others = {kind: name for kind, name in others.items() if any(row.fastest(kind) for row in rows)}
    has_share = any(goal.form == "share" for row in rows for goal in row.goals)
    header += [*others.values(), *(["of the ceiling"] if has_share else [])]
    lines = []
    for row in rows:
        for goal in row.goals:
            if goal.form == "share":
                continue  # it has a column of its own
            rival = row.fastest(goal.against)
            lines.append(
                [
                    row.title(goal),
                    row.start,
                    _time(row, "gradkern", goal.of),
                    goal.against if rival is None else rival.name,
                    _time(row, goal.against),
                    _ratio(row, goal),
                    goal.words(goal.floor),
                    goal.words(goal.aim),
                    row.verdict(goal) or "–",
                    *(_time(row, kind) for kind in others),
                    *([_share(row)] if has_share else []),
                ]
            )
    return _table(header, lines, right=range(2, len(header)))


def _errors(rows: Sequence[Row]) -> str:
    kinds = ["gradkern", "torch", "compiled", "optax"]
    lines = []
    for row in rows:
        found = [row.fastest(kind) for kind in kinds]
        errors = [None if timing is None else timing.norm_error for timing in found]
        if errors[0] is not None:
            lines.append([row.work, *("–" if error is None else f"{error:.0e}" for error in errors)])
    return _table(["work", "gradkern", "torch", "torch.compile", "optax"], lines, right=range(1, 5))


def _time(row: Row, kind: str, name: str = "") -> str:
    timing = row.fastest(kind, name)
    return "–" if timing is None else f"{significant(timing.median_ms)} ± {spread(timing):.0%}"


def _ratio(row: Row, goal: Goal) -> str:
    between = row.ratio_quartiles(goal)
    if between is None:
        return "–"
    lower, upper = (goal.words(value) for value in between)
    return f"**{goal.words(row.ratio(goal))}** ({lower.rstrip(' ×µns')}–{upper.rstrip(' ×µns')})"


def _share(row: Row) -> str:
    goal = next((goal for goal in row.goals if goal.form == "share"), None)
    if goal is None or row.ratio(goal) is None:
        return "–"
    text = goal.words(row.ratio(goal))
    if goal.floor is not None:
        text += f" (floor {goal.words(goal.floor)}, aim {goal.words(goal.aim)}: {row.verdict(goal)})"
    return text


def significant(value: float) -> str:
    """`value` with three significant digits, and no exponent."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, digits)}f}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(3, *(len(line[i]) for line in [header, *lines])) for i in range(len(header))]

    def text(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width - 1) + (":" if i in right else "-") for i, width in enumerate(widths)]
    return "\n".join([text(header), text(rule), *map(text, lines)])
