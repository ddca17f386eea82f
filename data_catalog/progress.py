"""Progress without knowing who watches: stages tick, a terminal or a server listens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int, int, str], None]
_listeners: list[Listener] = []
_lock = threading.Lock()


def tick(what: str, done: int, total: int, note: str = "") -> None:
    """Tell the listeners of this process that ``done`` of ``total`` steps of ``what`` are over."""
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
