"""Scenes that a thread has under way together come out as those that are cut one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.io import MemoryFile

from data_catalog.catalogue import Catalogue
from data_catalog.run import make_job, plan_parts, seal, work_parts
from data_catalog.store import open_store
from geofm.chips import cut
from geofm.config.recipe import CutSettings
from tests.geofm.chips.test_cut import Run, reasons
from tests.geofm.stac.small_world import NORTH, WEST, World, add_scene, texture, tiff


def other(west: float, seed: int, **how: object) -> bytes:
    """A file that GDAL has to read."""
    usual = {
        "driver": "GTiff", "height": 96, "width": 96, "count": 1, "dtype": "uint16",
        "crs": "EPSG:32631", "transform": rasterio.Affine(10, 0, west, 0, -10, NORTH),
    }  # fmt: skip
    masked = how.pop("masked", False)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), MemoryFile() as memory:
        with memory.open(**{**usual, **how}) as file:
            file.write(texture(96, 96, seed), 1)
            if masked:
                file.write_mask(np.arange(96 * 96).reshape(96, 96) % 3 > 0)
        return bytes(memory.read())


def add_scenes(world: World) -> None:
    """Scenes beside each other: plain ones, those that GDAL reads, and bad ones."""
    for number in range(9):
        west = WEST + 10_000 * number
        item = add_scene(world, f"s{number}", {"red": texture(96, 96, number)}, west=west)
        del item["assets"]["red"]["file:checksum"]  # some files are replaced
        file = f"/files/s{number}/red.tif"
        if number == 1:
            world.files[file] = other(west, 21, compress="lzw")
        if number == 2:
            world.files[file] = other(west, 22, compress="deflate", masked=True)
        if number == 4:
            del world.files[file]
        if number == 5:
            jp2 = {"QUALITY": "100", "REVERSIBLE": "YES"}
            world.files[file] = other(west, 25, driver="JP2OpenJPEG", **jp2)
        if number == 6:
            world.files[file] = tiff(texture(96, 96, 6), west)[:-900]
        if number == 7:
            world.files[file] = other(west, 27, compress="zstd", tiled=True, blockxsize=32,
                                      blockysize=32)  # fmt: skip


@pytest.mark.parametrize("whole_max_mib", [0, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_scenes_come_out_the_same(
    catalogue: Catalogue, world: World, tmp_path: Path, threads: int, whole_max_mib: int
) -> None:
    add_scenes(world)
    alone, together = (open_store(tmp_path / name) for name in ("alone", "together"))
    told = {"size_px": 32, "bands": ["red"], "retries": 1, "max_failed": 0.9,
            "whole_max_mib": whole_max_mib}  # fmt: skip
    one_by_one = Run(alone, catalogue, world).chips(**told)
    assert reasons(one_by_one) == {"s4": "not_found", "s6": "truncated"}
    items = {"items": Run(together, catalogue, world).items()}
    stage = replace(cut.STAGE, at_once=threads)
    job = make_job(stage, together, items, CutSettings.model_validate(told))
    parts = plan_parts(stage, job)
    assert work_parts(stage, job, parts) == len(parts) == 9
    assert seal(stage, job, parts)[0].digest == one_by_one.digest
