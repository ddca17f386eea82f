"""What cutting a scene will fetch, about, from what its item states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_catalog.sources import Source
from geofm.chips.items import Listed
from geofm.chips.overlap import Cells
from geofm.config.recipe import CutSettings
from geofm.raster.grid import Grid
from geofm.raster.scene import is_upright
from geofm.remote.assets import BEGINNING
from geofm.stac.bands import Band, declared_crs, find_band, find_layer
from geofm.types import Json

#: Compressed blocks as they are met most often: their edge (pixels), and bytes per byte of pixels.
USUAL_BLOCK, USUAL_RATIO = 512, 0.75
#: Share of a COG's bytes that is not overviews.
FULL_RESOLUTION = 0.75


@dataclass(frozen=True)
class Cost:
    """What fetching takes, about: requests and bytes."""

    requests: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        """The sum."""
        return Cost(self.requests + other.requests, self.bytes + other.bytes)


def wanted(item: Json, source: Source, settings: CutSettings) -> list[Band]:
    """The bands to read, the cloud layer included."""
    layer = find_layer(item, source.cloud.asset) if source.cloud else None
    bands = [find_band(item, name, source) for name in settings.bands]
    return [*bands, layer] if layer else bands


def stated_place(item: Json, band: Band) -> tuple[str, tuple[float, ...], tuple[int, int]] | None:
    """CRS, affine and [height, width] of a band as stated for its asset or the item."""
    crs = declared_crs(item, band.asset)
    properties = item["properties"]
    to = band.transform or properties.get("proj:transform")
    size = band.size or properties.get("proj:shape")
    if not crs or not to or not size or not is_upright(to[:6]):
        return None
    return crs, tuple(float(v) for v in to[:6]), (int(size[0]), int(size[1]))


def cost_of(one: Listed, grid: Grid, cells: Cells, settings: CutSettings) -> Cost:
    """About what cutting these cells of a scene will fetch."""
    if not len(cells):
        return Cost(0, 0)
    total, item = Cost(0, 0), one.item
    assets: set[str] = set()
    for band in wanted(item, one.profile, settings):
        if band.asset in assets:
            continue
        assets.add(band.asset)
        if whole := whole_bytes(item, band, grid, settings):
            total += Cost(1 + (whole > BEGINNING), round(whole))
            continue
        ratio = gsd_of(item, band, grid) / grid.gsd
        blocks = touched_blocks(grid, cells, max(1.0, ratio))
        per_block = bytes_per_pixel(item, band, grid) * (USUAL_BLOCK * max(1.0, ratio)) ** 2
        total += Cost(1 + len(np.unique(blocks[:, 0])), round(len(blocks) * per_block))
    return total


def whole_bytes(item: Json, band: Band, grid: Grid, settings: CutSettings) -> float:
    """About the size of a band's file where it is read whole, else 0."""
    size: float = band.bytes
    if not size:
        pixels = math.prod(band.size or (grid.height, grid.width))
        size = pixels * 2 * USUAL_RATIO / FULL_RESOLUTION
    return size if size <= settings.whole_max_mib * 2**20 else 0.0


def touched_blocks(grid: Grid, cells: Cells, ratio: float) -> Cells:
    """Blocks (row, column) of ``USUAL_BLOCK`` of a band's pixels that the cells touch.

    Args:
        grid: of the scene.
        cells: [n, 2].
        ratio: edge of the band's pixel in the grid's.
    """
    edge = USUAL_BLOCK * ratio
    x, y = cells.T
    row, col = grid.top - (y + 1) * grid.size, x * grid.size - grid.left
    corners = [
        np.column_stack([(row + down) // edge, (col + over) // edge])
        for down in (0, grid.size - 1)
        for over in (0, grid.size - 1)
    ]
    found = np.unique(np.concatenate(corners).astype(np.int64), axis=0)
    return np.asarray(found, dtype=np.int64)


def gsd_of(item: Json, band: Band, grid: Grid) -> float:
    """Edge of a band's pixel in units of the CRS; the grid's where it is not stated."""
    place = stated_place(item, band)
    return place[1][0] if place else grid.gsd


def bytes_per_pixel(item: Json, band: Band, grid: Grid) -> float:
    """About how many compressed bytes of a band's file one pixel of the grid takes."""
    share = (grid.gsd / gsd_of(item, band, grid)) ** 2
    size = band.bytes
    if size and band.size:
        return size * FULL_RESOLUTION / math.prod(band.size) * share
    return 2 * USUAL_RATIO * share
