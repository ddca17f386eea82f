"""Threads of a worker: one as long as nothing waits, more when something does."""

from __future__ import annotations

import threading
from collections import deque

import pytest

from data_catalog.crew import kept_waiting, work_together


def test_nobody_joins_one_that_is_never_kept_waiting() -> None:
    left, seen = deque(range(100)), set()

    def work() -> None:
        while left:
            left.popleft()
            seen.add(threading.get_ident())

    work_together(work, left.clear, 1, 4)
    assert len(seen) == 1


@pytest.mark.parametrize("most", [2, 3, 5])
def test_one_joins_each_that_is_kept_waiting_up_to_a_limit(most: int) -> None:
    inside, lock = [0, 0], threading.Lock()
    full = threading.Event()

    def work() -> None:
        with lock:
            inside[0] += 1
            inside[1] = max(inside)
            if inside[0] == most:
                full.set()
        kept_waiting()
        assert full.wait(10)  # nobody goes on before all are there
        kept_waiting()
        with lock:
            inside[0] -= 1

    work_together(work, lambda: None, 1, most)
    assert inside == [0, most]


def test_a_failure_of_one_that_joined_stops_the_others_and_is_told() -> None:
    stopped, began = threading.Event(), deque(["first", "second"])
    ended: list[str] = []

    def work() -> None:
        if began.popleft() == "second":
            raise ValueError("of the second")
        kept_waiting()
        assert stopped.wait(10)
        ended.append("first")

    with pytest.raises(ValueError, match="of the second"):
        work_together(work, stopped.set, 1, 2)
    assert ended == ["first"]


def test_an_interruption_stops_those_who_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()
    ended: list[bool] = []

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work_together(lambda: ended.append(stopped.wait(10)), stopped.set, 2, 2)
    assert ended == [True, True]


def test_elsewhere_nobody_is_there_to_join() -> None:
    kept_waiting()
