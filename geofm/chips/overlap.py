"""Ownership of ground that several scenes of one day cover (tiles overlap at their rims).

The best scene keeps all its chips. A chip of the next is dropped when chips that are kept already
cover enough of it. Only whole kept chips count, so no ground is lost at the rim of a scene.
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
class Claim:
    """A scene that may be cut, and what decides between it and others.

    Attributes:
        item_sha256: of the frozen item.
        acquisition: from the identity rule; empty claims nothing against anybody.
        time: RFC 3339, UTC.
        cloud: percent, 100 when unknown.
        nodata: percent of pixels without data, 0 when unknown.
        geometry: where the scene has data, EPSG:4326.
        chip_bytes: about what one of its chips costs to download.
        scene_bytes: about what its first chip costs besides, for files that are read whole.
        cells: the cells that it can be cut into; None for all of its grid.
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
        """Smaller is better: newest baseline, fewest clouds, then by id."""
        return tuple(-number for number in version_key(self.version)), self.cloud, self.item_id

    @cached_property
    def data(self) -> BaseGeometry:
        """Where the scene has data, in its own CRS."""
        area = np.array([unwrap_longitudes(self.geometry)])
        found: BaseGeometry = shapely.make_valid(to_crs(area, WGS84, self.grid.crs)[0])
        shapely.prepare(found)
        return found


def find_owners(
    claims: Sequence[Claim], cells: Sequence[Cells], max_overlap: float
) -> list[NDArray[np.int64]]:
    """For each cell of each claim the claim that owns its ground instead, -1 for none.

    Args:
        claims: scenes of any collections and days; only those of one collection and day, whose
            acquisition is known, are held against each other.
        cells: the cells of each claim that count.
        max_overlap: share of a cell from which it belongs to the other scene.
    """
    owner = [np.full(len(some), -1, np.int64) for some in cells]
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    days = first_days(claims)
    for number, claim in enumerate(claims):
        if claim.acquisition and len(cells[number]):
            groups[claim.collection, days[claim.collection, claim.acquisition]].append(number)
    for members in groups.values():
        near = neighbours([claims[n] for n in members]) if len(members) > 1 else {}
        done: dict[int, _Owner] = {}
        for place in sorted(range(len(members)), key=lambda p: claims[members[p]].priority()):
            number = members[place]
            others = [done[p] for p in sorted(near.get(place, ())) if p in done]
            if others:
                owner[number] = lose(claims[number], cells[number], others, max_overlap)
            kept = cells[number][owner[number] < 0]
            done[place] = _Owner(number, claims[number], kept)
    return owner


def first_days(claims: Sequence[Claim]) -> dict[tuple[str, str], str]:
    """The day (UTC) on which each acquisition began: one that passes midnight has one day."""
    days: dict[tuple[str, str], str] = {}
    for claim in claims:
        key = claim.collection, claim.acquisition
        days[key] = min(days.get(key, claim.time[:10]), claim.time[:10])
    return days


def neighbours(claims: Sequence[Claim]) -> dict[int, set[int]]:
    """Which scenes touch which, by position, across the antimeridian too."""
    areas = [extent_footprint(claim.grid) for claim in claims]
    tree = shapely.STRtree(areas)
    found: dict[int, set[int]] = defaultdict(set)
    for turn in FULL_TURNS:
        turned = [translate(area, turn) for area in areas]
        for a, b in tree.query(turned, predicate="intersects").T:
            if a != b:
                found[int(a)].add(int(b))
                found[int(b)].add(int(a))
    return found


@dataclass(frozen=True)
class _Owner:
    """A scene's kept cells as shapes on its own grid, clipped to where it has data."""

    number: int
    claim: Claim
    cells: Cells

    @cached_property
    def shapes(self) -> Shapes:
        found = boxes(self.claim.grid, self.cells)
        rim = ~shapely.contains_properly(self.claim.data, found)
        found[rim] = shapely.intersection(found[rim], self.claim.data)
        return found

    def near(self, claim: Claim) -> Shapes:
        """The shapes in the CRS of another claim, those that reach its scene."""
        extent = shapely.box(*claim.grid.extent())
        here = self.claim.grid.crs
        back = to_crs(np.array([extent]), claim.grid.crs, here)[0]
        close = self.shapes[shapely.intersects(self.shapes, back)]
        return to_crs(close, here, claim.grid.crs)


def lose(
    claim: Claim, cells: Cells, owners: Sequence[_Owner], max_overlap: float
) -> NDArray[np.int64]:
    """For each cell of a claim the number of the owner that covers most of it, or -1."""
    lost = np.full(len(cells), -1, np.int64)
    shapes = [owner.near(claim) for owner in owners]
    others = np.concatenate(shapes)
    whose = np.repeat(np.arange(len(owners)), [len(some) for some in shapes])
    if not len(others):
        return lost
    mine = boxes(claim.grid, cells)
    pairs = shapely.STRtree(others).query(mine, predicate="intersects")
    parts = shapely.intersection(mine[pairs[0]], others[pairs[1]])
    areas = shapely.area(parts)
    hits: dict[int, list[int]] = defaultdict(list)
    for pair in np.flatnonzero(areas > 0):
        hits[int(pairs[0, pair])].append(int(pair))
    least = max(max_overlap - 1e-6, 1e-6)
    for cell, found in hits.items():
        covered = shapely.area(shapely.union_all(parts[found]))
        if covered / shapely.area(mine[cell]) >= least:
            share = np.bincount(whose[pairs[1, found]], areas[found], minlength=len(owners))
            lost[cell] = owners[int(share.argmax())].number
    return lost
