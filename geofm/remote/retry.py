"""The retry policy: pauses, request rates, and hosts that are left alone, for pixels and search.

Everything is counted per process and host. A limit of 10 requests per second is 10 for each worker
process. No result depends on it.
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

from geofm.remote.quarantine import Quarantine

T = TypeVar("T")
#: Longest pause before the first retry (seconds); it doubles with each further retry.
FIRST_PAUSE = 0.25
#: Longest pause (seconds), even if a Retry-After header requests a longer pause.
MAX_PAUSE = 30.0
#: After this many requests in a row that failed for good, a host is left alone for some time.
MAX_FAILURES, REST_S = 5, 60.0
#: Source of the jitter.
_jitter = random.Random()


class Fault(Exception):
    """A failure that another attempt may cure.

    Attributes:
        pause: Pause in seconds that the server requested.
        host_failed: The host did not answer, or requested a pause. False after a wrong answer,
            which concerns one asset and not the host.
        status: HTTP status, if there was an answer with one.
    """

    def __init__(
        self, detail: str, pause: float = 0.0, host_failed: bool = False, status: int | None = None
    ) -> None:
        super().__init__(detail)
        self.pause, self.host_failed, self.status = pause, host_failed, status


@dataclass
class Host:
    """This process's record of one host.

    Attributes:
        next_turn: Time at which the next request may start (monotonic seconds).
        failures: Requests in a row that failed for good because the host did not answer.
        rests_until: Time until which the host is left alone (monotonic seconds).
        requires_signing: The host refused an unsigned address and answered the signed one.
    """

    next_turn: float = 0.0
    failures: int = 0
    rests_until: float = 0.0
    requires_signing: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take_turn(self, per_s: float | None) -> None:
        """Wait until another request fits ``per_s`` requests per second (None: no limit)."""
        if per_s is None:
            return
        with self._lock:
            turn = max(self.next_turn, time.monotonic())
            self.next_turn = turn + 1 / per_s
        time.sleep(max(0.0, turn - time.monotonic()))

    def answered(self) -> None:
        """Note an answer."""
        self.failures, self.rests_until = 0, 0.0

    def failed(self) -> None:
        """Note a request that failed for good; the host rests after `MAX_FAILURES` in a row."""
        with self._lock:
            self.failures += 1
            if self.failures >= MAX_FAILURES:
                self.rests_until = time.monotonic() + REST_S

    def rests(self) -> bool:
        """Return whether the host is left alone; after its rest, one request may try it again."""
        with self._lock:
            now = time.monotonic()
            if self.failures < MAX_FAILURES:
                return False
            if now < self.rests_until:
                return True
            self.rests_until = now + REST_S
            return False


def host_record(name: str) -> Host:
    """Return this process's record of ``host:port`` or ``s3://bucket``."""
    return _host_record(name, os.getpid())


@lru_cache(maxsize=4096)
def _host_record(name: str, process: int) -> Host:
    return Host()


def call_with_retries(
    attempt: Callable[[], T],
    retries: int,
    host: Host | None = None,
    before_retry: Callable[[Fault, float], None] | None = None,
) -> T:
    """Call a function until it raises no Fault, with pauses in between.

    The pauses have full jitter: their length is uniform between 0 and a bound that doubles.

    Args:
        attempt: Function to call.
        retries: Attempts after the first.
        host: Record of the host; no more retries once it has failed too often.
        before_retry: Called with the fault and the pause in seconds before each pause.

    Raises:
        Fault: That of the last attempt; its text states the number of attempts.
    """
    for number in range(retries + 1):
        try:
            return attempt()
        except Fault as fault:
            if number == retries or (host is not None and host.failures >= MAX_FAILURES):
                fault.args = (f"{fault} ({number + 1} attempts)",)
                raise
            pause = fault.pause + _jitter.uniform(0.0, FIRST_PAUSE * 2**number)
            pause = min(pause, MAX_PAUSE)
            if before_retry is not None:
                before_retry(fault, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def read_with_retries(
    attempt: Callable[[], T], retries: int, label: str, host: Host | None = None
) -> T:
    """Call a function that reads a part of an asset, with retries.

    Args:
        attempt: Function to call; it raises Fault for failures that may pass.
        retries: Attempts after the first.
        label: Name of the asset in error messages.
        host: Record of the asset's host.

    Raises:
        Quarantine: ``unreachable`` (passing) if the last attempt fails, and at once if the host
            has not answered for some time.
    """
    if host is not None and host.rests():
        detail = f"{label}: its host has not answered {MAX_FAILURES} requests in a row"
        raise Quarantine("unreachable", detail, passing=True)
    try:
        return call_with_retries(attempt, retries, host)
    except Fault as fault:
        if host is not None and fault.host_failed:
            host.failed()
        raise Quarantine("unreachable", f"{label}: {fault}", passing=True) from fault


def is_passing(status: int) -> bool:
    """Return whether a request with this HTTP status may succeed later."""
    return status in (408, 425, 429) or status >= 500


def retry_after(text: str) -> float:
    """Return the seconds that a Retry-After header (a number or an HTTP date) requests.

    The result is 0 for any other text, and at most `MAX_PAUSE`.
    """
    if text.isascii() and text.isdigit() and len(text) < 16:
        return min(float(text), MAX_PAUSE)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), MAX_PAUSE)
