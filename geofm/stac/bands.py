"""Bands of an item by common name, for items of STAC 0.9 to 1.1.

STAC 1.1 describes bands with ``bands``, older versions with ``eo:bands`` and ``raster:bands``. In
STAC 0.9 the item has the list and the asset has positions in it. All become the same :class:`Band`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from data_catalog.sources import Source
from geofm.remote.quarantine import Quarantine
from geofm.stac.item import is_number, text_of
from geofm.stac.supersede import version_key
from geofm.types import Json

#: Roles of assets that are renderings of the data.
_RENDERINGS = {"thumbnail", "overview", "visual"}
_SHA256 = re.compile(r"^1220([0-9a-f]{64})$")


@dataclass(frozen=True)
class Band:
    """A band of an item, as the item describes it; None if not stated.

    Attributes:
        name: Common name (red, nir, ...).
        asset: Asset key.
        href: Address of the asset.
        index: Position in the file, from 1.
        scale: Reflectance per count, as the item states it.
        usual_scale: Reflectance per count by the source profile, for items that state none.
        offset: Reflectance of count 0 that is not yet in the pixels.
        nodata: Value of pixels without data.
        size: Height and width that the asset states, in pixels.
        transform: Affine coefficients a, b, c, d, e, f that the asset states.
        sha256: Stated SHA-256 of the file, hex; empty if not stated.
        bytes: Stated size of the file; 0 if not stated.
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
    """Find a band by the source profile, else by asset key, else by the metadata of the bands.

    Raises:
        Quarantine: ``missing_band``, or ``not_imagery`` if the asset is of another media type.
    """
    assets: dict[str, Json] = item["assets"]
    known = source.bands.get(name)
    if known is not None and known.asset in assets:
        index = _index(item, assets[known.asset], name) or known.index
        return _band(item, name, known.asset, index, source)
    if name in assets and is_data(assets[name]):
        return _band(item, name, name, _index(item, assets[name], name) or 1, source)
    candidates = []
    for key, asset in assets.items():
        position = _index(item, asset, name)
        if position is not None and is_data(asset):
            jp2 = "jp2" in str(asset.get("type", "")).lower()
            candidates.append((jp2, len(described_bands(item, asset)), key, position))
    if not candidates and name in assets:
        kind = assets[name].get("type")
        raise Quarantine("not_imagery", f"the asset {name} is {kind!a:.60}, not TIFF or JPEG 2000")
    if not candidates:
        raise Quarantine("missing_band", f"no asset holds the band {name} of cut.bands")
    _, _, key, index = min(candidates)  # TIFF before JPEG 2000, then the fewest bands
    return _band(item, name, key, index, source)


def find_layer(item: Json, key: str) -> Band | None:
    """Find a layer that is not reflectance, such as clouds; None if the item lacks it."""
    asset = item["assets"].get(key)
    if asset is None:
        return None
    return Band(
        name=key,
        asset=key,
        href=asset["href"],
        index=1,
        scale=None,
        usual_scale=None,
        offset=0.0,
        nodata=None,
        size=_size(asset),
        transform=_transform(asset),
        sha256=_sha256_of(asset),
        bytes=file_size(asset),
    )


def is_data(asset: Json) -> bool:
    """Check whether an asset is imagery, not a rendering of it."""
    roles = asset.get("roles") or []
    kind = str(asset.get("type") or "image/tiff").lower()
    is_raster = any(word in kind for word in ("tiff", "jp2", "octet-stream", "image/x-"))
    return is_raster and not _RENDERINGS & {role for role in roles if isinstance(role, str)}


def described_bands(item: Json, asset: Json) -> list[Json]:
    """Return the descriptions of an asset's bands; a malformed description is empty."""
    bands = asset.get("bands") or asset.get("eo:bands") or []
    item_bands = item["properties"].get("eo:bands")
    item_bands = item_bands if isinstance(item_bands, list) else []
    descriptions = [
        # STAC 0.9: a position in the item's list
        item_bands[band] if isinstance(band, int) and 0 <= band < len(item_bands) else band
        for band in bands
    ]
    return [band if isinstance(band, dict) else {} for band in descriptions]


def _index(item: Json, asset: Json, name: str) -> int | None:
    """Return the position of a band in the asset, from 1, by common name, else by name."""
    bands = described_bands(item, asset)
    for fields in (("eo:common_name", "common_name"), ("name",)):
        for number, band in enumerate(bands, start=1):
            if any(str(band.get(field, "")).lower() == name for field in fields):
                return number
    return None


def _band(item: Json, name: str, key: str, index: int, source: Source) -> Band:
    """Read the description of a band."""
    asset = item["assets"][key]
    objects = _radiometry_objects(item, asset, index)
    scale = _number(objects, "scale")
    nodata = _number(objects, "nodata")
    return Band(
        name=name,
        asset=key,
        href=asset["href"],
        index=index,
        scale=scale if scale is not None and scale > 0 else None,
        usual_scale=source.default_scale,
        offset=_offset(item, objects, scale or source.default_scale or 1.0, source),
        nodata=nodata if nodata is not None else source.default_nodata,
        size=_size(asset),
        transform=_transform(asset),
        sha256=_sha256_of(asset),
        bytes=file_size(asset),
    )


def _radiometry_objects(item: Json, asset: Json, index: int) -> list[Json]:
    """Return the objects that may state a band's radiometry, the most specific first."""
    raster_bands = asset.get("raster:bands") or []
    lists = (described_bands(item, asset), raster_bands)
    objects = [bands[index - 1] for bands in lists if 0 < index <= len(bands)]
    return [content for content in (*objects, asset) if isinstance(content, dict)]


def _number(objects: list[Json], name: str) -> float | None:
    """Return the first number of a name, with or without the prefix ``raster:``."""
    for content in objects:
        for field in (f"raster:{name}", name):
            if is_number(content.get(field)):
                return float(content[field])
    return None


def _offset(item: Json, objects: list[Json], scale: float, source: Source) -> float:
    """Return the offset that is still to be applied; 0 if the pixels contain it already."""
    properties = item["properties"]
    if source.offset_applied and properties.get(source.offset_applied) is True:
        return 0.0
    stated = _number(objects, "offset")
    if stated is not None:
        return stated
    rule = source.baseline_offset
    if rule is not None:
        version = text_of(properties.get(rule.property))
        if version and version_key(version) >= version_key(rule.since):
            return rule.counts * scale
    # An item that states a scale and no offset has no offset.
    return source.default_offset if _number(objects, "scale") is None else 0.0


def _size(asset: Json) -> tuple[int, int] | None:
    """Return the stated height and width."""
    size = asset.get("proj:shape")
    return (int(size[0]), int(size[1])) if size else None


def file_size(asset: Json) -> int:
    """Return the stated ``file:size`` in bytes; 0 if not stated."""
    size: Any = asset.get("file:size")
    return int(size) if is_number(size) and size > 0 else 0


def _transform(asset: Json) -> tuple[float, ...] | None:
    """Return the stated affine coefficients."""
    coefficients = asset.get("proj:transform")
    return tuple(float(v) for v in coefficients[:6]) if coefficients else None


def _sha256_of(asset: Json) -> str:
    """Return the SHA-256 in ``file:checksum`` (a multihash); empty for other digests."""
    match = _SHA256.match(str(asset.get("file:checksum", "")).lower())
    return match[1] if match else ""


def declared_crs(item: Json, key: str) -> str:
    """Return the CRS that the asset or the item states, e.g. ``EPSG:32631``; empty if none."""
    for fields in (item["assets"].get(key, {}), item["properties"]):
        if fields.get("proj:code"):
            return str(fields["proj:code"])
        code = fields.get("proj:epsg") or fields.get("eo:epsg")
        if isinstance(code, int):
            return f"EPSG:{code}"
    return ""
