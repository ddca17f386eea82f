"""The built world: reproducible bytes, valid COGs, and planted cases that the pixels confirm."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
from pyproj import Transformer
from rasterio.windows import from_bounds
from shapely.geometry import shape

from geofm.planet.catalog import site
from geofm.planet.scenes import RIM, default_plan, small_plan
from geofm.planet.world import build_world, world_items

BANDS = ("blue", "green", "red", "nir", "swir16")


def files(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def items(small_world: Path) -> dict[str, Any]:
    return {item["id"]: item for item in world_items(small_world)}


@pytest.fixture(scope="module")
def cases(small_world: Path) -> list[dict[str, Any]]:
    return json.loads((small_world / "truth.json").read_bytes())["cases"]


def of_kind(cases: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    matching = [case for case in cases if case["kind"] == kind]
    assert matching
    return matching


def reflectance(root: Path, item: dict[str, Any], band: str) -> np.ndarray:
    """[H, W] with NaN where there is no data."""
    asset = item["assets"][band]
    with rasterio.open(root / asset["href"]) as source:
        counts = source.read(1)
    radiometry = asset["raster:bands"][0]
    values = counts * radiometry["scale"] + radiometry["offset"]
    return np.where(counts == radiometry["nodata"], np.nan, values)


def test_two_builds_give_the_same_bytes(small_world: Path, tmp_path: Path) -> None:
    site.make_planet.cache_clear()
    again = build_world(tmp_path, seed=7, plan=small_plan())
    assert files(again) == files(small_world)
    assert not [path for path in tmp_path.iterdir() if path != again]


def test_a_built_world_is_found_again(small_world: Path) -> None:
    before = (small_world / "truth.json").stat().st_mtime_ns
    assert build_world(small_world.parent, seed=7, plan=small_plan()) == small_world
    assert (small_world / "truth.json").stat().st_mtime_ns == before


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("geofm.planet.world.cog_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        build_world(tmp_path, seed=7, plan=small_plan())
    assert list(tmp_path.iterdir()) == []


def test_assets_are_cogs_as_their_items_say(small_world: Path, items: dict[str, Any]) -> None:
    for item in items.values():
        for key, asset in item["assets"].items():
            data = (small_world / asset["href"]).read_bytes()
            assert len(data) == asset["file:size"]
            assert "1220" + hashlib.sha256(data).hexdigest() == asset["file:checksum"]
            if key == "thumbnail":
                continue
            with rasterio.open(small_world / asset["href"]) as source:
                assert source.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
                assert source.profile["tiled"]
                assert source.overviews(1) or max(source.shape) <= 256
                assert source.crs.to_string() == item["properties"]["proj:code"]
                assert list(source.shape) == asset["proj:shape"]
                assert list(source.transform)[:6] == asset["proj:transform"]
                assert source.dtypes[0] == asset["raster:bands"][0]["data_type"]
                assert source.nodata == 0


def test_footprints_lie_where_the_pixels_are(small_world: Path, items: dict[str, Any]) -> None:
    for item in items.values():
        area = shape(item["geometry"])
        assert item["bbox"] == pytest.approx(area.bounds)
        with rasterio.open(small_world / item["assets"]["red"]["href"]) as source:
            move = Transformer.from_crs(source.crs, "EPSG:4326", always_xy=True)
            data = source.read(1) > 0
            rows, columns = np.nonzero(data)
            pick = np.linspace(0, len(rows) - 1, 50).astype(int)
            x, y = source.transform @ (columns[pick] + 0.5, rows[pick] + 0.5)
        points = shapely.points(*move.transform(x, y))
        assert shapely.contains(area.buffer(2e-4), points).all()


def test_a_reprocessed_scene_has_the_same_reflectance(
    small_world: Path, items: dict[str, Any], cases: list[dict[str, Any]]
) -> None:
    (case,) = of_kind(cases, "reprocessed")
    old, new = (items[name] for name in case["items"])
    assert case["keep"] == new["id"]
    for band in BANDS:
        a, b = reflectance(small_world, old, band), reflectance(small_world, new, band)
        assert np.array_equal(np.round(a, 6), np.round(b, 6))
        assert old["assets"][band]["raster:bands"][0]["offset"] == 0
        assert new["assets"][band]["raster:bands"][0]["offset"] == pytest.approx(-0.1)
    take_old, take_new = (i["properties"]["s2:datatake_id"] for i in (old, new))
    assert take_old.rpartition("_N")[0] == take_new.rpartition("_N")[0]
    assert (take_old[-5:], take_new[-5:]) == ("03.00", "05.00")


def test_a_second_station_differs_only_in_its_strip(
    items: dict[str, Any], cases: list[dict[str, Any]]
) -> None:
    (case,) = of_kind(cases, "second_station")
    a, b = (items[name]["properties"] for name in case["items"])
    for name in ("s2:datatake_id", "grid:code", "s2:processing_baseline", "datetime"):
        assert a[name] == b[name]
    for name in ("s2:datastrip_id", "s2:sequence", "s2:product_uri", "s2:generation_time"):
        assert a[name] != b[name]


def test_overlapping_tiles_agree_on_the_ground(
    small_world: Path, items: dict[str, Any], cases: list[dict[str, Any]]
) -> None:
    overlaps = of_kind(cases, "tile_overlap")
    assert {case["same_crs"] for case in overlaps} == {True, False}
    for case in overlaps:
        a, b = (items[name]["assets"]["red"]["href"] for name in case["items"])
        with rasterio.open(small_world / a) as first, rasterio.open(small_world / b) as second:
            if case["same_crs"]:
                a_box, b_box = first.bounds, second.bounds
                box = (*np.maximum(a_box[:2], b_box[:2]), *np.minimum(a_box[2:], b_box[2:]))
                pair = [s.read(1, window=from_bounds(*box, s.transform)) for s in (first, second)]
                assert pair[0].size > 128 * 128
                assert np.array_equal(*pair)
                continue
            inside = shape(case["overlap"]).buffer(-0.001)
            west, south, east, north = inside.bounds
            rng = np.random.default_rng(0)
            points = rng.uniform((west, south), (east, north), (3000, 2))
            points = points[shapely.contains_xy(inside, points)]
            seen = []
            for source in (first, second):
                move = Transformer.from_crs("EPSG:4326", source.crs, always_xy=True)
                x, y = move.transform(*points.T)
                column, row = ~source.transform @ (np.array(x), np.array(y))
                seen.append(source.read(1)[row.astype(int), column.astype(int)].astype(float))
            valid = (seen[0] > 0) & (seen[1] > 0)
            assert valid.sum() > 300
            assert np.corrcoef(seen[0][valid], seen[1][valid])[0, 1] > 0.75


def test_the_swath_ends_in_all_bands_alike(
    small_world: Path, items: dict[str, Any], cases: list[dict[str, Any]]
) -> None:
    (case,) = of_kind(cases, "nodata_border")
    item = items[case["items"][0]]
    gap = np.isnan(reflectance(small_world, item, "red"))
    assert 0.2 < gap.mean() < 0.6
    assert np.array_equal(gap, np.isnan(reflectance(small_world, item, "nir")))
    assert np.array_equal(gap[::2, ::2], np.isnan(reflectance(small_world, item, "swir16")))
    with rasterio.open(small_world / item["assets"]["scl"]["href"]) as source:
        assert np.array_equal(gap[::2, ::2], source.read(1) == 0)


def test_water_is_dark_and_crops_change_with_the_season(
    small_world: Path, items: dict[str, Any]
) -> None:
    with rasterio.open(small_world / "truth" / "31TXG.tif") as source:
        water = source.read(1) == 1
    item = items["S2A_31TXG_20231016_0_L2A"]
    nir, red = (reflectance(small_world, item, band) for band in ("nir", "red"))
    with rasterio.open(small_world / item["assets"]["scl"]["href"]) as source:
        codes = np.repeat(np.repeat(source.read(1), 2, axis=0), 2, axis=1)
    clear = np.isin(codes, (4, 5, 6))
    assert np.nanmedian(nir[water & clear]) < 0.06
    assert np.nanmedian(((nir - red) / (nir + red))[~water & clear]) > 0.25
    with rasterio.open(small_world / "truth" / "31TXD.tif") as source:
        crops = source.read(1) == 3
    spring, summer = (
        reflectance(small_world, items[name], "nir")[crops]
        for name in ("S2A_31TXD_20240428_0_L2A", "S2A_31TXD_20210603_0_L2A")
    )
    assert np.mean(np.abs(spring - summer)) > 0.03


def test_the_default_plan_offers_what_a_demo_needs() -> None:
    plan = default_plan()
    assert sum(tile_cells(plan, p.tile) for p in plan.products) >= 600
    assert {tile.epsg for tile in plan.tiles} == {32631, 32632}
    for tile in (*plan.tiles, *plan.aerial):
        assert all(0 <= shift <= RIM and shift % 2 == 0 for shift in tile.shift)


def tile_cells(plan: Any, name: str) -> int:
    return next(tile.cells for tile in plan.tiles if tile.name == name) ** 2
