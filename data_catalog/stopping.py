"""Ask the work of this process to stop: Ctrl-C, SIGTERM, or a cancelled run.

The signal reaches only the main thread, and Python cannot end another thread. So the main thread
asks, and work in other threads ends where it next reports progress (data_catalog/progress.py), or
where it next asks for itself, as training does to write a checkpoint first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from data_catalog.errors import RunError

_asked = threading.Event()


class Stopped(RunError):
    """The work was asked to stop; what is finished is kept."""


def is_asked() -> bool:
    """Tell whether the work is to stop."""
    return _asked.is_set()


def end_if_asked() -> None:
    """End this piece of work if it is to stop.

    Raises:
        Stopped: The work is to stop.
    """
    if _asked.is_set():
        raise Stopped("the run was stopped; what is finished is kept, start it again to go on")


@contextmanager
def stoppable() -> Iterator[None]:
    """Ask the work of other threads to stop if this block ends by an exception."""
    has_ended = False
    try:
        yield
        has_ended = True
    finally:
        if not has_ended:
            _asked.set()


@contextmanager
def new_run() -> Iterator[None]:
    """Begin a run, whose work nobody has asked to stop yet."""
    _asked.clear()
    try:
        yield
    finally:
        _asked.clear()
