"""Retries, a rate and a limit to patience for each host: how faults that pass are waited out.

Everything here counts by process and host. A limit of 10 requests a second is 10 for each of the
worker processes; what is read depends on none of it.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import TypeVar

from data_catalog.crew import kept_waiting
from geofm.remote.quarantine import Quarantine

T = TypeVar("T")
#: First pause before a retry is up to so many seconds; each further one up to twice as many.
FIRST_PAUSE = 0.25
#: Longest pause (seconds), whatever the server's Retry-After asks for.
MAX_PAUSE = 30.0
#: After so many requests in a row given up on one host, it is left alone for so many seconds.
GIVEN_UP, LEFT_ALONE_S = 5, 60.0
_pauses = random.Random()


class Fault(Exception):
    """A fault that may pass.

    Attributes:
        pause: how long the server asks to wait (seconds).
        refused: nobody answered, or the server asked to be left alone; False where an answer came
            and was wrong, which says something about one asset rather than about its host.
    """

    def __init__(self, detail: str, pause: float = 0.0, refused: bool = False) -> None:
        super().__init__(detail)
        self.pause, self.refused = pause, refused


@dataclass
class Host:
    """What this process has met on one host.

    Attributes:
        next_turn: when the next request may start (monotonic seconds).
        lost: requests given up in a row because nobody answered.
        back: until when the host is left alone (monotonic seconds).
        signs: whether it refused an address that it answered once that was signed.
    """

    next_turn: float = 0.0
    lost: int = 0
    back: float = 0.0
    signs: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take_turn(self, per_s: float | None) -> None:
        """Wait until one more request fits ``per_s`` requests a second (None: at once)."""
        if per_s is None:
            return
        with self._lock:
            turn = max(self.next_turn, time.monotonic())
            self.next_turn = turn + 1 / per_s
        time.sleep(max(0.0, turn - time.monotonic()))

    def answered(self) -> None:
        """An answer came."""
        self.lost, self.back = 0, 0.0

    def gave_up(self) -> None:
        """A request failed to its last retry; after some in a row the host gets a rest."""
        with self._lock:
            self.lost += 1
            if self.lost >= GIVEN_UP:
                self.back = time.monotonic() + LEFT_ALONE_S

    def rests(self) -> bool:
        """Whether the host is left alone; once the time is over one request may try."""
        with self._lock:
            now = time.monotonic()
            if self.lost < GIVEN_UP:
                return False
            if now < self.back:
                return True
            self.back = now + LEFT_ALONE_S
            return False


def host_of(place: str) -> Host:
    """The record of ``host:port`` or ``s3://bucket`` in this process."""
    return _host(place, os.getpid())


@lru_cache(maxsize=4096)
def _host(place: str, process: int) -> Host:
    return Host()


def patiently(attempt: Callable[[], T], retries: int, what: str, host: Host | None = None) -> T:
    """Call until it works, with pauses of full jitter: between nothing and a bound that doubles.

    Args:
        attempt: one try; raises :class:`Fault` for what may pass.
        retries: tries after the first.
        what: is asked for, in messages.
        host: the record of the host that is asked, where one is.

    Raises:
        Quarantine: ``unreachable`` (passing) when the last retry fails as well, and at once when
            the host has answered nobody for some time.
    """
    if host is not None and host.rests():
        raise Quarantine("unreachable", f"{what}: its host answers nobody", passing=True)
    for number in range(retries + 1):
        try:
            return attempt()
        except Fault as fault:
            if number == retries or (host is not None and host.lost >= GIVEN_UP):
                if host is not None and fault.refused:
                    host.gave_up()
                raise Quarantine(
                    "unreachable", f"{what}: {fault} ({number + 1} attempts)", passing=True
                ) from fault
            wait = fault.pause + _pauses.uniform(0.0, FIRST_PAUSE * 2**number)
            kept_waiting()
            time.sleep(min(wait, MAX_PAUSE))
    raise AssertionError("unreachable")


def retry_after(text: str) -> float:
    """Seconds that a Retry-After header (a number or an HTTP date) asks for; 0 for anything else.

    An answer is not believed to ask for more than :data:`MAX_PAUSE`.
    """
    if text.isascii() and text.isdigit() and len(text) < 16:
        return min(float(text), MAX_PAUSE)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), MAX_PAUSE)
