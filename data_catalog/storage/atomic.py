"""Atomic writing of local files and folders: write beside the final place, then rename.

atomic_file      a file that is written in a block
write_atomic     a file whose bytes are in memory
atomic_folder    a folder that is written in a block
move_folder      a folder that was written somewhere else on the same file system

A reader sees the old content or the new content, never a part of it, also if the writer is killed.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_catalog.storage.lock import mark_in_use


def _temporary_name(target: Path) -> Path:
    """Return a new hidden name in the folder of the target: ``.NAME.`` and 8 random digits."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")


@contextmanager
def atomic_file(
    path: Path, sync: bool = False, lock: bool = False, mode: int = 0o666
) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of ``path`` at the end of the block.

    If the block raises, ``path`` stays as it was and nothing is left beside it.

    Args:
        path: Final path; its folder must exist.
        sync: Wait until the content is on the disk, so that it survives a crash of the machine.
        lock: Lock the file while it is written, so that ``is_in_use`` can distinguish it from the
            remains of a killed process, which match ``.NAME.*``.
        mode: Permission bits, as for ``os.open``.
    """
    temporary = _temporary_name(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            if lock:
                mark_in_use(file)
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write the bytes of a file in one atomic step."""
    with atomic_file(path, mode=mode) as file:
        file.write(data)


@contextmanager
def atomic_folder(
    target: Path, is_complete: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield a new empty folder that becomes ``target`` at the end of the block.

    If the block raises, the folder is removed.

    Args:
        target: Final path; folders above it are created.
        is_complete: See ``move_folder``.
    """
    temporary = _temporary_name(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        move_folder(temporary, target, is_complete)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_folder(
    folder: Path, target: Path, is_complete: Callable[[Path], bool] | None = None
) -> None:
    """Rename a folder to its final path.

    Args:
        folder: Folder on the same file system.
        target: Final path; the folders above it are created.
        is_complete: Returns whether the folder at ``target`` is complete. If so, another process
            wrote the same content first, and its folder stays. None if that must not happen.

    Raises:
        OSError: The rename failed, e.g. because ``target`` exists and is not complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError:
        if is_complete is None or not is_complete(target):
            raise
