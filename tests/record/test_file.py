from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradkern.record import Run, Writer, file

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 22 0:40 / /home rw - nfs4 server:/home rw
32 31 0:41 / /home/me/fast rw master:3 - xfs /dev/vdb rw
33 22 0:42 / /a\\040b rw - lustre mgs:/scratch rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/x", "ext4"),
        ("/home/me/run.gk", "nfs4"),
        ("/home", "nfs4"),
        ("/homes/run.gk", "ext4"),
        ("/home/me/fast/run.gk", "xfs"),
        ("/a b/run.gk", "lustre"),
    ],
)
def test_a_file_system_is_that_of_the_deepest_mount(
    path: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: MOUNTS)
    assert file.file_system(Path(path)) == kind


def test_a_machine_without_mountinfo_has_an_unknown_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert file.file_system(Path("/x")) == ""


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "fuse.sshfs", "9p"])
def test_network_file_systems_are_known(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "file_system", lambda path: kind)
    assert file.journal_for(tmp_path / "run.gk") == "rollback"


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", ""])
def test_local_file_systems_are_not_taken_for_network_ones(kind: str) -> None:
    assert not file.NETWORK.fullmatch(kind)


def test_trying_leaves_nothing_behind(tmp_path: Path) -> None:
    file.journal_for(tmp_path / "run.gk")
    assert not list(tmp_path.iterdir())


RECORD = """
import sys, pathlib
from gradkern.record import Run, Writer
path = pathlib.Path(sys.argv[1])
with Writer(path) as writer:
    writer.set_names("grad_norm", ["a"])
    for part in range(2):
        for step in range(10 * part, 10 * part + 10):
            writer.put_rows("grad_norm", step, [step])
        assert writer.flush(60)
        with Run.open(path) as run:
            print(len(run.rows("grad_norm")[0]))
    print(writer.dropped, writer._store.journal)
"""


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes locks fail."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("takes Linux and a C compiler")
    library = tmp_path_factory.mktemp("no_locks") / "no_locks.so"
    source = Path(__file__).with_name("no_locks.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize(
    ("ending", "journal"),
    [
        pytest.param("-shm", "rollback", id="of-shared-memory"),
        pytest.param("", "unlocked", id="of-all-files"),
        pytest.param(".nothing", "wal", id="of-none"),
    ],
)
def test_a_run_is_recorded_and_read_where_locks_fail(
    ending: str, journal: str, no_locks: Path, tmp_path: Path
) -> None:
    if file.journal_for(tmp_path / "run.gk") != "wal":
        pytest.skip("no write-ahead log on this file system")
    environment = {**os.environ, "LD_PRELOAD": str(no_locks), "GRADKERN_NO_LOCKS": ending}
    command = [sys.executable, "-c", RECORD, str(tmp_path / "run.gk")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stderr == ""
    assert result.stdout.split() == ["10", "20", "0", journal]


def test_what_was_recorded_without_locks_is_read_with_them(no_locks: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(no_locks), "GRADKERN_NO_LOCKS": ""}
    command = [sys.executable, "-c", RECORD, str(tmp_path / "run.gk")]
    subprocess.run(command, env=environment, capture_output=True, check=True, timeout=120)
    with Run.open(tmp_path / "run.gk") as run:
        assert run.rows("grad_norm")[1][:, 0].tolist() == list(range(20))


def test_a_copy_without_the_log_is_a_record_too(tmp_path: Path) -> None:
    with Writer(tmp_path / "run.gk") as writer:
        writer.put_scalars(0, {"loss": 1})
        assert writer.flush()
        shutil.copy(tmp_path / "run.gk", tmp_path / "copy.gk")
    with Run.open(tmp_path / "copy.gk") as run:
        assert run.meta == {}
