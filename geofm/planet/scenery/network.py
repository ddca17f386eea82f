"""Lines and places on the relief: rivers where water gathers, towns on flat ground, roads between.

Lines are stored as dense points with their tangents, so the distance of any point of the world to
the nearest line is exact to well below a pixel, at any resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

from geofm.planet.scenery.noise import Coords, Ints, Mask, Noise
from geofm.planet.scenery.terrain import CELL, HEIGHT, SOUTH, WEST, WIDTH, Relief
from geofm.types import Floats32

#: Drained area from which a stream is drawn (square metres), and distance of points on lines.
STREAM_AREA = 1.6e6
SPACING = 12.0
#: Lines further away than this (metres) do not matter to a pixel.
REACH = 200.0


@dataclass(frozen=True)
class Lines:
    """Polylines as points [N, 2] with unit tangents [N, 2] and half their width in metres [N].

    ``close`` marks the cells of the relief's grid that a line may reach.
    """

    tree: cKDTree
    tangent: Coords
    half_width: Floats32
    close: Mask

    def near(self, x: Coords, y: Coords) -> tuple[Floats32, Floats32]:
        """Distance to the nearest line (``REACH`` or more where none is near), its half width."""
        rows, columns = self.close.shape
        cell = np.clip(((y - SOUTH) / CELL).astype(np.int32), 0, rows - 1) * columns
        cell += np.clip(((x - WEST) / CELL).astype(np.int32), 0, columns - 1)
        ask = np.flatnonzero(self.close.ravel()[cell.ravel()])
        points = np.column_stack([x.ravel()[ask], y.ravel()[ask]])
        far, index = self.tree.query(points, distance_upper_bound=REACH)
        distance = np.full(x.size, REACH)
        width = np.zeros(x.size)
        inside = np.isfinite(far)
        hit, points, far, found = ask[inside], points[inside], far[inside], index[inside]
        away = points - self.tree.data[found]
        along = np.abs((away * self.tangent[found]).sum(axis=1))
        t = self.tangent[found]
        across = np.abs(away[:, 0] * t[:, 1] - away[:, 1] * t[:, 0])
        # beyond the end of a line only the distance to its last point counts
        distance[hit] = np.where(along <= SPACING, across, far)
        width[hit] = self.half_width[found]
        return (
            distance.reshape(x.shape).astype(np.float32),
            width.reshape(x.shape).astype(np.float32),
        )


@dataclass(frozen=True)
class Town:
    """A built-up place: centre (EPSG:32631), radius in metres."""

    x: float
    y: float
    radius: float


def make_lines(paths: list[tuple[Coords, Floats32]]) -> Lines:
    """Lines from paths: points [N, 2] in metres and half widths [N]."""
    points, tangents, widths = [], [], []
    for path, half in paths:
        steps = np.hypot(*np.diff(path, axis=0).T)
        at = np.concatenate([[0.0], np.cumsum(steps)])
        where = np.arange(0, at[-1], SPACING)
        dense = np.column_stack([np.interp(where, at, path[:, k]) for k in (0, 1)])
        if len(dense) < 3:
            continue
        for k in (0, 1):
            dense[:, k] = ndimage.gaussian_filter1d(dense[:, k], 2.5, mode="nearest")
        slope = np.gradient(dense, axis=0)
        points.append(dense)
        tangents.append(slope / np.maximum(np.hypot(*slope.T), 1e-9)[:, None])
        widths.append(np.interp(where, at, half))
    every = np.concatenate(points)
    close = np.zeros((round(HEIGHT / CELL), round(WIDTH / CELL)), dtype=bool)
    row = np.clip(((every[:, 1] - SOUTH) / CELL).astype(np.int64), 0, close.shape[0] - 1)
    column = np.clip(((every[:, 0] - WEST) / CELL).astype(np.int64), 0, close.shape[1] - 1)
    close[row, column] = True
    return Lines(
        cKDTree(every),
        np.concatenate(tangents),
        np.concatenate(widths).astype(np.float32),
        ndimage.binary_dilation(close, np.ones((3, 3), dtype=bool), iterations=3),
    )


def river_paths(relief: Relief) -> list[tuple[Coords, Floats32]]:
    """Streams from their springs to the sea or to a larger stream, smoothed.

    Metres from the world's south-west corner, and half the width.
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
    # the longest stream keeps its course; the others end where they meet one that is drawn
    chains.sort(key=lambda c: (-len(c), c[0]))
    place: dict[int, tuple[float, float]] = {}
    paths = []
    for chain in chains:
        stop = next((i for i, cell in enumerate(chain) if cell in place), len(chain) - 1)
        cells = np.array(chain[: stop + 1])
        if len(cells) < 3:
            continue
        path = np.column_stack([(cells % columns + 0.5) * CELL, (cells // columns + 0.5) * CELL])
        for k in (0, 1):
            path[:, k] = ndimage.gaussian_filter1d(path[:, k], 2.0, mode="nearest")
        if chain[stop] in place:
            fade = np.exp(-np.arange(len(path))[::-1] / 2.5)[:, None]
            path += fade * (np.array(place[chain[stop]]) - path[-1])
        for cell, point in zip(chain[:stop], path[:-1].tolist(), strict=False):
            place[cell] = (point[0], point[1])
        paths.append((path, np.clip(0.42 * (area[cells] / 1e6) ** 0.72 + 0.6, 1.2, 55)))
    return paths


def make_rivers(relief: Relief, noise: Noise) -> Lines:
    """All streams of the world; their bends are a function of position, so that they still meet."""
    fine: list[tuple[Coords, Floats32]] = []
    for path, half in river_paths(relief):
        steps = np.hypot(*np.diff(path, axis=0).T)
        at = np.concatenate([[0.0], np.cumsum(steps)])
        where = np.arange(0, at[-1], 25.0)
        dense = np.column_stack([np.interp(where, at, path[:, k]) for k in (0, 1)])
        fine.append((np.add(dense, (WEST, SOUTH)), np.interp(where, at, half).astype(np.float32)))
    every = np.concatenate([path for path, _ in fine])
    bend = [75 * noise.at(key, every[:, 0], every[:, 1], 900, 2.6) for key in (21, 22)]
    cuts = np.cumsum([len(path) for path, _ in fine])[:-1]
    moved = np.split(every + np.column_stack(bend), cuts)
    return make_lines([(path, half) for path, (_, half) in zip(moved, fine, strict=True)])


def make_towns(
    relief: Relief, noise: Noise, fixed: list[tuple[float, float, float]], more: int
) -> list[Town]:
    """Towns on flat, dry ground.

    Args:
        relief: of the world.
        noise: of the world.
        fixed: towns that there must be: kilometres east and north, radius in metres.
        more: how many others.
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
    return Town(WEST + (column + 0.5) * CELL, SOUTH + (row + 0.5) * CELL, radius)


def make_roads(relief: Relief, towns: list[Town]) -> Lines:
    """Roads from each town to its nearest neighbours, along gentle ground."""
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
    paths: list[tuple[Coords, Floats32]] = []
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
    row = min(max(round((town.y - SOUTH) / edge), 0), rows - 1)
    column = min(max(round((town.x - WEST) / edge), 0), columns - 1)
    return row * columns + column


def _walk(before: NDArray[np.int32], last: int) -> Ints:
    cells = [last]
    while before[cells[-1]] >= 0:
        cells.append(int(before[cells[-1]]))
    return np.array(cells, dtype=np.int64)
