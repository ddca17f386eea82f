"""Reading a STAC API: landing page, collections and pages, as raw JSON.

Requests of pystac-client are sent by geofm's own HTTP client, so that every address and redirect
obeys the host policy, and failures that may pass are retried.
"""

from __future__ import annotations

import json
import logging
import math
import os
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

import pystac
from pystac import Link
from pystac_client import Client
from pystac_client.errors import ClientTypeError
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ProxyError,
    SSLError,
)

from data_catalog.errors import RunError, UsageError
from data_catalog.hashing import canonical
from data_catalog.redaction import mask, printable, without_secrets, without_secrets_in
from geofm.config.credentials import base_address
from geofm.config.recipe import SearchSettings
from geofm.remote.http import READ_SIZE, Request, check_speed, send_request
from geofm.remote.json import shallow
from geofm.remote.quarantine import Quarantine
from geofm.remote.retry import Fault, call_with_retries, is_passing, retry_after
from geofm.remote.url_policy import PLANET_ENV, Access, check_redirect
from geofm.stac.item import check_id
from geofm.types import Json

log = logging.getLogger("geofm.search")

#: Retries of a request that fails for a passing reason.
RETRIES = 5
#: Retries if no connection can be made: a wrong address is reported soon.
CONNECT_RETRIES = 2
#: Not retried although it is a 5xx: the server does not know a parameter of the query.
NOT_IMPLEMENTED = 501
#: Seconds to connect, and between two bytes.
TIMEOUT = (5.0, 60.0)
#: Largest answer (bytes).
MAX_BYTES = 512 * 2**20
#: Bytes that are read of an answer with an error status.
MAX_ERROR_BYTES = 64 * 1024
MAX_PAGES = 1000
#: Most empty pages in a row; a server with more would page without an end.
MAX_EMPTY = 20
#: Most digits of an integer.
MAX_DIGITS = 1000

#: Exceptions of reading a server's answers: HTTP errors, no JSON, or JSON of another structure.
API_ERRORS = (
    APIError,
    ClientTypeError,
    pystac.STACError,
    pystac.STACTypeError,
    NotImplementedError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)


def planet_url() -> str:
    """Return the address of the embedded planet.

    Raises:
        RunError: The planet does not run.
    """
    url = os.environ.get(PLANET_ENV, "")
    if not url:
        raise RunError(
            f"the embedded planet does not run ({PLANET_ENV} is not set); `geofm run` starts it, "
            "or give the address of a STAC API with search.stac"
        )
    return url.rstrip("/")


def api_url(settings: SearchSettings) -> str:
    """Return the address of the catalogue, without credentials."""
    return planet_url() if settings.stac == "planet" else base_address(settings.stac)


class StacRequests(StacApiIO):  # type: ignore[misc, unused-ignore]
    """Sends the requests of pystac-client by geofm's own HTTP client.

    The host policy checks each address and each redirect, and host names again when a connection is
    made. Neither ``~/.netrc`` nor cookies are used. Status 408, 425, 429 and 5xx except 501, lost
    connections and truncated answers are retried; a connection that can't be made is retried less
    often, and a failed TLS handshake is not.

    Attributes:
        access: Rules for reading.
        count: Number of requests sent.
    """

    def __init__(self, access: Access) -> None:
        super().__init__(max_retries=None)
        self.access = access
        self.count = 0

    def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
        """Read an address by http(s) only; pystac would open other texts as files."""
        if isinstance(source, pystac.Link):
            text: str = super().read_text(source, *args, **kwargs)
            return text
        return self.request(str(source), *args, **kwargs)

    def request(
        self,
        href: str,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> str:
        """Send a request, with retries, and return the text of the answer.

        Raises:
            APIError: There is no answer, or its status is an error.
            RunError: The host policy refuses the address or a redirect.
        """
        try:
            request = self._request(href, method or "GET", headers or {}, parameters or {})
            attempt = partial(self._attempt, request, without_secrets(href), [])
            status, text = call_with_retries(attempt, RETRIES, before_retry=_log_retry)
        except Quarantine as problem:
            raise RunError(
                f"the STAC API {self.access.base} leads to an address that is not allowed "
                f"({problem.detail}); check search.stac and search.allow_hosts"
            ) from problem
        except Fault as fault:
            failure = APIError(mask(str(fault)))
            if fault.status is not None:
                failure.status_code = fault.status
            raise failure from None
        if 200 <= status < 300:
            return text
        failure = APIError(mask(text[:500]))
        failure.status_code = status
        raise failure

    def _attempt(
        self, request: Request, label: str, unconnected: list[HTTPError]
    ) -> tuple[int, str]:
        """Send a request once and read the answer.

        Args:
            request: The request.
            label: Its address in error messages.
            unconnected: Errors of this request's attempts to connect; a further one is appended.

        Raises:
            Fault: There is no answer, it is truncated, or its status may pass.
            APIError: There is no answer, and another attempt is of no use.
        """
        self.count += 1
        try:
            response, _ = send_request(request, self.access, label)
            status = response.status
            text = _read_text(response) if 200 <= status < 300 else _read_error(response)
        except HTTPError as error:
            detail = f"{type(error).__name__}: {error}"
            cause = error.original_error if isinstance(error, ProxyError) else error
            if isinstance(cause, (ConnectTimeoutError, NewConnectionError)):
                unconnected.append(error)
            if _is_refusal_of_tls(cause) or len(unconnected) > CONNECT_RETRIES:
                raise APIError(mask(detail)) from error
            raise Fault(detail) from error
        if is_passing(status) and status != NOT_IMPLEMENTED:
            pause = retry_after(response.headers.get("retry-after", ""))
            raise Fault(text[:500], pause, status=status)
        return status, text

    def _request(
        self, href: str, method: str, headers: dict[str, str], parameters: dict[str, Any]
    ) -> Request:
        """Build a request to an allowed address.

        Raises:
            Quarantine: The address is refused, or the method is neither GET nor POST.
        """
        url = check_redirect(self.access.base, href, self.access)
        method = method.upper()
        if method not in ("GET", "POST"):
            raise Quarantine("bad_href", f"the method {method!a:.20} for {href!a:.80}")
        sent_headers = {str(name).lower(): str(value) for name, value in headers.items()}
        sent_headers |= {"accept-encoding": "gzip, deflate", "accept": "application/json, */*"}
        body = None
        if method == "POST":
            body = json.dumps(parameters).encode()
            sent_headers["content-type"] = "application/json"
        elif parameters:
            fields = {name: value for name, value in parameters.items() if value is not None}
            url += ("&" if "?" in url else "?") + urlencode(fields, doseq=True)
        return Request(url, sent_headers, method, body, TIMEOUT)

    def json_loads(self, txt: str, *args: Any, **kwargs: Any) -> Json:
        """Parse JSON by the standard library, even if pystac-client would use another parser.

        NaN and huge numbers are accepted here, so that they quarantine an item and not its page.
        """
        try:
            content: Json = json.loads(txt, parse_int=_parse_integer)
        except RecursionError:
            content = json.loads(shallow(txt), parse_int=_parse_integer)
        return content

    def get_pages(
        self, url: str, method: str | None = None, parameters: dict[str, Any] | None = None
    ) -> Iterator[Json]:
        """Yield the pages of a search or of the list of collections.

        An empty page is not the end: servers that filter after paging send empty pages that have a
        next page.

        Raises:
            ValueError: The next page is on another server or was read before, or too many pages in
                a row are empty.
        """
        seen = {canonical([url, None])}
        page = self.read_json(url, method=method, parameters=parameters)
        empty = 0
        while True:
            yield page
            empty = 0 if page.get("features") or page.get("collections") else empty + 1
            links = page.get("links") or []
            link = next((entry for entry in links if entry.get("rel") == "next"), None)
            if link is None:
                return
            if empty > MAX_EMPTY:
                raise ValueError(f"{empty} empty pages in a row")
            link["href"] = urljoin(url, link["href"])
            if not same_server(url, link["href"]):
                raise ValueError(f"a next page on another server: {link['href']!a:.80}")
            key = canonical([link["href"], link.get("body")])
            if key in seen:
                raise ValueError("a next page that was read before")
            seen.add(key)
            page = self.read_json(Link.from_dict(link), parameters=parameters)


def _log_retry(fault: Fault, pause: float) -> None:
    log.info("search: requesting again in %.1f s (%s)", pause, short(fault))


def _is_refusal_of_tls(error: BaseException) -> bool:
    """Check for a failed TLS handshake, e.g. by a certificate; a lost connection is none."""
    cause = error.args[0] if isinstance(error, SSLError) and error.args else None
    lost = isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
    return isinstance(error, SSLError) and not lost


def _read_text(response: BaseHTTPResponse) -> str:
    """Read the body of an answer.

    Raises:
        HTTPError: The body is damaged or ends too early.
        Fault: The body arrives too slowly.
        ValueError: The body is too long, or is no UTF-8.
    """
    body = _read(response, MAX_BYTES)
    if len(body) > MAX_BYTES:
        raise ValueError(f"an answer of more than {MAX_BYTES} bytes")
    return body.decode("utf-8")


def _read_error(response: BaseHTTPResponse) -> str:
    """Read the beginning of an answer with an error status; damage does not hide the status."""
    body = b""
    with suppress(HTTPError, Fault):
        body = _read(response, MAX_ERROR_BYTES)[:MAX_ERROR_BYTES]
    return body.decode("utf-8", errors="replace") or f"HTTP {response.status}"


def _read(response: BaseHTTPResponse, limit: int) -> bytes:
    """Read and decompress a body, up to ``limit`` + 1 bytes.

    The connection returns to its pool if the body was read to its end, and is closed otherwise.
    """
    started, size = time.monotonic(), 0
    blocks: list[bytes] = []
    try:
        while size <= limit:
            block = response.read(min(READ_SIZE, limit + 1 - size), decode_content=True)
            if not block:
                response.release_conn()
                return b"".join(blocks)
            blocks.append(block)
            size += len(block)
            check_speed(size, started, TIMEOUT[1])
    except (HTTPError, Fault):
        response.close()
        raise
    response.close()
    return b"".join(blocks)


def _parse_integer(text: str) -> int | float:
    """Parse an integer; infinity if it has more digits than Python reads."""
    return int(text) if len(text) <= MAX_DIGITS else math.inf


def same_server(a: str, b: str) -> bool:
    """Check for equal host and port; http and https on their default ports are equal."""
    first, second = urlsplit(a), urlsplit(b)
    default_ports = {"http": 80, "https": 443}
    if first.hostname != second.hostname or second.scheme not in default_ports:
        return False
    ports = [parts.port or default_ports.get(parts.scheme) for parts in (first, second)]
    return ports[0] == ports[1] or set(ports) == {80, 443}


def status_of(error: APIError) -> int | None:
    """Return the HTTP status of an error; None without an answer."""
    return getattr(error, "status_code", None)


def read_root(url: str, access: Access | None = None) -> Json:
    """Read the landing page of an API, or the root of a static catalogue.

    Raises:
        RunError: There is no answer, or it is no JSON object.
    """
    io = StacRequests(access or Access(url))
    try:
        root = io.json_loads(io.request(url))
        if not isinstance(root, dict):
            raise ValueError("no JSON object")
    except API_ERRORS as error:
        raise RunError(_no_answer(url, error)) from error
    return root


def is_api(root: Json) -> bool:
    """Check whether a landing page is that of an API, not of a static catalogue."""
    links = root.get("links")
    links = links if isinstance(links, list) else []
    rels = [link.get("rel") for link in links if isinstance(link, dict)]
    searchable = "conformsTo" in root or "search" in rels or "data" in rels
    return root.get("type") != "Collection" and searchable


@dataclass(frozen=True)
class ApiConnection:
    """A STAC API: ``client`` builds the searches, ``io`` sends their requests."""

    client: Client
    io: StacRequests


def open_api(url: str, access: Access | None = None) -> ApiConnection:
    """Connect to a STAC API.

    Raises:
        RunError: There is no answer, or it is not that of a STAC API.
    """
    io = StacRequests(access or Access(url))
    try:
        return ApiConnection(Client.open(url, stac_io=io), io)
    except API_ERRORS as error:
        raise RunError(_no_answer(url, error)) from error


def _no_answer(url: str, error: BaseException) -> str:
    """Explain that an address can't be read as a STAC API."""
    if isinstance(error, json.JSONDecodeError) or not isinstance(error, APIError):
        return (
            f"the address {url} answers, but not as a STAC API does ({short(error)}); check "
            "search.stac, it must be the API's landing page"
        )
    if status_of(error) is not None:
        return (
            f"the STAC API {url} answers with HTTP {status_of(error)}; check search.stac and "
            "whether the API is up, then run again"
        )
    return (
        f"the STAC API {url} cannot be reached ({short(error)}); check search.stac and the "
        "network, then run again"
    )


def short(error: BaseException) -> str:
    """Format an error in at most 160 characters, without line breaks and secrets."""
    return mask(printable(" ".join(f"{type(error).__name__}: {error}".split())))[:160]


def list_collections(io: StacRequests, url: str) -> dict[str, Json]:
    """Return the collections of the API as raw JSON, by id.

    Raises:
        RunError: The list can't be read.
    """
    collections: dict[str, Json] = {}
    try:
        path, mark, query = url.partition("?")
        address = f"{path.rstrip('/')}/collections{mark}{query}"
        pages = io.get_pages(address)
        for number, page in enumerate(pages, start=1):
            for collection in page.get("collections", []):
                if isinstance(collection, dict) and has_name(collection):
                    collections.setdefault(collection["id"], without_secrets_in(collection))
            if number == MAX_PAGES:
                raise ValueError(f"more than {MAX_PAGES} pages")
    except API_ERRORS as error:
        raise RunError(
            f"the collections of {url} cannot be read ({short(error)}); check search.stac"
        ) from error
    return collections


def has_name(collection: Json) -> bool:
    """Check that a collection's id is a plain name; warn that it is skipped if not."""
    try:
        check_id(collection.get("id"))
    except Quarantine as problem:
        name = ascii(collection.get("id"))[:80]
        log.warning("the collection %s is skipped: %s", name, problem.detail)
        return False
    return True


def choose_collections(offered: dict[str, Json], wanted: list[str], url: str) -> list[str]:
    """Choose the collections to search: the wanted collections that exist, or all; sorted.

    Raises:
        UsageError: None of the wanted collections exists.
        RunError: The API has no collections.
    """
    if not offered:
        raise RunError(f"the STAC API {url} offers no collections; check search.stac")
    if not wanted:
        return sorted(offered)
    available = sorted(set(wanted) & set(offered))
    missing = sorted(set(wanted) - set(offered))
    names = ", ".join(sorted(offered)[:20])
    if not available:
        raise UsageError(
            f"search.collections: {url} offers none of {', '.join(missing)}; it offers {names}"
        )
    if missing:
        log.warning("%s lacks %s; searching %s", url, ", ".join(missing), ", ".join(available))
    return available
