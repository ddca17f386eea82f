"""Addresses of catalogues: SQLite files and databases, parsed by SQLAlchemy.

SQLAlchemy builds and parses the addresses, so the path of a SQLite file may have any character.
Passwords are never shown.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, quote_plus

from sqlalchemy import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from data_catalog.redaction import MASK, mask, secrets_in
from data_catalog.storage.address import SCHEME, local_folder


def sqlite_address(path: Path) -> str:
    """Return the SQLAlchemy address of a SQLite file, whatever characters its path has."""
    if "?" in str(path):  # a question mark starts the options, so the path is written as a URI
        url = URL.create("sqlite", database=f"file:{quote(str(path))}", query={"uri": "true"})
    else:
        url = URL.create("sqlite", database=str(path))
    return url.render_as_string(hide_password=False)


def sqlite_path(address: str) -> Path | None:
    """Return the file of a SQLite address; None for other databases and databases in memory.

    Raises:
        sqlalchemy.exc.ArgumentError: The text is not an address.
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
        sqlalchemy.exc.ArgumentError: The text is not an address.
    """
    path = sqlite_path(text)
    return text if path is None or make_url(text).query else sqlite_address(path)


def parse_database(text: str) -> URL:
    """Parse the address of a catalogue.

    Raises:
        ValueError: It is not an address, or a character of its password is not percent-encoded. The
            message omits the address, because the password in it cannot be identified.
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
    """Return the address of a catalogue without its password, for messages."""
    try:
        url = parse_database(text)
    except ValueError:
        scheme = SCHEME.match(text)
        return f"{scheme[0]}…" if scheme else "…"
    return url.set(query={}).render_as_string(hide_password=True)


def hide_password(text: str, url: URL) -> str:
    """Mask the secrets of a catalogue's address in a message of its driver."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        for spelling in (secret, quote(secret, safe=""), quote_plus(secret)):
            text = text.replace(spelling, MASK)
    return mask(text)


def _secrets(url: URL) -> set[str]:
    """Return the secrets of a catalogue's address, decoded."""
    secrets = {str(url.password)} if url.password else set()
    for name, value in url.query.items():
        values = (value,) if isinstance(value, str) else value
        secrets |= {text for text in values if secrets_in(f"?{name}={quote(text, safe='')}")}
    return secrets
