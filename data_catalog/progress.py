"""Progress: stages report their progress, a terminal or a server shows it.

A stage calls ``tick`` and does not depend on how progress is shown.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int, int, str], None]
_listeners: list[Listener] = []
_lock = threading.Lock()


def tick(what: str, done: int, total: int, note: str = "") -> None:
    """Report to the listeners of this process that ``done`` of ``total`` steps are finished.

    Args:
        what: Name of the work, e.g. a stage.
        done: Finished steps.
        total: All steps.
        note: Unit of the steps, or a short remark.
    """
    for listener in tuple(_listeners):
        listener(what, done, total, note)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call ``listener(what, done, total, note)`` on every tick while the block runs."""
    with _lock:
        _listeners.append(listener)
    try:
        yield
    finally:
        with _lock:
            _listeners.remove(listener)
