"""Locks on files, which the kernel releases when the process that holds them ends.

They protect local folders: files being written (staging) and the state of a job (scratch). A
process id is no substitute: it means another process in another container, and it is used again
after a while. Leases (``database.lease``) are for machines that share a catalogue.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data_catalog.errors import RunError
from data_catalog.progress import tick
from data_catalog.storage.process import boot_mark

#: Errors of file systems that have no locks.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
#: Seconds between two attempts of a process that waits.
RETRY_S = 0.5
#: Age (seconds) from which a lock counts as abandoned if its process ran on another machine, or on
#: this machine before a restart: some network file systems do not show locks of other machines.
ABANDONED_S = 7 * 24 * 3600.0
#: Longest time (seconds) between creating a file and locking it.
FRESH_S = 2.0


class Locked(RunError):
    """Another process holds the lock."""


@contextmanager
def lock_file(path: Path, what: str, wait: bool = True, shared: bool = False) -> Iterator[None]:
    """Hold a lock on a file while the block runs. The file stays.

    Args:
        path: Lock file; created where it is missing.
        what: Noun phrase for messages, e.g. ``the folder of job 3fa…``.
        wait: Wait while other processes hold the lock.
        shared: Let other processes hold the lock as well, if theirs is shared.

    Raises:
        Locked: Another process holds the lock and ``wait`` is False.
    """
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    waited = False
    with path.open("a+", encoding="utf-8") as file:
        while (locked := _try_lock(file.fileno(), mode)) is False:
            file.seek(0)
            holder = file.read().partition("\n")[0] or "another process"
            if not wait:
                raise Locked(f"{what} is in use by {holder}; run again when it has ended")
            waited = True
            tick("waiting", 0, 1, f"{what} is in use by {holder}")
            time.sleep(RETRY_S)
        if waited:
            tick("waiting", 1, 1, "over")
        if not shared:
            file.truncate(0)
            boot = boot_mark() if locked else ""  # without locks only the age of the file counts
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n{boot}\n")
            file.flush()
        try:
            yield
        finally:
            if not shared:
                file.truncate(0)


def is_abandoned(path: Path) -> bool:
    """Return whether the process that held an exclusive lock has ended without cleaning up.

    If the lock file is missing or empty, the age of its folder decides.
    """
    try:
        with path.open("r+", encoding="utf-8") as file:
            boot = file.read().partition("\n")[2].strip()
            if boot and _try_lock(file.fileno(), fcntl.LOCK_EX) is False:
                return False
    except FileNotFoundError:
        boot = ""
    except (PermissionError, NotADirectoryError):  # of another user, or not a staging folder
        return False
    if boot and boot == boot_mark():
        return True
    try:
        newest = max(file.stat().st_mtime for file in (path, path.parent) if file.exists())
    except (FileNotFoundError, ValueError):  # another process has just removed it
        return False
    return time.time() - newest > ABANDONED_S


def mark_in_use(file: IO[bytes]) -> None:
    """Lock an open file that no other process writes, until it is closed."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)  # waits at most for a check by ``is_in_use``
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def is_in_use(path: Path) -> bool:
    """Return whether a living process has locked a file, or has created it just now."""
    try:
        with path.open("rb") as file:
            fresh = time.time() - os.fstat(file.fileno()).st_ctime < FRESH_S
            return _try_lock(file.fileno(), fcntl.LOCK_SH) is False or fresh
    except FileNotFoundError:  # the writer has finished
        return False


def _try_lock(descriptor: int, mode: int) -> bool | None:
    """Take a lock.

    Returns:
        False if another process holds it, None if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None
    return True
