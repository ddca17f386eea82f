"""Addresses as users write them: of a folder, a store, a catalogue.

A local address becomes an absolute path: ``~``, a leading ``$HOME``, ``file://`` and relative
paths are understood. Addresses of catalogues are built and taken apart by SQLAlchemy, so any
character may stand in a path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from sqlalchemy import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from data_catalog.errors import UsageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_HOME = re.compile(r"\$(HOME\b|\{HOME\})")


class BadAddress(UsageError):
    """An address that means no folder, store or catalogue."""


def local_folder(text: str | Path) -> Path:
    """Return the absolute path that a user means.

    Args:
        text: A path, perhaps with ``~``, a leading ``$HOME`` or relative; or a ``file:`` URL.

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
        raise BadAddress(f"{str(text)!r} is no path; give a folder")
    try:
        found = Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise BadAddress(f"{path}: {error}; write ./{path} for a folder of this name") from error
    return found.resolve() if ".." in found.parts else found


def folder_setting(name: str, default: Path) -> Path:
    """Return the folder that an environment variable names, or the default if it is not set."""
    text = os.environ.get(name)
    return local_folder(text) if text else default


def store_address(text: str | Path) -> str:
    """Return the address of a store: an absolute path, or ``scheme://…`` without a last slash."""
    address = str(text)
    scheme = _SCHEME.match(address)
    if scheme is None or scheme[1].lower() in ("file", "local"):
        return str(local_folder(text))
    return address.rstrip("/")


def sqlite_address(path: Path) -> str:
    """Return the SQLAlchemy address of a SQLite file, whatever characters its path has."""
    if "?" in str(path):  # begins the options of an address: the path is written as a URI then
        url = URL.create("sqlite", database=f"file:{quote(str(path))}", query={"uri": "true"})
    else:
        url = URL.create("sqlite", database=str(path))
    return url.render_as_string(hide_password=False)


def sqlite_path(address: str) -> Path | None:
    """Return the file of a SQLite address; None for other databases and for one in memory.

    Raises:
        sqlalchemy.exc.ArgumentError: The text is no address.
    """
    url = make_url(address)
    if url.get_backend_name() != "sqlite" or not url.database or ":memory:" in url.database:
        return None
    if url.database.startswith("file:") and url.query.get("uri"):
        return None if url.query.get("mode") == "memory" else local_folder(url.database)
    return local_folder(url.database)


def catalogue_address(text: str) -> str:
    """Return the address of a catalogue; the path of a SQLite file becomes absolute.

    Raises:
        sqlalchemy.exc.ArgumentError: The text is no address.
    """
    path = sqlite_path(text)
    return text if path is None or make_url(text).query else sqlite_address(path)


def shown_address(text: str) -> str:
    """Return the address of a catalogue without its password, for people."""
    try:
        url = make_url(text)
    except (ValueError, SQLAlchemyError):
        return text.partition("://")[0] + "://…"
    return url.set(query={}).render_as_string(hide_password=True)
