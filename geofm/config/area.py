"""The ground that a search asks for: a box, a GeoJSON geometry or circles around places.

Everything is in degrees (EPSG:4326) between -180 and 180. What crosses the antimeridian is split
there, so that areas can be intersected without thinking of it.
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

from geofm.types import Json

#: An area is part of a recipe and of every manifest made with it, so it is not endless.
MAX_POINTS = 20_000
MAX_FILE_BYTES = 20 * 2**20
CIRCLE_POINTS = 64
MAX_RADIUS_KM = 5000.0
_NUMBER = r"([+-]?\d{1,4}(?:\.\d{1,12})?)"
_PLACE = re.compile(rf"{_NUMBER}/{_NUMBER}/{_NUMBER}")
_EARTH = Geod(ellps="WGS84")


def area_of(
    bbox: Sequence[float] | None, area: Json | None, places: Sequence[str]
) -> BaseGeometry | None:
    """The area that a search is limited to (EPSG:4326), None for everywhere.

    A box, geometry or circle across the antimeridian comes back in two pieces.
    """
    if bbox is not None:
        west, south, east, north = bbox
        return split(box(west, south, east if west <= east else east + 360.0, north))
    if area is not None:
        return split(shape(area))
    if places:
        circles = [circle(*parse_place(text)) for text in places]
        return shapely.union_all([split(one) for one in circles])
    return None


def split(area: BaseGeometry) -> BaseGeometry:
    """The area with all longitudes in -180..180; a polygon over the edge is cut there."""
    west, _, east, _ = area.bounds
    if west >= -180 and east <= 180:
        return area
    turns = range(math.floor((west + 180) / 360), math.floor((east + 180) / 360) + 1)
    pieces = [
        translate(area.intersection(box(360 * n - 180, -90, 360 * n + 180, 90)), -360 * n)
        for n in turns
    ]
    return shapely.union_all([one for one in pieces if one.area > 0])


def parse_place(text: str) -> tuple[float, float, float]:
    """Longitude, latitude (degrees) and radius (km) of ``lon/lat/radius_km``.

    Raises:
        ValueError: with an example.
    """
    found = _PLACE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!a:.60}: write lon/lat/radius_km, e.g. 2.35/48.85/10")
    lon, lat, radius = (float(number) for number in found.groups())
    if not (-180 <= lon <= 180 and -90 <= lat <= 90 and 0 < radius <= MAX_RADIUS_KM):
        raise ValueError(
            f"{text!a:.60}: longitude -180..180, latitude -90..90, radius up to "
            f"{MAX_RADIUS_KM:g} km, e.g. 2.35/48.85/10"
        )
    return lon, lat, radius


def circle(lon: float, lat: float, radius_km: float) -> Polygon:
    """The ground within a distance of a place; may reach beyond longitude 180 on either side."""
    turn = np.linspace(0, 360, CIRCLE_POINTS, endpoint=False)
    here = np.full(CIRCLE_POINTS, lon), np.full(CIRCLE_POINTS, lat)
    lons, lats, _ = _EARTH.fwd(*here, turn, np.full(CIRCLE_POINTS, radius_km * 1000.0))
    to_pole = _EARTH.inv(lon, lat, lon, math.copysign(90.0, lat))[2] / 1000.0
    if to_pole <= radius_km:  # a cap: its rim runs once around
        order = np.argsort(lons)
        rim = np.column_stack([lons[order], lats[order]])
        pole, edge = math.copysign(90.0, lat), float(rim[[0, -1], 1].mean())
        corners = [[180.0, edge], [180.0, pole], [-180.0, pole], [-180.0, edge]]
        return Polygon(np.vstack([rim, corners]))
    lons = lon + (np.asarray(lons) - lon + 180.0) % 360.0 - 180.0
    return Polygon(np.column_stack([lons, lats]))


def read_area(given: Any) -> Json | None:
    """A GeoJSON polygon or multipolygon from a geometry, a feature, a collection or a file's path.

    Returns:
        The geometry alone, as JSON; several features are joined.

    Raises:
        ValueError: what is wrong and what would do.
    """
    if given is None:
        return None
    content = _read(given) if isinstance(given, str) else given
    areas = [_polygon(geometry) for geometry in _geometries(content)]
    if not areas:
        raise ValueError("the GeoJSON holds no geometry; give a polygon or multipolygon")
    whole = areas[0] if len(areas) == 1 else shapely.union_all(areas)
    if shapely.get_num_coordinates(whole) > MAX_POINTS:
        raise ValueError(f"the area has more than {MAX_POINTS} points; simplify it")
    found: Json = json.loads(json.dumps(mapping(whole)))
    return found


def _read(path: str) -> Any:
    file = Path(path)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} has more than {MAX_FILE_BYTES} bytes; simplify the area")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path} as GeoJSON ({error}); give a file's path") from error


def _geometries(content: Any) -> list[Any]:
    """The geometries in a GeoJSON object."""
    if not isinstance(content, dict):
        raise ValueError("give a GeoJSON object, or the path of a file with one")
    if content.get("type") == "FeatureCollection":
        features = content.get("features")
        found = features if isinstance(features, list) else []
        return [one.get("geometry") if isinstance(one, dict) else None for one in found]
    return [content.get("geometry") if content.get("type") == "Feature" else content]


def _polygon(geometry: Any) -> BaseGeometry:
    """One polygon or multipolygon in degrees."""
    try:
        area = shape(geometry)
        good = not area.is_empty and area.geom_type in ("Polygon", "MultiPolygon")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError,
            shapely.errors.ShapelyError) as error:  # fmt: skip
        raise ValueError(f"the geometry can't be read: {error}"[:200]) from error
    if not good:
        raise ValueError("the area must be a Polygon or MultiPolygon")
    west, south, east, north = area.bounds
    if not (west >= -360 and east <= 360 and south >= -90 and north <= 90):
        raise ValueError("the area must be in degrees (longitude, latitude), EPSG:4326")
    if _leaps(area):
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


def _leaps(area: BaseGeometry) -> bool:
    """Whether an edge may be meant to go the other way around the Earth."""
    polygons = list(getattr(area, "geoms", [area]))
    rings = [ring for one in polygons for ring in (one.exterior, *one.interiors)]
    steps = [np.abs(np.diff(np.asarray(ring.coords)[:, 0])) for ring in rings]
    return any(bool(((step > 180) & (step < 360)).any()) for step in steps)
