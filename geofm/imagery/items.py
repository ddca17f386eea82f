"""STAC items as they come from a stranger: frozen to canonical JSON and checked field by field.

Nothing here parses an item into objects of a STAC library, which would trust its types. An item is
a ``dict`` of JSON; what is wrong with it becomes a :class:`Quarantine` with a reason.
"""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import shapely
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from data_catalog.canonical import canonical
from geofm.imagery.quarantine import Quarantine

Json = dict[str, Any]

#: Frozen items above this size (bytes) are refused: a row of metadata is not a place for data.
MAX_ITEM_BYTES = 256 * 1024
MAX_ID_LENGTH = 255

#: Schemes of addresses that may be read, and of those that are merely of no use here.
READABLE = {"http", "https", "s3"}
ELSEWHERE = {"gs", "az", "abfs", "abfss", "ftp", "ftps", "mailto", "doi"}
_SAS = {"se", "sig", "sp", "sr", "st", "sv", "skoid", "sktid", "skt", "ske", "sks", "skv", "spr"}


def unsigned(href: str) -> str:
    """The address without credentials: user info, Azure SAS and AWS query signatures."""
    parts = urlsplit(href)
    query = parse_qsl(parts.query, keep_blank_values=True)
    names = {name for name, _ in query}
    drop = _SAS if {"sig", "se"} <= names else set()
    if any(name.startswith("X-Amz-Signature") for name in names):
        drop = drop | {name for name in names if name.startswith("X-Amz-")}
    host = parts.netloc.rpartition("@")[2]
    if not drop and host == parts.netloc:
        return href
    kept = urlencode([(name, value) for name, value in query if name not in drop])
    return urlunsplit((parts.scheme, host, parts.path, kept, parts.fragment))


def lasting(item: Json, planet_url: str = "") -> Json:
    """What of an item stays the same: no links, unsigned hrefs, the planet's hrefs without host."""
    frozen = {key: value for key, value in item.items() if key != "links"}
    assets = frozen.get("assets")
    if isinstance(assets, dict):
        frozen["assets"] = {
            key: {**asset, "href": _freeze_href(asset["href"], planet_url)}
            if isinstance(asset, dict) and isinstance(asset.get("href"), str)
            else asset
            for key, asset in assets.items()
        }
    return frozen


def freeze(item: Json, planet_url: str = "") -> str:
    """What stays the same of an item, as canonical JSON text.

    Raises:
        Quarantine: ``not_json`` for NaN and infinities, ``item_too_large``.
    """
    try:
        text = canonical(lasting(item, planet_url)).decode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise Quarantine("not_json", f"the item is no valid JSON: {error}") from error
    if len(text.encode("utf-8")) > MAX_ITEM_BYTES:
        raise Quarantine("item_too_large", f"the item has more than {MAX_ITEM_BYTES} bytes of JSON")
    return text


def _freeze_href(href: str, planet_url: str) -> str:
    """One address as it is stored."""
    base = planet_url.rstrip("/")
    if base and href.startswith(base + "/"):
        return "planet:" + href.removeprefix(base)
    try:
        return unsigned(href)
    except ValueError:  # not an address at all; check_item says so
        return href


def stub(item: Json) -> str:
    """What is kept of an item that can't be frozen: its id and collection, cut to length."""
    texts = {key: item[key] for key in ("id", "collection") if isinstance(item.get(key), str)}
    cut = {key: text[:MAX_ID_LENGTH].encode("ascii", "replace") for key, text in texts.items()}
    return canonical({key: text.decode("ascii") for key, text in cut.items()}).decode("utf-8")


def check_item(item: Json, collections: list[str], planet: bool) -> BaseGeometry:
    """Check everything that a search can know; returns the geometry (EPSG:4326).

    Args:
        item: a frozen item.
        collections: the collections that were asked for.
        planet: whether the item comes from the embedded planet.

    Raises:
        Quarantine: with the first thing that is wrong.
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
        check_asset(str(key), asset, planet)
    return check_geometry(item.get("geometry"))


def check_id(name: Any) -> None:
    """An id is a plain name: not empty, not long, no control characters, no path."""
    if not isinstance(name, str) or not name.strip():
        raise Quarantine("bad_id", "the id is no text")
    if len(name) > MAX_ID_LENGTH:
        raise Quarantine("bad_id", f"the id has {len(name)} characters, {MAX_ID_LENGTH} may be")
    if any(unicodedata.category(character).startswith("C") for character in name):
        raise Quarantine("bad_id", f"the id has control characters: {name!a:.80}")
    if "/" in name or "\\" in name or name in (".", "..") or ".." in name:
        raise Quarantine("bad_id", f"the id reads as a path: {name!a:.80}")


def instant(text: Any) -> datetime | None:
    """A time by RFC 3339, None for anything else."""
    if not isinstance(text, str) or len(text) > 40:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def check_times(properties: Json) -> None:
    """``datetime``, or both ``start_datetime`` and ``end_datetime``."""
    names = ("datetime", "start_datetime", "end_datetime")
    for name in names:
        if properties.get(name) is not None and instant(properties[name]) is None:
            raise Quarantine("bad_datetime", f"{name} is no RFC 3339 time")
    if all(properties.get(name) is None for name in ("datetime",)) and any(
        properties.get(name) is None for name in names[1:]
    ):
        raise Quarantine("no_datetime", "neither datetime nor start_datetime and end_datetime")


def check_numbers(fields: Json) -> None:
    """Types of the fields that later steps compute with, of an item or of an asset."""
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
    to = fields.get("proj:transform")
    if to is not None and not (
        isinstance(to, list) and len(to) in (6, 9) and all(is_number(n) for n in to)
    ):
        raise Quarantine("wrong_types", f"proj:transform is {to!r:.40}, not six numbers")


def is_number(value: Any) -> bool:
    """A finite JSON number that a float can hold (booleans are none)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_asset(key: str, asset: Any, planet: bool) -> None:
    """An asset is an object with an address that does not point into this machine."""
    if not isinstance(asset, dict) or not isinstance(asset.get("href"), str):
        raise Quarantine("wrong_types", f"asset {key!a:.40} has no href")
    for name in ("bands", "eo:bands", "raster:bands", "roles"):
        if asset.get(name) is not None and not isinstance(asset[name], list):
            raise Quarantine("wrong_types", f"asset {key!a:.40}: {name} is no list")
    check_numbers(asset)
    scheme = scheme_of(asset["href"])
    allowed = READABLE | ELSEWHERE | ({"planet"} if planet else set())
    if scheme not in allowed:
        raise Quarantine("bad_scheme", f"asset {key!a:.40} has the address {asset['href']!a:.80}")


def scheme_of(href: str) -> str:
    """Scheme of an address in small letters, empty for a bare path."""
    found = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*):", href)
    return found[1].lower() if found else ""


def check_geometry(geometry: Any) -> BaseGeometry:
    """A polygon or multipolygon in degrees, with area."""
    if not isinstance(geometry, dict):
        raise Quarantine("bad_geometry", "the item has no geometry")
    try:
        area = shape(geometry)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError,
            OverflowError, shapely.errors.ShapelyError) as error:  # fmt: skip
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
