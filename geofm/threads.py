"""One torch thread for a while: sums in a fixed order are the same bits on any machine load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside = {"count": 0, "before": 0}


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch computes with one thread in this block; the last to leave restores the number."""
    with _lock:
        if _inside["count"] == 0:
            _inside["before"] = torch.get_num_threads()
        _inside["count"] += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside["count"] -= 1
            if _inside["count"] == 0:
                torch.set_num_threads(_inside["before"])
