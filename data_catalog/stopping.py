"""Ask the work of a run to stop: Ctrl-C, SIGTERM, a cancelled run, or a stage that has failed.

A signal reaches only the main thread, and Python cannot end another thread. So the main thread
asks, and work in other threads ends where it next reports progress (data_catalog/progress.py), or
where it next asks for itself, as training does to write a checkpoint first. Worker processes share
an event with the process that started them.
"""

from __future__ import annotations

import threading
from typing import Protocol

from data_catalog.errors import RunError


class SharedEvent(Protocol):
    """An event of ``multiprocessing``."""

    def is_set(self) -> bool:
        """Tell whether the event is set."""

    def set(self) -> None:
        """Set the event."""


_asked = threading.Event()
_shared: list[SharedEvent] = []


class Stopped(RunError):
    """The work was asked to stop; what is finished is kept."""


def new_run() -> None:
    """Begin a run, whose work nobody has asked to stop yet."""
    _asked.clear()
    _shared.clear()


def share(event: SharedEvent) -> None:
    """Share an event with worker processes: they stop when this process is asked to."""
    _shared.append(event)


def ask_to_stop() -> None:
    """Ask all work of this process and of its workers to stop."""
    _asked.set()
    for event in _shared:
        event.set()


def is_asked() -> bool:
    """Tell whether the work is to stop."""
    return _asked.is_set() or any(event.is_set() for event in _shared)


def end_if_asked() -> None:
    """End this piece of work if it is to stop.

    Raises:
        Stopped: The work is to stop.
    """
    if is_asked():
        raise Stopped("the run was stopped; what is finished is kept, start it again to go on")
