from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shapely
from pyproj import Transformer

from data_catalog.artifact import Artifact
from data_catalog.catalogue import Catalogue
from data_catalog.errors import RunError, UsageError
from data_catalog.run import run_stage
from data_catalog.store import Store
from geofm.chips import cut
from geofm.chips.recut import recut
from geofm.config.recipe import CutSettings, SearchSettings
from geofm.formats.npy import read_chip
from geofm.stac import search
from tests.geofm.stac.small_world import NORTH, WEST, World, add_scene, identity, texture, tiff


class Run:
    """Search and cut of a small world."""

    def __init__(self, store: Store, catalogue: Catalogue, world: World) -> None:
        self.store, self.catalogue, self.world = store, catalogue, world
        self.search: dict[str, Any] = {}

    def items(self) -> Artifact:
        found = SearchSettings.model_validate({"stac": self.world.url, **self.search})
        return run_stage(search.STAGE, self.store, self.catalogue, {}, found)

    def chips(self, **settings: Any) -> Artifact:
        usual = {"size_px": 32, "bands": ["red"], "retries": 1, "max_failed": 0.9}
        found = CutSettings.model_validate({**usual, **settings})
        inputs = {"items": self.items()}
        return run_stage(cut.STAGE, self.store, self.catalogue, inputs, found)


@pytest.fixture
def run(store: Store, catalogue: Catalogue, world: World) -> Run:
    return Run(store, catalogue, world)


def good(chips: Artifact) -> pd.DataFrame:
    frame = chips.table("chips.parquet")
    return frame[frame.status == "ok"].reset_index(drop=True)


def reasons(chips: Artifact) -> dict[str, str]:
    frame = chips.table("chips.parquet")
    bad = frame[frame.status == "quarantined"]
    return dict(zip(bad.item_id, bad.reason, strict=True))


def test_chips_are_the_scenes_pixels(run: Run) -> None:
    red, green = texture(70, 100), texture(70, 100, 1)
    add_scene(run.world, "a", {"red": red, "green": green})
    chips = run.chips(bands=["green", "red"])
    frame = good(chips)
    assert len(frame) == 2 * 3
    for row in frame.itertuples():
        pixels = read_chip(chips, row)
        window = (slice(row.row, row.row + 32), slice(row.col, row.col + 32))
        assert pixels.dtype == np.uint16
        assert np.array_equal(pixels, np.stack([green[window], red[window]]))
        assert row.transform[2] == WEST + row.col * 10
        assert row.transform[5] == NORTH - row.row * 10
    assert set(frame.valid_fraction) == {1.0}
    assert frame.cloud_fraction.isna().all()
    assets = chips.table("assets.parquet")
    assert list(assets.band) == ["green", "red"]
    assert set(assets.sha256_from) == {"computed"}
    assert list(good(run.chips(bands=["green", "red"])).chip_id) == list(frame.chip_id)


def test_the_offset_is_applied_once_and_nodata_stays(run: Run) -> None:
    red = texture(32, 32) + 900
    red[:4] = 0
    red[5, 5] = 400
    add_scene(run.world, "new", {"red": red}, offset=-0.1)
    chips = run.chips()
    row = good(chips).iloc[0]
    pixels = read_chip(chips, row)[0]
    assert list(row.dn_offset) == [-1000]
    assert list(row.scale) == [0.0001]
    assert (pixels[:4] == 0).all()
    assert pixels[5, 5] == 1
    rest = red[6:].astype(int) - 1000
    assert np.array_equal(pixels[6:], np.maximum(rest, 1))
    assert row.valid_fraction == pytest.approx(28 / 32)


def test_an_offset_in_the_pixels_is_left_alone(run: Run) -> None:
    red = texture(32, 32)
    flag = {"earthsearch:boa_offset_applied": True}
    add_scene(run.world, "done", {"red": red}, offset=-0.1, **flag)
    chips = run.chips()
    assert np.array_equal(read_chip(chips, good(chips).iloc[0])[0], red)


def test_coarse_bands_are_resampled_and_it_is_written_down(run: Run) -> None:
    coarse = texture(32, 32)
    item = add_scene(
        run.world, "a", {"red": texture(64, 64), "swir16": coarse}, gsd={"swir16": 20.0}
    )
    chips = run.chips(bands=["red", "swir16"], resampling="nearest")
    frame = good(chips)
    pixels = read_chip(chips, frame[(frame.row == 0) & (frame.col == 0)].iloc[0])[1]
    assert np.array_equal(pixels, coarse[:16, :16].repeat(2, 0).repeat(2, 1))
    assets = chips.table("assets.parquet")
    assert dict(zip(assets.band, assets.resampling, strict=True)) == {
        "red": "", "swir16": "nearest",
    }  # fmt: skip
    halved = run.chips(bands=["red"], gsd_m=20, resampling="average")
    assert len(good(halved)) == 1
    assert set(good(halved).gsd_m) == {20}
    assert item["id"] == "a"


def test_clouds_saturation_and_constants_are_measured(run: Run) -> None:
    scl = np.full((16, 16), 5, np.uint8)
    scl[:4], scl[4:8] = 9, 3
    red = texture(32, 32)
    red[:8] = 12_000
    add_scene(run.world, "a", {"red": red, "scl": scl}, gsd={"scl": 20.0})
    add_scene(run.world, "flat", {"red": np.full((32, 32), 7, np.uint16)})
    frame = good(run.chips()).set_index("item_id")
    assert frame.cloud_fraction["a"] == 0.25
    assert frame.shadow_fraction["a"] == 0.25
    assert frame.saturated_fraction["a"] == 0.25
    assert list(frame.constant[["a", "flat"]]) == [False, True]
    assert math.isnan(frame.cloud_fraction["flat"])


def test_eight_bit_pictures_stay_as_they_are(run: Run) -> None:
    red = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    item = add_scene(run.world, "photo", {"red": red}, collection="drone")
    href = run.world.add("/files/photo/red.tif", tiff(red, nodata=None))
    item["assets"]["red"] = {"href": href}
    chips = run.chips()
    row = good(chips).iloc[0]
    assert row["dtype"] == "uint8"
    assert np.array_equal(read_chip(chips, row)[0], red)


def spoil(run: Run, name: str, pixels: np.ndarray, **change: Any) -> None:
    """A scene whose red file is another one than its item says."""
    item = add_scene(run.world, name, {"red": texture(32, 32)})
    run.world.add(f"/files/{name}/red.tif", tiff(pixels, **change))
    del item["assets"]["red"]["file:checksum"]


def test_bad_items_are_rows_with_a_reason(run: Run) -> None:
    red = texture(32, 32)
    add_scene(run.world, "good", {"red": red})
    checksum = add_scene(run.world, "checksum", {"red": red})
    checksum["assets"]["red"]["file:checksum"] = "1220" + "0" * 64
    spoil(run, "shape", texture(64, 64))
    spoil(run, "crs", red, crs="EPSG:32632")
    spoil(run, "elsewhere", red, west=600_000)
    spoil(run, "complex", red.astype(np.complex64))
    nan = red.astype(np.float32)
    nan[3] = np.nan
    spoil(run, "nan", nan)
    gone = add_scene(run.world, "gone", {"red": red})
    gone["assets"]["red"]["href"] += "x"
    outside = add_scene(run.world, "outside", {"red": red})
    outside["assets"]["red"]["href"] = "http://127.0.0.1:9/red.tif"
    add_scene(run.world, "bandless", {"green": red})
    chips = run.chips()
    assert reasons(chips) == {
        "checksum": "wrong_checksum", "shape": "shape_mismatch", "crs": "crs_mismatch",
        "elsewhere": "footprint_mismatch", "complex": "bad_dtype", "nan": "nan_values",
        "gone": "not_found", "outside": "host_refused", "bandless": "missing_band",
    }  # fmt: skip
    assert list(good(chips).item_id) == ["good"]
    assert chips.manifest.counts == {"rows_in": 10, "rows_out": 1}
    with pytest.raises(RunError, match=r"cut\.max_failed = 0\.5.*allow_hosts"):
        run.chips(max_failed=0.5)


def test_floats_become_counts(run: Run) -> None:
    spoil(run, "float", np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32), nodata=None)
    run.world.items[0]["assets"]["red"].pop("raster:bands")
    chips = run.chips()
    pixels = read_chip(chips, good(chips).iloc[0])
    assert pixels.dtype == np.uint16
    assert pixels.max() == 10_000


def overlap_pair(run: Run, **second: Any) -> None:
    add_scene(run.world, "a", {"red": texture(64, 64)}, **identity("31UDQ", "05.00", "2023-01-01"))
    add_scene(
        run.world, "b", {"red": texture(64, 64)}, west=WEST + 320,
        **{**identity("31UEQ", "05.00", "2023-01-01"), **second},
    )  # fmt: skip


def test_overlapping_tiles_share_their_ground_once(run: Run) -> None:
    overlap_pair(run)
    frame = run.chips().table("chips.parquet")
    lost = frame[frame.status == "dropped"]
    told = lost[["item_id", "reason", "witness"]].to_numpy().tolist()
    assert told == [["b", "overlap", "a"]] * 2
    assert (lost.part == "").all()
    kept = frame[frame.status == "ok"]
    assert kept.cell.is_unique
    assert len(kept) == 6


@pytest.mark.parametrize(
    "second",
    [
        {
            "datetime": "2020-01-02T00:00:00Z",
            "s2:datatake_id": "GS2A_20200102T000000_000002_N05.00",
        },
        {"s2:datatake_id": None},
    ],
    ids=["another day", "no pass"],
)
def test_ground_of_other_days_is_kept(run: Run, second: dict[str, Any]) -> None:
    overlap_pair(run, **second)
    assert len(good(run.chips())) == 8


def test_an_acquisition_that_passes_midnight_is_one(run: Run) -> None:
    overlap_pair(run, datetime="2020-01-02T00:00:05Z")
    assert len(good(run.chips())) == 6


def test_two_passes_of_one_day_share_their_ground(run: Run) -> None:
    overlap_pair(run, **{"s2:datatake_id": "GS2A_20200101T000000_000002_N05.00"})
    assert len(good(run.chips())) == 6


def test_overlap_across_zones_leaves_no_hole(run: Run) -> None:
    here, there = "EPSG:32631", "EPSG:32632"
    east, north = 767_680.0, 5_411_200.0
    add_scene(run.world, "a", {"red": texture(160, 160)}, west=east, north=north,
              **identity("31UGQ", "05.00", "2023-01-01"))  # fmt: skip
    x, y = Transformer.from_crs(here, there, always_xy=True).transform(east + 600, north)
    x, y = math.floor(x / 320) * 320, math.floor(y / 320) * 320
    add_scene(run.world, "b", {"red": texture(160, 160)}, west=x, north=y, epsg=32632,
              **identity("32ULQ", "05.00", "2023-01-01"))  # fmt: skip
    everything = run.chips(max_overlap=1.0).table("chips.parquet")
    frame = run.chips(max_overlap=0.5).table("chips.parquet")
    lost = frame[frame.status == "dropped"]
    kept = frame[frame.status == "ok"]
    assert 0 < len(lost) < 25
    assert set(lost.witness) == {"a"}
    owner = shapely.union_all(kept[kept.item_id == "a"].geometry)
    shares = [owner.intersection(area).area / area.area for area in lost.geometry]
    assert min(shares) >= 0.49
    rest = [owner.intersection(g).area / g.area for g in kept[kept.item_id == "b"].geometry]
    assert max(rest) < 0.51
    assert len(everything) == len(frame) == 50


def test_ground_of_an_item_found_bad_late_goes_to_the_next(run: Run) -> None:
    overlap_pair(run)
    run.world.items[0]["assets"]["red"]["file:checksum"] = "1220" + "0" * 64
    chips = run.chips()
    assert reasons(chips) == {"a": "wrong_checksum"}
    frame = good(chips)
    assert list(frame.item_id) == ["b"] * 4
    pixels = [read_chip(chips, row) for row in frame.itertuples()]
    assert all(p.shape == (1, 32, 32) for p in pixels)


def test_parts_are_used_again_and_faults_leave_no_trace(run: Run) -> None:
    overlap_pair(run)
    first = run.chips()
    asked = len([path for path in run.world.asked if path.startswith("/files")])
    add_scene(run.world, "c", {"red": texture(64, 64)}, north=NORTH - 640)
    second = run.chips()
    again = [path for path in run.world.asked if path.startswith("/files")][asked:]
    assert {path.split("/")[2] for path in again} == {"c"}
    assert set(first.table("chips.parquet").chip_id) < set(second.table("chips.parquet").chip_id)


def test_parts_of_a_table_whose_rows_have_moved_are_used_again(run: Run, tmp_path: Any) -> None:
    from data_catalog.catalogue import open_catalogue
    from data_catalog.store import open_store

    for name, south in (("k", 0), ("m", 6400), ("p", 12_800)):
        add_scene(run.world, name, {"red": texture(64, 64)}, north=NORTH - south)
    run.chips()
    for name, south in (("a", 19_200), ("l", 25_600)):
        add_scene(run.world, name, {"red": texture(64, 64)}, north=NORTH - south)
    run.world.items.pop(1)  # m is withdrawn
    run.world.asked.clear()
    second = run.chips()
    asked = {path.split("/")[2] for path in run.world.asked if path.startswith("/files")}
    assert asked == {"a", "l"}
    other = open_store(tmp_path / "other")
    catalogue = open_catalogue(f"sqlite:///{tmp_path}/o.db", other)
    afresh = Run(other, catalogue, run.world).chips()
    frames = [one.table("chips.parquet").drop(columns="geometry") for one in (second, afresh)]
    pd.testing.assert_frame_equal(*frames)
    assert set(good(second).item_id) == {"a", "k", "l", "p"}


def test_a_passing_failure_heals_when_the_run_seals(run: Run, tmp_path: Any) -> None:
    from data_catalog.catalogue import open_catalogue
    from data_catalog.store import open_store

    overlap_pair(run)
    expected = run.chips().digest
    store = open_store(tmp_path / "other")
    other = Run(store, open_catalogue(f"sqlite:///{tmp_path}/o.db", store), run.world)
    run.world.faults["/files/a/red.tif"] += [503, 503]  # retries is 1: the probe gives up
    assert other.chips().digest == expected


def test_chips_can_be_cut_again(run: Run) -> None:
    add_scene(run.world, "a", {"red": texture(70, 100), "swir16": texture(35, 50)},
              gsd={"swir16": 20.0}, offset=-0.05)  # fmt: skip
    chips, items = run.chips(bands=["red", "swir16"]), run.items()
    names = list(good(chips).chip_id)
    results = recut(chips, items, names[::-1])
    assert [one.chip_id for one in results] == names[::-1]
    assert all(one.expected == one.got and not one.problem for one in results)
    run.world.files.pop("/files/a/red.tif")
    gone = recut(chips, items, names[:1])[0]
    assert gone.got is None
    assert gone.problem.startswith("not_found")
    assert "asset red (" in gone.changed
    assert "can't be read any more" in gone.changed
    with pytest.raises(UsageError, match="no chip with pixels"):
        recut(chips, items, ["0" * 24])


def test_nothing_left_is_an_error(run: Run) -> None:
    add_scene(run.world, "a", {"red": texture(20, 20)})
    with pytest.raises(RunError, match=r"cut\.size_px"):
        run.chips()
