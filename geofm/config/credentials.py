"""Credentials for the catalogue itself: references ``${NAME}`` in ``search.stac``.

Recipes, manifests and Prefect's database hold only the reference. Its value is read from the
environment when a request is sent, and is sent only to the catalogue's own server.
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
    """Secrets that are added to requests to the catalogue's own server.

    Attributes:
        user_info: ``user:password``; empty for none.
        fields: Query parameters, percent-encoded.
    """

    user_info: str = ""
    fields: tuple[str, ...] = ()

    @property
    def headers(self) -> dict[str, str]:
        """The header of HTTP Basic authentication; empty without user info."""
        if not self.user_info:
            return {}
        encoded = b64encode(self.user_info.encode("utf-8")).decode("ascii")
        return {"authorization": f"Basic {encoded}"}

    def add_to(self, target: str) -> str:
        """Append the query parameters to a path, which may have a query."""
        path, _, query = target.partition("?")
        present = query.split("&") if query else []
        fields = [*present, *(field for field in self.fields if field not in present)]
        return f"{path}?{'&'.join(fields)}" if fields else target


def check_address(address: str) -> None:
    """Refuse an address with a secret, or with a reference in a part that is not resolved.

    Raises:
        UsageError: With the remedy. A ValueError is avoided: pydantic would quote the address.
    """
    secrets = secrets_in(address)
    if secrets:
        raise UsageError(f"search.stac holds a secret ({', '.join(secrets)}): {REMEDY}")
    if not REFERENCE.search(address):
        return
    if not re.match(r"https?://", address) or REFERENCE.search(base_address(address)):
        raise UsageError(
            "search.stac: a reference ${NAME} is allowed only in the user info or in the query of "
            "an http(s) address"
        )


@lru_cache(maxsize=64)
def base_address(address: str) -> str:
    """Return the catalogue's address without user info and without parts that hold references."""
    if not REFERENCE.search(address):
        return address
    begin, _, rest = split_user_info(address)
    path, _, query = rest.partition("?")
    fields = [field for field in query.split("&") if field and not REFERENCE.search(field)]
    return f"{begin}{path}".rstrip("/") + ("?" + "&".join(fields) if fields else "")


def credentials_of(address: str) -> Credentials:
    """Resolve the references in a catalogue's address.

    Raises:
        UsageError: An environment variable is not set.
    """
    if not REFERENCE.search(address):
        return Credentials()
    _, user, rest = split_user_info(address)
    query = rest.partition("?")[2]
    try:
        fields = tuple(
            _resolve_field(field) for field in query.split("&") if REFERENCE.search(field)
        )
        return Credentials(_resolve_user_info(user.removesuffix("@")), fields)
    except KeyError as error:
        raise UsageError(
            f"search.stac refers to ${{{error.args[0]}}}, which is not set: set this environment "
            "variable where geofm and its workers run"
        ) from None


def check_variables(address: str) -> None:
    """Check that all variables in a catalogue's address are set.

    Raises:
        UsageError: An environment variable is not set.
    """
    credentials_of(address)


def _resolve_user_info(user: str) -> str:
    """Resolve user info; literal text is percent-decoded, values of references are not."""
    pieces = REFERENCE.split(user)  # text, name, text, name, text
    return "".join(
        resolve(f"${{{piece}}}") if number % 2 else unquote(piece)
        for number, piece in enumerate(pieces)
    )


def _resolve_field(field: str) -> str:
    """Resolve a query parameter; a bare reference is a whole query, such as an Azure SAS."""
    name, equals, value = field.partition("=")
    if not equals:
        return resolve(field).lstrip("?")
    return f"{name}={resolve(value, lambda secret: quote(secret, safe=''))}"
