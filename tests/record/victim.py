"""Runs that are killed: `python -m tests.record.victim DIRECTORY RUNS`.

Each run is a process that records a step every few milliseconds into run<i>.gk until it is killed at a random
moment, and notes each step beside it as soon as it has been put. When it was killed goes to killed<i>.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

from gradkern.record import Writer

NAMES = [f"layer{i}.weight" for i in range(100)]
AT_ONCE = 5
NOTE = struct.Struct("<qd")  # step, time.monotonic() after it was put


def record(directory: Path, run: int) -> None:
    """Record until killed."""
    notes = os.open(directory / f"notes{run}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    writer = Writer(directory / f"run{run}.gk")
    writer.set_names("grad_norm", NAMES)
    step = 0
    while True:
        writer.put_rows("grad_norm", step, [step] * len(NAMES))
        writer.put_scalars(step, {"loss": step})
        if step % 50 == 20:
            writer.incident(step)
        os.write(notes, NOTE.pack(step, time.monotonic()))
        step += 1
        time.sleep(0.004)


def main(directory: Path, runs: int) -> None:
    """Start and kill `runs` runs, a few at a time."""
    moments = random.Random(0)
    for begin in range(0, runs, AT_ONCE):
        group = []
        for run in range(begin, min(begin + AT_ONCE, runs)):
            child = os.fork()
            if child == 0:
                try:
                    record(directory, run)
                finally:
                    os._exit(1)
            group.append((time.monotonic() + moments.uniform(0.05, 2.0), child, run))
        for moment, child, run in sorted(group):
            time.sleep(max(moment - time.monotonic(), 0.0))
            os.kill(child, signal.SIGKILL)
            killed = time.monotonic()
            os.waitpid(child, 0)
            (directory / f"killed{run}").write_text(repr(killed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
