from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import box

from geofm.config.area import unwrap_longitudes
from geofm.raster.grid import METRES_PER_DEGREE, footprints, make_grid
from geofm.remote.quarantine import Quarantine

corner = st.integers(-90_000, 90_000)
edge = st.integers(1, 300)


@given(corner, corner, edge, edge, st.integers(16, 64), st.sampled_from([0.0, 2.5, 5.0, 9.99]))
@settings(max_examples=200, deadline=None)
def test_cells_are_whole_pixels_of_the_scene_and_disjoint(
    left: int, top: int, height: int, width: int, size: int, phase: float
) -> None:
    grid = make_grid(
        "EPSG:32631", (10, 0, left * 10 + phase, 0, -10, top * 10 + phase), (height, width), size,
        None,
    )  # fmt: skip
    seen = set()
    for cell in grid.cells():
        row, col = grid.window(cell)
        assert 0 <= row <= height - size
        assert 0 <= col <= width - size
        seen.add((row % size, col % size))
        west, _, _, north = grid.bounds(cell)
        assert math.isclose(west, left * 10 + phase + col * 10, abs_tol=1e-6)
        assert math.isclose(north, top * 10 + phase - row * 10, abs_tol=1e-6)
    assert len(seen) <= 1  # one phase: cells are disjoint and next to each other
    cells = list(grid.cells())
    assert len(cells) == len(set(cells)) == len(grid.columns()) * len(grid.rows())
    if height >= 2 * size and width >= 2 * size:
        assert cells


@given(corner, corner, st.integers(0, 500), st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_two_scenes_on_the_same_pixels_share_their_cells(
    left: int, top: int, east: int, south: int
) -> None:
    a = make_grid("EPSG:32631", (10, 0, left * 10, 0, -10, top * 10), (256, 256), 64, None)
    b = make_grid(
        "EPSG:32631", (10, 0, (left + east) * 10, 0, -10, (top - south) * 10), (256, 256), 64, None
    )
    common = set(a.cells()) & set(b.cells())
    assert all(a.bounds(cell) == pytest.approx(b.bounds(cell)) for cell in common)
    assert {a.name(cell) for cell in common} == {b.name(cell) for cell in common}


def test_a_cell_has_the_name_of_its_place() -> None:
    grid = make_grid("EPSG:32631", (10, 0, 527_360, 0, -10, 5_232_640), (128, 128), 128, None)
    assert [grid.name(cell) for cell in grid.cells()] == ["EPSG:32631/128x10m/412/4087"]


def test_another_gsd_counts_from_the_origin() -> None:
    grid = make_grid("EPSG:32631", (10, 0, 500_010, 0, -10, 5_000_010), (200, 200), 16, 20.0)
    assert (grid.west, grid.north, grid.gsd) == (500_020, 5_000_000, 20)
    assert (grid.height, grid.width) == (99, 99)


def test_degrees_are_read_as_metres_at_the_equator() -> None:
    step = 10 / METRES_PER_DEGREE
    grid = make_grid("EPSG:4326", (step, 0, 2.0, 0, -step, 49.0), (64, 64), 32, 10.0)
    assert grid.gsd == step
    assert grid.metres == pytest.approx(10)


def test_an_area_round_the_whole_earth_stays_one() -> None:
    assert unwrap_longitudes(box(-180, -90, 180, 90)).area == 360 * 180


def test_footprints_run_on_past_the_antimeridian() -> None:
    grid = make_grid("EPSG:32601", (10, 0, 165_760, 0, -10, 8_000), (128, 128), 64, None)
    areas = footprints(grid, list(grid.cells()))
    assert all(area.bounds[2] - area.bounds[0] < 1 for area in areas)


def test_a_crs_that_is_not_on_the_ground_is_refused() -> None:
    with pytest.raises(Quarantine, match="bad_crs"):
        make_grid("EPSG:99999", (1, 0, 0, 0, -1, 0), (10, 10), 16, None)
    with pytest.raises(Quarantine, match="bad_crs"):
        make_grid("EPSG:4978", (1, 0, 0, 0, -1, 0), (10, 10), 16, None)
