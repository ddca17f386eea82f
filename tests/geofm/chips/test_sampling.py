"""Which windows are cut: by area, footprint, day, season, stratum and budget."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer
from shapely.geometry import box
from shapely.geometry.base import BaseGeometry

from data_catalog.hashing import digest_of
from geofm.chips.overlap import SceneCandidate
from geofm.chips.sampling import REASONS, Windows, choose_windows, sampling_period
from geofm.config.recipe import CutSettings
from geofm.raster.grid import extent_footprint, footprints, make_grid

#: On the ground grid of 32-pixel cells of 10 m.
WEST, NORTH = 448_000.0, 5_411_200.0


def claim(
    name: str = "a",
    *,
    west: float = WEST,
    north: float = NORTH,
    epsg: int = 32631,
    cells: int = 4,
    time: str = "2023-07-01T10:00:00+00:00",
    cloud: float = 0.0,
    nodata: float = 0.0,
    acquisition: str | None = None,
    geometry: BaseGeometry | None = None,
) -> SceneCandidate:
    pixels = cells * 32
    transform = (10.0, 0.0, west, 0.0, -10.0, north)
    grid = make_grid(f"EPSG:{epsg}", transform, (pixels, pixels), 32, None)
    return SceneCandidate(
        collection="s2", item_id=name, item_sha256=digest_of(name), time=time, version="05.00",
        acquisition=time[:10] if acquisition is None else acquisition, cloud=cloud, nodata=nodata,
        grid=grid, geometry=geometry or extent_footprint(grid), chip_bytes=2.0**20,
    )  # fmt: skip


def plan(*claims: SceneCandidate, area: BaseGeometry | None = None, **change: Any) -> Windows:
    return choose_windows(claims, CutSettings(size_px=32, bands=["red"], **change), area)


def told(windows: Windows) -> dict[str, int]:
    return windows.counts()


def test_without_limits_every_whole_cell_is_cut() -> None:
    assert told(plan(claim())) == {"": 16}
    assert told(plan()) == {}


def test_the_area_decides_by_the_cells_centre() -> None:
    whole = claim()
    half = extent_footprint(whole.grid)
    west, south, east, north = half.bounds
    windows = plan(whole, area=box(west, south, (west + east) / 2, north))
    assert told(windows) == {"": 8, "outside_area": 8}
    assert set(windows.chosen(0)[:, 0].tolist()) == {WEST // 320, WEST // 320 + 1}


def test_the_area_across_the_antimeridian() -> None:
    lon, lat = 180.0, -16.0
    x, y = Transformer.from_crs(4326, 32660, always_xy=True).transform(lon, lat)
    scene = claim(west=x // 320 * 320 - 640, north=y // 320 * 320 + 640, epsg=32660)
    east_of_it = box(-180, -17, -179, -15)
    kept = told(plan(scene, area=east_of_it))
    everything = told(plan(scene, area=east_of_it.union(box(179, -17, 180, -15))))
    assert 0 < kept[""] < 16
    assert everything == {"": 16}


def test_cells_off_the_footprint_are_not_fetched() -> None:
    scene = claim()
    west, south, east, north = extent_footprint(scene.grid).bounds
    partly = claim(geometry=box(west, south, (west + east) / 2, north))
    assert told(plan(partly))["no_footprint"] in (7, 8)
    assert told(plan(partly, min_footprint=0.0)) == {"": 16}


def test_scenes_without_enough_data_fall_as_a_whole() -> None:
    assert told(plan(claim(nodata=60.0), max_nodata_percent=50)) == {"nodata_percent": 16}
    assert told(plan(claim(nodata=40.0), max_nodata_percent=50)) == {"": 16}


def test_no_ground_twice_on_a_day_across_tiles_and_zones() -> None:
    here = claim("a", west=767_680.0, cells=8)
    x, y = Transformer.from_crs(32631, 32632, always_xy=True).transform(767_680.0, NORTH)
    there = claim("b", west=x // 320 * 320 + 320, north=y // 320 * 320, epsg=32632, cells=8)
    beside = claim("c", west=767_680.0 + 4 * 320, cells=8)
    scenes = [here, there, beside]
    windows = plan(*scenes)
    shapes, names = [], []
    for number, scene in enumerate(scenes):
        chosen = [(int(x), int(y)) for x, y in windows.chosen(number)]
        shapes += footprints(scene.grid, chosen)
        names += [scene.item_id] * len(chosen)
    pairs = shapely.STRtree(shapes).query(shapes, predicate="overlaps")
    shares = [shapes[a].intersection(shapes[b]).area / shapes[a].area for a, b in pairs.T if a < b]
    assert told(windows)["overlap"] > 60
    assert max(shares, default=0.0) <= 0.5
    same_zone = [n for n, name in enumerate(names) if name != "b"]
    cells = [shapes[n].wkb for n in same_zone]
    assert len(set(cells)) == len(cells)
    lost = {owner for number in (1, 2) for _, owner in windows.lost(number)}
    assert lost == {0, 1} or lost == {0}
    other_day = claim("c", west=767_680.0 + 4 * 320, cells=8, time="2023-07-02T10:00:00+00:00")
    assert told(plan(here, other_day)) == {"": 128}


def test_at_most_so_many_dates_of_a_cell_in_a_season() -> None:
    days = [claim(f"d{n}", time=f"2023-0{m}-0{n}T10:00:00+00:00", cloud=10.0 * n)
            for m, n in ((6, 1), (7, 2), (8, 3), (9, 4))]  # fmt: skip
    windows = plan(*days, max_dates=2)
    kept = {scene.item_id: len(windows.chosen(n)) for n, scene in enumerate(days)}
    assert kept == {"d1": 16, "d2": 16, "d3": 0, "d4": 16}  # the clearest two of June to August
    assert told(windows) == {"": 48, "more_dates": 16}
    assert told(plan(*days, max_dates=1, season="year")) == {"": 16, "more_dates": 48}


@pytest.mark.parametrize(
    ("time", "kind", "name"),
    [
        ("2022-12-15T00:00:00Z", "quarter", "2023-1"),
        ("2023-02-28T00:00:00Z", "quarter", "2023-1"),
        ("2023-03-01T00:00:00Z", "quarter", "2023-2"),
        ("2023-11-30T00:00:00Z", "quarter", "2023-4"),
        ("2023-11-30T00:00:00Z", "month", "2023-11"),
        ("2023-11-30T00:00:00Z", "year", "2023"),
        ("2023-11-30T00:00:00Z", "all", ""),
        ("", "quarter", ""),
    ],
)
def test_seasons(time: str, kind: str, name: str) -> None:
    assert sampling_period(time, kind) == name


def test_strata_and_budgets_are_filled_evenly() -> None:
    far = claim("far", west=WEST + 320_000.0, cells=10)
    near = claim("near", cells=3)
    windows = plan(near, far, max_per_stratum=20)
    assert told(windows) == {"": 29, "stratum_full": 80}
    even = plan(near, far, max_chips=12)
    assert [len(even.chosen(n)) for n in (0, 1)] == [6, 6]
    assert told(even)["over_budget"] == 97
    assert told(plan(near, far, max_gib=5 / 1024))[""] == 5


def test_a_file_that_is_read_whole_is_paid_by_its_first_chip() -> None:
    scenes = [
        replace(claim(f"s{n}", west=WEST + 6400.0 * n), chip_bytes=0.0, scene_bytes=2.0**30)
        for n in range(6)
    ]
    windows = plan(*scenes, max_gib=2.5)
    assert sum(len(windows.chosen(n)) > 0 for n in range(6)) == 2


SCENES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(0, 100)),
    min_size=1, max_size=6, unique_by=lambda scene: scene[:2],
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SCENES, st.integers(0, 5), st.sampled_from([None, 1, 2]), st.sampled_from([None, 3, 11]))
def test_the_plan_does_not_depend_on_the_order(
    scenes: list[tuple[int, int, int]], seed: int, dates: int | None, chips: int | None
) -> None:
    claims = [
        claim(f"{place}-{day}", west=WEST + 640.0 * place, time=f"2023-07-0{day}T10:00:00+00:00",
              cloud=float(cloud))
        for place, day, cloud in scenes
    ]  # fmt: skip
    mixed = random.Random(seed).sample(claims, len(claims))
    limits = {"max_dates": dates, "max_chips": chips}

    def named(order: list[SceneCandidate]) -> set[tuple[str, int, int, str, str]]:
        windows = plan(*order, **limits)
        owners = [*(one.item_id for one in order), ""]
        return {
            (order[c].item_id, int(x), int(y), REASONS[r], owners[o])
            for c, (x, y), r, o in zip(
                windows.scene, windows.cells, windows.reason, windows.owner, strict=True
            )
        }

    found = named(claims)
    assert found == named(mixed)
    assert len(found) == 16 * len(claims)
    kept = [row for row in found if not row[3]]
    if chips is not None:
        assert len(kept) <= chips
    if dates is not None:
        assert max(Counter(row[1:3] for row in kept).values(), default=0) <= dates
    # the owner of lost ground really has it in the plan, or gave it up to a limit itself
    for _, x, y, reason, owner in found:
        if reason == "overlap":
            assert (owner, x, y) in {row[:3] for row in found if row[3] != "overlap"}


def test_one_more_scene_changes_little_of_a_budget() -> None:
    many = [claim(f"s{n}", west=WEST + 6400.0 * n, cells=10) for n in range(20)]
    before = plan(*many, max_per_stratum=None, max_chips=400)
    after = plan(*many, claim("new", north=NORTH - 3200, cells=10), max_chips=400)
    kept = {(n, *cell) for n in range(20) for cell in before.chosen(n).tolist()}
    still = {(n, *cell) for n in range(20) for cell in after.chosen(n).tolist()}
    assert len(kept) == 400
    assert still <= kept
    assert len(still) > 350


def test_windows_are_whole_numbers_of_the_claims() -> None:
    windows = plan(claim("a"), claim("b", time="2023-07-02T10:00:00+00:00"))
    assert windows.scene.tolist() == [0] * 16 + [1] * 16
    assert windows.cells.dtype == np.int64
