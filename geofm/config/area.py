"""The area of a search, and the rules for areas that cross the antimeridian.

A recipe gives the area as a bounding box, a GeoJSON geometry or circles. Coordinates are degrees
(EPSG:4326). Areas that cross the antimeridian are held in one of two forms:

split       two pieces, longitudes -180 to 180; the form of a search, so that areas intersect as
            usual                                                    (`split_at_antimeridian`)
unwrapped   one piece, with longitudes that run past 180; the form of footprints of scenes and
            chips. An unwrapped area is compared with copies of the other area that are shifted by
            `FULL_TURNS`                                             (`unwrap_longitudes`)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from pyproj import Geod
from shapely.affinity import translate
from shapely.geometry import Polygon, box, mapping, shape
from shapely.geometry.base import BaseGeometry

from geofm.types import Floats, Json

#: Limits of an area, because it is copied to the manifest of every search.
MAX_POINTS = 20_000
MAX_FILE_BYTES = 20 * 2**20
CIRCLE_POINTS = 64
MAX_RADIUS_KM = 5000.0
#: Shifts in degrees at which two areas with unwrapped longitudes can meet.
FULL_TURNS = (0.0, 360.0, -360.0)
_NUMBER = r"([+-]?\d{1,4}(?:\.\d{1,12})?)"
_CIRCLE = re.compile(rf"{_NUMBER}/{_NUMBER}/{_NUMBER}")
_EARTH = Geod(ellps="WGS84")
#: Exceptions of shapely for geometries that are not GeoJSON.
_UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    OverflowError,
    shapely.errors.ShapelyError,
)


def search_area(
    bbox: Sequence[float] | None, area: Json | None, circles: Sequence[str]
) -> BaseGeometry | None:
    """Build the area of a search from the settings; at most one of them is given.

    Args:
        bbox: West, south, east, north in degrees; west > east means across the antimeridian.
        area: GeoJSON polygon or multipolygon.
        circles: Circles as ``lon/lat/radius_km``.

    Returns:
        The area, split at the antimeridian; None for everywhere.
    """
    if bbox is not None:
        west, south, east, north = bbox
        whole = box(west, south, east if west <= east else east + 360.0, north)
        return split_at_antimeridian(whole)
    if area is not None:
        return split_at_antimeridian(shape(area))
    if circles:
        discs = [circle(*parse_circle(text)) for text in circles]
        return shapely.union_all([split_at_antimeridian(disc) for disc in discs])
    return None


def split_at_antimeridian(area: BaseGeometry) -> BaseGeometry:
    """Bring all longitudes into -180 to 180; an area that crosses the antimeridian is cut there."""
    west, _, east, _ = area.bounds
    if west >= -180 and east <= 180:
        return area
    turns = range(math.floor((west + 180) / 360), math.floor((east + 180) / 360) + 1)
    pieces = [
        translate(area.intersection(box(360 * n - 180, -90, 360 * n + 180, 90)), -360 * n)
        for n in turns
    ]
    return shapely.union_all([piece for piece in pieces if piece.area > 0])


def unwrap_longitudes(area: BaseGeometry) -> BaseGeometry:
    """Join an area that is wider than 180 degrees across the antimeridian, past longitude 180."""
    if area.is_empty or area.bounds[2] - area.bounds[0] <= 180:
        return area
    moved = to_eastern_longitudes(area)
    return moved if moved.area > 0 else area  # an area around the whole Earth has no gap to join


def to_eastern_longitudes(area: BaseGeometry) -> BaseGeometry:
    """Add 360 degrees to each negative longitude; the result may be invalid."""

    def shift(points: Floats) -> Floats:
        return points + np.where(points[:, :1] < 0, [360.0, 0.0], [0.0, 0.0])

    moved: BaseGeometry = shapely.transform(area, shift)
    return moved


def parse_circle(text: str) -> tuple[float, float, float]:
    """Parse ``lon/lat/radius_km`` into longitude, latitude (degrees) and radius (km).

    Raises:
        ValueError: The text is malformed or out of range; the message has an example.
    """
    match = _CIRCLE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!a:.60}: write lon/lat/radius_km, e.g. 2.35/48.85/10")
    lon, lat, radius = (float(number) for number in match.groups())
    if not (-180 <= lon <= 180 and -90 <= lat <= 90 and 0 < radius <= MAX_RADIUS_KM):
        raise ValueError(
            f"{text!a:.60}: longitude -180..180, latitude -90..90, radius up to "
            f"{MAX_RADIUS_KM:g} km, e.g. 2.35/48.85/10"
        )
    return lon, lat, radius


def circle(lon: float, lat: float, radius_km: float) -> Polygon:
    """Build the polygon within a distance of a point; longitudes may run past 180 or -180."""
    azimuths = np.linspace(0, 360, CIRCLE_POINTS, endpoint=False)
    centre = np.full(CIRCLE_POINTS, lon), np.full(CIRCLE_POINTS, lat)
    lons, lats, _ = _EARTH.fwd(*centre, azimuths, np.full(CIRCLE_POINTS, radius_km * 1000.0))
    to_pole = _EARTH.inv(lon, lat, lon, math.copysign(90.0, lat))[2] / 1000.0
    if to_pole <= radius_km:  # the circle holds a pole: its rim takes on every longitude once
        order = np.argsort(lons)
        rim = np.column_stack([lons[order], lats[order]])
        pole, edge = math.copysign(90.0, lat), float(rim[[0, -1], 1].mean())
        corners = [[180.0, edge], [180.0, pole], [-180.0, pole], [-180.0, edge]]
        return Polygon(np.vstack([rim, corners]))
    lons = lon + (np.asarray(lons) - lon + 180.0) % 360.0 - 180.0
    return Polygon(np.column_stack([lons, lats]))


def read_area(value: Any) -> Json | None:
    """Read the setting ``search.area``.

    Args:
        value: GeoJSON geometry, feature or collection of features, or the path of a file with
            one; None for no area.

    Returns:
        One polygon or multipolygon as GeoJSON; several features are joined.

    Raises:
        ValueError: The area can't be used; the message says what to give.
    """
    if value is None:
        return None
    content = _read_json(value) if isinstance(value, str) else value
    areas = [_polygon(geometry) for geometry in _geometries(content)]
    if not areas:
        raise ValueError("the GeoJSON holds no geometry; give a polygon or multipolygon")
    whole = areas[0] if len(areas) == 1 else shapely.union_all(areas)
    if shapely.get_num_coordinates(whole) > MAX_POINTS:
        raise ValueError(f"the area has more than {MAX_POINTS} points; simplify it")
    geometry: Json = json.loads(json.dumps(mapping(whole)))
    return geometry


def _read_json(path: str) -> Any:
    """Read a GeoJSON file of bounded size."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} has more than {MAX_FILE_BYTES} bytes; simplify the area")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path} as GeoJSON ({error}); give a file's path") from error


def _geometries(content: Any) -> list[Any]:
    """Return the geometries of a GeoJSON object, unchecked."""
    if not isinstance(content, dict):
        raise ValueError("give a GeoJSON object, or the path of a file with one")
    if content.get("type") == "FeatureCollection":
        features = content.get("features")
        features = features if isinstance(features, list) else []
        return [item.get("geometry") if isinstance(item, dict) else None for item in features]
    return [content.get("geometry") if content.get("type") == "Feature" else content]


def _polygon(geometry: Any) -> BaseGeometry:
    """Check a GeoJSON geometry and return it as a valid polygon or multipolygon in degrees."""
    try:
        area = shape(geometry)
        is_polygon = not area.is_empty and area.geom_type in ("Polygon", "MultiPolygon")
    except _UNREADABLE as error:
        raise ValueError(f"the geometry can't be read: {error}"[:200]) from error
    if not is_polygon:
        raise ValueError("the area must be a Polygon or MultiPolygon")
    west, south, east, north = area.bounds
    if not (west >= -360 and east <= 360 and south >= -90 and north <= 90):
        raise ValueError("the area must be in degrees (longitude, latitude), EPSG:4326")
    if _has_long_edge(area):
        raise ValueError(
            "an edge of the area spans more than 180 degrees; cut it at the antimeridian, or "
            "write longitudes beyond 180 (170 to 190)"
        )
    valid = shapely.force_2d(area if area.is_valid else shapely.make_valid(area))
    if valid.geom_type == "GeometryCollection":
        valid = shapely.union_all([part for part in valid.geoms if part.area > 0])
    if valid.area <= 0:
        raise ValueError("the area encloses no ground")
    return valid


def _has_long_edge(area: BaseGeometry) -> bool:
    """Check for an edge of more than 180 degrees, whose way around the Earth is ambiguous."""
    polygons = list(getattr(area, "geoms", [area]))
    rings = [ring for polygon in polygons for ring in (polygon.exterior, *polygon.interiors)]
    steps = [np.abs(np.diff(np.asarray(ring.coords)[:, 0])) for ring in rings]
    return any(bool(((step > 180) & (step < 360)).any()) for step in steps)
