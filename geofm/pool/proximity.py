"""Areas within some metres of each other, anywhere on Earth: poles and antimeridian included.

Boxes in degrees propose pairs. The distance is measured in an azimuthal equidistant projection
centred on the first area (Snyder 1987, section 25, sphere), point by point, so longitudes may be
written in any way. Distances on a sphere are right to about half a percent; the search reaches
further by that much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from geofm.config.area import FULL_TURNS
from geofm.types import Floats, Indices

#: Array of shapely geometries.
Shapes = NDArray[np.object_]

#: Mean radius of the Earth.
RADIUS_M = 6_371_008.8
#: Factor by which a distance on the sphere may be wrong.
SLACK = 1.006
#: Longest edge (degrees) that is projected as a straight line.
EDGE_DEG = 0.25
#: Latitude beyond which every longitude is near.
POLAR_DEG = 89.9


@dataclass(frozen=True)
class NearAreas:
    """Pairs of areas: row of the first list, row of the second list, distance in metres."""

    left: Indices
    right: Indices
    distance_m: Floats


def near_areas(left: Shapes, right: Shapes, reach_m: float) -> NearAreas:
    """Find pairs of areas at most ``reach_m`` metres apart; areas that touch have distance 0.

    Args:
        left: areas in EPSG:4326, shape (n,); missing or empty areas are in no pair.
        right: areas in EPSG:4326, shape (m,).
        reach_m: largest distance in metres.
    """
    reach = reach_m * SLACK
    left_rows, left_boxes = _boxes(left, reach)
    right_rows, right_boxes = _boxes(right, 0.0)
    count = max(len(right), 1)
    codes: list[Indices] = [np.empty(0, np.int64)]
    if len(left_rows) and len(right_rows):
        tree = shapely.STRtree(shapely.box(*right_boxes.T))
        for degrees in FULL_TURNS:
            moved = shapely.box(*(left_boxes + np.array([degrees, 0, degrees, 0])).T)
            i, j = tree.query(moved, predicate="intersects")
            codes.append(left_rows[i] * count + right_rows[j])
    a, b = np.divmod(np.unique(np.concatenate(codes)), count)
    distance = np.array(
        [_distance_m(left[i], right[j]) for i, j in zip(a, b, strict=True)], dtype=np.float64
    )
    near = distance <= reach
    return NearAreas(a[near], b[near], distance[near])


def _boxes(areas: Shapes, reach_m: float) -> tuple[Indices, Floats]:
    """Compute the bounds in degrees of areas, widened by a distance.

    Returns:
        Rows of the areas that are not missing or empty, shape (k,); bounds, shape (k, 4).
    """
    rows = np.flatnonzero(~(shapely.is_missing(areas) | shapely.is_empty(areas))).astype(np.int64)
    west, south, east, north = shapely.bounds(areas[rows]).T.reshape(4, -1)
    height = np.degrees(reach_m / RADIUS_M)
    south, north = south - height, north + height
    latitude = np.minimum(np.maximum(np.abs(south), np.abs(north)), 90.0)
    width = height / np.maximum(np.cos(np.radians(latitude)), 1e-4)
    width = np.where(latitude > POLAR_DEG, 360.0, width)
    width = np.where(reach_m > 0, np.minimum(width, 360.0), 0.0)
    return rows, np.stack([west - width, south, east + width, north], axis=1)


def _distance_m(area: BaseGeometry, other: BaseGeometry) -> float:
    """Compute the distance of two areas in a projection centred on the first one."""
    # The centre is the mean of the directions of the corners: right wherever longitudes wrap.
    corners = np.radians(shapely.get_coordinates(area))
    cos_lat = np.cos(corners[:, 1])
    x = np.mean(cos_lat * np.cos(corners[:, 0]))
    y = np.mean(cos_lat * np.sin(corners[:, 0]))
    z = np.mean(np.sin(corners[:, 1]))
    lon0, lat0 = np.arctan2(y, x), np.arctan2(z, np.hypot(x, y))

    def project(points: Floats) -> Floats:
        lon, lat = np.radians(points).T
        east = np.cos(lat) * np.sin(lon - lon0)
        north = np.cos(lat0) * np.sin(lat) - np.sin(lat0) * np.cos(lat) * np.cos(lon - lon0)
        towards = np.sin(lat0) * np.sin(lat) + np.cos(lat0) * np.cos(lat) * np.cos(lon - lon0)
        length = np.hypot(east, north)
        angle = np.arctan2(length, towards)
        scale = RADIUS_M * np.where(length > 0, angle / np.maximum(length, 1e-300), 1.0)
        return np.stack([east * scale, north * scale], axis=1)

    def project_area(shape: BaseGeometry) -> BaseGeometry:
        west, _, east, _ = shapely.bounds(shape)
        # an area wider than 180 degrees wraps around: its edges cannot be divided in degrees
        fine = shapely.segmentize(shape, EDGE_DEG) if east - west < 180 else shape
        return shapely.make_valid(shapely.transform(fine, project))

    return float(shapely.distance(project_area(area), project_area(other)))
