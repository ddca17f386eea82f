"""The home folder of geofm's own Prefect server: ``GEOFM_HOME``, by default ~/.geofm.

The home holds the server's secret (the password that each request needs), address, database and
log. Only the user may read it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from data_catalog.errors import UsageError
from data_catalog.storage.address import folder_setting
from data_catalog.storage.atomic import write_atomic

#: File with the secret, ``geofm:`` and a random text.
AUTH_FILE = "server.auth"
#: Files of geofm in the home; the last pattern is a temporary file of a killed process.
FILES = re.compile(
    r"server\.(auth|json|port|lock|log)|worker\.(pid|lock)|pages\.port|prefect"
    r"|\.(server|worker|pages)\.\w+(\.[0-9]+)?\.[0-9a-f]{8}"
)


class HomeUnusable(UsageError):
    """The home folder cannot be made private to the user."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"GEOFM_HOME={path} {problem}; set GEOFM_HOME to a folder of your own that only geofm "
            "uses"
        )


def home() -> Path:
    """Return the home folder, created if it is missing, and closed to other users.

    Raises:
        HomeUnusable: the folder belongs to another user, is a shared folder such as /tmp, cannot be
            written, or is open to others and holds files of other programs.
    """
    folder = _path()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.geteuid():
            raise HomeUnusable(folder, "belongs to another user")
        if status.st_mode & stat.S_ISVTX or folder == Path("/"):
            raise HomeUnusable(folder, "is a folder that other programs use too")
        if status.st_mode & 0o077:
            _check_own(folder, status.st_mode)
            folder.chmod(0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise HomeUnusable(folder, "cannot be written")
    except OSError as error:
        raise HomeUnusable(folder, f"cannot be used ({error.strerror})") from error
    return folder


def _check_own(folder: Path, mode: int) -> None:
    """Check that a folder that other users may enter holds only files of geofm.

    An empty folder that other users may read is accepted, because mkdir creates it like this.
    """
    names = sorted(path.name for path in folder.iterdir())
    other = [name for name in names if not FILES.fullmatch(name)]
    if other:
        raise HomeUnusable(folder, f"is open to other users and holds other files ({other[0]!r})")
    if not names and mode & 0o022:
        raise HomeUnusable(folder, "is a folder that other users may write")


def _path() -> Path:
    return folder_setting("GEOFM_HOME", Path.home() / ".geofm")


def home_mark() -> str:
    """Return a text that differs between the home folder and a copy of it (device and inode)."""
    status = home().stat()
    return f"{status.st_dev}:{status.st_ino}"


def auth_string() -> str:
    """Return the home's secret: ``geofm:`` and 43 random characters, created if it is missing.

    A secret that another user could have read or written is replaced. If two commands may start at
    the same time, the caller must hold the home's lock.
    """
    folder = home()
    if not (text := known_auth_string()):
        text = f"geofm:{secrets.token_urlsafe(32)}"
        write_private(folder / AUTH_FILE, text)
    return text


def known_auth_string() -> str:
    """Return the home's secret; empty if it is missing or not private to the user."""
    path = _path() / AUTH_FILE
    try:
        status = path.lstat()
        private = status.st_uid == os.geteuid() and not status.st_mode & 0o077
        text = path.read_text().strip() if stat.S_ISREG(status.st_mode) and private else ""
    except (OSError, UnicodeError):
        return ""
    user, _, password = text.partition(":")
    plain = text.isascii() and text.isprintable() and " " not in text
    return text if plain and user and len(password) >= 20 else ""


def write_private(path: Path, text: str) -> None:
    """Write a file for the user alone, in one step: readers see the old file or the new one."""
    try:
        write_atomic(path, text.encode(), mode=0o600)
    except OSError as error:
        raise HomeUnusable(path.parent, f"cannot be written ({error})") from error


def read_note(name: str) -> dict[str, Any]:
    """Return the JSON object in a file of the home; empty if it is missing or damaged."""
    try:
        note = json.loads((_path() / name).read_text())
    except (OSError, ValueError, RecursionError):  # UnicodeError is a ValueError
        return {}
    return note if isinstance(note, dict) else {}


def write_note(name: str, note: dict[str, Any]) -> None:
    """Write a JSON object to a file of the home."""
    write_private(home() / name, json.dumps(note))
