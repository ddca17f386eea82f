"""Requests that are on their way: who sent them reads their answers later, without a thread.

A thread for each request would have to be woken for its answer and wait for the interpreter's lock,
which takes longer than the request itself where the network is near. So where a connection is open
and idle the request is written to it at once, and the answer waits in the kernel until it is
wanted. Threads open connections and do all that takes more than one request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Generic, Protocol, TypeVar

import urllib3
from urllib3.exceptions import HTTPError, ProtocolError

from geofm.imagery.connections import acknowledge_at_once

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Call(Protocol[T_co]):
    """Something that was begun, as a ``concurrent.futures.Future`` is."""

    def result(self) -> T_co:
        """What comes of it, waited for."""

    def cancel(self) -> bool:
        """Nobody waits for it any more."""


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

    def response(self) -> urllib3.BaseHTTPResponse:
        """The answer, its body still to come.

        Raises:
            HTTPError: when there is none.
        """
        connection, self.connection = self.connection, None
        connection.timeout = self.timeout_s
        try:
            found = connection.getresponse()
        except (OSError, HTTPException, HTTPError) as error:
            self._close(connection)
            raise ProtocolError("Connection aborted.", error) from error
        # as the pool itself does, so that the connection goes back when the answer is read
        found._connection, found._pool = connection, self.pool
        return found  # type: ignore[no-any-return]

    def cancel(self) -> bool:
        """Close the connection of an answer that nobody has read; whether there was one."""
        connection, self.connection = self.connection, None
        if connection is not None:
            self._close(connection)
        return connection is not None

    def _close(self, connection: Any) -> None:
        connection.close()
        self.pool._put_conn(connection)


def send(
    pool: urllib3.HTTPConnectionPool,
    target: str,
    headers: dict[str, str],
    timeout_s: float,
    signed: str = "",
) -> Sent | None:
    """Write a GET to an open, idle connection; None where there is none."""
    connection: Any = pool._get_conn()
    sent = Sent(pool, timeout_s, signed, connection)
    if connection.is_closed:
        pool._put_conn(connection)
        return None
    try:
        connection.request(
            "GET", target, headers=headers, preload_content=False, decode_content=False
        )
        acknowledge_at_once(connection.sock)
    except (OSError, HTTPException, HTTPError):  # its time was over, as may happen
        sent.cancel()
        return None
    return sent


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
