"""Where chips lie on the ground, and that they are the same pixels however they are read."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyproj import Transformer
from rasterio.warp import transform as gdal_transform
from shapely.geometry import shape

from data_catalog.sources import source_named
from geofm.chips.writer import cut_cells, to_spans
from geofm.config.recipe import CutSettings
from geofm.formats.npy import read_chip
from geofm.raster.scene import open_scene
from geofm.raster.windows import read_strip
from geofm.remote.url_policy import Access
from tests.geofm.chips.test_cut import Run, good, run
from tests.geofm.stac.small_world import NORTH, WEST, World, add_scene, serve, texture

__all__ = ["run"]  # a fixture


@pytest.mark.parametrize("anchor", ["ground", "scene"])
@pytest.mark.parametrize(
    ("epsg", "west", "north"),
    [(32631, WEST, NORTH), (32631, WEST + 3.7, NORTH - 1.2), (32736, 300_013.0, 8_999_987.5)],
)
def test_a_pixel_lies_where_an_independent_reprojection_puts_it(
    run: Run, anchor: str, epsg: int, west: float, north: float
) -> None:
    height, width = 150, 170
    # every pixel tells its own row and column
    ramp = np.arange(1, height * width + 1, dtype=np.uint16).reshape(height, width)
    add_scene(run.world, "a", {"red": ramp}, west=west, north=north, epsg=epsg)
    chips = run.chips(anchor=anchor)
    frame = good(chips)
    assert len(frame) == (20 if anchor == "scene" else len(frame)) > 8
    with rasterio.open(io.BytesIO(run.world.files["/files/a/red.tif"])) as file:
        for row in frame.itertuples():
            counts = read_chip(chips, row)[0].astype(int) - 1
            a, _, c, _, e, f = row.transform
            lines, samples = np.mgrid[0:32:31, 0:32:31]
            east, up = c + (samples + 0.5) * a, f + (lines + 0.5) * e
            to_ground = Transformer.from_crs(row.crs, 4326, always_xy=True)
            lon, lat = to_ground.transform(east.ravel(), up.ravel())
            # the same pixels by the file's own georeference, through GDAL
            true = counts[lines.ravel(), samples.ravel()]
            x, y = rasterio.transform.xy(file.transform, true // width, true % width)
            there_lon, there_lat = gdal_transform(file.crs, "EPSG:4326", x, y)
            back = Transformer.from_crs(4326, epsg, always_xy=True)
            moved = np.subtract(back.transform(lon, lat), back.transform(there_lon, there_lat))
            assert np.abs(moved).max() / 10.0 < 0.01
            ring = np.array(row.geometry.exterior.coords)
            corner = np.column_stack(to_ground.transform([c, c + 32 * a], [f, f + 32 * e]))
            for point in corner:
                near = np.hypot(*((ring - point) * 111_320).T).min()
                assert near < 0.1  # metres


SHAPES = st.tuples(st.integers(64, 150), st.integers(64, 150))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(SHAPES, st.sampled_from(["nearest", "bilinear", "average", "cubic"]), st.integers(0, 9),
       st.sampled_from(["ground", "scene"]), st.sampled_from([0.0, 64.0]))  # fmt: skip
def test_strips_are_the_whole_scene_bit_for_bit(
    size: tuple[int, int], resampling: str, shift: int, anchor: str, whole_max_mib: float
) -> None:
    height, width = size
    with serve() as world:
        item = scene(world, height // 2 * 2, width // 2 * 2, shift)
        change: Any = {"resampling": resampling, "anchor": anchor}
        cut = CutSettings(size_px=32, bands=["red", "swir16"], **change)
        access = Access(world.url, whole_max=int(whole_max_mib * 2**20))
        source = source_named("sentinel-2")
        with open_scene(item, shape(item["geometry"]), source, cut, access) as opened:
            grid = opened.grid
            everything = read_strip(opened, 0, 0, grid.height, grid.width)
            cells = list(grid.cells())
            for cell, strip in cut_cells(opened, to_spans(cells)):
                row, col = grid.window(cell)
                here = (slice(row, row + 32), slice(col, col + 32))
                assert np.array_equal(strip.counts, everything.counts[(slice(None), *here)])
                assert np.array_equal(strip.valid, everything.valid[here])
            lone = cells[len(cells) // 2]
            row, col = grid.window(lone)
            alone = next(cut_cells(opened, to_spans([lone])))[1].counts
            part = everything.counts[:, row : row + 32, col : col + 32]
            assert np.array_equal(alone, part)


def scene(world: World, height: int, width: int, shift: int) -> dict[str, Any]:
    red = texture(height, width)
    red[: height // 3, : width // 4] = 0  # no data
    bands = {"red": red, "swir16": texture(height // 2, width // 2, 1)}
    return add_scene(world, "a", bands, west=WEST + 20 * shift, gsd={"swir16": 20.0})


def test_a_mixed_stack_states_its_resampling_and_a_plane_stays_a_plane(run: Run) -> None:
    fine = texture(128, 128)
    lines, samples = np.mgrid[0:64, 0:64]
    plane = (1000 + 20 * samples + 40 * lines).astype(np.uint16)  # 1 a metre east, 2 a metre south
    add_scene(run.world, "a", {"red": fine, "swir16": plane}, gsd={"swir16": 20.0})
    chips = run.chips(bands=["red", "swir16"], resampling="bilinear", anchor="scene")
    assets = chips.table("assets.parquet")
    stated = dict(zip(assets.band, assets.resampling, strict=True))
    assert stated == {"red": "", "swir16": "bilinear"}
    inner = good(chips).query("row == 32 and col == 64").iloc[0]
    pixels = read_chip(chips, inner)[1].astype(float)
    row, col = np.mgrid[0:32, 0:32]
    expected = 1000 + 10 * (col + 64) - 5 + 20 * (row + 32) - 10  # at the 10 m pixel's centre
    assert np.abs(pixels - expected).max() <= 0.5
