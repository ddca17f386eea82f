"""The catalogue: references, names and runs, on SQLite and on PostgreSQL with the same code."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from data_catalog.catalogue import (
    Catalogue,
    UnknownReference,
    open_catalogue,
)
from data_catalog.database.connection import CatalogueUnreachable
from data_catalog.database.schema import Base
from data_catalog.provenance.costs import lineage_costs
from data_catalog.provenance.lineage import ancestor, ancestry, walk_lineage
from data_catalog.provenance.verify import verify_chain
from data_catalog.run import run_stage
from data_catalog.store import Store, open_store
from tests.data_catalog.helpers import NO_STORE, NUMBERS, SQUARES, Settings


@pytest.fixture(params=["sqlite", "postgresql"])
def any_catalogue(request: pytest.FixtureRequest, tmp_path: Path, store: Store) -> Catalogue:
    if request.param == "postgresql":
        return open_catalogue(request.getfixturevalue("postgres_url"), store)
    return open_catalogue(f"sqlite:///{tmp_path}/any.db", store)


def test_the_record(store: Store, any_catalogue: Catalogue) -> None:
    catalogue = any_catalogue
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    first = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    second = run_stage(SQUARES, store, catalogue, {"items": items}, Settings(count=7))
    one = catalogue.publish("corpus", first, "2026-11-23")
    assert (one.version, one.predecessor) == ("2026-11-23", None)
    assert catalogue.publish("corpus", first, "2026-11-24").version == "2026-11-23"  # unchanged
    two = catalogue.publish("corpus", second, "2026-11-23")
    assert (two.version, two.predecessor) == ("2026-11-23.2", "2026-11-23")
    assert catalogue.resolve("corpus").digest == second.digest
    assert catalogue.resolve("corpus@2026-11-23").digest == first.digest
    assert catalogue.resolve(first.digest).digest == first.digest
    assert catalogue.resolve(first.digest[:12]).digest == first.digest
    for bad in ("corpus@1999", "nothing", "", "%%%%", "____"):
        with pytest.raises(UnknownReference, match="geofm list"):
            catalogue.resolve(bad)
    kinds = [node.artifact.kind for node in walk_lineage(ancestry(catalogue, second))]
    assert kinds == ["chips", "items"]
    assert ancestor(catalogue, first, "items").digest == items.digest
    with pytest.raises(UnknownReference, match="no model in its lineage"):
        ancestor(catalogue, first, "model")
    spent = lineage_costs(catalogue, [first.digest])
    assert [cost.stage for cost in spent] == ["search", "cut"]
    assert all(cost.seconds and cost.seconds > 0 for cost in spent)
    assert spent[1].metrics["speed"] == 1.0


def test_migrations_and_tables_agree(any_catalogue: Catalogue) -> None:
    with any_catalogue.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() is not None
        assert compare_metadata(context, Base.metadata) == []


def test_two_that_open_at_once_both_get_it(tmp_path: Path) -> None:
    problems: list[BaseException] = []

    def open_it() -> None:
        try:
            open_catalogue(f"sqlite:///{tmp_path}/race.db", NO_STORE).artifacts()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@pytest.mark.parametrize(
    "url",
    ["sqlite:////nowhere/x/y.db", "nonsense", "oracle://x/y", "postgresql+psycopg://u@h:abc/x"],
)
def test_a_bad_address_names_the_remedy(url: str) -> None:
    with pytest.raises(CatalogueUnreachable, match="--catalog or GEOFM_CATALOG"):
        open_catalogue(url, NO_STORE)


def test_a_password_is_never_shown() -> None:
    with pytest.raises(CatalogueUnreachable) as caught:
        open_catalogue("postgresql+psycopg://user:hush@127.0.0.1:1/db", NO_STORE)
    assert "hush" not in str(caught.value)


def test_an_artifact_made_again_elsewhere_is_found_there(
    store: Store, catalogue: Catalogue, tmp_path: Path
) -> None:
    first = run_stage(NUMBERS, store, catalogue, {}, Settings())
    shutil.rmtree(store.local_root)
    elsewhere = open_store(tmp_path / "elsewhere")
    again = run_stage(NUMBERS, elsewhere, catalogue, {}, Settings())
    assert again.digest == first.digest
    assert catalogue.at(elsewhere).resolve(first.digest).url == again.url
    assert len(catalogue.artifacts()) == 1


def test_the_chain_is_walked_past_a_damaged_manifest(store: Store, catalogue: Catalogue) -> None:
    items = run_stage(NUMBERS, store, catalogue, {}, Settings())
    squares = run_stage(SQUARES, store, catalogue, {"items": items}, Settings())
    squares.path("manifest.json").write_bytes(b"{")
    items.path("numbers.json").write_bytes(b"[]")
    fresh = catalogue.resolve(squares.digest)
    problems = verify_chain(catalogue, fresh)
    assert [p for p in problems if "missing or damaged" in p]
    assert [p for p in problems if "numbers.json" in p]
    assert catalogue.kind(squares.digest) == "chips"
