"""An answer on a connection of urllib3, read by llhttp (httptools) in a third of the time.

Where images are cut from small files nearly all of an HTTP client's time goes into the heads of
answers. What comes here answers a plain GET that was written to an idle connection (``sent.py``).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import httptools
import urllib3
from urllib3.exceptions import HTTPError, ProtocolError

from data_catalog.crew import kept_waiting
from geofm.remote.connections import await_answer

#: Bytes that are taken from a socket at once.
PIECE = 2**18
#: An answer of which nothing comes for so long (seconds) is waited for beside other work.
FAR_S = 0.03
#: Bytes that an answer may have before its body.
LONGEST_HEAD = 2**18


class Reply:
    """An answer on a connection, as far as ``http_client`` needs one; ``release_conn`` ends it.

    Attributes:
        status: of the answer.
        headers: by name in lower case.
    """

    def __init__(self, pool: urllib3.HTTPConnectionPool, connection: Any, timeout_s: float) -> None:
        self.status, self.headers = 0, dict[str, str]()
        self._pool, self._connection = pool, connection
        self._parser: Any = httptools.HttpResponseParser(self)
        self._body: deque[bytes] = deque()
        self._taken, self._over, self._alive = 0, False, False
        self._timeout_s = connection.timeout = timeout_s
        try:
            await_answer(connection, self._head)
        except (OSError, HTTPError) as error:
            self.close()
            raise ProtocolError("Connection aborted.", error) from error

    def on_message_begin(self) -> None:
        """A head begins (called by the parser): the first, or one after an interim answer."""
        if self._over:
            raise ValueError("two answers to one request")
        self.headers.clear()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header (called by the parser)."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """All headers are there (called by the parser)."""
        status = self._parser.get_status_code()
        self.status = status if status >= 200 else 0

    def on_body(self, body: bytes) -> None:
        """Some of the body (called by the parser)."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The answer is whole (called by the parser)."""
        self._over = bool(self.status)
        self._alive = self._parser.should_keep_alive()

    @property
    def length_remaining(self) -> int | None:
        """Bytes of the body still to be read; None where nothing tells."""
        told = self.headers.get("content-length", "")
        return int(told) - self._taken if told.isdecimal() else 0 if self._over else None

    def read1(self, most: int, decode_content: bool = False) -> bytes:
        """Some bytes of the body as they were sent, none at its end.

        Raises:
            HTTPError: when no more come.
        """
        while not self._body and not self._over:
            self._feed()
        if not self._body:
            return b""
        piece = self._body.popleft()
        if len(piece) > most:
            self._body.appendleft(piece[most:])
        self._taken += min(len(piece), most)
        return piece[:most]

    def release_conn(self) -> None:
        """Give the connection back: to be used again after a whole answer, closed otherwise."""
        connection, self._connection = self._connection, None
        self._parser = None  # which knows this object
        if connection is not None:
            if not self._alive or self._body:
                connection.close()
            self._pool._put_conn(connection)

    def close(self) -> None:
        """Give the connection back closed."""
        self._alive = False
        self.release_conn()

    def _head(self) -> None:
        taken = 0
        while not self.status:
            taken += self._feed()
            if not self.status and (self._over or taken > LONGEST_HEAD):
                raise ProtocolError("the connection ended or went on and on without an answer")

    def _receive(self) -> bytes:
        door = self._connection.sock
        door.settimeout(min(FAR_S, self._timeout_s))
        try:
            return bytes(door.recv(PIECE))
        except TimeoutError:
            kept_waiting()
        door.settimeout(self._timeout_s)
        return bytes(door.recv(PIECE))

    def _feed(self) -> int:
        """Take what the socket has; returns how many bytes."""
        try:
            data = self._receive()
            if data:
                self._parser.feed_data(data)
            else:  # all that will ever come
                self._over, self._alive = True, False
        except (OSError, httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise ProtocolError(f"Connection broken: {error!r}", error) from error
        return len(data)
