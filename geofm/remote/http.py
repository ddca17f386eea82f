"""One http(s) request: pooled connections, redirects by the host policy, and answers in order.

An address is taken apart once, by the code that also checks its host. The connection is made to
exactly that host and port, so no two parsers can disagree about where a request goes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from urllib.parse import urljoin

import httpx
import urllib3
from urllib3.exceptions import HTTPError

from geofm.config.credentials import credentials_of
from geofm.remote.connections import pools, proxy_for
from geofm.remote.quarantine import Quarantine
from geofm.remote.reply import Reply
from geofm.remote.retry import Fault, Host, host_of, retry_after
from geofm.remote.sent import Sent, send
from geofm.remote.url_policy import Access, check_redirect, origin, scheme_of

Response = urllib3.BaseHTTPResponse | Reply

REDIRECTS = 5
#: An answer may take the timeout and a second for each so many bytes; slower ones are given up.
SLOWEST = 10_000
#: Bytes that are taken from a connection at once.
BLOCK = 2**20
#: Headers of every request.
COMMON = {"accept-encoding": "identity", "user-agent": "geofm"}
#: Headers of the caller that another server may see.
HARMLESS = ("range", "content-type", "accept", "accept-encoding")
#: The rest of an answer nobody needs is read up to here (bytes), so that its connection lives on.
LEFT_OVER = 16 * 1024


class Refused(Exception):
    """The server wants credentials."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


class Answer:
    """An answer with status 200 or 206 whose body is still to come."""

    def __init__(self, response: Response, timeout_s: float) -> None:
        self.response, self.timeout_s = response, timeout_s
        self.status = response.status
        self.headers = response.headers

    def take(self, most: int) -> bytes:
        """The body, or its first ``most`` bytes when there are more.

        Raises:
            Fault: when it comes too slowly.
        """
        began, blocks, size = time.monotonic(), [], 0
        while size < most:
            block = self.response.read1(min(BLOCK, most - size), decode_content=False)
            if not block:
                break
            blocks.append(block)
            size += len(block)
            if time.monotonic() - began > self.timeout_s + size / SLOWEST:
                raise Fault(f"only {size} bytes came in {time.monotonic() - began:.0f} s")
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)


@dataclass(frozen=True)
class Request:
    """One http(s) request.

    Attributes:
        url: an address whose host has been checked.
        headers: of the caller; they are not sent on to another server.
        method: GET or POST.
        body: of a POST.
        retries: urllib3's, none by default.
        timeout_s: to connect and between two bytes; by default ``Access.timeout_s``.
    """

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "GET"
    body: bytes | None = None
    retries: urllib3.Retry | bool = False
    timeout_s: tuple[float, float] | None = None


@contextmanager
def ask(
    url: str,
    headers: dict[str, str],
    access: Access,
    where: str,
    trusted: bool = False,
    sent: Sent | None = None,
) -> Iterator[Answer]:
    """An answer after redirects, each hop of which the host policy allows.

    Args:
        url: an address whose host has been checked.
        headers: of the request.
        access: what may be read, and how.
        where: the address in messages.
        trusted: the address is the user's own and may lie in a private network.
        sent: this very request, by ``send_ahead``.

    Raises:
        Fault: for what may pass; Refused: 401 and 403; Quarantine: for what stays.
    """
    answered = False
    try:
        response, url = final_response(Request(url, headers), access, where, trusted, sent)
        try:
            problem = _problem(response, where)
            if not isinstance(problem, Fault):
                record(url).answered()
                answered = True
            if problem is not None:
                raise problem
            yield Answer(response, access.timeout_s)
        finally:
            _done(response, access.timeout_s)
    except HTTPError as error:
        detail = f"{type(error).__name__}: {error}"[:120]
        raise Fault(detail, refused=not answered) from error


def final_response(
    request: Request,
    access: Access,
    where: str,
    trusted: bool = False,
    sent: Sent | None = None,
) -> tuple[Response, str]:
    """Send a request and follow its redirects, each of which is checked before it is followed.

    Args:
        request: to a host that has been checked.
        access: what may be read, and how.
        where: the address in messages.
        trusted: the address is the user's own and may lie in a private network.
        sent: this very request, by ``send_ahead``.

    Returns:
        The response, whose body is still to come, and the address that gave it.

    Raises:
        HTTPError: no response came; Quarantine: a redirect is refused, or there are too many.
    """
    for _ in range(REDIRECTS + 1):
        response = _answer_of(sent) or _send(request, access, trusted)
        sent = None
        location = response.headers.get("location", "")
        if response.status not in (301, 302, 303, 307, 308) or not location:
            return response, request.url
        _done(response, access.timeout_s)
        target = check_redirect(request.url, _follow(request.url, location), access)
        if origin(target) != origin(request.url):
            kept = {name: value for name, value in request.headers.items() if name in HARMLESS}
            request = replace(request, headers=kept)
        if response.status == 303:
            request = replace(request, method="GET", body=None)
        request, trusted = replace(request, url=target), False
    raise Quarantine("too_many_redirects", f"{where} redirects on and on")


def _answer_of(sent: Sent | None) -> Response | None:
    """The answer to what was sent; None where none begins, as when a connection's time was over."""
    with suppress(HTTPError):
        return sent.response() if sent else None
    return None


def _send(request: Request, access: Access, trusted: bool) -> urllib3.BaseHTTPResponse:
    """One request, when it is its turn; the body of the answer is left to come."""
    scheme, host, port, _ = address(request.url)
    target, own = _with_credentials(request.url, access)
    connect, read = request.timeout_s or (min(access.timeout_s, 10.0), access.timeout_s)
    record(request.url).take_turn(access.requests_per_s)
    proxy = proxy_for(scheme, host)
    urlopen: Callable[..., urllib3.BaseHTTPResponse]
    if proxy:
        urlopen = pools(access.timeout_s, proxy, False, os.getpid()).urlopen
        target = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{target}"
    else:
        urlopen = _pool(request.url, access, trusted).urlopen
    return urlopen(
        request.method,
        target,
        body=request.body,
        headers=COMMON | request.headers | own,
        retries=request.retries,
        redirect=False,
        assert_same_host=False,  # host and port come from the checked address, not from target
        preload_content=False,
        decode_content=False,
        timeout=urllib3.Timeout(connect=connect, read=read),
    )


def _with_credentials(url: str, access: Access) -> tuple[str, dict[str, str]]:
    """The target of a request, and headers, with the user's credentials for the catalogue.

    They go to the catalogue's own server alone, and by https if its address says so.
    """
    scheme, host, port, target = address(url)
    if f"{host}:{port}" != access.home or scheme != scheme_of(access.base):
        return target, {}
    credentials = credentials_of(access.stac)
    return credentials.add_to(target), credentials.headers


def _pool(url: str, access: Access, trusted: bool = False) -> urllib3.HTTPConnectionPool:
    """The connections to the host of an address, which no proxy stands before."""
    scheme, host, port, _ = address(url)
    public = not (trusted or access.allow_hosts or access.is_home(f"{host}:{port}"))
    connections = pools(access.timeout_s, "", public, os.getpid())
    return connections.connection_from_host(host, port, scheme)


def send_ahead(
    url: str, headers: dict[str, str], access: Access, signed: bool = False
) -> Sent | None:
    """Send a request whose answer ``ask`` reads; None where it has to be asked with more care.

    That is without an idle connection, with a proxy or a rate, and after a failure on the host.
    """
    scheme, host, _, _ = address(url)
    if access.requests_per_s is not None or record(url).lost or proxy_for(scheme, host):
        return None
    pool = _pool(url, access)
    target, own = _with_credentials(url, access)
    return send(pool, target, COMMON | headers | own, access.timeout_s, url if signed else "")


@lru_cache(maxsize=4096)
def address(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and target (path and query) of an http(s) address.

    Raises:
        Quarantine: ``bad_scheme`` or ``bad_href``.
    """
    host, _, port = origin(url).rpartition(":")
    return scheme_of(url), host, int(port), httpx.URL(url).raw_path.decode("ascii")


def record(url: str) -> Host:
    """What this process has met on the host of an address."""
    _, host, port, _ = address(url)
    return host_of(f"{host}:{port}")


def _done(response: Response, timeout_s: float) -> None:
    """Give the connection back, or close it where much of the answer is still to come."""
    left = response.length_remaining
    if left is None or left > LEFT_OVER:
        response.close()
        return
    try:
        Answer(response, timeout_s).take(left + 1)
    except (HTTPError, Fault):
        response.close()
    response.release_conn()


def _follow(url: str, location: str) -> str:
    """The address that a redirect leads to, not checked yet."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise Quarantine("bad_href", f"a redirect leads to no address: {location!a:.80}") from error


def _problem(response: Response, where: str) -> Exception | None:
    """None for 200 and 206; other answers are a fault that passes, or final."""
    status = response.status
    if status in (200, 206):
        return None
    if status in (408, 425, 429) or status >= 500:
        pause = retry_after(response.headers.get("retry-after", ""))
        return Fault(f"answers {status}", pause, refused=True)
    if status in (401, 403):
        return Refused(status)
    if status in (404, 410):
        return Quarantine("not_found", f"{where} answers {status}")
    return Quarantine("http_error", f"{where} answers {status}")
