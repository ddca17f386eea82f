"""The ground grid: where on Earth chips lie, in pixels of the scene's own CRS.

Cells have ``size`` pixels of ``gsd`` CRS units and are counted from the CRS origin, so two scenes
on the same pixels share their cells, whatever their extent. A scene whose pixels are shifted
against the origin by a part of a pixel keeps its own pixels (nothing is resampled): its cells are
shifted by that part and have the same numbers.

An anchored grid counts its cells from the scene's own corner instead: no rim is left over and cells
fit the blocks of the file, but neighbouring scenes share no cells.
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

from geofm.remote.quarantine import Quarantine

#: Metres of a degree at the equator: how gsd_m is read in a geographic CRS.
METRES_PER_DEGREE = 111_319.490793
#: Pixel edges (metres) and coordinates (units of the CRS) of rasters of the Earth.
PIXEL_METRES = (1e-3, 1e5)
MAX_COORDINATE = 1e9
#: A scene may be cut into so many cells, at a pixel so many times finer than its own.
MAX_CELLS = 500_000
MAX_FINER = 1000.0
#: Points per edge of a footprint that is carried into another CRS.
DENSE = 8

WGS84 = "EPSG:4326"

Cell = tuple[int, int]
#: One-dimensional array of shapely geometries.
Shapes = NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """The pixels of a scene and the cells on them.

    Attributes:
        crs: as ``EPSG:32631`` where there is a code, else WKT.
        gsd: pixel edge in units of the CRS.
        metres: the same in metres.
        west, north: coordinates of the upper left corner.
        height, width: pixels.
        size: cell edge in pixels.
        anchored: cells are counted from the scene's own corner, not from the CRS origin.
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
        """Pixels from where cells are counted to the left edge (rounded down)."""
        return 0 if self.anchored else _pixels(self.west / self.gsd)

    @property
    def top(self) -> int:
        """Pixels from where cells are counted up to the upper edge (rounded down)."""
        return 0 if self.anchored else _pixels(self.north / self.gsd)

    def cells(self) -> Iterator[Cell]:
        """Cells (x, y) that lie in the scene with all their pixels, by rows from north to south."""
        for y in self.rows():
            for x in self.columns():
                yield x, y

    @property
    def number(self) -> int:
        """How many cells there are."""
        columns, rows = self.columns(), self.rows()
        return max(0, columns.stop - columns.start) * max(0, rows.start - rows.stop)

    def columns(self) -> range:
        """Numbers of the cells' columns, eastwards."""
        return range(-(-self.left // self.size), (self.left + self.width) // self.size)

    def rows(self) -> range:
        """Numbers of the cells' rows, from north to south."""
        bottom = self.top - self.height
        return range(self.top // self.size - 1, -(-bottom // self.size) - 1, -1)

    def window(self, cell: Cell) -> tuple[int, int]:
        """Row and column of the cell's upper left pixel in the scene."""
        x, y = cell
        return self.top - (y + 1) * self.size, x * self.size - self.left

    def transform(self, cell: Cell) -> list[float]:
        """Affine coefficients a, b, c, d, e, f of the cell's pixels."""
        row, col = self.window(cell)
        return [self.gsd, 0.0, self.west + col * self.gsd, 0.0, -self.gsd,
                self.north - row * self.gsd]  # fmt: skip

    def bounds(self, cell: Cell) -> tuple[float, float, float, float]:
        """West, south, east, north of a cell in the CRS."""
        row, col = self.window(cell)
        west, north = self.west + col * self.gsd, self.north - row * self.gsd
        edge = self.size * self.gsd
        return west, north - edge, west + edge, north

    def extent(self) -> tuple[float, float, float, float]:
        """West, south, east, north of the scene in the CRS."""
        east, south = self.west + self.width * self.gsd, self.north - self.height * self.gsd
        return self.west, south, east, self.north

    @property
    def lattice(self) -> str:
        """What cells of two scenes share when equal numbers mean equal ground (to a pixel)."""
        corner = f"@{self.west:.10g},{self.north:.10g}" if self.anchored else ""
        return f"{crs_name(self.crs)}/{self.size}x{self.metres:.6g}m{corner}"

    def name(self, cell: Cell) -> str:
        """The cell's id, e.g. ``EPSG:32631/128x10m/412/4087``: CRS, pixels and gsd, x, y."""
        return f"{self.lattice}/{cell[0]}/{cell[1]}"


def crs_name(crs: str) -> str:
    """A short name: the code, or ``WKT-`` and eight digits of a digest."""
    if ":" in crs and len(crs) <= 40:
        return crs
    total = 0
    for byte in crs.encode():
        total = (total * 131 + byte) % 2**32
    return f"WKT-{total:08x}"


def _pixels(value: float) -> int:
    """Whole pixels from the origin; a millionth of a pixel is rounding, not position."""
    return math.floor(value + 1e-6)


@lru_cache(maxsize=256)
def metres_of(crs: str) -> float:
    """Metres per unit of a CRS.

    Raises:
        Quarantine: ``bad_crs`` for a CRS that is not on the ground, or not on the Earth.
    """
    try:
        found = CRS.from_user_input(crs)
        transformer(crs, WGS84)
        transformer(WGS84, crs)
    except ProjError as error:
        raise Quarantine("bad_crs", f"no CRS of the Earth: {crs!a:.60}") from error
    if found.is_geographic:
        return METRES_PER_DEGREE
    if not found.is_projected or not found.axis_info:
        raise Quarantine("bad_crs", f"{crs_name(crs)} is neither geographic nor projected")
    return float(found.axis_info[0].unit_conversion_factor)


def make_grid(
    crs: str,
    transform: tuple[float, ...],
    shape: tuple[int, int],
    size: int,
    gsd_m: float | None,
    anchored: bool = False,
) -> Grid:
    """The grid of a scene from the pixels of its finest band.

    Args:
        crs: of the band.
        transform: its affine coefficients a, b, c, d, e, f (north up).
        shape: its height and width in pixels.
        size: cell edge, pixels.
        gsd_m: metres of a pixel; None or the band's own keeps its pixels, another value counts
            pixels from the CRS origin.
        anchored: count cells from the scene's corner.

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
    if grid.number > MAX_CELLS:
        raise Quarantine(
            "too_many_cells",
            f"{height} x {width} pixels are {grid.number} cells; raise cut.size_px",
        )
    return grid


def check_pixels(transform: tuple[float, ...], unit: float) -> None:
    """Pixels have a size and a place that rasters of the Earth have.

    Raises:
        Quarantine: ``bad_transform``.
    """
    least, most = PIXEL_METRES
    if not least <= transform[0] * unit <= most:
        raise Quarantine("bad_transform", f"a pixel has {transform[0] * unit:g} metres")
    if max(abs(transform[2]), abs(transform[5])) > MAX_COORDINATE:
        raise Quarantine("bad_transform", f"it lies at {transform[2]:g}, {transform[5]:g}")


@lru_cache(maxsize=256)
def transformer(source: str, target: str) -> Transformer:
    """A transformation between two CRS, x before y."""
    return Transformer.from_crs(source, target, always_xy=True)


def to_crs(areas: Shapes, source: str, target: str) -> Shapes:
    """Shapes in another CRS, with points along their edges where the CRS differ.

    One that has no place there is empty; one whose edges cross there is made valid.
    """
    if source == target or areas.size == 0:
        return areas
    bounds = shapely.bounds(areas)
    step = np.maximum(bounds[:, 2] - bounds[:, 0], bounds[:, 3] - bounds[:, 1]) / DENSE
    move = transformer(source, target)

    def convert(points: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = move.transform(points[:, 0], points[:, 1])
        return np.column_stack([x, y])

    moved: Shapes = shapely.transform(shapely.segmentize(areas, step), convert)
    for n in np.flatnonzero(~shapely.is_valid(moved)):
        lost = not np.isfinite(shapely.get_coordinates(moved[n])).all()
        moved[n] = Polygon() if lost else shapely.make_valid(moved[n])
    return moved


def boxes(grid: Grid, cells: Sequence[Cell] | NDArray[np.int64]) -> Shapes:
    """The cells as boxes in the scene's CRS."""
    x, y = np.asarray(cells, dtype=np.int64).reshape(-1, 2).T
    row, col = grid.top - (y + 1) * grid.size, x * grid.size - grid.left
    west, north = grid.west + col * grid.gsd, grid.north - row * grid.gsd
    edge = grid.size * grid.gsd
    return np.asarray(shapely.box(west, north - edge, west + edge, north))


def centres(grid: Grid, cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """Longitude and latitude [n, 2] of the cells' centres, degrees, -180 to 180."""
    x, y = cells.reshape(-1, 2).T
    east = grid.west + (x * grid.size - grid.left + grid.size / 2) * grid.gsd
    north = grid.north - (grid.top - (y + 1) * grid.size + grid.size / 2) * grid.gsd
    lon, lat = transformer(grid.crs, WGS84).transform(east, north)
    return np.column_stack([(np.asarray(lon) + 180) % 360 - 180, lat])


def all_cells(grid: Grid) -> NDArray[np.int64]:
    """``grid.cells()`` as an array [n, 2] of x, y."""
    y, x = np.meshgrid(np.array(grid.rows()), np.array(grid.columns()), indexing="ij")
    return np.column_stack([x.ravel(), y.ravel()]).astype(np.int64)


def footprints(grid: Grid, cells: Sequence[Cell]) -> list[BaseGeometry]:
    """The cells on the ground, EPSG:4326; longitudes run on past 180 across the antimeridian."""
    return [continuous(area) for area in to_crs(boxes(grid, cells), grid.crs, WGS84)]


@lru_cache(maxsize=1024)
def extent_footprint(grid: Grid) -> BaseGeometry:
    """The whole scene on the ground, EPSG:4326."""
    return continuous(to_crs(np.array([box(*grid.extent())]), grid.crs, WGS84)[0])


def continuous(area: BaseGeometry) -> BaseGeometry:
    """An area whose longitudes do not jump: past 180 rather than back to -180."""
    if area.is_empty or area.bounds[2] - area.bounds[0] <= 180:
        return area

    def move(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return points + np.where(points[:, :1] < 0, [360.0, 0.0], [0.0, 0.0])

    moved: BaseGeometry = shapely.transform(area, move)
    return moved if moved.area > 0 else area  # one that goes round the Earth jumps nowhere
