"""Checks of one STAC item from an untrusted catalogue, field by field.

An item is a ``dict`` of JSON. It is not parsed by a STAC library, because libraries trust the types
of its fields. The first fault raises :class:`Quarantine` with a reason.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import shapely
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from geofm.remote.quarantine import Quarantine
from geofm.remote.url_policy import scheme_of
from geofm.runtime.timestamps import parse_time
from geofm.types import Json

MAX_ID_LENGTH = 255

#: URL schemes that geofm reads, and harmless schemes that it does not read.
READABLE = {"http", "https", "s3"}
UNREADABLE = {"gs", "az", "abfs", "abfss", "ftp", "ftps", "mailto", "doi"}

#: Exceptions of shapely for JSON that is no geometry.
_UNREADABLE_GEOMETRY = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RecursionError,
    OverflowError,
    shapely.errors.ShapelyError,
)


def check_item(item: Json, collections: list[str], own: str = "") -> BaseGeometry:
    """Check all fields of an item that can be checked without reading its assets.

    Args:
        item: The item in canonical form.
        collections: The collections of the search.
        own: Scheme of addresses inside the catalogue: ``planet`` for the embedded planet,
            ``catalog`` for a local folder, else empty.

    Returns:
        The geometry, EPSG:4326.

    Raises:
        Quarantine: With the reason of the first fault.
    """
    check_id(item.get("id"))
    if item.get("collection") not in collections:
        raise Quarantine("wrong_collection", f"names collection {item.get('collection')!r:.80}")
    properties, assets = item.get("properties"), item.get("assets")
    if not isinstance(properties, dict) or not isinstance(assets, dict):
        raise Quarantine("wrong_types", "properties and assets must be JSON objects")
    check_times(properties)
    check_numbers(properties)
    if not assets:
        raise Quarantine("no_assets", "the item has no assets")
    for key, asset in assets.items():
        check_asset(str(key), asset, own)
    return check_geometry(item.get("geometry"))


def check_id(name: Any) -> None:
    """Check that an id is a plain name: not empty, not long, no control characters, no path."""
    if not isinstance(name, str) or not name.strip():
        raise Quarantine("bad_id", "the id is no text")
    if len(name) > MAX_ID_LENGTH:
        raise Quarantine("bad_id", f"the id has {len(name)} characters, more than {MAX_ID_LENGTH}")
    if any(unicodedata.category(character).startswith("C") for character in name):
        raise Quarantine("bad_id", f"the id has control characters: {name!a:.80}")
    if "/" in name or "\\" in name or name in (".", "..") or ".." in name:
        raise Quarantine("bad_id", f"the id reads as a path: {name!a:.80}")


def check_times(properties: Json) -> None:
    """Check for ``datetime``, or for both ``start_datetime`` and ``end_datetime``."""
    names = ("datetime", "start_datetime", "end_datetime")
    for name in names:
        if properties.get(name) is not None and parse_time(properties[name]) is None:
            raise Quarantine("bad_datetime", f"{name} is no RFC 3339 time")
    if properties.get("datetime") is None and any(
        properties.get(name) is None for name in names[1:]
    ):
        raise Quarantine("no_datetime", "neither datetime nor start_datetime and end_datetime")


def check_numbers(fields: Json) -> None:
    """Check the fields of an item or an asset that later steps compute with."""
    cover = fields.get("eo:cloud_cover")
    if cover is not None and not (is_number(cover) and 0 <= cover <= 100):
        raise Quarantine("wrong_types", f"eo:cloud_cover is {cover!r:.40}, not 0 to 100")
    epsg = fields.get("proj:epsg")
    if epsg is not None and not (isinstance(epsg, int) and 1000 <= epsg <= 999_999):
        raise Quarantine("wrong_types", f"proj:epsg is {epsg!r:.40}, not a code")
    code = fields.get("proj:code")
    if code is not None and not (
        isinstance(code, str) and re.fullmatch(r"\w{1,20}:\w{1,20}", code)
    ):
        raise Quarantine("wrong_types", f"proj:code is {code!r:.40}, not AUTHORITY:CODE")
    size = fields.get("proj:shape")
    if size is not None and not (
        isinstance(size, list)
        and len(size) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in size)
    ):
        raise Quarantine("wrong_types", f"proj:shape is {size!r:.40}, not two positive integers")
    transform = fields.get("proj:transform")
    if transform is not None and not (
        isinstance(transform, list)
        and len(transform) in (6, 9)
        and all(is_number(n) for n in transform)
    ):
        raise Quarantine("wrong_types", f"proj:transform is {transform!r:.40}, not six numbers")


def is_number(value: Any) -> bool:
    """Check for a finite JSON number that a float can hold; booleans are not numbers."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_asset(key: str, asset: Any, own: str) -> None:
    """Check that an asset is an object whose address does not point into this machine."""
    if not isinstance(asset, dict) or not isinstance(asset.get("href"), str):
        raise Quarantine("wrong_types", f"asset {key!a:.40} has no href")
    for name in ("bands", "eo:bands", "raster:bands", "roles"):
        if asset.get(name) is not None and not isinstance(asset[name], list):
            raise Quarantine("wrong_types", f"asset {key!a:.40}: {name} is no list")
    check_numbers(asset)
    scheme = scheme_of(asset["href"])
    allowed = READABLE | UNREADABLE | ({own} if own else set())
    if scheme not in allowed:
        raise Quarantine("bad_scheme", f"asset {key!a:.40} has the address {asset['href']!a:.80}")


def check_geometry(geometry: Any) -> BaseGeometry:
    """Check for a polygon or multipolygon in degrees with an area, and make it valid."""
    if not isinstance(geometry, dict):
        raise Quarantine("bad_geometry", "the item has no geometry")
    try:
        area = shape(geometry)
    except _UNREADABLE_GEOMETRY as error:
        raise Quarantine("bad_geometry", f"the geometry can't be read: {error}"[:200]) from error
    if area.is_empty or area.geom_type not in ("Polygon", "MultiPolygon"):
        raise Quarantine("bad_geometry", f"the geometry is an empty area or a {area.geom_type}")
    bounds = area.bounds
    if not all(math.isfinite(v) for v in bounds) or not (
        bounds[0] >= -360 and bounds[2] <= 360 and bounds[1] >= -90.01 and bounds[3] <= 90.01
    ):
        raise Quarantine("bad_geometry", f"the geometry is not in degrees: {bounds}")
    valid = area if area.is_valid else shapely.make_valid(area)
    if valid.area <= 0:
        raise Quarantine("no_area", "the geometry has no area")
    return valid


def text_of(value: Any) -> str:
    """Return a text or integer as text; empty for any other value."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def first_text(properties: Json, names: Sequence[str]) -> str:
    """Return the first of the named properties that has a text; empty if none has."""
    return next((text for name in names if (text := text_of(properties.get(name)))), "")
