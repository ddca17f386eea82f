from __future__ import annotations

import json
import time

import pytest

from data_catalog import sources
from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import RunError, UsageError
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.config.recipe import SearchSettings
from geofm.stac.search import STAGE
from tests.geofm.stac.small_world import World, add_scene, identity, texture

SMALL = {"red": texture(64, 64)}


def search(store: Store, catalogue: Catalogue, stac: str, **fields: object) -> Artifact:
    settings = SearchSettings.model_validate({"stac": stac, **fields})
    return run_stage(STAGE, store, catalogue, {}, settings)


def verdicts(items: Artifact) -> dict[str, tuple[str, str]]:
    frame = items.table("items.parquet", ["item_id", "status", "reason"])
    return {row.item_id: (row.status, row.reason) for row in frame.itertuples()}


def test_every_item_listed_is_a_row(store: Store, catalogue: Catalogue, world: World) -> None:
    add_scene(world, "old", SMALL, **identity("31UDQ", "02.05", "2018-01-01T00:00:00Z"))
    add_scene(world, "new", SMALL, **identity("31UDQ", "05.00", "2023-01-01T00:00:00Z"))
    add_scene(world, "cloudy", SMALL, **{"eo:cloud_cover": 80})
    bad = add_scene(world, "bad", SMALL)
    bad["geometry"] = None
    twice = add_scene(world, "twice", SMALL)
    world.items.append(twice)
    item = add_scene(world, "same-id", SMALL)
    world.items.append({**item, "extra": 1})
    world.items.append({"collection": "sentinel-2-test", "id": "../../x"})
    items = search(store, catalogue, world.url, max_cloud_percent=50)
    frame = items.table("items.parquet")
    assert verdicts(items) == {
        "old": ("dropped", "reprocessed"),
        "new": ("ok", ""),
        "cloudy": ("dropped", "cloud_cover"),
        "bad": ("quarantined", "bad_geometry"),
        "twice": ("dropped", "listed_twice"),
        "same-id": ("quarantined", "duplicate_id"),
        "../../x": ("quarantined", "bad_id"),
    }
    assert sorted(frame[frame.item_id == "twice"].status) == ["dropped", "ok"]
    assert list(frame[frame.item_id == "old"].superseded_by) == ["new"]
    assert set(frame.licence) == {"CC-BY-4.0"}
    assert items.manifest.counts == {"rows_in": 9, "rows_out": 2}
    assert "links" not in json.loads(frame.item_json.iloc[-1])
    assert items.manifest.facts["sources"] == [
        {
            "source": "sentinel-2",
            "licence": "CC-BY-4.0",
            "rows": 2,
            "attribution": "Contains modified Copernicus Sentinel data.",
        }
    ]


def test_the_same_answer_gives_the_same_digest_through_faults(
    store: Store, catalogue: Catalogue, world: World
) -> None:
    for number in range(7):
        add_scene(world, f"i{number}", SMALL)
    first = search(store, catalogue, world.url)
    world.items.reverse()
    world.faults["/search"] += [503, "cut", 429, "cut"]
    world.faults["/collections"] += [500]
    assert search(store, catalogue, world.url).digest == first.digest


def test_pages_are_all_read(store: Store, catalogue: Catalogue, world: World) -> None:
    item = add_scene(world, "first", SMALL)
    world.items += [{**item, "id": f"i{number}"} for number in range(250)]
    assert search(store, catalogue, world.url).manifest.counts["rows_in"] == 251
    assert world.asked.count("/search") == 3
    with pytest.raises(UsageError, match=r"search\.max_items = 100"):
        search(store, catalogue, world.url, max_items=100)


def test_missing_collections_are_skipped_with_a_warning(
    store: Store, catalogue: Catalogue, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    add_scene(world, "a", SMALL)
    items = search(store, catalogue, world.url, collections=["sentinel-2-test", "nothing"])
    assert items.manifest.facts["collections"] == ["sentinel-2-test"]
    assert "lacks nothing" in caplog.text
    with pytest.raises(UsageError, match=r"search\.collections: .* offers sentinel-2-test"):
        search(store, catalogue, world.url, collections=["nothing"])


def test_nothing_found_names_the_query(store: Store, catalogue: Catalogue, world: World) -> None:
    add_scene(world, "a", SMALL)
    world.items.clear()
    with pytest.raises(RunError, match=r"search\.bbox 1,2,3,4, search\.datetime 2020"):
        search(store, catalogue, world.url, bbox=(1, 2, 3, 4), datetime="2020-01-01/2020-02-01")


def test_an_address_without_a_server_is_reported_soon(store: Store, catalogue: Catalogue) -> None:
    began = time.monotonic()
    with pytest.raises(RunError, match=r"cannot be reached.*check search\.stac"):
        search(store, catalogue, "http://127.0.0.1:9")
    assert time.monotonic() - began < 10


def test_an_address_that_is_no_api(store: Store, catalogue: Catalogue, world: World) -> None:
    world.add("/page", b"<html>hello</html>")
    with pytest.raises(RunError, match="not as a STAC API does"):
        search(store, catalogue, world.url + "/page")
    with pytest.raises(RunError, match="HTTP 404"):
        search(store, catalogue, world.url + "/nothing")


def test_a_planet_that_does_not_run(
    store: Store, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GEOFM_PLANET_URL", raising=False)
    with pytest.raises(RunError, match="GEOFM_PLANET_URL"):
        search(store, catalogue, "planet")


def test_the_planets_port_is_not_in_the_artifact(
    store: Store, catalogue: Catalogue, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_scene(world, "a", SMALL, collection="planet-s2")
    world.collections[0]["license"] = "CC0-1.0"
    monkeypatch.setenv("GEOFM_PLANET_URL", world.url)
    frame = search(store, catalogue, "planet").table("items.parquet")
    assert world.url not in frame.item_json[0]
    assert '"href":"planet:/files/a/red.tif"' in frame.item_json[0]
    assert (frame.licence[0], frame.source[0], frame.status[0]) == ("CC0-1.0", "planet-s2", "ok")


def test_a_scene_that_is_too_cloudy_supersedes_no_other(
    store: Store, catalogue: Catalogue, world: World
) -> None:
    for name, version, cover in (("old", "02.05", 19), ("new", "05.00", 21)):
        properties = identity("31UDQ", version, "2018-01-01T00:00:00Z")
        add_scene(world, name, SMALL, **properties, **{"eo:cloud_cover": cover})
    items = search(store, catalogue, world.url, max_cloud_percent=20)
    assert verdicts(items) == {"old": ("ok", ""), "new": ("dropped", "cloud_cover")}


def test_a_changed_profile_changes_the_items(
    store: Store, catalogue: Catalogue, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_scene(world, "a", SMALL)
    first = search(store, catalogue, world.url)
    assert list(first.manifest.facts["profiles"]) == ["sentinel-2"]
    changed = tuple(
        source.model_copy(update={"default_scale": 0.5}) if source.name == "sentinel-2" else source
        for source in sources.load_sources()
    )
    monkeypatch.setattr(sources, "load_sources", lambda: changed)
    assert search(store, catalogue, world.url).digest != first.digest
