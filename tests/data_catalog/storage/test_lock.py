"""Folders of living processes stay, those of killed processes go: by locks, not by process ids."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_catalog.progress import listen
from data_catalog.storage import lock
from data_catalog.storage.lock import ABANDONED_S, Locked, is_abandoned, lock_file
from data_catalog.store import Store, open_store

#: Writes into staging, says where, and stays.
HOLDER = """
import sys, time
from data_catalog.store import open_store
with open_store(sys.argv[1]).staging() as folder:
    (folder / "half").write_text("written")
    print(folder, flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(store: Store, *within: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that stages a file: the process and the folder."""
    command = [*within, sys.executable, "-c", HOLDER, store.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait(30)


def staged(store: Store) -> list[Path]:
    return list((store.local_root / "staging").iterdir())


def test_staging_of_a_killed_process_is_swept(store: Store) -> None:
    with holder(store) as (process, folder):
        store.sweep()
        assert len(staged(store)) == 1  # a living process keeps its folder
        assert (folder / "half").read_text() == "written"
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        open_store(store.url)  # reading commands do no more than this
        assert len(staged(store)) == 1
        store.sweep()
        assert staged(store) == []


@pytest.fixture
def namespace() -> tuple[str, ...]:
    """The command prefix for another pid namespace with the same host name."""
    prefix = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    found = shutil.which("unshare")
    if not found or subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to make a pid namespace (unshare --pid)")
    return prefix


def test_a_live_process_in_another_pid_namespace_keeps_its_folder(
    store: Store, namespace: tuple[str, ...]
) -> None:
    with holder(store, *namespace) as (process, folder):
        # its pid there is a small number, which belongs to another process here or to none
        assert not folder.parent.name.split(".")[-2].startswith(str(process.pid))
        store.sweep()
        assert (folder / "half").read_text() == "written"
    deadline = time.monotonic() + 10  # the namespace ends with its first process
    while staged(store) and time.monotonic() < deadline:
        store.sweep()
        time.sleep(0.1)
    assert staged(store) == []


def test_sweeping_from_another_pid_namespace_leaves_live_folders(
    store: Store, namespace: tuple[str, ...]
) -> None:
    code = "import sys; from data_catalog.store import Store; Store(sys.argv[1]).sweep()"
    with store.staging() as folder:
        (folder / "half").write_text("written")
        subprocess.run([*namespace, sys.executable, "-c", code, store.url], check=True)
        assert (folder / "half").read_text() == "written"


def test_a_folder_of_another_machine_is_swept_only_when_it_is_old(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems don't show the locks of other machines."""
    with holder(store) as (process, folder):
        process.kill()
        process.wait(30)
        note = folder.parent / "lock"
        note.write_text(note.read_text().partition("\n")[0] + "\nanother-boot\n")
        store.sweep()
        assert staged(store) == [folder.parent]
        for place in (note, folder.parent):
            os.utime(place, (time.time() - ABANDONED_S - 60,) * 2)
        store.sweep()
        assert staged(store) == []


def test_what_else_lies_in_staging_is_kept_until_it_is_old(store: Store) -> None:
    place = store.local_root / "staging"
    (place / "stray").write_text("somebody's")
    (place / "host.1.abcdef01").mkdir()  # without a lock: just made, or of an earlier version
    store.sweep()
    assert len(staged(store)) == 2
    os.utime(place / "host.1.abcdef01", (time.time() - ABANDONED_S - 60,) * 2)
    store.sweep()
    assert staged(store) == [place / "stray"]


def test_a_lock_excludes_other_processes_and_names_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    notes: list[str] = []
    code = (
        "import sys\nfrom pathlib import Path\nfrom data_catalog.storage.lock import lock_file\n"
        "with lock_file(Path(sys.argv[1]), 'the job'):\n    print('in', flush=True); input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(Locked, match=rf"the job is in use by process {other.pid} on .*; run again"):
        lock_file(path, "the job", wait=False).__enter__()
    assert not is_abandoned(path)

    def release(what: str, done: int, total: int, note: str) -> None:
        notes.append(json.dumps([what, note]))
        other.kill()
        other.wait(30)

    with listen(release), lock_file(path, "the job"):
        assert str(os.getpid()) in path.read_text()
        with pytest.raises(Locked):  # threads exclude each other, too
            lock_file(path, "the job", wait=False).__enter__()
    assert f"process {other.pid} on" in notes[0]
    with (
        lock_file(path, "it", shared=True),
        lock_file(path, "it", wait=False, shared=True),
        pytest.raises(Locked),
    ):
        lock_file(path, "it", wait=False).__enter__()


def test_a_file_system_without_locks_decides_by_age(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, mode: int) -> None:
        raise OSError(lock.UNSUPPORTED[0], "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with store.staging() as folder:
        (folder / "half").write_text("written")
        store.sweep()
        assert (folder / "half").exists()
