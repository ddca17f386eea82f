"""Which asset holds which band, by its common name, in items of STAC 0.9 to 1.1.

Older items describe bands with ``eo:bands`` and ``raster:bands``, newer ones with ``bands``; 0.9
has the list on the item and numbers on the asset. All are read into the same :class:`Band`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from data_catalog.sources import Source
from geofm.remote.quarantine import Quarantine
from geofm.stac.item import is_number
from geofm.stac.supersede import text_of, version_key
from geofm.types import Json

#: Roles of assets that are pictures of the data, not the data.
_PICTURES = {"thumbnail", "overview", "visual"}
_SHA256 = re.compile(r"^1220([0-9a-f]{64})$")


@dataclass(frozen=True)
class Band:
    """One band of an item, as the item describes it; what it does not say is None.

    Attributes:
        name: common name (red, nir, ...).
        asset: asset key.
        index: position in the file, counted from 1.
        scale: reflectance per count, as stated.
        usual_scale: what the source profile knows where nothing is stated.
        offset: reflectance of count 0, not yet in the pixels.
        nodata: value of pixels without data.
        size: [height, width] that the item states for this very asset.
        sha256: hex, declared.
        bytes: size of the file as stated, 0 where it is not.
    """

    name: str
    asset: str
    href: str
    index: int
    scale: float | None
    usual_scale: float | None
    offset: float
    nodata: float | None
    size: tuple[int, int] | None
    transform: tuple[float, ...] | None
    sha256: str
    bytes: int = 0


def find_band(item: Json, name: str, source: Source) -> Band:
    """The band with a common name: by the source's profile, by asset key, by the band's metadata.

    Raises:
        Quarantine: ``missing_band``.
    """
    assets: dict[str, Json] = item["assets"]
    known = source.bands.get(name)
    if known is not None and known.asset in assets:
        place = _index(item, assets[known.asset], name) or known.index
        return _band(item, name, known.asset, place, source)
    if name in assets and is_data(assets[name]):
        return _band(item, name, name, _index(item, assets[name], name) or 1, source)
    found = []
    for key, asset in assets.items():
        index = _index(item, asset, name)
        if index is not None and is_data(asset):
            jp2 = "jp2" in str(asset.get("type", "")).lower()
            found.append((jp2, len(described(item, asset)), key, index))
    if not found and name in assets:
        kind = assets[name].get("type")
        raise Quarantine("not_imagery", f"the asset {name} is {kind!a:.60}, not TIFF or JPEG 2000")
    if not found:
        raise Quarantine("missing_band", f"no asset holds the band {name}; cut.bands asks for it")
    _, _, key, index = min(found)
    return _band(item, name, key, index, source)


def find_layer(item: Json, key: str) -> Band | None:
    """A layer that is not reflectance (clouds), None where the item lacks it."""
    asset = item["assets"].get(key)
    if asset is None:
        return None
    return Band(
        key,
        key,
        asset["href"],
        1,
        None,
        None,
        0.0,
        None,
        _size(asset),
        _to(asset),
        _sha(asset),
        file_size(asset),
    )


def is_data(asset: Json) -> bool:
    """Whether an asset is imagery rather than a picture of it."""
    roles = asset.get("roles") or []
    kind = str(asset.get("type") or "image/tiff").lower()
    raster = any(word in kind for word in ("tiff", "jp2", "octet-stream", "image/x-"))
    return raster and not _PICTURES & {role for role in roles if isinstance(role, str)}


def described(item: Json, asset: Json) -> list[Json]:
    """The asset's bands as objects; what is malformed is an empty one."""
    bands = asset.get("bands") or asset.get("eo:bands") or []
    old = item["properties"].get("eo:bands")
    old = old if isinstance(old, list) else []
    found = []
    for band in bands:
        if isinstance(band, int) and 0 <= band < len(old):  # STAC 0.9
            found.append(old[band])
        else:
            found.append(band)
    return [band if isinstance(band, dict) else {} for band in found]


def _index(item: Json, asset: Json, name: str) -> int | None:
    """Position (from 1) of the band in the asset."""
    bands = described(item, asset)
    for fields in (("eo:common_name", "common_name"), ("name",)):
        for number, band in enumerate(bands, start=1):
            if any(str(band.get(field, "")).lower() == name for field in fields):
                return number
    return None


def _band(item: Json, name: str, key: str, index: int, source: Source) -> Band:
    asset = item["assets"][key]
    places = _places(item, asset, index)
    scale = _number(places, "scale")
    nodata = _number(places, "nodata")
    return Band(
        name=name,
        asset=key,
        href=asset["href"],
        index=index,
        scale=scale if scale is not None and scale > 0 else None,
        usual_scale=source.default_scale,
        offset=_offset(item, places, scale or source.default_scale or 1.0, source),
        nodata=nodata if nodata is not None else source.default_nodata,
        size=_size(asset),
        transform=_to(asset),
        sha256=_sha(asset),
        bytes=file_size(asset),
    )


def _places(item: Json, asset: Json, index: int) -> list[Json]:
    """Where a band's radiometry may be written, the most particular first."""
    raster = asset.get("raster:bands") or []
    bands = described(item, asset)
    found = [b[index - 1] for b in (bands, raster) if 0 < index <= len(b)]
    return [place for place in (*found, asset) if isinstance(place, dict)]


def _number(places: list[Json], name: str) -> float | None:
    for place in places:
        for field in (f"raster:{name}", name):
            if is_number(place.get(field)):
                return float(place[field])
    return None


def _offset(item: Json, places: list[Json], scale: float, source: Source) -> float:
    """The offset still to be applied: zero where the provider says that it is in the pixels."""
    properties = item["properties"]
    if source.offset_applied and properties.get(source.offset_applied) is True:
        return 0.0
    stated = _number(places, "offset")
    if stated is not None:
        return stated
    rule = source.baseline_offset
    if rule is not None:
        version = text_of(properties.get(rule.property))
        if version and version_key(version) >= version_key(rule.since):
            return rule.counts * scale
    # who states a scale and no offset says that there is none
    return source.default_offset if _number(places, "scale") is None else 0.0


def _size(asset: Json) -> tuple[int, int] | None:
    size = asset.get("proj:shape")
    return (int(size[0]), int(size[1])) if size else None


def file_size(asset: Json) -> int:
    """``file:size`` in bytes, 0 where it is not stated."""
    size: Any = asset.get("file:size")
    return int(size) if is_number(size) and size > 0 else 0


def _to(asset: Json) -> tuple[float, ...] | None:
    to = asset.get("proj:transform")
    return tuple(float(v) for v in to[:6]) if to else None


def _sha(asset: Json) -> str:
    """SHA-256 of ``file:checksum`` (a multihash), empty for other digests."""
    found = _SHA256.match(str(asset.get("file:checksum", "")).lower())
    return found[1] if found else ""


def declared_crs(item: Json, key: str) -> str:
    """CRS that the asset or the item names (``EPSG:32631``), or empty."""
    for place in (item["assets"].get(key, {}), item["properties"]):
        if place.get("proj:code"):
            return str(place["proj:code"])
        if isinstance(place.get("proj:epsg") or place.get("eo:epsg"), int):
            return f"EPSG:{place.get('proj:epsg') or place.get('eo:epsg')}"
    return ""
