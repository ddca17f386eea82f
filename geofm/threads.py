"""Threads of one process: work ahead in order, and what they share in torch, held alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result]:
    """``function`` of each item in order, at most ``ahead`` of them beyond the one that is due.

    Whoever stops early closes it: what has not begun is then not begun.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


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
