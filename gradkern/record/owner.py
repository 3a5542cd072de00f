"""Which process writes a record: it is named in the file, so that no second one writes to it beside it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

# The claims of the writers of this process.
_OURS: Final[set[str]] = set()


@dataclass(frozen=True)
class Owner:
    """A writer: `claim` is its own, `machine` where its process number means something."""

    claim: str
    process: int
    began: str
    host: str
    machine: str

    @classmethod
    def new(cls) -> Owner:
        """The writer that begins now, in this process."""
        owner = cls(os.urandom(8).hex(), os.getpid(), _began(os.getpid()), socket.gethostname(), _machine())
        _OURS.add(owner.claim)
        return owner

    @classmethod
    def parse(cls, text: str | None) -> Owner | None:
        """The writer that `str` named; None for nobody, and for what an older gradkern wrote."""
        try:
            return cls(**json.loads(text or ""))
        except (ValueError, TypeError):
            return None

    @property
    def text(self) -> str:
        """The reverse of `parse`."""
        return json.dumps(asdict(self))

    @property
    def is_alive(self) -> bool:
        """Whether it writes still. Of another machine that is not known: taken for no, nothing is blocked."""
        if self.machine != _machine():
            return False
        if self.process == os.getpid():
            return self.claim in _OURS
        # A number that was given to another process since is told from it by when that began.
        return _is_running(self.process) and _began(self.process) == self.began

    def release(self) -> None:
        """It writes no more."""
        _OURS.discard(self.claim)

    def __str__(self) -> str:
        here = " (this one)" if self.process == os.getpid() and self.machine == _machine() else ""
        return f"process {self.process}{here} on {self.host}"


def _machine() -> str:
    """What processes have in common whose numbers can be compared: a container counts its own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _stat(process: int) -> list[str]:
    """What Linux says about a process, from its state on; empty where it says nothing."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _began(process: int) -> str:
    return "".join(_stat(process)[19:20])


def _is_running(process: int) -> bool:
    if _stat(os.getpid()):
        # One that has ended and whose parent has not asked how is still listed.
        return _stat(process)[:1] not in ([], ["Z"], ["X"])
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
