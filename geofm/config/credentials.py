"""The user's credentials for the catalogue itself: references ``${NAME}`` in ``search.stac``.

A recipe, a manifest and the database of Prefect hold the reference. The value is read from the
environment when a request is sent, and it is sent to the catalogue's own server alone.
"""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, unquote

from data_catalog.errors import UsageError
from data_catalog.redaction import REFERENCE, resolve, secrets_in, split_user_info

REMEDY = (
    "write ${NAME} in its place, e.g. https://api.example/v1?token=${STAC_TOKEN} or "
    "https://${STAC_USER}:${STAC_PASSWORD}@api.example/v1, and set the variable where geofm and "
    "its workers run"
)


@dataclass(frozen=True)
class Credentials:
    """What is added to a request to the catalogue's own server.

    Attributes:
        user_info: ``user:password``, empty for none.
        fields: parameters of the query, percent-encoded.
    """

    user_info: str = ""
    fields: tuple[str, ...] = ()

    @property
    def headers(self) -> dict[str, str]:
        """The header of HTTP Basic, if there is user info."""
        if not self.user_info:
            return {}
        coded = b64encode(self.user_info.encode("utf-8")).decode("ascii")
        return {"authorization": f"Basic {coded}"}

    def add_to(self, target: str) -> str:
        """Append the parameters to a path with its query."""
        path, _, query = target.partition("?")
        there = query.split("&") if query else []
        fields = [*there, *(field for field in self.fields if field not in there)]
        return f"{path}?{'&'.join(fields)}" if fields else target


def check_address(address: str) -> None:
    """Refuse a catalogue's address that holds a secret, or a reference where none is resolved.

    Raises:
        UsageError: with the remedy. It is no ValueError, since pydantic would quote the address.
    """
    secrets = secrets_in(address)
    if secrets:
        raise UsageError(f"search.stac holds a secret ({', '.join(secrets)}): {REMEDY}")
    if not REFERENCE.search(address):
        return
    if not re.match(r"https?://", address) or REFERENCE.search(base_address(address)):
        raise UsageError(
            "search.stac: a reference ${NAME} may stand in the user info or in the query of an "
            "http(s) address only"
        )


@lru_cache(maxsize=64)
def base_address(address: str) -> str:
    """The catalogue's address without the parts that hold references, and without user info."""
    if not REFERENCE.search(address):
        return address
    begin, _, rest = split_user_info(address)
    path, _, query = rest.partition("?")
    fields = [field for field in query.split("&") if field and not REFERENCE.search(field)]
    return f"{begin}{path}".rstrip("/") + ("?" + "&".join(fields) if fields else "")


def credentials_of(address: str) -> Credentials:
    """Resolve the references of a catalogue's address.

    Raises:
        UsageError: a variable is not set.
    """
    if not REFERENCE.search(address):
        return Credentials()
    _, user, rest = split_user_info(address)
    query = rest.partition("?")[2]
    try:
        fields = tuple(_resolved(field) for field in query.split("&") if REFERENCE.search(field))
        return Credentials(_resolved_user(user.removesuffix("@")), fields)
    except KeyError as error:
        raise UsageError(
            f"search.stac refers to ${{{error.args[0]}}}, which is not set: set this environment "
            "variable where geofm and its workers run"
        ) from None


def check_variables(address: str) -> None:
    """Check that the variables to which a catalogue's address refers are set.

    Raises:
        UsageError: one is not.
    """
    credentials_of(address)


def _resolved_user(user: str) -> str:
    """User info: its literal text is percent-decoded, the values of its references are not."""
    pieces = REFERENCE.split(user)  # text, name, text, name, text
    return "".join(
        resolve(f"${{{piece}}}") if number % 2 else unquote(piece)
        for number, piece in enumerate(pieces)
    )


def _resolved(field: str) -> str:
    """A parameter; a reference alone stands for a whole query, such as an Azure SAS."""
    name, equals, value = field.partition("=")
    if not equals:
        return resolve(field).lstrip("?")
    return f"{name}={resolve(value, lambda secret: quote(secret, safe=''))}"
