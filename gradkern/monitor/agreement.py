"""All ranks of a distributed run act on the same findings at the same step."""

from __future__ import annotations

from typing import Final

import torch.distributed as dist

from gradkern.diagnosis import Finding

# Steps from one exchange to the next. Losses and data differ from rank to rank, so that what stands out on
# one cannot decide when all of them meet.
EVERY: Final = 20


def is_needed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(findings: list[Finding]) -> list[Finding]:
    """The findings of all ranks, of each kind and severity one, in the same order on every rank.

    Every rank must call it at the same time. Of the same kind the earliest counts, then the lowest rank's.
    """
    everybody: list[list[Finding]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, findings)
    chosen: dict[tuple[str, str], Finding] = {}
    for finding in (finding for of_rank in everybody for finding in of_rank):
        key = (finding.kind, finding.severity)
        if key not in chosen or finding.step < chosen[key].step:
            chosen[key] = finding
    return sorted(chosen.values(), key=lambda finding: (finding.step, finding.kind, finding.severity))


def least(value: float) -> float:
    """The smallest of the values of all ranks. Every rank must call it at the same time."""
    everybody: list[float] = [value] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return min(everybody)
