"""Relief shaped by rivers: uplift against stream-power erosion, on a grid of 100 m.

The scheme is implicit (Braun and Willett 2013, Geomorphology 180-181): every cell drains to its
lowest neighbour, erosion grows with drained area and slope, and solving from the sea upwards makes
any time step stable. Coarse grids run first, so valleys of all scales form in about a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from geofm.planet.scenery.noise import Noise, smoothstep
from geofm.types import Bools, Floats, Floats32, Indices

#: South-west corner of the world in EPSG:32631 (metres; multiples of 1280) and its extent.
WEST, SOUTH = 704_000.0, 4_976_640.0
WIDTH, HEIGHT = 64_000.0, 48_640.0
EAST, NORTH = WEST + WIDTH, SOUTH + HEIGHT
#: Cell edge of the relief's grid, metres.
CELL = 100.0
#: Erodibility per time step; slope exponent 1, area exponent 0.5.
ERODIBILITY = 0.08
#: Steepest stable slope.
REPOSE = 0.75
_LEVELS = ((4, 60), (2, 16), (1, 6))

_STEPS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


@dataclass(frozen=True)
class Relief:
    """The world's relief on the grid of ``CELL`` metres, row 0 in the south.

    Attributes:
        height: Metres above the sea, shape (rows, columns); negative on the sea floor.
        lake: Surface of the lake in or near a cell; far below the ground without a lake.
        area: Drained area in square metres.
        receiver: Flat index of the cell to which each cell drains; its own index at the sea.
    """

    height: Floats32
    lake: Floats32
    area: Floats32
    receiver: Indices


def cell_centres(step: float = CELL) -> tuple[Floats, Floats]:
    """Return the world coordinates of cell centres, two arrays of shape (rows, columns)."""
    x = WEST + (np.arange(round(WIDTH / step)) + 0.5) * step
    y = SOUTH + (np.arange(round(HEIGHT / step)) + 0.5) * step
    xs, ys = np.meshgrid(x, y)
    return xs, ys


def km(x: Floats, y: Floats) -> tuple[Floats32, Floats32]:
    """Return kilometres east and north of the world's south-west corner."""
    return ((x - WEST) / 1000).astype(np.float32), ((y - SOUTH) / 1000).astype(np.float32)


def coast_distance(noise: Noise, x: Floats, y: Floats) -> Floats32:
    """Return the approximate distance from the coast in kilometres; negative at sea."""
    east, north = km(x, y)
    line = 10.5 + 2.6 * np.sin(north * 0.21 + 0.6) - 3.5 * np.exp(-(((north - 8) / 4) ** 2))
    line += 3.0 * np.exp(-(((north - 21) / 2.6) ** 2))  # the estuary
    distance: Floats32 = east - line + 1.1 * noise.at(1, x, y, 9000, 1.7)
    return distance


def uplift(noise: Noise, x: Floats, y: Floats) -> Floats32:
    """Return the uplift in metres per time step: western plain, hills, north-eastern mountains."""
    east, north = km(x, y)
    rough = noise.at(2, x, y, 14_000, 2.0)
    inland = smoothstep(24, 46, east + 3 * rough)
    ridge = np.exp(-(((north - 31 - 0.25 * (east - 48)) / 8.5) ** 2)) * smoothstep(30, 47, east)
    hills = smoothstep(0.2, 1.6, noise.at(3, x, y, 9000, 2.0)) * smoothstep(13, 20, east)
    west_hills = np.exp(-(((north - 41) / 5) ** 2 + ((east - 22) / 7) ** 2))
    dry = smoothstep(36, 42, east) * smoothstep(17, 11, north)
    lift = 0.5 + 2.6 * inland * (1 - 0.85 * dry) + 19 * ridge + 2.4 * hills * (1 - dry)
    return np.asarray(lift + 5.0 * west_hills, dtype=np.float32)


def receivers(height: Floats32, outlet: Bools, cell: float) -> tuple[Indices, Floats32]:
    """Find the steepest downhill neighbour of each cell (flat index) and its distance."""
    rows, columns = height.shape
    padded = np.pad(height, 1, constant_values=np.inf)
    index = np.arange(rows * columns).reshape(rows, columns)
    best = np.zeros_like(height)
    to = index.copy()
    far = np.full_like(height, cell)
    for dy, dx in _STEPS:
        length = cell * float(np.hypot(dy, dx))
        near = padded[1 + dy : 1 + dy + rows, 1 + dx : 1 + dx + columns]
        slope = (height - near) / np.float32(length)
        better = slope > best
        best = np.where(better, slope, best)
        to = np.where(better, index + dy * columns + dx, to)
        far = np.where(better, np.float32(length), far)
    to[outlet] = index[outlet]
    return to.ravel(), far.ravel()


def by_depth(receiver: Indices) -> list[Indices]:
    """Group cells by their number of steps to the sea, outlets first."""
    depth = (receiver != np.arange(receiver.size)).astype(np.int64)
    jump = receiver
    while True:
        further = depth[jump]
        if not further.any():
            break
        depth = depth + further
        jump = jump[jump]
    order = np.argsort(depth, kind="stable")
    edges = np.searchsorted(depth[order], np.arange(1, int(depth.max()) + 1))
    return np.split(order, edges)


def drained(receiver: Indices, levels: list[Indices], cell: float) -> Floats32:
    """Compute the area that drains through each cell, itself included, in square metres."""
    area = np.full(receiver.size, cell * cell)
    for level in reversed(levels[1:]):
        np.add.at(area, receiver[level], area[level])
    return area.astype(np.float32)


def fill(height: Floats32, outlet: Bools, rise: float = 0.002) -> Floats32:
    """Fill depressions so that all ground drains, with at least ``rise`` metres per cell.

    If each edge of the grid weighs as much as its higher end, the lowest way out of every cell lies
    on the minimum spanning tree.
    """
    rows, columns = height.shape
    sea = rows * columns
    index = np.arange(sea).reshape(rows, columns)
    floor = float(height.min()) - 2
    heads, tails, weights = [], [], []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = (slice(0, rows - dy), slice(max(0, -dx), columns - max(0, dx)))
        b = (slice(dy, rows), slice(max(0, dx), columns - max(0, -dx)))
        heads.append(index[a].ravel())
        tails.append(index[b].ravel())
        weights.append(np.maximum(height[a], height[b]).ravel() - floor)
    coast = index[outlet]
    heads.append(coast)
    tails.append(np.full(coast.size, sea))
    weights.append(np.full(coast.size, 1.0))
    graph = sparse.csr_array(
        (np.concatenate(weights), (np.concatenate(heads), np.concatenate(tails))),
        shape=(sea + 1, sea + 1),
    )
    tree = csgraph.minimum_spanning_tree(graph)
    _, before = csgraph.breadth_first_order(tree, sea, directed=False)
    down = np.where(before < 0, np.arange(sea + 1), before).astype(np.int64)
    flat = np.append(height.ravel(), np.float32(floor))
    for level in by_depth(down)[1:]:
        flat[level] = np.maximum(flat[level], flat[down[level]] + np.float32(rise))
    return np.where(outlet, height, flat[:sea].reshape(height.shape)).astype(np.float32)


def erode(height: Floats32, outlet: Bools, lift: Floats32, cell: float, steps: int) -> Floats32:
    """Run uplift and erosion for a number of time steps."""
    height = fill(height, outlet)
    rate = np.where(outlet, 0, lift).astype(np.float32)
    for step in range(steps):
        receiver, far = receivers(height, outlet, cell)
        levels = by_depth(receiver)
        area = drained(receiver, levels, cell)
        factor = ERODIBILITY * np.sqrt(area) / far
        flat = (height + rate).ravel()
        steepest = REPOSE * far
        for level in levels[1:]:
            below = flat[receiver[level]]
            new = (flat[level] + factor[level] * below) / (1 + factor[level])
            flat[level] = np.minimum(new, below + steepest[level])
        height = flat.reshape(height.shape).astype(np.float32)
        if step % 4 == 3:
            smooth = ndimage.gaussian_filter(height, 0.7)
            height = np.where(outlet, height, 0.75 * height + 0.25 * smooth).astype(np.float32)
            height = np.maximum(height, np.where(outlet, -1e9, 0.05)).astype(np.float32)
    return height


def make_relief(noise: Noise, basins: list[tuple[float, float, float, float]]) -> Relief:
    """Make relief, lakes and drainage.

    Args:
        noise: Noise of the world.
        basins: Lakes: kilometres east and north, radius in kilometres, depth in metres.
    """
    height: Floats32 | None = None
    for factor, steps in _LEVELS:
        x, y = cell_centres(CELL * factor) if factor < 4 else _coarse(4)
        coast = coast_distance(noise, x, y)
        outlet = coast < 0
        lift = uplift(noise, x, y)
        start = 2 + 6 * coast + 1.5 * noise.at(4, x, y, 2500, 1.2)
        if height is None:
            height = start
        else:
            height = _refine(height, x.shape) + 0.6 * noise.at(5, x, y, 900, 1.0)
        height = np.where(outlet, 9 * coast - 0.3, np.maximum(height, 0.2)).astype(np.float32)
        height = erode(height, outlet, lift, CELL * factor, steps)
    assert height is not None  # noqa: S101 - there is always a level
    east, north = km(x, y)
    for e, n, radius, depth in basins:
        bend = 0.35 * noise.at(6, x, y, 3500, 2.0)
        distance = np.hypot(east - e, north - n) / radius + bend
        # The rim is level with its lowest ground, where the water leaves.
        rim = np.percentile(height[(distance < 1.15) & ~outlet], 8)
        bowl = rim + 60 * smoothstep(0.75, 1.3, distance) - depth * smoothstep(0.95, 0.3, distance)
        height = np.where((distance < 1.25) & ~outlet, np.minimum(height, bowl), height)
        height = height.astype(np.float32)
    full = fill(height, outlet)
    receiver, _ = receivers(full, outlet, CELL)
    area = drained(receiver, by_depth(receiver), CELL).reshape(full.shape)
    return Relief(height, _lake_surface(height, full, outlet), area, receiver)


def _coarse(factor: int) -> tuple[Floats, Floats]:
    """Return the cell centres of a coarser grid, rounded up to whole cells."""
    step = CELL * factor
    rows, columns = int(np.ceil(HEIGHT / step)), int(np.ceil(WIDTH / step))
    x, y = WEST + (np.arange(columns) + 0.5) * step, SOUTH + (np.arange(rows) + 0.5) * step
    xs, ys = np.meshgrid(x, y)
    return xs, ys


def _refine(height: Floats32, shape: tuple[int, int]) -> Floats32:
    """Interpolate a grid at twice its resolution."""
    rows, columns = np.meshgrid(
        (np.arange(shape[0]) + 0.5) / 2 - 0.5, (np.arange(shape[1]) + 0.5) / 2 - 0.5, indexing="ij"
    )
    fine = ndimage.map_coordinates(height, [rows, columns], order=1, mode="nearest")
    return np.asarray(fine, dtype=np.float32)


def _lake_surface(height: Floats32, full: Floats32, outlet: Bools) -> Floats32:
    """Compute the water level of lakes, up to four cells beyond the shore; -1000 elsewhere."""
    names, _ = ndimage.label((full - height > 0.6) & ~outlet)
    size = np.bincount(names.ravel())
    names[size[names] < 40] = 0
    water = names > 0
    if not water.any():
        return np.full_like(height, -1000)
    away, nearest = ndimage.distance_transform_edt(~water, return_indices=True)
    level = full[tuple(nearest)]
    return np.where(away <= 4, level, -1000).astype(np.float32)
