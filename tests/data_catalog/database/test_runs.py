"""Killed runs end as lost: recognised at once here, by their heartbeat elsewhere."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from data_catalog import catalogue as catalogue_module
from data_catalog.catalogue import Catalogue, open_catalogue
from data_catalog.database import lease
from data_catalog.database.schema import RunRow
from data_catalog.provenance.costs import lineage_costs
from data_catalog.run import run_stage
from data_catalog.store import Store
from tests.data_catalog.helpers import NO_STORE, NUMBERS, Settings

#: Runs a job of this key, notes what it has spent, says so and stays.
RUNNER = """
import sys, time
from data_catalog.catalogue import open_catalogue
from tests.data_catalog.helpers import NO_STORE
catalogue = open_catalogue(sys.argv[1], NO_STORE)
with catalogue.run("search", sys.argv[2]) as row:
    catalogue.keep(row, {"seconds": 7.0, "kwh": 0.25})
    print(row.id, flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def record(request: pytest.FixtureRequest, tmp_path: Path) -> Catalogue:
    """A catalogue without runs."""
    if request.param == "postgresql":
        found = open_catalogue(request.getfixturevalue("postgres_url"), NO_STORE)
        with found.session() as session:
            session.query(RunRow).delete()
        return found
    return open_catalogue(f"sqlite:///{tmp_path}/runs.db", NO_STORE)


def killed(catalogue: Catalogue, key: str = "key") -> str:
    """Kill a process in the middle of a run; returns the run's id."""
    url = catalogue.engine.url.render_as_string(hide_password=False)
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, url, key], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    run = process.stdout.readline().strip()
    assert kept(catalogue, run).status == "running"
    assert shown(catalogue, run).status == "running"
    assert catalogue.close_lost_runs() == 0
    process.kill()
    process.wait(30)
    return run


def kept(catalogue: Catalogue, run: str) -> RunRow:
    """A run's record as it is in the table."""
    with catalogue.session() as session:
        return session.get_one(RunRow, run)


def shown(catalogue: Catalogue, run: str) -> RunRow:
    return next(row for row in catalogue.runs() if row.id == run)


def change(catalogue: Catalogue, **values: Any) -> None:
    with catalogue.session() as session:
        session.execute(update(RunRow).values(**values))


def test_a_killed_run_is_shown_as_lost_and_closed_by_a_command_that_writes(
    record: Catalogue,
) -> None:
    run = killed(record)
    lost = shown(record, run)
    assert (lost.status, kept(record, run).status) == ("lost", "running")  # nothing was written
    assert lost.finished_at is not None
    assert "ended before the run did" in str(lost.error)
    assert record.close_lost_runs() == 1
    closed = kept(record, run)
    assert closed.status == "lost"
    assert closed.finished_at is not None
    assert closed.finished_at >= closed.started_at + timedelta(seconds=6.9)
    assert closed.metrics == {"seconds": 7.0, "kwh": 0.25}
    assert record.close_lost_runs() == 0


def test_what_a_lost_run_had_spent_counts(store: Store, catalogue: Catalogue) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    before = lineage_costs(catalogue, [items.digest])[0]
    with catalogue.session() as session:
        key = session.scalars(select(RunRow.key)).one()
        session.query(RunRow).delete()
    killed(catalogue, key)
    catalogue.close_lost_runs()
    run_stage(NUMBERS, store, catalogue, {}, Settings(), seed=1)
    with catalogue.session() as session:
        done = session.scalars(select(RunRow).where(RunRow.status == "done")).one()
        done.metrics = {**done.metrics, "cached": False}
    cost = lineage_costs(catalogue, [items.digest])[0]
    assert (before.sessions, cost.sessions) == (1, 2)
    assert cost.seconds == pytest.approx(7.0, abs=1)
    assert cost.kwh == pytest.approx(0.25)


def test_elsewhere_the_last_heartbeat_decides(record: Catalogue) -> None:
    run = killed(record)
    moment = datetime.now(UTC)
    change(record, host="elsewhere", process="other-boot/pid:[1]/7/7", beat=moment)
    assert shown(record, run).status == "running"
    assert record.close_lost_runs() == 0
    last = moment - timedelta(seconds=lease.EXPIRY_S + 30)
    change(record, beat=last, started_at=last - timedelta(seconds=60))
    assert shown(record, run).status == "lost"
    assert record.close_lost_runs() == 1
    finished = kept(record, run).finished_at
    assert finished is not None
    assert abs(lease.aware(finished) - last) < timedelta(seconds=2)


def test_a_record_of_an_earlier_version_is_lost_when_it_is_old(record: Catalogue) -> None:
    run = killed(record)
    change(record, process=None, beat=None)
    assert shown(record, run).status == "running"
    change(record, started_at=datetime.now(UTC) - timedelta(days=3))
    assert shown(record, run).status == "lost"
    assert record.close_lost_runs() == 1


def test_a_run_that_comes_back_is_running_again_and_can_finish(
    record: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        catalogue_module, "heartbeat", lambda beat, what: lease.heartbeat(beat, what, 0.2)
    )
    with record.run("search", "key") as row:
        change(record, status="lost", finished_at=datetime.now(UTC), error="it seemed so")
        deadline = time.monotonic() + 20
        while kept(record, row.id).status == "lost" and time.monotonic() < deadline:
            time.sleep(0.05)
        back = kept(record, row.id)
        assert (back.status, back.finished_at, back.error) == ("running", None, None)
        change(record, status="lost", finished_at=datetime.now(UTC))
    assert kept(record, row.id).status == "done"


def test_a_run_that_failed_stays_failed(record: Catalogue) -> None:
    with pytest.raises(KeyError), record.run("search", "key") as row:
        raise KeyError("x")
    assert not record._beat(row.id)  # a heartbeat that comes too late
    assert kept(record, row.id).status == "failed"


def test_processes_that_close_a_run_at_once_close_it_once(record: Catalogue) -> None:
    run = killed(record)
    url = record.engine.url.render_as_string(hide_password=False)
    closed: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: closed.append(open_catalogue(url, NO_STORE).close_lost_runs())
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(closed) == [0, 0, 0, 1]
    assert kept(record, run).status == "lost"
