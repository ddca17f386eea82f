"""Threads: ordered work in a pool, work on all cores, kept memory, and torch's global state.

Torch has one number of threads and one random state per process. The context managers at the end
let threads of a process use them without disturbing each other.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, copy_context
from functools import cache
from typing import TypeVar

from data_catalog.storage.process import cores, one_blas_thread
from geofm.runtime.native import torch

#: Largest block (bytes) that is allocated from kept memory, and most memory that is kept.
KEPT_BLOCK, KEPT = 2**26, 2**28
#: Parameters of glibc's ``mallopt`` (malloc.h) for both.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


@cache
def keep_freed_memory() -> bool:
    """Keep up to ``KEPT`` bytes of freed memory in the process.

    By default glibc returns memory to the system when twice the largest block is free. Activations
    of a batch are such blocks, so each batch would request them again: about 900 pages per chip,
    which take 1 to 2 ms beside 4.4 ms of arithmetic (EfficientNet-Lite0 at 128 px).

    Returns:
        False if the C library has no ``mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, KEPT_BLOCK) and mallopt(_TRIM_THRESHOLD, KEPT))


@cache
def _pool(name: str, threads: int, process: int) -> ThreadPoolExecutor:
    """Make the pool of a name and a process; torch keeps a number of threads for each thread."""
    return ThreadPoolExecutor(
        threads, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(1,)
    )


def shared_pool(name: str, threads: int) -> ThreadPoolExecutor:
    """Return the pool of threads with a name; it is made on first use.

    A forked process has a pool of its own, because the parent's threads do not exist in it.
    """
    return _pool(name, threads, os.getpid())


Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ordered(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], lookahead: int
) -> Generator[Result]:
    """Apply a function to items in a pool and yield the results in order.

    If the caller stops iterating, items that have not started are cancelled.

    Args:
        pool: The pool.
        function: The function.
        items: The items.
        lookahead: Number of items submitted beyond the one whose result is due.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > lookahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


#: Items per thread that are started before the oldest result is taken; some take far longer.
LOOKAHEAD = 32
#: Name of the pool that computes on all cores.
CORES = "geofm-cores"


def is_core_thread() -> bool:
    """Tell whether the caller is a thread of ``map_on_cores``; then other cores are busy too."""
    return threading.current_thread().name.startswith(CORES)


def map_on_cores(
    function: Callable[[Item], Result], items: Sequence[Item], lookahead: int = LOOKAHEAD
) -> Iterator[Result]:
    """Apply a function to items, with one thread per core, and yield the results in order.

    All callers of a process share the threads, so parts that are worked on at once do not start
    more threads than there are cores. Products of small blocks and the work around them keep a core
    busy; the threads of torch and BLAS themselves would wait for each other after every block.

    Args:
        function: The function.
        items: The items.
        lookahead: Items per thread that are started before the oldest result is taken.
    """
    threads = cores()
    if threads == 1 or len(items) == 1 or is_core_thread():
        yield from map(function, items)
        return

    def apply(item: tuple[Context, Item]) -> Result:
        return item[0].run(function, item[1])

    # each item in the caller's context, which knows the stage whose progress it reports
    with_context = ((copy_context(), item) for item in items)
    with one_torch_thread():
        yield from map_ordered(
            shared_pool(CORES, threads), apply, with_context, lookahead * threads
        )


_lock = threading.Lock()
#: Number of blocks that run now, and the number of threads before the first.
_blocks = {"count": 0, "threads_before": 0}


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch and BLAS compute with one thread; the last block that ends restores the number."""
    with _lock:
        if _blocks["count"] == 0:
            _blocks["threads_before"] = torch.get_num_threads()
        _blocks["count"] += 1
        torch.set_num_threads(1)
    try:
        with one_blas_thread():
            yield
    finally:
        with _lock:
            _blocks["count"] -= 1
            if _blocks["count"] == 0:
                torch.set_num_threads(_blocks["threads_before"])


_random = threading.RLock()


@contextmanager
def own_random_state(seed: int | None = None) -> Iterator[None]:
    """Hold torch's global random state exclusively, and restore it afterwards.

    All threads of a process share this state. Without the lock, two threads that build networks
    at the same time would draw from each other's numbers, and an untrained network would differ
    from run to run.

    Args:
        seed: Seed of the block; None if the drawn numbers do not matter.
    """
    with _random, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        yield
