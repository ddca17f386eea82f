"""Estimated requests and bytes of cutting a scene, from the metadata of its item."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_catalog.sources import Source
from geofm.chips.items import ItemRecord
from geofm.chips.overlap import Cells
from geofm.config.recipe import CutSettings
from geofm.raster.grid import Grid
from geofm.raster.scene import is_upright
from geofm.remote.assets import BEGINNING
from geofm.stac.bands import Band, declared_crs, find_band, find_layer
from geofm.types import Json

#: Typical compressed block: edge (pixels), and compressed bytes per byte of pixels.
TYPICAL_BLOCK, TYPICAL_RATIO = 512, 0.75
#: Share of a COG's bytes that is not overviews.
FULL_RESOLUTION = 0.75


@dataclass(frozen=True)
class FetchCost:
    """Estimated requests and bytes."""

    requests: int = 0
    bytes: int = 0

    def __add__(self, other: FetchCost) -> FetchCost:
        """Return the sum of two estimates."""
        return FetchCost(self.requests + other.requests, self.bytes + other.bytes)


def fetch_cost_of(item: ItemRecord, grid: Grid, cells: Cells, settings: CutSettings) -> FetchCost:
    """Estimate the cost of cutting cells, shape (n, 2), of a scene."""
    cost, content = FetchCost(), item.item
    if not len(cells):
        return cost
    assets: set[str] = set()
    for band in bands_to_read(content, item.profile, settings):
        if band.asset in assets:
            continue
        assets.add(band.asset)
        if whole := whole_bytes(content, band, grid, settings):
            cost += FetchCost(1 + (whole > BEGINNING), round(whole))
            continue
        ratio = max(1.0, pixel_edge(content, band, grid) / grid.gsd)
        blocks = touched_blocks(grid, cells, ratio)
        block_bytes = bytes_per_pixel(content, band, grid) * (TYPICAL_BLOCK * ratio) ** 2
        cost += FetchCost(1 + len(np.unique(blocks[:, 0])), round(len(blocks) * block_bytes))
    return cost


def bands_to_read(item: Json, source: Source, settings: CutSettings) -> list[Band]:
    """Return the bands to read, the cloud layer included."""
    layer = find_layer(item, source.cloud.asset) if source.cloud else None
    bands = [find_band(item, name, source) for name in settings.bands]
    return [*bands, layer] if layer else bands


def stated_layout(item: Json, band: Band) -> tuple[str, tuple[float, ...], tuple[int, int]] | None:
    """Return the CRS, the affine and [height, width] that an item states for a band.

    The values of the asset come before those of the item. None if one of them is missing.
    """
    crs = declared_crs(item, band.asset)
    properties = item["properties"]
    affine = band.transform or properties.get("proj:transform")
    size = band.size or properties.get("proj:shape")
    if not crs or not affine or not size or not is_upright(affine[:6]):
        return None
    return crs, tuple(float(v) for v in affine[:6]), (int(size[0]), int(size[1]))


def whole_bytes(item: Json, band: Band, grid: Grid, settings: CutSettings) -> float:
    """Estimate the size of a band's file if it is read whole; 0 if it is read by range."""
    size: float = band.bytes
    if not size:
        pixels = math.prod(band.size or (grid.height, grid.width))
        size = pixels * 2 * TYPICAL_RATIO / FULL_RESOLUTION
    return size if size <= settings.whole_max_mib * 2**20 else 0.0


def touched_blocks(grid: Grid, cells: Cells, ratio: float) -> Cells:
    """Return the blocks (row, column) of `TYPICAL_BLOCK` pixels of a band that cells touch.

    Args:
        grid: Grid of the scene.
        cells: Cell numbers x, y, shape (n, 2).
        ratio: Edge of the band's pixel in pixels of the grid.
    """
    edge = TYPICAL_BLOCK * ratio
    x, y = cells.T
    row, col = grid.top - (y + 1) * grid.size, x * grid.size - grid.left
    corners = [
        np.column_stack([(row + down) // edge, (col + right) // edge])
        for down in (0, grid.size - 1)
        for right in (0, grid.size - 1)
    ]
    blocks = np.unique(np.concatenate(corners).astype(np.int64), axis=0)
    return np.asarray(blocks, dtype=np.int64)


def pixel_edge(item: Json, band: Band, grid: Grid) -> float:
    """Return the edge of a band's pixel in units of the CRS; the grid's if it is not stated."""
    layout = stated_layout(item, band)
    return layout[1][0] if layout else grid.gsd


def bytes_per_pixel(item: Json, band: Band, grid: Grid) -> float:
    """Estimate the compressed bytes of a band's file per pixel of the grid."""
    share = (grid.gsd / pixel_edge(item, band, grid)) ** 2
    size = band.bytes
    if size and band.size:
        return size * FULL_RESOLUTION / math.prod(band.size) * share
    return 2 * TYPICAL_RATIO * share
