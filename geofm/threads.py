"""What threads of one process share in torch, and how to have it alone: threads, random state."""

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


_random = threading.RLock()


@contextmanager
def own_random_state(seed: int | None = None) -> Iterator[None]:
    """Torch's global random state, held alone and put back afterwards.

    There is one for all threads of a process: two that build networks at once would draw from
    each other's numbers, and an untrained network would not be the same twice.

    Args:
        seed: start from this; None where what is drawn does not matter.
    """
    with _random, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        yield
