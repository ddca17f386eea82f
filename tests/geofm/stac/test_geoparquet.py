"""stac-geoparquet: searching a table, and the table that a search writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import pytest
import s3fs
import stac_geoparquet.arrow as sga

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import RunError
from data_catalog.hashing import sha256_file
from data_catalog.run import run_stage
from data_catalog.sources import source_for
from data_catalog.store import Store
from geofm.config.recipe import SearchSettings
from geofm.stac import geoparquet
from geofm.stac.bands import find_band
from geofm.stac.canonical_item import canonical_text
from geofm.stac.geoparquet import write_items
from geofm.stac.item import check_item
from geofm.stac.search import STAGE
from geofm.types import Json
from tests.geofm.stac.filter_api import an_item
from tests.geofm.stac.small_world import World, add_scene, texture


def search(store: Store, catalogue: Catalogue, stac: object, **more: Any) -> Artifact:
    settings = SearchSettings.model_validate({"stac": str(stac), **more})
    return run_stage(STAGE, store, catalogue, {}, settings)


def written(tmp_path: Path, *items: Json) -> tuple[dict[str, int], list[Json]]:
    """Write items as a table; returns the counts and the items in the table."""
    path = tmp_path / "stac.parquet"
    counts = write_items([canonical_text(item) for item in items], path)
    rows = list(sga.stac_table_to_items(pq.read_table(path))) if path.exists() else []
    return counts, rows


def test_the_strict_table_is_read_by_other_tools(
    store: Store, catalogue: Catalogue, world: World
) -> None:
    for name in ("a", "b"):
        add_scene(world, name, {"red": texture(32, 32)}, platform="sentinel-2a")
    add_scene(world, "bad", {"red": texture(32, 32)})["geometry"] = None
    items = search(store, catalogue, world.url)
    path = items.local("stac.parquet")
    assert items.manifest.facts["stac_parquet"] == {"items": 2, "left_out": 0}
    frame = gpd.read_parquet(path)
    assert (list(frame.id), frame.crs.to_epsg()) == (["a", "b"], 4326)
    assert not frame.geometry.is_empty.any()
    assert frame.datetime.dt.year.tolist() == [2020, 2020]
    near = gpd.read_parquet(path, bbox=(2.0, 48.0, 3.0, 49.0), columns=["id", "geometry"])
    assert list(near.id) == ["a", "b"]
    assert gpd.read_parquet(path, bbox=(50.0, 0.0, 51.0, 1.0)).empty
    for item in sga.stac_table_to_items(pq.read_table(path)):
        parsed = pystac.Item.from_dict(item)
        assert item["stac_version"] == "1.1.0"
        assert parsed.assets["red"].href == f"{world.url}/files/{parsed.id}/red.tif"
    assert search(store, catalogue, world.url).digest == items.digest


def test_old_items_are_migrated_for_the_table_and_hashed_as_they_are(tmp_path: Path) -> None:
    old = an_item("old", **{"eo:platform": "LANDSAT_8", "eo:epsg": 32631, "eo:sun_azimuth": 97.5,
                             "eo:cloud_cover": 5})  # fmt: skip
    old |= {"stac_version": "0.7.0", "stac_extensions": ["eo"]}
    _, (item,) = written(tmp_path, old)
    assert item["stac_version"] == "1.1.0"
    assert item["properties"]["platform"] == "LANDSAT_8"
    assert item["properties"]["view:sun_azimuth"] == 97.5
    assert json.loads(canonical_text(old))["stac_version"] == "0.7.0"


def test_usgs_items_of_stac_0_7(shared: Path, tmp_path: Path) -> None:
    files = sorted((shared / "data" / "landsat_c2").glob("assets*/*stac.json"))
    items = [json.loads(path.read_text()) for path in files]
    assert len(items) == 3
    for item in items:
        item["collection"] = "landsat-c2-l2"
        canonical = json.loads(canonical_text(item))
        assert check_item(canonical, ["landsat-c2-l2"]).area > 0
        band = find_band(canonical, "red", source_for("http://x", "landsat-c2-l2"))
        assert band.asset == "SR_B4.TIF"
    counts, rows = written(tmp_path, *items)
    assert counts == {"items": 3, "left_out": 0}
    assert {item["properties"]["platform"] for item in rows} == {"LANDSAT_8"}


@pytest.mark.parametrize(
    "strange",
    [
        {"gsd": "ten"}, {"gsd": [10]}, {"gsd": {"m": 10}}, {"gsd": True}, {"created": "yesterday"},
        {"geometry": 7}, {"id": "x"}, {"deep": [[["a"], [{"b": 1}]]]}, {"mixed": [1, "a"]},
        {"large": 10**19}, {"proj:geometry": {"type": "Point"}},
        {"updated": "0001-01-01T00:00:00+10:00"},
    ],
)  # fmt: skip
def test_items_that_contradict_the_others_are_left_out(
    tmp_path: Path, strange: dict[str, Any]
) -> None:
    good = [an_item(f"g{n}", gsd=10 + n / 2, created="2020-01-01T00:00:00Z") for n in range(3)]
    bad = an_item("a-bad")
    bad["properties"] |= strange
    counts, rows = written(tmp_path, bad, *good)
    assert counts["items"] + counts["left_out"] == 4
    assert {"g0", "g1", "g2"} <= {item["id"] for item in rows}


def test_empty_things_are_no_column(tmp_path: Path) -> None:
    counts, rows = written(
        tmp_path, an_item("a", none={}, inner={"x": {}}, listed=[], objects=[{}])
    )
    assert counts == {"items": 1, "left_out": 0}
    assert "none" not in rows[0]["properties"]


def test_a_table_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geoparquet, "MAX_FIELDS", 40)
    wide = an_item("wide", **{f"p{n}": n for n in range(50)})
    counts, rows = written(tmp_path, an_item("a"), wide, an_item("b"))
    assert counts == {"items": 2, "left_out": 1}
    assert [item["id"] for item in rows] == ["a", "b"]


def test_the_bytes_do_not_depend_on_how_items_were_written(tmp_path: Path) -> None:
    first = an_item("a", gsd=10, other=None)
    same = dict(reversed(an_item("a", other=None, gsd=10.0).items()))
    for name, item in (("one", first), ("two", same)):
        write_items([canonical_text(item)], tmp_path / name)
    assert sha256_file(tmp_path / "one") == sha256_file(tmp_path / "two")


def test_a_table_is_searched(
    store: Store, catalogue: Catalogue, world: World, tmp_path: Path, s3: str
) -> None:
    items = [
        an_item("a", updated="2024-01-01T00:00:00.000Z"),
        an_item("b", at=(20.0, 48.0), gsd=10),
    ]
    path = tmp_path / "items.parquet"
    sga.to_parquet(sga.parse_stac_items_to_arrow(
        [{**item, "bbox": [0, 0, 1, 1], "links": [{"rel": "self", "href": "x"}]} for item in items]
    ), path, collections={"c": {"id": "c", "license": "CC-BY-4.0"}})  # fmt: skip
    url = world.add("/items.parquet", path.read_bytes())
    s3fs.S3FileSystem(skip_instance_cache=True).put(str(path), f"{s3}/items.parquet")
    tables = []
    for stac in (path, url, f"{s3}/items.parquet"):
        frame = search(store, catalogue, stac).table("items.parquet")
        assert list(frame.status) == ["ok", "ok"]
        assert set(frame.licence) == {"CC-BY-4.0"}
        tables.append(list(frame.item_sha256))
    assert tables[0] == tables[1] == tables[2]
    canonical = json.loads(frame.item_json[0])
    assert canonical["properties"] == items[0]["properties"] | {"updated": "2024-01-01T00:00:00Z"}
    assert set(
        search(store, catalogue, path, bbox=(1, 47, 4, 50)).table("items.parquet").item_id
    ) == {"a"}


def test_real_items_of_a_table(shared: Path, store: Store, catalogue: Catalogue) -> None:
    path = shared / "data" / "stac_items" / "100-sentinel-2-items.parquet"
    items = search(store, catalogue, path)
    frame = items.table("items.parquet")
    assert items.manifest.counts["rows_in"] == 100
    assert set(frame.status) <= {"ok", "dropped"}
    assert items.manifest.facts["stac_parquet"]["left_out"] == 0


@pytest.mark.parametrize("data", [b"", b"PAR1", b"<html>", "table"])
def test_tables_that_are_none(
    store: Store, catalogue: Catalogue, tmp_path: Path, data: Any
) -> None:
    path = tmp_path / "x.parquet"
    if data == "table":
        pq.write_table(pa.table({"id": [1], "geometry": ["x"]}), path)
    else:
        path.write_bytes(data)
    with pytest.raises(RunError, match=r"is no stac-geoparquet.*check search\.stac"):
        search(store, catalogue, path)
    with pytest.raises(RunError, match=r"cannot be read.*check search\.stac"):
        search(store, catalogue, tmp_path / "gone.parquet")
