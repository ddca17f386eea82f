"""Ownership of ground that several scenes of one day cover, since tiles overlap at their edges.

The best scene keeps all its chips. A chip of the next scene is dropped if the chips that are kept
already cover enough of it. Only whole kept chips count, so no ground is lost at a scene's edge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.affinity import translate
from shapely.geometry.base import BaseGeometry

from geofm.config.area import FULL_TURNS, unwrap_longitudes
from geofm.raster.grid import WGS84, Grid, Shapes, boxes, extent_footprint, to_crs
from geofm.stac.supersede import version_key

#: [n, 2] cell numbers x, y.
Cells = NDArray[np.int64]


@dataclass(frozen=True)
class SceneCandidate:
    """A scene that may be cut, with the properties that decide between it and other scenes.

    Attributes:
        item_sha256: sha256 of the frozen item.
        acquisition: Acquisition by the identity rule; if empty, the scene owns no ground.
        time: Time, RFC 3339 in UTC.
        version: Processing baseline.
        cloud: Cloud cover in percent; 100 if unknown.
        nodata: Pixels without data in percent; 0 if unknown.
        geometry: Area with data, EPSG:4326.
        chip_bytes: Estimated bytes to download for each chip.
        scene_bytes: Estimated bytes to download once, for files that are read whole.
        cells: Cells that the scene can be cut into, shape (n, 2); None for all of its grid.
    """

    collection: str
    item_id: str
    item_sha256: str
    acquisition: str
    time: str
    version: str
    cloud: float
    nodata: float
    grid: Grid
    geometry: BaseGeometry
    chip_bytes: float = 0.0
    scene_bytes: float = 0.0
    cells: Cells | None = None

    def priority(self) -> tuple[tuple[int, ...], float, str]:
        """Return a sort key; the best scene has the newest baseline, then the fewest clouds."""
        return tuple(-number for number in version_key(self.version)), self.cloud, self.item_id

    @cached_property
    def data(self) -> BaseGeometry:
        """Area with data, in the scene's CRS."""
        area = np.array([unwrap_longitudes(self.geometry)])
        valid: BaseGeometry = shapely.make_valid(to_crs(area, WGS84, self.grid.crs)[0])
        shapely.prepare(valid)
        return valid


def find_owners(
    candidates: Sequence[SceneCandidate], cells: Sequence[Cells], max_overlap: float
) -> list[NDArray[np.int64]]:
    """Find the scene that owns the ground of each cell.

    Only scenes of one collection and day whose acquisition is known are compared.

    Args:
        candidates: Scenes, of any collections and days.
        cells: Cells of each scene that may be cut, shape (n, 2) each.
        max_overlap: Share of a cell from which it belongs to the other scene.

    Returns:
        For each scene an array, shape (n,): number of the other scene that owns the cell, or -1.
    """
    owner = [np.full(len(own), -1, np.int64) for own in cells]
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    days = first_days(candidates)
    for number, candidate in enumerate(candidates):
        if candidate.acquisition and len(cells[number]):
            groups[candidate.collection, days[candidate.collection, candidate.acquisition]].append(
                number
            )
    for members in groups.values():
        near = touching([candidates[n] for n in members]) if len(members) > 1 else {}
        done: dict[int, _Owner] = {}
        by_priority = sorted(range(len(members)), key=lambda p: candidates[members[p]].priority())
        for position in by_priority:
            number = members[position]
            others = [done[p] for p in sorted(near.get(position, ())) if p in done]
            if others:
                owner[number] = find_covering(
                    candidates[number], cells[number], others, max_overlap
                )
            kept = cells[number][owner[number] < 0]
            done[position] = _Owner(number, candidates[number], kept)
    return owner


def first_days(candidates: Sequence[SceneCandidate]) -> dict[tuple[str, str], str]:
    """Return the UTC day on which each acquisition began: one day, even if it passes midnight."""
    days: dict[tuple[str, str], str] = {}
    for candidate in candidates:
        key = candidate.collection, candidate.acquisition
        days[key] = min(days.get(key, candidate.time[:10]), candidate.time[:10])
    return days


def touching(candidates: Sequence[SceneCandidate]) -> dict[int, set[int]]:
    """Return the positions of the scenes that touch each scene, across the antimeridian too."""
    areas = [extent_footprint(candidate.grid) for candidate in candidates]
    tree = shapely.STRtree(areas)
    near: dict[int, set[int]] = defaultdict(set)
    for turn in FULL_TURNS:
        turned = [translate(area, turn) for area in areas]
        for a, b in tree.query(turned, predicate="intersects").T:
            if a != b:
                near[int(a)].add(int(b))
                near[int(b)].add(int(a))
    return near


@dataclass(frozen=True)
class _Owner:
    """A scene's kept cells as shapes on its own grid, clipped to where it has data."""

    number: int
    scene: SceneCandidate
    cells: Cells

    @cached_property
    def shapes(self) -> Shapes:
        shapes = boxes(self.scene.grid, self.cells)
        partial = ~shapely.contains_properly(self.scene.data, shapes)
        shapes[partial] = shapely.intersection(shapes[partial], self.scene.data)
        return shapes

    def near(self, candidate: SceneCandidate) -> Shapes:
        """Return the shapes that reach another scene, in the CRS of that scene."""
        extent = shapely.box(*candidate.grid.extent())
        crs = self.scene.grid.crs
        back = to_crs(np.array([extent]), candidate.grid.crs, crs)[0]
        close = self.shapes[shapely.intersects(self.shapes, back)]
        return to_crs(close, crs, candidate.grid.crs)


def find_covering(
    candidate: SceneCandidate, cells: Cells, owners: Sequence[_Owner], max_overlap: float
) -> NDArray[np.int64]:
    """Return the number of the owner that covers most of each cell, shape (n,); -1 for none."""
    lost = np.full(len(cells), -1, np.int64)
    shapes = [owner.near(candidate) for owner in owners]
    others = np.concatenate(shapes)
    owner_of = np.repeat(np.arange(len(owners)), [len(part) for part in shapes])
    if not len(others):
        return lost
    squares = boxes(candidate.grid, cells)
    pairs = shapely.STRtree(others).query(squares, predicate="intersects")
    parts = shapely.intersection(squares[pairs[0]], others[pairs[1]])
    areas = shapely.area(parts)
    hits: dict[int, list[int]] = defaultdict(list)
    for pair in np.flatnonzero(areas > 0):
        hits[int(pairs[0, pair])].append(int(pair))
    least = max(max_overlap - 1e-6, 1e-6)
    for cell, hit in hits.items():
        covered = shapely.area(shapely.union_all(parts[hit]))
        if covered / shapely.area(squares[cell]) >= least:
            share = np.bincount(owner_of[pairs[1, hit]], areas[hit], minlength=len(owners))
            lost[cell] = owners[int(share.argmax())].number
    return lost
