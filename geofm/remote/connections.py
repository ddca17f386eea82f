"""Connections of a process: kept alive, trusted, and never to another kind of host than was meant.

A name is resolved when its host is checked, and again when the connection is made; who answers for
the name may give another address the second time. So where only public hosts are allowed, the
address that was really reached is looked at before anything is sent to it.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import certifi
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url

from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import is_public

#: An answer may begin so many times the timeout after it was asked for.
PATIENCE = 2.0
#: How often the watching thread looks (seconds).
LOOK_S = 0.5


@dataclass
class _Wait:
    door: socket.socket
    until: float
    over: bool = False


@contextmanager
def limited(door: socket.socket | None, seconds: float | None) -> Iterator[None]:
    """Cut a connection off when the block takes longer than so many seconds.

    Raises:
        TimeoutError: when that happened.
    """
    if door is None or seconds is None:
        yield
        return
    waits, wait = _waits(os.getpid()), _Wait(door, time.monotonic() + seconds)
    waits[id(wait)] = wait
    try:
        yield
    finally:
        del waits[id(wait)]
        if wait.over:
            raise TimeoutError(f"no answer began within {seconds:g} s")


@lru_cache(maxsize=2)
def _waits(process: int) -> dict[int, _Wait]:
    """What the watching thread of this process looks at."""
    waits: dict[int, _Wait] = {}
    threading.Thread(target=_watch, args=(waits,), daemon=True, name="geofm-watch").start()
    return waits


def _watch(waits: dict[int, _Wait]) -> None:
    pause = threading.Event()
    while not pause.wait(LOOK_S):
        now = time.monotonic()
        for wait in list(waits.values()):
            if now > wait.until:
                wait.over = True
                with suppress(OSError):  # the plain socket's: TLS has nothing to say any more
                    socket.socket.shutdown(wait.door, socket.SHUT_RDWR)


T = TypeVar("T")
#: Connections to one host that are kept open.
MOST = 96
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@lru_cache(maxsize=16)
def pools(timeout_s: float, proxy: str, public: bool, process: int) -> urllib3.PoolManager:
    """The connections of a process (a fork must not share its parent's).

    Args:
        timeout_s: to connect (at most 10) and between two bytes.
        proxy: its address, or empty.
        public: refuse addresses that are not on the public internet.
        process: its id.
    """
    trusted = ssl.create_default_context()
    trusted.load_verify_locations(certifi.where())
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # the default has SSL_CERT_FILE
        if os.environ.get(name):
            trusted.load_verify_locations(os.environ[name])
    make: Callable[..., urllib3.PoolManager] = urllib3.PoolManager
    if proxy:
        login = parse_url(proxy).auth
        told = urllib3.make_headers(proxy_basic_auth=unquote(login)) if login else None
        make = partial(urllib3.ProxyManager, proxy, proxy_headers=told)
    made = make(
        timeout=urllib3.Timeout(connect=min(timeout_s, 10.0), read=timeout_s),
        maxsize=MOST,
        num_pools=64,
        ssl_context=trusted,
    )
    made.pool_classes_by_scheme = _PUBLIC if public else _ANY
    return made


@lru_cache(maxsize=1024)
def proxy_for(scheme: str, host: str) -> str:
    """The proxy that the environment names for a host; loopback never goes by one."""
    if host in LOOPBACK or proxy_bypass(host):
        return ""
    named = getproxies()
    return named.get(scheme) or named.get("all") or ""


def await_answer(connection: Any, getresponse: Callable[[], T]) -> T:
    """What reads the head of an answer does, unless that takes too long."""
    timeout = connection.timeout
    acknowledge_at_once(connection.sock)
    with limited(connection.sock, PATIENCE * timeout if timeout else None):
        return getresponse()


def acknowledge_at_once(door: socket.socket) -> None:
    """Acknowledge the next packets at once rather than after up to 40 ms (Linux).

    A server that leaves Nagle's algorithm on and writes headers and body apart holds the body
    back until its headers are acknowledged. The kernel forgets the option with each request.
    """
    if hasattr(socket, "TCP_QUICKACK"):
        door.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _public(door: socket.socket) -> socket.socket:
    address = door.getpeername()[0]
    if not is_public(address):
        door.close()
        raise Quarantine("host_refused", f"a public name leads to the private address {address}")
    return door


class _Http(HTTPConnection):
    def getresponse(self) -> Any:
        return await_answer(self, super().getresponse)


class _Https(HTTPSConnection):
    def getresponse(self) -> Any:
        return await_answer(self, super().getresponse)


class _PublicHttp(_Http):
    def _new_conn(self) -> socket.socket:
        return _public(super()._new_conn())


class _PublicHttps(_Https):
    def _new_conn(self) -> socket.socket:
        return _public(super()._new_conn())


def _by_scheme(http: Any, https: Any) -> dict[str, Any]:
    return {
        "http": type("Pool", (urllib3.HTTPConnectionPool,), {"ConnectionCls": http}),
        "https": type("Pool", (urllib3.HTTPSConnectionPool,), {"ConnectionCls": https}),
    }


_ANY, _PUBLIC = _by_scheme(_Http, _Https), _by_scheme(_PublicHttp, _PublicHttps)
