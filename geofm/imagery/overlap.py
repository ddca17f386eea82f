"""Ownership of ground that several scenes of one acquisition cover (tiles overlap at their rims).

The best scene keeps all its chips. A chip of the next is dropped when chips that are kept already
cover enough of it. Only whole kept chips count, so no ground is lost at the rim of a scene.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from geofm.imagery.grid import WGS84, Cell, Grid, Shapes, boxes, continuous, to_crs
from geofm.imagery.identity import version_key


@dataclass(frozen=True)
class Claim:
    """A scene that can be read, and what decides between it and others.

    Attributes:
        acquisition: from the identity rule; empty claims nothing against anybody.
        cloud: percent, 100 when unknown.
        geometry: where the scene has data, EPSG:4326.
    """

    collection: str
    item_id: str
    acquisition: str
    version: str
    cloud: float
    grid: Grid
    geometry: BaseGeometry

    def priority(self) -> tuple[tuple[int, ...], float, str]:
        """Smaller is better: newest baseline, fewest clouds, then by id."""
        return tuple(-number for number in version_key(self.version)), self.cloud, self.item_id


def lost_cells(claims: Sequence[Claim], max_overlap: float) -> list[dict[Cell, str]]:
    """For each claim its cells that others own, with the owner's item id.

    Args:
        claims: scenes of any collections and acquisitions.
        max_overlap: share of a cell from which it belongs to the other scene.
    """
    lost: list[dict[Cell, str]] = [{} for _ in claims]
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, claim in enumerate(claims):
        if claim.acquisition:
            groups[claim.collection, claim.acquisition].append(number)
    for members in groups.values():
        owners: list[_Owner] = []
        for number in sorted(members, key=lambda n: claims[n].priority()):
            claim = claims[number]
            cells = list(claim.grid.cells())
            if owners and cells:
                lost[number] = _lose(claim, cells, owners, max_overlap)
            if len(members) > 1:
                owners.append(_Owner(claim, [c for c in cells if c not in lost[number]]))
    return lost


class _Owner:
    """A scene's kept cells as shapes on its own grid, clipped to where it has data."""

    def __init__(self, claim: Claim, cells: list[Cell]) -> None:
        self.claim = claim
        self.shapes = boxes(claim.grid, cells)
        area = np.array([continuous(claim.geometry)])
        data = shapely.make_valid(to_crs(area, WGS84, claim.grid.crs)[0])
        shapely.prepare(data)
        rim = ~shapely.contains_properly(data, self.shapes)
        self.shapes[rim] = shapely.intersection(self.shapes[rim], data)

    def near(self, claim: Claim) -> Shapes:
        """The shapes in the CRS of another claim, those that reach its scene."""
        extent = shapely.box(*claim.grid.extent())
        here = self.claim.grid.crs
        back = to_crs(np.array([extent]), claim.grid.crs, here)[0]
        close = self.shapes[shapely.intersects(self.shapes, back)]
        return to_crs(close, here, claim.grid.crs)


def _lose(
    claim: Claim, cells: list[Cell], owners: list[_Owner], max_overlap: float
) -> dict[Cell, str]:
    """The cells of a claim that are covered by shapes of owners."""
    shapes, whose = [], []
    for number, owner in enumerate(owners):
        near = owner.near(claim)
        shapes.append(near)
        whose.append(np.full(len(near), number))
    others, names = np.concatenate(shapes), np.concatenate(whose)
    if not len(others):
        return {}
    mine = boxes(claim.grid, cells)
    pairs = shapely.STRtree(others).query(mine, predicate="intersects")
    parts = shapely.intersection(mine[pairs[0]], others[pairs[1]])
    areas = shapely.area(parts)
    hits: dict[int, list[int]] = defaultdict(list)
    for pair in np.flatnonzero(areas > 0):
        hits[int(pairs[0, pair])].append(int(pair))
    lost: dict[Cell, str] = {}
    for cell, found in hits.items():
        covered = shapely.area(shapely.union_all(parts[found]))
        if covered / shapely.area(mine[cell]) >= max(max_overlap - 1e-6, 1e-6):
            share = np.bincount(names[pairs[1, found]], areas[found], minlength=len(owners))
            lost[cells[cell]] = owners[int(share.argmax())].claim.item_id
    return lost
