"""Work in other threads ends soon after the main thread was interrupted, and keeps its parts."""

from __future__ import annotations

import threading
import time

import pytest

from data_catalog.progress import advance, tick
from data_catalog.stopping import Stopped, is_asked, new_run, stoppable


def test_work_ends_where_it_next_reports() -> None:
    ended: list[str] = []

    def work(name: str) -> None:
        try:
            for step in range(10_000):
                time.sleep(0.005)
                advance(1) if name == "rows" else tick(name, step, 10_000)
        except Stopped as error:
            ended.append(f"{name}: {error}")

    threads = [threading.Thread(target=work, args=(name,)) for name in ("rows", "steps")]
    with new_run():
        with pytest.raises(KeyboardInterrupt), stoppable():
            for thread in threads:
                thread.start()
            time.sleep(0.05)
            raise KeyboardInterrupt
        for thread in threads:
            thread.join(5)
        assert is_asked()
    assert len(ended) == 2
    assert all("start it again to go on" in line for line in ended)


def test_the_next_run_is_not_stopped() -> None:
    with pytest.raises(SystemExit), new_run(), stoppable():
        raise SystemExit
    assert not is_asked()
    advance(1)
    with new_run(), stoppable():
        advance(1)
