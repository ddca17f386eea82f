"""A STAC API as a patient client sees it: pages of raw JSON, retried, within time limits."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
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
from urllib3.exceptions import HTTPError, ProtocolError

from data_catalog.errors import RunError, UsageError
from data_catalog.hashing import canonical
from data_catalog.redaction import mask, without_secrets, without_secrets_in
from geofm.config.credentials import base_address
from geofm.config.recipe import SearchSettings
from geofm.remote.http import READ_SIZE, Request, check_speed, send_request
from geofm.remote.json import shallow
from geofm.remote.quarantine import Quarantine, printable
from geofm.remote.retry import Fault, call_with_retries, is_passing, retry_after
from geofm.remote.url_policy import PLANET_ENV, Access, check_redirect
from geofm.stac.item import check_id
from geofm.types import Json

log = logging.getLogger("geofm.search")

PAGE = 100
#: Attempts after the first for failures that may pass.
RETRIES = 5
#: Seconds to connect (an address where nobody answers is soon told) and between two bytes.
TIMEOUT = (5.0, 60.0)
#: Bytes that an answer may have.
MAX_BYTES = 512 * 2**20
MAX_PAGES = 1000
#: Empty pages in a row after which a server is taken to page for ever.
MAX_EMPTY = 20
#: Digits that an integer may have.
MAX_DIGITS = 1000

#: What reading a strange server's answers may raise: its errors, no JSON, JSON of another shape.
STRANGE = (
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
    """The embedded planet's address.

    Raises:
        RunError: when it does not run.
    """
    url = os.environ.get(PLANET_ENV, "")
    if not url:
        raise RunError(
            f"the embedded planet does not run ({PLANET_ENV} is not set); `geofm run` starts it, "
            "or give the address of a STAC API with search.stac"
        )
    return url.rstrip("/")


def api_url(settings: SearchSettings) -> str:
    """The address to ask."""
    return planet_url() if settings.stac == "planet" else base_address(settings.stac)


class PatientIO(StacApiIO):  # type: ignore[misc, unused-ignore]
    """Requests of pystac-client, sent by our own HTTP client.

    So each address and each redirect is checked by the host policy, names are checked again when
    the connection is made, and neither ``~/.netrc`` nor cookies are used. Refusals (429, 5xx), lost
    connections and answers that are cut off are retried.

    Attributes:
        access: what may be asked.
        asked: number of requests.
    """

    def __init__(self, access: Access) -> None:
        super().__init__(max_retries=None)
        self.access = access
        self.asked = 0

    def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
        """Read an address by http(s); pystac would read any other text as a file's name."""
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
        """Send one request and return the text of its answer; one that ends too early is repeated.

        Raises:
            APIError: no answer, or one with an error status.
            RunError: the host policy refuses the address or a redirect.
        """
        try:
            request = self._request(href, method or "GET", headers or {}, parameters or {})
            status, text = call_with_retries(
                partial(self._attempt, request, without_secrets(href)), RETRIES
            )
        except Quarantine as problem:
            raise RunError(
                f"the STAC API {self.access.base} leads to an address that is not asked "
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

    def _attempt(self, request: Request, label: str) -> tuple[int, str]:
        """Send a request once and read the answer.

        Raises:
            Fault: No answer, one that ends too early, or one whose status may pass.
        """
        self.asked += 1
        try:
            response, _ = send_request(request, self.access, label)
            text = _read(response)
        except HTTPError as error:
            raise Fault(f"{type(error).__name__}: {error}") from error
        if is_passing(response.status):
            pause = retry_after(response.headers.get("retry-after", ""))
            raise Fault(text[:500], pause, status=response.status)
        return response.status, text

    def _request(
        self, href: str, method: str, headers: dict[str, str], parameters: dict[str, Any]
    ) -> Request:
        """A request to an address that is allowed.

        Raises:
            Quarantine: the address is refused, or the method is neither GET nor POST.
        """
        url = check_redirect(self.access.base, href, self.access)
        method = method.upper()
        if method not in ("GET", "POST"):
            raise Quarantine("bad_href", f"the method {method!a:.20} for {href!a:.80}")
        told = {str(name).lower(): str(value) for name, value in headers.items()}
        told |= {"accept-encoding": "gzip, deflate", "accept": "application/json, */*"}
        body = None
        if method == "POST":
            body = json.dumps(parameters).encode()
            told["content-type"] = "application/json"
        elif parameters:
            given = {name: value for name, value in parameters.items() if value is not None}
            url += ("&" if "?" in url else "?") + urlencode(given, doseq=True)
        return Request(url, told, method, body, TIMEOUT)

    def json_loads(self, txt: str, *args: Any, **kwargs: Any) -> Json:
        """JSON by the standard library, whatever else is installed.

        NaN and endless numbers are let in, so that they spoil one item and not its page.
        """
        try:
            found: Json = json.loads(txt, parse_int=_whole)
        except RecursionError:
            found = json.loads(shallow(txt), parse_int=_whole)
        return found

    def get_pages(
        self, url: str, method: str | None = None, parameters: dict[str, Any] | None = None
    ) -> Iterator[Json]:
        """Pages one after the other; a next page lies on the same server and is a new one.

        An empty page ends nothing: servers that filter after paging send some, with a next page.

        Raises:
            ValueError: when the next page is another server's or was there before, or too many
                pages in a row are empty.
        """
        seen = {canonical([url, None])}
        page = self.read_json(url, method=method, parameters=parameters)
        empty = 0
        while True:
            yield page
            empty = 0 if page.get("features") or page.get("collections") else empty + 1
            links = page.get("links") or []
            link = next((one for one in links if one.get("rel") == "next"), None)
            if link is None:
                return
            if empty > MAX_EMPTY:
                raise ValueError(f"{empty} empty pages in a row")
            link["href"] = urljoin(url, link["href"])
            if not same_server(url, link["href"]):
                raise ValueError(f"a next page on another server: {link['href']!a:.80}")
            key = canonical([link["href"], link.get("body")])
            if key in seen:
                raise ValueError("a next page that was there before")
            seen.add(key)
            page = self.read_json(Link.from_dict(link), parameters=parameters)


def _read(response: BaseHTTPResponse) -> str:
    """Read and decompress the body of an answer; the connection returns to its pool.

    Raises:
        ProtocolError: The body ends too early.
        Fault: The body arrives too slowly.
        ValueError: The body is too long, or is no UTF-8.
    """
    started, blocks, size = time.monotonic(), [], 0
    try:
        while block := response.read(READ_SIZE, decode_content=True):
            blocks.append(block)
            size += len(block)
            if size > MAX_BYTES:
                raise ValueError(f"an answer of more than {MAX_BYTES} bytes")
            check_speed(size, started, TIMEOUT[1])
    except (ProtocolError, ValueError, Fault):
        response.close()
        raise
    response.release_conn()
    return b"".join(blocks).decode("utf-8")


def _whole(text: str) -> int | float:
    """An integer; one of thousands of digits, which Python refuses to read, is infinite."""
    return int(text) if len(text) <= MAX_DIGITS else math.inf


def same_server(a: str, b: str) -> bool:
    """Whether two addresses lie on one host and port; http and https on their usual ports count."""
    one, other = urlsplit(a), urlsplit(b)
    usual = {"http": 80, "https": 443}
    if one.hostname != other.hostname or other.scheme not in usual:
        return False
    ports = [place.port or usual.get(place.scheme) for place in (one, other)]
    return ports[0] == ports[1] or set(ports) == {80, 443}


def status_of(error: APIError) -> int | None:
    """HTTP status of an error, None when there was no answer (the attribute is then missing)."""
    return getattr(error, "status_code", None)


def read_root(url: str, access: Access | None = None) -> Json:
    """What an address answers: an API's landing page, or a static catalogue.

    Raises:
        RunError: when nobody answers, or not with a JSON object.
    """
    io = PatientIO(access or Access(url))
    try:
        root = io.json_loads(io.request(url))
        if not isinstance(root, dict):
            raise ValueError("no JSON object")
    except STRANGE as error:
        raise RunError(_no_answer(url, error)) from error
    return root


def is_api(root: Json) -> bool:
    """Whether a landing page is that of an API; a static catalogue has nothing to search with."""
    links = root.get("links")
    listed = links if isinstance(links, list) else []
    rels = [link.get("rel") for link in listed if isinstance(link, dict)]
    asks = "conformsTo" in root or "search" in rels or "data" in rels
    return root.get("type") != "Collection" and asks


@dataclass(frozen=True)
class ApiConnection:
    """A STAC API: pystac-client builds the searches, and ``io`` sends their requests."""

    client: Client
    io: PatientIO


def open_api(url: str, access: Access | None = None) -> ApiConnection:
    """Connect to a STAC API.

    Raises:
        RunError: when nobody answers or the answer is no STAC API.
    """
    io = PatientIO(access or Access(url))
    try:
        return ApiConnection(Client.open(url, stac_io=io), io)
    except STRANGE as error:
        raise RunError(_no_answer(url, error)) from error


def _no_answer(url: str, error: BaseException) -> str:
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
    """An error in at most 160 characters, without line breaks."""
    return mask(printable(" ".join(f"{type(error).__name__}: {error}".split())))[:160]


def list_collections(io: PatientIO, url: str) -> dict[str, Json]:
    """The collections that the API offers, by id, as raw JSON.

    Raises:
        RunError: when the list can't be read.
    """
    found: dict[str, Json] = {}
    try:
        path, mark, query = url.partition("?")
        address = f"{path.rstrip('/')}/collections{mark}{query}"
        pages = io.get_pages(address)
        for number, page in enumerate(pages, start=1):
            for collection in page.get("collections", []):
                if isinstance(collection, dict) and has_name(collection):
                    found.setdefault(collection["id"], without_secrets_in(collection))
            if number == MAX_PAGES:
                raise ValueError(f"more than {MAX_PAGES} pages")
    except STRANGE as error:
        raise RunError(
            f"the collections of {url} cannot be read ({short(error)}); check search.stac"
        ) from error
    return found


def has_name(collection: Json) -> bool:
    """Whether a collection's id is a plain name; others are skipped with a warning."""
    try:
        check_id(collection.get("id"))
    except Quarantine as problem:
        told = ascii(collection.get("id"))[:80]
        log.warning("the collection %s is skipped: %s", told, problem.detail)
        return False
    return True


def choose_collections(offered: dict[str, Json], wanted: list[str], url: str) -> list[str]:
    """The collections to search, sorted: those asked for that exist, or all.

    Raises:
        UsageError: when none of those asked for exists.
        RunError: when the API has no collection at all.
    """
    if not offered:
        raise RunError(f"the STAC API {url} offers no collections; check search.stac")
    if not wanted:
        return sorted(offered)
    there = sorted(set(wanted) & set(offered))
    missing = sorted(set(wanted) - set(offered))
    names = ", ".join(sorted(offered)[:20])
    if not there:
        raise UsageError(
            f"search.collections: {url} offers none of {', '.join(missing)}; it offers {names}"
        )
    if missing:
        log.warning("%s lacks %s; searching %s", url, ", ".join(missing), ", ".join(there))
    return there
