"""Generate scenes for benchmarks: COGs as large as Sentinel-2's, at many places from few files.

Pixels are smooth noise with a fine texture that compresses like real scenes (about 1.3 of 2 bytes
per pixel). ``range_server.py`` serves each item at its own place by writing another corner into the
header.
"""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from pyproj import Transformer
from rasterio.shutil import copy
from scipy.ndimage import zoom

BANDS = ("red", "green", "blue", "nir")
EPSG, WEST, NORTH, GSD = 32631, 300_000.0, 1_300_020.0, 10.0
#: Items beside each other; all stay within the UTM zone.
COLUMNS = {10_980: 4, 2815: 15}


def make_world(folder: Path, edge: int, items: int) -> None:
    """Write ``assets``, ``items.json``, ``collection.json`` and ``patches.json``, once.

    Args:
        folder: Target folder; kept from an earlier call with the same arguments.
        edge: Edge of a scene in pixels: 10,980, or 2,815 (which always contains 100 cells of 256).
        items: Number of items.
    """
    done = folder / "made.json"
    what = {"edge": edge, "items": items, "version": 1}
    if done.exists() and json.loads(done.read_bytes()) == what:
        return
    (folder / "assets").mkdir(parents=True, exist_ok=True)
    for number, band in enumerate(BANDS):
        write_band(folder / "assets" / f"{band}.tif", edge, number)
    listed, patches = [], {}
    for number in range(items):
        item = make_item(number, edge)
        listed.append(item)
        west, north = corner(number, edge)
        for band in BANDS:
            file = folder / "assets" / f"{band}.tif"
            at = file.open("rb").read(65_536).find(tiepoint(WEST, NORTH))
            patches[item["assets"][band]["href"]] = {
                "file": file.name, "at": at, "hex": tiepoint(west, north).hex(),
            }  # fmt: skip
    extent = {
        "spatial": {"bbox": [[-180, -90, 180, 90]]},
        "temporal": {"interval": [["2020-01-01T00:00:00Z", None]]},
    }
    collection = {"type": "Collection", "id": "bench", "stac_version": "1.0.0", "links": [],
                  "description": "generated", "license": "CC0-1.0", "extent": extent}  # fmt: skip
    written = {"items": listed, "collection": collection, "patches": patches, "made": what}
    for name, content in written.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_band(path: Path, edge: int, seed: int) -> None:
    """Write a band as a COG: deflate, predictor 2, blocks of 256, overviews."""
    draw = np.random.default_rng(seed)
    coarse = draw.normal(0, 1, (edge // 64 + 2, edge // 64 + 2)).astype(np.float32)
    pixels = zoom(coarse, 64, order=1)[:edge, :edge] * 350 + 1500
    pixels += draw.standard_normal((edge, edge), dtype=np.float32) * 28
    plain = {
        "driver": "GTiff", "height": edge, "width": edge, "count": 1, "dtype": "uint16",
        "crs": EPSG, "transform": Affine(GSD, 0, WEST, 0, -GSD, NORTH), "nodata": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=path.parent) as inner:
        temporary = Path(inner) / "plain.tif"
        with rasterio.open(temporary, "w", **plain) as file:
            file.write(np.clip(pixels, 1, 12_000).astype(np.uint16), 1)
        copy(temporary, path, driver="COG", compress="deflate", predictor="2", blocksize=256,
             overview_resampling="average", num_threads="2")  # fmt: skip


def corner(number: int, edge: int) -> tuple[float, float]:
    """Return west and north of an item."""
    column, row = number % COLUMNS[edge], number // COLUMNS[edge]
    return WEST + column * edge * GSD, NORTH - row * edge * GSD


def tiepoint(west: float, north: float) -> bytes:
    """Make the GeoTIFF tag with the position of the upper left corner."""
    return struct.pack("<6d", 0, 0, 0, west, north, 0)


def make_item(number: int, edge: int) -> dict[str, Any]:
    """Make a STAC item."""
    name = f"scene-{number:04d}"
    hrefs = {band: f"{name}/{band}.tif" for band in BANDS}
    return stac_item(name, "bench", corner(number, edge), edge, hrefs, "2020-06-01T10:00:00Z")


def stac_item(
    name: str,
    collection: str,
    west_north: tuple[float, float],
    edge: int,
    hrefs: dict[str, str],
    taken: str,
) -> dict[str, Any]:
    """Make the STAC item of a square scene of uint16 counts.

    Args:
        name: id of the item.
        collection: id of its collection.
        west_north: upper left corner in the CRS ``EPSG``, metres.
        edge: edge in pixels of ``GSD``.
        hrefs: address of each band's file, by common name.
        taken: time, RFC 3339.
    """
    west, north = west_north
    east, south = west + edge * GSD, north - edge * GSD
    move = Transformer.from_crs(EPSG, 4326, always_xy=True).transform
    corners = ((west, south), (east, south), (east, north), (west, north), (west, south))
    ring = [list(move(x, y)) for x, y in corners]
    lons, lats = zip(*ring, strict=True)
    assets = {
        band: {
            "href": href, "roles": ["data"],
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "eo:bands": [{"name": band, "common_name": band}],
            "raster:bands": [{"nodata": 0, "scale": 0.0001, "offset": 0, "data_type": "uint16"}],
            "proj:shape": [edge, edge], "proj:transform": [GSD, 0, west, 0, -GSD, north],
        }
        for band, href in hrefs.items()
    }  # fmt: skip
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection,
        "stac_extensions": [
            "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
            "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
            "https://stac-extensions.github.io/projection/v1.1.0/schema.json"],
        "bbox": [min(lons), min(lats), max(lons), max(lats)],
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"datetime": taken, "proj:epsg": EPSG, "eo:cloud_cover": 0},
        "assets": assets, "links": [],
    }  # fmt: skip
