"""The same items table through different servers: a real pgstac, and the original server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.hashing import sha256_file
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.config.recipe import SearchSettings
from geofm.stac.search import STAGE
from tests.geofm.stac.pgstac_server import pgstac
from tests.geofm.stac.small_world import World, add_scene, identity, serve, texture
from tests.geofm.stac.world_server import served

REAL = ["derived-copies", "sentinel-2-l1c"]
#: Hostile items that PostgreSQL can't hold: a zero byte in the id, no datetime, or the id of
#: another item (the last item loaded stays).
REFUSED = {"bad\nid\u202e\x00", "hostile-17", "hostile-duplicate"}


def search(store: Store, catalogue: Catalogue, stac: str, **fields: Any) -> Artifact:
    settings = SearchSettings.model_validate({"stac": stac, **fields})
    return run_stage(STAGE, store, catalogue, {}, settings)


def table_of(items: Artifact) -> str:
    return sha256_file(items.path("items.parquet"))


@pytest.fixture(scope="module")
def small(
    postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[World, str]]:
    """Serve a generated world whose items a database writes in another way."""
    with serve() as world:
        pixels = {"red": texture(32, 32)}
        add_scene(world, "old", pixels, **identity("31UDQ", "02.05", "2018-01-01T00:00:00Z"))
        add_scene(world, "new", pixels, **identity("31UDQ", "05.00", "2023-01-01T00:00:00Z"))
        add_scene(world, "nulls", pixels, empty=None, inner={"a": None, "b": [None, {"c": None}]})
        add_scene(
            world, "numbers", pixels, one=1.0, large=10**20, exact=2**53 + 1, small=1e-7,
            minus=-0.0, third=0.1 + 0.2, most=1.7976931348623157e308,
        )  # fmt: skip
        span = {"start_datetime": "2020-01-01T00:00:00Z", "end_datetime": "2020-01-02T00:00:00Z"}
        add_scene(world, "range", pixels, **span)["properties"]["datetime"] = None
        late = add_scene(world, "zone", pixels, eo="é\ud83d\ude00")
        late["properties"]["datetime"] = "2020-01-01T02:00:00.500+02:00"
        for number, item in enumerate(world.items):
            item["properties"]["updated"] = f"2024-01-0{number + 1}T00:00:00.000Z"
        world.collections[0] |= {
            "description": "small", "links": [], "stac_version": "1.0.0",
            "extent": {"spatial": {"bbox": [[-180, -90, 180, 90]]},
                       "temporal": {"interval": [["2019-01-01T00:00:00Z", None]]}},
            "item_assets": {"red": {"title": "Red", "roles": ["data"]}, "nir": {"title": "NIR"}},
        }  # fmt: skip
        folder = tmp_path_factory.mktemp("pgstac")
        with pgstac(postgres_url, "small", world.collections, world.items, folder) as url:
            yield world, url


def test_a_generated_world_is_the_same_through_pgstac(
    store: Store, catalogue: Catalogue, small: tuple[World, str]
) -> None:
    world, url = small
    direct, through = (search(store, catalogue, stac) for stac in (world.url, url))
    frame = through.table("items.parquet").set_index("item_id")
    assert dict(frame.status) == {
        "old": "dropped", "new": "ok", "nulls": "ok", "numbers": "ok", "range": "ok", "zone": "ok",
    }  # fmt: skip
    assert table_of(through) == table_of(direct)


def test_pgstac_by_time_and_ground(
    store: Store, catalogue: Catalogue, small: tuple[World, str]
) -> None:
    _, url = small
    whole = table_of(search(store, catalogue, url))
    for area in ({"bbox": (2, 48, 3, 49)}, {"places": ["2.3/48.85/20"]}):
        assert table_of(search(store, catalogue, url, datetime="2020", **area)) == whole
    none = search(store, catalogue, url, datetime="2020-01-01T00:00:00.5Z")
    assert set(none.table("items.parquet").item_id) == {"range", "zone"}


def test_a_refresh_through_pgstac_asks_for_what_is_new(
    store: Store, catalogue: Catalogue, small: tuple[World, str], postgres_url: str
) -> None:
    psycopg = pytest.importorskip("psycopg")
    _, url = small
    database_url = postgres_url.replace("+psycopg", "").rpartition("/")[0] + "/small"
    first = search(store, catalogue, url)
    assert search(store, catalogue, url).digest == first.digest
    assert [run.metrics["asked"] for run in catalogue.runs()] == ["whole", "whole"]
    with psycopg.connect(database_url, autocommit=True) as database:
        database.execute("UPDATE pgstac.pgstac_settings SET value = 'on' WHERE name = 'context'")
    assert search(store, catalogue, url).digest == first.digest
    assert catalogue.runs()[-1].metrics["asked"] == "updated"


@pytest.fixture(scope="module")
def dev(
    shared: Path, postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """Serve the development world by its own server, and its items by pgstac."""
    with served(shared) as url:
        collections = httpx.get(url + "/collections").json()["collections"]
        items = httpx.post(url + "/search", json={"limit": 1000}).json()["features"]
        keep = [item for item in items if item["id"] not in REFUSED]
        assert len(items) - len(keep) == len(REFUSED) + 1
        folder = tmp_path_factory.mktemp("pgstac-dev")
        with pgstac(postgres_url, "dev", collections, keep, folder) as through:
            yield url, through


def test_the_dev_world_is_the_same_through_pgstac(
    store: Store, catalogue: Catalogue, dev: tuple[str, str]
) -> None:
    tables = [search(store, catalogue, url, collections=REAL) for url in dev]
    assert tables[0].manifest.counts == {"rows_in": 57, "rows_out": 51}
    assert table_of(tables[0]) == table_of(tables[1])
    assert sha256_file(tables[0].path("stac.parquet")) == sha256_file(
        tables[1].path("stac.parquet")
    )


def test_hostile_items_have_the_same_verdict_through_pgstac(
    store: Store, catalogue: Catalogue, dev: tuple[str, str]
) -> None:
    direct, through = (
        search(store, catalogue, url, collections=["hostile"]).table("items.parquet") for url in dev
    )
    kept = direct[~direct.item_id.isin(REFUSED)].reset_index(drop=True)
    assert len(through) == 18
    assert kept.equals(through)
