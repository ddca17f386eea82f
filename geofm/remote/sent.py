"""Requests that are on their way: who sent them reads their answers later, without a thread.

A thread for each request would have to be woken for its answer and wait for the interpreter's lock,
which takes longer than the request itself where the network is near. So where a connection is open
and idle the request is written to it at once, and the answer waits in the kernel until it is
wanted. Threads open connections and do all that takes more than one request.

Connections are urllib3's and go back to it; in between a GET is written to the socket here, and the
answer is read by ``reply.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

import urllib3

from data_catalog.crew import kept_waiting
from geofm.remote.connections import acknowledge_at_once
from geofm.remote.reply import FAR_S, Reply

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")
#: A line of a request.
LINE = re.compile(r"[!-~]+( [!-~]+)*")


class Call(Protocol[T_co]):
    """Something that was begun, as a ``concurrent.futures.Future`` is."""

    def result(self) -> T_co:
        """What comes of it, waited for."""

    def cancel(self) -> bool:
        """Nobody waits for it any more."""


def wait_for(call: Call[T]) -> T:
    """What comes of a call; other work goes on meanwhile when that takes long."""
    if isinstance(call, Future):
        with suppress(TimeoutError):
            return cast(T, call.result(FAR_S))
        kept_waiting()
    return call.result()


@dataclass
class Sent:
    """A request whose answer is still to be read, once.

    Attributes:
        signed: the signed address that was asked; empty for the asset's own.
    """

    pool: urllib3.HTTPConnectionPool
    timeout_s: float
    signed: str
    connection: Any

    @property
    def waits(self) -> bool:
        """Whether the answer is still to be read."""
        return self.connection is not None

    def response(self) -> Reply:
        """The answer, its body still to come.

        Raises:
            HTTPError: when there is none.
        """
        connection, self.connection = self.connection, None
        return Reply(self.pool, connection, self.timeout_s)

    def cancel(self) -> bool:
        """Close the connection of an answer that nobody has read; whether there was one."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()
            self.pool._put_conn(connection)
        return connection is not None


def send(
    pool: urllib3.HTTPConnectionPool,
    target: str,
    headers: dict[str, str],
    timeout_s: float,
    signed: str = "",
) -> Sent | None:
    """Write a GET to an open, idle connection; None where there is none.

    Raises:
        ValueError: for what is no single line of a request.
    """
    lines = [f"GET {target} HTTP/1.1", f"host: {_host(pool)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if not all(map(LINE.fullmatch, lines)):
        raise ValueError(f"no request for {target!a:.80} can be written")
    connection: Any = pool._get_conn()
    if connection.is_closed:
        pool._put_conn(connection)
        return None
    sent = Sent(pool, timeout_s, signed, connection)
    try:
        connection.sock.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        acknowledge_at_once(connection.sock)
    except OSError:  # its time was over, as may happen
        sent.cancel()
        return None
    return sent


def _host(pool: urllib3.HTTPConnectionPool) -> str:
    """The host header: with the port only where it is not the usual one."""
    host = f"[{pool.host}]" if ":" in pool.host else pool.host
    return host if pool.port == pool.ConnectionCls.default_port else f"{host}:{pool.port}"


@dataclass
class Later(Generic[T]):
    """What is made of an answer when it is wanted; for one thread.

    Attributes:
        finish: reads the answer, and asks again where that fails.
    """

    sent: Sent
    finish: Callable[[Sent], T]
    _found: list[T] = field(default_factory=list)

    def result(self) -> T:
        """What was made of it, the first time and ever after."""
        if not self._found:
            self._found.append(self.finish(self.sent))
        return self._found[0]

    def cancel(self) -> bool:
        """Close the connection if nobody has read the answer."""
        return self.sent.cancel()
