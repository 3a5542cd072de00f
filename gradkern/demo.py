"""A recurrent network on real text, trained twice from one seed: unclipped it explodes, clipped it learns.

    python -m gradkern.demo

The network is the textbook case: a tanh RNN that predicts the next character, with orthogonal recurrent
weights and plain SGD at a learning rate that needs clipping. The text is the reference manual that CPython
carries in `pydoc_data/topics.py`, so nothing is downloaded. At the end come a table and a picture of both
runs' gradient norms. Nothing is staged: the only difference between the runs is one line, `clip_` or
`measure`, and the table says "never" where something did not happen.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradkern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

STEPS = 2000
# Seeds differ in how far the explosion goes, and rounding alone changes it. With this one it passes 100 times
# the early median with the texts of Python 3.10 to 3.13, 1 or 2 threads, each of torch's instruction sets. Of
# the seeds 0 to 39, 22 passed a norm of 1000 within 80 steps, and 39 ended worse than knowing nothing.
SEED = 5
# For so small a network a second thread gains little, and loses much where another program wants the core;
# and with one the sums, whose last bits decide how far an explosion goes, are the same in every run.
THREADS = 1
MAX_NORM = 0.25
# SGD at 1.0 with momentum 0.9 is what makes this network explode; at 0.5 it often does not.
LEARNING_RATE = 1.0
MOMENTUM = 0.9

BATCH = 32
LENGTH = 100
EMBEDDING = 64
HIDDEN = 128

# A norm this many times the median of the first steps counts as exploding.
EXPLODED = 100
EARLY_STEPS = 10

# Of the text, the share at its end that is only tested on.
HELD_OUT = 0.1

EXTRA_MISSING = (
    "gradkern.demo needs {name}, which is not installed.\n"
    "Install the demo's extra: pip install 'gradkern[demo]' (or: pip install rich matplotlib)"
)


@dataclass(frozen=True)
class Text:
    """A text as numbers: `train` and `held_out` are int64 `[characters]`, each below `symbols`."""

    train: Tensor
    held_out: Tensor
    symbols: int
    characters: int
    sha256: str

    @property
    def uniform_bits(self) -> float:
        """Bits per character of a model that knows nothing: every symbol equally likely."""
        return math.log2(self.symbols)


@dataclass
class Run:
    """What one training run leaves: one entry per step, norms and losses as they were before the step."""

    name: str
    max_norm: float | None
    norms: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    clipped_steps: int = 0
    first_nonfinite: tuple[int, str] | None = None
    held_out_bits: float = math.nan
    seconds: float = 0.0

    @property
    def early_norm(self) -> float:
        """Median of the finite norms among the first steps; NaN if there is none."""
        early = [norm for norm in self.norms[:EARLY_STEPS] if math.isfinite(norm)]
        return statistics.median(early) if early else math.nan

    @property
    def first_exploded(self) -> int | None:
        """The first step (from 1) whose norm is not below 100 times `early_norm`; a NaN is not below."""
        limit = EXPLODED * self.early_norm
        return next((step for step, norm in enumerate(self.norms, 1) if not norm <= limit), None)

    @property
    def largest_norm(self) -> float:
        """The largest norm of all; NaN if a gradient was NaN, since no number would then be true."""
        return max(self.norms, key=lambda norm: (math.isnan(norm), norm))


def load_text() -> Text:
    """The topics of Python's reference manual, in the order of their names.

    It differs a little from one Python to the next: the hash says which one a result belongs to.
    """
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise SystemExit(
            "gradkern.demo trains on the text of pydoc_data/topics.py, and this Python came without it.\n"
            "Some distributions pack it separately: install the whole standard library."
        ) from error
    return encode("".join(topics.topics[name] for name in sorted(topics.topics)))


def encode(characters: str) -> Text:
    """`characters` as numbers, cut into a part to train on and a part to test on."""
    number = {symbol: index for index, symbol in enumerate(sorted(set(characters)))}
    codes = torch.tensor([number[symbol] for symbol in characters])
    cut = round(len(codes) * (1 - HELD_OUT))
    digest = hashlib.sha256(characters.encode()).hexdigest()
    return Text(codes[:cut], codes[cut:], len(number), len(characters), digest)


class CharacterRNN(nn.Module):
    """A tanh RNN that predicts the next character: `[batch, length]` to `[batch, length, symbols]`."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, EMBEDDING)
        self.rnn = nn.RNN(EMBEDDING, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, symbols)
        # Orthogonal: at the start no direction grows or shrinks from one time step to the next.
        nn.init.orthogonal_(self.rnn.get_parameter("weight_hh_l0"))

    def forward(self, characters: Tensor) -> Tensor:
        """Scores of the next character, at every place."""
        states, _ = self.rnn(self.embed(characters))
        scores: Tensor = self.head(states)
        return scores


def next_character_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy (in nats) of every character but the first of `windows`, `[batch, LENGTH + 1]`."""
    scores = model(windows[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())


def in_bits(loss: Tensor) -> float:
    """A loss in nats as bits per character."""
    return loss.item() / math.log(2)


@torch.no_grad()
def held_out_bits(model: nn.Module, text: Text) -> float:
    """Bits per character on the part of the text that was not trained on."""
    whole = len(text.held_out) // (LENGTH + 1) * (LENGTH + 1)
    return in_bits(next_character_loss(model, text.held_out[:whole].view(-1, LENGTH + 1)))


def train(text: Text, run: Run, *, steps: int, seed: int, learning_rate: float) -> Iterator[None]:
    """Fill `run` with `steps` steps of training, pausing after each.

    The same seed gives the same weights and the same batches.
    """
    torch.manual_seed(seed)
    model = CharacterRNN(text.symbols)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=MOMENTUM)
    offsets = torch.arange(LENGTH + 1)
    for step in range(1, steps + 1):
        started = time.perf_counter()
        begins = torch.randint(len(text.train) - LENGTH, (BATCH, 1))
        loss = next_character_loss(model, text.train[begins + offsets])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]

        if run.max_norm is None:
            stats = gradkern.measure(model)
        else:
            stats = gradkern.clip_(model, max_norm=run.max_norm)

        optimizer.step()
        run.seconds += time.perf_counter() - started
        run.norms.append(float(stats.norm))
        run.bits.append(in_bits(loss))
        run.clipped_steps += bool(stats.coef < 1)
        if run.first_nonfinite is None and not stats.is_finite:
            run.first_nonfinite = (step, first_nonfinite_parameter(stats))
        yield
    run.held_out_bits = held_out_bits(model, text)


def first_nonfinite_parameter(stats: gradkern.GradStats) -> str:
    """The name of the first parameter, in the model's order, whose gradient holds a NaN or an Inf."""
    per_tensor = stats.per_tensor
    bad = (per_tensor.nan_count + per_tensor.inf_count).tolist()
    return next(name for name, count in zip(stats.names, bad, strict=True) if count)


def table(text: Text, runs: Sequence[Run]) -> Table:
    """Both runs side by side."""
    from rich.table import Table

    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("bits per character, held-out text", lambda run: f"{run.held_out_bits:.2f}"),
        ("  a model that knows nothing", lambda run: f"{text.uniform_bits:.2f}"),
        ("largest gradient norm", lambda run: f"{run.largest_norm:.3g}"),
        ("steps clipped", clipped_words),
        (f"first step over {EXPLODED}× the early median", lambda run: step_words(run.first_exploded)),
        ("first non-finite step", nonfinite_words),
        ("time per step", lambda run: f"{1e3 * run.seconds / len(run.norms):.1f} ms"),
    ]
    result = Table()
    result.add_column()
    for run in runs:
        result.add_column(run.name, justify="right")
    for title, cell in rows:
        result.add_row(title, *(cell(run) for run in runs))
    return result


def clipped_words(run: Run) -> str:
    """How often clipping fired, of how many steps."""
    steps = len(run.norms)
    return f"{run.clipped_steps} of {steps} ({run.clipped_steps / steps:.0%})"


def step_words(step: int | None) -> str:
    """The step, or "never"."""
    return "never" if step is None else str(step)


def nonfinite_words(run: Run) -> str:
    """The first step with a NaN or an Inf, and the parameter it was found in, or "never"."""
    if run.first_nonfinite is None:
        return "never"
    step, name = run.first_nonfinite
    return f"{step}, in {name}"


def verdict(text: Text, unclipped: Run, clipped: Run) -> str:
    """What happened, whatever it was."""
    exploded = unclipped.first_exploded is not None or unclipped.first_nonfinite is not None
    lost = not unclipped.held_out_bits < text.uniform_bits
    learned = clipped.held_out_bits < text.uniform_bits
    return (
        f"Without clipping the gradients {'exploded' if exploded else 'did not explode with this seed'} "
        f"and the network {'ended worse than knowing nothing' if lost else 'learned something even so'}.\n"
        f"With max_norm={clipped.max_norm:g} it {'learned' if learned else 'did not learn either'}: "
        f"{clipped.held_out_bits:.2f} bits per character; knowing nothing takes {text.uniform_bits:.2f}."
    )


# Of Paul Tol's high-contrast scheme, which every kind of colour vision can tell apart, and which survives
# printing in grey; the width of the line says it once more.
UNCLIPPED_LINE: dict[str, Any] = {"color": "#BB5566", "linewidth": 0.8}
CLIPPED_LINE: dict[str, Any] = {"color": "#004488", "linewidth": 1.4}


def draw(text: Text, unclipped: Run, clipped: Run, path: Path) -> None:
    """Write the picture: both runs' norms on a logarithmic axis above, what they learned below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (norms, bits) = plt.subplots(
        2, 1, figsize=(8, 6.4), sharex=True, height_ratios=[3, 2], layout="constrained"
    )
    draw_norms(norms, unclipped, clipped)
    draw_bits(bits, text, unclipped, clipped)
    figure.suptitle("The same network, the same text, the same seed", fontsize=13)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_norms(axes: Axes, unclipped: Run, clipped: Run) -> None:
    """Norms before clipping; where there is no finite one, a cross at the upper edge."""
    for run, line in ((unclipped, UNCLIPPED_LINE), (clipped, CLIPPED_LINE)):
        steps = range(1, len(run.norms) + 1)
        finite = [norm if math.isfinite(norm) else math.nan for norm in run.norms]
        axes.plot(steps, finite, label=run.name, **line)
        bad = [step for step, norm in zip(steps, run.norms, strict=True) if not math.isfinite(norm)]
        if bad:
            axes.plot(
                bad,
                [0.97] * len(bad),
                "x",
                color=line["color"],
                markersize=6,
                transform=axes.get_xaxis_transform(),
                label=f"{run.name}: NaN or Inf",
            )
    threshold = clipped.max_norm
    if threshold:
        axes.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"max_norm = {threshold:g}")
    axes.set_yscale("log")
    # The explosion takes a few steps near the beginning, the learning all the others.
    axes.set_xscale("log")
    axes.set_xlim(1, max(len(run.norms) for run in (unclipped, clipped)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("gradient norm before clipping")
    axes.grid(which="major", alpha=0.25)
    # Above the axes, where it hides no step.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, handlelength=1.6)


def draw_bits(axes: Axes, text: Text, unclipped: Run, clipped: Run) -> None:
    """Training loss, beside that of a model that knows nothing."""
    from matplotlib.ticker import LogLocator

    for run, line in ((unclipped, UNCLIPPED_LINE), (clipped, CLIPPED_LINE)):
        axes.plot(range(1, len(run.bits) + 1), run.bits, **line)
    uniform = text.uniform_bits
    axes.axhline(uniform, color="black", linestyle=":", linewidth=1.2)
    axes.annotate(
        f"knowing nothing: {uniform:.2f}",
        (1, uniform),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
    )
    # A run that has lost its way takes a hundred bits, and would press the other flat on a linear axis.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("bits per character")
    axes.set_xlabel("step (logarithmic)")
    axes.grid(which="major", alpha=0.25)


def train_both(text: Text, options: argparse.Namespace, console: Console) -> tuple[Run, Run]:
    """The run without clipping and the run with it, under a progress bar each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    runs = Run("unclipped", None), Run("clipped", options.max_norm)
    with Progress(*columns, console=console) as progress:
        for run in runs:
            task = progress.add_task(run.name, total=options.steps, now="")
            for _ in train(text, run, steps=options.steps, seed=options.seed, learning_rate=options.lr):
                now = f"{run.bits[-1]:5.2f} bits per character, norm {run.norms[-1]:.3g}"
                progress.update(task, advance=1, now=now)
    return runs


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before anything is trained."""
    parser = argparse.ArgumentParser(
        prog="python -m gradkern.demo",
        description="Train a character-level tanh RNN twice from one seed: unclipped, and clipped.",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each run (%(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of weights and batches (%(default)s)")
    parser.add_argument("--max-norm", type=float, default=MAX_NORM, help="of the clipped run (%(default)s)")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="learning rate (%(default)s)")
    parser.add_argument("--threads", type=int, default=THREADS, help="of the training (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (%(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < EARLY_STEPS:
        parser.error(f"--steps must be at least {EARLY_STEPS}, got {options.steps}")
    if not options.max_norm > 0:
        parser.error(f"--max-norm must be positive, got {options.max_norm:g}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if not 0 < options.lr < math.inf:
        parser.error(f"--lr must be positive and finite, got {options.lr:g}")
    if options.out.suffix.lower() not in {".png", ".pdf", ".svg"}:
        parser.error(f"--out must end in .png, .pdf or .svg, got {options.out}")
    if not options.out.resolve().parent.is_dir():
        parser.error(f"--out: there is no directory {options.out.resolve().parent}")
    return options


def require_extra() -> None:
    """Stop with the remedy if a package of the demo's extra is missing."""
    import importlib.util

    for name in ("rich", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(EXTRA_MISSING.format(name=name))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train twice, then print the table and write the picture."""
    options = parse(arguments)
    require_extra()
    from rich.console import Console

    torch.set_num_threads(options.threads)
    console = Console(highlight=False, soft_wrap=True)
    text = load_text()
    console.print(
        f"Text: pydoc_data/topics.py, {text.characters:,} characters, {text.symbols} symbols, "
        f"sha256 {text.sha256[:16]}\n"
        f"gradkern {gradkern.backend()}, torch {torch.__version__}, "
        f"{options.threads} thread{'s' * (options.threads > 1)}, seed {options.seed}"
    )
    unclipped, clipped = train_both(text, options, console)
    console.print(table(text, (unclipped, clipped)))
    console.print(verdict(text, unclipped, clipped))
    draw(text, unclipped, clipped, options.out)
    console.print(f"Both norms, step by step: {options.out}")


if __name__ == "__main__":
    main()
