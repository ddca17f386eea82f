"""Which areas on Earth lie within some metres of each other: anywhere, poles and antimeridian too.

Boxes in degrees propose pairs; the distance is measured in an azimuthal equidistant projection
about the first area, point by point, so that longitudes may be written in any way. On a sphere:
distances are right to about half a percent, by which the search reaches further.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from geofm.config.area import FULL_TURNS
from geofm.types import Indices

Shapes = NDArray[np.object_]

RADIUS_M = 6_371_008.8
#: What the sphere may be wrong by.
SLACK = 1.006
#: Longest edge (degrees) that is projected as a straight line.
EDGE_DEG = 0.25


@dataclass(frozen=True)
class Near:
    """Pairs within reach: row of the first areas, row of the second, distance in metres."""

    left: Indices
    right: Indices
    distance_m: NDArray[np.float64]


def near_areas(left: Shapes, right: Shapes, reach_m: float) -> Near:
    """Pairs of areas (EPSG:4326) at most ``reach_m`` metres apart; 0 where they touch.

    Areas that are missing or empty are near to nothing.
    """
    reach = reach_m * SLACK
    mine, boxes = _boxes(left, reach)
    other, bounds = _boxes(right, 0.0)
    near: list[NDArray[np.int64]] = []
    if len(mine) and len(other):
        tree = shapely.STRtree(shapely.box(*bounds.T))
        for turn in FULL_TURNS:
            moved = shapely.box(*(boxes + np.array([turn, 0, turn, 0])).T)
            asked, given = tree.query(moved, predicate="intersects")
            near.append(mine[asked] * len(right) + other[given])
    codes = np.unique(np.concatenate(near)) if near else np.empty(0, np.int64)
    rows, others = codes // max(len(right), 1), codes % max(len(right), 1)
    distance = np.array(
        [_distance(left[a], right[b]) for a, b in zip(rows, others, strict=True)], dtype=np.float64
    )
    found = distance <= reach
    return Near(rows[found], others[found], distance[found])


def _boxes(areas: Shapes, reach_m: float) -> tuple[Indices, NDArray[np.float64]]:
    """Rows that have an area, and [n, 4] their bounds in degrees, widened."""
    rows = np.flatnonzero(~(shapely.is_missing(areas) | shapely.is_empty(areas))).astype(np.int64)
    west, south, east, north = shapely.bounds(areas[rows]).T.reshape(4, -1)
    tall = np.degrees(reach_m / RADIUS_M)
    south, north = south - tall, north + tall
    highest = np.minimum(np.maximum(np.abs(south), np.abs(north)), 90.0)
    # beyond the pole every longitude is near
    wide = np.where(highest > 89.9, 360.0, tall / np.maximum(np.cos(np.radians(highest)), 1e-4))
    wide = np.where(reach_m > 0, np.minimum(wide, 360.0), 0.0)
    return rows, np.stack([west - wide, south, east + wide, north], axis=1)


def _distance(area: BaseGeometry, other: BaseGeometry) -> float:
    """Metres between two areas, seen from the first."""
    # the mean of the directions of its points: right wherever its longitudes are cut
    corners = np.radians(shapely.get_coordinates(area))
    flat = np.cos(corners[:, 1])
    point = np.array([np.mean(flat * np.cos(corners[:, 0])), np.mean(flat * np.sin(corners[:, 0])),
                      np.mean(np.sin(corners[:, 1]))])  # fmt: skip
    lon0, lat0 = np.arctan2(point[1], point[0]), np.arctan2(point[2], np.hypot(*point[:2]))

    def project(points: NDArray[np.float64]) -> NDArray[np.float64]:
        lon, lat = np.radians(points).T
        across = np.cos(lat) * np.sin(lon - lon0)
        up = np.cos(lat0) * np.sin(lat) - np.sin(lat0) * np.cos(lat) * np.cos(lon - lon0)
        along = np.sin(lat0) * np.sin(lat) + np.cos(lat0) * np.cos(lat) * np.cos(lon - lon0)
        length = np.hypot(across, up)
        angle = np.arctan2(length, along)
        scale = RADIUS_M * np.where(length > 0, angle / np.maximum(length, 1e-300), 1.0)
        return np.stack([across * scale, up * scale], axis=1)

    flat_areas = [
        shapely.make_valid(shapely.transform(shapely.segmentize(one, EDGE_DEG), project))
        if shapely.bounds(one)[2] - shapely.bounds(one)[0] < 180
        else shapely.make_valid(shapely.transform(one, project))
        for one in (area, other)
    ]
    return float(shapely.distance(*flat_areas))
