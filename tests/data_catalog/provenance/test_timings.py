"""Timings: runs that computed something, the newest first."""

from __future__ import annotations

from data_catalog.catalogue import Catalogue
from data_catalog.database.schema import RunRow
from data_catalog.provenance.timings import timings_of
from data_catalog.run import run_stage
from data_catalog.store import Store
from tests.data_catalog.helpers import NUMBERS, SQUARES, Settings


def test_only_runs_that_computed_something_are_listed(store: Store, catalogue: Catalogue) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=6))
    assert timings_of(catalogue, "cut") == []
    for _ in range(2):  # the second run finds the artifact
        run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    (found,) = timings_of(catalogue, "cut")
    assert (found.share, found.workers, found.processes) == (1.0, 1, 1)
    assert found.inputs == {"items": {"rows_in": 6, "rows_out": 6}}
    assert found.manifest["counts"]["rows_in"] == 6
    assert found.bytes == sum(len(str(n * n)) for n in range(6))
    assert found.kwh is None


def test_a_run_counts_with_the_share_of_parts_that_it_computed(
    store: Store, catalogue: Catalogue
) -> None:
    for count in (6, 8):
        items = run_stage(NUMBERS, store, catalogue, {}, Settings(count=count))
        run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    newest, oldest = timings_of(catalogue, "cut")
    assert (newest.share, oldest.share) == (2 / 8, 1.0)
    assert [t.manifest["counts"]["rows_in"] for t in timings_of(catalogue, "cut", most=1)] == [8]


def test_the_sessions_of_a_training_count_together(store: Store, catalogue: Catalogue) -> None:
    run_stage(NUMBERS, store, catalogue, {}, Settings())
    with catalogue.session() as session:
        row = session.query(RunRow).one()
        row.metrics = {**row.metrics, "seconds": 500.0, "processes": 4, "kwh": 0.5}
        row.seconds = 20.0
    (found,) = timings_of(catalogue, "search")
    assert (found.seconds, found.processes, found.kwh) == (500.0, 4, 0.5)
