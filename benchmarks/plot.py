"""The results as a picture."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Results

# Of Paul Tol's high-contrast scheme, which every kind of colour vision can tell apart, in print too.
_BAR, _OTHER, _AIM = "#004488", "#DDAA33", "#BB5566"


def draw(results: Results, path: Path) -> None:
    """A bar for each row that is measured against torch: how many times as fast, and its floor and aim."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [
        (row, goal, ratio)
        for row in results.rows
        for goal in row.goals
        if goal.against == "torch" and (ratio := row.ratio(goal)) is not None
    ]
    if not shown:
        raise ValueError("draw: no row of these results is measured against torch.")
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.42 * len(shown)), layout="constrained")
    widths = [ratio - 1 for *_, ratio in shown]
    axes.barh(range(len(shown)), widths, left=1, height=0.6, color=_BAR, label="gradkern, with quartiles")
    for place, (row, goal, ratio) in enumerate(shown):
        between = row.ratio_quartiles(goal) or (ratio, ratio)
        axes.plot(between, [place, place], color="black", linewidth=1.2)
        axes.annotate(
            goal.words(ratio),
            (max(ratio, between[1]), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
        )
    marks = (
        (
            "floor",
            "|",
            [(goal.floor, place) for place, (_, goal, _) in enumerate(shown) if goal.floor],
            _OTHER,
        ),
        ("aim", "D", [(goal.aim, place) for place, (_, goal, _) in enumerate(shown) if goal.aim], _AIM),
    )
    for name, marker, points, colour in marks:
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=name, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [row.work for row, *_ in shown])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_xlabel("times as fast as torch's best call (logarithmic)")
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)
