"""Publishing at the end of a run: nothing new, no version; a wrong clock, a warning."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.database.schema import NameRow
from data_catalog.run import run_stage
from data_catalog.store import Store
from flows import versions
from tests.data_catalog.helpers import NUMBERS, Settings


@pytest.fixture
def first(store: Store, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setattr(versions, "_difference_to", lambda *_: None)  # these are no datasets
    return run_stage(NUMBERS, store, catalogue, {}, Settings(count=1))


def test_a_version_with_a_time_ahead_is_reported_and_followed(
    store: Store, catalogue: Catalogue, first: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    versions.publish(catalogue, "demo", first)
    assert "clock" not in caplog.text
    with catalogue.session() as session:
        session.execute(sa.update(NameRow).values(created_at=datetime.now(UTC) + timedelta(1)))
    second = run_stage(NUMBERS, store, catalogue, {}, Settings(count=2))
    with caplog.at_level(logging.WARNING):
        published = versions.publish(catalogue, "demo", second)
    assert published.new
    assert "carries a time that is 86" in caplog.text
    assert catalogue.resolve("demo").digest == second.digest
    assert not versions.publish(catalogue, "demo", second).new
    assert len(catalogue.names()) == 2


@pytest.mark.parametrize(("minutes", "words"), [(10, "ahead of"), (-10, "behind")])
def test_a_machine_whose_clock_is_wrong_is_reported(
    catalogue: Catalogue, first: Artifact, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, minutes: int, words: str,
) -> None:  # fmt: skip
    """The database's clock is right, this machine's is not."""
    moment = datetime.now(UTC) - timedelta(minutes=minutes)
    monkeypatch.setattr(Catalogue, "clock", lambda _: moment)
    published = versions.publish(catalogue, "demo", first)
    assert f"{words} the database's clock" in caplog.text
    assert published.row.version == moment.strftime("%Y-%m-%d")


def test_a_version_of_another_run_in_the_meantime_is_followed(
    store: Store, catalogue: Catalogue, first: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [run_stage(NUMBERS, store, catalogue, {}, Settings(count=n)) for n in (2, 3)]
    seen: list[str | None] = []

    def against(catalogue: Catalogue, newest: NameRow | None, dataset: Artifact) -> None:
        seen.append(newest.version if newest else None)
        if others:  # another run publishes while this one compares
            catalogue.publish("demo", others.pop(), "2026-11-30")

    monkeypatch.setattr(versions, "_difference_to", against)
    published = versions.publish(catalogue, "demo", first)
    assert seen == [None, "2026-11-30", "2026-11-30.2"]
    assert published.row.predecessor == "2026-11-30.2"
    assert catalogue.resolve("demo").digest == first.digest


def test_a_predecessor_whose_tables_are_missing_does_not_stop_a_publication(
    store: Store, catalogue: Catalogue, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    old, new = (run_stage(NUMBERS, store, catalogue, {}, Settings(count=n)) for n in (1, 2))
    versions.publish(catalogue, "demo", old)
    old.path("numbers.json").unlink()
    monkeypatch.setattr(versions, "_compare", lambda _, before, __: before.table("numbers.json"))
    assert versions.publish(catalogue, "demo", new).new
    assert "cannot be compared" in caplog.text
