"""Threads of one worker: as few as keep its cores busy, and more once one of them is kept waiting.

Threads of one interpreter wait for its lock, so more of them than cores make work slower. But one
that waits out a fault, or for a server that is far away, leaves a core idle: then another joins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_thread = threading.local()


def work_together(
    work: Callable[[], None], stop: Callable[[], None], first: int, most: int
) -> None:
    """Call ``work`` in several threads until it has returned in each of them.

    Args:
        work: takes what is left to do, piece by piece; returns when there is nothing.
        stop: leaves nothing to do; called when ``work`` has ended, whatever way, in one of them.
        first: threads at the start.
        most: threads at the end.

    Raises:
        Exception: the first that ``work`` raised.
    """
    calls: list[Future[None]] = []
    lock = threading.Lock()
    with ThreadPoolExecutor(most) as pool:

        def join() -> None:
            with lock:
                if len(calls) < most:
                    calls.append(pool.submit(run))

        def run() -> None:
            _thread.join, _thread.others = join, others
            try:
                work()
            finally:
                stop()

        def others() -> int:
            with lock:
                return len(calls) - 1

        with lock:  # so that each of the first knows of all
            calls += [pool.submit(run) for _ in range(min(first, most))]
        try:
            for call in calls:  # also those that join meanwhile
                call.result()
        finally:  # also when a user interrupts
            stop()


def count_others() -> int:
    """Threads that work beside this one."""
    others = getattr(_thread, "others", None)
    return others() if others is not None else 0


def kept_waiting() -> None:
    """Say that this thread is about to wait for long: another joins it, where there may be more."""
    join = getattr(_thread, "join", None)
    if join is not None:
        join()
