"""Work in other threads and processes ends soon after it was asked to, and keeps its parts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from data_catalog.progress import advance, tick
from data_catalog.stopping import Stopped, ask_to_stop, is_asked, new_run, share
from flows.pipeline import begin_worker


@pytest.fixture(autouse=True)
def run() -> Iterator[None]:
    new_run()
    yield
    new_run()


def work(name: str) -> str:
    """A piece of work of a minute that reports its progress."""
    try:
        for step in range(12_000):
            time.sleep(0.005)
            advance(1) if name == "rows" else tick(name, step, 12_000)
    except Stopped as error:
        return str(error)
    return "ended by itself"


def test_work_ends_where_it_next_reports() -> None:
    ended: list[str] = []
    threads = [
        threading.Thread(target=lambda name=name: ended.append(work(name)))
        for name in ("rows", "steps")
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    ask_to_stop()
    for thread in threads:
        thread.join(5)
    assert len(ended) == 2
    assert all("start it again to go on" in line for line in ended)


def test_worker_processes_are_asked_too() -> None:
    context = get_context("spawn")
    stop = context.Event()
    share(stop)
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=begin_worker, initargs=(os.getpid(), stop)
    ) as pool:
        future = pool.submit(work, "rows")
        time.sleep(1)
        ask_to_stop()
        assert "start it again to go on" in future.result(40)


def test_the_next_run_is_not_stopped() -> None:
    ask_to_stop()
    assert is_asked()
    new_run()
    assert not is_asked()
    advance(1)
