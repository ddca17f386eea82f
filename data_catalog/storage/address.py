"""Addresses of folders and stores, as users write them.

A local address becomes an absolute path: ``~``, a leading ``$HOME``, ``file://`` and relative
paths are resolved.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_catalog.errors import UsageError
from data_catalog.redaction import mask, secrets_in

#: Scheme of an address, e.g. ``s3://``.
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_HOME = re.compile(r"\$(HOME\b|\{HOME\})")


class BadAddress(UsageError):
    """An address that is not one of a folder, store or catalogue."""


def local_folder(text: str | Path) -> Path:
    """Return the absolute path of a folder.

    Args:
        text: Absolute or relative path, with ``~`` or a leading ``$HOME`` if wanted; or a ``file:``
            URL.

    Raises:
        BadAddress: The text is empty, names another host or an unknown user.
    """
    path = str(text)
    if re.match(r"file:|local://", path):
        parts = urlsplit(path.replace("?", "%3F").replace("#", "%23"))
        if parts.netloc not in ("", "localhost"):
            raise BadAddress(f"{path}: a file address names no host; write file:///folder")
        path = unquote(parts.path)
    elif _HOME.match(path):
        path = _HOME.sub(lambda _: str(Path.home()), path, count=1)
    if not path or "\0" in path:
        raise BadAddress(f"{str(text)!r} is not a path; give a folder")
    try:
        folder = Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise BadAddress(f"{path}: {error}; write ./{path} for a folder of this name") from error
    return folder.resolve() if ".." in folder.parts else folder


def folder_setting(name: str, default: Path) -> Path:
    """Return the folder in an environment variable, or the default if it is not set."""
    text = os.environ.get(name)
    return local_folder(text) if text else default


def store_address(text: str | Path) -> str:
    """Return the address of a store: an absolute path, or ``scheme://…`` without a last slash.

    Raises:
        BadAddress: The address holds a secret, which the catalogue and Prefect would keep.
    """
    address = str(text)
    scheme = SCHEME.match(address)
    if scheme is None or scheme[1].lower() in ("file", "local"):
        return str(local_folder(text))
    if set(secrets_in(address)) - {"user info"}:
        raise BadAddress(
            f"the store's address {mask(address)} holds a secret, which the catalogue and Prefect "
            "would store: leave it out, and set the variable of the storage's own library, e.g. "
            "AWS_SECRET_ACCESS_KEY, or FSSPEC_SFTP_PASSWORD for sftp"
        )
    return address.rstrip("/")
