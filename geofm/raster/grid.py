"""The grid of cells that chips are cut from, in pixels of the scene's own CRS.

Cells have ``size`` × ``size`` pixels of ``gsd`` CRS units and are numbered from the CRS origin. Two
scenes with the same pixels therefore share cells, whatever their extent. If a scene's pixels are
shifted against the origin by a fraction of a pixel, its cells are shifted by the same fraction and
keep their numbers, so nothing is resampled.

An anchored grid numbers its cells from the scene's own corner: no rim is lost and cells match the
blocks of the file, but neighbouring scenes share no cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import ProjError
from shapely.geometry import Polygon, box
from shapely.geometry.base import BaseGeometry

from geofm.config.area import unwrap_longitudes
from geofm.remote.quarantine import Quarantine
from geofm.types import Floats, Indices

#: Metres per degree at the equator, used for gsd_m in a geographic CRS.
METRES_PER_DEGREE = 111_319.490793
#: Plausible pixel edges (metres) and coordinates (units of the CRS) of a raster of the Earth.
PIXEL_METRES = (1e-3, 1e5)
MAX_COORDINATE = 1e9
#: Most cells of a scene, and largest factor by which gsd_m may be finer than its own pixels.
MAX_CELLS = 500_000
MAX_FINER = 1000.0
#: Points per edge of a shape that is transformed into another CRS.
EDGE_POINTS = 8

WGS84 = "EPSG:4326"

Cell = tuple[int, int]
#: One-dimensional array of shapely geometries.
Shapes = NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """The pixels of a scene and the cells on them.

    Attributes:
        crs: The CRS as a code (``EPSG:32631``), or WKT if it has no code.
        gsd: Pixel edge in units of the CRS.
        metres: Pixel edge in metres.
        west, north: Coordinates of the upper left corner.
        height, width: Size of the scene in pixels.
        size: Cell edge in pixels.
        anchored: Cells are numbered from the scene's own corner, not from the CRS origin.
    """

    crs: str
    gsd: float
    metres: float
    west: float
    north: float
    height: int
    width: int
    size: int
    anchored: bool = False

    @property
    def left(self) -> int:
        """Pixels from the origin of the cells to the left edge, rounded down."""
        return 0 if self.anchored else _whole_pixels(self.west / self.gsd)

    @property
    def top(self) -> int:
        """Pixels from the origin of the cells up to the upper edge, rounded down."""
        return 0 if self.anchored else _whole_pixels(self.north / self.gsd)

    def cells(self) -> Iterator[Cell]:
        """Yield the cells (x, y) that lie completely in the scene, by rows from north to south."""
        for y in self.rows():
            for x in self.columns():
                yield x, y

    @property
    def cell_count(self) -> int:
        """The number of cells."""
        columns, rows = self.columns(), self.rows()
        return max(0, columns.stop - columns.start) * max(0, rows.start - rows.stop)

    def columns(self) -> range:
        """Return the column numbers of the cells, from west to east."""
        return range(-(-self.left // self.size), (self.left + self.width) // self.size)

    def rows(self) -> range:
        """Return the row numbers of the cells, from north to south."""
        bottom = self.top - self.height
        return range(self.top // self.size - 1, -(-bottom // self.size) - 1, -1)

    def window(self, cell: Cell) -> tuple[int, int]:
        """Return row and column of the cell's upper left pixel in the scene."""
        x, y = cell
        return self.top - (y + 1) * self.size, x * self.size - self.left

    def transform(self, cell: Cell) -> list[float]:
        """Return the affine coefficients a, b, c, d, e, f of the cell's pixels."""
        row, col = self.window(cell)
        west, north = self.west + col * self.gsd, self.north - row * self.gsd
        return [self.gsd, 0.0, west, 0.0, -self.gsd, north]

    def bounds(self, cell: Cell) -> tuple[float, float, float, float]:
        """Return west, south, east, north of a cell in the CRS."""
        row, col = self.window(cell)
        west, north = self.west + col * self.gsd, self.north - row * self.gsd
        edge = self.size * self.gsd
        return west, north - edge, west + edge, north

    def extent(self) -> tuple[float, float, float, float]:
        """Return west, south, east, north of the scene in the CRS."""
        east, south = self.west + self.width * self.gsd, self.north - self.height * self.gsd
        return self.west, south, east, self.north

    @property
    def cell_system(self) -> str:
        """Prefix of cell names; if it is equal, equal numbers mean equal ground, to a pixel."""
        corner = f"@{self.west:.10g},{self.north:.10g}" if self.anchored else ""
        return f"{crs_name(self.crs)}/{self.size}x{self.metres:.6g}m{corner}"

    def name(self, cell: Cell) -> str:
        """Return the cell's id, e.g. ``EPSG:32631/128x10m/412/4087``: CRS, size and gsd, x, y."""
        return f"{self.cell_system}/{cell[0]}/{cell[1]}"


def crs_name(crs: str) -> str:
    """Return a short name of a CRS: its code, or ``WKT-`` and eight digits of a checksum."""
    if ":" in crs and len(crs) <= 40:
        return crs
    checksum = 0
    for byte in crs.encode():
        checksum = (checksum * 131 + byte) % 2**32
    return f"WKT-{checksum:08x}"


def _whole_pixels(value: float) -> int:
    """Round a position down to whole pixels; a millionth of a pixel is a rounding error."""
    return math.floor(value + 1e-6)


@lru_cache(maxsize=256)
def metres_of(crs: str) -> float:
    """Return the metres per unit of a CRS.

    Raises:
        Quarantine: ``bad_crs`` if the CRS is neither geographic nor projected, or not of the Earth.
    """
    try:
        parsed = CRS.from_user_input(crs)
        transformer(crs, WGS84)
        transformer(WGS84, crs)
    except ProjError as error:
        raise Quarantine("bad_crs", f"no CRS of the Earth: {crs!a:.60}") from error
    if parsed.is_geographic:
        return METRES_PER_DEGREE
    if not parsed.is_projected or not parsed.axis_info:
        raise Quarantine("bad_crs", f"{crs_name(crs)} is neither geographic nor projected")
    return float(parsed.axis_info[0].unit_conversion_factor)


def make_grid(
    crs: str,
    transform: tuple[float, ...],
    shape: tuple[int, int],
    size: int,
    gsd_m: float | None,
    anchored: bool = False,
) -> Grid:
    """Make the grid of a scene from the pixels of its finest band.

    Args:
        crs: CRS of the band.
        transform: Affine coefficients a, b, c, d, e, f of the band, north up.
        shape: Height and width of the band in pixels.
        size: Cell edge in pixels.
        gsd_m: Pixel edge in metres. None or the band's own edge keeps its pixels; another value
            makes new pixels, aligned with the CRS origin.
        anchored: Number the cells from the scene's corner.

    Raises:
        Quarantine: ``bad_crs``, ``bad_transform`` or ``too_many_cells``.
    """
    unit = metres_of(crs)
    own = transform[0]
    check_pixels(transform, unit)
    if gsd_m is not None and own * unit / gsd_m > MAX_FINER:
        raise Quarantine("too_many_cells", f"cut.gsd_m = {gsd_m:g} is far finer than {own * unit}")
    gsd = own if gsd_m is None or math.isclose(gsd_m, own * unit, rel_tol=1e-6) else gsd_m / unit
    west, north = transform[2], transform[5]
    height, width = shape
    if gsd != own:
        east, south = west + width * own, north - height * own
        west, north = math.ceil(west / gsd - 1e-6) * gsd, math.floor(north / gsd + 1e-6) * gsd
        width = max(0, math.floor((east - west) / gsd + 1e-6))
        height = max(0, math.floor((north - south) / gsd + 1e-6))
    grid = Grid(crs, gsd, round(gsd * unit, 6), west, north, height, width, size, anchored)
    if grid.cell_count > MAX_CELLS:
        raise Quarantine(
            "too_many_cells",
            f"{height} x {width} pixels are {grid.cell_count} cells; raise cut.size_px",
        )
    return grid


def check_pixels(transform: tuple[float, ...], unit: float) -> None:
    """Check that size and position of the pixels are plausible for the Earth.

    Raises:
        Quarantine: ``bad_transform``.
    """
    smallest, largest = PIXEL_METRES
    if not smallest <= transform[0] * unit <= largest:
        raise Quarantine("bad_transform", f"a pixel has {transform[0] * unit:g} metres")
    if max(abs(transform[2]), abs(transform[5])) > MAX_COORDINATE:
        raise Quarantine("bad_transform", f"it lies at {transform[2]:g}, {transform[5]:g}")


@lru_cache(maxsize=256)
def transformer(source: str, target: str) -> Transformer:
    """Return the transformation between two CRS, x before y."""
    return Transformer.from_crs(source, target, always_xy=True)


def to_crs(areas: Shapes, source: str, target: str) -> Shapes:
    """Transform shapes into another CRS, with extra points along their edges.

    A shape that the target CRS can't hold becomes empty; a shape whose edges cross is made valid.
    """
    if source == target or areas.size == 0:
        return areas
    bounds = shapely.bounds(areas)
    step = np.maximum(bounds[:, 2] - bounds[:, 0], bounds[:, 3] - bounds[:, 1]) / EDGE_POINTS
    transformation = transformer(source, target)

    def convert(points: Floats) -> Floats:
        x, y = transformation.transform(points[:, 0], points[:, 1])
        return np.column_stack([x, y])

    moved: Shapes = shapely.transform(shapely.segmentize(areas, step), convert)
    for n in np.flatnonzero(~shapely.is_valid(moved)):
        lost = not np.isfinite(shapely.get_coordinates(moved[n])).all()
        moved[n] = Polygon() if lost else shapely.make_valid(moved[n])
    return moved


def boxes(grid: Grid, cells: Sequence[Cell] | Indices) -> Shapes:
    """Return the cells as boxes in the scene's CRS."""
    x, y = np.asarray(cells, dtype=np.int64).reshape(-1, 2).T
    row, col = grid.top - (y + 1) * grid.size, x * grid.size - grid.left
    west, north = grid.west + col * grid.gsd, grid.north - row * grid.gsd
    edge = grid.size * grid.gsd
    return np.asarray(shapely.box(west, north - edge, west + edge, north))


def centres(grid: Grid, cells: Indices) -> Floats:
    """Return the longitudes (-180 to 180) and latitudes of the cells' centres, shape (n, 2)."""
    x, y = cells.reshape(-1, 2).T
    east = grid.west + (x * grid.size - grid.left + grid.size / 2) * grid.gsd
    north = grid.north - (grid.top - (y + 1) * grid.size + grid.size / 2) * grid.gsd
    lon, lat = transformer(grid.crs, WGS84).transform(east, north)
    return np.column_stack([(np.asarray(lon) + 180) % 360 - 180, lat])


def all_cells(grid: Grid) -> Indices:
    """Return ``grid.cells()`` as an array of x, y, shape (n, 2)."""
    y, x = np.meshgrid(np.array(grid.rows()), np.array(grid.columns()), indexing="ij")
    return np.column_stack([x.ravel(), y.ravel()]).astype(np.int64)


def footprints(grid: Grid, cells: Sequence[Cell]) -> list[BaseGeometry]:
    """Return the cells in EPSG:4326; longitudes run past 180 across the antimeridian."""
    return [unwrap_longitudes(area) for area in to_crs(boxes(grid, cells), grid.crs, WGS84)]


@lru_cache(maxsize=1024)
def extent_footprint(grid: Grid) -> BaseGeometry:
    """Return the whole scene in EPSG:4326; longitudes run past 180 across the antimeridian."""
    return unwrap_longitudes(to_crs(np.array([box(*grid.extent())]), grid.crs, WGS84)[0])
