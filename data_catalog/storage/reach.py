"""Read files of a store, and repeat reads of an object store that fail for a while.

A remote read that fails for a reason that may pass (a reset connection, a timeout, status 500 or
503, an expired token) is repeated after growing pauses. If it still fails, ``OutOfReach`` is
raised, which does not mean damage. A missing object is requested again before it counts as missing.
Reads of local files are not repeated.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from upath import UPath

from data_catalog.errors import RunError
from data_catalog.storage.s3 import OutsideObject, is_s3, read_object

T = TypeVar("T")
log = logging.getLogger("geofm.reach")

#: Pauses (seconds) before further attempts: for failures that may pass, and for those that rarely
#: do (access denied, or missing).
PAUSES, FEW_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0), (0.3, 1.0)
#: Errors of a local file that is missing or of the wrong type. All other errors (permission, an
#: unreachable network file system) mean that the file could not be examined.
_MISSING_OR_WRONG = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EINVAL,
    errno.ESPIPE,
    errno.ENXIO,
    errno.ENAMETOOLONG,
)
_DENIED = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (or AWS_PROFILE)"


class OutOfReach(RunError):
    """A file could not be read now, so nothing is known about its content."""


def is_remote(path: UPath) -> bool:
    """Return whether a path is on an object store."""
    return path.protocol not in ("", "file", "local")


def is_away(error: OSError) -> bool:
    """Return whether a failed read means that the file is out of reach, not missing or wrong."""
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return not missing and error.errno not in _MISSING_OR_WRONG  # s3fs sets no number


def out_of_reach(what: object, error: BaseException, remote: bool = False) -> OutOfReach:
    """Return the error for a file that could not be read, with the remedy.

    Args:
        what: Address of the file.
        error: Cause.
        remote: Whether the file is on an object store.
    """
    lines = str(error).splitlines() or [type(error).__name__]
    reason = getattr(error, "strerror", None) or lines[0]
    if not remote:
        denied = isinstance(error, PermissionError)
        remedy = "ask for permission to read it" if denied else "try again when it can be read"
    elif _is_denied(error) or "Bad Request" in str(reason):
        remedy = f"{_DENIED}, and that they may read this bucket"
    else:
        remedy = f"check AWS_ENDPOINT_URL and the network, {_DENIED}, and try again"
    return OutOfReach(
        f"{what} could not be read ({reason}); it is not known to be damaged: {remedy}"
    )


def _is_denied(error: BaseException) -> bool:
    """Return whether a read failed because access is denied or credentials are missing."""
    from botocore.exceptions import NoCredentialsError

    return isinstance(error, PermissionError | NoCredentialsError)


@cache
def _read_errors() -> tuple[type[Exception], ...]:
    """Return the errors that fsspec's object stores raise if they cannot read."""
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError

    return OSError, BotoCoreError, ClientError, HttpError


def reach(path: UPath, read: Callable[[], T], retry: bool = True) -> T:
    """Call a function that reads a file; repeat it after growing pauses if that may help.

    Args:
        path: Address of the file, for the message. Only reads of an object store are repeated.
        read: Function that reads the file.
        retry: Repeat the read if it fails.

    Raises:
        FileNotFoundError: The file is missing, also on further attempts.
        OutOfReach: The file could not be read.
        OSError: A local file has the wrong type (a folder, a symbolic link).
    """
    if not is_remote(path):
        try:
            return read()
        except OSError as error:
            if is_away(error):
                raise out_of_reach(path, error) from error
            raise
    attempt = 0
    while True:
        try:
            return read()
        except _read_errors() as error:
            missing = isinstance(error, FileNotFoundError)
            few = missing or _is_denied(error)
            pauses: tuple[float, ...] = (FEW_PAUSES if few else PAUSES) if retry else ()
            if attempt >= len(pauses):
                if missing:
                    raise
                raise out_of_reach(path, error, remote=True) from error
            log.debug("%s: %s; the read is repeated", path, error)
            time.sleep(pauses[attempt] * (0.5 + random.random()))
            attempt += 1
            path.fs.invalidate_cache()  # the object may be missing only in an old listing


def exists(path: UPath) -> bool:
    """Return whether a file exists.

    Raises:
        OutOfReach: The store did not answer.
    """

    def look_up() -> bool:
        try:
            path.fs.info(path.path) if is_remote(path) else path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    return reach(path, look_up)


def file_size(path: UPath, retry: bool = True) -> int:
    """Return the size of a file in bytes; arguments and errors are those of ``reach``."""

    def look_up() -> int:
        return int(path.fs.info(path.path)["size"] if is_remote(path) else path.stat().st_size)

    return reach(path, look_up, retry)


def read_file(path: UPath) -> bytes:
    """Read a whole file; raises as ``reach`` does."""
    return reach(path, lambda: _whole(path) if is_remote(path) else path.read_bytes())


def _whole(path: UPath) -> bytes:
    data: bytes = path.fs.cat_file(path.path)
    return data


def read_range(path: UPath, start: int, size: int) -> bytes:
    """Read bytes of a file, fewer if the file ends before; raises as ``reach`` does."""

    def read() -> bytes:
        if not is_remote(path):
            with path.open("rb") as file:
                file.seek(start)
                # A table from an untrusted source may name a range larger than the memory.
                return bytes(file.read(min(size, max(0, path.stat().st_size - start))))
        if size <= 0:
            return b""
        if is_s3(path):
            try:
                return read_object(path.fs, path.path, start, start + size).data
            except OutsideObject:
                return b""
        data: bytes = path.fs.cat_file(path.path, start=start, end=start + size)
        if len(data) < size and start + len(data) < int(path.fs.info(path.path)["size"]):
            raise TimeoutError("the answer was cut short")
        return data

    return reach(path, read)
