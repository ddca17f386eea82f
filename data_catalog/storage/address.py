"""Addresses as users write them: of a folder, a store, a catalogue.

A local address becomes an absolute path: ``~``, a leading ``$HOME``, ``file://`` and relative
paths are understood. Addresses of catalogues are built and taken apart by SQLAlchemy, so any
character may stand in a path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote, urlsplit

from sqlalchemy import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from data_catalog.errors import UsageError
from data_catalog.redaction import MASK, mask, secrets_in

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
    """Return the address of a store: an absolute path, or ``scheme://…`` without a last slash.

    Raises:
        BadAddress: The address holds a secret, which the catalogue and Prefect would keep.
    """
    address = str(text)
    scheme = _SCHEME.match(address)
    if scheme is None or scheme[1].lower() in ("file", "local"):
        return str(local_folder(text))
    if set(secrets_in(address)) - {"user info"}:
        raise BadAddress(
            f"the store's address {mask(address)} holds a secret, which the catalogue and Prefect "
            "would keep: leave it out, and give it as the storage's own library reads it, e.g. "
            "AWS_SECRET_ACCESS_KEY, or FSSPEC_SFTP_PASSWORD for sftp"
        )
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


def parse_database(text: str) -> URL:
    """Take the address of a catalogue apart.

    Raises:
        ValueError: It is none, or a character of its password is not percent-encoded. The message
            holds nothing of the address, since it is not known which part is the password.
    """
    encode = "percent-encode special characters of a password (@ is %40, : is %3A, / is %2F)"
    try:
        url = make_url(text)
    except (ValueError, SQLAlchemyError):
        raise ValueError(f"its address can't be parsed; {encode}") from None
    rest = (url.host, url.database, *url.query)
    if url.password is not None and any("@" in (part or "") for part in rest):
        raise ValueError(
            f"its address has more than one @, so the end of the password is not clear; {encode}"
        )
    return url


def shown_address(text: str) -> str:
    """Return the address of a catalogue without its password, for people."""
    try:
        url = parse_database(text)
    except ValueError:
        scheme = _SCHEME.match(text)
        return f"{scheme[0]}…" if scheme else "…"
    return url.set(query={}).render_as_string(hide_password=True)


def holds_password(text: str) -> bool:
    """Whether the address of a catalogue holds a password, or can't be parsed and may hold one."""
    try:
        return bool(_secrets(parse_database(text)))
    except ValueError:
        return True


def hide_password(text: str, url: URL) -> str:
    """Mask the secrets of a catalogue's address in a text of its driver, which may quote them."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        for written in (secret, quote(secret, safe=""), quote_plus(secret)):
            text = text.replace(written, MASK)
    return mask(text)


def _secrets(url: URL) -> set[str]:
    """The secrets of a catalogue's address, decoded."""
    secrets = {str(url.password)} if url.password else set()
    for name, value in url.query.items():
        values = (value,) if isinstance(value, str) else value
        secrets |= {one for one in values if secrets_in(f"?{name}={quote(one, safe='')}")}
    return secrets
