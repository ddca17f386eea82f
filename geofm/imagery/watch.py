"""Connections whose answers never begin are cut off.

A socket's timeout counts from byte to byte. A server that sends a header line now and then, or
``100 Continue`` for ever, would hold a thread for good; so one watching thread per process ends
connections whose time is over.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache

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
