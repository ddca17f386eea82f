"""Reading what may be out of reach for a moment.

A read that fails for a reason that may pass (a reset connection, a timeout, an answer 500 or 503,
an expired token) is repeated after growing pauses, then it is an error of its own: ``OutOfReach``.
It is never taken for damage. An object that is missing is asked for again before it counts as
missing. Local files are not asked for again.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from upath import UPath

from data_catalog.errors import RunError
from data_catalog.storage.s3 import OutsideObject, is_s3, read_object

T = TypeVar("T")
log = logging.getLogger("geofm.reach")

#: Seconds before each further attempt: where the failure may pass, and where it hardly does
#: (access denied, or missing).
PAUSES, FEW_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0), (0.3, 1.0)
#: Failures of a local file that say that it is not what it should be. All others (permission,
#: a network file system that is away) say that it could not be looked at.
_WRONG = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ESPIPE,
    errno.ENXIO, errno.ENAMETOOLONG,
)  # fmt: skip
_DENIED = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (or AWS_PROFILE)"


class OutOfReach(RunError):
    """Something could not be read now. That says nothing about its content."""


def is_remote(path: UPath) -> bool:
    """Whether a path is on an object store."""
    return path.protocol not in ("", "file", "local")


def is_away(error: OSError) -> bool:
    """Whether a failed read of a local file says that it is out of reach, not that it is wrong."""
    gone = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return not gone and error.errno not in _WRONG  # s3fs gives no number


def out_of_reach(what: object, error: BaseException, remote: bool = False) -> OutOfReach:
    """Make the error for something that could not be read, with the remedy."""
    why = getattr(error, "strerror", None) or str(error).splitlines()[0:1] or type(error).__name__
    why = why[0] if isinstance(why, list) else why
    if not remote:
        denied = isinstance(error, PermissionError)
        remedy = "ask for permission to read it" if denied else "try again when it can be read"
    elif isinstance(error, PermissionError | NoCredentialsError) or "Bad Request" in str(why):
        remedy = f"{_DENIED}, and that they may read this bucket"
    else:
        remedy = f"check AWS_ENDPOINT_URL and the network, {_DENIED}, and try again"
    return OutOfReach(f"{what} could not be read ({why}); it is not known to be damaged: {remedy}")


@cache
def _failures() -> tuple[type[Exception], ...]:
    """What fsspec's object stores raise where they cannot read."""
    from aiohttp import ClientError as HttpError

    return OSError, BotoCoreError, ClientError, HttpError


def reach(path: UPath, read: Callable[[], T], patient: bool = True) -> T:
    """Read something, again after growing pauses where that may help.

    Args:
        path: What is read, for the message; decides whether reading is repeated.
        read: Reads it.
        patient: Repeat the read; without it one attempt has to do.

    Raises:
        FileNotFoundError: It is missing, also when asked for again.
        OutOfReach: It could not be read.
        OSError: A local file is not what it should be (a folder, a symbolic link).
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
        except _failures() as error:
            missing = isinstance(error, FileNotFoundError)
            few = missing or isinstance(error, PermissionError | NoCredentialsError)
            pauses: tuple[float, ...] = (FEW_PAUSES if few else PAUSES) if patient else ()
            if attempt >= len(pauses):
                if missing:
                    raise
                raise out_of_reach(path, error, remote=True) from error
            log.debug("%s: %s; asking again", path, error)
            time.sleep(pauses[attempt] * (0.5 + random.random()))
            attempt += 1
            path.fs.invalidate_cache()  # a listing from before may be what says "missing"


def exists(path: UPath) -> bool:
    """Whether there is a file; an error where that cannot be known.

    Raises:
        OutOfReach: It could not be found out.
    """

    def look() -> bool:
        try:
            path.fs.info(path.path) if is_remote(path) else path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    return reach(path, look)


def file_size(path: UPath, patient: bool = True) -> int:
    """Size of a file in bytes; arguments and errors are those of ``reach``."""

    def look() -> int:
        return int(path.fs.info(path.path)["size"] if is_remote(path) else path.stat().st_size)

    return reach(path, look, patient)


def read_file(path: UPath) -> bytes:
    """The bytes of a whole file; raises as ``reach`` does."""
    return reach(path, lambda: _whole(path) if is_remote(path) else path.read_bytes())


def _whole(path: UPath) -> bytes:
    data: bytes = path.fs.cat_file(path.path)
    return data


def read_range(path: UPath, start: int, size: int) -> bytes:
    """Bytes of a file, fewer where it ends before; raises as ``reach`` does."""

    def read() -> bytes:
        if not is_remote(path):
            with path.open("rb") as file:
                file.seek(start)
                # a table of a stranger may ask for more than there is memory
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
