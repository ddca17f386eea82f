"""STAC items and collections of the planet, modelled on Sentinel-2 archives.

Hrefs are relative to the world's folder; the server makes them absolute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta

import numpy as np
import shapely
from pyproj import Transformer
from shapely.geometry import Polygon, box, mapping

from geofm.planet.scenery import spectra as sp
from geofm.planet.scenery.reflectance import Season
from geofm.planet.scenes import Product, Take, Tile, made_at
from geofm.types import Json

LICENCE = "CC0-1.0"
COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
SATELLITE, AERIAL = "planet-s2", "planet-hr"
EXTENSIONS = [
    "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
    "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
    "https://stac-extensions.github.io/grid/v1.1.0/schema.json",
    "https://stac-extensions.github.io/view/v1.0.0/schema.json",
    "https://stac-extensions.github.io/sat/v1.0.0/schema.json",
    "https://stac-extensions.github.io/processing/v1.1.0/schema.json",
]
_WAVES = {
    "blue": (0.490, 0.098), "green": (0.560, 0.045), "red": (0.665, 0.038), "nir": (0.842, 0.145),
    "swir16": (1.610, 0.143),
}  # fmt: skip
PROVIDERS = [{"name": "geofm", "roles": ["producer", "licensor", "host"]}]


def _rfc3339(moment: datetime) -> str:
    """Format a time as RFC 3339 with milliseconds."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def _compact(moment: datetime) -> str:
    """Format a time as in product names: 20240428T104021."""
    return moment.strftime("%Y%m%dT%H%M%S")


def to_degrees(area: Polygon, epsg: int) -> Polygon:
    """Transform a polygon into EPSG:4326, with points along its edges."""
    transformation = Transformer.from_crs(f"EPSG:{epsg}", "EPSG:4326", always_xy=True)
    dense = shapely.segmentize(area, max(area.length / 32, 1))
    points = np.column_stack(transformation.transform(*np.asarray(dense.exterior.coords).T))
    return Polygon(np.round(points, 7).tolist())


def footprint(tile: Tile, swath: float | None) -> Polygon:
    """Return the ground with data, in the tile's CRS; see ``sensors.swath_gap``."""
    west, south, east, north = tile.extent
    if swath is None:
        return box(west, south, east, north)
    edge, slant = tile.size * tile.gsd, 0.21
    top = west + edge * (swath + slant / 2)
    bottom = west + edge * (swath - slant / 2)
    data = Polygon([(west, north), (top, north), (bottom, south), (west, south)])
    return data.intersection(box(west, south, east, north))


def item_id(tile: Tile, product: Product, take: Take) -> str:
    """Return the id of a satellite item; a second copy or a reprocessing has an id of its own."""
    copy = product.sequence
    if product.baseline >= "05.00" and product.made > 100:
        copy += 1
    return f"{take.satellite}_{tile.name}_{take.moment:%Y%m%d}_{copy}_L2A"


def asset_of(
    name: str, href: str, data: bytes, tile: Tile, *, kind: str, offset: float, cell: int = 1
) -> Json:
    """Describe an asset with its radiometry, grid, size and checksum.

    Args:
        name: Name of the band.
        href: Relative address.
        data: Bytes of the file.
        tile: The tile.
        kind: Data type of the pixels.
        offset: Reflectance of count 0.
        cell: Edge of a pixel of the band, in pixels of the tile.
    """
    gsd = tile.gsd * cell
    raster: Json = {"nodata": 0, "data_type": kind, "spatial_resolution": gsd}
    if kind == "uint16":
        raster |= {"bits_per_sample": 15, "scale": 0.0001, "offset": offset}
    asset: Json = {
        "href": href,
        "type": COG_TYPE,
        "title": f"{name} - {gsd:g} m",
        "roles": ["data"],
        "gsd": gsd,
        "raster:bands": [raster],
        "proj:shape": [tile.size // cell, tile.size // cell],
        "proj:transform": [gsd, 0.0, tile.west, 0.0, -gsd, tile.north],
        **checksum(data),
    }
    if name in sp.BANDS:
        wave, width = _WAVES[name]
        asset["roles"] = ["data", "reflectance"] if kind == "uint16" else ["data"]
        asset["eo:bands"] = [
            {"name": name, "common_name": name, "center_wavelength": wave,
             "full_width_half_max": width}
        ]  # fmt: skip
    return asset


def checksum(data: bytes) -> Json:
    """Return ``file:size`` and ``file:checksum`` (a multihash of SHA-256)."""
    return {"file:size": len(data), "file:checksum": "1220" + hashlib.sha256(data).hexdigest()}


def satellite_item(
    tile: Tile, product: Product, take: Take, season: Season, assets: Json, shares: Json
) -> Json:
    """Make an item of ``planet-s2``.

    Args:
        tile: The tile.
        product: The product.
        take: The overpass.
        season: The season, with the direction of the sun.
        assets: The assets, by key.
        shares: Percentages to state, e.g. ``eo:cloud_cover``.
    """
    made = made_at(product, take)
    number = product.baseline.replace(".", "")
    # Tiles of a datatake are sensed seconds apart, southern tiles later.
    sensed = take.moment + timedelta(milliseconds=6000 + round((5_030_000 - tile.north) / 6.8))
    sat = take.satellite
    strip = f"{sat}_OPER_MSI_L2A_DS_{product.station}_{_compact(made)}_S{_compact(take.moment)}"
    uri = f"{sat}_MSIL2A_{_compact(take.moment)}_N{number}_R{take.relative_orbit:03d}_T{tile.name}"
    properties = {
        "datetime": _rfc3339(sensed),
        "created": _rfc3339(made + timedelta(hours=2)),
        "updated": _rfc3339(made + timedelta(hours=2)),
        "platform": f"sentinel-2{sat[-1].lower()}",
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "license": LICENCE,
        "providers": PROVIDERS,
        "grid:code": f"PLANET-{tile.name}",
        "sat:orbit_state": "descending",
        "sat:relative_orbit": take.relative_orbit,
        "sat:absolute_orbit": take.orbit,
        "view:off_nadir": 0,
        "s2:datatake_id": f"G{sat}_{_compact(take.moment)}_{take.orbit:06d}_N{product.baseline}",
        "s2:processing_baseline": product.baseline,
        "s2:generation_time": _rfc3339(made),
        "s2:sequence": str(product.sequence),
        "s2:product_uri": f"{uri}_{_compact(made)}.SAFE",
        "s2:datastrip_id": f"{strip}_N{product.baseline}",
        "s2:product_type": "S2MSI2A",
        "processing:level": "L2A",
        **shares,
    }
    area = footprint(tile, product.swath)
    return _item(item_id(tile, product, take), SATELLITE, tile, area, properties, season, assets)


def aerial_item(tile: Tile, take: Take, season: Season, assets: Json) -> Json:
    """Make an item of ``planet-hr``."""
    properties = {
        "datetime": _rfc3339(take.moment + timedelta(seconds=int(tile.name[1:]) * 41)),
        "created": _rfc3339(take.moment + timedelta(days=60)),
        "platform": take.satellite,
        "constellation": "geofm-aerial",
        "instruments": ["camera"],
        "license": LICENCE,
        "providers": PROVIDERS,
        "eo:cloud_cover": 0.0,
    }
    name = f"HR_{tile.name}_{take.moment:%Y%m%d}"
    return _item(name, AERIAL, tile, footprint(tile, None), properties, season, assets)


def _item(
    name: str, collection: str, tile: Tile, area: Polygon, properties: Json, season: Season,
    assets: Json,
) -> Json:  # fmt: skip
    """Make an item with the fields that both collections share."""
    degrees = to_degrees(area, tile.epsg)
    grid = {
        "gsd": tile.gsd,
        "proj:code": f"EPSG:{tile.epsg}",
        "proj:epsg": tile.epsg,
        "proj:shape": [tile.size, tile.size],
        "proj:transform": [tile.gsd, 0.0, tile.west, 0.0, -tile.gsd, tile.north],
        "view:sun_azimuth": round(season.sun.azimuth, 3),
        "view:sun_elevation": round(season.sun.elevation, 3),
        "description": tile.about,
    }
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": EXTENSIONS,
        "id": name,
        "collection": collection,
        "bbox": list(degrees.bounds),
        "geometry": mapping(degrees),
        "properties": {**properties, **grid},
        "assets": assets,
        "links": [],
    }


def collection_of(name: str, items: Sequence[Json]) -> Json:
    """Make a collection with the extent of its items."""
    boxes = np.array([item["bbox"] for item in items])
    times = sorted(item["properties"]["datetime"] for item in items)
    about = {
        SATELLITE: ("Procedural Earth, Sentinel-2 manner", "Surface reflectance at 10 and 20 m"),
        AERIAL: ("Procedural Earth, aerial manner", "8-bit camera imagery at 2.5 m"),
    }[name]
    return {
        "type": "Collection",
        "stac_version": "1.0.0",
        "id": name,
        "title": about[0],
        "description": f"{about[1]} of a generated world. No real place is shown.",
        "license": LICENCE,
        "keywords": ["synthetic", "geofm"],
        "providers": PROVIDERS,
        "extent": {
            "spatial": {"bbox": [[*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)]]},
            "temporal": {"interval": [[times[0], times[-1]]]},
        },
        "links": [],
    }
