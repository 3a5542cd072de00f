"""The results as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Goal, Results, Row

# Of Paul Tol's high-contrast scheme, which every kind of colour vision can tell apart, in print too.
_BLUE, _YELLOW, _RED = "#004488", "#DDAA33", "#BB5566"

Shown = Sequence[tuple[Row, Goal, float]]


def draw(results: Results, path: Path) -> None:
    """A bar for each row that is measured against torch: how many times as fast, and its floor and aim."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    shown = [
        (row, goal, ratio)
        for row in results.rows
        for goal in row.goals
        if goal.against == "torch" and goal.form == "speedup" and (ratio := row.ratio(goal)) is not None
    ]
    if not shown:
        raise ValueError("draw: no row of these results is measured against torch.")
    places = range(len(shown))
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.36 * len(shown)), layout="constrained")
    axes.barh(places, [ratio - 1 for *_, ratio in shown], left=1, height=0.55, color=_BLUE, label="gradkern")
    for place, (row, goal, ratio) in enumerate(shown):
        axes.plot(row.ratio_quartiles(goal) or (), (place, place), color="0.6", linewidth=1.5)
        # In a column of their own, where no mark can hide them.
        axes.annotate(
            goal.words(ratio), (1.01, place), xycoords=("axes fraction", "data"), va="center", weight="bold"
        )
    for label, values, style in _marks(shown):
        points = [(value, place) for place, value in enumerate(values) if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="none", label=label, zorder=3, **style)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("")
    axes.set_yticks(places, [_title(row, goal) for row, goal, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(
        f"times as fast as torch's best call (logarithmic)\n{results.machine_facts.get('cpu', '')}"
    )
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, handlelength=1.5)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _marks(shown: Shown) -> list[tuple[str, list[float | None], dict[str, Any]]]:
    """Name, one value per row, and style of each kind of mark."""
    tick = {"marker": "|", "markersize": 15, "markeredgewidth": 3, "color": _RED}
    diamond = {"marker": "D", "markersize": 6, "color": _YELLOW, "markeredgecolor": "black"}
    square = {"marker": "s", "markersize": 5, "markerfacecolor": "white", "markeredgecolor": "black"}
    return [
        ("floor", [goal.floor for _, goal, _ in shown], tick),
        ("aim", [goal.aim for _, goal, _ in shown], diamond),
        ("torch.compile", [_against_torch(row, "compiled") for row, *_ in shown], square),
        ("optax", [_against_torch(row, "optax") for row, *_ in shown], square | {"marker": "o"}),
    ]


def _against_torch(row: Row, kind: str) -> float | None:
    """How many times as fast as torch a rival is."""
    torch, rival = row.fastest("torch"), row.fastest(kind)
    return None if torch is None or rival is None else torch.median_ms / rival.median_ms


def _title(row: Row, goal: Goal) -> str:
    return f"{row.title(goal)}, flushed" if row.start == "flushed" else row.title(goal)
