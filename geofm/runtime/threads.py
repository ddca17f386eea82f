"""Threads of one process: work ahead in order, and what they share in torch, held alone."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

from geofm.runtime.native import torch

# Freed memory stays with the process: to ask for it anew costs more than a small network.

#: Blocks up to here (bytes) come from memory that is kept, and so much of it is kept at most.
KEPT_BLOCK, KEPT = 2**26, 2**28
#: Names of glibc's ``mallopt`` for the two (malloc.h).
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


@cache
def keep_freed_memory() -> bool:
    """Keep up to ``KEPT`` bytes of what is freed; False where the C library cannot be told.

    By default glibc gives memory back to the system as soon as twice the largest block is free.
    Activations of a batch are such blocks: each batch then asks for all of them again, about 900
    pages a chip, 1 to 2 ms beside 4.4 ms of arithmetic (EfficientNet-Lite0 at 128 px).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, KEPT_BLOCK) and mallopt(_TRIM_THRESHOLD, KEPT))


@cache
def _pool(name: str, threads: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=name)


def shared_pool(name: str, threads: int) -> ThreadPoolExecutor:
    """Return the process's pool of threads with this name; it is made on first use.

    A forked process gets its own pool, since the parent's threads do not exist in it.
    """
    return _pool(name, threads, os.getpid())


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
