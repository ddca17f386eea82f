"""HTTP requests to hosts that are not trusted, over pooled urllib3 connections.

`send_request` sends one request and follows its redirects; every hop is checked by the URL policy.
`open_response` does the same for an asset: it classifies the status and yields the body.

Three things protect against a hostile server:

- An address is parsed once, by ``url_policy.parse_http_url``. The host that was checked and the
  host that is connected to are the same string, so two parsers cannot disagree.
- A name is resolved when its host is checked and again when the connection is made, and its DNS
  server may answer differently. Where only public hosts are allowed, the address of the open
  socket is checked before the TLS handshake and before any byte of the request is sent.
- An answer has to begin within `ANSWER_TIMEOUTS` times the read timeout, and its body has to
  arrive at `MIN_BYTES_PER_S` or faster.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any
from urllib.parse import unquote, urljoin
from urllib.request import getproxies, proxy_bypass

import certifi
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.util import parse_url

from geofm.config.credentials import credentials_of
from geofm.remote.quarantine import Quarantine
from geofm.remote.retry import Fault, Host, host_record, is_passing, retry_after
from geofm.remote.url_policy import (
    Access,
    check_redirect,
    is_public,
    origin,
    parse_http_url,
    scheme_of,
)

MAX_REDIRECTS = 5
#: Timeout for connecting (seconds), if the read timeout is not shorter.
CONNECT_TIMEOUT_S = 10.0
#: An answer has to begin within this many read timeouts.
ANSWER_TIMEOUTS = 2.0
#: Seconds between two checks for overdue answers by the watching thread.
WATCH_INTERVAL_S = 0.5
#: Lowest speed of a body (bytes per second), after a grace period of one read timeout.
MIN_BYTES_PER_S = 10_000
#: Bytes read from a connection in one call.
READ_SIZE = 2**20
#: Largest unread rest of a body (bytes) that is read so that the connection can be reused.
MAX_DRAIN = 16 * 1024
#: Idle connections kept for each host.
MAX_IDLE = 96
#: Headers of every request.
COMMON_HEADERS = {"accept-encoding": "identity", "user-agent": "geofm"}
#: Request headers that are also sent to the host of a redirect.
FORWARDED_HEADERS = ("range", "content-type", "accept", "accept-encoding")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class CredentialsRequired(Exception):
    """The server answered 401 or 403."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


@dataclass(frozen=True)
class Request:
    """An HTTP request.

    Attributes:
        url: Address whose host has been checked.
        headers: Headers of the caller; most are not forwarded to another server.
        method: GET or POST.
        body: Body of a POST.
        timeout_s: Seconds to connect and seconds between two bytes; None for ``Access.timeout_s``.
    """

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "GET"
    body: bytes | None = None
    timeout_s: tuple[float, float] | None = None


class Answer:
    """An answer with status 200 or 206, whose body has not been read yet."""

    def __init__(self, response: urllib3.BaseHTTPResponse, timeout_s: float) -> None:
        self.response, self.timeout_s = response, timeout_s
        self.status = response.status
        self.headers = response.headers

    def read(self, limit: int) -> bytes:
        """Read the body, at most ``limit`` bytes of it.

        Raises:
            Fault: The body arrives too slowly.
        """
        started, blocks, size = time.monotonic(), [], 0
        while size < limit:
            block = self.response.read1(min(READ_SIZE, limit - size), decode_content=False)
            if not block:
                break
            blocks.append(block)
            size += len(block)
            check_speed(size, started, self.timeout_s)
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def check_speed(size: int, started: float, timeout_s: float) -> None:
    """Raise a Fault if a body arrives too slowly.

    Args:
        size: Bytes received so far.
        started: Monotonic time at which reading began, seconds.
        timeout_s: Read timeout, seconds.
    """
    elapsed = time.monotonic() - started
    if elapsed > timeout_s + size / MIN_BYTES_PER_S:
        raise Fault(f"received only {size} bytes in {elapsed:.0f} s")


@contextmanager
def open_response(
    url: str, headers: dict[str, str], access: Access, label: str, trusted: bool = False
) -> Iterator[Answer]:
    """Send a GET and yield the answer, after redirects.

    Args:
        url: Address whose host has been checked.
        headers: Request headers.
        access: Which hosts may be read, and the timeouts.
        label: Name of the address in error messages.
        trusted: The address was configured by the user and may be in a private network.

    Raises:
        Fault: For 408, 425, 429, 5xx and lost connections, which another attempt may cure.
        CredentialsRequired: For 401 and 403.
        Quarantine: For every other status, and for redirects that the policy refuses.
    """
    answered = False
    try:
        response, url = send_request(Request(url, headers), access, label, trusted)
        try:
            problem = _problem_of(response, label)
            if not isinstance(problem, Fault):
                record_of(url).answered()
                answered = True
            if problem is not None:
                raise problem
            yield Answer(response, access.timeout_s)
        finally:
            release(response, access.timeout_s)
    except HTTPError as error:
        detail = f"{type(error).__name__}: {error}"[:120]
        raise Fault(detail, host_failed=not answered) from error


def send_request(
    request: Request, access: Access, label: str, trusted: bool = False
) -> tuple[urllib3.BaseHTTPResponse, str]:
    """Send a request and follow its redirects; each target is checked before it is contacted.

    Args:
        request: Request to a host that has been checked.
        access: Which hosts may be read, and the timeouts.
        label: Name of the address in error messages.
        trusted: The address was configured by the user and may be in a private network.

    Returns:
        The response, whose body has not been read, and the address that sent it.

    Raises:
        HTTPError: There was no response.
        Quarantine: A redirect is refused, or there are too many.
    """
    for _ in range(MAX_REDIRECTS + 1):
        response = _send(request, access, trusted)
        location = response.headers.get("location", "")
        if response.status not in (301, 302, 303, 307, 308) or not location:
            return response, request.url
        release(response, access.timeout_s)
        target = check_redirect(request.url, _join(request.url, location), access)
        if origin(target) != origin(request.url):
            kept = {n: value for n, value in request.headers.items() if n in FORWARDED_HEADERS}
            request = replace(request, headers=kept)
        if response.status == 303:
            request = replace(request, method="GET", body=None)
        request, trusted = replace(request, url=target), False
    raise Quarantine("too_many_redirects", f"{label} redirects more than {MAX_REDIRECTS} times")


def _send(request: Request, access: Access, trusted: bool) -> urllib3.BaseHTTPResponse:
    """Send one request when the host's rate allows it; the body of the answer is not read."""
    scheme, host, port, _ = parse_http_url(request.url)
    target, credentials = _with_credentials(request.url, access)
    connect, read = request.timeout_s or (
        min(access.timeout_s, CONNECT_TIMEOUT_S),
        access.timeout_s,
    )
    record_of(request.url).take_turn(access.requests_per_s)
    proxy = proxy_for(scheme, host)
    urlopen: Callable[..., urllib3.BaseHTTPResponse]
    if proxy:
        urlopen = pools(access.timeout_s, proxy, False, os.getpid()).urlopen
        target = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{target}"
    else:
        public = not (trusted or access.allow_hosts or access.is_home(f"{host}:{port}"))
        connections = pools(access.timeout_s, "", public, os.getpid())
        urlopen = connections.connection_from_host(host, port, scheme).urlopen
    return urlopen(
        request.method,
        target,
        body=request.body,
        headers=COMMON_HEADERS | request.headers | credentials,
        retries=False,
        redirect=False,
        assert_same_host=False,  # host and port come from the checked address, not from target
        preload_content=False,
        decode_content=False,
        timeout=urllib3.Timeout(connect=connect, read=read),
    )


def _with_credentials(url: str, access: Access) -> tuple[str, dict[str, str]]:
    """Return a request's target and headers, with the user's credentials for the catalogue.

    Only the catalogue's own server gets them, and only over https if the catalogue's address is
    https.
    """
    scheme, host, port, target = parse_http_url(url)
    if f"{host}:{port}" != access.home or scheme != scheme_of(access.base):
        return target, {}
    credentials = credentials_of(access.stac)
    return credentials.add_to(target), credentials.headers


def record_of(url: str) -> Host:
    """Return this process's record of the host of an address."""
    return host_record(origin(url))


def release(response: urllib3.BaseHTTPResponse, timeout_s: float) -> None:
    """Return the connection to its pool; close it first if much of the body is unread."""
    unread = response.length_remaining
    if unread is None or unread > MAX_DRAIN:
        response.close()
        return
    try:
        Answer(response, timeout_s).read(unread + 1)
    except (HTTPError, Fault):
        response.close()
    response.release_conn()


def _join(url: str, location: str) -> str:
    """Return the target of a redirect, which has not been checked yet."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise Quarantine("bad_href", f"a redirect leads to no address: {location!a:.80}") from error


def _problem_of(response: urllib3.BaseHTTPResponse, label: str) -> Exception | None:
    """Classify a status: None for 200 and 206, a Fault if a retry may help, else final."""
    status = response.status
    if status in (200, 206):
        return None
    if is_passing(status):
        pause = retry_after(response.headers.get("retry-after", ""))
        return Fault(f"answers {status}", pause, host_failed=True, status=status)
    if status in (401, 403):
        return CredentialsRequired(status)
    if status in (404, 410):
        return Quarantine("not_found", f"{label} answers {status}")
    return Quarantine("http_error", f"{label} answers {status}")


# Connections


@lru_cache(maxsize=16)
def pools(timeout_s: float, proxy: str, public_only: bool, process: int) -> urllib3.PoolManager:
    """Return the connections of a process; a forked process must not use its parent's.

    Args:
        timeout_s: Read timeout, seconds.
        proxy: Address of the proxy, or empty.
        public_only: Refuse addresses that are not on the public internet.
        process: Process id.
    """
    manager: Callable[..., urllib3.PoolManager] = urllib3.PoolManager
    if proxy:
        login = parse_url(proxy).auth
        headers = urllib3.make_headers(proxy_basic_auth=unquote(login)) if login else None
        manager = partial(urllib3.ProxyManager, proxy, proxy_headers=headers)
    made = manager(
        timeout=urllib3.Timeout(connect=min(timeout_s, CONNECT_TIMEOUT_S), read=timeout_s),
        maxsize=MAX_IDLE,
        num_pools=64,
        ssl_context=_ssl_context(public_only),
    )
    made.pool_classes_by_scheme = {
        "http": _PublicHttpPool if public_only else _HttpPool,
        "https": _HttpsPool,
    }
    return made


def _ssl_context(public_only: bool) -> ssl.SSLContext:
    """Return a context that trusts the system's, certifi's and the environment's certificates.

    Verification and SSLKEYLOGFILE are those of Python's default context.
    """
    context = ssl.create_default_context()  # loads the default certificates, SSL_CERT_FILE included
    if public_only:
        context.__class__ = _PublicSslContext  # Python makes no default context of a subclass
    context.load_verify_locations(certifi.where())
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if os.environ.get(name):
            context.load_verify_locations(os.environ[name])
    return context


@lru_cache(maxsize=1024)
def proxy_for(scheme: str, host: str) -> str:
    """Return the proxy that the environment names for a host; never one for loopback."""
    if host in LOOPBACK or proxy_bypass(host):
        return ""
    named = getproxies()
    return named.get(scheme) or named.get("all") or ""


def check_peer(sock: socket.socket) -> None:
    """Close a connection that leads to a private address.

    Raises:
        Quarantine: ``host_refused``.
    """
    address = sock.getpeername()[0]
    if not is_public(address):
        sock.close()
        raise Quarantine("host_refused", f"a public name leads to the private address {address}")


class _PublicSslContext(ssl.SSLContext):
    """Checks the peer's address before the TLS handshake."""

    def wrap_socket(self, sock: socket.socket, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        check_peer(sock)
        return super().wrap_socket(sock, *args, **kwargs)


class _Http(HTTPConnection):
    def getresponse(self) -> Any:
        return _await_answer(self, super().getresponse)


class _Https(HTTPSConnection):
    def getresponse(self) -> Any:
        return _await_answer(self, super().getresponse)


class _PublicHttp(_Http):
    def connect(self) -> None:
        super().connect()  # opens the socket and sends nothing
        check_peer(self.sock)


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Http


class _PublicHttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _PublicHttp


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Https


def _await_answer(connection: HTTPConnection, getresponse: Callable[[], Any]) -> Any:
    """Read the head of an answer, within a deadline.

    A server that leaves Nagle's algorithm on and writes head and body separately holds back the
    body until its head is acknowledged, which Linux delays by up to 40 ms. TCP_QUICKACK
    acknowledges at once; the kernel forgets the option, so it is set for each answer.
    """
    if hasattr(socket, "TCP_QUICKACK"):
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    timeout = connection.timeout
    with deadline(connection.sock, ANSWER_TIMEOUTS * timeout if timeout else None):
        return getresponse()


# Deadlines: a socket's timeout restarts with every byte, so a server that sends a head byte by byte
# never exceeds it.


@dataclass
class _Wait:
    sock: socket.socket
    until: float
    expired: bool = False


@contextmanager
def deadline(sock: socket.socket | None, seconds: float | None) -> Iterator[None]:
    """Shut a connection down if the block takes longer than a number of seconds.

    Raises:
        TimeoutError: The deadline has passed.
    """
    if sock is None or seconds is None:
        yield
        return
    waits, wait = _waits(os.getpid()), _Wait(sock, time.monotonic() + seconds)
    waits[id(wait)] = wait
    try:
        yield
    finally:
        del waits[id(wait)]
        if wait.expired:
            raise TimeoutError(f"no answer began within {seconds:g} s")


@lru_cache(maxsize=2)
def _waits(process: int) -> dict[int, _Wait]:
    """Return the waits of this process, and start the thread that watches them."""
    waits: dict[int, _Wait] = {}
    threading.Thread(target=_watch, args=(waits,), daemon=True, name="geofm-watch").start()
    return waits


def _watch(waits: dict[int, _Wait]) -> None:
    pause = threading.Event()
    while not pause.wait(WATCH_INTERVAL_S):
        now = time.monotonic()
        for wait in list(waits.values()):
            if now > wait.until:
                wait.expired = True
                with suppress(OSError):  # of the plain socket: TLS would first send a message
                    socket.socket.shutdown(wait.sock, socket.SHUT_RDWR)
