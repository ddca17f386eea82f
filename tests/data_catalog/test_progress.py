"""Progress of a stage: one line that never goes back, and no long silence."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextvars import copy_context

import pytest

from data_catalog import progress
from data_catalog.catalogue import Catalogue
from data_catalog.progress import advance, follow, listen, report_stage, tick
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.runtime.threads import map_on_cores
from tests.data_catalog.helpers import NUMBERS, SQUARES, Settings

Line = tuple[str, int, int, str]


@pytest.fixture
def lines(monkeypatch) -> Iterator[list[Line]]:
    """Lines that a follower sees; one every 20 ms."""
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    seen: list[Line] = []
    with follow(lambda *line: seen.append(line)):
        yield seen


def test_a_silent_stage_is_heard_of(lines):
    with report_stage("embed", "chips"):
        time.sleep(0.15)
    assert len(lines) >= 4
    assert {line[0] for line in lines} == {"embed"}
    assert lines[0][1:] == (0, 1, "planning for 0 s")
    assert lines[-1][1:3] == (1, 1)
    assert lines[-1][3].startswith("done in")


def test_rows_parts_rate_and_time_left(lines):
    finished = {"a"}
    with report_stage("embed", "chips") as stage:
        stage.begin([("a", 100), ("b", 300), ("c", 600)], {"a"}, finished.__contains__)
        advance(150)
        time.sleep(0.1)
        part_way = lines[-1]
        finished.add("b")
        time.sleep(0.1)
        after_b = lines[-1]
        stage.seal()
        tick("joining", 3, 9, "blocks")
        time.sleep(0.1)
    name, done, total, note = part_way
    assert (name, done, total) == ("embed", 250, 1000)
    assert note.startswith("chips, 1 of 3 parts, ")
    assert "/s, " in note
    assert note.endswith(" left")
    assert after_b[1] == 400
    assert "2 of 3 parts" in after_b[3]
    assert any("sealing for 0 s, joining 3 of 9 blocks" in line[3] for line in lines)
    assert [line[1] for line in lines] == sorted(line[1] for line in lines)


def test_parts_without_rows_are_counted(lines):
    with report_stage("report", "chips") as stage:
        stage.begin([("a", 0), ("b", 0)], {"a"}, lambda _: False)
        time.sleep(0.05)
    assert lines[-2][1:] == (1, 2, "parts")


def test_a_tick_outside_of_a_stage_is_a_line(lines):
    tick("server", 0, 1, "starting")
    assert lines == [("server", 0, 1, "starting")]


def test_every_tick_is_heard_by_listeners(lines):
    heard: list[Line] = []
    with listen(lambda *line: heard.append(line)), report_stage("pretrain", "steps"):
        tick("pretrain", 1, 9, "loss 0.5")
        tick("pretrain", 2, 9, "loss 0.4")
    assert [line[1] for line in heard] == [1, 2]


def test_a_run_of_a_stage_tells_its_parts(store: Store, catalogue: Catalogue, lines):
    items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=6))
    run_stage(SQUARES, store, catalogue, {"items": items}, Settings(count=6))
    last = [line for line in lines if line[0] == "cut"][-1]
    assert last[1:3] == (6, 6)
    again = run_stage(SQUARES, store, catalogue, {"items": items}, Settings(count=6))
    assert again is not None
    assert lines[-1] == ("cut", 1, 1, "found in the catalogue")


def test_stages_that_run_at_once_each_count_their_own_rows(lines):
    """Also in threads that they start: in the context of a part, and on all cores."""
    begun = threading.Barrier(2)

    def run(name: str, rows: int) -> None:
        with report_stage(name, "chips") as stage:
            stage.begin([("a", 1000)], set(), lambda _: False)
            begun.wait(10)
            list(map_on_cores(lambda _: advance(rows), range(5)))
            threading.Thread(target=copy_context().run, args=(advance, rows)).start()
            time.sleep(0.1)
            begun.wait(10)

    threads = [threading.Thread(target=run, args=pair) for pair in (("pool", 10), ("pairs", 70))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    most = {name: max(line[1] for line in lines if line[0] == name and line[1] < 1000)
            for name in ("pool", "pairs")}  # fmt: skip
    assert most == {"pool": 60, "pairs": 420}
