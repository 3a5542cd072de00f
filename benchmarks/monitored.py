"""What the monitor costs: `python -m benchmarks.monitored --minutes 10`.

The demo's network is trained twice from one seed, with the monitor on (every cadence, with a file) and
without, in turn, block by block, so that both meet the same machine. Both must end with the same weights.

Times are wall clock, and CPU time of the whole process, the monitor's background thread included. That thread
writes twice a second, whichever of the two is being trained then: about half of its work, which is 0.2 % of a
step, is counted for the other.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import gradkern
from gradkern.demo import BATCH, LENGTH, CharacterRNN, load_text, next_character_loss

BLOCK = 40  # steps: longer than the writer's pause, short against the machine's moods


@dataclass
class Times:
    """Seconds of each block."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def block(self, step: Callable[[], None]) -> None:
        """Time a block of steps."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(BLOCK):
            step()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


class Trained:
    """The demo's model and its batches; `step` trains it by one, with or without a monitor."""

    def __init__(self, path: Path | None) -> None:
        torch.manual_seed(5)
        self.text = load_text()
        self.model = CharacterRNN(self.text.symbols)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.9)
        self.batches = torch.Generator().manual_seed(5)
        self.monitor = None if path is None else gradkern.Monitor(self.model, self.optimizer, path=path)
        self.times = Times()

    def step(self) -> None:
        """One step, clipped at 0.25 as in the demo."""
        begins = torch.randint(len(self.text.train) - LENGTH, (BATCH, 1), generator=self.batches)
        windows = self.text.train[begins + torch.arange(LENGTH + 1)]
        loss = next_character_loss(self.model, windows)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        stats = gradkern.clip_(self.model, max_norm=0.25)
        self.optimizer.step()
        if self.monitor is not None:
            self.monitor.step(loss, stats)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights are equal to the bit."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitored", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="(%(default)s)")
    minutes = parser.parse_args().minutes
    logging.disable()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.gk"
        plain, watched = Trained(None), Trained(path)
        end = time.monotonic() + 60 * minutes
        blocks = 0
        while time.monotonic() < end:
            for trained in (plain, watched) if blocks % 2 else (watched, plain):
                trained.times.block(trained.step)
            blocks += 1
        assert watched.monitor is not None
        findings = [finding for finding in watched.monitor.findings if finding.severity != "info"]
        watched.monitor.close()
        size = path.stat().st_size
    steps = blocks * BLOCK
    print(f"{steps} steps each, gradkern {gradkern.backend()}, torch {torch.__version__}, 1 thread")
    for clock in ("wall", "cpu"):
        without, with_it = getattr(plain.times, clock), getattr(watched.times, clock)
        extra = statistics.median(b / a - 1 for a, b in zip(without, with_it, strict=True))
        each = [f"{1e3 * sum(times) / steps:.2f} ms" for times in (without, with_it)]
        whole = sum(with_it) / sum(without) - 1
        print(f"{clock}: {each[0]} a step without, {each[1]} with: {whole:+.2%}, median block {extra:+.2%}")
    print(f"file: {size / 1e6:.2f} MB, {size / steps:.0f} bytes a step")
    print(f"same weights: {same_weights(plain.model, watched.model)}; warnings or errors: {len(findings)}")


if __name__ == "__main__":
    main()
