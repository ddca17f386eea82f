"""Versions of a name: ordered by predecessor, whatever the clocks say, and never forked."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_catalog import catalogue as catalogue_module
from data_catalog.artifact import Artifact
from data_catalog.catalogue import (
    Catalogue,
    PublishedMeanwhile,
    UnknownReference,
    open_catalogue,
)
from data_catalog.database.connection import MIGRATIONS
from data_catalog.database.schema import ArtifactRow, NameRow, RunRow
from data_catalog.run import make_job, run_stage, with_previous
from data_catalog.store import Store
from tests.data_catalog.helpers import NO_STORE, NUMBERS, Settings


@pytest.fixture(params=["sqlite", "postgresql"])
def any_catalogue(
    request: pytest.FixtureRequest, tmp_path: Path, store: Store
) -> Iterator[Catalogue]:
    if request.param == "sqlite":
        yield open_catalogue(f"sqlite:///{tmp_path}/any.db", store)
        return
    url: str = request.getfixturevalue("postgres_url")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text("DROP DATABASE IF EXISTS versions WITH (FORCE)"))
        connection.execute(sa.text("CREATE DATABASE versions"))
    engine.dispose()
    catalogue = open_catalogue(url.rpartition("/")[0] + "/versions", store)
    yield catalogue
    catalogue.engine.dispose()


def make(store: Store, catalogue: Catalogue, count: int) -> Artifact:
    """An artifact with its own digest for each count."""
    return run_stage(NUMBERS, store, catalogue, {}, Settings(count=count))


def set_clocks(catalogue: Catalogue, moment: datetime) -> None:
    """Give everything in the catalogue the time of a clock that was wrong."""
    with catalogue.session() as session:
        for table, column in ((NameRow, "created_at"), (ArtifactRow, "created_at"),
                              (RunRow, "started_at"), (RunRow, "finished_at")):  # fmt: skip
            session.execute(sa.update(table).values({column: moment}))


def test_an_artifact_that_is_not_recorded_is_no_version(
    store: Store, any_catalogue: Catalogue, tmp_path: Path
) -> None:
    foreign = make(store, open_catalogue(f"sqlite:///{tmp_path}/foreign.db", store), 3)
    with pytest.raises(UnknownReference, match=foreign.digest):
        any_catalogue.publish("corpus", foreign, "2026-11-30")
    assert any_catalogue.names() == []


def test_a_publication_that_always_fails_ends(
    store: Store, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise sa.exc.IntegrityError("insert", {}, ValueError("taken"))

    monkeypatch.setattr(catalogue, "_publish", fail)
    with pytest.raises(PublishedMeanwhile, match="run again later"):
        catalogue.publish("corpus", make(store, catalogue, 3), "2026-11-30")


@pytest.mark.parametrize("hours", [1 / 6, 24, 24 * 365 * 10])
def test_after_one_version_with_the_clock_ahead_the_bare_name_is_the_last_published(
    store: Store, any_catalogue: Catalogue, hours: float
) -> None:
    catalogue = any_catalogue
    first, second, third = (make(store, catalogue, count) for count in (3, 4, 5))
    catalogue.publish("demo", first, "2026-11-28")
    ahead = catalogue.publish("demo", second, "2026-11-30")
    set_clocks(catalogue, datetime.now(UTC) + timedelta(hours=hours))
    row = catalogue.publish("demo", third, "2026-11-29")
    assert row.predecessor == ahead.version
    assert catalogue.resolve("demo").digest == third.digest
    newest = catalogue.newest("demo")
    assert newest is not None and newest.version == "2026-11-29"
    assert [name.digest for name in catalogue.names()] == [a.digest for a in (third, second, first)]
    # an unchanged refresh publishes nothing
    assert catalogue.publish("demo", third, "2026-11-29").version == "2026-11-29"
    assert len(catalogue.names()) == 3
    # back to an earlier content: its newest version is meant by its digest
    again = catalogue.publish("demo", first, "2026-11-29")
    assert (again.version, again.predecessor) == ("2026-11-29.2", "2026-11-29")
    assert catalogue.version_of(first.digest).version == "2026-11-29.2"


def test_runs_and_artifacts_are_found_by_order_not_by_time(
    store: Store, any_catalogue: Catalogue
) -> None:
    catalogue = any_catalogue
    with catalogue.run("search", "k") as run:
        run.artifact = make(store, catalogue, 3).digest
    set_clocks(catalogue, datetime.now(UTC) + timedelta(days=1))
    newer = make(store, catalogue, 4)
    with catalogue.run("search", "k") as run:
        run.artifact = newer.digest
    last = catalogue.last_made("k")
    assert last is not None and last.digest == newer.digest
    assert catalogue.artifacts()[0].digest == newer.digest
    assert catalogue.runs()[-1].artifact == newer.digest


def test_a_time_is_the_databases_own(
    store: Store, any_catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = datetime.now(UTC) + timedelta(hours=5)
    monkeypatch.setattr(catalogue_module, "now", lambda: wrong)
    row = any_catalogue.publish("demo", make(store, any_catalogue, 3), "2026-11-28")
    with any_catalogue.session() as session:
        made = session.scalars(sa.select(ArtifactRow)).one()
    for moment in (row.created_at, made.created_at, any_catalogue.clock()):
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        assert abs(aware - datetime.now(UTC)) < timedelta(minutes=1)


def test_writers_at_once_make_one_chain(store: Store, any_catalogue: Catalogue) -> None:
    url = any_catalogue.engine.url.render_as_string(hide_password=False)
    made = [make(store, any_catalogue, count) for count in range(1, 9)]
    problems: list[BaseException] = []
    ready = threading.Barrier(len(made))

    def write(number: int) -> None:
        try:
            mine = open_catalogue(url, store)
            ready.wait()
            mine.publish("demo", made[number], "2026-11-30")
            mine.publish(f"other{number % 2}", made[number], "2026-11-30")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    for name, count in (("demo", 8), ("other0", 4), ("other1", 4)):
        chain = [row for row in any_catalogue.names() if row.name == name]
        assert len(chain) == count
        before = [row.predecessor for row in chain]
        assert before == [*(row.version for row in chain[1:]), None]


def test_a_difference_against_a_version_that_was_followed_is_refused(
    store: Store, any_catalogue: Catalogue
) -> None:
    first, second, third = (make(store, any_catalogue, count) for count in (3, 4, 5))
    row = any_catalogue.publish("demo", first, "2026-11-30", after=0)
    any_catalogue.publish("demo", second, "2026-11-30", {"added": 1}, after=row.number)
    with pytest.raises(PublishedMeanwhile, match=r"demo@2026-11-30\.2"):
        any_catalogue.publish("demo", third, "2026-11-30", {"added": 2}, after=row.number)
    assert len(any_catalogue.names()) == 2


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-900, 900)), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_any_clocks_leave_one_chain(
    store: Store, catalogue: Catalogue, steps: list[tuple[int, int]]
) -> None:
    """Each step publishes one of five contents, with a clock that is wrong by so many minutes."""
    made = [make(store, catalogue, count) for count in range(1, 6)]
    name = f"demo{len(catalogue.names())}"
    expected: list[str] = []
    for content, minutes in steps:
        row = catalogue.publish(name, made[content], "2026-11-30")
        if not expected or expected[-1] != made[content].digest:
            expected.append(made[content].digest)
        newest = catalogue.newest(name)
        assert newest is not None and newest.digest == expected[-1]
        with catalogue.session() as session:
            moment = datetime.now(UTC) + timedelta(minutes=minutes)
            session.execute(
                sa.update(NameRow).where(NameRow.number == row.number).values(created_at=moment)
            )
    chain = [row for row in reversed(catalogue.names()) if row.name == name]
    assert [row.digest for row in chain] == expected
    assert [row.predecessor for row in chain] == [None, *(row.version for row in chain[:-1])]


def test_an_older_catalogue_is_numbered_along_its_chains(tmp_path: Path) -> None:
    """A catalogue in which one version was published with the clock ahead."""
    url = f"sqlite:///{tmp_path}/old.db"
    engine = sa.create_engine(url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.commit()
    with sqlite3.connect(tmp_path / "old.db") as old:
        for digest, time in (("a", "2026-11-27"), ("b", "2026-12-09"), ("c", "2026-11-28")):
            old.execute(
                "INSERT INTO artifact VALUES (?, 'dataset', 'pack', 'k', '', '{}', ?)",
                (digest, f"{time} 00:00:00"),
            )
        rows = [  # name, version, digest, predecessor, time; the last two both follow the second
            ("demo", "2026-11-27", "a", None, "2026-11-27 09:00:00"),
            ("demo", "2026-12-09", "b", "2026-11-27", "2026-12-09 09:00:00"),
            ("demo", "2026-11-28", "a", "2026-12-09", "2026-11-28 09:00:00"),
            ("demo", "2026-11-29", "c", "2026-12-09", "2026-11-29 09:00:00"),
            ("other", "2026-11-29", "a", None, "2026-11-29 08:00:00"),
        ]
        old.executemany(
            "INSERT INTO name (name, version, digest, predecessor, created_at) "
            "VALUES (?, ?, ?, ?, ?)", rows,
        )  # fmt: skip
    catalogue = open_catalogue(url, NO_STORE)
    order = [row.version for row in reversed(catalogue.names()) if row.name == "demo"]
    assert order == ["2026-11-27", "2026-12-09", "2026-11-28", "2026-11-29"]
    newest = catalogue.newest("demo")
    assert newest is not None and newest.digest == "c"
    with catalogue.session() as session:
        numbers = list(session.scalars(sa.select(ArtifactRow.number)))
    assert sorted(numbers) == [1, 2, 3]


def test_a_following_stage_takes_over_from_its_last_run(store: Store, catalogue: Catalogue) -> None:
    from dataclasses import replace

    stage = replace(NUMBERS, follows=True)
    run_stage(stage, store, catalogue, {}, Settings(count=3))
    set_clocks(catalogue, datetime.now(UTC) + timedelta(days=1))
    stage = replace(stage, fields=())
    first = run_stage(stage, store, catalogue, {}, Settings(count=4))
    job = with_previous(stage, make_job(stage, store, {}, Settings(count=4)), catalogue)
    assert job.previous is not None and job.previous.digest == first.digest
