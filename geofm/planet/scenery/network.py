"""Networks on the relief: rivers where water gathers, towns on flat ground, roads between towns.

Lines are stored as dense points with tangents, so the distance from any point of the world to the
nearest line is exact to well below a pixel at any resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

from geofm.planet.scenery.noise import Noise
from geofm.planet.scenery.terrain import CELL, HEIGHT, SOUTH, WEST, WIDTH, Relief
from geofm.types import Bools, Floats, Floats32, Indices

#: Least drained area of a stream (square metres), and distance of points on lines (metres).
STREAM_AREA = 1.6e6
SPACING = 12.0
#: Lines farther than this (metres) do not affect a pixel.
REACH = 200.0


@dataclass(frozen=True)
class Lines:
    """Polylines as dense points.

    Attributes:
        tree: Points in metres, shape (N, 2).
        tangent: Unit tangents, shape (N, 2).
        half_width: Half the width in metres, shape (N,).
        close: Cells of the relief's grid that a line may reach.
    """

    tree: cKDTree
    tangent: Floats
    half_width: Floats32
    close: Bools

    def near(self, x: Floats, y: Floats) -> tuple[Floats32, Floats32]:
        """Return distance and half width of the nearest line; ``REACH`` and 0 if none is near."""
        rows, columns = self.close.shape
        cell = np.clip(((y - SOUTH) / CELL).astype(np.int32), 0, rows - 1) * columns
        cell += np.clip(((x - WEST) / CELL).astype(np.int32), 0, columns - 1)
        rows_near = np.flatnonzero(self.close.ravel()[cell.ravel()])
        points = np.column_stack([x.ravel()[rows_near], y.ravel()[rows_near]])
        far, index = self.tree.query(points, distance_upper_bound=REACH)
        distance = np.full(x.size, REACH)
        width = np.zeros(x.size)
        inside = np.isfinite(far)
        hit, points, far = rows_near[inside], points[inside], far[inside]
        nearest = index[inside]
        away = points - self.tree.data[nearest]
        t = self.tangent[nearest]
        along = np.abs((away * t).sum(axis=1))
        across = np.abs(away[:, 0] * t[:, 1] - away[:, 1] * t[:, 0])
        # Beyond the end of a line the distance to its last point counts.
        distance[hit] = np.where(along <= SPACING, across, far)
        width[hit] = self.half_width[nearest]
        return (
            distance.reshape(x.shape).astype(np.float32),
            width.reshape(x.shape).astype(np.float32),
        )


@dataclass(frozen=True)
class Town:
    """A town: centre (EPSG:32631) and radius in metres."""

    x: float
    y: float
    radius: float


def make_lines(paths: list[tuple[Floats, Floats32]]) -> Lines:
    """Make lines from paths: points in metres, shape (N, 2), and half widths, shape (N,)."""
    points, tangents, widths = [], [], []
    for path, half in paths:
        steps = np.hypot(*np.diff(path, axis=0).T)
        at = np.concatenate([[0.0], np.cumsum(steps)])
        positions = np.arange(0, at[-1], SPACING)
        dense = np.column_stack([np.interp(positions, at, path[:, k]) for k in (0, 1)])
        if len(dense) < 3:
            continue
        for k in (0, 1):
            dense[:, k] = ndimage.gaussian_filter1d(dense[:, k], 2.5, mode="nearest")
        slope = np.gradient(dense, axis=0)
        points.append(dense)
        tangents.append(slope / np.maximum(np.hypot(*slope.T), 1e-9)[:, None])
        widths.append(np.interp(positions, at, half))
    all_points = np.concatenate(points)
    close = np.zeros((round(HEIGHT / CELL), round(WIDTH / CELL)), dtype=bool)
    row = np.clip(((all_points[:, 1] - SOUTH) / CELL).astype(np.int64), 0, close.shape[0] - 1)
    column = np.clip(((all_points[:, 0] - WEST) / CELL).astype(np.int64), 0, close.shape[1] - 1)
    close[row, column] = True
    return Lines(
        cKDTree(all_points),
        np.concatenate(tangents),
        np.concatenate(widths).astype(np.float32),
        ndimage.binary_dilation(close, np.ones((3, 3), dtype=bool), iterations=3),
    )


def river_paths(relief: Relief) -> list[tuple[Floats, Floats32]]:
    """Trace streams from their springs to the sea or to a larger stream, and smooth them.

    Returns:
        For each stream its points, in metres from the world's south-west corner, shape (N, 2), and
        its half widths in metres, shape (N,).
    """
    columns = relief.height.shape[1]
    area, to = relief.area.ravel(), relief.receiver
    stream = area > STREAM_AREA
    fed = np.zeros(area.size, dtype=bool)
    fed[to[stream & (to != np.arange(area.size))]] = True
    springs = np.flatnonzero(stream & ~fed)
    chains: list[list[int]] = []
    for spring in springs.tolist():
        chain = [spring]
        while to[chain[-1]] != chain[-1]:
            chain.append(int(to[chain[-1]]))
        chains.append(chain)
    # The longest stream keeps its course; the others end where they meet a longer one.
    chains.sort(key=lambda c: (-len(c), c[0]))
    drawn: dict[int, tuple[float, float]] = {}
    paths = []
    for chain in chains:
        stop = next((i for i, cell in enumerate(chain) if cell in drawn), len(chain) - 1)
        cells = np.array(chain[: stop + 1])
        if len(cells) < 3:
            continue
        path = np.column_stack([(cells % columns + 0.5) * CELL, (cells // columns + 0.5) * CELL])
        for k in (0, 1):
            path[:, k] = ndimage.gaussian_filter1d(path[:, k], 2.0, mode="nearest")
        if chain[stop] in drawn:
            fade = np.exp(-np.arange(len(path))[::-1] / 2.5)[:, None]
            path += fade * (np.array(drawn[chain[stop]]) - path[-1])
        for cell, point in zip(chain[:stop], path[:-1].tolist(), strict=False):
            drawn[cell] = (point[0], point[1])
        paths.append((path, np.clip(0.42 * (area[cells] / 1e6) ** 0.72 + 0.6, 1.2, 55)))
    return paths


def make_rivers(relief: Relief, noise: Noise) -> Lines:
    """Make all streams; bends are a function of position, so that streams still meet."""
    fine: list[tuple[Floats, Floats32]] = []
    for path, half in river_paths(relief):
        steps = np.hypot(*np.diff(path, axis=0).T)
        at = np.concatenate([[0.0], np.cumsum(steps)])
        positions = np.arange(0, at[-1], 25.0)
        dense = np.column_stack([np.interp(positions, at, path[:, k]) for k in (0, 1)])
        fine.append(
            (np.add(dense, (WEST, SOUTH)), np.interp(positions, at, half).astype(np.float32))
        )
    points = np.concatenate([path for path, _ in fine])
    bend = [75 * noise.at(key, points[:, 0], points[:, 1], 900, 2.6) for key in (21, 22)]
    cuts = np.cumsum([len(path) for path, _ in fine])[:-1]
    moved = np.split(points + np.column_stack(bend), cuts)
    return make_lines([(path, half) for path, (_, half) in zip(moved, fine, strict=True)])


def make_towns(
    relief: Relief, noise: Noise, fixed: list[tuple[float, float, float]], more: int
) -> list[Town]:
    """Place towns on flat, dry ground.

    Args:
        relief: Relief of the world.
        noise: Noise of the world.
        fixed: Required towns: kilometres east and north, radius in metres.
        more: Number of other towns.
    """
    gy, gx = np.gradient(ndimage.gaussian_filter(relief.height, 3), CELL)
    slope = np.hypot(gx, gy)
    wet = (relief.height < 2.5) | (relief.lake > relief.height)
    shore = ndimage.distance_transform_edt(~wet)
    cost = slope * 30 + np.where(shore < 5, 3, 0) + np.where(relief.height > 420, 5, 0)
    cost = cost.astype(np.float32)
    towns = []
    rows, columns = cost.shape
    for east, north, radius in fixed:
        r, c = round(north * 1000 / CELL), round(east * 1000 / CELL)
        window = cost[max(r - 8, 0) : r + 9, max(c - 8, 0) : c + 9]
        dr, dc = np.unravel_index(int(window.argmin()), window.shape)
        towns.append(_town(max(r - 8, 0) + int(dr), max(c - 8, 0) + int(dc), radius))
    rng = np.random.default_rng([noise.seed, 31])
    dry = (np.arange(columns) * CELL > 37_000)[None, :] & (np.arange(rows) * CELL < 16_000)[:, None]
    for _ in range(4000):
        if len(towns) >= more + len(fixed):
            break
        r, c = int(rng.integers(rows * 0.03, rows * 0.97)), int(rng.integers(0, columns * 0.98))
        radius = float(min(600 * math.exp(0.55 * rng.standard_normal() + 0.35), 2300))
        apart = min(
            math.hypot(t.x - WEST - c * CELL, t.y - SOUTH - r * CELL) - t.radius for t in towns
        )
        if cost[r, c] < (0.8 if not dry[r, c] else 0.25) and apart > 1.3 * radius + 900:
            towns.append(_town(r, c, radius))
    return towns


def _town(row: int, column: int, radius: float) -> Town:
    """Make a town at the centre of a cell."""
    return Town(WEST + (column + 0.5) * CELL, SOUTH + (row + 0.5) * CELL, radius)


def make_roads(relief: Relief, towns: list[Town]) -> Lines:
    """Make roads from each town to its three nearest neighbours, along gentle slopes."""
    step = 4
    coarse = relief.height[::step, ::step]
    rows, columns = coarse.shape
    edge = CELL * step
    index = np.arange(rows * columns).reshape(rows, columns)
    wet = (coarse < 0.5) | (relief.lake[::step, ::step] > coarse)
    heads, tails, costs = [], [], []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = (slice(0, rows - dy), slice(max(0, -dx), columns - max(0, dx)))
        b = (slice(dy, rows), slice(max(0, dx), columns - max(0, -dx)))
        length = math.hypot(dy, dx)
        climb = np.abs(coarse[a] - coarse[b]) / (edge * length)
        cost = length * (1 + (climb * 14) ** 2) * np.where(wet[a] | wet[b], 12, 1)
        heads.append(index[a].ravel())
        tails.append(index[b].ravel())
        costs.append(cost.ravel())
    graph = sparse.csr_array(
        (np.concatenate(costs), (np.concatenate(heads), np.concatenate(tails))),
        shape=(index.size, index.size),
    )
    nodes = np.array([_node(t, rows, columns, edge) for t in towns])
    paths: list[tuple[Floats, Floats32]] = []
    seen: set[tuple[int, int]] = set()
    distance, before = csgraph.dijkstra(
        graph, directed=False, indices=nodes, return_predecessors=True
    )
    for i, town in enumerate(towns):
        order = [int(j) for j in np.argsort(distance[i, nodes], kind="stable") if j != i][:3]
        for j in order:
            pair = (min(i, j), max(i, j))
            if pair in seen:
                continue
            seen.add(pair)
            cells = _walk(before[i], int(nodes[j]))
            path = np.column_stack([cells % columns, cells // columns]) * edge + (WEST, SOUTH)
            path = path + CELL / 2
            path[0], path[-1] = (towns[j].x, towns[j].y), (town.x, town.y)
            for k in (0, 1):
                path[:, k] = ndimage.gaussian_filter1d(path[:, k], 1.4, mode="nearest")
            main = town.radius > 900 and towns[j].radius > 900
            paths.append((path, np.full(len(path), 7.0 if main else 4.0, dtype=np.float32)))
    return make_lines(paths)


def _node(town: Town, rows: int, columns: int, edge: float) -> int:
    """Return the flat index of the cell of a town."""
    row = min(max(round((town.y - SOUTH) / edge), 0), rows - 1)
    column = min(max(round((town.x - WEST) / edge), 0), columns - 1)
    return row * columns + column


def _walk(before: NDArray[np.int32], last: int) -> Indices:
    """Follow predecessors from a cell to the start of its path."""
    cells = [last]
    while before[cells[-1]] >= 0:
        cells.append(int(before[cells[-1]]))
    return np.array(cells, dtype=np.int64)
