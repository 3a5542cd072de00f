"""The file of a record: its tables, how it is opened, and what a file that is none is answered with.

Tables of version 1:

- ``meta``: key, value as JSON.
- ``series``: kind ("scalars", one of the kinds of rows, "exponents"), dtype, and `stride`: one row is kept in
  that many steps.
- ``layouts``: the names of the columns of a series, as JSON. Each block was written under one of them.
- ``blocks``: consecutive rows of a series. `first` and `last` are the steps of the outer ones, `steps` all of
  them (NULL if their distances are equal), `code` says how `data` was made (see blocks.py). Rows around an
  incident are there a second time, under its number.
- ``events`` and ``incidents``.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from gradkern._version import __version__

VERSION: Final = 1
APPLICATION_ID: Final = 0x676B7264  # "gkrd", which `file` and others find in the header

TABLES: Final = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE series (id INTEGER PRIMARY KEY, kind TEXT NOT NULL UNIQUE, dtype TEXT NOT NULL,
                     stride INTEGER NOT NULL);
CREATE TABLE layouts (id INTEGER PRIMARY KEY, series INTEGER NOT NULL, names TEXT NOT NULL);
CREATE TABLE blocks (id INTEGER PRIMARY KEY AUTOINCREMENT, series INTEGER NOT NULL, incident INTEGER,
                     layout INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
                     count INTEGER NOT NULL, bytes INTEGER NOT NULL, code INTEGER NOT NULL,
                     steps BLOB, data BLOB NOT NULL);
CREATE INDEX blocks_by_step ON blocks (series, incident, first, last, count, bytes);
CREATE TABLE events (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, kind TEXT NOT NULL,
                     detail TEXT NOT NULL);
CREATE TABLE incidents (id INTEGER PRIMARY KEY, step INTEGER NOT NULL);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
"""

# Seconds that a statement waits for another process's lock.
LOCK_SECONDS: Final = 0.5

# Where several machines see one file, SQLite's write-ahead log cannot be shared between them, and a probe
# from one machine does not notice.
NETWORK: Final = re.compile(
    r"nfs\d?|cifs|smb\w*|gpfs|lustre|beegfs|ceph|glusterfs|orangefs|pvfs2|panfs|wekafs|9p|virtiofs|fuse\..*"
)


class RecordError(RuntimeError):
    """A file is not a record that this gradkern can read, or no longer one. The message says which."""


def as_path(path: str | os.PathLike[str], function: str) -> Path:
    """`path` as a Path. TypeError if it is neither text nor a path."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{function}: path must be text or a path, got {type(path).__name__}.")
    return Path(path)


def connect(path: Path, *, write: bool, locks: bool = True) -> sqlite3.Connection:
    """A connection in autocommit mode. Without `locks` nothing keeps a reader from looking in mid-write."""
    options = f"mode={'rwc' if write else 'ro'}{'' if locks else '&nolock=1'}"
    return sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?{options}",
        uri=True,
        timeout=LOCK_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )


def file_system(path: Path) -> str:
    """The type of the file system that `path` is on, as Linux names it; empty where that is not known."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
        target = str(path.resolve())
    except OSError:
        return ""
    best, found = "", ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        # The kernel writes a space as \040.
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, found = point, after.split()[0]
    return found


def journal_for(path: Path) -> str:
    """How a database at `path` can be written: "wal", "rollback", or "unlocked" where locks fail too.

    Tried on a scratch file beside it: a database that was switched to a journal which then fails may not open
    again.
    """
    journals = ["rollback"] if NETWORK.fullmatch(file_system(path.parent)) else ["wal", "rollback"]
    for journal in journals:
        scratch = path.with_name(f".{path.name}.{os.getpid()}.{journal}")
        try:
            if _works(scratch, journal):
                return journal
        finally:
            for name in ("", "-wal", "-shm", "-journal"):
                with contextlib.suppress(OSError):
                    scratch.with_name(scratch.name + name).unlink()
    return "unlocked"


def _works(scratch: Path, journal: str) -> bool:
    try:
        with contextlib.closing(connect(scratch, write=True)) as writer:
            set_journal(writer, journal)
            writer.execute("CREATE TABLE probe (value)")
            writer.execute("BEGIN IMMEDIATE")
            writer.execute("INSERT INTO probe VALUES (1)")
            writer.execute("COMMIT")
            with contextlib.closing(connect(scratch, write=False)) as reader:
                return reader.execute("SELECT value FROM probe").fetchall() == [(1,)]
    except sqlite3.Error:
        return False


def set_journal(connection: sqlite3.Connection, journal: str) -> None:
    """Switch to a journal of `journal_for`. OperationalError if SQLite does not do it."""
    wanted = "wal" if journal == "wal" else "truncate"
    (got,) = connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
    if got != wanted:
        raise sqlite3.OperationalError(f"journal mode is {got}, not {wanted}")
    # A power cut may lose the last commits under "wal", never the file.
    connection.execute("PRAGMA synchronous = NORMAL")


def check(connection: sqlite3.Connection, path: Path, function: str) -> None:
    """RecordError unless `connection` is to a record of a version that is known."""
    with damage(path, function):
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application == APPLICATION_ID and version == VERSION:
            connection.execute("SELECT count(*) FROM series").fetchone()
    if application != APPLICATION_ID:
        raise RecordError(
            f"{function}: {path} is an SQLite database, but not a record of gradkern. Choose another path."
        )
    if version > VERSION:
        raise RecordError(
            f"{function}: {path} was written by a newer gradkern (record version {version}); gradkern "
            f"{__version__} reads version {VERSION}. Update gradkern to read it."
        )


@contextlib.contextmanager
def damage(path: Path, function: str) -> Iterator[None]:
    """Turn what SQLite, zlib and numpy say about bytes that make no sense into a RecordError."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        if "closed" not in str(error):
            raise
        raise RecordError(f"{function}: {path} has been closed. Open it again with Run.open.") from error
    except sqlite3.OperationalError as error:
        if "no such table" in str(error) or "malformed" in str(error):
            raise RecordError(_damaged(path, function, error)) from error
        raise RecordError(
            f"{function}: {path} cannot be read now: {error}. If a run writes to it, try again; else check "
            f"that the file and its directory can be read."
        ) from error
    except (sqlite3.DatabaseError, ValueError, IndexError, KeyError) as error:
        raise RecordError(_damaged(path, function, error)) from error


def _damaged(path: Path, function: str, error: Exception) -> str:
    # A handle that this process closes takes the locks of SQLite with it: none before SQLite has given up.
    if "not a database" in str(error) and not _begins_as_sqlite(path):
        return f"{function}: {path} is not an SQLite file, so not a record of gradkern. Check the path."
    return (
        f"{function}: {path} is damaged: {error}. What is left of it may be saved by "
        f"`sqlite3 {path} .recover | sqlite3 saved.gk`."
    )


def _begins_as_sqlite(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def open_for_reading(path: Path, function: str) -> sqlite3.Connection:
    """A connection that only reads. FileNotFoundError, or RecordError for a file that is no record."""
    if path.is_dir():
        raise IsADirectoryError(f"{function}: {path} is a directory. Name a file, for instance in it.")
    if not path.is_file():
        raise FileNotFoundError(f"{function}: there is no file {path}.")
    if not path.stat().st_size:
        raise RecordError(f"{function}: {path} is empty, so not a record of gradkern. Check the path.")
    connection = _reader(path)
    try:
        check(connection, path, function)
    except BaseException:
        connection.close()
        raise
    return connection


def _reader(path: Path) -> sqlite3.Connection:
    """A connection that can read a page, or one whose errors say why none can."""
    end = time.monotonic() + 2 * LOCK_SECONDS
    while True:
        # What a killed writer left behind is put in order by the next to read, who needs to write for it.
        for write in (False, True):
            connection = connect(path, write=write)
            if _reads(connection):
                return connection
            connection.close()
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    if journal_for(path) != "unlocked":
        return connect(path, write=False)
    # Without locks a journal may belong to a writer that is alive, unless it has not changed for long.
    abandoned = not _changed_since(path.with_name(path.name + "-journal"), 5.0)
    return connect(path, write=abandoned, locks=False)


def _reads(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        # Damage is not cured by another way of opening.
        return not isinstance(error, sqlite3.OperationalError)
    return True


def number_of_log(path: Path) -> int | None:
    """Which file is the write-ahead log of the database at `path`; None if there is none."""
    try:
        return path.with_name(path.name + "-wal").stat().st_ino
    except OSError:
        return None


def _changed_since(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime < seconds
    except OSError:
        return False
